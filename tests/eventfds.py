"""Eventfds for the tests, and waiting for what the kernel makes of them: it may take its time."""

import os
import time
from collections.abc import Callable

LIMIT_S = 5.0
"""No wait of a test that works comes near it."""
PAUSE_S = 0.0005


class EventFd:
    """A non-blocking eventfd."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def signal(self, times: int = 1) -> None:
        os.eventfd_write(self.fd, times)

    def count(self) -> int:
        """How often it was signalled since the last time."""
        try:
            return os.eventfd_read(self.fd)
        except BlockingIOError:
            return 0


MakeEventFd = Callable[[], EventFd]


def wait_for(condition: Callable[[], bool]) -> None:
    """Look until it holds, and leave the CPU to others in between.

    For what no file descriptor tells of: KVM serves an irqfd in a worker, a little later.
    """
    deadline_s = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline_s, f"not within {LIMIT_S} s"
        time.sleep(PAUSE_S)
