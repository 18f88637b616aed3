"""The results of conformance cases for people."""

from collections import Counter
from collections.abc import Iterable, Sequence

from rich.markup import escape

from kvmtick.cli.show import ReportConsole
from kvmtick.conform.case import Case
from kvmtick.conform.run import Outcome, Result

__all__ = ["show_list", "show_results"]

_STYLES: dict[Outcome, str] = {"passed": "green", "failed": "red", "skipped": "yellow"}


def show_list(cases: Iterable[Case]) -> None:
    """Name and sentence of each."""
    console = ReportConsole()
    for case in cases:
        console.print(f"[bold]{escape(case.name)}[/]\n    {escape(case.right)}")


def show_results(backend: str, results: Sequence[Result], *, verbose: bool) -> None:
    """Counts by module, what was skipped and why, what failed; `verbose`: every case."""
    console = ReportConsole()
    show = console.print
    modules: dict[str, Counter[Outcome]] = {}
    for result in results:
        modules.setdefault(result.case.name.partition(".")[0], Counter())[result.outcome] += 1
        if verbose:
            show(f"{_styled(result.outcome):<8} {escape(result.case.name)}")
    show(f"{len(results)} conformance cases on the {backend}")
    for module, counts in modules.items():
        show(f"  {module:<14} {_counts(counts)}")
    _show_skips(console, [result for result in results if result.outcome == "skipped"])
    for result in results:
        if result.outcome == "failed":
            _show_failure(console, backend, result, verbose)
    total = Counter(result.outcome for result in results)
    show()
    show(", ".join(f"{total[outcome]} {_styled(outcome)}" for outcome in _STYLES))


def _styled(outcome: Outcome) -> str:
    return f"[{_STYLES[outcome]}]{outcome}[/]"


def _counts(counts: Counter[Outcome]) -> str:
    return ", ".join(f"{counts[name]} {_styled(name)}" for name in _STYLES if counts[name])


def _show_skips(console: ReportConsole, skipped: list[Result]) -> None:
    reasons: dict[str, list[str]] = {}
    for result in skipped:
        reasons.setdefault(result.reason, []).append(result.case.name)
    for reason, names in reasons.items():
        console.print(f"\n{_styled('skipped')}: {escape(reason)}")
        for name in names:
            console.print(f"  {escape(name)}")


def _show_failure(console: ReportConsole, backend: str, result: Result, verbose: bool) -> None:
    failed = result.failed
    lines = {"right": result.case.right}
    if failed is None:
        lines["error"] = result.reason
    else:
        lines |= {
            "looked at": failed.what,
            "expected": str(failed.expected),
            "got": str(failed.got),
        }
    lines["repeat"] = f"kvmtick conform --backend {backend} --case {result.case.name}"
    console.print(f"\n{_styled('failed')}: [bold]{escape(result.case.name)}[/]")
    for label, text in lines.items():
        console.print(f"  {label + ':':<10} {escape(text)}")
    if verbose and result.traceback:
        console.out(result.traceback, highlight=False)
