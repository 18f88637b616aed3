"""`kvmtick fuzz`: random operations on the model and on /dev/kvm, compared after each."""

from __future__ import annotations

import argparse
import json
import re
import sys
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvmtick.cli import EXIT_DIFFERENCE, EXIT_OK, UsageError
from kvmtick.cli.options import Parser

if TYPE_CHECKING:
    from kvmtick.conform.fuzz.search import Finding, Fuzzer
    from kvmtick.kvm.api import System

__all__ = ["main"]

DEFAULT_OPS = 40_000
MOST_SHOWN = 40
BACKENDS = ("model", "kernel")
_UNITS_S = {"s": 1, "m": 60, "h": 3600}

EPILOG = """\
The search ends after --ops or --for, whichever comes first, at the first difference, and at the
first warning in the kernel's log, which only root may read. A difference is made as short as it
gets and saved: a file for --replay. What is not compared, times above all, stands in
docs/fidelity.md.

exit codes:
  0 no difference   1 a difference, or a warning of the kernel   2 usage
  3 no usable /dev/kvm   130 interrupted

examples:
  kvmtick fuzz                            40,000 operations, about half a minute
  kvmtick fuzz --for 15m --seed 7         for long, and others
  kvmtick fuzz --replay fuzz-0-1.json     a saved difference again
  kvmtick fuzz --backends model,model     without /dev/kvm: does the model agree with itself?
"""


def main(argv: list[str]) -> int:
    """Run the verb; the exit code is 1 when something was found."""
    options = _parser().parse_command_line(argv)
    with ExitStack() as stack:
        return _replay(options, stack) if options.replay else _search(options, stack)


def _parser() -> Parser:
    p = Parser(
        prog="kvmtick fuzz",
        usage="kvmtick fuzz [OPTION ...]",
        description="Does the model do what /dev/kvm does? Random operations on both, compared"
        " after each: results,\nerrnos, what the guest read, and the state of all chips and vCPUs.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument("--ops", metavar="N", help=f"how many operations ({DEFAULT_OPS:,})")
    p.add_argument("--for", dest="for_", metavar="DURATION", help="how long: 90s, 15m, 2h")
    p.add_argument("--seed", metavar="N", default="0", help="what to draw from (0)")
    p.add_argument(
        "--backends",
        metavar="A,B",
        default=",".join(BACKENDS),
        help="which two, each model or kernel (%(default)s)",
    )
    p.add_argument("--save", metavar="DIR", default=".", help="where a finding is saved (.)")
    p.add_argument("--replay", metavar="FILE", help="carry out a saved sequence again")
    p.add_argument("--json", action="store_true", help="one JSON object instead of text")
    return p


def _search(options: argparse.Namespace, stack: ExitStack) -> int:
    from kvmtick.conform.fuzz.replay import save
    from kvmtick.timing.wall import Stopwatch

    seed = _number("--seed", options.seed)
    for_s = None if options.for_ is None else _seconds(options.for_)
    ops = _number("--ops", options.ops) if options.ops is not None else None
    if ops is None and for_s is None:
        ops = DEFAULT_OPS
    directory = Path(options.save)
    if not directory.is_dir():
        raise UsageError(f"--save {directory}: no such directory; give one that is there")
    fuzzer = _fuzzer(options, stack, seed)
    stopwatch = Stopwatch()
    with _Progress(fuzzer, ops) as progress:
        finding = fuzzer.run(ops, for_s, progress.tell)
    path = None if finding is None else save(finding, fuzzer.backends.names, directory)
    totals = fuzzer.totals
    rate = round(totals.ops / max(stopwatch.elapsed_s(), 1e-9), 1)
    if options.json:
        content = {
            "ops": totals.ops,
            "seed": seed,
            "sequences": totals.sequences,
            "differences": totals.differences,
            "ops_per_s": rate,
            "backends": fuzzer.backends.names,
            "noise": totals.noise,
            "late": totals.late,
            "coverage": dict(sorted(totals.coverage.items())),
            "finding": finding and _as_dict(finding, path),
        }
        print(json.dumps(content))
    else:
        print(
            f"{totals.ops:,} operations in {totals.sequences:,} sequences, seed {seed}: "
            f"{rate:,.0f} a second, {totals.differences} differences"
        )
        if totals.noise or totals.late:
            print(
                f"set aside: {totals.noise} differences that showed once only, "
                f"{totals.late} sequences for which the host was late"
            )
        if finding is not None:
            _show(finding, fuzzer.backends.names)
            print(f"again: kvmtick fuzz --replay {path}")
    return EXIT_OK if finding is None else EXIT_DIFFERENCE


def _replay(options: argparse.Namespace, stack: ExitStack) -> int:
    from kvmtick.conform.fuzz.replay import ReplayError, load
    from kvmtick.conform.fuzz.search import Finding, first_difference

    path = Path(options.replay)
    try:
        each = load(path)
    except ReplayError as error:
        raise UsageError(str(error)) from None
    except OSError as error:
        raise UsageError(
            f"--replay {path}: {error.strerror}; give a file that can be read"
        ) from None
    fuzzer = _fuzzer(options, stack, each.seed)
    found = first_difference(fuzzer.backends, each.config, each.operations)
    finding = Finding(each, found)
    if options.json:
        print(
            json.dumps(
                {
                    "ops": len(each.operations),
                    "seed": each.seed,
                    "differences": int(found is not None),
                    "finding": found and _as_dict(finding, path),
                }
            )
        )
    elif found is None:
        print(f"{path}: {len(each.operations)} operations, no difference")
    else:
        _show(finding, fuzzer.backends.names)
    return EXIT_OK if found is None else EXIT_DIFFERENCE


def _fuzzer(options: argparse.Namespace, stack: ExitStack, seed: int) -> Fuzzer:
    from kvmtick.abi.errors import HostError
    from kvmtick.conform.fuzz.search import Backends, Fuzzer
    from kvmtick.host.kmsg import KernelLog

    names = options.backends.split(",")
    if len(names) != 2 or not set(names) <= set(BACKENDS):
        raise UsageError(
            f"--backends {options.backends}: give two of model and kernel: model,kernel"
        )
    left, right = (stack.enter_context(_system(name)) for name in names)
    log = None
    if "kernel" in names:
        try:
            log = stack.enter_context(KernelLog())
        except HostError as error:
            print(f"kvmtick: the kernel log is not watched: {error}", file=sys.stderr)
    return Fuzzer(Backends.of(left, right), seed, log)


def _system(name: str) -> System:
    from kvmtick.abi.errors import HostError
    from kvmtick.kvm import Kvm

    if name == "model":
        return Kvm("model")
    try:
        return Kvm("kernel")
    except HostError as error:
        raise error.or_else("let the model alone be run: --backends model,model") from None


def _number(option: str, text: str) -> int:
    if not text.isdecimal() or len(text) > 18:
        raise UsageError(f"{option} {text}: give a whole number, 0 or more")
    return int(text)


def _seconds(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text)
    if match is None or float(match[1]) <= 0:
        raise UsageError(f"--for {text}: give a number and a unit: 90s, 15m, 2h")
    return float(match[1]) * _UNITS_S[match[2]]


def _as_dict(finding: Finding, path: Path | None) -> dict[str, Any]:
    found = finding.found
    return {
        "file": str(path),
        "operations": len(finding.sequence.operations),
        "step": found and found.step,
        "fields": [asdict(each) for each in found.differences] if found else [],
        "warning": finding.warning,
    }


def _show(finding: Finding, names: tuple[str, str]) -> None:
    from kvmtick.conform.fuzz.replay import show

    each, found = finding.sequence, finding.found
    print(f"sequence {each.number} of seed {each.seed}, {len(each.operations)} operations:")
    for number, operation in enumerate(each.operations[-MOST_SHOWN:]):
        print(f"  {max(0, len(each.operations) - MOST_SHOWN) + number:3}  {show(operation)}")
    if finding.warning:
        print(f"the kernel says: {finding.warning}")
    if found is not None:
        print(f"after step {found.step}, {show(found.operation)}:")
        for difference in found.differences:
            values = zip(names, (difference.left, difference.right), strict=True)
            shown = ", ".join(f"{name} {_value(value)}" for name, value in values)
            print(f"  {difference.field}: {shown}")


def _value(value: object) -> str:
    return hex(value) if isinstance(value, int) and value > 9 else str(value)


class _Progress:
    """On a terminal: how far it is."""

    def __init__(self, fuzzer: Fuzzer, ops: int | None) -> None:
        self._fuzzer = fuzzer
        self._ops = ops
        self._status: Any = None

    def __enter__(self) -> _Progress:
        if sys.stderr is not None and sys.stderr.isatty():
            from rich.console import Console

            self._status = Console(stderr=True).status("fuzzing")
            self._status.start()
        return self

    def tell(self) -> None:
        """A sequence is done."""
        if self._status is not None:
            done = f"{self._fuzzer.totals.ops:,}"
            of = "" if self._ops is None else f" of {self._ops:,}"
            self._status.update(f"{done}{of} operations, no difference")

    def __exit__(self, *_: object) -> None:
        if self._status is not None:
            self._status.stop()
