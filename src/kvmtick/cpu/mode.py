"""Which mode a CPU is in, told from its registers (Intel SDM vol. 3A, 2.2, 3.4.5 and 9.9).

For people who look at a guest that stands: debugger and crash report. `registers` are those of
`Engine.registers`; one that an engine does not have counts as 0.

Not modelled: system-management mode.
"""

from collections.abc import Mapping

__all__ = ["code_bits", "is_long_mode", "is_real_mode", "linear_rip", "linear_rsp", "mode_name"]

CR0_PE = 1 << 0
RFLAGS_VM = 1 << 17
EFER_LMA = 1 << 10
ACCESS_L = 1 << 13
ACCESS_DB = 1 << 14


def is_real_mode(registers: Mapping[str, int]) -> bool:
    """CR0.PE is clear."""
    return not registers.get("cr0", 0) & CR0_PE


def is_long_mode(registers: Mapping[str, int]) -> bool:
    """EFER.LMA is set: 64-bit mode or compatibility mode."""
    return bool(registers.get("efer", 0) & EFER_LMA)


def code_bits(registers: Mapping[str, int]) -> int:
    """How wide the code is that CS holds: 16, 32 or 64 bits."""
    if is_real_mode(registers) or registers.get("rflags", 0) & RFLAGS_VM:
        return 16
    access = registers.get("cs_access", ACCESS_DB)
    if is_long_mode(registers) and access & ACCESS_L:
        return 64
    return 32 if access & ACCESS_DB else 16


def mode_name(registers: Mapping[str, int]) -> str:
    """The mode in a few words."""
    if is_real_mode(registers):
        return "real mode"
    if registers.get("rflags", 0) & RFLAGS_VM:
        return "virtual-8086 mode"
    bits = code_bits(registers)
    if bits == 64:
        return "64-bit mode"
    return f"{bits}-bit {'compatibility' if is_long_mode(registers) else 'protected'} mode"


def linear_rip(registers: Mapping[str, int]) -> int:
    """The linear address of the next instruction."""
    return _linear(registers, "cs", registers["rip"])


def linear_rsp(registers: Mapping[str, int]) -> int:
    """The linear address of the top of the stack."""
    bits = code_bits(registers)
    is_big = bits != 16 or registers.get("ss_access", 0) & ACCESS_DB
    offset = registers["rsp"] if is_big else registers["rsp"] & 0xFFFF
    return _linear(registers, "ss", offset)


def _linear(registers: Mapping[str, int], segment: str, offset: int) -> int:
    if code_bits(registers) == 64:
        return offset
    base = registers.get(f"{segment}_base")
    if base is None:
        base = registers.get(segment, 0) << 4 if is_real_mode(registers) else 0
    return (base + offset) & 0xFFFF_FFFF
