"""Multiboot kernels and ELF files: what goes where, what they are told, what is refused."""

import gzip
import struct
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import elf_images as elves
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmtick import guests
from kvmtick.guests import Guest
from kvmtick.guests.start import GDT_32, GDT_64
from kvmtick.kvm.model import ModelVm
from kvmtick.machine.loader import LoadError, load_file
from kvmtick.machine.run import Run

MIB = 1 << 20
GPA = elves.GPA
CONVENTIONAL_END = 0x9_F000


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return tmp_path / "kernel.elf"


def run(guest: Guest) -> Run:
    with ModelVm(ram_bytes=guest.needs.ram_bytes) as vm:
        vm.prepare(guest.needs)
        vm.load(guest)
        return vm.run(limit_s=20)


class Memory:
    """What a guest's pieces make of fresh RAM."""

    def __init__(self, guest: Guest) -> None:
        self.pieces = guest.pieces

    def read(self, gpa: int, size_bytes: int) -> bytes:
        for at, data in self.pieces:
            if at <= gpa < at + len(data):
                return data[gpa - at : gpa - at + size_bytes]
        raise AssertionError(f"nothing was put at {gpa:#x}")

    def words(self, gpa: int, count: int) -> tuple[int, ...]:
        return struct.unpack(f"<{count}I", self.read(gpa, 4 * count))

    def string(self, gpa: int) -> str:
        return self.read(gpa, 4096).split(b"\0")[0].decode()


@dataclass
class Info:
    """The boot information, read as a kernel does."""

    memory: Memory
    at: int

    def word(self, offset: int) -> int:
        return self.memory.words(self.at + offset, 1)[0]

    def modules(self) -> list[tuple[bytes, str, int]]:
        found = []
        for index in range(self.word(20)):
            start, end, string, reserved = self.memory.words(self.word(24) + 16 * index, 4)
            assert reserved == 0
            contents = self.memory.read(start, end - start) if start < end else b""
            found.append((contents, self.memory.string(string), start))
        return found

    def memory_map(self) -> list[tuple[int, int, int]]:
        length, at = self.word(44), self.word(48)
        found = []
        while length:
            size, base, size_bytes, kind = struct.unpack("<IQQI", self.memory.read(at, 24))
            assert size == 20
            found.append((base, size_bytes, kind))
            at, length = at + size + 4, length - size - 4
        return found


def told(guest: Guest) -> Info:
    assert guest.start is not None
    assert guest.start["rax"] == 0x2BAD_B002
    return Info(Memory(guest), guest.start["rbx"])


# --- Multiboot ----------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [32, 64])
def test_a_kernel_starts_in_protected_mode_and_reads_its_command_line(
    image: Path, bits: int
) -> None:
    image.write_bytes(elves.kernel(bits=bits))
    guest = load_file(image, append="quiet nosmp")
    assert guest.start is not None
    assert guest.start["rip"] == GPA + 12
    assert (guest.name, guest.parameters) == ("kernel.elf", None)
    assert guest.needs == guests.Needs(ram_bytes=128 * MIB, gsi0="ioapic-pin-2")
    result = run(guest)
    assert (result.exit.reason, result.console) == ("done", "kernel.elf quiet nosmp")


def test_address_fields_load_what_is_no_elf(image: Path) -> None:
    image.write_bytes(elves.kludge(before=b"text", bss_bytes=64) + b"behind it")
    guest = load_file(image)
    assert guest.start is not None
    assert guest.start["rip"] == GPA + 32
    loaded = Memory(guest).read(GPA, 4096)
    assert loaded == elves.kludge(bss_bytes=64), "from the header on and no further"
    assert (GPA + len(loaded), bytes(64)) in guest.pieces
    assert run(guest).console == "kernel.elf"


def test_address_fields_without_an_end_load_the_whole_file(image: Path) -> None:
    header = elves.multiboot_header(1 << 16, GPA + 8, GPA, 0, 0, GPA + 40)
    image.write_bytes(b"8 before" + header + b"code")
    assert Memory(load_file(image)).read(GPA, 4096) == image.read_bytes()


def test_address_fields_come_before_an_elf_header(image: Path) -> None:
    code = elves.ECHO_COMMAND_LINE
    offset = elves.HEADER_BYTES[32] + elves.PROGRAM_HEADER_BYTES[32]
    header = elves.multiboot_header(1 << 16, 2 * MIB + offset, 2 * MIB, 0, 0, 2 * MIB + offset + 32)
    image.write_bytes(elves.elf(header + code))
    guest = load_file(image)
    assert guest.pieces[0] == (2 * MIB, image.read_bytes())
    assert run(guest).exit.reason == "done"


@pytest.mark.parametrize("flags", [0, 1, 2, 3, 0xFFFE_0000])
def test_flags_that_can_be_met(image: Path, flags: int) -> None:
    image.write_bytes(elves.kernel(flags=flags))
    assert told(load_file(image)).word(0) == 0x24D


@pytest.mark.parametrize(
    ("flags", "words"), [(4, "asks for a video mode"), (8, "0x8"), (0x8003, "0x8000")]
)
def test_flags_that_cannot_be_met(image: Path, flags: int, words: str) -> None:
    image.write_bytes(elves.kernel(flags=flags))
    with pytest.raises(LoadError, match=words):
        load_file(image)


@pytest.mark.parametrize("ram_mib", [1, 2, 64, 3072])
def test_the_memory_it_is_told_of(image: Path, ram_mib: int) -> None:
    header = elves.multiboot_header(1 << 16, 0x1_0000, 0x1_0000, 0, 0, 0x1_0020)
    image.write_bytes(header + b"\xf4")
    info = told(load_file(image, ram_bytes=ram_mib * MIB))
    assert (info.word(4), info.word(8)) == (639, (ram_mib - 1) * 1024)
    available = [(base, size) for base, size, kind in info.memory_map() if kind == 1]
    assert available == [(0, 639 << 10), (MIB, (ram_mib - 1) * MIB)][: 1 + (ram_mib > 1)]
    bounds = [(base, base + size) for base, size, _ in info.memory_map()]
    assert all(end <= start for (_, end), (start, _) in pairwise(bounds))
    assert info.memory.string(info.word(64)) == "kvmtick"


def test_modules_lie_on_pages_behind_the_kernel(image: Path, tmp_path: Path) -> None:
    one, two, nothing = tmp_path / "initrd", tmp_path / "config", tmp_path / "nothing"
    one.write_bytes(bytes(range(256)) * 17)
    two.write_bytes(b"x=1\n")
    nothing.write_bytes(b"")
    kernel_bytes = 5 * MIB + 1
    image.write_bytes(
        elves.elf(elves.multiboot_header(1), entry=GPA + 4, memory_bytes=kernel_bytes)
    )
    guest = load_file(image, modules=[(one, "root=/dev/ram0 ro"), (two, ""), (nothing, "x")])
    modules = told(guest).modules()
    assert [(contents, string) for contents, string, _ in modules] == [
        (one.read_bytes(), "initrd root=/dev/ram0 ro"),
        (b"x=1\n", "config"),
        (b"", "nothing x"),
    ]
    starts = [start for _, _, start in modules]
    assert starts[0] == 0x60_1000
    assert starts[1] == 0x60_3000
    assert all(start % 4096 == 0 for start in starts)
    disjoint(guest)


def test_the_information_makes_room_for_a_kernel_in_low_memory(image: Path) -> None:
    header = elves.multiboot_header()
    for gpa, size in ((0x9_E000, 0x1000), (0x9_0000, 0x10_0000), (0x1000, 0x9_F000)):
        image.write_bytes(elves.elf(header, gpa=gpa, memory_bytes=size))
        guest = load_file(image)
        disjoint(guest)
        assert told(guest).word(0), "it can be read"
    image.write_bytes(elves.kernel())
    assert told(load_file(image)).at < CONVENTIONAL_END
    assert told(load_file(image)).at >= CONVENTIONAL_END - 4096


def disjoint(guest: Guest) -> None:
    """No two pieces overlap, and all are in RAM."""
    end = 0
    for gpa, data in sorted(guest.pieces):
        assert gpa >= end
        end = gpa + len(data)
    assert end <= guest.needs.ram_bytes


# --- ELF without a header of Multiboot ----------------------------------------------------------


def test_64_bits_start_in_long_mode_with_stack_gdt_and_all_of_4_gib(image: Path) -> None:
    image.write_bytes(elves.elf(elves.LONG_MODE, 64))
    guest = load_file(image)
    result = run(guest)
    assert (result.exit.reason, result.console) == ("done", "\x146"), result.exit
    assert guest.start is not None
    memory = Memory(guest)
    assert memory.read(guest.start["gdtr_base"], 4096) == GDT_64
    pml4 = guest.start["cr3"]
    pml4_entries = struct.unpack("<512Q", memory.read(pml4, 4096))
    assert not any(pml4_entries[1:])
    pdpt = struct.unpack("<512Q", memory.read(pml4_entries[0] & ~0xFFF, 4096))
    assert not any(pdpt[4:])
    for gib in range(4):
        directory = struct.unpack("<512Q", memory.read(pdpt[gib] & ~0xFFF, 4096))
        wanted = [(gib << 30) + (page << 21) | 0x87 for page in range(512)]
        assert list(directory) == wanted


def test_32_bits_start_in_protected_mode_with_stack_and_gdt(image: Path) -> None:
    image.write_bytes(elves.elf(elves.PROTECTED_MODE))
    guest = load_file(image)
    assert guest.start is not None
    assert guest.start["rsp"] % 16 == 12
    assert Memory(guest).read(guest.start["gdtr_base"], 4096) == GDT_32
    result = run(guest)
    assert (result.exit.reason, result.console) == ("done", "3"), result.exit


def test_the_entry_may_be_a_physical_address(image: Path) -> None:
    image.write_bytes(elves.elf(b"\xf4" * 64, address=0xC010_0000, entry=GPA + 63))
    guest = load_file(image)
    assert guest.start is not None
    assert guest.start["rip"] == GPA + 63
    image.write_bytes(elves.elf(b"\xf4" * 64, address=0xC010_0000, entry=GPA + 64))
    with pytest.raises(LoadError, match="starts at 0x100040, where none"):
        load_file(image)


def test_physical_addresses_count_and_bss_is_zero(image: Path) -> None:
    """The kernel is linked for the upper half, the entry is taken to where it lies."""
    data = (elves.PT_LOAD, 3 * MIB, b"data")
    image.write_bytes(
        elves.elf(
            b"\xf4" * 64,
            64,
            gpa=2 * MIB,
            address=0xFFFF_FFFF_8020_0000,
            entry=0xFFFF_FFFF_8020_0010,
            memory_bytes=0x1000,
            more=(data,),
        )
    )
    guest = load_file(image, ram_bytes=16 * MIB, vcpus=3)
    assert guest.start is not None
    assert guest.start["rip"] == 2 * MIB + 0x10
    assert guest.needs == guests.Needs(vcpus=3, ram_bytes=16 * MIB, gsi0="ioapic-pin-2")
    with ModelVm(ram_bytes=guest.needs.ram_bytes) as vm:
        vm.write_memory(2 * MIB, b"\xcc" * 0x2000)
        vm.load(guest)
        assert vm.read_memory(2 * MIB, 0x1000) == b"\xf4" * 64 + bytes(0x1000 - 64)
        assert vm.read_memory(2 * MIB + 0x1000, 1) == b"\xcc"
        assert vm.read_memory(3 * MIB, 4) == b"data"


# --- what is refused ----------------------------------------------------------------------------

GOOD = elves.elf(b"\xf4" * 16)
MULTIBOOT2 = struct.pack("<4I", 0xE852_50D6, 0, 16, -(0xE852_50D6 + 16) & 0xFFFF_FFFF)


def patched(image: bytes, offset: int, data: bytes) -> bytes:
    return image[:offset] + data + image[offset + len(data) :]


def pe() -> bytes:
    return patched(patched(b"MZ" + bytes(200), 0x3C, b"\x80"), 0x80, b"PE\0\0")


def by_addresses(*fields: int) -> bytes:
    return elves.multiboot_header(1 << 16, *fields) + b"\xf4" * 16


REFUSED = {
    "is an ELF for AArch64": elves.elf(b"\xf4", 64, machine=elves.EM_AARCH64),
    "is an ELF for machine 999": elves.elf(b"\xf4", machine=999),
    "is an ELF of 64 bits for i386": elves.elf(b"\xf4", 64, machine=elves.EM_386),
    "is an x32 ELF": elves.elf(b"\xf4", 32, machine=elves.EM_X86_64),
    "is an ELF relocatable": elves.elf(b"\xf4", type_=elves.ET_REL),
    "position-independent program: link it for": elves.elf(b"\xf4", 64, type_=elves.ET_DYN),
    "is an ELF core dump": elves.elf(b"\xf4", 64, type_=elves.ET_CORE),
    "is an ELF of type 77": elves.elf(b"\xf4", type_=77),
    "is a dynamically linked program": elves.elf(
        b"\xf4", 64, more=((elves.PT_INTERP, 0, b"/lib/ld.so"),)
    ),
    "is a big-endian ELF": patched(GOOD, 5, b"\2"),
    "is an ELF of the unknown class 7": patched(GOOD, 4, b"\7"),
    "is cut off: its ELF header would end at byte 16, the file at 8": GOOD[:8],
    "is cut off: its ELF header would end at byte 52, the file at 40": GOOD[:40],
    "is cut off: its ELF program headers would end at byte 84": GOOD[:60],
    "is cut off: its ELF segment 0 would end at byte 100, the file at 99": GOOD[:-1],
    "has ELF program headers of 31 bytes": patched(GOOD, 42, b"\x1f"),
    "is an ELF with nothing to load": patched(GOOD, 44, b"\0\0"),
    "has 0x10 bytes for ELF segment 0, which takes only 0x8": elves.elf(
        b"\xf4" * 16, memory_bytes=8
    ),
    "starts at 0x5000, where none": elves.elf(b"\xf4", entry=0x5000),
    r"loaded segment 0 at 0x8000000 to 0x8000001, but RAM ends at 0x8000000: give": elves.elf(
        b"\xf4", gpa=128 * MIB
    ),
    r"loaded segment 1 at 0x100008 to 0x100010, over its loaded segment 0": elves.elf(
        b"\xf4" * 16, more=((elves.PT_LOAD, GPA + 8, bytes(8)),)
    ),
    "loaded segment 1 at 0xfffff to 0x100001, over its loaded segment 0": elves.elf(
        b"\xf4" * 16, more=((elves.PT_LOAD, GPA - 1, bytes(2)),)
    ),
    "has only a Multiboot 2 header": elves.elf(MULTIBOOT2),
    "has a Multiboot header without addresses": elves.multiboot_header() + b"\xf4",
    "is cut off within its Multiboot header": by_addresses(GPA, GPA, 0, 0, GPA)[:24],
    "has its Multiboot header at byte 0 and wants it at 0x100010": by_addresses(
        GPA + 16, GPA, 0, 0, GPA
    ),
    "its Multiboot header wants bytes 0 to 512, the file has 48": by_addresses(
        GPA, GPA, GPA + 512, 0, GPA
    ),
    "ends its bss at 0x100008, before its data": by_addresses(GPA, GPA, 0, GPA + 8, GPA),
    "starts at 0x1, where nothing": by_addresses(GPA, GPA, 0, 0, 1),
    "is a gzip file: unpack it": gzip.compress(GOOD),
    "is an xz file": b"\xfd7zXZ\0" + bytes(100),
    "is a PE, a Windows or UEFI program": pe(),
    "is a script": b"#!/bin/sh\nexit\n",
    "is a text file": b"  mov ax, 5\n\thlt\n",
    "is an archive of object files": b"!<arch>\nabc",
}


@pytest.mark.parametrize("words", REFUSED)
def test_a_wrong_file_is_told_what_it_is(image: Path, words: str) -> None:
    image.write_bytes(REFUSED[words])
    with pytest.raises(LoadError) as caught:
        load_file(image)
    assert str(caught.value).startswith(f"{str(image)!r} ")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_looks_like_another_format_is_flat_if_it_is_given_a_place(image: Path) -> None:
    for looks in (pe(), b"#!hlt", elves.multiboot_header()):
        image.write_bytes(looks)
        assert load_file(image, 0x8000).image == looks


def test_a_header_counts_only_where_it_may_be(image: Path) -> None:
    """Aligned to 4 bytes, whole within the first 8192."""
    for before, found in ((0, True), (2, False), (8192 - 32, True), (8192 - 28, None)):
        header = elves.multiboot_header(1 << 16, GPA, GPA, 0, 0, GPA + 8)
        image.write_bytes(bytes(before) + header + bytes(4))
        if found is None:
            with pytest.raises(LoadError, match="is cut off within its Multiboot header"):
                load_file(image)
        else:
            assert (load_file(image).start is not None) == found


# --- anything at all ----------------------------------------------------------------------------

SEEDS = {
    "multiboot": elves.kernel(),
    "multiboot 64": elves.kernel(bits=64),
    "addresses": elves.kludge(bss_bytes=100),
    "long mode": elves.elf(
        elves.LONG_MODE, 64, memory_bytes=0x2000, more=((elves.PT_LOAD, 5 * MIB, bytes(64)),)
    ),
    "protected mode": elves.elf(elves.PROTECTED_MODE),
}
NUMBERS = st.one_of(
    st.binary(min_size=1, max_size=8),
    st.sampled_from(
        (b"\xff" * 4, b"\0" * 4, b"\xff" * 8, b"\0\0\0\x80", GPA.to_bytes(8, "little"))
    ),
)


@pytest.mark.parametrize("seed", SEEDS)
@given(data=st.data())
def test_damaged_files_load_or_are_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, seed: str, data: st.DataObject
) -> None:
    good = bytes(SEEDS[seed])
    size = data.draw(st.one_of(st.just(len(good)), st.integers(1, len(good))), label="size")
    damaged = good[:size]
    for _ in range(data.draw(st.integers(0, 3), label="changes")):
        damaged = patched(damaged, data.draw(st.integers(0, size - 1)), data.draw(NUMBERS))
    image = tmp_path_factory.getbasetemp() / "damaged"
    image.write_bytes(damaged)
    refusal = guest = None
    try:
        guest = load_file(image, ram_bytes=8 * MIB)
    except LoadError as error:
        refusal = str(error)
    if guest is None:
        assert refusal is not None
        assert refusal.startswith(repr(str(image)))
        assert "\n" not in refusal
    elif guest.start is None:
        assert guest.image == damaged
    else:
        disjoint(guest)
        rip = guest.start["rip"]
        assert any(gpa <= rip < gpa + len(contents) for gpa, contents in guest.pieces)
