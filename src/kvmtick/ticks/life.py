"""From trace to lives: every expiry of the PIT's hrtimer gets an identity and one verdict.

`TickAssembler` consumes records in order and keeps only what is open: the expiries that wait for
their pulse, the one whose PIC request is latched, the one in service. It mirrors the kernel's
`pending` from the events alone, so that the same code can judge any trace that has them.

Which pulse belongs to which expiry: with reinject on the oldest expiry without a pulse gets the
next one; with reinject off the one that queued the work.
"""

from collections import deque
from collections.abc import Callable
from operator import itemgetter

from kvmtick.ticks.histogram import Histogram
from kvmtick.ticks.verdict import Verdict, Where
from kvmtick.trace.events import IRQ_CONTEXT, ApicvInhibitReason, Event, Function, Irqchip, Record

__all__ = ["Tick", "TickAssembler"]

KEEP = 16_384
"""Lives kept for looking at; the counts and latencies cover all."""

PIT_GSI = 0
PIT_SOURCE_ID = 2
PORT_PIC_COMMAND = 0x20
PORT_PIC_DATA = 0x21
IMR_IRQ0 = 1
NO_COMMAND = -1
OPEN = Verdict.OUTSTANDING
_DELIVERED = Verdict.DELIVERED
_LATE = Verdict.LATE

_EVENT_OF = itemgetter(1)
_PLAIN_TICK = bytes(
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
_REACH_HOPS = ("expiry_to_work", "work_to_accept", "accept_to_inject")
_END_HOPS = ("inject_to_eoi", "expiry_to_eoi")
ICW1 = 0x10
OCW3 = 0x08

_PIT_TIMER_FN = int(Function.PIT_TIMER_FN)
_PIT_DO_WORK = int(Function.PIT_DO_WORK)
_PIC_MASTER = int(Irqchip.PIC_MASTER)


def _ignore(record: Record) -> None:
    """An event that says nothing of the PIT's ticks."""


class Tick:
    """One expiry and what became of it; times in ns, None for a step it never reached."""

    __slots__ = (
        "accept_ns",
        "detail",
        "eoi_ns",
        "expiry_ns",
        "fired_ns",
        "index",
        "inject_ns",
        "period_ns",
        "vector",
        "verdict",
        "where",
        "work_ns",
    )

    def __init__(
        self,
        index: int,
        expiry_ns: int,
        fired_ns: int,
        period_ns: int | None = None,
        work_ns: int | None = None,
        accept_ns: int | None = None,
        inject_ns: int | None = None,
        eoi_ns: int | None = None,
        vector: int | None = None,
        verdict: Verdict = OPEN,
    ) -> None:
        """`index` counts from 1; `expiry_ns` is the timer's `expires`, `fired_ns` the late now."""
        self.index = index
        self.expiry_ns = expiry_ns
        self.fired_ns = fired_ns
        self.period_ns = period_ns
        self.work_ns = work_ns
        self.accept_ns = accept_ns
        self.inject_ns = inject_ns
        self.eoi_ns = eoi_ns
        self.vector = vector
        self.verdict = verdict
        self.where: Where | None = None
        self.detail = ""

    def __repr__(self) -> str:
        where = f" at {self.where.value}" if self.where else ""
        return f"<Tick {self.index} expiry_ns={self.expiry_ns} {self.verdict.value}{where}>"


_PlainTick = tuple[int, int, int, int, int, int, int, int, int, Verdict]
"""A finished life as the arguments of `Tick`: most are never looked at."""


class TickAssembler:
    """A recorder's consumer that follows the PIT's ticks down the PIC path."""

    source = "pit"
    path = "pic"

    def __init__(self, keep: int = KEEP) -> None:
        self._kept: deque[Tick | _PlainTick] = deque(maxlen=keep)
        self.expired = 0
        self.extra = 0
        self.reached = 0
        self._latency_ns = {hop: Histogram() for hop in (*_REACH_HOPS, *_END_HOPS)}
        self._reach_hops: list[tuple[int, int, int]] = []
        self._end_hops: list[tuple[int, int]] = []
        self._judged = dict.fromkeys(Verdict, 0)
        self._reinject = False
        self._expires_ns = 0
        self._expiring: Tick | None = None
        self._pending = 0
        self._work_queued = False
        self._work_ns = 0
        self._seen_by_worker = 0
        self._run_pulsed = True
        self._held_back = 0
        self._waiting: deque[Tick] = deque()
        self._pulsed: Tick | None = None
        self._pulse_level = 0
        self._held_by: set[int] = set()
        self._request: Tick | None = None
        self._foreign_request = False
        self._in_service: Tick | None = None
        self._counted: Tick | None = None
        self._auto_eoi = False
        self._auto_eoi_tick: Tick | None = None
        self._pic_command = NO_COMMAND
        self._icw2_next = False
        self._irq_base: int | None = None
        self._handlers: list[Callable[[Record], None]] = [_ignore] * len(Event)
        for event, handler in (
            (Event.HRTIMER_START, self._hrtimer_start),
            (Event.HRTIMER_EXPIRE_ENTRY, self._hrtimer_expire_entry),
            (Event.WORK_QUEUE, self._work_queue),
            (Event.WORK_START, self._work_start),
            (Event.KVM_SET_IRQ, self._set_irq),
            (Event.KVM_PIC_SET_IRQ, self._pic_set_irq),
            (Event.KVM_INJ_VIRQ, self._inj_virq),
            (Event.KVM_ACK_IRQ, self._ack_irq),
            (Event.KVM_PIO, self._pio),
            (Event.KVM_APICV_INHIBIT_CHANGED, self._apicv_inhibit_changed),
            (Event.PIT_RESET_REINJECT, self._pit_reset_reinject),
        ):
            self._handlers[event] = handler

    def __call__(self, batch: list[Record]) -> None:
        """Take in a batch of records."""
        handlers = self._handlers
        events = bytes(map(_EVENT_OF, batch))
        idle = self._is_idle()
        at = 0
        while at < len(batch):
            plain = events.find(_PLAIN_TICK, at)
            if plain == at and idle and self._plain_tick(batch, at):
                at += len(_PLAIN_TICK)
                continue
            # Record by record up to the next tick that may be plain, past this one if it was not.
            end = plain if plain > at else events.find(_PLAIN_TICK, at + 1)
            for record in batch[at : end if end >= 0 else None]:
                handlers[record[1]](record)
            if end < 0:
                break
            at = end
            idle = self._is_idle()
        self._fold_hops()

    def _plain_tick(self, batch: list[Record], at: int) -> bool:
        """A whole life at once, the same as record by record: expiry, pulse, injection and EOI in
        a row, while nothing else is under way. False, and nothing done, if it is not that.
        """
        _, _, _, gsi, level, source = batch[at + 4]
        accept_ns, _, _, chip, pin, _, imr, coalesced = batch[at + 5]
        inject_ns, _, _, vector, _, reinjected = batch[at + 6]
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
            or vector != self._irq_base
            or reinjected
            or not is_write
            or port != PORT_PIC_COMMAND
            or value & (ICW1 | OCW3)
            or irqchip
            or acked_pin
        ):
            return False
        self.expired += 1
        self.reached += 1
        expiry_ns, next_ns, work_ns = self._expires_ns, batch[at + 2][5], batch[at + 3][0]
        self._expires_ns = next_ns
        self._work_ns = work_ns
        self._begin_run()
        self._run_pulsed = True
        verdict = _DELIVERED if inject_ns < next_ns else _LATE
        self._judged[verdict] += 1
        self._kept.append(
            (
                self.expired,
                expiry_ns,
                batch[at][5],
                next_ns - expiry_ns,
                work_ns,
                accept_ns,
                inject_ns,
                eoi_ns,
                vector,
                verdict,
            )
        )
        self._reach_hops.append((work_ns - expiry_ns, accept_ns - work_ns, inject_ns - accept_ns))
        self._end_hops.append((eoi_ns - inject_ns, eoi_ns - expiry_ns))
        return True

    def _is_idle(self) -> bool:
        """Reinject is on and no tick is under way."""
        return (
            self._reinject
            and not self._pending
            and not self._waiting
            and not self._work_queued
            and self._request is None
            and self._in_service is None
            and not self._foreign_request
            and not self._held_by
            and not self._auto_eoi
        )

    @property
    def kept(self) -> int:
        """How many lives are kept: the last ones."""
        return len(self._kept)

    @property
    def lives(self) -> list[Tick]:
        """The lives that are kept, in order."""
        return [kept if isinstance(kept, Tick) else Tick(*kept) for kept in self._kept]

    def life(self, position: int) -> Tick:
        """One of the lives that are kept, counted from 0; IndexError if there is none."""
        kept = self._kept[position]
        return kept if isinstance(kept, Tick) else Tick(*kept)

    def latency_ns(self) -> dict[str, Histogram]:
        """The hops of a tick: worker start, PIC request, VM-entry field written, guest's EOI."""
        return self._latency_ns

    def _fold_hops(self) -> None:
        for names, rows in ((_REACH_HOPS, self._reach_hops), (_END_HOPS, self._end_hops)):
            for name, values in zip(names, zip(*rows, strict=True), strict=False):
                self._latency_ns[name].add(values)
            rows.clear()

    def settle(self) -> None:
        """Judge what can be judged now, between two events; everything else is outstanding."""
        self._drop_uncounted()

    def count(self, verdict: Verdict) -> int:
        """How many ticks have this verdict; the verdicts add up to `expired`."""
        if verdict is Verdict.OUTSTANDING:
            return self.expired - sum(self._judged.values())
        return self._judged[verdict]

    # The timer and the worker.

    def _hrtimer_start(self, record: Record) -> None:
        if record[4] != _PIT_TIMER_FN:
            return
        expiring = self._expiring
        if expiring is not None and record[2] & IRQ_CONTEXT:
            expiring.period_ns = record[5] - self._expires_ns
        self._expiring = None
        self._expires_ns = record[5]

    def _hrtimer_expire_entry(self, record: Record) -> None:
        if record[4] != _PIT_TIMER_FN:
            return
        if len(self._waiting) > self._pending:
            self._drop_uncounted()
        self.expired += 1
        tick = Tick(self.expired, self._expires_ns, record[5])
        self._expiring = tick
        self._kept.append(tick)
        if self._reinject:
            self._pending += 1
        elif self._work_queued:
            self._judge(tick, Verdict.COALESCED, Where.WORKER, "the worker had not run yet")
            return
        self._waiting.append(tick)

    def _work_queue(self, record: Record) -> None:
        if record[4] == _PIT_DO_WORK:
            self._work_queued = True

    def _work_start(self, record: Record) -> None:
        if record[4] != _PIT_DO_WORK:
            return
        self._work_queued = False
        self._work_ns = record[0]
        self._begin_run()

    def _begin_run(self) -> None:
        """A run of the worker that gave no pulse found `irq_ack` at 0: it held back every tick
        that had expired by then.
        """
        if not self._run_pulsed:
            self._held_back = self._seen_by_worker
        self._seen_by_worker = self.expired
        self._run_pulsed = False

    def _pit_reset_reinject(self, record: Record) -> None:
        self._pending = 0
        self._counted = None
        self._forget_waiting("its pending count was reset")

    def _apicv_inhibit_changed(self, record: Record) -> None:
        if record[3] != ApicvInhibitReason.PIT_REINJ:
            return
        self._reinject = bool(record[4])
        self._pending = 0
        self._counted = None
        self._forget_waiting("reinjection was switched")

    def _forget_waiting(self, why: str) -> None:
        """Drop who waits; work that is queued already will still pulse for the first of them."""
        survivor = self._waiting.popleft() if self._waiting and self._work_queued else None
        for tick in self._waiting:
            self._judge(tick, Verdict.DROPPED, detail=why)
        self._waiting.clear()
        if survivor is not None:
            self._waiting.append(survivor)

    def _drop_uncounted(self) -> None:
        """Acknowledgements that were nobody's consume counts: fewer pulses than ticks will come."""
        if not self._reinject or self._work_queued:
            return
        owed = max(0, self._pending - (self._counted is not None))
        while len(self._waiting) > owed:
            self._judge(
                self._waiting.popleft(),
                Verdict.DROPPED,
                detail="an acknowledgement that was not its own consumed its pending count",
            )

    # The line and the PIC.

    def _set_irq(self, record: Record) -> None:
        if record[3] == PIT_GSI and record[5] != PIT_SOURCE_ID:
            self._hold(record[5], record[4])
        self._pulse_level = record[4]
        if not record[4]:
            return
        self._pic_command = NO_COMMAND
        if record[3] != PIT_GSI or record[5] != PIT_SOURCE_ID or not self._waiting:
            self._pulsed = None
            return
        tick = self._waiting.popleft()
        self._pulsed = tick
        tick.work_ns = self._work_ns
        self._run_pulsed = True
        if self._reinject:
            self._counted = tick
            if tick.index <= self._held_back:
                self._judge(tick, Verdict.REINJECTED)

    def _hold(self, source: int, level: int) -> None:
        """Another source drives GSI 0: while it is high a pulse is no edge."""
        if level:
            self._held_by.add(source)
        else:
            self._held_by.discard(source)

    def _pic_set_irq(self, record: Record) -> None:
        if not self._pulse_level or record[3] or record[4]:
            return
        tick = self._pulsed
        self._pulsed = None
        if record[6] & IMR_IRQ0 and (self._request is not None or self._foreign_request):
            self._lost(tick, Verdict.MASKED, "IRQ 0 was masked and its request latched already")
        elif record[7]:
            self._lost(tick, Verdict.COALESCED, "the PIC's request was still set")
        elif tick is not None and self._held_by:
            self._lost(tick, Verdict.COALESCED, "another source holds the line high: no edge")
        else:
            if self._request is not None:
                self._judge(
                    self._request, Verdict.DROPPED, Where.PIC, "its PIC request was taken back"
                )
            self._request = tick
            self._foreign_request = tick is None
            if tick is not None:
                tick.accept_ns = record[0]

    def _lost(self, tick: Tick | None, verdict: Verdict, detail: str) -> None:
        if tick is not None and tick.verdict is OPEN:
            self._judge(tick, verdict, Where.PIC, detail)

    # The vCPU and the guest.

    def _inj_virq(self, record: Record) -> None:
        if record[5]:
            return
        if self._auto_eoi:
            self._auto_eoi = False
            if self._auto_eoi_tick is not None:
                self._auto_eoi_tick.vector = record[3]
            else:
                self.extra += 1
            return
        tick = self._request
        base = self._irq_base
        if tick is None or (base is not None and record[3] != base):
            if base is None or record[3] == base:
                self._foreign_request = False
            self.extra += 1
            return
        tick.vector = record[3]
        self._request = None
        self._in_service = tick
        self._reach(tick, record[0])

    def _ack_irq(self, record: Record) -> None:
        if record[3] != _PIC_MASTER or record[4]:
            return
        if self._reinject and self._pending:
            self._pending -= 1
        self._counted = None
        command, self._pic_command = self._pic_command, NO_COMMAND
        if command == NO_COMMAND or command & (ICW1 | OCW3):
            self._acked_without_eoi(command, record[0])
        elif self._in_service is not None:
            self._end(self._in_service, record[0])
            self._in_service = None

    def _acked_without_eoi(self, command: int, ts_ns: int) -> None:
        """ICW1 forgot the request; a poll or an automatic EOI took it."""
        tick = self._request
        self._request = None
        self._foreign_request = False
        if command != NO_COMMAND and command & ICW1:
            if tick is not None and tick.verdict is OPEN:
                self._judge(tick, Verdict.DROPPED, Where.PIC, "ICW1 cleared its PIC request")
            return
        # An automatic EOI comes just before its injection, a poll just before its port read.
        self._auto_eoi = True
        self._auto_eoi_tick = tick
        if tick is not None:
            self._reach(tick, ts_ns)
            self._end(tick, ts_ns)

    def _pio(self, record: Record) -> None:
        if not record[3]:
            self._auto_eoi = False
            return
        port, value = record[4], record[7]
        if port == PORT_PIC_COMMAND:
            self._pic_command = value
            if value & ICW1:
                self._icw2_next = True
        elif port == PORT_PIC_DATA and self._icw2_next:
            self._icw2_next = False
            self._irq_base = value & 0xF8

    # Judgement.

    def _reach(self, tick: Tick, ts_ns: int) -> None:
        tick.inject_ns = ts_ns
        self.reached += 1
        if tick.verdict is OPEN:
            on_time = tick.period_ns is None or ts_ns < tick.expiry_ns + tick.period_ns
            self._judge(tick, _DELIVERED if on_time else _LATE)
        if tick.work_ns is not None and tick.accept_ns is not None:
            work_ns, accept_ns = tick.work_ns, tick.accept_ns
            self._reach_hops.append(
                (work_ns - tick.expiry_ns, accept_ns - work_ns, ts_ns - accept_ns)
            )

    def _end(self, tick: Tick, ts_ns: int) -> None:
        tick.eoi_ns = ts_ns
        if tick.inject_ns is not None:
            self._end_hops.append((ts_ns - tick.inject_ns, ts_ns - tick.expiry_ns))

    def _judge(
        self, tick: Tick, verdict: Verdict, where: Where | None = None, detail: str = ""
    ) -> None:
        tick.verdict = verdict
        tick.where = where
        tick.detail = detail
        self._judged[verdict] += 1
