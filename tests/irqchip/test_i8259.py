"""The PIC pair, rule by rule."""

import pytest
from attributes import attributes
from pc import (
    ELCR1,
    ELCR2,
    EOI,
    MASTER,
    MASTER_DATA,
    SLAVE,
    SLAVE_DATA,
    Pc,
    VcpuStub,
)

from kvmtick.abi.structs import kvm_pic_state
from kvmtick.irqchip.i8259 import PIC_STATE_FIELDS, PicPorts, PicState
from kvmtick.trace.events import Event, Irqchip, field

LEVELS = (1, 1, 0, 1, 0, 0)
"""The call sequence of the IRQ_LINE_STATUS table."""

CHIPS = [(MASTER, 0), (SLAVE, 8)]
READ_IRR, READ_ISR, POLL = 0x0A, 0x0B, 0x0C


def registers(chip: PicState) -> dict[str, int]:
    return {name: getattr(chip, name) for name in PIC_STATE_FIELDS}


def irr(pc: Pc, port: int = MASTER) -> int:
    pc.out(port, READ_IRR)
    return pc.inp(port)


def isr(pc: Pc, port: int = MASTER) -> int:
    pc.out(port, READ_ISR)
    return pc.inp(port)


# Reset and state.


def test_after_reset_everything_is_0_but_the_elcr_mask() -> None:
    for chip, elcr_mask in zip(Pc(pit=None).chips, (0xF8, 0xDE), strict=True):
        assert registers(chip) == dict.fromkeys(PIC_STATE_FIELDS, 0) | {"elcr_mask": elcr_mask}


def test_the_state_is_the_kernels_struct_and_no_field_is_forgotten() -> None:
    assert tuple(name for name, *_ in kvm_pic_state._fields_) == PIC_STATE_FIELDS
    assert set(attributes(PicState)) == {*PIC_STATE_FIELDS, "first_pin"}


def test_save_and_restore_walk_every_field() -> None:
    chip = PicState(8, 0)
    for index, name in enumerate(PIC_STATE_FIELDS):
        setattr(chip, name, 0xA0 + index)
    saved = chip.save()
    assert saved == bytes(range(0xA0, 0xB0))
    for index, name in enumerate(PIC_STATE_FIELDS):
        assert getattr(kvm_pic_state.from_buffer_copy(saved), name) == 0xA0 + index
    other = PicState(0, 0xF8)
    other.restore(saved)
    assert other.save() == saved
    assert other.first_pin == 0  # which chip it is does not travel


@pytest.mark.parametrize("size", [0, 15, 17])
def test_a_state_of_another_size_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match="zip"):
        PicState(0, 0).restore(bytes(size))


def test_a_restored_request_is_delivered_after_the_update(pics: Pc) -> None:
    chip = pics.pic.master
    chip.restore(bytes((0, 0x08)) + chip.save()[2:])
    assert not pics.pic.output
    pics.pic.update_irq()
    assert pics.inta() == 0x23


def test_user_space_may_set_an_elcr_and_its_mask_beyond_the_chips(pics: Pc) -> None:
    chip = pics.pic.master
    chip.restore(chip.save()[:14] + b"\xff\xff")
    assert pics.inp(ELCR1) == 0xFF
    pics.out(ELCR1, 0x07)
    assert pics.inp(ELCR1) == 0x07


# What KVM_IRQ_LINE_STATUS returns.


@pytest.mark.parametrize("pin", [3, 11])
@pytest.mark.parametrize(
    ("level_triggered", "masked", "results"),
    [
        (False, False, (1, 1, 1, 0, 1, 1)),
        (True, False, (1, 0, 1, 1, 1, 1)),
        (False, True, (-1, -1, -1, -1, -1, -1)),
        (True, True, (-1, -1, -1, -1, -1, -1)),
    ],
)
def test_line_status_of_the_pic_alone(
    pics: Pc, pin: int, level_triggered: bool, masked: bool, results: tuple[int, ...]
) -> None:
    bit = 1 << (pin & 7)
    pics.out(ELCR2 if pin > 7 else ELCR1, bit if level_triggered else 0)
    pics.out(SLAVE_DATA if pin > 7 else MASTER_DATA, bit if masked else 0)
    assert tuple(pics.pic.set_irq(pin, 0, level) for level in LEVELS) == results


@pytest.mark.parametrize("gsi", [3, 11])
@pytest.mark.parametrize(
    ("level_triggered", "masked", "results"),
    [
        (False, False, (1, 1, 2, 0, 2, 2)),
        (True, False, (1, 0, 2, 1, 2, 2)),
        (False, True, (-1, 0, 1, -1, 1, 1)),
    ],
)
def test_line_status_of_pic_and_masked_ioapic_together(
    pics: Pc, gsi: int, level_triggered: bool, masked: bool, results: tuple[int, ...]
) -> None:
    bit = 1 << (gsi & 7)
    pics.out(ELCR2 if gsi > 7 else ELCR1, bit if level_triggered else 0)
    pics.out(SLAVE_DATA if gsi > 7 else MASTER_DATA, bit if masked else 0)
    assert tuple(pics.line(gsi, level) for level in LEVELS) == results


@pytest.mark.parametrize("gsi", [16, 23])
def test_line_status_of_a_gsi_that_only_the_masked_ioapic_has(pics: Pc, gsi: int) -> None:
    assert tuple(pics.line(gsi, level) for level in LEVELS) == (-1, 0, 1, -1, 1, 1)


@pytest.mark.parametrize("gsi", [24, 4096, 0xFFFF_FFFF])
def test_line_status_of_a_gsi_without_a_route(pics: Pc, gsi: int) -> None:
    assert [pics.line(gsi, level) for level in LEVELS] == [-1] * 6
    assert not pics.pic.output


def test_line_status_is_0_while_a_request_waits_and_1_after_it_was_taken(pics: Pc) -> None:
    assert pics.pic.set_irq(3, 0, 1) == 1
    pics.pic.set_irq(3, 0, 0)
    assert pics.pic.set_irq(3, 0, 1) == 0
    pics.pic.set_irq(3, 0, 0)
    assert pics.inta() == 0x23
    assert pics.pic.set_irq(3, 0, 1) == 1  # in service, but the request register is free


# Edge and level.


@pytest.mark.parametrize(("gsi", "vector"), [(3, 0x23), (11, 0x2B)])
def test_an_edge_that_is_gone_before_inta_still_fires(pics: Pc, gsi: int, vector: int) -> None:
    pics.pulse(gsi)
    assert pics.inta() == vector
    assert pics.inta() == -1


def test_a_level_that_is_gone_before_inta_vanishes_silently(pics: Pc) -> None:
    pics.out(ELCR1, 0x20)
    pics.line(5, 1)
    assert pics.pic.output
    pics.line(5, 0)
    assert not pics.pic.output
    assert pics.inta() == -1


def test_a_line_held_high_fires_once_by_edge_and_again_after_eoi_by_level(pics: Pc) -> None:
    pics.out(ELCR1, 0x20)
    for gsi in (4, 5):
        pics.line(gsi, 1)
    assert pics.inta() == 0x24
    pics.out(MASTER, EOI)
    assert pics.inta() == 0x25
    pics.out(MASTER, EOI)
    assert pics.inta() == 0x25  # still high
    pics.line(5, 0)
    pics.out(MASTER, EOI)
    assert pics.inta() == -1


def test_an_edge_latched_while_masked_fires_at_the_unmask(pics: Pc) -> None:
    pics.out(MASTER_DATA, 0x08)
    pics.pulse(3)
    assert pics.inta() == -1
    pics.out(MASTER_DATA, 0)
    assert pics.inta() == 0x23


@pytest.mark.parametrize(("port", "mask"), [(ELCR1, 0xF8), (ELCR2, 0xDE)])
def test_the_elcr_keeps_timer_keyboard_cascade_rtc_and_fpu_edge_triggered(
    pics: Pc, port: int, mask: int
) -> None:
    pics.out(port, 0xFF)
    assert pics.inp(port) == mask
    assert pics.inp(ELCR1 if port == ELCR2 else ELCR2) == 0
    pics.out(port, 0x08)
    assert pics.inp(port) == 0x08


def test_a_line_is_the_or_of_its_sources(pics: Pc) -> None:
    pics.out(ELCR1, 0x20)
    pics.line(5, 1, source=0)
    pics.line(5, 1, source=2)
    pics.line(5, 0, source=0)
    assert pics.pic.output
    pics.line(5, 0, source=2)
    assert not pics.pic.output


# INTR and the INTA cycle.


def test_intr_rises_once_and_asks_the_first_vcpu_that_takes_extint() -> None:
    pc = Pc(pit=None)
    pc.vcpu.extint = False
    second, third = VcpuStub(), VcpuStub()
    pc.add_vcpu(second)
    pc.add_vcpu(third)
    pc.init_pics()
    pc.pulse(3, 4)
    assert [vcpu.requests for vcpu in (pc.vcpu, second, third)] == [0, 1, 0]
    assert pc.inta() == 0x23
    assert [vcpu.requests for vcpu in (pc.vcpu, second, third)] == [0, 1, 0]
    pc.out(MASTER, EOI)  # IRQ 4 comes up
    assert [vcpu.requests for vcpu in (pc.vcpu, second, third)] == [0, 2, 0]


def test_inta_of_a_slave_request_puts_both_chips_in_service(pics: Pc) -> None:
    pics.pulse(11)
    assert (irr(pics), irr(pics, SLAVE)) == (0x04, 0x08)
    assert pics.inta() == 0x2B
    assert (isr(pics), isr(pics, SLAVE)) == (0x04, 0x08)
    assert (irr(pics), irr(pics, SLAVE)) == (0, 0)
    pics.out(SLAVE, EOI)
    pics.out(MASTER, EOI)
    assert (isr(pics), isr(pics, SLAVE)) == (0, 0)


def test_inta_with_nothing_to_give_is_the_masters_spurious_vector(pics: Pc) -> None:
    assert pics.pic.read_irq() == 0x27
    assert isr(pics) == 0


def test_a_cascade_request_without_a_slaves_is_the_slaves_spurious_vector(pics: Pc) -> None:
    pics.pulse(2)
    assert pics.inta() == 0x2F
    assert (isr(pics), isr(pics, SLAVE)) == (0x04, 0)


def test_a_masked_slave_request_after_the_cascade_was_latched_is_spurious(pics: Pc) -> None:
    pics.pulse(11)
    pics.out(SLAVE_DATA, 0x08)
    assert pics.inta() == 0x2F


def test_a_vector_is_one_byte_whatever_base_user_space_set(pics: Pc) -> None:
    pics.pic.master.irq_base = 0xFF
    pics.pulse(3)
    assert pics.inta() == 0x02


# Priorities and EOI commands.


def test_the_lower_pin_comes_first_and_interrupts_the_higher(pics: Pc) -> None:
    pics.pulse(5)
    assert pics.inta() == 0x25
    pics.pulse(6, 3)
    assert pics.inta() == 0x23
    assert pics.inta() == -1
    pics.out(MASTER, EOI)
    assert isr(pics) == 0x20
    assert pics.inta() == -1
    pics.out(MASTER, EOI)
    assert pics.inta() == 0x26


def test_set_priority_makes_the_named_pin_the_lowest(pics: Pc) -> None:
    pics.out(MASTER, 0xC2)
    assert pics.pic.master.priority_add == 3
    pics.pulse(0, 1, 3)
    assert [(pics.inta(), pics.out(MASTER, EOI))[0] for _ in range(3)] == [0x23, 0x20, 0x21]


def test_set_priority_lets_a_request_overtake_what_is_in_service(pics: Pc) -> None:
    pics.pulse(3)
    pics.inta()
    pics.pulse(5)
    assert pics.inta() == -1
    pics.out(MASTER, 0xC3)
    assert pics.inta() == 0x25


@pytest.mark.parametrize(
    ("command", "isr_left", "priority_add"),
    [
        (0x20, 0x20, 0),  # non-specific EOI
        (0xA0, 0x20, 4),  # and rotate
        (0x63, 0x20, 0),  # specific EOI
        (0xE3, 0x20, 4),  # and rotate
        (0x65, 0x08, 0),
        (0xE5, 0x08, 6),
        (0x60, 0x28, 0),  # of a pin that is not in service
        (0x40, 0x28, 0),  # no operation
    ],
)
def test_end_of_interrupt_commands(
    pics: Pc, command: int, isr_left: int, priority_add: int
) -> None:
    for gsi in (5, 3):
        pics.pulse(gsi)
        pics.inta()
    assert isr(pics) == 0x28
    pics.out(MASTER, command)
    assert isr(pics) == isr_left
    assert pics.pic.master.priority_add == priority_add


@pytest.mark.parametrize("command", [0x20, 0xA0])
def test_a_non_specific_eoi_with_nothing_in_service_does_nothing(pics: Pc, command: int) -> None:
    pics.records()
    pics.out(MASTER, command)
    assert pics.pic.master.priority_add == 0
    assert pics.records() == []


def test_a_rotating_eoi_goes_by_the_rotated_priorities(pics: Pc) -> None:
    pics.out(MASTER, 0xC4)  # 5 is the highest now
    for gsi in (1, 6):
        pics.pulse(gsi)
        pics.inta()
    assert isr(pics) == 0x42
    pics.out(MASTER, 0xA0)
    assert isr(pics) == 0x02
    assert pics.pic.master.priority_add == 7


def test_the_slaves_eoi_does_not_end_the_masters(pics: Pc) -> None:
    pics.pulse(9)
    pics.inta()
    pics.out(SLAVE, EOI)
    assert (isr(pics), isr(pics, SLAVE)) == (0x04, 0)


# Automatic EOI.


def test_with_automatic_eoi_inta_ends_the_service_and_tells_who_waits() -> None:
    pc = Pc(pit=None)
    pc.init_pics(icw4=0x03)
    acked: list[int] = []
    for gsi in (2, 3, 11):
        pc.board.notifiers.register_ack(gsi, lambda gsi=gsi: acked.append(gsi))
    pc.pulse(3)
    assert pc.inta() == 0x23
    assert isr(pc) == 0
    assert acked == [3]
    pc.pulse(11)
    assert pc.inta() == 0x2B
    assert (isr(pc), isr(pc, SLAVE)) == (0, 0)
    assert acked == [3, 2, 11]
    assert pc.pic.master.priority_add == 0


def test_rotation_on_automatic_eoi_is_switched_by_0x80_and_0x00() -> None:
    pc = Pc(pit=None)
    pc.init_pics(icw4=0x03)
    pc.out(MASTER, 0x80)
    pc.pulse(3)
    pc.inta()
    assert pc.pic.master.priority_add == 4
    pc.out(MASTER, 0x00)
    pc.pulse(6)
    pc.inta()
    assert pc.pic.master.priority_add == 4


def test_rotation_on_automatic_eoi_needs_automatic_eoi(pics: Pc) -> None:
    pics.out(MASTER, 0x80)
    pics.pulse(3)
    pics.inta()
    assert pics.pic.master.priority_add == 0


# Special modes.


@pytest.mark.parametrize(("icw4", "nests"), [(0x11, True), (0x01, False)])
def test_special_fully_nested_mode_lets_a_slave_interrupt_a_slave(icw4: int, nests: bool) -> None:
    pc = Pc(pit=None)
    pc.init_pics(icw4=icw4)
    pc.pulse(12)
    assert pc.inta() == 0x2C
    pc.pulse(9)
    assert pc.inta() == (0x29 if nests else -1)
    pc.pulse(14)
    assert pc.inta() == -1


def test_special_fully_nested_mode_means_the_masters_cascade_only() -> None:
    pc = Pc(pit=None)
    pc.init_pics(icw4=0x11)
    pc.pulse(3)
    pc.inta()
    pc.pulse(3, 4)
    assert pc.inta() == -1
    pc.pulse(10)  # pin 2 of the slave is nothing special
    assert pc.inta() == 0x2A
    pc.pulse(10)
    assert pc.inta() == -1


def test_the_special_mask_is_stored_without_effect(pics: Pc) -> None:
    pics.pulse(3)
    pics.inta()
    pics.out(MASTER_DATA, 0x08)
    pics.out(MASTER, 0x68)
    assert pics.pic.master.special_mask == 1
    pics.pulse(5)
    assert pics.inta() == -1
    assert (irr(pics), isr(pics)) == (0x20, 0x08)
    pics.out(MASTER, 0x48)
    assert pics.pic.master.special_mask == 0
    pics.out(MASTER, 0x28)  # without the enable bit
    assert pics.pic.master.special_mask == 0


# OCW3 and reading.


def test_ocw3_chooses_the_register_that_is_read(pics: Pc) -> None:
    pics.pulse(3)
    pics.inta()
    pics.pulse(5)
    assert (irr(pics), isr(pics)) == (0x20, 0x08)
    pics.out(MASTER, 0x08, 0x09)  # without bit 1 the choice stays
    assert pics.inp(MASTER) == 0x08


@pytest.mark.parametrize(("port", "first_gsi"), CHIPS)
def test_the_odd_port_reads_the_mask(pics: Pc, port: int, first_gsi: int) -> None:
    pics.out(port + 1, 0xA5)
    assert pics.inp(port + 1) == 0xA5
    assert pics.inp(SLAVE_DATA if port == MASTER else MASTER_DATA) == 0


@pytest.mark.parametrize("odd", [0, 1])
@pytest.mark.parametrize(("port", "first_gsi"), CHIPS)
def test_a_poll_acknowledges_and_ends_the_service_at_once(
    pics: Pc, port: int, first_gsi: int, odd: int
) -> None:
    pics.pulse(first_gsi + 4, first_gsi + 6)
    pics.out(port, POLL)
    assert pics.inp(port + odd) == 0x84
    assert (isr(pics, port), irr(pics, port)) == (0, 0x40)
    pics.out(port, POLL)
    assert pics.inp(port + odd) == 0x86


@pytest.mark.parametrize("odd", [0, 1])
@pytest.mark.parametrize(("port", "first_gsi"), CHIPS)
def test_a_poll_with_nothing_pending_reads_7(pics: Pc, port: int, first_gsi: int, odd: int) -> None:
    pics.out(port, POLL)
    assert pics.inp(port + odd) == 0x07
    assert pics.inp(port) == 0  # and the next read is a register again


def test_a_poll_of_the_slave_clears_the_masters_cascade_too(pics: Pc) -> None:
    pics.pulse(11)
    assert pics.pic.output
    pics.out(SLAVE, POLL)
    assert pics.inp(SLAVE) == 0x83
    assert (irr(pics), isr(pics)) == (0, 0)
    assert not pics.pic.output


def test_a_poll_of_the_slave_leaves_its_next_request_with_the_master(pics: Pc) -> None:
    pics.pulse(11, 12)
    pics.out(SLAVE, POLL)
    assert pics.inp(SLAVE) == 0x83
    assert pics.inta() == 0x2C


def test_a_poll_of_the_master_lowers_intr(pics: Pc) -> None:
    pics.pulse(3)
    pics.out(MASTER, POLL)
    assert pics.inp(MASTER) == 0x83
    assert not pics.pic.output


def test_a_poll_of_the_cascade_leaves_the_slave_asking(pics: Pc) -> None:
    pics.line(9, 1)
    pics.out(MASTER, POLL)
    assert pics.inp(MASTER) == 0x82
    assert irr(pics) == 0
    pics.line(9, 0)
    assert irr(pics) == 0x04
    assert pics.inta() == 0x29


def test_a_poll_respects_what_is_in_service(pics: Pc) -> None:
    pics.pulse(3)
    pics.inta()
    pics.pulse(5)
    pics.out(MASTER, POLL)
    assert pics.inp(MASTER) == 0x07


# Initialisation.


@pytest.mark.parametrize(("port", "first_gsi"), CHIPS)
def test_the_sequence_with_icw4(port: int, first_gsi: int) -> None:
    pc = Pc(pit=None)
    chip = pc.chips[first_gsi >> 3]
    states = [chip.init_state]
    for offset, value in ((0, 0x11), (1, 0x4F), (1, 0xFF), (1, 0x13)):
        pc.out(port + offset, value)
        states.append(chip.init_state)
    assert states == [0, 1, 2, 3, 0]
    assert chip.irq_base == 0x48  # the low bits come from the pin
    assert (chip.special_fully_nested_mode, chip.auto_eoi) == (1, 1)
    assert registers(pc.chips[1 - (first_gsi >> 3)]) == registers(
        Pc(pit=None).chips[1 - (first_gsi >> 3)]
    )
    pc.out(port + 1, 0xAA)
    assert chip.imr == 0xAA


def test_the_sequence_without_icw4(pics: Pc) -> None:
    chip = pics.pic.master
    states = []
    for offset, value in ((0, 0x10), (1, 0x40), (1, 0x04), (1, 0x03)):
        pics.out(MASTER + offset, value)
        states.append(chip.init_state)
    assert states == [1, 2, 0, 0]
    assert (chip.irq_base, chip.imr, chip.auto_eoi) == (0x40, 0x03, 0)


@pytest.mark.parametrize("icw1", [0x12, 0x18, 0x1A])
def test_single_mode_still_expects_icw3_and_ltim_is_ignored(pics: Pc, icw1: int) -> None:
    chip = pics.pic.master
    pics.out(MASTER, icw1)
    pics.out(MASTER_DATA, 0x40)
    assert chip.init_state == 2
    pics.out(MASTER_DATA, 0xFF)
    assert (chip.init_state, chip.imr, chip.elcr) == (0, 0, 0)


def test_icw1_in_the_middle_of_a_sequence_starts_it_over(pics: Pc) -> None:
    pics.out(MASTER, 0x11)
    pics.out(MASTER_DATA, 0x40)
    pics.out(MASTER, 0x10)
    pics.out(MASTER_DATA, 0x50, 0x04)
    assert (pics.pic.master.init_state, pics.pic.master.irq_base) == (0, 0x50)


def test_commands_between_the_words_do_not_disturb_the_sequence(pics: Pc) -> None:
    pics.out(MASTER, 0x11, 0x20, READ_ISR)
    pics.out(MASTER_DATA, 0x40)
    pics.out(MASTER, POLL)
    assert pics.inp(MASTER_DATA) == 0x07
    assert pics.inp(MASTER_DATA) == 0
    pics.out(MASTER_DATA, 0x04, 0x01)
    assert (pics.pic.master.init_state, pics.pic.master.irq_base) == (0, 0x40)


@pytest.mark.parametrize("state", [4, 0xFF])
def test_an_unknown_state_set_by_user_space_takes_no_data(pics: Pc, state: int) -> None:
    pics.pic.master.init_state = state
    before = registers(pics.pic.master)
    pics.out(MASTER_DATA, 0xFF)
    assert registers(pics.pic.master) == before


@pytest.mark.parametrize(("icw1", "kept"), [(0x11, 1), (0x10, 0)])
def test_icw1_resets_this_and_nothing_else(pics: Pc, icw1: int, kept: int) -> None:
    chip = pics.pic.master
    chip.restore(bytes((0xFF, 0xFF, 0xFF, 0xF1, 5, 0x48, 1, 1, 1, 0, 1, 1, 1, 1, 0x30, 0xF8)))
    slave = registers(pics.pic.slave)
    before = registers(chip)
    pics.vcpu.extint = False
    pics.out(MASTER, icw1)
    assert registers(chip) == before | {
        "last_irr": 0,
        "irr": 0x30,  # the level requests
        "imr": 0,
        "priority_add": 0,
        "read_reg_select": 0,
        "special_mask": 0,
        "init_state": 1,
        "auto_eoi": kept,
        "special_fully_nested_mode": kept,
        "init4": icw1 & 1,
    }
    assert registers(pics.pic.slave) == slave


def test_a_line_held_high_over_icw1_counts_as_a_new_edge_when_raised_again(pics: Pc) -> None:
    pics.line(4, 1)
    pics.init_pics()
    assert irr(pics) == 0
    assert pics.pic.set_irq(4, 0, 1) == 1  # forgotten: no falling edge was needed
    assert pics.inta() == 0x24


@pytest.mark.parametrize(("port", "first_gsi"), CHIPS)
def test_icw1_acknowledges_the_edge_requests_it_forgets(
    pics: Pc, port: int, first_gsi: int
) -> None:
    acked: list[int] = []
    for gsi in range(16):
        pics.board.notifiers.register_ack(gsi, lambda gsi=gsi: acked.append(gsi))
    pics.out(ELCR2 if first_gsi else ELCR1, 0x40)
    pics.pulse(first_gsi + 3, first_gsi + 5)
    pics.line(first_gsi + 6, 1)
    pics.out(port, 0x11)
    assert acked == [first_gsi + 3, first_gsi + 5]
    assert irr(pics, port) == 0x40


def test_icw1_acknowledges_nothing_when_no_vcpu_takes_extint(pics: Pc) -> None:
    pics.pulse(3)
    pics.vcpu.extint = False
    pics.records()
    pics.out(MASTER, 0x11)
    assert pics.records(Event.KVM_ACK_IRQ) == []
    pics.add_vcpu(VcpuStub())
    pics.pic.master.irr = 0x08
    pics.out(MASTER, 0x11)
    assert len(pics.records(Event.KVM_ACK_IRQ)) == 1


def test_icw1_also_ends_the_service_of_a_pin_whose_request_it_forgets(pics: Pc) -> None:
    pics.pulse(3)
    pics.inta()
    pics.pulse(5)
    assert pics.inta() == -1
    pics.pulse(3)
    pics.out(MASTER, 0x11)
    assert isr(pics) == 0
    pics.init_pics()


# INTR is driven anew by every edge of every line, a falling one too; not by these writes.


def test_after_an_initialisation_a_stale_intr_is_spurious(pics: Pc) -> None:
    pics.line(3, 1)
    pics.out(MASTER, 0x11)
    pics.out(MASTER_DATA, 0x40, 0x04, 0x01)
    assert pics.inta() == 0x47


def test_icw1_leaves_intr_high_until_the_next_edge(pics: Pc) -> None:
    pics.line(3, 1)
    pics.out(MASTER, 0x11)
    assert pics.pic.output
    pics.line(3, 0)
    assert not pics.pic.output


def test_icw4_leaves_intr_low_until_the_next_edge(pics: Pc) -> None:
    pics.pulse(2)
    assert pics.inta() == 0x2F
    pics.out(MASTER, 0x11)
    pics.pulse(2)  # blocked by itself
    pics.out(MASTER_DATA, 0x20, 0x04, 0x11)  # not in special fully nested mode
    assert not pics.pic.output
    pics.line(4, 0)
    assert pics.pic.output


def test_a_poll_of_the_cascade_leaves_intr_high_until_the_next_edge(pics: Pc) -> None:
    pics.pulse(2)
    pics.out(MASTER, POLL)
    assert pics.inp(MASTER) == 0x82
    assert pics.pic.output
    pics.line(4, 0)
    assert not pics.pic.output


def test_a_slave_request_behind_a_cascade_line_held_high_waits_for_the_next_edge(
    pics: Pc,
) -> None:
    pics.line(2, 1)
    assert pics.inta() == 0x2F
    pics.out(MASTER, EOI)
    pics.line(11, 1)  # no rising edge for the master to see, but the line is low after it
    assert not pics.pic.output
    pics.line(11, 0)
    assert pics.inta() == 0x2B


# Who is told.


@pytest.mark.parametrize(
    ("port", "first_gsi", "irqchip"),
    [(MASTER, 0, Irqchip.PIC_MASTER), (SLAVE, 8, Irqchip.PIC_SLAVE)],
)
@pytest.mark.parametrize("command", [0x20, 0x65, 0xA0, 0xE5])
def test_an_eoi_is_recorded_and_told_by_gsi(
    pics: Pc, port: int, first_gsi: int, irqchip: int, command: int
) -> None:
    acked: list[int] = []
    for gsi in range(24):
        pics.board.notifiers.register_ack(gsi, lambda gsi=gsi: acked.append(gsi))
    pics.pulse(first_gsi + 5)
    pics.inta()
    pics.records()
    pics.out(port, command)
    [record] = pics.records(Event.KVM_ACK_IRQ)
    assert (field(record, "irqchip"), field(record, "pin")) == (irqchip, first_gsi + 5)
    assert acked == [first_gsi + 5]


@pytest.mark.parametrize(("port", "first_gsi"), CHIPS)
def test_a_mask_write_tells_the_pins_that_changed_by_gsi(
    pics: Pc, port: int, first_gsi: int
) -> None:
    told: list[tuple[int, bool]] = []
    for gsi in range(24):
        pics.board.notifiers.register_mask(gsi, lambda masked, gsi=gsi: told.append((gsi, masked)))
    pics.out(port + 1, 0x0F)
    assert told == [(first_gsi + pin, True) for pin in range(4)]
    told.clear()
    pics.out(port + 1, 0x1E)
    assert told == [(first_gsi, False), (first_gsi + 4, True)]
    told.clear()
    pics.out(port + 1, 0x1E)
    pics.out(port, 0x11)  # clears the mask silently
    assert told == []


def test_the_mask_is_in_force_when_the_notifiers_run_but_intr_is_not_yet(pics: Pc) -> None:
    pics.out(MASTER_DATA, 0x08)
    pics.pulse(3)
    seen: list[tuple[int, bool]] = []
    pics.board.notifiers.register_mask(
        3, lambda masked: seen.append((pics.pic.master.imr, pics.pic.output))
    )
    pics.out(MASTER_DATA, 0)
    assert seen == [(0, False)]
    assert pics.pic.output


def test_a_rising_line_is_recorded_with_the_chips_registers(pics: Pc) -> None:
    pics.out(ELCR2, 0x08)
    pics.out(SLAVE_DATA, 0x08)
    pics.records()
    pics.line(11, 1)
    pics.line(11, 1)
    pics.line(11, 0)  # only in detail
    seen = [record[3:] for record in pics.records(Event.KVM_PIC_SET_IRQ)]
    assert seen == [(1, 3, 0x08, 0x08, False), (1, 3, 0x08, 0x08, False)]
    pics.out(SLAVE_DATA, 0)
    for level in (1, 1, 0):
        pics.line(11, level)
    seen = [record[3:] for record in pics.records(Event.KVM_PIC_SET_IRQ)]
    assert seen == [(1, 3, 0x08, 0x00, False), (1, 3, 0x08, 0x00, True)]


def test_in_detail_falling_lines_are_recorded_too() -> None:
    pc = Pc(pit=None, detail=True)
    pc.init_pics()
    pc.records()
    pc.pulse(3)
    assert pc.names() == ["kvm_set_irq", "kvm_ioapic_set_irq", "kvm_pic_set_irq"] * 2


# Access width.


@pytest.mark.parametrize("port", [MASTER, SLAVE, ELCR1])
def test_a_word_access_is_taken_reads_0_and_changes_nothing(pics: Pc, port: int) -> None:
    pics.pulse(3, 11)
    pics.out(ELCR1, 0xF8)
    before = [registers(chip) for chip in pics.chips]
    assert pics.inp(port, size=2, stale=0xFFFF) == 0
    pics.out(port, 0xFFFF, size=2)
    pics.out(port, 0x1111, size=2)
    assert [registers(chip) for chip in pics.chips] == before


@pytest.mark.parametrize("port", [MASTER, MASTER_DATA, SLAVE, SLAVE_DATA, ELCR1, ELCR2])
def test_bytes_are_taken_and_what_reaches_beyond_the_ports_is_not(pics: Pc, port: int) -> None:
    find = pics.board.bus.find
    assert isinstance(find(port, 1), PicPorts)
    assert find(port, 2) is (None if port & 1 else find(port, 1))
    assert find(port, 4) is None
