"""The Perfetto trace, read back: it is as Perfetto wants one, and tells what the trace tells.

What Perfetto wants: its "Writing TrackEvent Protos Synthetically".
"""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from made import MadeTrace, Make, make, record
from recordings import GUESTS, RUNS, write_recording, write_trace

from kvmtick.abi.errors import HostError
from kvmtick.report.perfetto import write_perfetto
from kvmtick.report.track_events import Lanes, TrackEvents
from kvmtick.ticks.host import HostTicks
from kvmtick.ticks.verdict import Verdict
from kvmtick.trace.events import IRQ_CONTEXT, Event
from kvmtick.trace.formats import FormatError
from kvmtick.trace.reading import open_trace
from kvmtick.trace.vms import VmInfo

protos = pytest.importorskip(
    "perfetto.protos.perfetto.trace.perfetto_trace_pb2", reason="perfetto is not installed"
)

__all__ = ["make"]

BEGIN, END, INSTANT = 1, 2, 3


@dataclass
class Drawn:
    """An event of a Perfetto trace."""

    ts_ns: int
    kind: int
    track: int
    name: str
    told: dict[str, Any]
    flow: int = 0
    ends: bool = False


@dataclass
class Picture:
    """A Perfetto trace, checked while it is read."""

    tracks: dict[int, Any] = field(default_factory=dict)
    events: list[Drawn] = field(default_factory=list)

    def name(self, track: int) -> str:
        """A track's name, with those above it."""
        descriptor = self.tracks[track]
        if descriptor.HasField("process"):
            return f"{descriptor.process.process_name} {descriptor.process.pid}"
        thread = descriptor.thread
        own = descriptor.name or f"{thread.thread_name} {thread.tid}"
        parent = descriptor.parent_uuid
        return f"{self.name(parent)} / {own}" if parent else str(own)

    def named(self, track: str) -> list[Drawn]:
        """The events of the tracks of this name, in the order of the file."""
        return [event for event in self.events if self.name(event.track) == track]


TABLES = ("event_names", "debug_annotation_names", "debug_annotation_string_values")


def look(path: Path) -> Picture:
    """Read a Perfetto trace, and see that a reader of one packet after the other understands it."""
    trace = protos.Trace()
    trace.ParseFromString(path.read_bytes())
    picture = Picture()
    words: dict[tuple[str, int], str] = {}
    for at, packet in enumerate(trace.packet):
        assert packet.trusted_packet_sequence_id == 1
        assert packet.sequence_flags == (3 if at == 0 else 2)
        assert packet.first_packet_on_sequence == (at == 0)
        for table in TABLES:
            for entry in getattr(packet.interned_data, table):
                text = entry.str.decode() if table == TABLES[2] else entry.name
                assert entry.iid > 0
                assert (table, entry.iid) not in words
                assert text not in [have for (of, _), have in words.items() if of == table]
                words[table, entry.iid] = text
        if packet.HasField("track_descriptor"):
            descriptor = packet.track_descriptor
            assert descriptor.uuid > 0
            assert descriptor.uuid not in picture.tracks
            assert not descriptor.parent_uuid or descriptor.parent_uuid in picture.tracks
            picture.tracks[descriptor.uuid] = descriptor
        elif packet.HasField("track_event"):
            picture.events.append(drawn(packet, words))
            assert picture.events[-1].track in picture.tracks
    nest(picture)
    return picture


def drawn(packet: Any, words: dict[tuple[str, int], str]) -> Drawn:
    """An event, with its words."""
    event = packet.track_event
    told: dict[str, Any] = {}
    for note in event.debug_annotations:
        kind = note.WhichOneof("value")
        value = getattr(note, kind)
        key = words[TABLES[1], note.name_iid]
        assert key not in told
        told[key] = words[TABLES[2], value] if kind == "string_value_iid" else value
    name = words[TABLES[0], event.name_iid] if event.type != END else ""
    flows = [*event.flow_ids, *event.terminating_flow_ids]
    assert len(flows) <= 1
    ends = bool(event.terminating_flow_ids)
    return Drawn(packet.timestamp, event.type, event.track_uuid, name, told, sum(flows), ends)


def nest(picture: Picture) -> None:
    """On every track times ascend, every slice that begins ends, and none overlap."""
    depth: Counter[int] = Counter()
    last: dict[int, int] = {}
    for event in picture.events:
        assert event.ts_ns >= last.get(event.track, 0), picture.name(event.track)
        last[event.track] = event.ts_ns
        depth[event.track] += {BEGIN: 1, END: -1, INSTANT: 0}[event.kind]
        assert depth[event.track] in (0, 1), picture.name(event.track)
    assert not any(depth.values())


def drawn_of(source: Path) -> Picture:
    """What is drawn of a trace."""
    out = source.with_suffix(".pftrace")
    write_perfetto(source, out)
    return look(out)


def ticks_of(path: Path) -> HostTicks:
    """The ticks of a trace."""
    trace = open_trace(path)
    host = HostTicks(trace)
    host.read()
    trace.close()
    return host


@pytest.fixture(params=(*GUESTS, *RUNS))
def recording(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A recording of a guest, on the kernel or simulated."""
    return write_trace(tmp_path / "t.ktrace", request.param)


def test_every_event_is_drawn_once(recording: Path) -> None:
    picture = drawn_of(recording)
    # What is drawn of an event tells its thread; nothing else does.
    times = sorted(e.ts_ns for e in picture.events if {"thread", "interrupted"} & e.told.keys())
    trace = open_trace(recording)
    assert times == [record[0] for batch in trace.batches() for record in batch]
    trace.close()


def test_ticks_are_named_by_their_verdict(recording: Path) -> None:
    picture = drawn_of(recording)
    (vm,) = ticks_of(recording).vms
    for report in vm.assembler.reports():
        timer = "PIT" if report.source == "pit" else f"LAPIC {report.vcpu} timer"
        slices = picture.named(f"{vm.name} {vm.pid} / {timer} ticks")
        begun = sorted((e for e in slices if e.kind == BEGIN), key=lambda e: e.told["tick"])
        assert [e.ts_ns for e in begun] == [tick.expiry_ns for tick in report]
        assert [e.name for e in begun] == [tick.verdict.value for tick in report]
        counts = Counter(event.name for event in begun)
        assert counts == {v.value: report.count(v) for v in Verdict if report.count(v)}


def test_an_arrow_leads_through_every_tick(recording: Path) -> None:
    picture = drawn_of(recording)
    flows: dict[int, list[Drawn]] = {}
    for event in picture.events:
        if event.flow:
            flows.setdefault(event.flow, []).append(event)
    reached = 0
    for steps in flows.values():
        assert [step.ends for step in steps] == [False] * (len(steps) - 1) + [True]
        assert [step.ts_ns for step in steps] == sorted(step.ts_ns for step in steps)
        assert len({step.told["tick"] for step in steps}) == 1
        reached += steps[-1].name == "EOI"
    (vm,) = ticks_of(recording).vms
    lives = [(s.name, tick) for s in vm.assembler.sources() for tick in s.lives]
    assert reached == sum(tick.eoi_ns is not None for _, tick in lives)
    # A tick that came nowhere has no arrow; of a LAPIC timer there is no pulse.
    somewhere = [t for name, t in lives if t.accept_ns or (name == "pit" and t.work_ns)]
    assert len(flows) == len(somewhere) > 0


def test_the_way_of_a_tick(tmp_path: Path) -> None:
    picture = drawn_of(write_recording(tmp_path / "t.ktrace", "tick-ioapic"))
    second = next(event.flow for event in picture.events if event.told.get("tick") == 2)
    assert [
        (picture.name(event.track).removeprefix("tick-ioapic 19540 / "), event.name)
        for event in picture.events
        if event.flow == second
    ] == [
        ("PIT ticks", "delivered"),
        ("<...> 19563 / PIT ticks", "pulse"),
        ("IOAPIC / PIT ticks", "message"),
        ("LAPIC 0 / PIT ticks", "requested"),
        ("vCPU 0 / PIT ticks", "injected"),
        ("LAPIC 0 / PIT ticks", "in service"),
        ("vCPU 0 / PIT ticks", "EOI"),
    ]


def test_a_thread_belongs_to_its_process(recording: Path) -> None:
    picture = drawn_of(recording)
    threads = [d for d in picture.tracks.values() if d.HasField("thread")]
    processes = [d for d in picture.tracks.values() if d.HasField("process")]
    (vm,) = ticks_of(recording).vms
    assert [(d.process.pid, d.process.process_name) for d in processes] == [(vm.pid, vm.name)]
    assert {d.thread.pid for d in threads} == {vm.pid}
    assert {d.thread.tid for d in threads} >= {tid_of(vm.tasks[task]) for task in vm.vcpus}


def tid_of(task: str) -> int:
    """The number of a thread."""
    return int(task.rpartition("-")[2])


def test_the_guest_the_scheduler_and_what_is_cut_off(make: Make) -> None:
    vms = [
        VmInfo(10, "a", {11: "CPU 0/KVM", 12: "kvm-pit/10"}, {11: 0}),
        VmInfo(20, "b", {21: "CPU 3/KVM"}, {21: 3}),
    ]
    tasks = ["<idle>-0", "CPU 0/KVM-11", "kvm-pit/10-12", "CPU 3/KVM-21"]
    entry = {"rip": 0x8000, "intr_info": 0}
    left = {"exit_reason": 12, "guest_rip": 0x8001, "info1": 0, "intr_info": 0}
    work = {"work": 1 << 63, "function": 1}
    events = [
        record(1, Event.KVM_EXIT, 1, vcpu_id=0, **left),
        record(2, Event.KVM_ENTRY, 1, vcpu_id=0, **entry),
        record(3, Event.SCHED_SWITCH, 0, prev_pid=0, prev_state=0, next_pid=12, cpu=1),
        record(4, Event.WORK_END, 2, **work),
        record(5, Event.SCHED_SWITCH, 2, prev_pid=12, prev_state=1, next_pid=21, cpu=1),
        record(6, Event.KVM_EXIT, 1, vcpu_id=0, **left),
        record(7, Event.KVM_ENTRY, 1, vcpu_id=0, **entry),
        record(8, Event.KVM_ENTRY, 1, vcpu_id=0, **entry),
        record(9, Event.SCHED_WAKING, 0 | IRQ_CONTEXT, pid=12, target_cpu=0),
        record(10, Event.LOST_EVENTS, 0, cpu=1, count=-1),
        record(11, Event.KVM_VCPU_WAKEUP, 3, ns=5, waited=1, valid=1),
    ]
    picture = drawn_of(make(MadeTrace(tasks, vms, [events])))

    def shape(track: str) -> list[tuple[int, int, str]]:
        return [(event.ts_ns, event.kind, event.name) for event in picture.named(track)]

    assert shape("a 10 / vCPU 0") == [
        (1, INSTANT, "kvm_exit"),
        (2, BEGIN, "guest"),
        (6, END, ""),
        (7, BEGIN, "guest"),
        (8, END, ""),
        (8, BEGIN, "guest"),
        (11, END, ""),
    ]
    assert shape("a 10 / kvm-pit/10 12 / running") == [(3, BEGIN, "running"), (5, END, "")]
    assert shape("b 20 / CPU 3/KVM 21 / running") == [(5, BEGIN, "running"), (11, END, "")]
    assert shape("a 10 / kvm-pit/10 12") == [
        (4, INSTANT, "sched_kthread_work_execute_end"),
        (9, INSTANT, "sched_waking"),
    ]
    assert shape("events of no VM") == [(10, INSTANT, "lost_events")]
    assert shape("b 20 / vCPU 3") == [(11, INSTANT, "kvm_vcpu_wakeup")]
    (lost,) = picture.named("events of no VM")
    assert lost.told["count"] == -1
    assert picture.named("a 10 / kvm-pit/10 12")[0].told["work"] == 1 << 63
    assert "cut" in picture.named("a 10 / vCPU 0")[-1].told


def test_what_overlaps_gets_lanes_and_the_crowd_instants(tmp_path: Path) -> None:
    path = tmp_path / "t.pftrace"
    with path.open("wb") as file:
        out = TrackEvents(file)
        lanes = Lanes(out, "ticks", 0, most=2)
        for start_ns, end_ns in ((1, 9), (2, 3), (3, 8), (4, 5), (5, None), (8, 10)):
            lanes.put(start_ns, end_ns, "tick", out.notes([("tick", start_ns)]))
        out.finish(10)
    picture = look(path)
    kinds = {(e.told["tick"], e.track): e.kind for e in picture.events if e.kind != END}
    assert kinds == {(1, 1): 1, (2, 2): 1, (3, 2): 1, (4, 3): 3, (5, 3): 3, (8, 2): 1}
    assert {picture.name(track) for track in picture.tracks} == {"ticks"}


def test_many_words_and_values_are_told_as_they_are(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("kvmtick.report.track_events._MOST_NOTES", 3)
    path = tmp_path / "t.pftrace"
    values = [0, 127, 128, 300, -1, 1 << 40, (1 << 64) - 1, "a", "b" * 300, "\N{MICRO SIGN}s"]
    with path.open("wb") as file:
        out = TrackEvents(file)
        track = out.track("numbers")
        for at, value in enumerate(values):
            out.instant(track, at << 20, f"e{at}", out.notes([("value", value), ("nothing", None)]))
        out.finish(0)
    picture = look(path)
    assert [event.told for event in picture.events] == [{"value": value} for value in values]
    assert [event.ts_ns for event in picture.events] == [at << 20 for at in range(len(values))]


# What can go wrong.


def test_a_full_disk_and_a_bad_place(tmp_path: Path) -> None:
    source = write_recording(tmp_path / "t.ktrace", "tick-pic")
    with pytest.raises(HostError, match="No space left on device; free some"):
        write_perfetto(source, Path("/dev/full"))
    with pytest.raises(HostError, match="nowhere is no directory; give a writable"):
        write_perfetto(source, tmp_path / "nowhere" / "t.pftrace")
    with pytest.raises(HostError, match="it is a directory"):
        write_perfetto(source, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["t.ktrace"]


def test_a_trace_that_breaks_off_leaves_no_file(tmp_path: Path) -> None:
    source = write_recording(tmp_path / "t.ktrace", "tick-pic")
    out = tmp_path / "t.pftrace"
    out.write_text("old")

    def interrupt(trace: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_perfetto(source, out, interrupt)
    assert out.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t.ktrace", "t.pftrace"]
    source.write_bytes(b"nothing")
    with pytest.raises(FormatError):
        write_perfetto(source, out)
    assert out.read_text() == "old"
