"""The page's still pictures as SVG: verdicts as a bar, latencies as histograms on a log scale.

Everything is placed in per cent, so that it fits any width and its text keeps its size.
"""

import math
from collections import Counter

from kvmtick.report.words import COLOURS
from kvmtick.ticks.histogram import Histogram
from kvmtick.ticks.report import TickReport
from kvmtick.timing.host import format_ns

__all__ = ["Scale", "axis", "histogram", "verdict_bar"]

BINS_PER_DECADE = 10
_LEAST_SHARE = 0.4
"""Per cent of the bar that a verdict with any ticks gets, so that it can be seen."""


class Scale:
    """The log axis that the histograms of a source share, in whole decades."""

    def __init__(self, histograms: dict[str, Histogram]) -> None:
        ends = [end for h in histograms.values() for end, _ in h.buckets()]
        highest = max((h.max for h in histograms.values()), default=1)
        self.first = math.floor(_log(min(ends, default=1)))
        self.last = max(self.first + 1, math.floor(_log(highest)) + 1)

    def share(self, value_ns: float) -> float:
        """Where a latency is, in per cent."""
        return 100 * (_log(value_ns) - self.first) / (self.last - self.first)

    @property
    def decades(self) -> list[int]:
        """The powers of ten that it shows, in ns."""
        return [10**power for power in range(self.first, self.last + 1)]


def verdict_bar(ticks: TickReport) -> str:
    """The verdicts as parts of one bar."""
    counts = [(verdict, ticks.count(verdict)) for verdict in COLOURS if ticks.count(verdict)]
    shares = [max(_LEAST_SHARE, 100 * count / ticks.expired) for _, count in counts]
    scale = 100 / sum(shares) if shares else 1
    parts, at = [], 0.0
    for (verdict, count), share in zip(counts, shares, strict=True):
        parts.append(
            f'<rect x="{at:.3f}%" width="{share * scale:.3f}%" height="100%"'
            f' fill="{COLOURS[verdict]}"><title>{verdict.value}: {count:,}</title></rect>'
        )
        at += share * scale
    return f'<svg class="bar" role="img" aria-label="verdicts">{"".join(parts)}</svg>'


def histogram(latency: Histogram, scale: Scale) -> str:
    """One hop's latencies; how high a bar is tells the logarithm of its count."""
    bins: Counter[int] = Counter()
    for end, count in latency.buckets():
        bins[math.floor(_log(min(end, latency.max)) * BINS_PER_DECADE)] += count
    most = math.log1p(max(bins.values(), default=1))
    width = 100 / (scale.last - scale.first) / BINS_PER_DECADE
    bars = []
    for place, count in sorted(bins.items()):
        left = 100 * (place / BINS_PER_DECADE - scale.first) / (scale.last - scale.first)
        height = 100 * math.log1p(count) / most
        low, high = (format_ns(round(10 ** (n / BINS_PER_DECADE))) for n in (place, place + 1))
        bars.append(
            f'<rect x="{left:.3f}%" y="{100 - height:.2f}%" width="{width * 0.92:.3f}%"'
            f' height="{height:.2f}%"><title>{low} to {high}: {count:,}</title></rect>'
        )
    marks = [
        f'<line class="{name}" x1="{at:.3f}%" x2="{at:.3f}%" y2="100%"/>'
        for name, value_ns in latency.summary().items()
        for at in [scale.share(value_ns)]
    ]
    return (
        f'<svg class="histogram" role="img" aria-label="histogram">'
        f"{_grid(scale)}{''.join(bars)}{''.join(marks)}</svg>"
    )


def axis(scale: Scale) -> str:
    """The names of the decades, under the histograms."""
    last = scale.decades[-1]
    texts = [
        f'<text x="{scale.share(value_ns):.3f}%" y="12" text-anchor="{anchor}">'
        f"{format_ns(value_ns)}</text>"
        for value_ns in scale.decades
        for anchor in ["start" if value_ns == scale.decades[0] else "middle"]
        if value_ns != last
    ]
    texts.append(f'<text x="100%" y="12" text-anchor="end">{format_ns(last)}</text>')
    return f'<svg class="axis" aria-hidden="true">{"".join(texts)}</svg>'


def _grid(scale: Scale) -> str:
    return "".join(
        f'<line class="grid" x1="{at:.3f}%" x2="{at:.3f}%" y2="100%"/>'
        for at in map(scale.share, scale.decades)
    )


def _log(value_ns: float) -> float:
    return math.log10(max(1, value_ns))
