"""Linux kernels: the bzImage's header, where its parts go, and what the kernel is told.

Implements the Linux x86 boot protocol (Documentation/arch/x86/boot.rst), versions 2.06 and later:
the setup header, the kernel in high memory at its preferred address, command line, initial RAM
disk, zero page (zero-page.rst) with the E820 memory map, and the 32-bit and the 64-bit entry. The
kernel finds the tables of `kvmtick.machine.pc.acpi` and `kvmtick.machine.pc.mptable` where a PC's
firmware has them.

Not modelled: zImages, protocols before 2.06 (Linux 2.6.22), the 16-bit entry (there is no BIOS to
call), EFI and its handover, 5-level paging at the entry, setup_data, a kernel above 4 GiB.
"""

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kvmtick.cpu.paging import PAGE_BYTES
from kvmtick.guests import Guest, Needs, start
from kvmtick.guests.needs import KVM_MAX_VCPUS
from kvmtick.machine.elf import ELF_MAGIC
from kvmtick.machine.image_file import LoadError, read_image
from kvmtick.machine.layout import ImageError, Layout
from kvmtick.machine.memory import MOST_RAM_BYTES, check_ram_bytes
from kvmtick.machine.pc.acpi import acpi_tables
from kvmtick.machine.pc.e820 import BIOS_START, EBDA_START, memory_map
from kvmtick.machine.pc.mptable import mp_tables

__all__ = ["LINUX_RAM_BYTES", "SetupHeader", "is_linux", "linux_guest", "load_linux"]

LINUX_RAM_BYTES: Final = 256 << 20
REMEDY: Final = "give a Linux bzImage, such as /boot/vmlinuz"

HEADER_MAGIC, MAGIC_AT = b"HdrS", 0x202
BOOT_FLAG, BOOT_FLAG_AT = b"\x55\xaa", 0x1FE
SECTOR_BYTES: Final = 512
HEADER_START: Final = 0x1F1
PROTOCOL_2_06, PROTOCOL_2_10, PROTOCOL_2_12 = 0x206, 0x20A, 0x20C
DEFAULT_SETUP_SECTS: Final = 4
LOADED_HIGH: Final = 1 << 0
XLF_KERNEL_64: Final = 1 << 0
ENTRY_64_OFFSET: Final = 0x200

UNDEFINED_LOADER: Final = 0xFF
ACPI_RSDP_ADDR, E820_ENTRIES, TYPE_OF_LOADER, E820_TABLE = 0x70, 0x1E8, 0x210, 0x2D0
CODE32_START, RAMDISK_IMAGE, CMD_LINE_PTR = 0x214, 0x218, 0x228

BDA_EBDA_SEGMENT, BDA_MEMORY_KIB = 0x40E, 0x413
GDT_AT, ZERO_PAGE_AT, PAGE_TABLES_AT, COMMAND_LINE_AT = 0x1000, 0x7000, 0x9000, 0x2_0000
"""In conventional memory; of no matter once the kernel has begun."""
ACPI_AT, MP_TABLES_AT = BIOS_START, BIOS_START + 0x8000

PRESENT_WRITABLE, LARGE_PAGE = 0x3, 0x80
LARGE_PAGE_BYTES: Final = 2 << 20
IDENTITY_GIB: Final = 4


@dataclass(frozen=True, slots=True)
class SetupHeader:
    """What a loader needs of the setup header (boot.rst, "Details of Header Fields"). Fields the
    kernel's protocol does not have are 0.
    """

    kernel_offset: int
    """Of the protected-mode kernel in the file."""
    end: int
    """Of the header in the file."""
    version: int
    load_at: int
    """pref_address, or where a kernel before 2.10 goes: code32_start."""
    initrd_addr_max: int
    xloadflags: int
    cmdline_size: int
    room_bytes: int
    """What the kernel needs from `load_at` on: init_size or its size."""


def load_linux(
    kernel: Path,
    *,
    initrd: bytes = b"",
    append: str = "",
    ram_bytes: int | None = None,
    vcpus: int = 1,
    entry: str | None = None,
) -> Guest:
    """A Linux kernel as a guest of 256 MiB unless `ram_bytes` says otherwise. LoadError, one line,
    if the file is no bzImage or something does not fit.

    `append` is its command line, `initrd` an initramfs or another initial RAM disk. `entry`: "64"
    or "32"; None: 64-bit where the kernel has that.
    """
    image = read_image(kernel, REMEDY)
    try:
        return linux_guest(kernel.name, image, initrd, append, ram_bytes, vcpus, entry)
    except ImageError as error:
        raise LoadError(f"{str(kernel)!r} {error}") from None


def is_linux(image: bytes) -> bool:
    """It has a setup header of protocol 2.00 or later."""
    return image[MAGIC_AT : MAGIC_AT + 4] == HEADER_MAGIC


def linux_guest(
    name: str,
    image: bytes,
    initrd: bytes = b"",
    append: str = "",
    ram_bytes: int | None = None,
    vcpus: int = 1,
    entry: str | None = None,
) -> Guest:
    """`load_linux` with the file's contents. ImageError if they cannot be run."""
    ram_bytes = LINUX_RAM_BYTES if ram_bytes is None else ram_bytes
    _check_machine(vcpus, ram_bytes)
    header = parse_header(image)
    command_line = os.fsencode(append)
    _check_command_line(command_line, header)
    wants_64 = _is_64_bit_entry(entry, header)
    layout = Layout(ram_bytes)
    kernel_end = header.load_at + header.room_bytes
    if kernel_end > ram_bytes:
        remedy = f"give --ram {-(-kernel_end >> 20)}M or more"
        raise ImageError(
            f"needs RAM up to {kernel_end:#x}, and RAM ends at {ram_bytes:#x}:"
            f" {remedy if kernel_end <= MOST_RAM_BYTES else REMEDY}"
        )
    layout.put("kernel", header.load_at, image[header.kernel_offset :])
    initrd_at = _initrd_place(len(initrd), header, ram_bytes)
    layout.put("initrd", initrd_at, initrd)
    layout.put("command line", COMMAND_LINE_AT, command_line + b"\0")
    zero_page = _zero_page(image, header, initrd_at, len(initrd), ram_bytes)
    layout.put("zero page", ZERO_PAGE_AT, zero_page)
    _put_firmware(layout, vcpus)
    registers = _entry_64(layout, header) if wants_64 else _entry_32(layout, header)
    needs = Needs(vcpus=vcpus, ram_bytes=ram_bytes, gsi0="ioapic-pin-2")
    return Guest(name, b"", 0, (0, 0), None, needs, layout.pieces, registers, has_rate=False)


def parse_header(image: bytes) -> SetupHeader:
    """The setup header. ImageError if the file is no whole bzImage or its protocol is too old."""
    if image.startswith(ELF_MAGIC):
        raise ImageError(f"is an ELF file, as a vmlinux is: {REMEDY}")
    if not is_linux(image) or image[BOOT_FLAG_AT : BOOT_FLAG_AT + 2] != BOOT_FLAG:
        raise ImageError(f"is no Linux bzImage: {REMEDY}")
    (version,) = struct.unpack_from("<H", image.ljust(MAGIC_AT + 6, b"\0"), MAGIC_AT + 4)
    if version < PROTOCOL_2_06:
        raise ImageError(
            f"has boot protocol {version >> 8}.{version & 0xFF:02d}, and 2.06 is the first that"
            " is known here: give Linux 2.6.22 or later"
        )
    kernel_offset = ((image[HEADER_START] or DEFAULT_SETUP_SECTS) + 1) * SECTOR_BYTES
    (syssize,) = struct.unpack_from("<I", image, 0x1F4)
    file_bytes = kernel_offset + 16 * syssize
    if len(image) < file_bytes or not syssize:
        raise ImageError(
            f"is cut off: its header says {file_bytes} bytes, the file has {len(image)}:"
            " give the whole file"
        )
    if not image[0x211] & LOADED_HIGH:
        raise ImageError(f"is a zImage, for low memory: {REMEDY}")
    code32_start, initrd_addr_max = (
        struct.unpack_from("<I", image, at)[0] for at in (CODE32_START, 0x22C)
    )
    (xloadflags, cmdline_size) = struct.unpack_from("<HI", image, 0x236)
    load_at, room_bytes = code32_start, len(image) - kernel_offset
    if version >= PROTOCOL_2_10:
        (load_at, init_size) = struct.unpack_from("<QI", image, 0x258)
        room_bytes = max(room_bytes, init_size)
    if load_at < 1 << 20:
        raise ImageError(f"wants to be loaded at {load_at:#x}, below 1 MiB: {REMEDY}")
    return SetupHeader(
        kernel_offset,
        MAGIC_AT + image[MAGIC_AT - 1],
        version,
        load_at,
        initrd_addr_max,
        xloadflags if version >= PROTOCOL_2_12 else 0,
        cmdline_size,
        room_bytes,
    )


def _check_machine(vcpus: int, ram_bytes: int) -> None:
    if not 1 <= vcpus <= KVM_MAX_VCPUS:
        raise ImageError(f"cannot have vcpus={vcpus}: give 1 to {KVM_MAX_VCPUS}")
    try:
        check_ram_bytes(ram_bytes)
    except ValueError as error:
        raise ImageError(f"cannot have {error}") from None


def _check_command_line(command_line: bytes, header: SetupHeader) -> None:
    if len(command_line) > header.cmdline_size:
        raise ImageError(
            f"takes a command line of {header.cmdline_size} bytes, and with --append it has"
            f" {len(command_line)}: give a shorter one"
        )
    if b"\0" in command_line:
        raise ImageError("takes a command line without zero bytes: leave them out of --append")


def _is_64_bit_entry(entry: str | None, header: SetupHeader) -> bool:
    has_64 = bool(header.xloadflags & XLF_KERNEL_64)
    if entry not in (None, "32", "64"):
        raise ImageError(f"has no entry {entry!r}: give 32 or 64")
    if entry == "64" and not has_64:
        raise ImageError("has no 64-bit entry: give entry 32 or a 64-bit kernel")
    return has_64 and entry != "32"


def _initrd_place(size_bytes: int, header: SetupHeader, ram_bytes: int) -> int:
    """As high as RAM and `initrd_addr_max` allow, on a page; 0 without one."""
    if not size_bytes:
        return 0
    kernel_end = header.load_at + header.room_bytes
    end = min(ram_bytes, header.initrd_addr_max + 1)
    at = (end - size_bytes) & -PAGE_BYTES
    if at < kernel_end:
        raise ImageError(
            f"leaves {max(0, end - kernel_end)} bytes for an initrd, from {kernel_end:#x} to"
            f" {end:#x}, and it has {size_bytes}: give more --ram or a smaller initrd"
        )
    return at


def _zero_page(
    image: bytes, header: SetupHeader, initrd_at: int, initrd_bytes: int, ram_bytes: int
) -> bytes:
    """struct boot_params: the kernel's setup header, filled in, and the memory map."""
    page = bytearray(PAGE_BYTES)
    header_end = min(header.end, E820_TABLE)
    page[HEADER_START:header_end] = image[HEADER_START:header_end]
    page[TYPE_OF_LOADER] = UNDEFINED_LOADER
    struct.pack_into("<I", page, CODE32_START, header.load_at)
    struct.pack_into("<II", page, RAMDISK_IMAGE, initrd_at, initrd_bytes)
    struct.pack_into("<I", page, CMD_LINE_PTR, COMMAND_LINE_AT)
    struct.pack_into("<Q", page, ACPI_RSDP_ADDR, ACPI_AT)
    ranges = memory_map(ram_bytes)
    page[E820_ENTRIES] = len(ranges)
    table = b"".join(part.entry() for part in ranges)
    page[E820_TABLE : E820_TABLE + len(table)] = table
    return bytes(page)


def _put_firmware(layout: Layout, vcpus: int) -> None:
    """What a PC's firmware leaves behind: its tables, and where conventional memory ends."""
    layout.put("EBDA's segment", BDA_EBDA_SEGMENT, struct.pack("<H", EBDA_START >> 4))
    layout.put("memory size", BDA_MEMORY_KIB, struct.pack("<H", EBDA_START >> 10))
    layout.put("ACPI tables", ACPI_AT, acpi_tables(ACPI_AT, vcpus))
    layout.put("MP tables", MP_TABLES_AT, mp_tables(MP_TABLES_AT, vcpus))


def _entry_32(layout: Layout, header: SetupHeader) -> dict[str, int]:
    """boot.rst, "32-bit Boot Protocol"."""
    layout.put("GDT", GDT_AT, start.GDT_32)
    return start.protected(
        header.load_at,
        rsi=ZERO_PAGE_AT,
        rbp=0,
        rdi=0,
        rbx=0,
        gdtr_base=GDT_AT,
        gdtr_limit=len(start.GDT_32) - 1,
    )


def _entry_64(layout: Layout, header: SetupHeader) -> dict[str, int]:
    """boot.rst, "64-bit Boot Protocol"."""
    layout.put("GDT", GDT_AT, start.GDT_64)
    layout.put("page tables", PAGE_TABLES_AT, _identity_map(PAGE_TABLES_AT))
    return start.long_mode(
        header.load_at + ENTRY_64_OFFSET,
        PAGE_TABLES_AT,
        rsi=ZERO_PAGE_AT,
        gdtr_base=GDT_AT,
        gdtr_limit=len(start.GDT_64) - 1,
    )


def _identity_map(at: int) -> bytes:
    """Page tables for address `at` that map the first 4 GiB to themselves by 2 MiB pages: a PML4, a
    page-directory-pointer table, page directories.
    """
    pdpt = at + PAGE_BYTES
    directories = [pdpt + PAGE_BYTES * (index + 1) for index in range(IDENTITY_GIB)]
    pages = range(0, IDENTITY_GIB << 30, LARGE_PAGE_BYTES)
    return (
        struct.pack("<Q", pdpt | PRESENT_WRITABLE).ljust(PAGE_BYTES, b"\0")
        + b"".join(struct.pack("<Q", one | PRESENT_WRITABLE) for one in directories).ljust(
            PAGE_BYTES, b"\0"
        )
        + b"".join(struct.pack("<Q", page | PRESENT_WRITABLE | LARGE_PAGE) for page in pages)
    )
