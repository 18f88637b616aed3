"""Messages, eventfds, CPUID, MSRs and the split irqchip on the live kernel."""

import errno
from collections.abc import Callable

import pytest
from eventfds import LIMIT_S, MakeEventFd, wait_for
from tiny_guests import DONE, HLT, SPIN, MakeVm, accesses, bytes_at, out8

import kvmtick
from kvmtick.abi import KvmError
from kvmtick.abi.caps import KVM_CAP_SPLIT_IRQCHIP, KVM_CAP_X2APIC_API
from kvmtick.abi.exits import ExitIo, ExitIoapicEoi, ExitIrqWindowOpen
from kvmtick.abi.structs import (
    KVM_IOEVENTFD_FLAG_DATAMATCH,
    KVM_IOEVENTFD_FLAG_DEASSIGN,
    KVM_IOEVENTFD_FLAG_PIO,
    KVM_IRQ_ROUTING_MSI,
    KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQFD_FLAG_DEASSIGN,
    KVM_IRQFD_FLAG_RESAMPLE,
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


# --- messages -----------------------------------------------------------------------------------


def test_a_message_reaches_the_request_register(make_vm: MakeVm) -> None:
    vm = make_vm(HLT)
    lapic = vm.vcpus[0].get_lapic()
    assert vm.signal_msi(APIC_BASE, 0x45) == 0  # the local APIC is software-disabled
    lapic.set_reg(0xF0, 0x1FF)
    vm.vcpus[0].set_lapic(lapic)
    assert vm.signal_msi(APIC_BASE, 0x45) == 1
    assert vm.signal_msi(APIC_BASE | 5 << 12, 0x46) == 0
    assert vm.vcpus[0].get_lapic().reg(0x200 + 0x10 * 2) == 1 << 5


def test_the_high_half_of_an_address_is_passed_on(make_vm: MakeVm) -> None:
    vm = make_vm(HLT)
    vm.enable_cap(KVM_CAP_X2APIC_API, 1)
    with pytest.raises(KvmError) as caught:
        vm.signal_msi(1 << 32 | APIC_BASE, 0x45)
    assert caught.value.errno == errno.EINVAL
    assert vm.signal_msi(0x100 << 32 | APIC_BASE, 0x45) == 0


# --- eventfds -----------------------------------------------------------------------------------


def test_an_irqfd_pulses_its_gsi_until_it_is_deassigned(
    make_vm: MakeVm, eventfd: MakeEventFd
) -> None:
    vm = make_vm(pit=False)
    event = eventfd()

    def irr() -> int:
        return vm.get_irqchip(KVM_IRQCHIP_PIC_MASTER).chip.pic.irr

    vm.irqfd(event.fd, 3)
    event.signal()
    wait_for(lambda: irr() == 1 << 3)
    assert event.count() == 0
    vm.irqfd(event.fd, 3, KVM_IRQFD_FLAG_DEASSIGN)
    vm.irqfd(event.fd, 4)
    event.signal()
    wait_for(lambda: irr() == 0b11000)


def test_a_resample_irqfd_holds_the_line_until_the_eoi(
    make_vm: MakeVm, eventfd: MakeEventFd
) -> None:
    # mov al, 0x0c; out 0x20, al; in al, 0x20 (a poll acknowledges); out 0x20 (EOI); the answer
    vm = make_vm(out8(0x20, 0x0C) + b"\xe4\x20\x88\xc3" + out8(0x20, 0x20) + b"\x88\xd8" + DONE)
    trigger, resample = eventfd(), eventfd()
    chip = vm.get_irqchip(KVM_IRQCHIP_PIC_MASTER)
    chip.chip.pic.elcr = 1 << 3
    vm.set_irqchip(chip)
    vm.irqfd(trigger.fd, 3, KVM_IRQFD_FLAG_RESAMPLE, resample.fd)
    trigger.signal()
    wait_for(lambda: vm.get_irqchip(KVM_IRQCHIP_PIC_MASTER).chip.pic.irr == 1 << 3)
    assert resample.count() == 0
    assert vm.run(limit_s=LIMIT_S).exit.code == 0x83
    assert resample.count() == 1
    assert vm.get_irqchip(KVM_IRQCHIP_PIC_MASTER).chip.pic.irr == 0


def test_an_ioeventfd_takes_the_writes_that_match(make_vm: MakeVm, eventfd: MakeEventFd) -> None:
    # mov dx, 0x510; mov ax, 0x1234; out dx, ax; out dx, al; inc ax; out dx, ax
    code = b"\xba\x10\x05\xb8\x34\x12\xef\xee\x40\xef" + DONE
    vm = make_vm(code)
    event = eventfd()
    flags = KVM_IOEVENTFD_FLAG_PIO | KVM_IOEVENTFD_FLAG_DATAMATCH
    vm.ioeventfd(0x510, 2, event.fd, flags, 0x1234)
    assert accesses(vm, 0x510) == 2
    assert event.count() == 1
    vm.ioeventfd(0x510, 2, event.fd, flags | KVM_IOEVENTFD_FLAG_DEASSIGN, 0x1234)
    vm.load(bytes_at(code))
    assert accesses(vm, 0x510) == 3


def test_an_ioeventfd_in_memory(make_vm: MakeVm, eventfd: MakeEventFd) -> None:
    vm = make_vm(mmio_write(0xD000_0000, 7) + DONE)
    vm.vcpus[0].set_real_mode(0, 0x1000, unreal=True)
    event = eventfd()
    vm.ioeventfd(0xD000_0000, 4, event.fd)
    assert vm.run(limit_s=LIMIT_S).exit.reason == "done"
    assert event.count() == 1


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


def test_x2apic_needs_its_cpuid_bit(make_vm: MakeVm) -> None:
    vm = make_vm(HLT)
    vcpu = vm.vcpus[0]
    assert vcpu.set_msrs({MSR_IA32_APICBASE: 0xFEE0_0D00}) == 0
    vcpu.set_cpuid2(vm.get_supported_cpuid())
    assert vcpu.set_msrs({MSR_IA32_APICBASE: 0xFEE0_0D00}) == 1
    assert vcpu.get_msrs([0x802, 0x803]) == {0x802: 0, 0x803: 0x50014}


def test_tsc_rate(make_vm: MakeVm) -> None:
    vcpu = make_vm(HLT).vcpus[0]
    host = vcpu.get_tsc_khz()
    vcpu.set_tsc_khz(2 * host)
    assert vcpu.get_tsc_khz() == 2 * host
    vcpu.set_tsc_khz(0)
    assert vcpu.get_tsc_khz() == host


# --- split and userspace irqchip ----------------------------------------------------------------


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


def test_user_space_injects_where_it_has_the_irqchip(make_vm: MakeVm) -> None:
    # ss:sp; vector 0x40 -> 0x1100; the handler leaves
    vm = make_vm(b"\x31\xc0\x8e\xd0\xbc\x00\x10" + SPIN, irqchip=False)
    vm.write_memory(0x40 * 4, (0x1100).to_bytes(2, "little") + b"\0\0")
    vm.write_memory(0x1100, out8(0xF4, 9))
    vcpu = vm.vcpus[0]
    vcpu.run(0.02)
    vcpu.interrupt(0x40)
    assert vm.run(limit_s=LIMIT_S).exit.code == 9


def test_the_interrupt_window_is_told(make_vm: MakeVm) -> None:
    vm = make_vm(b"\xfb" + SPIN, irqchip=False)
    vm.vcpus[0].file.area.request_interrupt_window = 1
    assert vm.vcpus[0].run(LIMIT_S) == ExitIrqWindowOpen()


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
