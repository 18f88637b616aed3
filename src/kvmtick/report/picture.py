"""The report as a picture (PNG), for an issue or a mail: a timeline and histograms per source.

The same report gives the same bytes with the same matplotlib and fonts. At most `MOST_SOURCES`
sources and `MOST_FINDINGS` findings are in it; the picture says how many it leaves out.
"""

from __future__ import annotations

import math
import textwrap
import warnings
from collections.abc import Sequence
from io import BytesIO, FileIO
from typing import TYPE_CHECKING, Any, BinaryIO

from kvmtick.report.data import Finding, Report, Severity, SourceReport, VmReport
from kvmtick.report.extras import extra
from kvmtick.report.log_bins import bins, decades
from kvmtick.report.page_data import drawn
from kvmtick.report.phrases import count
from kvmtick.report.words import COLOURS, hop_names, timer_name
from kvmtick.ticks.verdict import Verdict
from kvmtick.timing.host import format_ns

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure, SubFigure

__all__ = ["MOST_FINDINGS", "MOST_SOURCES", "write_picture"]

MOST_SOURCES = 12
MOST_FINDINGS = 5

_WIDTH_IN = 13.0
_DPI = 110
_LINE_IN = 0.24
_SOURCE_IN = 3.7
_FINDING_CHARACTERS = 165
_SEVERITY_COLOURS = {
    Severity.PROBLEM: "#c93c37",
    Severity.NOTICE: "#9a6700",
    Severity.GOOD: "#1a7f4b",
}
_MARKERS = {Verdict.LATE: "^", Verdict.REINJECTED: "D", Verdict.DELIVERED: "o"}
_DASHES = {"p50": "-", "p99": "--", "max": ":"}
_INK, _MUTED, _GRID, _BAR = "#1f2328", "#57606a", "#d8dee4", "#6e8fb5"
_STYLE: dict[Any, object] = {
    "font.size": 9.5,
    "text.parse_math": False,
    "text.color": _INK,
    "axes.edgecolor": _MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
}


def write_picture(report: Report, file: BinaryIO | FileIO) -> None:
    """Write the PNG to a binary file. Raises `HostError` without matplotlib."""
    with extra("report", "--png"):
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg

    with matplotlib.rc_context(), warnings.catch_warnings():
        # Names in scripts that the font lacks are boxes; nobody needs to be told.
        warnings.filterwarnings("ignore", message=".*[Gg]lyph")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        figure = _figure(report)
        FigureCanvasAgg(figure)
        png = BytesIO()
        figure.savefig(png, format="png", dpi=_DPI, metadata={"Software": None})
    file.write(png.getvalue())


def _figure(report: Report) -> Figure:
    from matplotlib.figure import Figure

    header = _header(report)
    sources = [(vm, source) for vm in report.vms for source in vm.sources][:MOST_SOURCES]
    heights = [_LINE_IN * (len(header) + 1), *([_SOURCE_IN] * len(sources))]
    figure = Figure(figsize=(_WIDTH_IN, sum(heights)), facecolor="white")
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    for line, (text, colour, weight) in enumerate(header):
        y = 1 - (line + 0.8) / (len(header) + 1)
        parts[0].text(0.02, y, text, color=colour, weight=weight, va="center")
    for part, (vm, source) in zip(parts[1:], sources, strict=True):
        _draw_source(part, report, vm, source)
    return figure


def _header(report: Report) -> list[tuple[str, str, str]]:
    """The lines on top: text, colour, weight."""
    names = {vm.pid: f"{_vm_title(vm)}: " for vm in report.vms}
    lost = f"{report.lost_events:,} lost"
    lines = [
        (f"Ticks of {_plain(report.path.name)}", _INK, "bold"),
        (
            f"from {_plain(report.origin)}, {format_ns(report.end_ns - report.start_ns)},"
            f" {count(len(report.vms), 'VM')}, {count(report.records, 'event')}, {lost}",
            _MUTED,
            "normal",
        ),
    ]
    for finding in report.findings[:MOST_FINDINGS]:
        lines += _finding_lines(finding, names.get(finding.pid or 0, ""))
    more = len(report.findings) - MOST_FINDINGS
    if more > 0:
        lines.append((f"and {more:,} more findings", _MUTED, "normal"))
    hidden = sum(len(vm.sources) for vm in report.vms) - MOST_SOURCES
    if hidden > 0:
        lines.append((f"{hidden:,} more timers are not in this picture", _MUTED, "normal"))
    return lines


def _finding_lines(finding: Finding, whose: str) -> list[tuple[str, str, str]]:
    text = f"{finding.severity.value}: {whose}{_plain(finding.text)}"
    return [
        (line, colour, "normal")
        for part, colour in ((text, _SEVERITY_COLOURS[finding.severity]), (finding.remedy, _MUTED))
        for line in textwrap.wrap(
            _plain(part),
            _FINDING_CHARACTERS,
            initial_indent="" if part is text else "    \N{RIGHTWARDS ARROW} ",
            subsequent_indent="        ",
        )
    ]


def _plain(text: str) -> str:
    """Without what would break the line or cannot be drawn at all."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


# One source.


def _draw_source(part: SubFigure, report: Report, vm: VmReport, source: SourceReport) -> None:
    part.text(0.02, 0.955, _title(vm, source), weight="bold", va="center")
    part.text(0.02, 0.89, _numbers(source), color=_MUTED, va="center")
    grid = part.add_gridspec(
        1, 2, left=0.075, right=0.975, top=0.76, bottom=0.13, wspace=0.5, width_ratios=[1.75, 1]
    )
    never = {tick.verdict for tick in drawn(source) if tick.inject_ns is None}
    lanes = [verdict for verdict in COLOURS if verdict in never]
    rows = grid[0].subgridspec(2, 1, hspace=0, height_ratios=[10, 0.01 + 1.1 * len(lanes)])
    arrived = part.add_subplot(rows[0])
    missed = part.add_subplot(rows[1], sharex=arrived)
    _draw_timeline(arrived, missed, report, source, lanes)
    _draw_histograms(part.add_subplot(grid[1]), source)


def _vm_title(vm: VmReport) -> str:
    return f"{_plain(vm.name)} ({vm.pid})" if vm.pid else _plain(vm.name)


def _title(vm: VmReport, source: SourceReport) -> str:
    return (
        f"{_vm_title(vm)}: {timer_name(source.source, source.vcpu)} by way of {source.ticks.path}"
    )


def _numbers(source: SourceReport) -> str:
    parts = [f"{source.ticks.expired:,} ticks expired"]
    if source.asked_hz is not None:
        parts.append(f"{source.asked_hz:,.6g} Hz asked")
    if source.got_hz is not None:
        parts.append(f"{source.got_hz:,.6g} Hz got")
    if source.drift_ppm is not None:
        parts.append(f"a clock of these ticks is off by {source.drift_ppm:+,.6g} ppm")
    return ", ".join(parts)


def _draw_timeline(
    arrived: Axes, missed: Axes, report: Report, source: SourceReport, lanes: list[Verdict]
) -> None:
    for verdict in COLOURS:
        own = [tick for tick in drawn(source) if tick.verdict is verdict]
        due_s = [(tick.expiry_ns - report.start_ns) / 1e9 for tick in own]
        seen = [
            (at, max(1, tick.inject_ns - tick.expiry_ns))
            for at, tick in zip(due_s, own, strict=True)
            if tick.inject_ns is not None
        ]
        size = (2.0 if len(seen) > 500 else 3.5) + (verdict is not Verdict.DELIVERED)
        _mark(arrived, verdict, [at for at, _ in seen], [took for _, took in seen], size)
        if verdict in lanes:
            at = [s for s, tick in zip(due_s, own, strict=True) if tick.inject_ns is None]
            _mark(missed, verdict, at, [lanes.index(verdict)] * len(at), 4)
        if source.ticks.count(verdict):
            label = f"{verdict.value} {source.ticks.count(verdict):,}"
            _mark(arrived, verdict, [], [], 5, label)
    if source.period_ns:
        arrived.axhline(source.period_ns, color=_MUTED, linewidth=1, linestyle=(0, (5, 4)))
    arrived.set_yscale("log")
    arrived.set_ylabel("to VM entry")
    _name_latencies(arrived.yaxis)
    arrived.grid(axis="both")
    arrived.set_xlim(0, max(1, report.end_ns - report.start_ns) / 1e9)
    arrived.tick_params(axis="x", length=0, labelbottom=False)
    arrived.legend(
        loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=8, frameon=False, handletextpad=0,
        columnspacing=1.2, borderpad=0.2,
    )  # fmt: skip
    missed.set_yticks(range(len(lanes)), [lane.value for lane in lanes])
    missed.set_ylim(len(lanes) - 0.5 if lanes else 1, -0.5)
    missed.tick_params(axis="y", length=0)
    missed.set_facecolor("#f3f5f7")
    missed.set_xlabel(f"seconds since the start{_left_out(source)}")


def _mark(
    axes: Axes,
    verdict: Verdict,
    due_s: Sequence[float],
    y: Sequence[float],
    size: float,
    label: str | None = None,
) -> None:
    axes.plot(
        due_s,
        y,
        linestyle="none",
        color=COLOURS[verdict],
        marker=_MARKERS.get(verdict, "s"),
        markersize=size,
        markeredgewidth=0,
        clip_on=False,
        label=label,
    )


def _left_out(source: SourceReport) -> str:
    shown = len(drawn(source))
    if shown == source.ticks.expired:
        return ""
    return f"; {shown:,} of {source.ticks.expired:,} ticks are drawn"


def _draw_histograms(axes: Axes, source: SourceReport) -> None:
    filled = {hop: latency for hop, latency in source.histograms.items() if len(latency)}
    if not filled:
        axes.set_axis_off()
        axes.text(0.5, 0.5, "no tick reached the guest", ha="center", color=_MUTED)
        return
    for place, latency in enumerate(filled.values()):
        held = bins(latency)
        most = math.log1p(max(each.count for each in held))
        axes.bar(
            [each.low_ns for each in held],
            [-0.85 * math.log1p(each.count) / most for each in held],
            [(each.high_ns - each.low_ns) * 0.92 for each in held],
            bottom=place + 0.9,
            align="edge",
            color=_BAR,
        )
        for name, value_ns in latency.summary().items():
            axes.plot(
                [max(1, value_ns)] * 2,
                [place + 0.05, place + 0.9],
                color=_INK,
                linestyle=_DASHES[name],
                linewidth=1,
                label=name if place == 0 else None,
            )
    powers = decades(filled.values())
    axes.set_xscale("log")
    axes.set_xlim(10 ** powers[0], 10 ** powers[-1])
    _name_latencies(axes.xaxis)
    axes.set_ylim(len(filled), 0)
    names = hop_names(source.source, source.ticks.path)
    axes.set_yticks(
        [place + 0.55 for place in range(len(filled))],
        [names[hop].replace("->", "\N{RIGHTWARDS ARROW}") for hop in filled],
    )
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
    axes.legend(
        loc="lower right", bbox_to_anchor=(1.02, 1.0), ncols=3, frameon=False, borderpad=0.2
    )


def _name_latencies(axis: Axis) -> None:
    """Powers of ten as durations."""
    from matplotlib.ticker import NullLocator

    axis.set_major_formatter(lambda value, _: format_ns(round(value)))
    axis.set_minor_locator(NullLocator())
