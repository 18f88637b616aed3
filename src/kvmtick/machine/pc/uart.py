"""A 16550A UART at 0x3f8 (National Semiconductor PC16550D datasheet) that sends at once.

Not modelled: interrupts, modem lines, FIFOs.
"""

from typing import Final

from kvmtick.machine.pc.host import PcHost
from kvmtick.machine.ports import PortHandler

__all__ = ["Uart"]

PORT_SERIAL: Final = 0x3F8
DATA, INTERRUPT_ID, LINE_CONTROL, LINE_STATUS, MODEM_STATUS = 0, 2, 3, 5, 6
LCR_DIVISOR_LATCH: Final = 0x80
LSR_TRANSMITTER_EMPTY: Final = 0x60
IIR_NONE_PENDING: Final = 0x01


class Uart:
    """COM1, on IRQ 4."""

    def __init__(self, host: PcHost) -> None:
        self._host = host
        self._registers = bytearray(8)

    def ports(self) -> dict[int, PortHandler]:
        """Who answers which port."""
        return dict.fromkeys(range(PORT_SERIAL, PORT_SERIAL + 8), self._access)

    def _access(self, port: int, size_bytes: int, value: int | None) -> int | None:
        if size_bytes != 1:
            return None
        register = port & 7
        if value is None:
            return self._read(register)
        if register == DATA and not self._registers[LINE_CONTROL] & LCR_DIVISOR_LATCH:
            self._host.transmit(value)
        else:
            self._registers[register] = value
        return None

    def _read(self, register: int) -> int:
        if register == LINE_STATUS:
            return LSR_TRANSMITTER_EMPTY
        if register == INTERRUPT_ID:
            return IIR_NONE_PENDING
        return 0 if register in (DATA, MODEM_STATUS) else self._registers[register]
