"""ELF executables for x86: what is in their headers, and which are none a PC can start.

Implements chapters 4 (ELF header) and 5 (program header) of the System V gABI, edition 4.1, with
the numbers of its i386 and x86-64 supplements. Segments go to their physical addresses (`p_paddr`),
and an entry that lies in a segment's virtual addresses is taken to its physical ones; it may also
be physical already.

Not modelled: relocation (shared objects and position-independent programs are refused), sections,
symbols, more than 65534 segments.
"""

import struct
from dataclasses import dataclass

from kvmtick.machine.layout import ImageError, Layout

__all__ = ["ELF_MAGIC", "Elf", "Segment", "parse_elf", "place_segments"]

ELF_MAGIC = b"\x7fELF"

IDENT_BYTES = 16
EI_CLASS, EI_DATA = 4, 5
CLASS_BITS = {1: 32, 2: 64}
ELFDATA2LSB = 1

HEADERS = {32: struct.Struct("<HHIIIIIHHHHHH"), 64: struct.Struct("<HHIQQQIHHHHHH")}
"""e_type, e_machine, e_version, e_entry, e_phoff, e_shoff, e_flags, e_ehsize, e_phentsize, e_phnum,
e_shentsize, e_shnum, e_shstrndx."""
PROGRAM_HEADERS = {32: struct.Struct("<IIIIIIII"), 64: struct.Struct("<IIQQQQQQ")}

ET_EXEC = 2
TYPES = {
    0: "an ELF file of no type: give a linked executable",
    1: "an ELF relocatable (an object file): link it",
    3: "an ELF shared object or position-independent program:"
    " link it for fixed addresses (-static -no-pie)",
    4: "an ELF core dump: give the executable",
}
MACHINE_BITS = {3: (32,), 62: (32, 64)}
"""EM_386, EM_X86_64; 32 bits of the latter too, for Multiboot kernels that hold both kinds."""
MACHINES = {
    2: "SPARC",
    3: "i386",
    8: "MIPS",
    20: "PowerPC",
    21: "64-bit PowerPC",
    22: "S/390",
    40: "Arm",
    43: "64-bit SPARC",
    50: "IA-64",
    62: "x86-64",
    183: "AArch64",
    243: "RISC-V",
    247: "BPF",
    258: "LoongArch",
}

PT_LOAD, PT_INTERP = 1, 3


@dataclass(frozen=True, slots=True)
class Segment:
    """A PT_LOAD: `data`, then zeros up to `size_bytes`."""

    gpa: int
    address: int
    """Virtual."""
    data: bytes
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Elf:
    """What is needed of an executable to start it; `entry` is guest-physical."""

    bits: int
    machine: str
    entry: int
    segments: list[Segment]


def parse_elf(image: bytes) -> Elf:
    """The headers of a file that begins with `ELF_MAGIC`. ImageError if it is not executable
    x86 code at fixed addresses, cut off, or inconsistent.
    """
    if len(image) < IDENT_BYTES:
        raise _cut_off("its ELF header", IDENT_BYTES, image)
    bits = CLASS_BITS.get(image[EI_CLASS])
    if bits is None:
        raise ImageError(f"is an ELF of the unknown class {image[EI_CLASS]}: give one for x86")
    if image[EI_DATA] != ELFDATA2LSB:
        raise ImageError("is a big-endian ELF: give one for x86")
    header = HEADERS[bits]
    if len(image) < IDENT_BYTES + header.size:
        raise _cut_off("its ELF header", IDENT_BYTES + header.size, image)
    type_, machine, _, entry, phoff, _, _, _, phentsize, phnum, *_ = header.unpack_from(
        image, IDENT_BYTES
    )
    name = MACHINES.get(machine, f"machine {machine}")
    if machine not in MACHINE_BITS:
        raise ImageError(f"is an ELF for {name}: give one for x86")
    if bits not in MACHINE_BITS[machine]:
        raise ImageError(f"is an ELF of {bits} bits for {name}: give one of 32")
    if type_ != ET_EXEC:
        raise ImageError(f"is {TYPES.get(type_, f'an ELF of type {type_}: give an executable')}")
    segments = _segments(image, bits, phoff, phentsize, phnum)
    return Elf(bits, name, _physical(entry, segments), segments)


def place_segments(elf: Elf, layout: Layout) -> None:
    """Put the segments where they belong. ImageError if one does not fit."""
    for index, segment in enumerate(elf.segments):
        layout.put(f"loaded segment {index}", segment.gpa, segment.data, segment.size_bytes)


def _segments(image: bytes, bits: int, phoff: int, phentsize: int, phnum: int) -> list[Segment]:
    header = PROGRAM_HEADERS[bits]
    if phnum and phentsize != header.size:
        raise ImageError(f"has ELF program headers of {phentsize} bytes, not {header.size}")
    if phoff + phnum * header.size > len(image):
        raise _cut_off("its ELF program headers", phoff + phnum * header.size, image)
    segments = []
    for index in range(phnum):
        at = phoff + index * header.size
        if bits == 64:
            type_, _, offset, address, gpa, filesz, memsz, _ = header.unpack_from(image, at)
        else:
            type_, offset, address, gpa, filesz, memsz, _, _ = header.unpack_from(image, at)
        if type_ == PT_INTERP:
            raise ImageError("is a dynamically linked program of an operating system: link -static")
        if type_ != PT_LOAD or not memsz:
            continue
        if filesz > memsz:
            raise ImageError(
                f"has {filesz:#x} bytes for ELF segment {index}, which takes only {memsz:#x}"
            )
        if offset + filesz > len(image):
            raise _cut_off(f"its ELF segment {index}", offset + filesz, image)
        segments.append(Segment(gpa, address, image[offset : offset + filesz], memsz))
    if not segments:
        raise ImageError("is an ELF with nothing to load: give a linked executable")
    return segments


def _physical(entry: int, segments: list[Segment]) -> int:
    """Where the entry point lies in guest-physical memory."""
    for segment in segments:
        if segment.address <= entry < segment.address + segment.size_bytes:
            return entry - segment.address + segment.gpa
    if any(0 <= entry - segment.gpa < segment.size_bytes for segment in segments):
        return entry
    raise ImageError(f"starts at {entry:#x}, where none of its ELF segments is: set the entry")


def _cut_off(what: str, wanted_bytes: int, image: bytes) -> ImageError:
    return ImageError(
        f"is cut off: {what} would end at byte {wanted_bytes}, the file at {len(image)}"
    )
