"""One pass over a trace for the exports: every event with the VM it belongs to, every life.

Not modelled: an event that concerns two VMs (the scheduler switches from one's thread to another's)
is counted to the VM of the thread it happened in.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from kvmtick.ticks.host import HostTicks, VmTicks
from kvmtick.ticks.source import HOPS, Source
from kvmtick.ticks.tick import Tick
from kvmtick.trace.events import HEADER_FIELDS, IRQ_CONTEXT, TRACEPOINTS, Event, Record
from kvmtick.trace.reading import Trace

__all__ = ["Consumer", "Progress", "Thread", "Threads", "hops", "stream"]

Progress = Callable[[Trace], None]

_VCPU_THREAD = re.compile(r"CPU (\d+)/KVM")
_LOST_EVENTS = int(Event.LOST_EVENTS)
_OTHER_THREAD = {
    int(event): HEADER_FIELDS + TRACEPOINTS[event].fields.index(name)
    for event, name in ((Event.SCHED_SWITCH, "next_pid"), (Event.SCHED_WAKING, "pid"))
}
"""Where the scheduler's events name a second thread."""

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
_BY_ITS_VCPU = frozenset(
    map(int, (Event.KVM_ENTRY, Event.KVM_EXIT, Event.KVM_INJ_NMI, Event.KVM_EOI))
)
"""Events that happen in the thread of the vCPU they name."""


@dataclass(frozen=True, slots=True)
class Thread:
    """A task of a trace, taken apart."""

    comm: str
    tid: int


class Threads:
    """What the tasks of a trace are, and whose vCPU they run."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self._named: dict[str, Thread] = {}
        self._vcpus: dict[int, int] = {}

    def __getitem__(self, task: int) -> Thread:
        """The thread of a record's task."""
        name = self._trace.tasks[task & ~IRQ_CONTEXT]
        thread = self._named.get(name)
        if thread is None:
            comm, _, tid = name.rpartition("-")
            thread = self._named[name] = Thread(comm, int(tid))
            match = _VCPU_THREAD.match(comm)
            if match:
                self._vcpus.setdefault(thread.tid, int(match[1]))
        return thread

    def vcpu(self, record: Record, vm: VmTicks | None) -> int | None:
        """The vCPU an event is about, where it is known."""
        event, task = record[1], record[2]
        at = _VCPU_FIELD.get(event)
        if at is not None:
            vcpu = record[at]
            if event in _BY_ITS_VCPU and not task & IRQ_CONTEXT:
                self._vcpus[self[task].tid] = vcpu
            return vcpu
        if task & IRQ_CONTEXT or vm is None:
            return None
        tid = self[task].tid
        known = vm.info.vcpus.get(tid)
        return self._vcpus.get(tid) if known is None else known


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
    for batch in trace.batches():
        host.take(batch)
        consumer.events(batch, owners.of(batch, host), owners.by_tid)
        if progress is not None:
            progress(trace)
    host.settle()
    return host


class _Owners:
    """Whose the events of a batch are."""

    def __init__(self) -> None:
        self._noted: dict[int, VmTicks] = {}
        self.by_tid: dict[int, VmTicks] = {}

    def note(self, vm: VmTicks, records: list[Record]) -> None:
        """These are the VM's. They are known by identity, as long as their batch lives."""
        self._noted.update(dict.fromkeys(map(id, records), vm))

    def of(self, batch: list[Record], host: HostTicks) -> list[VmTicks | None]:
        """The owner of each event; None: no VM's, as the gaps are."""
        for vm in host.vms:
            for tid in vm.info.threads:
                self.by_tid.setdefault(tid, vm)
        noted, rest = self._noted, self._rest
        tasks = host.trace.tasks
        owners = [
            None if record[1] == _LOST_EVENTS else noted.get(id(record)) or rest(record, tasks)
            for record in batch
        ]
        noted.clear()
        return owners

    def _rest(self, record: Record, tasks: list[str]) -> VmTicks | None:
        """Whose an event is that tells nothing of ticks, or that was replaced by what it means."""
        event, task = record[1], record[2]
        other = _OTHER_THREAD.get(event)
        # In an interrupt the thread says nothing; no thread has this number.
        tid = -1 if task & IRQ_CONTEXT else int(tasks[task].rpartition("-")[2])
        vm = self.by_tid.get(tid)
        return self.by_tid.get(record[other]) if vm is None and other is not None else vm


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
