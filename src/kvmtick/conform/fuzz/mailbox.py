"""The guest that carries out single accesses (`mailbox.asm`), and its mailbox in guest RAM."""

import struct
from pathlib import Path
from typing import Final, Protocol

from kvmtick import guests

__all__ = ["KINDS", "PORT_DONE", "RAM_BYTES", "SIPI_VECTOR", "START", "Mailbox", "Ram", "install"]

RAM_BYTES: Final = 0x10000

START: Final = guests.LOAD_AT
SIPI_VECTOR: Final = START >> 12
PORT_DONE: Final = 0x510
"""The guest writes here when it has nothing to do."""

PORT_WINDOW: Final = 0x80
"""A write to this port lies in an interrupt window."""

NMI_AT, GP_AT, HANDLER_AT = 0x8800, 0x8840, 0x8900
MAILBOX_AT, NMIS_AT, LOG_BYTES_AT, LOG_AT = 0x600, 0x700, 0x708, 0x710
LOG_ENTRIES = 64
NMI_VECTOR, GP_VECTOR = 2, 13

KINDS: Final = {
    "none": 1, "r8": 2, "r16": 3, "r32": 4, "w8": 5, "w16": 6, "w32": 7,
    "in8": 8, "in16": 9, "in32": 10, "out8": 11, "out16": 12, "out32": 13,
    "rdmsr": 14, "wrmsr": 15, "window": 16, "hlt": 17,
}  # fmt: skip
"""What a mailbox can ask for."""

_IMAGE = Path(guests.__file__).with_name("mailbox.bin").read_bytes()

_IVT = b"".join(
    {NMI_VECTOR: struct.pack("<HH", NMI_AT, 0), GP_VECTOR: struct.pack("<HH", GP_AT, 0)}.get(
        vector, struct.pack("<HH", HANDLER_AT - 16 * vector, vector)
    )
    for vector in range(256)
)
"""Every vector leads to HANDLER_AT, with the vector in CS."""


class Ram(Protocol):
    """Guest RAM, as a VM has it."""

    def read_memory(self, gpa: int, size_bytes: int) -> bytes:
        """Bytes of guest RAM."""

    def write_memory(self, gpa: int, data: bytes) -> None:
        """Store bytes in guest RAM."""


def install(ram: Ram) -> None:
    """Put the guest into RAM."""
    ram.write_memory(0, _IVT)
    ram.write_memory(START, _IMAGE)


class Mailbox:
    """The mailbox in guest RAM."""

    def __init__(self, ram: Ram) -> None:
        self._ram = ram

    def post(self, kind: str, address: int = 0, value: int = 0) -> None:
        """Something to do: one of `KINDS`."""
        low, high = value & 0xFFFF_FFFF, value >> 32
        words = struct.pack("<7I", KINDS[kind], address, low, high, 0, 0, 0)
        self._ram.write_memory(MAILBOX_AT, words)

    @property
    def is_done(self) -> bool:
        """Whether the guest has done it."""
        return not any(self._ram.read_memory(MAILBOX_AT, 4))

    def answer(self) -> tuple[int, int]:
        """The value read, and 1 if there was a #GP."""
        data = self._ram.read_memory(MAILBOX_AT + 16, 12)
        low, high, fault = struct.unpack("<3I", data)
        return high << 32 | low, fault


def interrupts_taken(ram: Ram) -> tuple[int, ...]:
    """How many NMIs the vCPUs have taken, and then the vectors since the last call."""
    data = ram.read_memory(NMIS_AT, LOG_AT - NMIS_AT + 2 * LOG_ENTRIES)
    nmis, _, log_bytes = struct.unpack_from("<IIH", data)
    if not log_bytes:
        return (nmis,)
    ram.write_memory(LOG_BYTES_AT, bytes(2))
    count = min(log_bytes // 2, LOG_ENTRIES)
    words = struct.unpack_from(f"<{count}H", data, LOG_AT - NMIS_AT)
    return (nmis, *(word - 1 for word in words))
