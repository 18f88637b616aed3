"""A trace as two Parquet tables: `ticks` (one row a tick) and `events` (one row an event).

docs/tables.md tells what every column means. The file's metadata has one JSON object under the key
`kvmtick`: what is known of the trace and its VMs (`about`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from io import FileIO
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvmtick.report.extras import extra
from kvmtick.report.output import output_errors, replaced
from kvmtick.report.stream import Progress, Threads, hops, origin, stream, vcpu_of
from kvmtick.ticks.host import HostTicks, VmTicks
from kvmtick.ticks.source import HOPS, Source
from kvmtick.ticks.tick import Tick
from kvmtick.trace.events import (
    FUNCTION_AT,
    FUNCTIONS,
    HAS_FUNCTION,
    HEADER_FIELDS,
    IRQ_CONTEXT,
    TRACEPOINTS,
    Record,
)
from kvmtick.trace.ftrace import event_text
from kvmtick.trace.reading import Trace, open_trace

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["EVENTS", "METADATA", "TABLES", "TICKS", "about", "schemas", "write_tables"]

TICKS, EVENTS = "ticks.parquet", "events.parquet"
"""The files' names in their directory."""
METADATA = b"kvmtick"
"""The key of what the files say of their trace."""

TABLES: dict[str, list[tuple[str, str, bool]]] = {
    TICKS: [
        ("vm", "BIGINT", False),
        ("name", "VARCHAR", False),
        ("source", "VARCHAR", False),
        ("vcpu", "INTEGER", True),
        ("tick", "BIGINT", False),
        ("expiry_ns", "BIGINT", False),
        ("fired_ns", "BIGINT", False),
        ("period_ns", "BIGINT", True),
        ("work_ns", "BIGINT", True),
        ("accept_ns", "BIGINT", True),
        ("inject_ns", "BIGINT", True),
        ("eoi_ns", "BIGINT", True),
        ("path", "VARCHAR", True),
        ("vector", "INTEGER", True),
        ("arrival_vcpu", "INTEGER", True),
        ("verdict", "VARCHAR", False),
        ("place", "VARCHAR", True),
        ("detail", "VARCHAR", False),
        *((f"{hop}_ns", "BIGINT", True) for hop in HOPS),
    ],
    EVENTS: [
        ("ts_ns", "BIGINT", False),
        ("vm", "BIGINT", True),
        ("event", "VARCHAR", False),
        ("thread", "VARCHAR", False),
        ("tid", "INTEGER", False),
        ("in_irq", "BOOLEAN", False),
        ("vcpu", "INTEGER", True),
        ("function", "VARCHAR", True),
        ("fields", "MAP(VARCHAR, UBIGINT)", False),
        ("text", "VARCHAR", False),
    ],
}
"""Column, type in SQL, may it be null; by the files' names. docs/tables.md tells what they mean."""

_ROWS = 100_000
"""Rows of a row group: what is held in memory of each table."""

_FUNCTIONS = list(FUNCTIONS)
_NAMES = {int(event): tracepoint.name for event, tracepoint in TRACEPOINTS.items()}


def write_tables(source: Path, directory: Path, progress: Progress | None = None) -> None:
    """Write `ticks.parquet` and `events.parquet` of the trace `source` into `directory`.

    The directory is made if it is not there; what else is in it stays. Raises OSError and
    `FormatError` where the trace cannot be read, `HostError` where pyarrow is missing or the files
    cannot be written.
    """
    with extra("export", "a Parquet table"):
        import pyarrow.parquet  # noqa: F401
    trace = open_trace(source)
    try:
        with output_errors(directory, "give a directory that can be written to"):
            directory.mkdir(parents=True, exist_ok=True)
        with (
            replaced(directory / TICKS) as ticks,
            replaced(directory / EVENTS) as events,
        ):
            writer = _Tables(trace, ticks, events)
            try:
                host = stream(trace, writer, progress)
                writer.finish(about(source, host))
            except BaseException:
                writer.abandon()
                raise
    finally:
        trace.close()


def about(source: Path, host: HostTicks) -> dict[str, Any]:
    """What is known of a trace that was read, and of its VMs; for JSON."""
    trace = host.trace
    return {
        "file": source.name,
        "origin": origin(trace),
        "simulated": trace.is_complete,
        "start_ns": host.start_ns,
        "end_ns": host.end_ns,
        "events": host.records,
        "lost_events": host.lost,
        "unknown_lines": trace.unknown,
        "cut": trace.cut,
        "vms": [{"pid": vm.pid, "name": vm.name, "notes": vm.notes} for vm in host.vms],
    }


def schemas() -> dict[str, pa.Schema]:
    """The schemas of both tables, by the files' names."""
    import pyarrow as pa

    types = {
        "BIGINT": pa.int64(),
        "INTEGER": pa.int32(),
        "BOOLEAN": pa.bool_(),
        "VARCHAR": pa.dictionary(pa.int32(), pa.string()),
        "MAP(VARCHAR, UBIGINT)": pa.map_(pa.string(), pa.uint64()),
    }
    return {
        name: pa.schema(
            [
                pa.field(column, pa.string() if column == "text" else types[sql], may_be_null)
                for column, sql, may_be_null in columns
            ]
        )
        for name, columns in TABLES.items()
    }


class _Tables:
    """Takes events and lives, writes a row group when there are enough."""

    def __init__(self, trace: Trace, ticks: FileIO, events: FileIO) -> None:
        self._trace = trace
        self._ticks = _TickRows()
        self._events = _EventRows(trace)
        by_name = schemas()
        self._tick_file = _TableFile(ticks, by_name[TICKS])
        self._event_file = _TableFile(events, by_name[EVENTS])

    def events(
        self,
        records: Sequence[Record],
        owners: Sequence[VmTicks | None],
        by_tid: Mapping[int, VmTicks],
    ) -> None:
        """A batch of events."""
        self._events.add(records, owners)
        if len(self._events) >= _ROWS:
            self._event_file.write(self._events.take())

    def lives(self, vm: VmTicks, source: Source, ticks: list[Tick]) -> None:
        """Lives of one source."""
        for at in range(0, len(ticks), _ROWS):
            self._ticks.add(vm, source, ticks[at : at + _ROWS])
            if len(self._ticks) >= _ROWS:
                self._tick_file.write(self._ticks.take())

    def finish(self, told: dict[str, Any]) -> None:
        """Everything was read."""
        for rows, file in ((self._ticks, self._tick_file), (self._events, self._event_file)):
            if len(rows):
                file.write(rows.take())
            file.finish(told)

    def abandon(self) -> None:
        """The files will not be kept."""
        self._tick_file.abandon()
        self._event_file.abandon()


class _TableFile:
    """A Parquet file that grows by row groups."""

    def __init__(self, file: FileIO, schema: pa.Schema) -> None:
        from pyarrow import parquet

        self._schema = schema
        self._writer = parquet.ParquetWriter(file, schema, compression="zstd")

    def write(self, columns: list[Any]) -> None:
        """A row group; the columns in the schema's order."""
        import pyarrow as pa

        arrays = [
            column if isinstance(column, pa.Array) else pa.array(column, field.type)
            for column, field in zip(columns, self._schema, strict=True)
        ]
        table = pa.Table.from_arrays(arrays, schema=self._schema)
        self._writer.write_table(table, row_group_size=len(table))

    def finish(self, told: dict[str, Any]) -> None:
        """The last words of the file."""
        self._writer.add_key_value_metadata({METADATA: json.dumps(told)})
        self._writer.close()

    def abandon(self) -> None:
        """Write no more, not even when Python throws the writer away."""
        self._writer.is_open = False


class _TickRows:
    """Rows of the table `ticks`, a list a column."""

    def __init__(self) -> None:
        self._rows: list[tuple[Any, ...]] = []

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, vm: VmTicks, source: Source, ticks: list[Tick]) -> None:
        """Lives of one source."""
        owner = source.vcpu if source.name == "lapic" else None
        head = (vm.pid, vm.name, source.name, owner)
        self._rows += [
            (
                *head,
                tick.index,
                tick.expiry_ns,
                tick.fired_ns,
                tick.period_ns,
                tick.work_ns,
                tick.accept_ns,
                tick.inject_ns,
                tick.eoi_ns,
                tick.path,
                tick.vector,
                tick.vcpu,
                tick.verdict,
                tick.where,
                tick.detail,
                *hops(source, tick),
            )
            for tick in ticks
        ]

    def take(self) -> list[Any]:
        """The columns; the rows begin anew."""
        rows, self._rows = self._rows, []
        return list(zip(*rows, strict=True))


class _EventRows:
    """Rows of the table `events`."""

    def __init__(self, trace: Trace) -> None:
        self._threads = Threads(trace)
        self._records: list[Record] = []
        self._owners: list[VmTicks | None] = []

    def __len__(self) -> int:
        return len(self._records)

    def add(self, records: Sequence[Record], owners: Sequence[VmTicks | None]) -> None:
        """A batch of events."""
        self._records += records
        self._owners += owners

    def take(self) -> list[Any]:
        """The columns; the rows begin anew."""
        records, self._records = self._records, []
        owners, self._owners = self._owners, []
        threads = self._threads
        of_task = {task: threads[task] for task in {record[2] for record in records}}
        tasks = [of_task[record[2]] for record in records]
        pids = {vm: None if vm is None else vm.pid for vm in set(owners)}
        return [
            list(map(itemgetter(0), records)),
            [pids[vm] for vm in owners],
            _words(list(map(itemgetter(1), records)), _NAMES),
            [thread.comm for thread in tasks],
            [thread.tid for thread in tasks],
            [record[2] & IRQ_CONTEXT != 0 for record in records],
            list(map(vcpu_of, records, owners)),
            [
                _FUNCTIONS[record[FUNCTION_AT]] if record[1] in HAS_FUNCTION else None
                for record in records
            ],
            _field_maps(records),
            list(map(event_text, records)),
        ]


def _words(numbers: list[int], words: dict[int, str]) -> pa.Array:
    """Words by number, as a dictionary array."""
    import pyarrow as pa

    table = [words.get(number, "") for number in range(max(words) + 1)]
    indices = pa.array(numbers, pa.int32())
    return pa.DictionaryArray.from_arrays(indices, pa.array(table, pa.string()))


_FIELD_NAMES = {
    int(event): tuple(name for name in tracepoint.fields if name != "function")
    for event, tracepoint in TRACEPOINTS.items()
}
_ALL_FIELDS = sorted({name for names in _FIELD_NAMES.values() for name in names})
_FIELD_NUMBERS = {
    event: tuple(map(_ALL_FIELDS.index, names)) for event, names in _FIELD_NAMES.items()
}


def _field_maps(records: Sequence[Record]) -> pa.Array:
    """The fields of each record by name, without the function; null for -1."""
    import pyarrow as pa

    numbers = [_FIELD_NUMBERS[record[1]] for record in records]
    offsets = [0]
    end = 0
    for each in numbers:
        end += len(each)
        offsets.append(end)
    keys = pa.DictionaryArray.from_arrays(
        pa.array(list(chain.from_iterable(numbers)), pa.int32()), pa.array(_ALL_FIELDS)
    ).cast(pa.string())
    fields = chain.from_iterable(
        record[HEADER_FIELDS:]
        if record[1] not in HAS_FUNCTION
        else (record[HEADER_FIELDS], *record[FUNCTION_AT + 1 :])
        for record in records
    )
    values = [None if value < 0 else value for value in fields]
    return pa.MapArray.from_arrays(offsets, keys, pa.array(values, pa.uint64()))
