"""Registers by name in KVM's structures."""

import pytest

from kvmtick.abi.structs import kvm_regs, kvm_sregs
from kvmtick.guests import start
from kvmtick.kvm.registers import put_registers


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
