"""Eventfds for the cases, and waiting for what KVM makes of them: it may take its time."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from kvmtick.conform.case import Failed
from kvmtick.timing.wall import Stopwatch, sleep_ns

__all__ = ["EventFd", "eventfds", "wait_for"]

LIMIT_S = 5.0
"""No wait of a KVM that works comes near it."""
PAUSE_NS = 500_000


class EventFd:
    """A non-blocking eventfd (eventfd(2))."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def signal(self, times: int = 1) -> None:
        """Add `times`."""
        os.eventfd_write(self.fd, times)

    def count(self) -> int:
        """How often it was signalled since the last time."""
        try:
            return os.eventfd_read(self.fd)
        except BlockingIOError:
            return 0

    def close(self) -> None:
        """Give the descriptor back."""
        os.close(self.fd)


@contextmanager
def eventfds(number: int = 1) -> Iterator[tuple[EventFd, ...]]:
    """So many eventfds."""
    with ExitStack() as stack:
        made = tuple(EventFd() for _ in range(number))
        for each in made:
            stack.callback(each.close)
        yield made


def wait_for(condition: Callable[[], bool], what: str = "what was awaited") -> None:
    """Look until it holds, and leave the CPU to others in between.

    For what no file descriptor tells of: KVM serves an irqfd in a worker, a little later.
    """
    stopwatch = Stopwatch()
    while not condition():
        if stopwatch.elapsed_s() > LIMIT_S:
            raise Failed(what, "true", f"still false after {LIMIT_S} s")
        sleep_ns(PAUSE_NS)
