"""The one event queue of a machine: what is due when, ties by insertion."""

from collections.abc import Callable
from typing import Final

from mypy_extensions import mypyc_attr

from kvmtick.timing.clock import Clock

__all__ = ["NEVER_NS", "Deadline", "EventQueue"]

NEVER_NS: Final = (1 << 62) - 1
"""Later than any deadline: what `next_ns` reads when nothing is queued."""


@mypyc_attr(allow_interpreted_subclasses=True)
class Deadline:
    """What is due at `due_ns`, while it is `queued`; the same object is queued again and again."""

    __slots__ = ("due_ns", "later", "queued")

    def __init__(self) -> None:
        self.due_ns = 0
        self.queued = False
        self.later: Deadline | None = None
        """The next one in the queue."""

    def on_due(self) -> None:
        """The time has come; it is not queued any more."""
        raise NotImplementedError


class _Callback(Deadline):
    """A function to call once."""

    __slots__ = ("_callback",)

    def __init__(self, callback: Callable[[], object]) -> None:
        super().__init__()
        self._callback = callback

    def on_due(self) -> None:
        self._callback()


class EventQueue:
    """Deadlines ordered by their due time in ns, and by insertion among equals.

    `next_ns` is the due time of the first, kept up to date so that a port access can see at the
    price of one comparison whether it created an earlier deadline. A machine has a handful of
    them, and most are due soon: a sorted chain beats a heap.
    """

    __slots__ = ("_first", "next_ns")

    def __init__(self) -> None:
        self._first: Deadline | None = None
        self.next_ns = NEVER_NS

    def __len__(self) -> int:
        count, deadline = 0, self._first
        while deadline is not None:
            count, deadline = count + 1, deadline.later
        return count

    def add(self, due_ns: int, callback: Callable[[], object]) -> Deadline:
        """Queue `callback` for `due_ns` (the past is due at once); the result is for `cancel`."""
        deadline = _Callback(callback)
        self.enqueue(deadline, due_ns)
        return deadline

    def enqueue(self, deadline: Deadline, due_ns: int) -> None:
        """Queue what is not queued for `due_ns`; the past is due at once."""
        deadline.due_ns = due_ns
        deadline.queued = True
        first = self._first
        if first is None or due_ns < first.due_ns:
            deadline.later = first
            self._first = deadline
            self.next_ns = due_ns
            return
        before = first
        after = first.later
        while after is not None and after.due_ns <= due_ns:
            before, after = after, after.later
        deadline.later = after
        before.later = deadline

    def cancel(self, deadline: Deadline) -> None:
        """Take back what is queued; ValueError if it is not."""
        first = self._first
        if first is deadline:
            self._take_first(deadline)
            return
        before = first
        while before is not None and before.later is not deadline:
            before = before.later
        if before is None:
            raise ValueError("this deadline is not queued")
        before.later = deadline.later
        deadline.later = None
        deadline.queued = False

    def run_due(self, clock: Clock) -> None:
        """Run, in order, everything due by now, what the callbacks add included.

        What falls due while a live clock goes on is left for the next call: callbacks that take
        longer than the time between them would never end.
        """
        now_ns = clock.now_ns
        while self.next_ns <= now_ns:
            deadline = self._first
            assert deadline is not None
            self._take_first(deadline)
            if clock.live:
                clock.refresh()
            deadline.on_due()

    def _take_first(self, first: Deadline) -> None:
        after = self._first = first.later
        first.later = None
        first.queued = False
        self.next_ns = NEVER_NS if after is None else after.due_ns
