"""A recording for people: a line for each VM while it runs, a summary when it is over."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from kvmtick.record.recording import Recording, Summary, VmSummary, Watcher
from kvmtick.timing.host import format_ns

if TYPE_CHECKING:
    from rich.table import Table

    from kvmtick.record.live import Sampled

__all__ = ["as_dict", "live", "live_table", "plural", "show_summary"]


def as_dict(
    path: Path, summary: Summary, command: dict[str, object] | None, *, interrupted: bool
) -> dict[str, object]:
    """For --json."""
    return {
        "file": str(path),
        "elapsed_ns": summary.elapsed_ns,
        "size_bytes": summary.size_bytes,
        "events": summary.events,
        "lost_events": summary.lost.total,
        "ticks": summary.ticks,
        "unowned_ticks": summary.unowned_ticks,
        "vms": [
            {
                "pid": vm.info.pid,
                "name": vm.info.name,
                "vcpus": len(set(vm.info.vcpus.values())),
                "reinject": vm.info.reinject,
                "ticks": {"pit": vm.ticks.get("pit", 0), "lapic": vm.ticks.get("lapic", 0)},
            }
            for vm in summary.vms
        ],
        "missing_events": summary.missing,
        "unfollowed_threads": summary.unfollowed,
        "cpu_ns": summary.cpu_ns,
        "cpu_share": round(summary.cpu_share, 6),
        "command": command,
        "interrupted": interrupted,
    }


def show_summary(path: Path, summary: Summary, command: dict[str, object] | None) -> None:
    """What was recorded, and what to do next."""
    from rich.markup import escape
    from rich.table import Table

    from kvmtick.cli.show import ReportConsole

    show = ReportConsole().print
    size_mb, seconds = summary.size_bytes / 1e6, summary.elapsed_ns / 1e9
    vms = plural(len(summary.vms), "VM")
    ticks = plural(summary.ticks + summary.unowned_ticks, "tick")
    show(f"{seconds:.1f} s of {vms} in {escape(str(path))}: {ticks}, {size_mb:,.1f} MB")
    table = Table("VM", "pid", "vCPUs", "PIT", "LAPIC timers", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for vm in summary.vms:
        rates = (_rate(vm, source, seconds) for source in ("pit", "lapic"))
        vcpus = len(set(vm.info.vcpus.values()))
        table.add_row(escape(vm.info.name), str(vm.info.pid), str(vcpus or "?"), *rates)
    if summary.vms:
        show(table)
    if summary.unowned_ticks:
        show(f"{plural(summary.unowned_ticks, 'tick')} of timers whose VM nobody can tell")
    show(_losses(summary))
    if summary.unfollowed:
        show(f"{plural(summary.unfollowed, 'thread')} too many to say when they waited for a CPU")
    if summary.missing:
        show(f"this kernel has no {', '.join(summary.missing)}")
    show(f"recording took {summary.cpu_share:.1%} of one CPU")
    if command is not None:
        show(f"the command {_ending(command['exit_code'])}")
    if summary.events:
        show(f"next: [bold]kvmtick report {escape(str(path))}[/]")


def plural(count: int, what: str) -> str:
    """`1 tick`, `2 ticks`."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _rate(vm: VmSummary, source: str, seconds: float) -> str:
    ticks = vm.ticks.get(source, 0)
    return f"{ticks:,} ({ticks / seconds:,.1f}/s)" if ticks and seconds else "-"


def _losses(summary: Summary) -> str:
    if not summary.lost.total:
        return f"{plural(summary.events, 'event')}, none lost"
    return (
        f"{plural(summary.events, 'event')}, [red]{summary.lost.total:,} more were lost[/]:"
        " record fewer VMs (--pid), or give a bigger --buffer"
    )


def _ending(exit_code: object) -> str:
    if not isinstance(exit_code, int):
        return "still runs"
    if exit_code >= 0:
        return f"ended with exit code {exit_code}"
    with contextlib.suppress(ValueError):
        return f"was ended by {signal.Signals(-exit_code).name}"
    return f"was ended by signal {-exit_code}"


# While it runs.


@contextlib.contextmanager
def live(recording: Recording, *, shown: bool) -> Iterator[Watcher | None]:
    """A line for each VM on the terminal; nothing where nobody watches."""
    if not shown or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.live import Live

    from kvmtick.record.live import LiveSamples

    with Live(console=Console(stderr=True), auto_refresh=False, transient=True) as area:

        class Lines(LiveSamples):
            """What is counted and sampled, on the terminal."""

            before: Summary | None = None

            def show(self, recording: Recording) -> None:
                """A second is over."""
                summary, before = recording.summary(), self.before
                rates = {} if before is None else _rates(before, summary)
                area.update(live_table(summary, self.vms, rates), refresh=True)
                self.before = summary

        yield Lines()


def _rates(before: Summary, now: Summary) -> dict[int, float]:
    """Ticks a second since then, by pid."""
    seconds = (now.elapsed_ns - before.elapsed_ns) / 1e9
    counted = {vm.info.pid: sum(vm.ticks.values()) for vm in before.vms}
    return {
        vm.info.pid: (sum(vm.ticks.values()) - counted.get(vm.info.pid, 0)) / seconds
        for vm in now.vms
    }


def live_table(summary: Summary, sampled: dict[int, Sampled], rates: dict[int, float]) -> Table:
    """Ticks and rates are counted; what was not delivered and the latency are of samples."""
    from rich.markup import escape
    from rich.table import Table

    lost = summary.lost.total
    caption = (
        f"{summary.elapsed_ns / 1e9:.0f} s, {summary.size_bytes / 1e6:,.1f} MB,"
        f" {lost:,} events lost; Ctrl-C ends the recording"
    )
    table = Table(
        *("VM", "pid", "ticks", "rate", "not delivered (sampled)", "p99 expiry to EOI (sampled)"),
        box=None,
        pad_edge=False,
        caption=caption,
        caption_justify="left",
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for vm in summary.vms:
        ticks = sum(vm.ticks.values())
        rate = f"{rates[vm.info.pid]:,.0f}/s" if vm.info.pid in rates else "-"
        known = sampled.get(vm.info.pid)
        told = ("-", "-")
        if known is not None and known.ticks:
            p99 = known.expiry_to_eoi.summary().get("p99")
            told = (f"{known.lost:,} of {known.ticks:,}", "-" if p99 is None else format_ns(p99))
        table.add_row(escape(vm.info.name), str(vm.info.pid), f"{ticks:,}", rate, *told)
    return table
