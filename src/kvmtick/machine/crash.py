"""The crash report: what is left to see when a guest failed.

Of every vCPU the registers, the code around RIP (by capstone, which is imported here and nowhere
else) and the top of its stack, and the last trace events. Making it never fails: what cannot be
told says so in its place.

Instructions before RIP are shown if decoding from a known boundary leads to it: where a recorded
entry or exit was, or where the guest started.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from kvmtick.cpu.mode import code_bits, linear_rip, linear_rsp, mode_name
from kvmtick.cpu.paging import read_linear
from kvmtick.machine.machine import Machine
from kvmtick.trace.events import Event
from kvmtick.trace.ftrace import format_line
from kvmtick.vcpu.vcpu import Vcpu

__all__ = ["CrashReport", "Instruction", "VcpuReport", "crash_report"]

LONGEST_INSTRUCTION_BYTES = 15
BEFORE, AFTER = 4, 6
"""Instructions shown around the one at RIP."""
REACH_BYTES = 4096
"""How far back a known boundary may be."""
STACK_WORDS = 16
LINEAR_DIGITS = {16: 6, 32: 8, 64: 16}
"""Of a linear address, by the width of the code."""
_RIP_FIELDS = {int(Event.KVM_ENTRY): 4, int(Event.KVM_EXIT): 5}
"""Where records have a RIP."""

NO_CAPSTONE = "no disassembly: capstone is not installed (pip install capstone)"

SEGMENTS = ("cs", "ss", "ds", "es", "fs", "gs", "ldtr", "tr")
CONTROL = ("cr0", "cr2", "cr3", "cr4", "efer")
_GENERAL = ("ax", "bx", "cx", "dx", "si", "di", "bp", "sp")


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction; `text` is empty where the bytes are none."""

    address: int
    data: bytes
    text: str


@dataclass(frozen=True, slots=True)
class VcpuReport:
    """One vCPU; `notes` say what could not be told. Addresses are linear."""

    vcpu_id: int
    state: str
    mode: str
    bits: int
    registers: Mapping[str, int]
    rip: int
    code: tuple[Instruction, ...]
    rsp: int
    stack: tuple[int, ...]
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """The object of docs/json.md."""
        return {
            "vcpu": self.vcpu_id,
            "state": self.state,
            "mode": self.mode,
            "registers": {name: f"{value:#x}" for name, value in self.registers.items()},
            "rip_linear": f"{self.rip:#x}",
            "code": [
                {"address": f"{i.address:#x}", "bytes": i.data.hex(), "text": i.text}
                for i in self.code
            ],
            "stack_linear": f"{self.rsp:#x}",
            "stack": [f"{word:#x}" for word in self.stack],
            "notes": list(self.notes),
        }

    def lines(self) -> Iterator[str]:
        """For people."""
        yield f"vCPU {self.vcpu_id}, {self.state}, {self.mode}:"
        yield from (f"  {line}" for line in _register_lines(self.registers, self.bits))
        digits = LINEAR_DIGITS[self.bits]
        if self.code:
            yield "code:"
        for instruction in self.code:
            mark = "->" if instruction.address == self.rip else "  "
            where = f"{instruction.address:0{digits}x}"
            yield f"{mark}{where}  {instruction.data.hex(' '):<30}{instruction.text}".rstrip()
        if self.stack:
            yield "stack:"
            for at in range(0, len(self.stack), 4):
                words = "  ".join(f"{word:0{self.bits // 4}x}" for word in self.stack[at : at + 4])
                yield f"  {self.rsp + at * self.bits // 8:0{digits}x}  {words}"
        yield from self.notes


@dataclass(frozen=True, slots=True)
class CrashReport:
    """All vCPUs and the last events, as lines of ftrace text."""

    vcpus: tuple[VcpuReport, ...]
    events: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """The object `crash` of `kvmtick run --json` (docs/json.md)."""
        return {"vcpus": [vcpu.as_dict() for vcpu in self.vcpus], "events": list(self.events)}

    def text(self) -> str:
        """For people."""
        lines = [line for vcpu in self.vcpus for line in vcpu.lines()]
        lines.append("last events:")
        lines += [f"  {line}" for line in self.events or ("none",)]
        return "\n".join(lines)


def crash_report(machine: Machine) -> CrashReport:
    """Look at a machine that stands; changes nothing and never fails."""
    records = machine.recorder.tail()
    vcpus = tuple(_vcpu_report(machine, vcpu) for vcpu in machine.board.vcpus)
    events = tuple(format_line(record, machine.recorder.tasks) for record in records)
    return CrashReport(vcpus, events)


def _vcpu_report(machine: Machine, vcpu: Vcpu) -> VcpuReport:
    state = vcpu.mp_state_name()
    try:
        registers = vcpu.engine.registers()
        rip, rsp = linear_rip(registers), linear_rsp(registers)
    except Exception as error:
        note = f"no registers: {error!r}"
        return VcpuReport(vcpu.vcpu_id, state, "mode unknown", 64, {}, 0, (), 0, (), (note,))

    def read(linear: int, size_bytes: int) -> bytes:
        return read_linear(registers, machine.read_ram, linear, size_bytes)

    bits = code_bits(registers)
    boundaries = [rip - registers["rip"] + offset for offset in _recorded_rips(machine, vcpu)]
    boundaries += _starts(machine)
    notes: list[str] = []
    code: list[Instruction] = []
    try:
        code = _code(read, rip, bits, boundaries, notes)
    except Exception as error:
        notes.append(f"no disassembly: {error!r}")
    stack = _stack(read, rsp, bits // 8, notes)
    return VcpuReport(
        vcpu.vcpu_id,
        state,
        mode_name(registers),
        bits,
        registers,
        rip,
        tuple(code),
        rsp,
        tuple(stack),
        tuple(notes),
    )


def _recorded_rips(machine: Machine, vcpu: Vcpu) -> list[int]:
    """Where this vCPU entered and left the guest last, the latest first; offsets into CS."""
    return [
        record[_RIP_FIELDS[record[1]]]
        for record in reversed(machine.recorder.tail())
        if record[1] in _RIP_FIELDS and record[3] == vcpu.vcpu_id
    ]


def _starts(machine: Machine) -> list[int]:
    """Where the guest started; linear."""
    return [
        guest.entry[0] * 16 + guest.entry[1] if guest.start is None else guest.start["rip"]
        for guest in machine.loaded[-1:]
        if guest.start is None or "rip" in guest.start
    ]


def _stack(
    read: Callable[[int, int], bytes], rsp: int, word_bytes: int, notes: list[str]
) -> list[int]:
    data = read(rsp, STACK_WORDS * word_bytes)
    if not data:
        notes.append(f"stack: {rsp:#x} is not mapped")
    return [
        int.from_bytes(data[at : at + word_bytes], "little")
        for at in range(0, len(data) - word_bytes + 1, word_bytes)
    ]


# Code.


def _code(
    read: Callable[[int, int], bytes],
    rip: int,
    bits: int,
    boundaries: list[int],
    notes: list[str],
) -> list[Instruction]:
    data = read(rip, AFTER * LONGEST_INSTRUCTION_BYTES)
    if not data:
        notes.append(f"code: {rip:#x} is not mapped")
        return []
    decoder = _decoder(bits)
    if decoder is None:
        notes.append(NO_CAPSTONE)
        return [Instruction(rip, data[:LONGEST_INSTRUCTION_BYTES], "")]
    after = _decode(decoder, data, rip, AFTER)
    if not after or after[0].address != rip:
        after = [Instruction(rip, data[:LONGEST_INSTRUCTION_BYTES], "(no instruction)")]
    return [*_before(decoder, read, rip, boundaries), *after]


def _before(
    decoder: Any, read: Callable[[int, int], bytes], rip: int, boundaries: list[int]
) -> list[Instruction]:
    """The last instructions from a boundary to RIP, if the bytes in between decode to there."""
    for start in boundaries:
        if 0 < rip - start <= REACH_BYTES:
            data = read(start, rip - start)
            found = _decode(decoder, data, start, 0)
            if found and found[-1].address + len(found[-1].data) == rip:
                return found[-BEFORE:]
    return []


def _decoder(bits: int) -> Any:
    """capstone's for that mode; None if it is not installed."""
    try:
        import capstone
    except ImportError:
        return None
    mode = {16: capstone.CS_MODE_16, 32: capstone.CS_MODE_32, 64: capstone.CS_MODE_64}[bits]
    return capstone.Cs(capstone.CS_ARCH_X86, mode)


def _decode(decoder: Any, data: bytes, address: int, count: int) -> list[Instruction]:
    """Up to `count` instructions, 0: all, as far as they decode."""
    return [
        Instruction(at, data[at - address : at - address + size], f"{mnemonic} {operands}".rstrip())
        for at, size, mnemonic, operands in decoder.disasm_lite(data, address, count)
    ]


# Registers, as wide as the mode has them.


def _register_lines(registers: Mapping[str, int], bits: int) -> Iterator[str]:
    prefix, digits = ("r", 16) if bits == 64 else ("e", 8)

    def cell(name: str, source: str, digits: int = digits) -> str:
        value = registers.get(source)
        if value is None:
            return f"{name:<3} {'?' * digits}"
        return f"{name:<3} {value & (1 << 4 * digits) - 1:0{digits}x}"

    cells = [cell(f"{prefix}{name}", f"r{name}") for name in _GENERAL]
    if bits == 64:
        cells += [cell(f"r{number}", f"r{number}") for number in range(8, 16)]
    yield from _rows(cells, 4)
    yield f"{cell(f'{prefix}ip', 'rip')}  {cell(f'{prefix}flags', 'rflags', 8)}"
    yield from (
        f"{name:<4} {registers[name]:04x} base {registers.get(f'{name}_base', 0):0{digits}x}"
        f" limit {registers.get(f'{name}_limit', 0):08x}"
        f" access {registers.get(f'{name}_access', 0):04x}"
        for name in SEGMENTS
        if name in registers
    )
    for name in ("gdtr", "idtr"):
        if f"{name}_base" in registers:
            base, limit = registers[f"{name}_base"], registers.get(f"{name}_limit", 0)
            yield f"{name}      base {base:0{digits}x} limit {limit:08x}"
    yield from _rows([cell(name, name) for name in CONTROL if name in registers], 3)


def _rows(cells: list[str], columns: int) -> Iterator[str]:
    for at in range(0, len(cells), columns):
        yield "  ".join(cells[at : at + columns])
