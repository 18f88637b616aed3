"""The machine's clock: integer nanoseconds, virtual or CLOCK_MONOTONIC.

`now_ns` is a plain attribute in both, so that hot code reads it without a call. The virtual clock
moves only when the machine moves it. The monotonic clock is a snapshot: `refresh` takes a new one,
and the machine refreshes it wherever the kernel would call `ktime_get`: before every timer
callback, worker run, VM entry and port access.
"""

import time

from mypy_extensions import mypyc_attr

from kvmtick.trace.recorder import Now

__all__ = ["Clock", "MonotonicClock", "VirtualClock"]


@mypyc_attr(allow_interpreted_subclasses=True)
class Clock(Now):
    """What every chip reads: `now_ns`, nanoseconds on CLOCK_MONOTONIC or since power-on."""

    __slots__ = ("live",)

    name = "abstract"

    def __init__(self, now_ns: int, live: bool) -> None:
        """`live`: time goes on by itself, so hot code has to `refresh`."""
        super().__init__(now_ns)
        self.live = live

    def refresh(self) -> None:
        """Bring `now_ns` up to date."""


class VirtualClock(Clock):
    """Time is what the machine says it is; it starts at 0 and never goes back."""

    __slots__ = ()

    name = "virtual"

    def __init__(self) -> None:
        super().__init__(0, live=False)


class MonotonicClock(Clock):
    """CLOCK_MONOTONIC of this host, the clock KVM's PIT runs on."""

    __slots__ = ()

    name = "real"

    def __init__(self) -> None:
        super().__init__(time.monotonic_ns(), live=True)

    def refresh(self) -> None:
        """Take a new snapshot of CLOCK_MONOTONIC."""
        self.now_ns = time.monotonic_ns()
