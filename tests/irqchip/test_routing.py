"""Routing, source ids, notifiers."""

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pc import ELCR1, ELCR2, Pc

from kvmtick.abi.errors import KvmError
from kvmtick.irqchip.ioapic import REDIRECTION_RESET
from kvmtick.irqchip.notifiers import Notifiers
from kvmtick.irqchip.routing import (
    IRQFD_RESAMPLE_IRQ_SOURCE_ID,
    PIT_IRQ_SOURCE_ID,
    USERSPACE_IRQ_SOURCE_ID,
    IrqRouting,
    IrqSourceIds,
    IrqTarget,
)
from kvmtick.timing.clock import VirtualClock
from kvmtick.trace.events import Event, Irqchip
from kvmtick.trace.recorder import Recorder

# Lines.


@given(st.lists(st.tuples(st.integers(0, 15), st.integers(0, 63), st.booleans()), max_size=50))
def test_every_line_of_both_chips_is_the_or_of_its_own_sources(
    calls: list[tuple[int, int, bool]],
) -> None:
    pc = Pc(pit=None)
    ioapic, pic = pc.board.ioapic, pc.pic
    assert ioapic is not None
    pc.out(ELCR1, 0xF8)
    pc.out(ELCR2, 0xDE)
    level_pins = {3, 4, 5, 6, 7, 9, 10, 11, 12, 14, 15}
    high: set[tuple[int, int]] = set()
    for pin, source, level in calls:
        (high.add if level else high.discard)((pin, source))
        pc.line(pin, level, source)
        lines = {each[0] for each in high}
        assert {pin for pin in range(24) if ioapic.irr >> pin & 1} == lines
        senses = pic.master.last_irr | pic.slave.last_irr << 8
        assert {pin for pin in range(16) if senses >> pin & 1} - {2} == lines - {2}
        requests = pic.master.irr | pic.slave.irr << 8
        assert {pin for pin in level_pins if requests >> pin & 1} == lines & level_pins
    sources = [sum(1 << each[1] for each in high if each[0] == pin) for pin in range(16)]
    assert [pic.irq_states.get(pin, 0) for pin in range(16)] == sources
    assert [ioapic.irq_states.get(pin, 0) for pin in range(16)] == sources


@pytest.mark.parametrize("level", [1, 5, -1])
def test_any_level_that_is_not_0_is_high(level: int) -> None:
    pc = Pc(pit=None)
    assert pc.line(5, level) == 1
    assert pc.pic.output
    assert pc.line(5, 0) == 2


# Source ids.


def test_user_space_and_resampling_have_their_source_ids_and_the_pit_gets_2() -> None:
    assert (USERSPACE_IRQ_SOURCE_ID, IRQFD_RESAMPLE_IRQ_SOURCE_ID, PIT_IRQ_SOURCE_ID) == (0, 1, 2)
    assert IrqSourceIds().request() == PIT_IRQ_SOURCE_ID


def test_the_lowest_free_source_id_is_given() -> None:
    ids = IrqSourceIds()
    assert [ids.request() for _ in range(4)] == [2, 3, 4, 5]
    ids.free(3)
    assert [ids.request() for _ in range(2)] == [3, 6]


def test_the_65th_source_id_is_refused_until_one_is_freed() -> None:
    ids = IrqSourceIds()
    assert [ids.request() for _ in range(62)] == list(range(2, 64))
    with pytest.raises(KvmError) as raised:
        ids.request()
    assert raised.value.errno == errno.EFAULT
    assert len(ids) == 64
    ids.free(40)
    assert ids.request() == 40


# The table.


class Chip(IrqTarget):
    """A target of the routing table that notes how it was driven."""

    def __init__(self, name: str, chips: "Chips") -> None:
        self.name = name
        self.chips = chips

    def set_irq(self, pin: int, irq_source_id: int, level: int, line_status: bool = False) -> int:
        self.chips.driven.append((self.name, pin, irq_source_id, level))
        return self.chips.answers[self.name]

    def pulse(self, pin: int, irq_source_id: int) -> None:
        self.chips.driven.append((self.name, pin, irq_source_id, PULSED))


PULSED = 10


class Chips:
    """Notes who was driven, and answers as told."""

    def __init__(self, detail: bool = False) -> None:
        self.driven: list[tuple[str, int, int, int]] = []
        self.answers = {"pic": 1, "ioapic": 1}
        self.routing = IrqRouting(Recorder(VirtualClock(), detail))
        self.routing.set_default(Chip("pic", self), Chip("ioapic", self))


def test_a_pulse_reaches_the_same_pins_in_the_same_order() -> None:
    chips = Chips()
    chips.routing.pulse(2, 0)
    assert chips.driven == [("ioapic", 0, 2, PULSED), ("pic", 0, 2, PULSED)]


def test_where_details_are_recorded_a_pulse_is_two_calls() -> None:
    chips = Chips(detail=True)
    chips.routing.pulse(2, 0)
    assert chips.driven == [
        ("ioapic", 0, 2, 1),
        ("pic", 0, 2, 1),
        ("ioapic", 0, 2, 0),
        ("pic", 0, 2, 0),
    ]


@pytest.mark.parametrize("gsi", range(16))
def test_gsis_0_to_15_lead_to_the_ioapic_first_and_then_to_the_pic(gsi: int) -> None:
    chips = Chips()
    chips.routing.set_irq(7, gsi, 1)
    assert chips.driven == [("ioapic", gsi, 7, 1), ("pic", gsi, 7, 1)]


@pytest.mark.parametrize("gsi", range(16, 24))
def test_gsis_16_to_23_lead_to_the_ioapic_only(gsi: int) -> None:
    chips = Chips()
    chips.routing.set_irq(0, gsi, 0)
    assert chips.driven == [("ioapic", gsi, 0, 0)]


@pytest.mark.parametrize("gsi", [24, 4095, 0xFFFF_FFFF])
def test_other_gsis_lead_nowhere_and_answer_minus_1(gsi: int) -> None:
    chips = Chips()
    assert chips.routing.set_irq(0, gsi, 1) == -1
    assert chips.driven == []


@pytest.mark.parametrize(
    ("ioapic", "pic", "answer"),
    [
        (1, 1, 2),
        (1, 0, 1),
        (0, 0, 0),
        (0, 1, 1),
        (-1, 1, 1),
        (1, -1, 1),
        (-1, 0, 0),
        (0, -1, 0),
        (-1, -1, -1),
        (3, 2, 5),  # delivered to several CPUs
    ],
)
def test_answers_add_up_and_a_negative_one_counts_only_alone(
    ioapic: int, pic: int, answer: int
) -> None:
    chips = Chips()
    chips.answers = {"ioapic": ioapic, "pic": pic}
    assert chips.routing.set_irq(0, 3, 1) == answer


def test_pins_lead_back_to_their_gsi_and_the_slaves_are_8_to_15() -> None:
    routing = Chips().routing
    for gsi in range(24):
        assert routing.gsi_of_pin(Irqchip.IOAPIC, gsi) == gsi
    for pin in range(8):
        assert routing.gsi_of_pin(Irqchip.PIC_MASTER, pin) == pin
        assert routing.gsi_of_pin(Irqchip.PIC_SLAVE, pin + 8) == pin + 8
        assert routing.gsi_of_pin(Irqchip.PIC_MASTER, pin + 8) == -1
        assert routing.gsi_of_pin(Irqchip.PIC_SLAVE, pin) == -1
    assert routing.gsi_of_pin(Irqchip.IOAPIC, 24) == -1


def test_gsi_0_leads_to_ioapic_pin_0_not_2() -> None:
    pc = Pc(pit=None, detail=True)
    pc.line(0, 1)
    assert [record[4] for record in pc.records(Event.KVM_IOAPIC_SET_IRQ)] == [0]


def test_an_unrouted_gsi_is_recorded_all_the_same() -> None:
    pc = Pc(pit=None)
    pc.line(4096, 1)
    assert [record[3:] for record in pc.records(Event.KVM_SET_IRQ)] == [(4096, 1, 0)]


# The IOAPIC as it is after reset.


def test_a_masked_edge_pin_answers_by_the_or_of_its_sources() -> None:
    ioapic = Pc(pit=None).board.ioapic
    assert ioapic is not None
    calls = [(0, 1), (2, 1), (0, 0), (2, 0), (2, 1)]
    assert [ioapic.set_irq(5, source, level) for source, level in calls] == [-1, 0, 0, 1, -1]
    assert ioapic.irr == 0x20


def test_the_ioapic_records_its_reset_entry_in_detail() -> None:
    pc = Pc(pit=None, detail=True)
    for level in (1, 1, 0):
        pc.line(20, level)
    seen = [record[3:] for record in pc.records(Event.KVM_IOAPIC_SET_IRQ)]
    assert REDIRECTION_RESET == 0x10000
    assert seen == [(0x10000, 20, False), (0x10000, 20, True), (0x10000, 20, False)]


# Notifiers.


def test_an_acknowledgement_reaches_the_notifiers_of_its_gsi_the_last_one_first() -> None:
    notifiers = Pc(pit=None).board.notifiers
    told: list[str] = []
    notifiers.register_ack(3, lambda: told.append("first"))
    notifiers.register_ack(4, lambda: told.append("other"))
    notifiers.register_ack(3, lambda: told.append("second"))
    notifiers.notify_acked_irq(Irqchip.PIC_MASTER, 3)
    assert told == ["second", "first"]
    notifiers.notify_acked_irq(Irqchip.IOAPIC, 4)
    assert told == ["second", "first", "other"]


def test_a_mask_change_reaches_the_notifiers_of_its_gsi_the_last_one_first() -> None:
    notifiers = Pc(pit=None).board.notifiers
    told: list[tuple[str, bool]] = []
    notifiers.register_mask(12, lambda masked: told.append(("first", masked)))
    notifiers.register_mask(12, lambda masked: told.append(("second", masked)))
    notifiers.register_mask(4, lambda masked: told.append(("other", masked)))
    notifiers.fire_mask_notifiers(Irqchip.PIC_SLAVE, 12, True)
    assert told == [("second", True), ("first", True)]


def test_a_pin_without_a_gsi_reaches_nobody_but_the_trace() -> None:
    pc = Pc(pit=None)
    told: list[object] = []
    for gsi in range(-1, 24):
        pc.board.notifiers.register_ack(gsi, lambda: told.append("ack"))
        pc.board.notifiers.register_mask(gsi, told.append)
    pc.board.notifiers.notify_acked_irq(Irqchip.IOAPIC, 24)
    pc.board.notifiers.fire_mask_notifiers(Irqchip.IOAPIC, 24, False)
    assert told == []
    assert [record[3:] for record in pc.records(Event.KVM_ACK_IRQ)] == [(2, 24)]


def test_unregistering_takes_back_that_notifier_and_only_once() -> None:
    notifiers = Pc(pit=None).board.notifiers
    told: list[str] = []

    def ack() -> None:
        told.append("ack")

    def mask(masked: bool) -> None:
        told.append("mask")

    notifiers.register_ack(3, ack)
    notifiers.register_ack(4, ack)
    notifiers.register_mask(3, mask)
    assert len(notifiers) == 3
    notifiers.unregister_ack(3, ack)
    notifiers.unregister_mask(3, mask)
    assert len(notifiers) == 1
    notifiers.notify_acked_irq(Irqchip.PIC_MASTER, 3)
    notifiers.fire_mask_notifiers(Irqchip.PIC_MASTER, 3, True)
    assert told == []
    with pytest.raises(ValueError, match="not in list"):
        notifiers.unregister_ack(3, ack)
    with pytest.raises(ValueError, match="not in list"):
        notifiers.unregister_mask(3, mask)


def test_whether_somebody_waits_for_a_pin() -> None:
    notifiers = Pc(pit=None).board.notifiers
    notifiers.register_ack(12, lambda: None)
    notifiers.register_ack(-1, lambda: None)
    assert notifiers.has_ack_notifier(Irqchip.PIC_SLAVE, 12)
    assert notifiers.has_ack_notifier(Irqchip.IOAPIC, 12)
    assert not notifiers.has_ack_notifier(Irqchip.IOAPIC, 11)
    assert not notifiers.has_ack_notifier(Irqchip.IOAPIC, 24)


def test_a_resampler_is_asked_by_gsi() -> None:
    routing = Chips().routing
    notifiers = Notifiers(routing, Recorder(VirtualClock()))
    assert not notifiers.notify_irqfd_resampler(Irqchip.IOAPIC, 5)
    asked: list[int] = []

    def resample(gsi: int) -> bool:
        asked.append(gsi)
        return gsi == 5

    notifiers.resampler = resample
    pins = [(Irqchip.IOAPIC, 5), (Irqchip.IOAPIC, 6), (Irqchip.IOAPIC, 24)]
    answers = [notifiers.notify_irqfd_resampler(chip, pin) for chip, pin in pins]
    assert answers == [True, False, False]
    assert asked == [5, 6]
