"""The MP floating pointer and configuration table (Intel MultiProcessor Specification 1.4, 4).

What a PC with one IOAPIC says: its processors, an ISA bus whose IRQ 0 is at IOAPIC pin 2, the
8259s' INTR at the local APICs' LINT0 and NMI at LINT1. Virtual wire mode: there is no IMCR.

Not modelled: PCI buses, extended entries; processors with APIC ids above 254 are left out.
"""

import struct
from typing import Final

from kvmtick.irqchip.apicdef import APIC_DEFAULT_PHYS_BASE
from kvmtick.irqchip.ioapic import IOAPIC_DEFAULT_BASE_ADDRESS, VERSION

__all__ = ["mp_tables"]

FLOATING_POINTER: Final = struct.Struct("<4sIBBB5s")
HEADER: Final = struct.Struct("<4sHBB8s12sIHHIHBx")
PROCESSOR: Final = struct.Struct("<BBBBII8x")
BUS: Final = struct.Struct("<BB6s")
IOAPIC: Final = struct.Struct("<BBBBI")
INTERRUPT: Final = struct.Struct("<BBHBBBB")

SPEC_1_4: Final = 4
TYPE_PROCESSOR, TYPE_BUS, TYPE_IOAPIC, TYPE_INTERRUPT, TYPE_LOCAL_INTERRUPT = range(5)
INT, NMI, EXTINT = 0, 1, 3
ENABLED, BOOT_PROCESSOR = 1, 2
LAPIC_VERSION: Final = 0x14
MOST_APIC_ID: Final = 254
FAMILY_6, FPU_AND_APIC = 0x600, 0x201
ISA_BUS, IOAPIC_ID, ALL_LAPICS = 0, 0, 0xFF
ISA_IRQS, CASCADE, TIMER_PIN = 16, 2, 2


def mp_tables(at: int, vcpus: int) -> bytes:
    """The floating pointer, for address `at`, with the configuration table behind it."""
    table = _configuration(vcpus)
    pointer = FLOATING_POINTER.pack(
        b"_MP_", at + FLOATING_POINTER.size, FLOATING_POINTER.size // 16, SPEC_1_4, 0, bytes(5)
    )
    return _with_checksum(pointer, 10) + table


def _configuration(vcpus: int) -> bytes:
    entries = [_processor(apic_id) for apic_id in range(min(vcpus, MOST_APIC_ID + 1))]
    entries.append(BUS.pack(TYPE_BUS, ISA_BUS, b"ISA   "))
    version = VERSION & 0xFF
    entries.append(
        IOAPIC.pack(TYPE_IOAPIC, IOAPIC_ID, version, ENABLED, IOAPIC_DEFAULT_BASE_ADDRESS)
    )
    for irq in range(ISA_IRQS):
        if irq != CASCADE:
            pin = TIMER_PIN if irq == 0 else irq
            entries.append(INTERRUPT.pack(TYPE_INTERRUPT, INT, 0, ISA_BUS, irq, IOAPIC_ID, pin))
    for lint, kind in enumerate((EXTINT, NMI)):
        entries.append(INTERRUPT.pack(TYPE_LOCAL_INTERRUPT, kind, 0, ISA_BUS, 0, ALL_LAPICS, lint))
    body = b"".join(entries)
    header = HEADER.pack(
        b"PCMP",
        HEADER.size + len(body),
        SPEC_1_4,
        0,
        b"KVMTICK ",
        b"PC".ljust(12),
        0,
        0,
        len(entries),
        APIC_DEFAULT_PHYS_BASE,
        0,
        0,
    )
    return _with_checksum(header + body, 7)


def _processor(apic_id: int) -> bytes:
    flags = ENABLED if apic_id else ENABLED | BOOT_PROCESSOR
    return PROCESSOR.pack(TYPE_PROCESSOR, apic_id, LAPIC_VERSION, flags, FAMILY_6, FPU_AND_APIC)


def _with_checksum(table: bytes, at: int) -> bytes:
    """All bytes add up to 0."""
    return table[:at] + bytes((-sum(table) & 0xFF,)) + table[at + 1 :]
