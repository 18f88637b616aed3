"""How findings speak: counts, timers, rates, and the remedies that several share."""

from kvmtick.report.data import Finding, Severity
from kvmtick.report.facts import SourceFacts, VmFacts

__all__ = ["DISCARD", "REPLAY", "count", "finding", "rate", "share", "title"]

DISCARD = (
    "tickpolicy discard (QEMU: -global kvm-pit.lost_tick_policy=discard; libvirt:"
    " <timer name='pit' tickpolicy='discard'/>)"
)
REPLAY = (
    "tickpolicy delay (QEMU: -global kvm-pit.lost_tick_policy=delay; libvirt:"
    " <timer name='pit' tickpolicy='delay'/>)"
)


def count(number: int, thing: str) -> str:
    """`1 tick`, `1,234 ticks`."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def title(source: SourceFacts) -> str:
    """Which timer."""
    if source.report.source == "lapic":
        return f"the local APIC timer of vCPU {source.report.vcpu}"
    return "the PIT"


def share(ticks: int, source: SourceFacts) -> str:
    """How much that is of all that expired."""
    return f"{100 * ticks / source.report.ticks.expired:.3g} %"


def rate(hz: float) -> str:
    """`1,000 ticks a second`."""
    return f"{hz:,.5g} ticks a second"


def finding(
    vm: VmFacts,
    source: SourceFacts | None,
    kind: str,
    severity: Severity,
    text: str,
    remedy: str,
    ticks: int = 0,
) -> Finding:
    """One about a VM, or a timer of it."""
    return Finding(
        kind=kind,
        severity=severity,
        text=text,
        remedy=remedy,
        pid=vm.ticks.pid,
        source=None if source is None else source.report.source,
        vcpu=None if source is None else source.report.vcpu,
        ticks=ticks,
    )
