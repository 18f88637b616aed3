"""`kvmtick bench`: how fast kvmtick is, beside QEMU and Bochs in the same run."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from typing import TextIO

from kvmtick.bench.figure import Figure
from kvmtick.bench.figures import FIGURES
from kvmtick.bench.run import as_dict, take_figures
from kvmtick.cli import EXIT_DIFFERENCE, EXIT_OK, UsageError
from kvmtick.cli.options import Parser
from kvmtick.cli.run_options import integer
from kvmtick.cli.show_bench import show_figures, show_results

__all__ = ["main"]

DEFAULT_RUNS = 5
QUICK_RUNS = 2
MOST_RUNS = 1000
ERASE = "\x1b[K"
EPILOG = """\
Each figure is taken in processes of its own, pinned to one core, --runs times in turns with its
peers. Shown are the best of the runs and the median, for a machine is rarely alone; a ratio is best
by best. Start-up is subtracted: few and many ticks are run, the difference counts.

peers:
  qemu   qemu-system-x86_64, TCG, -icount shift=0,sleep=off    apt-get install qemu-system-x86
  bochs  bochs, sync=none, 10 million instructions a second    apt-get install bochs bochs-term
They run the same guest images. Where one is not installed its ratio is left out, and whether a mark
that needs it is met cannot be told.

exit codes:
  0 all were taken, whatever they are   1 one could not be taken   2 usage   130 interrupted

examples:
  kvmtick bench                        all figures, several minutes
  kvmtick bench --quick tick-pic       a look at one
  kvmtick bench --list                 what they are, and their marks
  kvmtick bench --json > today.json    for programs
"""


def main(argv: list[str]) -> int:
    """Run the verb; returns the exit code."""
    options = _parser().parse_command_line(argv)
    figures = _figures(options.names)
    if options.list:
        _list(options, figures)
        return EXIT_OK
    runs = _runs(options)
    with _progress_on(sys.stderr) as progress:
        results = list(take_figures(figures, runs, options.quick, options.cpu_time, progress))
    told = as_dict(results, runs, options.quick, options.cpu_time)
    if options.json:
        print(json.dumps(told))
    else:
        show_results(results, told)
    return EXIT_DIFFERENCE if any(result.taken.failed for result in results) else EXIT_OK


def _parser() -> Parser:
    p = Parser(
        prog="kvmtick bench",
        usage="kvmtick bench [NAME ...] [OPTION ...]",
        description="How fast kvmtick is, beside QEMU and Bochs on the same guests, in one run.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument("names", nargs="*", metavar="NAME", help="only these figures (all)")
    p.add_argument("--list", action="store_true", help="name the figures and their marks")
    p.add_argument(
        "--runs",
        metavar="N",
        help=f"how often to take each figure ({DEFAULT_RUNS}; with --quick {QUICK_RUNS})",
    )
    p.add_argument(
        "--quick", action="store_true", help="a tenth of the length: for a look, not for the record"
    )
    p.add_argument(
        "--cpu-time",
        action="store_true",
        help="rates and the boot by CPU time, not wall time: for a machine that is busy otherwise",
    )
    p.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    return p


def _figures(names: list[str]) -> list[Figure]:
    for name in names:
        if name not in FIGURES:
            raise UsageError(f"there is no figure {name!r}: there are {', '.join(FIGURES)}")
    return [figure for name, figure in FIGURES.items() if not names or name in names]


def _runs(options: argparse.Namespace) -> int:
    if options.runs is None:
        return QUICK_RUNS if options.quick else DEFAULT_RUNS
    runs = integer("--runs", options.runs)
    if not 1 <= runs <= MOST_RUNS:
        raise UsageError(f"--runs {runs}: give 1 to {MOST_RUNS}")
    return runs


def _list(options: argparse.Namespace, figures: list[Figure]) -> None:
    if not options.json:
        show_figures(figures)
        return
    print(
        json.dumps(
            {
                "figures": [
                    {
                        "name": figure.name,
                        "what": figure.what,
                        "unit": figure.unit,
                        "mark": figure.mark_text(),
                    }
                    for figure in figures
                ]
            }
        )
    )


@contextlib.contextmanager
def _progress_on(file: TextIO) -> Iterator[Callable[[str], None]]:
    """One line that is written over, on a terminal; nothing elsewhere."""
    if not file.isatty():
        yield lambda _: None
        return
    try:
        yield lambda what: print(f"\r{ERASE}{what}", end="", file=file, flush=True)
    finally:
        print(f"\r{ERASE}", end="", file=file, flush=True)
