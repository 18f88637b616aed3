"""SQL over a trace's tables, by DuckDB: `ticks` and `events` (`kvmtick.report.tables`), `vms` and
`trace`.

A question can read these and nothing else: one SELECT, no file, no network, no extension.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvmtick.report.extras import extra
from kvmtick.report.stream import Progress
from kvmtick.report.tables import EVENTS, METADATA, TABLES, TICKS, write_tables
from kvmtick.trace.formats import FormatError
from kvmtick.trace.reading import open_trace

if TYPE_CHECKING:
    import duckdb

__all__ = ["COLUMNS", "Answer", "QueryError", "Tables", "check_source", "open_tables"]

_CHUNK_ROWS = 10_000


COLUMNS: dict[str, dict[str, str]] = {
    **{
        Path(name).stem: {column: sql for column, sql, _ in columns}
        for name, columns in TABLES.items()
    },
    "vms": {"vm": "BIGINT", "name": "VARCHAR", "notes": "VARCHAR[]"},
    "trace": {
        "file": "VARCHAR",
        "origin": "VARCHAR",
        "simulated": "BOOLEAN",
        "start_ns": "BIGINT",
        "end_ns": "BIGINT",
        "events": "BIGINT",
        "lost_events": "BIGINT",
        "unknown_lines": "BIGINT",
        "cut": "VARCHAR",
    },
}
"""The columns of every table, and their types in SQL."""


class QueryError(ValueError):
    """The SQL cannot be answered; one line, with the columns there are where that helps."""


class Answer:
    """What a SELECT gives."""

    def __init__(self, columns: list[str], relation: duckdb.DuckDBPyConnection) -> None:
        self.columns = columns
        self._relation = relation

    def chunks(self) -> Iterator[list[tuple[Any, ...]]]:
        """The rows, some at a time."""
        with _errors():
            while chunk := self._relation.fetchmany(_CHUNK_ROWS):
                yield chunk


class Tables:
    """The tables of a trace, to be asked."""

    def __init__(self, directory: Path, scratch: Path) -> None:
        """Of a directory that `write_tables` wrote. Raises `FormatError` where it is none."""
        with extra("export", "kvmtick query"):
            import duckdb

        told = _about(directory)
        self._connection = duckdb.connect()
        run = self._connection.execute
        # These two must stand before everything is locked; the rest is nobody's business.
        paths = {"ticks": str(directory / TICKS), "events": str(directory / EVENTS)}
        run("SET allowed_paths = $paths", {"paths": list(paths.values())})
        run("SET temp_directory = $path", {"path": str(scratch)})
        for name, path in paths.items():
            run(f"CREATE VIEW {name} AS FROM read_parquet({_literal(path)})")
        self._tell(told)
        for setting in (
            "enable_external_access",
            "python_enable_replacements",
            "autoinstall_known_extensions",
            "autoload_known_extensions",
        ):
            run(f"SET {setting} = false")
        run("SET enable_progress_bar = false")
        run("SET lock_configuration = true")

    def _tell(self, told: dict[str, Any]) -> None:
        """The small tables `vms` and `trace`."""
        vms = [(vm["pid"], vm["name"], vm["notes"]) for vm in told.pop("vms")]
        for table, rows in (("vms", vms), ("trace", [tuple(told.values())])):
            columns = COLUMNS[table]
            what = ", ".join(f"{name} {type_}" for name, type_ in columns.items())
            self._connection.execute(f"CREATE TABLE {table} ({what})")
            for row in rows:
                marks = ", ".join("?" * len(columns))
                self._connection.execute(f"INSERT INTO {table} VALUES ({marks})", row)

    def ask(self, sql: str) -> Answer:
        """Answer one SELECT. Raises `QueryError`."""
        import duckdb

        with _errors(sql):
            statements = self._connection.extract_statements(sql)
            if len(statements) != 1:
                raise QueryError(f"{len(statements)} statements: give one SELECT")
            if statements[0].type != duckdb.StatementType.SELECT:
                kind = statements[0].type.name
                raise QueryError(f"{kind} is no question: give a SELECT; nothing can be changed")
            answer = self._run(statements[0])
            description = answer.description
            assert description is not None
            return Answer([column[0] for column in description], answer)

    def _run(self, statement: duckdb.Statement) -> duckdb.DuckDBPyConnection:
        """Execute it. In a thread of its own, for DuckDB does not look for Ctrl-C reliably."""
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(self._connection.execute, statement)
            try:
                return answer.result()
            except KeyboardInterrupt:
                self._connection.interrupt()
                raise

    def close(self) -> None:
        """Let go of the files."""
        self._connection.close()


@contextmanager
def open_tables(source: Path, progress: Progress | None = None) -> Iterator[Tables]:
    """The tables of a trace, or of a directory that has them.

    Raises OSError and `FormatError` where it cannot be read, `HostError` where a library is missing
    or there is no room for the tables.
    """
    with tempfile.TemporaryDirectory(prefix="kvmtick-query-") as name:
        directory = source
        if not source.is_dir():
            directory = Path(name) / "tables"
            write_tables(source, directory, progress)
        tables = Tables(directory, Path(name) / "spill")
        try:
            yield tables
        finally:
            tables.close()


def check_source(source: Path) -> None:
    """Whether there is something to ask. Raises OSError and `FormatError` as `open_tables` does."""
    if source.is_dir():
        _about(source)
    else:
        open_trace(source).close()


@contextmanager
def _errors(sql: str = "") -> Iterator[None]:
    """DuckDB's complaint in one line, with the columns there are of the tables that `sql` names."""
    import duckdb

    try:
        yield
    except duckdb.Error as error:
        text = next(filter(None, map(str.strip, str(error).split("\n"))))
        if isinstance(error, duckdb.BinderException):
            words = set(re.findall(r"\w+", sql.lower()))
            for table in sorted(words & COLUMNS.keys()) or COLUMNS:
                text += f"; {table} has {', '.join(COLUMNS[table])}"
        elif isinstance(error, duckdb.CatalogException | duckdb.PermissionException):
            text += f"; there are the tables {', '.join(COLUMNS)}"
        raise QueryError(text) from None


def _about(directory: Path) -> dict[str, Any]:
    with extra("export", "kvmtick query"):
        import pyarrow as pa
        from pyarrow import parquet

    what = f"{directory}: no tables of kvmtick: give a directory that report --parquet wrote"
    told: dict[str, Any] = {}
    for name in (TICKS, EVENTS):
        try:
            told = json.loads(parquet.read_metadata(directory / name).metadata[METADATA])
        except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
            raise FormatError(f"{what} ({name}: {error})") from None
    return told


def _literal(text: str) -> str:
    """A string in SQL."""
    return "'" + text.replace("'", "''") + "'"
