"""The registers as gdb knows them: target descriptions, and the bytes of `g`, `G`, `p` and `P`.

The features are those of gdb's manual (appendix G.5.5, i386 features): org.gnu.gdb.i386.core, and
.segments for FS and GS bases; what gdb has no feature for (control registers, EFER,
IA32_KERNEL_GS_BASE) is org.kvmtick.system. gdb learns the description once, when it connects, so
the mode the CPU is in then decides: real mode i8086, 32-bit protected mode i386, long mode
i386:x86-64. A 64-bit guest that gdb meets before it has switched to long mode is told by its file.

The program counter is a linear address (CS base and IP), as breakpoints and memory are: gdb knows
no segments. In real mode a selector that is written gets its base.

Not modelled: x87 and SSE registers; gdb shows those it must have as unavailable.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kvmtick.cpu.mode import is_long_mode, is_real_mode, linear_rip

__all__ = ["I386", "I8086", "X86_64", "Architecture", "architecture_of"]

EFLAGS = {
    0: "CF",
    2: "PF",
    4: "AF",
    6: "ZF",
    7: "SF",
    8: "TF",
    9: "IF",
    10: "DF",
    11: "OF",
    14: "NT",
    16: "RF",
    17: "VM",
    18: "AC",
    19: "VIF",
    20: "VIP",
    21: "ID",
}
CR0 = {
    0: "PE",
    1: "MP",
    2: "EM",
    3: "TS",
    4: "ET",
    5: "NE",
    16: "WP",
    18: "AM",
    29: "NW",
    30: "CD",
    31: "PG",
}
CR4 = {
    0: "VME",
    1: "PVI",
    2: "TSD",
    3: "DE",
    4: "PSE",
    5: "PAE",
    6: "MCE",
    7: "PGE",
    8: "PCE",
    9: "OSFXSR",
    10: "OSXMMEXCPT",
    11: "UMIP",
    12: "LA57",
    13: "VMXE",
    14: "SMXE",
    16: "FSGSBASE",
    17: "PCIDE",
    18: "OSXSAVE",
    20: "SMEP",
    21: "SMAP",
    22: "PKE",
}
EFER = {0: "SCE", 8: "LME", 10: "LMA", 11: "NXE"}

SEGMENTS = ("cs", "ss", "ds", "es", "fs", "gs")
X87_CONTROL = ("fctrl", "fstat", "ftag", "fiseg", "fioff", "foseg", "fooff", "fop")


@dataclass(frozen=True, slots=True)
class Register:
    """One of gdb's registers; `source` is its name in `Engine.registers`, empty if we lack it."""

    name: str
    size_bytes: int
    type: str
    source: str


class Architecture:
    """A target description, and how registers go over the wire in it."""

    def __init__(self, name: str, core: list[Register], system: list[Register]) -> None:
        self.name = name
        self.registers = [*core, *system]
        self.width_bytes = core[0].size_bytes
        self.pc = next(index for index, r in enumerate(core) if r.source == "rip")
        self.description = _description(name, core, system)

    def encode(self, number: int, registers: Mapping[str, int]) -> str:
        """Register `number` in hex digits, `xx` for a byte that is not available."""
        register = self.registers[number]
        value = registers.get(register.source)
        if register.source == "rip":
            value = linear_rip(registers)
        if value is None:
            return "xx" * register.size_bytes
        value &= (1 << 8 * register.size_bytes) - 1
        return value.to_bytes(register.size_bytes, "little").hex()

    def decode(self, number: int, data: bytes, registers: Mapping[str, int]) -> dict[str, int]:
        """What to write for register `number`; nothing if we lack it. ValueError: wrong size."""
        register = self.registers[number]
        if len(data) != register.size_bytes:
            raise ValueError(f"{register.name} has {register.size_bytes} bytes, not {len(data)}")
        source, value = register.source, int.from_bytes(data, "little")
        if source == "rip":
            value -= linear_rip(registers) - registers["rip"]
            value &= (1 << 8 * register.size_bytes) - 1
        if source in SEGMENTS and is_real_mode(registers):
            return {source: value & 0xFFFF, f"{source}_base": (value & 0xFFFF) << 4}
        return {source: value} if source else {}


def architecture_of(registers: Mapping[str, int]) -> Architecture:
    """The description that fits the mode of a CPU."""
    if is_real_mode(registers):
        return I8086
    return X86_64 if is_long_mode(registers) else I386


def _x87() -> list[Register]:
    stack = [Register(f"st{index}", 10, "i387_ext", "") for index in range(8)]
    return [*stack, *(Register(name, 4, "int", "") for name in X87_CONTROL)]


def _core(general: Mapping[str, str], width_bytes: int) -> list[Register]:
    """General registers (gdb's name: ours), program counter, flags, segments, x87."""
    core = []
    for name, source in general.items():
        kind = {"rsp": "data_ptr", "rbp": "data_ptr", "rip": "code_ptr"}.get(source, "int")
        kind = f"{kind}{8 * width_bytes}" if kind == "int" else kind
        core.append(Register(name, width_bytes, kind, source))
    core.append(Register("eflags", 4, "i386_eflags", "rflags"))
    core += [Register(name, 4, "int32", name) for name in SEGMENTS]
    return core + _x87()


def _system(width_bytes: int) -> list[Register]:
    kind = f"uint{8 * width_bytes}"
    return [
        Register("fs_base", width_bytes, kind, "fs_base"),
        Register("gs_base", width_bytes, kind, "gs_base"),
        *([Register("k_gs_base", 8, "uint64", "kernel_gs_base")] if width_bytes == 8 else []),
        Register("cr0", width_bytes, "x86_cr0", "cr0"),
        Register("cr2", width_bytes, kind, "cr2"),
        Register("cr3", width_bytes, kind, "cr3"),
        Register("cr4", width_bytes, "x86_cr4", "cr4"),
        Register("efer", 8, "x86_efer", "efer"),
    ]


def _flags(name: str, size_bytes: int, bits: Mapping[int, str]) -> str:
    fields = "".join(f'<field name="{bit}" start="{n}" end="{n}"/>' for n, bit in bits.items())
    return f'<flags id="{name}" size="{size_bytes}">{fields}</flags>'


def _feature(name: str, types: str, registers: list[Register]) -> str:
    lines = "".join(
        f'<reg name="{r.name}" bitsize="{8 * r.size_bytes}" type="{r.type}"/>\n' for r in registers
    )
    return f'<feature name="{name}">\n{types}\n{lines}</feature>\n'


def _description(name: str, core: list[Register], system: list[Register]) -> str:
    width_bytes = core[0].size_bytes
    segments = [r for r in system if r.name in ("fs_base", "gs_base")]
    types = [_flags("x86_cr0", width_bytes, CR0), _flags("x86_cr4", width_bytes, CR4)]
    types.append(_flags("x86_efer", 8, EFER))
    return (
        '<?xml version="1.0"?>\n<!DOCTYPE target SYSTEM "gdb-target.dtd">\n<target>\n'
        f"<architecture>{name}</architecture>\n<osabi>none</osabi>\n"
        + _feature("org.gnu.gdb.i386.core", _flags("i386_eflags", 4, EFLAGS), core)
        + _feature("org.gnu.gdb.i386.segments", "", segments)
        + _feature("org.kvmtick.system", "\n".join(types), system[len(segments) :])
        + "</target>\n"
    )


_GENERAL_64 = (
    *("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp"),
    *("r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rip"),
)
_GENERAL_32 = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "rip")

X86_64 = Architecture("i386:x86-64", _core({n: n for n in _GENERAL_64}, 8), _system(8))
I386 = Architecture("i386", _core({f"e{n[1:]}": n for n in _GENERAL_32}, 4), _system(4))
I8086 = Architecture("i8086", _core({f"e{n[1:]}": n for n in _GENERAL_32}, 4), _system(4))
