"""What a VM's vCPUs did, as far as causes need it: their threads, guest entries, last events."""

import re
from array import array
from bisect import bisect_right
from collections.abc import Iterable

from kvmtick.report.waits import pid_of
from kvmtick.trace.events import IRQ_CONTEXT, Event, Record
from kvmtick.trace.vms import VmInfo

__all__ = ["Vcpus"]

MOST_ENTRIES = 1 << 20
"""Guest entries kept of each vCPU: the last ones."""

_VCPU_TASK = re.compile(r"CPU (\d+)/KVM")
_EOI = int(Event.KVM_EOI)
_ENTRY = int(Event.KVM_ENTRY)
_EXIT = int(Event.KVM_EXIT)
_TELLING = frozenset((_EOI, _ENTRY, _EXIT))
"""Their first field is the vCPU that made them."""
_OF_VCPUS = frozenset(
    map(int, (Event.KVM_EOI, Event.KVM_ENTRY, Event.KVM_EXIT, Event.KVM_INJ_VIRQ, Event.KVM_PIO))
)


class Vcpus:
    """Follows one VM's records."""

    def __init__(self, tasks: list[str]) -> None:
        """`tasks`: the trace's, which may still grow."""
        self._tasks = tasks
        self._task_of: dict[int, int] = {}
        self._tasks_seen: set[int] = set()
        self._entries: dict[int, array[int]] = {}
        self._entries_since: dict[int, int] = {}
        self._exits = False
        self.last_ns = 0
        """The last event in any of their threads."""

    def take(self, records: Iterable[Record]) -> None:
        """The next records of the VM."""
        for record in records:
            event = record[1]
            if event not in _OF_VCPUS or record[2] & IRQ_CONTEXT:
                continue
            self.last_ns = record[0]
            self._tasks_seen.add(record[2])
            if event in _TELLING:
                self._task_of[record[3]] = record[2]
                if event == _ENTRY:
                    self._enter(record[3], record[0])
                elif event == _EXIT:
                    self._exits = True

    def _enter(self, vcpu: int, ts_ns: int) -> None:
        entries = self._entries.setdefault(vcpu, array("q"))
        self._entries_since.setdefault(vcpu, ts_ns)
        if len(entries) >= MOST_ENTRIES:
            del entries[: MOST_ENTRIES // 2]
            self._entries_since[vcpu] = entries[0]
        entries.append(ts_ns)

    def pid(self, info: VmInfo, vcpu: int) -> int | None:
        """The pid of a vCPU's thread; None if the trace does not tell."""
        for tid, number in info.vcpus.items():
            if number == vcpu:
                return tid
        for tid, comm in info.threads.items():
            match = _VCPU_TASK.match(comm)
            if match and int(match[1]) == vcpu:
                return tid
        task = self._task_of.get(vcpu)
        if task is None and len(self._tasks_seen) == 1:
            task = next(iter(self._tasks_seen))
        return None if task is None else pid_of(self._tasks[task])

    def first_entry_ns(self, vcpu: int, start_ns: int, end_ns: int) -> int | None:
        """When it first entered the guest in a span; None if it did not."""
        entries = self._entries.get(vcpu, array("q"))
        at = bisect_right(entries, start_ns)
        return entries[at] if at < len(entries) and entries[at] < end_ns else None

    def knows_entries(self, vcpu: int, start_ns: int) -> bool:
        """Whether all its entries are known from `start_ns` on: where exits are recorded too."""
        return self._exits and self._entries_since.get(vcpu, start_ns + 1) <= start_ns
