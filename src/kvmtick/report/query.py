"""SQL over a trace's tables, by DuckDB: `ticks` and `events` (`kvmtick.report.tables`), `vms` and
`trace`.

A question can read these and nothing else: one SELECT, no file, no network, no extension.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvmtick.report.extras import extra
from kvmtick.report.stream import Progress
from kvmtick.report.tables import EVENTS, METADATA, TICKS, write_tables
from kvmtick.trace.formats import FormatError

if TYPE_CHECKING:
    import duckdb

__all__ = ["Answer", "QueryError", "Tables", "open_tables"]

_CHUNK_ROWS = 10_000


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
        run = self._connection.execute
        run("CREATE TABLE vms (vm BIGINT, name VARCHAR, notes VARCHAR[])")
        for vm in told.pop("vms"):
            run("INSERT INTO vms VALUES (?, ?, ?)", [vm["pid"], vm["name"], vm["notes"]])
        run(
            "CREATE TABLE trace (file VARCHAR, origin VARCHAR, simulated BOOLEAN, start_ns BIGINT,"
            " end_ns BIGINT, events BIGINT, lost_events BIGINT, unknown_lines BIGINT, cut VARCHAR)"
        )
        run("INSERT INTO trace VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", list(told.values()))

    def ask(self, sql: str) -> Answer:
        """Answer one SELECT. Raises `QueryError`."""
        import duckdb

        with _errors(self.columns):
            statements = self._connection.extract_statements(sql)
            if len(statements) != 1:
                raise QueryError(f"{len(statements)} statements: give one SELECT")
            if statements[0].type != duckdb.StatementType.SELECT:
                kind = statements[0].type.name
                raise QueryError(f"{kind} is no question: give a SELECT; nothing can be changed")
            answer = self._connection.execute(statements[0])
            description = answer.description
            assert description is not None
            return Answer([column[0] for column in description], answer)

    def columns(self) -> dict[str, list[tuple[str, str]]]:
        """Name and type of every column, by table."""
        rows = self._connection.execute(
            "SELECT table_name, column_name, data_type FROM duckdb_columns() WHERE NOT internal"
            " ORDER BY table_name NOT IN ('ticks', 'events'), table_name DESC, column_index"
        ).fetchall()
        tables: dict[str, list[tuple[str, str]]] = {}
        for table, column, type_ in rows:
            tables.setdefault(table, []).append((column, type_))
        return tables

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


@contextmanager
def _errors(columns: Any = None) -> Iterator[None]:
    """DuckDB's complaint in one line; where a column is not known, with those there are."""
    import duckdb

    try:
        yield
    except duckdb.Error as error:
        said = [line.strip() for line in str(error).split("\n") if line.strip()]
        text = said[0]
        if columns is not None and isinstance(error, duckdb.BinderException):
            text += "; " + "; ".join(
                f"{table} has {', '.join(name for name, _ in each)}"
                for table, each in columns().items()
            )
        elif columns is not None and isinstance(error, duckdb.CatalogException):
            text += "; tables: " + ", ".join(columns())
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
