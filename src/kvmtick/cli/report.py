"""`kvmtick report`: explain a recording, a trace or a run: findings first, numbers after."""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from kvmtick.cli import EXIT_OK, UsageError
from kvmtick.cli.options import Parser
from kvmtick.cli.reading import reading_progress
from kvmtick.report.build import WORST, build
from kvmtick.report.data import Report, WorstTick
from kvmtick.report.output import replaced
from kvmtick.report.stream import Progress
from kvmtick.trace.events import Event
from kvmtick.trace.formats import FormatError
from kvmtick.trace.reading import Trace, open_trace

if TYPE_CHECKING:
    from kvmtick.report.data import VmReport

__all__ = ["main"]

SHOWN_WORST = 5

EPILOG = """\
FILE is a recording (kvmtick record), a run (kvmtick run --trace), or ftrace text: `trace` or
`trace_pipe` of tracefs, trace-cmd report, perf script; it may be compressed with gzip.

exit codes:
  0 fine   2 usage, no such file, no trace, no tick in it   3 no room for an output, a library is
  missing   130 interrupted

examples:
  kvmtick report t.ktrace                           what is wrong, and what to do about it
  kvmtick report t.ktrace --story 1                 the worst tick, event by event
  kvmtick report t.ktrace --html t.html             one page with timelines, for a browser
  kvmtick report t.ktrace --json | jq '.findings'   for programs
"""


def main(argv: list[str]) -> int:
    """Run the verb; returns the exit code."""
    options = _parser().parse_command_line(argv)
    path = Path(options.file)
    worst, story = _number(options, "worst"), _number(options, "story")
    with contextlib.ExitStack() as stack:
        writers = list(_writers(options, path, stack))
        whole = _read(path, max(WORST, worst or 0))
        report = _chosen(whole, options.vm)
        told = None if story is None else _story(report, story)
        for write in writers:
            write(report)
    if worst is not None:
        for source in (source for vm in report.vms for source in vm.sources):
            del source.worst[worst:]
    _export(options, path)
    _show(options, report, told)
    return EXIT_OK


def _parser() -> Parser:
    p = Parser(
        prog="kvmtick report",
        usage="kvmtick report FILE [OPTION ...]",
        description="Explain a trace: what became of every tick of every VM in it, who held up"
        " those that\ncame late, and what to do about it.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument("file", metavar="FILE", help="the trace")
    p.add_argument(
        "--vm",
        metavar="PID|NAME",
        action="append",
        default=[],
        help="only this VM; may be repeated",
    )
    p.add_argument(
        "--worst",
        metavar="N",
        help=f"how many of the worst ticks of each timer to list ({SHOWN_WORST})",
    )
    p.add_argument("--story", metavar="N", help="the whole story of number N of the worst ticks")
    p.add_argument("--json", action="store_true", help="one JSON object instead of the text")
    outputs = p.add_argument_group("and write")
    outputs.add_argument("--html", metavar="FILE", help="a page for a browser, all in one file")
    outputs.add_argument("--png", metavar="FILE", help="a picture of the timelines and latencies")
    outputs.add_argument("--perfetto", metavar="FILE", help="a trace for https://ui.perfetto.dev")
    outputs.add_argument(
        "--parquet", metavar="DIR", help="tables of ticks and events, for kvmtick query and others"
    )
    return p


def _number(options: argparse.Namespace, name: str) -> int | None:
    text = vars(options)[name]
    if text is None:
        return None
    try:
        number = int(text)
    except ValueError:
        number = -1
    if number < 0 or (name == "story" and not number):
        raise UsageError(f"--{name} {text}: give a number, such as --{name} 3")
    return number


# Reading.


def _read(path: Path, worst: int) -> Report:
    with _trace(path) as trace, reading_progress(f"reading {path.name}") as progress:
        report = build(trace, path, progress, worst)
        if not any(vm.sources for vm in report.vms):
            raise UsageError(_no_tick(report, trace))
    return report


@contextlib.contextmanager
def _trace(path: Path) -> Iterator[Trace]:
    """What cannot be read in here is the file's fault."""
    try:
        with contextlib.closing(open_trace(path)) as trace:
            yield trace
    except FormatError as error:
        text = str(error)
        raise UsageError(text if str(path) in text else f"{path}: {text}") from None
    except OSError as error:
        raise UsageError(
            f"{path}: {error.strerror or error}; give a recording or a trace"
        ) from None


def _no_tick(report: Report, trace: Trace) -> str:
    seconds = (report.end_ns - report.start_ns) / 1e9
    what = f"{report.path}: no tick in it: {report.records:,} events"
    if report.records:
        what += f" in {seconds:.3g} s"
    what += f", {len(report.vms)} VM{'' if len(report.vms) == 1 else 's'}"
    if trace.cut:
        what += f" ({trace.cut})"
    if report.records and Event.HRTIMER_EXPIRE_ENTRY not in trace.events:
        event = "hrtimer_expire_entry"
        return f"{what}, no {event}: record timer:{event} too, as kvmtick record does"
    if report.records and not report.vms:
        return f"{what}: record while a VM runs (kvmtick record --all)"
    return f"{what}; record for longer, while a guest uses a timer of KVM's (PIT, local APIC)"


def _chosen(report: Report, wanted: list[str]) -> Report:
    """Only the VMs that were asked for; the findings of all of them and of the trace."""
    if not wanted:
        return report
    for name in wanted:
        if not any(_is(vm, name) for vm in report.vms):
            have = ", ".join(f"{vm.pid} ({vm.name})" for vm in report.vms[:8])
            raise UsageError(f"--vm {name}: no such VM in {report.path}; there are {have}")
    report.vms = [vm for vm in report.vms if any(_is(vm, name) for name in wanted)]
    pids = {None, *(vm.pid for vm in report.vms)}
    report.findings = [finding for finding in report.findings if finding.pid in pids]
    return report


def _is(vm: VmReport, name: str) -> bool:
    return name in (str(vm.pid), vm.name)


def _story(report: Report, number: int) -> WorstTick:
    worst = [tick for vm in report.vms for source in vm.sources for tick in source.worst]
    if number > len(worst):
        raise UsageError(
            f"--story {number}: {len(worst)} of the worst ticks are kept; give 1 to {len(worst)}"
        )
    return worst[number - 1]


# Writing.


def _writers(
    options: argparse.Namespace, path: Path, stack: contextlib.ExitStack
) -> Iterator[Callable[[Report], None]]:
    """What writes the report to files; that they can be written is known before it is made."""
    outputs = {name: vars(options)[name] for name in ("html", "png", "perfetto")}
    for name, file in outputs.items():
        if file is not None and path.exists() and Path(file).exists() and path.samefile(file):
            raise UsageError(f"--{name} {file}: that is the trace itself; give another file")
    if options.html is not None:
        html = stack.enter_context(replaced(Path(options.html)))

        def write_html(report: Report) -> None:
            from kvmtick.report.page import write_page

            write_page(report, html)

        yield write_html
    if options.png is not None:
        png = stack.enter_context(replaced(Path(options.png)))

        def write_png(report: Report) -> None:
            from kvmtick.report.picture import write_picture

            write_picture(report, png)

        yield write_png


def _export(options: argparse.Namespace, path: Path) -> None:
    """What reads the trace itself, for it needs every event."""
    if options.perfetto is not None:
        from kvmtick.report.perfetto import write_perfetto

        with _reading(path, "Perfetto") as progress:
            write_perfetto(path, Path(options.perfetto), progress)
    if options.parquet is not None:
        from kvmtick.report.tables import write_tables

        with _reading(path, "Parquet") as progress:
            write_tables(path, Path(options.parquet), progress)


def _reading(path: Path, what: str) -> contextlib.AbstractContextManager[Progress | None]:
    return reading_progress(f"{path.name} as {what}")


# Showing.


def _show(options: argparse.Namespace, report: Report, story: WorstTick | None) -> None:
    if options.json:
        result = report.as_dict()
        if story is not None:
            lines = [line.as_dict() for line in story.story]
            result["story"] = {**story.as_dict(), "lines": lines}
        print(json.dumps(result))
        return
    from kvmtick.cli.show_report import show_report, show_story

    if story is not None:
        show_story(story)
    else:
        show_report(report, SHOWN_WORST if options.worst is None else int(options.worst))
