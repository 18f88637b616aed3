"""Traces that are made up record by record, and read where a file would be."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvmtick.trace.events import TRACEPOINTS, Event, Record
from kvmtick.trace.vms import VmInfo


class MadeTrace:
    """A trace of these records. It is what the file of the given name holds."""

    is_complete = False
    unknown = 3
    cut = ""
    size_bytes = 100
    position_bytes = 100

    def __init__(self, tasks: list[str], vms: list[VmInfo], batches: list[list[Record]]) -> None:
        self.tasks = tasks
        self.vms = vms
        self.events = frozenset(Event(record[1]) for batch in batches for record in batch)
        self.lost = 0
        self.is_closed = False
        self._batches = batches

    def batches(self) -> Iterator[list[Record]]:
        """One by one."""
        yield from self._batches

    def close(self) -> None:
        """Nobody has to."""
        self.is_closed = True


Make = Callable[[MadeTrace], Path]


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Make:
    """Gives a made trace a path that the exports read it by."""

    def put(trace: MadeTrace) -> Path:
        for module in ("tables", "perfetto"):
            monkeypatch.setattr(f"kvmtick.report.{module}.open_trace", lambda path: trace)
        return tmp_path / "made.ktrace"

    return put


def record(ts_ns: int, event: Event, task: int, **fields: int) -> Record:
    """A record by its fields' names; those not given are 0."""
    names = TRACEPOINTS[event].fields
    assert fields.keys() <= set(names)
    return (ts_ns, int(event), task, *(fields.get(name, 0) for name in names))
