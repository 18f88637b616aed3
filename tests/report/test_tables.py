"""The Parquet tables: every tick and every event once, as the report counts them."""

import json
import re
import resource
from pathlib import Path
from typing import Any

import pytest
from made import MadeTrace, Make, make, record
from recordings import GUESTS, RUNS, write_recording, write_trace

from kvmtick.abi.errors import HostError
from kvmtick.report import tables
from kvmtick.report.query import COLUMNS
from kvmtick.report.tables import EVENTS, METADATA, TICKS, write_tables
from kvmtick.ticks.histogram import Histogram
from kvmtick.ticks.host import HostTicks
from kvmtick.ticks.source import HOPS
from kvmtick.ticks.verdict import Verdict
from kvmtick.trace.events import IRQ_CONTEXT, Event, Record
from kvmtick.trace.formats import FormatError
from kvmtick.trace.ftrace import event_name, event_text
from kvmtick.trace.reading import open_trace
from kvmtick.trace.vms import VmInfo

parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")

__all__ = ["make"]

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "tables.md"


@pytest.fixture(params=(*GUESTS, *RUNS))
def recording(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A recording of a guest, on the kernel or simulated."""
    return write_trace(tmp_path / "t.ktrace", request.param)


def rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a Parquet file."""
    found: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
    return found


def read(path: Path) -> tuple[HostTicks, list[Record], list[str]]:
    """The ticks of a trace, its records, its tasks."""
    records: list[Record] = []
    trace = open_trace(path)
    host = HostTicks(trace)
    for batch in trace.batches():
        records += batch
        host.take(batch)
    host.settle()
    trace.close()
    return host, records, trace.tasks


def test_ticks_are_those_of_the_report(recording: Path, tmp_path: Path) -> None:
    write_tables(recording, tmp_path / "out")
    found = rows(tmp_path / "out" / TICKS)
    host, _, _ = read(recording)
    expired = 0
    for vm in host.vms:
        for report in vm.assembler.reports():
            owner = report.vcpu if report.source == "lapic" else None
            own = [row for row in found if (row["source"], row["vcpu"]) == (report.source, owner)]
            expired += report.expired
            assert [row["tick"] for row in own] == list(range(1, report.expired + 1))
            assert [row["expiry_ns"] for row in own] == [tick.expiry_ns for tick in report]
            for verdict in Verdict:
                named = [row for row in own if row["verdict"] == verdict.value]
                assert len(named) == report.count(verdict)
            for hop in HOPS:
                histogram = Histogram()
                for row in own:
                    if row[f"{hop}_ns"] is not None:
                        histogram.add([row[f"{hop}_ns"]])
                assert histogram.summary() == report.latency_ns[hop], hop
    assert len(found) == expired > 0


def test_every_event_is_there_once(recording: Path, tmp_path: Path) -> None:
    write_tables(recording, tmp_path / "out")
    found = rows(tmp_path / "out" / EVENTS)
    _, records, tasks = read(recording)
    assert len(found) == len(records) > 0
    for row, event in zip(found, records, strict=True):
        thread, _, tid = tasks[event[2] & ~IRQ_CONTEXT].rpartition("-")
        assert (row["ts_ns"], row["event"]) == (event[0], event_name(event))
        assert row["text"] == event_text(event)
        assert (row["thread"], row["tid"]) == (thread, int(tid))
        assert row["in_irq"] == bool(event[2] & IRQ_CONTEXT)


def test_a_text_gives_the_same_ticks(tmp_path: Path) -> None:
    run = RUNS[0]
    for suffix in ("ktrace", "txt"):
        write_tables(write_trace(tmp_path / f"t.{suffix}", run), tmp_path / suffix)
    told = ("vm", "source", "tick", "verdict", "path", "vector", "arrival_vcpu")
    of_recording, of_text = (
        [[row[name] for name in told] for row in rows(tmp_path / suffix / TICKS)]
        for suffix in ("ktrace", "txt")
    )
    assert of_text == of_recording
    assert len(rows(tmp_path / "txt" / EVENTS)) == len(rows(tmp_path / "ktrace" / EVENTS))


def test_other_vms_events_are_nobodys(tmp_path: Path) -> None:
    write_tables(write_recording(tmp_path / "t.ktrace", "tick-mask"), tmp_path)
    found = rows(tmp_path / EVENTS)
    # The recording's own worker is kvm-pit/19540-19746; another VM's timer ticks in it.
    timers = {(row["vm"], dict(row["fields"])["hrtimer"]) for row in found if is_pit_start(row)}
    assert {vm for vm, _ in timers} == {19540, None}
    assert len({timer for _, timer in timers}) == len(timers)


def is_pit_start(row: dict[str, Any]) -> bool:
    """A PIT's timer is started."""
    return (row["event"], row["function"]) == ("hrtimer_start", "pit_timer_fn")


def test_fields_by_name_and_null_for_minus_one(tmp_path: Path) -> None:
    write_tables(write_recording(tmp_path / "t.ktrace", "tick-pic"), tmp_path)
    found = rows(tmp_path / EVENTS)
    (first, *_) = (row for row in found if row["event"] == "kvm_eoi")
    assert dict(first["fields"]) == {"apicid": 0, "vector": None}
    assert first["text"] == "apicid 0 vector -1"
    assert first["vcpu"] == 0
    (first, *_) = (row for row in found if row["event"] == "hrtimer_expire_entry")
    assert first["function"] == "apic_timer_fn"
    assert set(dict(first["fields"])) == {"hrtimer", "now"}
    assert dict(first["fields"])["hrtimer"] >> 63


def test_row_groups_do_not_matter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = write_recording(tmp_path / "t.ktrace", "tick-if0")
    write_tables(source, tmp_path / "one")
    monkeypatch.setattr(tables, "_ROWS", 2)
    write_tables(source, tmp_path / "many")
    assert parquet.ParquetFile(tmp_path / "many" / TICKS).num_row_groups > 1
    for name in (TICKS, EVENTS):
        assert rows(tmp_path / "many" / name) == rows(tmp_path / "one" / name)


def test_two_vms_the_scheduler_and_a_gap(make: Make, tmp_path: Path) -> None:
    vms = [
        VmInfo(10, "a", {10: "qemu", 11: "CPU 0/KVM", 12: "kvm-pit/10"}, {11: 0}),
        VmInfo(20, "b", {20: "qemu", 21: "vcpu"}, {21: 3}),
    ]
    tasks = ["<idle>-0", "CPU 0/KVM-11", "kvm-pit/10-12", "vcpu-21", "qemu-20", "qemu-10", "cc-99"]
    events = [
        record(1, Event.KVM_PIO, 1, rw=1, port=0x43, size=1, count=1, val=0x34),
        record(2, Event.KVM_PIO, 3, rw=1, port=0x43, size=1, count=1, val=0x34),
        record(3, Event.SCHED_SWITCH, 0, prev_pid=0, prev_state=0, next_pid=12, cpu=1),
        record(4, Event.SCHED_SWITCH, 2, prev_pid=12, prev_state=1, next_pid=21, cpu=1),
        record(5, Event.SCHED_WAKING, 0 | IRQ_CONTEXT, pid=21, target_cpu=0),
        record(6, Event.LOST_EVENTS, 0, cpu=1, count=-1),
        record(7, Event.SCHED_SWITCH, 6, prev_pid=99, prev_state=1, next_pid=98, cpu=1),
    ]
    trace = MadeTrace(tasks, vms, [events[:3], events[3:]])
    write_tables(make(trace), tmp_path)
    assert trace.is_closed
    found = rows(tmp_path / EVENTS)
    assert [row["vm"] for row in found] == [10, 20, 10, 10, 20, None, None]
    assert [row["vcpu"] for row in found] == [0, 3, None, None, None, None, None]
    assert dict(found[5]["fields"]) == {"cpu": 1, "count": None}
    told = json.loads(parquet.read_metadata(tmp_path / EVENTS).metadata[METADATA])
    assert told["lost_events"] == 1
    assert told["unknown_lines"] == 3
    assert (told["start_ns"], told["end_ns"], told["events"]) == (1, 7, 7)
    assert [(vm["pid"], vm["name"]) for vm in told["vms"]] == [(10, "a"), (20, "b")]


def test_an_empty_trace_gives_empty_tables(make: Make, tmp_path: Path) -> None:
    write_tables(make(MadeTrace([], [], [])), tmp_path)
    for name in (TICKS, EVENTS):
        assert rows(tmp_path / name) == []


def documented(table: str) -> list[tuple[str, str, bool]]:
    """Column, type, may it be null, of a table in the page."""
    text = DOCUMENT.read_text(encoding="utf-8")
    section = text.partition(f"\n## {table}\n")[2].partition("\n## ")[0]
    found = re.findall(r"^\| `(\w+)` \| ([^|]+?) \| ([^|]+?) \|", section, re.MULTILINE)
    return [(column, type_, null != "no") for column, type_, null in found]


def test_the_page_names_every_column() -> None:
    for name, columns in tables.TABLES.items():
        assert documented(Path(name).stem) == columns
    for table, types in COLUMNS.items():
        assert [(column, type_) for column, type_, _ in documented(table)] == list(types.items())


def test_the_schema_is_the_one_documented(tmp_path: Path) -> None:
    write_tables(write_recording(tmp_path / "t.ktrace", "tick-pic"), tmp_path)
    for name, columns in tables.TABLES.items():
        schema = parquet.read_schema(tmp_path / name)
        assert [(f.name, f.nullable) for f in schema] == [(c, null) for c, _, null in columns]


# What can go wrong.


def test_other_files_stay_and_ours_are_replaced(tmp_path: Path) -> None:
    source = write_recording(tmp_path / "t.ktrace", "tick-pic")
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("stay")
    (out / TICKS).write_text("old")
    write_tables(source, out)
    assert sorted(path.name for path in out.iterdir()) == [EVENTS, "mine.txt", TICKS]
    assert (out / "mine.txt").read_text() == "stay"
    assert len(rows(out / TICKS)) == 3


def test_a_directory_that_cannot_be(tmp_path: Path) -> None:
    source = write_recording(tmp_path / "t.ktrace", "tick-pic")
    with pytest.raises(HostError, match="give a directory") as caught:
        write_tables(source, source)
    assert str(source) in str(caught.value)
    (tmp_path / TICKS).mkdir()
    with pytest.raises(HostError, match="it is a directory; give a writable file"):
        write_tables(source, tmp_path)


def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    source = write_recording(tmp_path / "t.ktrace", "tick-if0")
    out = tmp_path / "out"
    write_tables(source, out)
    before = (out / TICKS).read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(HostError) as caught:
            write_tables(source, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "File too large" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert (out / TICKS).read_bytes() == before
    assert sorted(path.name for path in out.iterdir()) == [EVENTS, TICKS]


def test_a_file_that_is_no_trace_makes_nothing(tmp_path: Path) -> None:
    source = tmp_path / "t.txt"
    source.write_bytes(b"\0\1\2")
    with pytest.raises(FormatError):
        write_tables(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
