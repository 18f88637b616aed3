"""Records that were encoded as pages are read as the same records."""

import io
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmtick import guests
from kvmtick.kvm.model import ModelVm
from kvmtick.ticks.host import HostTicks
from kvmtick.trace.encode import MODEL_EVENTS, KtraceEncoder
from kvmtick.trace.events import IRQ_CONTEXT, TRACEPOINTS, Event, Function, Record
from kvmtick.trace.ktrace import KtraceReader
from kvmtick.trace.reading import open_trace
from kvmtick.trace.recorder import Entry
from kvmtick.trace.vms import VmInfo

TASKS = [
    "<idle>-0",
    "kvmtick-1000",
    "kvm-pit/1000-1001",
    "CPU 0/KVM-1002",
    "CPU 12/KVM-1003",
    "<...>-7",
    "<idle>-0",
    "a-b-c-99",
    "<idle>-0",
]
UNSIGNED = {"hrtimer", "work", "worker", "e", "rip", "guest_rip", "info1", "intr_info", "val"}
UNSIGNED |= {"gpa", "address", "data", "inhibits"}


def fields(event: Event) -> st.SearchStrategy[tuple[int, ...]]:
    """Any of an event, as far as 64 bits go."""
    signed = st.integers(-(1 << 63), (1 << 63) - 1) | st.sampled_from([-1, 0, 1])
    unsigned = st.integers(0, (1 << 64) - 1) | st.sampled_from([0, (1 << 64) - 1])
    by_name = {"function": st.sampled_from([int(each) for each in Function])}
    return st.tuples(
        *(
            by_name.get(name, unsigned if name in UNSIGNED else signed)
            for name in TRACEPOINTS[event].fields
        )
    )


tasks = st.builds(
    lambda task, flag: task | flag,
    st.integers(0, len(TASKS) - 1),
    st.sampled_from([0, IRQ_CONTEXT]),
)
events = st.sampled_from(list(Event)).flatmap(
    lambda event: st.tuples(st.just(int(event)), tasks, fields(event))
)
gaps = st.sampled_from([0, 0, 1, 500_000, (1 << 27) - 1, 1 << 27, 1 << 45])


def stored(records: list[Record], file: Path, batch: int = 1_000) -> KtraceReader:
    """A reader of the records."""
    with file.open("wb") as out:
        encoder = KtraceEncoder(out, TASKS, VmInfo(1000, "a guest", reinject=True), events=Event)
        for at in range(0, len(records), batch):
            encoder(records[at : at + batch])
        encoder.end()
    trace = open_trace(file)
    assert isinstance(trace, KtraceReader)
    return trace


def named(records: list[Record], names: list[str]) -> list[object]:
    """Records with a task's name instead of its index; idle threads by their order."""
    idle = [index for index, name in enumerate(names) if name == "<idle>-0"]
    labels = [f"{name} {idle.index(at)}" if at in idle else name for at, name in enumerate(names)]
    return [
        (r[0], r[1], labels[r[2] & ~IRQ_CONTEXT], bool(r[2] & IRQ_CONTEXT), *r[3:]) for r in records
    ]


@settings(max_examples=60, deadline=None)
@given(drawn=st.lists(st.tuples(gaps, events), max_size=200), start=st.integers(0, 1 << 60))
def test_any_records_come_back(
    tmp_path_factory: pytest.TempPathFactory,
    drawn: list[tuple[int, tuple[int, int, tuple[int, ...]]]],
    start: int,
) -> None:
    # Idle threads are told apart by their order: they come back in the order they are used.
    records: list[Record] = [(start, int(Event.HRTIMER_CANCEL), at, 0) for at in (0, 6, 8)]
    now_ns = start
    for gap_ns, (event, task, values) in drawn:
        now_ns += gap_ns
        records.append((now_ns, event, task, *values))
    with stored(records, tmp_path_factory.getbasetemp() / "any.ktrace", batch=70) as trace:
        read = [record for batch in trace.batches() for record in batch]
        assert named(read, trace.tasks) == named(records, TASKS)
        assert (trace.unknown, trace.cut, trace.is_complete) == (0, "", True)
        lost = sum(max(1, record[4]) for record in records if record[1] == Event.LOST_EVENTS)
        assert trace.lost == lost


in_ring = st.sampled_from(sorted(MODEL_EVENTS - {Event.LOST_EVENTS})).flatmap(
    lambda event: st.tuples(st.just(int(event)), tasks, fields(event))
)


def entry_of(record: Record) -> Entry:
    """As a recorder has it: what its event has not is left over."""
    entry = Entry()
    entry.ts_ns, entry.event, entry.task, *values = record
    rest = [-7] * (5 - len(values))
    entry.a, entry.b, entry.c, entry.d, entry.e = *values, *rest
    return entry


@settings(max_examples=60, deadline=None)
@given(
    drawn=st.lists(st.tuples(gaps, in_ring), max_size=200),
    start=st.integers(0, 1 << 60),
    cut=st.integers(0, 200),
)
def test_a_ring_s_entries_are_written_as_the_same_records_are(
    drawn: list[tuple[int, tuple[int, int, tuple[int, ...]]]], start: int, cut: int
) -> None:
    records: list[Record] = []
    now_ns = start
    for gap_ns, (event, task, values) in drawn:
        now_ns += gap_ns
        records.append((now_ns, event, task, *values))
    of_tuples, of_ring = io.BytesIO(), io.BytesIO()
    encoder = KtraceEncoder(of_tuples, TASKS, VmInfo(1000, "a guest"))
    encoder(records)
    encoder.end()
    encoder = KtraceEncoder(of_ring, TASKS, VmInfo(1000, "a guest"))
    entries = [Entry(), *map(entry_of, records), Entry()]
    middle = 1 + min(cut, len(records))
    for begin, end in ((1, middle), (middle, len(entries) - 1)):
        encoder.take(entries, begin, end)
    encoder.end()
    assert of_ring.getvalue() == of_tuples.getvalue()


def test_what_is_told_of_the_vm(tmp_path: Path) -> None:
    record = (5, int(Event.KVM_SET_IRQ), 3, 0, 1, 2)
    with stored([record], tmp_path / "a.ktrace") as trace:
        assert list(trace.batches())[-1] == [(5, int(Event.KVM_SET_IRQ), 3, 0, 1, 2)]
        (vm,) = trace.vms
    assert vm == VmInfo(
        1000,
        "a guest",
        {
            1000: "kvmtick",
            1001: "kvm-pit/1000",
            1002: "CPU 0/KVM",
            1003: "CPU 12/KVM",
            99: "a-b-c",
        },
        {1002: 0, 1003: 12},
        True,
    )


def test_many_records_fill_pages_and_are_marked(tmp_path: Path) -> None:
    records: list[Record] = [
        (n * 10, int(Event.KVM_PIO), 1, 1, 0x20, 1, 1, n) for n in range(10_000)
    ]
    with stored(records, tmp_path / "a.ktrace") as trace:
        batches = list(trace.batches())
    assert [record[7] for batch in batches for record in batch] == list(range(10_000))
    assert len(batches) > 3
    assert (tmp_path / "a.ktrace").stat().st_size < 10_000 * 56


def test_a_field_that_is_too_large_is_told() -> None:
    encoder = KtraceEncoder(io.BytesIO(), TASKS, VmInfo(1, ""))
    with pytest.raises(ValueError, match="too large"):
        encoder([(1, int(Event.KVM_MMIO), 0, 1, 2, 3, 1 << 64)])


@pytest.mark.parametrize("name", sorted(guests.names()))
def test_every_guest_s_run_is_judged_alike_from_its_recording(tmp_path: Path, name: str) -> None:
    path = tmp_path / "run.ktrace"
    written: list[Record] = []
    with path.open("wb") as file:
        vm = ModelVm(detail=True)
        try:
            recorder = vm.machine.recorder
            encoder = KtraceEncoder(file, recorder.tasks, VmInfo(1000, name))
            recorder.add_consumer(written.extend)
            recorder.add_entry_consumer(encoder)
            guest = guests.load(name, ticks=4)
            vm.prepare(guest.needs)
            vm.load(guest)
            run = vm.run(for_ns=30_000_000)
            recorder.flush()
            names = list(recorder.tasks)
        finally:
            vm.close()
        encoder.end()
    with open_trace(path) as trace:
        records = [record for batch in trace.batches() for record in batch]
        assert trace.events == MODEL_EVENTS - {Event.LOST_EVENTS}
        assert named(records, trace.tasks)[: len(written)] == named(written, names)
    with open_trace(path) as trace:
        ticks = HostTicks(trace)
        ticks.read()
    (vm_ticks,) = ticks.vms
    assert run.ticks is not None
    assert [each.summary() for each in vm_ticks.assembler.reports()] == [
        each.summary() for each in run.sources
    ]
