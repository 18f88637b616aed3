"""A 16550A UART at 0x3f8 (National Semiconductor PC16550D datasheet) that sends at once.

The transmitter is empty again as soon as it was written to. Input is what `receive` puts into the
FIFO of 16 bytes. IRQ 4 follows the interrupt identification, while OUT2 lets it through as on a PC.
In loop mode what is sent is received, and the modem outputs are the modem inputs.

Not modelled: input for a guest that polls (bytes wait at the other end until the guest enables the
receiver's interrupt, so that none is lost to firmware or to a driver's probing), the line's speed
and format, line errors (but the overrun of loop mode) and BREAK, the character timeout (what is in
the FIFO is told at once, whatever its trigger level), the modem's lines but in loop mode.
"""

from collections import deque
from collections.abc import Callable
from typing import Final

from kvmtick.machine.pc.host import PcHost
from kvmtick.machine.ports import PortHandler

__all__ = ["Uart"]

BASE: Final = 0x3F8
IRQ: Final = 4
FIFO_BYTES: Final = 16

DATA, IER, IIR, LCR, MCR, LSR, MSR, SCR = range(8)
FCR: Final = IIR

IER_RECEIVED, IER_TRANSMITTER_EMPTY, IER_LINE_STATUS, IER_MODEM = 0x01, 0x02, 0x04, 0x08
IER_BITS: Final = 0x0F
IIR_NONE, IIR_MODEM, IIR_TRANSMITTER_EMPTY, IIR_RECEIVED = 0x01, 0x00, 0x02, 0x04
IIR_LINE_STATUS: Final = 0x06
IIR_FIFOS: Final = 0xC0
FCR_ENABLE, FCR_CLEAR_RECEIVER = 0x01, 0x02
LCR_DIVISOR_LATCH: Final = 0x80
MCR_DTR, MCR_RTS, MCR_OUT1, MCR_OUT2, MCR_LOOP = 0x01, 0x02, 0x04, 0x08, 0x10
MCR_BITS: Final = 0x1F
LSR_DATA_READY, LSR_OVERRUN, LSR_TRANSMITTER_EMPTY = 0x01, 0x02, 0x60
MSR_CTS, MSR_DSR, MSR_RI, MSR_DCD = 0x10, 0x20, 0x40, 0x80
CONNECTED: Final = MSR_CTS | MSR_DSR | MSR_DCD
DIVISOR_9600: Final = 12


class Uart:
    """COM1. `on_room` is called when a guest that listens can take more:
    it has read or made the FIFO empty, has begun to listen, or has left loop mode.
    """

    def __init__(self, host: PcHost) -> None:
        self._host = host
        self.on_room: Callable[[], None] | None = None
        self.received: deque[int] = deque()
        self.divisor = DIVISOR_9600
        self.ier = 0
        self.fcr = 0
        self.lcr = 0
        self.mcr = 0
        self.scr = 0
        self.modem_changes = 0
        self.overrun = False
        self.tells_empty = False
        """The transmitter's interrupt has a cause that the guest has not seen."""
        self._line = 0

    def ports(self) -> dict[int, PortHandler]:
        """Who answers which port."""
        return dict.fromkeys(range(BASE, BASE + 8), self._access)

    # The other end of the line.

    @property
    def wants_input(self) -> bool:
        """The guest listens, by interrupts, and has room."""
        return bool(self.ier & IER_RECEIVED and self._room_for_line_bytes)

    def receive(self, data: bytes) -> int:
        """Put into the FIFO what fits of `data`; how many bytes that were."""
        taken = data[: self._room_for_line_bytes]
        self.received.extend(taken)
        self._update()
        return len(taken)

    @property
    def _room_for_line_bytes(self) -> int:
        """In loop mode the receiver is cut off from the line."""
        return 0 if self.mcr & MCR_LOOP else self._depth_bytes - len(self.received)

    @property
    def _depth_bytes(self) -> int:
        return FIFO_BYTES if self.fcr & FCR_ENABLE else 1

    # The guest's side.

    def _access(self, port: int, size_bytes: int, value: int | None) -> int | None:
        if size_bytes != 1:
            return None
        if value is None:
            answer = self._read(port - BASE)
        else:
            answer = None
            self._write(port - BASE, value & 0xFF)
        self._update()
        return answer

    def _read(self, register: int) -> int:
        if register <= IER and self.lcr & LCR_DIVISOR_LATCH:
            return self.divisor >> 8 * register & 0xFF
        match register:
            case 0:
                return self._read_data()
            case 1:
                return self.ier
            case 2:
                return self._read_iir()
            case 3:
                return self.lcr
            case 4:
                return self.mcr
            case 5:
                return self._read_lsr()
            case 6:
                return self._read_msr()
        return self.scr

    def _write(self, register: int, value: int) -> None:
        if register <= IER and self.lcr & LCR_DIVISOR_LATCH:
            shift = 8 * register
            self.divisor = self.divisor & ~(0xFF << shift) | value << shift
            return
        match register:
            case 0:
                self._send(value)
            case 1:
                self._write_ier(value & IER_BITS)
            case 2:
                self._write_fcr(value)
            case 3:
                self.lcr = value
            case 4:
                self._write_mcr(value & MCR_BITS)
            case 7:
                self.scr = value

    def _read_data(self) -> int:
        if not self.received:
            return 0
        byte = self.received.popleft()
        if not self.received:
            self._tell_room()
        return byte

    def _send(self, byte: int) -> None:
        if self.mcr & MCR_LOOP:
            self._loop_back(byte)
        else:
            self._host.transmit(byte)
        # the transmitter was full in between: a cause that was not seen ends, and a new one begins
        self.tells_empty = False
        self._update()
        self.tells_empty = True

    def _loop_back(self, byte: int) -> None:
        """An overrun loses the new byte, but the one in the buffer where there is no FIFO."""
        if len(self.received) < self._depth_bytes:
            self.received.append(byte)
            return
        self.overrun = True
        if not self.fcr & FCR_ENABLE:
            self.received[0] = byte

    def _write_ier(self, value: int) -> None:
        began = value & ~self.ier
        self.ier = value
        if began & IER_TRANSMITTER_EMPTY:
            self.tells_empty = True
        if began & IER_RECEIVED:
            self._tell_room()

    def _write_fcr(self, value: int) -> None:
        """Without the bit that enables the FIFOs no other counts."""
        value = value if value & FCR_ENABLE else 0
        clears = (value ^ self.fcr) & FCR_ENABLE or value & FCR_CLEAR_RECEIVER
        self.fcr = value
        if clears and self.received:
            self.received.clear()
            self._tell_room()

    def _write_mcr(self, value: int) -> None:
        before, looped = self._modem_lines(), self.mcr & MCR_LOOP
        self.mcr = value
        after = self._modem_lines()
        # of RI only the trailing edge counts (TERI)
        self.modem_changes |= ((before ^ after) & ~(after & MSR_RI)) >> 4
        if looped and not value & MCR_LOOP:
            self._tell_room()

    def _read_iir(self) -> int:
        """Reading it answers the transmitter's interrupt, if that is what it tells."""
        cause = self._cause()
        if cause == IIR_TRANSMITTER_EMPTY:
            self.tells_empty = False
        return cause | (IIR_FIFOS if self.fcr & FCR_ENABLE else 0)

    def _read_lsr(self) -> int:
        status = LSR_TRANSMITTER_EMPTY
        if self.received:
            status |= LSR_DATA_READY
        if self.overrun:
            status |= LSR_OVERRUN
            self.overrun = False
        return status

    def _read_msr(self) -> int:
        status = self._modem_lines() | self.modem_changes
        self.modem_changes = 0
        return status

    def _modem_lines(self) -> int:
        """What comes in; in loop mode RTS, DTR, OUT1 and OUT2."""
        if not self.mcr & MCR_LOOP:
            return CONNECTED
        loops = ((MCR_RTS, MSR_CTS), (MCR_DTR, MSR_DSR), (MCR_OUT1, MSR_RI), (MCR_OUT2, MSR_DCD))
        return sum(line for output, line in loops if self.mcr & output)

    def _cause(self) -> int:
        """The interrupt with the highest priority (PC16550D, table IV)."""
        if self.ier & IER_LINE_STATUS and self.overrun:
            return IIR_LINE_STATUS
        if self.ier & IER_RECEIVED and self.received:
            return IIR_RECEIVED
        if self.ier & IER_TRANSMITTER_EMPTY and self.tells_empty:
            return IIR_TRANSMITTER_EMPTY
        if self.ier & IER_MODEM and self.modem_changes:
            return IIR_MODEM
        return IIR_NONE

    def _update(self) -> None:
        level = int(self._cause() != IIR_NONE and bool(self.mcr & MCR_OUT2))
        if self.mcr & MCR_LOOP:
            level = 0
        if level != self._line:
            self._line = level
            self._host.set_irq_line(IRQ, level)

    def _tell_room(self) -> None:
        if self.on_room is not None and self.wants_input:
            self.on_room()
