"""`kvmtick compare`: a guest on the model and on the kernel, and where they part."""

from __future__ import annotations

import argparse
import json
from itertools import zip_longest
from typing import Any

from kvmtick import guests
from kvmtick.abi.errors import HostError
from kvmtick.cli import EXIT_DIFFERENCE, EXIT_OK, UsageError
from kvmtick.cli.options import Parser
from kvmtick.cli.run_guest import HOLDERS, guest_of, is_kernel
from kvmtick.cli.run_options import (
    add_file,
    add_guest,
    add_reinject,
    duration_ns,
    integer,
    ticks_of,
)
from kvmtick.conform.compare import Comparison, Difference, Side, Wanted, compare
from kvmtick.guests import Parameters
from kvmtick.kvm.api import DEFAULT_RUN_LIMIT_S

__all__ = ["main"]

DEFAULT_TICKS = 20
"""A host is rarely on time for much longer."""

DEFAULT_CONTEXT = 3
NS_PER_MS = 1_000_000

EPILOG = """\
Needs /dev/kvm, and a tracefs it may write to. The guest runs once on the model, and on the kernel
until two of its runs show the same difference, or one shows none; runs in which the host was late
do not count. What is set aside stands in docs/comparing.md.

A guest that prints or holds ticks back does so in real time: more than 20 ticks are asked of
tick-if0 and tick-mask, so that what was replayed is over before they end.

exit codes:
  0 the same   1 they differ   2 usage   130 interrupted
  3 no /dev/kvm, no tracefs, KVM cannot run this guest, or the host is too noisy

examples:
  kvmtick compare tick-if0                      ticks that are held back
  kvmtick compare tick-lapic --timer oneshot    the local APIC's timer
  kvmtick compare tick-pic --all                every step of both
"""

LINES = {
    "hrtimer": "the PIT's timer",
    "lapic_timer": "the local APIC's timer",
    "worker": "the runs of the kvm-pit worker",
    "gsi": "GSI levels",
    "ioapic": "IOAPIC pins",
    "pic": "PIC pins",
    "vcpu": "the vCPU: ports, injections, EOIs",
    "counts": "how often",
    "guest": "the guest itself",
}


def main(argv: list[str]) -> int:
    """Run the verb; returns the exit code."""
    options = _parser().parse_command_line(argv)
    context = _context(options)
    wanted = _wanted(options)
    try:
        result = compare(wanted)
    except HostError as error:
        raise error.or_else("run it on the model alone: kvmtick run") from None
    if options.json:
        print(json.dumps(_as_dict(wanted, result)))
    else:
        print(_text(wanted, result, None if options.all else context))
    return EXIT_OK if result.equal else EXIT_DIFFERENCE


def _parser() -> Parser:
    p = Parser(
        prog="kvmtick compare",
        usage="kvmtick compare GUEST [OPTION ...]",
        description="Run a guest on the model and on the kernel, and show side by side where they"
        " do not do the same.\nGUEST is a built-in guest or a file, as of kvmtick run.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument("guest", metavar="GUEST", help=argparse.SUPPRESS)
    add_guest(p, ticks=str(DEFAULT_TICKS))
    add_file(p)
    add_reinject(p.add_argument_group("how"))
    add = p.add_argument_group("what to show").add_argument
    add("--all", action="store_true", help="all steps, not only where they differ")
    add(
        "--context",
        metavar="N",
        default=str(DEFAULT_CONTEXT),
        help=f"equal steps around a difference ({DEFAULT_CONTEXT})",
    )
    add("--json", action="store_true", help="one JSON object instead of the report")
    return p


def _context(options: argparse.Namespace) -> int:
    context = integer("--context", options.context)
    if context < 0:
        raise UsageError(f"--context {context}: give 0 or more")
    return context


def _wanted(options: argparse.Namespace) -> Wanted:
    by_default = options.ticks is None and vars(options)["for"] is None
    if by_default:
        options.ticks = str(DEFAULT_TICKS)
    guest = guest_of(options)
    if guest.name in HOLDERS:
        least = DEFAULT_TICKS + _held_ticks(guest)
        if by_default:
            options.ticks = str(least)
            guest = guest_of(options)
        elif options.ticks is not None and integer("--ticks", options.ticks) < least:
            raise UsageError(
                f"--ticks {options.ticks}: {guest.name} holds {least - DEFAULT_TICKS} back, and how"
                " many of these it still takes before it ends is a matter of time; give"
                f" {least} or more, or a shorter --hold"
            )
    ticks = None
    if guest.parameters is None and not (by_default and is_kernel(guest)):
        ticks = ticks_of(options)
    return Wanted(
        guest,
        reinject=options.reinject is not False,
        ticks=ticks,
        for_ns=duration_ns("--for", vars(options)["for"]),
        limit_s=DEFAULT_RUN_LIMIT_S,
    )


def _held_ticks(guest: guests.Guest) -> int:
    """How many ticks tick-if0 and tick-mask hold back."""
    block = Parameters.read(guest.image, guests.PARAMETERS.magic - guests.LOAD_AT)
    return block.param_ms * NS_PER_MS * guests.PIT_HZ // (block.divisor * 1_000_000_000)


# The report.


def _as_dict(wanted: Wanted, result: Comparison) -> dict[str, Any]:
    return {
        "guest": wanted.guest.name,
        "equal": result.equal,
        "runs": result.runs,
        "model": _side_dict(result.model),
        "kernel": _side_dict(result.kernel),
        "differences": [
            {"line": d.line, "at": d.at, "model": list(d.model), "kernel": list(d.kernel)}
            for d in result.differences
        ],
    }


def _side_dict(side: Side) -> dict[str, Any]:
    return {
        "events": side.events,
        "exit": {"reason": side.run.exit.reason, "code": side.run.exit.code},
        "guest_ticks": side.run.guest_ticks,
        "lines": {line: list(steps) for line, steps in side.lines.items()},
    }


def _text(wanted: Wanted, result: Comparison, context: int | None) -> str:
    """`context` None: everything."""
    out = []
    for line in LINES:
        here = [each for each in result.differences if each.line == line]
        if here or context is None:
            out += [f"{LINES[line]}:", *_line(result, line, here, context), ""]
    verdict = "do the same" if result.equal else "differ"
    runs = "a run" if result.runs == 1 else f"{result.runs} runs"
    steps = sum(len(steps) for steps in result.model.lines.values())
    steps -= sum(len(each.model) for each in result.differences)
    found = len(result.differences)
    out.append(
        f"{wanted.guest.name}: the model and the kernel {verdict}: {steps:,} steps equal,"
        f" {found} difference{'' if found == 1 else 's'}; {result.model.events:,} events of the"
        f" model, {result.kernel.events:,} of the kernel ({runs})"
    )
    return "\n".join(out)


def _line(result: Comparison, line: str, found: list[Difference], context: int | None) -> list[str]:
    """The steps of a line side by side: the model's, the kernel's."""
    rows = _rows(result.model.lines[line], result.kernel.lines[line], found)
    near = [
        context is None
        or any(differs for *_, differs in rows[max(0, at - context) : at + context + 1])
        for at in range(len(rows))
    ]
    width = max(
        (len(ours) for (ours, _, _), shown in zip(rows, near, strict=True) if shown), default=0
    )
    out = [f"  {'model':<{width}}    kernel"] if rows else ["  nothing"]
    skipped = False
    for (ours, theirs, differs), shown in zip(rows, near, strict=True):
        if shown:
            out.append(f"{'>' if differs else ' '} {ours:<{width}}    {theirs}".rstrip())
        elif not skipped:
            out.append("  ...")
        skipped = not shown
    return out


def _rows(
    ours: tuple[str, ...], theirs: tuple[str, ...], found: list[Difference]
) -> list[tuple[str, str, bool]]:
    rows: list[tuple[str, str, bool]] = []
    at = their_at = 0
    for each in [*found, None]:
        equal = (each.at if each else min(len(ours), at + len(theirs) - their_at)) - at
        rows += [(ours[at + n], theirs[their_at + n], False) for n in range(equal)]
        if each:
            pairs = zip_longest(each.model, each.kernel, fillvalue="-")
            rows += [(step, their_step, True) for step, their_step in pairs]
            at, their_at = at + equal + len(each.model), their_at + equal + len(each.kernel)
    return rows
