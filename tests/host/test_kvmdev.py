"""/dev/kvm by its thin access: errors, bounded runs, exits, and that nothing leaks."""

import errno
import gc
import os
import select
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from tiny_guests import DONE, HLT, SPIN, TRIPLE_FAULT, MakeVm, out8

from kvmtick.abi import HostError, KvmError
from kvmtick.abi.exits import ExitHlt, ExitInternalError, ExitIntr, ExitIo, ExitMmio, ExitShutdown
from kvmtick.host import kvmdev
from kvmtick.host.kvmdev import KICK_SIGNAL, open_kvm, pit_worker_tids
from kvmtick.kvm.kernel import KernelVm

LIMIT_S = 5.0


def test_missing_device_is_told(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="is not there; modprobe kvm_intel") as caught:
        open_kvm(str(tmp_path / "kvm"))
    assert "\n" not in str(caught.value)


def test_a_device_that_is_no_kvm_is_told() -> None:
    with pytest.raises(HostError) as caught:
        open_kvm("/dev/null")
    told = "/dev/null is no KVM device (KVM_GET_API_VERSION: ENOTTY); a KVM device is: c 10 232"
    assert str(caught.value) == told


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.EACCES, "join the group kvm"),
        (errno.ENODEV, "firmware"),
        (errno.EBUSY, "see dmesg"),
    ],
)
def test_every_refusal_has_a_remedy(number: int, remedy: str) -> None:
    error = kvmdev._host_error("/dev/kvm", OSError(number, os.strerror(number)))
    assert remedy in str(error)


@pytest.mark.usefixtures("kvm")
def test_system_calls() -> None:
    with open_kvm() as device:
        assert device.api_version() == 12
        assert device.vcpu_mmap_size() >= 2352
        with pytest.raises(KvmError) as caught:
            device.create_vm(1)
        assert (caught.value.errno, caught.value.call) == (errno.EINVAL, "KVM_CREATE_VM")
        with pytest.raises(KvmError) as caught:
            device.ioctl(0xAEFF)
        assert caught.value.call == "ioctl 0xaeff"
    with pytest.raises(KvmError) as caught:
        device.api_version()
    assert caught.value.errno == errno.EBADF


@pytest.mark.parametrize("code", [SPIN, b"\xfa" + HLT], ids=["spinning", "halted"])
class TestBounded:
    """A guest that never leaves by itself, in a loop or asleep in the kernel."""

    def test_limit(self, make_vm: MakeVm, code: bytes) -> None:
        vcpu = make_vm(code).vcpus[0]
        for limit_s in (0.2, 0.0, 0.001):
            begin = time.monotonic()
            assert vcpu.run(limit_s) == ExitIntr("time")
            assert time.monotonic() - begin >= limit_s

    def test_kick_from_another_thread(self, make_vm: MakeVm, code: bytes) -> None:
        vcpu = make_vm(code).vcpus[0]
        timer = threading.Timer(0.1, vcpu.kick)
        timer.start()
        assert vcpu.run(LIMIT_S) == ExitIntr("kick")
        timer.join()

    def test_kick_at_the_run_s_beginning_ends_nothing_else(
        self, make_vm: MakeVm, code: bytes, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        vcpu = make_vm(code).vcpus[0].file
        real = signal.pthread_sigmask

        def kicked_first(how: int, signals: set[int]) -> set[int]:
            if how == signal.SIG_BLOCK:
                vcpu.kick()
            return real(how, signals)

        monkeypatch.setattr(kvmdev.signal, "pthread_sigmask", kicked_first)
        assert vcpu.run(LIMIT_S) == ExitIntr("kick")

    def test_kick_before_the_run_counts(self, make_vm: MakeVm, code: bytes) -> None:
        vcpu = make_vm(code).vcpus[0]
        vcpu.kick()
        assert vcpu.run(LIMIT_S) == ExitIntr("kick")
        assert vcpu.run(0.05) == ExitIntr("time")

    def test_any_thread_may_run(self, make_vm: MakeVm, code: bytes) -> None:
        vcpu = make_vm(code).vcpus[0]
        got: list[object] = []
        for _ in range(3):
            thread = threading.Thread(target=lambda: got.append(vcpu.run(0.05)))
            thread.start()
            thread.join(LIMIT_S)
        got.append(vcpu.run(0.05))
        assert got == [ExitIntr("time")] * 4

    def test_signals_of_others_do_not_end_it(self, make_vm: MakeVm, code: bytes) -> None:
        vcpu = make_vm(code).vcpus[0]
        seen: list[int] = []
        before = signal.signal(signal.SIGALRM, lambda number, frame: seen.append(number))
        signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
        try:
            assert vcpu.run(0.3) == ExitIntr("time")
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        assert len(seen) >= 5

    def test_an_exception_in_a_handler_leaves_all_in_order(
        self, make_vm: MakeVm, code: bytes
    ) -> None:
        vcpu = make_vm(code).vcpus[0]

        def interrupt(number: int, frame: object) -> None:
            raise KeyboardInterrupt

        before = signal.signal(signal.SIGALRM, interrupt)
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        try:
            with pytest.raises(KeyboardInterrupt):
                vcpu.run(LIMIT_S)
        finally:
            signal.signal(signal.SIGALRM, before)
        assert KICK_SIGNAL not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
        assert vcpu.run(0.05) == ExitIntr("time")


def test_one_thread_at_a_time(make_vm: MakeVm) -> None:
    vcpu = make_vm(SPIN).vcpus[0]
    with vcpu.file.bounded(0.1), pytest.raises(RuntimeError, match="one thread"):
        vcpu.run(0.1)


def test_port_write_and_read(make_vm: MakeVm) -> None:
    # mov dx, 0x510; in ax, dx; out 0xf4, ax
    vcpu = make_vm(b"\xba\x10\x05\xed\xe7\xf4").vcpus[0]
    assert vcpu.run(LIMIT_S) == ExitIo(0x510, 2, 1, False, b"")
    with pytest.raises(ValueError, match="reads 2 bytes, the answer has 1"):
        vcpu.answer(b"\x12")
    vcpu.answer(b"\x34\x12")
    exit_ = vcpu.run(LIMIT_S)
    assert exit_ == ExitIo(0xF4, 2, 1, True, b"\x34\x12")
    assert isinstance(exit_, ExitIo)
    assert exit_.values() == [0x1234]
    with pytest.raises(ValueError, match="nothing to answer"):
        vcpu.answer(b"\0\0")


def test_mmio_write_and_read(make_vm: MakeVm) -> None:
    # mov ax, 0xf000; mov ds, ax; mov [0], al; mov al, [1]; out 0xf4, al; RAM ends at 0x80000
    code = b"\xb8\x00\xf0\x8e\xd8\xa2\x00\x00\xa0\x01\x00" + DONE
    with KernelVm(ram_bytes=0x80000) as vm:
        vm.create_irqchip()
        vcpu = vm.create_vcpu()
        vm.write_memory(0x1000, code)
        vcpu.set_real_mode(0, 0x1000)
        assert vcpu.run(LIMIT_S) == ExitMmio(0xF0000, 1, True, b"\0")
        assert vcpu.run(LIMIT_S) == ExitMmio(0xF0001, 1, False, b"")
        vcpu.answer(b"\x77")
        assert vcpu.run(LIMIT_S) == ExitIo(0xF4, 1, 1, True, b"\x77")


def test_hlt_leaves_without_an_irqchip(make_vm: MakeVm) -> None:
    assert make_vm(HLT, irqchip=False).vcpus[0].run(LIMIT_S) == ExitHlt()


def test_triple_fault(make_vm: MakeVm) -> None:
    assert make_vm(TRIPLE_FAULT).vcpus[0].run(LIMIT_S) == ExitShutdown()


def test_internal_error_names_the_instruction() -> None:
    data = (1, int.from_bytes(b"\x02\x0f\x57\0\0\0\0\0", "little"), 0)
    assert ExitInternalError(1, data).instruction() == b"\x0f\x57"
    assert ExitInternalError(1, (0, *data[1:])).instruction() == b""
    assert ExitInternalError(3, data).instruction() == b""


def test_real_mode_segment(make_vm: MakeVm) -> None:
    vm = make_vm(HLT)
    vm.vcpus[0].set_real_mode(0x1234, 0x10)
    sregs, regs = vm.vcpus[0].get_sregs(), vm.vcpus[0].get_regs()
    assert (sregs.cs.selector, sregs.cs.base, sregs.cs.limit) == (0x1234, 0x12340, 0xFFFF)
    assert (sregs.ds.limit, sregs.cr0 & 1, regs.rip, regs.rflags) == (0xFFFF, 0, 0x10, 2)


def test_unreal_mode_reaches_the_local_apic(make_vm: MakeVm) -> None:
    # mov eax, [dword 0xfee00030]; out 0xf4, eax
    vm = make_vm(b"\x67\x66\xa1\x30\x00\xe0\xfe\x66\xe7\xf4")
    vm.vcpus[0].set_real_mode(0, 0x1000, unreal=True)
    end = vm.run(limit_s=LIMIT_S).exit
    assert end.code & 0xFF == 0x14


def test_memory_is_bounded(make_vm: MakeVm) -> None:
    vm = make_vm()
    vm.write_memory(0x1F_FFFF, b"x")
    assert vm.read_memory(0x1F_FFFE, 2) == b"\0x"
    for gpa, size in ((0x20_0000, 1), (0x1F_FFFF, 2), (-1, 1)):
        with pytest.raises(ValueError, match="outside guest RAM"):
            vm.read_memory(gpa, size)


def test_overlapping_memory_is_refused(make_vm: MakeVm) -> None:
    with pytest.raises(KvmError) as caught:
        make_vm().file.add_memory(0x1000, 0x1000, slot=1)
    assert caught.value.errno == errno.EEXIST


@pytest.mark.parametrize(("gpa", "size"), [(0x100, 0x1000), (0x40_0000, 100), (0x40_0000, 0)])
def test_unaligned_memory_is_refused(make_vm: MakeVm, gpa: int, size: int) -> None:
    with pytest.raises(KvmError, match="multiples of 4096") as caught:
        make_vm().file.add_memory(gpa, size, slot=1)
    assert caught.value.errno == errno.EINVAL


def test_another_process_cannot_run_it(make_vm: MakeVm) -> None:
    vm = make_vm(SPIN)
    pid = os.fork()
    if pid == 0:
        try:
            vm.vcpus[0].run(0.1)
        except KvmError as error:
            os._exit(error.errno or 0)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == errno.EIO


def test_a_living_vm_keeps_its_memory(make_vm: MakeVm) -> None:
    """A guest must never see what this process maps where its RAM was."""
    vm = make_vm(SPIN)
    vm.file.close()
    vm.memory.close()
    with pytest.raises(KvmError, match="read_memory: EBADF: this VM was closed"):
        vm.read_memory(0x1000, 2)
    assert not vm.memory.ram.closed
    assert vm.vcpus[0].run(0.02) == ExitIntr("time")
    vm.vcpus[0].close()


def test_a_closed_slot_is_gone_for_the_guest(make_vm: MakeVm) -> None:
    vm = make_vm(SPIN)
    vm.vcpus[0].run(0.01)
    vm.memory.close()
    assert vm.memory.ram.closed
    assert vm.vcpus[0].run(0.05) != ExitIntr("kick")
    vm.file.add_memory(0, 0x2000)


Close = Callable[[KernelVm], object]


@pytest.mark.parametrize(
    "close",
    [
        lambda vm: (vm.vcpus[0].close(), vm.file.close(), vm.memory.close(), vm.device.close()),
        lambda vm: (vm.memory.close(), vm.device.close(), vm.file.close(), vm.vcpus[0].close()),
        lambda vm: (vm.close(), vm.close()),
    ],
)
def test_closing_in_any_order(make_vm: MakeVm, close: Close) -> None:
    vm = make_vm(out8(0xF4, 1))
    vcpu, area = vm.vcpus[0], vm.vcpus[0].file.area
    vm.run(limit_s=LIMIT_S)
    close(vm)
    assert area.exit_reason == 2  # whoever still holds it may still look
    for call in (vcpu.run, vcpu.get_regs):
        with pytest.raises(KvmError) as caught:
            call()
        assert caught.value.errno == errno.EBADF


def _held() -> tuple[int, int, int, int]:
    gc.collect()
    maps = Path("/proc/self/maps").read_text()
    fds = len(os.listdir("/proc/self/fd"))
    timers = len(Path("/proc/self/timers").read_text().splitlines())
    return fds, maps.count("kvm-vcpu"), timers, threading.active_count()


def _made_and_forgotten(count: int) -> None:
    for index in range(count):
        vm = KernelVm()
        vm.create_irqchip()
        vm.create_pit2()
        vm.create_vcpu()
        vm.write_memory(0x1000, SPIN)
        vm.vcpus[0].set_real_mode(0, 0x1000)
        vm.vcpus[0].run(0.001)
        if index % 2:
            vm.close()


@pytest.mark.usefixtures("kvm")
def test_nothing_leaks() -> None:
    _made_and_forgotten(2)
    before = _held()
    _made_and_forgotten(20)
    assert _held() == before
    for tid in pit_worker_tids(os.getpid()):
        with suppress(ProcessLookupError):
            pidfd = os.pidfd_open(tid)
            select.select([pidfd], [], [], 5)
            os.close(pidfd)
    assert pit_worker_tids(os.getpid()) == set()


def test_pit_worker_is_found(make_vm: MakeVm) -> None:
    before = pit_worker_tids(os.getpid())
    make_vm()
    if not Path("/proc/2/comm").exists() or Path("/proc/2/comm").read_text() != "kthreadd\n":
        pytest.skip("kernel threads cannot be seen from this pid namespace")
    assert len(pit_worker_tids(os.getpid()) - before) == 1
