"""The ACPI tables of the PC (ACPI specification 6.3, chapters 5 and 20).

RSDP, RSDT, XSDT, FADT, FACS, MADT and a DSDT. The machine is always in ACPI mode (no SMI command
port), has the legacy devices and an 8042, and resets by port 0xcf9. The MADT lists the local APICs,
the IOAPIC, IRQ 0 at its pin 2, the SCI level-triggered and active high, and NMI at every LINT1.

Not modelled: general-purpose events, buttons, C-states and P-states, the sleeping states but S5,
HPET, PCI, SMBIOS.
"""

import struct
from typing import Final

from kvmtick.irqchip.apicdef import APIC_DEFAULT_PHYS_BASE
from kvmtick.irqchip.ioapic import IOAPIC_DEFAULT_BASE_ADDRESS
from kvmtick.machine.pc import acpi_pm, cmos, reset, uart
from kvmtick.machine.pc.aml import device as aml_device
from kvmtick.machine.pc.aml import eisa_id, integer, io_ports, irq, name, package, scope, template

__all__ = ["acpi_tables"]

PM1A_EVT_PORT, PM1A_CNT_PORT, PM_TMR_PORT = (
    acpi_pm.BASE + at for at in (acpi_pm.STATUS, acpi_pm.CONTROL, acpi_pm.TIMER)
)
PM1_EVT_BYTES, PM1_CNT_BYTES, PM_TMR_BYTES = 4, 2, 4
RESET_VALUE: Final = 6

OEM_ID, OEM_TABLE_ID, CREATOR_ID = b"KVMTCK", b"KVMTICK ", b"KVMT"
HEADER: Final = struct.Struct("<4sIBB6s8sI4sI")
HEADER_CHECKSUM_AT: Final = 9
RSDP: Final = struct.Struct("<8sB6sBIIQB3x")
RSDP_V1_BYTES, RSDP_V1_CHECKSUM_AT, RSDP_CHECKSUM_AT = 20, 8, 32
FACS: Final = struct.Struct("<4sIIIIIQB31x")
FACS_ALIGNMENT, TABLE_ALIGNMENT = 64, 16
FADT: Final = struct.Struct(
    "<IIBBHIBBBBIIIIIIIIBBBBBBBBHHHHBBBBBHxI12sB3xQQ12s12s12s12s12s12s12s12s"
)
ADDRESS: Final = struct.Struct("<BBBBQ")
"""A generic address structure."""
SYSTEM_IO: Final = 1

PROFILE_UNSPECIFIED: Final = 0
NO_C2, NO_C3 = 0xFFFF, 0xFFFF
LEGACY_DEVICES, HAS_8042, NO_VGA = 1 << 0, 1 << 1, 1 << 2
WBINVD, PROC_C1, PWR_BUTTON, SLP_BUTTON, FIX_RTC, RESET_REG_SUP = (
    1 << bit for bit in (0, 2, 4, 5, 6, 10)
)
"""FADT flags; those of the buttons and the RTC say that PM1 has no such event."""

PCAT_COMPAT: Final = 1
"""There are 8259s too."""
MADT_LAPIC, MADT_IOAPIC, MADT_OVERRIDE, MADT_LAPIC_NMI, MADT_X2APIC, MADT_X2APIC_NMI = (
    0, 1, 2, 4, 9, 10,
)  # fmt: skip
ENABLED: Final = 1
MOST_LAPIC_ID: Final = 254
ISA_BUS, IOAPIC_ID, GSI_BASE, TIMER_GSI, NMI_LINT = 0, 0, 0, 2, 1
CONFORMS, HIGH_LEVEL = 0, 0b1101
"""MPS INTI flags: polarity and trigger mode of the bus; active high and level-triggered."""


def acpi_tables(at: int, vcpus: int) -> bytes:
    """All of them for address `at`, which is aligned to 64 bytes; the RSDP comes first."""
    tables = bytearray(RSDP.size)

    def put(table: bytes, alignment: int = TABLE_ALIGNMENT) -> int:
        """Appends a table; returns its address."""
        tables.extend(bytes(-len(tables) % alignment))
        tables.extend(table)
        return at + len(tables) - len(table)

    facs = put(_facs(), FACS_ALIGNMENT)
    dsdt = put(_dsdt())
    listed = (put(_fadt(facs, dsdt)), put(_madt(vcpus)))
    rsdt = put(_table(b"RSDT", 1, struct.pack(f"<{len(listed)}I", *listed)))
    xsdt = put(_table(b"XSDT", 1, struct.pack(f"<{len(listed)}Q", *listed)))
    tables[: RSDP.size] = _rsdp(rsdt, xsdt)
    return bytes(tables)


def _rsdp(rsdt: int, xsdt: int) -> bytes:
    rsdp = bytearray(RSDP.pack(b"RSD PTR ", 0, OEM_ID, 2, rsdt, RSDP.size, xsdt, 0))
    rsdp[RSDP_V1_CHECKSUM_AT] = -sum(rsdp[:RSDP_V1_BYTES]) & 0xFF
    rsdp[RSDP_CHECKSUM_AT] = -sum(rsdp) & 0xFF
    return bytes(rsdp)


def _table(signature: bytes, revision: int, body: bytes) -> bytes:
    """`body` behind a table header; all bytes add up to 0."""
    header = HEADER.pack(
        signature, HEADER.size + len(body), revision, 0, OEM_ID, OEM_TABLE_ID, 1, CREATOR_ID, 1
    )
    table = bytearray(header + body)
    table[HEADER_CHECKSUM_AT] = -sum(table) & 0xFF
    return bytes(table)


def _facs() -> bytes:
    return FACS.pack(b"FACS", FACS.size, 0, 0, 0, 0, 0, 1)


def _io_port(port: int, size_bytes: int, access: int) -> bytes:
    """`access`: 1 a byte, 2 a word, 3 a dword. Port 0: there is no such register."""
    if not port:
        return bytes(ADDRESS.size)
    return ADDRESS.pack(SYSTEM_IO, size_bytes * 8, 0, access, port)


def _fadt(facs: int, dsdt: int) -> bytes:
    """Revision 3, that of ACPI 2.0."""
    none = _io_port(0, 0, 0)
    body = FADT.pack(
        facs,
        dsdt,
        0,
        PROFILE_UNSPECIFIED,
        acpi_pm.SCI,
        *(0, 0, 0, 0, 0),  # SMI_CMD and what would be written there
        *(PM1A_EVT_PORT, 0, PM1A_CNT_PORT, 0, 0, PM_TMR_PORT, 0, 0),
        *(PM1_EVT_BYTES, PM1_CNT_BYTES, 0, PM_TMR_BYTES, 0, 0, 0, 0),
        *(NO_C2, NO_C3, 0, 0, 0, 0),
        *(0, 0, cmos.CENTURY),  # no alarm by day or month
        LEGACY_DEVICES | HAS_8042 | NO_VGA,
        WBINVD | PROC_C1 | PWR_BUTTON | SLP_BUTTON | FIX_RTC | RESET_REG_SUP,
        _io_port(reset.RESET_CONTROL, 1, 1),
        RESET_VALUE,
        0,  # X_FIRMWARE_CTRL, for a FACS that the field of 32 bits cannot reach
        dsdt,
        *(_io_port(PM1A_EVT_PORT, PM1_EVT_BYTES, 2), none),
        *(_io_port(PM1A_CNT_PORT, PM1_CNT_BYTES, 2), none, none),
        *(_io_port(PM_TMR_PORT, PM_TMR_BYTES, 3), none, none),
    )
    return _table(b"FACP", 3, body)


def _madt(vcpus: int) -> bytes:
    body = struct.pack("<II", APIC_DEFAULT_PHYS_BASE, PCAT_COMPAT)
    body += b"".join(_local_apic(apic_id) for apic_id in range(vcpus))
    body += struct.pack(
        "<BBBxII", MADT_IOAPIC, 12, IOAPIC_ID, IOAPIC_DEFAULT_BASE_ADDRESS, GSI_BASE
    )
    for source, gsi, flags in ((0, TIMER_GSI, CONFORMS), (acpi_pm.SCI, acpi_pm.SCI, HIGH_LEVEL)):
        body += struct.pack("<BBBBIH", MADT_OVERRIDE, 10, ISA_BUS, source, gsi, flags)
    body += struct.pack("<BBBHB", MADT_LAPIC_NMI, 6, 0xFF, CONFORMS, NMI_LINT)
    if vcpus > MOST_LAPIC_ID + 1:
        body += struct.pack("<BBHIB3x", MADT_X2APIC_NMI, 12, CONFORMS, 0xFFFF_FFFF, NMI_LINT)
    return _table(b"APIC", 3, body)


def _local_apic(apic_id: int) -> bytes:
    """Its processor's UID is the same number."""
    if apic_id > MOST_LAPIC_ID:
        return struct.pack("<BBxxIII", MADT_X2APIC, 16, apic_id, ENABLED, apic_id)
    return struct.pack("<BBBBI", MADT_LAPIC, 8, apic_id, apic_id, ENABLED)


def _dsdt() -> bytes:
    """S5, and the devices that nobody finds by looking: the serial port and the RTC."""
    com1 = template(io_ports(uart.BASE, 8), irq(uart.IRQ))
    rtc = template(io_ports(cmos.PORT_INDEX, 2), irq(cmos.IRQ))
    s5 = package(integer(acpi_pm.S5), integer(0), integer(0), integer(0))
    return _table(
        b"DSDT",
        2,
        name("_S5_", s5)
        + scope(
            "_SB_",
            aml_device("COM1", name("_HID", eisa_id("PNP0501")), name("_CRS", com1)),
            aml_device("RTC_", name("_HID", eisa_id("PNP0B00")), name("_CRS", rtc)),
        ),
    )
