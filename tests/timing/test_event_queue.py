"""The event queue: order, ties, cancelling, and `next_ns`, which a port access relies on."""

import itertools
import time
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmtick.timing.clock import Clock, MonotonicClock, VirtualClock
from kvmtick.timing.queue import NEVER_NS, Deadline, EventQueue


class Queue:
    """A queue and its clock; callbacks note their name and the time."""

    def __init__(self) -> None:
        self.clock = VirtualClock()
        self.queue = EventQueue()
        self.ran: list[object] = []

    def note(self, name: object) -> Callable[[], None]:
        return lambda: self.ran.append(name)

    def add(self, due_ns: int, name: object) -> Deadline:
        return self.queue.add(due_ns, self.note(name))

    def run(self, now_ns: int) -> None:
        self.clock.now_ns = now_ns
        self.queue.run_due(self.clock)


def test_an_empty_queue_is_never_due() -> None:
    queue = Queue()
    assert queue.queue.next_ns == NEVER_NS
    assert len(queue.queue) == 0
    queue.run(NEVER_NS - 1)
    assert queue.ran == []


def test_events_run_in_order_of_their_time() -> None:
    queue = Queue()
    for due_ns in (30, 10, 20):
        queue.add(due_ns, due_ns)
    queue.run(20)
    assert queue.ran == [10, 20]
    assert queue.queue.next_ns == 30
    assert len(queue.queue) == 1


def test_ties_run_in_order_of_insertion() -> None:
    queue = Queue()
    for name in "abcde":
        queue.add(7, name)
    queue.run(7)
    assert queue.ran == list("abcde")


def test_what_is_due_in_the_past_runs_at_once() -> None:
    queue = Queue()
    queue.clock.now_ns = 1000
    queue.add(-5, "past")
    assert queue.queue.next_ns == -5
    queue.run(1000)
    assert queue.ran == ["past"]


def test_a_cancelled_event_does_not_run() -> None:
    queue = Queue()
    handles = {name: queue.add(5, name) for name in "abc"}
    queue.queue.cancel(handles["b"])
    assert len(queue.queue) == 2
    queue.run(5)
    assert queue.ran == ["a", "c"]
    assert len(queue.queue) == 0


def test_cancelling_the_head_moves_next_ns_on() -> None:
    queue = Queue()
    first = queue.add(1, 1)
    second = queue.add(2, 2)
    queue.add(3, 3)
    queue.queue.cancel(second)
    assert queue.queue.next_ns == 1
    queue.queue.cancel(first)
    assert queue.queue.next_ns == 3


def test_a_callback_may_add_what_is_due_now_and_it_runs_in_the_same_pass() -> None:
    queue = Queue()
    queue.queue.add(5, lambda: queue.add(5, "added"))
    queue.add(5, "after")
    queue.run(5)
    assert queue.ran == ["after", "added"]


def test_a_callback_may_add_an_earlier_deadline_than_the_next() -> None:
    queue = Queue()
    queue.queue.add(5, lambda: queue.add(6, "added"))
    queue.add(10, "later")
    queue.run(5)
    assert queue.ran == []
    assert queue.queue.next_ns == 6


def test_a_callback_may_cancel_another_that_is_due() -> None:
    queue = Queue()
    queue.queue.add(5, lambda: queue.queue.cancel(doomed))
    doomed = queue.add(5, "doomed")
    queue.add(5, "other")
    queue.run(5)
    assert queue.ran == ["other"]
    assert len(queue.queue) == 0


def test_next_ns_is_true_inside_a_callback() -> None:
    queue = Queue()
    queue.queue.add(5, lambda: queue.ran.append(queue.queue.next_ns))
    doomed = queue.add(6, "doomed")
    queue.add(9, "alive")
    queue.queue.cancel(doomed)
    queue.run(5)
    assert queue.ran == [9]


def test_cancelling_what_is_not_queued_is_refused() -> None:
    queue = Queue()
    once = queue.add(5, "once")
    queue.queue.cancel(once)
    with pytest.raises(ValueError, match="not queued"):
        queue.queue.cancel(once)


def test_a_deadline_knows_whether_it_is_queued() -> None:
    queue = Queue()
    one, other = queue.add(5, "one"), queue.add(6, "other")
    queue.queue.cancel(other)
    assert (one.queued, other.queued) == (True, False)
    queue.run(5)
    assert not one.queued


def test_a_real_clock_is_refreshed_before_every_callback(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count(1)
    monkeypatch.setattr(time, "monotonic_ns", ticks.__next__)
    clock, queue, seen = MonotonicClock(), EventQueue(), []
    for _ in range(3):
        queue.add(0, lambda: seen.append(clock.now_ns))
    queue.run_due(clock)
    assert seen == [2, 3, 4]


def test_what_a_real_clock_reaches_meanwhile_runs_in_the_next_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ticks = itertools.count(1)
    monkeypatch.setattr(time, "monotonic_ns", ticks.__next__)
    clock, queue, seen = MonotonicClock(), EventQueue(), []
    for due_ns in (1, 2, 3, 100):
        queue.add(due_ns, lambda due_ns=due_ns: seen.append(due_ns))
    queue.run_due(clock)
    assert seen == [1]
    queue.run_due(clock)
    assert seen == [1, 2]


def test_an_exception_passes_on_and_leaves_the_rest_queued() -> None:
    queue = Queue()

    def fail() -> None:
        raise RuntimeError("callback")

    queue.queue.add(5, fail)
    queue.add(5, "rest")
    with pytest.raises(RuntimeError, match="callback"):
        queue.run(5)
    assert queue.queue.next_ns == 5
    queue.run(5)
    assert queue.ran == ["rest"]


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("add"), st.integers(0, 40)),
            st.tuples(st.just("cancel"), st.integers(0, 30)),
            st.tuples(st.just("run"), st.integers(0, 12)),
        ),
        max_size=60,
    )
)
def test_any_history_agrees_with_a_sorted_list(history: list[tuple[str, int]]) -> None:
    queue = Queue()
    waiting: list[tuple[int, int]] = []  # (due, name): the reference
    deadlines: list[Deadline] = []  # by name
    expected: list[object] = []
    for step, number in history:
        if step == "add":
            due_ns, name = queue.clock.now_ns + number - 4, len(deadlines)
            deadlines.append(queue.add(due_ns, name))
            waiting.append((due_ns, name))
        elif step == "cancel" and waiting:
            entry = waiting.pop(number % len(waiting))
            queue.queue.cancel(deadlines[entry[1]])
        elif step == "run":
            now_ns = queue.clock.now_ns + number
            due = sorted(entry for entry in waiting if entry[0] <= now_ns)
            expected += [name for _, name in due]  # names count up: ties by insertion
            waiting = [entry for entry in waiting if entry[0] > now_ns]
            queue.run(now_ns)
        assert queue.ran == expected
        assert len(queue.queue) == len(waiting)
        assert queue.queue.next_ns == min((due for due, _ in waiting), default=NEVER_NS)


def test_callbacks_slower_than_their_period_do_not_keep_the_caller_for_ever() -> None:
    class Slow(Clock):
        """Each look finds it 10 ns later."""

        def refresh(self) -> None:
            self.now_ns += 10

    clock, queue = Slow(0, live=True), EventQueue()
    ran: list[int] = []

    def again() -> None:
        ran.append(clock.now_ns)
        queue.add(clock.now_ns, again)

    queue.add(0, again)
    queue.run_due(clock)
    assert ran == [10]
