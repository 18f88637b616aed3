"""`kvmtick run` as what is measured: one process a run, which has to end as it should."""

import json
from typing import Any

from kvmtick.bench.process import KVMTICK, MeasureError, Spent, run_process

__all__ = ["run_guest", "run_ticks", "told"]

_LIMIT = "30m"


def run_guest(*arguments: str) -> tuple[Spent, dict[str, Any]]:
    """Run it, and what it says of the run; MeasureError if the guest was not done."""
    spent = run_process([*KVMTICK, "run", *arguments, "--limit", _LIMIT, "--json"])
    run = told(spent)
    if run["exit"] != {"reason": "done", "code": 0}:
        raise MeasureError(f"kvmtick run {' '.join(arguments)} ended with {run['exit']}")
    return spent, run


def told(spent: Spent) -> dict[str, Any]:
    """The JSON object a process printed."""
    try:
        found: dict[str, Any] = json.loads(spent.output)
    except ValueError:
        raise MeasureError("what was run printed no JSON") from None
    return found


def run_ticks(guest: str, ticks: int, *options: str) -> Spent:
    """A built-in guest over so many ticks; each has to have reached it, by its own count and by the
    verdicts.
    """
    spent, run = run_guest(guest, "--ticks", str(ticks), *options)
    verdicts = run["ticks"]
    if run["guest_ticks"] != ticks or verdicts["expired"] != verdicts["delivered"]:
        raise MeasureError(f"{guest} took {run['guest_ticks']} of {ticks} ticks: {verdicts}")
    return spent
