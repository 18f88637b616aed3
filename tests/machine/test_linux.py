"""Linux kernels: what goes where, what they are told, what is refused."""

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import linux_images as images
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmtick import guests
from kvmtick.guests import Guest
from kvmtick.kvm.model import ModelVm
from kvmtick.machine.linux import load_linux
from kvmtick.machine.loader import LoadError, load_file

MIB = 1 << 20
ZERO_PAGE = 0x7000


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    path = tmp_path / "vmlinuz"
    path.write_bytes(images.bzimage())
    return path


def console(guest: Guest) -> str:
    with ModelVm(ram_bytes=guest.needs.ram_bytes) as vm:
        vm.prepare(guest.needs)
        vm.load(guest)
        run = vm.run(limit_s=20)
    assert run.exit.reason == "done", run.exit
    return run.console


@dataclass
class BootParams:
    """What a guest is told, read as a kernel does."""

    guest: Guest

    def read(self, gpa: int, size_bytes: int) -> bytes:
        for at, data in self.guest.pieces:
            if at <= gpa < at + len(data):
                return data[gpa - at : gpa - at + size_bytes]
        raise AssertionError(f"nothing was put at {gpa:#x}")

    def word(self, offset: int) -> int:
        return int.from_bytes(self.read(ZERO_PAGE + offset, 4), "little")

    def initrd(self) -> tuple[int, bytes]:
        at = self.word(0x218)
        return at, self.read(at, self.word(0x21C)) if at else b""

    def command_line(self) -> bytes:
        return self.read(self.word(0x228), 4096)

    def e820(self) -> list[tuple[int, int, int]]:
        entries = self.read(ZERO_PAGE + 0x1E8, 1)[0]
        return [
            struct.unpack("<QQI", self.read(ZERO_PAGE + 0x2D0 + 20 * index, 20))
            for index in range(entries)
        ]


@pytest.mark.parametrize("entry", [None, "32", "64"])
def test_a_kernel_starts_and_reads_its_command_line(kernel: Path, entry: str | None) -> None:
    guest = load_linux(kernel, append="quiet nosmp", entry=entry)
    assert guest.start is not None
    assert guest.start["rsi"] == ZERO_PAGE
    at = images.PREFERRED + (0 if entry == "32" else images.ENTRY_64)
    assert guest.start["rip"] == at
    assert guest.name == "vmlinuz"
    assert guest.needs == guests.Needs(ram_bytes=256 * MIB, gsi0="ioapic-pin-2")
    assert console(guest) == "quiet nosmp"


def test_a_kernel_without_a_64_bit_entry_starts_in_32_bit_mode(kernel: Path) -> None:
    for version, flags in ((0x206, 0), (0x20B, 1), (0x20F, 0)):
        kernel.write_bytes(images.bzimage(version, xloadflags=flags))
        guest = load_linux(kernel, append=hex(version), vcpus=2, ram_bytes=32 * MIB)
        assert guest.start is not None
        assert not guest.start["cr0"] >> 31
        assert (guest.needs.vcpus, guest.needs.ram_bytes) == (2, 32 * MIB)
        assert console(guest) == hex(version)
        with pytest.raises(LoadError, match="has no 64-bit entry: give entry 32"):
            load_linux(kernel, entry="64")


def test_protocols_before_2_10_go_to_1_mib(kernel: Path) -> None:
    kernel.write_bytes(images.bzimage(0x209))
    guest = load_linux(kernel, ram_bytes=2 * MIB)
    assert guest.start is not None
    assert guest.start["rip"] == MIB
    assert BootParams(guest).read(MIB, len(images.ECHO_32)) == images.ECHO_32


def test_the_zero_page_is_the_kernels_header_filled_in(kernel: Path) -> None:
    told = BootParams(load_linux(kernel, append="a b", ram_bytes=64 * MIB))
    assert told.read(ZERO_PAGE + 0x202, 6) == b"HdrS\x0f\x02"
    assert told.read(ZERO_PAGE + 0x210, 1) == b"\xff", "the boot loader has no id"
    assert told.word(0x214) == images.PREFERRED
    assert told.command_line() == b"a b\0"
    assert told.initrd() == (0, b"")
    assert told.read(told.word(0x70), 8) == b"RSD PTR "
    assert told.e820() == [
        (0, 0x9_FC00, 1),
        (0x9_FC00, 0x400, 2),
        (0xF_0000, 0x1_0000, 2),
        (MIB, 63 * MIB, 1),
    ]


def test_the_tables_of_as_many_vcpus_as_there_can_be_fit(kernel: Path) -> None:
    assert load_linux(kernel, vcpus=1024).needs.vcpus == 1024


def test_firmware_tables_lie_where_firmware_has_them_and_are_reserved(kernel: Path) -> None:
    told = BootParams(load_linux(kernel, vcpus=4))
    reserved = [(start, start + size) for start, size, kind in told.e820() if kind == 2]
    found = {
        magic: (at, len(data))
        for at, data in told.guest.pieces
        for magic in (b"RSD PTR ", b"_MP_")
        if data.startswith(magic)
    }
    assert len(found) == 2
    for at, size in found.values():
        assert at % 16 == 0
        assert any(start <= at and at + size <= end for start, end in reserved)
    assert told.read(0x40E, 2) == (0x9_FC00 >> 4).to_bytes(2, "little")
    assert told.read(0x413, 2) == (639).to_bytes(2, "little")


@pytest.mark.parametrize(
    ("addr_max", "ram_mib", "end"),
    [(0x7FFF_FFFF, 64, 64 * MIB), (0x1FF_FFFF, 64, 32 * MIB), (0xFFFF_FFFF, 33, 33 * MIB)],
)
def test_an_initrd_goes_up_on_a_page(kernel: Path, addr_max: int, ram_mib: int, end: int) -> None:
    kernel.write_bytes(images.bzimage(initrd_addr_max=addr_max))
    guest = load_linux(kernel, initrd=b"x" * 5000, ram_bytes=ram_mib * MIB)
    assert BootParams(guest).initrd() == (end - 8192, b"x" * 5000)


def test_an_initrd_keeps_clear_of_what_the_kernel_needs(kernel: Path) -> None:
    kernel.write_bytes(images.bzimage(init_size=4 * MIB))
    room = 64 * MIB - (images.PREFERRED + 4 * MIB)
    load_linux(kernel, initrd=bytes(room), ram_bytes=64 * MIB)
    with pytest.raises(
        LoadError, match=f"leaves {room} bytes for an initrd, from 0x1400000 to 0x4000000, and it"
    ):
        load_linux(kernel, initrd=bytes(room + 1), ram_bytes=64 * MIB)


REFUSED: dict[str, tuple[bytes, dict[str, Any]]] = {
    "is no Linux bzImage: give": (b"\xf4" * 4096, {}),
    "is an ELF file, as a vmlinux is: give a Linux bzImage": (b"\x7fELF" + bytes(4096), {}),
    "is empty: give a Linux bzImage": (b"", {}),
    "is cut off: its header says": (images.bzimage()[:-1], {}),
    "has boot protocol 2.05, and 2.06 is the first": (images.bzimage(0x205), {}),
    "is a zImage": (images.bzimage(loadflags=0), {}),
    "wants to be loaded at 0x1000, below 1 MiB": (images.bzimage(preferred=0x1000), {}),
    "takes a command line of 2047 bytes, and with --append it has 2048": (
        images.bzimage(),
        {"append": "x" * 2048},
    ),
    "takes a command line without zero bytes": (images.bzimage(), {"append": "a\0b"}),
    "needs RAM up to 0x1100000, and RAM ends at 0x10ff000: give --ram 17M": (
        images.bzimage(),
        {"ram_bytes": 17 * MIB - 4096},
    ),
    "needs RAM up to 0x100100000, and RAM ends at 0x10000000: give a Linux bzImage": (
        images.bzimage(preferred=1 << 32),
        {},
    ),
    "cannot have vcpus=0: give 1 to 1024": (images.bzimage(), {"vcpus": 0}),
    "cannot have vcpus=1025: give 1 to 1024": (images.bzimage(), {"vcpus": 1025}),
    "cannot have ram_bytes=268435579: give a multiple of 4096 up to 3 GiB": (
        images.bzimage(),
        {"ram_bytes": 256 * MIB + 123},
    ),
    "cannot have ram_bytes=3221229568: give": (images.bzimage(), {"ram_bytes": (3 << 30) + 4096}),
    "needs RAM up to 0x1100000, and RAM ends at 0x0:": (images.bzimage(), {"ram_bytes": 0}),
    "has no entry '16': give 32 or 64": (images.bzimage(), {"entry": "16"}),
    "has no 64-bit entry": (images.bzimage(xloadflags=0), {"entry": "64"}),
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_cannot_be_booted_is_told_why(kernel: Path, words: str) -> None:
    image, options = REFUSED[words]
    kernel.write_bytes(image)
    with pytest.raises(LoadError) as caught:
        load_linux(kernel, **options)
    assert str(caught.value).startswith(f"{str(kernel)!r} {words}")
    assert "\n" not in str(caught.value)


def test_a_longest_command_line_fits(kernel: Path) -> None:
    line = "x" * images.CMDLINE_SIZE
    assert BootParams(load_linux(kernel, append=line)).command_line() == line.encode() + b"\0"


def test_a_missing_kernel_is_an_error_of_one_line(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"cannot read '.*nowhere': No such file or directory"):
        load_linux(tmp_path / "nowhere")


def test_a_bzimage_among_other_files_is_linux(kernel: Path, tmp_path: Path) -> None:
    initrd = tmp_path / "initrd"
    initrd.write_bytes(b"initrd")
    guest = load_file(kernel, append="quiet", modules=[(initrd, "")])
    assert guest == load_linux(kernel, append="quiet", initrd=b"initrd")
    for modules in ([(initrd, "")] * 2, [(initrd, "argument")]):
        with pytest.raises(LoadError, match="takes one --module, its initrd, without arguments"):
            load_file(kernel, modules=modules)
    assert load_file(kernel, 0x8000).image == kernel.read_bytes(), "flat if it is given a place"


NUMBERS = st.one_of(
    st.binary(min_size=1, max_size=8),
    st.sampled_from((b"\xff" * 4, b"\0" * 4, b"\xff" * 8, b"\0\0\0\x80")),
)


@given(data=st.data())
def test_damaged_kernels_load_or_are_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    good = images.bzimage(data.draw(st.sampled_from((0x206, 0x20A, 0x20F)), label="version"))
    size = data.draw(st.one_of(st.just(len(good)), st.integers(0, len(good))), label="size")
    damaged = bytearray(good[:size])
    for _ in range(data.draw(st.integers(0, 3), label="changes")):
        at = data.draw(st.integers(0x1F1, 0x268))
        number = data.draw(NUMBERS)
        damaged[at : at + len(number)] = number
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(damaged)
    ram_bytes = 64 * MIB
    refusal = guest = None
    try:
        guest = load_linux(path, initrd=b"initrd", append="quiet", ram_bytes=ram_bytes)
    except LoadError as error:
        refusal = str(error)
    if guest is None:
        assert refusal is not None
        assert refusal.startswith(repr(str(path)))
        assert "\n" not in refusal
        return
    ends = 0
    for at, contents in sorted(guest.pieces):
        assert at >= ends
        ends = at + len(contents)
    assert ends <= ram_bytes
