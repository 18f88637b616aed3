"""CPUID as the guest sees it (Intel SDM vol. 2A, CPUID; arch/x86/kvm/cpuid.c).

A vCPU has no CPUID until user space gives it one (KVM_SET_CPUID2): every leaf then reads 0 and
features that need a bit (x2APIC, the TSC-deadline timer) are absent. `supported` is what the model
offers (KVM_GET_SUPPORTED_CPUID): the CPU that the unicorn engine executes, with KVM's signature.

Not modelled: the answer to a leaf out of range (0 here; Intel's highest basic leaf on some hosts),
the bits that follow CR4 and XCR0, KVM's paravirtual features.
"""

from collections.abc import Iterable
from typing import NamedTuple

from kvmtick.irqchip.lapic import DEFAULT_MAXPHYADDR

__all__ = ["ECX_TSC_DEADLINE", "FEATURES", "Cpuid", "CpuidLeaf", "supported"]

LEAF_FEATURES = 1
LEAF_EXTENDED = 0x8000_0000
LEAF_ADDRESS_SIZES = 0x8000_0008
ECX_SSE3 = 1 << 0
ECX_SSSE3 = 1 << 9
ECX_CX16 = 1 << 13
ECX_SSE4_1 = 1 << 19
ECX_SSE4_2 = 1 << 20
ECX_X2APIC = 1 << 21
ECX_POPCNT = 1 << 23
ECX_TSC_DEADLINE = 1 << 24
ECX_HYPERVISOR = 1 << 31
EDX_APIC = 1 << 9
EDX_BASELINE = 0x0783_FBFD
"""FPU to SSE2 without VME and MCE's machine checks: what every x86-64 processor has, APIC too."""

FEATURES = {"x2apic": ECX_X2APIC, "tsc_deadline": ECX_TSC_DEADLINE}
"""The bits of leaf 1's ECX that the model looks at."""

CLFLUSH_64_BYTES = 0x800


class CpuidLeaf(NamedTuple):
    """One entry of KVM_SET_CPUID2; `subleaf` is ECX, None where it does not matter."""

    function: int
    subleaf: int | None
    eax: int
    ebx: int
    ecx: int
    edx: int


class Cpuid:
    """The leaves of one vCPU."""

    __slots__ = ("_leaves",)

    def __init__(self) -> None:
        self._leaves: dict[tuple[int, int | None], CpuidLeaf] = {}

    def set(self, leaves: Iterable[CpuidLeaf]) -> None:
        """KVM_SET_CPUID2: these leaves and no others."""
        self._leaves = {(leaf.function, leaf.subleaf): leaf for leaf in leaves}

    def leaves(self) -> list[CpuidLeaf]:
        """KVM_GET_CPUID2."""
        return list(self._leaves.values())

    def has(self, feature: str) -> bool:
        """Whether the guest was given `x2apic` or `tsc_deadline`."""
        leaf = self._leaves.get((LEAF_FEATURES, None))
        return leaf is not None and bool(leaf.ecx & FEATURES[feature])

    def maxphyaddr(self) -> int:
        """Bits of a guest-physical address (`cpuid_query_maxphyaddr`)."""
        highest = self._leaves.get((LEAF_EXTENDED, None))
        leaf = self._leaves.get((LEAF_ADDRESS_SIZES, None))
        if highest is None or highest.eax < LEAF_ADDRESS_SIZES or leaf is None:
            return DEFAULT_MAXPHYADDR
        return leaf.eax & 0xFF

    def answer(self, function: int, index: int, apic_enabled: bool) -> tuple[int, int, int, int]:
        """EAX, EBX, ECX, EDX of a leaf; the APIC bit shows whether IA32_APIC_BASE enables it."""
        leaf = self._leaves.get((function, None)) or self._leaves.get((function, index))
        if leaf is None:
            return 0, 0, 0, 0
        edx = leaf.edx
        if function == LEAF_FEATURES and not apic_enabled:
            edx &= ~EDX_APIC
        return leaf.eax, leaf.ebx, leaf.ecx, edx


def supported() -> list[CpuidLeaf]:
    """KVM_GET_SUPPORTED_CPUID of the model; the APIC ids in it are 0."""
    features = (
        ECX_SSE3
        | ECX_SSSE3
        | ECX_CX16
        | ECX_SSE4_1
        | ECX_SSE4_2
        | ECX_X2APIC
        | ECX_POPCNT
        | ECX_TSC_DEADLINE
        | ECX_HYPERVISOR
    )
    return [
        CpuidLeaf(0, None, 0xB, *_text("Genu", "ntel", "ineI")),
        CpuidLeaf(
            LEAF_FEATURES,
            None,
            0x206A1,
            CLFLUSH_64_BYTES,
            features,
            EDX_BASELINE,
        ),
        CpuidLeaf(0xB, 0, 0, 1, 0x100, 0),
        CpuidLeaf(0xB, 1, 0, 0, 0x201, 0),
        CpuidLeaf(0x4000_0000, None, 0x4000_0001, *_text("KVMK", "VMKV", "M\0\0\0")),
        CpuidLeaf(0x4000_0001, None, 0, 0, 0, 0),
        CpuidLeaf(LEAF_EXTENDED, None, LEAF_ADDRESS_SIZES, 0, 0, 0),
        CpuidLeaf(0x8000_0001, None, 0, 0, 0x1, 0x2810_0800),
        CpuidLeaf(LEAF_ADDRESS_SIZES, None, 0x3028, 0, 0, 0),
    ]


def _text(*parts: str) -> tuple[int, int, int]:
    """Three registers that spell a name, in the order given."""
    first, second, third = (int.from_bytes(part.encode(), "little") for part in parts)
    return first, second, third
