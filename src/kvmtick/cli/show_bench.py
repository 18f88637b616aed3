"""The figures of `kvmtick bench` for people."""

from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kvmtick.bench.figure import Figure, Result
from kvmtick.cli.show import ReportConsole

__all__ = ["show_figures", "show_results"]

_MET = {True: "[green]met[/]", False: "[red]missed[/]", None: "[yellow]not told[/]"}


def show_figures(figures: Iterable[Figure]) -> None:
    """Name, sentence and mark of each."""
    console = ReportConsole()
    for figure in figures:
        console.print(f"[bold]{figure.name}[/]\n    {escape(figure.what)}: {figure.mark_text()}")


def show_results(results: Sequence[Result], told: dict[str, Any]) -> None:
    """The table, and below it what needs a sentence; `told` is the JSON object."""
    console = ReportConsole()
    _show_machine(console, told)
    table = Table("figure", "best", "median", "+-", "unit", "mark", "", box=None, pad_edge=False)
    for at in (1, 2, 3, 5):
        table.columns[at].justify = "right"
    for column in table.columns:
        column.no_wrap = True
    for result in results:
        _add_rows(table, result)
    console.print(table)
    console.print()
    for result in results:
        _show_remarks(console, result)


def _show_machine(console: Console, told: dict[str, Any]) -> None:
    machine = told["machine"]
    build = "compiled" if machine["compiled"] else "not compiled"
    console.print(
        f"kvmtick {machine['kvmtick']} ({build}) on {machine['python']}, {escape(machine['cpu'])},"
        f" {machine['cores']} cores, Linux {machine['kernel']}"
    )
    peers = [
        f"{name}: {escape(version) if version else 'not installed'}"
        for name, version in machine["peers"].items()
    ]
    console.print("; ".join(peers))
    length = ", a tenth of the length" if told["quick"] else ""
    console.print(
        f"{told['runs']} runs of each{length}, {told['time']} time; +- is how far they lie apart\n"
    )


def _add_rows(table: Table, result: Result) -> None:
    told = result.as_dict()
    table.add_row(
        f"[bold]{result.figure.name}[/]",
        *_numbers(told),
        result.figure.unit,
        _number(told["mark"]),
        _MET[told["met"]] if told["value"] is not None else "[yellow]not taken[/]",
    )
    for name, peer in told["peers"].items():
        if peer["absent"]:
            continue
        ratio = f"{peer['ratio']:.2f} x" if peer["ratio"] is not None else ""
        median = f"(median {peer['ratio_median']:.2f})" if peer["ratio_median"] else ""
        table.add_row(f"  {name}", *_numbers(peer), "", ratio, median)


def _numbers(told: dict[str, Any]) -> tuple[str, str, str]:
    spread = "" if told["spread"] is None else f"{told['spread']:.0%}"
    return _number(told["best"]), _number(told["median"]), spread


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 1000 else f"{value:,.4g}"


def _show_remarks(console: Console, result: Result) -> None:
    told = result.as_dict()
    remarks = [*told["faults"], *([told["note"]] if told["note"] else [])]
    remarks += [f"{name}: {p['absent']}" for name, p in told["peers"].items() if p["absent"]]
    for stretch in told["stretch"]:
        if told["value"] is not None and stretch["mark"] is not None:
            word = "reached" if stretch["met"] else "not reached"
            remarks.append(f"stretch, {stretch['rule']}: {word}")
    for remark in remarks:
        console.print(f"[bold]{result.figure.name}[/]: {escape(remark)}")
