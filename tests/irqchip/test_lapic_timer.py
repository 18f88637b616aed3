"""The local APIC's timer: modes, counts, the divide register, pending expiries."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lapic_rig import BASE, MS, LapicRig

from kvmtick.irqchip.delivery import IrqDelivery
from kvmtick.trace.events import Event, Function

ONESHOT, PERIODIC, DEADLINE = 0x45, 0x20045, 0x40045
MASKED = 0x10000
DIVIDE_BY_1 = 0xB
DIVISORS = {0: 2, 1: 4, 2: 8, 3: 16, 8: 32, 9: 64, 10: 128, 11: 1}
DEADLINE_MSR = 0x6E0


@pytest.fixture
def rig() -> LapicRig:
    return timer_rig()


def timer_rig() -> LapicRig:
    """One enabled APIC, divide by 1."""
    rig = LapicRig()
    rig.enable()
    rig.write(0x3E0, DIVIDE_BY_1)
    rig.records()
    return rig


def start(rig: LapicRig, lvt: int, count: int) -> None:
    rig.write(0x320, lvt)
    rig.write(0x380, count)


def take(rig: LapicRig) -> bool:
    """What the vCPU does before it enters: whether that made a request."""
    before = rig.lapic.irr
    rig.lapic.inject_pending_timer_irqs()
    return rig.lapic.irr != before


def test_one_shot(rig: LapicRig) -> None:
    start(rig, ONESHOT, MS)
    assert rig.read(0x390) == MS
    rig.run(MS - 1)
    assert rig.read(0x390) == 1
    assert rig.lapic.pending_timer == 0
    rig.run(1)
    assert (rig.lapic.pending_timer, rig.vcpu.unblocks) == (1, 1)
    assert rig.lapic.irr == 0
    assert take(rig)
    assert rig.lapic.irr == 1 << 0x45
    assert rig.lapic.pending_timer == 0
    assert rig.read(0x390) == 0
    rig.run(10 * MS)
    assert rig.expiries() == [MS]
    assert not take(rig)


def test_periodic(rig: LapicRig) -> None:
    start(rig, PERIODIC, MS)
    rig.run(3 * MS + MS // 4)
    assert rig.expiries() == [MS, 2 * MS, 3 * MS]
    assert rig.read(0x390) == MS * 3 // 4
    assert rig.read(0x380) == MS


def test_expiries_that_find_one_pending_are_merged(rig: LapicRig) -> None:
    start(rig, PERIODIC, MS)
    rig.run(5 * MS)
    assert len(rig.expiries()) == 5
    assert (rig.lapic.pending_timer, rig.vcpu.unblocks) == (1, 1)
    assert take(rig)
    assert not take(rig)
    rig.run(MS)
    assert (rig.lapic.pending_timer, rig.vcpu.unblocks) == (1, 2)


def test_the_timer_is_recorded_under_its_function(rig: LapicRig) -> None:
    start(rig, ONESHOT, MS)
    rig.write(0x380, 0)
    _, *timer = rig.records()
    assert timer == [(0x1001, int(Function.APIC_TIMER_FN), MS, 0), (0x1001,)]


def test_a_zero_count_stops_it(rig: LapicRig) -> None:
    start(rig, PERIODIC, MS)
    rig.run(MS + MS // 2)
    rig.write(0x380, 0)
    assert rig.read(0x390) == 0
    assert rig.lapic.pending_timer == 0
    rig.run(10 * MS)
    assert len(rig.expiries()) == 1


def test_a_masked_timer_runs_and_its_expiry_waits_for_the_unmasking(rig: LapicRig) -> None:
    start(rig, ONESHOT | MASKED, MS)
    rig.run(MS // 2)
    assert rig.read(0x390) == MS // 2
    rig.run(MS)
    assert not take(rig)
    assert (rig.lapic.pending_timer, rig.vcpu.unblocks) == (1, 1)
    rig.write(0x320, ONESHOT)
    assert rig.vcpu.unblocks == 2
    assert take(rig)
    assert rig.lapic.pending_timer == 0


def test_disabling_the_apic_forgets_an_expiry_that_waits(rig: LapicRig) -> None:
    start(rig, ONESHOT | MASKED, MS)
    rig.run(2 * MS)
    rig.write(0xF0, 0xFF)
    rig.write(0xF0, 0x1FF)
    rig.write(0x320, ONESHOT)
    assert not take(rig)


def test_a_vector_written_before_the_vcpu_looks_counts(rig: LapicRig) -> None:
    start(rig, ONESHOT, MS)
    rig.run(MS)
    rig.write(0x320, 0x77)
    assert take(rig)
    assert rig.lapic.irr == 1 << 0x77


def test_short_periods_are_clamped(rig: LapicRig) -> None:
    start(rig, PERIODIC, 1000)
    assert rig.read(0x390) == 200_000
    rig.run(MS)
    assert rig.expiries() == [200_000 * i for i in range(1, 6)]


def test_short_one_shots_are_not(rig: LapicRig) -> None:
    start(rig, ONESHOT, 1000)
    rig.run(MS)
    assert rig.expiries() == [1000]


def test_from_one_shot_to_periodic_on_the_run(rig: LapicRig) -> None:
    start(rig, ONESHOT, 100_000)
    rig.write(0x320, PERIODIC)
    assert rig.read(0x390) == 100_000
    rig.run(MS)
    assert rig.expiries() == [100_000, 300_000, 500_000, 700_000, 900_000]


def test_from_periodic_to_one_shot_on_the_run(rig: LapicRig) -> None:
    start(rig, PERIODIC, MS)
    rig.run(MS)
    rig.write(0x320, ONESHOT)
    rig.run(10 * MS)
    assert rig.expiries() == [MS, 2 * MS]


@pytest.mark.parametrize(("tdcr", "divisor"), DIVISORS.items())
def test_divisors(rig: LapicRig, tdcr: int, divisor: int) -> None:
    rig.write(0x3E0, tdcr)
    start(rig, ONESHOT, 10_000)
    rig.run(1000 * divisor)
    assert rig.read(0x390) == 9000
    rig.run(9000 * divisor)
    assert rig.expiries() == [10_000 * divisor]


def test_a_new_divisor_keeps_the_count(rig: LapicRig) -> None:
    start(rig, PERIODIC, MS)
    rig.run(MS // 4)
    rig.write(0x3E0, 0)
    assert rig.read(0x390) == MS * 3 // 4
    rig.run(10 * MS)
    assert rig.expiries()[:3] == [MS // 4 + 3 * MS // 2 + 2 * MS * i for i in range(3)]


def test_the_same_divisor_changes_nothing(rig: LapicRig) -> None:
    start(rig, ONESHOT, MS)
    rig.records()
    rig.write(0x3E0, DIVIDE_BY_1 | 0x4)
    assert rig.records() == []
    assert rig.read(0x3E0) == DIVIDE_BY_1


def test_a_new_divisor_has_an_expired_one_shot_expire_again(rig: LapicRig) -> None:
    start(rig, ONESHOT, MS)
    rig.run(2 * MS)
    assert take(rig)
    rig.lapic.irr = 0
    rig.write(0x3E0, DIVIDE_BY_1)
    rig.run(MS)
    assert not take(rig)
    rig.write(0x3E0, 0)
    rig.run(0)
    assert take(rig)
    rig.run(10 * MS)
    assert not take(rig)


def test_a_divisor_does_not_start_a_stopped_timer(rig: LapicRig) -> None:
    rig.write(0x3E0, 0)
    assert not rig.lapic.timer.enqueued


def test_a_slower_bus() -> None:
    rig = LapicRig(0)
    rig.delivery = IrqDelivery()
    rig.delivery.apic_bus_cycle_ns = 10
    rig.add(0)
    rig.enable()
    rig.write(0x3E0, DIVIDE_BY_1)
    start(rig, ONESHOT, 1000)
    rig.run(9990)
    assert rig.read(0x390) == 1
    rig.run(10)
    assert rig.expiries() == [10_000]


# TSC deadline.


def test_a_deadline(rig: LapicRig) -> None:
    rig.write(0x320, DEADLINE)
    assert rig.lapic.write_msr(DEADLINE_MSR, 3 * MS)
    assert rig.lapic.read_msr(DEADLINE_MSR) == 3 * MS
    rig.run(3 * MS)
    assert rig.expiries() == [3 * MS]
    assert rig.lapic.read_msr(DEADLINE_MSR) == 3 * MS
    assert take(rig)
    assert rig.lapic.read_msr(DEADLINE_MSR) == 0


@pytest.mark.parametrize("deadline", [1, MS - 1, MS])
def test_a_deadline_of_the_past_is_due(rig: LapicRig, deadline: int) -> None:
    rig.run(MS)
    rig.write(0x320, DEADLINE)
    rig.lapic.set_tsc_deadline(deadline)
    assert not rig.lapic.timer.enqueued
    assert rig.vcpu.unblocks == 1
    assert take(rig)
    assert rig.lapic.get_tsc_deadline() == 0


def test_a_deadline_written_while_one_is_pending_is_lost(rig: LapicRig) -> None:
    rig.run(MS)
    rig.write(0x320, DEADLINE)
    rig.lapic.set_tsc_deadline(1)
    rig.lapic.set_tsc_deadline(2 * MS)
    assert rig.lapic.get_tsc_deadline() == 2 * MS
    assert take(rig)
    assert rig.lapic.get_tsc_deadline() == 0
    rig.run(5 * MS)
    assert rig.expiries() == []


def test_a_zero_deadline_stops_it(rig: LapicRig) -> None:
    rig.write(0x320, DEADLINE)
    rig.lapic.set_tsc_deadline(MS)
    rig.lapic.set_tsc_deadline(0)
    rig.run(2 * MS)
    assert rig.expiries() == []
    assert rig.lapic.pending_timer == 0


def test_a_deadline_needs_its_mode(rig: LapicRig) -> None:
    rig.write(0x320, ONESHOT)
    assert rig.lapic.write_msr(DEADLINE_MSR, MS)
    assert rig.lapic.read_msr(DEADLINE_MSR) == 0
    assert not rig.lapic.timer.enqueued


def test_a_disabled_apic_takes_no_deadline(rig: LapicRig) -> None:
    rig.write(0x320, DEADLINE)
    rig.lapic.set_tsc_deadline(5 * MS)
    assert rig.lapic.set_base(BASE | 0x100)
    rig.lapic.set_tsc_deadline(MS)
    assert rig.lapic.get_tsc_deadline() == 0
    rig.run(MS)
    assert rig.expiries() == []


def test_the_initial_count_is_not_for_deadlines(rig: LapicRig) -> None:
    rig.write(0x320, DEADLINE)
    rig.write(0x380, MS)
    assert rig.read(0x380) == 0
    assert rig.read(0x390) == 0
    assert not rig.lapic.timer.enqueued


@pytest.mark.parametrize("mode", [ONESHOT, PERIODIC])
def test_to_deadline_and_back_stops_it(rig: LapicRig, mode: int) -> None:
    start(rig, mode, MS)
    rig.write(0x320, DEADLINE)
    assert rig.read(0x380) == 0
    rig.lapic.set_tsc_deadline(MS)
    rig.write(0x320, mode)
    rig.write(0x320, DEADLINE)
    assert rig.lapic.get_tsc_deadline() == 0
    rig.run(10 * MS)
    assert rig.expiries() == []


def test_the_fourth_mode_is_none(rig: LapicRig) -> None:
    start(rig, 0x60045, MS)
    assert rig.read(0x380) == MS
    assert rig.read(0x390) == 0
    assert not rig.lapic.timer.enqueued


def test_a_far_deadline_wraps_as_the_kernels(rig: LapicRig) -> None:
    rig.write(0x320, DEADLINE)
    ahead = (1 << 64) // 1_000_000 + 1 + 5000
    rig.lapic.set_tsc_deadline(ahead)
    assert rig.lapic.timer.expires_ns == (ahead * 1_000_000 - (1 << 64)) // 1_000_000


# The host.


def test_a_late_host_does_not_make_it_catch_up(rig: LapicRig) -> None:
    rig.host.set_fault("late_expiry", "5500us")
    start(rig, PERIODIC, MS)
    rig.host.set_fault("late_expiry", None)
    rig.run(8 * MS)
    assert rig.expiries() == [6_500_000, 6_500_000, 7_500_000]


def test_migrating_keeps_the_expiry(rig: LapicRig) -> None:
    rig.lapic.migrate_timer()
    assert rig.records() == []
    start(rig, ONESHOT, MS)
    rig.run(MS // 2)
    rig.lapic.migrate_timer()
    rig.run(MS)
    assert rig.expiries() == [MS]


def test_a_restart_drops_what_is_pending(rig: LapicRig) -> None:
    start(rig, ONESHOT, MS)
    rig.run(MS)
    rig.write(0x380, MS)
    assert not take(rig)
    rig.run(MS)
    assert take(rig)


# Properties.

COUNTS = st.integers(1, 0xFFFFFFFF)
CODES = st.sampled_from(sorted(DIVISORS))


@given(COUNTS, CODES, st.integers(0, 1 << 40), st.booleans())
def test_the_count_is_what_time_has_left(
    count: int, tdcr: int, elapsed_ns: int, periodic: bool
) -> None:
    """One less every `divisor` ns; periodic from the top again, one-shot stays at 0."""
    rig = timer_rig()
    rig.write(0x3E0, tdcr)
    divisor = DIVISORS[tdcr]
    start(rig, (PERIODIC if periodic else ONESHOT) | MASKED, count)
    period_ns = count * divisor
    if periodic:
        period_ns = max(period_ns, 200_000)
        elapsed_ns %= period_ns * 5
    rig.run(elapsed_ns)
    left_ns = period_ns - elapsed_ns
    if periodic:
        left_ns = period_ns - elapsed_ns % period_ns
    assert rig.read(0x390) == max(left_ns, 0) // divisor
    expired = elapsed_ns // period_ns
    assert len(rig.expiries()) == (expired if periodic else min(expired, 1))


@given(st.lists(st.tuples(st.integers(1, 500_000), st.booleans()), max_size=30))
def test_no_tick_twice_and_none_unasked(steps: list[tuple[int, bool]]) -> None:
    """A periodic timer at 300 us: a look takes one interrupt if anything expired since the last."""
    rig = timer_rig()
    start(rig, PERIODIC, 300_000)
    seen = 0
    for elapsed_ns, look in steps:
        rig.run(elapsed_ns)
        if look:
            expired = rig.clock.now_ns // 300_000
            assert take(rig) == (expired > seen)
            rig.lapic.irr = 0
            seen = expired


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just(0x380), st.sampled_from([0, 1, 1000, 250_000, MS, 0xFFFFFFFF])),
            st.tuples(st.just(0x320), st.sampled_from([0x45, 0x20045, 0x40045, 0x60045, 0x10045])),
            st.tuples(st.just(0x3E0), st.sampled_from(sorted(DIVISORS))),
            st.tuples(st.just(DEADLINE_MSR), st.integers(0, 20 * MS)),
            st.tuples(st.just(0), st.integers(0, 5 * MS)),
        ),
        max_size=40,
    )
)
def test_whatever_is_written_the_timer_makes_sense(steps: list[tuple[int, int]]) -> None:
    rig = timer_rig()
    lapic = rig.lapic
    # In the mode that is none a count is stored, and the last one that started something stays.
    highest = max([200_000, *(value for what, value in steps if what == 0x380)])
    for what, value in steps:
        if what == 0:
            rig.run(value)
        elif what == DEADLINE_MSR:
            lapic.set_tsc_deadline(value)
        else:
            rig.write(what, value)
        if lapic.timer.enqueued:
            # A start that is due now goes off with the next look at the queue.
            assert lapic.timer.expires_ns >= rig.clock.now_ns
            if not lapic.is_tscdeadline:
                assert lapic.timer.expires_ns == lapic.target_expiration_ns
        if lapic.is_oneshot or lapic.is_periodic:
            assert 0 <= rig.read(0x390) <= highest
        if lapic.is_tscdeadline:
            assert rig.read(0x380) == 0
        else:
            assert lapic.get_tsc_deadline() == 0
        if lapic.is_periodic:
            assert lapic.period_ns == 0 or lapic.period_ns >= 200_000
        assert lapic.pending_timer in (0, 1)
    gaps = rig.records(Event.HRTIMER_EXPIRE_ENTRY)
    assert all(function == int(Function.APIC_TIMER_FN) for _, function, _ in gaps)
