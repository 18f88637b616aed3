"""The kernel log: what counts as a warning, and how records are read."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmtick.abi import HostError
from kvmtick.host.kmsg import KernelLog, is_warning

PID = 4711


@pytest.mark.parametrize(
    ("priority", "text"),
    [
        (6, "WARNING: CPU: 1 PID: 99 at arch/x86/kvm/lapic.c:123 kvm_apic_set_eoi+0x10/0x20"),
        (1, "BUG: kernel NULL pointer dereference, address: 0000000000000008"),
        (0, "Oops: 0002 [#1] SMP"),
        (6, "Call Trace:"),
        (3, "INFO: task kvm-pit/99:100 blocked for more than 122 seconds."),
        (4, "kvm: something KVM has never said"),
        (3, f"kvm: kvm [{PID}]: vcpu0, guest rIP: 0x8000 something new"),
    ],
)
def test_warnings(priority: int, text: str) -> None:
    assert is_warning(priority, text, PID)


@pytest.mark.parametrize(
    ("priority", "text"),
    [
        (6, "kvm: something KVM has never said"),
        (4, "usb 1-1: device not accepting address 5"),
        (3, "kvm: kvm [99]: vcpu0, guest rIP: 0x8000 something new"),
        (6, "kvm: requested 8380 ns i8254 timer period limited to 200000 ns"),
        (3, "kvm: pic: non byte write"),
        (3, "kvm: pic: level sensitive irq not supported"),
        (3, "kvm: pic: single mode not supported"),
        (3, f"kvm: kvm [{PID}]: vcpu0, guest rIP: 0x80bf Unhandled WRMSR(0xc1) = 0xff"),
        (4, "KVM: debugfs: duplicate directory 19781-4"),
        (4, "kvm_create_vm_debugfs: 36 callbacks suppressed"),
        (3, "kvm-pvm: INTERNAL_ERROR in batch emul: rip=0xfff0 cpl=0"),
    ],
)
def test_no_warnings(priority: int, text: str) -> None:
    assert not is_warning(priority, text, PID)


@pytest.fixture
def log_of(tmp_path: Path) -> Iterator[object]:
    """Makes a log that gives these records, one a read."""
    path = tmp_path / "kmsg"
    path.write_bytes(b"")
    made: list[KernelLog] = []

    def make(*records: bytes | type[OSError]) -> KernelLog:
        waiting = list(records)

        def read(fd: int, size_bytes: int) -> bytes:
            if not waiting:
                raise BlockingIOError
            record = waiting.pop(0)
            if isinstance(record, bytes):
                return record
            raise record

        made.append(KernelLog(str(path), read))
        return made[-1]

    yield make
    for log in made:
        log.close()
        log.close()


def test_the_first_new_warning_is_told_once(log_of: object) -> None:
    log = log_of(  # type: ignore[operator]
        b"6,1,10,-;kvm: requested 1000 ns lapic timer period limited to 200000 ns\n",
        BrokenPipeError,
        b"4,7,11,-;------------[ cut here ]------------\n",
        b"4,8,12,-;WARNING: CPU: 0 PID: 1 at x.c:1\n SUBSYSTEM=kvm\n",
        b"4,9,13,c;Call Trace:\n",
    )
    assert log.new_warning() == "WARNING: CPU: 0 PID: 1 at x.c:1"
    assert log.new_warning() is None


def test_only_what_is_new_counts(tmp_path: Path) -> None:
    path = tmp_path / "kmsg"
    path.write_bytes(b"4,1,1,-;WARNING: old\n")
    with KernelLog(str(path)) as log:
        assert log.new_warning() is None
        with path.open("ab") as file:
            file.write(b"4,2,2,-;WARNING: new\n")
        assert log.new_warning() == "WARNING: new"


def test_a_log_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="cannot be read"):
        KernelLog(str(tmp_path / "absent"))


def test_this_host(tmp_path: Path) -> None:
    try:
        log = KernelLog()
    except HostError as error:
        pytest.skip(f"needs the kernel log: {error}")
    with log:
        assert log.new_warning() is None or os.path.exists("/dev/kmsg")
