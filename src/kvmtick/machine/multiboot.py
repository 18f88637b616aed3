"""Multiboot 1 kernels: their header, and what they are told.

Implements version 0.6.96 of the Multiboot specification: the header (3.1) with its magic and
address fields, the machine state (3.2) and the boot information (3.3): memory, command line,
modules, memory map and boot loader name. Kernels are ELF files, of 64 bits too (entered in 32-bit
mode like all others), or, with address fields, anything.

The command line begins with the kernel's file name, a module's string with the module's. The
information goes to the end of conventional memory, modules to whole pages behind the kernel.

Not modelled, and absent from the information: boot device, symbols and section headers, drives,
ROM configuration table, APM, VBE and framebuffer; a kernel that requires a video mode is refused.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from kvmtick.guests import start
from kvmtick.machine.elf import ELF_MAGIC, parse_elf, place_segments
from kvmtick.machine.layout import ImageError, Layout
from kvmtick.machine.pc.e820 import EBDA_START, memory_map

__all__ = ["BootOptions", "Header", "find_header", "load_multiboot"]

SEARCH_BYTES = 8192
HEADER_MAGIC = 0x1BAD_B002
BOOTLOADER_MAGIC = 0x2BAD_B002
MULTIBOOT2_MAGIC = 0xE852_50D6
U32 = 0xFFFF_FFFF

ALIGN_MODULES, MEMORY_INFO, VIDEO_MODE = 1 << 0, 1 << 1, 1 << 2
REQUIRED = 0xFFFF
ADDRESSES = 1 << 16

INFO_MEMORY, INFO_COMMAND_LINE, INFO_MODULES = 1 << 0, 1 << 2, 1 << 3
INFO_MEMORY_MAP, INFO_LOADER_NAME = 1 << 6, 1 << 9
LOADER_NAME = b"kvmtick\0"

KIB, MIB = 1 << 10, 1 << 20

INFO = struct.Struct("<7I16x2I12xI48x")
"""flags, mem_lower, mem_upper, boot_device, cmdline, mods_count, mods_addr, mmap_length, mmap_addr,
boot_loader_name."""
MODULE = struct.Struct("<4I")
MAP_ENTRY = struct.Struct("<IQQI")


@dataclass(frozen=True, slots=True)
class Header:
    """The Multiboot header; the address fields are those of a kernel with `ADDRESSES`."""

    offset: int
    flags: int
    header_addr: int = 0
    load_addr: int = 0
    load_end_addr: int = 0
    bss_end_addr: int = 0
    entry_addr: int = 0


def find_header(image: bytes) -> Header | None:
    """The header in the file's first 8192 bytes. ImageError for one that asks for what we cannot
    give or is not whole there, and for a kernel that has only a Multiboot 2 header.
    """
    area = image[:SEARCH_BYTES]
    is_multiboot2 = False
    for offset in range(0, len(area) - 11, 4):
        magic, flags, checksum = struct.unpack_from("<3I", area, offset)
        if magic == HEADER_MAGIC and not (magic + flags + checksum) & U32:
            _check_required(flags)
            if not flags & ADDRESSES:
                return Header(offset, flags)
            if offset + 32 > len(area):
                raise ImageError(f"is cut off within its Multiboot header, at byte {offset}")
            return Header(offset, flags, *struct.unpack_from("<5I", area, offset + 12))
        checksum2 = int.from_bytes(area[offset + 12 : offset + 16], "little")
        if magic == MULTIBOOT2_MAGIC and not (magic + flags + checksum + checksum2) & U32:
            is_multiboot2 = True
    if is_multiboot2:
        raise ImageError("has only a Multiboot 2 header: give it one of Multiboot 1")
    return None


def _check_required(flags: int) -> None:
    if flags & VIDEO_MODE:
        raise ImageError("asks for a video mode (Multiboot flag 2), and this PC has no display")
    unknown = flags & REQUIRED & ~(ALIGN_MODULES | MEMORY_INFO)
    if unknown:
        raise ImageError(f"asks for Multiboot flags {unknown:#x} that version 0.6.96 does not have")


@dataclass(frozen=True, slots=True)
class BootOptions:
    """What a kernel is told."""

    ram_bytes: int
    command_line: bytes
    modules: Sequence[tuple[bytes, bytes]] = ()
    """Each with its contents and its string."""


def load_multiboot(
    image: bytes, header: Header, layout: Layout, options: BootOptions
) -> dict[str, int]:
    """Place a kernel, its modules and the boot information; returns the state it starts in.
    ImageError if something does not fit.
    """
    entry = _load_kernel(image, header, layout)
    modules = []
    for contents, string in options.modules:
        gpa = layout.high(len(contents))
        layout.put("module", gpa, contents)
        modules.append((gpa, gpa + len(contents), string))
    at = layout.low(len(_information(0, options, modules)))
    layout.put("boot information", at, _information(at, options, modules))
    return start.protected(entry, rax=BOOTLOADER_MAGIC, rbx=at)


def _load_kernel(image: bytes, header: Header, layout: Layout) -> int:
    """Place the kernel; returns its entry point. Address fields come before an ELF header."""
    if header.flags & ADDRESSES:
        return _load_by_addresses(image, header, layout)
    if not image.startswith(ELF_MAGIC):
        raise ImageError(
            "has a Multiboot header without addresses (flag 16) and is no ELF: give its ELF file"
        )
    elf = parse_elf(image)
    place_segments(elf, layout)
    return elf.entry


def _load_by_addresses(image: bytes, header: Header, layout: Layout) -> int:
    """The part of the file from `load_addr` to `load_end_addr`, with zeros up to `bss_end_addr`."""
    first = header.offset - (header.header_addr - header.load_addr)
    if not 0 <= first <= header.offset:
        raise ImageError(
            f"has its Multiboot header at byte {header.offset} and wants it at"
            f" {header.header_addr:#x}, with the file's text from {header.load_addr:#x} on"
        )
    last = len(image)
    if header.load_end_addr:
        last = first + header.load_end_addr - header.load_addr
    if not header.offset < last <= len(image):
        raise ImageError(
            f"is cut off: its Multiboot header wants bytes {first} to {last}, the file has"
            f" {len(image)}"
        )
    load_end = header.load_addr + last - first
    bss_end = header.bss_end_addr or load_end
    if bss_end < load_end:
        raise ImageError(f"ends its bss at {bss_end:#x}, before its data at {load_end:#x}")
    if not header.load_addr <= header.entry_addr < bss_end:
        raise ImageError(f"starts at {header.entry_addr:#x}, where nothing of it is loaded")
    size_bytes = bss_end - header.load_addr
    layout.put("kernel", header.load_addr, image[first:last], size_bytes)
    return header.entry_addr


def _information(at: int, options: BootOptions, modules: Sequence[tuple[int, int, bytes]]) -> bytes:
    """The boot information for address `at`, and all it points to but the contents of `modules`:
    start, end and string of each.
    """
    memory_map = _memory_map(options.ram_bytes)
    mmap_at = at + INFO.size
    mods_at = mmap_at + len(memory_map)
    strings_at = mods_at + MODULE.size * len(modules)
    strings = bytearray(LOADER_NAME)
    command_line_at = strings_at + len(strings)
    strings += options.command_line + b"\0"
    entries = bytearray()
    for start_gpa, end_gpa, string in modules:
        entries += MODULE.pack(start_gpa, end_gpa, strings_at + len(strings), 0)
        strings += string + b"\0"
    info = INFO.pack(
        INFO_MEMORY | INFO_COMMAND_LINE | INFO_MODULES | INFO_MEMORY_MAP | INFO_LOADER_NAME,
        EBDA_START // KIB,
        max(0, options.ram_bytes - MIB) // KIB,
        0,
        command_line_at,
        len(modules),
        mods_at,
        len(memory_map),
        mmap_at,
        strings_at,
    )
    return info + memory_map + bytes(entries) + bytes(strings)


def _memory_map(ram_bytes: int) -> bytes:
    size_field = MAP_ENTRY.size - 4
    return b"".join(
        MAP_ENTRY.pack(size_field, part.start, part.end - part.start, part.kind)
        for part in memory_map(ram_bytes)
    )
