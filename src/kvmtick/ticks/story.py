"""The life of one tick, step by step: what the kernel calls it, where it is here, what changed.

The teller follows the recorder record by record, with a snapshot of the machine's state at each,
until its tick is over. What changed between two records is the doing of the first, unless the
second is an event that is recorded after it did that.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from kvmtick.ticks.life import Tick, TickAssembler
from kvmtick.ticks.verdict import Verdict
from kvmtick.trace.events import Event, Record
from kvmtick.trace.ftrace import event_name, event_text
from kvmtick.trace.recorder import Recorder

__all__ = ["Step", "StoryTeller"]

BEFORE = 64
AFTER = 4
LIMIT = 20_000
"""Records kept of one life; a longer one is told up to there."""

Snapshot = dict[str, str]

_TOLD: dict[int, tuple[str, str, str]] = {
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
    Event.KVM_PIO: ("the guest accesses a port", "kvm_fast_pio", "vcpu.vcpu.Vcpu"),
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
}

_RECORDED_AFTER: dict[str, tuple[Event, ...]] = {
    "timer": (Event.HRTIMER_EXPIRE_ENTRY,),
    "PIC IRR": (Event.KVM_PIC_SET_IRQ, Event.KVM_INJ_VIRQ),
    "PIC ISR": (Event.KVM_INJ_VIRQ,),
    "INTR": (Event.KVM_PIC_SET_IRQ, Event.KVM_INJ_VIRQ),
    "KVM_REQ_EVENT": (Event.KVM_PIC_SET_IRQ, Event.KVM_INJ_VIRQ, Event.KVM_ENTRY),
    "interrupt window": (Event.KVM_ENTRY,),
    "VM-entry intr info": (Event.KVM_EXIT,),
    "vCPU": (Event.KVM_VCPU_WAKEUP,),
}
"""For each name of the snapshot, the events that are recorded when they have changed it already."""


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


class StoryTeller:
    """Follows tick `index` (from 1) through a run and tells its life afterwards."""

    def __init__(self, index: int, recorder: Recorder, snapshot: Callable[[], Snapshot]) -> None:
        """`snapshot` gives the machine's state by name; `recorder` must record details.

        Made before the PIT is, or it misses how reinjection is set.
        """
        self.index = index
        self.tick: Tick | None = None
        self.expired = 0
        self._snapshot = snapshot
        self._assembler = TickAssembler(keep=1)
        self._seen: deque[tuple[Record, Snapshot]] = deque(maxlen=BEFORE)
        self._life: list[tuple[Record, Snapshot]] = []
        self._marks: dict[str, int] = {}
        self._after = AFTER
        recorder.follow(self._follow)

    def _follow(self, record: Record) -> None:
        """Take in one record, the moment it is made."""
        assembler = self._assembler
        assembler([record])
        self.expired = assembler.expired
        if self._after <= 0:
            return
        moment = (record, self._snapshot())
        if self.tick is None:
            self._seen.append(moment)
            if assembler.expired == self.index:
                self.tick = assembler.lives[-1]
                self._life = list(self._seen)
                self._marks["expiry"] = len(self._life) - 1
            return
        self._life.append(moment)
        self._mark(self.tick)
        if self._is_over(self.tick) or len(self._life) >= LIMIT:
            self._after -= 1

    def _mark(self, tick: Tick) -> None:
        here = len(self._life) - 1
        for name, ns in (("pulse", tick.work_ns), ("inject", tick.inject_ns), ("eoi", tick.eoi_ns)):
            if ns is not None:
                self._marks.setdefault(name, here)
        if tick.verdict is Verdict.DROPPED:
            self._marks.setdefault("drop", here)

    def _is_over(self, tick: Tick) -> bool:
        if tick.eoi_ns is not None:
            return True
        lost = (Verdict.COALESCED, Verdict.MASKED, Verdict.DROPPED)
        return tick.verdict in lost and self._life[-1][0][1] == Event.WORK_END

    def steps(self) -> list[Step]:
        """The life in order, other ticks' events left out; empty if the tick never expired."""
        steps: list[Step] = []
        last = None
        for position in sorted(self._chosen()):
            record = self._life[position][0]
            what, kernel, module = _TOLD[record[1]]
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
        if not 0 < position < len(self._life):
            return []
        before, (record, after) = self._life[position - 1][1], self._life[position]
        return [
            f"{name}: {value} -> {after[name]}"
            for name, value in before.items()
            if after.get(name, value) != value
            and (record[1] in _RECORDED_AFTER.get(name, ())) == by_next
        ]

    def _chosen(self) -> set[int]:
        """Which records are this tick's: the arming, the expiry, the pulse, the delivery."""
        if self.tick is None:
            return set()
        expiry = self._marks["expiry"]
        chosen = {expiry}
        armed = self._back(expiry, Event.HRTIMER_START, self.tick.expiry_ns)
        if armed is not None:
            chosen.add(armed)
        chosen |= self._until(expiry, (Event.WORK_END, Event.KVM_ENTRY))
        if "pulse" in self._marks:
            chosen |= self._pulse(self._marks["pulse"], expiry)
        if "inject" in self._marks:
            chosen |= self._delivery(self._marks["inject"], self._marks.get("eoi"))
        if "drop" in self._marks:
            chosen |= self._drop(self._marks["drop"])
        return chosen

    def _drop(self, drop: int) -> set[int]:
        """What threw the count away, from the guest's port access on."""
        start = drop
        while self._life[start - 1][0][1] == Event.HRTIMER_CANCEL:
            start -= 1
        if self._life[start - 1][0][1] == Event.KVM_PIO:
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
        """From the wake-up or the window to the EOI."""
        chosen = {inject}
        if inject and self._life[inject - 1][0][1] in (Event.KVM_VCPU_WAKEUP, Event.KVM_EXIT):
            chosen.add(inject - 1)
        chosen |= self._until(inject, (Event.KVM_ENTRY,))
        if eoi is not None:
            chosen |= set(range(max(inject, eoi - 2), eoi + 1))
        return chosen

    def _back(self, position: int, event: Event, expires_ns: int | None = None) -> int | None:
        for index in range(position, -1, -1):
            record = self._life[index][0]
            if record[1] == event and (expires_ns is None or record[5] == expires_ns):
                return index
        return None

    def _until(self, position: int, ends: tuple[Event, ...]) -> set[int]:
        """From a record to the first of `ends`, stopping before another tick's expiry."""
        chosen = {position}
        for index in range(position + 1, len(self._life)):
            event = self._life[index][0][1]
            if event == Event.HRTIMER_EXPIRE_ENTRY:
                break
            chosen.add(index)
            if event in ends:
                break
        return chosen

    def text(self) -> str:
        """The story for people."""
        if self.tick is None:
            return f"tick {self.index} did not happen: {self.expired} expired in this run"
        tick = self.tick
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
