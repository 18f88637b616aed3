"""From trace to lives: every expiry of a timer gets an identity and one verdict.

`TickAssembler` consumes records in order and passes each to those it concerns: the PIT, the local
APICs' timers, the local APICs. They keep only what is open: expiries that wait for their pulse,
requests that wait for their injection, who is in service.
"""

import re
from collections.abc import Callable, Mapping
from operator import itemgetter
from typing import Final

from kvmtick.ticks.apics import DM_FIXED, DM_INIT, DM_LOWEST, LocalApics
from kvmtick.ticks.lapic import HOST_TICK as HOST_LAPIC_TICK
from kvmtick.ticks.lapic import LapicTimers
from kvmtick.ticks.lives import Keep
from kvmtick.ticks.messages import Messages
from kvmtick.ticks.pit import HOST_TICK as HOST_PIT_TICK
from kvmtick.ticks.pit import PitTicks
from kvmtick.ticks.report import TickReport
from kvmtick.ticks.source import Source
from kvmtick.trace.events import IRQ_CONTEXT, Event, Function, Record
from kvmtick.trace.inferred import is_creation
from kvmtick.trace.recorder import Entry, EntryConsumer
from kvmtick.trace.vms import vcpu_of_name

KEEP: Final = 16_384
"""Lives kept of each source for looking at; the counts and latencies cover all."""

_EVENT_OF: Final = itemgetter(1)
_HOST_TICK: Final = re.compile(HOST_PIT_TICK + b"|" + HOST_LAPIC_TICK, re.DOTALL)

_HRTIMER_START: Final = int(Event.HRTIMER_START)
_HRTIMER_EXPIRE_ENTRY: Final = int(Event.HRTIMER_EXPIRE_ENTRY)
_WORK_QUEUE: Final = int(Event.WORK_QUEUE)
_WORK_START: Final = int(Event.WORK_START)
_WORK_END: Final = int(Event.WORK_END)
_KVM_SET_IRQ: Final = int(Event.KVM_SET_IRQ)
_KVM_PIC_SET_IRQ: Final = int(Event.KVM_PIC_SET_IRQ)
_KVM_IOAPIC_SET_IRQ: Final = int(Event.KVM_IOAPIC_SET_IRQ)
_KVM_MSI_SET_IRQ: Final = int(Event.KVM_MSI_SET_IRQ)
_KVM_APIC_IPI: Final = int(Event.KVM_APIC_IPI)
_KVM_APIC_ACCEPT_IRQ: Final = int(Event.KVM_APIC_ACCEPT_IRQ)
_KVM_APICV_ACCEPT_IRQ: Final = int(Event.KVM_APICV_ACCEPT_IRQ)
_KVM_APIC: Final = int(Event.KVM_APIC)
_KVM_INJ_VIRQ: Final = int(Event.KVM_INJ_VIRQ)
_KVM_INJ_NMI: Final = int(Event.KVM_INJ_NMI)
_KVM_EOI: Final = int(Event.KVM_EOI)
_KVM_ACK_IRQ: Final = int(Event.KVM_ACK_IRQ)
_KVM_PIO: Final = int(Event.KVM_PIO)
_KVM_APICV_INHIBIT_CHANGED: Final = int(Event.KVM_APICV_INHIBIT_CHANGED)
_PIT_RESET_REINJECT: Final = int(Event.PIT_RESET_REINJECT)
_LOST_EVENTS: Final = int(Event.LOST_EVENTS)
_PIT_TIMER_FN: Final = int(Function.PIT_TIMER_FN)
_PIT_DO_WORK: Final = int(Function.PIT_DO_WORK)
_APIC_TIMER_FN: Final = int(Function.APIC_TIMER_FN)


_NO_OWNERS: Final[Mapping[int, int]] = {}


class TickAssembler(EntryConsumer):
    """A recorder's consumer that follows the ticks of the PIT and of the local APICs' timers.

    What is asked of it alone is answered for the main source: the timer of which most ticks reached
    a vCPU, else the one that expired most; the PIT if that does not decide.
    """

    def __init__(
        self,
        keep: int = KEEP,
        tasks: list[str] | None = None,
        sees_nmis: Callable[[], bool] = lambda: True,
        vcpus: Mapping[int, int] | None = None,
        owners: Mapping[int, int] | None = None,
        keep_all: bool = False,
    ) -> None:
        """`keep`: how many lives of each source. `tasks`: the recorder's, which may still grow;
        their names tell which thread is which vCPU's, unless `vcpus` does. `sees_nmis`: whether the
        records show when an NMI is injected. `owners`: the task whose local APIC timer it is, by
        hrtimer. `keep_all`: until they are taken (`Source.take_old`).
        """
        self._tasks = [] if tasks is None else tasks
        self._vcpus = vcpus
        self._named: list[int | None] = []
        """Of the first of `_tasks`."""
        vcpu_of = self._vcpu_of
        self._apics = LocalApics(sees_nmis)
        self._messages = Messages(vcpu_of)
        kept = Keep(keep, keep_all)
        self._pit = PitTicks(self._apics, kept)
        self._timers = LapicTimers(
            self._apics,
            self._messages,
            vcpu_of,
            tasks is not None,
            kept,
            _NO_OWNERS if owners is None else owners,
        )
        self._has_looked = False
        """Nothing but plain ticks came since `_look`."""
        self._has_details = False
        self._timers_may_be_plain = False

    def __call__(self, batch: list[Record]) -> None:
        """Take in a batch of records."""
        if self._vcpus is not None:
            self._take_hosts(batch)
            return
        self._one_by_one(batch)

    def take(self, entries: list[Entry], begin: int, end: int) -> None:
        """Take in records of a simulated run. Details are passed over once there are any, so that
        ticks between them are as plain as without.
        """
        if self._has_details:
            entries = [entry for entry in entries[begin:end] if not entry.is_detail]
            begin, end = 0, len(entries)
        at = begin
        while at < end:
            entry = entries[at]
            if entry.event == _HRTIMER_EXPIRE_ENTRY:
                count = self._take_tick(entries, at, end)
                if count:
                    at += count
                    continue
            self._has_details |= entry.is_detail
            self._has_looked = False
            self._take_in(entry.record())
            at += 1

    def _take_tick(self, entries: list[Entry], at: int, end: int) -> int:
        """A plain tick; how many entries it took, 0 if it is none."""
        if not self._has_looked:
            self._look()
        function = entries[at].b
        if function == _PIT_TIMER_FN:
            return self._pit.take_tick(entries, at, end, self._messages)
        if function == _APIC_TIMER_FN and self._timers_may_be_plain:
            return self._timers.take_tick(entries, at, end)
        return 0

    def _look(self) -> None:
        """Which ticks may be plain until something else comes."""
        pit = self._pit
        may_be = self._timers.look() and self._apics.sees_nmis()
        pit.look(may_be and pit.worker >= 0 and self._vcpu_of(pit.worker) is None)
        self._timers_may_be_plain = may_be and pit.is_out_of_the_way
        self._has_looked = True

    def _take_hosts(self, batch: list[Record]) -> None:
        """A batch of a kernel's records."""
        pit, timers = self._pit, self._timers
        events = bytes(map(_EVENT_OF, batch))
        idle = self._is_idle()
        at = 0
        for match in _HOST_TICK.finditer(events):
            start, end = match.span()
            if start > at:
                self._one_by_one(batch[at:start])
                idle = self._is_idle()
                at = start
            if match.start(1) >= 0:
                if idle and pit.host_tick(batch, match):
                    at = end
            elif not pit.pic.asks and timers.host_tick(batch, start, end):
                at = end
        self._one_by_one(batch[at:])

    def _one_by_one(self, records: list[Record]) -> None:
        self._has_looked = False
        for record in records:
            self._take_in(record)

    def _is_idle(self) -> bool:
        """Nothing is under way: a tick of the PIT's may be plain."""
        pit = self._pit
        return (
            pit.is_idle() and pit.plain_task not in self._messages and not self._timers.is_waiting
        )

    def begin_in_the_middle(self, reinject: bool | None = None) -> None:
        """The VM may have run before the first record; `reinject`: as its PIT was then, if known.

        A record that comes with the VM's creation says that it had not.
        """
        why = "the trace begins here"
        self._has_looked = False
        self._lose(why)
        self._pit.begin_in_the_middle(why, reinject)

    def created(self) -> None:
        """The VM is made here: nothing was before."""
        self._has_looked = False
        self._apics.created()
        self._timers.created()
        self._pit.created()

    def judge_by(self, pit: str, lapic: str, sees_masks: bool) -> None:
        """Why the ticks of the PIT, and of the local APICs' timers, cannot be judged, empty if they
        can; and whether the records show when a timer's LVT entry is masked.
        """
        self._has_looked = False
        if self._pit.blind and not pit:
            self._pit.lost(self._pit.blind)
        self._pit.blind = pit
        self._timers.judge_by(lapic, sees_masks)

    # For readers.

    @property
    def main(self) -> Source:
        """The main source."""
        return max(self.sources(), key=lambda source: (source.reached, source.expired))

    def sources(self) -> list[Source]:
        """All that expired: the PIT (also if nothing did), then the timers by vCPU."""
        timers = self._timers.sources()
        return [self._pit, *timers] if self._pit.expired or not timers else [*timers]

    def report(self) -> TickReport:
        """The ticks of the main source so far."""
        return TickReport(self.main)

    def reports(self) -> list[TickReport]:
        """The ticks of every source so far; the PIT's first, if it expired or nothing did."""
        return [TickReport(source) for source in self.sources()]

    @property
    def without_expiry(self) -> int:
        """Interrupts that look like a local APIC timer's, and that no hrtimer gave."""
        return self._timers.without_expiry

    def settle(self) -> None:
        """Judge what can be judged now, between two events; everything else is outstanding."""
        self._has_looked = False
        self._pit.settle()
        self._timers.settle()
        self._apics.settle()
        for source in self.sources():
            source.judge_blind()

    @property
    def expired(self) -> int:
        """How often it expired."""
        return self.main.expired

    @property
    def reached(self) -> int:
        """How many of its ticks reached a vCPU."""
        return self.main.reached

    # Who is concerned.

    def _take_in(self, record: Record) -> None:
        """Other events say nothing of ticks. The most frequent are asked for first: a table of
        handlers would be a fifth of what a machine of a fleet takes.
        """
        event: int = record[1]
        if event == _HRTIMER_START:
            self._hrtimer_start(record)
        elif event == _HRTIMER_EXPIRE_ENTRY:
            self._hrtimer_expire_entry(record)
        elif event == _KVM_INJ_VIRQ:
            self._inj_virq(record)
        elif event == _KVM_PIO:
            self._pio(record)
        elif event == _KVM_EOI:
            self._eoi(record)
        elif event == _KVM_ACK_IRQ:
            self._ack_irq(record)
        elif event == _KVM_SET_IRQ:
            self._set_irq(record)
        elif event == _KVM_PIC_SET_IRQ:
            self._pit.pic_set_irq(record)
        elif event == _KVM_IOAPIC_SET_IRQ:
            self._ioapic_set_irq(record)
        elif event == _KVM_APIC_ACCEPT_IRQ:
            self._apic_accept_irq(record)
        elif event == _WORK_QUEUE:
            self._work_queue(record)
        elif event == _WORK_START:
            self._work_start(record)
        elif event == _WORK_END:
            self._work_end(record)
        else:
            self._take_in_rare(event, record)

    def _take_in_rare(self, event: int, record: Record) -> None:
        if event == _KVM_APIC_IPI:
            self._messages.ipi(record)
        elif event == _KVM_APIC:
            self._timers.apic(record)
        elif event == _KVM_MSI_SET_IRQ:
            self._msi_set_irq(record)
        elif event == _KVM_APICV_ACCEPT_IRQ:
            self._apicv_accept_irq(record)
        elif event == _KVM_INJ_NMI:
            self._inj_nmi(record)
        elif event == _KVM_APICV_INHIBIT_CHANGED:
            self._apicv_inhibit_changed(record)
        elif event == _PIT_RESET_REINJECT:
            self._pit_reset_reinject(record)
        elif event == _LOST_EVENTS:
            self._lost_events(record)

    def _vcpu_of(self, task: int) -> int | None:
        """The vCPU whose thread a task is."""
        task &= ~IRQ_CONTEXT
        if self._vcpus is not None:
            return self._vcpus.get(task)
        if not 0 <= task < len(self._tasks):
            return None
        while len(self._named) <= task:
            name = self._tasks[len(self._named)]
            self._named.append(vcpu_of_name(name.rpartition("-")[0]))
        return self._named[task]

    def _hrtimer_start(self, record: Record) -> None:
        if record[4] == _PIT_TIMER_FN:
            self._pit.hrtimer_start(record)
        elif record[4] == _APIC_TIMER_FN:
            self._timers.hrtimer_start(record)

    def _hrtimer_expire_entry(self, record: Record) -> None:
        if record[4] == _PIT_TIMER_FN:
            self._pit.hrtimer_expire_entry(record)
        elif record[4] == _APIC_TIMER_FN:
            self._timers.hrtimer_expire_entry(record)

    def _work_queue(self, record: Record) -> None:
        if record[4] == _PIT_DO_WORK:
            self._pit.work_queue(record)

    def _work_start(self, record: Record) -> None:
        if record[4] == _PIT_DO_WORK:
            self._pit.work_start(record)

    def _work_end(self, record: Record) -> None:
        if record[4] == _PIT_DO_WORK:
            self._pit.end_run()

    def _pit_reset_reinject(self, record: Record) -> None:
        self._pit.reset_reinject(record)

    def _apicv_inhibit_changed(self, record: Record) -> None:
        if is_creation(record):
            self.created()
        else:
            self._pit.apicv_inhibit_changed(record)

    def _lost_events(self, record: Record) -> None:
        count = "some" if record[4] < 0 else str(record[4])
        self._lose(f"the kernel lost {count} of its records")

    def _lose(self, why: str) -> None:
        self._pit.lost(why)
        self._timers.lost(why)
        self._apics.forget(why)
        self._messages.clear()

    def _set_irq(self, record: Record) -> None:
        self._pit.set_irq(record)
        self._messages.line(record)

    def _ioapic_set_irq(self, record: Record) -> None:
        self._pit.ioapic_set_irq(record)
        self._messages.forget(record[2])

    def _msi_set_irq(self, record: Record) -> None:
        if self._pit.is_running(record[2]):
            self._pit.msi_set_irq(record)
        else:
            self._messages.msi(record)

    def _apic_accept_irq(self, record: Record) -> None:
        mode = record[4]
        if self._pit.is_running(record[2]):
            self._pit.accept(record)
        elif not self._timers.accept(record):
            self._apics.accept_foreign(record[3], mode, record[6])
        if mode == DM_INIT:
            self._timers.reset(record[3])

    def _apicv_accept_irq(self, record: Record) -> None:
        if record[4] in (DM_FIXED, DM_LOWEST):
            self._apics.post(record[3], record[6])

    def _inj_virq(self, record: Record) -> None:
        ts_ns, _, task, vector, _, reinjected = record
        if reinjected:
            return
        vcpu = self._vcpu_of(task)
        self._guest_ran(task, vcpu)
        if not self._pit.pic.takes(vector) and self._apics.requested(vcpu, vector):
            self._apics.inject(vcpu, vector, ts_ns)
            self._pit.injected()
        else:
            self._apics.injected(vcpu, vector)
            self._pit.inject(record, vcpu or 0)

    def _inj_nmi(self, record: Record) -> None:
        self._guest_ran(record[2], record[3])
        self._apics.inject_nmi(record[3], record[4], record[0])

    def _eoi(self, record: Record) -> None:
        ts_ns, _, _, vcpu, vector = record
        self._guest_ran(record[2], vcpu)
        self._messages.eoi(record)
        self._apics.eoi(vcpu, vector, ts_ns)

    def _ack_irq(self, record: Record) -> None:
        self._pit.ack_irq(record, self._vcpu_of(record[2]) or 0)

    def _pio(self, record: Record) -> None:
        _, _, task, is_write, port, _, _, value = record
        self._guest_ran(task, self._vcpu_of(task))
        self._pit.pic.pio(is_write, port, value)

    def _guest_ran(self, task: int, vcpu: int | None) -> None:
        self._messages.forget(task)
        self._timers.guest_ran(vcpu)
