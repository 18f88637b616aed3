"""The report of a run for people: tables by rich, without colour when not on a terminal."""

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kvmtick.machine.run import BELIEVED_HZ, Run
from kvmtick.report.words import hop_names
from kvmtick.ticks.report import TickReport
from kvmtick.timing.host import format_ns

__all__ = ["STYLES", "ReportConsole", "show_run", "verdict_table"]

STYLES = {"delivered": "green", "late": "yellow", "reinjected": "cyan", "outstanding": "dim"}


class ReportConsole(Console):
    """Colour only on a terminal, no wrapping of lines; a closed pipe is `main`'s business."""

    def __init__(self) -> None:
        super().__init__(highlight=False, soft_wrap=True)

    def on_broken_pipe(self) -> None:
        """Instead of ending with exit code 1, which means something else here."""
        raise BrokenPipeError


def show_run(run: Run, console: Console | None = None, *, with_text: bool = True) -> None:
    """Print the report; `with_text`: and what the guest printed."""
    console = console or ReportConsole()
    show = console.print
    show(
        f"[bold]{escape(run.guest)}[/] on the {run.cpu} CPU with the {run.chips}'s chips,"
        f" {run.clock} time"
    )
    show(_setting(run))
    show(_outcome(run))
    reports = run.reports()
    for report in reports:
        show()
        if len(reports) > 1 or (report.source, report.path) != ("pit", "pic"):
            show(f"ticks of {report.title()}:")
        show(verdict_table(report))
        _show_latency(report, console)
    show()
    show(_speed(run))
    for name, text in (("debug console", run.console), ("serial line", run.serial)):
        if text and with_text:
            show(f"\n{name}:")
            console.out(text.rstrip("\n"), highlight=False)


def verdict_table(report: TickReport) -> Table:
    """Counts by verdict, and what each means."""
    verdicts = Table("verdict", "ticks", "meaning", box=None, pad_edge=False)
    verdicts.columns[1].justify = "right"
    for name, count, meaning in report.rows():
        if count:
            verdicts.add_row(f"[{STYLES.get(name, 'red')}]{name}[/]", f"{count:,}", meaning)
    verdicts.add_row("[bold]expired[/]", f"[bold]{report.expired:,}[/]", "")
    return verdicts


def _setting(run: Run) -> str:
    period_ns = run.believed_period_ns
    if period_ns:
        text = (
            f"local APIC timer: the guest asks for a tick every {period_ns:,.10g} ns"
            f" ({1e9 / period_ns:,.6g} Hz)"
        )
    else:
        text = _pit_setting(run)
    return (
        text
        + "".join(f", {name}={delay}" for name, delay in run.faults.items())
        + (f", seed {run.seed}" if run.faults else "")
    )


def _pit_setting(run: Run) -> str:
    pit = run.pit
    if pit is None or not pit.period_ns:
        return "the PIT was not programmed"
    reinject = f"reinject {'on' if pit.reinject else 'off'}"
    if not run.has_rate:
        return f"the PIT ticks when the guest chooses, {reinject}"
    rate_hz = 1e9 / pit.period_ns
    return (
        f"PIT count {pit.count}: a tick every {pit.period_ns:,} ns ({rate_hz:,.6g} Hz), {reinject}"
    )


def _outcome(run: Run) -> str:
    text = f"{run.exit.reason} after {run.elapsed_ns / 1e9:.6f} s"
    if run.guest_ticks is None:
        return text
    text += f"; the guest counted {run.guest_ticks:,} tick{'' if run.guest_ticks == 1 else 's'}"
    if run.drift_ppm is not None and run.exit.reason == "done":
        clock = "its clock" if run.believed_period_ns else f"its clock ({BELIEVED_HZ} Hz)"
        text += f", {clock} is off by {run.drift_ppm:+,.6g} ppm"
    return text


def _show_latency(report: TickReport, console: Console) -> None:
    names = hop_names(report.source, report.path)
    table = Table("hop", "p50", "p99", "max", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for hop, values in report.latency_ns.items():
        if values:
            table.add_row(names[hop], *(format_ns(values[key]) for key in ("p50", "p99", "max")))
    if table.row_count:
        console.print()
        console.print(table)


def _speed(run: Run) -> str:
    expired = sum(report.expired for report in run.reports())
    rate = f": {expired / run.wall_s:,.0f} ticks/s" if expired and run.wall_s else ""
    instructions = f", {run.instructions:,} instructions" if run.instructions is not None else ""
    return f"{run.wall_s:.3f} s of wall time{rate}{instructions}"
