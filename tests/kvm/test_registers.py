"""Registers by name in KVM's structures, and the ioctls: one table, held against both back ends."""

import errno
from typing import Any

import pytest
from backends import MakeVm, vms, with_cpuid  # noqa: F401 - a fixture

from kvmtick.abi import KvmError
from kvmtick.abi.registers import put_registers
from kvmtick.abi.structs import (
    KVM_MP_STATE_HALTED,
    KVM_MP_STATE_RUNNABLE,
    kvm_regs,
    kvm_sregs,
    struct_diff,
)
from kvmtick.guests import start
from kvmtick.kvm.kernel import KernelVm


def test_long_mode() -> None:
    regs, sregs = kvm_regs(), kvm_sregs()
    put_registers(start.long_mode(0x10_0000, 0x9000, rsp=0x8000, gdtr_base=0x7000), regs, sregs)
    assert (regs.rip, regs.rsp) == (0x10_0000, 0x8000)
    assert (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) == (0x8000_0033, 0x9000, 0x620, 0x500)
    cs, ss = sregs.cs, sregs.ss
    assert (cs.selector, cs.base, cs.limit, cs.type) == (start.BOOT_CS, 0, 0xFFFF_FFFF, 0xB)
    assert (cs.s, cs.dpl, cs.present, cs.avl, cs.l, cs.db, cs.g, cs.unusable) == (
        *(1, 0, 1, 0, 1, 0, 1, 0),
    )
    assert (ss.selector, ss.type, ss.l, ss.db, ss.g) == (start.BOOT_DS, 3, 0, 1, 1)
    assert (sregs.gdt.base, sregs.gdt.limit) == (0x7000, 0)


def test_the_other_bits_of_access_rights() -> None:
    sregs = kvm_sregs()
    put_registers({"ldtr": 0x28, "ldtr_access": 0x1_1062, "idtr_limit": 0xFFF}, kvm_regs(), sregs)
    assert (sregs.ldt.selector, sregs.ldt.type, sregs.ldt.dpl, sregs.ldt.avl) == (0x28, 2, 3, 1)
    assert (sregs.ldt.s, sregs.ldt.present, sregs.ldt.unusable) == (0, 0, 1)
    assert sregs.idt.limit == 0xFFF


@pytest.mark.parametrize("name", ["dr7", "lstar", "kernel_gs_base", "cs_type", "gdtr", "eax"])
def test_what_has_no_place_there_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: KVM_SET_REGS and KVM_SET_SREGS have no such"):
        put_registers({name: 1}, kvm_regs(), kvm_sregs())


# KVM_SET_REGS and KVM_SET_SREGS.

PE, ET, NW, CD, PG = 1 << 0, 1 << 4, 1 << 29, 1 << 30, 1 << 31
PAE, LA57, UMIP, VMXE, SMEP = 1 << 5, 1 << 12, 1 << 11, 1 << 13, 1 << 20
LME, LMA = 1 << 8, 1 << 10
LONG = {"cr0": PE | PG | ET, "cr4": PAE, "efer": LME | LMA}


@pytest.fixture
def vcpu(vms: MakeVm) -> Any:  # noqa: F811
    vm = vms()
    vm.create_irqchip()
    return with_cpuid(vm, vm.create_vcpu(0))


def changed(vcpu: Any, **fields: int) -> kvm_sregs:
    """`cs__l=1` sets `cs.l`."""
    sregs = vcpu.get_sregs()
    for path, value in fields.items():
        *outer, name = path.split("__")
        target: Any = sregs
        for part in outer:
            target = getattr(target, part)
        setattr(target, name, value)
    return sregs


TAKEN = {
    "the same": {},
    "protected mode": {"cr0": PE | ET},
    "no caches": {"cr0": CD | NW | ET},
    "long mode": LONG,
    "LME alone": {"efer": LME},
    "long mode, a high CR3": {**LONG, "cr3": 0xFF_FFFF_F000},
    "a CR3 that means nothing": {"cr3": 1 << 62},
    "CR2": {"cr2": 1 << 63 | 5},
    "CR8": {"cr8": 15},
    "the always known bits of CR4": {"cr4": 0x7FF & ~PAE},
    "SMEP": {"cr4": SMEP},
    "the local APIC disabled": {"apic_base": 0xFEE0_0100},
    "x2APIC": {"apic_base": 0xFEE0_0D00},
    "a base in CS": {"cs__base": 0x1234_5670, "cs__selector": 0x1000},
    "a limit in bytes": {"ds__limit": 0xFFFF_FFFF, "ds__g": 1},
    "a limit in pages": {"ss__limit": 0x1234_5FFF, "ss__g": 1, "ss__db": 1, "ss__dpl": 3},
    "a 64-bit base": {"fs__base": 0xFFFF_8000_1234_5678},
    "code": {"es__type": 0xB, "es__avl": 1},
    "an unusable segment": {"gs__unusable": 1, "gs__present": 0, "gs__s": 0, "gs__type": 0},
    "LDT and TSS": {"ldt__selector": 0x28, "ldt__base": 0x5000, "tr__selector": 0x30},
    "tables": {"gdt__base": 0xFFFF_8000_0000_0000, "gdt__limit": 0x7F, "idt__limit": 0xFFF},
}


@pytest.mark.parametrize("name", TAKEN)
def test_special_registers_are_kept(vcpu: Any, name: str) -> None:
    sregs = changed(vcpu, **TAKEN[name])
    vcpu.set_sregs(sregs)
    assert struct_diff(sregs, vcpu.get_sregs()) == []


@pytest.mark.parametrize(
    "fields",
    [
        {"cr0": PG | ET},
        {"cr0": NW | ET},
        {"cr0": 1 << 32 | ET},
        {"efer": LMA},
        {"efer": LME | LMA},
        {**LONG, "efer": LME},
        {**LONG, "cr4": 0},
        {**LONG, "cr3": 1 << 62},
        {**LONG, "cr3": 1 << 52},
        {"cs__l": 1},
        {"cr4": LA57},
        {"cr4": VMXE},
        {"cr4": UMIP << 12},
        {"cr4": 1 << 40},
        {"apic_base": 0xFEE0_0500},
        {"apic_base": 0xFEE0_0901},
        {"apic_base": 1 << 60 | 0xFEE0_0900},
    ],
)
def test_special_registers_that_contradict_each_other(vcpu: Any, fields: dict[str, int]) -> None:
    before = vcpu.get_sregs()
    given = changed(vcpu, **{"cr2": 0x1234, "cr8": 3, **fields})
    given.interrupt_bitmap[0] = 1 << 32
    with pytest.raises(KvmError, match="KVM_SET_SREGS: EINVAL"):
        vcpu.set_sregs(given)
    assert struct_diff(before, vcpu.get_sregs()) == [], "nothing is changed"


def test_x2apic_needs_its_bit_in_cpuid(vms: MakeVm) -> None:  # noqa: F811
    vm = vms()
    vm.create_irqchip()
    vcpu = vm.create_vcpu(0)
    with pytest.raises(KvmError) as caught:
        vcpu.set_sregs(changed(vcpu, apic_base=0xFEE0_0D00))
    assert caught.value.errno == errno.EINVAL


def test_bits_of_cr4_need_theirs_in_cpuid(vms: MakeVm) -> None:  # noqa: F811
    vm = vms()
    vcpu = vm.create_vcpu(0)
    vcpu.set_sregs(changed(vcpu, cr4=SMEP))
    vcpu.set_sregs(changed(vcpu, cr4=0))
    entries = vm.get_supported_cpuid()
    for entry in entries:
        if entry.function == 7:
            entry.ebx &= ~(1 << 7)
    vcpu.set_cpuid2(entries)
    if isinstance(vm, KernelVm):
        pytest.skip("this host's back end does not look at the guest's CPUID (docs/fidelity.md)")
    with pytest.raises(KvmError) as caught:
        vcpu.set_sregs(changed(vcpu, cr4=SMEP))
    assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize("irqchip", [True, False])
def test_a_cr8_of_more_than_four_bits_is_left_out(vms: MakeVm, irqchip: bool) -> None:  # noqa: F811
    vm = vms()
    if irqchip:
        vm.create_irqchip()
    vcpu = vm.create_vcpu(0)
    vcpu.set_sregs(changed(vcpu, cr8=5))
    vcpu.set_sregs(changed(vcpu, cr8=16, cr2=7))
    sregs = vcpu.get_sregs()
    assert (sregs.cr8, sregs.cr2) == (5, 7)


def test_cr8_is_the_local_apics_task_priority(vcpu: Any) -> None:
    vcpu.set_sregs(changed(vcpu, cr8=9))
    assert vcpu.get_lapic().reg(0x80) == 0x90


def test_a_bit_of_the_bitmap_injects_the_first_and_none_takes_none_away(vcpu: Any) -> None:
    sregs = vcpu.get_sregs()
    sregs.interrupt_bitmap[0] = 1 << 48
    sregs.interrupt_bitmap[2] = 1
    vcpu.set_sregs(sregs)
    assert list(vcpu.get_sregs().interrupt_bitmap) == [1 << 48, 0, 0, 0]
    vcpu.set_sregs(changed(vcpu))
    sregs.interrupt_bitmap[0] = sregs.interrupt_bitmap[2] = 0
    vcpu.set_sregs(sregs)
    interrupt = vcpu.get_vcpu_events().interrupt
    assert (interrupt.injected, interrupt.nr) == (1, 48)


@pytest.mark.parametrize("cs_base", [0xFFFF_0000, 0xF_0000])
def test_the_registers_of_a_reset_wake_the_vcpu_that_boots(vcpu: Any, cs_base: int) -> None:
    vcpu.set_regs(kvm_regs(rip=0xFFF0, rflags=2))
    vcpu.set_mp_state(KVM_MP_STATE_HALTED)
    vcpu.set_sregs(changed(vcpu, cs__selector=0xF000, cs__base=cs_base))
    woken = cs_base == 0xFFFF_0000
    assert vcpu.get_mp_state() == (KVM_MP_STATE_RUNNABLE if woken else KVM_MP_STATE_HALTED)


def test_general_registers_are_kept(vcpu: Any) -> None:
    names = [name for name, *_ in kvm_regs._fields_ if name != "rflags"]
    regs = kvm_regs(**{name: 0x8000_0000_0000_0100 + at for at, name in enumerate(names)})
    regs.rflags = 0x4_4ED5
    vcpu.set_regs(regs)
    regs.rflags |= 2
    assert struct_diff(regs, vcpu.get_regs()) == []


def test_real_mode_is_not_virtual_8086(vcpu: Any) -> None:
    vcpu.set_regs(kvm_regs(rflags=1 << 17))
    assert vcpu.get_regs().rflags == 2
