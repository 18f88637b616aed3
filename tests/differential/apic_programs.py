"""Random programs for the APIC world, and how a side carries them out.

A program is a list of operations. `Access` is one access of a guest (apic_guest.asm, interrupts
off): memory, a port, an MSR. All others are calls of KVM's API. `sequence(seed)` gives the programs
that run one after the other in one VM, without a reset between them, and what that VM is like.

The order is the same everywhere: before and after an access every vCPU that is runnable enters the
guest once, and again while it has an NMI to take.

What hangs on time is kept out: a LAPIC timer is only ever given counts that take seconds (`COUNT`,
DEADLINE), and the current count is compared for being 0 alone. With interrupts off no vector is
ever taken: what becomes of one then shows in IRR and ISR. A guest that runs must stay in its
program: no INIT reaches vCPU 0, and a SIPI starts vCPU 1 where it has code.

Not covered: eventfds, the split irqchip, timers that fire, HLT, interrupts that are taken, accesses
that are not aligned (an engine may make two of one).
"""

import random
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from differential.programs import Line, SetIrqchip
from kvmtick.abi.structs import (
    KVM_IRQ_ROUTING_IRQCHIP,
    KVM_IRQ_ROUTING_MSI,
    kvm_cpuid_entry2,
    kvm_ioapic_state,
)

PROGRAMS_A_SEQUENCE = 25
LEAST_TIMER_S = 3.0
"""No timer a program starts fires earlier; a sequence must be over by then."""

LAPIC, IOAPIC = 0xFEE0_0000, 0xFEC0_0000
APIC_PAGES = 0xFED0_0000
"""From here on there are local APICs, where MSR_IA32_APICBASE put them."""
ID, TPR, PPR, EOI, LDR, DFR, SVR = 0x20, 0x80, 0xA0, 0xB0, 0xD0, 0xE0, 0xF0
ISR, TMR, IRR, ESR, ICR, ICR2 = 0x100, 0x180, 0x200, 0x280, 0x300, 0x310
LVTT, LVTTHMR, LVTPC, LVT0, LVT1, LVTERR = 0x320, 0x330, 0x340, 0x350, 0x360, 0x370
TMICT, TMCCT, TDCR = 0x380, 0x390, 0x3E0
MSR_TSC, MSR_APICBASE, MSR_TSC_DEADLINE, MSR_X2APIC = 0x10, 0x1B, 0x6E0, 0x800

COUNTS = (0, 0xC012_3457, 0xFFFF_FFFF)
DEADLINE = 0x100_0000_0000
"""Minutes of any TSC. A program's deadlines count from the guest's TSC at that moment, which may be
the host's; what is there to read is compared for being 0 alone."""

SIPI_VECTOR = 9
"""Where vCPU 1 has code."""


# Operations.


@dataclass(frozen=True, slots=True)
class Access:
    """A guest's access; `kind`: r8, r16, r32, w8, w16, w32 (memory), in, out, rdmsr, wrmsr."""

    vcpu: int
    kind: str
    address: int
    value: int = 0


@dataclass(frozen=True, slots=True)
class Msi:
    """KVM_SIGNAL_MSI."""

    address: int
    data: int
    flags: int = 0


Route: TypeAlias = tuple[int, int, int, int, int, int]
"""gsi, type, flags, and three words: irqchip, pin, 0 or address_lo, address_hi, data."""


@dataclass(frozen=True, slots=True)
class Routing:
    """KVM_SET_GSI_ROUTING."""

    entries: tuple[Route, ...]
    flags: int = 0


@dataclass(frozen=True, slots=True)
class SetIoapic:
    """KVM_SET_IRQCHIP of the IOAPIC: struct kvm_ioapic_state."""

    state: bytes


@dataclass(frozen=True, slots=True)
class SetLapic:
    """KVM_SET_LAPIC of what KVM_GET_LAPIC gives, with (offset, value) changed in it."""

    vcpu: int
    changes: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Nmi:
    """KVM_NMI."""

    vcpu: int


@dataclass(frozen=True, slots=True)
class SetMsr:
    """KVM_SET_MSRS."""

    vcpu: int
    index: int
    value: int


@dataclass(frozen=True, slots=True)
class GetMsr:
    """KVM_GET_MSRS."""

    vcpu: int
    index: int


@dataclass(frozen=True, slots=True)
class SetMpState:
    """KVM_SET_MP_STATE."""

    vcpu: int
    state: int


@dataclass(frozen=True, slots=True)
class GetEvents:
    """KVM_GET_VCPU_EVENTS."""

    vcpu: int


Call: TypeAlias = (
    Line | Msi | Routing | SetIrqchip | SetIoapic | SetLapic | Nmi | SetMsr | GetMsr | SetMpState
    | GetEvents
)  # fmt: skip
Operation: TypeAlias = Access | Call
Program: TypeAlias = tuple[Operation, ...]


@dataclass(frozen=True, slots=True)
class Config:
    """What the VM is like: `guest`: its vCPUs run (two at most); `x2apic`: CPUID has x2APIC and the
    TSC deadline; `x2apic_api`: argument of KVM_CAP_X2APIC_API, 0: not enabled.
    """

    vcpus: int
    guest: bool
    x2apic: bool
    x2apic_api: int


@dataclass(frozen=True, slots=True)
class Sequence:
    """Programs for one VM."""

    seed: int
    config: Config
    programs: tuple[Program, ...]


def cpuid_entries() -> list[kvm_cpuid_entry2]:
    """Leaves 0 and 1, with the x2APIC and the TSC deadline timer."""
    top = kvm_cpuid_entry2(function=0, eax=1, ebx=0x756E6547, ecx=0x6C65746E, edx=0x49656E69)
    ecx, edx = 1 << 21 | 1 << 24, 1 << 9 | 1 << 5 | 1 << 4
    return [top, kvm_cpuid_entry2(function=1, eax=0x600, ecx=ecx, edx=edx)]


# Generation.

VECTORS = (0x20, 0x31, 0x31, 0x45, 0x45, 0x45, 0x46, 0x80, 0xEF, 0xFF, 0x10, 0x0F, 0x00)
DESTINATIONS = (0, 0, 0, 1, 1, 2, 3, 4, 5, 0x0F, 0x10, 0x11, 0x80, 0xFF, 0xFF)
MODES = (0, 0, 0, 0, 0, 1, 1, 1, 2, 3, 4, 4, 5, 6, 7)
FIXED, LOWEST, NMI, INIT, STARTUP = 0, 1, 4, 5, 6
SMALL_REGISTERS = (ID, 0x30, TPR, 0x90, PPR, EOI, 0xC0, LDR, DFR, SVR, ESR, ICR, ICR2)
LVTS = (LVTT, LVTTHMR, LVTPC, LVT0, LVT1, LVTERR, 0x2F0)
REGISTERS = (
    *SMALL_REGISTERS, *LVTS, TMICT, TMCCT, TDCR, 0x3F0, 0x400,
    *(base + 0x10 * index for base in (ISR, TMR, IRR) for index in (0, 1, 2, 4, 7)),
)  # fmt: skip


class _Maker:
    """Random operations for a VM of `config`."""

    def __init__(self, rng: random.Random, config: Config) -> None:
        self.rng = rng
        self.config = config

    # Values.

    def word(self) -> int:
        rng = self.rng
        return rng.choice((rng.getrandbits(32), rng.getrandbits(8), 0, 0xFFFF_FFFF))

    def vcpu(self) -> int:
        return self.rng.randrange(self.config.vcpus)

    def vector(self) -> int:
        return self.rng.choice(VECTORS)

    def destination(self) -> int:
        return self.rng.choice((*DESTINATIONS, self.rng.getrandbits(8)))

    def tame(self, message: int) -> int:
        """A message's low word which keeps a running guest in its program."""
        if self.config.guest:
            mode = message >> 8 & 7
            if mode == INIT:
                message &= ~0x700
            elif mode == STARTUP:
                message = message & ~0xFF | SIPI_VECTOR
        return message

    def message(self, level: int = 1 << 14) -> int:
        """Vector, delivery mode, level, trigger mode."""
        rng = self.rng
        out = self.vector() | rng.choice(MODES) << 8 | rng.choice((0, 0, 1 << 15))
        return self.tame(out | rng.choice((level, level, 0)))

    def icr(self) -> int:
        rng = self.rng
        if rng.random() < 0.1:
            return self.tame(self.word())
        shorthand = rng.choice((0, 0, 0, 1, 2, 3)) << 18
        return self.message() | rng.choice((0, 0, 1)) << 11 | shorthand

    def redirection(self) -> int:
        rng = self.rng
        if rng.random() < 0.1:
            low = self.tame(self.word())
        else:
            low = self.message(0) | rng.choice((0, 0, 1)) << 11 | rng.choice((0, 0, 0, 1)) << 16
            low |= rng.choice((0, 0, 0, 1 << 12, 1 << 13, 1 << 14))
        return self.destination() << 56 | rng.choice((0, 0, 0, 0, rng.getrandbits(24))) << 32 | low

    def base(self, vcpu: int) -> int:
        """For MSR_IA32_APICBASE of `vcpu`."""
        rng = self.rng
        value = rng.choice((LAPIC, LAPIC, LAPIC, LAPIC, LAPIC + 0x1000, 0xFED0_0000))
        value |= rng.choice((0x900, 0x900, 0x800, 0x100, 0x000, 0xD00, 0xC00, 0xC00, 0x400, 0xD00))
        value |= rng.choice((0, 0, 0, 0, 0, 0, 1, 1 << 9, 1 << 40, 1 << 63))
        # with the bit for the boot processor an INIT would make vCPU 1 run at the reset vector
        return value & ~0x100 if self.config.guest and vcpu else value

    def register_value(self, offset: int, vcpu: int) -> int:
        """What to write to a register of the local APIC of `vcpu`."""
        rng = self.rng
        if offset in (TMICT, TMCCT):
            return rng.choice(COUNTS)
        if offset == ICR:
            return self.icr()
        if offset == SVR:
            return rng.choice((0x1FF, 0x1FF, 0x1FF, 0x1F0, 0xFF, 0x3FF, 0x11FF, self.word()))
        if offset in (TPR, PPR):
            return rng.choice((0, 0, 0x30, 0x45, 0x50, 0xF0, self.word()))
        if offset == DFR:
            return rng.choice((0xFFFF_FFFF, 0x0FFF_FFFF, 0, 0x7FFF_FFFF, self.word()))
        if offset in (LDR, ICR2):
            return self.destination() << 24
        if offset == ID:
            value = self.destination()
            # only vCPU 1 answers to 1, which is sent an INIT
            return (0 if self.config.guest and value == 1 else value) << 24
        if offset in LVTS:
            low = self.vector() | rng.choice(MODES) << 8 | rng.choice((0, 0, 1 << 16))
            return rng.choice((low, low | rng.choice((1, 2, 2, 3)) << 17, 0x700, self.word()))
        if ISR <= offset < ESR:
            return rng.choice((1 << (self.vector() & 31), 0, self.word()))
        return self.word()

    # Calls.

    def line(self) -> list[Operation]:
        rng = self.rng
        gsi = rng.choice((rng.randrange(24), rng.randrange(24), 0, 2, 4, 8, 9, 24, 25, 40, 4096))
        kind = rng.random()
        if kind < 0.5:
            return [Line(gsi, 1), Line(gsi, 0)]
        if kind < 0.6:
            return [Line(gsi, 1), Line(gsi, 1), Line(gsi, 0)]
        return [Line(gsi, rng.getrandbits(1))]

    def msi_address(self) -> int:
        rng = self.rng
        low = LAPIC | self.destination() << 12 | rng.choice((0, 0, 4, 8, 12))
        if rng.random() < 0.05:
            low = self.word()
        high = rng.choice((0,) * 12 + (0x100, 1, 0xFFFF_FF00, self.word()))
        return high << 32 | low

    def msi(self) -> list[Operation]:
        rng = self.rng
        data = self.message() if rng.random() < 0.9 else self.tame(self.word())
        return [Msi(self.msi_address(), data, rng.choice((0,) * 15 + (1, 2)))]

    def route(self) -> Route:
        rng = self.rng
        gsi = rng.choice((rng.randrange(24), rng.randrange(24), 24, 25, 40))
        if rng.random() < 0.4:
            address = self.msi_address()
            words = (address & 0xFFFF_FFFF, address >> 32, self.message())
            return (gsi, KVM_IRQ_ROUTING_MSI, 0, *words)
        chip = rng.choice((0, 1, 2, 2, 2))
        return (gsi, KVM_IRQ_ROUTING_IRQCHIP, 0, chip, rng.randrange(24 if chip == 2 else 8), 0)

    def routing(self) -> list[Operation]:
        rng = self.rng
        if rng.random() < 0.25:  # the usual table
            table = [(g, 1, 0, g >> 3, g & 7, 0) for g in range(16)]
            table += [(g, 1, 0, 2, 2 if g == 0 else g, 0) for g in range(24) if g != 2]
            return [Routing(tuple(table))]
        used: set[tuple[int, int]] = set()
        entries: list[Route] = []
        for _ in range(rng.randrange(12)):
            entry = self.route()
            chip = entry[3] if entry[1] == KVM_IRQ_ROUTING_IRQCHIP else 2
            if (entry[0], chip) not in used or rng.random() < 0.05:
                if entry[1] == KVM_IRQ_ROUTING_MSI:
                    used |= {(entry[0], 0), (entry[0], 1)}
                used.add((entry[0], chip))
                entries.append(entry)
        if entries and rng.random() < 0.15:  # something may be wrong with one
            at, field = rng.randrange(len(entries)), rng.randrange(6)
            bad = list(entries[at])
            bad[field] = rng.choice((0, 1, 2, 3, 4, 8, 24, 4095, 4096, 0xFFFF_FFFF))
            if bad[1] == KVM_IRQ_ROUTING_MSI:
                bad[5] = self.tame(bad[5])
            route = (bad[0], bad[1], bad[2], bad[3], bad[4], bad[5])
            entries[at] = route
        return [Routing(tuple(entries), rng.choice((0,) * 15 + (1,)))]

    def set_pic(self) -> list[Operation]:
        rng = self.rng
        state = bytes(rng.choice((0, rng.randrange(5), rng.getrandbits(8))) for _ in range(16))
        return [SetIrqchip(rng.getrandbits(1), state)]

    def set_ioapic(self) -> list[Operation]:
        rng = self.rng
        state = kvm_ioapic_state(base_address=rng.choice((IOAPIC,) * 9 + (IOAPIC + 0x1000,)))
        state.ioregsel = rng.choice((0, 1, 0x10, 0x14, self.word()))
        state.id = rng.choice((0, rng.getrandbits(4) << 24, rng.getrandbits(4), self.word()))
        state.irr = rng.choice((0, 0, 1 << rng.randrange(24), self.word()))
        for entry in state.redirtbl:
            masked = 1 << 16 if rng.random() < 0.5 else 0
            entry.bits = self.redirection() | masked
        return [SetIoapic(bytes(state))]

    def set_lapic(self) -> list[Operation]:
        rng, vcpu = self.rng, self.vcpu()
        if rng.random() < 0.08:
            offsets: Iterable[int] = range(0, 0x400, 0x10)
        else:
            offsets = [rng.choice(REGISTERS) for _ in range(rng.randrange(6))]
        values = {offset: self.register_value(offset, vcpu) for offset in offsets if offset < 0x400}
        if rng.random() < 0.5:
            values[SVR] = 0x1FF
        return [SetLapic(vcpu, tuple(values.items()))]

    def nmi(self) -> list[Operation]:
        rng, vcpu = self.rng, self.vcpu()
        return [*[Nmi(vcpu)] * rng.choice((1, 1, 2, 3)), *[GetEvents(vcpu)] * rng.getrandbits(1)]

    def msr(self, vcpu: int) -> tuple[int, int]:
        """An MSR and what to write to it."""
        rng = self.rng
        kind = rng.random()
        if kind < 0.25:
            return MSR_APICBASE, self.base(vcpu)
        if kind < 0.35:
            return MSR_TSC_DEADLINE, rng.choice((0, DEADLINE, DEADLINE + 1))
        if kind < 0.4:
            return MSR_X2APIC + rng.getrandbits(8), rng.getrandbits(8) | 0xC000_0000
        offset = rng.choice(REGISTERS)
        value = self.register_value(offset, vcpu)
        if offset == ICR:
            value |= self.destination() << 32
        elif offset == 0x3F0:
            value = self.vector()
        elif rng.random() < 0.5:
            value = 0 if offset in (EOI, ESR) else value & (0xFF if offset == TPR else ~0)
        if rng.random() < 0.05:
            value |= 1 << 40
        return MSR_X2APIC + offset // 16, value

    def host_msr(self) -> list[Operation]:
        vcpu = self.vcpu()
        index, value = self.msr(vcpu)
        if self.rng.random() < 0.5:
            return [GetMsr(vcpu, index)]
        return [SetMsr(vcpu, index, value), GetMsr(vcpu, index)]

    def mp_state(self) -> list[Operation]:
        return [SetMpState(self.vcpu(), self.rng.randrange(5))]

    # The guest.

    def lapic_access(self) -> list[Operation]:
        rng, vcpu = self.rng, self.vcpu()
        page = rng.choice((LAPIC,) * 12 + (LAPIC + 0x1000, 0xFED0_0000))
        offset = rng.choice(REGISTERS)
        if rng.random() < 0.03:
            offset = rng.randrange(0, 0x1000, 4)
        if rng.random() < 0.45:
            if rng.random() < 0.1:
                offset += rng.randrange(16)
            size_bytes = rng.choice((4, 4, 4, 4, 4, 4, 4, 4, 2, 1))
            address = page + offset // size_bytes * size_bytes
            return [Access(vcpu, f"r{8 * size_bytes}", address)]
        value = self.register_value(offset & ~15, vcpu)
        if rng.random() < 0.05 and offset & ~15 not in (TMICT, ICR):
            return [Access(vcpu, rng.choice(("w16", "w8")), page + offset, value)]
        write = Access(vcpu, "w32", page + offset, value)
        if offset == ICR and rng.random() < 0.7:
            destination = self.destination() << 24
            return [Access(vcpu, "w32", page + ICR2, destination), write]
        return [write]

    def start_another(self) -> list[Operation]:
        """INIT and SIPI to vCPU 1, whole or in part."""
        rng = self.rng
        if self.config.vcpus < 2:
            return self.lapic_access()
        steps: list[Operation]
        init = rng.choice((0x4500, 0x4500, 0xC500, 0x8500, 0xC4500, 0x0500))
        if rng.random() < 0.2:
            steps = [Access(0, "wrmsr", MSR_X2APIC + ICR // 16, 1 << 32 | init & ~0xC_0000)]
            steps += [Access(0, "wrmsr", MSR_X2APIC + ICR // 16, 1 << 32 | 0x4600 | SIPI_VECTOR)]
        elif rng.random() < 0.2:
            steps = [Msi(LAPIC | 1 << 12, init & 0xC500)]
            steps += [Msi(LAPIC | 1 << 12, 0x4600 | SIPI_VECTOR)]
        else:
            aim = Access(0, "w32", LAPIC + ICR2, 1 << 24)
            steps = [aim, Access(0, "w32", LAPIC + ICR, init)]
            steps += [aim, Access(0, "w32", LAPIC + ICR, 0x4600 | SIPI_VECTOR)]
        half = len(steps) // 2
        return rng.choice((steps, steps, steps, steps[:half], steps[half:]))

    def ioapic_access(self) -> list[Operation]:
        rng, vcpu = self.rng, self.vcpu()
        page = rng.choice((IOAPIC,) * 12 + (IOAPIC + 0x1000,))
        kind = rng.random()
        if kind < 0.1:
            offset = rng.choice((0, 0x10, 0x20, 0x40, rng.randrange(0x100)))
            kind_of_read, size_bytes = rng.choice((("r8", 1), ("r16", 2), ("r32", 4)))
            return [Access(vcpu, kind_of_read, page + offset // size_bytes * size_bytes)]
        index = rng.choice((0, 1, 2, 0x10 + rng.randrange(48), 0x10 + rng.randrange(48), 0x40))
        select = Access(vcpu, "w32", page, index)
        if kind < 0.3:
            return [select, Access(vcpu, "r32", page + 0x10)]
        if kind < 0.7 and index >= 0x10:
            pin, entry = (index - 0x10) // 2, self.redirection()
            halves = [(0x11 + 2 * pin, entry >> 32), (0x10 + 2 * pin, entry & 0xFFFF_FFFF)]
            return [
                access
                for at, value in halves
                for access in (
                    Access(vcpu, "w32", page, at),
                    Access(vcpu, "w32", page + 0x10, value),
                )
            ]
        # whatever index is chosen now: the low half of an entry among them
        value = self.tame(rng.choice((self.word(), self.redirection() & 0xFFFF_FFFF)))
        write = Access(vcpu, rng.choice(("w32",) * 6 + ("w16", "w8")), page + 0x10, value)
        return [select, write] if rng.random() < 0.7 else [write]

    def port_access(self) -> list[Operation]:
        rng, vcpu = self.rng, self.vcpu()
        port = rng.choice((0x20, 0x20, 0x21, 0xA0, 0xA0, 0xA1, 0x4D0, 0x4D1))
        if rng.random() < 0.35:
            return [Access(vcpu, "in", port)]
        value = rng.choice((0x20, 0x60, 0x0A, 0x0B, 0x0C, 0x68, 0x11, 0xC2, rng.getrandbits(8)))
        return [Access(vcpu, "out", port, value)]

    def msr_access(self) -> list[Operation]:
        vcpu = self.vcpu()
        index, value = self.msr(vcpu)
        if self.rng.random() < 0.4:
            return [Access(vcpu, "rdmsr", index)]
        return [Access(vcpu, "wrmsr", index, value)]

    def tsc_deadline(self) -> list[Operation]:
        vcpu = self.vcpu()
        mode = Access(vcpu, "w32", LAPIC + LVTT, 2 << 17 | self.vector())
        start = Access(vcpu, "wrmsr", MSR_TSC_DEADLINE, self.rng.choice((0, DEADLINE, DEADLINE)))
        return [mode, start, Access(vcpu, "rdmsr", MSR_TSC_DEADLINE)]

    def enter_x2apic(self) -> list[Operation]:
        vcpu = self.vcpu()
        bsp = 0 if vcpu else 0x100
        return [Access(vcpu, "wrmsr", MSR_APICBASE, LAPIC | 0xC00 | bsp)]

    def interrupt_and_eoi(self) -> list[Operation]:
        """A vector in service, a level line to it, EOIs: what an interrupt handler does."""
        rng, vcpu = self.rng, self.vcpu()
        vector, pin = rng.choice((0x31, 0x45, 0x80)), rng.randrange(24)
        level = rng.getrandbits(1)
        out: list[Operation] = [
            Access(vcpu, "w32", IOAPIC, 0x11 + 2 * pin),
            Access(vcpu, "w32", IOAPIC + 0x10, self.destination() << 24),
            Access(vcpu, "w32", IOAPIC, 0x10 + 2 * pin),
            Access(vcpu, "w32", IOAPIC + 0x10, level << 15 | vector),
            Line(pin, 1),
        ]
        changes = [(SVR, 0x1FF), (ISR + 0x10 * (vector // 32), 1 << vector % 32)]
        if level:
            changes.append((TMR + 0x10 * (vector // 32), 1 << vector % 32))
        if rng.random() < 0.7:
            changes.append((IRR + 0x10 * (vector // 32), 0))
        out.append(SetLapic(vcpu, tuple(changes)))
        if rng.getrandbits(1):
            out.append(Line(pin, 0))
        eoi = Access(vcpu, "w32", LAPIC + EOI, 0)
        return [*out, *[eoi] * rng.choice((1, 1, 2))]

    def program(self) -> Program:
        rng = self.rng
        kinds: list[tuple[int, Callable[[], list[Operation]]]] = [
            (6, self.line), (5, self.msi), (2, self.routing), (2, self.set_pic),
            (2, self.set_ioapic), (4, self.set_lapic), (2, self.nmi), (2, self.host_msr),
        ]  # fmt: skip
        if self.config.guest:
            kinds += [
                (12, self.lapic_access), (8, self.ioapic_access), (3, self.port_access),
                (4, self.msr_access), (2, self.start_another), (3, self.interrupt_and_eoi),
                (2, self.enter_x2apic), (1, self.tsc_deadline),
            ]  # fmt: skip
        else:
            kinds += [(2, self.mp_state)]
        weights = [weight for weight, _ in kinds]
        out: list[Operation] = []
        for _, make in rng.choices(kinds, weights, k=rng.randint(1, 8)):
            out += make()
        return tuple(out)


def sequence(seed: int, programs: int = PROGRAMS_A_SEQUENCE) -> Sequence:
    """The programs of a seed: always the same."""
    rng = random.Random(seed)
    guest = rng.random() < 0.75
    config = Config(
        vcpus=rng.choice((1, 1, 2, 2, 2) if guest else (1, 2, 3)),
        guest=guest,
        x2apic=rng.random() < 0.4,
        x2apic_api=rng.choice((0, 0, 0, 1, 2, 3)),
    )
    maker = _Maker(rng, config)
    out = [maker.program() for _ in range(programs)]
    if guest and rng.random() < 0.8:  # the usual start: only then the others can be sent anything
        on = Access(0, "w32", LAPIC + SVR, 0x1FF)
        out[0] = (on, *maker.start_another(), *out[0])
    return Sequence(seed, config, tuple(out))


# The guest.

IMAGE = Path(__file__).with_name("apic_guest.bin").read_bytes()
LOAD_AT = 0x8000
NMI_AT, GP_AT = 0x8800, 0x8840
PORT_DONE = 0x510
"""vCPU n writes to the n-th port from here when it has done what its mailbox told."""

MAILBOX, MAILBOX_BYTES, NMIS_AT = 0x600, 0x40, 0x680
KINDS = {
    "none": 1, "r8": 2, "r16": 3, "r32": 4, "w8": 5, "w16": 6, "w32": 7,
    "in": 8, "out": 10, "rdmsr": 12, "wrmsr": 13,
}  # fmt: skip
IVT = b"".join(
    struct.pack("<HH", {2: NMI_AT, 13: GP_AT}.get(vector, 0xFFF0), 0) for vector in range(256)
)


class Mailbox:
    """A vCPU's mailbox in guest RAM."""

    def __init__(self, ram: Any, vcpu: int) -> None:
        self._ram = ram
        self._at = MAILBOX + vcpu * MAILBOX_BYTES
        struct.pack_into("<8I", ram, self._at, *([0] * 7), PORT_DONE + vcpu)

    def post(self, access: Access | None) -> None:
        """Something to do; None: nothing, but tell when it is done."""
        if access is None:
            words = (KINDS["none"], 0, 0, 0, 0, 0, 0)
        else:
            low, high = access.value & 0xFFFF_FFFF, access.value >> 32
            words = (KINDS[access.kind], access.address, low, high, 0, 0, 0)
        struct.pack_into("<7I", self._ram, self._at, *words)

    @property
    def is_done(self) -> bool:
        return not self._word(0)

    def answer(self) -> tuple[int, int]:
        """The value read, and whether there was a #GP."""
        low, high, fault = struct.unpack_from("<3I", self._ram, self._at + 16)
        return high << 32 | low, fault

    def _word(self, offset: int) -> int:
        (word,) = struct.unpack_from("<I", self._ram, self._at + offset)
        return int(word)


def nmis_taken(ram: Any) -> int:
    """How many NMIs the guest's vCPUs have taken, all together."""
    (count,) = struct.unpack_from("<I", ram, NMIS_AT)
    return int(count)


# What is compared.


READABLE = frozenset((*REGISTERS, *range(ISR, ESR, 0x10))) - {EOI, 0xC0, 0x2F0, 0x3F0, 0x400}
"""Registers of a local APIC; a read of any other leaves what the instruction emulator read last."""


def read_mask(operation: Access | GetMsr) -> int | None:
    """Which bits of the value read can be compared; None: only whether it is 0."""
    if isinstance(operation, GetMsr) or operation.kind == "rdmsr":
        index = operation.index if isinstance(operation, GetMsr) else operation.address
        return None if index in (MSR_TSC_DEADLINE, MSR_X2APIC + TMCCT // 16) else ~0
    size_bytes = {"r32": 4, "r16": 2, "r8": 1}.get(operation.kind)
    if size_bytes is None or operation.address < APIC_PAGES:
        return ~0
    register, byte = operation.address & 0xFF0, operation.address & 0xF
    if register not in READABLE or byte + size_bytes > 4:
        return 0
    if register == TMCCT:
        return None if size_bytes == 4 else 0
    return ~0


def show(operation: Operation) -> str:
    """For people, and to be pasted: addresses and values in hexadecimal."""

    def value(what: object) -> str:
        if isinstance(what, tuple):
            return "(" + "".join(f"{value(item)}, " for item in what) + ")"
        if isinstance(what, bytes):
            return f'bytes.fromhex("{what.hex()}")'
        return hex(what) if isinstance(what, int) and what > 9 else repr(what)

    values = (value(getattr(operation, name)) for name in operation.__dataclass_fields__)
    return f"{type(operation).__name__}({', '.join(values)})"


def comparable(lapic: bytes, config: Config) -> bytes:
    """KVM_GET_LAPIC's answer without what depends on time.

    Of the current count only whether it is 0. The PPR of a vCPU that runs: KVM brings it up to date
    whenever it looks for interrupts, so also when the host takes the vCPU out of the guest. What
    the guest reads is up to date.
    """
    page = bytearray(lapic)
    page[TMCCT : TMCCT + 4] = (any(lapic[TMCCT : TMCCT + 4]), 0, 0, 0)
    if config.guest:
        page[PPR : PPR + 4] = bytes(4)
    return bytes(page)
