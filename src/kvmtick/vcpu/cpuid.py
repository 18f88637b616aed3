"""CPUID as the guest sees it (Intel SDM vol. 2A, CPUID; arch/x86/kvm/cpuid.c).

A vCPU has no CPUID until user space gives it one (KVM_SET_CPUID2): every leaf then reads 0 and
features that need a bit (x2APIC, the TSC-deadline timer) are absent. `supported` is what the model
offers (KVM_GET_SUPPORTED_CPUID): the CPU that the unicorn engine executes, the model's local APIC
and clocks, KVM's signature.

The clocks are told in leaf 0x15 (TSC and local APIC timer: a crystal of 1 GHz, ratio 1) and, as
VMMs do, in leaf 0x40000010 (both in kHz), so a guest need not measure them. With another
KVM_CAP_X86_APIC_BUS_CYCLES_NS the VMM has to change both, as with KVM.

Of the bits that follow the vCPU's state only that of the APIC is there to do so: neither XSAVE nor
MWAIT nor protection keys are offered.

How the vCPUs of a VM make up a package is the VMM's to say (`kvmtick.kvm.topology`); in `supported`
each is a package.

Not modelled: caches (leaf 4 reads 0), KVM's paravirtual features.
"""

from collections.abc import Iterable
from typing import Final, NamedTuple

from kvmtick.irqchip.lapic import DEFAULT_MAXPHYADDR
from kvmtick.irqchip.lapic_timer import GUEST_TSC_KHZ

__all__ = [
    "BOARD_FEATURES",
    "ECX_TSC_DEADLINE",
    "FEATURES",
    "Cpuid",
    "CpuidLeaf",
    "Feature",
    "is_amd_or_hygon",
    "supported",
    "vendor_registers",
]

LEAF_VENDOR: Final = 0
LEAF_FEATURES: Final = 1
LEAF_CACHES: Final = 4
LEAF_EXTENDED_FEATURES: Final = 7
LEAF_TOPOLOGY: Final = 0xB
LEAVES_TOPOLOGY: Final = (LEAF_TOPOLOGY, 0x1F)
LEAF_CRYSTAL_CLOCK: Final = 0x15
LEAF_HYPERVISOR: Final = 0x4000_0000
LEAF_HYPERVISOR_CLOCKS: Final = 0x4000_0010
LEAVES_CLOCKS: Final = (LEAF_CRYSTAL_CLOCK, 0x16, LEAF_HYPERVISOR_CLOCKS)
LEAF_EXTENDED: Final = 0x8000_0000
LEAF_BRAND: Final = 0x8000_0002
LEAF_INVARIANT_TSC: Final = 0x8000_0007
LEAF_ADDRESS_SIZES: Final = 0x8000_0008
LEAF_CENTAUR: Final = 0xC000_0000

ECX_X2APIC: Final = 1 << 21
ECX_TSC_DEADLINE: Final = 1 << 24
ECX_HYPERVISOR: Final = 1 << 31
EDX_APIC: Final = 1 << 9
EBX_TSC_ADJUST: Final = 1 << 1
EDX_INVARIANT_TSC: Final = 1 << 8

# What the engine executes (`kvmtick.cpu.unicorn.FEATURES`), but for XSAVE, PKU and LA57.
_CPU_1_ECX: Final = 0x42D8_2203  # SSE3 PCLMULQDQ SSSE3 CX16 SSE4.1 SSE4.2 MOVBE POPCNT AES RDRAND
_CPU_1_EDX: Final = 0x078A_A9FD  # FPU to SSE2, CLFSH; those of the board are below
_CPU_7_EBX: Final = 0x019C_0389  # FSGSBASE BMI1 SMEP BMI2 ERMS RDSEED ADX SMAP CLFLUSHOPT CLWB
_CPU_EXT_ECX: Final = 0x0000_0121  # LAHF in 64-bit mode, LZCNT, PREFETCHW
_CPU_EXT_EDX: Final = 0x2C10_0800  # SYSCALL NX 1-GiB-pages RDTSCP long-mode
_BOARD_1_ECX: Final = ECX_X2APIC | ECX_TSC_DEADLINE | ECX_HYPERVISOR
_BOARD_1_EDX: Final = EDX_APIC | 1 << 12 | 1 << 14 | 1 << 16  # MTRR, MCA, PAT

BOARD_FEATURES: Final = {
    (LEAF_FEATURES, "ecx"): _BOARD_1_ECX,
    (LEAF_FEATURES, "edx"): _BOARD_1_EDX,
    (LEAF_EXTENDED_FEATURES, "ebx"): EBX_TSC_ADJUST,
}
"""The bits that chips and MSRs of the model are behind, by leaf and register; whoever executes
the guest has the others."""

SANDY_BRIDGE: Final = 0x206A1
CLFLUSH_64_BYTES: Final = 0x800
BRAND: Final = "kvmtick virtual CPU @ 1.00GHz"
AMD_OR_HYGON: Final = ("Auth", "AMDi", "Hygo")
"""How the vendors' names begin whose CPUs answer a leaf out of range with 0."""


class CpuidLeaf(NamedTuple):
    """One entry of KVM_SET_CPUID2; `subleaf` is ECX, None where it does not matter."""

    function: int
    subleaf: int | None
    eax: int
    ebx: int
    ecx: int
    edx: int


class Feature(NamedTuple):
    """A bit of a leaf."""

    function: int
    register: str
    mask: int


FEATURES: Final = {
    "x2apic": Feature(LEAF_FEATURES, "ecx", ECX_X2APIC),
    "tsc_deadline": Feature(LEAF_FEATURES, "ecx", ECX_TSC_DEADLINE),
    "tsc_adjust": Feature(LEAF_EXTENDED_FEATURES, "ebx", EBX_TSC_ADJUST),
}
"""What the model looks at."""


class Cpuid:
    """The leaves of one vCPU."""

    __slots__ = ("_leaves",)

    def __init__(self) -> None:
        self._leaves: dict[tuple[int, int | None], CpuidLeaf] = {}

    def set(self, leaves: Iterable[CpuidLeaf]) -> None:
        """KVM_SET_CPUID2: these leaves and no others."""
        self._leaves = {(leaf.function, leaf.subleaf): leaf for leaf in leaves}

    def set_same(self, other: "Cpuid") -> None:
        """Those of another vCPU, whose table serves both."""
        self._leaves = other._leaves

    def leaves(self) -> list[CpuidLeaf]:
        """KVM_GET_CPUID2."""
        return list(self._leaves.values())

    def has(self, feature: str) -> bool:
        """Whether the guest was given that one of `FEATURES`."""
        return self.has_bit(*FEATURES[feature])

    def has_bit(self, function: int, register: str, mask: int) -> bool:
        """Whether the guest was given that bit of a leaf."""
        leaf = self._find(function, 0)
        return leaf is not None and getattr(leaf, register) & mask != 0

    def has_leaf(self, function: int) -> bool:
        """`kvm_find_cpuid_entry`: whether the guest was given that leaf."""
        return self._find(function, 0) is not None

    def maxphyaddr(self) -> int:
        """Bits of a guest-physical address (`cpuid_query_maxphyaddr`)."""
        highest = self._leaves.get((LEAF_EXTENDED, None))
        leaf = self._leaves.get((LEAF_ADDRESS_SIZES, None))
        if highest is None or highest.eax < LEAF_ADDRESS_SIZES or leaf is None:
            return DEFAULT_MAXPHYADDR
        return leaf.eax & 0xFF

    def answer(self, function: int, index: int, apic_enabled: bool) -> tuple[int, int, int, int]:
        """EAX, EBX, ECX, EDX of a leaf; the APIC bit shows whether IA32_APIC_BASE enables it."""
        leaf = self._find(function, index)
        if leaf is None and self._is_out_of_range(function):
            function = self._leaves[LEAF_VENDOR, None].eax
            leaf = self._find(function, index)
        if leaf is None:
            # Below the levels there are, topology tells the subleaf asked for and the APIC id.
            level = self._find(function, 1) if function in LEAVES_TOPOLOGY else None
            return (0, 0, index & 0xFF, level.edx) if level is not None else (0, 0, 0, 0)
        edx = leaf.edx
        if function == LEAF_FEATURES and not apic_enabled:
            edx &= ~EDX_APIC
        return leaf.eax, leaf.ebx, leaf.ecx, edx

    def _find(self, function: int, index: int) -> CpuidLeaf | None:
        return self._leaves.get((function, None)) or self._leaves.get((function, index))

    def _is_out_of_range(self, function: int) -> bool:
        """Whether Intel's CPUs answer with the highest basic leaf: beyond the highest leaf of its
        range, or in a range that is not there.
        """
        basic = self._leaves.get((LEAF_VENDOR, None))
        if basic is None or is_amd_or_hygon(basic.ebx):
            return False
        if function >> 28 == LEAF_HYPERVISOR >> 28:
            first = function & ~0xFF
        elif function >= LEAF_CENTAUR:
            first = LEAF_CENTAUR
        else:
            first = function & LEAF_EXTENDED
        highest = self._leaves.get((first, None))
        return highest is None or function > highest.eax


def supported() -> list[CpuidLeaf]:
    """KVM_GET_SUPPORTED_CPUID of the model; the APIC ids in it are 0."""
    clock_khz = GUEST_TSC_KHZ
    return [
        CpuidLeaf(LEAF_VENDOR, None, LEAF_CRYSTAL_CLOCK, *_text("Genu", "ntel", "ineI")),
        CpuidLeaf(
            LEAF_FEATURES,
            None,
            SANDY_BRIDGE,
            CLFLUSH_64_BYTES,
            _CPU_1_ECX | _BOARD_1_ECX,
            _CPU_1_EDX | _BOARD_1_EDX,
        ),
        CpuidLeaf(LEAF_EXTENDED_FEATURES, 0, 0, _CPU_7_EBX | EBX_TSC_ADJUST, 0, 0),
        CpuidLeaf(LEAF_TOPOLOGY, 0, 0, 1, 0x100, 0),
        CpuidLeaf(LEAF_TOPOLOGY, 1, 0, 1, 0x201, 0),
        CpuidLeaf(LEAF_CRYSTAL_CLOCK, None, 1, 1, clock_khz * 1000, 0),
        CpuidLeaf(LEAF_HYPERVISOR, None, LEAF_HYPERVISOR_CLOCKS, *_text("KVMK", "VMKV", "M\0\0\0")),
        CpuidLeaf(LEAF_HYPERVISOR + 1, None, 0, 0, 0, 0),
        CpuidLeaf(LEAF_HYPERVISOR_CLOCKS, None, clock_khz, clock_khz, 0, 0),
        CpuidLeaf(LEAF_EXTENDED, None, LEAF_ADDRESS_SIZES, 0, 0, 0),
        CpuidLeaf(LEAF_EXTENDED + 1, None, 0, 0, _CPU_EXT_ECX, _CPU_EXT_EDX),
        *_brand(),
        CpuidLeaf(LEAF_INVARIANT_TSC, None, 0, 0, 0, EDX_INVARIANT_TSC),
        CpuidLeaf(LEAF_ADDRESS_SIZES, None, 0x3028, 0, 0, 0),
    ]


def _brand() -> list[CpuidLeaf]:
    """The brand string: 48 bytes, 16 a leaf."""
    words = memoryview(BRAND.encode().ljust(48, b"\0")).cast("I")
    return [CpuidLeaf(LEAF_BRAND + n, None, *words[4 * n : 4 * n + 4]) for n in range(3)]


def is_amd_or_hygon(ebx: int) -> bool:
    """By EBX of leaf 0."""
    return ebx.to_bytes(4, "little").decode("latin-1") in AMD_OR_HYGON


def vendor_registers(name: str) -> tuple[int, int, int]:
    """EBX, EDX and ECX of leaf 0 that spell a vendor's name of 12 characters."""
    return _text(name[:4], name[4:8], name[8:12])


def _text(*parts: str) -> tuple[int, int, int]:
    """Three registers that spell a name, in the order given."""
    first, second, third = (int.from_bytes(part.encode(), "little") for part in parts)
    return first, second, third
