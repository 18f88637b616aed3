"""The ATA disk by its registers, as T13/1321D has them."""

from dataclasses import dataclass, field

import pytest

from kvmtick.machine.pc.ata import SECTOR_BYTES, Ata
from kvmtick.machine.pc.host import PcHost
from kvmtick.timing.clock import VirtualClock
from kvmtick.timing.queue import EventQueue

DATA, ERROR, COUNT, LOW, MID, HIGH, DEVICE, STATUS = range(0x1F0, 0x1F8)
CONTROL = 0x3F6
IDENTIFY, READ, WRITE, VERIFY, SET_FEATURES, DIAGNOSTIC = 0xEC, 0x20, 0x30, 0x40, 0xEF, 0x90
IDENTIFY_PACKET, SET_MULTIPLE, FLUSH = 0xA1, 0xC6, 0xE7
READY, DATA_REQUEST, FAILED = 0x50, 0x58, 0x51
ABRT, IDNF = 4, 0x10
LBA, DEVICE_1, NIEN, SRST = 0x40, 0x10, 2, 4
SECTORS = 16 * 63 * 3
LAST = SECTORS - 1


@dataclass
class Rig:
    """A disk whose sectors begin with their number."""

    lines: list[tuple[int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        host = PcHost(
            VirtualClock(),
            EventQueue(),
            lambda gsi, level: self.lines.append((gsi, level)),
            lambda: 0,
            lambda byte: None,
            lambda by: None,
            lambda: None,
            1 << 20,
            lambda: 1,
        )
        self.ata = Ata(host)
        self.ports = self.ata.ports()

    def insert(self) -> "Rig":
        self.ata.insert(b"".join(sector(number) for number in range(SECTORS)))
        return self

    def read(self, port: int, size_bytes: int = 1) -> int | None:
        return self.ports[port](port, size_bytes, None)

    def write(self, port: int, value: int, size_bytes: int = 1) -> None:
        self.ports[port](port, size_bytes, value)

    def command(self, command: int, lba: int = 0, count: int = 1) -> None:
        self.write(COUNT, count)
        for port in (LOW, MID, HIGH):
            self.write(port, lba & 0xFF)
            lba >>= 8
        self.write(DEVICE, LBA | lba)
        self.write(STATUS, command)

    def read_data(self, size_bytes: int = SECTOR_BYTES) -> bytes:
        words = (self.read(DATA, 2) for _ in range(size_bytes // 2))
        return b"".join((word or 0).to_bytes(2, "little") for word in words)

    def write_data(self, data: bytes) -> None:
        for at in range(0, len(data), 4):
            self.write(DATA, int.from_bytes(data[at : at + 4], "little"), 4)

    @property
    def is_interrupting(self) -> bool:
        return bool(self.lines) and self.lines[-1] == (14, 1)


def sector(number: int) -> bytes:
    return number.to_bytes(4, "little") * (SECTOR_BYTES // 4)


@pytest.fixture
def rig() -> Rig:
    return Rig().insert()


def test_without_a_disk_the_bus_is_undriven() -> None:
    rig = Rig()
    rig.write(STATUS, IDENTIFY)
    assert [rig.read(port) for port in (*range(DATA, STATUS + 1), CONTROL)] == [None] * 9
    assert rig.lines == []


def test_identify_tells_the_size(rig: Rig) -> None:
    rig.command(IDENTIFY)
    assert rig.is_interrupting
    assert rig.read(STATUS) == DATA_REQUEST
    assert not rig.is_interrupting
    identity = rig.read_data()
    assert rig.read(STATUS) == READY
    words = [int.from_bytes(identity[at : at + 2], "little") for at in range(0, SECTOR_BYTES, 2)]
    assert (words[1], words[3], words[6]) == (3, 16, 63)
    assert words[60] | words[61] << 16 == SECTORS
    assert b"".join(word.to_bytes(2, "big") for word in words[27:47]).strip() == b"KVMTICK DISK"


@pytest.mark.parametrize("lba", [0, 1, LAST])
def test_a_sector_is_read(rig: Rig, lba: int) -> None:
    rig.command(READ, lba)
    assert rig.read_data() == sector(lba)
    assert rig.read(STATUS) == READY


def test_every_sector_that_is_read_has_its_interrupt(rig: Rig) -> None:
    rig.command(READ, 7, count=3)
    for number in (7, 8, 9):
        assert rig.is_interrupting
        assert rig.read(STATUS) == DATA_REQUEST
        assert rig.read_data() == sector(number)
    assert not rig.is_interrupting
    assert rig.read(STATUS) == READY


def test_a_count_of_0_is_256(rig: Rig) -> None:
    rig.command(READ, 0, count=0)
    assert rig.read_data(256 * SECTOR_BYTES)[-4:] == (255).to_bytes(4, "little")
    assert rig.read(STATUS) == READY


def test_cylinder_head_and_sector(rig: Rig) -> None:
    for port, value in ((COUNT, 1), (LOW, 5), (MID, 2), (HIGH, 0), (DEVICE, 3), (STATUS, READ)):
        rig.write(port, value)
    assert rig.read_data() == sector((2 * 16 + 3) * 63 + 5 - 1)


def test_what_is_written_can_be_read(rig: Rig) -> None:
    rig.command(WRITE, 4, count=2)
    assert not rig.is_interrupting  # the first sector is asked for by DRQ alone
    assert rig.read(STATUS) == DATA_REQUEST
    rig.write_data(b"a" * SECTOR_BYTES)
    assert rig.is_interrupting
    assert rig.read(STATUS) == DATA_REQUEST
    rig.write_data(b"b" * SECTOR_BYTES)
    assert rig.is_interrupting
    assert rig.read(STATUS) == READY
    rig.command(READ, 3, count=4)
    read = rig.read_data(4 * SECTOR_BYTES)
    assert read == sector(3) + b"a" * SECTOR_BYTES + b"b" * SECTOR_BYTES + sector(6)
    assert len(rig.ata.disk) == SECTORS * SECTOR_BYTES


@pytest.mark.parametrize("command", [READ, WRITE, VERIFY])
def test_sectors_behind_the_end_are_not_found(rig: Rig, command: int) -> None:
    rig.command(command, LAST, count=2)
    assert (rig.read(STATUS), rig.read(ERROR)) == (FAILED, IDNF)


def test_a_track_has_no_sector_0(rig: Rig) -> None:
    for port, value in ((COUNT, 1), (LOW, 0), (DEVICE, 0), (STATUS, READ)):
        rig.write(port, value)
    assert (rig.read(STATUS), rig.read(ERROR)) == (FAILED, IDNF)


@pytest.mark.parametrize("command", [IDENTIFY_PACKET, SET_MULTIPLE, 0x25, 0xC8, 0x00])
def test_commands_that_are_not_there_are_aborted(rig: Rig, command: int) -> None:
    rig.command(command)
    assert rig.is_interrupting
    assert (rig.read(STATUS), rig.read(ERROR)) == (FAILED, ABRT)


@pytest.mark.parametrize(
    ("feature", "status"), [(0x03, READY), (0x82, READY), (0x02, READY), (0x99, FAILED)]
)
def test_set_features(rig: Rig, feature: int, status: int) -> None:
    rig.write(ERROR, feature)
    rig.command(SET_FEATURES)
    assert rig.read(STATUS) == status


@pytest.mark.parametrize("command", [VERIFY, FLUSH, 0x10, 0x91])
def test_commands_without_data(rig: Rig, command: int) -> None:
    rig.command(command)
    assert rig.is_interrupting
    assert rig.read(STATUS) == READY


def test_nien_holds_the_interrupt_back(rig: Rig) -> None:
    rig.write(CONTROL, NIEN)
    rig.command(FLUSH)
    assert not rig.is_interrupting
    rig.write(CONTROL, 0)
    assert rig.is_interrupting
    assert rig.read(CONTROL) == READY  # Alternate Status leaves it pending
    assert rig.is_interrupting
    rig.read(STATUS)
    assert not rig.is_interrupting


def test_a_software_reset_ends_the_command_and_shows_the_signature(rig: Rig) -> None:
    rig.command(READ, 9)
    rig.write(CONTROL, SRST)
    rig.write(CONTROL, 0)
    assert rig.read(STATUS) == READY
    assert not rig.is_interrupting
    assert [rig.read(port) for port in (ERROR, COUNT, LOW, MID, HIGH)] == [1, 1, 1, 0, 0]


def test_there_is_no_second_device(rig: Rig) -> None:
    rig.write(DEVICE, DEVICE_1)
    rig.lines.clear()
    rig.write(STATUS, IDENTIFY)
    assert (rig.read(STATUS), rig.read(CONTROL)) == (0, 0)
    assert not rig.is_interrupting
    rig.write(STATUS, DIAGNOSTIC)  # of both devices
    assert (rig.read(STATUS), rig.read(ERROR)) == (READY, 1)
