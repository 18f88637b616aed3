"""The two clocks."""

import time

from kvmtick.timing.clock import MonotonicClock, VirtualClock


def test_the_virtual_clock_starts_at_zero_and_moves_only_when_moved() -> None:
    clock = VirtualClock()
    clock.refresh()
    assert (clock.now_ns, clock.name) == (0, "virtual")
    clock.now_ns = 5
    clock.refresh()
    assert clock.now_ns == 5


def test_the_monotonic_clock_is_a_snapshot_until_refreshed() -> None:
    before_ns = time.monotonic_ns()
    clock = MonotonicClock()
    snapshot_ns = clock.now_ns
    assert before_ns <= snapshot_ns <= time.monotonic_ns()
    assert clock.now_ns == snapshot_ns
    later_ns = time.monotonic_ns()
    clock.refresh()
    assert later_ns <= clock.now_ns <= time.monotonic_ns()
    assert clock.name == "real"
