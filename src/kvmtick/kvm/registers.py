"""KVM_GET_REGS, KVM_SET_REGS, KVM_GET_SREGS and KVM_SET_SREGS of the model (api.rst 4.11 to 4.14).

`set_sregs` refuses what kvm_is_valid_sregs and kvm_apic_set_base do. Segments are kept as in a VMCS
(SDM vol. 3C, 25.4.1): one that is not present is unusable, too, and a field has its bits only.
CR0.ET always reads 1, and a task that is available is busy.

Not modelled: registers that contradict each other in other ways; an entry with them does what the
engine makes of it. Debug registers and MSRs have ioctls of their own.
"""

import errno

from kvmtick.abi.errors import KvmError
from kvmtick.abi.registers import GENERAL, SPECIAL, put_registers, special_values
from kvmtick.abi.structs import kvm_regs, kvm_sregs
from kvmtick.cpu.mode import CR0_PE, EFER_LMA, RFLAGS_VM
from kvmtick.irqchip.apicdef import MSR_IA32_APICBASE
from kvmtick.kvm.vcpu_events import has_injected_interrupt
from kvmtick.vcpu.cpuid import Cpuid
from kvmtick.vcpu.vcpu import Vcpu

__all__ = ["get_regs", "get_sregs", "set_regs", "set_sregs"]

CR0_NW, CR0_CD, CR0_PG = 1 << 29, 1 << 30, 1 << 31
CR4_PAE = 1 << 5
CR4_ALWAYS = 0x7FF
"""VME PVI TSD DE PSE PAE MCE PGE PCE OSFXSR OSXMMEXCPT: KVM looks at no CPUID for them."""
_CR4_OF_CPUID = {
    1 << 11: (0x7, "ecx", 1 << 2),  # UMIP
    1 << 12: (0x7, "ecx", 1 << 16),  # LA57
    1 << 16: (0x7, "ebx", 1 << 0),  # FSGSBASE
    1 << 17: (0x1, "ecx", 1 << 17),  # PCIDE: PCID
    1 << 18: (0x1, "ecx", 1 << 26),  # OSXSAVE: XSAVE
    1 << 20: (0x7, "ebx", 1 << 7),  # SMEP
    1 << 21: (0x7, "ebx", 1 << 20),  # SMAP
    1 << 22: (0x7, "ecx", 1 << 3),  # PKE: PKU
    1 << 23: (0x7, "ecx", 1 << 7),  # CET: shadow stacks
}
"""Bits that KVM knows, and what of CPUID gives them (SDM vol. 3A, 2.5)."""
EFER_LME = 1 << 8
CR8_MAX = 15
VECTORS = 256

RESET_RIP, RESET_CS, RESET_CS_BASE = 0xFFF0, 0xF000, 0xFFFF_0000


# The model's vCPU.


def get_regs(vcpu: Vcpu) -> kvm_regs:
    """KVM_GET_REGS."""
    registers = vcpu.engine.registers()
    return kvm_regs(**{name: registers[name] for name in GENERAL})


def set_regs(vcpu: Vcpu, regs: kvm_regs) -> None:
    """KVM_SET_REGS."""
    values: dict[str, int] = {name: getattr(regs, name) for name in GENERAL}
    if not vcpu.engine.registers()["cr0"] & CR0_PE:
        values["rflags"] &= ~RFLAGS_VM
    vcpu.engine.set_registers(values)
    vcpu.take_over_state()


def get_sregs(vcpu: Vcpu) -> kvm_sregs:
    """KVM_GET_SREGS."""
    sregs, lapic, pending = kvm_sregs(), vcpu.lapic, vcpu.pending
    registers = vcpu.engine.registers()
    put_registers({name: registers[name] for name in SPECIAL}, kvm_regs(), sregs)
    sregs.cr8 = vcpu.exits.cr8 if lapic is None else lapic.get_cr8()
    sregs.apic_base = vcpu.msrs.get(MSR_IA32_APICBASE, host_initiated=True) or 0
    if has_injected_interrupt(pending):
        sregs.interrupt_bitmap[pending.interrupt_nr // 64] = 1 << pending.interrupt_nr % 64
    return sregs


def set_sregs(vcpu: Vcpu, sregs: kvm_sregs) -> None:
    """KVM_SET_SREGS. A bit in `interrupt_bitmap` injects that interrupt; none takes none away.

    EINVAL: the registers contradict each other, or are not for a guest with this CPUID; nothing
    is changed then.
    """
    if sregs.cr4 & ~vcpu.engine.cr4_bits or not _is_valid(vcpu.cpuid, sregs):
        raise KvmError(errno.EINVAL, "KVM_SET_SREGS", "cr0, cr3, cr4, efer and cs do not fit")
    if not vcpu.msrs.set(MSR_IA32_APICBASE, sregs.apic_base, host_initiated=True):
        raise KvmError(errno.EINVAL, "KVM_SET_SREGS", f"apic_base={sregs.apic_base:#x}")
    vcpu.engine.set_registers(dict(special_values(sregs)))
    if sregs.cr8 <= CR8_MAX:
        if vcpu.lapic is None:
            vcpu.exits.cr8 = sregs.cr8
        else:
            vcpu.lapic.set_tpr(sregs.cr8)
    if vcpu.is_bsp and _is_reset(vcpu, sregs):
        vcpu.make_runnable()
    bitmap = int.from_bytes(bytes(sregs.interrupt_bitmap), "little")
    if bitmap:
        vcpu.queue_interrupt((bitmap & -bitmap).bit_length() - 1)
    vcpu.take_over_state()


def _is_reset(vcpu: Vcpu, sregs: kvm_sregs) -> bool:
    """Older user space resets a halted vCPU by its registers alone."""
    at_start = sregs.cs.selector == RESET_CS and sregs.cs.base == RESET_CS_BASE
    return at_start and not sregs.cr0 & CR0_PE and vcpu.engine.rip == RESET_RIP


def _is_valid(cpuid: Cpuid, sregs: kvm_sregs) -> bool:
    """`kvm_is_valid_sregs`."""
    cr0 = sregs.cr0
    if sregs.efer & EFER_LME and cr0 & CR0_PG:
        if not sregs.cr4 & CR4_PAE or not sregs.efer & EFER_LMA or sregs.cr3 >> cpuid.maxphyaddr():
            return False
    elif sregs.efer & EFER_LMA or sregs.cs.l:
        return False
    if sregs.cr4 & ~_allowed_cr4(cpuid):
        return False
    caches = cr0 & CR0_CD or not cr0 & CR0_NW
    return bool(not cr0 >> 32 and caches and (cr0 & CR0_PE or not cr0 & CR0_PG))


def _allowed_cr4(cpuid: Cpuid) -> int:
    """Without KVM_SET_CPUID2, all that the CPU has."""
    given = cpuid.leaves()
    return CR4_ALWAYS | sum(
        bit
        for bit, (function, register, mask) in _CR4_OF_CPUID.items()
        if not given or cpuid.has_bit(function, register, mask)
    )
