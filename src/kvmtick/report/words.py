"""How verdicts and hops are named and coloured wherever a report is shown."""

from kvmtick.ticks.verdict import Verdict

__all__ = ["COLOURS", "hop_names", "timer_name"]

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
