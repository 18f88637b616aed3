"""High-resolution timers with Linux's semantics (kernel/time/hrtimer.c, Documentation/timers).

A timer is *enqueued* from `start` until its callback runs or it is cancelled; an expired timer
whose callback has not run yet (a late host) is still enqueued and can still be cancelled. The
callback says whether the timer restarts, after moving `expires_ns` itself (`forward` or
`add_expires_ns`). A callback may also call `start`; the kernel then ignores RESTART.

Not modelled: soft-irq expiry, slack (soft and hard expiry are the same), several clock bases.
"""

from collections.abc import Callable
from enum import IntEnum
from typing import Final

from kvmtick.timing.clock import Clock
from kvmtick.timing.host import HostModel
from kvmtick.timing.queue import Deadline, EventQueue
from kvmtick.trace.events import Function
from kvmtick.trace.recorder import Recorder

__all__ = ["NORESTART", "RESTART", "HrTimer", "HrTimerRestart"]


class HrTimerRestart(IntEnum):
    """What a timer callback returns (enum hrtimer_restart)."""

    NORESTART = 0
    RESTART = 1


# Names of their own: looking up an enum's member costs more than running a timer callback.
NORESTART: Final = HrTimerRestart.NORESTART
RESTART: Final = HrTimerRestart.RESTART


class HrTimer(Deadline):
    """One timer on the machine's clock, HRTIMER_MODE_ABS."""

    __slots__ = (
        "_clock",
        "_host",
        "_queue",
        "_recorder",
        "address",
        "callback",
        "expires_ns",
        "function",
    )

    def __init__(
        self,
        clock: Clock,
        queue: EventQueue,
        host: HostModel,
        recorder: Recorder,
        function: Function,
        address: int,
        callback: Callable[[], HrTimerRestart],
    ) -> None:
        """`function` and `address` are what the trace calls the callback and the timer."""
        super().__init__()
        self._clock = clock
        self._queue = queue
        self._host = host
        self._recorder = recorder
        self.function = int(function)
        self.address = address
        self.callback = callback
        self.expires_ns = 0

    @property
    def enqueued(self) -> bool:
        """Started, and the callback has not run since."""
        return self.queued

    def start(self, expires_ns: int) -> None:
        """`hrtimer_start(HRTIMER_MODE_ABS)`: expire at `expires_ns`, whatever was set before."""
        was_armed = self.queued
        if was_armed:
            self._queue.cancel(self)
        self.expires_ns = expires_ns
        self._enqueue(was_armed)

    def cancel(self) -> bool:
        """`hrtimer_cancel`: True if it was enqueued (even when already past its expiry)."""
        if not self.queued:
            return False
        self._queue.cancel(self)
        self._recorder.hrtimer_cancel(self.address)
        return True

    def restart(self) -> None:
        """`hrtimer_restart`: start again at the expiry it has."""
        self.start(self.expires_ns)

    def add_expires_ns(self, interval_ns: int) -> None:
        """`hrtimer_add_expires_ns`: move the expiry; for the timer's own callback."""
        self.expires_ns += interval_ns

    def forward(self, now_ns: int, interval_ns: int) -> int:
        """`hrtimer_forward`: move the expiry by whole intervals past `now_ns`.

        Returns the number of intervals passed, 0 if the expiry still lies ahead. Otherwise,
        ValueError if the timer is enqueued (the kernel warns) or the interval is not positive.
        """
        late_ns = now_ns - self.expires_ns
        if late_ns < 0:
            return 0
        if self.queued:
            raise ValueError("hrtimer forward: the timer is enqueued; cancel it first")
        if interval_ns <= 0:
            raise ValueError(f"hrtimer forward: interval {interval_ns} ns is not positive")
        overruns = late_ns // interval_ns + 1
        self.expires_ns += overruns * interval_ns
        return overruns

    def remaining_ns(self) -> int:
        """`hrtimer_get_remaining`: ns until the expiry, negative once it has passed."""
        return self.expires_ns - self._clock.now_ns

    def _enqueue(self, was_armed: bool) -> None:
        self._recorder.hrtimer_start(self.address, self.function, self.expires_ns, was_armed)
        due_ns = self.expires_ns
        if not self._host.on_time:
            due_ns += self._host.delay_ns("late_expiry")
        self._queue.enqueue(self, due_ns)

    def on_due(self) -> None:
        """`__run_hrtimer`."""
        recorder = self._recorder
        task = recorder.enter_irq()
        recorder.hrtimer_expire_entry(self.address, self.function, self._clock.now_ns)
        if self.callback() is RESTART and not self.queued:
            self._enqueue(False)
        recorder.task = task
