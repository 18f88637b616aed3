"""The recorder: one method a tracepoint, records in order, in batches, bounded.

Hot code calls the methods; each appends one tuple. Consumers (the tick assembler, a trace file)
get the records in batches by `flush`, which the machine calls between guest entries and which a
full buffer calls itself. Without a consumer only a short tail is kept and the rest is counted as
dropped.

`detail` is the static key of the tracepoints that verdicts do not need: guest entries and exits,
wake-ups, the end of a work item, what a line's falling edge does in the chips. It is off unless
somebody reads them.
"""

from collections import deque
from collections.abc import Callable
from typing import Protocol

from kvmtick.trace.events import IRQ_CONTEXT, Event, Record

__all__ = ["IDLE_TASK", "Consumer", "Recorder"]

Consumer = Callable[[list[Record]], None]

IDLE_TASK = 0

BATCH = 2048

TAIL = 32

_HRTIMER_START = int(Event.HRTIMER_START)
_HRTIMER_CANCEL = int(Event.HRTIMER_CANCEL)
_HRTIMER_EXPIRE_ENTRY = int(Event.HRTIMER_EXPIRE_ENTRY)
_WORK_QUEUE = int(Event.WORK_QUEUE)
_WORK_START = int(Event.WORK_START)
_WORK_END = int(Event.WORK_END)
_KVM_SET_IRQ = int(Event.KVM_SET_IRQ)
_KVM_PIC_SET_IRQ = int(Event.KVM_PIC_SET_IRQ)
_KVM_IOAPIC_SET_IRQ = int(Event.KVM_IOAPIC_SET_IRQ)
_KVM_ACK_IRQ = int(Event.KVM_ACK_IRQ)
_KVM_INJ_VIRQ = int(Event.KVM_INJ_VIRQ)
_KVM_VCPU_WAKEUP = int(Event.KVM_VCPU_WAKEUP)
_KVM_PIO = int(Event.KVM_PIO)
_KVM_ENTRY = int(Event.KVM_ENTRY)
_KVM_EXIT = int(Event.KVM_EXIT)
_KVM_APICV_INHIBIT_CHANGED = int(Event.KVM_APICV_INHIBIT_CHANGED)
_PIT_RESET_REINJECT = int(Event.PIT_RESET_REINJECT)
_KVM_APIC_ACCEPT_IRQ = int(Event.KVM_APIC_ACCEPT_IRQ)
_KVM_EOI = int(Event.KVM_EOI)
_KVM_MSI_SET_IRQ = int(Event.KVM_MSI_SET_IRQ)
_KVM_APIC_IPI = int(Event.KVM_APIC_IPI)
_KVM_APIC = int(Event.KVM_APIC)
_KVM_MMIO = int(Event.KVM_MMIO)
_KVM_MSR = int(Event.KVM_MSR)
_KVM_IOAPIC_DELAYED_EOI_INJ = int(Event.KVM_IOAPIC_DELAYED_EOI_INJ)
_KVM_INJ_NMI = int(Event.KVM_INJ_NMI)


class HasNow(Protocol):
    """A clock, as far as the recorder is concerned."""

    now_ns: int


class _FollowedBuffer(list[Record]):
    """A buffer that shows each record as it comes."""

    def __init__(self, follower: Callable[[Record], None]) -> None:
        super().__init__()
        self._follower = follower

    def append(self, record: Record) -> None:
        self._follower(record)
        super().append(record)


class Recorder:
    """Stamps events with the clock and the running task and keeps them in order."""

    __slots__ = (
        "_buffer",
        "_clock",
        "_consumers",
        "_follower",
        "_tail",
        "detail",
        "dropped",
        "task",
        "tasks",
    )

    def __init__(self, clock: HasNow, detail: bool = False) -> None:
        self._clock = clock
        self._buffer: list[Record] = []
        self._consumers: list[Consumer] = []
        self._follower: Callable[[Record], None] | None = None
        self._tail: deque[Record] = deque(maxlen=TAIL)
        self.detail = detail
        self.dropped = 0
        self.tasks = ["<idle>-0"]
        self.task = IDLE_TASK

    def add_task(self, name: str) -> int:
        """Register a thread (`comm-pid`); returns its index for `task`."""
        self.tasks.append(name)
        return len(self.tasks) - 1

    def add_consumer(self, consumer: Consumer) -> None:
        """Hand all later records, in batches and in order, to `consumer`."""
        self.flush()
        self._consumers.append(consumer)

    def remove_consumer(self, consumer: Consumer) -> None:
        """Hand it what there is and nothing after that."""
        self.flush()
        self._consumers.remove(consumer)

    @property
    def full(self) -> bool:
        """A batch is ready."""
        return len(self._buffer) >= BATCH

    def flush(self) -> None:
        """Hand the records so far to the consumers."""
        batch = self._buffer
        if not batch:
            return
        self._buffer = [] if self._follower is None else _FollowedBuffer(self._follower)
        self._tail.extend(batch[-TAIL:])
        if not self._consumers:
            self.dropped += len(batch)
        for consumer in self._consumers:
            consumer(batch)

    def tail(self) -> list[Record]:
        """The last records, at most 32: what a crash report shows."""
        return [*self._tail, *self._buffer][-TAIL:]

    def follow(self, follower: Callable[[Record], None]) -> None:
        """Show every later record to `follower` the moment it is made (slow; for stories)."""
        self.flush()
        self._follower = follower
        self._buffer = _FollowedBuffer(follower)

    def enter_irq(self) -> int:
        """An interrupt hits the running task's CPU; returns what to restore `task` to."""
        task = self.task
        self.task = task | IRQ_CONTEXT
        return task

    def hrtimer_start(self, hrtimer: int, function: int, expires: int, was_armed: bool) -> None:
        """A timer was enqueued for `expires` (ns, absolute)."""
        self._buffer.append(
            (self._clock.now_ns, _HRTIMER_START, self.task, hrtimer, function, expires, was_armed)
        )

    def hrtimer_cancel(self, hrtimer: int) -> None:
        """An enqueued timer was taken back."""
        self._buffer.append((self._clock.now_ns, _HRTIMER_CANCEL, self.task, hrtimer))

    def hrtimer_expire_entry(self, hrtimer: int, function: int, now: int) -> None:
        """A timer's callback is about to run."""
        self._buffer.append(
            (self._clock.now_ns, _HRTIMER_EXPIRE_ENTRY, self.task, hrtimer, function, now)
        )

    def sched_kthread_work_queue_work(self, work: int, function: int, worker: int) -> None:
        """A work item was put into a worker's queue."""
        self._buffer.append((self._clock.now_ns, _WORK_QUEUE, self.task, work, function, worker))

    def sched_kthread_work_execute_start(self, work: int, function: int) -> None:
        """The worker starts on an item."""
        self._buffer.append((self._clock.now_ns, _WORK_START, self.task, work, function))

    def sched_kthread_work_execute_end(self, work: int, function: int) -> None:
        """The worker is done with an item (detail; the caller asks)."""
        self._buffer.append((self._clock.now_ns, _WORK_END, self.task, work, function))

    def kvm_set_irq(self, gsi: int, level: int, irq_source_id: int) -> None:
        """A source drives a GSI."""
        self._buffer.append(
            (self._clock.now_ns, _KVM_SET_IRQ, self.task, gsi, level, irq_source_id)
        )

    def kvm_pic_set_irq(self, chip: int, pin: int, elcr: int, imr: int, coalesced: bool) -> None:
        """A PIC pin was driven; `coalesced` if its request was set already."""
        self._buffer.append(
            (self._clock.now_ns, _KVM_PIC_SET_IRQ, self.task, chip, pin, elcr, imr, coalesced)
        )

    def kvm_ioapic_set_irq(self, e: int, pin: int, coalesced: bool) -> None:
        """An IOAPIC pin was driven; `e` is its redirection entry."""
        self._buffer.append((self._clock.now_ns, _KVM_IOAPIC_SET_IRQ, self.task, e, pin, coalesced))

    def kvm_ack_irq(self, irqchip: int, pin: int) -> None:
        """The guest acknowledged (EOI, poll) an interrupt of a pin."""
        self._buffer.append((self._clock.now_ns, _KVM_ACK_IRQ, self.task, irqchip, pin))

    def kvm_inj_virq(self, vector: int, soft: bool, reinjected: bool) -> None:
        """An interrupt was written into the VMCS for the next VM entry."""
        self._buffer.append(
            (self._clock.now_ns, _KVM_INJ_VIRQ, self.task, vector, soft, reinjected)
        )

    def kvm_vcpu_wakeup(self, ns: int, waited: bool, valid: bool) -> None:
        """A halted vCPU is runnable again after `ns` (detail; the caller asks)."""
        self._buffer.append((self._clock.now_ns, _KVM_VCPU_WAKEUP, self.task, ns, waited, valid))

    def kvm_pio(self, rw: int, port: int, size: int, count: int, val: int) -> None:
        """The guest accessed a port; `rw` is 1 for a write."""
        buffer = self._buffer
        buffer.append((self._clock.now_ns, _KVM_PIO, self.task, rw, port, size, count, val))
        # A guest can write ports for ever within one entry.
        if len(buffer) >= BATCH:
            self.flush()

    def kvm_entry(self, vcpu_id: int, rip: int, intr_info: int) -> None:
        """The vCPU enters the guest (detail; the caller asks)."""
        self._buffer.append((self._clock.now_ns, _KVM_ENTRY, self.task, vcpu_id, rip, intr_info))

    def kvm_exit(
        self, vcpu_id: int, exit_reason: int, guest_rip: int, info1: int, intr_info: int
    ) -> None:
        """The vCPU left the guest (detail; the caller asks)."""
        self._buffer.append(
            (
                self._clock.now_ns,
                _KVM_EXIT,
                self.task,
                vcpu_id,
                exit_reason,
                guest_rip,
                info1,
                intr_info,
            )
        )

    def kvm_apicv_inhibit_changed(self, reason: int, set_: bool, inhibits: int) -> None:
        """A reason not to use APICv came or went."""
        self._buffer.append(
            (self._clock.now_ns, _KVM_APICV_INHIBIT_CHANGED, self.task, reason, set_, inhibits)
        )

    def kvm_pit_reset_reinject(self, pending: int) -> None:
        """The PIT forgot `pending` counted expiries (the model's own event)."""
        self._buffer.append((self._clock.now_ns, _PIT_RESET_REINJECT, self.task, pending))

    def kvm_apic_accept_irq(self, apicid: int, dm: int, tm: int, vec: int) -> None:
        """A local APIC was sent a message: `dm` delivery mode << 8, `tm` 1 for level."""
        self._buffer.append(
            (self._clock.now_ns, _KVM_APIC_ACCEPT_IRQ, self.task, apicid, dm, tm, vec)
        )

    def kvm_eoi(self, apicid: int, vector: int) -> None:
        """A local APIC's EOI register was written; `vector` -1 if nothing was in service."""
        self._buffer.append((self._clock.now_ns, _KVM_EOI, self.task, apicid, vector))

    def kvm_msi_set_irq(self, address: int, data: int) -> None:
        """A message-signalled interrupt was sent."""
        self._buffer.append((self._clock.now_ns, _KVM_MSI_SET_IRQ, self.task, address, data))

    def kvm_apic_ipi(self, icr_low: int, dest_id: int) -> None:
        """The guest sent an interprocessor interrupt."""
        self._buffer.append((self._clock.now_ns, _KVM_APIC_IPI, self.task, icr_low, dest_id))

    def kvm_apic(self, rw: int, reg: int, val: int) -> None:
        """A local APIC register was accessed (detail, but for writes of LVTT and SPIV; the caller
        asks); `rw` is 1 for a write.
        """
        self._buffer.append((self._clock.now_ns, _KVM_APIC, self.task, rw, reg, val))

    def kvm_mmio(self, type_: int, len_: int, gpa: int, val: int) -> None:
        """The guest accessed memory that is no RAM (detail); `type_`: 0 unsatisfied read, 1 read,
        2 write.
        """
        self._buffer.append((self._clock.now_ns, _KVM_MMIO, self.task, type_, len_, gpa, val))

    def kvm_msr(self, write: int, ecx: int, data: int, exception: bool) -> None:
        """The guest accessed a model-specific register (detail); `exception`: it got #GP."""
        self._buffer.append((self._clock.now_ns, _KVM_MSR, self.task, write, ecx, data, exception))

    def kvm_ioapic_delayed_eoi_inj(self, e: int) -> None:
        """A level line stayed high over so many EOIs that its next request is put off."""
        self._buffer.append((self._clock.now_ns, _KVM_IOAPIC_DELAYED_EOI_INJ, self.task, e))

    def kvm_inj_nmi(self, vcpu_id: int, pending: int) -> None:
        """An NMI was written into the VMCS for the next VM entry, so many still wait (the model's
        own event).
        """
        self._buffer.append((self._clock.now_ns, _KVM_INJ_NMI, self.task, vcpu_id, pending))
