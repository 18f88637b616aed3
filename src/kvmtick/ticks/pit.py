"""The PIT's ticks: from the expiry through the worker's run to the chips that it pulses.

The kernel's `pending` is mirrored from the events alone, so that the same code can judge any trace
that has them. Which pulse belongs to which expiry: with reinject on the oldest expiry without a
pulse gets the next one; with reinject off the one that queued the work.

Where the records begin in the middle, ticks are `unknown` until the guest acknowledged a pulse and
nothing is pending. Whether reinject is on may not be known either. It is on if a run of the worker
gives no pulse or an acknowledgement queues the work, off if a second pulse comes without an
acknowledgement between; while both may be, both would give each tick the same verdict, or the tick
is `unknown`.

One run of the worker may reach a vCPU several ways: by the PIC, by messages of the IOAPIC or an MSI
entry, and by the NMI watchdog, which comes last. What they gave is weighed when the run is over.
"""

import re
from collections import deque
from typing import Final

from kvmtick.ticks import pic
from kvmtick.ticks.apics import DM_FIXED, DM_LOWEST, DM_NMI, LocalApics
from kvmtick.ticks.lives import Keep
from kvmtick.ticks.messages import Messages
from kvmtick.ticks.pic import PicPin
from kvmtick.ticks.source import NO_VECTOR, Source
from kvmtick.ticks.tick import Claim, Tick
from kvmtick.ticks.verdict import Path, Verdict, Where
from kvmtick.trace.events import IRQ_CONTEXT, ApicvInhibitReason, Event, Function, Irqchip, Record
from kvmtick.trace.recorder import Entry

__all__ = ["HOST_TICK", "PitTicks"]

HOST_TICK: Final = b"%c%c%c%c(%c%c?%c)(%c%c?%c)?%c?%c%c%c" % (
    *(Event.HRTIMER_EXPIRE_ENTRY, Event.WORK_QUEUE, Event.HRTIMER_START, Event.WORK_START),
    *(Event.KVM_SET_IRQ, Event.KVM_IOAPIC_SET_IRQ, Event.KVM_PIC_SET_IRQ),
    *(Event.KVM_SET_IRQ, Event.KVM_IOAPIC_SET_IRQ, Event.KVM_PIC_SET_IRQ),
    Event.WORK_END,
    *(Event.KVM_INJ_VIRQ, Event.KVM_PIO, Event.KVM_ACK_IRQ),
)
"""The events of a tick by way of the PIC that nothing disturbs, with what a kernel writes beside: a
pattern; its groups are the edges of the pulse.
"""

NOT_PLAIN: Final = 0
BY_PIC: Final = 1
BY_IOAPIC: Final = 2
"""By which way the next tick may be plain."""

PIC_ENTRIES: Final = 9
IOAPIC_ENTRIES: Final = 11
"""Of a plain tick of a simulated run."""

PIT_GSI: Final = 0
PIT_SOURCE_ID: Final = 2
NO_GSI: Final = -1
NO_PIN: Final = -1
NO_TASK: Final = -1
IMR_IRQ0: Final = 1
NOT_END_OF_INTERRUPT: Final = pic.ICW1 | pic.OCW3
IOAPIC_MASKED: Final = 1 << 16
MSI_MODE: Final = 0x700

QUEUED_NS: Final = 50_000
"""So long after an acknowledgement the work that it calls for is queued at the latest."""

REINJECT_UNKNOWN: Final = "whether ticks are reinjected was not known yet"

_WORK_QUEUE: Final = int(Event.WORK_QUEUE)
_HRTIMER_START: Final = int(Event.HRTIMER_START)
_WORK_START: Final = int(Event.WORK_START)
_KVM_SET_IRQ: Final = int(Event.KVM_SET_IRQ)
_KVM_PIC_SET_IRQ: Final = int(Event.KVM_PIC_SET_IRQ)
_KVM_IOAPIC_SET_IRQ: Final = int(Event.KVM_IOAPIC_SET_IRQ)
_KVM_APIC_ACCEPT_IRQ: Final = int(Event.KVM_APIC_ACCEPT_IRQ)
_KVM_INJ_VIRQ: Final = int(Event.KVM_INJ_VIRQ)
_KVM_PIO: Final = int(Event.KVM_PIO)
_KVM_EOI: Final = int(Event.KVM_EOI)
_KVM_ACK_IRQ: Final = int(Event.KVM_ACK_IRQ)
_PIT_TIMER_FN: Final = int(Function.PIT_TIMER_FN)
_PIT_DO_WORK: Final = int(Function.PIT_DO_WORK)
_OPEN: Final = Verdict.OUTSTANDING
_DELIVERED: Final = Verdict.DELIVERED
_LATE: Final = Verdict.LATE
_IOAPIC: Final = int(Irqchip.IOAPIC)
_PIC: Final = Path.PIC
_LAPIC: Final = Path.LAPIC

_DEPTH: Final = {Where.WORKER: 0, Where.PIC: 1, Where.IOAPIC: 2, Where.LAPIC: 3}
_NOT_RUN: Final = "the worker had not run yet"
_NO_PIN: Final = (Where.IOAPIC, "no pin it leads to was open")
_NOBODY: Final = (Where.LAPIC, "no local APIC took the message")
_DOUBTFUL: Final = "IRQ 0 was masked, and whether its request was latched already is not known"
_NMI_UNSEEN: Final = "this host writes no event when it injects an NMI"
_PIC_LOSSES: Final = {
    pic.MASKED: (Where.PIC, "IRQ 0 was masked and its request latched already"),
    pic.COALESCED: (Where.PIC, "the PIC's request was still set"),
    pic.HELD: (Where.PIC, "another source holds the line high: no edge"),
}

_Loss = tuple[Where, str]


class PitTicks(Source):
    """Follows the PIT's hrtimer, its worker and GSI 0."""

    def __init__(self, apics: LocalApics, keep: Keep) -> None:
        super().__init__("pit", _PIC, keep, has_worker=True)
        self.pic = PicPin()
        self.plain_task = NO_TASK
        self._pic_vcpu = 0
        self._pic_vector = NO_VECTOR
        self._way = NOT_PLAIN
        self._free_task = NO_TASK
        """The thread of `_free_vcpu`, on which `_free_vector` is neither requested nor in service.
        """
        self._free_vcpu = 0
        self._free_vector = NO_VECTOR
        self._apics = apics
        self._reinject: bool | None = False
        self._merged: list[Tick] = []
        """Those who wait only if reinject is on: they expired when the work was queued already."""
        self._irq_ack: bool | None = True
        self._ack_ns = 0
        self._reset_ns = -1
        self._expires_ns = 0
        self._expiring: Tick | None = None
        self._queued_for = 0
        """The index of the last expiry that queued the work; 0 where no such event was seen."""
        self._pending = 0
        self._work_queued = False
        self._work_known = True
        self._queues: Tick | None = None
        """It gets the next pulse, if now the work is queued for it."""
        self._work_ns = 0
        self.worker = NO_TASK
        self._seen_by_worker = 0
        self._run_pulsed = True
        self._held_back = 0
        self._waiting: list[Tick] = []
        self._counted: Tick | None = None
        self._line = NO_GSI
        self._line_task = NO_TASK
        self._is_own_pulse = False
        self._held_by: list[int] = []
        self._ioapic_pin = 0
        self._run_tick: Tick | None = None
        self._fresh: list[Claim] = []
        self._accepted = 0
        self._msi: tuple[int, int] | None = None
        self._msi_taken = False
        self._coalesced: _Loss | None = None
        self._masked: _Loss | None = None
        self._unsure = ""
        """Why the count of what is pending is not known: records are missing."""
        self._unpulsed: deque[Tick] | None = None
        """They expired since then, and nothing was pulsed yet. None until there is one: a deque is
        larger than a chip, and most timers need none.
        """
        self._nmi_unseen = False
        self._doubtful = False
        self._unseen: deque[Tick] | None = None
        """Open ticks that an NMI may have brought to the guest, which no record would tell; None
        until there is one.
        """

    # A whole life at once.

    def is_idle(self) -> bool:
        """No tick is under way: the next one may be plain, by way of the PIC."""
        vector = self.pic.vector
        self._pic_vector = NO_VECTOR if vector is None else vector
        return self._has_none and self.pic.is_idle

    def look(self, may_be: bool) -> None:
        """By which way the next tick may be plain, if it may be as far as others are concerned."""
        self._way = NOT_PLAIN
        self._free_task = NO_TASK
        if may_be and self.is_idle():
            self._way = BY_PIC
        elif may_be and self._has_none and self.pic.is_latched:
            self._way = BY_IOAPIC

    @property
    def is_out_of_the_way(self) -> bool:
        """A vCPU's next message and its injection are not the PIT's."""
        return self._run_tick is None and self.pic.takes_none

    @property
    def _has_none(self) -> bool:
        """No tick is under way."""
        return (
            not self._pending
            and not self._waiting
            and not self._work_queued
            and self._run_tick is None
            and not self._held_by
            and not self._unsure
            and not self.blind
            and self._expires_ns > 0
            and self._no_expiry is None
        )

    def take_tick(self, entries: list[Entry], at: int, end: int, messages: Messages) -> int:
        """The same as record by record: expiry, pulse, injection and EOI in a row. How many entries
        that took; 0, and nothing done, if it is not that.
        """
        way = self._way
        if way == NOT_PLAIN or end - at < PIC_ENTRIES:
            return 0
        queue, start, run = entries[at + 1], entries[at + 2], entries[at + 3]
        pulse, line = entries[at + 4], entries[at + 5]
        worker = self.worker
        if (
            queue.event != _WORK_QUEUE
            or start.event != _HRTIMER_START
            or run.event != _WORK_START
            or pulse.event != _KVM_SET_IRQ
            or line.event != _KVM_PIC_SET_IRQ
            or queue.b != _PIT_DO_WORK
            or start.b != _PIT_TIMER_FN
            or not start.task & IRQ_CONTEXT
            or run.b != _PIT_DO_WORK
            or run.task != worker
            or pulse.task != worker
            or line.task != worker
            or pulse.a != PIT_GSI
            or not pulse.b
            or pulse.c != PIT_SOURCE_ID
            or line.a
            or line.b
        ):
            return 0
        if way == BY_PIC:
            return self._take_by_pic(entries, at, messages)
        if end - at < IOAPIC_ENTRIES:
            return 0
        return self._take_by_ioapic(entries, at, messages)

    def _take_by_pic(self, entries: list[Entry], at: int, messages: Messages) -> int:
        line, inject, command = entries[at + 5], entries[at + 6], entries[at + 7]
        ack = entries[at + 8]
        if (
            inject.event != _KVM_INJ_VIRQ
            or command.event != _KVM_PIO
            or ack.event != _KVM_ACK_IRQ
            or line.d & IMR_IRQ0
            or line.e
            or inject.task != self.plain_task
            or inject.a != self._pic_vector
            or inject.c
            or command.task != inject.task
            or not command.a
            or command.b != pic.PORT_COMMAND
            or command.e & NOT_END_OF_INTERRUPT
            or ack.a
            or ack.b
        ):
            return 0
        messages.forget(inject.task)
        if (
            self._plain_path is not _PIC
            or self._plain_vcpu != self._pic_vcpu
            or self._plain_vector != self._pic_vector
        ):
            self.go_plain(_PIC, self._pic_vcpu, self._pic_vector)
        self._take_whole(
            entries[at].c,
            entries[at + 2].c,
            entries[at + 3].ts_ns,
            line.ts_ns,
            inject.ts_ns,
            ack.ts_ns,
            ack.ts_ns,
        )
        return PIC_ENTRIES

    def _take_by_ioapic(self, entries: list[Entry], at: int, messages: Messages) -> int:
        line, accept, ioapic = entries[at + 5], entries[at + 6], entries[at + 7]
        inject, eoi, ack = entries[at + 8], entries[at + 9], entries[at + 10]
        worker, task, vcpu, vector = self.worker, inject.task, accept.a, accept.d
        if (
            accept.event != _KVM_APIC_ACCEPT_IRQ
            or ioapic.event != _KVM_IOAPIC_SET_IRQ
            or inject.event != _KVM_INJ_VIRQ
            or eoi.event != _KVM_EOI
            or ack.event != _KVM_ACK_IRQ
            or not line.d & IMR_IRQ0
            or not self.pic.has_imr(line.d)
            or accept.task != worker
            or accept.b
            or ioapic.task != worker
            or ioapic.a & IOAPIC_MASKED
            or ioapic.c
            or inject.a != vector
            or inject.c
            or eoi.task != task
            or eoi.a != vcpu
            or eoi.b != vector
            or ack.a != _IOAPIC
            or ack.b != ioapic.b
        ):
            return 0
        if task != self._free_task or vcpu != self._free_vcpu or vector != self._free_vector:
            if messages.vcpu_of(task) != vcpu or not self._apics.is_free(vcpu, vector, self):
                return 0
            self._free_task, self._free_vcpu, self._free_vector = task, vcpu, vector
            self.go_plain(Path.IOAPIC, vcpu, vector)
        self._ioapic_pin = ioapic.b
        self.pic.new_pulse()
        self._take_whole(
            entries[at].c,
            entries[at + 2].c,
            entries[at + 3].ts_ns,
            accept.ts_ns,
            inject.ts_ns,
            eoi.ts_ns,
            ack.ts_ns,
        )
        messages.end(task, vector)
        return IOAPIC_ENTRIES

    def _take_whole(
        self,
        fired_ns: int,
        next_ns: int,
        work_ns: int,
        accept_ns: int,
        inject_ns: int,
        eoi_ns: int,
        ack_ns: int,
    ) -> None:
        """What a plain tick leaves behind."""
        if not self._run_pulsed:
            self._held_back = self._seen_by_worker
        expiry_ns = self._expires_ns
        self._expires_ns = next_ns
        self._work_ns = work_ns
        self._run_pulsed = self._irq_ack = self._is_own_pulse = True
        self._line = PIT_GSI
        self._line_task = self.worker
        self._ack_ns = ack_ns
        self.take_plain(fired_ns, next_ns, expiry_ns, work_ns, accept_ns, inject_ns, eoi_ns)
        self._seen_by_worker = self.expired

    def host_tick(self, batch: list[Record], tick: re.Match[bytes]) -> bool:
        """The same of a kernel's records, which match `HOST_TICK`, while the PIT is idle. False,
        and nothing done, if it is not plain.
        """
        at, pulse, falling = tick.start(), tick.start(1), tick.start(2)
        pic_at, end = tick.end(1) - 1, tick.end()
        expiry, start, run = batch[at], batch[at + 2], batch[at + 3]
        worker = run[2]
        if (
            expiry[4] != _PIT_TIMER_FN
            or run[4] != _PIT_DO_WORK
            or start[2:5] != expiry[2:5]
            or not start[2] & IRQ_CONTEXT
            or batch[at + 1][2] != expiry[2]
            or batch[pulse][2] != worker
            or batch[pic_at][2] != worker
        ):
            return False
        if pic_at - pulse == 2:
            _, _, task, entry, ioapic_pin, _ = batch[pulse + 1]
            if task != worker or not entry & IOAPIC_MASKED:
                return False
        else:
            ioapic_pin = self._ioapic_pin
        if falling >= 0 and batch[falling][2:] != (worker, PIT_GSI, 0, PIT_SOURCE_ID):
            return False
        _, _, _, gsi, level, source = batch[pulse]
        accept_ns, _, _, chip, pin, _, imr, coalesced = batch[pic_at]
        inject_ns, _, task, vector, _, reinjected = batch[end - 3]
        _, _, _, is_write, port, _, _, value = batch[end - 2]
        eoi_ns, _, _, irqchip, acked_pin = batch[end - 1]
        if (
            gsi != PIT_GSI
            or not level
            or source != PIT_SOURCE_ID
            or chip
            or pin
            or imr & IMR_IRQ0
            or coalesced
            or vector != self._pic_vector
            or task != self.plain_task
            or reinjected
            or not is_write
            or port != pic.PORT_COMMAND
            or value & NOT_END_OF_INTERRUPT
            or irqchip
            or acked_pin
        ):
            return False
        self.worker = worker
        self.go_plain(_PIC, self._pic_vcpu, vector)
        self._take_whole(expiry[5], start[5], run[0], accept_ns, inject_ns, eoi_ns, eoi_ns)
        self._ioapic_pin = ioapic_pin
        self._line = PIT_GSI if falling < 0 else NO_GSI
        return True

    # The timer and the worker.

    def hrtimer_start(self, record: Record) -> None:
        """The PIT's timer was armed, by the guest or by its own callback."""
        expiring = self._expiring
        if expiring is not None and record[2] & IRQ_CONTEXT:
            self.rearmed(expiring, record[5])
            self._check_queued(expiring)
        else:
            self._no_expiry = None
            if record[0] == self._reset_ns:
                # Programming waits for the worker first (create_pit_timer).
                self._work_known = True
                self._work_queued = False
                self._unsure = ""
        self._expiring = None
        self._expires_ns = record[5]

    def _check_queued(self, tick: Tick) -> None:
        """Its callback queued no work, so that still was queued, whatever the worker's start seemed
        to say: the worker takes its work before that is recorded.
        """
        if self._reinject is not False or self._queued_for in (0, tick.index):
            return
        if self._waiting and self._waiting[-1] is tick:
            self._waiting.pop()
            self._work_queued = True
            self.judge(tick, Verdict.COALESCED, Where.WORKER, _NOT_RUN)

    def hrtimer_expire_entry(self, record: Record) -> None:
        """A tick begins."""
        if len(self._waiting) > self._pending:
            self._drop_uncounted()
        if self._unsure and self._is_clear(record[0]):
            self._unsure = ""
            self._give_up_unpulsed(REINJECT_UNKNOWN)
        if self._reinject is None and self._waiting and self._irq_ack and not self._work_queued:
            self._is_not_owed(record[0])
        tick = self._expiring = self.begin(self._expires_ns, record[5])
        if self._reinject is False:
            self._expire_once(tick)
        elif self._unsure:
            if self._unpulsed is None:
                self._unpulsed = deque(maxlen=self._keep)
            self._unpulsed.append(tick)
        else:
            self._pending += 1
            if self._reinject is None and self._work_queued:
                self._merged.append(tick)
            self._waiting.append(tick)

    def _expire_once(self, tick: Tick) -> None:
        """Nothing is counted: only the tick that queues the work gets a pulse."""
        if not self._work_known:
            self._give_up_queuing()
            self._queues = tick
        elif self._work_queued:
            self.judge(tick, Verdict.COALESCED, Where.WORKER, _NOT_RUN)
            return
        else:
            self._unsure = ""
        self._waiting.append(tick)

    def _give_up_queuing(self) -> None:
        """The work was queued before, nobody knows for which tick."""
        if self._queues is not None:
            self._waiting.clear()
            self.judge(self._queues, Verdict.UNKNOWN, detail=self._unsure)
            self._queues = None

    def _is_clear(self, now_ns: int) -> bool:
        """Nothing can be pending: the last pulse was acknowledged, and no work is queued."""
        return (
            self._irq_ack is True
            and self._work_known
            and not self._work_queued
            and now_ns - self._ack_ns >= QUEUED_NS
        )

    def _is_not_owed(self, now_ns: int) -> None:
        """With reinject on, the last acknowledgement would have queued the work."""
        if now_ns - self._ack_ns >= QUEUED_NS:
            self._know_reinject(False)
        else:
            self._lose_count(REINJECT_UNKNOWN)

    def work_queue(self, record: Record) -> None:
        """pit_do_work was queued: by the timer, or by an acknowledgement."""
        if self._reinject is None and not record[2] & IRQ_CONTEXT:
            self._know_reinject(True)
        self._work_queued = self._work_known = True
        self._queues = None
        if self._expiring is not None:
            self._queued_for = self._expiring.index

    def work_start(self, record: Record) -> None:
        """The worker runs. A run that gave no pulse found `irq_ack` at 0: it held back every tick
        that had expired by then.
        """
        self.end_run()
        if self._queues is not None:
            self._give_up_queuing()
        if self._reinject is None and not self._run_pulsed:
            self._know_reinject(True)
        self._work_queued = False
        self._work_known = True
        self._work_ns = record[0]
        self.worker = record[2]
        if not self._run_pulsed:
            self._held_back = self._seen_by_worker
        self._seen_by_worker = self.expired
        self._run_pulsed = False

    def end_run(self) -> None:
        """The worker is done: a tick that no interrupt is left of gets its verdict."""
        tick = self._run_tick
        self._run_tick = None
        if tick is None or tick.verdict is not _OPEN:
            return
        if tick.claims:
            if self._nmi_unseen:
                if self._unseen is None:
                    self._unseen = deque(maxlen=self._keep)
                self._unseen.append(tick)
            return
        if self._nmi_unseen or self._doubtful:
            why = _NMI_UNSEEN if self._nmi_unseen else _DOUBTFUL
            self.judge(tick, Verdict.UNKNOWN, detail=why)
            return
        if self._msi is not None and not self._msi_taken:
            self._masked = _NOBODY
        if self._coalesced is not None:
            self.judge(tick, Verdict.COALESCED, *self._coalesced)
        else:
            self.judge(tick, Verdict.MASKED, *(self._masked or _NO_PIN))

    def settle(self) -> None:
        """Judge what can be judged now, between two events; everything else is outstanding."""
        self.end_run()
        self._drop_uncounted()
        for tick in self._unseen or ():
            if tick.verdict is _OPEN:
                self.judge(tick, Verdict.UNKNOWN, detail=_NMI_UNSEEN)
        self._unseen = None
        if self._reinject is None:
            for tick in (*self._merged, *(self._unpulsed or ())):
                if tick.verdict is _OPEN:
                    self.judge(tick, Verdict.UNKNOWN, detail=REINJECT_UNKNOWN)

    def begin_in_the_middle(self, why: str, reinject: bool | None) -> None:
        """The PIT may have been at work before the first record. `reinject`: None if not known."""
        self.lost(why)
        self._reinject = reinject

    def lost(self, why: str) -> None:
        """Records are missing: with reinject on, nobody knows how many ticks are pending until all
        are acknowledged.
        """
        self.lose_sight(why)
        self.pic.forget(why)
        self._waiting.clear()
        self._lose_count(why)
        self._unseen = None
        self._expiring = self._run_tick = self._queues = self._no_expiry = None
        self._expires_ns = 0
        self._work_queued = self._work_known = self._is_own_pulse = False
        self._run_pulsed = True
        self._held_by.clear()
        self._ioapic_pin = NO_PIN
        self._line = NO_GSI

    def _lose_count(self, why: str) -> None:
        """How many pulses are owed is not known any more."""
        for tick in (*self._waiting, *(self._unpulsed or ())):
            if tick.verdict is _OPEN:
                self.judge(tick, Verdict.UNKNOWN, detail=why)
        self._waiting.clear()
        self._merged.clear()
        self._unpulsed = None
        self._counted = None
        self._pending = 0
        self._irq_ack = None
        self._unsure = why

    def created(self) -> None:
        """The VM is made here: nothing was before."""
        self.pic = PicPin()
        self._unsure = ""
        self._irq_ack = self._work_known = True
        self._ioapic_pin = 0

    def _give_up_unpulsed(self, why: str) -> None:
        """Which of them a pulse or a count is for, nobody knows."""
        if not self._unpulsed:
            return
        for tick in self._unpulsed:
            if tick.verdict is _OPEN:
                self.judge(tick, Verdict.UNKNOWN, detail=why)
        self._unpulsed = None

    def _know_reinject(self, on: bool) -> None:
        """The records showed it."""
        self._reinject = on
        if not on:
            for tick in self._merged:
                if tick in self._waiting:
                    self._waiting.remove(tick)
                    self.judge(tick, Verdict.COALESCED, Where.WORKER, _NOT_RUN)
            self._pending = 0
            self._counted = None
            self._give_up_unpulsed(self._unsure)
            if self._work_known:
                self._unsure = ""
        self._merged.clear()

    def reset_reinject(self, record: Record) -> None:
        """The guest's unmasking or programming threw `pending` away; perhaps, if that is -1."""
        if self._reinject is False:
            self._forget_pending("its pending count was reset")
        elif record[3] < 0:
            if self._waiting or self._pending or self._irq_ack is not True:
                self._lose_count("its pending count may have been reset")
        else:
            self._forget_pending("its pending count was reset")
            self._irq_ack = True
            self._ack_ns = self._reset_ns = record[0]
            self._give_up_unpulsed(self._unsure)
            if self._work_known:
                self._unsure = ""

    def apicv_inhibit_changed(self, record: Record) -> None:
        """KVM_REINJECT_CONTROL."""
        if record[3] == ApicvInhibitReason.PIT_REINJ:
            self._reinject = bool(record[4])
            self._merged.clear()
            self._forget_pending("reinjection was switched")
            self._irq_ack = True
            self._give_up_unpulsed(self._unsure)

    def _forget_pending(self, why: str) -> None:
        """Drop who waits; work that is queued already will still pulse for the first of them."""
        self._pending = 0
        self._counted = None
        survivor = self._waiting.pop(0) if self._waiting and self._work_queued else None
        for tick in self._waiting:
            if self._reinject is None:
                self.judge(tick, Verdict.UNKNOWN, detail=REINJECT_UNKNOWN)
            else:
                self.judge(tick, Verdict.DROPPED, detail=why)
        self._waiting.clear()
        if survivor is not None:
            self._waiting.append(survivor)

    def _drop_uncounted(self) -> None:
        """Acknowledgements that were nobody's consume counts: fewer pulses than ticks will come."""
        if self._reinject is False or self._work_queued:
            return
        owed = max(0, self._pending - (self._counted is not None))
        dropped = self._waiting[: max(0, len(self._waiting) - owed)]
        del self._waiting[: len(dropped)]
        for tick in dropped:
            if self._reinject is None:
                self.judge(tick, Verdict.UNKNOWN, detail=REINJECT_UNKNOWN)
            else:
                detail = "an acknowledgement that was not its own consumed its pending count"
                self.judge(tick, Verdict.DROPPED, detail=detail)

    # The line and the chips.

    def set_irq(self, record: Record) -> None:
        """A GSI is driven: a rising GSI 0 of the PIT's own is the pulse of the oldest who waits."""
        _, _, task, gsi, level, source = record
        self._is_own_pulse = False
        self._line_task = task
        if gsi == PIT_GSI and source != PIT_SOURCE_ID:
            self._hold(source, level)
        if not level:
            self._line = NO_GSI
            return
        self._line = gsi
        self.pic.new_pulse()
        if gsi != PIT_GSI or source != PIT_SOURCE_ID:
            return
        self.end_run()
        if self._reinject is None and self._irq_ack is False:
            self._know_reinject(False)
        self._irq_ack = False
        self._run_pulsed = True
        self._give_up_unpulsed(self._unsure)
        if self._reinject is None and self._waiting and self._waiting[0] in self._merged:
            # Replayed, it has this pulse; merged, the tick that queued the work has.
            self._lose_count(REINJECT_UNKNOWN)
            self._irq_ack = False
        if not self._waiting:
            return
        tick = self._run_tick = self._waiting.pop(0)
        self._is_own_pulse = True
        self._fresh.clear()
        self._accepted = 0
        self._msi = None
        self._msi_taken = self._nmi_unseen = self._doubtful = False
        self._coalesced = self._masked = None
        tick.work_ns = self._work_ns
        if self._reinject is not False:
            self._counted = tick
            if tick.index <= self._held_back and tick.verdict is _OPEN:
                self.judge(tick, Verdict.REINJECTED)

    def _hold(self, source: int, level: int) -> None:
        """Another source drives GSI 0: while it is high a pulse is no edge."""
        if not level and source in self._held_by:
            self._held_by.remove(source)
        elif level and source not in self._held_by:
            self._held_by.append(source)

    def pic_set_irq(self, record: Record) -> None:
        """A PIC pin is driven; the level is that of the kvm_set_irq before."""
        if self._line == NO_GSI or record[2] != self._line_task:
            return
        pin = (record[3] & 1) << 3 | record[4] & 7
        if self._line == PIT_GSI:
            self.pic.pin = pin
        elif pin != self.pic.pin:
            return
        tick = self._run_tick if self._is_own_pulse else None
        outcome = self.pic.pulse(record, self, tick, bool(self._held_by))
        self._fresh.clear()
        self._accepted = 0
        if tick is not None and outcome == pic.DOUBTFUL:
            self._doubtful = True
        elif tick is not None and outcome == pic.MASKED:
            self._lose_masked(_PIC_LOSSES[outcome])
        elif tick is not None and outcome != pic.LATCHED:
            self._lose_coalesced(_PIC_LOSSES[outcome])

    def ioapic_set_irq(self, record: Record) -> None:
        """An IOAPIC pin was driven; what the local APICs accepted just before is its message."""
        _, _, task, entry, pin, coalesced = record
        if self._line != PIT_GSI or task != self._line_task:
            return
        self._ioapic_pin = pin
        if not self._is_own_pulse or self._run_tick is None:
            return
        fresh, accepted = self._fresh, self._accepted
        self._fresh, self._accepted = [], 0
        if entry & IOAPIC_MASKED:
            return
        for claim in fresh:
            if claim.path is _LAPIC:
                self.rename(claim, Path.IOAPIC)
        if coalesced and accepted:
            for claim in fresh:
                self._apics.revoke(claim)
            self._lose_masked(_NOBODY)
        elif coalesced and not self._held_by:
            self._lose_masked(_NOBODY)
        elif coalesced:
            self._lose_coalesced((Where.IOAPIC, "another source holds the line high: no edge"))
        elif not accepted:
            self._lose_coalesced((Where.IOAPIC, "its remote IRR was still set"))

    def msi_set_irq(self, record: Record) -> None:
        """GSI 0 leads to a message."""
        self._msi = (record[4] & 0xFF, record[4] & MSI_MODE)

    def is_running(self, task: int) -> bool:
        """This task is the worker, between its pulse and its end."""
        return self._run_tick is not None and task == self.worker

    def accept(self, record: Record) -> None:
        """A local APIC accepts a message of the run: the IOAPIC's, an MSI, or its own LVT0."""
        ts_ns, _, _, vcpu, mode, _, vector = record
        tick = self._run_tick
        assert tick is not None
        if mode == DM_NMI and not self._apics.sees_nmis():
            self._nmi_unseen = True
            return
        is_msi = self._msi == (vector, mode)
        self._msi_taken |= is_msi
        doubt = self._apics.doubt(vcpu, mode, vector)
        if doubt:
            self._accepted += 1
            self._apics.accept_doubtful(vcpu, mode, vector, self)
            if tick.verdict is _OPEN:
                self.judge(tick, Verdict.UNKNOWN, detail=doubt)
            return
        path = Path.MSI if is_msi else _LAPIC
        claim = self._apics.accept(vcpu, mode, vector, self, tick, path, ts_ns)
        self._accepted += 1
        if claim is not None:
            self._fresh.append(claim)
        elif mode == DM_NMI:
            self._lose_coalesced((Where.LAPIC, "as many NMIs as can wait were pending"))
        elif mode in (DM_FIXED, DM_LOWEST):
            self._lose_coalesced((Where.LAPIC, "its vector was accepted and not injected since"))
        else:
            self._lose_masked((Where.LAPIC, "its message asks for no interrupt"))

    def _lose_masked(self, loss: _Loss) -> None:
        if self._masked is None or _DEPTH[loss[0]] > _DEPTH[self._masked[0]]:
            self._masked = loss

    def _lose_coalesced(self, loss: _Loss) -> None:
        """Of several ways the deepest is told."""
        if self._coalesced is None or _DEPTH[loss[0]] > _DEPTH[self._coalesced[0]]:
            self._coalesced = loss

    # The vCPU and the guest.

    def inject(self, record: Record, vcpu: int) -> None:
        """An injection that no local APIC's request explains."""
        if self.pic.request is not None:
            self.plain_task = record[2]
            self._pic_vcpu = vcpu
        self.injected()
        self.pic.inject(self, record[3], vcpu, record[0])

    def injected(self) -> None:
        """Some interrupt was: a back end that writes its own EOI then acknowledges the pulse by it,
        and says nothing.
        """
        if not self._apics.sees_nmis():
            self._irq_ack = self._irq_ack or None

    def ack_irq(self, record: Record, vcpu: int) -> None:
        """A pin was acknowledged; if GSI 0 leads to it, the PIT hears of it."""
        irqchip, pin = record[3], record[4]
        if irqchip == _IOAPIC:
            if pin == self._ioapic_pin:
                self._acknowledged(record[0])
        elif pin == self.pic.pin and irqchip == pin >> 3:
            self._acknowledged(record[0])
            self.pic.acknowledge(record[0], vcpu)

    def _acknowledged(self, ts_ns: int) -> None:
        if self._pending:
            self._pending -= 1
        self._counted = None
        self._irq_ack = True
        self._ack_ns = ts_ns
        self._give_up_unpulsed(self._unsure)

    def finish(self, claim: Claim, ts_ns: int) -> None:
        """The guest ended an interrupt: the run that gave it is long over."""
        super().finish(claim, ts_ns)
        if claim.tick is self._run_tick:
            self._run_tick = None
