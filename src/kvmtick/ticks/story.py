"""The life of one tick, step by step: what the kernel calls it, where it is here, what changed.

The teller follows the recorder record by record, with a snapshot of the machine's state at each,
until its tick is over. What changed between two records is the doing of the first, unless the
second is an event that is recorded after it did that.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from kvmtick.ticks.life import TickAssembler
from kvmtick.ticks.source import Source
from kvmtick.ticks.tick import Tick
from kvmtick.ticks.verdict import Path, Verdict
from kvmtick.trace.events import Event, Function, Record
from kvmtick.trace.ftrace import event_name, event_text
from kvmtick.trace.recorder import Recorder

__all__ = ["Step", "StoryTeller", "Words", "words_of"]

BEFORE = 64
AFTER = 4
LIMIT = 20_000
"""Records kept of one life; a longer one is told up to there."""

Snapshot = dict[str, str]
Moment = tuple[Record, Snapshot]
Words = tuple[str, str, str]
"""The step, the kernel's functions, the code here."""

_VCPU_PREFIX = re.compile(r"vCPU \d+ ")

_TOLD: dict[int, Words] = {
    Event.HRTIMER_START: (
        "the hrtimer is armed",
        "hrtimer_start",
        "timing.hrtimer.HrTimer.start",
    ),
    Event.HRTIMER_CANCEL: ("the hrtimer is cancelled", "hrtimer_cancel", "timing.hrtimer.HrTimer"),
    Event.HRTIMER_EXPIRE_ENTRY: (
        "the hrtimer expires",
        "pit_timer_fn",
        "irqchip.i8254.Pit.timer_fn",
    ),
    Event.WORK_QUEUE: (
        "the kvm-pit worker is woken",
        "kthread_queue_work",
        "timing.kthread.KthreadWorker.queue_work",
    ),
    Event.WORK_START: ("the worker runs", "pit_do_work", "irqchip.i8254.Pit.do_work"),
    Event.WORK_END: ("the worker is done", "pit_do_work", "irqchip.i8254.Pit.do_work"),
    Event.KVM_SET_IRQ: (
        "GSI 0 is driven",
        "kvm_set_irq",
        "irqchip.routing.IrqRouting.set_irq",
    ),
    Event.KVM_PIC_SET_IRQ: (
        "routing reaches the PIC",
        "kvm_pic_set_irq",
        "irqchip.i8259.Pic.set_irq",
    ),
    Event.KVM_IOAPIC_SET_IRQ: (
        "routing reaches the IOAPIC",
        "kvm_ioapic_set_irq",
        "irqchip.ioapic.Ioapic.set_irq",
    ),
    Event.KVM_ACK_IRQ: (
        "the acknowledgement reaches the PIT",
        "kvm_notify_acked_irq, kvm_pit_ack_irq",
        "irqchip.notifiers.Notifiers.notify_acked_irq",
    ),
    Event.KVM_INJ_VIRQ: (
        "the vector is written into the VMCS",
        "kvm_check_and_inject_events, vmx_inject_irq",
        "vcpu.events.inject_pending_event",
    ),
    Event.KVM_VCPU_WAKEUP: ("the halted vCPU wakes", "kvm_vcpu_halt", "machine.machine.Machine"),
    Event.KVM_PIO: ("the guest accesses a port", "kvm_fast_pio", "vcpu.exits.ExitHandlers"),
    Event.KVM_ENTRY: ("VM entry", "vcpu_enter_guest", "vcpu.vcpu.Vcpu.enter"),
    Event.KVM_EXIT: ("VM exit", "vmx_handle_exit", "vcpu.vcpu.Vcpu.enter"),
    Event.KVM_APICV_INHIBIT_CHANGED: (
        "APICv is allowed or not",
        "kvm_set_apicv_inhibit",
        "machine.board.Board.set_apicv_inhibit",
    ),
    Event.PIT_RESET_REINJECT: (
        "the PIT forgets what it missed",
        "kvm_pit_reset_reinject",
        "irqchip.i8254.Pit.reset_reinject",
    ),
    Event.KVM_APIC_ACCEPT_IRQ: (
        "a local APIC accepts a message",
        "__apic_accept_irq",
        "irqchip.lapic.Lapic.accept_irq",
    ),
    Event.KVM_EOI: (
        "the guest ends the interrupt at its local APIC",
        "apic_set_eoi, kvm_ioapic_update_eoi",
        "irqchip.lapic.Lapic.eoi",
    ),
    Event.KVM_MSI_SET_IRQ: (
        "routing sends a message",
        "kvm_set_msi, kvm_irq_delivery_to_apic",
        "irqchip.delivery.IrqDelivery.deliver",
    ),
    Event.KVM_APIC_IPI: (
        "the guest sends an interprocessor interrupt",
        "kvm_apic_send_ipi, kvm_irq_delivery_to_apic",
        "irqchip.delivery.IrqDelivery.deliver",
    ),
    Event.KVM_APIC: (
        "the guest accesses its local APIC",
        "kvm_lapic_reg_write, kvm_lapic_reg_read",
        "irqchip.lapic.Lapic",
    ),
    Event.KVM_MMIO: (
        "the guest accesses memory that is no RAM",
        "vcpu_mmio_write, vcpu_mmio_read",
        "vcpu.exits.ExitHandlers",
    ),
    Event.KVM_MSR: (
        "the guest accesses a model-specific register",
        "kvm_emulate_wrmsr, kvm_emulate_rdmsr",
        "vcpu.exits.ExitHandlers",
    ),
    Event.KVM_IOAPIC_DELAYED_EOI_INJ: (
        "a level line that stays high is put off",
        "kvm_ioapic_eoi_inject_work",
        "irqchip.ioapic.Ioapic",
    ),
    Event.KVM_INJ_NMI: (
        "an NMI is written into the VMCS",
        "kvm_check_and_inject_events, vmx_inject_nmi",
        "vcpu.events.inject_pending_event",
    ),
    Event.LOST_EVENTS: (
        "the kernel lost some of its records",
        "ring_buffer_lost_events",
        "trace.pages.Page",
    ),
    Event.KVM_APICV_ACCEPT_IRQ: (
        "a local APIC accepts a message that the hardware will inject",
        "__apic_accept_irq",
        "irqchip.lapic.Lapic.accept_irq",
    ),
    Event.SCHED_WAKING: ("a thread is woken", "try_to_wake_up", "timing.kthread.KthreadWorker"),
    Event.SCHED_SWITCH: ("a CPU goes to another thread", "__schedule", "timing.host.HostModel"),
}

_TIMER_FN: dict[int, Words] = {
    Function.PIT_TIMER_FN: _TOLD[Event.HRTIMER_EXPIRE_ENTRY],
    Function.APIC_TIMER_FN: (
        "the hrtimer expires",
        "apic_timer_fn",
        "irqchip.lapic_timer.LapicTimer.timer_fn",
    ),
}
"""Whose callback an expiry runs."""

_RECORDED_AFTER: dict[str, tuple[Event, ...]] = {
    "timer": (Event.HRTIMER_EXPIRE_ENTRY,),
    "PIC IRR": (Event.KVM_PIC_SET_IRQ, Event.KVM_INJ_VIRQ),
    "PIC ISR": (Event.KVM_INJ_VIRQ,),
    "INTR": (Event.KVM_PIC_SET_IRQ, Event.KVM_INJ_VIRQ),
    "IOAPIC IRR": (Event.KVM_IOAPIC_SET_IRQ, Event.KVM_APIC_ACCEPT_IRQ),
    "LAPIC IRR": (Event.KVM_INJ_VIRQ,),
    "LAPIC ISR": (Event.KVM_INJ_VIRQ,),
    "NMI pending": (Event.KVM_INJ_NMI,),
    "KVM_REQ_EVENT": (
        Event.KVM_PIC_SET_IRQ,
        Event.KVM_INJ_VIRQ,
        Event.KVM_INJ_NMI,
        Event.KVM_ENTRY,
    ),
    "interrupt window": (Event.KVM_ENTRY,),
    "VM-entry intr info": (Event.KVM_EXIT, Event.KVM_INJ_NMI),
    "vCPU": (Event.KVM_VCPU_WAKEUP,),
    "state": (Event.KVM_VCPU_WAKEUP,),
}
"""For each name of the snapshot, the events that are recorded when they have changed it already.
With several vCPUs a name has its vCPU before it.
"""


_ACCESSES = (Event.KVM_APIC, Event.KVM_MMIO, Event.KVM_MSR, Event.KVM_EXIT)
"""What comes before kvm_eoi in the same exit."""


@dataclass(frozen=True, slots=True)
class Step:
    """One step of the story; `skipped` counts the events of other ticks before it."""

    skipped: int
    ts_ns: int
    what: str
    event: str
    kernel: str
    module: str
    changed: tuple[str, ...]


class Life:
    """The records of one tick's life, from a little before its expiry to its end."""

    def __init__(self, source: Source, before: deque[Moment]) -> None:
        """Its expiry is the last of `before`."""
        self.source = source
        self.tick = source.lives[-1]
        self._moments = list(before)
        self._marks = {"expiry": len(self._moments) - 1}
        self._after = AFTER

    def follow(self, moment: Moment) -> None:
        """One more record, until the tick is over and a little beyond."""
        if self._after <= 0:
            return
        self._moments.append(moment)
        tick, here = self.tick, len(self._moments) - 1
        for name, ns in (("pulse", tick.work_ns), ("inject", tick.inject_ns), ("eoi", tick.eoi_ns)):
            if ns is not None:
                self._marks.setdefault(name, here)
        if tick.verdict is Verdict.DROPPED:
            self._marks.setdefault("drop", here)
        if self._is_over() or len(self._moments) >= LIMIT:
            self._after -= 1

    def _is_over(self) -> bool:
        tick = self.tick
        if tick.eoi_ns is not None or (tick.path is Path.NMI and tick.inject_ns is not None):
            return True
        lost = (Verdict.COALESCED, Verdict.MASKED, Verdict.DROPPED)
        if tick.verdict not in lost:
            return False
        return self._is_timers_own or self._moments[-1][0][1] == Event.WORK_END

    @property
    def _is_timers_own(self) -> bool:
        """No worker has a part in it."""
        return self.source.name == "lapic"

    def steps(self) -> list[Step]:
        """The life in order, other ticks' events left out."""
        steps: list[Step] = []
        last = None
        for position in sorted(self._chosen()):
            record = self._moments[position][0]
            what, kernel, module = words_of(record)
            steps.append(
                Step(
                    skipped=0 if last is None else position - last - 1,
                    ts_ns=record[0],
                    what=what,
                    event=f"{event_name(record)}: {event_text(record)}",
                    kernel=kernel,
                    module=module,
                    changed=self._changed(position),
                )
            )
            last = position
        return steps

    def _changed(self, position: int) -> tuple[str, ...]:
        """What the step at `position` changed."""
        return (*self._changes(position, by_next=True), *self._changes(position + 1, by_next=False))

    def _changes(self, position: int, by_next: bool) -> list[str]:
        """What differs between the record before `position` and the one there, as far as it is
        the doing of the later (`by_next`) or of the earlier.
        """
        if not 0 < position < len(self._moments):
            return []
        before, (record, after) = self._moments[position - 1][1], self._moments[position]
        return [
            f"{name}: {value} -> {after[name]}"
            for name, value in before.items()
            if after.get(name, value) != value
            and (record[1] in _RECORDED_AFTER.get(_VCPU_PREFIX.sub("", name), ())) == by_next
        ]

    def _chosen(self) -> set[int]:
        """Which records are this tick's: the arming, the expiry, the pulse, the delivery."""
        expiry = self._marks["expiry"]
        chosen = {expiry}
        armed = self._armed(expiry)
        if armed is not None:
            chosen.add(armed)
        if self._is_timers_own:
            chosen |= self._restart(expiry)
        else:
            chosen |= self._until(expiry, (Event.WORK_END, Event.KVM_ENTRY))
        if "pulse" in self._marks:
            pulse = self._marks["pulse"]
            chosen |= {pulse} if self._is_timers_own else self._pulse(pulse, expiry)
        if "inject" in self._marks:
            chosen |= self._delivery(self._marks["inject"], self._marks.get("eoi"))
        if "drop" in self._marks:
            chosen |= self._drop(self._marks["drop"])
        return chosen

    def _armed(self, expiry: int) -> int | None:
        """Where the timer was set to this tick's time."""
        hrtimer = self._moments[expiry][0][3]
        for index in range(expiry, -1, -1):
            record = self._moments[index][0]
            if record[1] == Event.HRTIMER_START and record[3] == hrtimer:
                return index if record[5] == self.tick.expiry_ns else None
        return None

    def _restart(self, expiry: int) -> set[int]:
        """The callback's own arming for the next tick, right after the expiry."""
        after = expiry + 1
        if after < len(self._moments):
            record = self._moments[after][0]
            if record[1] == Event.HRTIMER_START and record[3] == self._moments[expiry][0][3]:
                return {after}
        return set()

    def _drop(self, drop: int) -> set[int]:
        """What threw the count away, from the guest's port access on."""
        start = drop
        while self._moments[start - 1][0][1] == Event.HRTIMER_CANCEL:
            start -= 1
        if self._moments[start - 1][0][1] == Event.KVM_PIO:
            start -= 1
        return set(range(start, drop + 1))

    def _pulse(self, pulse: int, expiry: int) -> set[int]:
        """The worker's run around a pulse, and the acknowledgement that called for it."""
        start = self._back(pulse, Event.WORK_START) or pulse
        chosen = set(range(start, pulse)) | self._until(pulse, (Event.WORK_END,))
        acked = self._back(start, Event.KVM_ACK_IRQ)
        if acked is not None and acked > expiry:
            chosen |= set(range(max(acked - 1, expiry), start))
        return chosen

    def _delivery(self, inject: int, eoi: int | None) -> set[int]:
        """From the wake-up or the window to the EOI and who hears of it."""
        chosen = {inject}
        if inject and self._moments[inject - 1][0][1] in (Event.KVM_VCPU_WAKEUP, Event.KVM_EXIT):
            chosen.add(inject - 1)
        chosen |= self._until(inject, (Event.KVM_ENTRY,))
        if eoi is not None:
            chosen |= self._end(inject, eoi)
        return chosen

    def _end(self, inject: int, eoi: int) -> set[int]:
        """The guest's access that ended it, from the exit on, and who hears of that."""
        if self._moments[eoi][0][1] != Event.KVM_EOI:
            return set(range(max(inject, eoi - 2), eoi + 1))
        start, end = eoi, eoi + 1
        while self._moments[start - 1][0][1] in _ACCESSES and start > inject:
            start -= 1
        if end < len(self._moments) and self._moments[end][0][1] == Event.KVM_ACK_IRQ:
            end += 1
        return set(range(start, end))

    def _back(self, position: int, event: Event) -> int | None:
        for index in range(position, -1, -1):
            if self._moments[index][0][1] == event:
                return index
        return None

    def _until(self, position: int, ends: tuple[Event, ...]) -> set[int]:
        """From a record to the first of `ends`, stopping before another tick's expiry."""
        chosen = {position}
        for index in range(position + 1, len(self._moments)):
            event = self._moments[index][0][1]
            if event == Event.HRTIMER_EXPIRE_ENTRY:
                break
            chosen.add(index)
            if event in ends:
                break
        return chosen


class StoryTeller:
    """Follows tick `index` (from 1) of the main source and tells its life afterwards.

    Which source that is shows at the end, so every source's tick `index` is followed.
    """

    def __init__(self, index: int, recorder: Recorder, snapshot: Callable[[], Snapshot]) -> None:
        """`snapshot` gives the machine's state by name; `recorder` must record details.

        Made before the PIT is, or it misses how reinjection is set.
        """
        self.index = index
        self._snapshot = snapshot
        self._assembler = TickAssembler(keep=1, tasks=recorder.tasks)
        self._seen: deque[Moment] = deque(maxlen=BEFORE)
        self._followed: dict[Source, Life] = {}
        recorder.follow(self._follow)

    @property
    def expired(self) -> int:
        """How often the main source has expired so far."""
        return self._assembler.expired

    @property
    def tick(self) -> Tick | None:
        """The tick; None if it did not happen."""
        life = self._life()
        return None if life is None else life.tick

    def _follow(self, record: Record) -> None:
        """Take in one record, the moment it is made."""
        self._assembler([record])
        moment = (record, self._snapshot())
        self._seen.append(moment)
        for life in self._followed.values():
            life.follow(moment)
        if record[1] == Event.HRTIMER_EXPIRE_ENTRY:
            for source in self._assembler.sources():
                if source.expired == self.index and source not in self._followed:
                    self._followed[source] = Life(source, self._seen)

    def _life(self) -> Life | None:
        self._assembler.settle()
        return self._followed.get(self._assembler.main)

    def steps(self) -> list[Step]:
        """The life in order, other ticks' events left out; empty if the tick never expired."""
        life = self._life()
        return [] if life is None else life.steps()

    def text(self) -> str:
        """The story for people."""
        tick = self.tick
        if tick is None:
            return f"tick {self.index} did not happen: {self.expired} expired in this run"
        where = f" ({tick.where.value})" if tick.where else ""
        lines = [
            f"the life of tick {tick.index}: {tick.verdict.value}{where}",
            f"  times count from its expiry at {tick.expiry_ns:,} ns",
        ]
        if tick.detail:
            lines.append(f"  {tick.detail}")
        for number, step in enumerate(self.steps(), 1):
            if step.skipped:
                lines.append(f"      ... {step.skipped} events of other ticks ...")
            lines.append("")
            lines.append(f"{number:>3}. {step.what}   [{step.ts_ns - tick.expiry_ns:+,} ns]")
            lines.append(f"      trace   {step.event}")
            lines.append(f"      kernel  {step.kernel}")
            lines.append(f"      here    kvmtick.{step.module}")
            lines += [f"      change  {change}" for change in step.changed]
        return "\n".join(lines)

    def as_dict(self) -> dict[str, object]:
        """The story for programs."""
        tick = self.tick
        return {
            "tick": self.index,
            "verdict": tick.verdict.value if tick else None,
            "where": tick.where.value if tick and tick.where else None,
            "detail": tick.detail if tick else "",
            "expiry_ns": tick.expiry_ns if tick else None,
            "steps": [
                {
                    "ts_ns": step.ts_ns,
                    "what": step.what,
                    "event": step.event,
                    "kernel": step.kernel,
                    "module": f"kvmtick.{step.module}",
                    "changed": list(step.changed),
                }
                for step in self.steps()
            ],
        }


def words_of(record: Record) -> Words:
    """What happens at an event, the kernel's functions, the code here."""
    if record[1] == Event.HRTIMER_EXPIRE_ENTRY and record[4] in _TIMER_FN:
        return _TIMER_FN[record[4]]
    return _TOLD[record[1]]
