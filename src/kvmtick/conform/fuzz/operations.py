"""What a sequence is made of: one ioctl, one access of a guest, one wait for a timer.

An operation is a frozen dataclass of plain values, so a sequence can be stored (`replay`), cut and
carried out on any back end. `do` is what it does on a `Side`; what it returns is compared with what
it returned on the other side, an errno (`KvmError`) by name. Whatever hangs on the VM's state is
decided when it is carried out, from state that is compared: sides that agree so far decide alike.

`vcpu` is the index of a vCPU in the order of creation, `fd` the index of an eventfd. An operation
on a vCPU there is none of does nothing, so any part of a sequence is a sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from kvmtick.abi.ioctls import IOCTLS
from kvmtick.abi.structs import (
    kvm_clock_data,
    kvm_cpuid_entry2,
    kvm_ioapic_state,
    kvm_irq_routing_entry,
    kvm_irqchip,
    kvm_lapic_state,
    kvm_pic_state,
    kvm_pit_state,
    kvm_pit_state2,
    kvm_vcpu_events,
)

if TYPE_CHECKING:
    from kvmtick.conform.fuzz.side import Side

__all__ = [
    "KINDS",
    "Access",
    "Answer",
    "Clock",
    "CreateIrqchip",
    "CreatePit",
    "CreatePit2",
    "CreateVcpu",
    "EnableCap",
    "Enter",
    "GetMsr",
    "Interrupt",
    "IoEventFd",
    "IrqFd",
    "IrqLine",
    "IrqLineStatus",
    "LapicTick",
    "Nmi",
    "Operation",
    "PitTick",
    "RawIoctl",
    "ReadFd",
    "ReinjectControl",
    "Route",
    "SetBootCpuId",
    "SetCpuid2",
    "SetGsiRouting",
    "SetIrqchip",
    "SetLapic",
    "SetMpState",
    "SetMsr",
    "SetPit",
    "SetPit2",
    "SetTscKhz",
    "SetVcpuEvents",
    "SignalFd",
    "SignalMsi",
    "Window",
]

Answer: TypeAlias = int | str | tuple["Answer", ...] | None
"""What an operation gave."""

Route: TypeAlias = tuple[int, int, int, int, int, int]
"""gsi, type, flags, and three words: irqchip, pin, 0 or address_lo, address_hi, data."""

NO_VCPU = "no such vCPU"

TICK_COUNT = 100
"""PIT clocks: 84 us."""


class Operation:
    """One step of a sequence."""

    __slots__ = ()

    def do(self, side: Side) -> Answer:
        """Carry it out. Raises `KvmError`, whose errno is then the answer."""
        raise NotImplementedError


# Making a VM.


@dataclass(frozen=True, slots=True)
class CreateIrqchip(Operation):
    """KVM_CREATE_IRQCHIP."""

    def do(self, side: Side) -> Answer:
        side.vm.create_irqchip()
        return None


@dataclass(frozen=True, slots=True)
class EnableCap(Operation):
    """KVM_ENABLE_CAP of the VM."""

    cap: int
    arg: int
    flags: int = 0

    def do(self, side: Side) -> Answer:
        side.vm.enable_cap(self.cap, self.arg, flags=self.flags)
        return None


@dataclass(frozen=True, slots=True)
class CreatePit(Operation):
    """KVM_CREATE_PIT."""

    def do(self, side: Side) -> Answer:
        side.vm.create_pit()
        return None


@dataclass(frozen=True, slots=True)
class CreatePit2(Operation):
    """KVM_CREATE_PIT2."""

    flags: int = 0

    def do(self, side: Side) -> Answer:
        side.vm.create_pit2(self.flags)
        return None


@dataclass(frozen=True, slots=True)
class CreateVcpu(Operation):
    """KVM_CREATE_VCPU; a vCPU that runs from the start is put at the guest's entry."""

    vcpu_id: int

    def do(self, side: Side) -> Answer:
        side.create_vcpu(self.vcpu_id)
        return None


@dataclass(frozen=True, slots=True)
class SetBootCpuId(Operation):
    """KVM_SET_BOOT_CPU_ID."""

    vcpu_id: int

    def do(self, side: Side) -> Answer:
        side.vm.set_boot_cpu_id(self.vcpu_id)
        return None


@dataclass(frozen=True, slots=True)
class RawIoctl(Operation):
    """An ioctl with a raw address, or number, as its argument; `vcpu` -1: of the VM."""

    vcpu: int
    request: str
    arg: int

    def do(self, side: Side) -> Answer:
        target = side.vm if self.vcpu < 0 else side.vcpu(self.vcpu)
        if target is None:
            return NO_VCPU
        return target.ioctl(IOCTLS[self.request], self.arg)


# Interrupt lines, messages, eventfds.


@dataclass(frozen=True, slots=True)
class IrqLine(Operation):
    """KVM_IRQ_LINE."""

    gsi: int
    level: int

    def do(self, side: Side) -> Answer:
        side.vm.irq_line(self.gsi, self.level)
        return None


@dataclass(frozen=True, slots=True)
class IrqLineStatus(Operation):
    """KVM_IRQ_LINE_STATUS."""

    gsi: int
    level: int

    def do(self, side: Side) -> Answer:
        return side.vm.irq_line_status(self.gsi, self.level)


@dataclass(frozen=True, slots=True)
class SignalMsi(Operation):
    """KVM_SIGNAL_MSI."""

    address: int
    data: int
    flags: int = 0

    def do(self, side: Side) -> Answer:
        return side.vm.signal_msi(self.address, self.data, self.flags)


@dataclass(frozen=True, slots=True)
class SetGsiRouting(Operation):
    """KVM_SET_GSI_ROUTING."""

    entries: tuple[Route, ...]
    flags: int = 0

    def do(self, side: Side) -> Answer:
        side.vm.set_gsi_routing([_routing_entry(*entry) for entry in self.entries], self.flags)
        return None


def _routing_entry(
    gsi: int, type_: int, flags: int, first: int, second: int, third: int
) -> kvm_irq_routing_entry:
    entry = kvm_irq_routing_entry(gsi=gsi, type=type_, flags=flags)
    entry.u.msi.address_lo, entry.u.msi.address_hi, entry.u.msi.data = first, second, third
    return entry


@dataclass(frozen=True, slots=True)
class IrqFd(Operation):
    """KVM_IRQFD; `fd` and `resample` beyond the last eventfd are no descriptors."""

    fd: int
    gsi: int
    flags: int = 0
    resample: int = -1

    def do(self, side: Side) -> Answer:
        side.vm.irqfd(side.fd(self.fd), self.gsi, self.flags, side.fd(self.resample))
        side.let_irqfds_work()  # it may have been signalled before
        return None


@dataclass(frozen=True, slots=True)
class IoEventFd(Operation):
    """KVM_IOEVENTFD."""

    addr: int
    size: int
    fd: int
    flags: int = 0
    datamatch: int = 0

    def do(self, side: Side) -> Answer:
        fd = side.fd(self.fd)
        side.vm.ioeventfd(self.addr, self.size, fd, self.flags, self.datamatch)
        return None


@dataclass(frozen=True, slots=True)
class SignalFd(Operation):
    """Somebody writes 1 to an eventfd, which may be an irqfd."""

    fd: int

    def do(self, side: Side) -> Answer:
        side.signal_fd(self.fd)
        return None


@dataclass(frozen=True, slots=True)
class ReadFd(Operation):
    """Take what an eventfd counts: who resamples, or waits for an ioeventfd, does so."""

    fd: int

    def do(self, side: Side) -> Answer:
        return side.read_fd(self.fd)


# States of the VM.


@dataclass(frozen=True, slots=True)
class SetIrqchip(Operation):
    """KVM_SET_IRQCHIP of any bytes: struct kvm_pic_state or kvm_ioapic_state, by `chip_id`."""

    chip_id: int
    state: bytes

    def do(self, side: Side) -> Answer:
        chip = kvm_irqchip(chip_id=self.chip_id)
        if self.chip_id < 2:
            chip.chip.pic = kvm_pic_state.from_buffer_copy(self.state)
        elif self.chip_id == 2:
            chip.chip.ioapic = kvm_ioapic_state.from_buffer_copy(self.state)
        side.vm.set_irqchip(chip)
        return None


@dataclass(frozen=True, slots=True)
class SetPit(Operation):
    """KVM_SET_PIT of any bytes: struct kvm_pit_state."""

    state: bytes

    def do(self, side: Side) -> Answer:
        side.vm.set_pit(kvm_pit_state.from_buffer_copy(self.state))
        return None


@dataclass(frozen=True, slots=True)
class SetPit2(Operation):
    """KVM_SET_PIT2 of any bytes: struct kvm_pit_state2."""

    state: bytes

    def do(self, side: Side) -> Answer:
        side.vm.set_pit2(kvm_pit_state2.from_buffer_copy(self.state))
        return None


@dataclass(frozen=True, slots=True)
class ReinjectControl(Operation):
    """KVM_REINJECT_CONTROL."""

    on: int

    def do(self, side: Side) -> Answer:
        side.vm.reinject_control(bool(self.on))
        return None


@dataclass(frozen=True, slots=True)
class Clock(Operation):
    """KVM_SET_CLOCK, or with `flags` -1 KVM_GET_CLOCK: only whether it is done."""

    flags: int

    def do(self, side: Side) -> Answer:
        if self.flags < 0:
            side.vm.get_clock()
        else:
            side.vm.set_clock(kvm_clock_data(flags=self.flags))
        return None


@dataclass(frozen=True, slots=True)
class SetTscKhz(Operation):
    """KVM_SET_TSC_KHZ to what KVM_GET_TSC_KHZ tells, or 0, which is the host's rate; `vcpu` -1: of
    the VM.
    """

    vcpu: int
    same: int

    def do(self, side: Side) -> Answer:
        target = side.vm if self.vcpu < 0 else side.vcpu(self.vcpu)
        if target is None:
            return NO_VCPU
        target.set_tsc_khz(target.get_tsc_khz() if self.same else 0)
        return None


# States of a vCPU.


@dataclass(frozen=True, slots=True)
class OfVcpu(Operation):
    """What is done to one vCPU."""

    vcpu: int

    def do(self, side: Side) -> Answer:
        return NO_VCPU if side.vcpu(self.vcpu) is None else self.do_to(side)

    def do_to(self, side: Side) -> Answer:
        """As `do`; the vCPU is there."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class SetLapic(OfVcpu):
    """KVM_SET_LAPIC of what KVM_GET_LAPIC gives, with (offset, value) changed in it."""

    changes: tuple[tuple[int, int], ...]

    def do_to(self, side: Side) -> Answer:
        vcpu = side.vcpus[self.vcpu]
        lapic = vcpu.get_lapic()
        for offset, value in self.changes:
            lapic.set_reg(offset, value & 0xFFFF_FFFF)
        keep_timer_away(lapic)
        vcpu.set_lapic(lapic)
        return None


TMICT, TMCCT = 0x380, 0x390


def keep_timer_away(lapic: kvm_lapic_state) -> None:
    """A one-shot count that is over would fire at once: it begins anew."""
    if lapic.reg(TMICT) and lapic.reg(TMCCT) < 1 << 31:
        lapic.set_reg(TMCCT, lapic.reg(TMICT))


@dataclass(frozen=True, slots=True)
class SetVcpuEvents(OfVcpu):
    """KVM_SET_VCPU_EVENTS of any bytes: struct kvm_vcpu_events."""

    state: bytes

    def do_to(self, side: Side) -> Answer:
        events = kvm_vcpu_events.from_buffer_copy(self.state)
        side.vcpus[self.vcpu].set_vcpu_events(events)
        return None


@dataclass(frozen=True, slots=True)
class SetMpState(OfVcpu):
    """KVM_SET_MP_STATE."""

    mp_state: int

    def do_to(self, side: Side) -> Answer:
        side.vcpus[self.vcpu].set_mp_state(self.mp_state)
        return None


@dataclass(frozen=True, slots=True)
class Nmi(OfVcpu):
    """KVM_NMI."""

    def do_to(self, side: Side) -> Answer:
        side.vcpus[self.vcpu].nmi()
        return None


@dataclass(frozen=True, slots=True)
class Interrupt(OfVcpu):
    """KVM_INTERRUPT."""

    irq: int

    def do_to(self, side: Side) -> Answer:
        side.vcpus[self.vcpu].interrupt(self.irq)
        return None


@dataclass(frozen=True, slots=True)
class SetMsr(OfVcpu):
    """KVM_SET_MSRS of one; a TSC deadline counts from now."""

    index: int
    value: int

    def do_to(self, side: Side) -> Answer:
        value = side.from_now(self.vcpu, self.index, self.value)
        return side.vcpus[self.vcpu].set_msrs({self.index: value})


@dataclass(frozen=True, slots=True)
class GetMsr(OfVcpu):
    """KVM_GET_MSRS of one."""

    index: int

    def do_to(self, side: Side) -> Answer:
        found = side.vcpus[self.vcpu].get_msrs([self.index])
        return tuple(side.msr_answer(index, value) for index, value in found.items())


@dataclass(frozen=True, slots=True)
class SetCpuid2(OfVcpu):
    """KVM_SET_CPUID2: leaves 0 and 1, with the features whose names `cpuid` has."""

    cpuid: str

    def do_to(self, side: Side) -> Answer:
        side.vcpus[self.vcpu].set_cpuid2(_CPUID[self.cpuid])
        return None


def _leaves(ecx: int) -> list[kvm_cpuid_entry2]:
    top = kvm_cpuid_entry2(function=0, eax=1, ebx=0x756E6547, ecx=0x6C65746E, edx=0x49656E69)
    return [top, kvm_cpuid_entry2(function=1, eax=0x600, ecx=ecx, edx=1 << 9 | 1 << 5 | 1 << 4)]


X2APIC, TSC_DEADLINE = 1 << 21, 1 << 24
_CPUID = {
    "nothing": [],
    "apic": _leaves(0),
    "x2apic": _leaves(X2APIC),
    "x2apic, tsc_deadline": _leaves(X2APIC | TSC_DEADLINE),
}
CPUID_KINDS = tuple(_CPUID)


# The guest.


@dataclass(frozen=True, slots=True)
class Access(OfVcpu):
    """A guest's access; `kind` is one of `mailbox.KINDS`."""

    kind: str
    address: int
    value: int = 0

    def do_to(self, side: Side) -> Answer:
        value = self.value
        if self.kind == "wrmsr":
            value = side.from_now(self.vcpu, self.address, value)
        elif self.address == PORT_PIT and self.kind.startswith("out"):
            value = side.far_count(value)
        return side.access(self.vcpu, self.kind, self.address, value)


PORT_PIT = 0x40


@dataclass(frozen=True, slots=True)
class Enter(OfVcpu):
    """Let the guest run to its next exit, and on until it has no NMI to take."""

    def do_to(self, side: Side) -> Answer:
        return side.access(self.vcpu, "none")


@dataclass(frozen=True, slots=True)
class Window(OfVcpu):
    """An interrupt window, for one interrupt: `window` (STI; OUT), or `hlt` (STI; HLT)."""

    kind: str

    def do_to(self, side: Side) -> Answer:
        return side.window(self.vcpu, self.kind)


# Timers that fire.


@dataclass(frozen=True, slots=True)
class PitTick(Operation):
    """Start channel 0 with a short count, by KVM_SET_PIT2, wait until it has fired, and start it
    with one that will not fire. A periodic one fires more than twice.
    """

    mode: int

    def do(self, side: Side) -> Answer:
        state = side.vm.get_pit2()
        channel = state.channels[0]
        channel.mode, channel.count = self.mode, TICK_COUNT
        side.vm.set_pit2(state)
        side.wait_us(500 if self.mode in (0, 1, 4, 5) else 1500)
        channel.count = 0
        side.vm.set_pit2(state)
        return None


@dataclass(frozen=True, slots=True)
class LapicTick(OfVcpu):
    """Start the local APIC's timer with a short count, by KVM_SET_LAPIC, wait until it has fired,
    let the vCPU enter the guest, and stop it.
    """

    lvtt: int

    def do_to(self, side: Side) -> Answer:
        vcpu = side.vcpus[self.vcpu]
        answer = side.access(self.vcpu, "none")
        if isinstance(answer, str):
            return answer
        lapic = vcpu.get_lapic()
        lapic.set_reg(0x320, self.lvtt)
        lapic.set_reg(0x3E0, 0xB)
        lapic.set_reg(TMICT, 100_000)
        lapic.set_reg(TMCCT, 100_000)
        vcpu.set_lapic(lapic)
        side.wait_us(500)
        answer = side.access(self.vcpu, "none")
        lapic = vcpu.get_lapic()
        lapic.set_reg(TMICT, 0)
        vcpu.set_lapic(lapic)
        return answer


KINDS: dict[str, type[Operation]] = {
    kind.__name__: kind
    for kind in (
        CreateIrqchip,
        EnableCap,
        CreatePit,
        CreatePit2,
        CreateVcpu,
        SetBootCpuId,
        RawIoctl,
        IrqLine,
        IrqLineStatus,
        SignalMsi,
        SetGsiRouting,
        IrqFd,
        IoEventFd,
        SignalFd,
        ReadFd,
        SetIrqchip,
        SetPit,
        SetPit2,
        ReinjectControl,
        Clock,
        SetTscKhz,
        SetLapic,
        SetVcpuEvents,
        SetMpState,
        Nmi,
        Interrupt,
        SetMsr,
        GetMsr,
        SetCpuid2,
        Access,
        Enter,
        Window,
        PitTick,
        LapicTick,
    )
}
"""All kinds of operations, by name."""
