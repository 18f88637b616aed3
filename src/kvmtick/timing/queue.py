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

    __slots__ = ("due_ns", "queued")

    def __init__(self) -> None:
        self.due_ns = 0
        self.queued = False

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
    them, and most are due soon: a sorted list beats a heap.
    """

    __slots__ = ("_waiting", "next_ns")

    def __init__(self) -> None:
        self._waiting: list[Deadline] = []
        """The latest first, so that the next one is taken off the end."""
        self.next_ns = NEVER_NS

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, due_ns: int, callback: Callable[[], object]) -> Deadline:
        """Queue `callback` for `due_ns` (the past is due at once); the result is for `cancel`."""
        deadline = _Callback(callback)
        self.enqueue(deadline, due_ns)
        return deadline

    def enqueue(self, deadline: Deadline, due_ns: int) -> None:
        """Queue what is not queued for `due_ns`; the past is due at once."""
        deadline.due_ns = due_ns
        deadline.queued = True
        waiting = self._waiting
        at = len(waiting)
        while at > 0 and waiting[at - 1].due_ns <= due_ns:
            at -= 1
        waiting.insert(at, deadline)
        if due_ns < self.next_ns:
            self.next_ns = due_ns

    def cancel(self, deadline: Deadline) -> None:
        """Take back what is queued; ValueError if it is not."""
        self._waiting.remove(deadline)
        deadline.queued = False
        self._settle()

    def run_due(self, clock: Clock) -> None:
        """Run, in order, everything due by now, what the callbacks add included.

        What falls due while a live clock goes on is left for the next call: callbacks that take
        longer than the time between them would never end.
        """
        now_ns = clock.now_ns
        while self.next_ns <= now_ns:
            deadline = self._waiting.pop()
            deadline.queued = False
            self._settle()
            if clock.live:
                clock.refresh()
            deadline.on_due()

    def _settle(self) -> None:
        waiting = self._waiting
        self.next_ns = waiting[-1].due_ns if waiting else NEVER_NS
