"""`kvmtick query`: ask a trace by SQL."""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import math
import sys
from collections.abc import Iterable
from decimal import Decimal
from pathlib import Path
from typing import Any

from kvmtick.cli import EXIT_OK, UsageError
from kvmtick.cli.options import Parser
from kvmtick.cli.reading import reading_progress
from kvmtick.report.query import COLUMNS, Answer, QueryError, check_source, open_tables
from kvmtick.trace.formats import FormatError

__all__ = ["main"]

SHOWN_ROWS = 100
_WIDEST = 100_000

EPILOG = """\
tables (docs/tables.md tells what every column means; without SQL they are listed):
  ticks    one row a tick: what became of it, when, how long every hop took
  events   one row an event of the trace
  vms      the VMs
  trace    where the trace comes from, how long it is, what it lacks

examples:
  kvmtick query t.ktrace
  kvmtick query t.ktrace 'SELECT name, verdict, count(*) FROM ticks GROUP BY ALL ORDER BY ALL'
  kvmtick query t.ktrace --csv 'SELECT tick, expiry_to_eoi_ns FROM ticks' > latencies.csv
  kvmtick report t.ktrace --parquet tables/ && kvmtick query tables/ 'FROM ticks LIMIT 5'

exit codes:
  0 fine   2 usage, SQL that cannot be answered, no such file or no trace
  3 a library is missing, no room for the tables   130 interrupted
"""


def main(argv: list[str]) -> int:
    """Run the verb; returns the exit code."""
    options = _parser().parse_command_line(argv)
    source = Path(options.file)
    if options.sql is None:
        return _show_columns(source, options)
    show = {"json": _show_json, "csv": _show_csv}.get(options.form, _show_table)
    try:
        with contextlib.ExitStack() as stack:
            with reading_progress(f"reading {source.name}") as progress:
                tables = stack.enter_context(open_tables(source, progress))
            show(tables.ask(options.sql))
    except QueryError as error:
        raise UsageError(str(error)) from None
    except (FormatError, OSError) as error:
        raise _unreadable(source, error) from None
    return EXIT_OK


def _parser() -> Parser:
    p = Parser(
        prog="kvmtick query",
        usage="kvmtick query FILE ['SELECT ...'] [--json | --csv]",
        description="Ask a recording, a trace or a run by SQL (DuckDB). Nothing is changed by it.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument(
        "file", metavar="FILE", help="what report reads, or a directory that report --parquet wrote"
    )
    p.add_argument("sql", metavar="SQL", nargs="?", help="one SELECT; none: list the tables")
    form = p.add_mutually_exclusive_group()
    for name, text in (("json", "an array of objects"), ("csv", "comma-separated, with a header")):
        form.add_argument(
            f"--{name}", dest="form", action="store_const", const=name, help=f"{text}; all rows"
        )
    return p


def _unreadable(source: Path, error: Exception) -> UsageError:
    if isinstance(error, OSError):
        return UsageError(f"{source}: {error.strerror or error}; give a recording or a trace")
    return UsageError(str(error))


def _show_columns(source: Path, options: argparse.Namespace) -> int:
    """What can be asked."""
    try:
        check_source(source)
    except (FormatError, OSError) as error:
        raise _unreadable(source, error) from None
    if options.form == "json":
        print(json.dumps({table: dict(columns) for table, columns in COLUMNS.items()}))
        return EXIT_OK
    rows = [
        (table, column, type_)
        for table, columns in COLUMNS.items()
        for column, type_ in columns.items()
    ]
    if options.form == "csv":
        _write_csv(["table", "column", "type"], [rows])
    else:
        _print_table(["table", "column", "type"], rows)
    return EXIT_OK


def _show_json(answer: Answer) -> None:
    between = "["
    for chunk in answer.chunks():
        for row in chunk:
            values = dict(zip(answer.columns, map(_plain, row), strict=True))
            sys.stdout.write(f"{between}{json.dumps(values)}")
            between = ",\n"
    print("[]" if between == "[" else "]")


def _show_csv(answer: Answer) -> None:
    _write_csv(answer.columns, answer.chunks())


def _write_csv(columns: list[str], chunks: Iterable[list[tuple[Any, ...]]]) -> None:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(columns)
    for chunk in chunks:
        writer.writerows([_cell(value) for value in row] for row in chunk)


def _show_table(answer: Answer) -> None:
    shown: list[tuple[Any, ...]] = []
    more = 0
    for chunk in answer.chunks():
        room = SHOWN_ROWS - len(shown)
        shown += chunk[:room]
        more += len(chunk[room:])
    _print_table(answer.columns, shown)
    if more:
        print(f"... {more:,} more row{'s' * (more > 1)}; --json or --csv gives all")


def _print_table(columns: list[str], rows: list[tuple[Any, ...]]) -> None:
    from rich.markup import escape
    from rich.table import Table

    from kvmtick.cli.show import ReportConsole

    table = Table(*map(escape, columns), box=None, pad_edge=False)
    for at, column in enumerate(table.columns):
        column.no_wrap = True
        if any(isinstance(row[at], int | float | Decimal) for row in rows):
            column.justify = "right"
    for row in rows:
        table.add_row(*(escape(_cell(value)) for value in row))
    console = ReportConsole()
    console.width = _WIDEST  # a line is as long as its row; a terminal may wrap it
    console.print(table)


def _cell(value: Any) -> str:
    """A value in a table; nothing for null."""
    value = _plain(value)
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.10g}"
    return json.dumps(value) if isinstance(value, dict | list) else str(value)


def _plain(value: Any) -> Any:
    """A value of DuckDB's as JSON has it; what JSON has no word for is its text."""
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, Decimal):
        value = float(value) if value % 1 else int(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, bool | int | float) else str(value)
