"""A thread beside the test, and what it leaves behind."""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["JOIN_S", "nothing_leaks", "thread"]

JOIN_S = 30
"""Nothing that works comes near it."""


@contextmanager
def thread(function: Callable[[], object]) -> Iterator[threading.Thread]:
    """Runs `function` beside the test; what it raises, the test does."""
    failures: list[BaseException] = []

    def run() -> None:
        try:
            function()
        except BaseException as failure:
            failures.append(failure)

    running = threading.Thread(target=run, daemon=True)
    running.start()
    try:
        yield running
    finally:
        running.join(JOIN_S)
    assert not running.is_alive(), f"{function} does not end"
    if failures:
        raise failures[0]


@contextmanager
def nothing_leaks() -> Iterator[None]:
    """No thread and no descriptor is left over."""
    threads, descriptors = set(threading.enumerate()), _descriptors()
    yield
    assert set(threading.enumerate()) == threads
    assert _descriptors() == descriptors


def _descriptors() -> dict[str, str]:
    found = {}
    for fd in os.listdir("/proc/self/fd"):
        try:
            found[fd] = os.readlink(f"/proc/self/fd/{fd}")
        except OSError:  # that of the directory
            continue
    return found
