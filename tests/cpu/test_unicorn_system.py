"""System instructions of the `unicorn` engine: MSRs, control registers, SYSCALL and SYSENTER,
random numbers, and the features that CPUID may tell of."""

import pytest
from engine_machine import CODE, FLAGS_IF, MSR, STACK_TOP, Cpu, flat_segment, protected_mode
from long_machine import (
    CR0,
    CR4,
    DATA_PAGE,
    EFER,
    KERNEL_CODE,
    KERNEL_DATA,
    KERNEL_STACK,
    PML4,
    USER_CODE,
    USER_CODE_32,
    USER_DATA,
    USER_STACK,
    LongCpu,
)

from kvmtick.cpu.engine import CPU_MSRS, ExitReason
from kvmtick.cpu.unicorn import FEATURES

UD, GP = 6, 13
HALTS = dict.fromkeys(range(21), "f4")  # hlt
MSR_OF = {name: index for index, name in CPU_MSRS.items()}
NOT_CANONICAL = 0x0000_8000_0000_0000
CANONICAL = 0xFFFF_8000_0000_1000
ADDRESSES = (
    *("sysenter_esp", "sysenter_eip", "lstar", "cstar"),
    *("fs_base", "gs_base", "kernel_gs_base"),
)
either_engine = pytest.mark.parametrize("exact", [True, False], ids=["exact", "blocks"])


def is_general_protection_0(cpu: LongCpu) -> bool:
    return cpu.enter() is ExitReason.HLT and cpu.vector == GP and cpu.frame_with_code()[0] == 0


# ---- model-specific registers --------------------------------------------------------------------


def access_msr(code: str, index: int, value: int = 0) -> LongCpu:
    cpu = LongCpu(code + "f4", HALTS)
    cpu.set_registers(rcx=index, rax=value & 0xFFFF_FFFF, rdx=value >> 32)
    return cpu


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, CANONICAL) for name in ADDRESSES),
        ("star", 0x0018_0008_1234_5678),
        ("fmask", 0xFFFF_FFFF),
        ("sysenter_cs", 0x1_0008),
        ("tsc_aux", 0xFFFF_FFFF),
        ("efer", 0x0D00),
    ],
)
def test_msrs_of_the_cpu(name: str, value: int) -> None:
    cpu = access_msr("0f30 31c0 31d2 0f32", MSR_OF[name], value)  # wrmsr; xor eax, eax; edx; rdmsr
    assert cpu.enter() is ExitReason.HLT
    assert cpu.register("rdx") << 32 | cpu.register("rax") == value
    assert cpu.register(name) == value
    assert cpu.accesses == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, NOT_CANONICAL) for name in ADDRESSES),
        ("tsc_aux", 1 << 32),
        ("fmask", 1 << 32),
        ("efer", 0x0D02),  # reserved
        ("efer", 0x4D01),  # FFXSR is AMD's
        ("efer", 0x0C01),  # LME may not change while paging is on
    ],
)
def test_values_that_msrs_of_the_cpu_refuse(name: str, value: int) -> None:
    cpu = access_msr("0f30", MSR_OF[name], value)
    before = cpu.register(name)
    assert is_general_protection_0(cpu)
    assert cpu.register(name) == before


def test_efer_lma_is_read_only() -> None:
    cpu = access_msr("0f30", MSR_OF["efer"], EFER & ~0x400)
    assert cpu.enter() is ExitReason.HLT
    assert cpu.register("efer") == EFER


@either_engine
def test_a_refused_msr_access_in_the_middle_of_a_block(exact: bool) -> None:
    cpu = LongCpu("90 f9 0f30 90 f4", HALTS, exact=exact)  # nop; stc; wrmsr; nop; hlt
    cpu.set_registers(rcx=MSR, rflags=0x42)
    cpu.refused_msrs = {MSR}
    assert is_general_protection_0(cpu)
    _, frame = cpu.frame_with_code()
    assert frame["rip"] == CODE + 2
    assert frame["rflags"] & 0x41 == 0x41  # ZF as it was, CF


def test_rdtscp_reads_tsc_aux() -> None:
    cpu = LongCpu("0f01f9 f4", HALTS)
    cpu.set_registers(tsc_aux=0x1234_5678, rcx=(1 << 64) - 1)
    assert cpu.enter(tsc=7) is ExitReason.HLT
    assert (cpu.register("rax"), cpu.register("rcx")) == (7, 0x1234_5678)


def test_swapgs() -> None:
    cpu = LongCpu("0f01f8 65488b0425 00000000 f4", HALTS)  # swapgs; mov rax, [gs:0]
    cpu.set_registers(gs_base=1, kernel_gs_base=DATA_PAGE)
    cpu.set_quad(DATA_PAGE, 0x1122_3344_5566_7788)
    assert cpu.enter() is ExitReason.HLT
    assert cpu.register("rax") == 0x1122_3344_5566_7788
    assert (cpu.register("gs_base"), cpu.register("kernel_gs_base")) == (DATA_PAGE, 1)


# ---- control registers ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "value"),
    [
        *(("0f22e0", CR4 | 1 << bit) for bit in (0, 1, 11, 13, 14, 17, 19, 23, 31, 32, 63)),
        ("0f22e0", CR4 & ~0x20),  # PAE in long mode
        ("0f22e0", CR4 | 1 << 12),  # LA57 in long mode
        ("0f22c0", CR0 & ~1),  # PG without PE
        ("0f22c0", CR0 & ~(1 << 31)),  # paging off in 64-bit code
        ("0f22c0", CR0 | 1 << 29),  # NW without CD
        ("0f22c0", CR0 | 1 << 32),
        ("0f22d8", PML4 | 1 << 40),
        ("0f22d8", PML4 | 1 << 63),
    ],
)
@either_engine
def test_values_that_control_registers_refuse(code: str, value: int, exact: bool) -> None:
    cpu = LongCpu("90" + code + "f4", HALTS, exact=exact)  # nop; mov crN, rax
    cpu.set_registers(rax=value)
    before = [cpu.register(name) for name in ("cr0", "cr3", "cr4")]
    assert is_general_protection_0(cpu)
    assert cpu.frame_with_code()[1]["rip"] == CODE + 1
    assert [cpu.register(name) for name in ("cr0", "cr3", "cr4")] == before


@pytest.mark.parametrize("bit", [2, 3, 6, 7, 8, 16, 18, 20, 21, 22])
def test_bits_of_cr4_that_may_be_set(bit: int) -> None:
    cpu = LongCpu("0f22e0 0f20e3 f4", HALTS)  # mov cr4, rax; mov rbx, cr4
    for number in range(512):  # of the kernel: for SMEP and SMAP
        cpu.set_page(number << 12, number << 12 | 3)
    cpu.set_registers(rax=CR4 | 1 << bit)
    every = 0xFFFF_FFFF
    cpu.cpuid = lambda function, index: (7, every, every, every)  # type: ignore[method-assign]
    cpu.attach()
    assert cpu.enter() is ExitReason.HLT
    assert cpu.register("rbx") == cpu.register("cr4") == CR4 | 1 << bit


@pytest.mark.parametrize(
    ("bit", "leaf", "register", "feature"),
    [(16, 7, 1, 0), (18, 1, 2, 26), (20, 7, 1, 7), (21, 7, 1, 20), (22, 7, 2, 3)],
    ids=["FSGSBASE", "OSXSAVE", "SMEP", "SMAP", "PKE"],
)
def test_bits_of_cr4_that_need_a_feature(bit: int, leaf: int, register: int, feature: int) -> None:
    def cpuid(function: int, index: int) -> tuple[int, int, int, int]:
        lacks = 1 << feature if (function, index) == (leaf, 0) else 0
        eax, ebx, ecx, edx = (0xFFFF_FFFF ^ (lacks if i == register else 0) for i in range(4))
        return eax, ebx, ecx, edx

    cpu = LongCpu("0f22e0 0f22e0 f4", HALTS)
    cpu.cpuid = cpuid  # type: ignore[method-assign]
    cpu.attach()
    cpu.set_registers(rax=CR4 | 1 << bit)
    assert is_general_protection_0(cpu)
    assert cpu.register("cr4") == CR4


def test_reserved_bits_of_cr0_stay_clear() -> None:
    cpu = LongCpu("0f22c0 f4", HALTS)
    cpu.set_registers(rax=CR0 | 1 << 7 | 1 << 20)
    assert cpu.enter() is ExitReason.HLT
    assert cpu.register("cr0") == CR0


def test_lmsw_and_clts() -> None:
    cpu = Cpu("b80f00 0f01f0 0f06 f4")  # mov ax, 15; lmsw ax; clts; hlt
    assert cpu.enter(budget=2) is ExitReason.PREEMPTION_TIMER
    assert cpu.register("cr0") == 0x6000_001F
    assert cpu.enter() is ExitReason.HLT
    assert cpu.register("cr0") == 0x6000_0017
    cpu = LongCpu("31c0 0f01f0 f4")  # xor eax, eax; lmsw ax: PE stays
    assert cpu.enter() is ExitReason.HLT
    assert cpu.register("cr0") == CR0 & ~0xE


def test_paging_may_not_begin_as_long_mode_without_pae() -> None:
    cpu = Cpu("0f22c0 f4")
    cpu.reset_protected(CODE)
    cpu.set_registers(efer=0x100, cr3=PML4, rax=0x8000_0011)
    assert cpu.enter() is ExitReason.TRIPLE_FAULT  # #GP without an IDT
    assert cpu.register("cr0") == 0x6000_0011


def test_smep_and_smap() -> None:
    # The pages are the user's: the kernel may not even fetch. Then: pages of the kernel but one.
    cpu = LongCpu("f4", HALTS)
    cpu.set_registers(cr4=CR4 | 1 << 20)
    assert cpu.enter() is ExitReason.TRIPLE_FAULT
    for flag, expected in ((0, 14), (1 << 18, None)):  # RFLAGS.AC
        cpu = LongCpu("8a0425 00300400 f4", HALTS)  # mov al, [a page of the user]
        for number in range(512):
            cpu.set_page(number << 12, number << 12 | 3)
        cpu.set_page(DATA_PAGE, DATA_PAGE | 7)
        cpu.set_registers(cr4=CR4 | 3 << 20, rflags=2 | flag)
        assert cpu.enter() is ExitReason.HLT
        if expected is not None:
            assert cpu.vector == expected
            assert cpu.frame_with_code()[0] == 1
            assert cpu.register("cr2") == DATA_PAGE


# ---- SYSCALL and SYSRET --------------------------------------------------------------------------

STAR = 0x18 << 48 | KERNEL_CODE << 32
KERNEL = CODE + 0x100


def user(code: str, kernel: str, **registers: int) -> LongCpu:
    """Code in ring 3, and the kernel's behind SYSCALL or SYSENTER."""
    exact = bool(registers.pop("exact", True))
    cpu = LongCpu(code, HALTS, ring=3, exact=exact)
    data = bytes.fromhex(kernel)
    cpu.ram[KERNEL : KERNEL + len(data)] = data
    cpu.set_registers(star=STAR, lstar=KERNEL, fmask=0x700, sysenter_cs=8, sysenter_eip=KERNEL)
    cpu.set_registers(sysenter_esp=KERNEL_STACK, **registers)
    return cpu


def segments(cpu: LongCpu) -> dict[str, int]:
    names = [
        f"{name}{part}" for name in ("cs", "ss") for part in ("", "_base", "_limit", "_access")
    ]
    registers = cpu.engine.registers()
    return {name: registers[name] for name in names}


RING_0 = flat_segment("cs", KERNEL_CODE, 0xA09B) | flat_segment("ss", KERNEL_DATA, 0xC093)
RING_0_32_BITS = RING_0 | {"cs_access": 0xC09B}
RING_3 = flat_segment("cs", USER_CODE, 0xA0FB) | flat_segment("ss", USER_DATA, 0xC0F3)
RING_3_32_BITS = flat_segment("cs", USER_CODE_32, 0xC0FB) | flat_segment("ss", USER_DATA, 0xC0F3)


@either_engine
def test_syscall(exact: bool) -> None:
    cpu = user("f9 0f05", "f4", rflags=2 | FLAGS_IF | 0x40, exact=exact)  # stc; syscall - hlt
    assert cpu.enter() is ExitReason.HLT
    assert cpu.register("rip") == KERNEL + 1
    assert cpu.register("rcx") == CODE + 3
    assert cpu.register("r11") == 0x43 | FLAGS_IF
    assert cpu.engine.rflags == 0x43
    assert cpu.register("rsp") == USER_STACK
    assert segments(cpu) == RING_0
    assert cpu.engine.retired == 3


@either_engine
def test_sysret_to_64_bits(exact: bool) -> None:
    cpu = user(
        "0f05 0f0b", "4c89d8 480f07", rflags=2 | FLAGS_IF, exact=exact
    )  # mov rax, r11; sysret
    assert cpu.enter() is ExitReason.HLT
    assert cpu.vector == UD
    frame = cpu.frame()
    assert (frame["rip"], frame["cs"], frame["ss"]) == (CODE + 2, USER_CODE, USER_DATA)
    assert frame["rflags"] & 0xFFFF == 2 | FLAGS_IF


def test_what_sysret_makes_of_the_segments_and_of_r11() -> None:
    cpu = user("0f05", "49c7c3fffeffff 480f07")  # syscall - mov r11, ~TF; sysret
    assert cpu.enter(budget=3) is ExitReason.PREEMPTION_TIMER
    assert segments(cpu) == RING_3
    assert cpu.engine.rflags == 0x3C7ED7  # neither RF nor VM


def test_sysret_to_32_bits() -> None:
    cpu = user("0f05", "0f07")
    cpu.ram[CODE + 2 : CODE + 4] = b"\x40\x90"  # inc eax; nop: in 64-bit code a prefix and nop
    assert cpu.enter(budget=3) is ExitReason.PREEMPTION_TIMER
    assert segments(cpu) == RING_3_32_BITS
    assert cpu.register("rip") == CODE + 3
    assert cpu.register("rax") == 1


def test_sysret_to_an_address_that_is_not_canonical() -> None:
    cpu = user("0f05", f"48b9{NOT_CANONICAL.to_bytes(8, 'little').hex()} 480f07")  # mov rcx, ...
    assert is_general_protection_0(cpu)
    _, frame = cpu.frame_with_code()
    assert (frame["rip"], frame["cs"]) == (KERNEL + 10, KERNEL_CODE)


def test_syscall_with_the_trap_flag_that_fmask_clears() -> None:
    # The handler of #DB halts: only the instruction behind SYSRET may get there.
    cpu = user("0f05 90", "90 480f07", rflags=2 | 1 << 8)
    assert cpu.enter() is ExitReason.HLT
    assert cpu.vector == 1
    assert cpu.frame()["rip"] == CODE + 2


@either_engine
@pytest.mark.parametrize("code", ["0f05", "0f07"], ids=["syscall", "sysret"])
def test_without_sce_they_are_undefined(code: str, exact: bool) -> None:
    cpu = LongCpu("90" + code, HALTS, exact=exact)
    cpu.set_registers(efer=EFER & ~1)
    assert cpu.enter() is ExitReason.HLT
    assert cpu.vector == UD
    assert cpu.frame()["rip"] == CODE + 1


def test_syscall_in_compatibility_mode_is_undefined() -> None:
    cpu = user("0f05", "f4", **RING_3_32_BITS)
    assert cpu.enter() is ExitReason.HLT
    assert cpu.vector == UD
    assert cpu.frame()["cs"] == USER_CODE_32


@pytest.mark.parametrize(
    ("vendor", "has_syscall"),
    [("AuthenticAMD", True), ("HygonGenuine", True), ("GenuineIntel", False)],
)
def test_syscall_in_compatibility_mode_goes_by_the_vendor(vendor: str, has_syscall: bool) -> None:
    cpu = user("f9 0f05", "f4", cstar=KERNEL, lstar=0, **RING_3_32_BITS)  # stc; syscall - hlt
    name = int.from_bytes(vendor[:4].encode(), "little")
    cpu.cpuid = lambda function, index: (0, name if function == 0 else 0, 0, 0)  # type: ignore[method-assign]
    cpu.attach()
    assert cpu.enter() is ExitReason.HLT
    assert (cpu.register("rip") == KERNEL + 1) == has_syscall
    if has_syscall:
        assert segments(cpu) == RING_0
        assert (cpu.register("rcx"), cpu.register("r11")) == (CODE + 3, 3)
    else:
        assert cpu.vector == UD


def test_syscall_in_compatibility_mode_needs_sce() -> None:
    cpu = user("0f05", "f4", cstar=KERNEL, efer=EFER & ~1, **RING_3_32_BITS)
    cpu.cpuid = lambda function, index: (0, 0x6874_7541, 0, 0)  # type: ignore[method-assign]
    cpu.attach()
    assert cpu.enter() is ExitReason.HLT
    assert cpu.vector == UD


# ---- SYSENTER and SYSEXIT ------------------------------------------------------------------------


@either_engine
@pytest.mark.parametrize("mode", [RING_3, RING_3_32_BITS], ids=["64 bits", "compatibility mode"])
def test_sysenter_in_long_mode(mode: dict[str, int], exact: bool) -> None:
    cpu = user("f9 0f34", "f4", rflags=2 | FLAGS_IF, **mode, exact=exact)  # stc; sysenter - hlt
    cpu.set_registers(sysenter_esp=KERNEL_STACK | 1 << 40)
    assert cpu.enter() is ExitReason.HLT
    assert cpu.register("rip") == KERNEL + 1
    assert cpu.register("rsp") == KERNEL_STACK | 1 << 40
    assert cpu.engine.rflags == 3
    assert segments(cpu) == RING_0


def test_sysexit_to_64_bits() -> None:
    cpu = user("0f34", f"ba{CODE + 2:08x} b9{USER_STACK:08x} 480f35")
    cpu.ram[KERNEL + 1 : KERNEL + 5] = (CODE + 2).to_bytes(4, "little")  # mov edx, CODE + 2
    cpu.ram[KERNEL + 6 : KERNEL + 10] = USER_STACK.to_bytes(4, "little")  # mov ecx, USER_STACK
    assert cpu.enter(budget=4) is ExitReason.PREEMPTION_TIMER
    assert (cpu.register("rip"), cpu.register("rsp")) == (CODE + 2, USER_STACK)
    assert segments(cpu) == RING_3 | {"ss": 0x33}


def test_sysexit_to_32_bits() -> None:
    cpu = user("0f34", "0f35", rdx=CODE + 2, rcx=1 << 32 | USER_STACK)
    assert cpu.enter(budget=2) is ExitReason.PREEMPTION_TIMER
    assert (cpu.register("rip"), cpu.register("rsp")) == (CODE + 2, USER_STACK)
    assert segments(cpu) == RING_3_32_BITS


@pytest.mark.parametrize("name", ["rcx", "rdx"])
def test_sysexit_to_an_address_that_is_not_canonical(name: str) -> None:
    cpu = user("0f34", "480f35", **{name: NOT_CANONICAL})
    assert is_general_protection_0(cpu)
    assert cpu.frame_with_code()[1]["rip"] == KERNEL


@either_engine
@pytest.mark.parametrize("code", ["0f34", "0f35"], ids=["sysenter", "sysexit"])
def test_a_null_sysenter_cs_is_general_protection(code: str, exact: bool) -> None:
    cpu = LongCpu("90" + code, HALTS, exact=exact)
    cpu.set_registers(sysenter_cs=3)
    assert is_general_protection_0(cpu)
    assert cpu.frame_with_code()[1]["rip"] == CODE + 1


def test_sysenter_and_sysexit_in_protected_mode() -> None:
    cpu = Cpu("0f34 90 f4")  # sysenter
    cpu.engine.set_registers(protected_mode(CODE) | RING_3_32_BITS)
    cpu.ram[KERNEL : KERNEL + 2] = bytes.fromhex("0f35")
    cpu.set_registers(sysenter_cs=8, sysenter_esp=1 << 40 | 0x8000, sysenter_eip=KERNEL)
    cpu.set_registers(rdx=CODE + 2, rcx=0x7000, rflags=2 | FLAGS_IF)
    assert cpu.enter(budget=1) is ExitReason.PREEMPTION_TIMER
    assert (cpu.register("rip"), cpu.register("rsp")) == (KERNEL, 0x8000)
    assert {name: cpu.register(name) for name in RING_0_32_BITS} == RING_0_32_BITS
    assert cpu.engine.rflags == 2
    assert cpu.enter(budget=2) is ExitReason.PREEMPTION_TIMER
    assert {name: cpu.register(name) for name in RING_3_32_BITS} == RING_3_32_BITS
    assert cpu.register("rip") == CODE + 3


def test_sysenter_in_real_mode_is_general_protection() -> None:
    cpu = Cpu("0f34", {GP: "f4"})
    cpu.set_registers(sysenter_cs=8)
    assert cpu.enter() is ExitReason.HLT
    assert cpu.word(STACK_TOP - 6) == CODE


# ---- random numbers ------------------------------------------------------------------------------

# splitmix64 from 0: the published first outputs
SPLITMIX64 = [0xE220_A839_7B1D_CDAF, 0x6E78_9E6A_A1B9_65F4, 0x06C4_5D18_8009_454F]


@either_engine
def test_rdrand_and_rdseed_come_from_the_seed(exact: bool) -> None:
    # rdrand rax; rdseed ebx; rdrand cx; pushfq; pop rdx
    cpu = LongCpu("480fc7f0 0fc7fb 660fc7f1 9c 5a f4", exact=exact)
    cpu.set_registers(rbx=(1 << 64) - 1, rcx=(1 << 64) - 1, rflags=0x8D6)
    assert cpu.enter() is ExitReason.HLT
    assert cpu.register("rax") == SPLITMIX64[0]
    assert cpu.register("rbx") == SPLITMIX64[1] & 0xFFFF_FFFF
    assert cpu.register("rcx") == 0xFFFF_FFFF_FFFF_0000 | SPLITMIX64[2] & 0xFFFF
    assert cpu.register("rdx") == 3  # CF, and the other flags clear


def test_another_seed_gives_other_numbers() -> None:
    def numbers(seed: int) -> list[int]:
        cpu = LongCpu("480fc7f0 480fc7f3 f4", seed=seed)  # rdrand rax; rdrand rbx
        assert cpu.enter() is ExitReason.HLT
        return [cpu.register("rax"), cpu.register("rbx")]

    assert numbers(0) == SPLITMIX64[:2]
    assert numbers(5) == numbers(5) != numbers(6)
    assert numbers(2**64 - 1) == numbers(2**64 - 1)


# ---- features ------------------------------------------------------------------------------------

INSTRUCTIONS = {
    (1, 0, "edx"): {
        0: "d9e8",  # fld1
        4: "0f31",  # rdtsc
        5: "0f32",  # rdmsr
        8: "0fc70e",  # cmpxchg8b [rsi]
        11: "",  # sysenter: above
        15: "0f44c1",  # cmove eax, ecx
        19: "0fae3e",  # clflush [rsi]
        23: "0f6fc1",  # movq mm0, mm1
        24: "0fae06",  # fxsave [rsi]
        25: "0f58c1",  # addps
        26: "660fefc0",  # pxor xmm0, xmm0
    },
    (1, 0, "ecx"): {
        0: "f20f7cc1",  # haddps
        1: "660f3a44c100",  # pclmulqdq
        9: "660f3800c1",  # pshufb
        13: "480fc70e",  # cmpxchg16b [rsi]
        19: "660f3817c1",  # ptest
        20: "660f3837c1",  # pcmpgtq
        22: "0f38f006",  # movbe eax, [rsi]
        23: "f30fb8c1",  # popcnt eax, ecx
        25: "660f38dcc1",  # aesenc
        26: "0fae26",  # xsave [rsi]
        30: "0fc7f0",  # rdrand eax
    },
    (7, 0, "ebx"): {
        0: "f3480faec0",  # rdfsbase rax
        3: "c4e270f2c1",  # andn eax, ecx, ecx
        8: "c4e270f5c1",  # bzhi
        9: "f3aa",  # rep stosb
        18: "0fc7f8",  # rdseed eax
        19: "660f38f6c1",  # adcx
        20: "0f01cb",  # stac
        23: "660fae3e",  # clflushopt [rsi]
        24: "660fae36",  # clwb [rsi]
    },
    (7, 0, "ecx"): {3: "31c9 0f01ee"},  # rdpkru
    (0xD, 1, "eax"): {0: "0fae36", 2: "b901000000 0f01d0"},  # xsaveopt [rsi]; xgetbv
    (0x8000_0001, 0, "ecx"): {
        0: "9f",  # lahf
        5: "f30fbdc1",  # lzcnt
        8: "0f0d0e",  # prefetchw
    },
    (0x8000_0001, 0, "edx"): {27: "0f01f9"},  # rdtscp
}
"""An instruction of each feature that is one of instructions."""

MODES = {
    *((1, 0, "edx", bit) for bit in (2, 3, 6, 7, 13, 17)),  # DE, PSE, PAE, MCE, PGE, PSE-36
    *((7, 0, "ebx", 7), (7, 0, "ecx", 16)),  # SMEP, LA57
    # SYSCALL, NX, 1-GiB pages, long mode
    *((0x8000_0001, 0, "edx", bit) for bit in (11, 20, 26, 29)),
}
"""Those that are modes of paging and the like: other tests use them."""


@pytest.mark.parametrize(
    ("leaf", "bit", "code"),
    [
        pytest.param(leaf, bit, code, id=f"{leaf[0]:#x}.{leaf[1]}.{leaf[2]}.{bit}")
        for leaf, instructions in INSTRUCTIONS.items()
        for bit, code in instructions.items()
    ],
)
def test_instructions_of_the_features(leaf: tuple[int, int, str], bit: int, code: str) -> None:
    assert FEATURES[leaf] >> bit & 1
    cpu = LongCpu(code + "f4", HALTS)
    # FSGSBASE, OSXSAVE, PKE
    cpu.set_registers(cr4=CR4 | 0x45_0000, rsi=DATA_PAGE, rdi=DATA_PAGE, rcx=1, rax=7, rdx=0)
    assert cpu.enter() is ExitReason.HLT
    assert cpu.register("rip") == CODE + len(bytes.fromhex(code)) + 1


def test_no_feature_goes_untested() -> None:
    tested = {(*leaf, bit) for leaf, codes in INSTRUCTIONS.items() for bit in codes} | MODES
    told = {(*leaf, bit) for leaf, bits in FEATURES.items() for bit in range(32) if bits >> bit & 1}
    assert told == tested


ABSENT = {
    "rdpid": "f30fc7f8",
    "vfmadd132ps": "c4e27198c1",
    "vcvtph2ps": "c4e27913c1",
    "xsavec": "0fc726",
    "xsaves": "480fc72e",
    "invpcid": "660f388206",
    "monitor": "0f01c8",
    "mwait": "0f01c9",
    "rdpmc": "0f33",
    "sha1nexte": "0f38c8c1",
    "vmxon": "f30fc736",
    "getsec": "0f37",
    "pfcmpeq": "0f0fc1b0",
}


@pytest.mark.parametrize("code", ABSENT.values(), ids=ABSENT.keys())
def test_instructions_that_are_absent(code: str) -> None:
    cpu = LongCpu(code + "f4", HALTS)
    cpu.set_registers(cr4=CR4 | 0x45_0000, rsi=DATA_PAGE, rcx=0)
    assert cpu.enter() is ExitReason.HLT
    assert cpu.vector == UD


def test_57_bit_addresses() -> None:
    pml5 = 0x1_4000
    cpu = LongCpu("48b80000000000000001 8a18 f4", HALTS)  # mov rax, 1 << 56; mov bl, [rax]
    cpu.set_quad(pml5, PML4 | 7)
    cpu.set_registers(cr3=pml5, cr4=CR4 | 1 << 12)
    assert cpu.enter() is ExitReason.HLT
    assert cpu.vector == GP
    cpu = LongCpu("48b80000000000008000 8a18 f4", HALTS)  # 1 << 55: the next PML4
    cpu.set_quad(pml5, PML4 | 7)
    cpu.set_quad(pml5 + 8 * 128, PML4 | 7)
    cpu.ram[0] = 0x5A
    cpu.set_registers(cr3=pml5, cr4=CR4 | 1 << 12)
    assert cpu.enter() is ExitReason.HLT
    assert cpu.register("rbx") & 0xFF == 0x5A


def test_pages_of_1_gib_and_no_execute() -> None:
    cpu = LongCpu("48b80000004000000000 ffe0", HALTS)  # mov rax, 1 GiB; jmp rax
    cpu.set_quad(0x1_1000 + 8, 0x87)  # the second GiB is the first one again
    cpu.ram[0:1] = b"\xf4"
    assert cpu.enter() is ExitReason.HLT
    assert cpu.register("rip") == 0x4000_0001
    cpu.set_quad(0x1_1000 + 8, 0x87 | 1 << 63)
    cpu.set_registers(rip=CODE, cr3=PML4)
    assert cpu.enter() is ExitReason.HLT
    assert (cpu.vector, cpu.frame_with_code()[0]) == (14, 0x11)


def test_protection_keys() -> None:
    cpu = LongCpu("8a0425 00300400 f4", HALTS, ring=3)
    cpu.set_page(DATA_PAGE, DATA_PAGE | 7 | 1 << 59)  # key 1
    cpu.set_registers(cr4=CR4 | 1 << 22)
    assert cpu.enter() is ExitReason.HLT
    assert (cpu.vector, cpu.register("cr2")) == (GP, 0)  # hlt in ring 3: the key allows all
    cpu = LongCpu("b804000000 31c9 31d2 0f01ef 8a0425 00300400 f4", HALTS, ring=3)  # PKRU = AD1
    cpu.set_page(DATA_PAGE, DATA_PAGE | 7 | 1 << 59)
    cpu.set_registers(cr4=CR4 | 1 << 22)
    assert cpu.enter() is ExitReason.HLT
    assert (cpu.vector, cpu.frame_with_code()[0]) == (14, 0x25)
    assert cpu.register("cr2") == DATA_PAGE
