"""The model-specific registers of a vCPU (kvm_get_msr_common and kvm_set_msr_common, x86.c).

Those of time and of the local APIC, PAT (Intel SDM vol. 3A, 13.12), the MTRRs (13.11), the machine
check banks (vol. 3B, chapter 17), IA32_MISC_ENABLE and what else of vol. 4 KVM answers; RDMSR and
WRMSR of the guest come here for all but `engine.CPU_MSRS`, KVM_GET_MSRS and KVM_SET_MSRS for those
too. None and False refuse: the guest gets #GP(0), the ioctl stops.

KVM's way, where it is not the silicon's: PAT and the MTRRs are stored, and no access goes by them;
the machine check banks are empty; registers of frequencies, energy and last branches read as
constants; some of AMD's are there on any CPU.

KVM's paravirtual MSRs (Documentation/virt/kvm/x86/msr.rst) are as with
KVM_CAP_ENFORCE_PV_FEATURE_CPUID: CPUID offers none of them, so the guest may not use them.

Not modelled: performance counters, last branch records and single-stepping of branches (DEBUGCTL
reads 0), CPUID faulting (MISC_FEATURES_ENABLES takes 0 only), machine checks, SMM, XSS, speculation
control.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from kvmtick.cpu.engine import CPU_MSRS
from kvmtick.cpu.mode import EFER_LMA
from kvmtick.irqchip.apicdef import (
    APIC_BASE_MSR,
    APIC_DEFAULT_PHYS_BASE,
    APIC_LAST_MSR,
    MSR_IA32_APICBASE,
    MSR_IA32_APICBASE_BSP,
    MSR_IA32_APICBASE_ENABLE,
    MSR_IA32_TSC_DEADLINE,
    U32,
    U64,
)
from kvmtick.irqchip.lapic import allows_apic_base

if TYPE_CHECKING:
    from kvmtick.vcpu.vcpu import Vcpu

__all__ = ["Msrs"]

MSR_IA32_TSC: Final = 0x10
MSR_IA32_TSC_ADJUST: Final = 0x3B
MSR_IA32_UCODE_WRITE: Final = 0x79
MSR_IA32_UCODE_REV: Final = 0x8B
MSR_IA32_MISC_ENABLE: Final = 0x1A0
MSR_IA32_DEBUGCTL: Final = 0x1D9
MSR_MTRR_PHYS_BASE_0: Final = 0x200
MSR_IA32_CR_PAT: Final = 0x277
MSR_MTRR_DEF_TYPE: Final = 0x2FF
MSR_IA32_MC0_CTL: Final = 0x400
MSR_SYSENTER_CS: Final = 0x174
MSR_EFER: Final = 0xC000_0080
MSR_TSC_AUX: Final = 0xC000_0103


VARIABLE_MTRRS: Final = range(MSR_MTRR_PHYS_BASE_0, MSR_MTRR_PHYS_BASE_0 + 16)
"""Eight pairs, base (even) and mask (odd)."""
FIXED_MTRRS: Final = (0x250, 0x258, 0x259, *range(0x268, 0x270))
MTRR_CAP: Final = 1 << 10 | 1 << 8 | len(VARIABLE_MTRRS) // 2
"""Write combining, fixed ranges, the number of pairs."""
MTRR_TYPES: Final = frozenset({0, 1, 4, 5, 6})
PAT_TYPES: Final = frozenset({0, 1, 4, 5, 6, 7})
PAT_RESET: Final = 0x0007_0406_0007_0406
MTRR_DEF_TYPE_RESERVED: Final = ~0xCFF
MTRR_BASE_RESERVED: Final = 0xF00
MTRR_MASK_RESERVED: Final = 0x7FF

MISC_ENABLE_FAST_STRING: Final = 1 << 0
MISC_ENABLE_EMON: Final = 1 << 7
MISC_ENABLE_PMU_RO: Final = 1 << 12 | 1 << 11
"""PEBS and branch trace storage are unavailable."""
DEBUGCTL_LBR_BTF: Final = 3

MC_BANKS: Final = range(MSR_IA32_MC0_CTL, MSR_IA32_MC0_CTL + 4 * 32)
"""32 banks of CTL, STATUS, ADDR and MISC."""
MC_CTL_UNCHECKED: Final = 1 << 10 | 1
"""Linux clears these bits of a CTL on some CPUs; else a CTL is all ones or 0."""

EFER_BITS: Final = 1 << 11 | EFER_LMA | 1 << 8 | 1 << 0

_STORED: Final = {
    MSR_IA32_UCODE_REV: 1 << 32,
    0x17A: 0,  # IA32_MCG_STATUS
    MSR_IA32_MISC_ENABLE: MISC_ENABLE_FAST_STRING | MISC_ENABLE_PMU_RO,
    0x1FC: 0,  # MSR_POWER_CTL
    MSR_IA32_CR_PAT: PAT_RESET,
    MSR_MTRR_DEF_TYPE: 0,
    **dict.fromkeys(VARIABLE_MTRRS, 0),
    **dict.fromkeys(FIXED_MTRRS, 0),
    **dict.fromkeys(MC_BANKS, 0),
}
"""What is kept, with its value after power-on. INIT changes none of them."""

_READ_ONLY: Final = {
    0x0: 0,  # IA32_P5_MC_ADDR
    0x1: 0,  # IA32_P5_MC_TYPE
    0x17: 0,  # IA32_PLATFORM_ID
    0x2A: 0,  # MSR_EBL_CR_POWERON
    0x2C: 1 << 24,  # MSR_EBC_FREQUENCY_ID
    0x34: 0,  # MSR_SMI_COUNT
    0xCD: 3,  # MSR_FSB_FREQ
    0xCE: 0,  # MSR_PLATFORM_INFO: no CPUID faulting
    0xFE: MTRR_CAP,
    0x179: len(MC_BANKS) // 4,  # IA32_MCG_CAP
    0x198: 4 << 40 | 1000,  # IA32_PERF_STATUS
    0x199: 0,  # IA32_PERF_CTL
    **dict.fromkeys(range(0x1DB, 0x1DF), 0),  # last branch and last exception, from and to
    **dict.fromkeys((0x606, 0x611, 0x619, 0x639, 0x641), 0),  # RAPL: unit and energies
    0xC001_0010: 0,  # AMD64_SYSCFG
    0xC001_0055: 0,  # AMD64_INT_PENDING_MSG
}

_ONLY_ZERO: Final = frozenset({0x140, 0xC001_0015, 0xC001_0058})
"""MISC_FEATURES_ENABLES, K7_HWCR and FAM10H_MMIO_CONF_BASE: they read 0 and take 0."""

_WRITES_IGNORED: Final = {
    **dict.fromkeys((0xC1, 0xC2, 0x186, 0x187), 0),  # P6 counters and event selects
    0x11E: 0xBE70_2111,  # IA32_BBL_CR_CTL3
    **dict.fromkeys(range(0xC001_0000, 0xC001_0008), 0),  # K7 counters and event selects
    0xC001_001B: 0x2000_0000,  # K7_CLK_CTL
    **dict.fromkeys((0xC001_001F, 0xC001_0117), 0),  # AMD64_NB_CFG, VM_HSAVE_PA
    **dict.fromkeys((0xC001_1022, 0xC001_1023, 0xC001_102A, 0xC001_102C), 0),  # DC, TW, BU, EX_CFG
}

_WRITE_ONLY: Final = frozenset({MSR_IA32_UCODE_WRITE, 0xC001_0020})
"""Microcode updates, Intel's and AMD's: swallowed."""

_FEATURE_MSRS: Final = frozenset(
    {
        *(0x11, 0x12, *range(0x4B56_4D00, 0x4B56_4D08)),  # MSR_KVM_*
        *(0x10A, 0x345, 0x17B, 0xDA0),  # capabilities, IA32_MCG_CTL, IA32_XSS
        *range(0x280, 0x280 + len(MC_BANKS) // 4),  # IA32_MCi_CTL2
    }
)
"""On KVM_GET_MSR_INDEX_LIST, but without their feature: user space reads 0 and may write 0."""

_SPECIAL: Final = frozenset(
    {MSR_IA32_TSC, MSR_IA32_TSC_ADJUST, MSR_IA32_APICBASE, MSR_IA32_TSC_DEADLINE, MSR_IA32_DEBUGCTL}
)


class Msrs:
    """The MSRs of one vCPU that are neither its engine's nor its local APIC's."""

    __slots__ = ("_apic_base", "_vcpu", "tsc_adjust", "values")

    def __init__(self, vcpu: Vcpu) -> None:
        self._vcpu = vcpu
        # IA32_APIC_BASE of a vCPU whose local APIC is user space's business.
        self._apic_base = APIC_DEFAULT_PHYS_BASE | MSR_IA32_APICBASE_ENABLE
        if vcpu.is_bsp:
            self._apic_base |= MSR_IA32_APICBASE_BSP
        self.tsc_adjust = 0
        self.values = _STORED
        """By index; `_STORED` itself until one is written."""

    @staticmethod
    def is_known(index: int) -> bool:
        """Whether a guest has it: a refusal is then for the value or the mode."""
        return (
            index in _SPECIAL
            or index in CPU_MSRS
            or APIC_BASE_MSR <= index <= APIC_LAST_MSR
            or index in _STORED
            or index in _READ_ONLY
            or index in _ONLY_ZERO
            or index in _WRITES_IGNORED
            or index in _WRITE_ONLY
        )

    def get(self, index: int, host_initiated: bool = False) -> int | None:
        """`kvm_get_msr_common`; None: refused. Only user space asks for `CPU_MSRS`."""
        vcpu = self._vcpu
        if APIC_BASE_MSR <= index <= APIC_LAST_MSR or index == MSR_IA32_TSC_DEADLINE:
            return self._get_lapic_msr(index)
        if index == MSR_IA32_TSC:
            return vcpu.guest_tsc()
        if index in self.values:
            return self.values[index]
        if index == MSR_IA32_APICBASE:
            return self._apic_base if vcpu.lapic is None else vcpu.lapic.apic_base
        if index == MSR_IA32_TSC_ADJUST:
            return self.tsc_adjust
        if index == MSR_IA32_DEBUGCTL or index in _ONLY_ZERO:
            return 0
        constant = _READ_ONLY.get(index, _WRITES_IGNORED.get(index))
        if constant is not None or not host_initiated:
            return constant
        if index in CPU_MSRS:
            return vcpu.engine.registers()[CPU_MSRS[index]]
        return 0 if index in _FEATURE_MSRS else None

    def set(self, index: int, value: int, host_initiated: bool = False) -> bool:
        """`kvm_set_msr_common`; False: refused. Only user space writes `CPU_MSRS`."""
        if APIC_BASE_MSR <= index <= APIC_LAST_MSR or index == MSR_IA32_TSC_DEADLINE:
            return self._set_lapic_msr(index, value)
        if index == MSR_IA32_TSC:
            self._set_tsc(value, host_initiated)
            return True
        if index in self.values:
            return self._store(index, value, host_initiated)
        if index == MSR_IA32_APICBASE:
            return self._set_apic_base(value, host_initiated)
        if index == MSR_IA32_TSC_ADJUST:
            self._set_tsc_adjust(value, host_initiated)
            return True
        if index == MSR_IA32_DEBUGCTL:
            return not value & ~DEBUGCTL_LBR_BTF
        if index in _ONLY_ZERO:
            return value == 0
        if index in _WRITES_IGNORED or index in _WRITE_ONLY:
            return True
        if not host_initiated:
            return False
        if index in CPU_MSRS:
            return self._set_cpu_msr(index, value)
        return index in _FEATURE_MSRS and value == 0

    # The local APIC's.

    def _get_lapic_msr(self, index: int) -> int | None:
        lapic = self._vcpu.lapic
        if lapic is None:
            return 0 if index == MSR_IA32_TSC_DEADLINE else None
        return lapic.read_msr(index)

    def _set_lapic_msr(self, index: int, value: int) -> bool:
        lapic = self._vcpu.lapic
        if lapic is None:
            return index == MSR_IA32_TSC_DEADLINE
        return lapic.write_msr(index, value)

    def _set_apic_base(self, value: int, host_initiated: bool) -> bool:
        vcpu = self._vcpu
        if vcpu.lapic is not None:
            return vcpu.lapic.set_base(value, host_initiated)
        old, has_x2apic = self._apic_base, vcpu.has_cpuid("x2apic")
        if value == old:
            return True
        if not allows_apic_base(old, value, has_x2apic, vcpu.cpuid.maxphyaddr(), host_initiated):
            return False
        self._apic_base = value
        return True

    # Time (SDM vol. 3B, 19.17.3): IA32_TSC_ADJUST sums up what the guest did to the TSC.

    def _set_tsc(self, value: int, host_initiated: bool) -> None:
        vcpu = self._vcpu
        if not host_initiated:
            self.tsc_adjust = self.tsc_adjust + value - vcpu.guest_tsc() & U64
        vcpu.set_guest_tsc(value)

    def _set_tsc_adjust(self, value: int, host_initiated: bool) -> None:
        vcpu = self._vcpu
        if not vcpu.has_cpuid("tsc_adjust"):
            return
        if not host_initiated:
            vcpu.set_guest_tsc(vcpu.guest_tsc() + value - self.tsc_adjust)
        self.tsc_adjust = value

    # Those with reserved bits.

    def _store(self, index: int, value: int, host_initiated: bool) -> bool:
        if index == MSR_IA32_UCODE_REV and not host_initiated:
            return True
        if index == MSR_IA32_MISC_ENABLE and not host_initiated:
            old = self.values[index]
            if (old ^ value) & MISC_ENABLE_PMU_RO:
                return False
            value = value & ~MISC_ENABLE_EMON | old & MISC_ENABLE_EMON
        elif index == MSR_IA32_CR_PAT:
            if not _all_types(value, PAT_TYPES):
                return False
        elif index in MC_BANKS:
            if not _mc_bank_valid(index, value, host_initiated):
                return False
        elif not self._mtrr_valid(index, value):
            return False
        if self.values is _STORED:
            self.values = dict(_STORED)
        self.values[index] = value
        return True

    def _mtrr_valid(self, index: int, value: int) -> bool:
        """`kvm_mtrr_valid`; true for what is no MTRR."""
        if index in FIXED_MTRRS:
            return _all_types(value, MTRR_TYPES)
        if index == MSR_MTRR_DEF_TYPE:
            return not value & MTRR_DEF_TYPE_RESERVED and value & 0xFF in MTRR_TYPES
        if index not in VARIABLE_MTRRS:
            return True
        if value >> self._vcpu.cpuid.maxphyaddr():
            return False
        if index & 1:
            return not value & MTRR_MASK_RESERVED
        return not value & MTRR_BASE_RESERVED and value & 0xFF in MTRR_TYPES

    # The engine's.

    def _set_cpu_msr(self, index: int, value: int) -> bool:
        """`__kvm_set_msr` by user space: addresses are canonical, EFER has no unknown bits."""
        engine, name = self._vcpu.engine, CPU_MSRS[index]
        if index == MSR_EFER:
            if value & ~EFER_BITS:
                return False
            value = value & ~EFER_LMA | engine.registers()[name] & EFER_LMA
        elif index == MSR_SYSENTER_CS:
            value &= U32
        elif index == MSR_TSC_AUX:
            if value > U32:
                return False
        elif name.endswith(("_base", "_esp", "_eip", "lstar", "cstar")) and not _canonical(value):
            return False
        engine.set_registers({name: value})
        return True


def _all_types(value: int, types: frozenset[int]) -> bool:
    """Whether each of the eight bytes is one of the memory types."""
    return all(byte in types for byte in value.to_bytes(8, "little"))


def _mc_bank_valid(index: int, value: int, host_initiated: bool) -> bool:
    """`set_msr_mce`: a CTL is all ones or 0, a STATUS is cleared by the guest."""
    register = index & 3
    if register == 0:
        return value == 0 or value | MC_CTL_UNCHECKED == U64
    return register != 1 or host_initiated or value == 0


def _canonical(value: int) -> bool:
    """Bits 63:47 are all alike."""
    return value >> 47 in (0, U64 >> 47)
