"""One pass over a trace for the exports: every event with the VM it belongs to, every life.

Not modelled: an event that concerns two VMs (the scheduler switches from one's thread to another's)
is counted to the VM of the thread it happened in.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from kvmtick.ticks.host import HostTicks, VmTicks
from kvmtick.ticks.source import HOPS, Source
from kvmtick.ticks.tick import Tick
from kvmtick.trace.decoder import pid_of
from kvmtick.trace.events import HEADER_FIELDS, IRQ_CONTEXT, TRACEPOINTS, Event, Record
from kvmtick.trace.ktrace import KtraceReader
from kvmtick.trace.reading import Trace

__all__ = ["Consumer", "Progress", "Thread", "Threads", "hops", "origin", "stream", "vcpu_of"]

Progress = Callable[[Trace], None]

_TIDS = {
    int(event): tuple(HEADER_FIELDS + TRACEPOINTS[event].fields.index(name) for name in names)
    for event, names in (
        (Event.SCHED_SWITCH, ("prev_pid", "next_pid")),
        (Event.SCHED_WAKING, ("pid",)),
    )
}
"""Where the scheduler's events name threads; the first of a VM has the event."""
_OF_ADDRESS = frozenset(
    map(
        int,
        (
            Event.HRTIMER_START,
            Event.HRTIMER_CANCEL,
            Event.HRTIMER_EXPIRE_ENTRY,
            Event.WORK_QUEUE,
        ),
    )
)
"""Events that happen in any thread: their timer or work item says whose they are."""

_NOT_OF_THREAD = frozenset((int(Event.LOST_EVENTS), *_TIDS, *_OF_ADDRESS))

_VCPU_FIELD = {
    int(event): HEADER_FIELDS + TRACEPOINTS[event].fields.index(name)
    for event, name in (
        (Event.KVM_ENTRY, "vcpu_id"),
        (Event.KVM_EXIT, "vcpu_id"),
        (Event.KVM_INJ_NMI, "vcpu_id"),
        (Event.KVM_EOI, "apicid"),
        (Event.KVM_APIC_ACCEPT_IRQ, "apicid"),
        (Event.KVM_APICV_ACCEPT_IRQ, "apicid"),
    )
}
"""Where an event names its vCPU; a vCPU's APIC id is its number."""


@dataclass(frozen=True, slots=True)
class Thread:
    """A task of a trace, taken apart."""

    comm: str
    tid: int


class Threads:
    """What the tasks of a trace are."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self._named: dict[str, Thread] = {}

    def __getitem__(self, task: int) -> Thread:
        """The thread of a record's task."""
        name = self._trace.tasks[task & ~IRQ_CONTEXT]
        thread = self._named.get(name)
        if thread is None:
            comm, _, tid = name.rpartition("-")
            thread = self._named[name] = Thread(comm, int(tid))
        return thread


def vcpu_of(record: Record, vm: VmTicks | None) -> int | None:
    """The vCPU an event is about: the one it names, or whose thread it happened in."""
    at = _VCPU_FIELD.get(record[1])
    if at is not None:
        return record[at]
    return None if vm is None else vm.vcpus.get(record[2])


class Consumer(Protocol):
    """Who takes what a trace holds."""

    def events(
        self,
        records: Sequence[Record],
        owners: Sequence[VmTicks | None],
        by_tid: Mapping[int, VmTicks],
    ) -> None:
        """The next events as they were recorded, in order, with the VM each belongs to, and the VMs
        by their threads.
        """

    def lives(self, vm: VmTicks, source: Source, ticks: list[Tick]) -> None:
        """The next lives of a source, in order; every life comes once."""


def stream(trace: Trace, consumer: Consumer, progress: Progress | None = None) -> HostTicks:
    """Read a trace to its end. Raises `FormatError` where it is damaged."""
    owners = _Owners()
    host = HostTicks(trace, on_records=owners.note, on_lives=consumer.lives)
    waiting: list[Record] = []
    for batch in trace.batches():
        host.take(batch)
        waiting += batch
        if not host.is_gathering:
            consumer.events(waiting, owners.of(waiting, host), owners.by_tid)
            waiting = []
        if progress is not None:
            progress(trace)
    host.settle()
    consumer.events(waiting, owners.of(waiting, host), owners.by_tid)
    return host


class _Owners:
    """Whose the events of a batch are: told by the records that the VMs are handed."""

    def __init__(self) -> None:
        self.by_tid: dict[int, VmTicks] = {}
        self._by_task: dict[int, VmTicks] = {}
        self._by_address: dict[int, VmTicks] = {}

    def note(self, vm: VmTicks, records: list[Record]) -> None:
        """These are the VM's."""
        addresses = {r[HEADER_FIELDS] for r in records if r[1] in _OF_ADDRESS}
        tasks = {r[2] for r in records if r[1] not in _NOT_OF_THREAD}
        self._by_address |= dict.fromkeys(addresses, vm)
        self._by_task |= dict.fromkeys(tasks, vm)

    def of(self, batch: list[Record], host: HostTicks) -> list[VmTicks | None]:
        """The owner of each event; None: no VM's, as the gaps are."""
        for vm in host.vms:
            tids = {pid_of(vm.tasks[task]) for task in vm.workers | vm.vcpus.keys()}
            self.by_tid |= dict.fromkeys(tids | vm.info.threads.keys(), vm)
        by_task, of_another = self._by_task, self._of_another
        return [
            of_another(record) if record[1] in _NOT_OF_THREAD else by_task.get(record[2])
            for record in batch
        ]

    def _of_another(self, record: Record) -> VmTicks | None:
        """The owner of an event that the thread it happened in says nothing of."""
        event = record[1]
        if event in _OF_ADDRESS:
            return self._by_address.get(record[HEADER_FIELDS])
        tids = (record[at] for at in _TIDS.get(event, ()))
        return next((self.by_tid[tid] for tid in tids if tid in self.by_tid), None)


def origin(trace: Trace) -> str:
    """Where a trace comes from, for people."""
    if isinstance(trace, KtraceReader):
        return "a simulated run" if trace.is_complete else trace.header.origin
    return "ftrace text"


def hops(source: Source, tick: Tick) -> tuple[int | None, ...]:
    """Latencies in the order of HOPS, as the report counts them: of ticks that reached a vCPU."""
    expiry, work, accept, inject = tick.expiry_ns, tick.work_ns, tick.accept_ns, tick.inject_ns
    if inject is None or accept is None:
        return (None,) * len(HOPS)
    end = tick.eoi_ns
    ends = (None, None) if end is None else (end - inject, end - expiry)
    if source.name == "lapic":
        return (accept - expiry, None, inject - accept, *ends)
    if work is None:
        return (None, None, None, *ends)
    return (work - expiry, accept - work, inject - accept, *ends)
