"""Latencies for a log scale: the bins of a histogram, and the decades it spans."""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from kvmtick.ticks.histogram import Histogram

__all__ = ["BINS_PER_DECADE", "Bin", "bins", "decades"]

BINS_PER_DECADE = 10


@dataclass(frozen=True, slots=True)
class Bin:
    """So many latencies lie between `low_ns` and `high_ns`."""

    low_ns: float
    high_ns: float
    count: int


def bins(latency: Histogram) -> list[Bin]:
    """The bins that hold something, ascending. What took less than 1 ns counts as 1 ns."""
    counts: Counter[int] = Counter()
    for end_ns, count in latency.buckets():
        value_ns = max(1, min(end_ns, latency.max))
        counts[math.floor(math.log10(value_ns) * BINS_PER_DECADE)] += count
    return [
        Bin(10 ** (place / BINS_PER_DECADE), 10 ** ((place + 1) / BINS_PER_DECADE), count)
        for place, count in sorted(counts.items())
    ]


def decades(latencies: Iterable[Histogram]) -> range:
    """The powers of ten between which all of them lie."""
    ends = [place for latency in latencies for place in bins(latency)]
    first = min((math.log10(each.low_ns) for each in ends), default=0)
    last = max((math.log10(each.high_ns) for each in ends), default=1)
    # A bin's end is a power of ten only up to rounding.
    return range(math.floor(first + 1e-9), math.ceil(last - 1e-9) + 1)
