"""The report of a trace, in one pass and bounded memory."""

from collections.abc import Callable
from pathlib import Path

from kvmtick.report.causes import Causes
from kvmtick.report.data import Report, SourceReport, VmReport, WorstTick
from kvmtick.report.facts import SourceFacts, TraceFacts, VmFacts, sees_eoi
from kvmtick.report.findings import findings_of
from kvmtick.report.masks import PicMask
from kvmtick.report.phases import Phases
from kvmtick.report.source import BELIEVED_HZ, PIT_HZ, SourceLives
from kvmtick.report.stories import RecentRecords, Watch, story_lines
from kvmtick.report.stream import Progress, origin
from kvmtick.report.vcpus import Vcpus
from kvmtick.report.waits import CpuWaits
from kvmtick.ticks.host import HostTicks, VmTicks
from kvmtick.ticks.report import TickReport
from kvmtick.ticks.source import Source
from kvmtick.ticks.tick import Tick
from kvmtick.ticks.verdict import Verdict
from kvmtick.timing.wall import collections_held_back
from kvmtick.trace.decoder import pid_of
from kvmtick.trace.events import ApicvInhibitReason, Event, Record
from kvmtick.trace.reading import Trace

__all__ = ["WORST", "build"]

WORST = 10
"""Worst ticks told of each source."""
RECENT_RECORDS = 400_000
"""Records of all VMs that stories can be told from."""


def build(trace: Trace, path: Path, progress: Progress | None = None, worst: int = WORST) -> Report:
    """Read a trace to its end and report on it. `progress` is called after each batch; `worst`:
    how many of a source's worst ticks are told. Raises `FormatError` for a damaged file.
    """
    # records are tuples of numbers, millions of them: Python need not search them for cycles
    with collections_held_back():
        return _Builder(trace, worst).read(progress).report(path)


class _Builder:
    def __init__(self, trace: Trace, worst: int) -> None:
        self._trace = trace
        self._worst = worst
        self._vms: dict[int, _Vm] = {}
        self._host = HostTicks(trace, on_records=self._on_records, on_lives=self._on_lives)
        self._settling = False

    def read(self, progress: Progress | None) -> "_Builder":
        for batch in self._trace.batches():
            self._host.take(batch)
            for vm in self._vms.values():
                vm.look()
            if progress is not None:
                progress(self._trace)
        self._settling = True
        self._host.settle()
        return self

    def _vm(self, ticks: VmTicks) -> "_Vm":
        vm = self._vms.get(id(ticks))
        if vm is None:
            vm = self._vms[id(ticks)] = _Vm(ticks, self._trace, self._worst)
            most = RECENT_RECORDS // len(self._vms)
            for each in self._vms.values():
                each.recent.most = most
        return vm

    def _on_records(self, ticks: VmTicks, records: list[Record]) -> None:
        self._vm(ticks).take(records)

    def _on_lives(self, ticks: VmTicks, source: Source, lives: list[Tick]) -> None:
        self._vm(ticks).take_lives(source, lives, last=self._settling)

    def report(self, path: Path) -> Report:
        host, trace = self._host, self._trace
        facts = TraceFacts(
            start_ns=host.start_ns or 0,
            end_ns=host.end_ns,
            lost=host.lost,
            unknown=trace.unknown,
            cut=trace.cut,
            events=trace.events,
            is_complete=trace.is_complete,
        )
        names = _Names(trace.tasks)
        vms = [self._vm(ticks) for ticks in host.vms]
        vm_facts = [vm.facts(facts, names) for vm in vms]
        return Report(
            path=path,
            origin=origin(trace),
            start_ns=facts.start_ns,
            end_ns=facts.end_ns,
            records=host.records,
            lost_events=facts.lost,
            unknown_lines=facts.unknown,
            vms=[
                VmReport(
                    pid=each.ticks.pid,
                    name=each.ticks.name,
                    sources=[source.report for source in each.sources],
                    phases=each.phases,
                    notes=each.ticks.notes,
                )
                for each in vm_facts
            ],
            findings=findings_of(facts, vm_facts),
            notes=[facts.cut] if facts.cut else [],
        )


class _Vm:
    """What is gathered of one VM."""

    def __init__(self, ticks: VmTicks, trace: Trace, worst: int) -> None:
        self.ticks = ticks
        self._trace = trace
        self.recent = RecentRecords()
        self._waits = CpuWaits(ticks.tasks)
        self._vcpus = Vcpus(ticks)
        self._mask = PicMask()
        self._phases = Phases(ticks.vcpus.get)
        self._causes = Causes(ticks, self._waits, self._vcpus, self._mask)
        self._worst = worst
        self._reinject: bool | None = None
        self._inhibits: int | None = None
        waits, mask, vcpus, phases = self._waits, self._mask, self._vcpus, self._phases
        of: dict[Event, tuple[Callable[[Record], None], ...]] = {
            Event.SCHED_SWITCH: (waits.switch,),
            Event.SCHED_WAKING: (waits.waking,),
            Event.LOST_EVENTS: (waits.lost,),
            Event.WORK_START: (waits.runs,),
            Event.KVM_INJ_VIRQ: (waits.runs,),
            Event.KVM_EOI: (waits.runs,),
            Event.KVM_PIO: (waits.runs, mask.pio, phases.pio),
            Event.KVM_APIC: (phases.apic,),
            Event.KVM_PIC_SET_IRQ: (mask.pulse,),
            Event.KVM_ENTRY: (waits.runs, vcpus.enter),
            Event.KVM_EXIT: (vcpus.exit,),
            Event.KVM_APICV_INHIBIT_CHANGED: (self._apicv_inhibit_changed,),
        }
        self._handlers = [of.get(event, ()) for event in sorted(Event)]
        self._without_switches = [
            tuple(handler for handler in handlers if handler != waits.runs)
            for handlers in self._handlers
        ]
        self._watches: dict[int, Watch] = {}
        self._lives: dict[int, SourceLives] = {}

    def take(self, records: list[Record]) -> None:
        """The VM's next records, before they are judged."""
        switches = Event.SCHED_SWITCH in self._trace.events
        handlers = self._handlers if switches else self._without_switches
        for record in records:
            for handler in handlers[record[1]]:
                handler(record)
        self._vcpus.take(records)
        self.recent.add(records)

    def _apicv_inhibit_changed(self, record: Record) -> None:
        if record[3] == ApicvInhibitReason.PIT_REINJ:
            self._reinject = bool(record[4])
            self._inhibits = record[5]

    def look(self) -> None:
        """After a batch."""
        for source in self.ticks.assembler.sources():
            self._watch(source).look()

    def _watch(self, source: Source) -> Watch:
        watch = self._watches.get(id(source))
        if watch is None:
            watch = self._watches[id(source)] = Watch(source, self.recent, self._worst)
        return watch

    def take_lives(self, source: Source, lives: list[Tick], last: bool) -> None:
        """Lives of which everything is known."""
        watch = self._watch(source)
        watch.see(lives)
        if last:
            watch.finish()
        follower = self._lives.get(id(source))
        if follower is None:
            follower = self._lives[id(source)] = SourceLives(
                self._causes, watch.tells, lambda: self._vcpus.last_ns
            )
        follower.take(lives)
        self._phases.take(source.name, source.vcpu, lives)

    def facts(self, trace: TraceFacts, names: "_Names") -> VmFacts:
        sources = [s for s in self.ticks.assembler.sources() if s.expired]
        return VmFacts(
            ticks=self.ticks,
            vcpus=self._vcpus,
            reinject=self._replays,
            inhibits=self._inhibits,
            sources=[self._source(source, trace, names) for source in sources],
            phases=self._phases.told(),
            trace=trace,
            name=names,
        )

    @property
    def _replays(self) -> bool | None:
        return self.ticks.info.reinject if self._reinject is None else self._reinject

    def _source(self, source: Source, trace: TraceFacts, names: "_Names") -> SourceFacts:
        lives = self._lives[id(source)]
        is_pit = source.name == "pit"
        lives.finish(
            sees_eoi(source.path, trace.events), is_pit and bool(self._replays), source.extra
        )
        drift_ppm = lives.drift_ppm(is_pit)
        period_ns = lives.period_ns
        report = SourceReport(
            source=source.name,
            vcpu=source.vcpu,
            ticks=TickReport(source),
            histograms=source.latency_ns(),
            period_ns=period_ns,
            asked_hz=1e9 / period_ns if period_ns else None,
            got_hz=lives.got_hz(source.reached),
            drift_ppm=drift_ppm,
            drift_constant=_constant(is_pit) if drift_ppm is not None else "",
            points=lives.points(),
            worst=self._told(source, lives, names),
        )
        return SourceFacts(report, lives)

    def _told(self, source: Source, lives: SourceLives, names: "_Names") -> list[WorstTick]:
        told = []
        stories = self._watch(source).stories
        there = [s for s in stories if s.tick.verdict is not Verdict.OUTSTANDING]
        there += [s for s in stories if s not in there and s.tick.expiry_ns <= self._vcpus.last_ns]
        there.sort(key=lambda story: -story.waited_ns)
        for story in there[: self._worst]:
            cause = lives.causes.get(story.tick.index)
            if cause is None:
                cause = self._causes.of_told(story.tick)
            lines = story_lines(story.records, self.ticks.tasks)
            told.append(WorstTick(story.tick, cause.text(names), lines))
        return told


class _Names:
    """`comm-pid` of a pid, as far as the trace names it."""

    def __init__(self, tasks: list[str]) -> None:
        self._names = {pid_of(task): task for task in tasks}

    def __call__(self, pid: int) -> str:
        name = self._names.get(pid, "")
        return f"thread {pid}" if not name or name.startswith("<...>") else name


def _constant(is_pit: bool) -> str:
    if not is_pit:
        return "by the period its timer was set to"
    return f"taken for {BELIEVED_HZ} Hz; KVM's PIT runs at {PIT_HZ} Hz"
