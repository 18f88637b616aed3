"""The kicker thread and the stopwatch. Nothing here sleeps: the tests wait for events."""

import fcntl
import gc
import os
import re
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmtick.timing.wall import (
    Kicker,
    Stopwatch,
    TimerFd,
    Waker,
    collections_held_back,
    short_slices,
    sleep_ns,
)

SOON_S = 10.0
"""How long a test waits before it fails; never how long it takes."""
NEVER_NS = 1 << 62


class Kicked:
    """Notes when it was called back, and by whom."""

    def __init__(self) -> None:
        self.event = threading.Event()
        self.calls: list[tuple[int, str]] = []
        self.kicker = Kicker(self._kick)

    def _kick(self) -> None:
        self.calls.append((time.monotonic_ns(), threading.current_thread().name))
        self.event.set()
        if len(self.calls) > 9:
            raise SystemExit  # it calls back for ever: end the thread, so that the test can fail

    def wait(self) -> None:
        assert self.event.wait(SOON_S)
        self.event.clear()


@pytest.fixture
def kicked() -> Iterator[Kicked]:
    kicked = Kicked()
    yield kicked
    kicked.kicker.close()


def test_an_armed_kicker_calls_back_from_its_own_thread_and_not_early(kicked: Kicked) -> None:
    due_ns = time.monotonic_ns() + 2_000_000
    kicked.kicker.arm(due_ns)
    kicked.wait()
    [(called_ns, thread)] = kicked.calls
    assert called_ns >= due_ns
    assert thread == "kvmtick-kicker"


def test_a_time_that_has_passed_kicks_at_once(kicked: Kicked) -> None:
    kicked.kicker.arm(0)
    kicked.wait()


def test_arming_again_replaces_the_time(kicked: Kicked) -> None:
    kicked.kicker.arm(NEVER_NS)
    kicked.kicker.arm(time.monotonic_ns())
    kicked.wait()
    assert len(kicked.calls) == 1


def test_it_calls_back_once_for_each_time_it_is_armed(kicked: Kicked) -> None:
    for _ in range(3):
        kicked.kicker.arm(time.monotonic_ns())
        kicked.wait()
    kicked.kicker.close()
    assert len(kicked.calls) == 3


def test_a_disarmed_kicker_does_not_call_back(kicked: Kicked) -> None:
    due_ns = time.monotonic_ns() + 5_000_000
    kicked.kicker.arm(due_ns)
    kicked.kicker.disarm()
    if time.monotonic_ns() >= due_ns:
        pytest.skip("the host was busy for too long")
    # What is armed next comes at a later time than what was disarmed.
    kicked.kicker.arm(due_ns + 1_000_000)
    kicked.wait()
    kicked.kicker.close()
    [(called_ns, _)] = kicked.calls
    assert called_ns >= due_ns + 1_000_000


def test_the_callback_may_arm_the_kicker() -> None:
    done = threading.Event()
    calls: list[int] = []

    def again() -> None:
        calls.append(1)
        if len(calls) < 3:
            kicker.arm(0)
        else:
            done.set()

    kicker = Kicker(again)
    kicker.arm(0)
    assert done.wait(SOON_S)
    kicker.close()
    assert len(calls) == 3


def test_close_ends_the_thread_even_while_it_waits() -> None:
    kicked = Kicked()
    kicked.kicker.arm(NEVER_NS)
    thread = next(each for each in threading.enumerate() if each.name == "kvmtick-kicker")
    kicked.kicker.close()
    assert not thread.is_alive()
    kicked.kicker.close()
    assert kicked.calls == []


def test_there_is_no_thread_before_the_first_arm() -> None:
    before = threading.active_count()
    kicker = Kicked().kicker
    kicker.disarm()
    assert threading.active_count() == before
    kicker.close()


def test_the_stopwatch_counts_up_from_zero() -> None:
    stopwatch = Stopwatch()
    first_s = stopwatch.elapsed_s()
    second_s = stopwatch.elapsed_s()
    assert 0 <= first_s <= second_s < SOON_S


def test_sleeping_for_nothing_returns_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    sleep_ns(0)
    sleep_ns(-5)
    assert slept == []
    sleep_ns(10**9)
    assert slept == [1.0]


@pytest.fixture
def timer() -> Iterator[TimerFd]:
    timer = TimerFd()
    yield timer
    timer.close()


def test_a_timer_is_not_early_and_one_that_has_passed_is_not_waited_for(timer: TimerFd) -> None:
    due_ns = time.monotonic_ns() + 2_000_000
    timer.arm(due_ns)
    assert not timer.wait()
    assert time.monotonic_ns() >= due_ns
    for passed_ns in (due_ns, 1, 0, -5):
        timer.arm(passed_ns)
        assert not timer.wait()


def test_the_time_a_timer_was_armed_for_last_counts(timer: TimerFd) -> None:
    timer.arm(1)
    due_ns = time.monotonic_ns() + 2_000_000
    timer.arm(due_ns)
    timer.wait()
    assert time.monotonic_ns() >= due_ns


def test_a_descriptor_that_can_be_read_ends_the_wait(timer: TimerFd) -> None:
    signalled = os.eventfd(1)
    try:
        timer.arm(NEVER_NS)
        assert timer.wait([signalled])
    finally:
        os.close(signalled)


def test_a_descriptor_above_what_select_can_take_works_too(timer: TimerFd) -> None:
    # 1024 is FD_SETSIZE; the duplicate needs no room below it.
    signalled = os.eventfd(1)
    high = fcntl.fcntl(signalled, fcntl.F_DUPFD, 1024)
    try:
        timer.arm(NEVER_NS)
        assert timer.wait([high])
    finally:
        os.close(high)
        os.close(signalled)


def test_a_wake_before_the_sleep_is_not_lost_and_ends_one_sleep() -> None:
    waker = Waker()
    waker.wake()  # not open: nothing to wake
    waker.open()
    assert not waker.sleep(0)
    waker.wake()
    waker.wake()
    waker.open()
    assert waker.sleep(None)
    assert not waker.sleep(0)
    waker.close()
    waker.close()
    waker.wake()


def test_a_descriptor_ends_the_sleep_of_a_waker() -> None:
    waker = Waker()
    waker.open()
    signalled = os.eventfd(1)
    try:
        assert waker.sleep(None, [signalled])
        assert os.eventfd_read(signalled) == 1
    finally:
        os.close(signalled)
        waker.close()


def test_the_collector_is_held_back_for_a_while_and_works_before_a_long_sleep() -> None:
    class Cycle:
        def __init__(self) -> None:
            self.itself = self

    waker = Waker()
    waker.open()
    assert gc.isenabled()
    with collections_held_back():
        assert not gc.isenabled()
        gone = weakref.ref(Cycle())
        waker.sleep_until(time.monotonic_ns() + 3_000_000)
        assert gone() is not None, "a few objects are not worth a collection"
        cycles = [Cycle() for _ in range(20_000)]
        del cycles
        waker.sleep_until(1)
        assert gone() is not None, "there was no time"
        waker.wake()
        waker.sleep_until(NEVER_NS)
        assert gone() is None
    assert gc.isenabled()
    waker.close()


def slice_ns() -> int:
    """This thread's time slice, as the kernel tells it; 0 where it tells none."""
    told = Path("/proc/self/sched")
    found = re.search(r"se\.slice\s*:\s*(\d+)", told.read_text() if told.exists() else "")
    return int(found[1]) if found else 0


def test_time_slices_are_short_for_a_while_and_then_as_before() -> None:
    before_ns = slice_ns()
    with short_slices():
        within_ns = slice_ns()
    assert slice_ns() == before_ns
    if not before_ns or tuple(map(int, os.uname().release.split(".")[:2])) < (6, 12):
        pytest.skip("this kernel tells no time slices, or gives none that were asked for")
    assert within_ns == (100_000 if os.sched_getscheduler(0) == os.SCHED_OTHER else before_ns)
