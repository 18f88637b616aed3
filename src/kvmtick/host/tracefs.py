"""The kernel's tracefs: a private instance with the events of a tick, and its text.

`find_tracefs` uses a tracefs that is mounted, `open_tracefs` else mounts one that has no place in
the file tree (fsmount(2)): it is gone with its descriptor, whatever ends the process. An
`Instance` is a directory of `instances/`, apart from the host's own tracing; it is removed by the
context manager, at exit, and, where the process was killed, by the next one that makes an
instance. Events are named `system:event`, as in the kernel's `set_event`.

Raw pages and format texts are handed out as they are: `kvmtick.trace` reads them.

Source: Documentation/trace/ftrace.rst, events.rst. Not here: triggers, tracers.
"""

import atexit
import ctypes
import errno
import itertools
import math
import mmap
import os
import re
import select
import signal
import threading
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Final

from kvmtick.abi import HostError
from kvmtick.abi.closing import Closing

__all__ = [
    "TICK_EVENTS",
    "Instance",
    "Lost",
    "Tracefs",
    "find_tracefs",
    "is_locked_down",
    "open_tracefs",
]

_TIMER_FILTER = "function.function == pit_timer_fn || function.function == apic_timer_fn"

TICK_EVENTS: Final[Mapping[str, str]] = {
    "kvm:kvm_pio": "",
    "kvm:kvm_set_irq": "",
    "kvm:kvm_pic_set_irq": "",
    "kvm:kvm_ioapic_set_irq": "",
    "kvm:kvm_ack_irq": "",
    "kvm:kvm_eoi": "",
    "kvm:kvm_apic_accept_irq": "",
    "kvm:kvm_apic_ipi": "",
    "kvm:kvm_msi_set_irq": "",
    "kvm:kvm_inj_virq": "",
    "kvm:kvm_entry": "intr_info == 0x80000200 || intr_info == 0x80000202",
    "kvm:kvm_apic": "rw == 1 && (reg == 0x320 || reg == 0xf0)",
    "kvm:kvm_mmio": "type == 2 && (gpa == 0xfee000b0 || gpa == 0xfec00000 || gpa == 0xfec00010)",
    "kvm:kvm_msr": "write == 1 && ecx == 0x1b",
    "kvm:kvm_apicv_inhibit_changed": "",
    "kvm:kvm_vcpu_wakeup": "",
    "timer:hrtimer_start": _TIMER_FILTER,
    "timer:hrtimer_expire_entry": _TIMER_FILTER,
    "sched:sched_kthread_work_queue_work": "function.function == pit_do_work",
    "sched:sched_kthread_work_execute_start": "function.function == pit_do_work",
    "sched:sched_kthread_work_execute_end": "function.function == pit_do_work",
}
"""The life of a tick: events, and the filter that keeps out what says nothing of one.

Of kvm_entry those with an NMI (both vendors' numbers), of kvm_apic writes of the timer's LVT entry
and of SVR, of kvm_mmio writes of the local APIC's EOI and of the IOAPIC, of kvm_msr of the APIC's
base.
"""

_PREFIX = "kvmtick"
_MOUNT_REMEDY = "mount -t tracefs tracefs /sys/kernel/tracing (as root)"
_READ_REMEDY = "run as root, or: mount -o remount,gid=GROUP,mode=750 PATH"
_LOCKDOWN_REMEDY = "boot with lockdown=integrity, or without Secure Boot"
_REMEDIES = {
    errno.EACCES: _READ_REMEDY,
    errno.EPERM: _READ_REMEDY,
    errno.EROFS: "mount -o remount,rw PATH (as root)",
    errno.EBUSY: "tracing is busy: close the programs that read or map this instance",
    errno.ENOMEM: "there is no memory for that: ask for smaller buffers",
    errno.ENODEV: "the kernel has switched tracing off (see dmesg): it needs a reboot",
}
LOCKDOWN = Path("/sys/kernel/security/lockdown")


@dataclass(frozen=True, slots=True)
class Lost:
    """Events that did not make it into the buffers, summed over the CPUs (per_cpu/*/stats)."""

    overrun: int
    """Overwritten by newer ones."""
    dropped: int
    """Not written: the buffer was full and overwriting is off."""
    commit_overrun: int
    """Not written: they came nested too deeply."""

    @property
    def total(self) -> int:
        """All of them."""
        return self.overrun + self.dropped + self.commit_overrun


class Tracefs(Closing):
    """A tracefs at `root`; `mounted` names the mount point, None for a private mount."""

    def __init__(self, root: Path, mounted: Path | None, fd: int = -1) -> None:
        self.root = root
        self.mounted = mounted
        self._fd = fd

    def read(self, name: str) -> str:
        """A file's text. Raises `HostError`."""
        with _told(self.root / name):
            return (self.root / name).read_text(errors="replace")

    def has_event(self, event: str) -> bool:
        """Whether this kernel has `system:event`, and we may look at it."""
        try:
            return (self.root / "events" / _event_path(event)).is_dir()
        except OSError:
            return False

    def comms(self) -> dict[int, str]:
        """Names of the threads that were traced lately, by pid (`saved_cmdlines`)."""
        lines = self.read("saved_cmdlines").splitlines()
        found = (line.partition(" ") for line in lines)
        return {int(pid): comm for pid, _, comm in found if pid.isdigit()}

    def format_text(self, event: str) -> str:
        """An event's `format` file: names, offsets and sizes of its fields."""
        return self.read(f"events/{_event_path(event)}/format")

    def functions(self, *names: str) -> dict[int, str]:
        """Kernel functions by address, as raw records have them (/proc/kallsyms).

        Raises `HostError` where addresses are hidden.
        """
        found = _addresses(set(names))
        if not found:
            raise HostError(
                f"the kernel hides the address of {names[0]}",
                "run as root, and with kernel.kptr_restrict at most 1",
            )
        return found

    def instances(self) -> list[str]:
        """Names of the instances there are, ours and others'."""
        with _told(self.root / "instances"):
            return sorted(path.name for path in (self.root / "instances").iterdir())

    def remove_leftovers(self) -> list[str]:
        """Remove instances left by processes of ours that are dead; their names."""
        removed = []
        for name in self.instances():
            if _is_leftover(name):
                with suppress(OSError):
                    _remove(self.root / "instances" / name)
                    removed.append(name)
        return removed

    def instance(self) -> "Instance":
        """A new instance, tracing off; leftovers are removed first. Raises `HostError`."""
        self.remove_leftovers()
        return Instance(self)

    def close(self) -> None:
        """End a private mount; harmless when repeated."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        self.close()


_serial = itertools.count()
_live: "weakref.WeakSet[Instance]" = weakref.WeakSet()


class Instance:
    """A trace instance of our own: `with tracefs.instance() as trace:`.

    Buffer and events are set while it is off; `start` and `stop` switch it. In the main thread
    SIGTERM and SIGHUP, where nobody handles them, unwind the `with` instead of ending the
    process in the middle of it.
    """

    def __init__(self, tracefs: Tracefs) -> None:
        self.tracefs = tracefs
        self.name = f"{_PREFIX}-{_pid_namespace()}-{os.getpid()}-{next(_serial)}"
        self.path = tracefs.root / "instances" / self.name
        self._handlers: dict[int, object] = {}
        self._pipes: dict[int, int] = {}
        with _told(self.path):
            self.path.mkdir()
        self._pid = os.getpid()
        _live.add(self)
        try:
            self.write("tracing_on", "0")
            self.write("trace_clock", "mono")
        except BaseException:
            self.close()
            raise

    def write(self, name: str, text: str) -> None:
        """Write a control file of the instance. Raises `HostError`."""
        with _told(self.path / name):
            (self.path / name).write_text(text)

    def read(self, name: str) -> str:
        """A control file's text. Raises `HostError`."""
        with _told(self.path / name):
            return (self.path / name).read_text(errors="replace")

    def set_buffer_size(self, kib: int) -> None:
        """KiB of buffer for each CPU (`buffer_size_kb`). Raises `HostError`."""
        self.write("buffer_size_kb", str(kib))

    def enable(self, event: str, filter_: str = "") -> None:
        """Record `system:event`, if given only what passes `filter_` (events.rst, section 5).

        Raises `HostError` where this kernel has no such event or refuses the filter.
        """
        if not self.tracefs.has_event(event):
            raise HostError(
                f"this kernel has no trace event {event}", "see available_events in tracefs"
            )
        if filter_:
            self.set_filter(event, filter_)
        self.write(f"events/{_event_path(event)}/enable", "1")

    def set_filter(self, event: str, filter_: str) -> None:
        """Record of an event only what passes `filter_` from now on; "0": all. Nothing passes a
        comparison with a field that came with a later kernel.
        """
        where = f"events/{_event_path(event)}/filter"
        try:
            self.write(where, filter_)
        except HostError as error:
            # kernels before 6.3 do not know `.function`: ask for the address instead
            older = _function_filter(filter_) or _without_later(filter_)
            if not older:
                what = f"{where} was refused: {filter_} ({error.what})"
                raise HostError(what, "is the module with that function loaded?") from None
            self.write(where, older)

    def enable_known(self, events: Mapping[str, str] = TICK_EVENTS) -> list[str]:
        """Enable those of `events` (name: filter) the kernel has; the names of the others."""
        missing = [event for event in events if not self.tracefs.has_event(event)]
        for event, filter_ in events.items():
            if event not in missing:
                self.enable(event, filter_)
        return missing

    def start(self) -> None:
        """Record from now on."""
        self.write("tracing_on", "1")

    def stop(self) -> None:
        """Record no more; what was recorded stays."""
        self.write("tracing_on", "0")

    def clear(self) -> None:
        """Forget what was recorded."""
        self.write("trace", "")

    def text(self) -> str:
        """What was recorded, as ftrace text with its header; stays in the buffer."""
        return self.read("trace")

    def pages(self, is_full: Callable[[bytes], bool] | None = None) -> Iterator[tuple[int, bytes]]:
        """What was recorded since the last time as `(cpu, page)`, each CPU's in order; never waits.

        It leaves the buffer. `is_full`: leave a CPU where a page is not (the first may be the rest
        of one): where events come fast there are always some more, a few on each page. Raises
        `HostError`.
        """
        if not self._pipes:
            self._open_pipes()
        size_bytes = self._page_bytes()
        for cpu, fd in self._pipes.items():
            with _told(self.path / "trace_pipe_raw"):
                is_first = True
                while page := _read_page(fd, size_bytes):
                    yield cpu, page
                    if is_full is not None and not is_first and not is_full(page):
                        break
                    is_first = False

    def _open_pipes(self) -> None:
        for where in self.path.glob("per_cpu/cpu*"):
            pipe = where / "trace_pipe_raw"
            with _told(pipe):
                flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
                self._pipes[int(where.name.removeprefix("cpu"))] = os.open(pipe, flags)

    def _page_bytes(self) -> int:
        """A page of the buffer; kernels of before 6.8 have no choice."""
        name = "buffer_subbuf_size_kb"
        return int(self.read(name)) << 10 if (self.path / name).exists() else mmap.PAGESIZE

    def wait(self, timeout_s: float, others: Collection[int] = ()) -> None:
        """Until a CPU's buffer is full to `buffer_percent`, one of the descriptors `others` can be
        read, or the time is over.
        """
        if not self._pipes:
            self._open_pipes()
        poll = select.poll()
        for fd in (*self._pipes.values(), *others):
            poll.register(fd, select.POLLIN)
        poll.poll(math.ceil(timeout_s * 1000))

    def lost(self) -> Lost:
        """How many events were lost so far."""
        return Lost(*self._stats("overrun", "dropped events", "commit overrun"))

    def recorded(self) -> int:
        """How many events got into the buffers so far, and were not overwritten."""
        return sum(self._stats("entries", "read events"))

    def _stats(self, *keys: str) -> list[int]:
        """Numbers of per_cpu/*/stats, summed over the CPUs."""
        sums = dict.fromkeys(keys, 0)
        for stats in sorted(self.path.glob("per_cpu/cpu*/stats")):
            with _told(stats):
                lines = stats.read_text().splitlines()
            for key, _, value in (line.partition(": ") for line in lines):
                if key in sums:
                    sums[key] += int(value)
        return list(sums.values())

    def close(self) -> None:
        """Stop and remove the instance; harmless when repeated.

        Raises `HostError` where it cannot be removed (somebody has one of its files open).
        """
        if self not in _live:
            return
        _live.discard(self)
        while self._pipes:
            os.close(self._pipes.popitem()[1])
        # a forked child must not take its parent's instance away
        if self._pid == os.getpid() and self.path.exists():
            with _told(self.path):
                _remove(self.path)

    def __enter__(self) -> "Instance":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) == signal.SIG_DFL:
                    self._handlers[number] = signal.signal(number, _leave)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.close()
        finally:
            for number in self._handlers:
                signal.signal(number, signal.SIG_DFL)
            self._handlers.clear()


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


@atexit.register
def _remove_all() -> None:
    for instance in list(_live):
        with suppress(HostError, OSError):
            instance.close()


def _remove(path: Path) -> None:
    """Switch an instance off and remove it."""
    with suppress(OSError):
        (path / "tracing_on").write_text("0")
        (path / "events" / "enable").write_text("0")
    path.rmdir()


def _pid_namespace() -> int:
    """Pids mean something in one pid namespace only; tracefs may be shared by many."""
    return os.stat("/proc/self/ns/pid").st_ino


def _is_leftover(name: str) -> bool:
    parts = name.split("-")
    if len(parts) != 4 or parts[0] != _PREFIX or parts[1] != str(_pid_namespace()):
        return False
    return parts[2].isdigit() and not Path("/proc", parts[2]).exists()


KALLSYMS = Path("/proc/kallsyms")
_LATER_TERM = re.compile(r"\bintr_info == \w+")
_FUNCTION_TERM = re.compile(r"(\w+)\.function == (\w+)")


def _addresses(names: set[str], kallsyms: Path | None = None) -> dict[int, str]:
    """Addresses of kernel functions; empty where they are hidden."""
    try:
        text = (kallsyms or KALLSYMS).read_bytes()
    except OSError:
        return {}
    found = {_address(text, name.encode()): name for name in names}
    found.pop(0, None)
    return found


def _address(kallsyms: bytes, name: bytes) -> int:
    """The address in the line of a function, `ffffffff812eb600 t pit_timer_fn[\t[kvm]]`; 0 if there
    is none. A search is several times as fast as a regular expression over 200,000 lines.
    """
    at = max(kallsyms.find(b" %s%s" % (name, end)) for end in (b"\n", b"\t"))
    return int(kallsyms[kallsyms.rfind(b"\n", 0, at) + 1 : at].split(b" ")[0], 16) if at > 0 else 0


def _function_filter(filter_: str, kallsyms: Path | None = None) -> str:
    """A filter by function names with their addresses; empty where one cannot be known."""
    names = {match[2] for match in _FUNCTION_TERM.finditer(filter_)}
    addresses = {name: address for address, name in _addresses(names, kallsyms).items()}
    if not names or names - addresses.keys():
        return ""
    return _FUNCTION_TERM.sub(lambda match: f"{match[1]} == {addresses[match[2]]:#x}", filter_)


def _without_later(filter_: str) -> str:
    """A filter for older kernels, whose kvm_entry has no `intr_info`; empty if that is not
    what one is refused for.
    """
    older, terms = _LATER_TERM.subn("common_pid < 0", filter_)
    return older if terms else ""


def _read_page(fd: int, size_bytes: int) -> bytes:
    try:
        return os.read(fd, size_bytes)
    except BlockingIOError:
        return b""


def _event_path(event: str) -> str:
    system, _, name = event.partition(":")
    if not name or "/" in event:
        raise ValueError(f"{event!r} is no event name; write system:event, as kvm:kvm_set_irq")
    return f"{system}/{name}"


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """Turn what the file system says into a `HostError` with the remedy."""
    try:
        yield
    except OSError as error:
        what = f"tracefs: {path.name}: {error.strerror}"
        if error.errno == errno.EPERM and is_locked_down():
            raise HostError(f"{what}: the kernel is locked down", _LOCKDOWN_REMEDY) from None
        raise HostError(what, _REMEDIES.get(error.errno or 0, "")) from None


def is_locked_down() -> bool:
    """Whether the kernel keeps even root from tracefs (kernel_lockdown(7))."""
    with suppress(OSError):
        return "[confidentiality]" in LOCKDOWN.read_text()
    return False


def find_tracefs(mounts: Iterable[str] | None = None) -> Path | None:
    """Where tracefs is mounted, the usual place first; `mounts`: lines of /proc/mounts."""
    if mounts is None:
        mounts = Path("/proc/mounts").read_text(errors="surrogateescape").splitlines()
    found = []
    for line in mounts:
        fields = line.split(" ")
        if len(fields) > 2 and fields[2] == "tracefs":
            found.append(Path(_unescape(fields[1])))
    # the automounted copy under debugfs is the same tracefs, but needs debugfs' permissions too
    return min(found, key=lambda path: path != Path("/sys/kernel/tracing"), default=None)


def _unescape(field: str) -> str:
    """/proc/mounts writes blanks and backslashes as octal escapes."""
    for char in " \t\n\\":
        field = field.replace(f"\\{ord(char):03o}", char)
    return field


def open_tracefs() -> Tracefs:
    """The mounted tracefs, else a private mount. Raises `HostError` with the remedy."""
    mounted = find_tracefs()
    if mounted is not None:
        if not os.access(mounted, os.R_OK | os.X_OK):
            raise HostError(f"tracefs at {mounted} may not be read", _READ_REMEDY)
        return Tracefs(mounted, mounted)
    return mount_private()


_SYS_FSOPEN, _SYS_FSCONFIG, _SYS_FSMOUNT = 430, 431, 432
_FSCONFIG_CMD_CREATE = 6
_CLOEXEC = 1


def mount_private() -> Tracefs:
    """Mount tracefs outside the file tree (fsopen(2), fsmount(2)): it lives while it is open.

    Raises `HostError` without CAP_SYS_ADMIN, and on kernels before 5.2 or without tracefs.
    """
    fs = _syscall(_SYS_FSOPEN, ctypes.c_char_p(b"tracefs"), _CLOEXEC)
    try:
        _syscall(_SYS_FSCONFIG, fs, _FSCONFIG_CMD_CREATE, None, None, 0)
        mount = _syscall(_SYS_FSMOUNT, fs, _CLOEXEC, 0)
    finally:
        os.close(fs)
    return Tracefs(Path(f"/proc/self/fd/{mount}"), None, mount)


def _syscall(number: int, *args: object) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    result = int(libc.syscall(ctypes.c_long(number), *args))
    if result < 0:
        code = ctypes.get_errno()
        what = f"tracefs is not mounted and cannot be ({os.strerror(code)})"
        raise HostError(what, _MOUNT_REMEDY)
    return result
