"""The `unicorn` engine in 32-bit protected mode, virtual-8086 mode and unreal mode."""

import pytest
from engine_machine import (
    CODE,
    FLAGS_IF,
    HANDLERS,
    IRQ,
    MSR,
    NMI,
    VECTOR,
    Cpu,
    flat_segment,
    write_code,
)

from kvmtick.cpu.engine import (
    INTR_INFO_DELIVER_CODE,
    INTR_INFO_VALID,
    EventType,
    ExitReason,
    Interruptibility,
)

GDT = 0x3100
IDT = 0x3800
GDTR = 0x3000
IDTR = 0x3008
STACK = 0x8000
FLAT_CODE = 0x00CF_9B00_0000_FFFF
FLAT_DATA = 0x00CF_9300_0000_FFFF
INTERRUPT_GATE = 0x8E00
LAPIC = 0xFEE0_0000
IOAPIC = 0xFEC0_0000
GP = 13


def write_table(cpu: Cpu, register: int, table: int, entries: dict[int, int]) -> None:
    """A descriptor table of 256 entries and the 6 bytes that LGDT or LIDT loads."""
    for number, descriptor in entries.items():
        cpu.ram[table + 8 * number : table + 8 * number + 8] = descriptor.to_bytes(8, "little")
    cpu.ram[register : register + 6] = (table << 16 | 8 * 256 - 1).to_bytes(6, "little")


def write_gdt(cpu: Cpu) -> None:
    write_table(cpu, GDTR, GDT, {1: FLAT_CODE, 2: FLAT_DATA})


def gate(address: int) -> int:
    return address >> 16 << 48 | INTERRUPT_GATE << 32 | 8 << 16 | address & 0xFFFF


START = (
    "0f011500300000"  # lgdt [GDTR]
    "0f011d08300000"  # lidt [IDTR]
    "bc00800000"  # mov esp, STACK
)
START_STEPS = 3


class FlatCpu(Cpu):
    """A CPU in 32-bit protected mode with an IDT, behind START and the code."""

    def __init__(self, code: str, handlers: dict[int, str] | None = None) -> None:
        super().__init__(START + code)
        write_gdt(self)
        gates = {}
        for number, (vector, text) in enumerate((handlers or {}).items()):
            gates[vector] = gate(HANDLERS + 0x100 * number)
            write_code(self.ram, HANDLERS + 0x100 * number, text)
        write_table(self, IDTR, IDT, gates)
        self.reset_protected(CODE)
        assert self.enter(budget=START_STEPS) is ExitReason.PREEMPTION_TIMER

    @property
    def eip(self) -> int:
        return self.register("rip") - CODE - len(bytes.fromhex(START))


def test_flat_segments_reach_everything() -> None:
    # mov byte [0x54321], 7; mov al, [es:0xfee00020]; mov al, [fs:0xf0000001];
    # mov [gs:0xfffff000], al
    cpu = FlatCpu("c6052143050007 26a02000e0fe 64a0010000f0 65a200f0ffff f4")
    assert cpu.enter() is ExitReason.HLT
    assert cpu.ram[0x5_4321] == 7
    assert [access[:2] for access in cpu.accesses] == [
        ("mmio read", LAPIC + 0x20),
        ("mmio read", 0xF000_0001),
        ("mmio write", 0xFFFF_F000),
    ]


def test_descriptor_tables_are_empty_after_reset() -> None:
    cpu = Cpu("66b80800 8ed8 f4")  # mov ax, 8; mov ds, ax: #GP, and no IDT
    cpu.reset_protected(CODE)
    assert cpu.enter() is ExitReason.TRIPLE_FAULT
    assert cpu.engine.retired == 2
    cpu = Cpu("0f010500400000 0f010d08400000 f4")  # sgdt [0x4000]; sidt [0x4008]; hlt
    cpu.reset_protected(CODE)
    assert cpu.enter() is ExitReason.HLT
    assert bytes(cpu.ram[0x4000:0x4010]) == bytes(16)


def test_the_stack_is_32_bits_wide_after_reset() -> None:
    cpu = Cpu("50 e800000000 f4")  # push eax; call the next; hlt
    cpu.reset_protected(CODE)
    cpu.set_registers(rsp=0x2_0002, rax=0x1234_5678)
    assert cpu.enter() is ExitReason.HLT
    assert cpu.long(0x1_FFFE) == 0x1234_5678
    assert cpu.long(0x1_FFFA) == CODE + 6
    assert cpu.register("rsp") == 0x1_FFFA


def test_reset_leaves_no_mode_behind() -> None:
    cpu = FlatCpu("fb f4", {VECTOR: "f4"})
    assert cpu.enter() is ExitReason.HLT
    write_code(cpu.ram, CODE, "b81234 668ed8 668cdb f4")  # 16-bit: mov ax, 0x3412; mov ds, ...
    cpu.engine.ram_written(CODE, 16)
    cpu.engine.reset(0, CODE)
    assert cpu.enter() is ExitReason.HLT
    assert cpu.engine.retired == 4
    assert cpu.register("rbx") & 0xFFFF == 0x3412
    # From 16-bit mode back to 32 bits.
    write_code(cpu.ram, CODE, "b878563412 f4")  # mov eax, 0x12345678; hlt
    cpu.engine.ram_written(CODE, 16)
    cpu.reset_protected(CODE)
    assert cpu.enter() is ExitReason.HLT
    assert cpu.register("rax") == 0x1234_5678
    assert cpu.engine.retired == 2


TICK = "43 e620 cf"  # inc ebx; out 0x20, al; iret


def test_interrupts_go_through_the_idt() -> None:
    cpu = FlatCpu("fb f4 ebfd", {VECTOR: TICK})  # sti; again: hlt; jmp again
    assert cpu.enter() is ExitReason.HLT
    for tick in range(1, 50):
        assert cpu.enter(IRQ) is ExitReason.HLT
        assert cpu.engine.retired == 5
        assert cpu.register("rbx") == tick
        assert cpu.register("rsp") == STACK
        assert cpu.interrupts_enabled
    assert cpu.accesses == [("out", 0x20, 1, 0, 1)] * 49


def test_injection_pushes_eflags_cs_and_eip() -> None:
    cpu = FlatCpu("f9 fb f4", {VECTOR: "f4"})  # stc; sti; hlt - hlt
    assert cpu.enter() is ExitReason.HLT
    assert cpu.enter(IRQ) is ExitReason.HLT
    assert cpu.long(STACK - 4) == FLAGS_IF | 3
    assert cpu.long(STACK - 8) == 8
    assert cpu.long(STACK - 12) == CODE + len(bytes.fromhex(START)) + 3
    assert cpu.register("rsp") == STACK - 12
    assert not cpu.interrupts_enabled


def test_the_interrupt_window_and_shadows() -> None:
    # sti; nop; mov ax, 0x10; mov ss, ax; nop; nop; hlt
    cpu = FlatCpu("fb 90 66b81000 8ed0 90 90 f4", {VECTOR: TICK})
    assert cpu.enter(irq_window=True) is ExitReason.INTERRUPT_WINDOW
    assert (cpu.eip, cpu.engine.retired) == (2, 2)
    assert cpu.enter(budget=2) is ExitReason.PREEMPTION_TIMER
    assert cpu.engine.interruptibility == Interruptibility.MOV_SS
    assert cpu.enter(irq_window=True) is ExitReason.INTERRUPT_WINDOW
    assert (cpu.eip, cpu.engine.retired) == (9, 1)
    assert cpu.enter(IRQ) is ExitReason.HLT
    assert cpu.engine.retired == 3 + 2


def test_nmi_in_hlt_blocks_nmis_until_iret() -> None:
    cpu = FlatCpu("fb f4 ebfd", {2: TICK, VECTOR: "cf"})
    assert cpu.enter() is ExitReason.HLT
    assert cpu.enter(NMI, nmi_window=True, budget=2) is ExitReason.PREEMPTION_TIMER
    assert cpu.engine.interruptibility == Interruptibility.NMI
    assert not cpu.interrupts_enabled
    assert cpu.enter(nmi_window=True, irq_window=True) is ExitReason.NMI_WINDOW
    assert cpu.engine.retired == 1
    assert cpu.engine.interruptibility == 0
    assert cpu.enter(NMI) is ExitReason.HLT
    assert cpu.engine.retired == 5


@pytest.mark.parametrize("code", ["f4 ebfd", "fa f4 ebfd"], ids=["IF as it is", "cli"])
def test_nmi_in_hlt_in_real_mode(code: str) -> None:
    cpu = Cpu(code, {2: "f4 cf"})  # again: hlt; jmp again - hlt; iret
    assert cpu.enter() is ExitReason.HLT
    assert cpu.enter(NMI) is ExitReason.HLT  # in the handler
    assert cpu.engine.interruptibility == Interruptibility.NMI
    assert cpu.enter(nmi_window=True) is ExitReason.NMI_WINDOW
    assert cpu.engine.retired == 1
    assert cpu.enter(NMI) is ExitReason.HLT
    assert cpu.engine.interruptibility == Interruptibility.NMI


# The handler: pop edx (the error code); add dword [esp], 2; iret
SKIP_2 = "5a 83042402 cf"


def test_general_protection_pushes_its_error_code() -> None:
    # mov ax, 0x1b; mov ds, ax: beyond the GDT's entries, not present
    cpu = FlatCpu("66b81b00 8ed8 f4", {GP: SKIP_2, 11: SKIP_2})
    assert cpu.enter() is ExitReason.HLT
    assert cpu.register("rdx") == 0x18
    assert cpu.register("ds") == 0x10
    assert cpu.engine.retired == 6
    assert cpu.eip == 7


@pytest.mark.parametrize("code", ["0f30", "0f32"], ids=["wrmsr", "rdmsr"])
def test_a_refused_msr_access_is_general_protection_0(code: str) -> None:
    cpu = FlatCpu(f"f9 {code} f4", {GP: SKIP_2})
    cpu.set_registers(rcx=MSR, rdx=0x5678, rax=0x1234)
    cpu.refused_msrs = {MSR}
    assert cpu.enter() is ExitReason.HLT
    assert len(cpu.accesses) == 1
    assert cpu.register("rdx") == 0
    assert cpu.register("rax") == 0x1234
    assert cpu.register("rsp") == STACK
    assert cpu.eip == 4
    assert cpu.engine.retired == 6


def test_accepted_msr_accesses() -> None:
    cpu = FlatCpu("0f30 0f32 f4")
    cpu.set_registers(rcx=0x1B, rdx=0x1, rax=0xFEE0_0900)
    cpu.input = 0x2_FEE0_0D00
    assert cpu.enter() is ExitReason.HLT
    assert cpu.accesses == [("wrmsr", 0x1B, 0x1_FEE0_0900, 0), ("rdmsr", 0x1B, 1)]
    assert (cpu.register("rdx"), cpu.register("rax")) == (2, 0xFEE0_0D00)


@pytest.mark.parametrize(
    ("vector", "code", "pushed"),
    [
        pytest.param(0x42, "90 cd42", 3, id="int n"),
        pytest.param(3, "90 cc", 2, id="int3"),
        pytest.param(6, "90 0f0b", 1, id="ud2"),
        pytest.param(0, "31db f7f3", 2, id="divide error"),
    ],
)
def test_exceptions_go_through_the_idt(vector: int, code: str, pushed: int) -> None:
    cpu = FlatCpu(code, {vector: "f4"})
    assert cpu.enter() is ExitReason.HLT
    assert cpu.register("rsp") == STACK - 12
    assert cpu.long(STACK - 12) == CODE + len(bytes.fromhex(START)) + pushed
    assert cpu.register("rip") == HANDLERS + 1


@pytest.mark.parametrize("bit_11", [0, INTR_INFO_DELIVER_CODE])
def test_an_injected_exception_pushes_the_error_code_of_the_entry(bit_11: int) -> None:
    cpu = FlatCpu("f4", {GP: "f4"})
    cpu.engine.entry_error_code = 0x8000_1234
    info = INTR_INFO_VALID | EventType.HARDWARE_EXCEPTION << 8 | GP
    assert cpu.enter(info | bit_11) is ExitReason.HLT
    assert cpu.register("rsp") == STACK - 16
    assert cpu.long(STACK - 16) == (0x8000_1234 if bit_11 else 0)


def test_a_missing_gate_is_a_double_then_a_triple_fault() -> None:
    cpu = FlatCpu("fb f4", {8: "f4"})  # a #DF handler only
    assert cpu.enter() is ExitReason.HLT
    assert cpu.enter(IRQ) is ExitReason.HLT
    assert cpu.register("rip") == HANDLERS + 1
    cpu = FlatCpu("fb f4")
    assert cpu.enter() is ExitReason.HLT
    assert cpu.enter(IRQ) is ExitReason.TRIPLE_FAULT


@pytest.mark.parametrize("budget", [1, 3, 1000])
def test_slices_in_protected_mode(budget: int) -> None:
    # mov ecx, 100; again: add eax, ecx; adc edx, 0; loop again; rep stosd (ecx = 0); hlt
    cpu = FlatCpu("b964000000 01c8 83d200 e2f9 f3ab f4")
    cpu.set_registers(rax=0xFFFF_FFF0, rdx=0, rdi=0x5000)
    total = 0
    while cpu.enter(budget=budget) is not ExitReason.HLT:
        assert cpu.engine.retired == budget
        total += budget
        assert total < 1000
    assert total + cpu.engine.retired == 1 + 300 + 1 + 1
    assert (cpu.register("rdx"), cpu.register("rax")) == (1, 5050 - 16)


UNREAL = (
    "fa"  # cli
    "0f01160030"  # lgdt [GDTR]
    "0f20c0 0c01 0f22c0"  # mov eax, cr0; or al, 1; mov cr0, eax
    "bb1000 8edb 8ec3 8ee3"  # mov bx, 0x10; mov ds, bx; mov es, bx; mov fs, bx
    "24fe 0f22c0"  # and al, 0xfe; mov cr0, eax
    "31db 8edb 8ec3 8ee3"  # xor bx, bx; mov ds, bx; mov es, bx; mov fs, bx
)
UNREAL_STEPS = 15


def unreal(code: str, handlers: dict[int, str] | None = None) -> Cpu:
    cpu = Cpu(UNREAL + code, handlers)
    write_gdt(cpu)
    assert cpu.enter(budget=UNREAL_STEPS) is ExitReason.PREEMPTION_TIMER
    assert cpu.register("cr0") & 1 == 0
    return cpu


def test_unreal_mode_reaches_mmio() -> None:
    cpu = unreal(
        "6667c705b000e0fe78563412"  # mov dword [dword 0xfee000b0], 0x12345678
        "66be2000e0fe"  # mov esi, 0xfee00020
        "66678b06"  # mov eax, [esi]
        "2667894604"  # mov [es:esi+4], ax
        "64678a4e01"  # mov cl, [fs:esi+1]
        "66bf0000c0fe 66b902000000 f36667ab"  # mov edi, 0xfec00000; mov ecx, 2; a32 rep stosd
        "f4"  # hlt
    )
    cpu.input = 0x99
    assert cpu.enter() is ExitReason.HLT
    assert cpu.accesses == [
        ("mmio write", LAPIC + 0xB0, 4, 0x1234_5678, 0),
        ("mmio read", LAPIC + 0x20, 4, 2),
        ("mmio write", LAPIC + 0x24, 2, 0x99, 3),
        ("mmio read", LAPIC + 0x21, 1, 4),
        ("mmio write", IOAPIC, 4, 0x99, 7),
        ("mmio write", IOAPIC + 4, 4, 0x99, 8),
    ]
    assert cpu.engine.retired == 10


def test_interrupts_in_unreal_mode_go_through_the_ivt() -> None:
    # sti; again: hlt; jmp again - the handler: inc bx; EOI to the LAPIC; iret
    eoi = "43 6667c705b000e0fe00000000 cf"
    cpu = unreal("fb f4 ebfd", {VECTOR: eoi, 2: eoi})
    assert cpu.enter() is ExitReason.HLT
    for tick in range(1, 20):
        assert cpu.enter(NMI if tick % 5 == 0 else IRQ) is ExitReason.HLT
        assert cpu.engine.retired == 5
        assert cpu.register("rbx") == tick
        assert cpu.engine.interruptibility == 0
        assert cpu.interrupts_enabled
    assert cpu.accesses == [("mmio write", LAPIC + 0xB0, 4, 0, 1)] * 19


def test_a_kick_in_an_unreal_store() -> None:
    cpu = unreal("6667c705b000e0fe00000000 f4")
    cpu.on_out = lambda gpa: cpu.engine.kick()
    assert cpu.enter() is ExitReason.EXTERNAL_INTERRUPT
    assert cpu.engine.retired == 1
    assert cpu.register("rip") == CODE + len(bytes.fromhex(UNREAL)) + 12
    assert len(cpu.accesses) == 1


def test_real_mode_code_above_the_first_64_kib_in_unreal_mode() -> None:
    cpu = unreal("67a078560400 f4")  # mov al, [dword 0x45678]
    cpu.ram[0x4_5678] = 0x77
    assert cpu.enter() is ExitReason.HLT
    assert cpu.register("rax") & 0xFF == 0x77


# ---- rings and virtual-8086 mode ---------------------------------------------------------------

TSS = 0x6000
RING_0_STACK = 0x9000
USER_CODE, USER_DATA, TASK = 0x1B, 0x23, 0x28
RING_3 = flat_segment("cs", USER_CODE, 0xC0FB) | flat_segment("ss", USER_DATA, 0xC0F3)
VM = 1 << 17


class RingCpu(Cpu):
    """32-bit protected mode with rings 0 and 3 and a TSS; gates for all rings, `gate_type` each."""

    def __init__(self, code: str, handlers: dict[int, str], gate_type: int = 0xEE) -> None:
        super().__init__(code)
        user = 3 << 45  # the DPL
        descriptors = {3: FLAT_CODE | user, 4: FLAT_DATA | user}
        write_table(self, GDTR, GDT, {1: FLAT_CODE, 2: FLAT_DATA, **descriptors})
        gates = {}
        for number, (vector, text) in enumerate(handlers.items()):
            address = HANDLERS + 0x40 * number
            gates[vector] = gate_type << 40 | 8 << 16 | address
            write_code(self.ram, address, text)
        write_table(self, IDTR, IDT, gates)
        self.set_long(TSS + 4, RING_0_STACK)
        self.set_long(TSS + 8, 0x10)
        self.ram[TSS + 0x66] = 0x68
        self.reset_protected(CODE)
        self.set_registers(gdtr_base=GDT, gdtr_limit=0x7FF, idtr_base=IDT, idtr_limit=0x7FF)
        self.set_registers(tr=TASK, tr_base=TSS, tr_limit=0x67, tr_access=0x8B, rsp=STACK)

    def longs(self, count: int) -> list[int]:
        top = self.register("rsp")
        return [self.long(top + 4 * i) for i in range(count)]


@pytest.mark.parametrize(
    ("vector", "code", "pushed", "error_code"),
    [
        pytest.param(0, "31c9 f7f1", 2, None, id="divide error"),  # xor ecx, ecx; div ecx
        pytest.param(1, "90 f1", 2, None, id="int1"),
        pytest.param(3, "90 cc", 2, None, id="int3"),
        pytest.param(4, "b07f 0401 ce", 5, None, id="into"),  # mov al, 127; add al, 1; into
        pytest.param(5, "31c0 622530600000", 2, None, id="bound"),  # xor eax, eax; bound esp, [..]
        pytest.param(6, "90 0f0b", 1, None, id="ud2"),
        pytest.param(6, "0f05", 0, None, id="syscall outside of long mode"),
        pytest.param(GP, "f4", 0, 0, id="hlt"),
        pytest.param(GP, "e620", 0, 0, id="out"),
        pytest.param(GP, "66b80010 8ed8", 4, 0x1000, id="selector beyond the GDT"),
    ],
)
def test_exceptions_from_ring_3_change_to_the_stack_of_the_tss(
    vector: int, code: str, pushed: int, error_code: int | None
) -> None:
    cpu = RingCpu(code, dict.fromkeys(range(20), "f4"))
    cpu.set_registers(**RING_3)
    assert cpu.enter() is ExitReason.HLT
    assert cpu.register("rip") == HANDLERS + 0x40 * vector + 1
    frame = cpu.longs(5 if error_code is None else 6)
    if error_code is not None:
        assert frame.pop(0) == error_code
    eip, cs, eflags, esp, ss = frame
    assert (eip, cs, esp, ss) == (CODE + pushed, USER_CODE, STACK, USER_DATA)
    assert bool(eflags & 1 << 16) is (vector not in (1, 3, 4))  # RF
    assert (cpu.register("cs"), cpu.register("ss")) == (8, 0x10)


@pytest.mark.parametrize("info", [IRQ, NMI], ids=["interrupt", "nmi"])
def test_an_interrupt_from_ring_3_and_iret(info: int) -> None:
    cpu = RingCpu("43 ebfd", {2: "90 cf", VECTOR: "90 cf"})  # again: inc ebx; jmp again
    cpu.set_registers(**RING_3, rflags=FLAGS_IF | 2, rbx=0)
    for _ in range(20):
        assert cpu.enter(info, budget=1) is ExitReason.PREEMPTION_TIMER
        _, cs, eflags, esp, ss = cpu.longs(5)
        assert (cs, eflags & ~0xFD, esp, ss) == (USER_CODE, FLAGS_IF | 2, STACK, USER_DATA)
        assert cpu.engine.interruptibility == (Interruptibility.NMI if info == NMI else 0)
        assert cpu.enter(budget=1 + 10) is ExitReason.PREEMPTION_TIMER
        assert cpu.engine.interruptibility == 0
        assert (cpu.register("cs"), cpu.register("rsp")) == (USER_CODE, STACK)
    assert cpu.register("rbx") == 20 * 5


def test_gates_of_16_bits() -> None:
    cpu = RingCpu("90 cd42", {0x42: "f4"}, gate_type=0xE6)
    cpu.set_registers(**RING_3)
    assert cpu.enter() is ExitReason.HLT
    assert cpu.register("rsp") == RING_0_STACK - 10
    top = cpu.register("rsp")
    words = [cpu.word(top + 2 * i) for i in range(5)]
    assert words == [CODE + 3, USER_CODE, 2, STACK, USER_DATA]


def test_a_trap_gate_leaves_if() -> None:
    cpu = RingCpu("fb 90 cd42", {0x42: "f4"}, gate_type=0xEF)
    assert cpu.enter() is ExitReason.HLT
    assert cpu.interrupts_enabled


def v8086(code: str, handlers: dict[int, str], iopl: int = 0) -> RingCpu:
    cpu = RingCpu(code, handlers)
    for name in ("es", "cs", "ss", "ds", "fs", "gs"):
        cpu.set_registers(**{name: 0, f"{name}_base": 0, f"{name}_limit": 0xFFFF})
        cpu.set_registers(**{f"{name}_access": 0xF3})
    cpu.set_registers(rflags=VM | FLAGS_IF | 2 | iopl << 12)
    return cpu


def test_an_interrupt_in_virtual_8086_mode_and_iretd() -> None:
    # inc bx; jmp $-1 - iretd, from a stack with the data segments
    cpu = v8086("43 ebfd", {VECTOR: "90 cf"})
    cpu.set_registers(ds=0x123, ds_base=0x1230, gs=0x456, gs_base=0x4560, rbx=0)
    assert cpu.enter(IRQ, budget=1) is ExitReason.PREEMPTION_TIMER
    frame = cpu.longs(9)
    assert frame[:5] == [CODE, 0, VM | FLAGS_IF | 2, STACK, 0]
    assert frame[5:] == [0, 0x123, 0, 0x456]  # ES, DS, FS, GS
    assert cpu.register("ds") == 0
    assert cpu.register("cs") == 8
    assert cpu.enter(budget=1 + 10) is ExitReason.PREEMPTION_TIMER
    assert cpu.register("rbx") == 5
    assert (cpu.register("ds"), cpu.register("gs_base")) == (0x123, 0x4560)
    assert cpu.engine.rflags & VM


@pytest.mark.parametrize("code", ["cd42", "fa", "9c", "cf", "f4"])
def test_what_virtual_8086_mode_needs_iopl_3_for(code: str) -> None:
    cpu = v8086("90" + code, {GP: "f4"})
    assert cpu.enter() is ExitReason.HLT
    assert cpu.longs(2) == [0, CODE + 1]


def test_int_n_in_virtual_8086_mode_with_iopl_3() -> None:
    cpu = v8086("90 cd42", {0x42: "f4", GP: "f4"}, iopl=3)
    assert cpu.enter() is ExitReason.HLT
    assert cpu.register("rip") == HANDLERS + 1
    assert cpu.longs(2) == [CODE + 3, 0]
