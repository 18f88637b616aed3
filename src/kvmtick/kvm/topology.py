"""Which vCPUs are cores of which package, told in CPUID (SDM vol. 3A, 9.9; vol. 2A, CPUID leaves 1,
4 and 0xB; for AMD's CPUs APM vol. 3, leaf 0x80000008).

A VM's vCPUs are the cores of one package, a thread each, with consecutive APIC ids. So an operating
system knows that their TSCs are one clock, and Linux takes vCPU 0's loops_per_jiffy for all; were
each a package, it would measure it on each while vCPUs run by turns.

Not modelled: threads of a core, more than one package, dies (leaf 0x1F).
"""

from collections.abc import Iterable
from typing import Final

from kvmtick.abi.structs import KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2
from kvmtick.vcpu.cpuid import (
    LEAF_ADDRESS_SIZES,
    LEAF_CACHES,
    LEAF_FEATURES,
    LEAF_TOPOLOGY,
    LEAF_VENDOR,
    LEAVES_TOPOLOGY,
    is_amd_or_hygon,
)

__all__ = ["one_package"]

EDX_HTT: Final = 1 << 28
"""Leaf 1: the package has room for more than one logical processor."""
MOST_IDS_LEAF_1, MOST_CORES_LEAF_4 = 0xFF, 0x40
CACHE_TYPE, CACHE_LEVEL_SHIFT, CACHE_LEVEL = 0x1F, 5, 7
OWN_CACHE_LEVELS: Final = 2
"""A core has its first and second level caches to itself, the package shares the others."""
SMT, CORE = 1, 2


def one_package(
    entries: Iterable[kvm_cpuid_entry2], vcpu_id: int, vcpus: int
) -> list[kvm_cpuid_entry2]:
    """The entries, changed in place, of that one of the `vcpus` in the package.

    KVM tells the host's topology or none, so the levels of leaf 0xB are made anew where the leaf is
    offered.
    """
    entries = list(entries)
    shift = (vcpus - 1).bit_length()
    for entry in entries:
        if entry.function == LEAF_FEATURES:
            ids = min(1 << shift, MOST_IDS_LEAF_1)
            entry.ebx = entry.ebx & ~(0xFF << 16) | ids << 16
            entry.edx = entry.edx | EDX_HTT if vcpus > 1 else entry.edx & ~EDX_HTT
        elif entry.function == LEAF_CACHES and entry.eax & CACHE_TYPE:
            entry.eax = entry.eax & 0x3FFF | _shared_by(entry.eax, shift)
        elif entry.function == LEAF_ADDRESS_SIZES and is_amd_or_hygon(_vendor(entries)):
            entry.ecx = entry.ecx & ~0xF0FF | shift << 12 | min(vcpus - 1, 0xFF)
    if all(entry.function != LEAF_TOPOLOGY for entry in entries):
        return entries
    entries = [entry for entry in entries if entry.function not in LEAVES_TOPOLOGY]
    levels = ((SMT, 0, 1), (CORE, shift, vcpus))
    return entries + [
        kvm_cpuid_entry2(
            function=LEAF_TOPOLOGY,
            index=index,
            flags=KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            eax=id_shift,
            ebx=processors,
            ecx=level << 8 | index,
            edx=vcpu_id,
        )
        for index, (level, id_shift, processors) in enumerate(levels)
    ]


def _shared_by(cache: int, shift: int) -> int:
    """Leaf 4's EAX from bit 14 on: the ids of the package's cores and of those at the cache."""
    cores = min(1 << shift, MOST_CORES_LEAF_4)
    own = cache >> CACHE_LEVEL_SHIFT & CACHE_LEVEL <= OWN_CACHE_LEVELS
    return (cores - 1) << 26 | (0 if own else (1 << shift) - 1) << 14


def _vendor(entries: Iterable[kvm_cpuid_entry2]) -> int:
    """EBX of leaf 0."""
    return next((entry.ebx for entry in entries if entry.function == LEAF_VENDOR), 0)
