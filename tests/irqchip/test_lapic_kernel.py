"""The local APIC alone against the kernel's: random registers, messages and states.

vCPU 0 runs the accesses as a real-mode guest with interrupts off; vCPU 1 never runs, it only
receives. After each program every value read, every message's result and both pages must be equal.
Timers are given counts and deadlines that are seconds away, so that none expires.
"""

from __future__ import annotations

import errno
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import pytest
from lapic_rig import BASE, INIT, NOBODY, LapicRig, page_register, set_page_register

from kvmtick.abi import HostError, KvmError
from kvmtick.abi.exits import ExitIo
from kvmtick.abi.structs import kvm_cpuid_entry2
from kvmtick.guests import Guest
from kvmtick.host.kvmdev import open_kvm
from kvmtick.irqchip.delivery import LapicIrq
from kvmtick.kvm.kernel import KernelVm

SEEDS = range(150)
LEAST_COUNT = 0xC0000000
SLACK_NS = 1_000_000_000
"""How much of a count may pass while a program runs."""

CODE, RESULTS, GP_HANDLER, GP_VECTOR = 0x1000, 0x8000, 0xA00, 13
PORT_HOST, PORT_DONE = 0x77, 0xF4
DONE = ExitIo(PORT_DONE, 1, 1, True, b"\0")
LIMIT_S = 2.0
UNTOUCHED = 0xCCCCCCCC

IA32_TSC, IA32_APIC_BASE, TSC_DEADLINE, X2APIC = 0x10, 0x1B, 0x6E0, 0x800
PPR, TMICT, TMCCT = 0xA0, 0x380, 0x390

LVTT_VALUES = (0x45, 0x10045, 0x20045, 0x30045, 0x40045, 0x50045, 0x60045, 0xFFFFFFFF)
TMICT_VALUES = (0, LEAST_COUNT, 0xFFFFFFFF)
FAR_CYCLES = 1 << 42
"""Half an hour and more, and not so far that the kernel's product wraps."""

READABLE = (
    *(0x20, 0x30, 0x80, 0x90, 0xA0, 0xD0, 0xE0, 0xF0, 0x280, 0x300, 0x310),
    *(0x320, 0x330, 0x340, 0x350, 0x360, 0x370, 0x380, 0x390, 0x3E0),
    *(first + 16 * i for first in (0x100, 0x180, 0x200) for i in range(8)),
)


@dataclass(frozen=True)
class Read:
    offset: int
    size: int = 4


@dataclass(frozen=True)
class Write:
    offset: int
    value: int
    size: int = 4


@dataclass(frozen=True)
class ReadMsr:
    index: int


@dataclass(frozen=True)
class WriteMsr:
    index: int
    value: int


@dataclass(frozen=True)
class SetPage:
    vcpu: int
    registers: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Msi:
    address: int
    data: int


Op = Read | Write | ReadMsr | WriteMsr | SetPage | Msi


@cache
def far_deadline() -> int:
    """A deadline that is in no run's reach. A vCPU's TSC may go on from the host's."""
    with KernelVm() as vm:
        return vm.create_vcpu().get_msrs([IA32_TSC])[IA32_TSC] + FAR_CYCLES


def icr_value(draw: random.Random) -> int:
    """Any message, but only interrupts where vCPU 0 may get it: it has to go on running."""
    vector = draw.randrange(256)
    flags = draw.choice((0, 0x4000, 0x8000, 0xC000)) | draw.choice((0, 0x1000))
    if draw.random() < 0.2:
        return vector | flags | draw.randrange(8) << 8 | 3 << 18
    return vector | flags | draw.choice((0, 0x100, 0x800, 0x900)) | draw.randrange(4) << 18


def value_for(draw: random.Random, register: int) -> int:
    if register == 0x300:
        return icr_value(draw)
    if register == 0x310:
        return draw.choice((0, 1, 2, 3, 9, 0xFF)) << 24
    if register == TMICT:
        return draw.choice(TMICT_VALUES)
    if register == 0x320:
        return draw.choice(LVTT_VALUES)
    if register == 0x20:
        return draw.choice((0, 2, 0x55)) << 24
    if register == 0xD0:
        return draw.choice((0, 1, 2, 3, 0x11, 0x12, 0x80)) << 24
    if register == 0xE0:
        return draw.choice((0xFFFFFFFF, 0x0FFFFFFF, 0x5FFFFFFF))
    if register == 0xF0:
        return draw.choice((0x1FF, 0x1FF, 0x1FF, 0xFF, 0xFFFFFFFF))
    return draw.choice((0, 0x45, 0x10045, 0x700, 0x8055, draw.getrandbits(32)))


WRITABLE = (0x20, 0x80, 0x80, 0xB0, 0xB0, 0xD0, 0xE0, 0xF0, 0x280, 0x300, 0x300, 0x310, 0x320)
WRITABLE += (0x330, 0x340, 0x350, 0x360, 0x370, TMICT, TMICT, 0x3E0, 0x3F0, 0x30, 0x100)


def draw_page(draw: random.Random) -> SetPage:
    vcpu = draw.randrange(2)
    registers = {first + 16 * i: 0 for first in (0x100, 0x180, 0x200) for i in range(8)}
    for offset in draw.sample(sorted(registers), 4):
        registers[offset] = draw.getrandbits(32)
    if vcpu:
        registers[0x20] = 1 << 24
    for offset in draw.sample(WRITABLE, 6):
        if not (vcpu and offset == 0x20):
            registers[offset] = value_for(draw, offset)
    registers[TMICT] = draw.choice(TMICT_VALUES)
    registers[TMCCT] = draw.choice((LEAST_COUNT, LEAST_COUNT // 2 + 0x40000000, 0xFFFFFFFF))
    for offset in draw.sample(range(0, 0x400, 4), 6):
        if offset % 16 or offset not in READABLE:
            registers[offset] = draw.getrandbits(32)
    return SetPage(vcpu, tuple(sorted(registers.items())))


def draw_op(draw: random.Random) -> Op:
    kind = draw.randrange(12)
    if kind < 3:
        size = draw.choice((1, 2, 4, 4))
        return Read(draw.choice(READABLE) + draw.randrange(0, 5 - size), size)
    if kind < 6:
        register = draw.choice(WRITABLE)
        size = draw.choice((4, 4, 4, 4, 4, 4, 2, 1))
        return Write(register + 4 * (draw.random() < 0.05), value_for(draw, register), size)
    if kind == 6:
        return ReadMsr(draw.choice((IA32_APIC_BASE, TSC_DEADLINE, X2APIC + draw.randrange(0x42))))
    if kind < 9:
        register = draw.choice(WRITABLE)
        value = value_for(draw, register)
        if register == 0x300:
            value |= draw.choice((0, 1, 2, 0xFFFFFFFF, 0x10001)) << 32
            value |= 1 << draw.randrange(64) if draw.random() < 0.1 else 0
            value &= ~0x700 | 0x100
        elif draw.random() < 0.05:
            value |= 1 << 32
        return WriteMsr(X2APIC + (register >> 4), value)
    if kind == 9:
        if draw.random() < 0.5:
            return WriteMsr(TSC_DEADLINE, draw.choice((0, far_deadline())))
        base = BASE | draw.choice((0x900, 0x900, 0x900, 0xD00, 0xD00, 0x100, 0x500, 0x901, 0x800))
        return WriteMsr(IA32_APIC_BASE, base | (1 << 36 if draw.random() < 0.05 else 0))
    if kind == 10:
        return draw_page(draw)
    mode = draw.choice((0, 0, 1, 1, 2, 3, 7))
    data = draw.randrange(256) | mode << 8 | draw.choice((0, 0x8000, 0xC000))
    address = 0xFEE00000 | draw.choice((0, 1, 2, 3, 9, 0xFF)) << 12 | draw.choice((0, 4, 8, 12))
    return Msi(address, data)


def program(seed: int) -> tuple[tuple[str, ...] | None, list[Op]]:
    """What CPUID has (None: it was never set), and the operations."""
    draw = random.Random(seed)
    features = draw.choice((None, (), ("x2apic", "tsc_deadline"), ("x2apic", "tsc_deadline")))
    ops: list[Op] = [Write(0xF0, 0x1FF)] if draw.random() < 0.7 else []
    return features, ops + [draw_op(draw) for _ in range(40)]


@dataclass
class Outcome:
    reads: list[int | str]
    results: list[int]
    pages: list[bytes]
    ppr_settled: bool = True
    """vCPU 0 looked for interrupts after each restore, which it does not while disabled."""


# The model.


def on_the_model(features: tuple[str, ...] | None, ops: list[Op]) -> Outcome:
    rig = LapicRig(2, features)
    lapic = rig.lapic
    ppr_settled = True
    reads: list[int | str] = []
    results: list[int] = []
    for op in ops:
        if isinstance(op, Read):
            ones = (1 << 8 * op.size) - 1
            reads.append(rig.read(op.offset, op.size) | UNTOUCHED & ~ones)
        elif isinstance(op, Write):
            rig.write(op.offset, op.value & (1 << 8 * op.size) - 1, op.size)
        elif isinstance(op, ReadMsr):
            value = lapic.apic_base if op.index == IA32_APIC_BASE else lapic.read_msr(op.index)
            reads.append("#GP" if value is None else value)
        elif isinstance(op, WriteMsr):
            write: Callable[[int], bool] = lapic.set_base
            if op.index != IA32_APIC_BASE:
                write = lambda value, index=op.index: lapic.write_msr(index, value)  # noqa: E731
            reads.append("ok" if write(op.value) else "#GP")
        elif isinstance(op, SetPage):
            page = rig.page(op.vcpu)
            for offset, value in op.registers:
                set_page_register(page, offset, value)
            rig.lapics[op.vcpu].restore(bytes(page))
            lapic.has_interrupt()
            ppr_settled &= lapic.hw_enabled
        else:
            results.append(rig.delivery.deliver(msi_irq(op)))
    return Outcome(reads, results, [bytes(rig.page(vcpu)) for vcpu in range(2)], ppr_settled)


def msi_irq(op: Msi) -> LapicIrq:
    address, data = op.address, op.data
    return LapicIrq(
        vector=data & 0xFF,
        delivery_mode=data >> 8 & 7,
        dest_mode_logical=address >> 2 & 1 != 0,
        trig_mode_level=data >> 15 & 1 != 0,
        level=True,
        shorthand=0,
        dest_id=address >> 12 & 0xFF,
        msi_redir_hint=address >> 3 & 1 != 0,
    )


# The kernel.


def dword(value: int) -> bytes:
    return (value & 0xFFFFFFFF).to_bytes(4, "little")


def code(op: Op) -> bytes:
    """EBX is an address, ECX an MSR; results go to [DI]; ESI is set by the #GP handler."""
    store_eax = b"\x66\xab"
    if isinstance(op, Read):
        load = {4: b"\x66\x67\x8b\x03", 2: b"\x67\x8b\x03", 1: b"\x67\x8a\x03"}[op.size]
        to_ebx = b"\x66\xbb" + dword(BASE + op.offset)
        return to_ebx + b"\x66\xb8" + dword(UNTOUCHED) + load + store_eax
    if isinstance(op, Write):
        store = {4: b"\x66\x67\x89\x03", 2: b"\x67\x89\x03", 1: b"\x67\x88\x03"}[op.size]
        return b"\x66\xbb" + dword(BASE + op.offset) + b"\x66\xb8" + dword(op.value) + store
    if isinstance(op, ReadMsr):
        read = b"\x66\x31\xf6\x66\xb9" + dword(op.index) + b"\x0f\x32" + store_eax
        return read + b"\x66\x89\xd0" + store_eax + b"\x66\x89\xf0" + store_eax
    if isinstance(op, WriteMsr):
        load = b"\x66\xb8" + dword(op.value) + b"\x66\xba" + dword(op.value >> 32)
        write = b"\x66\x31\xf6\x66\xb9" + dword(op.index) + load + b"\x0f\x30"
        return write + b"\x66\x89\xf0" + store_eax
    return bytes((0xE6, PORT_HOST))


def cpuid(features: tuple[str, ...]) -> list[kvm_cpuid_entry2]:
    ecx = sum(1 << {"x2apic": 21, "tsc_deadline": 24}[name] for name in features)
    return [kvm_cpuid_entry2(function=0, eax=1), kvm_cpuid_entry2(function=1, ecx=ecx)]


def on_the_kernel(features: tuple[str, ...] | None, ops: list[Op]) -> Outcome:
    # cli; mov di, RESULTS; mov sp, CODE; ...; mov al, 0; out PORT_DONE, al
    start = b"\xfa\xbf" + RESULTS.to_bytes(2, "little") + b"\xbc" + CODE.to_bytes(2, "little")
    image = start + b"".join(map(code, ops)) + bytes((0xB0, 0, 0xE6, PORT_DONE))
    # mov si, 1; push bp; mov bp, sp; add word [bp + 2], 2 (over RDMSR or WRMSR); pop bp; iret
    handler = b"\xbe\x01\x00\x55\x89\xe5\x83\x46\x02\x02\x5d\xcf"
    host = (op for op in ops if isinstance(op, SetPage | Msi))
    results: list[int] = []
    with KernelVm() as vm:
        vm.create_irqchip()
        vcpus = []
        for vcpu_id in range(2):
            vcpus.append(vm.create_vcpu(vcpu_id))
            if features is not None:
                vcpus[-1].set_cpuid2(cpuid(features))

        def act(op: Op) -> None:
            if isinstance(op, SetPage):
                state = vcpus[op.vcpu].get_lapic()
                for offset, word in op.registers:
                    state.set_reg(offset, word)
                vcpus[op.vcpu].set_lapic(state)
            else:
                assert isinstance(op, Msi)
                results.append(signal(vm, op))

        vm.write_memory(4 * GP_VECTOR, GP_HANDLER.to_bytes(4, "little"))
        vm.write_memory(GP_HANDLER, handler)
        vm.load(Guest("program", image, CODE, (0, CODE), None))
        vcpus[0].set_real_mode(0, CODE, unreal=True)
        while (exit_ := vcpus[0].run(LIMIT_S)) != DONE:
            assert isinstance(exit_, ExitIo), exit_
            act(next(host))
        pages = [bytes(vcpu.get_lapic()) for vcpu in vcpus]
        memory = vm.read_memory(RESULTS, 0x1000)
    return Outcome(values(ops, memory), results, pages)


def signal(vm: KernelVm, op: Msi) -> int:
    try:
        return vm.signal_msi(op.address, op.data)
    except KvmError as error:
        # -1, nobody, is EPERM's number.
        if error.errno != errno.EPERM:
            raise
        return NOBODY


def values(ops: list[Op], memory: bytes) -> list[int | str]:
    words = (int.from_bytes(memory[i : i + 4], "little") for i in range(0, len(memory), 4))
    out: list[int | str] = []
    for op in ops:
        if isinstance(op, Read):
            out.append(next(words))
        elif isinstance(op, ReadMsr):
            value = next(words) | next(words) << 32
            out.append("#GP" if next(words) else value)
        elif isinstance(op, WriteMsr):
            out.append("#GP" if next(words) else "ok")
    return out


# Both.


@cache
def why_not() -> str:
    try:
        open_kvm().close()
    except HostError as error:
        return f"needs /dev/kvm: {error}"
    return ""


def close(model: int | str, kernel: int | str) -> bool:
    """A current count, which went on in the kernel."""
    if isinstance(model, str) or isinstance(kernel, str):
        return model == kernel
    return 0 <= model - kernel <= SLACK_NS and bool(model) == bool(kernel)


def is_count(op: Op) -> bool:
    register = op.offset & ~0xF if isinstance(op, Read) else -1
    return register == TMCCT or (isinstance(op, ReadMsr) and op.index == X2APIC + (TMCCT >> 4))


def differences(ops: list[Op], model: Outcome, kernel: Outcome) -> list[str]:
    reading = [op for op in ops if isinstance(op, Read | ReadMsr | WriteMsr)]
    out = []
    for op, ours, theirs in zip(reading, model.reads, kernel.reads, strict=True):
        if is_count(op):
            whole = isinstance(op, ReadMsr) or (isinstance(op, Read) and op.size == 4)
            if whole and not close(ours, theirs):
                out.append(f"{op}: model {ours}, kernel {theirs}")
        elif ours != theirs:
            out.append(f"{op}: model {ours}, kernel {theirs}")
    if model.results != kernel.results:
        out.append(f"messages: model {model.results}, kernel {kernel.results}")
    for vcpu in range(2):
        for offset in range(0, 1024, 4):
            if offset == PPR and not model.ppr_settled:
                continue
            ours, theirs = (page_register(side.pages[vcpu], offset) for side in (model, kernel))
            if not (close(ours, theirs) if offset == TMCCT else ours == theirs):
                out.append(f"vCPU {vcpu} {offset:#x}: model {ours:#x}, kernel {theirs:#x}")
    return out


@pytest.mark.parametrize("block", range(0, len(SEEDS), 30))
def test_the_same_as_the_kernels(block: int) -> None:
    if reason := why_not():
        pytest.skip(reason)
    for seed in SEEDS[block : block + 30]:
        features, ops = program(seed)
        found = differences(ops, on_the_model(features, ops), on_the_kernel(features, ops))
        assert not found, "\n".join([f"seed {seed}, CPUID {features}", *found, *map(str, ops)])


def test_a_difference_would_be_seen() -> None:
    if reason := why_not():
        pytest.skip(reason)
    pairs: list[tuple[Op, Op]] = [
        (Write(0x80, 0x40), Write(0x80, 0x41)),
        (Write(0x300, 0x40045), Write(0x300, 0x40046)),
        (Write(0x380, LEAST_COUNT), Write(0x380, 0)),
        (SetPage(1, ((0x200, 1),)), SetPage(1, ((0x200, 2),))),
        (Msi(0xFEE01000, INIT << 8), Msi(0xFEE09000, INIT << 8)),
    ]
    for ours, theirs in pairs:
        ops: list[Op] = [Write(0xF0, 0x1FF)]
        found = differences(
            [*ops, ours], on_the_model((), [*ops, ours]), on_the_kernel((), [*ops, theirs])
        )
        assert found, (ours, theirs)
