"""Latencies in constant memory: a histogram with a bounded relative error."""

from collections import Counter
from collections.abc import Iterator, Sequence
from operator import add, rshift
from typing import Final

__all__ = ["Histogram"]

SUB_BITS: Final = 7
"""Values below 2^7 are exact; above, a bucket spans less than 1/64 of its value."""

_FIRST_BITS: Final = (1 << SUB_BITS) - 1
_SHIFTS: Final = [max(0, bits - SUB_BITS) for bits in range(256)]
"""By how much a value of so many bits is shifted right."""
_TAGS: Final = [shift << SUB_BITS for shift in _SHIFTS]


class Histogram:
    """Counts of non-negative integers (ns), with quantiles. The maximum is exact."""

    __slots__ = ("_counts", "_total", "max")

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()
        """By `_keys`."""
        self._total = 0
        self.max = 0

    def __len__(self) -> int:
        return self._total

    def add(self, values: Sequence[int]) -> None:
        """Count some values; what is below 0 counts as 0."""
        distinct = Counter(values)
        if min(distinct) < 0:
            values = [max(0, value) for value in values]
            distinct = Counter(values)
        self.max = max(self.max, *distinct)
        self._total += len(values)
        if 4 * len(distinct) < len(values):
            for key, count in zip(_keys([*distinct]), distinct.values(), strict=True):
                self._counts[key] += count
        else:
            self._counts.update(_keys(values))

    def buckets(self) -> list[tuple[int, int]]:
        """`(upper end, count)` of the buckets that hold something, ascending."""
        return [
            (((key & _FIRST_BITS) + 1 << (key >> SUB_BITS)) - 1, count)
            for key, count in sorted(self._counts.items())
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


def _keys(values: Sequence[int]) -> Iterator[int]:
    """The bucket of each value: its first bits and, above these, how far it was shifted."""
    bits = [*map(int.bit_length, values)]
    first = map(rshift, values, map(_SHIFTS.__getitem__, bits))
    return map(add, first, map(_TAGS.__getitem__, bits))
