"""The IOAPIC's lines and registers: what the kernel gives for them."""

import pytest
from apics import LEVEL, MASK, REMOTE_IRR, Apics

from kvmtick.abi.structs import kvm_ioapic_state, to_chip, to_msi
from kvmtick.irqchip.delivery import LapicIrq
from kvmtick.irqchip.ioapic import (
    DELIVERY_STATUS,
    IOAPIC_DEFAULT_BASE_ADDRESS,
    REDIRECTION_RESET,
    RESERVED,
    lapic_irq_of,
)
from kvmtick.trace.events import Event

CALLS = (1, 1, 0, 1, 0, 0)
PIN = 5
VECTOR = 0x45
NMI, SMI, INIT, EXTINT = 4 << 8, 2 << 8, 5 << 8, 7 << 8
LOWEST = 1 << 8
LOGICAL = 1 << 11

# What KVM_IRQ_LINE_STATUS returns.


@pytest.mark.parametrize(
    ("entry", "answers"),
    [
        (VECTOR, [1, 0, 1, 1, 1, 1]),
        (VECTOR | MASK, [-1, 0, 1, -1, 1, 1]),
        (VECTOR | LEVEL, [1, -1, 1, -1, 1, 1]),
        (VECTOR | LEVEL | MASK, [-1, -1, 1, -1, 1, 1]),
        (VECTOR | NMI, [1, 0, 1, 1, 1, 1]),
    ],
    ids=["edge", "edge-masked", "level", "level-masked", "nmi"],
)
def test_line_status(entry: int, answers: list[int]) -> None:
    apics = Apics()
    apics.alone(PIN)
    apics.program(PIN, entry)
    assert apics.lines(PIN, *CALLS) == answers


def test_line_status_of_an_edge_pin_nobody_takes() -> None:
    disabled = Apics(enabled=False)
    disabled.alone(PIN)
    disabled.program(PIN, VECTOR)
    assert disabled.lines(PIN, 1, 0, 1, 0) == [0, 1, 0, 1]
    absent = Apics()
    absent.alone(PIN)
    absent.program(PIN, VECTOR, dest_id=5)
    assert absent.lines(PIN, 1, 0, 1, 0) == [0, 1, 0, 1]


def test_without_a_local_apic_a_level_interrupt_is_in_service_with_nobody() -> None:
    apics = Apics(vcpus=0)
    apics.alone(PIN)
    apics.program(PIN, VECTOR | LEVEL)
    assert apics.line(PIN, 1) == -1
    assert apics.ioapic.redirtbl[PIN] == VECTOR | LEVEL | REMOTE_IRR


def test_the_answers_of_pic_and_ioapic_add_up() -> None:
    apics = Apics()
    apics.program(PIN, VECTOR | MASK)
    assert apics.lines(PIN, 1, 1, 0) == [1, 1, 2]
    apics.program(PIN, VECTOR)
    assert apics.line(PIN, 1) == 1  # the PIC's request is set still: coalesced there


def test_a_line_is_the_or_of_its_sources() -> None:
    apics = Apics()
    apics.alone(PIN)
    apics.program(PIN, VECTOR)
    assert apics.line(PIN, 1, source=1) == 1
    assert apics.line(PIN, 1, source=2) == 0
    assert apics.line(PIN, 0, source=1) == 0
    assert apics.line(PIN, 0, source=2) == 1
    assert apics.line(PIN, 1, source=2) == 1


# Sensing.


def test_an_edge_while_masked_is_lost() -> None:
    apics = Apics()
    for held in (0, 1):
        apics.program(PIN, VECTOR | MASK)
        apics.lines(PIN, 1, held)
        apics.program(PIN, VECTOR)
        assert apics.irrs() == []
        apics.line(PIN, 0)


def test_polarity_is_kept_without_effect() -> None:
    apics = Apics()
    apics.alone(PIN)
    apics.program(PIN, VECTOR | 1 << 13)
    assert apics.lines(PIN, 1, 0) == [1, 1]
    assert apics.read(0x10 + 2 * PIN) == VECTOR | 1 << 13


def test_a_level_line_is_sent_when_it_is_unmasked_and_not_again() -> None:
    apics = Apics()
    apics.program(PIN, VECTOR | LEVEL | MASK)
    apics.line(PIN, 1)
    assert apics.irrs() == []
    apics.program(PIN, VECTOR | LEVEL)
    assert apics.irrs() == [VECTOR]
    assert apics.ioapic.redirtbl[PIN] & REMOTE_IRR
    assert apics.take() == VECTOR
    apics.program(PIN, VECTOR | LEVEL | MASK)
    apics.program(PIN, VECTOR | LEVEL)
    assert apics.irrs() == []


def test_a_level_request_whose_line_fell_while_masked_is_gone() -> None:
    apics = Apics()
    apics.program(PIN, VECTOR | LEVEL | MASK)
    apics.lines(PIN, 1, 0)
    apics.program(PIN, VECTOR | LEVEL)
    assert apics.irrs() == []


def test_a_high_line_written_as_level_is_sent() -> None:
    apics = Apics()
    apics.line(PIN, 1)
    apics.program(PIN, VECTOR | LEVEL)
    assert apics.irrs() == [VECTOR]


# What is sent.


@pytest.mark.parametrize("mode", range(8))
def test_every_delivery_mode_is_passed_on(mode: int) -> None:
    entry = 0x5A << 56 | LEVEL | LOGICAL | mode << 8 | 0x61
    assert lapic_irq_of(entry) == LapicIrq(
        vector=0x61,
        delivery_mode=mode,
        dest_mode_logical=True,
        trig_mode_level=True,
        level=True,
        shorthand=0,
        dest_id=0x5A,
        msi_redir_hint=False,
    )


def test_an_nmi_and_what_leaves_no_vector() -> None:
    apics = Apics()
    apics.alone(PIN)
    for mode, nmis in ((NMI, 1), (SMI, 1), (EXTINT, 1)):
        apics.program(PIN, VECTOR | mode)
        apics.lines(PIN, 1, 0)
        assert apics.stubs[0].nmis == nmis
        assert apics.irrs() == []


def test_init_resets_the_other_vcpu() -> None:
    apics = Apics(vcpus=2)
    apics.alone(PIN)
    apics.program(PIN, INIT, dest_id=1)
    assert apics.line(PIN, 1) == 1
    assert [lapic.pending_events for lapic in apics.lapics] == [0, 1]


def test_a_broadcast_reaches_all_and_a_logical_destination_those_it_names() -> None:
    apics = Apics(vcpus=3)
    apics.alone(PIN)
    for vcpu in range(3):
        apics.lapic_write(vcpu, 0xD0, 1 << 24 + vcpu)
    apics.program(PIN, VECTOR, dest_id=0xFF)
    assert apics.lines(PIN, 1, 0) == [3, 1]
    apics.program(PIN, VECTOR + 1 | LOGICAL, dest_id=0b110)
    assert apics.line(PIN, 1) == 2
    assert [apics.irrs(vcpu) for vcpu in range(3)] == [
        [VECTOR],
        [VECTOR, VECTOR + 1],
        [VECTOR, VECTOR + 1],
    ]


def test_lowest_priority_reaches_one_of_them() -> None:
    apics = Apics(vcpus=2)
    apics.alone(PIN)
    for vcpu in range(2):
        apics.lapic_write(vcpu, 0xD0, 1 << 24 + vcpu)
    apics.program(PIN, VECTOR | LOWEST | LOGICAL, dest_id=0b11)
    assert apics.line(PIN, 1) == 1
    assert sorted([apics.irrs(0), apics.irrs(1)]) == [[], [VECTOR]]


def test_an_entry_sends_what_it_holds_now() -> None:
    apics = Apics(vcpus=2)
    apics.program(PIN, VECTOR)
    apics.lines(PIN, 1, 0)
    apics.program(PIN, VECTOR + 1, dest_id=1)
    apics.lines(PIN, 1, 0)
    assert [apics.irrs(0), apics.irrs(1)] == [[VECTOR], [VECTOR + 1]]


# Registers.


def test_registers_after_creation() -> None:
    apics = Apics()
    assert [apics.read(register) for register in (0, 1, 2)] == [0, 0x17_0011, 0]
    assert [apics.read(0x10 + i) for i in range(48)] == [REDIRECTION_RESET, 0] * 24


def test_the_id_is_four_bits_and_the_arbitration_id_the_same() -> None:
    apics = Apics()
    apics.write(0, 0xFFFF_FFFF)
    assert (apics.read(0), apics.read(2)) == (0x0F00_0000, 0x0F00_0000)
    apics.write(2, 0)
    apics.write(1, 0)
    assert (apics.read(0), apics.read(1)) == (0x0F00_0000, 0x17_0011)


def test_the_low_half_keeps_bits_12_and_14() -> None:
    apics = Apics()
    apics.write(0x10, 0xFFFF_FFFF)
    assert apics.read(0x10) == 0xFFFF_AFFF
    state = apics.ioapic.save()
    state.redirtbl[0].bits = LEVEL | REMOTE_IRR | DELIVERY_STATUS
    apics.ioapic.restore(state)
    apics.write(0x10, LEVEL | 0x42)
    assert apics.read(0x10) == LEVEL | REMOTE_IRR | DELIVERY_STATUS | 0x42


@pytest.mark.parametrize("register", [0x10, 0x11])
def test_remote_irr_goes_when_either_half_of_an_edge_entry_is_written(register: int) -> None:
    apics = Apics()
    state = apics.ioapic.save()
    state.redirtbl[0].bits = REMOTE_IRR | 0x49
    apics.ioapic.restore(state)
    apics.write(register, 0x49 if register == 0x10 else 0)
    assert apics.ioapic.redirtbl[0] == 0x49


def test_reserved_bits_are_kept() -> None:
    apics = Apics()
    apics.program(3, 0xFFFF_0000)
    apics.write(0x17, 0x1234_5678)
    assert apics.read(0x17) == 0x1234_5678
    assert apics.ioapic.redirtbl[3] & RESERVED == 0x0034_5678_FFFE_0000


@pytest.mark.parametrize("register", [3, 0xF, 0x40, 0x41, 0xFF])
def test_other_registers_read_ones_and_swallow_writes(register: int) -> None:
    apics = Apics()
    before = bytes(apics.ioapic.save())
    apics.write(register, 0)
    assert apics.read(register) == 0xFFFF_FFFF
    apics.write(0, 0)
    assert apics.ioapic.mmio_write(IOAPIC_DEFAULT_BASE_ADDRESS, 4, 0)
    assert bytes(apics.ioapic.save()) == before


@pytest.mark.parametrize(
    ("size", "read", "written"),
    [
        (1, 0x11, 0x88),
        (2, 0x0011, 0x2788),
        (4, 0x17_0011, 0x5566_2788),
        (8, 0x17_0011, 0x5566_2788),
        (3, 0, REDIRECTION_RESET),
    ],
)
def test_access_sizes(size: int, read: int, written: int) -> None:
    ioapic = Apics().ioapic
    base = IOAPIC_DEFAULT_BASE_ADDRESS
    ioapic.mmio_write(base, 4, 1)
    assert ioapic.mmio_read(base + 0x10, size) == read
    ioapic.mmio_write(base, 4, 0x10)
    assert ioapic.mmio_write(base + 0x10, size, 0x1122_3344_5566_7788)
    assert ioapic.redirtbl[0] == written


def test_the_select_register_has_8_bits_and_the_rest_of_the_page_reads_0() -> None:
    ioapic = Apics().ioapic
    base = IOAPIC_DEFAULT_BASE_ADDRESS
    assert ioapic.mmio_write(base, 4, 0x1122_3301)
    assert ioapic.mmio_read(base, 4) == 1
    for offset in (1, 4, 0x11, 0x20, 0xFC):
        assert ioapic.mmio_read(base + offset, 1) == 0
        assert ioapic.mmio_write(base + offset, 1, 0xFF)
    assert ioapic.mmio_read(base, 4) == 1


@pytest.mark.parametrize(
    ("gpa", "size", "ours"),
    [
        (0xFEC0_0000, 4, True),
        (0xFEC0_00FC, 4, True),
        (0xFEC0_00FE, 4, False),
        (0xFEC0_00FF, 1, True),
        (0xFEC0_00FF, 2, False),
        (0xFEC0_0100, 4, False),
        (0xFEBF_FFFF, 1, False),
    ],
)
def test_an_access_must_lie_within_256_bytes(gpa: int, size: int, ours: bool) -> None:
    ioapic = Apics().ioapic
    assert (ioapic.mmio_read(gpa, size) is not None) is ours
    assert ioapic.mmio_write(gpa, size, 0) is ours


def test_a_moved_base_address_only_takes_away() -> None:
    apics = Apics()
    state = apics.ioapic.save()
    for base in (0xFEC0_0080, 0xFED0_1000, 0xFFFF_FFFF_FFFF_FF80):
        state.base_address = base
        apics.ioapic.restore(state)
        taken = {
            gpa
            for gpa in (0xFEC0_0000, 0xFEC0_0080, 0xFEC0_00FC, 0xFEC0_0100, 0xFED0_1000)
            if apics.ioapic.mmio_read(gpa, 4) is not None
        }
        assert taken == ({0xFEC0_0080, 0xFEC0_00FC} if base == 0xFEC0_0080 else set())


# Masks.


def test_a_mask_change_is_told_once() -> None:
    apics = Apics()
    told: list[bool] = []
    apics.notifiers.register_mask(PIN, told.append)
    for low in (VECTOR | MASK, VECTOR, VECTOR + 1, VECTOR | MASK, VECTOR | MASK):
        apics.program(PIN, low)
    assert told == [False, True]


# GET_IRQCHIP, SET_IRQCHIP.


def test_an_edge_that_was_sent_is_no_request() -> None:
    apics = Apics()
    apics.program(6, 0x46)
    apics.line(6, 1)
    assert apics.ioapic.irr == 1 << 6
    assert apics.ioapic.save().irr == 0
    apics.line(PIN, 1)
    assert apics.ioapic.save().irr == 1 << PIN


def test_a_sent_edge_hides_the_level_request_that_follows() -> None:
    apics = Apics()
    apics.program(6, 0x46)
    apics.lines(6, 1, 0)
    apics.program(6, 0x46 | LEVEL | MASK)
    apics.line(6, 1)
    assert apics.ioapic.irr == 1 << 6
    assert apics.ioapic.save().irr == 0


def test_restored_requests_are_raised_pin_by_pin() -> None:
    apics = Apics()
    apics.routing.set_table([to_chip(number, 2, number) for number in (5, 6, 7)])
    state = kvm_ioapic_state(base_address=0xFEC0_0000, irr=0xFF00_00E0, pad=0x1234, id=0xFFFF_FFFF)
    entries = {5: LEVEL | REMOTE_IRR | 0x45, 6: 0x46, 7: LEVEL | MASK | 0x47, 9: REMOTE_IRR | 0x49}
    for number, bits in entries.items():
        state.redirtbl[number].bits = bits
    apics.ioapic.restore(state)
    assert apics.irrs() == [0x46]
    assert [record[3:] for record in apics.records(Event.KVM_IOAPIC_SET_IRQ)] == [
        (LEVEL | REMOTE_IRR | 0x45, 5, False),
        (0x46, 6, False),
    ]
    state.irr = 0xA0
    assert bytes(apics.ioapic.save()) == bytes(state)
    assert apics.read(0) == 0x0F00_0000
    assert apics.lines(6, 1, 0) == [0, 1]
    assert apics.lines(7, 1, 0) == [-1, 1]


def test_any_state_is_taken() -> None:
    apics = Apics()
    state = kvm_ioapic_state.from_buffer_copy(b"\xff" * 216)
    apics.ioapic.restore(state)
    assert apics.ioapic.redirtbl == [(1 << 64) - 1] * 24
    assert apics.ioapic.save().irr == 0x00FF_FFFF
    assert apics.ioapic.mmio_read(0xFEC0_0000, 4) is None
    assert apics.stubs[0].scan_wanted


# The trace.


def test_only_a_masked_pin_is_left_out_and_only_without_details() -> None:
    for detail in (False, True):
        apics = Apics(detail=detail)
        apics.program(PIN, VECTOR)
        apics.records()
        apics.lines(3, 1, 1, 0)
        apics.lines(PIN, 1, 0)
        seen = [record[3:] for record in apics.records(Event.KVM_IOAPIC_SET_IRQ)]
        masked = [(MASK, 3, False), (MASK, 3, True), (MASK, 3, False)]
        rise, fall = [(VECTOR, PIN, False)], [(VECTOR, PIN, False)]
        assert seen == (masked + rise + fall if detail else rise)


def test_the_local_apic_comes_before_the_ioapic_in_the_trace() -> None:
    apics = Apics()
    apics.routing.set_table([to_chip(PIN, 2, PIN)])
    apics.program(PIN, VECTOR | LEVEL)
    apics.records()
    apics.line(PIN, 1)
    assert apics.names() == ["kvm_set_irq", "kvm_apic_accept_irq", "kvm_ioapic_set_irq"]
    apics.line(PIN, 1)
    assert [record[3:] for record in apics.records(Event.KVM_IOAPIC_SET_IRQ)] == [
        (VECTOR | LEVEL | REMOTE_IRR, PIN, False)
    ]


# Who looks again which ends are wanted.


def test_a_fixed_entry_makes_its_old_and_new_destinations_scan() -> None:
    apics = Apics(vcpus=4)
    apics.program(PIN, VECTOR | LEVEL, dest_id=2)
    for vcpu in range(4):
        apics.enter(vcpu)
    apics.write(0x11 + 2 * PIN, 3 << 24)
    assert [vcpu.scan_wanted for vcpu in apics.stubs] == [False, False, True, True]
    for vcpu in range(4):
        apics.enter(vcpu)
    apics.write(0x10 + 2 * PIN, VECTOR | LOWEST)
    assert all(vcpu.scan_wanted for vcpu in apics.stubs)


def test_a_change_of_the_table_makes_nobody_scan() -> None:
    apics = Apics()
    apics.enter()
    apics.routing.set_table([to_chip(0, 2, 2), to_msi(24, 0xFEE0_0000, 0x51)])
    assert not apics.stubs[0].scan_wanted


def test_ack_notifiers_make_everybody_scan() -> None:
    apics = Apics(vcpus=2)

    def ack() -> None:
        pass

    for change in (apics.notifiers.register_ack, apics.notifiers.unregister_ack):
        for vcpu in range(2):
            apics.enter(vcpu)
        change(PIN, ack)
        assert [vcpu.scan_wanted for vcpu in apics.stubs] == [True, True]
