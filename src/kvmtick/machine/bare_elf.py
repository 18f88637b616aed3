"""ELF programs without a Multiboot header: entered as a C function is, in the mode of their class.

64 bits: long mode, the first 4 GiB mapped to themselves (pages of 2 MiB, all of them writable and
executable, for supervisor and user), so that RAM, the local APICs and the IOAPIC are reached by
their physical addresses. 32 bits: protected mode without paging. In both the segments are flat and
a GDT holds them, there is no IDT, and interrupts are off. The stack has 64 KiB and is aligned as
the System V psABI wants it behind a call; there is nothing to return to, the guest ends by port
0xf4. Page tables, GDT and stack lie at the end of conventional memory.
"""

import struct

from kvmtick.cpu.paging import PAGE_BYTES, PAGE_SIZE
from kvmtick.guests import start
from kvmtick.machine.elf import parse_elf, place_segments
from kvmtick.machine.layout import ImageError, Layout

__all__ = ["load_bare_elf"]

STACK_BYTES = 64 << 10
ENTRIES = 512
LARGE_PAGE_SHIFT = 21
GIBS = 4

PRESENT_WRITABLE_USER = 0x7


def load_bare_elf(image: bytes, layout: Layout) -> dict[str, int]:
    """Place the program; returns the state it starts in. ImageError if it cannot run or not fit."""
    elf = parse_elf(image)
    if (elf.bits, elf.machine) == (32, "x86-64"):
        raise ImageError("is an x32 ELF without a Multiboot header: link it for 32 or 64 bits")
    place_segments(elf, layout)
    stack = layout.low(STACK_BYTES)
    layout.put("stack", stack, b"", STACK_BYTES)
    return_address_bytes = elf.bits // 8
    rsp = stack + STACK_BYTES - return_address_bytes
    gdt = start.GDT_64 if elf.bits == 64 else start.GDT_32
    gdtr_base = layout.low(len(gdt))
    layout.put("GDT", gdtr_base, gdt)
    gdtr_limit = len(gdt) - 1
    if elf.bits == 32:
        return start.protected(elf.entry, rsp=rsp, gdtr_base=gdtr_base, gdtr_limit=gdtr_limit)
    cr3 = layout.low((2 + GIBS) * PAGE_BYTES)
    layout.put("page tables", cr3, _identity_map(cr3))
    return start.long_mode(elf.entry, cr3, rsp=rsp, gdtr_base=gdtr_base, gdtr_limit=gdtr_limit)


def _identity_map(at: int) -> bytes:
    """A PML4, a PDPT and four page directories, for address `at` (SDM vol. 3A, 5.5)."""
    pdpt, directories = at + PAGE_BYTES, at + 2 * PAGE_BYTES
    tables = _table([pdpt | PRESENT_WRITABLE_USER])
    tables += _table(
        [directories + gib * PAGE_BYTES | PRESENT_WRITABLE_USER for gib in range(GIBS)]
    )
    large_page = PAGE_SIZE | PRESENT_WRITABLE_USER
    return tables + _table(
        [page << LARGE_PAGE_SHIFT | large_page for page in range(GIBS * ENTRIES)]
    )


def _table(entries: list[int]) -> bytes:
    """The entries, and empty ones up to a whole table."""
    count = max(len(entries), ENTRIES)
    return struct.pack(f"<{count}Q", *entries, *[0] * (count - len(entries)))
