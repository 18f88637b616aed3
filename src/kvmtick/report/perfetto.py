"""A trace for the Perfetto UI: a process a VM, with tracks per thread, per vCPU and per chip.

Two things are drawn. Every event as it was recorded: on the track of its chip, its vCPU or its
thread, as a slice where two events make a duration. And every tick as it was judged: from the
expiry to its end, and an arrow through the places it came by. docs/exporting.md names the tracks.

The lives come later than their events. So they have tracks of their own, and the times of each
track ascend in the file.

Not modelled: more than 64 ticks of a source that are under way at once; those beyond are instants.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from kvmtick.report.extras import extra
from kvmtick.report.output import replaced
from kvmtick.report.stream import Progress, Threads, hops, stream, vcpu_of
from kvmtick.report.track_events import Arguments, Lanes, TrackEvents
from kvmtick.ticks.host import VmTicks
from kvmtick.ticks.source import HOPS, Source
from kvmtick.ticks.tick import Tick
from kvmtick.ticks.verdict import Path as Way
from kvmtick.ticks.verdict import Where
from kvmtick.trace.events import (
    FUNCTION_AT,
    FUNCTIONS,
    HAS_FUNCTION,
    HEADER_FIELDS,
    IRQ_CONTEXT,
    TRACEPOINTS,
    Event,
    Function,
    Irqchip,
    Record,
)
from kvmtick.trace.reading import Trace, open_trace

__all__ = ["write_perfetto"]

Step = tuple[int, int, int | None, str]
"""A track, when it came there, when it left (None: an instant, or never), what it was then."""

_MOST_LANES = 64
_RANK_TICKS, _RANK_VCPU, _RANK_CHIP, _RANK_LAPIC, _RANK_REST = 0, 1000, 100_000, 200_000, 300_000

_FIELDS = {int(event): tracepoint.fields for event, tracepoint in TRACEPOINTS.items()}
_NAMES = {int(event): tracepoint.name for event, tracepoint in TRACEPOINTS.items()}
_FUNCTIONS = list(FUNCTIONS)
_PIT_TIMER, _APIC_TIMER = int(Function.PIT_TIMER_FN), int(Function.APIC_TIMER_FN)

_HRTIMER_START, _HRTIMER_CANCEL = int(Event.HRTIMER_START), int(Event.HRTIMER_CANCEL)
_HRTIMER_EXPIRE = int(Event.HRTIMER_EXPIRE_ENTRY)
_WORK_START, _WORK_END = int(Event.WORK_START), int(Event.WORK_END)
_ENTRY, _EXIT = int(Event.KVM_ENTRY), int(Event.KVM_EXIT)
_SWITCH, _WAKING = int(Event.SCHED_SWITCH), int(Event.SCHED_WAKING)
_UNNAMED = "<...>"

_PIT, _PIC, _IOAPIC = "PIT", "PIC", "IOAPIC"
_CHIPS: dict[int, str] = {
    Event.WORK_QUEUE: _PIT,
    Event.PIT_RESET_REINJECT: _PIT,
    Event.KVM_PIC_SET_IRQ: _PIC,
    Event.KVM_IOAPIC_SET_IRQ: _IOAPIC,
    Event.KVM_IOAPIC_DELAYED_EOI_INJ: _IOAPIC,
}
_LAPIC_EVENTS = frozenset(
    map(
        int,
        (
            Event.KVM_APIC_ACCEPT_IRQ,
            Event.KVM_APICV_ACCEPT_IRQ,
            Event.KVM_EOI,
            Event.KVM_APIC,
            Event.KVM_APIC_IPI,
        ),
    )
)
_VCPU_EVENTS = frozenset(
    map(
        int,
        (
            Event.KVM_ENTRY,
            Event.KVM_EXIT,
            Event.KVM_INJ_VIRQ,
            Event.KVM_INJ_NMI,
            Event.KVM_VCPU_WAKEUP,
        ),
    )
)


def write_perfetto(source: Path, out: Path, progress: Progress | None = None) -> None:
    """Write the trace `source` to the file `out` in Perfetto's format.

    Raises OSError and `FormatError` where the trace cannot be read, `HostError` where the library
    is missing or the file cannot be written.
    """
    with extra("export", "a Perfetto trace"):
        import perfetto.trace_builder.proto_builder  # noqa: F401
    trace = open_trace(source)
    try:
        with replaced(out) as file:
            host = stream(trace, writer := _Writer(trace, file), progress)
            writer.file.finish(host.end_ns)
    finally:
        trace.close()


class _Writer:
    """Takes events and lives, writes what they are."""

    def __init__(self, trace: Trace, file: BinaryIO) -> None:
        self.file = TrackEvents(file)
        self.threads = Threads(trace)
        self._vms: dict[VmTicks, _Vm] = {}
        self._other = 0

    def events(
        self,
        records: Sequence[Record],
        owners: Sequence[VmTicks | None],
        by_tid: Mapping[int, VmTicks],
    ) -> None:
        """A batch of events."""
        for vm in self._vms.values():
            vm.forget()
        for record, owner in zip(records, owners, strict=True):
            if owner is None:
                self._no_vm(record)
            elif record[1] == _SWITCH:
                self._switch(record, by_tid)
            else:
                self._vm(owner).event(record)

    def lives(self, vm: VmTicks, source: Source, ticks: list[Tick]) -> None:
        """Lives of one source."""
        follower = self._vm(vm).follower(source)
        for tick in ticks:
            follower.life(tick)

    def notes(self, record: Record) -> bytes:
        """The fields of an event, the thread and whether it was interrupted."""
        told: list[tuple[str, int | str | None]] = list(
            zip(_FIELDS[record[1]], record[HEADER_FIELDS:], strict=True)
        )
        if record[1] in HAS_FUNCTION:
            told[1] = ("function", _FUNCTIONS[record[FUNCTION_AT]])
        thread = self.threads[record[2]]
        where = "interrupted" if record[2] & IRQ_CONTEXT else "thread"
        told.append((where, f"{thread.comm}-{thread.tid}"))
        return self.file.notes(told)

    def _vm(self, vm: VmTicks) -> _Vm:
        known = self._vms.get(vm)
        if known is None:
            known = self._vms[vm] = _Vm(self, vm, len(self._vms) + 1)
        return known

    def _no_vm(self, record: Record) -> None:
        """An event of no VM, or a gap."""
        self._other = self._other or self.file.track("events of no VM", 0, _RANK_REST)
        event = _NAMES[record[1]]
        self.file.instant(self._other, record[0], event, self.notes(record))

    def _switch(self, record: Record, by_tid: Mapping[int, VmTicks]) -> None:
        """A thread leaves a CPU, another comes."""
        ts_ns, _, _, prev, state, following, cpu, *_ = record
        if prev in by_tid:
            self._vm(by_tid[prev]).stops(prev, ts_ns, state)
        if following in by_tid:
            self._vm(by_tid[following]).runs(following, ts_ns, cpu)


class _Vm:
    """The tracks of one VM."""

    def __init__(self, writer: _Writer, vm: VmTicks, number: int) -> None:
        self.file = writer.file
        self.number = number
        self._writer = writer
        self._vm = vm
        self.process = (
            self.file.process(vm.pid, vm.name)
            if vm.pid
            else self.file.track(vm.name or "a VM", 0, _RANK_TICKS)
        )
        self._seen: dict[Record, tuple[int, bytes]] = {}
        """Track and notes of an event, by all but its time: most come again and again."""
        self._tracks: dict[str, int] = {}
        self._thread_tracks: dict[int, int] = {}
        self._timers: dict[int, str] = {}
        self._followers: dict[int, _Follower] = {}

    # Tracks.

    def track(self, name: str, rank: int) -> int:
        """A track of the VM."""
        if name not in self._tracks:
            self._tracks[name] = self.file.track(name, self.process, rank)
        return self._tracks[name]

    def chip(self, name: str) -> int:
        """The track of a chip there is one of."""
        return self.track(name, _RANK_CHIP + (_PIT, _PIC, _IOAPIC).index(name))

    def lapic(self, vcpu: int | None) -> int:
        """The track of a vCPU's local APIC."""
        if vcpu is None:
            return self.track("a LAPIC", _RANK_LAPIC)
        return self.track(f"LAPIC {vcpu}", _RANK_LAPIC + 1 + vcpu)

    def vcpu(self, vcpu: int) -> int:
        """The track of a vCPU."""
        return self.track(f"vCPU {vcpu}", _RANK_VCPU + vcpu)

    def thread(self, tid: int, comm: str) -> int:
        """The track of a thread."""
        track = self._thread_tracks.get(tid)
        if track is None:
            make = self.file
            if self._vm.pid:
                track = make.thread(self._vm.pid, tid, comm, self.process)
            else:
                track = make.track(f"{comm} {tid}", self.process, _RANK_REST)
            self._thread_tracks[tid] = track
        return track

    def worker(self) -> int:
        """The track of the thread that runs the PIT's work."""
        if not self._vm.workers:
            return self.track("kvm-pit", _RANK_REST)
        thread = self._writer.threads[min(self._vm.workers)]
        return self.thread(thread.tid, thread.comm)

    def follower(self, source: Source) -> _Follower:
        """Who draws the ticks of a source."""
        follower = self._followers.get(id(source))
        if follower is None:
            number = len(self._followers)
            follower = self._followers[id(source)] = _Follower(self, source, number)
        return follower

    # Events.

    def event(self, record: Record) -> None:
        """An event of this VM."""
        ts_ns, event = record[:2]
        seen = self._seen.get(record[1:])
        if seen is None:
            seen = self._seen[record[1:]] = (self._place(record), self._writer.notes(record))
        track, notes = seen
        if event == _WORK_START:
            self._begin(track, ts_ns, "pit_do_work", notes)
        elif event == _ENTRY:
            self._begin(track, ts_ns, "guest", notes)
        elif event in (_WORK_END, _EXIT) and self.file.is_open(track):
            self.file.end(track, ts_ns, notes)
        else:
            self.file.instant(track, ts_ns, _NAMES[event], notes)

    def forget(self) -> None:
        """A new batch: a thread may have got its name."""
        self._seen.clear()

    def runs(self, tid: int, ts_ns: int, cpu: int) -> None:
        """A thread got a CPU."""
        self._begin(self._running(tid), ts_ns, "running", self.file.notes([("cpu", cpu)]))

    def stops(self, tid: int, ts_ns: int, state: int) -> None:
        """A thread left its CPU."""
        track = self._running(tid)
        if self.file.is_open(track):
            self.file.end(track, ts_ns, self.file.notes([("prev_state", state)]))

    def _running(self, tid: int) -> int:
        """The track of when a thread had a CPU."""
        name = f"running {tid}"
        if name not in self._tracks:
            parent = self.thread(tid, self._vm.info.threads.get(tid, _UNNAMED))
            self._tracks[name] = self.file.track("running", parent)
        return self._tracks[name]

    def _begin(self, track: int, ts_ns: int, name: str, notes: bytes) -> None:
        if self.file.is_open(track):
            cut = self.file.notes([("cut", "its end is not in the trace")])
            self.file.end(track, ts_ns, cut)
        self.file.begin(track, ts_ns, name, notes)

    def _place(self, record: Record) -> int:
        """The track an event belongs on."""
        event, task = record[1], record[2]
        if event in (_HRTIMER_START, _HRTIMER_CANCEL, _HRTIMER_EXPIRE):
            return self._timer(record)
        chip = _CHIPS.get(event)
        if chip is not None:
            return self.chip(chip)
        if event == Event.KVM_ACK_IRQ:
            return self.chip(_IOAPIC if record[3] == Irqchip.IOAPIC else _PIC)
        if event in _LAPIC_EVENTS:
            return self.lapic(vcpu_of(record, self._vm))
        if event in _VCPU_EVENTS:
            vcpu = vcpu_of(record, self._vm)
            if vcpu is not None:
                return self.vcpu(vcpu)
        if event == _WAKING:
            tid = record[3]
            return self.thread(tid, self._vm.info.threads.get(tid, _UNNAMED))
        if task & IRQ_CONTEXT:
            return self.track("host interrupts", _RANK_REST)
        thread = self._writer.threads[task]
        if not thread.tid:
            return self.track("idle", _RANK_REST)
        return self.thread(thread.tid, thread.comm)

    def _timer(self, record: Record) -> int:
        """The track of a timer: the PIT's, or that of the local APIC whose vCPU started it."""
        timer = record[3]
        if record[1] != _HRTIMER_CANCEL:
            if record[4] == _PIT_TIMER:
                self._timers[timer] = _PIT
            elif record[1] == _HRTIMER_START:
                vcpu = vcpu_of(record, self._vm)
                if vcpu is not None:
                    self._timers[timer] = str(vcpu)
        known = self._timers.get(timer)
        if known == _PIT:
            return self.chip(_PIT)
        return self.lapic(None if known is None else int(known))


class _Follower:
    """Draws the ticks of one source."""

    def __init__(self, vm: _Vm, source: Source, number: int) -> None:
        self._vm = vm
        self._source = source
        self._is_pit = source.name == "pit"
        self._name = "PIT ticks" if self._is_pit else f"LAPIC {source.vcpu} timer ticks"
        self._lives = Lanes(vm.file, self._name, vm.process, number, _MOST_LANES)
        self._lanes: dict[int, Lanes] = {}
        self._flow = vm.number << 48 | number << 40

    def life(self, tick: Tick) -> None:
        """One tick: a slice for all of it, and one for each place it stayed at."""
        steps = [*self._steps(tick)]
        flow = self._flow + tick.index if steps else 0
        notes = self._vm.file.notes
        told = notes(self._told(tick))
        self._lives.put(tick.expiry_ns, _end_ns(tick), tick.verdict.value, told, flow)
        number = notes([("tick", tick.index)])
        for at, (track, start_ns, end_ns, name) in enumerate(steps, 1):
            lanes = self._lanes.get(track)
            if lanes is None:
                lanes = self._lanes[track] = Lanes(self._vm.file, self._name, track)
            lanes.put(start_ns, end_ns, name, number, flow, at == len(steps))

    def _steps(self, tick: Tick) -> Iterator[Step]:
        """Where it stayed, from when to when."""
        vm, accept_ns, inject_ns = self._vm, tick.accept_ns, tick.inject_ns
        if self._is_pit and tick.work_ns is not None:
            yield vm.worker(), tick.work_ns, accept_ns, "pulse"
        if accept_ns is None:
            return
        if tick.path is Way.IOAPIC:
            yield vm.chip(_IOAPIC), accept_ns, None, "message"
        chip = self._chip(tick)
        if chip is not None:
            yield chip, accept_ns, inject_ns, "requested"
        if inject_ns is None or tick.vcpu is None:
            return
        yield vm.vcpu(tick.vcpu), inject_ns, None, "injected"
        if tick.eoi_ns is not None and chip is not None:
            yield chip, inject_ns, tick.eoi_ns, "in service"
            yield vm.vcpu(tick.vcpu), tick.eoi_ns, None, "EOI"

    def _chip(self, tick: Tick) -> int | None:
        """Who has the request; None if the trace does not tell."""
        if tick.path is Way.PIC or (tick.path is None and tick.where is Where.PIC):
            return self._vm.chip(_PIC)
        if tick.path is None and tick.where is Where.IOAPIC:
            return self._vm.chip(_IOAPIC)
        if tick.path is not None:
            return self._vm.lapic(tick.vcpu)
        if not self._is_pit:
            return self._vm.lapic(self._source.vcpu)
        return None

    def _told(self, tick: Tick) -> Arguments:
        """What is shown of a tick."""
        yield "tick", tick.index
        yield "period_ns", tick.period_ns
        yield "fired_late_ns", tick.fired_ns - tick.expiry_ns
        for hop, latency_ns in zip(HOPS, hops(self._source, tick), strict=True):
            yield f"{hop}_ns", latency_ns
        yield "path", tick.path and tick.path.value
        yield "vector", tick.vector
        yield "vcpu", tick.vcpu
        yield "where", tick.where and tick.where.value
        yield "detail", tick.detail or None


def _end_ns(tick: Tick) -> int:
    """The last that is known of it."""
    steps = (tick.fired_ns, tick.work_ns, tick.accept_ns, tick.inject_ns, tick.eoi_ns)
    return max(ns for ns in steps if ns is not None)
