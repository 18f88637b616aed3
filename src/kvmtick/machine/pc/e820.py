"""The PC's memory map, as INT 15h function e820h tells it (ACPI specification, 15.1)."""

from dataclasses import dataclass
from struct import Struct
from typing import Final

__all__ = [
    "BIOS_START",
    "EBDA_START",
    "ENTRY_BYTES",
    "RAM",
    "RESERVED",
    "MemoryRange",
    "memory_map",
]

EBDA_START: Final = 0x9_FC00
"""The extended BIOS data area: the last KiB of conventional memory."""
VGA_START: Final = 0xA_0000
BIOS_START: Final = 0xF_0000
"""The system BIOS, up to 1 MiB; firmware has its tables there."""
MIB: Final = 1 << 20

RAM, RESERVED = 1, 2

_ENTRY: Final = Struct("<QQI")
"""Base address, length, type."""
ENTRY_BYTES: Final = _ENTRY.size


@dataclass(frozen=True, slots=True)
class MemoryRange:
    """From `start` to before `end`, of a `kind` that is `RAM` or `RESERVED`."""

    start: int
    end: int
    kind: int

    def entry(self) -> bytes:
        """The address range descriptor: `ENTRY_BYTES`."""
        return _ENTRY.pack(self.start, self.end - self.start, self.kind)


def memory_map(ram_bytes: int) -> list[MemoryRange]:
    """A PC's: conventional memory, EBDA, BIOS, and what there is above 1 MiB."""
    ranges = [
        MemoryRange(0, EBDA_START, RAM),
        MemoryRange(EBDA_START, VGA_START, RESERVED),
        MemoryRange(BIOS_START, MIB, RESERVED),
    ]
    if ram_bytes > MIB:
        ranges.append(MemoryRange(MIB, ram_bytes, RAM))
    return ranges
