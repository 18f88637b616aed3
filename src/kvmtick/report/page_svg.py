"""The page's still pictures as SVG: verdicts as a bar, latencies as histograms on a log scale.

Everything is placed in per cent, so that it fits any width and its text keeps its size.
"""

import math
from collections.abc import Iterable

from kvmtick.report.log_bins import bins, decades
from kvmtick.report.words import COLOURS
from kvmtick.ticks.histogram import Histogram
from kvmtick.ticks.report import TickReport
from kvmtick.timing.host import format_ns

__all__ = ["Scale", "axis", "histogram", "verdict_bar"]

_LEAST_SHARE = 0.4
"""Per cent of the bar that a verdict with any ticks gets, so that it can be seen."""

_MOST_NAMES = 4
"""So many decades are named; more would not fit a narrow page."""


class Scale:
    """The log axis that the histograms of a source share, in whole decades."""

    def __init__(self, latencies: Iterable[Histogram]) -> None:
        self._powers = decades(latencies)

    def share(self, value_ns: float) -> float:
        """Where a latency is, in per cent."""
        first, last = self._powers[0], self._powers[-1]
        return 100 * (math.log10(max(1, value_ns)) - first) / (last - first)

    @property
    def ends_ns(self) -> list[int]:
        """The powers of ten that it shows."""
        return [10**power for power in self._powers]


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
    held = bins(latency)
    most = math.log1p(max(each.count for each in held))
    bars = []
    for each in held:
        left, right = scale.share(each.low_ns), scale.share(each.high_ns)
        height = 100 * math.log1p(each.count) / most
        span = f"{format_ns(round(each.low_ns))} to {format_ns(round(each.high_ns))}"
        bars.append(
            f'<rect x="{left:.3f}%" y="{100 - height:.2f}%" width="{(right - left) * 0.92:.3f}%"'
            f' height="{height:.2f}%"><title>{span}: {each.count:,}</title></rect>'
        )
    grid = [_line("grid", scale.share(end_ns)) for end_ns in scale.ends_ns]
    marks = [_line(name, scale.share(value_ns)) for name, value_ns in latency.summary().items()]
    return (
        '<svg class="histogram" role="img" aria-label="histogram">'
        f"{''.join(grid)}{''.join(bars)}{''.join(marks)}</svg>"
    )


def axis(scale: Scale) -> str:
    """The names of the decades, under the histograms."""
    step = math.ceil(len(scale.ends_ns) / _MOST_NAMES)
    texts = []
    for end_ns in scale.ends_ns[::step]:
        at = scale.share(end_ns)
        anchor = "start" if at < 5 else "end" if at > 95 else "middle"
        texts.append(
            f'<text x="{at:.3f}%" y="12" text-anchor="{anchor}">{format_ns(end_ns)}</text>'
        )
    return f'<svg class="axis" aria-hidden="true">{"".join(texts)}</svg>'


def _line(name: str, at: float) -> str:
    return f'<line class="{name}" x1="{at:.3f}%" x2="{at:.3f}%" y2="100%"/>'
