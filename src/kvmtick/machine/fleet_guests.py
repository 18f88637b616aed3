"""What the machines of a fleet run: built-in guests that take ticks for ever, as listings.

They do to the chips what the guests of the same names do (`kvmtick.guests`): program the timer,
HLT, one EOI a tick.
"""

from typing import Final

from kvmtick.cpu.listed import Listing
from kvmtick.cpu.scripted import MmioWrite, Operation, Out, Sti
from kvmtick.irqchip.apicdef import APIC_DEFAULT_PHYS_BASE
from kvmtick.irqchip.ioapic import IOAPIC_DEFAULT_BASE_ADDRESS

__all__ = ["GUESTS", "tick_ioapic", "tick_lapic", "tick_pic"]

DIVISOR: Final = 1193
"""Of the PIT: ticks of 999,848 ns."""
PERIOD_NS: Final = 1_000_000

VECTOR_IRQ0: Final = 0x20
VECTOR_IOAPIC: Final = 0x40
VECTOR_LAPIC: Final = 0x41

IOREGSEL: Final = IOAPIC_DEFAULT_BASE_ADDRESS
IOWIN: Final = IOAPIC_DEFAULT_BASE_ADDRESS + 0x10
PIN_PIT: Final = 0
"""GSI 0 leads to pin 0 in KVM's default routing table."""
LAPIC_EOI: Final = APIC_DEFAULT_PHYS_BASE + 0x0B0
LAPIC_SVR: Final = APIC_DEFAULT_PHYS_BASE + 0x0F0
LAPIC_LVTT: Final = APIC_DEFAULT_PHYS_BASE + 0x320
LAPIC_LVT0: Final = APIC_DEFAULT_PHYS_BASE + 0x350
LAPIC_TMICT: Final = APIC_DEFAULT_PHYS_BASE + 0x380
LAPIC_TDCR: Final = APIC_DEFAULT_PHYS_BASE + 0x3E0
SVR_ENABLED: Final = 0x1FF
LVT_MASKED: Final = 0x1_0000
LVT_PERIODIC: Final = 0x2_0000
DIVIDE_BY_1: Final = 0xB

_PIC_INIT: Final = (
    Out(0x20, 0x11),
    Out(0x21, VECTOR_IRQ0),
    Out(0x21, 0x04),
    Out(0x21, 0x01),
    Out(0x21, 0xFE),
    Out(0xA1, 0xFF),
)
_EOI: Final = MmioWrite(LAPIC_EOI, 0)


def tick_pic(divisor: int = DIVISOR) -> Listing:
    """PIT, PIC; `divisor` 1 to 65536."""
    program = (*_PIC_INIT, *_pit_start(divisor), Sti())
    return Listing(program, {VECTOR_IRQ0: (Out(0x20, 0x20),)})


def tick_ioapic(divisor: int = DIVISOR) -> Listing:
    """PIT, IOAPIC, local APIC; `divisor` 1 to 65536."""
    program = (
        *_APIC_INIT,
        MmioWrite(IOREGSEL, 0x10 + 2 * PIN_PIT + 1),
        MmioWrite(IOWIN, 0),
        MmioWrite(IOREGSEL, 0x10 + 2 * PIN_PIT),
        MmioWrite(IOWIN, VECTOR_IOAPIC),
        *_pit_start(divisor),
        Sti(),
    )
    return Listing(program, {VECTOR_IOAPIC: (_EOI,)})


def tick_lapic(period_ns: int = PERIOD_NS) -> Listing:
    """The local APIC's own timer, periodic; `period_ns` 1 to 2^32 - 1."""
    if not 0 < period_ns < 1 << 32:
        raise ValueError(f"period_ns={period_ns}: give 1 to {(1 << 32) - 1}")
    program = (
        *_APIC_INIT,
        MmioWrite(LAPIC_TDCR, DIVIDE_BY_1),
        MmioWrite(LAPIC_LVTT, LVT_PERIODIC | VECTOR_LAPIC),
        MmioWrite(LAPIC_TMICT, period_ns),
        Sti(),
    )
    return Listing(program, {VECTOR_LAPIC: (_EOI,)})


_APIC_INIT: Final[tuple[Operation, ...]] = (
    Out(0x21, 0xFF),
    Out(0xA1, 0xFF),
    MmioWrite(LAPIC_SVR, SVR_ENABLED),
    MmioWrite(LAPIC_LVT0, LVT_MASKED),
)


def _pit_start(divisor: int) -> tuple[Operation, ...]:
    """Channel 0 in mode 2."""
    if not 0 < divisor <= 0x1_0000:
        raise ValueError(f"divisor={divisor}: give 1 to 65536")
    return Out(0x43, 0x34), Out(0x40, divisor & 0xFF), Out(0x40, divisor >> 8 & 0xFF)


GUESTS: Final = {"tick-pic": tick_pic, "tick-ioapic": tick_ioapic, "tick-lapic": tick_lapic}
"""By the names that they have as real code."""
