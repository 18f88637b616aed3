"""What a VM's vCPUs did, as far as causes need it: their threads, guest entries, last events."""

from array import array
from bisect import bisect_right

from kvmtick.ticks.host import VmTicks
from kvmtick.trace.decoder import pid_of
from kvmtick.trace.events import IRQ_CONTEXT, Event, Record

__all__ = ["Vcpus"]

MOST_ENTRIES = 1 << 20
"""Guest entries kept of each vCPU: the last ones."""

_OF_VCPUS = frozenset(
    map(int, (Event.KVM_EOI, Event.KVM_ENTRY, Event.KVM_EXIT, Event.KVM_INJ_VIRQ, Event.KVM_PIO))
)


class Vcpus:
    """Follows one VM's records."""

    def __init__(self, vm: VmTicks) -> None:
        self._vm = vm
        self._entries: dict[int, array[int]] = {}
        self._entries_since: dict[int, int] = {}
        self._exits = False
        self.last_ns = 0
        """The last event in any of their threads."""

    def take(self, records: list[Record]) -> None:
        """The next records of the VM: when did one of its vCPUs last do something?"""
        for record in reversed(records):
            if record[1] in _OF_VCPUS and not record[2] & IRQ_CONTEXT:
                self.last_ns = record[0]
                break

    def exit(self, record: Record) -> None:
        """kvm_exit: where these are recorded, all entries are."""
        self._exits = True

    def enter(self, record: Record) -> None:
        """kvm_entry."""
        ts_ns, vcpu = record[0], record[3]
        entries = self._entries.get(vcpu)
        if entries is None:
            entries = self._entries[vcpu] = array("q")
            self._entries_since[vcpu] = ts_ns
        if len(entries) >= MOST_ENTRIES:
            del entries[: MOST_ENTRIES // 2]
            self._entries_since[vcpu] = entries[0]
        entries.append(ts_ns)

    def pid(self, vcpu: int) -> int | None:
        """The pid of a vCPU's thread; None if the trace does not tell."""
        for task, number in self._vm.vcpus.items():
            if number == vcpu:
                return pid_of(self._vm.tasks[task])
        return None

    def first_entry_ns(self, vcpu: int, start_ns: int, end_ns: int) -> int | None:
        """When it first entered the guest in a span; None if it did not."""
        entries = self._entries.get(vcpu, array("q"))
        at = bisect_right(entries, start_ns)
        return entries[at] if at < len(entries) and entries[at] < end_ns else None

    def knows_entries(self, vcpu: int, start_ns: int) -> bool:
        """Whether all its entries are known from `start_ns` on: where exits are recorded too."""
        return self._exits and self._entries_since.get(vcpu, start_ns + 1) <= start_ns
