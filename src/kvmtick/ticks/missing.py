"""Why a source's ticks cannot be judged: events that its verdicts need and that were not recorded.

A recording says which events it has. Of a text only those are known that were seen, and many an
event never happens to a guest; so of a text only what comes with every tick is asked for.
"""

from collections.abc import Collection
from typing import Final

from kvmtick.trace.events import TRACEPOINTS, Event
from kvmtick.trace.inferred import BackEnd

__all__ = ["missing_of_lapic", "missing_of_pit", "sees_masks", "sees_nmis"]

_PIT_ALWAYS: Final = (
    Event.HRTIMER_START,
    Event.WORK_QUEUE,
    Event.WORK_START,
    Event.KVM_SET_IRQ,
    Event.KVM_PIC_SET_IRQ,
    Event.KVM_IOAPIC_SET_IRQ,
    Event.KVM_ACK_IRQ,
)
_PIT: Final = (*_PIT_ALWAYS, Event.KVM_APIC_ACCEPT_IRQ, Event.KVM_PIO, Event.KVM_MMIO)
_LAPIC_ALWAYS: Final = (Event.HRTIMER_START, Event.KVM_APIC_ACCEPT_IRQ)
_LAPIC: Final = (*_LAPIC_ALWAYS, Event.KVM_SET_IRQ, Event.KVM_MSI_SET_IRQ, Event.KVM_APIC_IPI)


def missing_of_pit(events: Collection[Event], is_told: bool, back_end: BackEnd) -> str:
    """Why the PIT's ticks cannot be judged; empty if they can. `is_told`: `events` is all there
    is, not what was seen.
    """
    reason = _first(_PIT if is_told else _PIT_ALWAYS, events) or _injections(events, back_end)
    if not reason and not {Event.KVM_APIC_ACCEPT_IRQ, Event.KVM_PIO} & set(events):
        return "neither kvm_apic_accept_irq nor kvm_pio was recorded"
    return reason


def missing_of_lapic(events: Collection[Event], is_told: bool, back_end: BackEnd) -> str:
    """Why a local APIC timer's ticks cannot be judged; empty if they can."""
    return _first(_LAPIC if is_told else _LAPIC_ALWAYS, events) or _injections(events, back_end)


def sees_nmis(events: Collection[Event], back_end: BackEnd) -> bool:
    """The records show when an NMI is injected."""
    return Event.KVM_ENTRY in events and not back_end.eoi_is_injection


def sees_masks(events: Collection[Event]) -> bool:
    """The records show when a timer's LVT entry is masked."""
    return Event.KVM_APIC in events


def _first(needed: Collection[Event], events: Collection[Event]) -> str:
    for event in needed:
        if event not in events:
            return f"{TRACEPOINTS[event].name} was not recorded"
    return ""


def _injections(events: Collection[Event], back_end: BackEnd) -> str:
    """A kvm_inj_virq tells of one; or kvm_eoi, where a back end writes that when it injects."""
    if not back_end.eoi_is_injection:
        return ""
    if Event.KVM_EOI in events and (Event.KVM_INJ_VIRQ in events or back_end.proven):
        return ""
    if Event.KVM_INJ_VIRQ not in events:
        return "kvm_inj_virq was not recorded"
    return "there is no kvm_inj_virq, and kvm_eoi was not recorded"
