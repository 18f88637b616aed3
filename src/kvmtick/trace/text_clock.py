"""The clock of a text's times: is it that of the timers, and if not, how far off.

`now` of hrtimer_expire_entry is CLOCK_MONOTONIC, exact, read when the interrupt began. The line's
time is taken some hundred ns later, by whatever clock the trace has: `local` is ftrace's default,
perf has its own. The difference of an expiry, `now` less the line's time, is therefore the clocks'
offset less how late the line is; the largest of many is the offset, to within the fastest line.

* The clocks are one if the first block of the text that has expiries says so to 1 ms: then nothing
  is moved. One that is off by less cannot be told from an interrupt that was late.
* Otherwise all times are moved by the offset, which is followed from block to block: an expiry is
  never before its `now`, and clocks drift apart by 500 ppm at most (what adjtimex(2) allows).
* Nobody knows where no timer of a tick expires: then the times stay as they are.
"""

import re
from collections.abc import Iterable

__all__ = ["ClockOffset", "first_offset_ns"]

_ONE_CLOCK_NS = 1_000_000
_MOST_DRIFT_PPM = 500
_EXPIRY = re.compile(
    rb" (\d+)\.(\d{6,9}): +(?:timer:)?hrtimer_expire_entry: "
    rb"(?=[^\n]*function=(?:pit|apic)_timer_fn)[^\n]*?now=(\d+)\b"
)


def first_offset_ns(blocks: Iterable[bytes]) -> int:
    """What to add to the lines' times; 0 if they are CLOCK_MONOTONIC's, or nobody knows."""
    for block in blocks:
        offsets_ns = [
            int(now) - int(seconds) * 1_000_000_000 - int(fraction.ljust(9, b"0"))
            for seconds, fraction, now in _EXPIRY.findall(block)
        ]
        if offsets_ns:
            offset_ns = max(offsets_ns)
            return 0 if abs(offset_ns) <= _ONE_CLOCK_NS else offset_ns
    return 0


class ClockOffset:
    """Follows the offset of a text whose clock is another."""

    def __init__(self, first_ns: int) -> None:
        self.offset_ns = first_ns
        self._at_ns: int | None = None

    def follow(self, ts_ns: int, seen_ns: int | None) -> int:
        """The offset at a block's end `ts_ns`; `seen_ns`: the largest of its expiries, if any."""
        if seen_ns is None:
            return self.offset_ns
        since_ns = ts_ns - self._at_ns if self._at_ns is not None else 0
        least_ns = self.offset_ns - max(0, since_ns) * _MOST_DRIFT_PPM // 1_000_000
        self.offset_ns = max(seen_ns, least_ns)
        self._at_ns = ts_ns
        return self.offset_ns
