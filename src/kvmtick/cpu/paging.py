"""Linear addresses to guest-physical ones, by the page tables in guest RAM (Intel SDM vol. 3A,
chapter 4): no paging, 32-bit with 4 MiB pages (PSE, PSE-36), PAE, 4-level and 5-level.

For people who look at a guest that stands: debugger and crash report. Nothing of the guest changes.

Not modelled: protection and reserved bits, accessed and dirty bits, protection keys, the TLB; the
four PDPTEs of PAE are read from memory, not from the registers that MOV to CR3 loaded.
"""

from collections.abc import Callable, Mapping

from kvmtick.cpu.mode import is_long_mode

__all__ = ["PAGE_BYTES", "PhysicalReader", "read_linear", "translate"]

PhysicalReader = Callable[[int, int], bytes | None]
"""`(gpa, size_bytes)`: what is there; None if it is not all RAM."""

PAGE_BYTES = 4096

CR0_PG = 1 << 31
CR4_PSE = 1 << 4
CR4_PAE = 1 << 5
CR4_LA57 = 1 << 12
PRESENT = 1 << 0
PAGE_SIZE = 1 << 7
ADDRESS = 0x000F_FFFF_FFFF_F000
"""Bits 51:12 of an entry: where the next table, or the page, is."""
PDPT_ADDRESS = 0xFFFF_FFE0


def translate(registers: Mapping[str, int], read: PhysicalReader, linear: int) -> int | None:
    """The guest-physical address behind `linear`; None if nothing is mapped there.

    `registers` are those of `Engine.registers`.
    """
    cr0, cr3, cr4 = (registers.get(name, 0) for name in ("cr0", "cr3", "cr4"))
    if is_long_mode(registers):
        levels = 5 if cr4 & CR4_LA57 else 4
        if not _is_canonical(linear, 12 + 9 * levels):
            return None
        return _walk(read, cr3 & ADDRESS, linear, levels)
    linear &= 0xFFFF_FFFF
    if not cr0 & CR0_PG:
        return linear
    if cr4 & CR4_PAE:
        return _walk_pae(read, cr3 & PDPT_ADDRESS, linear)
    return _walk_32_bit(read, cr3, bool(cr4 & CR4_PSE), linear)


def read_linear(
    registers: Mapping[str, int], read: PhysicalReader, linear: int, size_bytes: int
) -> bytes:
    """Up to `size_bytes` at `linear`: less where a page is not mapped or no RAM."""
    data = b""
    while len(data) < size_bytes:
        at = (linear + len(data)) & 0xFFFF_FFFF_FFFF_FFFF
        gpa = translate(registers, read, at)
        length_bytes = min(size_bytes - len(data), PAGE_BYTES - at % PAGE_BYTES)
        part = None if gpa is None else read(gpa, length_bytes)
        if part is None:
            break
        data += part
    return data


def _is_canonical(linear: int, width: int) -> bool:
    return linear >> (width - 1) in (0, (1 << (65 - width)) - 1)


def _entry(read: PhysicalReader, gpa: int, size_bytes: int) -> int | None:
    """A paging-structure entry; None if it is not present, or not in RAM."""
    data = read(gpa, size_bytes)
    entry = 0 if data is None else int.from_bytes(data, "little")
    return entry if entry & PRESENT else None


def _walk(read: PhysicalReader, table: int, linear: int, levels: int) -> int | None:
    """Tables of 512 entries of 8 bytes; those of levels 3 and 2 may map 1 GiB and 2 MiB."""
    for level in range(levels, 0, -1):
        shift = 12 + 9 * (level - 1)
        entry = _entry(read, table + 8 * (linear >> shift & 0x1FF), 8)
        if entry is None:
            return None
        if level == 1 or (level <= 3 and entry & PAGE_SIZE):
            offset = (1 << shift) - 1
            return entry & ADDRESS & ~offset | linear & offset
        table = entry & ADDRESS
    return None


def _walk_pae(read: PhysicalReader, table: int, linear: int) -> int | None:
    entry = _entry(read, table + 8 * (linear >> 30), 8)
    return None if entry is None else _walk(read, entry & ADDRESS, linear, 2)


def _walk_32_bit(read: PhysicalReader, cr3: int, has_large_pages: bool, linear: int) -> int | None:
    pde = _entry(read, (cr3 & 0xFFFF_F000) + 4 * (linear >> 22), 4)
    if pde is None:
        return None
    if has_large_pages and pde & PAGE_SIZE:
        return pde & 0xFFC0_0000 | (pde >> 13 & 0xFF) << 32 | linear & 0x3F_FFFF
    pte = _entry(read, (pde & 0xFFFF_F000) + 4 * (linear >> 12 & 0x3FF), 4)
    return None if pte is None else pte & 0xFFFF_F000 | linear & 0xFFF
