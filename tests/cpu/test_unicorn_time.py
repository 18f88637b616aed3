"""The `unicorn` engine: boundaries of blocks, PAUSE, breakpoints, and how instructions count."""

import subprocess
import sys
import time
from hashlib import sha256
from pathlib import Path
from random import Random

import pytest
from engine_machine import CODE, HANDLERS, IRQ, NMI, PLENTY, VECTOR, Cpu

from kvmtick.cpu.engine import ExitReason, Interruptibility

PORT = 0x40


@pytest.fixture(params=[True, False], ids=["exact", "fast"])
def exact(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def fast(code: str, handlers: dict[int, str] | None = None) -> Cpu:
    return Cpu(code, handlers, exact=False)


def test_engines_are_exact_unless_told_otherwise() -> None:
    assert Cpu("f4").engine.exact
    assert not fast("f4").engine.exact


# ---- blocks ------------------------------------------------------------------------------------


def test_a_block_counts_when_it_begins() -> None:
    cpu = fast("90 90 e640 90 90 f4")
    assert cpu.enter() is ExitReason.HLT
    assert cpu.accesses == [("out", PORT, 1, 0, 5)]
    assert cpu.engine.retired == 6


def test_an_entry_ends_at_a_block_and_exceeds_its_budget_by_less_than_one() -> None:
    cpu = fast("b90300 40 40 49 75fb f4")  # mov cx, 3; inc ax; inc ax; dec cx; jnz; hlt
    ends = []
    while cpu.enter(budget=2) is ExitReason.PREEMPTION_TIMER:
        ends.append((cpu.engine.retired, cpu.register("rip") - CODE, cpu.register("rax")))
    assert ends == [(5, 3, 2), (4, 3, 4), (4, 8, 6)]
    assert (cpu.engine.retired, cpu.register("rip") - CODE) == (1, 9)


def test_a_budget_of_one_is_one_instruction() -> None:
    cpu = fast("b90300 40 40 49 75fb f4")  # as above
    assert cpu.enter(budget=5) is ExitReason.PREEMPTION_TIMER  # the whole block is translated
    cpu.engine.reset(0, CODE)
    ends = []
    while cpu.enter(budget=1) is ExitReason.PREEMPTION_TIMER:
        ends.append((cpu.engine.retired, cpu.register("rip") - CODE))
    again = [(1, 4), (1, 5), (1, 6), (1, 3)]
    assert ends == [(1, 3), *again, *again, *again[:-1], (1, 8)]
    assert (cpu.engine.retired, cpu.register("rip") - CODE) == (1, 9)


def test_a_budget_that_is_used_up_to_the_instruction() -> None:
    cpu = fast(
        "b90600 49 75fd f4"
    )  # mov cx, 6; dec cx; jnz: the first block has 3 instructions, the others 2
    assert cpu.enter(budget=5) is ExitReason.PREEMPTION_TIMER
    assert cpu.engine.retired == 5
    assert cpu.enter(budget=6) is ExitReason.PREEMPTION_TIMER
    assert cpu.engine.retired == 6


@pytest.mark.parametrize("wrmsr", ["0f30", "66f30f30"])
def test_a_kick_in_wrmsr_leaves_behind_it(exact: bool, wrmsr: str) -> None:
    """What comes behind it in the block sees what the handler changed: the TSC, for one."""
    cpu = Cpu(f"66b910000000 fb {wrmsr} 0f31 f4", exact=exact)  # mov ecx, 0x10; sti; wrmsr; rdtsc
    cpu.on_out = lambda msr: cpu.engine.kick()
    assert cpu.enter() is ExitReason.EXTERNAL_INTERRUPT
    assert [access[:2] for access in cpu.accesses] == [("wrmsr", 0x10)]
    assert cpu.register("rip") == CODE + 7 + len(bytes.fromhex(wrmsr))
    assert cpu.engine.interruptibility == 0
    assert cpu.enter(tsc=5_000_000) is ExitReason.HLT
    assert 5_000_000 <= cpu.register("rax") < 5_000_003


def test_a_kick_in_a_handler_leaves_at_the_next_block() -> None:
    cpu = fast("e640 40 e640 eb00 40 f4")
    cpu.on_out = lambda port: cpu.engine.kick()
    assert cpu.enter() is ExitReason.EXTERNAL_INTERRUPT
    assert (cpu.register("rip"), cpu.register("rax"), len(cpu.accesses)) == (CODE + 7, 1, 2)
    assert cpu.enter() is ExitReason.HLT


def test_a_kick_before_an_entry_leaves_behind_its_event() -> None:
    cpu = fast("f4", {VECTOR: "cf"})
    cpu.engine.kick()
    assert cpu.enter(IRQ) is ExitReason.EXTERNAL_INTERRUPT
    assert (cpu.register("rip"), cpu.engine.retired) == (HANDLERS, 0)
    assert cpu.enter() is ExitReason.HLT
    assert cpu.engine.retired == 2


def test_a_loop_of_one_block_is_left() -> None:
    cpu = fast("40 ebfd")
    assert cpu.enter(budget=1_000_000) is ExitReason.PREEMPTION_TIMER
    assert cpu.engine.retired == 1_000_000


def test_order_of_what_ends_an_entry() -> None:
    cpu = fast("fb 90 ebfd")
    assert cpu.enter(budget=2) is ExitReason.PREEMPTION_TIMER
    for irq_window, nmi_window, kick, reason in (
        (True, True, True, ExitReason.EXTERNAL_INTERRUPT),
        (True, True, False, ExitReason.NMI_WINDOW),
        (True, False, False, ExitReason.INTERRUPT_WINDOW),
    ):
        if kick:
            cpu.engine.kick()
        assert cpu.enter(irq_window=irq_window, nmi_window=nmi_window) is reason
        assert cpu.engine.retired == 0


def test_an_exception_of_a_handler_comes_out_at_the_next_block(exact: bool) -> None:
    cpu = Cpu("e640 eb00 f4", exact=exact)

    def fail(port: int) -> None:
        raise LookupError(port)

    cpu.on_out = fail
    with pytest.raises(LookupError):
        cpu.enter()
    assert cpu.enter() is ExitReason.HLT


# ---- windows and shadows, in either kind of engine ---------------------------------------------


@pytest.mark.parametrize(
    ("code", "opens_at"),
    [
        ("fb 90 90 f4", 2),  # sti: behind the next instruction
        ("fb fb 90 f4", 2),  # only the first STI casts a shadow
        ("6802029d 90 f4", 4),  # push 0x202; popf
        ("680202 0e 680011 cf", 0x100),  # push 0x202; push cs; push CODE + 0x100; iret
        ("fb 8ed0 90 90 f4", 3),  # sti; mov ss, ax: no second shadow
    ],
    ids=["sti", "sti sti", "popf", "iret", "sti mov ss"],
)
def test_the_interrupt_window_opens_at_once(code: str, opens_at: int, exact: bool) -> None:
    cpu = Cpu(code, exact=exact)
    cpu.ram[CODE + 0x100] = 0xF4
    assert cpu.enter(irq_window=True) is ExitReason.INTERRUPT_WINDOW
    assert cpu.register("rip") == CODE + opens_at


@pytest.mark.parametrize("before", ["", "8cd8 8cd8"], ids=["first", "in a block"])
@pytest.mark.parametrize(
    ("instruction", "shadow"),
    [
        ("fb", Interruptibility.STI),
        ("8ed0", Interruptibility.MOV_SS),
        ("6800 0017", Interruptibility.MOV_SS),
        ("3efb", Interruptibility.STI),
    ],
    ids=["sti", "mov ss", "pop ss", "prefixed sti"],
)
def test_the_shadow_tells_who_cast_it(
    instruction: str, shadow: Interruptibility, before: str, exact: bool
) -> None:
    cpu = Cpu(before + instruction + "90 f4", exact=exact)
    while cpu.register("rip") < CODE + len(bytes.fromhex(before + instruction)):
        assert cpu.enter(budget=1) is ExitReason.PREEMPTION_TIMER
    assert cpu.engine.interruptibility == shadow
    cpu.engine.kick()
    assert cpu.enter() is ExitReason.EXTERNAL_INTERRUPT
    assert cpu.engine.interruptibility == shadow
    assert cpu.enter(budget=1) is ExitReason.PREEMPTION_TIMER
    assert cpu.engine.interruptibility == 0


def test_nmis_are_blocked_until_iret(exact: bool) -> None:
    cpu = Cpu("f4 f4", {2: "90 cf"}, exact=exact)
    assert cpu.enter() is ExitReason.HLT
    assert cpu.enter(NMI, nmi_window=True) is ExitReason.NMI_WINDOW
    assert (cpu.register("rip"), cpu.engine.retired) == (CODE + 1, 2)


def test_a_software_interrupt_that_faults_is_on_its_instruction(exact: bool) -> None:
    # The vector is beyond the IVT's limit: #GP.
    cpu = Cpu("40 cd21 f4", {13: "f4"}, exact=exact)
    cpu.set_registers(idtr_limit=4 * 0x20 - 1)
    assert cpu.enter() is ExitReason.HLT
    assert cpu.word(0x1_0000 - 6) == CODE + 1


# ---- how string instructions count -------------------------------------------------------------

STRINGS = {
    "movsb": "f3a4",
    "repne stosw": "f2ab",
    "cs lodsb": "2ef3ac",
    "movsb with ecx": "67f3a4",
    "outsb": "f36e",
    "insb": "f36c",
}
PAIRS = [(first, second) for first in (0, 1, 5) for second in (0, 1, 2)]


@pytest.mark.parametrize("budget", [1, 2, 3, PLENTY])
@pytest.mark.parametrize(("first", "second"), PAIRS)
@pytest.mark.parametrize("name", STRINGS)
def test_rounds_of_rep_count_as_in_an_exact_engine(
    name: str, first: int, second: int, budget: int
) -> None:
    instruction = STRINGS[name]
    code = (
        f"66b9 {first.to_bytes(4, 'little').hex()} {instruction}"
        f"66b9 {second.to_bytes(4, 'little').hex()} {instruction} {instruction} 90 f4"
    )
    totals = []
    for exact in (True, False):
        cpu = Cpu(code, exact=exact)
        cpu.set_registers(rsi=0x4000, rdi=0x5000)
        total = 0
        while cpu.enter(budget=budget) is ExitReason.PREEMPTION_TIMER:
            total += cpu.engine.retired
        totals.append(total + cpu.engine.retired)
    assert totals[0] == totals[1] == 2 + max(first, 1) + max(second, 1) + 1 + 2


def test_count_of_the_address_size_decides() -> None:
    """With 16-bit addresses only CX counts; the rest of ECX stays."""
    for exact in (True, False):
        cpu = Cpu("66b9 02000100 f3a4 90 f4", exact=exact)
        assert cpu.enter() is ExitReason.HLT
        assert (cpu.engine.retired, cpu.register("rcx")) == (5, 0x1_0000)


def test_a_rep_that_ends_early_and_is_begun_again(exact: bool) -> None:
    # mov bx, 3; again: mov di, 0x5000; mov cx, 9; repne scasb; dec bx; jnz again; hlt
    cpu = Cpu("bb0300 bf0050 b90900 f2ae 4b 75f5 f4", exact=exact)
    cpu.ram[0x5000:0x5003] = b"\x01\x01\x00"
    assert cpu.enter() is ExitReason.HLT
    assert cpu.engine.retired == 1 + 3 * (2 + 3 + 2) + 1


def test_an_interrupt_between_the_rounds(exact: bool) -> None:
    cpu = Cpu("b90400 f3a4 90 f4", {VECTOR: "51 b90000 f3a4 59 cf"}, exact=exact)
    cpu.set_registers(rsi=0x4000, rdi=0x5000)
    assert cpu.enter(budget=2) is ExitReason.PREEMPTION_TIMER
    assert cpu.register("rcx") == 3
    assert cpu.enter(IRQ) is ExitReason.HLT
    assert cpu.engine.retired == 5 + 3 + 2


def test_a_rep_that_the_host_begins_anew_counts(exact: bool) -> None:
    cpu = Cpu("f3aa f4", exact=exact)
    cpu.set_registers(rcx=3, rdi=0x5000)
    assert cpu.enter(budget=3) is ExitReason.PREEMPTION_TIMER
    cpu.set_registers(rip=CODE)
    assert cpu.enter() is ExitReason.HLT
    assert cpu.engine.retired == 2
    cpu.engine.reset(0, CODE)
    assert cpu.enter() is ExitReason.HLT
    assert cpu.engine.retired == 2


# ---- what the running instruction is -----------------------------------------------------------


def test_ins_to_a_device_writes_it_once(exact: bool) -> None:
    # IN before it in the same block, two INS in a block, then rounds of REP INS.
    code = "b8ffff 8ec0 bf1000 ba4000 ec 6c 6d b90300 f36c aa f4"
    cpu = Cpu(code, exact=exact)
    assert cpu.enter() is ExitReason.HLT
    written = [access[:4] for access in cpu.accesses if access[0] == "mmio write"]
    value = cpu.input
    assert written == [
        ("mmio write", 0x10_0000, 1, value),
        ("mmio write", 0x10_0001, 2, value),
        *(("mmio write", 0x10_0003 + i, 1, value) for i in range(3)),
        ("mmio write", 0x10_0006, 1, value),
    ]


def test_rdtsc_is_that_of_its_block() -> None:
    cpu = fast("0f31 6689c3 0f31 6629d8 eb00 f4")
    assert cpu.enter(tsc=1000) is ExitReason.HLT
    assert 1000 <= cpu.register("rbx") < 1000 + cpu.engine.retired
    assert cpu.register("rax") < cpu.engine.retired


# ---- code that rewrites its own block ----------------------------------------------------------


def test_a_store_into_its_own_block_counts_once() -> None:
    # Two stores make `inc cx; inc dx` of the last two NOPs.
    cpu = Cpu("c6060b10 41 c6060c10 42 90 90 90 f4")
    cpu.set_registers(rdx=0)
    assert cpu.enter() is ExitReason.HLT
    assert (cpu.register("rcx"), cpu.register("rdx")) == (1, 1)
    assert cpu.engine.retired == 6


# ---- PAUSE -------------------------------------------------------------------------------------


def test_pause_ends_an_entry_only_when_asked_to(exact: bool) -> None:
    cpu = Cpu("90 f390 40 f390 40 f4", exact=exact)
    cpu.engine.exit_on_pause(True)
    assert cpu.enter() is ExitReason.PAUSE
    assert (cpu.engine.retired, cpu.register("rip")) == (2, CODE + 3)
    cpu.engine.exit_on_pause(False)
    assert cpu.enter() is ExitReason.HLT
    assert (cpu.engine.retired, cpu.register("rax")) == (4, 2)


def test_a_kick_outlives_a_pause_exit(exact: bool) -> None:
    cpu = Cpu("e640 f390 f4", exact=exact)
    cpu.on_out = lambda port: cpu.engine.kick()
    cpu.engine.exit_on_pause(True)
    reasons = {cpu.enter(), cpu.enter(), cpu.enter()}
    assert reasons == {ExitReason.PAUSE, ExitReason.EXTERNAL_INTERRUPT, ExitReason.HLT}


def test_a_pause_lifts_the_shadow_of_sti(exact: bool) -> None:
    cpu = Cpu("fb f390 90 f4", exact=exact)
    cpu.engine.exit_on_pause(True)
    assert cpu.enter() is ExitReason.PAUSE
    assert cpu.engine.interruptibility == 0
    assert cpu.enter(irq_window=True) is ExitReason.INTERRUPT_WINDOW
    assert cpu.engine.retired == 0


def test_two_spinning_vcpus(exact: bool) -> None:
    """Each waits with PAUSE for the byte the other one writes."""
    ping = "c6060050 01 f390 803e0150 01 75f7 f4"
    pong = "f390 803e0050 01 75f7 c6060150 01 f4"
    one = Cpu(ping, exact=exact)
    other = Cpu("", ram=one.ram, exact=exact)
    one.ram[0x2000 : 0x2000 + len(bytes.fromhex(pong))] = bytes.fromhex(pong)
    other.engine.reset(0, 0x2000)
    reasons: list[ExitReason] = []
    for cpu in (one, other):
        cpu.engine.exit_on_pause(True)
    while ExitReason.HLT not in reasons[-1:]:
        reasons += [other.enter(), one.enter()]
    assert reasons.count(ExitReason.PAUSE) == len(reasons) - 2 <= 6


# ---- breakpoints -------------------------------------------------------------------------------


def test_breakpoints_end_an_entry_before_the_instruction() -> None:
    cpu = Cpu("40 40 40 40 f4")
    cpu.engine.set_breakpoints({CODE + 3, CODE + 1, CODE + 0x40})
    assert cpu.enter() is ExitReason.BREAKPOINT
    assert (cpu.engine.retired, cpu.register("rip")) == (1, CODE + 1)
    assert cpu.enter() is ExitReason.BREAKPOINT
    assert cpu.engine.retired == 0
    cpu.engine.set_breakpoints([CODE + 3])
    assert cpu.enter() is ExitReason.BREAKPOINT
    assert (cpu.engine.retired, cpu.register("rip")) == (2, CODE + 3)
    cpu.engine.set_breakpoints(())
    assert cpu.enter() is ExitReason.HLT


def test_a_breakpoint_is_a_linear_address() -> None:
    cpu = Cpu("f4")
    cpu.engine.reset(CODE >> 4, 0)
    cpu.engine.set_breakpoints([CODE])
    assert cpu.enter() is ExitReason.BREAKPOINT
    assert cpu.register("rip") == 0


def test_everything_else_comes_before_a_breakpoint() -> None:
    cpu = Cpu("fb 90 40 f4")
    cpu.engine.set_breakpoints([CODE + 2])
    assert cpu.enter(budget=2) is ExitReason.PREEMPTION_TIMER
    assert cpu.enter(irq_window=True) is ExitReason.INTERRUPT_WINDOW
    cpu.engine.kick()
    assert cpu.enter() is ExitReason.EXTERNAL_INTERRUPT
    assert cpu.enter() is ExitReason.BREAKPOINT


def test_a_breakpoint_in_the_handler_of_the_entry_event() -> None:
    cpu = Cpu("f4 f4", {VECTOR: "90 cf"})
    assert cpu.enter() is ExitReason.HLT
    cpu.engine.set_breakpoints([HANDLERS])
    assert cpu.enter(IRQ) is ExitReason.BREAKPOINT
    assert (cpu.engine.retired, cpu.register("rip")) == (0, HANDLERS)


def test_breakpoints_in_a_rep_stop_before_each_round_but_not_behind_the_last() -> None:
    cpu = Cpu("b90300 f3a4 f4")
    cpu.engine.set_breakpoints([CODE + 3])
    assert cpu.enter() is ExitReason.BREAKPOINT
    counts = []
    while cpu.register("rip") == CODE + 3:
        counts.append(cpu.register("rcx"))
        cpu.engine.set_breakpoints([])
        cpu.enter(budget=1)
        cpu.engine.set_breakpoints([CODE + 3])
        if cpu.register("rip") == CODE + 3 and cpu.enter() is ExitReason.HLT:
            break
    assert counts == [3, 2, 1]


def test_breakpoints_that_cannot_be_are_refused() -> None:
    cpu = Cpu("f4")
    cpu.engine.set_breakpoints([CODE])
    with pytest.raises(TypeError):
        cpu.engine.set_breakpoints(["0x1000"])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="takes addresses"):
        cpu.engine.set_breakpoints(5)  # type: ignore[arg-type]
    with pytest.raises(OverflowError):
        cpu.engine.set_breakpoints([-1])
    assert cpu.enter() is ExitReason.BREAKPOINT
    with pytest.raises(ValueError, match="an engine that is exact"):
        fast("f4").engine.set_breakpoints([CODE])
    fast("f4").engine.set_breakpoints([])


# ---- determinism -------------------------------------------------------------------------------


def random_code(seed: int) -> str:
    """Loops with arithmetic, stores (some into the program itself), ports, strings, shadows."""
    random = Random(seed)
    pieces = ["40", "01d8", "a30050", "e640", "e440", "0f31", "b90500f3a4", "fb", "8ed0", "f390"]
    pieces += ["0306 0050", "50 58", "9c 9d", "cd21", "880e 8010", "fe06 8110"]
    body = "".join(random.choice(pieces) for _ in range(60))
    size = len(bytes.fromhex(body))
    return f"bd6400 {body} 4d 0f85 {(-size - 5 & 0xFFFF).to_bytes(2, 'little').hex()} f4"


def trace(seed: int, exact: bool) -> str:
    random = Random(seed)
    cpu = Cpu(
        random_code(seed), {0x21: "cf", VECTOR: "fe06 0060 cf", 2: "cf", 6: "f4"}, exact=exact
    )
    cpu.engine.exit_on_pause(seed % 2 == 0)
    steps = []
    for _ in range(400):
        event = random.choice((0, 0, IRQ, NMI))
        if event == NMI and cpu.engine.interruptibility & Interruptibility.NMI:
            event = 0
        window = random.random() < 0.5
        reason = cpu.enter(event, irq_window=window, budget=random.randrange(1, 200), tsc=seed)
        registers = cpu.engine.registers()
        steps.append((reason.name, cpu.engine.retired, registers["rip"], registers["rax"]))
    return repr((steps, cpu.accesses, cpu.ram[:0x8000].hex()))


@pytest.mark.parametrize("seed", range(8))
def test_the_same_entries_give_the_same_run(seed: int, exact: bool) -> None:
    assert trace(seed, exact) == trace(seed, exact)


def test_another_process_gives_the_same_run(exact: bool) -> None:
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); import test_unicorn_time as t;"
        f"from hashlib import sha256; print(sha256(t.trace(3, {exact}).encode()).hexdigest())"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, str(Path(__file__).parent)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == sha256(trace(3, exact).encode()).hexdigest()


# ---- other users of the library ----------------------------------------------------------------

STOCK = """
from kvmtick.cpu.unicorn import UnicornEngine
UnicornEngine().close()
import unicorn
from unicorn.x86_const import UC_X86_INS_IN, UC_X86_REG_RIP
uc = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_64)
uc.mem_map(0x1000, 0x1000)
uc.mem_write(0x1000, bytes.fromhex("ec eb01 90 48ffc3 ebf7"))
left = 5
def read(uc, port, size, user):
    global left
    left -= 1
    if not left:
        uc.emu_stop()
    return 0
uc.hook_add(unicorn.UC_HOOK_INSN, read, None, 1, 0, UC_X86_INS_IN)
uc.emu_start(0x1000, 0)
print(hex(uc.reg_read(UC_X86_REG_RIP)))
"""


def test_a_stock_engine_stops_where_it_would_without_us() -> None:
    alone = STOCK.replace("UnicornEngine().close()", "")
    results = [
        subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True
        ).stdout.strip()
        for program in (STOCK, alone)
    ]
    assert results == ["0x1004", "0x1004"]  # behind the jump


def test_both_kinds_of_engine_run_side_by_side() -> None:
    cpu, other = Cpu("90 90 90 f4"), fast("90 90 90 f4")
    for _ in range(3):
        for machine in (cpu, other):
            machine.engine.reset(0, CODE)
            assert machine.enter(budget=2) is (
                ExitReason.PREEMPTION_TIMER if machine is cpu else ExitReason.HLT
            )


# --- real time: a deadline of CLOCK_MONOTONIC -----------------------------------------------------

LOOPS = {
    "registers": "40 ebfd",  # inc ax; jmp
    "ports": "e640 ebfc",  # out 0x40, al; jmp
    "rep": "bf0020 b9ffff f3aa ebf6",  # mov di; mov cx; rep stosb; jmp
}


@pytest.mark.parametrize("code", LOOPS.values(), ids=LOOPS)
def test_a_deadline_ends_an_entry_and_not_early(exact: bool, code: str) -> None:
    cpu = Cpu(code, exact=exact)
    due_ns = time.monotonic_ns() + 3_000_000
    cpu.engine.deadline_ns = due_ns
    assert cpu.enter(budget=1 << 40) is ExitReason.EXTERNAL_INTERRUPT
    assert time.monotonic_ns() >= due_ns
    assert cpu.engine.retired > 0


def test_a_deadline_that_has_passed_lets_the_guest_do_little(exact: bool) -> None:
    cpu = Cpu(LOOPS["registers"], exact=exact)
    cpu.engine.deadline_ns = 1
    assert cpu.enter(budget=1 << 40) is ExitReason.EXTERNAL_INTERRUPT
    assert 1 <= cpu.engine.retired <= 2


def test_a_budget_and_a_kick_count_with_a_deadline_too(exact: bool) -> None:
    cpu = Cpu(LOOPS["ports"], exact=exact)
    cpu.engine.deadline_ns = time.monotonic_ns() + 3600 * 10**9
    assert cpu.enter(budget=1001) is ExitReason.PREEMPTION_TIMER
    assert 1001 <= cpu.engine.retired <= 1002
    cpu.on_out = lambda port: cpu.engine.kick()
    assert cpu.enter(budget=1 << 40) is ExitReason.EXTERNAL_INTERRUPT
