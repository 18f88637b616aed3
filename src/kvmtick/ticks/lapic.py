"""The ticks of the local APICs' timers: from the expiry to the message the vCPU sends itself.

The timer's callback only notes that it expired; one note is all it keeps. The vCPU delivers it
before it enters the guest: kvm_apic_accept_irq in its own task. Nothing is delivered while the
timer's LVT entry is masked; the note stays.

Whether the entry is masked is known from kvm_apic (writes of LVTT and SVR) where a trace has it.
Else it is told by a guest that ran on (it wrote a port or an EOI, or got an interrupt) with the
note still there, and by a timer that never gave an interrupt.

Where the records begin in the middle, a note may be there already, and whose timer it is may not be
known: its ticks are `unknown` until its vCPU delivered one, or programmed the timer.

Not told apart, for there is no record: a TSC deadline that had passed when it was written, and a
timer that runs as the VMX preemption timer, have no expiry; their interrupts are no tick's.
"""

from collections.abc import Callable, Mapping
from typing import Final

from kvmtick.ticks.apics import DM_FIXED, LocalApics
from kvmtick.ticks.lives import Keep
from kvmtick.ticks.messages import Messages
from kvmtick.ticks.source import Source
from kvmtick.ticks.tick import Tick
from kvmtick.ticks.verdict import Path, Verdict, Where
from kvmtick.trace.events import IRQ_CONTEXT, Event, Record
from kvmtick.trace.recorder import Entry

__all__ = ["HOST_TICK", "LapicTicks", "LapicTimers"]

HOST_TICK: Final = b"%c%c%c%c%c?%c" % (
    *(Event.HRTIMER_EXPIRE_ENTRY, Event.HRTIMER_START, Event.KVM_APIC_ACCEPT_IRQ),
    *(Event.KVM_INJ_VIRQ, Event.KVM_MMIO, Event.KVM_EOI),
)
"""The events of a periodic timer's tick that nothing disturbs, as a kernel has them: a pattern."""

TICK_ENTRIES: Final = 5
"""Of a plain tick of a simulated run."""

NO_TASK: Final = -1
APIC_SPIV: Final = 0xF0
APIC_LVTT: Final = 0x320
APIC_SPIV_APIC_ENABLED: Final = 1 << 8
APIC_LVT_MASKED: Final = 1 << 16

_HRTIMER_START: Final = int(Event.HRTIMER_START)
_KVM_APIC_ACCEPT_IRQ: Final = int(Event.KVM_APIC_ACCEPT_IRQ)
_KVM_INJ_VIRQ: Final = int(Event.KVM_INJ_VIRQ)
_KVM_EOI: Final = int(Event.KVM_EOI)
_OPEN: Final = Verdict.OUTSTANDING
_LAPIC: Final = Path.LAPIC
_MASKED_DETAIL: Final = "the timer's LVT entry was masked"
_MASK_UNKNOWN: Final = "no record tells whether the timer's LVT entry was masked"
_MERGED_DETAIL: Final = "merged with an expiry that the vCPU had not delivered yet"


class LapicTicks(Source):
    """One local APIC's timer."""

    def __init__(self, keep: Keep) -> None:
        super().__init__("lapic", _LAPIC, keep, has_worker=False)
        self.is_free: bool = False
        """Its vector was looked at, and is neither requested nor in service."""
        self.owner: int | None = None
        """Its vCPU, once that is known."""
        self.vector: int | None = None
        self.waiting: Tick | None = None
        """The expiry that its vCPU has not delivered yet."""
        self.task = NO_TASK
        """The thread that delivered the last one."""
        self.masked: bool | None = None
        self.sees_masks = True
        """Whether the records show the writes that mask it."""
        self.begun = ""
        """Why it is not known whether a note was there before the first expiry."""
        self.ran = False
        """The guest ran on while an expiry waited."""
        self._served = False
        self._expires_ns = 0
        self._expiring: Tick | None = None

    @property
    def vcpu(self) -> int:
        """The vCPU whose timer it is."""
        return super().vcpu if self.owner is None else self.owner

    def start(self, record: Record) -> None:
        """The timer was armed: by its callback, by the guest, or it followed its vCPU."""
        expires_ns = record[5]
        if record[2] & IRQ_CONTEXT:
            if self._expiring is not None:
                self.rearmed(self._expiring, expires_ns)
        else:
            self._no_expiry = None
            if expires_ns != self._expires_ns:
                self._programmed()
        self._expiring = None
        self._expires_ns = expires_ns

    def _programmed(self) -> None:
        """The guest set another time (start_apic_timer): the note is gone."""
        if self.waiting is not None:
            self.lose_waiting("its timer was programmed anew before the vCPU delivered it")
        if self._expires_ns or self.masked is False:
            self.begun = ""

    def expire(self, record: Record) -> None:
        """A tick begins."""
        tick = self._expiring = self.begin(self._expires_ns, record[5])
        if self.waiting is None:
            self.waiting = tick
            self.ran = False
        else:
            self._judge_unserved(tick, Verdict.COALESCED, _MERGED_DETAIL)

    def _judge_unserved(self, tick: Tick, verdict: Verdict, detail: str) -> None:
        """It gets no interrupt: `verdict` says why, unless the entry is masked."""
        masked = self._seems_masked()
        if masked:
            self.judge(tick, Verdict.MASKED, Where.LAPIC, _MASKED_DETAIL)
        elif masked is None:
            self.judge(tick, Verdict.UNKNOWN, detail=self.begun or _MASK_UNKNOWN)
        elif self.begun and verdict is not Verdict.COALESCED:
            self.judge(tick, Verdict.UNKNOWN, detail=self.begun)
        else:
            self.judge(tick, verdict, Where.LAPIC, detail)

    def accept(self, record: Record, apics: LocalApics) -> None:
        """The vCPU delivers the expiry that waits."""
        ts_ns, _, task, vcpu, mode, _, vector = record
        tick = self.waiting
        assert tick is not None
        self.waiting = None
        self.owner = vcpu
        self.task = task
        self.vector = vector
        if self.masked is None and not self.ran:
            self._were_merged(tick.index)
        self.masked = False if self.sees_masks else None
        self._served = True
        if tick.verdict is not _OPEN:
            self.reopen(tick)
        tick.work_ns = ts_ns
        doubt = apics.doubt(vcpu, mode, vector) or self.begun
        self.begun = ""
        if doubt:
            apics.accept_doubtful(vcpu, mode, vector, self)
            self.judge(tick, Verdict.UNKNOWN, detail=doubt)
            return
        if apics.accept(vcpu, mode, vector, self, tick, _LAPIC, ts_ns) is None:
            detail = "its vector was accepted and not injected since"
            self.judge(tick, Verdict.COALESCED, Where.LAPIC, detail)

    def is_plain(self, task: int, vcpu: int, vector: int) -> bool:
        """An expiry that `task` delivers to its vCPU is a plain tick, if that has nothing else to
        do.
        """
        return (
            task == self.task
            and vcpu == self.owner
            and vector == self.vector
            and self.masked is False
            and self.waiting is None
            and self._expires_ns > 0
            and self._no_expiry is None
            and not self.begun
            and not self.blind
        )

    def plain_tick(
        self, fired_ns: int, next_ns: int, accept_ns: int, inject_ns: int, eoi_ns: int
    ) -> None:
        """The same as record by record."""
        vcpu, vector = self.owner, self.vector
        assert vcpu is not None
        assert vector is not None
        if vcpu != self._plain_vcpu or vector != self._plain_vector:
            self.go_plain(_LAPIC, vcpu, vector)
        self._expiring = None
        self.ran = False
        expiry_ns, self._expires_ns = self._expires_ns, next_ns
        self.take_plain(fired_ns, next_ns, expiry_ns, accept_ns, accept_ns, inject_ns, eoi_ns)

    def _were_merged(self, index: int) -> None:
        """That the ticks after `index` seemed masked was a guess, and wrong."""
        count = self.expired - index
        if self._served or not count or self.begun or self.blind or not self.sees_masks:
            return
        self._count(Verdict.MASKED, -count)
        self._count(Verdict.COALESCED, count)
        for tick in self.lives:
            if tick.index > index:
                tick.verdict = Verdict.COALESCED
                tick.detail = _MERGED_DETAIL

    def lost(self, why: str) -> None:
        """Records are missing."""
        self.lose_sight(why)
        self.waiting = self._expiring = self._no_expiry = None
        self._expires_ns = 0
        self.masked = None
        self.begun = why

    def lose_waiting(self, why: str) -> None:
        """The note that an expiry waits is gone."""
        tick, self.waiting = self.waiting, None
        if tick is None or tick.verdict is not _OPEN:
            return
        self._judge_unserved(tick, Verdict.DROPPED, why)

    def settle(self) -> None:
        """An expiry that waits because the entry is masked is not just outstanding."""
        tick = self.waiting
        if tick is None or tick.verdict is not _OPEN:
            return
        masked = self._seems_masked()
        if masked:
            self.judge(tick, Verdict.MASKED, Where.LAPIC, _MASKED_DETAIL)
        elif self.begun or masked is None:
            self.judge(tick, Verdict.UNKNOWN, detail=self.begun or _MASK_UNKNOWN)

    def _seems_masked(self) -> bool | None:
        """Why an expiry waits: it is masked, or the vCPU has not run; None: one of them."""
        if self.masked is not None:
            return self.masked
        if self.ran:
            return True
        return None if self.begun or not self.sees_masks else not self._served


class LapicTimers:
    """All local APICs' timers, by their hrtimer."""

    def __init__(
        self,
        apics: LocalApics,
        messages: Messages,
        vcpu_of: Callable[[int], int | None],
        has_names: bool,
        keep: Keep,
        owners: Mapping[int, int],
    ) -> None:
        """`has_names`: `vcpu_of` knows the threads; else any task may be the vCPU's own. `owners`:
        whose timers these are that no vCPU was seen to arm, by hrtimer.
        """
        self._apics = apics
        self._messages = messages
        self._vcpu_of = vcpu_of
        self._has_names = has_names
        self._keep = keep
        self._owners = owners
        self._timers: dict[int, LapicTicks] = {}
        self._last: LapicTicks | None = None
        self._last_hrtimer = 0
        self._masked: dict[int, bool] = {}
        self.without_expiry = 0
        """Messages that only a timer explains, and that no expiry came before."""
        self._begun = ""
        self._blind = ""
        self._sees_masks = True

    def sources(self) -> list[LapicTicks]:
        """Those that expired, by vCPU."""
        return sorted(
            (timer for timer in self._timers.values() if timer.expired), key=lambda t: t.vcpu
        )

    @property
    def is_waiting(self) -> bool:
        """An expiry waits for its vCPU."""
        return any(timer.waiting is not None for timer in self._timers.values())

    def hrtimer_start(self, record: Record) -> None:
        """A timer was armed; the guest arms its own vCPU's."""
        timer = self._timer(record[3])
        if timer.owner is None and not record[2] & IRQ_CONTEXT:
            self._own(timer, self._vcpu_of(record[2]))
        timer.start(record)

    def hrtimer_expire_entry(self, record: Record) -> None:
        """A timer expired."""
        timer = self._timer(record[3])
        if timer.owner is None:
            # User space has started it (KVM_SET_LAPIC): its vector is not known yet.
            self._messages.forget_eois()
        timer.expire(record)

    def look(self) -> bool:
        """Whether the next expiry may be a plain tick, as far as the timers are concerned."""
        waiting = False
        for timer in self._timers.values():
            timer.is_free = False
            if timer.waiting is not None:
                waiting = True
        return not waiting

    def take_tick(self, entries: list[Entry], at: int, end: int) -> int:
        """The same as record by record, while no expiry waits: expiry, acceptance, injection and
        EOI in a row. How many entries that took; 0, and nothing done, if it is not that.
        """
        if end - at < TICK_ENTRIES:
            return 0
        expire, start, accept = entries[at], entries[at + 1], entries[at + 2]
        inject, eoi = entries[at + 3], entries[at + 4]
        task, vcpu, vector = accept.task, accept.a, accept.d
        if (
            start.event != _HRTIMER_START
            or accept.event != _KVM_APIC_ACCEPT_IRQ
            or inject.event != _KVM_INJ_VIRQ
            or eoi.event != _KVM_EOI
            or start.task != expire.task
            or start.b != expire.b
            or not start.task & IRQ_CONTEXT
            or accept.b
            or accept.c
            or inject.task != task
            or inject.a != vector
            or inject.c
            or eoi.task != task
            or eoi.a != vcpu
            or eoi.b != vector
            or start.a != expire.a
        ):
            return 0
        timer = self._timer_of(expire.a)
        if (
            timer is None
            or not timer.is_plain(task, vcpu, vector)
            or self._messages.may_explain(task)
        ):
            return 0
        if not timer.is_free:
            timer.is_free = self._apics.is_free(vcpu, vector, timer)
            if not timer.is_free:
                return 0
        timer.plain_tick(expire.c, start.c, accept.ts_ns, inject.ts_ns, eoi.ts_ns)
        self._messages.end(task, vector)
        return TICK_ENTRIES

    def _timer_of(self, hrtimer: int) -> LapicTicks | None:
        last = self._last
        if last is not None and self._last_hrtimer == hrtimer:
            return last
        self._last, self._last_hrtimer = self._timers.get(hrtimer), hrtimer
        return self._last

    def host_tick(self, batch: list[Record], at: int, end: int) -> bool:
        """The same of a kernel's records, which match `HOST_TICK`."""
        expire, start, accept, inject, eoi = *batch[at : at + 4], batch[end - 1]
        timer = self._timers.get(expire[3])
        accept_ns, _, task, vcpu, mode, level, vector = accept
        if (
            timer is None
            or mode
            or level
            or not timer.is_plain(task, vcpu, vector)
            or start[2:5] != expire[2:5]
            or not start[2] & IRQ_CONTEXT
            or inject[2] != task
            or inject[3] != vector
            or inject[5]
            or eoi[2:] != (task, vcpu, vector)
            or self._messages.may_explain(task)
            or not self._apics.is_free(vcpu, vector, timer)
        ):
            return False
        timer.plain_tick(expire[5], start[5], accept_ns, inject[0], eoi[0])
        self._messages.end(task, vector)
        return True

    def accept(self, record: Record) -> bool:
        """A local APIC accepts a message; False if it is not its timer's."""
        _, _, task, vcpu, mode, level, _ = record
        if task & IRQ_CONTEXT or (self._has_names and self._vcpu_of(task) != vcpu):
            return False
        timer = self._waiting_of(vcpu)
        if self._messages.explains(record, timer.vector if timer is not None else None):
            return False
        if mode != DM_FIXED or level:
            return False
        if timer is None:
            self.without_expiry += 1
            return False
        timer.accept(record, self._apics)
        if self._sees_masks:
            self._masked[vcpu] = False
        return True

    def apic(self, record: Record) -> None:
        """A local APIC's register was written: LVTT or SVR may mask the timer."""
        _, _, task, is_write, register, value = record
        vcpu = self._vcpu_of(task)
        if not is_write or vcpu is None:
            return
        if register == APIC_LVTT:
            self._mask(vcpu, value & APIC_LVT_MASKED != 0)
        elif register == APIC_SPIV and not value & APIC_SPIV_APIC_ENABLED:
            self._mask(vcpu, True)

    def guest_ran(self, vcpu: int | None) -> None:
        """The guest on a vCPU did something."""
        if vcpu is None:
            return
        for timer in self._timers.values():
            if timer.waiting is not None and timer.owner == vcpu:
                timer.ran = True

    def reset(self, vcpu: int) -> None:
        """INIT resets a local APIC: its timer stops, its LVT is masked."""
        for timer in self._timers.values():
            if timer.owner == vcpu:
                timer.lose_waiting("INIT reset its local APIC")
        self._mask(vcpu, True)

    def lost(self, why: str) -> None:
        """Records are missing."""
        self._begun = why
        self._masked.clear()
        for timer in self._timers.values():
            timer.lost(why)

    def created(self) -> None:
        """The VM is made here: nothing was before."""
        self._begun = ""

    def judge_by(self, blind: str, sees_masks: bool) -> None:
        """Why their ticks cannot be judged, and whether writes that mask them are recorded."""
        if self._blind and not blind:
            self.lost(self._blind)
        self._blind, self._sees_masks = blind, sees_masks
        for timer in self._timers.values():
            timer.blind, timer.sees_masks = blind, sees_masks

    def settle(self) -> None:
        """Judge what can be judged now."""
        for timer in self._timers.values():
            timer.settle()

    def _mask(self, vcpu: int, masked: bool) -> None:
        self._masked[vcpu] = masked
        for timer in self._timers.values():
            if timer.owner == vcpu:
                timer.masked = masked

    def _timer(self, hrtimer: int) -> LapicTicks:
        timer = self._timers.get(hrtimer)
        if timer is None:
            timer = self._timers[hrtimer] = LapicTicks(self._keep)
            timer.begun, timer.blind, timer.sees_masks = self._begun, self._blind, self._sees_masks
        if timer.owner is None and hrtimer in self._owners:
            self._own(timer, self._vcpu_of(self._owners[hrtimer]))
        return timer

    def _own(self, timer: LapicTicks, vcpu: int | None) -> None:
        timer.owner = vcpu
        if vcpu is not None:
            timer.masked = self._masked.get(vcpu)

    def _waiting_of(self, vcpu: int) -> LapicTicks | None:
        """The timer of a vCPU whose expiry waits, or one whose vCPU is not known yet."""
        found = None
        for timer in self._timers.values():
            if timer.waiting is not None:
                if timer.owner == vcpu:
                    return timer
                if timer.owner is None and not self._begun:
                    found = timer
        return found
