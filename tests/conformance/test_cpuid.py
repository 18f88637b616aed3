"""What CPUID answers beyond the leaves that user space gave: the model and the kernel."""

from collections.abc import Iterable

import pytest

from kvmtick.conform.bench import Bench, Pc
from kvmtick.guests.script import cpuid
from kvmtick.kvm.dev_ioctl import cpuid_entries
from kvmtick.vcpu.cpuid import CpuidLeaf

INTEL = (0x756E_6547, 0x6C65_746E, 0x4965_6E69)
AMD = (0x6874_7541, 0x444D_4163, 0x6974_6E65)
"""EBX, ECX, EDX of leaf 0."""
HIGHEST_BASIC = (0x15, 0x16, 0x17, 0x18)
NOTHING = (0, 0, 0, 0)


def leaves(vendor: tuple[int, int, int]) -> list[CpuidLeaf]:
    """Basic leaves up to 0x15, a hypervisor leaf and three extended ones."""
    return [
        CpuidLeaf(0, None, 0x15, *vendor),
        CpuidLeaf(1, None, 0x206A1, 0, 0, 0x200),
        CpuidLeaf(0xB, 0, 0, 1, 0x100, 3),
        CpuidLeaf(0xB, 1, 0, 1, 0x201, 3),
        CpuidLeaf(0x15, None, *HIGHEST_BASIC),
        CpuidLeaf(0x4000_0000, None, 0x4000_0001, 1, 2, 3),
        CpuidLeaf(0x4000_0001, None, 0, 5, 6, 7),
        CpuidLeaf(0x8000_0000, None, 0x8000_0008, 0, 0, 0),
        CpuidLeaf(0x8000_0001, None, 0, 0, 0, 1 << 29),
        CpuidLeaf(0x8000_0008, None, 0x3028, 0, 0, 0),
    ]


def answers(pc: Pc, functions: Iterable[int]) -> dict[int, tuple[int, ...]]:
    """EAX, EBX, ECX, EDX of subleaf 0."""
    return {function: pc.run(cpuid(function, 0)).results[:4] for function in functions}


IN_RANGE = {
    **dict.fromkeys((0x2, 0x4, 0xA, 0x14, 0x8000_0002, 0x8000_0007), NOTHING),
    0x15: HIGHEST_BASIC,
    0x4000_0001: (0, 5, 6, 7),
}
OUT_OF_RANGE = (
    *(0x16, 0x80, 0x3FFF_FFFF, 0x4000_0002, 0x4000_0100, 0x4FFF_FFFF, 0x5000_0000, 0x7FFF_FFFF),
    *(0x8000_0009, 0x8FFF_FFFF, 0xC000_0000, 0xFFFF_FFFF),
)


def test_leaves_out_of_range_read_as_the_highest_basic_one(backend: Bench) -> None:
    with backend.pc(cpuid=False) as pc:
        pc.vcpus[0].set_cpuid2(cpuid_entries(leaves(INTEL)))
        assert answers(pc, IN_RANGE) == IN_RANGE
        assert answers(pc, OUT_OF_RANGE) == dict.fromkeys(OUT_OF_RANGE, HIGHEST_BASIC)


def test_on_amds_cpus_they_read_0(backend: Bench) -> None:
    with backend.pc(cpuid=False) as pc:
        pc.vcpus[0].set_cpuid2(cpuid_entries(leaves(AMD)))
        assert answers(pc, IN_RANGE) == IN_RANGE
        assert answers(pc, OUT_OF_RANGE) == dict.fromkeys(OUT_OF_RANGE, NOTHING)


def test_without_leaves_all_read_0(backend: Bench) -> None:
    with backend.pc(cpuid=False) as pc:
        assert answers(pc, (0, 1, 0x16, 0x8000_0000)) == dict.fromkeys(
            (0, 1, 0x16, 0x8000_0000), NOTHING
        )


@pytest.mark.parametrize("leaf", [0xB, 0x1F])
def test_below_its_levels_topology_tells_the_subleaf_and_the_id(backend: Bench, leaf: int) -> None:
    """With a highest basic leaf of 0x1f both are in range; it has a level 1 only here."""
    with backend.pc(cpuid=False) as pc:
        given = [entry for entry in leaves(INTEL) if entry.function not in (0, 0xB)]
        given += [CpuidLeaf(0, None, 0x1F, *INTEL)]
        given += [CpuidLeaf(leaf, 1, 0, 1, 0x201, 9)]
        pc.vcpus[0].set_cpuid2(cpuid_entries(given))
        assert answers(pc, (leaf,)) == {leaf: (0, 0, 0, 9)}
