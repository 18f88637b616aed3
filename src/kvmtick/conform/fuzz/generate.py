"""Random sequences, biased to what is valid: `sequence(seed, number)` is always the same.

A sequence is about calls alone, or its vCPUs run as well. The first kind makes its VM in any order
and number, errors included, and takes no care of the vCPUs' states. The second begins with a VM
that is mostly in order; what it asks for leaves a vCPU in its program: no INIT reaches vCPU 0, and
a SIPI starts a vCPU where it has code.

Timers get counts that take long (`COUNTS`, `DEADLINE`, `LEAST_COUNT`): see `side`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeAlias

from kvmtick.abi.caps import (
    KVM_CAP_SPLIT_IRQCHIP,
    KVM_CAP_X2APIC_API,
    KVM_CAP_X86_APIC_BUS_CYCLES_NS,
)
from kvmtick.abi.structs import (
    KVM_IRQ_ROUTING_IRQCHIP,
    KVM_IRQ_ROUTING_MSI,
    kvm_ioapic_state,
    kvm_pit_state2,
    kvm_vcpu_events,
)
from kvmtick.conform.fuzz import mailbox
from kvmtick.conform.fuzz.operations import (
    CPUID_KINDS,
    Access,
    Clock,
    CreateIrqchip,
    CreatePit,
    CreatePit2,
    CreateVcpu,
    EnableCap,
    Enter,
    GetMsr,
    Interrupt,
    IoEventFd,
    IrqFd,
    IrqLine,
    IrqLineStatus,
    LapicTick,
    Nmi,
    Operation,
    PitTick,
    RawIoctl,
    ReadFd,
    ReinjectControl,
    Route,
    SetBootCpuId,
    SetCpuid2,
    SetGsiRouting,
    SetIrqchip,
    SetLapic,
    SetMpState,
    SetMsr,
    SetPit,
    SetPit2,
    SetTscKhz,
    SetVcpuEvents,
    SignalFd,
    SignalMsi,
    Window,
)
from kvmtick.conform.fuzz.side import EVENTFDS, LEAST_COUNT, Config

__all__ = ["Sequence", "sequence"]

LAPIC, IOAPIC = 0xFEE0_0000, 0xFEC0_0000
ID, TPR, PPR, EOI, LDR, DFR, SVR = 0x20, 0x80, 0xA0, 0xB0, 0xD0, 0xE0, 0xF0
ISR, TMR, IRR, ESR, ICR, ICR2 = 0x100, 0x180, 0x200, 0x280, 0x300, 0x310
LVTT, LVTTHMR, LVTPC, LVT0, LVT1, LVTERR = 0x320, 0x330, 0x340, 0x350, 0x360, 0x370
TMICT, TMCCT, TDCR, SELF_IPI = 0x380, 0x390, 0x3E0, 0x3F0
MSR_APIC_BASE, MSR_TSC_DEADLINE, MSR_X2APIC = 0x1B, 0x6E0, 0x800

COUNTS = (0, 0xC012_3457, 0xFFFF_FFFF)
MOST_VCPUS = 3

DEADLINE = 0x100_0000_0000
"""Minutes of any TSC, from now."""

VECTORS = (0x20, 0x31, 0x31, 0x45, 0x45, 0x45, 0x46, 0x80, 0xEF, 0xFF, 0x10, 0x0F, 0x00)
DESTINATIONS = (0, 0, 0, 1, 1, 2, 3, 4, 5, 0x0F, 0x10, 0x11, 0x80, 0xFF, 0xFF)
MODES = (0, 0, 0, 0, 0, 1, 1, 1, 2, 3, 4, 4, 5, 6, 7)
INIT, STARTUP = 5, 6
LVTS = (LVTT, LVTTHMR, LVTPC, LVT0, LVT1, LVTERR, 0x2F0)
REGISTERS = (
    ID, 0x30, TPR, 0x90, PPR, EOI, 0xC0, LDR, DFR, SVR, ESR, ICR, ICR2, *LVTS,
    TMICT, TMCCT, TDCR, SELF_IPI, 0x400,
    *(base + 0x10 * index for base in (ISR, TMR, IRR) for index in (0, 1, 2, 4, 7)),
)  # fmt: skip

PIC_PORTS = (0x20, 0xA0)
PORTS = (0x20, 0x21, 0xA0, 0xA1, 0x4D0, 0x4D1, 0x40, 0x41, 0x42, 0x43, 0x61)
OCW2 = (0x00, 0x20, 0x40, 0x60, 0x61, 0x62, 0x67, 0x80, 0xA0, 0xC0, 0xC2, 0xE0, 0xE3, 0xE7)
OCW3 = (0x08, 0x0A, 0x0B, 0x0C, 0x0E, 0x0F, 0x48, 0x68, 0x6B, 0x6C)
ICW1 = (0x11, 0x11, 0x10, 0x13, 0x19, 0x1F)
ICW4 = (0x01, 0x03, 0x11, 0x13, 0x00, 0x0D)
PIT_COUNTS = (0, 1, 100, 0x1234, 0x10000, 0x123456, 0xFFFFFFFF)
PIT_FLAGS = (0, 0, 1, 2, 3, 0xFFFFFFFE)

VCPU_IDS = (0, 0, 0, 1, 1, 2, 3, 7, 15, 16, 254, 255, 256, 4095, 4096, 0xFFFF_FFFF)
BAD_ADDRESSES = (0, 0x1000, 0xFFFF_8880_0000_0000)
"""NULL, a page no process may map, the kernel's own."""
VM_POINTERS = (
    "KVM_CREATE_PIT2", "KVM_GET_PIT", "KVM_GET_PIT2", "KVM_SET_PIT", "KVM_SET_PIT2",
    "KVM_REINJECT_CONTROL", "KVM_GET_IRQCHIP", "KVM_SET_IRQCHIP", "KVM_IRQ_LINE",
    "KVM_IRQ_LINE_STATUS", "KVM_SET_GSI_ROUTING", "KVM_SIGNAL_MSI", "KVM_IRQFD", "KVM_IOEVENTFD",
    "KVM_ENABLE_CAP",
)  # fmt: skip
VCPU_POINTERS = (
    "KVM_GET_LAPIC", "KVM_SET_LAPIC", "KVM_INTERRUPT", "KVM_GET_MP_STATE", "KVM_SET_MP_STATE",
    "KVM_GET_VCPU_EVENTS", "KVM_SET_VCPU_EVENTS", "KVM_GET_MSRS", "KVM_SET_MSRS",
    "KVM_SET_CPUID2", "KVM_ENABLE_CAP",
)  # fmt: skip

Piece: TypeAlias = list[Operation]


@dataclass(frozen=True, slots=True)
class Sequence:
    """Operations for a new VM; `number` of the run with `seed`."""

    seed: int
    number: int
    config: Config
    operations: tuple[Operation, ...]


@dataclass(slots=True)
class _Vm:
    """What the VM of a sequence is meant to be like."""

    irqchip: str
    pit: bool
    vcpus: int
    runs: bool


class _Maker:
    """Random pieces of a sequence: operations that belong together."""

    def __init__(self, rng: random.Random, vm: _Vm) -> None:
        self.rng = rng
        self.vm = vm

    # Values.

    def byte(self) -> int:
        return self.rng.randrange(0x100)

    def small(self) -> int:
        """Mostly a value that means something."""
        return self.rng.randrange(5) if self.rng.random() < 0.5 else self.byte()

    def word(self) -> int:
        rng = self.rng
        return rng.choice((rng.getrandbits(32), rng.getrandbits(8), 0, 0xFFFF_FFFF))

    def vcpu(self) -> int:
        return self.rng.randrange(self.vm.vcpus)

    def vector(self) -> int:
        return self.rng.choice(VECTORS)

    def destination(self) -> int:
        return self.rng.choice((*DESTINATIONS, self.rng.getrandbits(8)))

    def tame(self, message: int) -> int:
        """A message's low word which keeps a guest that runs in its program."""
        if self.vm.runs:
            mode = message >> 8 & 7
            if mode == INIT:
                message &= ~0x700
            elif mode == STARTUP:
                message = message & ~0xFF | mailbox.SIPI_VECTOR
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
        # with the bit for the boot processor an INIT would make the vCPU run at the reset vector
        return value & ~0x100 if self.vm.runs and vcpu else value

    def register_value(self, offset: int) -> int:
        """What to write to a register of a local APIC."""
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
            # only its own vCPU answers to an id that is sent an INIT
            return (0 if self.vm.runs and 0 < value < MOST_VCPUS else value) << 24
        if offset in LVTS:
            low = self.vector() | rng.choice(MODES) << 8 | rng.choice((0, 0, 1 << 16))
            return rng.choice((low, low | rng.choice((1, 2, 2, 3)) << 17, 0x700, self.word()))
        if ISR <= offset < ESR:
            return rng.choice((1 << (self.vector() & 31), 0, self.word()))
        return self.word()

    # Making the VM.

    def creation(self) -> Piece:
        """A VM as it is meant to be, now and then with something too much or out of order."""
        rng, vm = self.rng, self.vm
        out: Piece = []
        if vm.irqchip == "kernel":
            out.append(CreateIrqchip())
        elif vm.irqchip == "split":
            out.append(EnableCap(KVM_CAP_SPLIT_IRQCHIP, rng.choice((0, 8, 24))))
        if rng.random() < 0.3:
            out.append(EnableCap(KVM_CAP_X2APIC_API, rng.choice((1, 2, 3, 3))))
        if rng.random() < 0.1:
            out.append(EnableCap(KVM_CAP_X86_APIC_BUS_CYCLES_NS, rng.choice((2, 10, 40))))
        if vm.pit:
            out.append(CreatePit2(rng.choice((0, 1, 1))))
        x2apic = rng.choice(("", "x2apic", "x2apic, tsc_deadline"))
        for index in range(vm.vcpus):
            out.append(CreateVcpu(index))
            if x2apic:
                out.append(SetCpuid2(index, x2apic))
        for _ in range(rng.choice((0, 0, 1, 2))):
            out.insert(rng.randrange(len(out) + 1), self.make()[0])
        if vm.irqchip != "none" and rng.random() < 0.8:
            out += [SetLapic(index, ((SVR, 0x1FF),)) for index in range(vm.vcpus)]
        return out

    def make(self) -> Piece:
        """One of the calls that make a VM."""
        rng = self.rng
        vcpu_id = rng.choice(VCPU_IDS)
        if self.vm.runs:
            # the n-th vCPU is that with the id n
            vcpu_id = rng.choice((0, 4096, 0xFFFF_FFFF))
        return [
            rng.choice(
                (
                    CreateIrqchip(),
                    EnableCap(KVM_CAP_SPLIT_IRQCHIP, rng.choice((0, 1, 24, 4096, 4097, 1 << 40)))
                    if not self.vm.runs
                    else CreateIrqchip(),
                    EnableCap(KVM_CAP_X2APIC_API, rng.randrange(17), rng.choice((0, 0, 0, 1))),
                    EnableCap(KVM_CAP_X86_APIC_BUS_CYCLES_NS, rng.choice((0, 1, 10, 1 << 40))),
                    EnableCap(rng.choice((9999, 0, 0xFFFF_FFFF)), rng.randrange(2)),
                    CreatePit(),
                    CreatePit2(rng.choice((0, 1, 2, 0xFFFF_FFFF))),
                    CreateVcpu(vcpu_id),
                    SetBootCpuId(
                        0 if self.vm.runs else rng.choice((0, 1, 5000, 4096, 0xFFFF_FFFF))
                    ),
                )
            )
        ]

    def bad_address(self) -> Piece:
        rng = self.rng
        if rng.random() < 0.5:
            return [RawIoctl(-1, rng.choice(VM_POINTERS), rng.choice(BAD_ADDRESSES))]
        return [RawIoctl(self.vcpu(), rng.choice(VCPU_POINTERS), rng.choice(BAD_ADDRESSES))]

    # Calls of the VM.

    def line(self) -> Piece:
        rng = self.rng
        gsi = rng.choice((rng.randrange(24), rng.randrange(24), 0, 2, 4, 8, 9, 24, 25, 40, 4096))
        kind = IrqLine if rng.random() < 0.2 else IrqLineStatus
        chance = rng.random()
        if chance < 0.5:
            return [kind(gsi, 1), kind(gsi, 0)]
        if chance < 0.6:
            return [kind(gsi, 1), kind(gsi, 1), kind(gsi, 0)]
        return [kind(gsi, rng.getrandbits(1))]

    def msi_address(self) -> int:
        rng = self.rng
        low = LAPIC | self.destination() << 12 | rng.choice((0, 0, 4, 8, 12))
        if rng.random() < 0.05:
            low = self.word()
        high = rng.choice((0,) * 12 + (0x100, 1, 0xFFFF_FF00, self.word()))
        return high << 32 | low

    def msi(self) -> Piece:
        rng = self.rng
        data = self.message() if rng.random() < 0.9 else self.tame(self.word())
        return [SignalMsi(self.msi_address(), data, rng.choice((0,) * 15 + (1, 2)))]

    def route(self) -> Route:
        rng = self.rng
        gsi = rng.choice((rng.randrange(24), rng.randrange(24), 24, 25, 40))
        if rng.random() < (0.9 if self.vm.irqchip == "split" else 0.4):
            address = self.msi_address()
            words = (address & 0xFFFF_FFFF, address >> 32, self.message())
            return (gsi, KVM_IRQ_ROUTING_MSI, 0, *words)
        chip = rng.choice((0, 1, 2, 2, 2))
        return (gsi, KVM_IRQ_ROUTING_IRQCHIP, 0, chip, rng.randrange(24 if chip == 2 else 8), 0)

    def routing(self) -> Piece:
        rng = self.rng
        if rng.random() < 0.25:  # the usual table
            table = [(g, 1, 0, g >> 3, g & 7, 0) for g in range(16)]
            table += [(g, 1, 0, 2, 2 if g == 0 else g, 0) for g in range(24) if g != 2]
            return [SetGsiRouting(tuple(table))]
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
            entries[at] = (bad[0], bad[1], bad[2], bad[3], bad[4], bad[5])
        return [SetGsiRouting(tuple(entries), rng.choice((0,) * 15 + (1,)))]

    def set_pic(self) -> Piece:
        rng = self.rng
        state = bytes(rng.choice((0, rng.randrange(5), self.byte())) for _ in range(16))
        return [SetIrqchip(rng.choice((0, 1) * 8 + (3,)), state)]

    def set_ioapic(self) -> Piece:
        rng = self.rng
        state = kvm_ioapic_state(base_address=rng.choice((IOAPIC,) * 9 + (IOAPIC + 0x1000,)))
        state.ioregsel = rng.choice((0, 1, 0x10, 0x14, self.word()))
        state.id = rng.choice((0, rng.getrandbits(4) << 24, rng.getrandbits(4), self.word()))
        state.irr = rng.choice((0, 0, 1 << rng.randrange(24), self.word()))
        for entry in state.redirtbl:
            masked = 1 << 16 if rng.random() < 0.5 else 0
            entry.bits = self.redirection() | masked
        return [SetIrqchip(2, bytes(state))]

    def set_pit(self) -> Piece:
        rng = self.rng
        state = kvm_pit_state2(flags=rng.choice(PIT_FLAGS))
        for channel in state.channels:
            channel.count = rng.choice(PIT_COUNTS)
            channel.latched_count = rng.randrange(0x10000)
            channel.count_latched, channel.status_latched = self.small(), self.small()
            channel.status = self.byte()
            channel.read_state, channel.write_state = self.small(), self.small()
            channel.write_latch = self.byte()
            channel.rw_mode, channel.bcd, channel.gate = self.small(), self.byte(), self.byte()
            channel.mode = rng.randrange(6) if rng.random() < 0.5 else self.byte()
        if 0 < state.channels[0].count < LEAST_COUNT:
            state.channels[0].count |= LEAST_COUNT
        raw = bytes(state)
        return [SetPit(raw[:72])] if rng.random() < 0.2 else [SetPit2(raw)]

    def reinject(self) -> Piece:
        return [ReinjectControl(self.rng.getrandbits(1))]

    def pit_tick(self) -> Piece:
        return [PitTick(self.rng.choice((0, 0, 0, 1, 2, 3, 4)))]

    def irqfd(self) -> Piece:
        rng = self.rng
        fd = rng.choice((*range(EVENTFDS), *range(EVENTFDS), -1))
        gsi = rng.choice((rng.randrange(24), rng.randrange(24), 24, 25, 4095, 4096))
        flags = rng.choice((0, 0, 0, 2, 2, 1, 3, 4))
        resample = rng.choice((*range(EVENTFDS), -1)) if flags & 2 else -1
        signal: Piece = [SignalFd(max(fd, 0))] if rng.random() < 0.6 else []
        return [IrqFd(fd, gsi, flags, resample), *signal]

    def resampled(self) -> Piece:
        """A resampling irqfd that is signalled, and the interrupt's end."""
        rng, vcpu = self.rng, 0
        fd, pin = rng.randrange(EVENTFDS), rng.randrange(3, 16)
        resample = rng.randrange(EVENTFDS)
        out: Piece = [IrqFd(fd, pin, 2, resample)]
        if rng.getrandbits(1):
            out += [SignalFd(fd), Access(vcpu, "out8", 0xA0 if pin > 7 else 0x20, 0x60 | pin & 7)]
        else:
            ready = [(SVR, 0x1FF), (TPR, 0), *((ISR + 0x10 * word, 0) for word in range(8))]
            entry = 1 << 15 | self.vector()
            for at, value in ((0x11 + 2 * pin, 0), (0x10 + 2 * pin, entry)):
                out += [Access(vcpu, "w32", IOAPIC, at), Access(vcpu, "w32", IOAPIC + 0x10, value)]
            out += [SetLapic(vcpu, tuple(ready)), SignalFd(fd), *self.window()]
        return [*out, ReadFd(resample), IrqFd(fd, pin, rng.choice((1, 1, 3)))]

    def ioeventfd(self) -> Piece:
        rng = self.rng
        flags = rng.choice((0, 0, 1)) | rng.choice((0, 2)) | rng.choice((0, 0, 4))
        flags = rng.choice((flags,) * 8 + (8, 16, 32))
        addr = rng.choice((0x600, 0x600, 0xFD00_0000)) if flags & 2 else 0xFD00_0000
        size = rng.choice((0, 1, 2, 4, 4, 8, 3))
        fd = rng.choice((*range(EVENTFDS), -1))
        return [IoEventFd(addr, size, fd, flags, rng.choice((0, 1, 0x55)))]

    def eventfd(self) -> Piece:
        fd = self.rng.randrange(EVENTFDS)
        return [self.rng.choice((SignalFd(fd), ReadFd(fd)))]

    def clocks(self) -> Piece:
        rng = self.rng
        if rng.random() < 0.5:
            return [Clock(rng.choice((-1, 0, 2, 4, 0x10)))]
        return [SetTscKhz(rng.choice((-1, self.vcpu())), rng.getrandbits(1))]

    # Calls of a vCPU.

    def set_lapic(self) -> Piece:
        rng = self.rng
        if rng.random() < 0.08:
            offsets: Iterable[int] = range(0, 0x400, 0x10)
        else:
            offsets = [rng.choice(REGISTERS) for _ in range(rng.randrange(6))]
        values = {offset: self.register_value(offset) for offset in offsets if offset < 0x400}
        if rng.random() < 0.5:
            values[SVR] = 0x1FF
        return [SetLapic(self.vcpu(), tuple(values.items()))]

    def nmi(self) -> Piece:
        return [Nmi(self.vcpu())] * self.rng.choice((1, 1, 2, 3))

    def interrupt(self) -> Piece:
        rng = self.rng
        return [Interrupt(self.vcpu(), rng.choice((0x20, 0x31, 0xFF, 0, 0x100, 0xFFFF_FFFF)))]

    def events(self) -> Piece:
        rng = self.rng
        events = kvm_vcpu_events(flags=rng.choice((0, 1, 1, 2, 4, 5, 7)))
        events.nmi.pending = rng.choice((0, 1, 2, 3))
        events.sipi_vector = mailbox.SIPI_VECTOR if self.vm.runs else self.byte()
        if rng.random() < 0.3:
            events.interrupt.injected, events.interrupt.nr = 1, rng.choice((0x20, 0x31, 0xFF))
        if not self.vm.runs:
            events.nmi.masked, events.nmi.injected = rng.getrandbits(1), rng.getrandbits(1)
            if rng.random() < 0.2:
                events.exception.injected = 1
                events.exception.nr = rng.choice((0, 2, 6, 13, 31, 32, 40))
            if rng.random() < 0.2:
                events.interrupt.shadow = rng.choice((1, 2))  # both: see docs/fidelity.md
            if rng.random() < 0.1:
                events.flags = rng.choice((0x10, 0x20, 0x40, 0x8000_0000))
        return [SetVcpuEvents(self.vcpu(), bytes(events))]

    def msr(self, vcpu: int) -> tuple[int, int]:
        """An MSR and what to write to it."""
        rng = self.rng
        kind = rng.random()
        if kind < 0.25:
            return MSR_APIC_BASE, self.base(vcpu)
        if kind < 0.35:
            return MSR_TSC_DEADLINE, rng.choice((0, DEADLINE, DEADLINE + 1))
        if kind < 0.4:
            return MSR_X2APIC + rng.getrandbits(8), rng.getrandbits(8) | 0xC000_0000
        offset = rng.choice(REGISTERS)
        value = self.register_value(offset)
        if offset == ICR:
            value |= self.destination() << 32
        elif offset == SELF_IPI:
            value = self.vector()
        elif rng.random() < 0.5:
            value = 0 if offset in (EOI, ESR) else value & (0xFF if offset == TPR else ~0)
        if rng.random() < 0.05:
            value |= 1 << 40
        return MSR_X2APIC + offset // 16, value

    def host_msr(self) -> Piece:
        vcpu = self.vcpu()
        index, value = self.msr(vcpu)
        if self.rng.random() < 0.5:
            return [GetMsr(vcpu, index)]
        return [SetMsr(vcpu, index, value), GetMsr(vcpu, index)]

    def mp_state(self) -> Piece:
        rng, vcpu = self.rng, self.vcpu()
        if not self.vm.runs:
            return [SetMpState(vcpu, rng.choice((*range(11), 0, 1, 2, 3, 4)))]
        # a vCPU that was never started has nowhere to run
        return [SetMpState(0, rng.choice((3, 5, 9))), self.any_call(), SetMpState(0, 0)]

    def any_call(self) -> Operation:
        return self.rng.choice((self.line, self.msi, self.nmi, self.set_lapic))()[0]

    def cpuid(self) -> Piece:
        return [SetCpuid2(self.vcpu(), self.rng.choice(CPUID_KINDS))]

    # The guest.

    def lapic_access(self) -> Piece:
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
        value = self.register_value(offset & ~15)
        if rng.random() < 0.05 and offset & ~15 not in (TMICT, ICR):
            return [Access(vcpu, rng.choice(("w16", "w8")), page + offset, value)]
        write = Access(vcpu, "w32", page + offset, value)
        if offset == ICR and rng.random() < 0.7:
            destination = self.destination() << 24
            return [Access(vcpu, "w32", page + ICR2, destination), write]
        return [write]

    def start_another(self) -> Piece:
        """INIT and SIPI to another vCPU, whole or in part."""
        rng = self.rng
        if self.vm.vcpus < 2:
            return self.lapic_access()
        other = rng.randrange(1, self.vm.vcpus)
        sipi = 0x4600 | mailbox.SIPI_VECTOR
        init = rng.choice((0x4500, 0x4500, 0xC500, 0x8500, 0xC4500, 0x0500))
        steps: Piece
        if rng.random() < 0.2:
            icr = MSR_X2APIC + ICR // 16
            steps = [Access(0, "wrmsr", icr, other << 32 | init & ~0xC_0000)]
            steps += [Access(0, "wrmsr", icr, other << 32 | sipi)]
        elif rng.random() < 0.2:
            steps = [SignalMsi(LAPIC | other << 12, init & 0xC500)]
            steps += [SignalMsi(LAPIC | other << 12, sipi)]
        else:
            aim = Access(0, "w32", LAPIC + ICR2, other << 24)
            steps = [aim, Access(0, "w32", LAPIC + ICR, init)]
            steps += [aim, Access(0, "w32", LAPIC + ICR, sipi)]
        half = len(steps) // 2
        return rng.choice((steps, steps, steps, steps[:half], steps[half:]))

    def ioapic_access(self) -> Piece:
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

    def out(self, port: int, value: int) -> Access:
        kind = self.rng.choice(("out8",) * 7 + ("out16",))
        return Access(self.vcpu(), kind, port, value)

    def in_(self, port: int) -> Access:
        return Access(self.vcpu(), self.rng.choice(("in8",) * 7 + ("in16",)), port)

    def port_access(self) -> Piece:
        rng = self.rng
        port = rng.choice(PIC_PORTS)
        kind = rng.randrange(8)
        if kind == 0:
            return [self.in_(rng.choice(PORTS))]
        if kind == 1:
            return [self.out(rng.choice(PORTS), self.byte())]
        if kind == 2:
            return [self.out(port, rng.choice(OCW2))]
        if kind == 3:
            return [self.out(port, rng.choice(OCW3)), self.in_(port)]
        if kind == 4:
            return self.initialise()
        if kind == 5:
            gsi = rng.randrange(16)
            return [IrqLineStatus(gsi, 1), *self.initialise(), IrqLineStatus(gsi, 0)]
        if kind == 6:
            return [self.out(0x43, 0xC0 | rng.randrange(0x40)), self.in_(rng.choice(PORTS[6:9]))]
        return self.counter_access()

    def initialise(self) -> Piece:
        """ICWs of a PIC, not always all of them."""
        rng = self.rng
        port, vcpu = rng.choice(PIC_PORTS), self.vcpu()
        words: Piece = [Access(vcpu, "out8", port, rng.choice(ICW1))]
        data = (self.byte(), self.byte(), rng.choice(ICW4))
        words += (Access(vcpu, "out8", port + 1, each) for each in data)
        return words[: 1 + rng.choice((3, 3, 3, 0, 1, 2))]

    def counter_access(self) -> Piece:
        """A control word for a counter, and some of the bytes it asks for."""
        rng = self.rng
        channel = rng.randrange(3)
        port = 0x40 + channel
        data = [
            self.in_(port) if rng.random() < 0.5 else self.out(port, self.byte())
            for _ in range(rng.randrange(4))
        ]
        return [self.out(0x43, channel << 6 | rng.randrange(0x40)), *data]

    def msr_access(self) -> Piece:
        vcpu = self.vcpu()
        index, value = self.msr(vcpu)
        if self.rng.random() < 0.4:
            return [Access(vcpu, "rdmsr", index)]
        return [Access(vcpu, "wrmsr", index, value)]

    def tsc_deadline(self) -> Piece:
        vcpu = self.vcpu()
        mode = Access(vcpu, "w32", LAPIC + LVTT, 2 << 17 | self.vector())
        start = Access(vcpu, "wrmsr", MSR_TSC_DEADLINE, self.rng.choice((0, DEADLINE, DEADLINE)))
        return [mode, start, Access(vcpu, "rdmsr", MSR_TSC_DEADLINE)]

    def enter_x2apic(self) -> Piece:
        vcpu = self.vcpu()
        bsp = 0 if vcpu else 0x100
        return [Access(vcpu, "wrmsr", MSR_APIC_BASE, LAPIC | 0xC00 | bsp)]

    def interrupt_and_eoi(self) -> Piece:
        """A vector in service, a level line to it, EOIs: what an interrupt handler does."""
        rng, vcpu = self.rng, self.vcpu()
        vector, pin = rng.choice((0x31, 0x45, 0x80)), rng.randrange(24)
        level = rng.getrandbits(1)
        out: Piece = [
            Access(vcpu, "w32", IOAPIC, 0x11 + 2 * pin),
            Access(vcpu, "w32", IOAPIC + 0x10, self.destination() << 24),
            Access(vcpu, "w32", IOAPIC, 0x10 + 2 * pin),
            Access(vcpu, "w32", IOAPIC + 0x10, level << 15 | vector),
            IrqLineStatus(pin, 1),
        ]
        changes = [(SVR, 0x1FF), (ISR + 0x10 * (vector // 32), 1 << vector % 32)]
        if level:
            changes.append((TMR + 0x10 * (vector // 32), 1 << vector % 32))
        if rng.random() < 0.7:
            changes.append((IRR + 0x10 * (vector // 32), 0))
        out.append(SetLapic(vcpu, tuple(changes)))
        if rng.getrandbits(1):
            out.append(IrqLineStatus(pin, 0))
        eoi = Access(vcpu, "w32", LAPIC + EOI, 0)
        return [*out, *[eoi] * rng.choice((1, 1, 2))]

    def window(self) -> Piece:
        return [Window(self.vcpu(), self.rng.choice(("window", "window", "hlt")))]

    def take(self) -> Piece:
        """Something that makes an interrupt, in a local APIC that takes it, and a window."""
        rng, vcpu = self.rng, self.vcpu()
        ready = [(SVR, 0x1FF), (TPR, 0), *((ISR + 0x10 * word, 0) for word in range(8))]
        cause = rng.choice((self.line, self.msi, self.lapic_access))()
        return [SetLapic(vcpu, tuple(ready)), *cause, *self.window(), *self.window()]

    def enter(self) -> Piece:
        return [Enter(self.vcpu())]

    def lapic_tick(self) -> Piece:
        rng = self.rng
        mode = rng.choice((0, 0, 1)) << 17 | rng.choice((0, 0, 1)) << 16
        return [LapicTick(self.vcpu(), mode | self.vector())]

    def doorbell(self) -> Piece:
        """A write that an ioeventfd may wait for."""
        rng, vcpu = self.rng, self.vcpu()
        bits = rng.choice((8, 16, 32))
        value = rng.choice((0, 1, 0x55))
        if rng.getrandbits(1):
            return [Access(vcpu, f"out{bits}", 0x600, value)]
        return [Access(vcpu, f"w{bits}", 0xFD00_0000, value)]

    # All of it.

    def kinds(self) -> list[tuple[float, Callable[[], Piece]]]:
        """What there is, with weights."""
        vm = self.vm
        apic = vm.irqchip != "none"
        out: list[tuple[float, Callable[[], Piece]]] = [
            (6, self.line), (5, self.msi), (2, self.routing), (2, self.set_pic),
            (2, self.set_ioapic), (4 if apic else 0.5, self.set_lapic), (2, self.nmi),
            (2, self.host_msr), (2 if vm.pit else 0.2, self.set_pit), (0.3, self.reinject),
            (0.3 if vm.pit else 0, self.pit_tick), (1.5, self.irqfd), (1, self.ioeventfd),
            (1, self.eventfd), (0.3, self.clocks), (1, self.bad_address),
            (0.5 if vm.irqchip == "kernel" else 3, self.interrupt), (1, self.events),
        ]  # fmt: skip
        if vm.runs:
            out += [
                (12 if apic else 2, self.lapic_access), (8, self.ioapic_access),
                (12, self.port_access), (4, self.msr_access), (2, self.start_another),
                (3, self.interrupt_and_eoi), (2, self.enter_x2apic), (1, self.tsc_deadline),
                (6, self.window), (4, self.take), (1, self.resampled), (1, self.enter),
                (1, self.doorbell),
                (0.3 if apic else 0, self.lapic_tick), (0.1, self.make), (0.2, self.mp_state),
            ]  # fmt: skip
        else:
            out += [(3, self.mp_state), (2, self.make), (0.5, self.cpuid)]
        return out


CALLS_PIECES, GUEST_PIECES = 60, 100


def sequence(seed: int, number: int) -> Sequence:
    """The `number`-th sequence of the run with `seed`."""
    rng = random.Random(seed << 32 | number)
    runs = rng.random() < 0.75
    irqchip = rng.choice(("kernel",) * 8 + ("split", "none"))
    pit = irqchip == "kernel" and rng.random() < 0.5
    vm = _Vm(irqchip, pit, rng.choice((1, 1, 2, 2, 2, 3)), runs)
    maker = _Maker(rng, vm)
    kinds = maker.kinds()
    out: Piece = []
    if runs or rng.random() < 0.7:
        out += maker.creation()
    if runs and rng.random() < 0.8:  # only then the others can be sent anything
        out += maker.start_another()
    makers, weights = [make for _, make in kinds], [weight for weight, _ in kinds]
    for make in rng.choices(makers, weights, k=GUEST_PIECES if runs else CALLS_PIECES):
        out += make()
    return Sequence(seed, number, Config(runs), tuple(out))
