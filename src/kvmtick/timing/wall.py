"""Wall time of this host: a stopwatch, waiting, and the kick that ends a real-time slice."""

import ctypes
import errno
import os
import select
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from kvmtick.timing.queue import NEVER_NS

__all__ = ["Kicker", "Stopwatch", "Waker", "realtime_ns", "sleep_ns", "wait_for_any"]

REARM_NS = 250_000
"""Who was called back arms the next time within that, if it arms one at all."""


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self.started_ns = time.monotonic_ns()
        """On CLOCK_MONOTONIC."""

    def elapsed_ns(self) -> int:
        """Nanoseconds so far."""
        return time.monotonic_ns() - self.started_ns

    def elapsed_s(self) -> float:
        """Wall seconds so far."""
        return self.elapsed_ns() / 1e9


def realtime_ns() -> int:
    """CLOCK_REALTIME."""
    return time.time_ns()


def sleep_ns(duration_ns: int) -> None:
    """Sleep for that long."""
    if duration_ns > 0:
        time.sleep(duration_ns / 1e9)


class _pollfd(ctypes.Structure):
    _fields_ = (("fd", ctypes.c_int), ("events", ctypes.c_short), ("revents", ctypes.c_short))


class _timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


_libc = ctypes.CDLL(None, use_errno=True)


def wait_for_any(descriptors: Sequence[int], duration_ns: int | None) -> bool:
    """ppoll(2), which unlike Python's polls knows less than milliseconds: True when one of them
    can be read, or after a signal; None: wait for ever.
    """
    polled = (_pollfd * len(descriptors))(*(_pollfd(fd, select.POLLIN) for fd in descriptors))
    limit = None if duration_ns is None else ctypes.byref(_timespec(*divmod(duration_ns, 10**9)))
    ready = _libc.ppoll(polled, ctypes.c_ulong(len(descriptors)), limit, None)
    if ready < 0 and ctypes.get_errno() != errno.EINTR:
        raise OSError(ctypes.get_errno(), "ppoll")
    return bool(ready)


class Waker:
    """What one thread sleeps by and any other wakes it by: an eventfd. From `open` on no `wake` is
    lost: one that comes before the sleep ends it at once.
    """

    def __init__(self) -> None:
        self._fd = -1
        # for a signal's handler, too
        self._has_fd = threading.RLock()

    def open(self) -> None:
        """May be repeated."""
        if self._fd < 0:
            self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def wake(self) -> None:
        """From any thread; nothing happens when it is not open."""
        with self._has_fd:
            if self._fd >= 0:
                os.eventfd_write(self._fd, 1)

    def sleep(self, duration_ns: int | None, wake_on: Sequence[int] = ()) -> bool:
        """For that long, None: for ever. True: cut short by `wake`, a signal, or one of the
        descriptors `wake_on` that can be read.
        """
        if not wait_for_any((self._fd, *wake_on), duration_ns):
            return False
        with suppress(BlockingIOError):
            os.eventfd_read(self._fd)
        return True

    def close(self) -> None:
        """Give the descriptor back; nobody sleeps. May be repeated."""
        with self._has_fd:
            fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        self.close()


class Kicker:
    """A thread that calls back once when CLOCK_MONOTONIC reaches the time it was armed for.

    It is what the host timer's interrupt is to a real vCPU: it gets the guest out. The thread
    starts with the first `arm` and ends with `close`.

    To wake the thread costs more than many a guest runs. So `arm` does so only for a time before
    the one the thread will wake at anyway, and having called back the thread looks once more
    before it sleeps for good: the next time is armed by then.
    """

    def __init__(self, callback: Callable[[], None]) -> None:
        self._callback = callback
        self._changed = threading.Condition()
        self._due_ns: int | None = None
        self._wakes_ns = 0
        self._closed = False
        self._thread: threading.Thread | None = None

    def arm(self, due_ns: int) -> None:
        """Call back at `due_ns`, in place of whatever was armed before."""
        with self._changed:
            self._due_ns = due_ns
            if due_ns < self._wakes_ns:
                self._changed.notify()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="kvmtick-kicker", daemon=True)
            self._thread.start()

    def disarm(self) -> None:
        """No call back any more (one may be under way)."""
        with self._changed:
            self._due_ns = None

    def close(self) -> None:
        """End the thread and wait for it. Harmless when repeated."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        called_back = False
        with self._changed:
            while not self._closed:
                due_ns, now_ns = self._due_ns, time.monotonic_ns()
                if due_ns is not None and due_ns <= now_ns:
                    self._due_ns = None
                    self._callback()
                    called_back = True
                    continue
                if due_ns is None and not called_back:
                    self._wakes_ns = NEVER_NS
                    self._changed.wait()
                    continue
                self._wakes_ns = now_ns + REARM_NS if due_ns is None else due_ns
                called_back = False
                self._changed.wait((self._wakes_ns - now_ns) / 1e9)
