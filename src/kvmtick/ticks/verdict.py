"""The one word said of every tick.

The order is the order of judgement: the first that matches wins (docs/walkthrough.md). A tick is
`dropped` when the count it was owed a pulse by was thrown away before that pulse; a count reset
after the pulse takes nothing from the guest.
"""

from enum import StrEnum

__all__ = ["Path", "Verdict", "Where"]


class Verdict(StrEnum):
    """What became of an expiry."""

    DROPPED = "dropped"
    REINJECTED = "reinjected"
    MASKED = "masked"
    COALESCED = "coalesced"
    DELIVERED = "delivered"
    LATE = "late"
    OUTSTANDING = "outstanding"
    UNKNOWN = "unknown"


class Where(StrEnum):
    """Where a tick that did not come through ended."""

    WORKER = "worker"
    PIC = "pic"
    IOAPIC = "ioapic"
    LAPIC = "lapic"


class Path(StrEnum):
    """By which way a tick reached a vCPU."""

    PIC = "pic"
    IOAPIC = "ioapic"
    LAPIC = "lapic"
    """The local APIC's own: its timer, or a fixed-mode LVT0 that the NMI watchdog delivers."""
    MSI = "msi"
    NMI = "nmi"
