"""Why a tick came late or not at all: the hop that took longest, and who held it up.

A cause is named only where the trace shows it: a thread that wanted a CPU by sched_waking and
sched_switch, a guest that was entered with the request pending by kvm_entry. Elsewhere the hop
alone is named, and what would have to be recorded to tell more.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum

from kvmtick.report.masks import PicMask
from kvmtick.report.vcpus import Vcpus
from kvmtick.report.waits import CpuWaits, Wait
from kvmtick.ticks.host import VmTicks
from kvmtick.ticks.tick import Tick
from kvmtick.ticks.verdict import Path, Verdict, Where
from kvmtick.timing.host import format_ns
from kvmtick.trace.decoder import pid_of

__all__ = ["Cause", "CauseKind", "Causes", "Namer"]

Namer = Callable[[int], str]
"""`comm-pid` of a pid."""

SHORT_NS = 100_000
"""What took less held nothing up."""
MOST_JUDGED_NS = 1_000_000_000
"""Of a request that stands for long, its last half or this last part tells why."""
_HALF = 2
"""Who held a hop up for 1/2 of its time is its cause."""


class CauseKind(StrEnum):
    """Who held it up; the words of the findings."""

    TIMER_LATE = "timer-late"
    """The hrtimer's callback ran late."""
    WORKER_WAITED = "worker-late"
    """The kvm-pit thread wanted to run and had no CPU."""
    WORKER_LATE = "worker-late-unexplained"
    """The kvm-pit thread ran late; the trace does not show why."""
    VCPU_WAITED = "vcpu-waited"
    """The vCPU's thread wanted to run and had no CPU."""
    VCPU_ASLEEP = "vcpu-asleep"
    """The vCPU's thread slept."""
    VCPU_OUT = "vcpu-out"
    """The vCPU did not enter the guest, though nothing shows that its thread had no CPU."""
    INTERRUPTS_OFF = "interrupts-off"
    """The guest was entered with the request pending and did not take it."""
    NO_WINDOW = "not-taken-in-guest"
    """The same by way of a local APIC, which may serve what has a higher priority."""
    PIC_MASKED = "masked-in-pic"
    """The guest kept it waiting in the PIC: IRQ 0 was masked."""
    BUSY = "not-taken-on-cpu"
    """The vCPU's thread had a CPU and the guest did not take the request: its interrupts were off,
    or user space kept it out of the guest."""
    NOT_TAKEN = "not-taken"
    """The guest did not take the request; the trace does not show why."""
    SLOW_EOI = "slow-eoi"
    """The guest's handler took long to its EOI."""
    MASKED = "masked"
    """The guest masked it."""
    OTHER = "other"
    """As its verdict says."""


@dataclass(frozen=True, slots=True)
class Cause:
    """Who held a tick up."""

    kind: CauseKind
    ns: int = 0
    """For how long."""
    thread: int | None = None
    """pid of the thread that was late."""
    cpu: int | None = None
    """Which CPU it waited for."""
    holder: int | None = None
    """pid of who ran there; 0: nobody did."""
    previous: bool = False
    """It held up the tick before, which this one had to wait for."""
    detail: str = ""
    """What its verdict says beside."""

    def text(self, name: Namer) -> str:
        """A sentence without its stop."""
        what = _SAID[self.kind].format(
            ns=format_ns(self.ns),
            thread="its thread" if self.thread is None else name(self.thread),
            cpu=self.cpu,
            holder=_held_by(self.holder, name),
            detail=self.detail or "nothing else is known of it",
        )
        return f"it had to wait for the tick before: {what}" if self.previous else what


_SAID = {
    CauseKind.TIMER_LATE: "the hrtimer fired {ns} late: the host kept its interrupts off, or its"
    " CPU slept",
    CauseKind.WORKER_WAITED: "{thread} waited {ns} for CPU {cpu}, {holder}",
    CauseKind.WORKER_LATE: "the worker ran {ns} after the expiry; why, the trace cannot tell",
    CauseKind.VCPU_WAITED: "the vCPU's thread {thread} waited {ns} for CPU {cpu}, {holder}",
    CauseKind.VCPU_ASLEEP: "the vCPU's thread {thread} slept for {ns}",
    CauseKind.VCPU_OUT: "the vCPU did not enter the guest for {ns}",
    CauseKind.INTERRUPTS_OFF: "the guest was running and did not take it for {ns}: its interrupts"
    " were off",
    CauseKind.NO_WINDOW: "the guest was running and did not take it for {ns}: its interrupts were"
    " off, or it served others of a higher priority",
    CauseKind.PIC_MASKED: "the guest had masked IRQ 0 in the PIC for {ns}",
    CauseKind.BUSY: "the guest did not take it for {ns}, though its thread {thread} had a CPU: its"
    " interrupts were off, or its VMM kept it out of the guest",
    CauseKind.NOT_TAKEN: "the guest did not take it for {ns}; why, the trace cannot tell",
    CauseKind.SLOW_EOI: "the guest's handler took {ns} to its EOI",
    CauseKind.MASKED: "the guest had masked it",
    CauseKind.OTHER: "{detail}",
}


def _held_by(holder: int | None, name: Namer) -> str:
    if holder is None:
        return "where nobody knows who ran"
    return f"where {name(holder)} ran" if holder else "which was idle"


class Causes:
    """Finds the cause of one VM's ticks."""

    def __init__(self, vm: VmTicks, waits: CpuWaits, vcpus: Vcpus, mask: PicMask) -> None:
        self._vm = vm
        self._waits = waits
        self._vcpus = vcpus
        self._mask = mask

    def of(
        self,
        tick: Tick,
        before: Tick | None = None,
        cause_before: Cause | None = None,
        holder: Tick | None = None,
        since_ns: int | None = None,
    ) -> Cause:
        """Why a tick was not simply delivered. `before`: the tick before it, and its cause;
        `holder`: the last one before it that reached a vCPU; `since_ns`: when a chip's request was
        first found set that has not been taken since.
        """
        verdict = tick.verdict
        if verdict is Verdict.MASKED:
            return Cause(CauseKind.MASKED)
        if verdict in (Verdict.LATE, Verdict.DELIVERED):
            return self.of_arrival(tick)
        if verdict is Verdict.COALESCED and tick.where is Where.WORKER:
            before_ns = tick.fired_ns - 1 if before is None else before.fired_ns
            if tick.fired_ns - tick.expiry_ns > tick.fired_ns - before_ns:
                # A timer that is late catches up at once: no worker runs in between.
                return Cause(CauseKind.TIMER_LATE, tick.fired_ns - tick.expiry_ns)
            cause = self._worker(tick.fired_ns - 1, tick.fired_ns)
            if cause.kind is CauseKind.WORKER_LATE:
                return replace(cause, ns=tick.fired_ns - before_ns)
            return cause
        if verdict is Verdict.COALESCED and holder is not None:
            accept_ns, inject_ns = holder.accept_ns, holder.inject_ns
            if accept_ns is not None and inject_ns is not None and inject_ns > tick.fired_ns:
                return replace(self._vcpu(holder, accept_ns, inject_ns), previous=True)
        if tick.where is Where.PIC and since_ns is not None and since_ns < tick.fired_ns:
            # Whose request it is the trace does not show: it was set before it began.
            start_ns = max((since_ns + tick.fired_ns) // 2, tick.fired_ns - MOST_JUDGED_NS)
            cause = self._untaken(tick.vcpu or 0, True, start_ns, tick.fired_ns)
            if cause.kind is CauseKind.VCPU_OUT:
                # It may have entered before, and stayed there.
                cause = Cause(CauseKind.NOT_TAKEN)
            return replace(cause, ns=tick.fired_ns - since_ns, previous=True)
        if verdict in (Verdict.REINJECTED, Verdict.COALESCED):
            if cause_before is not None and (before is None or before.where is not Where.WORKER):
                return replace(cause_before, previous=True)
            if before is not None and before.inject_ns is not None:
                return replace(self.of_arrival(before, to_eoi=True), previous=True)
        return Cause(CauseKind.OTHER, detail=tick.detail or _standing(tick, before))

    def of_told(self, tick: Tick) -> Cause:
        """Of a tick that is told of but was delivered."""
        cause = self.of_arrival(tick) if tick.inject_ns is not None else self.of(tick)
        if tick.verdict is Verdict.DELIVERED and cause.ns < SHORT_NS:
            return Cause(CauseKind.OTHER, detail="nothing: it came in time")
        return cause

    def of_arrival(self, tick: Tick, to_eoi: bool = False) -> Cause:
        """Of a tick that reached a vCPU the hop that took longest; `to_eoi`: or until its EOI."""
        is_pit = tick.path is not Path.LAPIC
        fire_ns = tick.fired_ns - tick.expiry_ns
        spans = []
        if tick.work_ns is not None:
            spans.append((tick.fired_ns, tick.work_ns, self._worker if is_pit else None))
        if tick.work_ns is not None and tick.accept_ns is not None:
            spans.append((tick.work_ns, tick.accept_ns, self._worker if is_pit else None))
        if tick.accept_ns is not None and tick.inject_ns is not None:
            spans.append((tick.accept_ns, tick.inject_ns, None))
        start_ns, end_ns, who = max(spans, key=lambda s: s[1] - s[0], default=(0, 0, None))
        longest_ns = end_ns - start_ns
        if to_eoi and tick.inject_ns is not None and tick.eoi_ns is not None:
            handler_ns = tick.eoi_ns - tick.inject_ns
            if handler_ns > max(fire_ns, longest_ns):
                off = self._off_cpu(tick.vcpu or 0, tick.inject_ns, tick.eoi_ns)
                return off or Cause(CauseKind.SLOW_EOI, handler_ns)
        if fire_ns > longest_ns:
            return Cause(CauseKind.TIMER_LATE, fire_ns)
        if who is not None:
            return who(start_ns, end_ns)
        return self._vcpu(tick, start_ns, end_ns)

    def _worker(self, start_ns: int, end_ns: int) -> Cause:
        """Why the worker did not run in a span."""
        for task in self._vm.workers:
            pid = pid_of(self._vm.tasks[task])
            waits = [w for w in self._waits.waits(pid, start_ns, end_ns) if not w.asleep]
            wait = max(waits, key=lambda w: w.within(start_ns, end_ns), default=None)
            if wait is not None and wait.within(start_ns, end_ns) * _HALF >= end_ns - start_ns:
                return _waited(CauseKind.WORKER_WAITED, pid, wait)
        return Cause(CauseKind.WORKER_LATE, end_ns - start_ns)

    def _vcpu(self, tick: Tick, start_ns: int, end_ns: int) -> Cause:
        """Why a vCPU took nothing in a span."""
        return self._untaken(tick.vcpu or 0, tick.path is Path.PIC, start_ns, end_ns)

    def _untaken(self, vcpu: int, is_pic: bool, start_ns: int, end_ns: int) -> Cause:
        span_ns = end_ns - start_ns
        if is_pic and self._mask.masked_ns(start_ns, end_ns) * _HALF >= span_ns > 0:
            return Cause(CauseKind.PIC_MASKED, span_ns)
        off = self._off_cpu(vcpu, start_ns, end_ns)
        if off is not None:
            return off
        entry_ns = self._vcpus.first_entry_ns(vcpu, start_ns, end_ns)
        if entry_ns is not None and (end_ns - entry_ns) * _HALF >= span_ns:
            return Cause(CauseKind.INTERRUPTS_OFF if is_pic else CauseKind.NO_WINDOW, span_ns)
        if self._vcpus.knows_entries(vcpu, start_ns):
            return Cause(CauseKind.VCPU_OUT, span_ns)
        pid = self._vcpus.pid(vcpu)
        if pid is not None and self._waits.knows(pid, start_ns):
            return Cause(CauseKind.BUSY, span_ns, pid)
        return Cause(CauseKind.NOT_TAKEN, span_ns)

    def _off_cpu(self, vcpu: int, start_ns: int, end_ns: int) -> Cause | None:
        """If its thread was off its CPU for most of a span, why."""
        pid = self._vcpus.pid(vcpu)
        if pid is None:
            return None
        for asleep in (False, True):
            waits = [w for w in self._waits.waits(pid, start_ns, end_ns) if w.asleep == asleep]
            off_ns = sum(wait.within(start_ns, end_ns) for wait in waits)
            if not waits or off_ns * _HALF < end_ns - start_ns:
                continue
            if asleep:
                return Cause(CauseKind.VCPU_ASLEEP, off_ns, pid)
            longest = max(waits, key=lambda w: w.within(start_ns, end_ns))
            return replace(_waited(CauseKind.VCPU_WAITED, pid, longest), ns=off_ns)
        return None


def _standing(tick: Tick, before: Tick | None) -> str:
    """Of a tick that is under way at the end."""
    if tick.accept_ns is None and before is not None and before.inject_ns is not None:
        return "the tick before it was not acknowledged by the end of the trace"
    return "it was under way when the trace ended"


def _waited(kind: CauseKind, pid: int, wait: Wait) -> Cause:
    return Cause(kind, wait.ns, pid, wait.cpu, wait.holder)
