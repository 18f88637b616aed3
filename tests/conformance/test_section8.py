"""What the calls answer: rows of the errno table measured on a real kernel, on both back ends.

The rows are those of the APICs, of routing and of eventfds; `tests/kvm/test_model_errno.py` has
those of the PICs and the PIT. Rows that give the kernel no or a bad pointer cannot be told by this
API. `UNMODELLED` are those the model answers otherwise, and says so.
"""

import errno
import os
from collections.abc import Callable, Iterator
from ctypes import sizeof
from dataclasses import dataclass, field

import pytest

from kvmtick.abi import KvmError
from kvmtick.abi.caps import KVM_CAP_SPLIT_IRQCHIP, KVM_CAP_X2APIC_API
from kvmtick.abi.structs import (
    KVM_IOEVENTFD_FLAG_DATAMATCH,
    KVM_IOEVENTFD_FLAG_DEASSIGN,
    KVM_IOEVENTFD_FLAG_PIO,
    KVM_IRQ_ROUTING_IRQCHIP,
    KVM_IRQCHIP_IOAPIC,
    KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE,
    kvm_irq_routing_entry,
    kvm_irqchip,
    kvm_lapic_state,
    kvm_vcpu_events,
)

from .rig import (
    APIC_BASE,
    ENABLED,
    ID,
    MSI_ADDRESS,
    MSR_APIC_BASE,
    MSR_TSC,
    MSR_TSC_DEADLINE,
    SVR,
    Backend,
    Vcpu,
    Vm,
    to_ioapic,
    to_msi,
    to_pic,
)

VECTOR = 0x40
NO_EVENTFD = -2
"""Stands for a descriptor of something else."""


@dataclass
class Host:
    """A VM without anything, and what the rows need beside it."""

    vm: Vm
    eventfds: list[int] = field(default_factory=list)
    other_fd: int = -1

    def eventfd(self, number: int = 0) -> int:
        """The same descriptor for the same number."""
        while len(self.eventfds) <= number:
            self.eventfds.append(os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC))
        return self.eventfds[number]

    def close(self) -> None:
        for fd in (*self.eventfds, self.other_fd):
            if fd >= 0:
                os.close(fd)

    # What a row starts from.

    def nothing(self) -> None:
        """A fresh VM."""

    def irqchip(self) -> None:
        self.vm.create_irqchip()

    def split(self) -> None:
        self.vm.enable_cap(KVM_CAP_SPLIT_IRQCHIP, 24)

    def x2apic_format(self) -> None:
        self.vm.create_irqchip()
        self.vm.enable_cap(KVM_CAP_X2APIC_API, 1)

    def enabled_lapic(self) -> None:
        self.vm.create_irqchip()
        vcpu = self.vm.create_vcpu(0)
        state = vcpu.get_lapic()
        state.set_reg(SVR, ENABLED)
        vcpu.set_lapic(state)


Call = Callable[[Host], object]
Row = tuple[str, Call, Call, object]
"""Its name, what comes before, the call, and the errno or (None: not looked at) what it gives."""


def raises(number: int) -> KvmError:
    return KvmError(number, "KVM")


EEXIST, EINVAL, ENXIO, ENOENT, EPERM, EBADF, EBUSY = map(
    raises,
    (
        *(errno.EEXIST, errno.EINVAL, errno.ENXIO, errno.ENOENT, errno.EPERM, errno.EBADF),
        errno.EBUSY,
    ),
)


def split_irqchip(pins: int = 24, flags: int = 0) -> Call:
    return lambda host: host.vm.enable_cap(KVM_CAP_SPLIT_IRQCHIP, pins, flags=flags)


def x2apic_api(value: int) -> Call:
    return lambda host: host.vm.enable_cap(KVM_CAP_X2APIC_API, value)


def after(*calls: Call) -> Call:
    """One after the other."""

    def all_of_them(host: Host) -> None:
        for call in calls:
            call(host)

    return all_of_them


def vcpu(vcpu_id: int = 0) -> Call:
    return lambda host: host.vm.create_vcpu(vcpu_id)


def routing(*entries: kvm_irq_routing_entry, flags: int = 0) -> Call:
    return lambda host: host.vm.set_gsi_routing(entries, flags)


def pin_of(chip_id: int, pin: int, **fields: int) -> kvm_irq_routing_entry:
    entry = kvm_irq_routing_entry(gsi=4, type=KVM_IRQ_ROUTING_IRQCHIP, **fields)
    entry.u.irqchip.irqchip = chip_id
    entry.u.irqchip.pin = pin
    return entry


def of_type(type_: int) -> kvm_irq_routing_entry:
    return kvm_irq_routing_entry(gsi=4, type=type_)


def msi(data: int = VECTOR, address: int = MSI_ADDRESS, flags: int = 0) -> Call:
    return lambda host: host.vm.signal_msi(address, data, flags)


def irqfd(gsi: int = 4, flags: int = 0, fd: int | None = 0, resample: int | None = None) -> Call:
    """`fd` and `resample`: numbers of eventfds, NO_EVENTFD, or None: -1."""

    def call(host: Host) -> None:
        host.vm.irqfd(_fd(host, fd), gsi, flags, _fd(host, resample))

    return call


PIO, DEASSIGN = KVM_IOEVENTFD_FLAG_PIO, KVM_IOEVENTFD_FLAG_DEASSIGN
MATCH = KVM_IOEVENTFD_FLAG_DATAMATCH
MMIO_AT = 0xD000_0000


def ioeventfd(
    addr: int = 0x510, length: int = 2, flags: int = PIO, fd: int | None = 0, match: int = 0
) -> Call:
    return lambda host: host.vm.ioeventfd(addr, length, _fd(host, fd), flags, match)


def _fd(host: Host, number: int | None) -> int:
    if number is None:
        return -1
    return host.other_fd if number == NO_EVENTFD else host.eventfd(number)


def signalled_irqfd(host: Host) -> None:
    os.eventfd_write(host.eventfd(0), 1)
    host.vm.irqfd(host.eventfd(0), 4)


def on_vcpu(call: Callable[[Vcpu], object]) -> Call:
    return lambda host: call(host.vm.create_vcpu(0))


def twice(call: Callable[[Vcpu], object]) -> Callable[[Vcpu], object]:
    return lambda each: (call(each), call(each))[1]


def set_lapic(each: Vcpu, **registers: int) -> None:
    state = each.get_lapic()
    if "id" in registers:
        state.set_reg(ID, registers["id"])
    each.set_lapic(state)


def all_ones(each: Vcpu) -> None:
    each.set_lapic(kvm_lapic_state.from_buffer_copy(b"\xff" * sizeof(kvm_lapic_state)))


def set_events(**fields: int) -> Callable[[Vcpu], object]:
    """`exception_nr`: an injected one; `interrupt_nr`: likewise."""

    def call(each: Vcpu) -> None:
        events = kvm_vcpu_events(flags=fields.get("flags", 0))
        if "exception_nr" in fields:
            events.exception.injected, events.exception.nr = 1, fields["exception_nr"]
        if "interrupt_nr" in fields:
            events.interrupt.injected, events.interrupt.nr = 1, fields["interrupt_nr"]
        each.set_vcpu_events(events)

    return call


def get_msr(index: int) -> Callable[[Vcpu], object]:
    return lambda each: each.get_msrs([index]).get(index)


def set_msr(index: int, value: int) -> Callable[[Vcpu], object]:
    return lambda each: each.set_msrs({index: value})


def moved_base(each: Vcpu) -> int:
    each.set_msrs({MSR_APIC_BASE: 0xFED0_0900})
    return each.get_msrs([MSR_APIC_BASE])[MSR_APIC_BASE]


def ioapic_of_ones(host: Host) -> None:
    chip = kvm_irqchip(chip_id=KVM_IRQCHIP_IOAPIC)
    state = chip.chip.ioapic
    ones = type(state).from_buffer_copy(b"\xff" * sizeof(state))
    chip.chip.ioapic = ones
    host.vm.set_irqchip(chip)


BARE, CHIPS, SPLIT = Host.nothing, Host.irqchip, Host.split
X2APIC, LAPIC = Host.x2apic_format, Host.enabled_lapic

TSC_ADJUST, X2APIC_ID, X2APIC_EOI = 0x3B, 0x802, 0x80B
SYSTEM_TIME_NEW, PV_EOI_EN = 0x4B56_4D01, 0x4B56_4D04


def vcpu_rows(before: Call, irqchip: bool) -> list[Row]:
    """The rows that the table has twice: without and with an irqchip."""
    with_or_without = "irqchip" if irqchip else "no irqchip"

    def row(name: str, call: Callable[[Vcpu], object], expected: object) -> Row:
        call_name, _, case = name.partition(" ")
        return f"{call_name} {with_or_without} {case}".strip(), before, on_vcpu(call), expected

    ok_with = None if irqchip else EINVAL
    refused = ENXIO if irqchip else None
    rows = [
        row("GET_LAPIC", lambda v: v.get_lapic(), ok_with),
        row("SET_LAPIC", lambda v: v.set_lapic(kvm_lapic_state()), ok_with),
        *(row(f"INTERRUPT irq={n:#x}", lambda v, n=n: v.interrupt(n), refused) for n in (0, 32)),
        row("INTERRUPT irq=0xff", lambda v: v.interrupt(0xFF), refused),
        row("INTERRUPT irq=0x100", lambda v: v.interrupt(0x100), EINVAL),
        row("INTERRUPT irq=0xffffffff", lambda v: v.interrupt(0xFFFF_FFFF), EINVAL),
        row("INTERRUPT second without run", twice(lambda v: v.interrupt(0x20)), refused),
        row("NMI", lambda v: v.nmi(), None),
        row("NMI twice", twice(lambda v: v.nmi()), None),
        row("GET_MP_STATE", lambda v: v.get_mp_state(), 0),
        row("GET_VCPU_EVENTS", lambda v: v.get_vcpu_events(), None),
        row("SET_VCPU_EVENTS same", lambda v: v.set_vcpu_events(v.get_vcpu_events()), None),
        row("SET_VCPU_EVENTS exception nr=40", set_events(exception_nr=40), EINVAL),
        row("SET_VCPU_EVENTS exception nr=2", set_events(exception_nr=2), EINVAL),
        row("SET_VCPU_EVENTS interrupt 0x20", set_events(interrupt_nr=0x20), None),
        row("GET_MSRS APIC_BASE", get_msr(MSR_APIC_BASE), APIC_BASE),
        row("GET_MSRS TSC", lambda v: list(v.get_msrs([MSR_TSC])), [MSR_TSC]),
        row("GET_MSRS TSC_DEADLINE", get_msr(MSR_TSC_DEADLINE), 0),
        row("GET_MSRS TSC_ADJUST", get_msr(TSC_ADJUST), 0),
        row("GET_MSRS X2APIC_ID", lambda v: v.get_msrs([X2APIC_ID]), {}),
        row("GET_MSRS X2APIC_EOI", lambda v: v.get_msrs([X2APIC_EOI]), {}),
        row("GET_MSRS KVM_SYSTEM_TIME_NEW", get_msr(SYSTEM_TIME_NEW), 0),
        row("GET_MSRS KVM_PV_EOI_EN", get_msr(PV_EOI_EN), 0),
        row("SET_MSRS APIC_BASE disable", set_msr(MSR_APIC_BASE, 0xFEE0_0100), 1),
        row("SET_MSRS APIC_BASE same", set_msr(MSR_APIC_BASE, APIC_BASE), 1),
        row("SET_MSRS APIC_BASE x2apic without cpuid", set_msr(MSR_APIC_BASE, 0xFEE0_0D00), 0),
        row("SET_MSRS APIC_BASE extd only", set_msr(MSR_APIC_BASE, 0xFEE0_0500), 0),
        row("SET_MSRS APIC_BASE moved", set_msr(MSR_APIC_BASE, 0xFED0_0900), 1),
        row("SET_MSRS APIC_BASE moved, read back", moved_base, 0xFED0_0900),
        row("SET_MSRS TSC_DEADLINE=1", set_msr(MSR_TSC_DEADLINE, 1), 1),
        row("SET_MSRS TSC_ADJUST=5", set_msr(TSC_ADJUST, 5), 1),
    ]
    for flags in (1, 2, 4, 8, 0x10, 0x20, 0x40, 0x8000_0000):
        expected = None if flags < 0x10 else EINVAL
        rows.append(row(f"SET_VCPU_EVENTS flags={flags:#x}", set_events(flags=flags), expected))
    for state in range(12):
        expected = None if state == 0 or (irqchip and state in (1, 2, 3, 4, 9)) else EINVAL
        rows.append(
            row(f"SET_MP_STATE state={state}", lambda v, n=state: v.set_mp_state(n), expected)
        )
    return rows


ROWS: list[Row] = [
    ("SPLIT_IRQCHIP fresh VM", BARE, split_irqchip(), None),
    ("SPLIT_IRQCHIP second time", SPLIT, split_irqchip(), EEXIST),
    ("SPLIT_IRQCHIP then CREATE_IRQCHIP", SPLIT, CHIPS, EEXIST),
    ("SPLIT_IRQCHIP then CREATE_PIT2", SPLIT, lambda host: host.vm.create_pit2(), ENOENT),
    ("SPLIT_IRQCHIP then GET_IRQCHIP", SPLIT, lambda host: host.vm.get_irqchip(0), ENXIO),
    ("SPLIT_IRQCHIP then IRQ_LINE", SPLIT, lambda host: host.vm.irq_line(0, 1), None),
    ("SPLIT_IRQCHIP then SIGNAL_MSI (no vcpu)", SPLIT, msi(), EPERM),
    ("SPLIT_IRQCHIP routing with PIC entry", SPLIT, routing(to_pic(4, 4)), EINVAL),
    ("SPLIT_IRQCHIP routing with MSI entry", SPLIT, routing(to_msi(4, VECTOR)), None),
    ("SPLIT_IRQCHIP args[0]=4097", BARE, split_irqchip(4097), EINVAL),
    ("SPLIT_IRQCHIP args[0]=0", BARE, split_irqchip(0), None),
    ("SPLIT_IRQCHIP flags=1", BARE, split_irqchip(24, 1), EINVAL),
    ("SPLIT_IRQCHIP after a vCPU exists", vcpu(), split_irqchip(), EEXIST),
    ("SPLIT_IRQCHIP after CREATE_IRQCHIP", CHIPS, split_irqchip(), EEXIST),
    *((f"X2APIC_API args={n}", CHIPS, x2apic_api(n), None) for n in (0, 1, 3, 8)),
    *((f"X2APIC_API args={n}", CHIPS, x2apic_api(n), EINVAL) for n in (4, 12, 16)),
    ("X2APIC_API split args=4", SPLIT, x2apic_api(4), None),
    ("X2APIC_API split args=12", SPLIT, x2apic_api(12), EINVAL),
    ("ENABLE_CAP unknown cap 9999", CHIPS, lambda host: host.vm.enable_cap(9999), EINVAL),
    ("ENABLE_CAP X2APIC 1 then MSI addr_hi=0x1", LAPIC, x2apic_api(1), None),
    # Routing.
    ("SET_GSI_ROUTING no irqchip, nr=0", BARE, routing(), EINVAL),
    ("SET_GSI_ROUTING no irqchip, 1 PIC entry", BARE, routing(to_pic(4, 4)), EINVAL),
    ("SET_GSI_ROUTING no irqchip, 1 MSI entry", BARE, routing(to_msi(4, VECTOR)), EINVAL),
    ("SET_GSI_ROUTING nr=0", CHIPS, routing(), None),
    (
        "IRQ_LINE_STATUS gsi 4 after empty table",
        after(CHIPS, routing()),
        lambda host: host.vm.irq_line_status(4, 1),
        -1,
    ),
    *(
        (f"SET_GSI_ROUTING {name} pin {pin}", CHIPS, routing(pin_of(chip_id, pin)), expected)
        for name, chip_id, pin, expected in (
            ("PIC master", KVM_IRQCHIP_PIC_MASTER, 0, None),
            ("PIC master", KVM_IRQCHIP_PIC_MASTER, 7, None),
            ("PIC master", KVM_IRQCHIP_PIC_MASTER, 8, EINVAL),
            ("PIC master", KVM_IRQCHIP_PIC_MASTER, 15, EINVAL),
            ("PIC master", KVM_IRQCHIP_PIC_MASTER, 16, EINVAL),
            ("PIC slave", KVM_IRQCHIP_PIC_SLAVE, 0, None),
            ("PIC slave", KVM_IRQCHIP_PIC_SLAVE, 7, None),
            ("PIC slave", KVM_IRQCHIP_PIC_SLAVE, 8, EINVAL),
            ("IOAPIC", KVM_IRQCHIP_IOAPIC, 0, None),
            ("IOAPIC", KVM_IRQCHIP_IOAPIC, 23, None),
            ("IOAPIC", KVM_IRQCHIP_IOAPIC, 24, EINVAL),
            ("irqchip 3", 3, 0, EINVAL),
        )
    ),
    *((f"SET_GSI_ROUTING type {n}", CHIPS, routing(of_type(n)), EINVAL) for n in (0, 3, 4, 5, 99)),
    ("SET_GSI_ROUTING table flags=1", CHIPS, routing(to_pic(4, 4), flags=1), EINVAL),
    ("SET_GSI_ROUTING irqchip entry flags=1", CHIPS, routing(pin_of(0, 4, flags=1)), EINVAL),
    ("SET_GSI_ROUTING MSI flags=1", CHIPS, routing(to_msi(24, VECTOR, flags=1)), None),
    ("SET_GSI_ROUTING MSI flags=2", CHIPS, routing(to_msi(24, VECTOR, flags=2)), EINVAL),
    ("SET_GSI_ROUTING MSI entry", CHIPS, routing(to_msi(24, VECTOR)), None),
    ("SET_GSI_ROUTING MSI addr_lo=0", CHIPS, routing(to_msi(24, VECTOR, 0)), None),
    *(
        (
            f"SET_GSI_ROUTING MSI addr_hi={high:#x} (no x2apic_format)",
            CHIPS,
            routing(to_msi(24, VECTOR, high << 32 | MSI_ADDRESS)),
            None,
        )
        for high in (0x100, 1)
    ),
    ("SET_GSI_ROUTING gsi 4095", CHIPS, routing(to_ioapic(4095, 2)), None),
    ("SET_GSI_ROUTING gsi 4096", CHIPS, routing(to_ioapic(4096, 2)), EINVAL),
    ("SET_GSI_ROUTING gsi 0xffffffff", CHIPS, routing(to_ioapic(0xFFFF_FFFF, 2)), EINVAL),
    ("SET_GSI_ROUTING PIC0 + IOAPIC2", CHIPS, routing(to_pic(0, 0), to_ioapic(0, 2)), None),
    ("SET_GSI_ROUTING PIC0 pin0 twice", CHIPS, routing(to_pic(0, 0), to_pic(0, 0)), EINVAL),
    ("SET_GSI_ROUTING IOAPIC 2 and 3", CHIPS, routing(to_ioapic(0, 2), to_ioapic(0, 3)), EINVAL),
    (
        "SET_GSI_ROUTING PIC0+PIC1+IOAPIC",
        CHIPS,
        routing(to_pic(0, 0), to_pic(0, 8), to_ioapic(0, 2)),
        None,
    ),
    ("SET_GSI_ROUTING MSI+MSI", CHIPS, routing(to_msi(24, 1), to_msi(24, 2)), EINVAL),
    ("SET_GSI_ROUTING IOAPIC then MSI", CHIPS, routing(to_ioapic(0, 2), to_msi(0, 1)), EINVAL),
    ("SET_GSI_ROUTING MSI then IOAPIC", CHIPS, routing(to_msi(0, 1), to_ioapic(0, 2)), EINVAL),
    ("SET_GSI_ROUTING gsi 0 & 1 -> pin 2", CHIPS, routing(to_ioapic(0, 2), to_ioapic(1, 2)), None),
    (
        "SET_GSI_ROUTING nr=4097",
        CHIPS,
        routing(*[to_msi(n % 4096, 1) for n in range(4097)]),
        EINVAL,
    ),
    ("SET_GSI_ROUTING nr=4096", CHIPS, routing(*(to_msi(n, 1) for n in range(4096))), None),
    *(
        (
            f"SET_GSI_ROUTING x2apic_format MSI addr_hi={high:#x}",
            X2APIC,
            routing(to_msi(24, VECTOR, high << 32 | MSI_ADDRESS)),
            expected,
        )
        for high, expected in ((1, EINVAL), (0x100, None))
    ),
    # Messages.
    ("SIGNAL_MSI no irqchip", BARE, msi(), EINVAL),
    ("SIGNAL_MSI no vCPU", CHIPS, msi(), EPERM),
    ("SIGNAL_MSI LAPIC sw-disabled", after(CHIPS, vcpu()), msi(), 0),
    ("SIGNAL_MSI LAPIC enabled vec 0x40", LAPIC, msi(), 1),
    ("SIGNAL_MSI again (coalesced)", after(LAPIC, msi()), msi(), 1),
    ("SIGNAL_MSI dest id 5 absent", LAPIC, msi(address=MSI_ADDRESS | 5 << 12), 0),
    ("SIGNAL_MSI broadcast 0xff", LAPIC, msi(address=MSI_ADDRESS | 0xFF << 12), 1),
    ("SIGNAL_MSI vector 0x0f", LAPIC, msi(0x0F), 1),
    ("SIGNAL_MSI address_lo=0", LAPIC, msi(address=0), 1),
    ("SIGNAL_MSI address_hi=0x100", LAPIC, msi(address=0x100 << 32 | MSI_ADDRESS), 1),
    ("SIGNAL_MSI address_hi=1", LAPIC, msi(address=1 << 32 | MSI_ADDRESS), 1),
    ("SIGNAL_MSI flags=1", LAPIC, msi(flags=1), 1),
    ("SIGNAL_MSI flags=2", LAPIC, msi(flags=2), EINVAL),
    ("SIGNAL_MSI NMI delivery", LAPIC, msi(0x400 | VECTOR), 1),
    ("SIGNAL_MSI SMI delivery", LAPIC, msi(0x200 | VECTOR), 0),
    ("SIGNAL_MSI INIT delivery", LAPIC, msi(0x500 | VECTOR), 1),
    ("SIGNAL_MSI ExtINT", LAPIC, msi(0x700 | VECTOR), 0),
    (
        "SIGNAL_MSI x2apic_format: address_hi=1",
        after(LAPIC, x2apic_api(1)),
        msi(address=1 << 32 | MSI_ADDRESS),
        EINVAL,
    ),
    (
        "SIGNAL_MSI x2apic_format: address_hi=0x100",
        after(LAPIC, x2apic_api(1)),
        msi(address=0x100 << 32 | MSI_ADDRESS),
        0,
    ),
    # Eventfds.
    ("IRQFD no irqchip: assign gsi 4", BARE, irqfd(), EINVAL),
    ("IRQFD no irqchip: assign resample", BARE, irqfd(4, 2, 0, 1), EINVAL),
    ("IRQFD no irqchip: deassign gsi 4", BARE, irqfd(4, 1), None),
    ("IRQFD assign gsi 4", CHIPS, irqfd(), None),
    ("IRQFD same eventfd again gsi 4", after(CHIPS, irqfd()), irqfd(), EBUSY),
    ("IRQFD same eventfd, other gsi 5", after(CHIPS, irqfd()), irqfd(5), EBUSY),
    ("IRQFD other eventfd same gsi 4", after(CHIPS, irqfd()), irqfd(fd=1), None),
    *((f"IRQFD gsi {gsi:#x}", CHIPS, irqfd(gsi), None) for gsi in (100, 4095, 4096, 0xFFFF_FFFF)),
    ("IRQFD deassign gsi 4096", after(CHIPS, irqfd(4096)), irqfd(4096, 1), None),
    ("IRQFD flags=4", CHIPS, irqfd(4, 4), EINVAL),
    ("IRQFD fd=-1", CHIPS, irqfd(fd=None), EBADF),
    ("IRQFD fd is not an eventfd", CHIPS, irqfd(fd=NO_EVENTFD), EINVAL),
    ("IRQFD deassign never assigned", CHIPS, irqfd(4, 1), None),
    ("IRQFD deassign wrong gsi", after(CHIPS, irqfd()), irqfd(5, 1), None),
    ("IRQFD deassign ok", after(CHIPS, irqfd()), irqfd(4, 1), None),
    ("IRQFD deassign twice", after(CHIPS, irqfd(), irqfd(4, 1)), irqfd(4, 1), None),
    ("IRQFD deassign fd=-1", CHIPS, irqfd(4, 1, None), EBADF),
    ("IRQFD resample", CHIPS, irqfd(4, 2, 0, 1), None),
    ("IRQFD resample fd=-1", CHIPS, irqfd(4, 2, 0, None), EBADF),
    ("IRQFD resample fd not eventfd", CHIPS, irqfd(4, 2, 0, NO_EVENTFD), EINVAL),
    ("IRQFD deassign with resample flag", after(CHIPS, irqfd(4, 2, 0, 1)), irqfd(4, 3, 0, 1), None),
    ("IRQFD resample fd == trigger fd", CHIPS, irqfd(4, 2, 0, 0), None),
    ("IRQFD assign with count already 1", CHIPS, signalled_irqfd, None),
    ("IRQFD split: resample", SPLIT, irqfd(4, 2, 0, 1), EINVAL),
    ("IRQFD split: plain", SPLIT, irqfd(), None),
    ("IOEVENTFD pio 0x510 len 2", BARE, ioeventfd(), None),
    ("IOEVENTFD same again", ioeventfd(), ioeventfd(), EEXIST),
    ("IOEVENTFD same addr other fd", ioeventfd(), ioeventfd(fd=1), EEXIST),
    ("IOEVENTFD datamatch differs, same addr", ioeventfd(), ioeventfd(flags=3, match=7), EEXIST),
    ("IOEVENTFD mmio len 0", BARE, ioeventfd(MMIO_AT, 0, 0), None),
    ("IOEVENTFD mmio len 3", BARE, ioeventfd(MMIO_AT, 3, 0), EINVAL),
    ("IOEVENTFD mmio len 8", BARE, ioeventfd(MMIO_AT, 8, 0), None),
    ("IOEVENTFD pio len 8", BARE, ioeventfd(length=8), None),
    ("IOEVENTFD len 0 + datamatch", BARE, ioeventfd(MMIO_AT, 0, MATCH), EINVAL),
    ("IOEVENTFD flags=8 (virtio ccw)", BARE, ioeventfd(MMIO_AT, 4, 8), None),
    ("IOEVENTFD flags=0x10", BARE, ioeventfd(MMIO_AT, 4, 0x10), None),
    ("IOEVENTFD addr wraps", BARE, ioeventfd((1 << 64) - 2, 4, 0), EINVAL),
    ("IOEVENTFD fd=-1", BARE, ioeventfd(fd=None), EBADF),
    ("IOEVENTFD fd not eventfd", BARE, ioeventfd(fd=NO_EVENTFD), EINVAL),
    ("IOEVENTFD deassign ok", ioeventfd(), ioeventfd(flags=PIO | DEASSIGN), None),
    ("IOEVENTFD deassign unknown", BARE, ioeventfd(flags=PIO | DEASSIGN), ENOENT),
    # vCPUs.
    ("CREATE_VCPU id 0 twice", vcpu(), vcpu(), EEXIST),
    *(
        (f"CREATE_VCPU id {n}", BARE, lambda host, n=n: vcpu(n)(host) and None, None)
        for n in (255, 256, 4095)
    ),
    ("CREATE_VCPU id 4096", BARE, vcpu(4096), EINVAL),
    ("SET_BOOT_CPU_ID after vCPU", vcpu(), lambda host: host.vm.set_boot_cpu_id(0), EBUSY),
    ("SET_BOOT_CPU_ID before vCPU, id 1", BARE, lambda host: host.vm.set_boot_cpu_id(1), None),
    ("SET_BOOT_CPU_ID id 5000", BARE, lambda host: host.vm.set_boot_cpu_id(5000), EINVAL),
    *vcpu_rows(BARE, False),
    *vcpu_rows(CHIPS, True),
    *(
        (
            f"SET_LAPIC irqchip id reg={n:#x} on vCPU0",
            CHIPS,
            on_vcpu(lambda v, n=n: set_lapic(v, id=n)),
            None,
        )
        for n in (0x0100_0000, 1, 0xFF00_0000)
    ),
    ("SET_LAPIC irqchip all 0xff", CHIPS, on_vcpu(all_ones), None),
    ("SET_IRQCHIP chip 2 all 0xff", CHIPS, ioapic_of_ones, None),
    # With the split irqchip one interrupt waits for the guest.
    ("INTERRUPT split", SPLIT, on_vcpu(lambda v: v.interrupt(0x20)), None),
    ("INTERRUPT split second", SPLIT, on_vcpu(twice(lambda v: v.interrupt(0x20))), EEXIST),
    ("GET_LAPIC split", SPLIT, on_vcpu(lambda v: v.get_lapic()), None),
]


@pytest.fixture
def host(backend: Backend) -> Iterator[Host]:
    made = Host(backend.make_vm(), other_fd=os.open(os.devnull, os.O_RDONLY))
    yield made
    made.vm.close()
    made.close()


@pytest.mark.parametrize(
    ("name", "before", "call", "expected"), ROWS, ids=[row[0].replace(" ", "-") for row in ROWS]
)
def test_row(
    backend: Backend, host: Host, name: str, before: Call, call: Call, expected: object
) -> None:
    before(host)
    if isinstance(expected, KvmError):
        with pytest.raises(KvmError) as caught:
            call(host)
        assert caught.value.errno == expected.errno
        return
    got = call(host)
    if expected is not None:
        assert got == expected


# --- what some of these calls do ------------------------------------------------------------------


def test_a_refused_table_leaves_the_old_one(host: Host) -> None:
    host.irqchip()
    host.vm.set_gsi_routing([to_pic(4, 5)])
    with pytest.raises(KvmError):
        host.vm.set_gsi_routing([to_pic(4, 6), to_pic(5, 6), to_ioapic(4, 24)])
    host.vm.irq_line(4, 1)
    assert host.vm.get_irqchip(0).chip.pic.irr == 1 << 5


def test_set_lapic_keeps_the_version_and_takes_the_id(host: Host) -> None:
    host.irqchip()
    each = host.vm.create_vcpu(0)
    for given in (0x0100_0000, 1, 0xFF00_0000):
        set_lapic(each, id=given)
        assert each.get_lapic().reg(ID) == given
    all_ones(each)
    assert each.get_lapic().reg(0x30) == 0x5_0014
    assert each.get_lapic().reg(SVR) == 0xFFFF_FFFF


def test_a_set_that_stops_half_way_says_how_many(host: Host) -> None:
    host.irqchip()
    each = host.vm.create_vcpu(0)
    assert each.set_msrs({MSR_APIC_BASE: 0xFEE0_0100, X2APIC_ID: 0, MSR_TSC: 5}) == 1
    assert each.get_msrs([MSR_APIC_BASE, X2APIC_ID, MSR_TSC]) == {MSR_APIC_BASE: 0xFEE0_0100}


@pytest.mark.parametrize(
    ("given", "first", "second"), [(0, 0, 0), (1, 1, 1), (2, 2, 2), (3, 3, 3), (4, 0, 0), (9, 9, 9)]
)
def test_the_mp_state_reads_back(host: Host, given: int, first: int, second: int) -> None:
    """SIPI_RECEIVED (4) starts the vCPU at once."""
    host.irqchip()
    for vcpu_id, expected in enumerate((first, second)):
        each = host.vm.create_vcpu(vcpu_id)
        assert each.get_mp_state() == vcpu_id
        each.set_mp_state(given)
        assert each.get_mp_state() == expected
