"""Latencies in constant memory: a histogram with a bounded relative error."""

from collections.abc import Iterable
from typing import Final

from mypy_extensions import mypyc_attr

__all__ = ["Histogram"]

SUB_BITS: Final = 7
"""Values below 2^7 are exact; above, a bucket spans less than 1/64 of its value."""

_EXACT: Final = 1 << SUB_BITS
_FIRST_BITS: Final = _EXACT - 1
_FAR: Final = _EXACT << 8


@mypyc_attr(acyclic=True)
class Histogram:
    """Counts of non-negative integers (ns), with quantiles. The maximum is exact."""

    __slots__ = ("_counts", "_last", "_repeats", "_total", "max")

    def __init__(self) -> None:
        self._counts: dict[int, int] | None = None
        """By `_key`, but for the repeats of the last value; None while there are but these."""
        self._last = -1
        self._repeats = 0
        self._total = 0
        self.max = 0

    def __len__(self) -> int:
        return self._total

    def count(self, value: int) -> None:
        """Count a value; what is below 0 counts as 0."""
        if value < 0:
            value = 0
        if value == self._last:
            self._repeats += 1
        else:
            self._count_repeats()
            self._last = value
            self._repeats = 1
            if value > self.max:
                self.max = value
        self._total += 1

    def add(self, values: Iterable[int]) -> None:
        """Count some values."""
        for value in values:
            self.count(value)

    def buckets(self) -> list[tuple[int, int]]:
        """`(upper end, count)` of the buckets that hold something, ascending."""
        self._count_repeats()
        return [
            (((key & _FIRST_BITS) + 1 << (key >> SUB_BITS)) - 1, count)
            for key, count in sorted((self._counts or {}).items())
        ]

    def quantile(self, share: float) -> int:
        """The smallest bucket's upper end that covers `share` (0-1) of the values; 0 if empty."""
        wanted = max(1, round(share * self._total))
        seen = 0
        for bucket, count in self.buckets():
            seen += count
            if seen >= wanted:
                return min(bucket, self.max)
        return 0

    def summary(self) -> dict[str, int]:
        """`p50`, `p99` and `max`; empty if nothing was counted."""
        if not self._total:
            return {}
        return {"p50": self.quantile(0.5), "p99": self.quantile(0.99), "max": self.max}

    def _count_repeats(self) -> None:
        if self._repeats:
            key = _key(self._last)
            if self._counts is None:
                self._counts = {}
            self._counts[key] = self._counts.get(key, 0) + self._repeats
            self._repeats = 0


def _key(value: int) -> int:
    """The bucket of a value: its first bits and, above these, how far it was shifted."""
    shift = 0
    while value >= _FAR:
        value >>= 8
        shift += 8
    while value >= _EXACT:
        value >>= 1
        shift += 1
    return shift << SUB_BITS | value
