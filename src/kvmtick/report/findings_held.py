"""Findings about who held ticks up: one for each kind of cause."""

from collections.abc import Iterator

from kvmtick.report.causes import Cause, CauseKind
from kvmtick.report.data import Finding, Severity
from kvmtick.report.facts import SourceFacts, VmFacts
from kvmtick.report.phrases import count, finding, title
from kvmtick.report.source import Held
from kvmtick.timing.host import format_ns
from kvmtick.trace.events import Event

__all__ = ["held_findings"]

FEW = 0.001
_MOST_NAMED = 3

Who = dict[Cause, Held]


def held_findings(vm: VmFacts, source: SourceFacts) -> Iterator[Finding]:
    """What held up the ticks that were not simply delivered."""
    for kind, who in source.lives.held.items():
        if kind not in _TOLD:
            continue
        what, remedy = _TOLD[kind]
        ticks = sum(held.ticks for held in who.values())
        worst_ns = max(held.worst_ns for held in who.values())
        few = ticks <= FEW * source.report.ticks.expired
        yield finding(
            vm,
            source,
            kind.value,
            Severity.NOTICE if few else Severity.PROBLEM,
            f"{count(ticks, 'tick')} of {title(source)} late or lost because "
            + what.format(
                worst=format_ns(worst_ns),
                thread=_threads(vm, who),
                cpus=_cpus(vm, who),
            ),
            _SIMULATED
            if vm.trace.is_complete and kind in _BY_FAULTS
            else remedy.format(pids=_pids(who), missing=_missing(vm, kind)),
            ticks,
        )


_SCHED_EVENTS = (
    (Event.SCHED_SWITCH, "sched_switch"),
    (Event.SCHED_WAKING, "sched_waking"),
)
_MISSING_EVENTS = (*_SCHED_EVENTS, (Event.KVM_ENTRY, "kvm_entry"))

_TOLD = {
    CauseKind.TIMER_LATE: (
        "the hrtimer fired up to {worst} late: the host's interrupts were off, or its CPU slept"
        " deeply or was itself not running",
        "look for what keeps interrupts off (tracer irqsoff), for deep idle states (cpupower"
        " idle-set), and for steal time if the host is a guest itself",
    ),
    CauseKind.WORKER_WAITED: (
        "{thread} waited up to {worst} for {cpus}",
        "pin it elsewhere (taskset -p -c CPUS {pids}) or raise its priority (chrt -f -p 1 {pids})",
    ),
    CauseKind.WORKER_LATE: (
        "the kvm-pit thread ran up to {worst} after the timer; why, the trace cannot tell",
        "record again {missing} of that thread: they show who had its CPU",
    ),
    CauseKind.VCPU_WAITED: (
        "the vCPU's thread {thread} waited up to {worst} for {cpus}",
        "give the vCPU a CPU of its own (taskset -p -c CPUS {pids}; libvirt: <vcpupin/>), or run"
        " fewer threads on that one",
    ),
    CauseKind.VCPU_ASLEEP: (
        "the vCPU's thread {thread} slept up to {worst} with a tick waiting",
        "look at what its VMM waits for (strace -p, cat /proc/TID/stack): a stopped VM, a lock,"
        " slow storage",
    ),
    CauseKind.VCPU_OUT: (
        "the vCPU did not enter the guest for up to {worst}",
        "its VMM was busy with something else, or its thread had no CPU: record {missing} and"
        " kvm_exit to tell which",
    ),
    CauseKind.INTERRUPTS_OFF: (
        "the guest kept its interrupts off: its vCPU was running and did not take them for up to"
        " {worst}",
        "shorten what the guest does with interrupts off (cli, a handler that does not return)",
    ),
    CauseKind.NO_WINDOW: (
        "the guest was running and did not take them for up to {worst}: its interrupts were off, or"
        " it served others of a higher priority",
        "shorten what the guest does with interrupts off, and its other handlers",
    ),
    CauseKind.PIC_MASKED: (
        "the guest had masked IRQ 0 in the PIC for up to {worst}",
        "the guest should unmask sooner",
    ),
    CauseKind.BUSY: (
        "the guest did not take them for up to {worst}, though its vCPU's thread {thread} had a"
        " CPU: its interrupts were off, or its VMM kept it out of the guest",
        "shorten what the guest does with interrupts off; kvm_entry and kvm_exit tell for certain,"
        " where the host's KVM writes them",
    ),
    CauseKind.NOT_TAKEN: (
        "the guest did not take them for up to {worst}: its interrupts were off, or its vCPU was"
        " not running; the trace cannot tell which",
        "record again {missing}: they tell",
    ),
    CauseKind.SLOW_EOI: (
        "the guest took up to {worst} from the interrupt to its EOI, and KVM gives no tick before",
        "shorten the guest's handler, or have it write the EOI first",
    ),
}
"""What, and what to do. Masked ticks and those of no known cause have findings of their own."""

_BY_FAULTS = (CauseKind.TIMER_LATE, CauseKind.WORKER_LATE, CauseKind.VCPU_OUT)
_SIMULATED = "the simulated host was told to be late (--fault)"


def _threads(vm: VmFacts, who: Who) -> str:
    pids = sorted({cause.thread for cause in who if cause.thread is not None})
    return _list([vm.name(pid) for pid in pids])


def _pids(who: Who) -> str:
    pids = sorted({cause.thread for cause in who if cause.thread is not None})
    return " ".join(str(pid) for pid in pids[:1]) or "PID"


def _cpus(vm: VmFacts, who: Who) -> str:
    """Which CPUs, and who ran there."""
    cpus = sorted({cause.cpu for cause in who if cause.cpu is not None})
    holders: dict[int, int] = {}
    for cause, held in who.items():
        if cause.holder is not None:
            holders[cause.holder] = holders.get(cause.holder, 0) + held.ticks
    idle = holders.pop(0, 0)
    ran = [vm.name(pid) for pid in sorted(holders, key=lambda pid: -holders[pid])]
    words = f"CPU {cpus[0]}" if len(cpus) == 1 else f"CPUs {_list([str(c) for c in cpus], 8)}"
    if ran:
        words += f", where {_list(ran)} ran"
    if idle:
        words += f"{' or' if ran else ','} which was idle and slow to wake"
    return words


def _list(words: list[str], most: int = _MOST_NAMED) -> str:
    rest = len(words) - most
    return ", ".join(words[:most]) + (f" and {rest} more" if rest > 0 else "")


def _missing(vm: VmFacts, kind: CauseKind) -> str:
    """Which events would tell more, that this trace lacks."""
    wanted = _SCHED_EVENTS if kind is CauseKind.WORKER_LATE else _MISSING_EVENTS
    names = [name for event, name in wanted if event not in vm.trace.events]
    if names:
        return f"with {_list(names)}"
    # A VM that has just started is followed a moment later.
    whose = "" if wanted is _SCHED_EVENTS else " of its threads"
    return f"once the VM runs, with all switches{whose}"
