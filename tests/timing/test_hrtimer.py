"""HrTimer against kernel/time/hrtimer.c."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from timing_rig import TIMER, Rig

from kvmtick.timing.hrtimer import HrTimer, HrTimerRestart
from kvmtick.trace.events import IRQ_CONTEXT, Event, Function, field

NORESTART, RESTART = HrTimerRestart.NORESTART, HrTimerRestart.RESTART


class Expiries:
    """A timer whose callback notes the time, then does what the test says."""

    def __init__(self, rig: Rig, then: Callable[[HrTimer], HrTimerRestart]) -> None:
        self.at_ns: list[int] = []
        self._rig = rig
        self._then = then
        self.timer = rig.timer(self._expire)

    def _expire(self) -> HrTimerRestart:
        self.at_ns.append(self._rig.clock.now_ns)
        return self._then(self.timer)


def one_shot(rig: Rig) -> Expiries:
    return Expiries(rig, lambda timer: NORESTART)


def periodic(rig: Rig, period_ns: int) -> Expiries:
    def then(timer: HrTimer) -> HrTimerRestart:
        timer.add_expires_ns(period_ns)
        return RESTART

    return Expiries(rig, then)


def test_a_started_timer_expires_at_that_absolute_time_once(rig: Rig) -> None:
    expiries = one_shot(rig)
    rig.clock.now_ns = 50
    expiries.timer.start(200)
    assert expiries.timer.enqueued
    rig.run_to(199)
    assert expiries.at_ns == []
    rig.run_to(10_000)
    assert expiries.at_ns == [200]
    assert not expiries.timer.enqueued
    assert len(rig.queue) == 0


def test_an_expiry_in_the_past_is_due_at_once(rig: Rig) -> None:
    expiries = one_shot(rig)
    rig.clock.now_ns = 1000
    expiries.timer.start(200)
    rig.queue.run_due(rig.clock)
    assert expiries.at_ns == [1000]


def test_start_records_expiry_and_whether_the_timer_was_armed(rig: Rig) -> None:
    expiries = one_shot(rig)
    expiries.timer.start(100)
    expiries.timer.start(300)
    first, second = rig.records()
    for record, expires, was_armed in ((first, 100, False), (second, 300, True)):
        assert record[1] == Event.HRTIMER_START
        assert field(record, "hrtimer") == TIMER
        assert field(record, "function") == Function.PIT_TIMER_FN
        assert field(record, "expires") == expires
        assert field(record, "was_armed") == was_armed


def test_starting_an_armed_timer_replaces_its_expiry(rig: Rig) -> None:
    expiries = one_shot(rig)
    expiries.timer.start(100)
    expiries.timer.start(300)
    assert len(rig.queue) == 1
    rig.run_to(1000)
    assert expiries.at_ns == [300]


def test_cancel_says_whether_the_timer_was_enqueued(rig: Rig) -> None:
    expiries = one_shot(rig)
    assert expiries.timer.cancel() is False
    expiries.timer.start(100)
    assert expiries.timer.cancel() is True
    assert expiries.timer.cancel() is False
    rig.run_to(1000)
    assert expiries.at_ns == []
    assert rig.events() == [("hrtimer_start", 0), ("hrtimer_cancel", 0)]


def test_a_timer_that_has_run_cannot_be_cancelled(rig: Rig) -> None:
    expiries = one_shot(rig)
    expiries.timer.start(100)
    rig.run_to(100)
    assert expiries.timer.cancel() is False


def test_an_expired_timer_whose_callback_has_not_run_is_enqueued_and_can_be_cancelled(
    rig: Rig,
) -> None:
    expiries = one_shot(rig)
    expiries.timer.start(100)
    rig.clock.now_ns = 500  # nobody ran the queue
    assert expiries.timer.enqueued
    assert expiries.timer.remaining_ns() == -400
    assert expiries.timer.cancel() is True
    rig.queue.run_due(rig.clock)
    assert expiries.at_ns == []


def test_restart_keeps_the_expiry_it_has(rig: Rig) -> None:
    expiries = one_shot(rig)
    expiries.timer.start(700)
    assert expiries.timer.cancel()
    rig.clock.now_ns = 300
    expiries.timer.restart()
    start = rig.records()[-1]
    assert (field(start, "expires"), field(start, "was_armed")) == (700, False)
    rig.run_to(1000)
    assert expiries.at_ns == [700]


def test_a_callback_that_returns_restart_goes_on_at_the_moved_expiry(rig: Rig) -> None:
    expiries = periodic(rig, 250)
    expiries.timer.start(100)
    rig.run_to(1000)
    assert expiries.at_ns == [100, 350, 600, 850]
    assert expiries.timer.expires_ns == 1100
    starts = [record for record in rig.records() if record[1] == Event.HRTIMER_START]
    assert [field(start, "expires") for start in starts] == [100, 350, 600, 850, 1100]
    assert not any(field(start, "was_armed") for start in starts)


def test_a_late_periodic_timer_catches_up_with_every_period(rig: Rig) -> None:
    expiries = periodic(rig, 100)
    expiries.timer.start(100)
    rig.clock.now_ns = 350
    rig.queue.run_due(rig.clock)
    assert expiries.at_ns == [350, 350, 350]
    assert expiries.timer.expires_ns == 400


def test_a_callback_may_start_its_timer_and_return_norestart(rig: Rig) -> None:
    expiries = Expiries(rig, lambda timer: (timer.start(900), NORESTART)[1])
    expiries.timer.start(100)
    rig.run_to(899)
    assert expiries.at_ns == [100]
    assert expiries.timer.enqueued
    assert expiries.timer.expires_ns == 900


def test_restart_is_ignored_when_the_callback_started_the_timer_itself(rig: Rig) -> None:
    expiries = Expiries(rig, lambda timer: (timer.start(900), RESTART)[1])
    expiries.timer.start(100)
    rig.run_to(100)
    assert len(rig.queue) == 1
    assert [name for name, _ in rig.events()].count("hrtimer_start") == 2


def test_the_timer_is_not_enqueued_while_its_callback_runs(rig: Rig) -> None:
    seen: list[bool] = []
    expiries = Expiries(rig, lambda timer: (seen.append(timer.enqueued), NORESTART)[1])
    expiries.timer.start(1)
    rig.run_to(1)
    assert seen == [False]


def test_the_expiry_is_recorded_in_interrupt_context_with_the_time_it_runs(rig: Rig) -> None:
    task = rig.recorder.add_task("CPU 0/KVM-7")
    rig.recorder.task = task
    expiries = one_shot(rig)
    expiries.timer.start(100)
    rig.clock.now_ns = 130
    rig.queue.run_due(rig.clock)
    start, expire = rig.records()
    assert start[2] == task
    assert expire[:3] == (130, Event.HRTIMER_EXPIRE_ENTRY, task | IRQ_CONTEXT)
    assert field(expire, "now") == 130
    assert rig.recorder.task == task


# hrtimer_forward, hrtimer_get_remaining.


def test_forward_leaves_an_expiry_that_lies_ahead(rig: Rig) -> None:
    timer = one_shot(rig).timer
    timer.add_expires_ns(1000)
    assert timer.forward(999, 100) == 0
    assert timer.expires_ns == 1000


@pytest.mark.parametrize(
    ("now_ns", "overruns", "expires_ns"),
    [(1000, 1, 1100), (1099, 1, 1100), (1100, 2, 1200), (1101, 2, 1200), (1999, 10, 2000)],
)
def test_forward_moves_by_whole_intervals_past_now(
    rig: Rig, now_ns: int, overruns: int, expires_ns: int
) -> None:
    timer = one_shot(rig).timer
    timer.add_expires_ns(1000)
    assert timer.forward(now_ns, 100) == overruns
    assert timer.expires_ns == expires_ns


@given(st.integers(0, 10**9), st.integers(0, 10**9), st.integers(1, 10**6))
def test_forward_ends_in_the_one_interval_after_now(
    expires_ns: int, now_ns: int, interval_ns: int
) -> None:
    timer = one_shot(Rig()).timer
    timer.add_expires_ns(expires_ns)
    overruns = timer.forward(now_ns, interval_ns)
    assert timer.expires_ns == expires_ns + overruns * interval_ns
    assert timer.expires_ns > now_ns or (overruns == 0 and expires_ns > now_ns)
    assert overruns == 0 or timer.expires_ns - interval_ns <= now_ns


def test_forward_of_an_enqueued_timer_is_a_mistake_once_it_has_expired(rig: Rig) -> None:
    timer = one_shot(rig).timer
    timer.start(1000)
    assert timer.forward(999, 100) == 0
    with pytest.raises(ValueError, match="enqueued; cancel it first"):
        timer.forward(1000, 100)
    assert timer.expires_ns == 1000


@pytest.mark.parametrize("interval_ns", [0, -1])
def test_forward_needs_a_positive_interval(rig: Rig, interval_ns: int) -> None:
    with pytest.raises(ValueError, match=f"interval {interval_ns} ns is not positive"):
        one_shot(rig).timer.forward(0, interval_ns)


def test_remaining_counts_down_through_zero(rig: Rig) -> None:
    timer = one_shot(rig).timer
    timer.start(100)
    remaining = []
    for now_ns in (0, 60, 100, 130):
        rig.clock.now_ns = now_ns
        remaining.append(timer.remaining_ns())
    assert remaining == [100, 40, 0, -30]


# The host is late.


def test_late_expiry_delays_the_callback_but_not_the_expiry(rig: Rig) -> None:
    rig.host.set_fault("late_expiry", "40ns")
    expiries = periodic(rig, 100)
    expiries.timer.start(100)
    rig.run_to(350)
    assert expiries.at_ns == [140, 240, 340]
    assert expiries.timer.expires_ns == 400
    starts = [record for record in rig.records() if record[1] == Event.HRTIMER_START]
    assert [field(start, "expires") for start in starts] == [100, 200, 300, 400]


def test_a_late_timer_past_its_expiry_can_still_be_cancelled(rig: Rig) -> None:
    rig.host.set_fault("late_expiry", "40ns")
    expiries = one_shot(rig)
    expiries.timer.start(100)
    rig.run_to(120)
    assert expiries.timer.remaining_ns() == -20
    assert expiries.timer.cancel() is True
    rig.run_to(1000)
    assert expiries.at_ns == []


def test_a_host_on_time_again_is_on_time(rig: Rig) -> None:
    rig.host.set_fault("late_expiry", "40ns")
    rig.host.set_fault("late_expiry", None)
    expiries = one_shot(rig)
    expiries.timer.start(100)
    rig.run_to(1000)
    assert expiries.at_ns == [100]
