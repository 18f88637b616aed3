"""The IOAPIC when interrupts end: remote IRR, notifiers, storms, the RTC."""

import pytest
from apics import LEVEL, MASK, REMOTE_IRR, Apics
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmtick.abi.structs import to_chip
from kvmtick.irqchip.delivery import SuppressEoiBroadcast
from kvmtick.irqchip.ioapic import EOI_INJECT_DELAY_NS, IOAPIC_SUCCESSIVE_IRQ_MAX_COUNT, RTC_GSI
from kvmtick.trace.events import Event

PIN = 5
VECTOR = 0x45
LOWEST, NMI = 1 << 8, 4 << 8
LOGICAL = 1 << 11
SVR_DIRECTED_EOI = 0x11FF


def level_pin() -> Apics:
    apics = Apics()
    apics.alone(PIN)
    apics.program(PIN, VECTOR | LEVEL)
    return apics


def remote_irr(apics: Apics, number: int = PIN) -> bool:
    return bool(apics.ioapic.redirtbl[number] & REMOTE_IRR)


# Level.


def test_an_end_clears_remote_irr() -> None:
    apics = level_pin()
    apics.lines(PIN, 1, 0)
    assert remote_irr(apics)
    assert apics.take() == VECTOR
    assert remote_irr(apics)
    apics.eoi()
    assert not remote_irr(apics)
    assert apics.irrs() == []


def test_a_line_that_is_still_high_interrupts_again_after_each_end() -> None:
    apics = level_pin()
    apics.line(PIN, 1)
    apics.records()
    for _ in range(3):
        assert apics.take() == VECTOR
        apics.eoi()
        assert remote_irr(apics)
    assert apics.names() == ["kvm_eoi", "kvm_ack_irq", "kvm_apic_accept_irq"] * 3
    apics.line(PIN, 0)
    assert apics.take() == VECTOR
    apics.eoi()
    assert apics.take() == -1


def test_a_line_that_rose_while_in_service_interrupts_again() -> None:
    apics = level_pin()
    apics.lines(PIN, 1, 0)
    assert apics.take() == VECTOR
    assert apics.line(PIN, 1) == -1
    apics.eoi()
    assert apics.take() == VECTOR


def test_a_masked_pin_does_not_interrupt_again() -> None:
    apics = level_pin()
    apics.line(PIN, 1)
    assert apics.take() == VECTOR
    apics.program(PIN, VECTOR | LEVEL | MASK)
    apics.eoi()
    assert not remote_irr(apics)
    assert apics.take() == -1
    apics.program(PIN, VECTOR | LEVEL)
    assert apics.take() == VECTOR


def test_an_end_of_what_is_not_in_service_does_nothing() -> None:
    apics = level_pin()
    apics.line(PIN, 1)
    apics.eoi()
    assert remote_irr(apics)
    assert apics.irrs() == [VECTOR]


@pytest.mark.parametrize(
    ("mode", "stays"),
    [(SuppressEoiBroadcast.QUIRKED, True), (SuppressEoiBroadcast.DISABLED, False)],
)
def test_directed_eoi_leaves_remote_irr_alone(mode: SuppressEoiBroadcast, stays: bool) -> None:
    apics = level_pin()
    apics.delivery.suppress_eoi_broadcast = mode
    state = bytearray(apics.lapics[0].save())
    state[0xF0:0xF4] = SVR_DIRECTED_EOI.to_bytes(4, "little")
    apics.lapics[0].restore(bytes(state))
    apics.lines(PIN, 1, 0)
    assert apics.take() == VECTOR
    apics.records()
    apics.eoi()
    assert remote_irr(apics) is stays
    assert [record[3:] for record in apics.records(Event.KVM_ACK_IRQ)] == [(2, PIN)]


def test_two_pins_of_one_vector_end_together() -> None:
    apics = Apics()
    apics.routing.set_table([to_chip(4, 2, 4), to_chip(5, 2, 5)])
    for number in (4, 5):
        apics.program(number, VECTOR | LEVEL)
        apics.lines(number, 1, 0)
    assert apics.take() == VECTOR
    apics.eoi()
    assert [remote_irr(apics, number) for number in (4, 5)] == [False, False]


# Storms.


def test_a_storm_is_put_off_by_10_ms() -> None:
    apics = level_pin()
    apics.line(PIN, 1)
    for _ in range(IOAPIC_SUCCESSIVE_IRQ_MAX_COUNT - 1):
        assert apics.take() == VECTOR
        apics.eoi()
    apics.records()
    assert apics.take() == VECTOR
    apics.eoi()
    assert [record[3:] for record in apics.records(Event.KVM_IOAPIC_DELAYED_EOI_INJ)] == [
        (VECTOR | LEVEL,)
    ]
    assert apics.take() == -1
    assert not remote_irr(apics)
    assert EOI_INJECT_DELAY_NS == 10_000_000
    apics.run(EOI_INJECT_DELAY_NS - 1)
    assert apics.take() == -1
    apics.run(1)
    assert remote_irr(apics)
    assert apics.take() == VECTOR
    apics.eoi()
    assert apics.take() == VECTOR  # and at once again


def test_the_work_runs_in_a_kworker_and_once() -> None:
    apics = level_pin()
    apics.line(PIN, 1)
    apics.ioapic.irq_eoi[PIN] = IOAPIC_SUCCESSIVE_IRQ_MAX_COUNT - 1
    apics.take()
    apics.eoi()
    apics.ioapic.irq_eoi[PIN] = IOAPIC_SUCCESSIVE_IRQ_MAX_COUNT - 1
    task = apics.recorder.task
    apics.lapics[0].isr = 1 << VECTOR
    apics.eoi()
    assert len(apics.queue) == 1
    apics.records()
    apics.run(EOI_INJECT_DELAY_NS)
    (record,) = apics.records(Event.KVM_APIC_ACCEPT_IRQ)
    assert apics.recorder.tasks[record[2]].startswith("kworker/")
    assert apics.recorder.task == task
    assert len(apics.queue) == 0


def test_a_storm_that_ended_meanwhile_is_not_sent() -> None:
    apics = level_pin()
    apics.line(PIN, 1)
    apics.ioapic.irq_eoi[PIN] = IOAPIC_SUCCESSIVE_IRQ_MAX_COUNT - 1
    apics.take()
    apics.eoi()
    apics.line(PIN, 0)
    apics.run(EOI_INJECT_DELAY_NS)
    assert apics.take() == -1


def test_an_end_with_the_line_low_starts_the_count_anew() -> None:
    apics = level_pin()
    apics.line(PIN, 1)
    for _ in range(5):
        apics.take()
        apics.eoi()
    assert apics.ioapic.irq_eoi[PIN] == 5
    apics.line(PIN, 0)
    apics.take()
    apics.eoi()
    assert PIN not in apics.ioapic.irq_eoi


# Acknowledgement, and who tells of it.


def test_an_edge_is_acknowledged_only_where_somebody_waits() -> None:
    apics = Apics()
    told: list[str] = []

    def ack() -> None:
        told.append("ack")

    apics.routing.set_table([to_chip(0, 2, PIN)])
    apics.program(PIN, VECTOR)
    for registered in (False, True):
        if registered:
            apics.notifiers.register_ack(0, ack)
        apics.lines(0, 1, 0)
        assert apics.take() == VECTOR
        apics.records()
        apics.eoi()
        assert apics.names() == ["kvm_eoi", "kvm_ack_irq"][: 1 + registered]
    assert told == ["ack"]


def test_a_route_that_comes_after_the_scan_is_not_acknowledged_before_the_next_one() -> None:
    apics = Apics()
    told: list[str] = []
    apics.notifiers.register_ack(30, lambda: told.append("ack"))
    apics.program(10, 0x4A)
    apics.enter()
    apics.routing.set_table([to_chip(30, 2, 10)])
    for _ in range(2):
        apics.lines(30, 1, 0)
        assert apics.take() == 0x4A
        apics.eoi()
        if not told:
            apics.program(10, 0x4A)
    assert told == ["ack"]


def test_the_notifier_of_a_level_pin_may_drop_the_line() -> None:
    apics = level_pin()

    def drop() -> None:
        apics.line(PIN, 0)

    apics.notifiers.register_ack(PIN, drop)
    apics.line(PIN, 1)
    assert apics.take() == VECTOR
    apics.eoi()
    assert not remote_irr(apics)
    assert apics.take() == -1


def test_handled_vectors() -> None:
    apics = Apics(vcpus=2)
    for number, (low, dest_id) in {
        1: (0x41 | LEVEL, 0),
        2: (0x42, 0),
        3: (0x43, 0),
        4: (0x44 | LEVEL, 1),
        5: (0x45 | LEVEL | MASK, 0),
        RTC_GSI: (0x48, 0),
    }.items():
        apics.program(number, low, dest_id)
    apics.notifiers.register_ack(3, lambda: None)

    def handled(vcpu: int) -> set[int]:
        vectors = apics.ioapic.handled_vectors(apics.lapics[vcpu])
        return {vector for vector in range(256) if vectors >> vector & 1}

    assert handled(0) == {0x41, 0x43, 0x45, 0x48}
    assert handled(1) == {0x44}


def test_who_has_an_interrupt_still_to_end_goes_on_telling_until_then() -> None:
    apics = Apics(vcpus=2)
    apics.alone(PIN)
    apics.program(PIN, VECTOR | LEVEL)
    apics.lines(PIN, 1, 0)
    assert apics.take(0) == VECTOR
    apics.program(PIN, VECTOR | LEVEL, dest_id=1)
    apics.enter(0)
    assert apics.lapics[0].handled_vectors >> VECTOR & 1
    apics.eoi(0)
    assert not remote_irr(apics)
    assert apics.stubs[0].scan_wanted
    apics.enter(0)
    assert not apics.lapics[0].handled_vectors >> VECTOR & 1


# The RTC.


def rtc(low: int = 0x48, dest_id: int = 0, vcpus: int = 1) -> Apics:
    apics = Apics(vcpus=vcpus)
    apics.alone(RTC_GSI)
    apics.program(RTC_GSI, low, dest_id)
    return apics


def test_the_rtc_is_coalesced_until_it_was_ended() -> None:
    apics = rtc()
    assert apics.lines(RTC_GSI, 1, 0, 1, 0) == [1, 1, 0, 1]
    assert apics.take() == 0x48
    assert apics.lines(RTC_GSI, 1, 0) == [0, 1]
    apics.eoi()
    assert apics.lines(RTC_GSI, 1, 0, 1, 0) == [1, 1, 0, 1]


def test_who_does_not_ask_for_the_status_is_not_coalesced() -> None:
    apics = rtc()
    apics.line(RTC_GSI, 1)
    apics.routing.set_irq(0, RTC_GSI, 0)
    assert apics.routing.set_irq(0, RTC_GSI, 1) == 1


def test_every_destination_has_to_end_the_rtc() -> None:
    apics = rtc(dest_id=0xFF, vcpus=2)
    assert apics.lines(RTC_GSI, 1, 0) == [2, 1]
    for vcpu in range(2):
        assert apics.line(RTC_GSI, 1) == 0
        assert apics.take(vcpu) == 0x48
        apics.eoi(vcpu)
        apics.line(RTC_GSI, 0)
    assert apics.ioapic.rtc_pending_eoi == 0
    assert apics.line(RTC_GSI, 1) == 2


def test_lowest_priority_rtc_is_ended_by_the_one_who_got_it() -> None:
    apics = rtc(0x48 | LOWEST, dest_id=0xFF, vcpus=2)
    apics.program(RTC_GSI, 0x48 | LOWEST | LOGICAL, 0b11)
    for vcpu in range(2):
        apics.lapic_write(vcpu, 0xD0, 1 << 24 + vcpu)
    assert apics.line(RTC_GSI, 1) == 1
    (taker,) = [vcpu for vcpu in range(2) if apics.irrs(vcpu)]
    apics.line(RTC_GSI, 0)
    assert apics.line(RTC_GSI, 1) == 0
    assert apics.take(taker) == 0x48
    apics.eoi(taker)
    assert apics.ioapic.rtc_pending_eoi == 0


def test_an_rtc_nmi_has_no_end() -> None:
    apics = rtc(NMI)
    assert apics.lines(RTC_GSI, 1, 0, 1, 0) == [1, 1, 0, 1]


def test_rtc_tracking_follows_a_restored_local_apic_and_ioapic() -> None:
    apics = rtc()
    apics.line(RTC_GSI, 1)
    apics.line(RTC_GSI, 0)
    lapic = apics.lapics[0]
    lapic.irr = 0
    apics.ioapic.restore_rtc_tracking(lapic)
    assert apics.ioapic.rtc_pending_eoi == 0
    lapic.isr = 1 << 0x48
    apics.ioapic.restore_rtc_tracking(lapic)
    assert apics.lines(RTC_GSI, 1, 0) == [0, 1]
    apics.ioapic.restore(apics.ioapic.save())
    assert apics.ioapic.rtc_pending_eoi == 1
    apics.eoi()
    assert apics.ioapic.rtc_pending_eoi == 0


def test_a_pending_rtc_is_told_by_its_old_vector() -> None:
    apics = rtc()
    apics.lines(RTC_GSI, 1, 0)
    apics.program(RTC_GSI, 0x58)
    apics.enter()
    assert apics.lapics[0].handled_vectors == 1 << 0x48 | 1 << 0x58
    assert apics.take() == 0x48
    apics.eoi()
    assert apics.ioapic.rtc_pending_eoi == 0


# What always holds.

steps = st.lists(st.sampled_from(["up", "down", "take", "eoi", "mask", "unmask"]), max_size=60)


@settings(max_examples=300)
@given(steps)
def test_remote_irr_is_set_exactly_between_accept_and_end(moves: list[str]) -> None:
    apics = level_pin()
    lapic = apics.lapics[0]
    for move in moves:
        apics.records()
        _move(apics, move)
        accepted = len(apics.records(Event.KVM_APIC_ACCEPT_IRQ))
        # One at a time: a new one only after the end of the last.
        assert accepted <= 1
        assert remote_irr(apics) is lapic.pending_eoi(VECTOR)
        assert not (lapic.irr & lapic.isr)
        # A line that asks is answered: accepted, in service, or masked.
        entry = apics.ioapic.redirtbl[PIN]
        if apics.ioapic.irr >> PIN & 1 and not entry & MASK:
            assert remote_irr(apics)


@settings(max_examples=300)
@given(steps)
def test_no_accepted_edge_is_lost_and_no_masked_one_kept(moves: list[str]) -> None:
    apics = Apics()
    apics.alone(PIN)
    apics.program(PIN, VECTOR)
    lapic = apics.lapics[0]
    line, owed = 0, False
    for move in moves:
        masked = bool(apics.ioapic.redirtbl[PIN] & MASK)
        if move == "up":
            owed = owed or (not line and not masked)
            line = 1
        elif move == "down":
            line = 0
        elif move == "take" and owed and not lapic.isr:
            owed = False
        _move(apics, move, level=0)
        assert (apics.irrs() == [VECTOR]) is owed


def _move(apics: Apics, move: str, level: int = LEVEL) -> None:
    if move in ("up", "down"):
        apics.line(PIN, int(move == "up"))
    elif move == "take":
        apics.take()
    elif move == "eoi":
        apics.eoi()
    else:
        apics.write(0x10 + 2 * PIN, VECTOR | level | (MASK if move == "mask" else 0))
