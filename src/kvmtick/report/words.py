"""How verdicts and hops are named and coloured wherever a report is shown."""

from kvmtick.report.data import Phase
from kvmtick.ticks.verdict import Verdict
from kvmtick.timing.host import format_ns

__all__ = [
    "COLOURS",
    "hop_names",
    "phase_outcome",
    "phase_setting",
    "phase_timer",
    "phase_way",
    "timer_name",
]

COLOURS = {
    Verdict.DELIVERED: "#2a9d6f",
    Verdict.LATE: "#e69f00",
    Verdict.REINJECTED: "#3a86e0",
    Verdict.COALESCED: "#d1495b",
    Verdict.MASKED: "#9467bd",
    Verdict.DROPPED: "#d95f0e",
    Verdict.OUTSTANDING: "#8a939c",
    Verdict.UNKNOWN: "#8c6d31",
}
"""In the order a reader wants them. They show on white and on black, and those that share a plot
area (the first three) differ to the colour-blind; the others have a lane of their own as well.
"""

_PIC = {
    "expiry_to_work": "hrtimer expiry -> kvm-pit worker",
    "work_to_accept": "worker -> PIC request",
    "accept_to_inject": "PIC request -> VM entry",
    "inject_to_eoi": "VM entry -> guest's EOI",
    "expiry_to_eoi": "expiry -> EOI",
}
_APIC = {
    **_PIC,
    "work_to_accept": "worker -> local APIC",
    "accept_to_inject": "local APIC -> VM entry",
}
_LAPIC_TIMER = {**_APIC, "expiry_to_work": "hrtimer expiry -> local APIC"}


def hop_names(source: str, path: str) -> dict[str, str]:
    """What each of `kvmtick.ticks.source.HOPS` is for ticks of `source` that go by `path`."""
    if source == "lapic":
        return _LAPIC_TIMER
    return _PIC if path == "pic" else _APIC


def timer_name(source: str, vcpu: int) -> str:
    """Which timer of a VM it is: `source` is `pit` or `lapic`."""
    return "PIT" if source == "pit" else f"LAPIC timer of vCPU {vcpu}"


def phase_timer(phase: Phase) -> str:
    """Which timer was set."""
    if phase.channel is not None and phase.channel > 0:
        return f"PIT counter {phase.channel}"
    return timer_name(phase.source, phase.vcpu)


def phase_setting(phase: Phase) -> str:
    """How it was set."""
    if phase.mode is None:
        how = "how is not known"
    elif phase.source == "lapic":
        how = "TSC deadline" if phase.mode == "tsc-deadline" else phase.mode
    else:
        how = f"mode {phase.mode}"
        how += ", any count" if phase.count is None else f", count {phase.count:,}"
    if phase.period_ns is not None:
        how += f": every {format_ns(phase.period_ns)}"
    return how


def phase_way(phase: Phase) -> str:
    """By which way its ticks came."""
    if phase.path is None:
        return ""
    return phase.path if phase.vector is None else f"{phase.path}, vector {phase.vector:#x}"


def phase_outcome(phase: Phase) -> str:
    """Its ticks by verdict, or how often it was read."""
    told = [f"{count:,} {verdict}" for verdict, count in phase.verdicts.items()]
    if phase.reads:
        told.append(f"read {phase.reads:,} time{'' if phase.reads == 1 else 's'}")
    return ", ".join(told)
