"""Latencies in constant memory: a histogram with a bounded relative error."""

from collections import Counter
from collections.abc import Sequence

__all__ = ["Histogram"]

SUB_BITS = 7
"""Values below 2^7 are exact; above, a bucket spans less than 1/64 of its value."""


class Histogram:
    """Counts of non-negative integers (ns), with quantiles. The maximum is exact."""

    __slots__ = ("_buckets", "_total", "max")

    def __init__(self) -> None:
        self._buckets: dict[int, int] = {}
        self._total = 0
        self.max = 0

    def __len__(self) -> int:
        return self._total

    def add(self, values: Sequence[int]) -> None:
        """Count some values."""
        self.max = max(self.max, *values)
        self._total += len(values)
        for value, count in Counter(values).items():
            shift = max(0, value.bit_length() - SUB_BITS)
            bucket = ((value >> shift) + 1 << shift) - 1
            self._buckets[bucket] = self._buckets.get(bucket, 0) + count

    def buckets(self) -> list[tuple[int, int]]:
        """`(upper end, count)` of the buckets that hold something, ascending."""
        return sorted(self._buckets.items())

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
