"""The ticks of all VMs in a trace: its records are split by VM, completed and put together.

with open_trace(path) as trace:
    host = HostTicks(trace)
    host.read()
    for vm in host.vms:
        print(vm.name, vm.assembler.report().summary())
"""

from collections.abc import Callable

from kvmtick.ticks.life import KEEP, TickAssembler
from kvmtick.ticks.source import Source
from kvmtick.ticks.tick import Tick
from kvmtick.trace.events import Event, Record
from kvmtick.trace.inferred import Inferred
from kvmtick.trace.one_vm import OneVm
from kvmtick.trace.reading import Trace
from kvmtick.trace.vms import VmInfo

__all__ = ["HostTicks", "VmTicks"]

OnRecords = Callable[["VmTicks", list[Record]], None]
OnLives = Callable[["VmTicks", Source, list[Tick]], None]


class VmTicks:
    """One VM of a trace and its ticks."""

    def __init__(self, info: VmInfo, trace: Trace, keep: int) -> None:
        self.info = info
        self.tasks = trace.tasks
        self.notes: list[str] = []
        """What cannot be told of this VM, and why; a sentence each."""
        self.inferred = Inferred()
        self.assembler = TickAssembler(
            keep, tasks=trace.tasks, sees_nmis=lambda: trace.is_complete or self.inferred.sees_nmis
        )
        self.one_vm = OneVm()

    @property
    def pid(self) -> int:
        """The process that made it; 0 if that is not known."""
        return self.info.pid

    @property
    def name(self) -> str:
        """Its name, for people."""
        return self.info.name


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

    def read(self, progress: Callable[[], None] | None = None) -> None:
        """Read to the end; `progress` is called after each batch. Raises `FormatError`."""
        for batch in self.trace.batches():
            self.take(batch)
            if progress is not None:
                progress()
        self.settle()

    def take(self, batch: list[Record]) -> None:
        """The next records of the whole host."""
        if not batch:
            return
        if self.start_ns is None:
            self.start_ns = batch[0][0]
        self.end_ns = batch[-1][0]
        self.records += len(batch)
        self.lost += sum(max(1, r[4]) for r in batch if r[1] == Event.LOST_EVENTS)
        self._find_vms()
        for vm in self.vms:
            own = vm.one_vm.keep(batch)
            own = own if self.trace.is_complete else vm.inferred(own)
            if self._on_records is not None:
                self._on_records(vm, own)
            vm.assembler(own)

    def _find_vms(self) -> None:
        known = {vm.pid for vm in self.vms}
        for info in self.trace.vms:
            if info.pid not in known:
                vm = VmTicks(info, self.trace, self.keep)
                self.vms.append(vm)
                names = {name: index for index, name in enumerate(self.trace.tasks)}
                for tid, comm in info.threads.items():
                    vm.one_vm.add_task(names[f"{comm}-{tid}"])

    def settle(self) -> None:
        """Everything was read: judge what can be judged, hand out the rest."""
        for vm in self.vms:
            vm.assembler.settle()
            for source in vm.assembler.sources():
                if self._on_lives is not None:
                    self._on_lives(vm, source, source.lives)
        self.lost = max(self.lost, self.trace.lost)
