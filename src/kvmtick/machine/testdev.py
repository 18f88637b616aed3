"""The parts of QEMU's pc-testdev that tests of interrupts drive (QEMU's hw/misc/pc-testdev.c).

* 0x2000 + n, write only: a byte sets the level of GSI n, 0 to 23, as KVM_IRQ_LINE does;
* 0xe0-0xe3: four bytes of storage, read and written in any width.

Not modelled: the port that makes the VMM forget a page (0xe4: nothing the guest could see), and the
memory at 0xff000000.
"""

from collections.abc import Callable
from typing import Final

from kvmtick.machine.ports import PortHandler

__all__ = ["PcTestdev"]

IRQ_LINES: Final = range(0x2000, 0x2000 + 24)
STORAGE: Final = range(0xE0, 0xE4)


class PcTestdev:
    """`set_irq_line(gsi, level)` is KVM_IRQ_LINE."""

    __slots__ = ("_set_irq_line", "storage")

    def __init__(self, set_irq_line: Callable[[int, int], None]) -> None:
        self._set_irq_line = set_irq_line
        self.storage = bytearray(len(STORAGE))

    def ports(self) -> dict[int, PortHandler]:
        """Who answers which port."""
        lines: dict[int, PortHandler] = dict.fromkeys(IRQ_LINES, self._access_irq_line)
        return lines | dict.fromkeys(STORAGE, self._access_storage)

    def _access_irq_line(self, port: int, size_bytes: int, value: int | None) -> int | None:
        if value is not None and size_bytes == 1:
            self._set_irq_line(port - IRQ_LINES.start, int(value != 0))
        return None

    def _access_storage(self, port: int, size_bytes: int, value: int | None) -> int | None:
        at = port - STORAGE.start
        if value is None:
            return int.from_bytes(self.storage[at : at + size_bytes], "little")
        data = value.to_bytes(size_bytes, "little")
        self.storage[at : at + size_bytes] = data[: len(STORAGE) - at]
        return None
