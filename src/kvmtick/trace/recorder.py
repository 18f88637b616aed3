"""The recorder: one method a tracepoint, records in order, bounded.

Hot code calls the methods; each fills the next entry of a ring: records of one fixed size that are
used again and again. Consumers get what is new by `flush`, which the machine calls between guest
entries and a full ring calls itself: the tick assembler and trace files (`EntryConsumer`) read the
entries where they are, whoever wants to keep records gets tuples. Without a consumer they are
counted as dropped. A consumer must not record.

`detail` is the static key of the tracepoints that verdicts do not need: guest entries and exits,
wake-ups, the end of a work item, what a line's falling edge does in the chips. It is off unless
somebody reads them.
"""

import sys
from collections.abc import Callable
from typing import Final

from mypy_extensions import i64, mypyc_attr

from kvmtick.trace.events import IRQ_CONTEXT, TRACEPOINTS, Event, Record

__all__ = [
    "IDLE_TASK",
    "RING_ENTRIES",
    "Consumer",
    "Entry",
    "EntryConsumer",
    "Now",
    "Recorder",
    "Ring",
]

Consumer = Callable[[list[Record]], None]

IDLE_TASK: Final = 0

RING_ENTRIES: Final = 2048

TAIL: Final = 32

_FIELD_COUNTS: Final = [len(TRACEPOINTS[event].fields) for event in Event]

_HRTIMER_START: Final = int(Event.HRTIMER_START)
_HRTIMER_CANCEL: Final = int(Event.HRTIMER_CANCEL)
_HRTIMER_EXPIRE_ENTRY: Final = int(Event.HRTIMER_EXPIRE_ENTRY)
_WORK_QUEUE: Final = int(Event.WORK_QUEUE)
_WORK_START: Final = int(Event.WORK_START)
_WORK_END: Final = int(Event.WORK_END)
_KVM_SET_IRQ: Final = int(Event.KVM_SET_IRQ)
_KVM_PIC_SET_IRQ: Final = int(Event.KVM_PIC_SET_IRQ)
_KVM_IOAPIC_SET_IRQ: Final = int(Event.KVM_IOAPIC_SET_IRQ)
_KVM_ACK_IRQ: Final = int(Event.KVM_ACK_IRQ)
_KVM_INJ_VIRQ: Final = int(Event.KVM_INJ_VIRQ)
_KVM_VCPU_WAKEUP: Final = int(Event.KVM_VCPU_WAKEUP)
_KVM_PIO: Final = int(Event.KVM_PIO)
_KVM_ENTRY: Final = int(Event.KVM_ENTRY)
_KVM_EXIT: Final = int(Event.KVM_EXIT)
_KVM_APICV_INHIBIT_CHANGED: Final = int(Event.KVM_APICV_INHIBIT_CHANGED)
_PIT_RESET_REINJECT: Final = int(Event.PIT_RESET_REINJECT)
_KVM_APIC_ACCEPT_IRQ: Final = int(Event.KVM_APIC_ACCEPT_IRQ)
_KVM_EOI: Final = int(Event.KVM_EOI)
_KVM_MSI_SET_IRQ: Final = int(Event.KVM_MSI_SET_IRQ)
_KVM_APIC_IPI: Final = int(Event.KVM_APIC_IPI)
_KVM_APIC: Final = int(Event.KVM_APIC)
_KVM_MMIO: Final = int(Event.KVM_MMIO)
_KVM_MSR: Final = int(Event.KVM_MSR)
_KVM_IOAPIC_DELAYED_EOI_INJ: Final = int(Event.KVM_IOAPIC_DELAYED_EOI_INJ)
_KVM_INJ_NMI: Final = int(Event.KVM_INJ_NMI)


@mypyc_attr(allow_interpreted_subclasses=True)
class Now:
    """A clock, as far as the recorder is concerned."""

    __slots__ = ("now_ns",)

    def __init__(self, now_ns: int) -> None:
        self.now_ns = now_ns


class Entry:
    """One record in the ring; fields that its event has not are left over from others."""

    __slots__ = ("a", "b", "c", "d", "e", "event", "is_detail", "task", "ts_ns")

    def __init__(self) -> None:
        self.ts_ns = 0
        self.event = 0
        self.task = 0
        self.is_detail = False
        """It would not be here without `Recorder.detail`: verdicts do not need it."""
        self.a = 0
        self.b = 0
        self.c = 0
        self.d = 0
        self.e = 0

    def record(self) -> Record:
        """The same to keep."""
        count = _FIELD_COUNTS[self.event]
        fields = (self.a, self.b, self.c, self.d, self.e)
        return self.ts_ns, self.event, self.task, *fields[:count]


@mypyc_attr(allow_interpreted_subclasses=True)
class EntryConsumer:
    """Reads the entries in the ring."""

    __slots__ = ()

    def take(self, entries: list[Entry], begin: int, end: int) -> None:
        """`entries[begin:end]` are new; they will be used again."""
        raise NotImplementedError


class Ring:
    """Entries in order: from `begin` to `at` they are new to the consumers."""

    __slots__ = ("at", "begin", "entries", "made", "size")

    def __init__(self, size: int = RING_ENTRIES) -> None:
        self.size: i64 = size
        self.entries: list[Entry] = []
        """At most `size`: made when they are first used."""
        self.made: i64 = 0
        """So many there are."""
        self.begin: i64 = 0
        self.at: i64 = 0

    def last(self, count: int) -> list[Record]:
        """The last records, `count` of them if there are so many."""
        entries, at = self.entries, self.at
        older = entries[at:] if len(entries) == self.size else []
        return [entry.record() for entry in (*older, *entries[:at])[-count:]]


class Recorder:
    """Stamps events with the clock and the running task and keeps them in order."""

    __slots__ = (
        "_clock",
        "_consumers",
        "_entry_consumers",
        "_follower",
        "_ring",
        "detail",
        "dropped",
        "task",
        "tasks",
    )

    def __init__(self, clock: Now, detail: bool = False, ring: Ring | None = None) -> None:
        """`ring`: one that several share; each flushes before another one records."""
        self._clock = clock
        self._ring = Ring() if ring is None else ring
        self._consumers: list[Consumer] = []
        self._entry_consumers: list[EntryConsumer] = []
        self._follower: Callable[[Record], None] | None = None
        self.detail = detail
        self.dropped = 0
        self.tasks = ["<idle>-0"]
        self.task = IDLE_TASK

    def add_task(self, name: str) -> int:
        """Register a thread (`comm-pid`); returns its index for `task`."""
        # The machines of a fleet have threads of the same names.
        self.tasks.append(sys.intern(name))
        return len(self.tasks) - 1

    def add_consumer(self, consumer: Consumer) -> None:
        """Hand all later records, in batches and in order, to `consumer`."""
        self.flush()
        self._consumers.append(consumer)

    def remove_consumer(self, consumer: Consumer) -> None:
        """Hand it what there is and nothing after that."""
        self.flush()
        self._consumers.remove(consumer)

    def add_entry_consumer(self, consumer: EntryConsumer) -> None:
        """Let `consumer` read all later records, in order, while they are in the ring."""
        self.flush()
        self._entry_consumers.append(consumer)

    def remove_entry_consumer(self, consumer: EntryConsumer) -> None:
        """Let it read what there is and nothing after that."""
        self.flush()
        self._entry_consumers.remove(consumer)

    @property
    def full(self) -> bool:
        """There is a batch to hand on."""
        ring = self._ring
        return ring.at - ring.begin >= ring.size // 2

    def flush(self) -> None:
        """Hand the records so far to the consumers."""
        ring = self._ring
        begin, end = ring.begin, ring.at
        if begin == end:
            return
        ring.begin = end
        for reader in self._entry_consumers:
            reader.take(ring.entries, begin, end)
        if self._consumers:
            batch = [entry.record() for entry in ring.entries[begin:end]]
            for consumer in self._consumers:
                consumer(batch)
        elif not self._entry_consumers:
            self.dropped += end - begin

    def tail(self) -> list[Record]:
        """The last records, at most 32: what a crash report shows."""
        return self._ring.last(TAIL)

    def follow(self, follower: Callable[[Record], None]) -> None:
        """Show every later record to `follower` the moment it is made (slow; for stories)."""
        self._follower = follower

    def _add(
        self,
        event: i64,
        a: int,
        b: int = 0,
        c: int = 0,
        d: int = 0,
        e: int = 0,
        is_detail: bool = False,
    ) -> None:
        ring = self._ring
        if ring.at == ring.made:
            self._make_room()
        at = ring.at
        entry = ring.entries[at]
        ring.at = at + 1
        entry.ts_ns = self._clock.now_ns
        entry.event = event
        entry.task = self.task
        entry.is_detail = is_detail
        entry.a = a
        entry.b = b
        entry.c = c
        entry.d = d
        entry.e = e
        if self._follower is not None:
            self._follower(entry.record())

    def _make_room(self) -> None:
        """All entries are used: one more, or a full ring is handed on."""
        ring = self._ring
        if ring.made == ring.size:
            self.flush()
            ring.at = ring.begin = 0
        else:
            ring.entries.append(Entry())
            ring.made += 1

    def enter_irq(self) -> int:
        """An interrupt hits the running task's CPU; returns what to restore `task` to."""
        task = self.task
        self.task = task | IRQ_CONTEXT
        return task

    def hrtimer_start(self, hrtimer: int, function: int, expires: int, was_armed: bool) -> None:
        """A timer was enqueued for `expires` (ns, absolute)."""
        self._add(_HRTIMER_START, hrtimer, function, expires, was_armed)

    def hrtimer_cancel(self, hrtimer: int) -> None:
        """An enqueued timer was taken back."""
        self._add(_HRTIMER_CANCEL, hrtimer)

    def hrtimer_expire_entry(self, hrtimer: int, function: int, now: int) -> None:
        """A timer's callback is about to run."""
        self._add(_HRTIMER_EXPIRE_ENTRY, hrtimer, function, now)

    def sched_kthread_work_queue_work(self, work: int, function: int, worker: int) -> None:
        """A work item was put into a worker's queue."""
        self._add(_WORK_QUEUE, work, function, worker)

    def sched_kthread_work_execute_start(self, work: int, function: int) -> None:
        """The worker starts on an item."""
        self._add(_WORK_START, work, function)

    def sched_kthread_work_execute_end(self, work: int, function: int) -> None:
        """The worker is done with an item (detail; the caller asks)."""
        self._add(_WORK_END, work, function, is_detail=True)

    def kvm_set_irq(
        self, gsi: int, level: int, irq_source_id: int, is_detail: bool = False
    ) -> None:
        """A source drives a GSI."""
        self._add(_KVM_SET_IRQ, gsi, level, irq_source_id, is_detail=is_detail)

    def kvm_pic_set_irq(
        self, chip: int, pin: int, elcr: int, imr: int, coalesced: bool, is_detail: bool = False
    ) -> None:
        """A PIC pin was driven; `coalesced` if its request was set already."""
        self._add(_KVM_PIC_SET_IRQ, chip, pin, elcr, imr, coalesced, is_detail)

    def kvm_ioapic_set_irq(
        self, e: int, pin: int, coalesced: bool, is_detail: bool = False
    ) -> None:
        """An IOAPIC pin was driven; `e` is its redirection entry."""
        self._add(_KVM_IOAPIC_SET_IRQ, e, pin, coalesced, is_detail=is_detail)

    def kvm_ack_irq(self, irqchip: int, pin: int) -> None:
        """The guest acknowledged (EOI, poll) an interrupt of a pin."""
        self._add(_KVM_ACK_IRQ, irqchip, pin)

    def kvm_inj_virq(self, vector: int, soft: bool, reinjected: bool) -> None:
        """An interrupt was written into the VMCS for the next VM entry."""
        self._add(_KVM_INJ_VIRQ, vector, soft, reinjected)

    def kvm_vcpu_wakeup(self, ns: int, waited: bool, valid: bool) -> None:
        """A halted vCPU is runnable again after `ns` (detail; the caller asks)."""
        self._add(_KVM_VCPU_WAKEUP, ns, waited, valid, is_detail=True)

    def kvm_pio(self, rw: int, port: int, size: int, count: int, val: int) -> None:
        """The guest accessed a port; `rw` is 1 for a write."""
        self._add(_KVM_PIO, rw, port, size, count, val)

    def kvm_entry(self, vcpu_id: int, rip: int, intr_info: int) -> None:
        """The vCPU enters the guest (detail; the caller asks)."""
        self._add(_KVM_ENTRY, vcpu_id, rip, intr_info, is_detail=True)

    def kvm_exit(
        self, vcpu_id: int, exit_reason: int, guest_rip: int, info1: int, intr_info: int
    ) -> None:
        """The vCPU left the guest (detail; the caller asks)."""
        self._add(_KVM_EXIT, vcpu_id, exit_reason, guest_rip, info1, intr_info, is_detail=True)

    def kvm_apicv_inhibit_changed(self, reason: int, set_: bool, inhibits: int) -> None:
        """A reason not to use APICv came or went."""
        self._add(_KVM_APICV_INHIBIT_CHANGED, reason, set_, inhibits)

    def kvm_pit_reset_reinject(self, pending: int) -> None:
        """The PIT forgot `pending` counted expiries (the model's own event)."""
        self._add(_PIT_RESET_REINJECT, pending)

    def kvm_apic_accept_irq(self, apicid: int, dm: int, tm: int, vec: int) -> None:
        """A local APIC was sent a message: `dm` delivery mode << 8, `tm` 1 for level."""
        self._add(_KVM_APIC_ACCEPT_IRQ, apicid, dm, tm, vec)

    def kvm_eoi(self, apicid: int, vector: int) -> None:
        """A local APIC's EOI register was written; `vector` -1 if nothing was in service."""
        self._add(_KVM_EOI, apicid, vector)

    def kvm_msi_set_irq(self, address: int, data: int) -> None:
        """A message-signalled interrupt was sent."""
        self._add(_KVM_MSI_SET_IRQ, address, data)

    def kvm_apic_ipi(self, icr_low: int, dest_id: int) -> None:
        """The guest sent an interprocessor interrupt."""
        self._add(_KVM_APIC_IPI, icr_low, dest_id)

    def kvm_apic(self, rw: int, reg: int, val: int, is_detail: bool = False) -> None:
        """A local APIC register was accessed (detail, but for writes of LVTT and SPIV; the caller
        asks); `rw` is 1 for a write.
        """
        self._add(_KVM_APIC, rw, reg, val, is_detail=is_detail)

    def kvm_mmio(self, type_: int, len_: int, gpa: int, val: int) -> None:
        """The guest accessed memory that is no RAM (detail); `type_`: 0 unsatisfied read, 1 read,
        2 write.
        """
        self._add(_KVM_MMIO, type_, len_, gpa, val, is_detail=True)

    def kvm_msr(self, write: int, ecx: int, data: int, exception: bool) -> None:
        """The guest accessed a model-specific register (detail); `exception`: it got #GP."""
        self._add(_KVM_MSR, write, ecx, data, exception, is_detail=True)

    def kvm_ioapic_delayed_eoi_inj(self, e: int) -> None:
        """A level line stayed high over so many EOIs that its next request is put off."""
        self._add(_KVM_IOAPIC_DELAYED_EOI_INJ, e)

    def kvm_inj_nmi(self, vcpu_id: int, pending: int) -> None:
        """An NMI was written into the VMCS for the next VM entry, so many still wait (the model's
        own event).
        """
        self._add(_KVM_INJ_NMI, vcpu_id, pending)
