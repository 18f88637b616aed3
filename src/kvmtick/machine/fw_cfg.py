"""QEMU's firmware configuration device: what firmware and guests ask it for the machine's size.

Implements the I/O port interface of QEMU's docs/specs/fw_cfg.rst: the selector at 0x510 (a word,
write only), the data port at 0x511 (a byte a read; what is past the end of an item reads 0; writes
do nothing). Items: the signature, the interface's id, RAM_SIZE, NB_CPUS and MAX_CPUS, and the file
directory with one file, etc/e820: what SeaBIOS knows the RAM by. All others are empty.

Not modelled: the DMA interface (the id says so), files for ACPI and SMBIOS tables.
"""

from collections.abc import Callable
from struct import Struct
from typing import Final

from kvmtick.machine.pc.e820 import ENTRY_BYTES, RAM, MemoryRange
from kvmtick.machine.ports import PortHandler

__all__ = ["FwCfg"]

PORT_SELECTOR = 0x510
PORT_DATA = 0x511

SIGNATURE = 0x00
ID = 0x01
RAM_SIZE = 0x03
NB_CPUS = 0x05
MAX_CPUS = 0x0F
FILE_DIRECTORY = 0x19
FIRST_FILE = 0x20
WRITE_CHANNEL = 1 << 14

ID_TRADITIONAL = 1 << 0

E820_FILE: Final = b"etc/e820"
_FILE_COUNT: Final = Struct(">I")
_FILE: Final = Struct(">IHH56s")
"""Size, selector, reserved, name."""


class FwCfg:
    """The selected item and how much of it was read."""

    __slots__ = ("_items", "offset", "selected")

    def __init__(self, ram_bytes: int, vcpus: Callable[[], int]) -> None:
        """`vcpus` tells how many there are at the moment of the question."""
        self._items: dict[int, Callable[[], bytes]] = {
            SIGNATURE: lambda: b"QEMU",
            ID: lambda: ID_TRADITIONAL.to_bytes(4, "little"),
            RAM_SIZE: lambda: ram_bytes.to_bytes(8, "little"),
            NB_CPUS: lambda: vcpus().to_bytes(2, "little"),
            MAX_CPUS: lambda: vcpus().to_bytes(2, "little"),
            FILE_DIRECTORY: lambda: (
                _FILE_COUNT.pack(1) + _FILE.pack(ENTRY_BYTES, FIRST_FILE, 0, E820_FILE)
            ),
            FIRST_FILE: lambda: MemoryRange(0, ram_bytes, RAM).entry(),
        }
        self.selected = SIGNATURE
        self.offset = 0

    def ports(self) -> dict[int, PortHandler]:
        """Who answers which port."""
        return {PORT_SELECTOR: self._access_selector, PORT_DATA: self._access_data}

    def _access_selector(self, port: int, size_bytes: int, value: int | None) -> int | None:
        if value is not None and size_bytes == 2:
            self.selected = value & ~WRITE_CHANNEL
            self.offset = 0
        return None

    def _access_data(self, port: int, size_bytes: int, value: int | None) -> int | None:
        if value is not None or size_bytes != 1:
            return None
        item = self._items.get(self.selected)
        data = item() if item is not None else b""
        offset, self.offset = self.offset, self.offset + 1
        return data[offset] if offset < len(data) else 0
