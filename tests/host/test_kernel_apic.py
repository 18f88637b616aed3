"""CPUID, MSRs, the split irqchip and errors on the live kernel."""

import errno
from collections.abc import Callable

import pytest
from eventfds import LIMIT_S, MakeEventFd
from tiny_guests import DONE, HLT, MakeVm, bytes_at

import kvmtick
from kvmtick.abi import KvmError
from kvmtick.abi.caps import KVM_CAP_SPLIT_IRQCHIP, KVM_CAP_X2APIC_API
from kvmtick.abi.exits import ExitIo, ExitIoapicEoi
from kvmtick.abi.structs import (
    KVM_IOEVENTFD_FLAG_PIO,
    KVM_IRQ_ROUTING_MSI,
    kvm_irq_routing_entry,
)
from kvmtick.kvm.kernel import KernelVm

APIC_BASE = 0xFEE0_0000
MSR_IA32_APICBASE = 0x1B
MSR_IA32_SYSENTER_CS = 0x174
CPUID_X2APIC = 1 << 21


def mmio_write(address: int, value: int) -> bytes:
    """mov dword [address], value; in unreal mode"""
    return b"\x67\x66\xc7\x05" + address.to_bytes(4, "little") + value.to_bytes(4, "little")


# --- CPUID, MSRs, TSC ---------------------------------------------------------------------------


def test_cpuid_is_what_was_set(make_vm: MakeVm) -> None:
    # xor eax, eax; inc eax; cpuid; mov eax, ecx; out 0xf4, eax
    vm = make_vm(b"\x66\x31\xc0\x66\x40\x0f\xa2\x66\x89\xc8\x66\xe7\xf4")
    entries = vm.get_supported_cpuid()
    assert [e.function for e in entries] == [
        e.function for e in kvmtick.Kvm("kernel").get_supported_cpuid()
    ]
    assert len(entries) > 5
    leaf = next(entry for entry in entries if entry.function == 1)
    assert leaf.ecx & CPUID_X2APIC
    vcpu = vm.vcpus[0]
    vcpu.set_cpuid2(entries)
    kept = next(entry for entry in vcpu.get_cpuid2() if entry.function == 1)
    assert (kept.eax, kept.ecx & CPUID_X2APIC) == (leaf.eax, CPUID_X2APIC)
    assert vm.run(limit_s=LIMIT_S).exit.code & CPUID_X2APIC
    leaf.eax ^= 0x10
    with pytest.raises(KvmError) as caught:
        vcpu.set_cpuid2(entries)
    assert caught.value.errno == errno.EINVAL


def test_msrs_by_index(make_vm: MakeVm) -> None:
    vcpu = make_vm(HLT).vcpus[0]
    values = vcpu.get_msrs([MSR_IA32_APICBASE, 0x10, 0x3B])
    assert values[MSR_IA32_APICBASE] == 0xFEE0_0900
    assert list(values) == [MSR_IA32_APICBASE, 0x10, 0x3B]
    # there is none of the second: the rest is not looked at
    assert vcpu.get_msrs([MSR_IA32_APICBASE, 0x1234_5678, 0x10]) == {MSR_IA32_APICBASE: 0xFEE0_0900}
    moved = {MSR_IA32_APICBASE: 0xFEE0_0100, MSR_IA32_SYSENTER_CS: 5}
    assert vcpu.set_msrs(moved) == 2
    assert vcpu.get_msrs(moved) == moved
    assert vcpu.set_msrs({MSR_IA32_APICBASE: 0xFEE0_0500}) == 0  # no enable bit: x2APIC alone


def test_tsc_rate(make_vm: MakeVm) -> None:
    vcpu = make_vm(HLT).vcpus[0]
    host = vcpu.get_tsc_khz()
    vcpu.set_tsc_khz(2 * host)
    assert vcpu.get_tsc_khz() == 2 * host
    vcpu.set_tsc_khz(0)
    assert vcpu.get_tsc_khz() == host


# --- split irqchip ------------------------------------------------------------------------------


def test_the_split_irqchip_tells_the_end_of_a_level_interrupt(make_vm: MakeVm) -> None:
    vm = make_vm(irqchip=False)
    vm.enable_cap(KVM_CAP_SPLIT_IRQCHIP, 24)
    entry = kvm_irq_routing_entry(gsi=5, type=KVM_IRQ_ROUTING_MSI)
    entry.u.msi.address_lo, entry.u.msi.data = APIC_BASE, 0xC045  # level, assert, vector 0x45
    vm.set_gsi_routing([entry])
    vcpu = vm.create_vcpu()
    vm.load(bytes_at(mmio_write(APIC_BASE + 0xB0, 0) + DONE))
    vcpu.set_real_mode(0, 0x1000, unreal=True)
    lapic = vcpu.get_lapic()
    lapic.set_reg(0xF0, 0x1FF)
    for register in (0x100, 0x180):  # in service, level
        lapic.set_reg(register + 0x10 * 2, 1 << 5)
    vcpu.set_lapic(lapic)
    # this exit may be told only after the exits of the instructions behind the EOI
    exits = [vcpu.run(LIMIT_S), vcpu.run(LIMIT_S)]
    assert ExitIoapicEoi(0x45) in exits
    assert ExitIo(0xF4, 1, 1, True, b"\0") in exits


# --- errno: section 8 ---------------------------------------------------------------------------

BARE: dict[str, bool] = {"irqchip": False}
NO_PIT: dict[str, bool] = {"pit": False}

Call = Callable[[KernelVm, int], object]
"""Of a VM and an eventfd."""

PIO = KVM_IOEVENTFD_FLAG_PIO


def _twice(vm: KernelVm, call: Callable[[KernelVm], object]) -> None:
    call(vm)
    call(vm)


ERRNO_ROWS: list[tuple[str, dict[str, bool], Call, int]] = [
    ("SIGNAL_MSI no irqchip", BARE, lambda vm, fd: vm.signal_msi(APIC_BASE, 0x45), errno.EINVAL),
    ("SIGNAL_MSI no vCPU", NO_PIT, lambda vm, fd: vm.signal_msi(APIC_BASE, 0x45), errno.EPERM),
    (
        "SIGNAL_MSI flags=2",
        NO_PIT,
        lambda vm, fd: (vm.create_vcpu(), vm.signal_msi(APIC_BASE, 0x45, 2)),
        errno.EINVAL,
    ),
    ("IRQFD no irqchip", BARE, lambda vm, fd: vm.irqfd(fd, 4), errno.EINVAL),
    (
        "IRQFD same eventfd, other gsi",
        NO_PIT,
        lambda vm, fd: (vm.irqfd(fd, 4), vm.irqfd(fd, 5)),
        errno.EBUSY,
    ),
    ("IRQFD flags=4", NO_PIT, lambda vm, fd: vm.irqfd(fd, 4, 4), errno.EINVAL),
    ("IRQFD fd=-1", NO_PIT, lambda vm, fd: vm.irqfd(-1, 4), errno.EBADF),
    ("IRQFD no eventfd", NO_PIT, lambda vm, fd: vm.irqfd(vm.file.fileno(), 4), errno.EINVAL),
    ("IRQFD resample fd=-1", NO_PIT, lambda vm, fd: vm.irqfd(fd, 4, 2, -1), errno.EBADF),
    (
        "IOEVENTFD same again",
        BARE,
        lambda vm, fd: _twice(vm, lambda vm: vm.ioeventfd(0x510, 2, fd, PIO)),
        errno.EEXIST,
    ),
    ("IOEVENTFD len 3", BARE, lambda vm, fd: vm.ioeventfd(0xD0000000, 3, fd), errno.EINVAL),
    ("IOEVENTFD len 0 + datamatch", BARE, lambda vm, fd: vm.ioeventfd(8, 0, fd, 1), errno.EINVAL),
    ("IOEVENTFD flags=0x20", BARE, lambda vm, fd: vm.ioeventfd(8, 4, fd, 0x20), errno.EINVAL),
    ("IOEVENTFD wraps", BARE, lambda vm, fd: vm.ioeventfd(2**64 - 2, 4, fd), errno.EINVAL),
    ("IOEVENTFD fd=-1", BARE, lambda vm, fd: vm.ioeventfd(8, 4, -1), errno.EBADF),
    ("IOEVENTFD unknown", BARE, lambda vm, fd: vm.ioeventfd(8, 4, fd, 4), errno.ENOENT),
    ("SPLIT_IRQCHIP twice", BARE, lambda vm, fd: _twice(vm, _split), errno.EEXIST),
    ("SPLIT_IRQCHIP 4097", BARE, lambda vm, fd: vm.enable_cap(121, 4097), errno.EINVAL),
    ("SPLIT_IRQCHIP flags=1", BARE, lambda vm, fd: vm.enable_cap(121, 24, flags=1), errno.EINVAL),
    (
        "SPLIT_IRQCHIP after a vCPU",
        BARE,
        lambda vm, fd: (vm.create_vcpu(), _split(vm)),
        errno.EEXIST,
    ),
    ("SPLIT_IRQCHIP after CREATE_IRQCHIP", NO_PIT, lambda vm, fd: _split(vm), errno.EEXIST),
    (
        "SPLIT_IRQCHIP GET_IRQCHIP",
        BARE,
        lambda vm, fd: (_split(vm), vm.get_irqchip(0)),
        errno.ENXIO,
    ),
    ("X2APIC_API 16", BARE, lambda vm, fd: vm.enable_cap(KVM_CAP_X2APIC_API, 16), errno.EINVAL),
    ("ENABLE_CAP 9999", BARE, lambda vm, fd: vm.enable_cap(9999), errno.EINVAL),
    (
        "SET_BOOT_CPU_ID after vCPU",
        BARE,
        lambda vm, fd: (vm.create_vcpu(), vm.set_boot_cpu_id(1)),
        errno.EBUSY,
    ),
    ("SET_BOOT_CPU_ID 5000", BARE, lambda vm, fd: vm.set_boot_cpu_id(5000), errno.EINVAL),
    ("INTERRUPT irqchip", NO_PIT, lambda vm, fd: vm.create_vcpu().interrupt(0x20), errno.ENXIO),
    ("INTERRUPT 256", BARE, lambda vm, fd: vm.create_vcpu().interrupt(256), errno.EINVAL),
    ("INTERRUPT split, second", BARE, lambda vm, fd: _interrupt_twice(vm), errno.EEXIST),
]


def _split(vm: KernelVm) -> None:
    vm.enable_cap(KVM_CAP_SPLIT_IRQCHIP, 24)


def _interrupt_twice(vm: KernelVm) -> None:
    _split(vm)
    vcpu = vm.create_vcpu()
    _twice(vm, lambda vm: vcpu.interrupt(0x20))


@pytest.mark.parametrize(
    ("given", "call", "expected"),
    [row[1:] for row in ERRNO_ROWS],
    ids=[row[0] for row in ERRNO_ROWS],
)
def test_errno(
    make_vm: MakeVm,
    eventfd: MakeEventFd,
    given: dict[str, bool],
    call: Call,
    expected: int,
) -> None:
    vm = make_vm(**given)
    with pytest.raises(KvmError) as caught:
        call(vm, eventfd().fd)
    assert caught.value.errno == expected


ALLOWED_ROWS: list[tuple[str, dict[str, bool], Call]] = [
    ("IRQFD gsi 0xffffffff", NO_PIT, lambda vm, fd: vm.irqfd(fd, 0xFFFF_FFFF)),
    ("IRQFD deassign never assigned", NO_PIT, lambda vm, fd: vm.irqfd(fd, 4, 1)),
    ("IRQFD deassign, no irqchip", BARE, lambda vm, fd: vm.irqfd(fd, 4, 1)),
    ("IOEVENTFD len 0", BARE, lambda vm, fd: vm.ioeventfd(0xD000_0000, 0, fd)),
    ("IOEVENTFD pio len 8", BARE, lambda vm, fd: vm.ioeventfd(0x510, 8, fd, PIO)),
    ("SPLIT_IRQCHIP 0", BARE, lambda vm, fd: vm.enable_cap(KVM_CAP_SPLIT_IRQCHIP, 0)),
    ("X2APIC_API 3", NO_PIT, lambda vm, fd: vm.enable_cap(KVM_CAP_X2APIC_API, 3)),
    ("SET_BOOT_CPU_ID 1", NO_PIT, lambda vm, fd: vm.set_boot_cpu_id(1)),
    (
        "INTERRUPT no irqchip, twice",
        BARE,
        lambda vm, fd: (vcpu := vm.create_vcpu(), vcpu.interrupt(1), vcpu.interrupt(255)),
    ),
]


@pytest.mark.parametrize(
    ("given", "call"), [row[1:] for row in ALLOWED_ROWS], ids=[row[0] for row in ALLOWED_ROWS]
)
def test_allowed(make_vm: MakeVm, eventfd: MakeEventFd, given: dict[str, bool], call: Call) -> None:
    call(make_vm(**given), eventfd().fd)
