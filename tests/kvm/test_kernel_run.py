"""`KernelVm.run`: the calls of the model, on the kernel's chips, with one vCPU and with more."""

import threading
from collections.abc import Iterator
from pathlib import Path

import elf_images
import pytest
from eventfds import LIMIT_S

import kvmtick
from kvmtick.abi import HostError
from kvmtick.abi.structs import KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_UNINITIALIZED
from kvmtick.guests import Guest
from kvmtick.host.kvmdev import open_kvm
from kvmtick.kvm.kernel import KernelVm
from kvmtick.machine.loader import load_file

AP_AT = 0x2000
SPIN = b"\xeb\xfe"
TRIPLE_FAULT = b"\x0f\x01\x1e\x00\x00\x66\xb8\x01\x00\x00\x00\x0f\x22\xc0\x0f\x0b"
"""lidt [0] (an empty IDT); mov eax, 1; mov cr0, eax (protected mode); ud2"""


@pytest.fixture(autouse=True)
def kvm() -> None:
    """Skip, saying why, where /dev/kvm cannot be used."""
    try:
        open_kvm().close()
    except HostError as error:
        pytest.skip(f"needs /dev/kvm: {error}")


def test_the_library_example_runs_on_the_kernel_and_has_no_ticks_to_tell() -> None:
    with kvmtick.Kvm("kernel").create_vm() as vm:
        vm.create_irqchip()
        vm.create_pit2()
        vm.create_vcpu(0)
        vm.load(kvmtick.guests.load("tick-pic", ticks=50, tsc_khz=vm.get_tsc_khz()))
        run = vm.run()
    assert (run.exit.reason, run.exit.code) == ("done", 0)
    assert run.guest_ticks == 50
    assert run.pit is not None
    assert (run.pit.count, run.pit.period_ns, run.pit.reinject) == (1193, 999_848, True)
    assert run.ticks is None
    assert run.as_dict()["ticks"] is None


def test_a_run_says_what_reinject_was_set_to_and_that_a_vm_has_no_pit() -> None:
    with kvmtick.Kvm("kernel").create_vm() as vm:
        vm.create_irqchip()
        vm.create_pit2()
        vm.reinject_control(False)
        vm.create_vcpu(0)
        vm.load(kvmtick.guests.load("tick-pic", ticks=5, tsc_khz=vm.get_tsc_khz()))
        run = vm.run()
    assert run.pit is not None
    assert not run.pit.reinject


def test_a_guest_that_hangs_is_stopped_at_the_limit() -> None:
    with kvmtick.Kvm("kernel").create_vm() as vm:
        vm.create_irqchip()
        vm.create_vcpu(0)
        vm.load(kvmtick.guests.Guest("spin", b"\xeb\xfe", 0x8000, (0, 0x8000), None))
        run = vm.run(limit_s=0.2)
    assert run.exit.reason == "limit"
    assert run.pit is None
    assert run.guest_ticks is None


# --- several vCPUs ------------------------------------------------------------------------------


def _out8(port: int, value: int) -> bytes:
    return bytes((0xB0, value, 0xE6, port))


def _apic_write(register: int, value: int) -> bytes:
    """mov dword [0xfee00000 + register], value; in unreal mode"""
    address = 0xFEE0_0000 + register
    return b"\x67\x66\xc7\x05" + address.to_bytes(4, "little") + value.to_bytes(4, "little")


INIT_SIPI = (
    # only now does KVM look anew which vCPUs there are: the last created is not in its map
    _apic_write(0xF0, 0x1FF)
    + _apic_write(0x310, 1 << 24)
    + _apic_write(0x300, 0x4500)
    + _apic_write(0x300, 0x4600 | AP_AT >> 12)
)


@pytest.fixture
def vms() -> Iterator[list[KernelVm]]:
    made: list[KernelVm] = []
    yield made
    for vm in made:
        vm.close()


def _two(vms: list[KernelVm], bsp: bytes, ap: bytes, *, started: bool = False) -> KernelVm:
    """vCPU 0 at `bsp`, vCPU 1 at `ap` after a SIPI to AP_AT, or at once if `started`."""
    vm = KernelVm()
    vms.append(vm)
    vm.create_irqchip()
    vm.create_vcpu(0)
    vm.create_vcpu(1)
    vm.load(Guest("two", bsp, 0x1000, (0, 0x1000), None))
    vm.vcpus[0].set_real_mode(0, 0x1000, unreal=True)
    vm.write_memory(AP_AT, ap)
    if started:
        vm.vcpus[1].set_mp_state(KVM_MP_STATE_RUNNABLE)
        vm.vcpus[1].set_real_mode(0, AP_AT)
    return vm


def _threads() -> set[str]:
    return {thread.name for thread in threading.enumerate()}


def test_the_boot_vcpu_starts_another_which_ends_the_run(vms: list[KernelVm]) -> None:
    vm = _two(vms, INIT_SIPI + SPIN, _out8(0xE9, ord("b")) + _out8(0xF4, 7) + SPIN)
    assert vm.vcpus[1].get_mp_state() == KVM_MP_STATE_UNINITIALIZED
    run = vm.run(limit_s=LIMIT_S)
    assert (run.exit.reason, run.exit.code, run.console) == ("guest-error", 7, "b")
    assert vm.vcpus[1].get_mp_state() == KVM_MP_STATE_RUNNABLE
    assert not {name for name in _threads() if name.startswith("vcpu")}


def test_the_boot_vcpu_ends_those_that_spin_and_those_that_wait(vms: list[KernelVm]) -> None:
    for started in (False, True):
        vm = _two(vms, _out8(0xF4, 3) + SPIN, SPIN, started=started)
        assert vm.run(limit_s=LIMIT_S).exit.code == 3
        # nothing is left over for the next run
        vm.load(Guest("again", _out8(0xF4, 4), 0x1000, (0, 0x1000), None))
        assert vm.run(limit_s=LIMIT_S).exit.code == 4


def test_one_limit_is_for_all(vms: list[KernelVm]) -> None:
    vm = _two(vms, SPIN, SPIN, started=True)
    assert vm.run(limit_s=0.2).exit.reason == "limit"
    assert not {name for name in _threads() if name.startswith("vcpu")}


def test_a_kick_of_any_vcpu_interrupts(vms: list[KernelVm]) -> None:
    for index in (0, 1):
        vm = _two(vms, SPIN, SPIN, started=True)
        timer = threading.Timer(0.05, vm.vcpus[index].kick)
        timer.start()
        ended = vm.run(limit_s=LIMIT_S).exit
        timer.join()
        assert (ended.reason, ended.detail) == ("interrupted", f"vCPU {index} was kicked")


def test_a_triple_fault_of_another_vcpu_ends_the_run(vms: list[KernelVm]) -> None:
    vm = _two(vms, SPIN, TRIPLE_FAULT, started=True)
    ended = vm.run(limit_s=LIMIT_S).exit
    assert (ended.reason, ended.detail) == ("triple-fault", "vCPU 1 shut down on a triple fault")


def test_what_a_handler_raises_is_raised_by_run(vms: list[KernelVm]) -> None:
    def handler(port: int, size_bytes: int, value: int | None) -> int | None:
        raise LookupError(threading.current_thread().name)

    vm = _two(vms, SPIN, _out8(0x80, 1) + SPIN, started=True)
    with pytest.raises(LookupError, match="vcpu 1"):
        vm.run(handlers={0x80: handler}, limit_s=LIMIT_S)
    assert vm.run(limit_s=0.05).exit.reason == "limit"


def test_handlers_are_called_one_at_a_time(vms: list[KernelVm]) -> None:
    inside, together, calls = 0, 0, [0, 0]

    def handler(port: int, size_bytes: int, value: int | None) -> int | None:
        nonlocal inside, together
        inside += 1
        together = max(together, inside)
        threading.Event().wait(0.0002)  # gives another thread the chance to come in
        calls[port & 1] += 1
        inside -= 1
        if min(calls) >= 20:
            vm.vcpus[0].kick()
        return None

    # again: out 0x80 (or 0x81), al; jmp again
    vm = _two(vms, b"\xe6\x80\xeb\xfc", b"\xe6\x81\xeb\xfc", started=True)
    run = vm.run(handlers={0x80: handler, 0x81: handler}, limit_s=LIMIT_S)
    assert run.exit.reason == "interrupted"
    assert min(calls) >= 20
    assert together == 1


def test_a_sleeping_vcpu_holds_nobody_up(vms: list[KernelVm]) -> None:
    # mov eax, 0xffffffff; out 0xd8, eax: an hour
    sleep = b"\x66\xb8\xff\xff\xff\xff\x66\xe7\xd8" + SPIN
    for bsp, ap in ((sleep, _out8(0xF4, 5)), (_out8(0xF4, 5), sleep)):
        run = _two(vms, bsp, ap, started=True).run(limit_s=LIMIT_S)
        assert run.exit.code == 5
        assert run.elapsed_ns < 4_000_000_000


@pytest.mark.parametrize(
    ("image", "console"),
    [
        (elf_images.kernel(), "guest.elf"),
        (elf_images.elf(elf_images.PROTECTED_MODE, 32), "3"),
        (elf_images.elf(elf_images.LONG_MODE, 64), "\x146"),
    ],
    ids=["multiboot", "ELF32", "ELF64"],
)
def test_a_guest_from_a_file_starts_in_its_mode_and_leaves_none_of_it(
    vms: list[KernelVm], tmp_path: Path, image: bytes, console: str
) -> None:
    path = tmp_path / "guest.elf"
    path.write_bytes(image)
    guest = load_file(path, ram_bytes=4 << 20)
    vm = KernelVm(ram_bytes=guest.needs.ram_bytes)
    vms.append(vm)
    vm.prepare(guest.needs)
    vm.load(guest)
    run = vm.run(limit_s=LIMIT_S)
    assert (run.exit.reason, run.exit.code, run.console) == ("done", 0, console)
    vm.load(Guest("real mode", _out8(0xE9, 0x52) + _out8(0xF4, 0), 0x1000, (0, 0x1000), None))
    assert vm.run(limit_s=LIMIT_S).console == f"{console}R"


def test_one_vcpu_needs_no_thread(vms: list[KernelVm]) -> None:
    before, seen = _threads(), set()

    def handler(port: int, size_bytes: int, value: int | None) -> int | None:
        seen.update(_threads())
        return None

    vm = KernelVm()
    vms.append(vm)
    vm.create_irqchip()
    vm.create_vcpu(0)
    vm.load(Guest("one", _out8(0x80, 1) + _out8(0xF4, 0), 0x1000, (0, 0x1000), None))
    assert vm.run(handlers={0x80: handler}, limit_s=LIMIT_S).exit.reason == "done"
    assert seen == before
