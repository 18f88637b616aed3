"""The API on the live kernel: what it says is what the model is held to."""

import errno
import time
from collections.abc import Callable

import pytest
from tiny_guests import (
    DONE,
    HLT,
    PIC_INIT,
    SPIN,
    TRIPLE_FAULT,
    MakeVm,
    accesses,
    bytes_at,
    out8,
    ticker,
)

from kvmtick.abi import KvmError
from kvmtick.abi.caps import KVM_CAP_PIT2
from kvmtick.abi.structs import (
    KVM_IRQ_ROUTING_IRQCHIP,
    KVM_IRQCHIP_IOAPIC,
    KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE,
    KVM_PIT_FLAGS_HPET_LEGACY,
    KVM_PIT_FLAGS_SPEAKER_DATA_ON,
    KVM_PIT_SPEAKER_DUMMY,
    kvm_irq_routing_entry,
    kvm_irqchip,
    kvm_pit_state,
    kvm_pit_state2,
    struct_diff,
    struct_fields,
)
from kvmtick.kvm.kernel import KernelVm

LIMIT_S = 5.0
LINE_CALLS = (1, 1, 0, 1, 0, 0)


# --- guests -------------------------------------------------------------------------------------


def test_guest_counts_pit_ticks(make_vm: MakeVm) -> None:
    vm = make_vm(ticker(20))
    run = vm.run(limit_s=LIMIT_S)
    assert run.exit.code == 20
    # the first tick is due one period after the counter was loaded
    assert run.elapsed_ns >= 20 * 999_848
    assert vm.get_pit2().channels[0].count == 1193


def test_the_guest_may_be_loaded_before_its_vcpu(make_vm: MakeVm) -> None:
    vm = make_vm()
    vm.load(bytes_at(ticker(3)))
    vm.create_vcpu()
    assert vm.run(limit_s=LIMIT_S).exit.code == 3


def test_console_and_serial(make_vm: MakeVm) -> None:
    # 0xe9, then 0x3f8 by dx; with DLAB set the byte is a divisor and no text
    def serial(port: int, value: int) -> bytes:
        return b"\xba" + port.to_bytes(2, "little") + bytes((0xB0, value, 0xEE))

    code = out8(0xE9, ord("a")) + serial(0x3FB, 0x80) + serial(0x3F8, 1)
    code += serial(0x3FB, 0x03) + serial(0x3F8, ord("b"))
    code += b"\xba\xfd\x03\xec" + DONE  # mov dx, 0x3fd; in al, dx
    run = make_vm(code).run(limit_s=LIMIT_S)
    assert (run.console, run.serial, run.exit.code) == ("a", "b", 0x60)


def test_string_output_reaches_the_console(make_vm: MakeVm) -> None:
    # xor ax, ax; mov ds, ax; mov si, 0x2000; mov cx, 5; mov dx, 0xe9; cld; rep outsb
    code = b"\x31\xc0\x8e\xd8\xbe\x00\x20\xb9\x05\x00\xba\xe9\x00\xfc\xf3\x6e" + DONE
    vm = make_vm(code)
    vm.write_memory(0x2000, b"hello")
    assert vm.run(limit_s=LIMIT_S).console == "hello"


def test_unknown_ports_read_ones(make_vm: MakeVm) -> None:
    # mov dx, 0x520; in eax, dx; out 0xf4, eax
    run = make_vm(b"\xba\x20\x05\x66\xed\x66\xe7\xf4").run(limit_s=LIMIT_S)
    assert run.exit.code == 0xFFFF_FFFF


def test_handlers_come_first(make_vm: MakeVm) -> None:
    calls: list[tuple[int, int, int | None]] = []

    def handler(port: int, size_bytes: int, value: int | None) -> int | None:
        calls.append((port, size_bytes, value))
        return 0x1_42 if value is None else None

    code = out8(0xE9, 7) + b"\xe4\xe9" + DONE
    run = make_vm(code).run(handlers={0xE9: handler}, limit_s=LIMIT_S)
    assert calls == [(0xE9, 1, 7), (0xE9, 1, None)]
    assert (run.console, run.exit.code) == ("", 0x42)


def test_sleep_port(make_vm: MakeVm) -> None:
    # mov eax, 50000; out 0xd8, eax
    code = b"\x66\xb8" + (50_000).to_bytes(4, "little") + b"\x66\xe7\xd8" + DONE
    assert make_vm(code).run(limit_s=LIMIT_S).elapsed_ns >= 50_000_000
    # a guest cannot sleep past the limit
    code = b"\x66\xb8\xff\xff\xff\xff\x66\xe7\xd8" + SPIN
    run = make_vm(code).run(limit_s=0.1)
    assert run.exit.reason == "limit"
    assert run.elapsed_ns < 2_000_000_000


@pytest.mark.parametrize(
    ("code", "irqchip", "reason"),
    [
        (SPIN, True, "limit"),
        (HLT, False, "deadlock"),
        (TRIPLE_FAULT, True, "triple-fault"),
    ],
)
def test_other_ends(make_vm: MakeVm, code: bytes, irqchip: bool, reason: str) -> None:
    assert make_vm(code, irqchip=irqchip).run(limit_s=0.1).exit.reason == reason


def test_a_kick_interrupts(make_vm: MakeVm) -> None:
    vm = make_vm(SPIN)
    vm.vcpus[0].kick()
    assert vm.run(limit_s=LIMIT_S).exit.reason == "interrupted"


def test_without_a_vcpu_there_is_nothing_to_run(make_vm: MakeVm) -> None:
    with pytest.raises(KvmError, match=r"call create_vcpu\(0\)"):
        make_vm().run()


# --- the PIT: section 3 -------------------------------------------------------------------------


def test_pit_after_creation(make_vm: MakeVm) -> None:
    before_ns = time.monotonic_ns()
    state = make_vm().get_pit2()
    expected = kvm_pit_state2()
    for number, channel in enumerate(expected.channels):
        channel.count, channel.mode, channel.gate = 0x10000, 0xFF, int(number != 2)
    assert struct_diff(state, expected, ["count_load_time"]) == []
    loaded = [channel.count_load_time for channel in state.channels]
    assert loaded[0] == 0
    assert before_ns <= loaded[1] <= loaded[2] <= time.monotonic_ns()


def test_no_tick_before_the_guest_programs_the_counter(make_vm: MakeVm) -> None:
    vm = make_vm(PIC_INIT + b"\xfb" + HLT + DONE)
    assert vm.run(limit_s=0.12).exit.reason == "limit"
    assert vm.get_irqchip(KVM_IRQCHIP_PIC_MASTER).chip.pic.irr == 0


def test_set_pit2_stores_and_reloads(make_vm: MakeVm) -> None:
    vm = make_vm()
    state = vm.get_pit2()
    state.channels[0].count_load_time = 77
    for channel in state.channels:
        channel.count = 0
    state.flags = KVM_PIT_FLAGS_SPEAKER_DATA_ON | KVM_PIT_FLAGS_HPET_LEGACY
    vm.set_pit2(state)
    again = vm.get_pit2()
    assert [channel.count for channel in again.channels] == [0x10000] * 3
    assert again.flags == 3
    assert again.channels[0].count_load_time == 77
    assert again.channels[1].count_load_time > state.channels[1].count_load_time


def test_get_pit_is_get_pit2_without_flags(make_vm: MakeVm) -> None:
    vm = make_vm()
    old, new = vm.get_pit(), vm.get_pit2()
    assert bytes(old) == bytes(new)[: len(bytes(old))]
    old.channels[2].count = 0x123456
    vm.set_pit(old)
    assert vm.get_pit2().channels[2].count == 0x123456


@pytest.mark.parametrize(("flags", "exits"), [(0, 1), (KVM_PIT_SPEAKER_DUMMY, 0)])
def test_port_61_belongs_to_the_speaker_flag(make_vm: MakeVm, flags: int, exits: int) -> None:
    vm = make_vm(pit=False)
    vm.create_pit2(flags)
    vm.create_vcpu()
    vm.load(bytes_at(b"\xe4\x61" + DONE))
    assert accesses(vm, 0x61) == exits


def test_create_pit_has_the_speaker(make_vm: MakeVm) -> None:
    vm = make_vm(pit=False)
    vm.create_pit()
    vm.create_vcpu()
    vm.load(bytes_at(b"\xe4\x61" + DONE))
    assert accesses(vm, 0x61) == 0


# --- lines: section 2 ---------------------------------------------------------------------------


def _alone(vm: KernelVm, gsi: int, chip: int, pin: int) -> None:
    """Route `gsi` to one pin and nothing else anywhere."""
    entry = kvm_irq_routing_entry(gsi=gsi, type=KVM_IRQ_ROUTING_IRQCHIP)
    entry.u.irqchip.irqchip, entry.u.irqchip.pin = chip, pin
    vm.set_gsi_routing([entry])


def _pic(vm: KernelVm, chip_id: int, *, imr: int = 0, elcr: int = 0) -> None:
    chip = vm.get_irqchip(chip_id)
    chip.chip.pic.imr, chip.chip.pic.elcr = imr, elcr
    vm.set_irqchip(chip)


@pytest.mark.parametrize("chip", [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE])
@pytest.mark.parametrize(
    ("imr", "elcr", "expected"),
    [
        (0x00, 0x00, [1, 1, 1, 0, 1, 1]),
        (0x10, 0x00, [-1] * 6),
        (0x10, 0x10, [-1] * 6),
        (0x00, 0x10, [1, 0, 1, 1, 1, 1]),
    ],
    ids=["edge", "edge-masked", "level-masked", "level"],
)
def test_pic_line_status(
    make_vm: MakeVm, chip: int, imr: int, elcr: int, expected: list[int]
) -> None:
    vm = make_vm(pit=False)
    _alone(vm, 4, chip, 4)
    _pic(vm, chip, imr=imr, elcr=elcr)
    assert [vm.irq_line_status(4, level) for level in LINE_CALLS] == expected


def test_masked_ioapic_edge_line_status(make_vm: MakeVm) -> None:
    vm = make_vm(pit=False)
    _alone(vm, 4, KVM_IRQCHIP_IOAPIC, 4)
    assert [vm.irq_line_status(4, level) for level in LINE_CALLS] == [-1, 0, 1, -1, 1, 1]


def test_line_status_adds_up_over_the_chips(make_vm: MakeVm) -> None:
    vm = make_vm(pit=False)
    assert [vm.irq_line_status(4, level) for level in LINE_CALLS[:5]] == [1, 1, 2, 0, 2]


@pytest.mark.parametrize("gsi", [16, 23, 24, 4095, 4096, 0x7FFF_FFFF, 0xFFFF_FFFF])
def test_unrouted_and_masked_lines_are_ignored(make_vm: MakeVm, gsi: int) -> None:
    vm = make_vm(pit=False)
    assert vm.irq_line_status(gsi, 1) == -1
    vm.irq_line(gsi, 0)


def test_a_line_reaches_the_pic(make_vm: MakeVm) -> None:
    vm = make_vm(pit=False)
    vm.irq_line(3, 1)
    assert vm.get_irqchip(KVM_IRQCHIP_PIC_MASTER).chip.pic.irr == 1 << 3


# --- chips: sections 4 and 5 --------------------------------------------------------------------


def test_chips_after_creation(make_vm: MakeVm) -> None:
    vm = make_vm(pit=False)
    for chip_id, elcr_mask in ((KVM_IRQCHIP_PIC_MASTER, 0xF8), (KVM_IRQCHIP_PIC_SLAVE, 0xDE)):
        expected = kvm_irqchip(chip_id=chip_id)
        expected.chip.pic.elcr_mask = elcr_mask
        assert struct_diff(vm.get_irqchip(chip_id), expected) == []
    ioapic = vm.get_irqchip(KVM_IRQCHIP_IOAPIC)
    table = [value for name, value in struct_fields(ioapic) if "redirtbl" in name]
    assert table == [0x10000] * 24
    assert ioapic.chip.ioapic.base_address == 0xFEC0_0000


def test_chips_store_what_they_are_given(make_vm: MakeVm) -> None:
    vm = make_vm(pit=False)
    pic = vm.get_irqchip(KVM_IRQCHIP_PIC_SLAVE)
    pic.chip.pic.imr, pic.chip.pic.irq_base, pic.chip.pic.elcr = 0x5A, 0x28, 0x0E
    vm.set_irqchip(pic)
    assert struct_diff(vm.get_irqchip(KVM_IRQCHIP_PIC_SLAVE), pic) == []


def test_lapic_after_creation(make_vm: MakeVm) -> None:
    vcpu = make_vm(HLT).vcpus[0]
    lapic = vcpu.get_lapic()
    registers = {offset: lapic.reg(offset) for offset in (0x30, 0xE0, 0xF0, 0x320, 0x350, 0x3E0)}
    assert registers == {
        0x30: 0x50014,
        0xE0: 0xFFFF_FFFF,
        0xF0: 0xFF,
        0x320: 0x10000,
        0x350: 0x700,
        0x3E0: 0,
    }
    vcpu.set_lapic(lapic)
    assert bytes(vcpu.get_lapic()) == bytes(lapic)


def test_vcpu_state_round_trips(make_vm: MakeVm) -> None:
    vcpu = make_vm(HLT).vcpus[0]
    regs = vcpu.get_regs()
    regs.rbx = 0x1234
    vcpu.set_regs(regs)
    assert vcpu.get_regs().rbx == 0x1234
    vcpu.set_sregs(vcpu.get_sregs())
    vcpu.set_mp_state(3)
    assert vcpu.get_mp_state() == 3
    for _ in range(3):
        vcpu.nmi()
    vcpu.set_vcpu_events(vcpu.get_vcpu_events())
    assert vcpu.get_tsc_khz() > 0


def test_three_nmis_make_two(make_vm: MakeVm) -> None:
    """Section 5: two at most wait; the third is dropped."""
    # ss:sp; vector 2 -> 0x1100; again: hlt; jmp again; handler: inc bx; iret
    vm = make_vm(b"\x31\xc0\x8e\xd0\xbc\x00\x10" + SPIN)
    vm.write_memory(2 * 4, (0x1100).to_bytes(2, "little") + b"\0\0")
    vm.write_memory(0x1100, b"\x43\xcf")
    vcpu = vm.vcpus[0]
    vcpu.run(0.02)
    for _ in range(3):
        vcpu.nmi()
    vcpu.run(0.1)
    assert vcpu.get_regs().rbx == 2


def test_capability_of_the_vm(make_vm: MakeVm) -> None:
    vm = make_vm()
    assert vm.check_extension(KVM_CAP_PIT2) == 1
    assert vm.get_tsc_khz() > 0


# --- errno: section 8 ---------------------------------------------------------------------------

BARE: dict[str, bool] = {"irqchip": False}
NO_PIT: dict[str, bool] = {"pit": False}
FULL: dict[str, bool] = {}

Call = Callable[[KernelVm], object]

ERRNO_ROWS: list[tuple[str, dict[str, bool], Call, int]] = [
    ("CREATE_IRQCHIP second time", NO_PIT, lambda vm: vm.create_irqchip(), errno.EEXIST),
    (
        "CREATE_IRQCHIP after a vCPU exists",
        BARE,
        lambda vm: (vm.create_vcpu(), vm.create_irqchip()),
        errno.EINVAL,
    ),
    ("CREATE_PIT no irqchip", BARE, lambda vm: vm.create_pit(), errno.ENOENT),
    ("CREATE_PIT2 no irqchip", BARE, lambda vm: vm.create_pit2(), errno.ENOENT),
    ("CREATE_PIT twice", NO_PIT, lambda vm: (vm.create_pit(), vm.create_pit()), errno.EEXIST),
    (
        "CREATE_PIT2 after CREATE_PIT",
        NO_PIT,
        lambda vm: (vm.create_pit(), vm.create_pit2()),
        errno.EEXIST,
    ),
    ("GET_PIT no irqchip", BARE, lambda vm: vm.get_pit(), errno.ENXIO),
    ("GET_PIT2 no irqchip", BARE, lambda vm: vm.get_pit2(), errno.ENXIO),
    ("SET_PIT no irqchip", BARE, lambda vm: vm.set_pit(kvm_pit_state()), errno.ENXIO),
    ("SET_PIT2 no irqchip", BARE, lambda vm: vm.set_pit2(kvm_pit_state2()), errno.ENXIO),
    ("REINJECT_CONTROL no irqchip", BARE, lambda vm: vm.reinject_control(True), errno.ENXIO),
    ("GET_PIT no PIT", NO_PIT, lambda vm: vm.get_pit(), errno.ENXIO),
    ("GET_PIT2 no PIT", NO_PIT, lambda vm: vm.get_pit2(), errno.ENXIO),
    ("SET_PIT no PIT", NO_PIT, lambda vm: vm.set_pit(kvm_pit_state()), errno.ENXIO),
    ("SET_PIT2 no PIT", NO_PIT, lambda vm: vm.set_pit2(kvm_pit_state2()), errno.ENXIO),
    ("REINJECT_CONTROL no PIT", NO_PIT, lambda vm: vm.reinject_control(False), errno.ENXIO),
    ("GET_IRQCHIP no irqchip", BARE, lambda vm: vm.get_irqchip(0), errno.ENXIO),
    ("SET_IRQCHIP no irqchip", BARE, lambda vm: vm.set_irqchip(kvm_irqchip()), errno.ENXIO),
    ("GET_IRQCHIP chip_id 3", FULL, lambda vm: vm.get_irqchip(3), errno.EINVAL),
    ("GET_IRQCHIP chip_id -1", FULL, lambda vm: vm.get_irqchip(-1), errno.EINVAL),
    ("SET_IRQCHIP chip_id 4", FULL, lambda vm: vm.set_irqchip(kvm_irqchip(4)), errno.EINVAL),
    ("IRQ_LINE no irqchip", BARE, lambda vm: vm.irq_line(0, 1), errno.ENXIO),
    ("IRQ_LINE_STATUS no irqchip", BARE, lambda vm: vm.irq_line_status(0, 1), errno.ENXIO),
    ("SET_GSI_ROUTING no irqchip", BARE, lambda vm: vm.set_gsi_routing([]), errno.EINVAL),
    ("SET_GSI_ROUTING flags=1", FULL, lambda vm: vm.set_gsi_routing([], 1), errno.EINVAL),
    ("SET_GSI_ROUTING PIC pin 8", FULL, lambda vm: _alone(vm, 0, 0, 8), errno.EINVAL),
    ("SET_GSI_ROUTING IOAPIC pin 24", FULL, lambda vm: _alone(vm, 0, 2, 24), errno.EINVAL),
    ("SET_GSI_ROUTING irqchip 3", FULL, lambda vm: _alone(vm, 0, 3, 0), errno.EINVAL),
    ("SET_GSI_ROUTING gsi 4096", FULL, lambda vm: _alone(vm, 4096, 0, 0), errno.EINVAL),
    (
        "SET_GSI_ROUTING type 0",
        FULL,
        lambda vm: vm.set_gsi_routing([kvm_irq_routing_entry()]),
        errno.EINVAL,
    ),
    ("CREATE_VCPU twice", FULL, lambda vm: (vm.create_vcpu(), vm.create_vcpu()), errno.EEXIST),
    ("CREATE_VCPU id 4096", FULL, lambda vm: vm.create_vcpu(4096), errno.EINVAL),
    ("CREATE_VCPU id -1", FULL, lambda vm: vm.create_vcpu(-1), errno.EINVAL),
    ("GET_LAPIC no irqchip", BARE, lambda vm: vm.create_vcpu().get_lapic(), errno.EINVAL),
    (
        "SET_MP_STATE no irqchip state=3",
        BARE,
        lambda vm: vm.create_vcpu().set_mp_state(3),
        errno.EINVAL,
    ),
    ("SET_MP_STATE state=5", FULL, lambda vm: vm.create_vcpu().set_mp_state(5), errno.EINVAL),
]


@pytest.mark.parametrize(
    ("given", "call", "expected"),
    [row[1:] for row in ERRNO_ROWS],
    ids=[row[0] for row in ERRNO_ROWS],
)
def test_errno(make_vm: MakeVm, given: dict[str, bool], call: Call, expected: int) -> None:
    vm = make_vm(**given)
    with pytest.raises(KvmError) as caught:
        call(vm)
    assert caught.value.errno == expected
    assert len(str(caught.value).splitlines()) == 1


ALLOWED_ROWS: list[tuple[str, Call]] = [
    ("CREATE_VCPU id 4095", lambda vm: vm.create_vcpu(4095)),
    ("SET_GSI_ROUTING nr=0", lambda vm: vm.set_gsi_routing([])),
    ("SET_GSI_ROUTING gsi 4095", lambda vm: _alone(vm, 4095, 0, 0)),
    ("SET_PIT2 all zero", lambda vm: vm.set_pit2(kvm_pit_state2())),
    (
        "REINJECT_CONTROL off and on",
        lambda vm: (vm.reinject_control(False), vm.reinject_control(True)),
    ),
    ("IRQ_LINE level=2", lambda vm: vm.irq_line(0, 2)),
]


@pytest.mark.parametrize("call", [row[1] for row in ALLOWED_ROWS], ids=[r[0] for r in ALLOWED_ROWS])
def test_allowed(make_vm: MakeVm, call: Call) -> None:
    call(make_vm())


@pytest.mark.parametrize("flags", [0, 1, 2, 0xFFFF_FFFF])
def test_create_pit2_takes_any_flags(make_vm: MakeVm, flags: int) -> None:
    make_vm(pit=False).create_pit2(flags)


def test_image_outside_ram_is_refused(make_vm: MakeVm) -> None:
    with pytest.raises(ValueError, match="outside guest RAM"):
        make_vm().load(bytes_at(b"\0" * 16, load_at=0x1F_FFF8))
