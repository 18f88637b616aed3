"""`Vm.save` and `Vm.load`: what moves between VMs of the two back ends, and what goes on there."""

import base64
import json
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from backends import make_vm, with_cpuid
from hypothesis import given, settings
from hypothesis import strategies as st

import kvmtick
from kvmtick.abi import KvmError
from kvmtick.abi.caps import (
    KVM_CAP_SPLIT_IRQCHIP,
    KVM_CAP_X2APIC_API,
    KVM_CAP_X86_APIC_BUS_CYCLES_NS,
)
from kvmtick.abi.exits import ExitIo
from kvmtick.abi.structs import (
    KVM_IRQCHIP_IOAPIC,
    KVM_IRQCHIP_PIC_MASTER,
    KVM_MP_STATE_HALTED,
    KVM_MP_STATE_UNINITIALIZED,
    KVM_PIT_SPEAKER_DUMMY,
    KVM_X86_SHADOW_INT_STI,
    kvm_clock_data,
    kvm_regs,
)
from kvmtick.conform.bench import to_ioapic, to_msi, to_pic
from kvmtick.guests import Guest, start
from kvmtick.kvm.state import StateError, VmState
from kvmtick.kvm.state_file import from_json, to_json
from kvmtick.machine.run import Run

PAIRS = [(source, target) for source in ("model", "kernel") for target in ("model", "kernel")]
ICR_LOW, SVR, LVTT, TMICT, TMCCT, TDCR, IRR = 0x300, 0xF0, 0x320, 0x380, 0x390, 0x3E0, 0x200
TSC, TSC_DEADLINE = 0x10, 0x6E0
PIC_ENABLED, LEVEL, REMOTE_IRR = 0x1FF, 1 << 15, 1 << 14
NO_PIT_ROUTE = [to_pic(1, 1), to_ioapic(20, 20)]
"""GSI 0 leads nowhere: what the PIT of a running VM does is not seen."""

MakeVm = Callable[..., Any]


@pytest.fixture
def new_vm() -> Iterator[MakeVm]:
    """Makes VMs of the back end given, which are closed after the test."""
    made = []

    def make(backend: str, **options: Any) -> Any:
        made.append(make_vm(backend, **options))
        return made[-1]

    yield make
    for vm in made:
        vm.close()


def irqchip(vm: Any, vcpus: int = 1) -> list[Any]:
    """An irqchip, and vCPUs that know what there is."""
    vm.create_irqchip()
    return [with_cpuid(vm, vm.create_vcpu(vcpu_id)) for vcpu_id in range(vcpus)]


def set_lapic(vcpu: Any, **registers: int) -> None:
    lapic = vcpu.get_lapic()
    for name, value in registers.items():
        lapic.set_reg(globals()[name], value)
    vcpu.set_lapic(lapic)


def set_pin(vm: Any, pin: int, entry: int) -> None:
    chip = vm.get_irqchip(KVM_IRQCHIP_IOAPIC)
    chip.chip.ioapic.redirtbl[pin].bits = entry
    vm.set_irqchip(chip)


# Every kind of VM is the same when it has been moved.


def bare(vm: Any) -> None:
    vcpu = vm.create_vcpu(0)
    vcpu.set_regs(kvm_regs(rip=0x1234, rflags=0x202, rax=1 << 63))
    vm.write_memory(0x3000, b"RAM")
    vm.write_memory(vm.ram_bytes - 1, b"\xff")


def ram_only(vm: Any) -> None:
    vm.write_memory(0x1FFF, b"ab")


def pc(vm: Any) -> None:
    irqchip(vm)
    vm.set_gsi_routing(NO_PIT_ROUTE)
    vm.create_pit2(KVM_PIT_SPEAKER_DUMMY)
    state = vm.get_pit2()
    state.channels[0].count, state.channels[0].mode, state.channels[0].rw_mode = 1193, 2, 3
    state.channels[2].count_latched, state.channels[2].latched_count = 2, 0x1234
    state.flags = 2
    vm.set_pit2(state)
    chip = vm.get_irqchip(KVM_IRQCHIP_PIC_MASTER)
    chip.chip.pic.imr, chip.chip.pic.irq_base, chip.chip.pic.isr = 0xAB, 0x20, 4
    vm.set_irqchip(chip)
    vm.get_clock()


def without_reinjection(vm: Any) -> None:
    irqchip(vm)
    vm.set_gsi_routing([])
    vm.create_pit()
    vm.reinject_control(False)


def one_shot(vm: Any) -> None:
    pc(vm)
    state = vm.get_pit2()
    state.channels[0].mode, state.channels[0].count = 0, 60000
    vm.set_pit2(state)


def split(vm: Any) -> None:
    vm.enable_cap(KVM_CAP_X2APIC_API, 3)
    vm.enable_cap(KVM_CAP_SPLIT_IRQCHIP, 24)
    vm.set_gsi_routing([to_msi(0, 0x43), to_msi(40, 0x51, flags=0)])
    with_cpuid(vm, vm.create_vcpu(0))


def slow_bus(vm: Any) -> None:
    vm.create_irqchip()
    vm.enable_cap(KVM_CAP_X86_APIC_BUS_CYCLES_NS, 40)
    vm.create_vcpu(0)


def two_vcpus(vm: Any) -> None:
    irqchip(vm, 2)
    assert vm.vcpus[1].get_mp_state() == KVM_MP_STATE_UNINITIALIZED


def the_second_boots(vm: Any) -> None:
    vm.set_boot_cpu_id(5)
    vm.create_irqchip()
    vm.create_vcpu(2)
    vm.create_vcpu(5)


def x2apic(vm: Any) -> None:
    for vcpu in irqchip(vm, 2):
        sregs = vcpu.get_sregs()
        sregs.apic_base |= 1 << 10
        vcpu.set_sregs(sregs)
        set_lapic(vcpu, SVR=PIC_ENABLED)


def halted(vm: Any) -> None:
    irqchip(vm)[0].set_mp_state(KVM_MP_STATE_HALTED)


def level_pin(vm: Any) -> None:
    (vcpu,) = irqchip(vm)
    set_lapic(vcpu, SVR=PIC_ENABLED)
    set_pin(vm, 20, LEVEL | 0x51)
    vm.irq_line(20, 1)
    assert vm.get_irqchip(KVM_IRQCHIP_IOAPIC).chip.ioapic.redirtbl[20].bits & REMOTE_IRR
    assert vcpu.get_lapic().reg(IRR + 0x20) == 1 << 0x11


def requests(vm: Any) -> None:
    (vcpu,) = irqchip(vm)
    set_lapic(vcpu, SVR=PIC_ENABLED)
    vm.signal_msi(0xFEE0_0000, 0x45)
    vm.irq_line(3, 1)
    vcpu.nmi()
    vcpu.nmi()


def events(vm: Any) -> None:
    (vcpu,) = irqchip(vm)
    given = vcpu.get_vcpu_events()
    given.exception.injected, given.exception.nr = 1, 13
    given.exception.has_error_code, given.exception.error_code = 1, 0x18
    given.interrupt.injected, given.interrupt.nr = 1, 0x30
    given.interrupt.shadow = KVM_X86_SHADOW_INT_STI
    given.nmi.masked, given.nmi.pending = 1, 1
    vcpu.set_vcpu_events(given)


def tsc_deadline(vm: Any) -> None:
    (vcpu,) = irqchip(vm)
    set_lapic(vcpu, SVR=PIC_ENABLED, LVTT=0x4_0055)
    assert vcpu.set_msrs({TSC_DEADLINE: 1 << 60}) == 1


def long_mode(vm: Any) -> None:
    (vcpu,) = irqchip(vm)
    registers = start.long_mode(0x10_0000, 0x9000, rsp=0x8000)
    vcpu.start_at(0, 0, registers)
    msrs = {0xC000_0081: 0x23_0010_0000_0000, 0xC000_0082: 0xFFFF_8000_0000_1000, 0x277: 0x606}
    assert vcpu.set_msrs(msrs) == len(msrs)


KINDS = [
    *(bare, ram_only, pc, without_reinjection, one_shot, split, slow_bus, two_vcpus),
    *(the_second_boots, x2apic, halted, level_pin, requests, events, tsc_deadline, long_mode),
]
OF_THE_HOST = ("tsc_khz", "cpuid")
"""The TSC's rate; and what the kernel makes of a CPUID that is not its own."""


@pytest.mark.parametrize(("source", "target"), PAIRS)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_anew_is_the_same(
    new_vm: MakeVm, kind: Callable[[Any], None], source: str, target: str
) -> None:
    vm = new_vm(source)
    kind(vm)
    state = vm.save()
    moved = new_vm(target)
    moved.load(state)
    found = moved.save().differences(state)
    if source != target:
        found = [each for each in found if not each.endswith(OF_THE_HOST)]
    assert found == []
    vm.close()
    moved.close()


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_clocks_go_on(new_vm: MakeVm, source: str, target: str) -> None:
    vm, moved = new_vm(source), new_vm(target)
    irqchip(vm)
    vm.set_clock(kvm_clock_data(clock=10**15))
    state = vm.save()
    moved.load(state)
    assert 10**15 <= state.clock_ns <= moved.get_clock().clock < 2 * 10**15
    left, found = state.vcpus[0].msrs[TSC], moved.vcpus[0].get_msrs([TSC])[TSC]
    if target == "kernel" and found - left > 10**11:
        pytest.skip("this host's back end leaves the TSC as it is")
    assert left <= found <= left + 10**11


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_is_the_same_in_a_file(
    new_vm: MakeVm, kind: Callable[[Any], None], tmp_path: Path
) -> None:
    vm = new_vm("model")
    kind(vm)
    state = vm.save()
    state.write(tmp_path / "state")
    again = VmState.read(tmp_path / "state")
    again.write(tmp_path / "again")
    assert again.differences(state) == []
    assert (tmp_path / "again").read_bytes() == (tmp_path / "state").read_bytes()


def test_a_difference_is_found(new_vm: MakeVm) -> None:
    vm = new_vm("model")
    pc(vm)
    state = vm.save()
    vm.vcpus[0].set_regs(kvm_regs(rip=1, rflags=2))
    vm.vcpus[0].set_msrs({0x175: 7})
    set_lapic(vm.vcpus[0], SVR=PIC_ENABLED)
    vm.reinject_control(False)
    vm.set_gsi_routing([])
    vm.write_memory(5, b"x")
    found = " ".join(vm.save().differences(state))
    for name in ("routing", "pit reinject", "vcpu 0 regs rip", "msr 0x175", "lapic", "ram"):
        assert name in found
    assert "chips" not in found


# What a new VM has to be.


@pytest.mark.parametrize("backend", ["model", "kernel"])
@pytest.mark.parametrize(
    "spoil",
    [
        lambda vm: vm.create_irqchip(),
        lambda vm: vm.create_vcpu(0),
        lambda vm: vm.enable_cap(KVM_CAP_X2APIC_API, 1),
        lambda vm: vm.enable_cap(KVM_CAP_SPLIT_IRQCHIP, 24),
    ],
)
def test_a_vm_that_is_not_new_takes_no_state(
    new_vm: MakeVm, backend: str, spoil: Callable[[Any], None]
) -> None:
    source, vm = new_vm("model"), new_vm(backend)
    bare(source)
    spoil(vm)
    before = vm.save()
    with pytest.raises(StateError, match="load into a new one"):
        vm.load(source.save())
    assert vm.save().differences(before) == []


@pytest.mark.parametrize("has", [{"roms": ((0xFFFF_0000, bytes(0x1_0000)),)}, {"disk": bytes(512)}])
def test_a_guest_with_a_rom_or_a_disk_is_refused(new_vm: MakeVm, has: dict[str, Any]) -> None:
    vm = new_vm("model")
    vm.create_vcpu(0)
    vm.load(Guest("bios", b"\xf4", 0x8000, (0, 0x8000), None, **has))
    with pytest.raises(StateError, match="'bios' has a ROM or a disk, which are not moved: run it"):
        vm.save()


def test_ram_must_be_large_enough_and_is_wiped(new_vm: MakeVm) -> None:
    source = new_vm("model", ram_bytes=1 << 20)
    ram_only(source)
    state = source.save()
    with pytest.raises(StateError, match="make it with ram_bytes=1048576"):
        new_vm("model", ram_bytes=1 << 19).load(state)
    larger = new_vm("model")
    larger.write_memory(0x8_0000, b"old")
    larger.load(state)
    assert larger.read_memory(0x1FFE, 4) == b"\0ab\0"
    assert not any(larger.read_memory(0x3000, larger.ram_bytes - 0x3000))


@pytest.mark.parametrize("backend", ["model", "kernel"])
def test_a_state_that_contradicts_itself_leaves_the_vm_new(new_vm: MakeVm, backend: str) -> None:
    source = new_vm("model")
    two_vcpus(source)
    state = source.save()
    state.vcpus[1].sregs.efer = 1 << 10
    vm = new_vm(backend)
    with pytest.raises(StateError, match=r"contradicts itself \(KVM_SET_SREGS: EINVAL"):
        vm.load(state)
    assert vm.vcpus == []
    assert not any(vm.read_memory(0, vm.ram_bytes))
    vm.create_irqchip()


def test_a_back_end_that_refuses_says_so(new_vm: MakeVm, monkeypatch: pytest.MonkeyPatch) -> None:
    source, vm = new_vm("model"), new_vm("model")
    bare(source)

    def refuse(gpa: object) -> None:
        raise KvmError(22, "KVM_SET_CLOCK", "not here")

    monkeypatch.setattr(vm, "set_clock", refuse)
    with pytest.raises(StateError, match=r"refuses the state \(KVM_SET_CLOCK: EINVAL: not here\)"):
        vm.load(source.save())


# What goes on in the new VM: code at 0000:8000, its handler at 0000:8100 ends it with 1.

EXIT_1 = bytes.fromhex("b001 e6f4")  # mov al, 1; out 0xf4, al
HALT = bytes.fromhex("f4 ebfd")  # again: hlt; jmp again
STI_HALT = b"\xfb" + HALT
CLI_HALT = b"\xfa" + HALT


def load_code(vm: Any, code: bytes, vector: int) -> None:
    pieces = ((4 * vector, (0x8100).to_bytes(4, "little")), (0x8100, EXIT_1))
    vm.load(Guest("moved", code, 0x8000, (0, 0x8000), None, pieces=pieces))


def finish(vm: Any) -> int:
    """Run to the end; the exit code."""
    run = vm.run(for_ns=10**9) if vm.backend == "model" else vm.run(limit_s=10)
    assert run.exit.reason in ("done", "guest-error"), run.exit
    return int(run.exit.code)


@pytest.mark.parametrize(("source", "target"), PAIRS)
class TestWhatGoesOn:
    """Something waits in the VM that is saved, and happens in the one that it is loaded into."""

    def move(self, new_vm: MakeVm, vm: Any, target: str) -> Any:
        moved = new_vm(target)
        moved.load(vm.save())
        vm.close()
        return moved

    def test_an_interrupt_in_the_local_apic(self, new_vm: MakeVm, source: str, target: str) -> None:
        vm = new_vm(source)
        (vcpu,) = irqchip(vm)
        set_lapic(vcpu, SVR=PIC_ENABLED)
        load_code(vm, STI_HALT, 0x45)
        vm.signal_msi(0xFEE0_0000, 0x45)
        assert finish(self.move(new_vm, vm, target)) == 1

    def test_an_interrupt_in_the_pic(self, new_vm: MakeVm, source: str, target: str) -> None:
        vm = new_vm(source)
        irqchip(vm)
        chip = vm.get_irqchip(KVM_IRQCHIP_PIC_MASTER)
        chip.chip.pic.irq_base = 0x20
        vm.set_irqchip(chip)
        load_code(vm, STI_HALT, 0x23)
        vm.irq_line(3, 1)
        vm.irq_line(3, 0)
        assert finish(self.move(new_vm, vm, target)) == 1

    def test_an_nmi(self, new_vm: MakeVm, source: str, target: str) -> None:
        vm = new_vm(source)
        (vcpu,) = irqchip(vm)
        load_code(vm, CLI_HALT, 2)
        vcpu.nmi()
        assert finish(self.move(new_vm, vm, target)) == 1

    def test_an_injected_interrupt(self, new_vm: MakeVm, source: str, target: str) -> None:
        vm = new_vm(source)
        (vcpu,) = irqchip(vm)
        load_code(vm, CLI_HALT, 0x31)
        given = vcpu.get_vcpu_events()
        given.interrupt.injected, given.interrupt.nr = 1, 0x31
        vcpu.set_vcpu_events(given)
        assert finish(self.move(new_vm, vm, target)) == 1

    def test_an_injected_exception(self, new_vm: MakeVm, source: str, target: str) -> None:
        vm = new_vm(source)
        (vcpu,) = irqchip(vm)
        load_code(vm, CLI_HALT, 6)
        given = vcpu.get_vcpu_events()
        given.exception.injected, given.exception.nr = 1, 6
        vcpu.set_vcpu_events(given)
        assert finish(self.move(new_vm, vm, target)) == 1

    def test_a_level_that_is_still_high(self, new_vm: MakeVm, source: str, target: str) -> None:
        vm = new_vm(source)
        level_pin(vm)
        load_code(vm, STI_HALT, 0x51)
        moved = self.move(new_vm, vm, target)
        moved.irq_line(20, 0)
        state = moved.get_irqchip(KVM_IRQCHIP_IOAPIC).chip.ioapic
        assert (state.irr, state.redirtbl[20].bits & REMOTE_IRR) == (0, REMOTE_IRR)
        assert finish(moved) == 1

    def test_the_timer_of_a_local_apic(self, new_vm: MakeVm, source: str, target: str) -> None:
        vm = new_vm(source)
        (vcpu,) = irqchip(vm)
        set_lapic(vcpu, SVR=PIC_ENABLED)
        load_code(vm, STI_HALT, 0x55)
        # one-shot at 1 GHz / 1: a tenth of what it counts is left
        set_lapic(vcpu, LVTT=0x55, TDCR=0xB, TMICT=500_000_000, TMCCT=50_000_000)
        state = vm.save()
        left = state.vcpus[0].lapic.reg(TMCCT)
        moved = new_vm(target)
        moved.load(state)
        assert 0 < left <= 50_000_000
        assert 0 < moved.vcpus[0].get_lapic().reg(TMCCT) <= left
        assert finish(moved) == 1

    def test_a_vcpu_that_waits_for_sipi(self, new_vm: MakeVm, source: str, target: str) -> None:
        vm = new_vm(source)
        irqchip(vm, 2)
        load_code(vm, STI_HALT, 0)
        vm.write_memory(0x4000, EXIT_1)
        moved = self.move(new_vm, vm, target)
        assert moved.vcpus[1].get_mp_state() == KVM_MP_STATE_UNINITIALIZED
        for vcpu in moved.vcpus:
            set_lapic(vcpu, SVR=PIC_ENABLED)
        for message in (0x500, 0x604):  # INIT, SIPI for page 4
            moved.signal_msi(0xFEE0_1000, message)
        assert finish(moved) == 1

    def test_a_vcpu_in_hlt(self, new_vm: MakeVm, source: str, target: str) -> None:
        vm = new_vm(source)
        (vcpu,) = irqchip(vm)
        set_lapic(vcpu, SVR=PIC_ENABLED)
        load_code(vm, STI_HALT, 0x45)
        run_a_while(vm)
        assert vcpu.get_mp_state() == KVM_MP_STATE_HALTED
        moved = self.move(new_vm, vm, target)
        assert moved.vcpus[0].get_mp_state() == KVM_MP_STATE_HALTED
        moved.signal_msi(0xFEE0_0000, 0x45)
        assert finish(moved) == 1

    def test_an_access_that_is_under_way(self, new_vm: MakeVm, source: str, target: str) -> None:
        vm = new_vm(source)
        (vcpu,) = irqchip(vm)
        load_code(vm, bytes.fromhex("e480 fec0 e6f4"), 0)  # in al, 0x80; inc al; out 0xf4, al
        assert isinstance(vcpu.run(), ExitIo)
        vcpu.answer(b"\x04")
        assert finish(self.move(new_vm, vm, target)) == 5

    def test_cr8_without_a_local_apic(self, new_vm: MakeVm, source: str, target: str) -> None:
        vm = new_vm(source)
        vcpu = vm.create_vcpu(0)
        sregs = vcpu.get_sregs()
        sregs.cr8 = 5
        vcpu.set_sregs(sregs)
        load_code(vm, EXIT_1, 0)
        moved = self.move(new_vm, vm, target)
        assert isinstance(moved.vcpus[0].run(), ExitIo)
        assert moved.vcpus[0].get_sregs().cr8 == 5


def run_a_while(vm: Any, ms: int = 100) -> Run:
    """Some time of the machine's; the guest is not done by then."""
    run: Run = vm.run(for_ns=ms * 1_000_000) if vm.backend == "model" else vm.run(limit_s=ms / 1000)
    assert run.exit.reason in ("time", "limit", "deadlock"), run.exit
    return run


# A guest that ticks, there and back.

TICKS = 400
TICKING = ["tick-pic", "tick-oneshot", "tick-ioapic", "tick-lapic", "tick-x2apic", "ipi-tick"]


@pytest.mark.parametrize("first", ["model", "kernel"])
@pytest.mark.parametrize("name", [*TICKING, "tick-long"])
def test_a_guest_there_and_back_takes_all_its_ticks(new_vm: MakeVm, name: str, first: str) -> None:
    vm = new_vm(first)
    guest = kvmtick.guests.load(name, ticks=TICKS, tsc_khz=vm.get_tsc_khz())
    vm.prepare(guest.needs)
    vm.load(guest)
    state, before = None, 0
    for backend in ("kernel" if first == "model" else "model", first):
        run = run_until_it_waits(vm, before + 20)
        after = run.guest_ticks or 0
        left = vm.save()
        check_ticks(vm, after - before, waiting(state) - waiting(left))
        vm.close()
        state, before, vm = left, after, new_vm(backend)
        vm.load(state)
    run = vm.run()
    assert (run.exit.reason, run.exit.code, run.guest, run.guest_ticks) == ("done", 0, name, TICKS)
    check_ticks(vm, TICKS - before, waiting(state))


def run_until_it_waits(vm: Any, ticks: int) -> Run:
    """Run on until the guest has taken so many ticks, but not all, and all its vCPUs halt."""
    while True:
        run = run_a_while(vm, 20)
        assert run.guest_ticks is not None
        # tick-long hardly ever does
        halted = all(vcpu.get_mp_state() == KVM_MP_STATE_HALTED for vcpu in vm.vcpus)
        if run.guest_ticks >= ticks and (halted or run.guest == "tick-long"):
            return run


def waiting(state: VmState | None) -> int:
    """Ticks that are requests in PIC or local APIC."""
    if state is None:
        return 0
    assert state.chips is not None
    pic = state.chips.pic_master
    bits = [pic.irr & ~pic.imr & 1]
    for vcpu in state.vcpus:
        assert vcpu.lapic is not None
        bits += [vcpu.lapic.reg(IRR + 16 * i) for i in range(8)]
    return sum(each.bit_count() for each in bits)


def check_ticks(vm: Any, taken: int, moved: int) -> None:
    """On the model every expiry is known: the guest took them all, and those that moved in."""
    # tick-long takes those of two timers, and counts one's
    if vm.backend == "model" and vm.guest.name != "tick-long":
        ticks = vm.ticks()
        assert ticks.expired + moved == taken
        assert [ticks.count(verdict) for verdict in ("coalesced", "masked", "dropped")] == [0] * 3


# Files that are none.


@pytest.fixture(scope="module")
def good() -> str:
    """The file of a VM that has everything."""
    with kvmtick.Kvm("model").create_vm() as vm:
        level_pin(vm)
        vm.set_gsi_routing(NO_PIT_ROUTE)
        vm.create_pit2()
        vm.enable_cap(KVM_CAP_X2APIC_API, 1)
        vm.load(kvmtick.guests.load("tick-pic", ticks=3))
        return json.dumps(to_json(vm.save()))


def read(text: str, tmp_path: Path) -> VmState:
    path = tmp_path / "state"
    path.write_text(text, encoding="utf-8")
    return VmState.read(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no JSON, or cut short"),
        ("[" * 100_000, "no JSON, or cut short"),
        ("\x7fELF", "no JSON, or cut short"),
        ("[]", "no state of a VM"),
        ("{}", "no state of a VM"),
        ('{"format": "kvmtick-fuzz", "version": 1}', "no state of a VM"),
        ('{"format": "kvmtick-vm-state"}', "version None, and this kvmtick reads 1"),
        ('{"format": "kvmtick-vm-state", "version": 2}', "version 2, and this kvmtick reads 1"),
        ('{"format": "kvmtick-vm-state", "version": 1}', "backend: missing"),
    ],
)
def test_a_foreign_file_is_told(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(StateError) as caught:
        read(text, tmp_path)
    told = str(caught.value)
    assert told.startswith(f"{tmp_path / 'state'}: ")
    assert message in told
    assert "\n" not in told


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("irqchip",), "xics", "irqchip: 'xics' is none of none, split, kernel"),
        (("irqchip",), "none", "chips: they do not go with irqchip 'none'"),
        (("chips",), None, "chips: they do not go with irqchip 'kernel'"),
        (("chips", "ioapic"), "00", "chips.ioapic: kvm_ioapic_state has 216 bytes, not 1"),
        (("pit", "state"), "zz", "pit.state: no hexadecimal: 'zz'"),
        (("pit", "reinject"), 1, "pit.reinject: true or false is needed, not 1"),
        (("vcpus", 0, "lapic"), None, "vcpus[0].lapic: it does not go with irqchip 'kernel'"),
        (("vcpus", 0, "id"), -1, "vcpus[0].id: -1 is not in 0..4294967295"),
        (("vcpus", 0, "msrs"), {"x": "0x1"}, "a number in hexadecimal is needed, not 'x'"),
        (("vcpus", 0, "msrs"), [], "vcpus[0].msrs: an object is needed, not []"),
        (("vcpus",), {}, "vcpus: a list is needed, not {}"),
        (("clock_ns",), 1 << 64, "clock_ns: 18446744073709551616 is not in"),
        (("clock_ns",), True, "clock_ns: a number is needed, not True"),
        (("caps", 0, "args"), [0] * 5, "caps[0].args: more than 4 arguments"),
        (("guest", "parameters", "end"), "x", "guest.parameters.end: a number is needed, not 'x'"),
        (("guest", "tick_source"), "hpet", "'hpet' is none of pit, lapic"),
        (("ram_bytes",), 4097, "ram_bytes: 4097 is not a multiple of 4096"),
        (("ram_bytes",), 4096, "are not between the others"),
        (("ram", 0, "gpa"), "0x1", "are not multiples of 4096"),
        (("ram", 0, "bytes"), (1 << 20) + 4096, "1052672 is not in 1..1048576"),
        (("ram", 0, "bytes"), 8192, "RAM at 0x8000 has not 8192 bytes"),
        (("ram", 0, "zlib"), "????", "ram[0].zlib: no base64"),
        (("ram", 0, "zlib"), "AAAA", "RAM at 0x8000 is damaged"),
    ],
)
def test_a_wrong_field_is_told(
    good: str, path: tuple[Any, ...], value: Any, message: str, tmp_path: Path
) -> None:
    file = json.loads(good)
    *outer, last = path
    target = file
    for part in outer:
        target = target[part]
    target[last] = value
    with pytest.raises(StateError) as caught:
        read(json.dumps(file), tmp_path)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "contradict",
    [
        lambda file: file["vcpus"].append(file["vcpus"][0]),
        lambda file: file["vcpus"][0].update(mp_state=77),
        lambda file: file.update(routing=["f" * 96]),
        lambda file: file["caps"].append({"cap": 9999, "args": []}),
        lambda file: file.update(boot_cpu_id=1 << 20),
        lambda file: file["vcpus"][0]["msrs"].update({"0x277": "0x2"}),
        lambda file: file["vcpus"][0]["msrs"].update({"0x12345": "0x2"}),
    ],
)
def test_a_file_that_contradicts_itself_is_not_applied(
    good: str, contradict: Callable[[Any], None], tmp_path: Path, new_vm: MakeVm
) -> None:
    file = json.loads(good)
    contradict(file)
    state = read(json.dumps(file), tmp_path)
    vm = new_vm("model")
    with pytest.raises(StateError, match="contradicts itself"):
        vm.load(state)
    assert vm.vcpus == []


def test_a_number_of_any_length_is_one_line(good: str, tmp_path: Path) -> None:
    file = json.loads(good)
    file["clock_ns"] = 10**1000
    with pytest.raises(StateError) as caught:
        read(json.dumps(file), tmp_path)
    assert "..." in str(caught.value)
    assert len(str(caught.value)) < 200 + len(str(tmp_path))


def test_what_a_run_of_pages_takes_is_known_before(good: str, tmp_path: Path) -> None:
    """A small file that would inflate to gigabytes is refused before it does."""
    file = json.loads(good)
    deflate = zlib.compressobj(9)
    bomb = b"".join(deflate.compress(bytes(1 << 22)) for _ in range(64)) + deflate.flush()
    for claimed_bytes in (64 << 22, 4096):
        file["ram_bytes"] = 64 << 22
        file["ram"] = [
            {"gpa": "0x0", "bytes": claimed_bytes, "zlib": base64.b64encode(bomb).decode()}
        ]
        text = json.dumps(file)
        tracemalloc.start()
        try:
            with pytest.raises(StateError):
                read(text, tmp_path)
            assert tracemalloc.get_traced_memory()[1] < 32 << 20
        finally:
            tracemalloc.stop()


@settings(max_examples=200)
@given(
    st.lists(
        st.tuples(st.floats(0, 1), st.text('0189afe"[]{},:- ', max_size=2)), min_size=1, max_size=3
    ),
    st.sampled_from([1.0, 0.999, 0.5]),
)
def test_damage_is_found_or_harms_nobody(
    good: str, damage: list[tuple[float, str]], rest: float
) -> None:
    """Bytes that are others or gone, and an end that comes early."""
    text = good[: int(rest * len(good))]
    for where, what in damage:
        at = int(where * (len(text) - 1))
        text = text[:at] + what + text[at + 1 :]
    with suppress(json.JSONDecodeError), kvmtick.Kvm("model").create_vm() as vm:
        value = json.loads(text)
        loaded = False
        with suppress(StateError):
            vm.load(from_json(value))
            loaded = True
        assert loaded == (vm.vcpus != [])
