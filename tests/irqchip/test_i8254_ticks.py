"""Counter 0's timer and reinjection: what expires when, what is pulsed, what is made up for."""

from collections.abc import Callable

import pytest
from pc import CONTROL, EOI, MASTER, MASTER_DATA, Pc, interval_ns

from kvmtick.abi.structs import KVM_PIT_FLAGS_HPET_LEGACY
from kvmtick.trace.events import ApicvInhibitReason, Event, Irqchip, field

MS = 1_000_000
COUNT = 1193
PERIOD_NS = 999_848
VECTOR = 0x20


def ticking(reinject: bool = True, mode: int = 2) -> Pc:
    """1 kHz, PICs ready, IF = 0: nobody takes the interrupt."""
    pc = Pc()
    pc.init_pics()
    pc.pit.set_reinject(reinject)
    pc.load(0, mode, COUNT)
    pc.records()
    return pc


def periods(pc: Pc, count: int) -> None:
    pc.run(count * PERIOD_NS)


def tick(pc: Pc) -> bool:
    """The guest takes one tick and ends it, if there is one."""
    vector = pc.inta()
    if vector < 0:
        return False
    assert vector == VECTOR
    pc.out(MASTER, EOI)
    pc.settle()
    return True


def take_all(pc: Pc) -> int:
    """IF = 1: how many ticks come back to back."""
    count = 0
    while tick(pc):
        count += 1
    return count


# The timer.


def test_the_first_expiry_is_one_interval_after_the_load(pc: Pc) -> None:
    pc.run(12345)
    pc.load(0, 2, COUNT)
    assert pc.pit.timer.expires_ns == 12345 + PERIOD_NS
    assert (pc.pit.period_ns, pc.pit.is_periodic) == (PERIOD_NS, True)
    [start] = pc.records(Event.HRTIMER_START)
    assert field(start, "expires") == 12345 + PERIOD_NS
    assert field(start, "was_armed") == 0


@pytest.mark.parametrize("mode", [2, 3, 6, 7])
def test_modes_2_and_3_are_periodic(pc: Pc, mode: int) -> None:
    pc.load(0, mode, COUNT)
    periods(pc, 5)
    assert pc.expiries() == [PERIOD_NS * (index + 1) for index in range(5)]


@pytest.mark.parametrize("mode", [0, 1, 4])
def test_modes_0_1_and_4_expire_once(pc: Pc, mode: int) -> None:
    pc.load(0, mode, COUNT)
    assert not pc.pit.is_periodic
    periods(pc, 5)
    assert pc.expiries() == [PERIOD_NS]
    assert not pc.pit.timer.enqueued
    assert len(pc.board.queue) == 0


def test_mode_5_has_no_timer_and_cancels_the_one_there_was(pc: Pc) -> None:
    pc.load(0, 2, COUNT)
    pc.load(0, 5, COUNT)
    assert not pc.pit.timer.enqueued
    periods(pc, 5)
    assert pc.expiries() == []


@pytest.mark.parametrize("access", [1, 2, 3])
def test_any_complete_count_starts_the_timer(pc: Pc, access: int) -> None:
    pc.out(CONTROL, access << 4 | 2 << 1)
    pc.out(0x40, 4)
    assert pc.pit.timer.enqueued == (access != 3)
    pc.out(0x40, 4)
    assert pc.pit.timer.expires_ns == interval_ns({1: 4, 2: 0x400, 3: 0x404}[access])


def test_count_0_is_the_longest_period(pc: Pc) -> None:
    pc.load(0, 2, 0)
    assert pc.pit.period_ns == interval_ns(0x10000) == 54_925_447


@pytest.mark.parametrize("word", [0x30, 0x32, 0x36, 0x38, 0x3A, 0x10, 0x20])
def test_a_control_word_alone_does_not_stop_or_change_the_ticks(pc: Pc, word: int) -> None:
    pc.load(0, 2, COUNT)
    periods(pc, 1)
    pc.out(CONTROL, word)
    periods(pc, 3)
    assert pc.expiries() == [PERIOD_NS * (index + 1) for index in range(4)]


def test_half_a_count_does_not_restart_the_timer(pc: Pc) -> None:
    pc.load(0, 2, COUNT)
    pc.run(1000)
    pc.out(0x40, 0x01)
    assert pc.pit.timer.expires_ns == PERIOD_NS
    pc.out(0x40, 0x02)
    assert pc.pit.timer.expires_ns == 1000 + interval_ns(0x201)


def test_counters_1_and_2_have_no_timer(pc: Pc) -> None:
    for channel in (1, 2):
        for mode in range(6):
            pc.load(channel, mode, COUNT)
    assert len(pc.board.queue) == 0


@pytest.mark.parametrize(
    ("count", "period_ns"), [(1, 200_000), (10, 200_000), (238, 200_000), (239, 200_304)]
)
def test_a_periodic_interval_is_at_least_200_us_but_for_the_first(
    pc: Pc, count: int, period_ns: int
) -> None:
    pc.load(0, 2, count)
    first_ns = interval_ns(count)
    pc.run(1 * MS)
    expected = list(range(first_ns, 1 * MS + 1, period_ns))
    assert pc.expiries() == expected
    assert pc.pit.channels[0].count == count


@pytest.mark.parametrize("mode", [0, 1, 4])
def test_a_one_shot_interval_is_not_clamped(pc: Pc, mode: int) -> None:
    pc.load(0, mode, 10)
    assert pc.pit.period_ns == 8380
    pc.run(1 * MS)
    assert pc.expiries() == [8380]


def test_reprogramming_replaces_the_timer(pc: Pc) -> None:
    pc.load(0, 2, COUNT)
    pc.run(500_000)
    pc.load(0, 2, 2 * COUNT)
    assert len(pc.board.queue) == 1
    pc.run(3 * MS)
    assert pc.expiries() == [500_000 + interval_ns(2 * COUNT)]


def test_programming_for_ever_does_not_grow_the_event_queue(pc: Pc) -> None:
    for _ in range(500):
        pc.load(0, 2, COUNT)
    assert len(pc.board.queue) == 1


def test_reprogramming_flushes_the_worker_first(pc: Pc) -> None:
    pc.host.set_fault("worker_delay", "10ms")
    pc.load(0, 0, COUNT)
    periods(pc, 1)
    assert pc.pit.work.queued
    assert pc.pulses() == 0
    pc.load(0, 2, COUNT)
    assert pc.pulses() == 1
    assert not pc.pit.work.queued
    assert (pc.pit.pending, pc.pit.irq_ack) == (0, True)


# HPET legacy mode.


def set_flags(pc: Pc, flags: int) -> None:
    state = pc.pit.get_state2()
    state.flags = flags
    pc.pit.set_state2(state)


def test_hpet_legacy_stops_counter_0_until_it_is_cleared() -> None:
    pc = ticking()
    set_flags(pc, KVM_PIT_FLAGS_HPET_LEGACY)
    assert not pc.pit.timer.enqueued
    assert pc.pit.channels[0].mode == 2
    periods(pc, 5)
    assert pc.expiries() == []
    set_flags(pc, 0)
    periods(pc, 3)
    assert len(pc.expiries()) == 3


def test_programming_in_hpet_legacy_mode_starts_nothing() -> None:
    pc = ticking()
    set_flags(pc, KVM_PIT_FLAGS_HPET_LEGACY)
    pc.load(0, 3, 2 * COUNT)
    assert not pc.pit.timer.enqueued
    assert (pc.pit.channels[0].mode, pc.pit.channels[0].count) == (3, 2 * COUNT)
    set_flags(pc, KVM_PIT_FLAGS_HPET_LEGACY)  # set already: reloads, starts nothing
    pc.pit.set_state(pc.pit.get_state())
    assert not pc.pit.timer.enqueued
    set_flags(pc, 0)
    assert pc.pit.timer.expires_ns == interval_ns(2 * COUNT)


def test_setting_the_state_in_hpet_legacy_mode_leaves_the_worker_alone() -> None:
    pc = ticking()
    periods(pc, 3)
    set_flags(pc, KVM_PIT_FLAGS_HPET_LEGACY)
    assert pc.pit.pending == 3  # stopping the timer forgets nothing
    pc.pit.ack_irq()
    set_flags(pc, KVM_PIT_FLAGS_HPET_LEGACY)
    assert pc.pit.work.queued


# From expiry to pulse to acknowledgement.


def test_an_expiry_becomes_one_pulse_of_gsi_0_by_the_worker() -> None:
    pc = ticking()
    pc.run_to(PERIOD_NS)
    records = pc.records()
    assert [record[1] for record in records] == [
        Event.HRTIMER_EXPIRE_ENTRY,
        Event.WORK_QUEUE,
        Event.HRTIMER_START,
        Event.WORK_START,
        Event.KVM_SET_IRQ,
        Event.KVM_PIC_SET_IRQ,
    ]
    assert records[4][3:] == (0, 1, 2)  # GSI 0, level 1, source 2
    assert pc.pic.output
    assert pc.vcpu.requests == 1


def test_in_detail_the_pulse_is_level_1_then_0() -> None:
    pc = Pc(detail=True)
    pc.load(0, 0, COUNT)
    periods(pc, 1)
    assert [record[3:] for record in pc.records(Event.KVM_SET_IRQ)] == [(0, 1, 2), (0, 0, 2)]


@pytest.mark.parametrize("reinject", [True, False])
def test_a_guest_that_keeps_up_gets_every_tick_once(reinject: bool) -> None:
    pc = ticking(reinject)
    for _ in range(20):
        periods(pc, 1)
        assert take_all(pc) == 1
    assert (pc.pit.pending, pc.pulses()) == (0, 20)


@pytest.mark.parametrize(("reinject", "ticks", "pulses"), [(True, 50, 50), (False, 1, 50)])
def test_interrupts_disabled_for_50_ms(reinject: bool, ticks: int, pulses: int) -> None:
    pc = ticking(reinject)
    periods(pc, 50)
    assert pc.pit.pending == (50 if reinject else 0)
    assert take_all(pc) == ticks
    assert pc.pulses() == pulses
    assert pc.pit.pending == 0
    periods(pc, 1)
    assert take_all(pc) == 1


@pytest.mark.parametrize("reinject", [True, False])
def test_irq_0_masked_for_50_ms_then_unmasked(reinject: bool) -> None:
    pc = ticking(reinject)
    pc.out(MASTER_DATA, 0x01)
    periods(pc, 50)
    assert not pc.pic.output
    assert pc.pit.pending == (50 if reinject else 0)
    pc.records()
    pc.out(MASTER_DATA, 0x00)
    dropped = [field(record, "pending") for record in pc.records(Event.PIT_RESET_REINJECT)]
    assert dropped == ([50] if reinject else [])
    assert pc.pit.pending == 0
    assert take_all(pc) == 1  # the edge the PIC latched while masked
    periods(pc, 1)
    assert take_all(pc) == 1


def test_masking_alone_drops_nothing() -> None:
    pc = ticking()
    periods(pc, 30)
    pc.out(MASTER_DATA, 0x01)
    assert pc.pit.pending == 30


def test_unmasking_another_line_drops_nothing() -> None:
    pc = ticking()
    pc.out(MASTER_DATA, 0x02)
    periods(pc, 30)
    pc.out(MASTER_DATA, 0x00)
    assert pc.pit.pending == 30


@pytest.mark.parametrize("reinject", [True, False])
def test_interrupts_disabled_for_30_ms_then_mask_and_unmask(reinject: bool) -> None:
    pc = ticking(reinject)
    periods(pc, 30)
    pc.out(MASTER_DATA, 0x01, 0x00)
    assert take_all(pc) == 1


@pytest.mark.parametrize(("reinject", "pulses"), [(True, 1), (False, 21)])
def test_a_guest_that_never_writes_eoi(reinject: bool, pulses: int) -> None:
    pc = ticking(reinject)
    periods(pc, 1)
    assert pc.inta() == VECTOR
    periods(pc, 20)
    assert pc.inta() == -1
    records = pc.records()
    assert sum(record[1] == Event.HRTIMER_EXPIRE_ENTRY for record in records) == 21
    assert sum(record[1] == Event.KVM_SET_IRQ for record in records) == pulses


@pytest.mark.parametrize("reinject", [True, False])
def test_a_late_eoi_gives_one_tick_more(reinject: bool) -> None:
    pc = ticking(reinject)
    periods(pc, 1)
    assert pc.inta() == VECTOR
    periods(pc, 20)
    pc.records()
    pc.out(MASTER, EOI)
    pc.settle()
    assert pc.pulses() == (1 if reinject else 0)  # without reinject the PIC had latched it
    assert pc.inta() == VECTOR
    periods(pc, 5)
    assert pc.inta() == -1  # that one waits for its EOI too


@pytest.mark.parametrize("where", ["eoi", "poll", "ioapic"])
def test_the_acknowledgement_may_come_from_eoi_poll_or_the_ioapic_pin(where: str) -> None:
    pc = ticking()
    periods(pc, 3)
    assert not pc.pit.irq_ack
    if where == "eoi":
        pc.inta()
        pc.out(MASTER, EOI)
    elif where == "poll":
        pc.out(MASTER, 0x0C)
        assert pc.inp(MASTER) == 0x80
    else:
        pc.board.notifiers.notify_acked_irq(Irqchip.IOAPIC, 0)
    assert pc.pit.irq_ack
    assert pc.pit.pending == 2
    assert pc.pit.work.queued
    pc.settle()
    assert pc.pulses() == 2  # the first, and the one this let go
    assert not pc.pit.irq_ack


@pytest.mark.parametrize(("irqchip", "pin"), [(Irqchip.IOAPIC, 2), (Irqchip.PIC_SLAVE, 8)])
def test_the_acknowledgement_of_another_pin_is_not_the_pits(irqchip: int, pin: int) -> None:
    pc = ticking()
    periods(pc, 3)
    pc.board.notifiers.notify_acked_irq(irqchip, pin)
    assert (pc.pit.irq_ack, pc.pit.pending) == (False, 3)


@pytest.mark.parametrize(
    ("pending", "left", "queued"), [(0, 0, False), (1, 0, False), (2, 1, True), (50, 49, True)]
)
def test_an_acknowledgement_consumes_one_and_asks_for_the_next(
    pc: Pc, pending: int, left: int, queued: bool
) -> None:
    pc.pit.pending, pc.pit.irq_ack = pending, False
    pc.pit.ack_irq()
    assert (pc.pit.pending, pc.pit.irq_ack, pc.pit.work.queued) == (left, True, queued)


def test_the_worker_does_not_pulse_before_the_acknowledgement(pc: Pc) -> None:
    pc.pit.irq_ack = False
    pc.pit.do_work()
    assert pc.pulses() == 0
    pc.pit.irq_ack = True
    pc.pit.do_work()
    assert pc.pulses() == 1
    assert not pc.pit.irq_ack


def test_without_reinject_the_worker_always_pulses_and_keeps_no_books(pc: Pc) -> None:
    pc.pit.set_reinject(False)
    pc.pit.irq_ack = False
    pc.pit.do_work()
    pc.pit.do_work()
    assert pc.pulses() == 2
    pc.load(0, 2, COUNT)
    periods(pc, 5)
    assert (pc.pit.pending, pc.pit.irq_ack) == (0, True)


def test_expiries_merge_while_the_work_is_queued() -> None:
    pc = ticking(reinject=False)
    pc.host.set_fault("worker_delay", "10ms")
    periods(pc, 5)
    assert pc.pulses() == 0
    pc.run(10 * MS)
    assert pc.pulses() == 1


# KVM_REINJECT_CONTROL.


def test_reinject_is_on_after_creation_and_registers_for_every_eoi(pc: Pc) -> None:
    inhibit = 1 << ApicvInhibitReason.PIT_REINJ
    assert pc.pit.reinject
    assert len(pc.board.notifiers) == 2
    assert pc.board.apicv_inhibits == inhibit
    pc.records()
    pc.pit.set_reinject(False)
    assert len(pc.board.notifiers) == 0
    assert pc.board.apicv_inhibits == 0
    pc.pit.set_reinject(True)
    assert len(pc.board.notifiers) == 2
    assert pc.board.apicv_inhibits == inhibit
    changes = [record[3:] for record in pc.records(Event.KVM_APICV_INHIBIT_CHANGED)]
    reason = ApicvInhibitReason.PIT_REINJ
    assert changes == [(reason, False, 0), (reason, True, inhibit)]


@pytest.mark.parametrize("reinject", [True, False])
def test_the_same_value_again_changes_nothing(pc: Pc, reinject: bool) -> None:
    pc.pit.set_reinject(reinject)
    pc.pit.pending, pc.pit.irq_ack = 7, False
    registered = len(pc.board.notifiers)
    pc.records()
    pc.pit.set_reinject(reinject)
    assert (pc.pit.pending, pc.pit.irq_ack) == (7, False)
    assert len(pc.board.notifiers) == registered
    assert pc.records() == []


def test_turning_reinject_off_with_30_pending_delivers_one() -> None:
    pc = ticking()
    periods(pc, 30)
    pc.pit.set_reinject(False)
    assert take_all(pc) == 1
    periods(pc, 1)
    assert take_all(pc) == 1


def test_turning_reinject_on_recovers_nothing_that_was_lost_before() -> None:
    pc = ticking(reinject=False)
    periods(pc, 30)
    pc.pit.set_reinject(True)
    assert (pc.pit.pending, pc.pit.irq_ack) == (0, True)
    assert take_all(pc) == 1
    periods(pc, 1)
    assert take_all(pc) == 1


def test_off_and_on_again_forgets_what_was_pending() -> None:
    pc = ticking()
    periods(pc, 30)
    pc.pit.set_reinject(False)
    pc.pit.set_reinject(True)
    assert (pc.pit.pending, pc.pit.irq_ack) == (0, True)


def test_with_reinject_off_unmasking_keeps_the_books_as_they_were() -> None:
    pc = ticking(reinject=False)
    pc.pit.pending, pc.pit.irq_ack = 7, False
    pc.out(MASTER_DATA, 0x01, 0x00)
    assert (pc.pit.pending, pc.pit.irq_ack) == (7, False)


def reprogrammed(pc: Pc) -> None:
    pc.load(0, 2, COUNT)


def set_again(pc: Pc) -> None:
    pc.pit.set_state2(pc.pit.get_state2())


@pytest.mark.parametrize("restart", [reprogrammed, set_again])
def test_a_restart_with_30_pending_drops_them_and_waits_a_full_period(
    restart: Callable[[Pc], None],
) -> None:
    pc = ticking()
    periods(pc, 30)
    pc.run(PERIOD_NS // 2)
    pc.records()
    restart(pc)
    dropped = [field(record, "pending") for record in pc.records(Event.PIT_RESET_REINJECT)]
    assert dropped == [30]
    assert (pc.pit.pending, pc.pit.irq_ack) == (0, True)
    assert pc.pit.timer.expires_ns == pc.clock.now_ns + PERIOD_NS
    assert take_all(pc) == 1


def test_a_reset_of_nothing_pending_is_not_recorded(pc: Pc) -> None:
    pc.records()
    pc.pit.reset_reinject()
    assert pc.records() == []


# Migration: the timer follows vCPU 0.


def test_migration_restarts_an_armed_timer_at_the_expiry_it_has() -> None:
    pc = ticking()
    pc.run(300_000)
    pc.pit.pending = 5
    pc.board.migrate_pit_timer()
    cancel, start = pc.records()
    assert (cancel[1], start[1]) == (Event.HRTIMER_CANCEL, Event.HRTIMER_START)
    assert field(start, "expires") == PERIOD_NS
    assert field(start, "was_armed") == 0  # cancelled first
    assert pc.pit.pending == 5
    periods(pc, 2)
    assert pc.expiries() == [PERIOD_NS, 2 * PERIOD_NS]


def test_migration_leaves_a_timer_alone_that_is_not_armed(pc: Pc) -> None:
    pc.load(0, 0, COUNT)
    periods(pc, 2)
    pc.records()
    pc.board.migrate_pit_timer()
    assert not pc.pit.timer.enqueued
    assert pc.records() == []


def test_migration_before_the_callback_ran_loses_no_expiry() -> None:
    pc = ticking()
    pc.clock.now_ns = PERIOD_NS + 5000  # late: expired, still enqueued
    pc.board.migrate_pit_timer()
    pc.settle()
    assert pc.expiries() == [PERIOD_NS + 5000]
    assert pc.pit.timer.expires_ns == 2 * PERIOD_NS


def test_migration_without_a_pit_is_harmless() -> None:
    Pc(pit=None).board.migrate_pit_timer()
