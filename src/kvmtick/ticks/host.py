"""The ticks of all VMs in a trace: its records are split by VM, completed and put together.

with open_trace(path) as trace:
    host = HostTicks(trace)
    host.read()
    for vm in host.vms:
        print(vm.name, vm.assembler.report().summary())
"""

from collections.abc import Callable
from operator import itemgetter
from typing import Final

from kvmtick.ticks.life import KEEP, TickAssembler
from kvmtick.ticks.missing import missing_of_lapic, missing_of_pit, sees_masks, sees_nmis
from kvmtick.ticks.source import Source
from kvmtick.ticks.tick import Tick
from kvmtick.trace.by_vm import ByVm, Share
from kvmtick.trace.events import Event, Record
from kvmtick.trace.inferred import BackEnd, Inferred
from kvmtick.trace.reading import Trace
from kvmtick.trace.vms import VmInfo

__all__ = ["HostTicks", "VmTicks"]

OnRecords = Callable[["VmTicks", list[Record]], None]
OnLives = Callable[["VmTicks", Source, list[Tick]], None]

FIRST_RECORDS, FIRST_NS = 30_000, 1_000_000_000
"""The beginning of a trace, so many records or so long, is looked at as one: who is who has to be
learnt from it.
"""

_EVENT_OF: Final = itemgetter(1)
_LOST_EVENTS: Final = int(Event.LOST_EVENTS)
_NOBODYS: Final = frozenset((Event.SCHED_SWITCH, Event.SCHED_WAKING, Event.KVM_VCPU_WAKEUP))
"""What no verdict needs."""
_NOT_JUDGED: Final = _NOBODYS | {Event.KVM_ENTRY, Event.KVM_EXIT}
"""What the assembler need not see: from entries others learn who is which vCPU, and of NMIs."""


_PART: Final = "no record tells which thread runs its vCPU"


class VmTicks:
    """One VM of a trace and its ticks."""

    def __init__(
        self,
        share: Share,
        owners: dict[int, int],
        back_end: BackEnd,
        trace: Trace,
        keep: int,
        keep_all: bool,
    ) -> None:
        self.share = share
        self.tasks = trace.tasks
        self.notes: list[str] = []
        """What cannot be told of this VM, and why; a sentence each."""
        self.inferred = Inferred(back_end)
        self.assembler = TickAssembler(
            keep,
            tasks=trace.tasks,
            sees_nmis=lambda: trace.is_complete or sees_nmis(trace.events, back_end),
            vcpus=share.vcpus,
            owners=owners,
            keep_all=keep_all,
        )
        if not trace.is_complete:
            self.assembler.begin_in_the_middle(share.info.reinject)
            if share.info.from_start:
                self.assembler.created()

    @property
    def info(self) -> VmInfo:
        """What is known of it beside the records."""
        return self.share.info

    @property
    def workers(self) -> set[int]:
        """Tasks that run its PIT's work."""
        return self.share.workers

    @property
    def vcpus(self) -> dict[int, int]:
        """Which task is which vCPU, as far as it is known."""
        return self.share.vcpus

    @property
    def pid(self) -> int:
        """The process that made it; 0 if that is not known."""
        return self.info.pid

    @property
    def name(self) -> str:
        """Its name, for people."""
        return self.info.name

    def note(self) -> None:
        """Everything was read: say what cannot be told."""
        share, came = self.share, self.assembler.without_expiry
        if share.is_guessed:
            self.notes.append("nothing tells its threads from those of another VM: taken for one")
        if share.is_part:
            self.notes.append(_PART)
        if share.missed:
            self.notes.append(
                f"{share.missed} records are left out: it was known too late whose they are"
            )
        if came:
            self.notes.append(
                f"{came} timer interrupts came without an expiry (a VMX preemption timer, or a "
                "deadline in the past): they are no ticks here"
            )


class HostTicks:
    """Reads a whole trace; `vms` is what it gives."""

    def __init__(
        self,
        trace: Trace,
        keep: int = KEEP,
        on_records: OnRecords | None = None,
        on_lives: OnLives | None = None,
    ) -> None:
        """`on_records` gets each VM's records (completed) before they are judged, batch by batch;
        `on_lives` gets every life of every source once, in order, when it is old enough to be
        settled (`keep` later ones are there) or at the end.
        """
        self.trace = trace
        self.keep = keep
        self.vms: list[VmTicks] = []
        self.start_ns: int | None = None
        """The first record's time; None before there is one."""
        self.end_ns = 0
        self.records = 0
        """So many were read, of VMs or not."""
        self.lost = 0
        """Events that are missing, as far as anybody knows."""
        self._on_records = on_records
        self._on_lives = on_lives
        self._first: list[Record] | None = []
        self._by_vm: ByVm | None = None
        self._back_end = BackEnd()
        self._events_told = bool(trace.events)
        self._of_share: dict[Share, VmTicks] = {}

    def read(self, progress: Callable[[], None] | None = None) -> None:
        """Read to the end; `progress` is called after each batch. Raises `FormatError`."""
        for batch in self.trace.batches():
            self.take(batch)
            if progress is not None:
                progress()
        self.settle()

    @property
    def is_gathering(self) -> bool:
        """The beginning is still being gathered: nothing was handed out yet."""
        return self._first is not None

    def take(self, batch: list[Record]) -> None:
        """The next records of the whole host."""
        if not batch:
            return
        if self.start_ns is None:
            self.start_ns = batch[0][0]
        self.end_ns = batch[-1][0]
        self.records += len(batch)
        if _LOST_EVENTS in map(_EVENT_OF, batch):
            self.lost += sum(max(1, r[4]) for r in batch if r[1] == _LOST_EVENTS)
        if self._first is not None:
            self._first += batch
            if len(self._first) < FIRST_RECORDS and self.end_ns - self.start_ns < FIRST_NS:
                return
            batch, self._first = self._first, None
        self._split(batch)

    def _split(self, batch: list[Record]) -> None:
        by_vm = self._by_vm
        if by_vm is None:
            unwanted = _NOBODYS if self._on_records is None else ()
            by_vm = self._by_vm = ByVm(self.trace.tasks, not self.trace.vms, unwanted)
        by_vm.know(self.trace.vms)
        self._back_end.learn(batch)
        for share, records in by_vm(batch):
            self._judge(self._vm(share), records)
        for share in by_vm.shares:
            self._vm(share)

    def _vm(self, share: Share) -> VmTicks:
        vm = self._of_share.get(share)
        if vm is None:
            assert self._by_vm is not None
            streams = self._on_lives is not None
            owners = self._by_vm.owners
            vm = VmTicks(share, owners, self._back_end, self.trace, self.keep, streams)
            self._of_share[share] = vm
            self.vms.append(vm)
        return vm

    def _judge(self, vm: VmTicks, records: list[Record]) -> None:
        if not self.trace.is_complete:
            records = vm.inferred(records)
            self._look_for_missing(vm)
        if self._on_records is not None:
            self._on_records(vm, records)
            records = [record for record in records if record[1] not in _NOT_JUDGED]
        vm.assembler(records)
        if self._on_lives is not None:
            for source in vm.assembler.sources():
                self._hand_out(vm, source)

    def _look_for_missing(self, vm: VmTicks) -> None:
        events, back_end = self.trace.events, self._back_end
        part = _PART if vm.share.is_part else ""
        vm.assembler.judge_by(
            part or missing_of_pit(events, self._events_told, back_end),
            missing_of_lapic(events, self._events_told, back_end),
            sees_masks(events) or not self._events_told,
        )

    def _hand_out(self, vm: VmTicks, source: Source, also_kept: bool = False) -> None:
        lives = source.take_old(also_kept)
        if lives and self._on_lives is not None:
            self._on_lives(vm, source, lives)

    def settle(self) -> None:
        """Everything was read: judge what can be judged, hand out the rest."""
        if self._first is not None:
            first, self._first = self._first, None
            self._split(first)
        for vm in self.vms:
            vm.assembler.settle()
            if self._on_lives is not None:
                for source in vm.assembler.sources():
                    self._hand_out(vm, source, also_kept=True)
            vm.note()
        self.lost = max(self.lost, self.trace.lost)
