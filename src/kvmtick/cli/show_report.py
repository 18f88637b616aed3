"""The report of a trace for people: findings, then the numbers of every timer."""

from textwrap import wrap

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kvmtick.cli.show import STYLES, ReportConsole, verdict_table
from kvmtick.report.data import Finding, Phase, Report, Severity, SourceReport, WorstTick
from kvmtick.report.words import (
    hop_names,
    phase_outcome,
    phase_setting,
    phase_timer,
    phase_way,
)
from kvmtick.timing.host import format_ns

__all__ = ["show_report", "show_story"]

_COLOURS = {Severity.PROBLEM: "red", Severity.NOTICE: "yellow", Severity.GOOD: "green"}
_QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p99.9": 0.999}
_WIDTH = 100
_WIDEST = 10_000
"""A row of a table is one line; a terminal may wrap it."""


def show_report(report: Report, worst: int) -> None:
    """Print it; `worst`: so many of each timer's worst ticks."""
    console = ReportConsole()
    console.width = _WIDEST
    show = console.print
    seconds = (report.end_ns - report.start_ns) / 1e9
    show(f"[bold]{escape(report.path.name)}[/]: {escape(report.origin)}")
    lost = f"{report.lost_events:,} lost" if report.lost_events else "none lost"
    vms = f"{len(report.vms)} VM{'' if len(report.vms) == 1 else 's'}"
    show(f"{vms}, {seconds:.3f} s, {report.records:,} events, {lost}")
    for note in report.notes:
        show(escape(note))
    names = {vm.pid: vm.name for vm in report.vms}
    for finding in report.findings:
        _show_finding(console, finding, names)
    number = 0
    for vm in report.vms:
        show()
        show(f"[bold]{escape(vm.name)}[/] (pid {vm.pid})")
        for note in vm.notes:
            show(f"  {escape(note)}")
        if len(vm.phases) > 1:
            show()
            show("how the guest set its timers, by the time since the trace began:")
            show(_phase_table(vm.phases, report.start_ns))
        for source in vm.sources:
            _show_source(console, source)
            if worst and source.worst:
                show()
                show(_worst_table(source.worst[:worst], number))
            number += len(source.worst)
    if worst and number:
        show()
        show("The story of a tick: --story N, N as in the first column.")


def _show_finding(console: Console, finding: Finding, names: dict[int, str]) -> None:
    colour = _COLOURS[finding.severity]
    whose = ""
    if finding.pid is not None and len(names) > 1:
        whose = f"{names.get(finding.pid, '')} ({finding.pid}): "
    console.print()
    head = f"[{colour} bold]{finding.severity.value}[/] [dim]{finding.kind}[/]"
    console.print(head)
    _paragraph(console, whose + finding.text)
    if finding.remedy:
        _paragraph(console, f"-> {finding.remedy}")


def _paragraph(console: Console, text: str) -> None:
    """Wrapped, for it is meant to be read."""
    width = min(ReportConsole().width, _WIDTH) if console.is_terminal else _WIDTH
    for line in wrap(
        text, width, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False
    ):
        console.print(escape(line))


def _phase_table(phases: list[Phase], start_ns: int) -> Table:
    table = Table(
        *("from", "to", "timer", "set to", "ticks and readings", "by way of"),
        *("from tick to tick", "most"),
        box=None,
        pad_edge=False,
    )
    for at in (0, 1, 6, 7):
        table.columns[at].justify = "right"
    for phase in phases:
        intervals = phase.intervals.summary()
        table.add_row(
            format_ns(phase.start_ns - start_ns),
            format_ns(phase.end_ns - start_ns),
            phase_timer(phase),
            phase_setting(phase),
            phase_outcome(phase),
            phase_way(phase),
            *(format_ns(intervals[key]) for key in ("p50", "max") if intervals),
        )
    return table


def _show_source(console: Console, source: SourceReport) -> None:
    show = console.print
    show()
    show(f"{source.ticks.title()}: {_rates(source)}")
    if source.drift_ppm is not None:
        show(f"a clock that counts them: {source.drift_ppm:+,.6g} ppm; {source.drift_constant}")
    show(verdict_table(source.ticks))
    table = Table("hop", *_QUANTILES, "max", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    words = hop_names(source.source, source.ticks.path)
    for hop, histogram in source.histograms.items():
        if len(histogram):
            values = [histogram.quantile(share) for share in _QUANTILES.values()]
            table.add_row(words[hop], *map(format_ns, (*values, histogram.max)))
    if table.row_count:
        show()
        show(table)


def _rates(source: SourceReport) -> str:
    got = "" if source.got_hz is None else f"{source.got_hz:,.6g} came"
    if source.asked_hz is None or source.period_ns is None:
        return f"one shot at a time{f', {got} a second' if got else ''}"
    asked = f"a tick every {source.period_ns:,} ns, {source.asked_hz:,.6g} a second asked for"
    return f"{asked}, {got}" if got else asked


def _worst_table(worst: list[WorstTick], before: int) -> Table:
    table = Table("#", "tick", "verdict", "came after", "held up", box=None, pad_edge=False)
    for at in (0, 1, 3):
        table.columns[at].justify = "right"
    for number, each in enumerate(worst, before + 1):
        verdict = each.tick.verdict.value
        waited = "never" if each.waited_ns is None else format_ns(each.waited_ns)
        style = STYLES.get(verdict, "red")
        told = escape(each.held_up)
        table.add_row(str(number), f"{each.tick.index:,}", f"[{style}]{verdict}[/]", waited, told)
    return table


def show_story(worst: WorstTick) -> None:
    """Print the life of one tick, event by event."""
    console = ReportConsole()
    tick = worst.tick
    where = f" ({tick.where.value})" if tick.where else ""
    console.print(f"[bold]tick {tick.index:,}[/]: {tick.verdict.value}{where}")
    if tick.detail:
        console.print(escape(tick.detail))
    console.print(f"{escape(worst.held_up)}")
    console.print(f"times count from its expiry at {tick.expiry_ns:,} ns")
    console.print()
    if not worst.story:
        console.print("its events were too long ago to be kept")
    for line in worst.story:
        if not line.event:
            console.print(line.what)
            continue
        console.print(
            f"{line.ts_ns - tick.expiry_ns:>+15,} ns  {escape(line.thread):<24} {escape(line.what)}"
        )
        console.print(f"{'':>18}  [dim]{line.event}: {escape(line.text)}[/]")
