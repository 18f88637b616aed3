"""The ports that reset a PC: system control port A (PS/2) and the chipset's reset control register.

* 0x92: bit 0 going to 1 resets at once, bit 1 is A20 (kept, and without effect: A20 is always on);
* 0xcf9: bit 2 going to 1 resets, whatever bits 1 and 3 say of the kind.
"""

from typing import Final

from kvmtick.machine.pc.host import PcHost
from kvmtick.machine.ports import PortHandler

__all__ = ["ResetPorts"]

PORT_A: Final = 0x92
A_FAST_RESET, A_A20 = 1 << 0, 1 << 1
RESET_CONTROL: Final = 0xCF9
RESET_CPU: Final = 1 << 2
RESET_BITS: Final = 0x0E


class ResetPorts:
    """Both registers."""

    def __init__(self, host: PcHost) -> None:
        self._host = host
        self.port_a = A_A20
        self.reset_control = 0

    def ports(self) -> dict[int, PortHandler]:
        """Who answers which port."""
        return {PORT_A: self._access_port_a, RESET_CONTROL: self._access_reset_control}

    def _access_port_a(self, port: int, size_bytes: int, value: int | None) -> int | None:
        if size_bytes != 1:
            return None
        if value is None:
            return self.port_a
        if value & ~self.port_a & A_FAST_RESET:
            self._host.reset("port 0x92")
        self.port_a = value & (A_FAST_RESET | A_A20)
        return None

    def _access_reset_control(self, port: int, size_bytes: int, value: int | None) -> int | None:
        if size_bytes != 1:
            return None
        if value is None:
            return self.reset_control
        if value & ~self.reset_control & RESET_CPU:
            self._host.reset("port 0xcf9")
        self.reset_control = value & RESET_BITS
        return None
