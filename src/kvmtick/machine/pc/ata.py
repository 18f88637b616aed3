"""One ATA hard disk, device 0 of the ISA bus's first channel (ATA/ATAPI-5, T13/1321D).

A command is carried out at once: BSY is never seen. INTRQ is IRQ 14, and reading Status takes it
back. What the guest writes stays in memory; whose image it was keeps it as it is. Without a disk
all registers read all ones, as an empty channel does.

Not modelled: DMA, READ and WRITE MULTIPLE, 48-bit addresses, PACKET, power management and security
(those commands are aborted), a geometry other than 16 heads of 63 sectors.
"""

from collections.abc import Callable
from struct import pack_into
from typing import Final

from kvmtick.machine.pc.host import PcHost
from kvmtick.machine.ports import PortHandler

__all__ = ["MOST_SECTORS", "SECTOR_BYTES", "Ata"]

SECTOR_BYTES: Final = 512
MOST_SECTORS: Final = 1 << 28

COMMAND_BLOCK: Final = 0x1F0
DEVICE_CONTROL: Final = 0x3F6
"""Alternate Status where it is read."""
IRQ: Final = 14

DATA, ERROR, COUNT, LBA_LOW, LBA_MID, LBA_HIGH, DEVICE, STATUS = range(8)
DEVICE_1, DEVICE_LBA, DEVICE_HEAD = 1 << 4, 1 << 6, 0x0F
BSY, DRDY, DSC, DRQ, ERR = 1 << 7, 1 << 6, 1 << 4, 1 << 3, 1 << 0
ABRT, IDNF = 1 << 2, 1 << 4
CONTROL_NIEN, CONTROL_SRST = 1 << 1, 1 << 2
DIAGNOSTIC_PASSED: Final = 0x01

HEADS: Final = 16
SECTORS_A_TRACK: Final = 63
MOST_CYLINDERS: Final = 16_383

RECALIBRATE: Final = 0x10
READ_SECTORS: Final = (0x20, 0x21)
WRITE_SECTORS: Final = (0x30, 0x31)
READ_VERIFY: Final = (0x40, 0x41)
DIAGNOSTIC: Final = 0x90
INITIALIZE_PARAMETERS: Final = 0x91
FLUSH_CACHE: Final = 0xE7
IDENTIFY: Final = 0xEC
SET_FEATURES: Final = 0xEF
DO_NOTHING: Final = (RECALIBRATE, INITIALIZE_PARAMETERS, FLUSH_CACHE)
FEATURES: Final = (0x02, 0x03, 0x55, 0x82, 0xAA)
"""Of SET FEATURES: write cache, transfer mode, look-ahead."""


class Ata:
    """The channel: the registers both devices share, and the transfer under way."""

    def __init__(self, host: PcHost) -> None:
        self._set_irq_line: Callable[[int, int], None] = host.set_irq_line
        self.disk = bytearray()
        """As the guest has made it; empty: there is no disk."""
        self._registers = bytearray(8)
        self._feature = 0
        self._control = 0
        self._status = 0
        self._intrq = False
        self._buffer = bytearray()
        self._at = 0
        self._lba = 0
        self._left = 0
        """Sectors of the command that are not transferred yet."""
        self._writes = False

    def insert(self, disk: bytes) -> None:
        """The disk from now on: whole sectors."""
        self.disk = bytearray(disk)
        self._reset()

    def ports(self) -> dict[int, PortHandler]:
        """Who answers which port."""
        registers: dict[int, PortHandler] = dict.fromkeys(
            range(COMMAND_BLOCK + 1, COMMAND_BLOCK + 8), self._access_register
        )
        return registers | {COMMAND_BLOCK: self._access_data, DEVICE_CONTROL: self._access_control}

    @property
    def _is_disk(self) -> bool:
        """The device that is selected is there."""
        return not self._registers[DEVICE] & DEVICE_1

    # Registers.

    def _access_register(self, port: int, size_bytes: int, value: int | None) -> int | None:
        if not self.disk or size_bytes != 1:
            return None
        register = port - COMMAND_BLOCK
        if value is None:
            return self._read_status() if register == STATUS else self._registers[register]
        if register == STATUS:
            self._command(value)
        elif register != ERROR:
            self._registers[register] = value
        else:
            self._feature = value
        return None

    def _access_control(self, port: int, size_bytes: int, value: int | None) -> int | None:
        if not self.disk or size_bytes != 1:
            return None
        if value is None:
            return self._status if self._is_disk else 0
        if value & ~self._control & CONTROL_SRST:
            self._reset()
        self._control = value
        self._update_irq()
        return None

    def _read_status(self) -> int:
        if not self._is_disk:
            return 0
        self._intrq = False
        self._update_irq()
        return self._status

    def _interrupt(self) -> None:
        self._intrq = True
        self._update_irq()

    def _update_irq(self) -> None:
        self._set_irq_line(IRQ, int(self._intrq and not self._control & CONTROL_NIEN))

    # Commands.

    def _reset(self) -> None:
        """Software reset, and power-on: the signature of a device without PACKET (9.12)."""
        self._registers = bytearray((0, DIAGNOSTIC_PASSED, 1, 1, 0, 0, 0, 0))
        self._feature = 0
        self._control = 0
        self._intrq = False
        self._left = 0
        self._status = DRDY | DSC

    def _command(self, command: int) -> None:
        if not self._is_disk and command != DIAGNOSTIC:
            return
        self._left = 0
        self._registers[ERROR] = 0
        if command in READ_SECTORS or command in WRITE_SECTORS or command in READ_VERIFY:
            self._begin_sectors(command)
        elif command == IDENTIFY:
            self._writes = False
            self._left = 1
            self._buffer = self._identity()
            self._offer()
        elif command == DIAGNOSTIC:
            control = self._control
            self._reset()
            self._control = control
            self._finish(DIAGNOSTIC_PASSED)
        elif command in DO_NOTHING or (command == SET_FEATURES and self._feature in FEATURES):
            self._finish()
        else:
            self._finish(ABRT, ERR)

    def _finish(self, error: int = 0, status: int = 0) -> None:
        """The command is over."""
        self._left = 0
        self._registers[ERROR] = error
        self._status = DRDY | DSC | status
        self._interrupt()

    def _begin_sectors(self, command: int) -> None:
        self._lba = self._address()
        count = self._registers[COUNT] or 256
        if not 0 <= self._lba <= len(self.disk) // SECTOR_BYTES - count:
            self._finish(IDNF, ERR)
        elif command in READ_VERIFY:
            self._finish()
        else:
            self._left = count
            self._writes = command in WRITE_SECTORS
            self._begin_sector()
            if self._writes:
                # the first sector is asked for without an interrupt
                self._status |= DRQ
            else:
                self._offer()

    def _address(self) -> int:
        """The first sector that the registers name; -1: CHS that no track has."""
        low, mid, high, device = self._registers[LBA_LOW : DEVICE + 1]
        head = device & DEVICE_HEAD
        if device & DEVICE_LBA:
            return low | mid << 8 | high << 16 | head << 24
        if not 1 <= low <= SECTORS_A_TRACK:
            return -1
        return ((mid | high << 8) * HEADS + head) * SECTORS_A_TRACK + low - 1

    # PIO: a sector at a time goes through the buffer.

    def _begin_sector(self) -> None:
        self._status = DRDY | DSC
        start = self._lba * SECTOR_BYTES
        self._buffer = self.disk[start : start + SECTOR_BYTES]
        self._at = 0

    def _offer(self) -> None:
        """The host shall transfer the buffer."""
        self._at = 0
        self._status = DRDY | DSC | DRQ
        self._interrupt()

    def _access_data(self, port: int, size_bytes: int, value: int | None) -> int | None:
        if not self.disk or not self._is_disk or not self._status & DRQ:
            return None
        at, self._at = self._at, self._at + size_bytes
        answer = None
        if value is None:
            answer = int.from_bytes(self._buffer[at : at + size_bytes], "little")
        elif self._writes:
            self._buffer[at : at + size_bytes] = value.to_bytes(size_bytes, "little")
        if self._at >= SECTOR_BYTES:
            self._end_sector()
        return answer

    def _end_sector(self) -> None:
        if self._writes:
            start = self._lba * SECTOR_BYTES
            self.disk[start : start + SECTOR_BYTES] = self._buffer[:SECTOR_BYTES]
        self._lba += 1
        self._left -= 1
        if self._left:
            self._begin_sector()
            self._offer()
        elif self._writes:
            self._finish()
        else:
            self._status = DRDY | DSC

    def _identity(self) -> bytearray:
        """What IDENTIFY DEVICE returns (8.12)."""
        sectors = len(self.disk) // SECTOR_BYTES
        whole_cylinders = sectors // (HEADS * SECTORS_A_TRACK)
        # firmware boots from no disk that has none
        cylinders = min(max(1, whole_cylinders), MOST_CYLINDERS)
        words = bytearray(SECTOR_BYTES)

        def put(word: int, *values: int) -> None:
            pack_into(f"<{len(values)}H", words, 2 * word, *values)

        put(0, 0x0040)  # fixed device
        put(1, cylinders, 0, HEADS, 0, 0, SECTORS_A_TRACK)
        _put_text(words, 10, 20, "0")
        _put_text(words, 23, 8, "1")
        _put_text(words, 27, 40, "KVMTICK DISK")
        put(49, 1 << 9)  # LBA
        put(51, 0x0200)  # PIO mode 2
        put(53, 1, cylinders, HEADS, SECTORS_A_TRACK)
        chs_sectors = cylinders * HEADS * SECTORS_A_TRACK
        put(57, chs_sectors & 0xFFFF, chs_sectors >> 16)
        put(60, sectors & 0xFFFF, sectors >> 16)
        put(80, 0x003E)  # ATA-1 to ATA/ATAPI-5
        put(82, 0, 1 << 14, 1 << 14, 0, 0, 1 << 14)  # no optional feature
        return words


def _put_text(words: bytearray, word: int, size_bytes: int, text: str) -> None:
    """ASCII, the first of two characters in the high byte of its word."""
    data = text.ljust(size_bytes).encode("ascii")
    for at in range(0, size_bytes, 2):
        words[2 * word + at], words[2 * word + at + 1] = data[at + 1], data[at]
