"""Which MSRs a guest and user space have, and what they take: the model and the kernel.

Paravirtual MSRs are those of a vCPU with KVM_CAP_ENFORCE_PV_FEATURE_CPUID and no such feature.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from kvmtick.abi import ioctls
from kvmtick.abi.structs import kvm_enable_cap
from kvmtick.conform.bench import Bench, Pc
from kvmtick.guests.script import Op, rdmsr, unreal, wrmsr
from kvmtick.kvm.kernel import KernelVcpu
from kvmtick.kvm.setup import cpuid_of

KVM_CAP_ENFORCE_PV_FEATURE_CPUID = 190
LEAF_KVM_FEATURES = 0x4000_0001
ONES = (1 << 64) - 1
GP = None

PAT, MTRR_DEF_TYPE, MISC_ENABLE, DEBUGCTL = 0x277, 0x2FF, 0x1A0, 0x1D9
WB_MTRR = 0x0606_0606_0606_0606

CONSTANTS = {
    0x0: 0,
    0x1: 0,
    0x17: 0,
    0x2A: 0,
    0x2C: 1 << 24,
    0x34: 0,
    0xCD: 3,
    0xFE: 0x508,
    0xC1: 0,
    0xC2: 0,
    0x11E: 0xBE70_2111,
    0x179: 0x20,
    0x186: 0,
    0x187: 0,
    0x198: 4 << 40 | 1000,
    0x199: 0,
    DEBUGCTL: 0,
    0x1DB: 0,
    0x1DC: 0,
    0x1DD: 0,
    0x1DE: 0,
    0x606: 0,
    0x611: 0,
    0x619: 0,
    0x639: 0,
    0x641: 0,
    0xC001_0000: 0,
    0xC001_0007: 0,
    0xC001_0010: 0,
    0xC001_0015: 0,
    0xC001_001B: 0x2000_0000,
    0xC001_001F: 0,
    0xC001_0055: 0,
    0xC001_0058: 0,
    0xC001_0117: 0,
    0xC001_1022: 0,
    0xC001_1023: 0,
    0xC001_102A: 0,
    0xC001_102C: 0,
}
AFTER_RESET = {
    0x3B: 0,
    0x17A: 0,
    0x1FC: 0,
    PAT: 0x0007_0406_0007_0406,
    MTRR_DEF_TYPE: 0,
    0x6E0: 0,
    0x200: 0,
    0x20F: 0,
    0x250: 0,
    0x258: 0,
    0x259: 0,
    0x268: 0,
    0x26F: 0,
    0x400: 0,
    0x401: 0,
    0x402: 0,
    0x403: 0,
    0x47F: 0,
}
PARAVIRTUAL = (0x11, 0x12, *range(0x4B56_4D00, 0x4B56_4D08))
HOST_READS_0 = (*PARAVIRTUAL, 0x10A, 0x17B, 0x280, 0x29F, 0x345, 0xDA0)
"""What a guest with these features would have."""
ABSENT = (
    *(0x4, 0x5, 0x9B, 0x9E, 0xE2, 0xE7, 0xE8, 0x119, 0x19A, 0x19B, 0x19C, 0x1A2, 0x1B0, 0x1C8),
    *(0x210, 0x24F, 0x251, 0x257, 0x25A, 0x267, 0x270, 0x276, 0x278, 0x27F, 0x2A0, 0x300),
    *(0x309, 0x38D, 0x38E, 0x38F, 0x390, 0x3F1, 0x480, 0x48A, 0x4C1, 0x570, 0x600, 0x770, 0xC80),
    *(0x802, 0x830, 0xD90, 0x4000_0000, 0x4000_0001, 0x4B56_4D08, 0xC001_1020, 0xDEAD_BEEF),
)
"""Of a vCPU with no more than what CPUID here offers; the x2APIC's in xAPIC mode."""


@contextmanager
def pc_without_pv(backend: Bench) -> Iterator[Pc]:
    """One vCPU that has to do without KVM's paravirtual features."""
    with backend.pc(cpuid=False) as pc:
        vcpu = pc.vcpus[0]
        entries = cpuid_of(pc.vm.get_supported_cpuid(), 0)
        for entry in entries:
            if entry.function == LEAF_KVM_FEATURES:
                entry.eax = 0
        vcpu.set_cpuid2(entries)
        if isinstance(vcpu, KernelVcpu):
            cap = kvm_enable_cap(cap=KVM_CAP_ENFORCE_PV_FEATURE_CPUID)
            cap.args[0] = 1
            vcpu.file.ioctl(ioctls.KVM_ENABLE_CAP, cap)
        yield pc


def read_by_guest(pc: Pc, indices: Iterable[int]) -> dict[int, int | None]:
    """What RDMSR gives, None: #GP."""
    got: dict[int, int | None] = {}
    for index in indices:
        run = pc.run(unreal(), rdmsr(index, 0))
        got[index] = GP if run.faults else run.results[0] | run.results[1] << 32
    return got


def writes(pc: Pc, *values: tuple[int, int]) -> list[bool]:
    """Whether the guest may write them."""
    return [pc.run(unreal(), wrmsr(index, value)).faults == 0 for index, value in values]


def test_a_guest_reads_those_that_are_constant(backend: Bench) -> None:
    with pc_without_pv(backend) as pc:
        assert read_by_guest(pc, CONSTANTS) == CONSTANTS
        assert pc.vcpus[0].get_msrs(CONSTANTS) == CONSTANTS


def test_a_guest_reads_those_it_may_write_as_after_reset(backend: Bench) -> None:
    with pc_without_pv(backend) as pc:
        assert read_by_guest(pc, AFTER_RESET) == AFTER_RESET
        assert pc.vcpus[0].get_msrs(AFTER_RESET) == AFTER_RESET


def test_all_others_fault(backend: Bench) -> None:
    with pc_without_pv(backend) as pc:
        assert read_by_guest(pc, ABSENT) == dict.fromkeys(ABSENT, GP)
        assert writes(pc, *((index, 0) for index in ABSENT)) == [False] * len(ABSENT)
        assert [index for index in ABSENT if pc.vcpus[0].get_msrs([index])] == []


def test_those_without_their_feature_fault_and_user_space_reads_and_writes_0(
    backend: Bench,
) -> None:
    with pc_without_pv(backend) as pc:
        vcpu = pc.vcpus[0]
        assert read_by_guest(pc, HOST_READS_0) == dict.fromkeys(HOST_READS_0, GP)
        assert writes(pc, *((index, 0) for index in PARAVIRTUAL)) == [False] * len(PARAVIRTUAL)
        assert vcpu.get_msrs(HOST_READS_0) == dict.fromkeys(HOST_READS_0, 0)
        assert vcpu.set_msrs(dict.fromkeys(PARAVIRTUAL, 0)) == len(PARAVIRTUAL)
        assert [vcpu.set_msrs({index: 1}) for index in PARAVIRTUAL] == [0] * len(PARAVIRTUAL)


def test_user_space_reads_up_to_the_first_unknown_one(backend: Bench) -> None:
    with pc_without_pv(backend) as pc:
        assert pc.vcpus[0].get_msrs([0xFE, 0xDEAD_BEEF, 0xCD]) == {0xFE: 0x508}
        assert pc.vcpus[0].set_msrs({PAT: 0, 0xFE: 0, 0x1FC: 1}) == 1


READ_ONLY = (0x0, 0x1, 0x17, 0x2A, 0x2C, 0xCD, 0xFE, 0x179, 0x198, 0x199, 0x1DB, 0x606, 0xC001_0010)
IGNORED = (0x79, 0x8B, 0xC1, 0x11E, 0x186, 0xC001_0000, 0xC001_001B, 0xC001_0020, 0xC001_102C)


def test_writes_to_constants_fault_or_do_nothing(backend: Bench) -> None:
    with pc_without_pv(backend) as pc:
        assert writes(pc, *((index, 0) for index in READ_ONLY)) == [False] * len(READ_ONLY)
        assert writes(pc, *((index, ONES) for index in IGNORED)) == [True] * len(IGNORED)
        assert read_by_guest(pc, (0xC1, 0x11E)) == {0xC1: 0, 0x11E: 0xBE70_2111}
        assert read_by_guest(pc, (0x79, 0xC001_0020)) == {0x79: GP, 0xC001_0020: GP}


TAKEN: list[tuple[int, int, bool]] = [
    *((PAT, 0x0007_0406_0007_0400 | kind, True) for kind in (0, 1, 4, 5, 6, 7)),
    *((MTRR_DEF_TYPE, value, True) for value in (6, 0x806, 0xC06, 0x406, 0xC00, 0)),
    *((MTRR_DEF_TYPE, value, False) for value in (0x100, 0x200, 2, 3, 7, 0x1000, 1 << 32)),
    *((0x200, value, True) for value in (6, 1 << 35 | 6, 0x1234_5006)),
    *((0x200, value, False) for value in (0x106, 2, 7, 0xFFF, 1 << 52)),
    *((0x20F, value, True) for value in (0x800, 1 << 35 | 0x800)),
    *((0x20F, value, False) for value in (0x400, 0x7FF, 0xC00, 1 << 52)),
    *((0x250, value, True) for value in (WB_MTRR, 0x0001_0405_0600_0104)),
    *((0x26F, value, False) for value in (2, WB_MTRR | 1, 0xFF << 56)),
    *((0x400, value, True) for value in (0, ONES, ONES & ~(1 << 10), ONES & ~1)),
    *((0x404, value, False) for value in (1, 2, ONES >> 1)),
    *((0x401, 0, True), (0x401, 1, False), (0x402, ONES, True), (0x403, 5, True)),
    *((0x17A, 5, True), (0x17A, ONES, True), (0x17B, 0, False), (0x1FC, ONES, True)),
    *((0xC001_0015, 0, True), (0xC001_0058, 0, True), (0xC001_0058, 1, False)),
]


def test_what_a_guest_may_write_it_reads_back(backend: Bench) -> None:
    with pc_without_pv(backend) as pc:
        for index, value, taken in TAKEN:
            before = pc.vcpus[0].get_msrs([index])
            assert writes(pc, (index, value)) == [taken], (hex(index), hex(value))
            after = {index: value} if taken else before
            assert pc.vcpus[0].get_msrs([index]) == after, (hex(index), hex(value))


def test_reserved_memory_types_of_pat_fault(model: Bench) -> None:
    with model.pc() as pc:
        assert writes(pc, (PAT, 2), (PAT, 3), (PAT, 8), (PAT, 0xFF << 56)) == [False] * 4


def test_user_space_may_set_what_a_guest_may_not(backend: Bench) -> None:
    with pc_without_pv(backend) as pc:
        vcpu = pc.vcpus[0]
        assert vcpu.set_msrs({0x401: 5}) == 1
        assert vcpu.get_msrs([0x401]) == {0x401: 5}


def test_bits_of_misc_enable_that_tell_of_hardware_stay(model: Bench) -> None:
    """Branch trace store and PEBS are unavailable; performance monitoring is, too."""
    with model.pc() as pc:
        assert read_by_guest(pc, [MISC_ENABLE]) == {MISC_ENABLE: 0x1801}
        assert writes(pc, (MISC_ENABLE, 0x1001), (MISC_ENABLE, 0x0801)) == [False, False]
        assert writes(pc, (MISC_ENABLE, 0x1888)) == [True]
        assert read_by_guest(pc, [MISC_ENABLE]) == {MISC_ENABLE: 0x1808}


def test_debugctl_has_no_bits_and_ignores_two(model: Bench) -> None:
    with model.pc() as pc:
        assert writes(pc, (DEBUGCTL, 3), (DEBUGCTL, 4), (DEBUGCTL, 1 << 14)) == [True, False, False]
        assert read_by_guest(pc, [DEBUGCTL]) == {DEBUGCTL: 0}


def test_there_is_no_cpuid_faulting(model: Bench) -> None:
    with model.pc() as pc:
        assert read_by_guest(pc, [0xCE, 0x140]) == {0xCE: 0, 0x140: 0}
        assert writes(pc, (0xCE, 0), (0x140, 0), (0x140, 1)) == [False, True, False]


def test_the_microcode_is_intels_and_user_space_sets_it(model: Bench) -> None:
    with model.pc() as pc:
        assert read_by_guest(pc, [0x8B]) == {0x8B: 1 << 32}
        assert pc.vcpus[0].set_msrs({0x8B: 7 << 32}) == 1
        assert read_by_guest(pc, [0x8B]) == {0x8B: 7 << 32}


# --- IA32_TSC_ADJUST ------------------------------------------------------------------------------

TSC, TSC_ADJUST = 0x10, 0x3B


def test_tsc_adjust_without_cpuid_is_ignored(backend: Bench) -> None:
    with backend.pc(cpuid=False) as pc:
        assert writes(pc, (TSC_ADJUST, 7)) == [True]
        assert pc.vcpus[0].set_msrs({TSC_ADJUST: 5}) == 1
        assert read_by_guest(pc, [TSC_ADJUST]) == {TSC_ADJUST: 0}


def test_tsc_adjust_tells_what_the_guest_did_to_its_tsc(backend: Bench) -> None:
    with backend.pc() as pc:
        ops: tuple[Op, ...] = (*wrmsr(TSC, 1 << 62), *rdmsr(TSC_ADJUST, 0))
        got = pc.run(unreal(), ops)
        moved = got.results[0] | got.results[1] << 32
        assert abs(moved - (1 << 62)) < 1 << 60


def test_tsc_adjust_moves_the_tsc(model: Bench) -> None:
    with model.pc() as pc:
        got = pc.run(unreal(), wrmsr(TSC_ADJUST, 1 << 40), rdmsr(TSC, 0), wrmsr(TSC_ADJUST, 0))
        assert 1 << 40 < got.results[0] | got.results[1] << 32 < (1 << 40) + 1_000_000
        assert pc.vcpus[0].get_msrs([TSC])[TSC] < 1_000_000


def test_user_space_sets_the_tsc_and_leaves_tsc_adjust(backend: Bench) -> None:
    with backend.pc() as pc:
        assert pc.vcpus[0].set_msrs({TSC: 1 << 50}) == 1
        assert pc.vcpus[0].get_msrs([TSC_ADJUST]) == {TSC_ADJUST: 0}
