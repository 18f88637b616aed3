"""What a guest needs of its VMM, and the GSI routing that follows from it."""

from dataclasses import dataclass
from typing import Final, Literal

from kvmtick.abi.structs import (
    KVM_IRQCHIP_IOAPIC,
    KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE,
    kvm_irq_routing_entry,
    to_chip,
    to_msi,
)

__all__ = ["DEFAULT_NEEDS", "KVM_MAX_VCPUS", "MSI_ADDRESS", "Needs", "gsi_routing"]

MSI_ADDRESS: Final = 0xFEE0_0000
"""An MSI to the local APIC with id 0: physical destination in bits 19:12, no hint."""

KVM_MAX_VCPUS: Final = 1024
"""What a VM of KVM can have at most (asm/kvm_host.h)."""

_PIC_PINS: Final = 16
_IOAPIC_PINS: Final = 24
_TIMER_PIN: Final = 2
"""Where a PC's IOAPIC has the timer: its pin 0 is the PIC's output."""


@dataclass(frozen=True, slots=True)
class Needs:
    """What a guest needs of its VMM. The defaults are a PC with one CPU, as KVM sets it up."""

    ram_bytes: int = 2 << 20
    """RAM from guest-physical 0 on; the default is all that real mode can address, and room."""

    vcpus: int = 1
    """vCPUs with the ids 0 .. `vcpus` - 1; the guest starts all but 0 itself."""
    gsi0: Literal["default", "ioapic-pin-2", "msi"] = "default"
    """Where the PIT's tick has to go (`gsi_routing`)."""
    msi_vector: int = 0
    """With `gsi0` "msi": the vector the message carries."""
    reinject: bool | None = None
    """KVM_REINJECT_CONTROL: what alone makes sense; None: as asked for."""
    tick_source: Literal["pit", "lapic"] = "pit"
    """Whose expiries are this guest's ticks."""
    cpuid: tuple[str, ...] | None = None
    """KVM_SET_CPUID2 with a leaf 1 that has these bits: "x2apic", "tsc_deadline". None: not needed.

    () is a need too: without a leaf 1 KVM drops the mode bits of LVTT, and every timer is one-shot.
    """
    cpuid_off: tuple[str, ...] = ()
    """Of the features that a VMM can leave out (`kvmtick.vcpu.cpuid.FEATURES`), those it does."""
    cpuid_clocks: bool = True
    """CPUID tells the rates of the TSC and the local APIC's timer; else the guest measures them."""
    cpuid_vendor: str | None = None
    """The vendor in leaf 0, 12 characters; None: KVM's."""


DEFAULT_NEEDS: Final = Needs()


def gsi_routing(needs: Needs) -> list[kvm_irq_routing_entry] | None:
    """The table for KVM_SET_GSI_ROUTING, all GSIs; None: the default will do.

    "ioapic-pin-2": GSI 0 goes to PIC pin 0 and IOAPIC pin 2, as on a PC. GSI 2 then keeps its PIC
    pin only: KVM knows one GSI a pin and looks the EOI's up by it, so with a second one on pin 2
    the PIT would never hear that its tick was acknowledged. "msi": GSI 0 goes to an MSI only. All
    other GSIs are those of the default.
    """
    match needs.gsi0:
        case "default":
            return None
        case "ioapic-pin-2":
            gsi0 = [_pic(0), _ioapic(0, _TIMER_PIN)]
        case "msi":
            gsi0 = [to_msi(0, MSI_ADDRESS, needs.msi_vector)]
    table = gsi0
    for gsi in range(1, _IOAPIC_PINS):
        if gsi < _PIC_PINS:
            table.append(_pic(gsi))
        if gsi != _TIMER_PIN or needs.gsi0 != "ioapic-pin-2":
            table.append(_ioapic(gsi, gsi))
    return table


def _pic(gsi: int) -> kvm_irq_routing_entry:
    slave, pin = divmod(gsi, 8)
    return to_chip(gsi, KVM_IRQCHIP_PIC_SLAVE if slave else KVM_IRQCHIP_PIC_MASTER, pin)


def _ioapic(gsi: int, pin: int) -> kvm_irq_routing_entry:
    return to_chip(gsi, KVM_IRQCHIP_IOAPIC, pin)
