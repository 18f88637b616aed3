"""The kernel log while we use KVM: the first line that says something went wrong.

Records of /dev/kmsg (Documentation/ABI/testing/dev-kmsg) are read from where the log ends when the
watch begins. A warning is

* from anybody in the kernel: one of `ALARMS`;
* of KVM: priority `warning` or worse, but for the lines in `HARMLESS`, which KVM writes about what
  a guest or user space did, and for those that name another process.
"""

import os
import re
from collections.abc import Callable, Iterator

from kvmtick.abi.closing import Closing
from kvmtick.abi.errors import HostError

__all__ = ["ALARMS", "HARMLESS", "KMSG_PATH", "KernelLog", "is_warning"]

KMSG_PATH = "/dev/kmsg"
RECORD_BYTES = 8192
"""CONSOLE_EXT_LOG_MAX: no record is longer."""
LOG_WARNING = 4

ALARMS = re.compile(
    r"WARNING:|BUG:|\bOops\b|Call Trace:|INFO: task |general protection fault|Kernel panic"
    r"|rcu: INFO|soft lockup|refcount_t:|KASAN|UBSAN|unregister_netdevice"
)

_OTHER_PROCESS = re.compile(r"\bkvm \[(\d+)\]|\bpid (\d+)\b")
_KVM = re.compile(r"\bkvm", re.IGNORECASE)

HARMLESS = tuple(
    map(
        re.compile,
        (
            r"requested \d+ ns (i8254|lapic) timer period limited to \d+ ns",
            r"pic: (non byte (read|write)|level sensitive irq not supported|single mode not)",
            r"apic: phys broadcast and lowest prio",
            r"Disabled LAPIC found during irq injection",
            r"requested lapic timer restore with starting count register",
            r"[Uu]nhandled (WR|RD)MSR|ignored (wr|rd)msr",
            r"user requested TSC rate below hardware speed",
            r"debugfs: duplicate directory",
            r"callbacks suppressed",
            # a guest that is lost, on a host whose back end emulates instructions
            r"kvm-pvm: INTERNAL_ERROR in batch emul",
            r"kvm-pvm: triple fault delivering",
            r"kvm-pvm:.* the VMM set CR0\.PG with EFER\.LME clear",
        ),
    )
)
"""What KVM writes in the ordinary course of a test of it."""


def is_warning(priority: int, text: str, pid: int) -> bool:
    """Whether a record says that something went wrong under process `pid`."""
    if ALARMS.search(text):
        return True
    if priority & 7 > LOG_WARNING or not _KVM.search(text):
        return False
    if any(harmless.search(text) for harmless in HARMLESS):
        return False
    other = _OTHER_PROCESS.search(text)
    return other is None or pid in (int(each) for each in other.groups() if each)


class KernelLog(Closing):
    """The kernel log from now on. Raises HostError where it cannot be read."""

    def __init__(self, path: str = KMSG_PATH, read: Callable[[int, int], bytes] = os.read) -> None:
        self._fd = -1
        self._read = read
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            os.lseek(self._fd, 0, os.SEEK_END)
        except OSError as error:
            self.close()
            raise HostError(
                f"{path} cannot be read ({error.strerror})", "read it as root, or watch dmesg"
            ) from None

    def new_warning(self) -> str | None:
        """The first warning since the last call; None: there was none."""
        pid = os.getpid()
        warnings = (text for priority, text in self._records() if is_warning(priority, text, pid))
        first = next(warnings, None)
        for _ in warnings:
            pass
        return first

    def _records(self) -> Iterator[tuple[int, str]]:
        """Priority and text of what was logged since the last call."""
        while True:
            try:
                record = self._read(self._fd, RECORD_BYTES).decode(errors="replace")
            except BlockingIOError:
                return
            except BrokenPipeError:
                continue  # records were overwritten before we read them: go on with the oldest
            head, _, text = record.partition(";")
            priority = head.partition(",")[0]
            if not priority.isdigit():
                return
            yield int(priority), text.partition("\n")[0]

    def close(self) -> None:
        """Give the descriptor back; harmless when repeated."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
