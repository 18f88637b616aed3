"""Wall time of this host: a stopwatch, waiting, and the kick that ends a real-time slice."""

import ctypes
import gc
import os
import select
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from kvmtick.timing.queue import NEVER_NS

__all__ = [
    "Kicker",
    "Stopwatch",
    "TimerFd",
    "Waker",
    "collections_held_back",
    "realtime_ns",
    "short_slices",
    "sleep_ns",
]


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


class _timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class _itimerspec(ctypes.Structure):
    _fields_ = (("interval", _timespec), ("value", _timespec))


_libc = ctypes.CDLL(None, use_errno=True)
_TFD_FLAGS = os.O_CLOEXEC
_TFD_TIMER_ABSTIME = 1
_AT_ONCE_NS = 1
"""A time that has passed; 0 would disarm the timer."""


class TimerFd:
    """timerfd_create(2) on CLOCK_MONOTONIC: a descriptor that can be read from a moment on.

    It is this and no timeout of poll(2), because a thread's timer slack of 50 us is not for it, and
    nothing is late by what happens between looking at the clock and going to sleep.
    """

    def __init__(self) -> None:
        self._fd: int = _libc.timerfd_create(time.CLOCK_MONOTONIC, _TFD_FLAGS)
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create")
        self._spec = _itimerspec()
        self._spec_at = ctypes.byref(self._spec)

    def arm(self, due_ns: int) -> None:
        """Readable from `due_ns` on, in place of whatever was armed before."""
        value = self._spec.value
        value.seconds, value.nanoseconds = divmod(max(due_ns, _AT_ONCE_NS), 10**9)
        _libc.timerfd_settime(self._fd, _TFD_TIMER_ABSTIME, self._spec_at, None)

    def wait(self, wake_on: Sequence[int] = ()) -> bool:
        """Until it can be read. True: one of `wake_on` can."""
        if not wake_on:
            os.read(self._fd, 8)
            return False
        waits = select.poll()
        for fd in (self._fd, *wake_on):
            waits.register(fd, select.POLLIN)
        return any(fd != self._fd for fd, _ in waits.poll())

    def close(self) -> None:
        """Once."""
        os.close(self._fd)


class Waker:
    """What one thread sleeps by and any other wakes it by. From `open` on no `wake` is lost: one
    that comes before the sleep ends it at once.
    """

    def __init__(self) -> None:
        self._timer: TimerFd | None = None
        self._woken = False
        # for a signal's handler, too
        self._has_timer = threading.RLock()

    def open(self) -> None:
        """May be repeated."""
        if self._timer is None:
            self._timer = TimerFd()

    def wake(self) -> None:
        """From any thread; nothing happens when it is not open."""
        with self._has_timer:
            if self._timer is not None:
                self._woken = True
                self._timer.arm(_AT_ONCE_NS)

    def sleep(self, duration_ns: int | None, wake_on: Sequence[int] = ()) -> bool:
        """For that long, None: for ever. True: cut short, as `sleep_until`."""
        if duration_ns is None:
            return self.sleep_until(NEVER_NS, wake_on)
        return self.sleep_until(time.monotonic_ns() + duration_ns, wake_on)

    def sleep_until(self, due_ns: int, wake_on: Sequence[int] = ()) -> bool:
        """Until then on CLOCK_MONOTONIC. True: cut short by `wake`, or by one of the descriptors
        `wake_on` that can be read.
        """
        timer = self._timer
        if timer is None:
            raise ValueError("the waker is not open")
        if not gc.isenabled():
            _collect_held_back(due_ns - time.monotonic_ns())
        with self._has_timer:
            if not self._woken:
                timer.arm(due_ns)
        signalled = timer.wait(wake_on)
        with self._has_timer:
            woken, self._woken = self._woken, False
        return woken or signalled

    def close(self) -> None:
        """Give the descriptor back; nobody sleeps. May be repeated."""
        with self._has_timer:
            timer, self._timer = self._timer, None
        if timer is not None:
            timer.close()

    def __del__(self) -> None:
        self.close()


class _sched_attr(ctypes.Structure):
    """struct sched_attr, its first version (sched_setattr(2))."""

    _fields_ = (
        ("size", ctypes.c_uint32),
        ("sched_policy", ctypes.c_uint32),
        ("sched_flags", ctypes.c_uint64),
        ("sched_nice", ctypes.c_int32),
        ("sched_priority", ctypes.c_uint32),
        ("sched_runtime", ctypes.c_uint64),
        ("sched_deadline", ctypes.c_uint64),
        ("sched_period", ctypes.c_uint64),
    )


_SYS_SCHED_SETATTR, _SYS_SCHED_GETATTR = 314, 315  # of x86-64
_THIS_THREAD = 0
_SHORTEST_SLICE_NS = 100_000
_DEFAULT_SLICE_NS = 0
_HELD_BACK, _MOST_HELD_BACK = 5_000, 500_000
"""Objects that wait for the collector; beyond the second it comes whatever is due."""
_COLLECTION_NS = 500_000
"""What looking at some thousand objects takes at most, on a CPU that has slept."""


@contextmanager
def short_slices() -> Iterator[None]:
    """This thread asks for the shortest time slices that Linux gives, 100 us, instead of some
    milliseconds: woken, it then comes before threads that compute and have had their share (EEVDF,
    from Linux 6.12 on). It gets no more of the CPU than before, and needs no privilege. Where it
    has another policy than SCHED_OTHER, or the kernel says no, nothing changes.
    """
    done = _set_slice(_SHORTEST_SLICE_NS)
    try:
        yield
    finally:
        if done:
            _set_slice(_DEFAULT_SLICE_NS)


@contextmanager
def collections_held_back() -> Iterator[None]:
    """Python's garbage collector does not stop this process at any moment, for milliseconds: a
    `Waker` lets it work before a sleep that is long enough.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _collect_held_back(slack_ns: int) -> None:
    """What has no cycles is freed without a collection, so there is seldom something to do."""
    held_back = gc.get_count()[0]
    if held_back > _MOST_HELD_BACK or (held_back > _HELD_BACK and slack_ns > _COLLECTION_NS):
        gc.collect(0)


def _set_slice(slice_ns: int) -> bool:
    attr = _sched_attr()
    size_bytes = ctypes.sizeof(attr)
    at = ctypes.byref(attr)
    if _libc.syscall(_SYS_SCHED_GETATTR, _THIS_THREAD, at, size_bytes, 0):
        return False
    if attr.sched_policy != os.SCHED_OTHER:
        return False
    attr.sched_runtime = slice_ns
    return not _libc.syscall(_SYS_SCHED_SETATTR, _THIS_THREAD, at, 0)


class Kicker:
    """A thread that calls back once when CLOCK_MONOTONIC reaches the time it was armed for.

    It is what the host timer's interrupt is to a real vCPU: it gets the guest out. The thread
    starts with the first `arm` and ends with `close`. It sleeps until the time has come, whatever
    is armed and disarmed meanwhile: to wake it costs more than many a guest runs.
    """

    def __init__(self, callback: Callable[[], None]) -> None:
        self._callback = callback
        self._timer: TimerFd | None = None
        self._thread: threading.Thread | None = None
        self._closed = False

    def arm(self, due_ns: int) -> None:
        """Call back at `due_ns`, in place of whatever was armed before."""
        if self._timer is None:
            self._timer = TimerFd()
            self._thread = threading.Thread(
                target=self._run, args=(self._timer,), name="kvmtick-kicker", daemon=True
            )
            self._thread.start()
        self._timer.arm(due_ns)

    def disarm(self) -> None:
        """No call back any more (one may be under way)."""
        if self._timer is not None:
            self._timer.arm(NEVER_NS)

    def close(self) -> None:
        """End the thread and wait for it. Harmless when repeated."""
        timer, self._timer = self._timer, None
        if timer is not None and self._thread is not None:
            self._closed = True
            timer.arm(_AT_ONCE_NS)
            self._thread.join()
            timer.close()

    def _run(self, timer: TimerFd) -> None:
        while True:
            timer.wait()
            if self._closed:
                return
            self._callback()
