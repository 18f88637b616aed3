"""The PIT's ticks: from the expiry through the worker's run to the chips that it pulses.

The kernel's `pending` is mirrored from the events alone, so that the same code can judge any trace
that has them. Which pulse belongs to which expiry: with reinject on the oldest expiry without a
pulse gets the next one; with reinject off the one that queued the work.

One run of the worker may reach a vCPU several ways: by the PIC, by messages of the IOAPIC or an MSI
entry, and by the NMI watchdog, which comes last. What they gave is weighed when the run is over.
"""

from collections import deque

from kvmtick.ticks import pic
from kvmtick.ticks.apics import DM_FIXED, DM_LOWEST, DM_NMI, LocalApics
from kvmtick.ticks.pic import PicPin
from kvmtick.ticks.source import Source
from kvmtick.ticks.tick import Claim, Tick
from kvmtick.ticks.verdict import Path, Verdict, Where
from kvmtick.trace.events import IRQ_CONTEXT, ApicvInhibitReason, Event, Irqchip, Record

__all__ = ["PLAIN_TICK", "PitTicks"]

PLAIN_TICK = bytes(
    (
        Event.HRTIMER_EXPIRE_ENTRY,
        Event.WORK_QUEUE,
        Event.HRTIMER_START,
        Event.WORK_START,
        Event.KVM_SET_IRQ,
        Event.KVM_PIC_SET_IRQ,
        Event.KVM_INJ_VIRQ,
        Event.KVM_PIO,
        Event.KVM_ACK_IRQ,
    )
)
"""The events of a tick by way of the PIC that nothing disturbs."""

PIT_GSI = 0
PIT_SOURCE_ID = 2
NO_GSI = -1
NO_TASK = -1
IMR_IRQ0 = 1
NOT_END_OF_INTERRUPT = pic.ICW1 | pic.OCW3
IOAPIC_MASKED = 1 << 16
MSI_MODE = 0x700

_OPEN = Verdict.OUTSTANDING
_DELIVERED = Verdict.DELIVERED
_LATE = Verdict.LATE
_IOAPIC = int(Irqchip.IOAPIC)
_PIC = Path.PIC
_LAPIC = Path.LAPIC

_DEPTH = {Where.WORKER: 0, Where.PIC: 1, Where.IOAPIC: 2, Where.LAPIC: 3}
_NO_PIN = (Where.IOAPIC, "no pin it leads to was open")
_NOBODY = (Where.LAPIC, "no local APIC took the message")
_PIC_LOSSES = {
    pic.MASKED: (Where.PIC, "IRQ 0 was masked and its request latched already"),
    pic.COALESCED: (Where.PIC, "the PIC's request was still set"),
    pic.HELD: (Where.PIC, "another source holds the line high: no edge"),
}

_Loss = tuple[Where, str]


class PitTicks(Source):
    """Follows the PIT's hrtimer, its worker and GSI 0."""

    def __init__(self, apics: LocalApics, keep: int) -> None:
        super().__init__("pit", _PIC, keep)
        self.pic = PicPin()
        self.plain_task = NO_TASK
        self._plain_vcpu = 0
        self._apics = apics
        self._reinject = False
        self._expires_ns = 0
        self._expiring: Tick | None = None
        self._pending = 0
        self._work_queued = False
        self._work_ns = 0
        self._worker = NO_TASK
        self._seen_by_worker = 0
        self._run_pulsed = True
        self._held_back = 0
        self._waiting: deque[Tick] = deque()
        self._counted: Tick | None = None
        self._line = NO_GSI
        self._is_own_pulse = False
        self._held_by: set[int] = set()
        self._ioapic_pin = 0
        self._run_tick: Tick | None = None
        self._fresh: list[Claim] = []
        self._accepted = 0
        self._msi: tuple[int, int] | None = None
        self._msi_taken = False
        self._coalesced: _Loss | None = None
        self._masked: _Loss | None = None

    # A whole life at once.

    def is_idle(self) -> bool:
        """Reinject is on and no tick is under way."""
        return (
            self._reinject
            and not self._pending
            and not self._waiting
            and not self._work_queued
            and self._run_tick is None
            and not self._held_by
            and self.pic.is_idle
        )

    def plain_tick(self, batch: list[Record], at: int) -> bool:
        """The same as record by record, while the PIT is idle: expiry, pulse, injection and EOI in
        a row. False, and nothing done, if it is not that.
        """
        _, _, _, gsi, level, source = batch[at + 4]
        accept_ns, _, _, chip, pin, _, imr, coalesced = batch[at + 5]
        inject_ns, _, task, vector, _, reinjected = batch[at + 6]
        _, _, _, is_write, port, _, _, value = batch[at + 7]
        eoi_ns, _, _, irqchip, acked_pin = batch[at + 8]
        if (
            gsi != PIT_GSI
            or not level
            or source != PIT_SOURCE_ID
            or chip
            or pin
            or imr & IMR_IRQ0
            or coalesced
            or vector != self._plain_vector
            or task != self.plain_task
            or reinjected
            or not is_write
            or port != pic.PORT_COMMAND
            or value & NOT_END_OF_INTERRUPT
            or irqchip
            or acked_pin
        ):
            return False
        if not self._run_pulsed:
            self._held_back = self._seen_by_worker
        self.expired = self._seen_by_worker = index = self.expired + 1
        self.reached += 1
        expiry_ns, next_ns, work_ns = self._expires_ns, batch[at + 2][5], batch[at + 3][0]
        self._expires_ns = next_ns
        self._work_ns = work_ns
        self._run_pulsed = True
        verdict = _DELIVERED if inject_ns < next_ns else _LATE
        self._judged[verdict] += 1
        self._kept.append(
            (
                index,
                expiry_ns,
                batch[at][5],
                next_ns - expiry_ns,
                work_ns,
                accept_ns,
                inject_ns,
                eoi_ns,
                vector,
                verdict,
                _PIC,
                self._plain_vcpu,
            )
        )
        self._reach_rows.append((work_ns - expiry_ns, accept_ns - work_ns, inject_ns - accept_ns))
        self._end_rows.append((eoi_ns - inject_ns, eoi_ns - expiry_ns))
        return True
