"""States a guest starts in other than real mode, for `Guest.start`: registers over a reset's.

`protected` is the machine state of the Multiboot specification 0.6.96, section 3.2: 32-bit code,
flat segments, no paging. `long_mode` is that of the Linux x86 boot protocol's 64-bit entry: flat
segments, paging on; the SSE instructions compilers use are on too (CR4.OSFXSR). Interrupts are off,
GDTR and IDTR are empty and all else is as after RESET (SDM table 10-1), unless further registers
are given by name: `rax=...`, `gdtr_base=...`.

Access rights of segments are in a VMCS's format (SDM 26.4.1).
"""

from typing import Final

__all__ = ["BOOT_CS", "BOOT_DS", "GDT_32", "GDT_64", "long_mode", "protected"]

BOOT_CS: Final = 0x10
BOOT_DS: Final = 0x18
"""The selectors in CS and in the data segments, those of the Linux boot protocol."""

_CODE_32, _CODE_64, _DATA = 0xC09B, 0xA09B, 0xC093
_LIMIT: Final = 0xFFFF_FFFF

_CR0_PE, _CR0_MP, _CR0_ET, _CR0_NE, _CR0_PG = 1 << 0, 1 << 1, 1 << 4, 1 << 5, 1 << 31
_CR4_PAE, _CR4_OSFXSR, _CR4_OSXMMEXCPT = 1 << 5, 1 << 9, 1 << 10
_EFER_LME, _EFER_LMA = 1 << 8, 1 << 10


def protected(eip: int, **registers: int) -> dict[str, int]:
    """32-bit protected mode at `eip`."""
    return _flat(_CODE_32) | {"rip": eip, "cr0": _CR0_PE | _CR0_ET} | registers


def long_mode(rip: int, cr3: int, **registers: int) -> dict[str, int]:
    """64-bit mode at `rip`, with the page tables at `cr3`."""
    return (
        _flat(_CODE_64)
        | {
            "rip": rip,
            "cr0": _CR0_PG | _CR0_NE | _CR0_ET | _CR0_MP | _CR0_PE,
            "cr3": cr3,
            "cr4": _CR4_OSXMMEXCPT | _CR4_OSFXSR | _CR4_PAE,
            "efer": _EFER_LMA | _EFER_LME,
        }
        | registers
    )


def _flat(code_access: int) -> dict[str, int]:
    """Segments from 0 to 4 GiB, no descriptor tables."""
    registers = {"gdtr_base": 0, "gdtr_limit": 0, "idtr_base": 0, "idtr_limit": 0}
    for name in ("cs", "ss", "ds", "es", "fs", "gs"):
        registers[name] = BOOT_CS if name == "cs" else BOOT_DS
        registers[f"{name}_base"] = 0
        registers[f"{name}_limit"] = _LIMIT
        registers[f"{name}_access"] = code_access if name == "cs" else _DATA
    return registers


def _gdt(code_access: int) -> bytes:
    return bytes(BOOT_CS) + _descriptor(code_access) + _descriptor(_DATA)


def _descriptor(access: int) -> bytes:
    """The flat segment with these access rights in a GDT (SDM vol. 3A, 3.4.5)."""
    limit_19_16 = 0xF
    value = 0xFFFF | (access & 0xFF) << 40 | limit_19_16 << 48 | (access >> 12) << 52
    return value.to_bytes(8, "little")


GDT_32: Final = _gdt(_CODE_32)
GDT_64: Final = _gdt(_CODE_64)
"""GDTs that hold the segments of `protected` and of `long_mode` under their selectors."""
