"""Running cases: `run_cases`, one after the other, and what came of each of them, a `Result`.

A case is bounded in time: after `CASE_LIMIT_S` it counts as failed, whatever it waits for. That
takes SIGALRM, so the cases must run in the main thread.
"""

import signal
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from types import FrameType
from typing import Any, Literal, TypeAlias

from kvmtick.conform.bench import Bench
from kvmtick.conform.case import Case, Failed, Skipped, all_cases
from kvmtick.timing.wall import Stopwatch

__all__ = [
    "CASE_LIMIT_S",
    "NoSuchCase",
    "Outcome",
    "Result",
    "as_dict",
    "run_case",
    "run_cases",
    "select_cases",
]

CASE_LIMIT_S = 30.0
"""Wall seconds of one case; none that works comes near it."""
CLEAN_UP_LIMIT_S = 5.0
"""The same for what a case does when it was ended, and again for what that does."""

Outcome: TypeAlias = Literal["passed", "failed", "skipped"]


class NoSuchCase(ValueError):
    """No case has a name that fits."""


@dataclass(frozen=True, slots=True)
class Result:
    """What came of a case: `reason` is one line, empty where it passed.

    `failed` holds what was looked at where that is what failed, `traceback` an exception's.
    """

    case: Case
    outcome: Outcome
    reason: str = ""
    wall_s: float = 0.0
    failed: Failed | None = None
    traceback: str = ""


def select_cases(patterns: Iterable[str]) -> list[Case]:
    """The cases whose names fit a pattern (`fnmatch`), in their order; all without a pattern.

    `NoSuchCase` for a pattern that fits none.
    """
    cases, patterns = list(all_cases()), list(patterns)
    for pattern in patterns:
        if not any(fnmatchcase(case.name, pattern) for case in cases):
            raise NoSuchCase(pattern)
    if not patterns:
        return cases
    return [case for case in cases if any(fnmatchcase(case.name, each) for each in patterns)]


def run_cases(
    cases: Iterable[Case], bench: Bench, limit_s: float = CASE_LIMIT_S
) -> Iterator[Result]:
    """Run cases in their order."""
    for case in cases:
        yield run_case(case, bench, limit_s)


def run_case(case: Case, bench: Bench, limit_s: float = CASE_LIMIT_S) -> Result:
    """Run one case; whatever it raises is a result, but for KeyboardInterrupt."""
    stopwatch = Stopwatch()
    try:
        with _bounded(limit_s):
            case.body(bench)
    except Skipped as skipped:
        return Result(case, "skipped", _line(skipped), stopwatch.elapsed_s())
    except Failed as failed:
        return Result(case, "failed", _line(failed), stopwatch.elapsed_s(), failed)
    except _TimeUp:
        return _broken(case, f"not over after {limit_s:g} s", stopwatch)
    except Exception as error:
        reason = f"{type(error).__name__}: {_line(error)}".removesuffix(": ")
        return _broken(case, reason, stopwatch)
    return Result(case, "passed", "", stopwatch.elapsed_s())


def _broken(case: Case, reason: str, stopwatch: Stopwatch) -> Result:
    text = traceback.format_exc().rstrip()
    return Result(case, "failed", reason, stopwatch.elapsed_s(), traceback=text)


def as_dict(backend: str, results: Iterable[Result]) -> dict[str, Any]:
    """The object of `kvmtick conform --json`."""
    results = list(results)
    outcomes = [result.outcome for result in results]
    return {
        "backend": backend,
        "cases": len(results),
        "passed": outcomes.count("passed"),
        "failed": outcomes.count("failed"),
        "skipped": outcomes.count("skipped"),
        "results": [
            {"case": result.case.name, "outcome": result.outcome, "reason": result.reason}
            for result in results
        ],
    }


class _TimeUp(BaseException):
    """No Exception, so that no case mistakes it for one of its own."""


@contextmanager
def _bounded(limit_s: float) -> Iterator[None]:
    def end(signum: int, frame: FrameType | None) -> None:
        raise _TimeUp

    before = signal.signal(signal.SIGALRM, end)
    try:
        signal.setitimer(signal.ITIMER_REAL, limit_s, CLEAN_UP_LIMIT_S)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
