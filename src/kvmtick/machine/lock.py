"""Who works on a machine: one thread at a time, in the order of asking.

All of the state is a queue of tickets, one a thread. What holds at any moment:

- The thread whose ticket is the first has the machine. A ticket comes in at the end and keeps its
  place till it leaves, so nobody is overtaken.
- Whoever takes a ticket out, wherever it was, then wakes the first. Nobody but the first is ever
  woken, and a ticket that was woken stays so: no wake-up is lost, and none is for nothing.
- Who asks is in the queue before he looks at who has the machine. Who gets it later than that sees
  `wanted`; who has it at that moment is called out by `on_urgent`.

The queue needs no lock of its own: append, remove and the look at the first of a list are atomic.
So a signal's handler may ask, too, whatever its thread does; while that waits, they share a ticket.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

__all__ = ["MachineLock", "Ticket"]


class Ticket:
    """A thread's place; `depth`: how often the thread has asked and not given back."""

    def __init__(self, ident: int, depth: int = 1) -> None:
        self.ident = ident
        self.depth = depth
        self._asleep = threading.Lock()
        self._asleep.acquire()

    def wake(self) -> None:
        """For good; may be repeated."""
        with suppress(RuntimeError):
            self._asleep.release()

    def wait(self) -> None:
        """Until it was woken."""
        self._asleep.acquire()
        self.wake()


class MachineLock:
    """A fair lock, which a thread that has it may take again.

    A thread that only wants to make a call enters it: whoever has it is called out by `on_urgent`,
    which gets that thread's ident. vCPU threads share it by turns, with `pass_on`.
    """

    def __init__(self, on_urgent: Callable[[int], None]) -> None:
        self._on_urgent = on_urgent
        self._queue: list[Ticket] = []

    @property
    def wanted(self) -> bool:
        """Somebody waits for it."""
        return len(self._queue) > 1

    @property
    def is_mine(self) -> bool:
        """The calling thread has it."""
        first = self._first()
        return first is not None and first.ident == threading.get_ident()

    def __enter__(self) -> None:
        ticket = self._mine()
        if ticket is None:
            ticket = Ticket(threading.get_ident())
            self._queue.append(ticket)
        else:
            ticket.depth += 1
        try:
            self._await(ticket, urgent=True)
        except BaseException:
            self._give(ticket)
            raise

    def __exit__(self, *_: object) -> None:
        ticket = self._mine()
        assert ticket is not None
        self._give(ticket)

    @contextmanager
    def released(self) -> Iterator[None]:
        """Let others have it meanwhile. What interrupts the way back, does so on arrival."""
        ticket = self._mine()
        assert ticket is not None
        try:
            self._leave(ticket)
            yield
        finally:
            self._come_back(self._mine() or Ticket(ticket.ident, ticket.depth))

    def pass_on(self) -> None:
        """Let those have it who wait now."""
        if self.wanted:
            with self.released():
                pass

    def _first(self) -> Ticket | None:
        with suppress(IndexError):
            return self._queue[0]
        return None

    def _mine(self) -> Ticket | None:
        me = threading.get_ident()
        return next((each for each in list(self._queue) if each.ident == me), None)

    def _join(self, ticket: Ticket) -> None:
        if ticket not in list(self._queue):
            self._queue.append(ticket)

    def _await(self, ticket: Ticket, urgent: bool) -> None:
        first = self._queue[0]
        if first is ticket:
            return
        # Its waker may be this very thread, in a signal's handler.
        first.wake()
        if urgent:
            self._on_urgent(first.ident)
        ticket.wait()

    def _give(self, ticket: Ticket) -> None:
        ticket.depth -= 1
        if not ticket.depth:
            self._leave(ticket)

    def _leave(self, ticket: Ticket) -> None:
        try:
            with suppress(ValueError):
                self._queue.remove(ticket)
        finally:
            first = self._first()
            if first is not None:
                first.wake()

    def _come_back(self, ticket: Ticket) -> None:
        try:
            self._join(ticket)
            self._await(ticket, urgent=False)
        except BaseException:
            # Ctrl-C, most likely: the holder shall not keep it waiting
            while self._first() is not ticket:
                with suppress(BaseException):
                    self._join(ticket)
                    self._await(ticket, urgent=True)
            raise
