"""The `unicorn` engine's accesses to MMIO, MSRs and CPUID, as only real code makes them."""

import subprocess
import sys
from mmap import mmap

import pytest
from engine_machine import CODE, HANDLERS, MMIO, MSR, PLENTY, RAM_BYTES, STACK_TOP, VECTOR, Cpu

from kvmtick.cpu.engine import ExitReason
from kvmtick.cpu.unicorn import UnicornEngine

LAPIC = 0xFEE0_0000
DATA = 0x8877_6655_4433_2211
LOW = DATA & 0xFFFF_FFFF


def protected(code: str, **registers: int) -> Cpu:
    """A CPU in flat 32-bit mode with the registers set; reads answer DATA."""
    cpu = Cpu(code)
    cpu.input = DATA
    cpu.reset_protected(CODE)
    cpu.set_registers(**registers)
    return cpu


@pytest.mark.parametrize(
    ("code", "written", "eax"),
    [
        pytest.param("f00103", LOW + 5, 5, id="lock add [ebx], eax"),
        pytest.param("0103", LOW + 5, 5, id="add [ebx], eax"),
        pytest.param("8703", 5, LOW, id="xchg [ebx], eax"),
        pytest.param("f0ff03", LOW + 1, 5, id="lock inc dword [ebx]"),
        pytest.param("f00fb10b", LOW, LOW, id="lock cmpxchg [ebx], ecx: differs"),
    ],
)
def test_read_modify_write_is_done_once(code: str, written: int, eax: int) -> None:
    cpu = protected(f"{code} f4", rbx=LAPIC, rax=5)
    cpu.on_out = lambda gpa: cpu.engine.kick()
    assert cpu.enter() is ExitReason.EXTERNAL_INTERRUPT
    assert cpu.engine.retired == 1
    assert cpu.register("rip") == CODE + len(bytes.fromhex(code))
    assert cpu.register("rax") == eax
    assert cpu.accesses == [
        ("mmio read", LAPIC, 4, 0),
        ("mmio write", LAPIC, 4, written, 0),
    ]


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "fast"])
@pytest.mark.parametrize("code", ["e620", "e420", "6e", "f36e"], ids=["out", "in", "outsb", "rep"])
def test_a_handler_of_a_port_finds_the_registers_before_the_access(exact: bool, code: str) -> None:
    """cmp eax, eax leaves ZF and PF; nop; the access; cmp eax, ebx, which it must not disturb."""
    cpu = Cpu(f"39c0 90 {code} 39d8 f4", exact=exact)
    cpu.reset_protected(CODE)
    cpu.set_registers(rax=5, rbx=9, rcx=1, rdx=0x20, rsi=0x5000)
    seen: list[tuple[int, int, int]] = []

    def look(_: int) -> None:
        registers = cpu.engine.registers()
        seen.append((cpu.engine.rip, registers["rip"], registers["rflags"]))

    cpu.on_out = look
    cpu.input = 5
    assert cpu.enter() is ExitReason.HLT
    assert seen == [(CODE + 3, CODE + 3, 0x46)]
    assert cpu.engine.rflags & 0x41 == 1  # below: CF, not ZF


def test_a_zero_where_ins_would_store_is_a_store_all_the_same() -> None:
    cpu = protected("c70700000000 c70700000000 f4", rdi=LAPIC)  # mov dword [edi], 0, twice
    assert cpu.enter() is ExitReason.HLT
    assert cpu.accesses == [("mmio write", LAPIC, 4, 0, 0), ("mmio write", LAPIC, 4, 0, 1)]


def test_rep_stos_to_mmio_and_kicks_between_its_rounds() -> None:
    cpu = protected("f3ab f4", rdi=LAPIC, rax=7, rcx=3)  # rep stosd; hlt
    cpu.on_out = lambda gpa: cpu.engine.kick()
    for left in (2, 1, 0):
        assert cpu.enter() is ExitReason.EXTERNAL_INTERRUPT
        assert cpu.engine.retired == 1
        assert cpu.register("rcx") == left
    assert cpu.register("rip") == CODE + 2
    assert cpu.enter() is ExitReason.HLT
    assert cpu.engine.retired == 1
    assert cpu.accesses == [("mmio write", LAPIC + 4 * i, 4, 7, 0) for i in range(3)]


@pytest.mark.parametrize(("code", "size_bytes"), [("f36c f4", 1), ("f36d f4", 4)])
def test_rep_ins_to_mmio_writes_once_a_round(code: str, size_bytes: int) -> None:
    cpu = protected(code, rdi=LAPIC, rdx=0x60, rcx=2)
    assert cpu.enter() is ExitReason.HLT
    value = DATA & ((1 << 8 * size_bytes) - 1)
    written = [access[:4] for access in cpu.accesses if access[0] == "mmio write"]
    assert written == [("mmio write", LAPIC + size_bytes * i, size_bytes, value) for i in range(2)]
    assert [access[0] for access in cpu.accesses] == ["in", "mmio write"] * 2


def test_rep_movs_from_mmio() -> None:
    cpu = protected("f3a5 f4", rdi=0x4000, rsi=LAPIC, rcx=2)  # rep movsd; hlt
    assert cpu.enter() is ExitReason.HLT
    assert cpu.accesses == [("mmio read", LAPIC + 4 * i, 4, i) for i in range(2)]
    assert [cpu.long(0x4000 + 4 * i) for i in range(3)] == [LOW, LOW, 0]


# Loads of 1, 2, 4 and 8 bytes from [ebx] and stores of what they gave to [ecx].
LOADS_AND_STORES = {1: ("8a03", "8801"), 2: ("668b03", "668901"), 4: ("8b03", "8901")}
LOADS_AND_STORES[8] = ("0f6f03", "0f7f01")  # movq mm0, [ebx]; movq [ecx], mm0


@pytest.mark.parametrize("size_bytes", [1, 2, 4, 8])
@pytest.mark.parametrize("gpa", [LAPIC, *(LAPIC + i for i in (1, 2, 3, 5, 7)), LAPIC + 0xFF8])
@pytest.mark.parametrize("release_gil", [False, True])
def test_an_access_comes_whole(gpa: int, size_bytes: int, release_gil: bool) -> None:
    cpu = protected("".join(LOADS_AND_STORES[size_bytes]) + "f4", rbx=gpa, rcx=gpa)
    cpu.engine.release_gil(release_gil)
    assert cpu.enter() is ExitReason.HLT
    value = DATA & (1 << 8 * size_bytes) - 1
    assert cpu.accesses == [
        ("mmio read", gpa, size_bytes, 0),
        ("mmio write", gpa, size_bytes, value, 1),
    ]


@pytest.mark.parametrize(
    ("size_bytes", "offset", "parts"),
    [
        *((2, 0xFFF, (1, 1)), (4, 0xFFD, (3, 1)), (4, 0xFFE, (2, 2)), (4, 0xFFF, (1, 3))),
        *((8, 0xFF9, (7, 1)), (8, 0xFFA, (6, 2)), (8, 0xFFB, (5, 3)), (8, 0xFFF, (1, 7))),
    ],
)
def test_an_access_over_the_end_of_a_page_is_split_there(
    size_bytes: int, offset: int, parts: tuple[int, int]
) -> None:
    gpa, behind = LAPIC + offset, LAPIC + 0x1000
    cpu = protected("".join(LOADS_AND_STORES[size_bytes]) + "f4", rbx=gpa, rcx=gpa)
    assert cpu.enter() is ExitReason.HLT
    first, second = ((1 << 8 * part) - 1 for part in parts)
    assert cpu.accesses == [
        ("mmio read", gpa, parts[0], 0),
        ("mmio read", behind, parts[1], 0),
        ("mmio write", gpa, parts[0], DATA & first, 1),
        ("mmio write", behind, parts[1], DATA & second, 1),
    ]


def test_signed_loads_and_what_a_load_leaves_alone() -> None:
    # movsx eax, word [ebx]; movsx ecx, byte [ebx]; mov dl, [ebx]; hlt
    cpu = protected("0fbf03 0fbe0b 8a13 f4", rbx=LAPIC + 1, rdx=LOW)
    cpu.input = 0xFFFF_FFFF_FFFF_8081
    assert cpu.enter() is ExitReason.HLT
    assert [access[2] for access in cpu.accesses] == [2, 1, 1]
    assert cpu.register("rax") == 0xFFFF_8081
    assert cpu.register("rcx") == 0xFFFF_FF81
    assert cpu.register("rdx") == LOW & ~0xFF | 0x81


def test_16_bytes_come_as_two_accesses_of_8() -> None:
    # CR4.OSFXSR on; movups xmm0, [ebx]; movups [ebx], xmm0; fild qword [ebx]; fistp qword [ebx]
    cpu = protected("0f20e0 0d00020000 0f22e0 0f1003 0f1103 df2b df3b f4", rbx=LAPIC + 1)
    cpu.input = DATA >> 8
    assert cpu.enter() is ExitReason.HLT
    assert [access[:3] for access in cpu.accesses] == [
        *(("mmio read", LAPIC + 1, 8), ("mmio read", LAPIC + 9, 8)),
        *(("mmio write", LAPIC + 1, 8), ("mmio write", LAPIC + 9, 8)),
        *(("mmio read", LAPIC + 1, 8), ("mmio write", LAPIC + 1, 8)),
    ]
    assert {access[3] for access in cpu.accesses if access[0] == "mmio write"} == {DATA >> 8}
    assert cpu.engine.retired == 8


def test_a_kick_in_a_part_of_an_access() -> None:
    cpu = protected("".join(LOADS_AND_STORES[8]) + "f4", rbx=LAPIC + 0xFFF, rcx=LAPIC + 0xFFF)
    cpu.on_out = lambda gpa: cpu.engine.kick()
    for length in (3, 6):
        assert cpu.enter() is ExitReason.EXTERNAL_INTERRUPT
        assert cpu.engine.retired == 1
        assert cpu.register("rip") == CODE + length
    assert len(cpu.accesses) == 4
    assert cpu.enter() is ExitReason.HLT
    assert len(cpu.accesses) == 4


def test_an_access_half_in_ram() -> None:
    cpu = protected("8903 8b0b f4", rbx=RAM_BYTES - 2, rax=0xDDCC_BBAA)  # store; mov ecx, [ebx]
    assert cpu.enter() is ExitReason.HLT
    assert cpu.ram[-2:] == b"\xaa\xbb"
    assert cpu.accesses == [
        ("mmio write", RAM_BYTES, 2, 0xDDCC, 0),
        ("mmio read", RAM_BYTES, 2, 1),
    ]
    assert cpu.register("rcx") == 0x2211_BBAA


def test_a_store_half_in_ram_rewrites_code() -> None:
    # call ecx; mov [ebx], eax; call ecx; hlt - called: inc edx; ret, and from then on: ret
    last = RAM_BYTES - 2
    cpu = protected("ffd1 8903 ffd1 f4", rax=0xDDCC_C3C3, rbx=last, rcx=last, rsp=STACK_TOP, rdx=0)
    cpu.ram[last:] = bytes.fromhex("42c3")
    assert cpu.enter() is ExitReason.HLT
    assert cpu.register("rdx") == 1
    assert cpu.accesses == [("mmio write", RAM_BYTES, 2, 0xDDCC, 3)]


def test_an_access_over_the_end_of_the_address_space() -> None:
    cpu = protected("8903 8b0b f4", rbx=0xFFFF_FFFE, rax=0xDDCC_BBAA)
    assert cpu.enter() is ExitReason.HLT
    assert cpu.accesses == [
        ("mmio write", 0xFFFF_FFFE, 2, 0xBBAA, 0),
        ("mmio read", 0xFFFF_FFFE, 2, 1),
    ]
    assert cpu.ram[:2] == b"\xcc\xdd"
    assert cpu.register("rcx") == 0xDDCC_2211


def test_with_paging_an_address_is_not_physical() -> None:
    # CR4.PSE on; CR3 = 0x8000; paging on; mov [0xfec05001], eax; mov [0x600000], eax; hlt
    cpu = protected("0f20e2 83ca10 0f22e2 0f22d9 0f20c2 81ca00000080 0f22c2", rcx=0x8000, rax=LOW)
    code = bytes.fromhex("a30150c0fe a300006000 f4")
    at = cpu.ram.find(bytes.fromhex("0f22c2"), CODE) + 3
    cpu.ram[at : at + len(code)] = code
    cpu.set_long(0x8000, 0x83)  # the first 4 MiB as they are
    cpu.set_long(0x8000 + 4, 0xFEC0_0083)  # the next: IOAPIC and local APIC
    cpu.set_long(0x8000 + 4 * (0xFEC0_0000 >> 22), 0x83)
    assert cpu.enter() is ExitReason.HLT
    assert cpu.long(0x5001) == LOW
    assert cpu.accesses == [("mmio write", LAPIC, 4, LOW, 8)]


def test_a_hole_between_rams_gives_physical_addresses() -> None:
    cpu = Cpu("a200a0 a20090 a200c0 f4")  # mov [0xa000], al; mov [0x9000], al; mov [0xc000], al
    engine = UnicornEngine()
    low, high = mmap(-1, 0x9000), mmap(-1, 0x1000)
    low[CODE : CODE + 10] = cpu.ram[CODE : CODE + 10]
    engine.map_ram(0xB000, high)
    engine.map_ram(0, low)
    cpu.engine = engine
    cpu.attach()
    engine.reset(0, CODE)
    assert cpu.enter() is ExitReason.HLT
    assert [access[1] for access in cpu.accesses] == [0xA000, 0x9000, 0xC000]
    # A range mapped later splits the hole.
    engine.map_ram(0x9000, mmap(-1, 0x1000))
    cpu.accesses.clear()
    engine.reset(0, CODE)
    assert cpu.enter() is ExitReason.HLT
    assert [access[1] for access in cpu.accesses] == [0xA000, 0xC000]


def test_a_stack_in_mmio() -> None:
    # An interrupt pushes FLAGS, CS and IP before any instruction: mov ss, ax; mov sp, 0x100; hlt
    cpu = Cpu("b8ffff 8ed0 bc0001 fb f4", {VECTOR: "f4"})
    assert cpu.enter() is ExitReason.HLT
    assert cpu.enter(1 << 31 | VECTOR) is ExitReason.HLT
    top = 0xFFFF0 + 0x100
    assert [access[:3] for access in cpu.accesses] == [
        ("mmio write", top - 2, 2),
        ("mmio write", top - 4, 2),
        ("mmio write", top - 6, 2),
    ]
    assert {access[4] for access in cpu.accesses} == {0}


def test_an_exception_ends_the_pieces_of_an_access() -> None:
    cpu = protected("8903 f4", rbx=LAPIC + 0xFFE)

    def fail(gpa: int) -> None:
        raise LookupError(gpa)

    cpu.on_out = fail
    with pytest.raises(LookupError):
        cpu.enter()
    assert len(cpu.accesses) == 1
    assert cpu.register("rip") == CODE + 2
    assert cpu.enter() is ExitReason.HLT


def answers_text(*values: int) -> object:
    return "text"


@pytest.mark.parametrize(
    ("handler", "code"),
    [
        ("on_mmio_read", "a11000"),  # mov ax, [0x10]
        ("on_rdmsr", "0f32"),
        ("on_cpuid", "0fa2"),
    ],
)
@pytest.mark.parametrize("release_gil", [False, True])
def test_an_answer_of_a_wrong_type(handler: str, code: str, release_gil: bool) -> None:
    cpu = Cpu(f"b8ffff 8ed8 66b930080000 {code} f4")
    cpu.engine.release_gil(release_gil)
    cpu.engine.attach(cpu.port_out, cpu.port_in, **{handler: answers_text})  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        cpu.enter()
    assert cpu.engine.retired == 4
    cpu.attach()
    assert cpu.enter() is ExitReason.HLT


def test_attach_checks_its_arguments() -> None:
    cpu = Cpu("f4")
    for arguments in ((cpu.port_out,), (None, cpu.port_in), (cpu.port_out, cpu.port_in, 5)):
        with pytest.raises(TypeError):
            cpu.engine.attach(*arguments)
    cpu.engine.attach(cpu.port_out, cpu.port_in, None, None, None, None, None)
    assert cpu.enter() is ExitReason.HLT


def test_an_engine_and_its_handlers_are_collected() -> None:
    script = """
import gc, weakref
from kvmtick.cpu.unicorn import UnicornEngine
class Board:
    def __init__(self):
        self.engine = UnicornEngine()
        self.engine.attach(*[self.answer] * 7)
    def answer(self, *values):
        return 0
board = weakref.ref(Board())
gc.collect()
assert board() is None
"""
    result = run_python(script)
    assert result.returncode == 0, result.stderr


def test_msr_registers_are_cut_to_32_bits() -> None:
    cpu = Cpu("0f30 0f32 f4")  # wrmsr; rdmsr; hlt
    ones = 0xFFFF_FFFF << 32
    cpu.set_registers(rax=ones | 1, rcx=ones | MSR, rdx=ones | 2)
    cpu.input = 0xAAAA_AAAA_BBBB_BBBB
    assert cpu.enter() is ExitReason.HLT
    assert cpu.accesses == [("wrmsr", MSR, 0x2_0000_0001, 0), ("rdmsr", MSR, 1)]
    assert cpu.register("rax") == 0xBBBB_BBBB
    assert cpu.register("rdx") == 0xAAAA_AAAA


@pytest.mark.parametrize("code", ["0f30", "0f32"], ids=["wrmsr", "rdmsr"])
def test_a_refused_msr_access_changes_nothing(code: str) -> None:
    cpu = Cpu(f"90 f9 {code} f4", {13: "f4"})  # nop; stc; the access; hlt - hlt
    cpu.set_registers(rax=0x1234, rcx=MSR, rdx=0x5678)
    cpu.refused_msrs = {MSR}
    assert cpu.enter() is ExitReason.HLT
    assert cpu.engine.retired == 4
    assert cpu.register("rip") == HANDLERS + 1
    assert cpu.word(STACK_TOP - 6) == CODE + 2  # a fault: RIP is on the access
    assert cpu.word(STACK_TOP - 2) == 0x3  # CF
    assert (cpu.register("rax"), cpu.register("rdx")) == (0x1234, 0x5678)


def test_refused_msr_accesses_in_a_loop() -> None:
    # again: rdmsr; dec bx; jnz again; hlt - the handler steps over the access:
    # push bp; mov bp, sp; add [bp+2], 2; pop bp; iret
    cpu = Cpu("0f32 4b 75fb f4", {13: "55 89e5 83460202 5d cf"})
    cpu.set_registers(rcx=MSR, rbx=1000)
    cpu.refused_msrs = {MSR}
    assert cpu.enter() is ExitReason.HLT
    assert len(cpu.accesses) == 1000
    assert cpu.register("rsp") == 0


def test_the_cpu_keeps_its_own_msrs() -> None:
    # ecx = IA32_SYSENTER_CS: wrmsr; then 0x830 with wrmsr; back, rdmsr; hlt
    cpu = Cpu("0f30 6687cb 0f30 6687cb 31c0 0f32 f4")
    cpu.set_registers(rax=0x4321, rcx=0x174, rdx=0, rbx=MSR)
    assert cpu.enter() is ExitReason.HLT
    assert cpu.register("rax") == 0x4321
    assert cpu.accesses == [("wrmsr", MSR, 0x4321, 2)]


def test_the_tsc_msr_is_the_handlers_and_rdtsc_is_not() -> None:
    cpu = Cpu("0f32 6693 0f31 f4")  # rdmsr; xchg eax, ebx; rdtsc; hlt
    cpu.set_registers(rcx=0x10)
    cpu.input = 77
    assert cpu.enter(tsc=1000) is ExitReason.HLT
    assert cpu.register("rbx") == 77
    assert cpu.register("rax") == 1002


def test_cpuid_zeroes_the_upper_halves() -> None:
    cpu = Cpu("0fa2 f4")
    ones = 0xFFFF_FFFF << 32
    cpu.set_registers(rax=ones | 1, rbx=ones, rcx=ones | 3, rdx=ones)
    assert cpu.enter() is ExitReason.HLT
    assert cpu.accesses == [("cpuid", 1, 3)]
    values = [cpu.register(name) for name in ("rax", "rbx", "rcx", "rdx")]
    assert values == [2, 0xBBBB_BBBB, 3, 0xFFFF_FFFF]


def test_cpuid_answers_are_cut_to_32_bits() -> None:
    cpu = Cpu("0fa2 f4")
    cpu.engine.attach(cpu.port_out, cpu.port_in, on_cpuid=lambda a, c: (1 << 32, -1, 1 << 80, 5))
    assert cpu.enter() is ExitReason.HLT
    values = [cpu.register(name) for name in ("rax", "rbx", "rcx", "rdx")]
    assert values == [0, 0xFFFF_FFFF, 0, 5]


@pytest.mark.parametrize("answer", [(1, 2, 3), [1, 2, 3, 4], None])
def test_cpuid_needs_four_numbers(answer: object) -> None:
    cpu = Cpu("0fa2 f4")
    cpu.engine.attach(cpu.port_out, cpu.port_in, on_cpuid=lambda a, c: answer)  # type: ignore[arg-type, return-value]
    with pytest.raises(TypeError):
        cpu.enter()


STOCK = """
import unicorn
from unicorn import x86_const as x86
def rdmsr(number):
    uc = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_64)
    uc.mem_map(0x1000, 0x1000)
    uc.mem_write(0x1000, bytes.fromhex("0f30 31c0 0f32 f4"))
    uc.reg_write(x86.UC_X86_REG_RCX, number)
    uc.reg_write(x86.UC_X86_REG_RAX, 0x1234)
    uc.emu_start(0x1000, 0x1007)
    return uc.reg_read(x86.UC_X86_REG_RAX)
def stored(address):
    uc = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_64)
    uc.mem_map(0x1000, 0x1000)
    uc.mem_map(address & ~0xfff, 0x2000)
    uc.mem_write(0x1000, bytes.fromhex("488903 488b0b f4"))
    uc.reg_write(x86.UC_X86_REG_RBX, address)
    uc.reg_write(x86.UC_X86_REG_RAX, 0x1122334455667788)
    uc.emu_start(0x1000, 0x1006)
    assert uc.reg_read(x86.UC_X86_REG_RCX) == 0x1122334455667788
    return bytes(uc.mem_read(address, 8)).hex()
"""
OURS = """
from mmap import mmap
from kvmtick.cpu.unicorn import UnicornEngine
def ours(answer=lambda: 0):
    engine, log = UnicornEngine(), []
    ram = mmap(-1, 4096)
    ram[:7] = bytes.fromhex("0f32 66a1fcff f4")
    engine.map_ram(0, ram)
    engine.attach(
        print,
        print,
        on_mmio_read=lambda gpa, size_bytes, retired: log.append(gpa) or answer(),
        on_rdmsr=lambda index, retired: log.append(index) or index,
    )
    engine.reset(0, 0)
    engine.set_registers({"rcx": 0x830})
    assert engine.enter(0, False, False, 100, 0) == 12
    assert log == [0x830, 0xfffc]
"""


def run_python(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )


def test_stock_unicorn_works_beside_ours() -> None:
    script = (
        f"{OURS}\nours()\n{STOCK}\n"
        "assert rdmsr(0x174) == 0x1234\nassert rdmsr(0x830) == 0\n"
        "def store():\n"
        "    for address in (0xfee00000, 0xfee00ffd, 0x8000, 0xffff8):\n"
        "        assert stored(address) == '8877665544332211'\n"
        "    return 0\n"
        "store()\nours(store)\nprint('done')"
    )
    result = run_python(script)
    assert (result.stdout, result.returncode) == ("done\n", 0), result.stderr


def test_unicorn_that_was_imported_first_is_refused() -> None:
    result = run_python(f"{STOCK}\nrdmsr(0x174)\n{OURS}\nours()")
    assert result.returncode == 1
    message = result.stderr.strip().splitlines()[-1]
    assert message.startswith("ImportError: ")
    assert "open the first kvmtick engine before anything imports unicorn" in message


def test_unicorn_that_was_imported_first_works_on() -> None:
    script = (
        f"{STOCK}\nassert rdmsr(0x174) == 0x1234\n{OURS}\n"
        "try:\n    ours()\nexcept ImportError:\n    print('refused')\n"
        "assert rdmsr(0x174) == 0x1234\nprint(stored(0x8000), stored(0x8ffd))"
    )
    result = run_python(script)
    value = "8877665544332211"
    assert (result.stdout, result.returncode) == (f"refused\n{value} {value}\n", 0), result.stderr


def test_a_library_that_is_not_there_leaves_stock_unicorn_alone() -> None:
    script = (
        "from kvmtick.cpu import _shim\n"
        "try:\n    _shim.load('/no/such/libunicorn.so.2')\n"
        f"except ImportError:\n    print('refused')\n{STOCK}\nprint(stored(0x8000))"
    )
    result = run_python(script)
    assert (result.stdout, result.returncode) == ("refused\n8877665544332211\n", 0), result.stderr


def test_forgetting_the_last_page_there_can_be_ends() -> None:
    UnicornEngine().ram_written((1 << 64) - 4096, 4095)


def test_two_virtual_cpus_share_their_ram() -> None:
    # Both: lock inc dword [0x8000], store their number to MMIO and to an MSR, again.
    ram = mmap(-1, RAM_BYTES)
    code = "66 f0ff060080 26a21000 0f30 ebf3"
    first, second = Cpu(code, ram=ram), Cpu(code, ram=ram)
    cpus = (first, second)
    for number, cpu in enumerate(cpus):
        cpu.ram[0x1100:0x1105] = bytes.fromhex("b8ffff8ec0")  # mov ax, 0xffff; mov es, ax
        cpu.engine.reset(0, 0x1100)
        assert cpu.enter(budget=2) is ExitReason.PREEMPTION_TIMER
        cpu.set_registers(rip=CODE, rax=number + 1, rcx=MSR, rdx=0)
    rounds = 0
    for turn in range(PLENTY // 10):
        cpu = cpus[turn % 2]
        budget = 1 + turn % 7
        assert cpu.enter(budget=budget) is ExitReason.PREEMPTION_TIMER
        assert cpu.engine.retired == budget
        rounds += budget
    for number, cpu in enumerate(cpus):
        assert {access[0] for access in cpu.accesses} == {"mmio write", "wrmsr"}
        values = {access[3 if access[0] == "mmio write" else 2] for access in cpu.accesses}
        assert values == {number + 1}
        assert {access[1] for access in cpu.accesses} == {MMIO, MSR}
    # Each increments once in four instructions.
    increments = first.long(0x8000)
    assert rounds // 4 - 2 <= increments <= rounds // 4 + 2
    assert bytes(second.ram[0x8000:0x8004]) == increments.to_bytes(4, "little")
