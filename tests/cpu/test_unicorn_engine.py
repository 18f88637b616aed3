"""What only real code can show: the `unicorn` engine in real mode."""

import re
import subprocess
import sys
from mmap import mmap
from pathlib import Path

import pytest
from engine_machine import CODE, FLAGS_IF, HANDLERS, IRQ, NMI, PLENTY, RAM_BYTES, STACK_TOP, Cpu

from kvmtick.cpu import _shim
from kvmtick.cpu.engine import ExitReason, Interruptibility
from kvmtick.cpu.unicorn import UnicornEngine, find_library

SEGMENTS = ("es", "cs", "ss", "ds", "fs", "gs")


def test_reset_state() -> None:
    cpu = Cpu("f4")
    cpu.engine.reset(0xF000, 0xFFF0)
    registers = cpu.engine.registers()
    assert registers.pop("rdx") == 0x80660  # family, model, stepping
    assert {name: value for name, value in registers.items() if value} == RESET


RESET = {
    "rip": 0xFFF0,
    "rflags": 2,
    "cs": 0xF000,
    "cs_base": 0xF_0000,
    "cr0": 0x6000_0010,
    "dr6": 0xFFFF_0FF0,
    "dr7": 0x400,
    **{f"{name}_limit": 0xFFFF for name in (*SEGMENTS, "ldtr", "tr", "gdtr", "idtr")},
    **{f"{name}_access": 0x93 for name in SEGMENTS},
    "cs_access": 0x9B,
    "ldtr_access": 0x82,
    "tr_access": 0x8B,
}
"""SDM vol. 3A, table 10-1; CS:IP as `reset` was told."""


def test_code_runs_where_cs_says() -> None:
    cpu = Cpu("")
    cpu.ram[0x2_3450:0x2_3453] = bytes.fromhex("8cc8f4")  # mov ax, cs; hlt
    cpu.engine.reset(0x2345, 0)
    assert cpu.enter() is ExitReason.HLT
    assert cpu.register("rax") == 0x2345
    assert cpu.register("rip") == 3


def test_injection_pushes_flags_cs_and_ip() -> None:
    cpu = Cpu("f9 fb f4 ebfd", {0x20: "f4"})  # stc; sti; again: hlt; jmp again - hlt
    assert cpu.enter() is ExitReason.HLT
    assert cpu.enter(IRQ, budget=1) is ExitReason.HLT
    flags, cs, ip = (cpu.word(STACK_TOP - 2 * i) for i in (1, 2, 3))
    assert flags == FLAGS_IF | 0x3  # CF and the bit that is always 1
    assert cs == 0
    assert ip == CODE + 3
    assert cpu.register("rsp") == STACK_TOP - 6
    assert not cpu.interrupts_enabled


def test_injection_keeps_the_flags_the_guest_computes_with() -> None:
    # Counts cx down to 0 with an interrupt before every instruction.
    cpu = Cpu(
        "fb"  # sti
        "b90500"  # mov cx, 5
        "31c0"  # xor ax, ax
        "40"  # again: inc ax
        "49"  # dec cx
        "75fc"  # jnz again
        "fa f4",  # cli; hlt
        {0x20: "31d2 f9 cf"},  # xor dx, dx; stc; iret
    )
    intr_info, entries = 0, 0
    while cpu.enter(intr_info, budget=1 if not intr_info else 4) is not ExitReason.HLT:
        entries += 1
        assert entries < PLENTY
        open_now = cpu.interrupts_enabled and not cpu.engine.interruptibility
        intr_info = IRQ if open_now and entries % 2 else 0
    assert cpu.register("rax") == 5


def test_pushf_shows_the_flags_of_now() -> None:
    # xor ax, ax; inc ax; pushf; stc; clc; pushf; std; cld; pushf; hlt
    cpu = Cpu("31c0 40 9c f9 f8 9c fd fc 9c f4")
    assert cpu.enter() is ExitReason.HLT
    assert [cpu.word(STACK_TOP - 2 * i) for i in (1, 2, 3)] == [0x2, 0x2, 0x2]


@pytest.mark.parametrize("budget", [1, 2, 3, 5, PLENTY])
def test_flags_survive_slices(budget: int) -> None:
    cpu = Cpu(
        "b83412"  # mov ax, 0x1234
        "b91e00"  # mov cx, 30
        "d1c8"  # again: ror ax, 1
        "83d007"  # adc ax, 7
        "9c 5b 01d8"  # pushf; pop bx; add ax, bx
        "e2f5"  # loop again
        "f4"  # hlt
    )
    for _ in range(PLENTY):
        if cpu.enter(budget=budget) is ExitReason.HLT:
            break
    assert cpu.register("rax") == ror_adc_sum(0x1234)


def ror_adc_sum(ax: int) -> int:
    """The loop above in Python."""
    for _ in range(30):
        ax = (ax >> 1 | ax << 15) & 0xFFFF
        carry = ax >> 15  # ROR: CF is the bit that went round
        total = ax + 7 + carry
        result = total & 0xFFFF
        half_carry = (ax & 0xF) + 7 + carry > 0xF
        overflow = bool(~(ax ^ 7) & (ax ^ result) & 0x8000)
        parity = bin(result & 0xFF).count("1") % 2 == 0
        flags = 2 | (total > 0xFFFF) | parity << 2 | half_carry << 4
        flags |= (result == 0) << 6 | (result >> 15) << 7 | overflow << 11
        ax = (result + flags) & 0xFFFF
    return ax


@pytest.mark.parametrize(
    ("vector", "code", "pushed_ip"),
    [
        pytest.param(0x42, "90 cd42", 3, id="int n"),
        pytest.param(3, "90 cc", 2, id="int3"),
        pytest.param(3, "90 cd03", 3, id="int 3 in two bytes"),
        pytest.param(4, "b07f 0401 ce", 5, id="into"),  # mov al, 127; add al, 1; into
        pytest.param(6, "90 0f0b", 1, id="ud2"),
        pytest.param(0, "31db f7f3", 2, id="divide error"),  # xor bx, bx; div bx
        pytest.param(0x42, "90 f3 cd42", 4, id="int n with a prefix"),
    ],
)
def test_exceptions_go_through_the_ivt(vector: int, code: str, pushed_ip: int) -> None:
    cpu = Cpu(code, {vector: "89e5 368b5e00 f4"})  # mov bp, sp; mov bx, [ss:bp]; hlt
    assert cpu.enter() is ExitReason.HLT
    assert cpu.register("rsp") == STACK_TOP - 6
    assert cpu.word(STACK_TOP - 6) == CODE + pushed_ip
    assert cpu.register("rbx") == CODE + pushed_ip
    assert cpu.register("rip") == HANDLERS + 7


def test_a_fault_counts_like_an_instruction() -> None:
    # ud2 - the handler steps over it: push bp; mov bp, sp; add [bp+2], 2; pop bp; iret
    cpu = Cpu("90 0f0b 90 f4", {6: "55 89e5 83460202 5d cf"})
    assert cpu.enter() is ExitReason.HLT
    assert cpu.engine.retired == 1 + 1 + 5 + 2


def test_a_fault_loop_ends_with_the_budget() -> None:
    cpu = Cpu("0f0b", {6: "0f0b"})  # ud2 - ud2
    assert cpu.enter(budget=777) is ExitReason.PREEMPTION_TIMER
    assert cpu.engine.retired == 777


def test_triple_fault_of_the_guest_itself() -> None:
    cpu = Cpu("0f011e0011 90 cd20")  # lidt [0x1100] (zeros); nop; int 0x20
    assert cpu.enter() is ExitReason.TRIPLE_FAULT
    assert cpu.engine.retired == 3
    cpu.engine.reset(0, CODE)
    assert cpu.enter(budget=2) is ExitReason.PREEMPTION_TIMER


def test_single_step() -> None:
    # push 0x100; popf; nop; hlt - the handler: inc dx; iret
    cpu = Cpu("31d2 680001 9d 90 90 f4", {1: "42 cf"})
    assert cpu.enter() is ExitReason.HLT
    assert cpu.register("rdx") >= 2


def test_injected_exception_and_software_interrupt() -> None:
    for info in (1 << 31 | 3 << 8 | 6, 1 << 31 | 4 << 8 | 0x42):
        cpu = Cpu("f4", {info & 0xFF: "f4"})
        assert cpu.enter(info) is ExitReason.HLT
        assert cpu.word(STACK_TOP - 6) == CODE
        assert cpu.register("rip") == HANDLERS + 1


def test_an_injected_exception_that_cannot_be_delivered_is_a_triple_fault() -> None:
    cpu = Cpu("0f011e0011 f4")  # lidt [0x1100]; hlt
    assert cpu.enter() is ExitReason.HLT
    assert cpu.enter(1 << 31 | 3 << 8 | 13) is ExitReason.TRIPLE_FAULT


def test_nmi_pushes_the_shadowed_flags() -> None:
    cpu = Cpu("fb 90 f4", {2: "f4"})  # sti; nop; hlt - hlt
    assert cpu.enter(budget=2) is ExitReason.PREEMPTION_TIMER
    assert cpu.enter(NMI) is ExitReason.HLT
    assert cpu.word(STACK_TOP - 2) == FLAGS_IF | 2
    assert cpu.word(STACK_TOP - 6) == CODE + 2
    assert cpu.engine.interruptibility == Interruptibility.NMI


@pytest.mark.parametrize("code", ["16 17", "8cd0 8ed0", "66 8cd0 26 8ed0"])
def test_loads_of_ss_cast_a_shadow(code: str) -> None:
    cpu = Cpu(code + "90 f4")  # push ss; pop ss - mov ax, ss; mov ss, ax
    assert cpu.enter(budget=2) is ExitReason.PREEMPTION_TIMER
    assert cpu.engine.interruptibility == Interruptibility.MOV_SS


@pytest.mark.parametrize(
    ("prefix", "opcode", "count", "retired"),
    [
        pytest.param("f3", "a4", 5, 5, id="rep movsb"),
        pytest.param("f3", "a4", 1, 1, id="rep movsb once"),
        pytest.param("f3", "a4", 0, 1, id="rep movsb with nothing to do"),
        pytest.param("f3", "ab", 9, 9, id="rep stosw"),
        pytest.param("67f3", "aa", 4, 4, id="a32 rep stosb"),
        pytest.param("f366", "ab", 4, 4, id="rep stosd"),
        pytest.param("f2", "ae", 6, 6, id="repne scasb, not found"),
        pytest.param("f3", "ae", 6, 1, id="repe scasb, ends at once"),
    ],
)
@pytest.mark.parametrize("budget", [1, 3, PLENTY])
def test_each_round_of_a_rep_counts_one(
    prefix: str, opcode: str, count: int, retired: int, budget: int
) -> None:
    cpu = Cpu(prefix + opcode + "f4")
    cpu.ram[0x5000:0x5100] = b"\x77" * 256
    cpu.engine.set_registers({"rcx": count, "rdi": 0x5000, "rsi": 0x5080, "rax": 0x11})
    total = 0
    for _ in range(PLENTY):
        reason = cpu.enter(budget=budget)
        total += cpu.engine.retired
        if reason is ExitReason.HLT:
            break
        assert cpu.engine.retired == budget
    assert total == retired + 1


def test_a_rep_can_be_interrupted_between_rounds() -> None:
    cpu = Cpu("fb 90 f3aa fa f4", {0x20: "42 cf"})  # sti; nop; rep stosb; cli; hlt - inc dx; iret
    cpu.engine.set_registers({"rcx": 4, "rdi": 0x5000, "rax": 0x33, "rdx": 0})
    assert cpu.enter(budget=2) is ExitReason.PREEMPTION_TIMER
    for left in (3, 2, 1):
        assert cpu.enter(IRQ, budget=3) is ExitReason.PREEMPTION_TIMER
        assert cpu.register("rip") == CODE + 2
        assert cpu.register("rcx") == left
    assert cpu.enter() is ExitReason.HLT
    assert cpu.engine.retired == 3
    assert cpu.register("rdx") == 3
    assert cpu.ram[0x5000:0x5005] == b"\x33\x33\x33\x33\x00"


def test_a_jump_to_itself_is_no_rep() -> None:
    cpu = Cpu("ebfe")
    cpu.engine.set_registers({"rcx": 0})
    assert cpu.enter(budget=100) is ExitReason.PREEMPTION_TIMER
    assert cpu.engine.retired == 100


def test_string_port_access() -> None:
    # rep outsb; rep insw; insd; hlt, with cx = 3, then 2
    cpu = Cpu("f36e b90200 f36d 666d f4")
    cpu.ram[0x5000:0x5003] = b"abc"
    cpu.engine.set_registers({"rcx": 3, "rdx": 0x3F8, "rsi": 0x5000, "rdi": 0x6000})
    cpu.input = 0x4433_2211
    assert cpu.enter() is ExitReason.HLT
    assert cpu.accesses == [
        ("out", 0x3F8, 1, ord("a"), 0),
        ("out", 0x3F8, 1, ord("b"), 1),
        ("out", 0x3F8, 1, ord("c"), 2),
        ("in", 0x3F8, 2, cpu.input, 4),
        ("in", 0x3F8, 2, cpu.input, 5),
        ("in", 0x3F8, 4, cpu.input, 6),
    ]
    assert cpu.ram[0x6000:0x6008] == bytes.fromhex("1122 1122 11223344")
    assert cpu.engine.retired == 8


def test_a_kick_stops_a_rep_out_between_rounds() -> None:
    cpu = Cpu("f36e f4")  # rep outsb; hlt
    cpu.engine.set_registers({"rcx": 3})
    cpu.on_out = lambda port: cpu.engine.kick()
    for left in (2, 1):
        assert cpu.enter() is ExitReason.EXTERNAL_INTERRUPT
        assert cpu.register("rcx") == left
    # The last round ends the instruction.
    assert cpu.enter() is ExitReason.EXTERNAL_INTERRUPT
    assert cpu.register("rip") == CODE + 2
    cpu.on_out = lambda port: None
    assert cpu.enter() is ExitReason.HLT
    assert cpu.engine.retired == 1


def test_rdtscp() -> None:
    cpu = Cpu("90 0f01f9 f4")  # nop; rdtscp; hlt
    cpu.engine.set_registers({"rcx": 7})
    assert cpu.enter(tsc=0x5_0000_0000) is ExitReason.HLT
    assert (cpu.register("rdx"), cpu.register("rax")) == (5, 1)
    assert cpu.register("rcx") == 0


def test_a_hole_between_two_rams() -> None:
    cpu = Cpu("a00080 8a1e00a0 8a2e00c0 f4")  # mov al, [0x8000]; mov bl, [0xa000]; ...
    engine = UnicornEngine()
    low, high = mmap(-1, 0x9000), mmap(-1, 0x4000)
    engine.map_ram(0xC000, high)
    engine.map_ram(0, low)
    engine.attach(cpu.port_out, cpu.port_in)
    low[CODE : CODE + 12] = cpu.ram[CODE : CODE + 12]
    low[0x8000], high[0] = 0x12, 0x34
    engine.reset(0, CODE)
    assert engine.enter(0, False, False, 100, 0) == ExitReason.HLT
    registers = engine.registers()
    assert registers["rax"] == 0x12
    assert registers["rbx"] == 0xFF
    assert registers["rcx"] == 0x3400
    # A range mapped later takes its place in the hole.
    middle = mmap(-1, 0x1000)
    middle[0] = 0x56
    engine.map_ram(0xA000, middle)
    engine.reset(0, CODE)
    assert engine.enter(0, False, False, 100, 0) == ExitReason.HLT
    assert engine.registers()["rbx"] == 0x56
    for gpa, ram in ((0xC000, middle), (0x100, middle), (0x1_0000, bytearray(100))):
        with pytest.raises(ValueError, match="RAM"):
            engine.map_ram(gpa, ram)  # type: ignore[arg-type]


def test_code_where_nothing_is_mapped_is_an_internal_error() -> None:
    cpu = Cpu("ea1000ffff")  # jmp 0xffff:0x0010
    assert cpu.enter() is ExitReason.INTERNAL_ERROR
    assert "ffff:10" in cpu.engine.error
    assert cpu.engine.retired == 1
    cpu.engine.reset(0, CODE)
    assert cpu.enter(budget=1) is ExitReason.PREEMPTION_TIMER
    cpu.engine.kick()
    assert cpu.enter() is ExitReason.EXTERNAL_INTERRUPT
    assert cpu.enter() is ExitReason.INTERNAL_ERROR
    assert cpu.engine.retired == 0


def test_host_writes_to_code() -> None:
    cpu = Cpu("b001 f4 ebfb")  # again: mov al, 1; hlt; jmp again
    assert cpu.enter() is ExitReason.HLT
    cpu.ram[CODE + 1] = 2
    cpu.engine.ram_written(CODE + 1, 1)
    assert cpu.enter() is ExitReason.HLT
    assert cpu.register("rax") == 2


def test_a_handler_writes_the_code_that_follows() -> None:
    cpu = Cpu("e680 b001 f4")  # out 0x80, al; mov al, 1; hlt

    def patch(port: int) -> None:
        cpu.ram[CODE + 3] = 9
        cpu.engine.ram_written(CODE, 5)

    cpu.on_out = patch
    assert cpu.enter() is ExitReason.HLT
    # Within the translated block the old code still runs, from the next entry on the new.
    cpu.engine.reset(0, CODE)
    cpu.on_out = lambda port: None
    assert cpu.enter() is ExitReason.HLT
    assert cpu.register("rax") == 9


def test_self_modifying_code() -> None:
    # mov byte [0x1006], 7; mov al, 1; hlt: the operand of the second mov
    cpu = Cpu("c606061007 b001 f4")
    assert cpu.enter() is ExitReason.HLT
    assert cpu.register("rax") == 7


def test_protected_mode_and_back_does_not_break_the_engine() -> None:
    cpu = Cpu("0f20c0 6683c801 0f22c0 0f20c0 6683e0fe 0f22c0 f4")  # cr0.PE on, off
    assert cpu.enter() is ExitReason.HLT
    assert cpu.register("cr0") & 1 == 0


def test_ram_is_released_by_close() -> None:
    cpu = Cpu("f4")
    with pytest.raises(BufferError):
        cpu.ram.close()
    cpu.engine.close()
    cpu.engine.close()
    cpu.ram.close()
    for call in (cpu.engine.registers, lambda: cpu.engine.map_ram(0, mmap(-1, RAM_BYTES))):
        with pytest.raises(RuntimeError, match="closed"):
            call()


@pytest.mark.parametrize("library", [_shim.__file__, "/nonexistent/libunicorn.so.2", "libm.so.6"])
def test_any_other_library_is_refused(library: str) -> None:
    script = (
        "from kvmtick.cpu import _shim; from kvmtick.cpu.unicorn import UnicornEngine\n"
        f"try:\n    _shim.load({library!r})\nexcept ImportError as error:\n    print(error)\n"
        "UnicornEngine()"  # the right one still works
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    assert re.search(r"expected Unicorn 2\.1\.4.*pip install unicorn==2\.1\.4", done.stdout), (
        done.stdout
    )


@pytest.mark.parametrize("library", [_shim.__file__, "/nonexistent/libunicorn.so.2"])
def test_one_library_is_in_use(library: str, tmp_path: Path) -> None:
    UnicornEngine()
    with pytest.raises(ImportError, match=r"libunicorn\.so\.2 is in use in this process"):
        _shim.load(library)
    same = tmp_path / "libunicorn.so.2"
    same.symlink_to(find_library())
    _shim.load(str(same))


def test_a_library_that_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "unicorn", raising=False)
    with pytest.raises(ImportError, match="pip install unicorn"):
        find_library()


def test_opening_an_engine_does_not_import_unicorn() -> None:
    script = (
        "import sys; from kvmtick.cpu.unicorn import UnicornEngine; UnicornEngine(); "
        "sys.exit('unicorn' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == 0


def test_keywords() -> None:
    engine = Cpu("f4").engine
    assert engine.enter(0, irq_window=False, nmi_window=False, budget=5, tsc=0) == ExitReason.HLT
    for arguments in ((), (0, False, False, 5), (0, False, False, 5, 0, 0)):
        with pytest.raises(TypeError, match="enter"):
            engine.enter(*arguments)
    with pytest.raises(TypeError):
        engine.enter("x", False, False, 5, 0)  # type: ignore[arg-type]
