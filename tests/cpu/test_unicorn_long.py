"""Events of the `unicorn` engine in 64-bit mode, with paging, rings, TSS and interrupt stacks."""

import pytest
from engine_machine import CODE, FLAGS_IF, HANDLERS, IRQ, MMIO, NMI, PLENTY, VECTOR, Cpu
from long_machine import (
    ABSENT_PAGE,
    ABSENT_SEGMENT,
    CR0,
    DATA_PAGE,
    GDT,
    IDT,
    IST_1,
    IST_2,
    KERNEL_CODE,
    KERNEL_DATA,
    KERNEL_STACK,
    READ_ONLY_PAGE,
    RING_0_STACK,
    SUPERVISOR_PAGE,
    TASK,
    TSS,
    USER_CODE,
    USER_DATA,
    USER_STACK,
    LongCpu,
)

from kvmtick.cpu.engine import INTR_INFO_VALID, EventType, ExitReason, Interruptibility

DB, BP, UD, NM, DF, TS, NP, SS, GP, PF, MF = 1, 3, 6, 7, 8, 10, 11, 12, 13, 14, 16
FLAGS_TF, FLAGS_RF = 1 << 8, 1 << 16
HALTS = dict.fromkeys(range(21), "f4") | {VECTOR: "f4", 0x42: "f4"}  # hlt
NO_CODE = -1
either_engine = pytest.mark.parametrize("exact", [True, False], ids=["exact", "blocks"])
SKIP_2 = "48 83042402 48cf"  # add qword [rsp], 2; iretq


def address(linear: int) -> str:
    return linear.to_bytes(8, "little").hex()


def stack_of(ring: int) -> tuple[int, int, int, int]:
    """Where an event finds its stack in ring 0, and what CS, RSP and SS it pushes."""
    if ring:
        return RING_0_STACK, USER_CODE, USER_STACK, USER_DATA
    return KERNEL_STACK, KERNEL_CODE, KERNEL_STACK, KERNEL_DATA


EXCEPTIONS = [
    # name, vector, code, where it stands when it is pushed, error code, RF in the pushed flags
    ("divide error", 0, "31c9 f7f1", 2, NO_CODE, True),  # xor ecx, ecx; div ecx
    ("int1", DB, "90 f1", 2, NO_CODE, False),
    ("int3", BP, "90 cc", 2, NO_CODE, False),
    ("int3 in two bytes", BP, "90 cd03", 3, NO_CODE, False),
    ("int n", 0x42, "90 cd42", 3, NO_CODE, False),
    ("ud2", UD, "90 0f0b", 1, NO_CODE, True),
    ("into in 64-bit mode", UD, "90 ce", 1, NO_CODE, True),
    # mov ax, the absent segment; mov ds, ax
    ("absent segment", NP, f"66b8{ABSENT_SEGMENT:02x}00 8ed8", 4, ABSENT_SEGMENT, True),
    ("selector beyond the GDT", GP, "66b80010 8ed8", 4, 0x1000, True),
    ("selector of the LDT", GP, "66b80c00 8ed8", 4, 0xC, True),
    # mov rax, 0x80000000000000; mov al, [rax]
    ("not canonical", GP, "48b80000000000008000 8a00", 10, 0, True),
    ("reserved bits of CR4 and ring 3", GP, "48c7c000200000 0f22e0", 7, 0, True),
    ("read an absent page", PF, "a0" + address(ABSENT_PAGE + 5), 0, 0, True),
    ("write an absent page", PF, "a2" + address(ABSENT_PAGE + 5), 0, 2, True),
    ("write a read-only page", PF, "a2" + address(READ_ONLY_PAGE + 5), 0, 3, True),
]


@either_engine
@pytest.mark.parametrize("ring", [0, 3])
@pytest.mark.parametrize(
    ("vector", "code", "pushed", "error_code", "resume_flag"),
    [pytest.param(*case[1:], id=case[0]) for case in EXCEPTIONS],
)
def test_exceptions(
    ring: int, vector: int, code: str, pushed: int, error_code: int, resume_flag: bool, exact: bool
) -> None:
    cpu = LongCpu(code, HALTS, ring=ring, exact=exact)
    assert cpu.enter() is ExitReason.HLT
    assert cpu.vector == vector
    top, cs, rsp, ss = stack_of(ring)
    if error_code == NO_CODE:
        frame, words = cpu.frame(), 5
    else:
        code_pushed, frame = cpu.frame_with_code()
        words = 6
        user = 4 if ring and vector == PF else 0
        assert code_pushed == error_code | user
    assert cpu.register("rsp") == top - 8 * words
    assert (frame["rip"], frame["cs"]) == (CODE + pushed, cs)
    assert (frame["rsp"], frame["ss"]) == (rsp, ss)
    assert bool(frame["rflags"] & FLAGS_RF) is resume_flag
    assert cpu.register("cs") == KERNEL_CODE
    assert not cpu.interrupts_enabled


@either_engine
@pytest.mark.parametrize(
    ("code", "linear", "error_code", "ring"),
    [
        pytest.param("a0" + address(ABSENT_PAGE + 5), ABSENT_PAGE + 5, 4, 3, id="read"),
        pytest.param("a0" + address(SUPERVISOR_PAGE), SUPERVISOR_PAGE, 5, 3, id="no right"),
        # mov eax, the page; jmp rax
        pytest.param("b800300400 ffe0", DATA_PAGE, 0x15, 3, id="fetch, no-execute"),
        pytest.param("b800300400 ffe0", DATA_PAGE, 0x11, 0, id="fetch, no-execute, ring 0"),
        pytest.param("b8ff1f0400 ffe0", ABSENT_PAGE + 0xFFF, 0x14, 3, id="fetch, absent"),
        # mov eax, end of the absent page - 2; mov [rax], ecx
        pytest.param("b8fe0f0400 8908", ABSENT_PAGE, 6, 0, id="a store over two pages"),
    ],
)
def test_page_faults_tell_where(
    code: str, linear: int, error_code: int, ring: int, exact: bool
) -> None:
    cpu = LongCpu(code, HALTS, ring=ring, exact=exact)
    if linear == ABSENT_PAGE and error_code == 6:
        cpu.set_page(SUPERVISOR_PAGE, SUPERVISOR_PAGE | 7)
        error_code = 2
    assert cpu.enter() is ExitReason.HLT
    assert cpu.vector == PF
    assert cpu.register("cr2") == linear
    assert cpu.frame_with_code()[0] == error_code


def test_a_page_fault_is_mended_and_the_instruction_runs_again() -> None:
    # mov al, [absent]; hlt - mov qword [its PTE], page | 7; invlpg [absent]; add rsp, 8; iretq
    entry = ABSENT_PAGE | 7
    mend = f"48c70425{(0x1_3000 + 8 * (ABSENT_PAGE >> 12)).to_bytes(4, 'little').hex()}"
    mend += entry.to_bytes(4, "little").hex()
    cpu = LongCpu(
        "a0" + address(ABSENT_PAGE) + "f4",
        {PF: mend + "0f013c2500100400 4883c408 48cf"},
    )
    cpu.ram[ABSENT_PAGE] = 0x77
    assert cpu.enter() is ExitReason.HLT
    assert cpu.register("rax") == 0x77
    assert cpu.register("rip") == CODE + 10
    assert cpu.engine.retired == 1 + 4 + 1 + 1


@either_engine
@pytest.mark.parametrize("ring", [0, 3])
def test_device_not_available(ring: int, exact: bool) -> None:
    cpu = LongCpu("90 d9d0", HALTS, ring=ring, exact=exact)  # nop; fnop
    cpu.set_registers(cr0=CR0 | 8)
    assert cpu.enter() is ExitReason.HLT
    assert cpu.vector == NM
    assert cpu.frame()["rip"] == CODE + 1


def test_floating_point_error() -> None:
    # fninit; fldcw [data] (all unmasked); fld1; fldz; fdivp; fwait
    cpu = LongCpu("dbe3 d92c2500300400 d9e8 d9ee def9 9b", HALTS, ring=3)
    cpu.ram[DATA_PAGE : DATA_PAGE + 2] = b"\x40\x03"
    assert cpu.enter() is ExitReason.HLT
    assert cpu.vector == MF
    assert cpu.frame()["rip"] == CODE + 15


@either_engine
@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("f4", "hlt"),
        ("fa", "cli"),
        ("0f32", "rdmsr"),
        ("0f30", "wrmsr"),
        ("0f20c0", "mov rax, cr0"),
        ("440f20c0", "mov rax, cr8"),
        ("440f22c0", "mov cr8, rax"),
        ("0f21c0", "mov rax, dr0"),
        ("0f011425 00300400", "lgdt"),
        ("0f06", "clts"),
        ("0f01f0", "lmsw ax"),
        ("0f01f8", "swapgs"),
        ("e620", "out 0x20, al"),
        ("e460", "in al, 0x60"),
        ("0f35", "sysexit"),
    ],
)
def test_ring_3_may_not(code: str, name: str, exact: bool) -> None:
    cpu = LongCpu(code, HALTS, ring=3, exact=exact)
    assert cpu.enter() is ExitReason.HLT, name
    assert (cpu.vector, cpu.frame_with_code()[0]) == (GP, 0), name
    assert cpu.accesses == []


@either_engine
@pytest.mark.parametrize(
    ("port", "size_bytes", "allowed"),
    [(0x20, 1, True), (0x21, 1, False), (0x1F, 2, True), (0x20, 2, False), (0x1E, 4, False)],
)
def test_the_tss_allows_ports(port: int, size_bytes: int, allowed: bool, exact: bool) -> None:
    # out dx, al - ax - eax
    cpu = LongCpu({1: "ee", 2: "66ef", 4: "ef"}[size_bytes] + "0f0b", HALTS, ring=3, exact=exact)
    cpu.ram[TSS + 0x68 : TSS + 0x70] = bytes([0, 0, 0, 0, 0b10, 0, 0, 0xFF])  # port 0x21 is denied
    cpu.set_registers(tr_limit=0x6F, rdx=port)
    assert cpu.enter() is ExitReason.HLT
    assert cpu.vector == (UD if allowed else GP)
    assert len(cpu.accesses) == allowed


def test_iopl_3_allows_all_ports_and_cli() -> None:
    cpu = LongCpu("e620 fb fa 0f0b", HALTS, ring=3)  # out 0x20, al; sti; cli; ud2
    cpu.set_registers(rflags=2 | 3 << 12)
    assert cpu.enter() is ExitReason.HLT
    assert cpu.vector == UD
    assert len(cpu.accesses) == 1


def test_a_gate_of_ring_0_is_no_way_for_int_n_in_ring_3() -> None:
    cpu = LongCpu("cd42", HALTS, ring=3)
    cpu.set_gate(0x42, HANDLERS, dpl=0)
    assert cpu.enter() is ExitReason.HLT
    assert cpu.vector == GP
    code, frame = cpu.frame_with_code()
    assert code == 0x42 * 8 + 2  # IDT; no EXT: a software interrupt
    assert frame["rip"] == CODE
    # INT1 does not look at the DPL, nor does anything but INT n, INT3 and INTO.
    cpu = LongCpu("f1", HALTS, ring=3)
    cpu.set_gate(DB, HANDLERS + 0x40 * DB, dpl=0)
    assert cpu.enter() is ExitReason.HLT
    assert cpu.vector == DB


# ---- interrupts and stacks ----------------------------------------------------------------------


@either_engine
@pytest.mark.parametrize("ring", [0, 3])
@pytest.mark.parametrize("info", [IRQ, NMI], ids=["interrupt", "nmi"])
def test_an_injected_event_pushes_its_frame(ring: int, info: int, exact: bool) -> None:
    cpu = LongCpu("90 ebfe", {2: "f4", VECTOR: "f4"}, ring=ring, exact=exact)  # nop; jmp $
    cpu.set_registers(rflags=FLAGS_IF | 3)
    assert cpu.enter(budget=1) is ExitReason.PREEMPTION_TIMER
    assert cpu.enter(info) is ExitReason.HLT
    top, cs, rsp, ss = stack_of(ring)
    assert cpu.frame() == {
        "rip": CODE + 1,
        "cs": cs,
        "rflags": FLAGS_IF | 3,
        "rsp": rsp,
        "ss": ss,
    }
    assert cpu.register("rsp") == top - 40
    assert cpu.register("ss") == (0 if ring else KERNEL_DATA)
    assert cpu.vector == info & 0xFF
    assert cpu.engine.interruptibility == (Interruptibility.NMI if info == NMI else 0)
    assert not cpu.interrupts_enabled


def test_the_stack_is_aligned_before_the_frame() -> None:
    cpu = LongCpu("f4", {VECTOR: "f4"})
    cpu.set_registers(rsp=KERNEL_STACK - 3)
    assert cpu.enter(IRQ) is ExitReason.HLT
    assert cpu.register("rsp") == KERNEL_STACK - 16 - 40
    assert cpu.frame()["rsp"] == KERNEL_STACK - 3


@pytest.mark.parametrize("ring", [0, 3])
def test_interrupt_stacks(ring: int) -> None:
    cpu = LongCpu("90 90 90", {VECTOR: "48cf", 2: "f4"}, ring=ring, ist={VECTOR: 1, 2: 2})
    cpu.set_registers(rflags=FLAGS_IF | 2)
    assert cpu.enter(IRQ, budget=2) is ExitReason.PREEMPTION_TIMER  # iretq; nop
    assert cpu.register("rip") == CODE + 1
    assert cpu.register("rsp") == stack_of(ring)[2]
    assert cpu.quad(IST_1 - 40) == CODE
    # An NMI over the interrupt, each on a stack of its own.
    assert cpu.enter(IRQ, budget=PLENTY, nmi_window=True) is ExitReason.NMI_WINDOW
    assert cpu.register("rsp") == IST_1 - 40
    assert cpu.enter(NMI) is ExitReason.HLT
    assert cpu.register("rsp") == IST_2 - 40
    assert cpu.frame()["rsp"] == IST_1 - 40


def test_a_tick_from_ring_3_and_back() -> None:
    # inc rbx; jmp $-3 - out 0x20, al; iretq
    cpu = LongCpu("48ffc3 ebfb", {VECTOR: "e620 48cf"}, ring=3)
    cpu.set_registers(rflags=FLAGS_IF | 2)
    for _ in range(50):
        assert cpu.enter(IRQ, budget=2 + 10) is ExitReason.PREEMPTION_TIMER
        assert cpu.register("cs") == USER_CODE
        assert cpu.register("ss") == USER_DATA
        assert cpu.register("rsp") == USER_STACK
        assert cpu.interrupts_enabled
    assert cpu.register("rbx") == 50 * 5
    assert cpu.accesses == [("out", 0x20, 1, 0, 0)] * 50


def test_nmis_are_blocked_until_iretq() -> None:
    cpu = LongCpu("ebfe", {2: "90 48cf"})
    assert cpu.enter(NMI, nmi_window=True, budget=1) is ExitReason.PREEMPTION_TIMER
    assert cpu.engine.interruptibility == Interruptibility.NMI
    assert cpu.enter(nmi_window=True) is ExitReason.NMI_WINDOW
    assert (cpu.engine.retired, cpu.engine.interruptibility) == (1, 0)


@either_engine
def test_an_iretq_that_faults_ends_the_blocking_of_nmis(exact: bool) -> None:
    # The NMI handler returns to a selector beyond the GDT: #GP (SDM vol. 3A, 7.7.1).
    cpu = LongCpu(
        "ebfe", {2: "66c74424080010 48cf", GP: "f4"}, exact=exact
    )  # mov word [rsp+8], 0x1000; iretq
    assert cpu.enter(NMI) is ExitReason.HLT
    assert cpu.vector == GP
    assert cpu.engine.interruptibility == 0
    code, frame = cpu.frame_with_code()
    assert code == 0x1000
    assert frame["rip"] == HANDLERS + 7
    assert frame["rflags"] & FLAGS_RF


@pytest.mark.parametrize(
    ("code", "kind"),
    [("fb 90 90 f4", Interruptibility.STI), ("8ed1 90 90 f4", Interruptibility.MOV_SS)],
    ids=["sti", "mov ss, ecx"],
)
def test_shadows(code: str, kind: Interruptibility) -> None:
    cpu = LongCpu(code)
    cpu.set_registers(rcx=KERNEL_DATA, rflags=2 if code.startswith("fb") else FLAGS_IF | 2)
    assert cpu.enter(budget=1) is ExitReason.PREEMPTION_TIMER
    assert cpu.engine.interruptibility == kind
    assert cpu.enter(irq_window=True, nmi_window=True) is ExitReason.NMI_WINDOW
    assert (cpu.engine.retired, cpu.engine.interruptibility) == (1, 0)
    assert cpu.enter(irq_window=True) is ExitReason.INTERRUPT_WINDOW
    assert cpu.engine.retired == 0


def test_shadows_in_a_page_that_is_elsewhere() -> None:
    # Linear 0x43000 is physical 0x50000: what is at physical 0x43000 is not the code.
    cpu = LongCpu("f4")
    cpu.set_page(DATA_PAGE, 0x5_0007)
    cpu.ram[0x5_0000:0x5_0003] = b"\xfb\x90\xf4"
    cpu.set_registers(rip=DATA_PAGE)
    assert cpu.enter(budget=1) is ExitReason.PREEMPTION_TIMER
    assert cpu.engine.interruptibility == Interruptibility.STI


# ---- faults on the way --------------------------------------------------------------------------


def test_a_fault_while_an_interrupt_is_delivered_has_ext() -> None:
    cpu = LongCpu("f4", {GP: "f4"})
    assert cpu.enter(IRQ) is ExitReason.HLT  # no gate
    assert cpu.vector == GP
    assert cpu.frame_with_code()[0] == VECTOR * 8 + 3  # IDT, EXT
    cpu = LongCpu("0f0b", {GP: "f4"})  # ud2
    assert cpu.enter() is ExitReason.HLT
    assert cpu.frame_with_code()[0] == UD * 8 + 3


@either_engine
def test_a_software_interrupt_that_faults_stands_on_itself(exact: bool) -> None:
    cpu = LongCpu("90 f3cd42 f4", {GP: "f4"}, ring=3, exact=exact)  # nop; rep int 0x42
    assert cpu.enter() is ExitReason.HLT
    code, frame = cpu.frame_with_code()
    assert (code, frame["rip"]) == (0x42 * 8 + 2, CODE + 1)
    assert frame["rflags"] & FLAGS_RF


def test_invalid_tss() -> None:
    cpu = LongCpu("cd42", HALTS | {TS: "f4"}, ring=3, ist={TS: 0})
    cpu.set_registers(tr_limit=0x10)  # RSP0 is in it, nothing is behind it
    cpu.set_gate(0x42, HANDLERS, ist=3)
    assert cpu.enter() is ExitReason.HLT
    assert (cpu.vector, cpu.frame_with_code()[0]) == (TS, TASK)


@either_engine
def test_code_that_runs_onto_a_page_it_may_not_fetch(exact: bool) -> None:
    """The instructions before the end of the page are done, one over it is not begun."""
    cpu = LongCpu("", HALTS, exact=exact)
    code = bytes.fromhex("48ffc0 48ffc0 b844332211")  # inc rax; inc rax; mov eax, 0x11223344
    start = ABSENT_PAGE - len(code) + 1
    cpu.ram[start : start + len(code)] = code
    cpu.set_registers(rip=start, rax=0)
    assert cpu.enter() is ExitReason.HLT
    assert (cpu.vector, cpu.register("cr2"), cpu.register("rax")) == (PF, ABSENT_PAGE, 2)
    assert cpu.frame_with_code()[1]["rip"] == start + 6
    assert cpu.engine.retired == 4


def test_a_load_that_faults_right_behind_its_instruction_counts_once() -> None:
    cpu = LongCpu("", HALTS)
    cpu.ram[ABSENT_PAGE - 2 : ABSENT_PAGE] = bytes.fromhex("8a03")  # mov al, [rbx]
    cpu.set_registers(rip=ABSENT_PAGE - 2, rbx=ABSENT_PAGE)
    assert cpu.enter() is ExitReason.HLT
    assert (cpu.vector, cpu.register("cr2")) == (PF, ABSENT_PAGE)
    assert cpu.engine.retired == 2


@pytest.mark.parametrize(
    ("code", "flags"),
    [
        ("3c50", 0x85),  # cmp al, 0x50: CF PF SF
        ("00c0 00c0 00c0 00c0", 0x845),  # add al, al, four times: at last CF PF ZF OF
        ("f9 fec0", 0x05),  # stc; inc al: CF PF
        ("04f0", 0x45),  # add al, 0xf0: CF PF ZF
    ],
)
@pytest.mark.parametrize(
    "faulting",
    ["8a03", "8803", "1203", "0fae20", "0f0b", "f6f1", "6c", "48cf", "0f32"],
    ids=["load", "store", "adc", "xsave", "ud2", "div", "ins", "iretq", "rdmsr"],
)
@either_engine
def test_flags_that_a_fault_pushes(code: str, flags: int, faulting: str, exact: bool) -> None:
    cpu = LongCpu(code + faulting, HALTS, exact=exact)
    cpu.refused_msrs = {0}
    registers = dict.fromkeys(("rbx", "rsi", "rdi", "rsp"), ABSENT_PAGE)
    cpu.set_registers(rax=0x10, rcx=0, **registers)
    cpu.set_gate(PF, HANDLERS + 0x40 * PF, ist=1)
    for vector in (UD, GP, 0):
        cpu.set_gate(vector, HANDLERS + 0x40 * vector, ist=1)
    assert cpu.enter() is ExitReason.HLT
    frame = cpu.frame_with_code()[1] if cpu.vector in (PF, GP) else cpu.frame()
    assert frame["rflags"] & 0x8D5 == flags


@either_engine
def test_ins_after_one_that_was_refused(exact: bool) -> None:
    cpu = LongCpu("6c", HALTS | {GP: "6c f4"}, ring=3, exact=exact)  # insb
    cpu.set_registers(rdi=MMIO, rdx=0x10)
    assert cpu.enter() is ExitReason.HLT
    assert [access[:4] for access in cpu.accesses] == [
        ("in", 0x10, 1, cpu.input),
        ("mmio write", MMIO, 1, cpu.input),
    ]


@either_engine
def test_ins_stores_once_whatever_base_es_has(exact: bool) -> None:
    cpu = LongCpu("6c f4", exact=exact)  # insb; hlt
    cpu.set_registers(rdi=MMIO, rdx=0x10, es_base=0x1234)
    assert cpu.enter() is ExitReason.HLT
    assert [access[:4] for access in cpu.accesses] == [
        ("in", 0x10, 1, cpu.input),
        ("mmio write", MMIO, 1, cpu.input),
    ]


@pytest.mark.parametrize("selector", range(4))
def test_ltr_refuses_a_null_selector(selector: int) -> None:
    cpu = LongCpu("0f00d8 f4", HALTS)  # ltr ax
    cpu.set_registers(rax=selector)
    assert cpu.enter() is ExitReason.HLT
    assert cpu.vector == GP
    assert cpu.frame_with_code()[0] == 0
    assert cpu.register("tr") == TASK


def test_a_way_to_ring_0_needs_a_tss_with_room_for_its_stack() -> None:
    cpu = Cpu("cd20")
    cpu.reset_protected(CODE)
    cpu.set_registers(gdtr_base=GDT, gdtr_limit=0xF, idtr_base=IDT, idtr_limit=0x7FF)
    cpu.ram[GDT + 8 : GDT + 16] = (0x00CF_9B00_0000_FFFF).to_bytes(8, "little")
    cpu.ram[IDT + 0x20 * 8 : IDT + 0x21 * 8] = (0xEE00_0008_2000).to_bytes(8, "little")
    cpu.set_registers(cs=0x1B, cs_access=0xC0FB, ss=0x23, ss_access=0xC0F3, tr_limit=3)
    assert cpu.enter() is ExitReason.TRIPLE_FAULT  # three times #TS


@pytest.mark.parametrize("access", [0x1_008B, 0x0B, 0x82, 0x93])
def test_an_entry_without_a_tss_is_an_internal_error(access: int) -> None:
    cpu = LongCpu("cd20", HALTS, ring=3)
    cpu.set_registers(tr_access=access)
    assert cpu.enter() is ExitReason.INTERNAL_ERROR
    assert cpu.engine.error == "TR holds no TSS at cs:rip 2b:1000"
    assert cpu.engine.retired == 0
    cpu.set_registers(tr_access=0x8B)
    assert cpu.enter() is ExitReason.HLT


@either_engine
def test_a_stack_that_is_absent_is_a_double_fault(exact: bool) -> None:
    # push rax: #PF; its frame has no stack either: #DF, on IST 1
    cpu = LongCpu("50", {PF: "f4", DF: "f4"}, ist={DF: 1}, exact=exact)
    cpu.set_registers(rsp=ABSENT_PAGE + 0x800)
    assert cpu.enter() is ExitReason.HLT
    assert cpu.vector == DF
    code, frame = cpu.frame_with_code()
    assert (code, frame["rip"], frame["rsp"]) == (0, CODE, ABSENT_PAGE + 0x800)
    assert cpu.register("cr2") == ABSENT_PAGE + 0x7F8
    assert cpu.register("rsp") == IST_1 - 48


def test_a_fault_while_a_page_fault_is_delivered_is_a_double_fault() -> None:
    cpu = LongCpu("a0" + address(ABSENT_PAGE), {PF: "f4", DF: "f4"}, ist={DF: 1})
    cpu.set_quad(IDT + 16 * PF, 0)  # no gate: #GP
    assert cpu.enter() is ExitReason.HLT
    assert cpu.vector == DF
    code, frame = cpu.frame_with_code()
    assert (code, frame["rip"]) == (0, CODE)


def test_two_page_faults_in_a_row_are_no_double_fault() -> None:
    # mov al, [absent] - the handler: mov al, [another one that is absent]
    cpu = LongCpu("a0" + address(ABSENT_PAGE), {PF: "a0" + address(ABSENT_PAGE + 8), DF: "f4"})
    assert cpu.enter(budget=10) is ExitReason.PREEMPTION_TIMER
    assert cpu.engine.retired == 10
    assert cpu.register("rsp") == KERNEL_STACK - 10 * 48


@pytest.mark.parametrize("ring", [0, 3])
def test_triple_fault(ring: int) -> None:
    cpu = LongCpu("90 0f0b", {}, ring=ring)  # nop; ud2, without any gate
    assert cpu.enter() is ExitReason.TRIPLE_FAULT
    assert cpu.engine.retired == 2
    assert cpu.register("rip") == CODE + 1


def test_injected_exceptions_on_an_interrupt_stack() -> None:
    cpu = LongCpu("f4", {GP: "f4", UD: "f4"}, ring=3, ist={UD: 1})
    assert cpu.enter(INTR_INFO_VALID | EventType.HARDWARE_EXCEPTION << 8 | UD) is ExitReason.HLT
    assert cpu.register("rsp") == IST_1 - 40
    assert cpu.frame()["rflags"] & FLAGS_RF


@either_engine
@pytest.mark.parametrize("target", ["absent", "not canonical"])
def test_handlers_that_cannot_be_fetched_use_up_the_budget(target: str, exact: bool) -> None:
    # The frames go to the same stack for ever: nothing but the budget ends it.
    cpu = LongCpu("90 0f0b", {UD: "f4"}, ist={UD: 1}, exact=exact)
    handler = ABSENT_PAGE if target == "absent" else 1 << 63
    for vector in (UD, GP, PF):
        cpu.set_gate(vector, handler, ist=1)
    assert cpu.enter(budget=1000) is ExitReason.PREEMPTION_TIMER
    assert cpu.engine.retired == 1000
    cpu.engine.kick()
    assert cpu.enter() is ExitReason.EXTERNAL_INTERRUPT
    assert cpu.engine.retired == 0


def test_the_boundary_before_a_fetch_that_faults() -> None:
    # sti; nop; jmp to the absent page: the window opens before its #PF
    cpu = LongCpu("fb 90 b800100400 ffe0", {PF: "f4", VECTOR: "f4"})
    assert cpu.enter(budget=4) is ExitReason.PREEMPTION_TIMER
    assert (cpu.engine.retired, cpu.register("rip")) == (4, ABSENT_PAGE)
    assert cpu.interrupts_enabled
    assert cpu.enter(irq_window=True) is ExitReason.INTERRUPT_WINDOW
    assert (cpu.engine.retired, cpu.register("rip")) == (0, ABSENT_PAGE)
    assert cpu.enter(IRQ) is ExitReason.HLT
    assert (cpu.vector, cpu.frame()["rip"]) == (VECTOR, ABSENT_PAGE)


# ---- RF, TF and breakpoints ----------------------------------------------------------------------


@either_engine
def test_an_instruction_breakpoint_and_rf(exact: bool) -> None:
    # nop; nop; hlt with a breakpoint at the second nop. Its handler sets RF and returns.
    cpu = LongCpu(
        "90 90 f4", {DB: "48ffc3 814c241000000100 48cf"}, exact=exact
    )  # inc rbx; or [rsp+16], RF
    cpu.set_registers(dr0=CODE + 1, dr7=0x401, rbx=0)
    assert cpu.enter() is ExitReason.HLT
    assert cpu.register("rbx") == 1
    assert cpu.register("dr6") & 0xF == 1
    assert cpu.quad(KERNEL_STACK - 40) == CODE + 1
    assert cpu.engine.rflags & FLAGS_RF == 0
    assert cpu.register("rip") == CODE + 3


def test_rf_lasts_for_one_instruction() -> None:
    # push SS, RSP, RF, CS, RIP; iretq; nop; nop; int 0x42
    cpu = LongCpu(
        "6a10 6800800000 6802000100 6a08 6815100000 48cf"  # to CODE + 0x15, right behind
        "90 cd42",
        HALTS,
    )
    assert cpu.enter(budget=6) is ExitReason.PREEMPTION_TIMER
    assert cpu.register("rip") == CODE + 0x15
    assert cpu.engine.rflags & FLAGS_RF
    assert cpu.enter() is ExitReason.HLT
    assert cpu.vector == 0x42
    assert not cpu.frame()["rflags"] & FLAGS_RF


def test_pushf_stores_no_rf() -> None:
    # As above; nop; pushfq; hlt, all entered once.
    cpu = LongCpu("6a10 6800800000 6802000100 6a08 6815100000 48cf 90 9c f4", HALTS)
    assert cpu.enter() is ExitReason.HLT
    assert cpu.stack(1) == [2]


def test_rf_is_in_the_frame_of_an_interrupt_right_behind_iret() -> None:
    cpu = LongCpu("90 90 90", HALTS)
    cpu.set_registers(rflags=2 | FLAGS_RF | FLAGS_IF)
    assert cpu.enter(IRQ) is ExitReason.HLT
    assert cpu.frame()["rflags"] & FLAGS_RF
    cpu = LongCpu("90 90 90", HALTS)
    cpu.set_registers(rflags=2 | FLAGS_RF | FLAGS_IF)
    assert cpu.enter(budget=1) is ExitReason.PREEMPTION_TIMER
    assert not cpu.engine.rflags & FLAGS_RF
    assert cpu.enter(IRQ) is ExitReason.HLT
    assert not cpu.frame()["rflags"] & FLAGS_RF


@either_engine
@pytest.mark.parametrize("ring", [0, 3])
def test_single_step(ring: int, exact: bool) -> None:
    cpu = LongCpu("90 90 ebfe", {DB: "48ffc3 48cf"}, ring=ring, exact=exact)  # inc rbx; iretq
    cpu.set_registers(rflags=2 | FLAGS_TF, rbx=0)
    assert cpu.enter(budget=3 * 5) is ExitReason.PREEMPTION_TIMER
    assert cpu.register("rbx") == 5
    assert cpu.register("dr6") & 1 << 14


# ---- REP in 64-bit code -------------------------------------------------------------------------


@either_engine
@pytest.mark.parametrize(
    ("code", "count", "rounds"),
    [
        pytest.param("f348ab", 5, 5, id="rep stosq"),
        pytest.param("f3aa", 1 << 32, 100, id="a count of more than 32 bits"),
        pytest.param("67f3aa", 1 << 32 | 3, 3, id="a32 rep stosb"),
        pytest.param("f348a5", 0, 1, id="rep movsq with nothing to do"),
    ],
)
@pytest.mark.parametrize("budget", [1, 3, 100])
def test_rep_rounds(code: str, count: int, rounds: int, budget: int, exact: bool) -> None:
    cpu = LongCpu(code + "f4", exact=exact)
    cpu.set_registers(rcx=count, rdi=DATA_PAGE, rsi=DATA_PAGE)
    total = 0
    while total < 100 and cpu.enter(budget=min(budget, 100 - total)) is not ExitReason.HLT:
        total += cpu.engine.retired
    if rounds < 100:
        assert total + cpu.engine.retired == rounds + 1
    else:
        assert (total, cpu.register("rcx")) == (100, count - 100)
