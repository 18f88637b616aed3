"""`kvmtick conform`: run the conformance cases on a back end, and say what came of them."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from io import BufferedWriter
from pathlib import Path
from textwrap import fill

from kvmtick.abi.errors import HostError
from kvmtick.cli import EXIT_DIFFERENCE, EXIT_OK, UsageError
from kvmtick.cli.options import Parser
from kvmtick.cli.show_conform import show_list, show_results
from kvmtick.conform.bench import BACKENDS, Bench, bench_of
from kvmtick.conform.case import MODULES, Case
from kvmtick.conform.junit import junit
from kvmtick.conform.run import NoSuchCase, Result, as_dict, run_cases, select_cases

__all__ = ["main"]

SUBJECTS = ", ".join(f"{module.replace('_', '-')}.*" for module in MODULES)
EPILOG = f"""\
{fill(SUBJECTS, 96, initial_indent="cases: ", subsequent_indent="       ", break_on_hyphens=False)}

outcomes:
  passed   the back end does what is right
  failed   it does something else: what was looked at, what is right, what it gave
  skipped  this host cannot show it, and why; never on the model

exit codes:
  0 no case failed   1 a case failed   2 usage   3 no usable /dev/kvm   130 interrupted

examples:
  kvmtick conform                               every case on the model
  kvmtick conform --backend kernel              every case on /dev/kvm
  kvmtick conform --case 'pit.*' --case 'pic.*' some of them
  kvmtick conform --list                        what they are
"""


def main(argv: list[str]) -> int:
    """Run the verb; returns the exit code."""
    options = _parser().parse_command_line(argv)
    cases = _cases(options)
    if options.list:
        _list(options, cases)
        return EXIT_OK
    bench = _bench(options)
    with contextlib.ExitStack() as stack:
        # The file is opened before the first case is run, and not emptied before all else fits.
        file = _junit_file(options, stack)
        results = _run(options, cases, bench)
        if file is not None:
            with _is_junit_file(options):
                file.write(junit(bench.name, results))
                file.flush()
    if options.json:
        print(json.dumps(as_dict(bench.name, results)))
    else:
        show_results(bench.name, results, verbose=options.verbose)
    return EXIT_DIFFERENCE if any(each.outcome == "failed" for each in results) else EXIT_OK


def _parser() -> Parser:
    p = Parser(
        prog="kvmtick conform",
        usage="kvmtick conform [OPTION ...]",
        description="Does a KVM do what KVM must do? Named cases about PIT, PICs, IOAPIC and\n"
        "local APICs, routing, reinjection, irqfds and saved state, on the model or on /dev/kvm.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument(
        "--backend", choices=BACKENDS, default="model", help="whose chips: model or kernel (model)"
    )
    p.add_argument(
        "--case",
        metavar="GLOB",
        action="append",
        default=[],
        help="only the cases of that name, such as 'pit.*'; may be repeated",
    )
    p.add_argument("--list", action="store_true", help="name the cases and what each looks at")
    p.add_argument("--verbose", action="store_true", help="every case, and where exceptions rose")
    p.add_argument("--junit", metavar="FILE", help="write the results as JUnit XML")
    p.add_argument("--json", action="store_true", help="one JSON object instead of the report")
    return p


def _cases(options: argparse.Namespace) -> list[Case]:
    try:
        return select_cases(options.case)
    except NoSuchCase as error:
        raise UsageError(
            f"--case {str(error)!r}: no case has such a name; there are {SUBJECTS}:"
            " see kvmtick conform --list"
        ) from None


def _bench(options: argparse.Namespace) -> Bench:
    try:
        return bench_of(options.backend)
    except HostError as error:
        raise error.or_else("run the model: --backend model") from None


def _junit_file(options: argparse.Namespace, stack: contextlib.ExitStack) -> BufferedWriter | None:
    if options.junit is None:
        return None
    with _is_junit_file(options):
        return stack.enter_context(Path(options.junit).open("wb"))


@contextlib.contextmanager
def _is_junit_file(options: argparse.Namespace) -> Iterator[None]:
    """What cannot be done in here is the file's fault."""
    try:
        yield
    except OSError as error:
        raise UsageError(
            f"--junit {options.junit}: {error.strerror}; give a writable file"
        ) from None


def _run(options: argparse.Namespace, cases: list[Case], bench: Bench) -> list[Result]:
    results = []
    with _progress(options, len(cases)) as show:
        for result in run_cases(cases, bench):
            results.append(result)
            show(results)
    return results


@contextlib.contextmanager
def _progress(options: argparse.Namespace, cases: int) -> Iterator[Callable[[list[Result]], None]]:
    """A bar on the terminal; nothing where nobody watches."""
    if options.json or not sys.stderr.isatty():
        yield lambda results: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[failed]} failed"),
        console=Console(stderr=True),
        transient=True,
    ) as bar:
        task = bar.add_task("", total=cases, failed=0)

        def show(results: list[Result]) -> None:
            failed = sum(result.outcome == "failed" for result in results)
            name = results[-1].case.name
            bar.update(task, completed=len(results), failed=failed, description=name)

        yield show


def _list(options: argparse.Namespace, cases: list[Case]) -> None:
    if options.json:
        print(json.dumps({"cases": [{"case": c.name, "right": c.right} for c in cases]}))
    else:
        show_list(cases)
