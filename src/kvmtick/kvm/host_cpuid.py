"""KVM_GET_SUPPORTED_CPUID of the model's chips over a real CPU: what both of them have."""

from collections.abc import Iterable
from typing import Final

from kvmtick.abi.structs import kvm_cpuid_entry2
from kvmtick.vcpu.cpuid import (
    BOARD_FEATURES,
    ECX_TSC_DEADLINE,
    ECX_X2APIC,
    LEAF_ADDRESS_SIZES,
    LEAF_CRYSTAL_CLOCK,
    LEAF_EXTENDED,
    LEAF_EXTENDED_FEATURES,
    LEAF_FEATURES,
    LEAF_HYPERVISOR_CLOCKS,
    LEAF_INVARIANT_TSC,
    LEAF_VENDOR,
)

__all__ = ["both_have"]

_FEATURE_WORDS: Final = (
    (LEAF_FEATURES, "ecx"),
    (LEAF_FEATURES, "edx"),
    (LEAF_EXTENDED_FEATURES, "ebx"),
    (LEAF_EXTENDED + 1, "ecx"),
    (LEAF_EXTENDED + 1, "edx"),
    (LEAF_INVARIANT_TSC, "edx"),
)
_CRYSTAL_KHZ: Final = 1_000_000
"""What leaf 0x15's ratio is of, and the local APIC's timer counts."""


def both_have(
    model: Iterable[kvm_cpuid_entry2],
    host: Iterable[kvm_cpuid_entry2],
    tsc_khz: int,
    filters_msrs: bool,
) -> list[kvm_cpuid_entry2]:
    """The model's entries with the features that the host's CPU executes; features of the board
    (`kvmtick.vcpu.cpuid.BOARD_FEATURES`) are the model's to give.

    Vendor, signature and the width of addresses are the host's, and so is the TSC's rate. Unless
    `filters_msrs`, the local APIC's MSRs are out of the guest's reach.
    """
    theirs = {(entry.function, entry.index): entry for entry in host}
    entries = [kvm_cpuid_entry2.from_buffer_copy(entry) for entry in model]
    for entry in entries:
        other = theirs.get((entry.function, entry.index), kvm_cpuid_entry2())
        for function, word in _FEATURE_WORDS:
            if entry.function == function:
                mask = getattr(other, word) | BOARD_FEATURES.get((function, word), 0)
                setattr(entry, word, getattr(entry, word) & mask)
        if entry.function == LEAF_VENDOR:
            entry.ebx, entry.ecx, entry.edx = other.ebx, other.ecx, other.edx
        elif entry.function == LEAF_FEATURES:
            entry.eax = other.eax
            if not filters_msrs:
                entry.ecx &= ~(ECX_X2APIC | ECX_TSC_DEADLINE)
        elif entry.function == LEAF_CRYSTAL_CLOCK:
            entry.eax, entry.ebx = _CRYSTAL_KHZ, tsc_khz
        elif entry.function == LEAF_HYPERVISOR_CLOCKS:
            entry.eax = tsc_khz
        elif entry.function == LEAF_ADDRESS_SIZES:
            entry.eax = other.eax
    return entries
