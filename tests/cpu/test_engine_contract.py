"""The engine contract, one body for every engine that runs without /dev/kvm.

Each guest exists twice: as machine code (bytes with their assembly beside them) and as a generator.
"""

import functools
import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from engine_machine import (
    CODE,
    HANDLERS,
    IRQ,
    MMIO,
    MSR,
    NMI,
    PLENTY,
    VECTOR,
    Guest,
    Machine,
    protected_mode,
)
from long_machine import PDPT, PML4, long_mode

from kvmtick.abi import HostError
from kvmtick.abi.exits import Exit, ExitIrqWindowOpen, ExitShutdown
from kvmtick.cpu.engine import CPU_MSRS, Engine, ExitReason, Interruptibility
from kvmtick.cpu.hostkvm import HostKvm
from kvmtick.cpu.scripted import (
    At,
    Cli,
    Cpuid,
    Cr8Read,
    Cr8Write,
    Hlt,
    In,
    MmioRead,
    MmioWrite,
    MovSs,
    Out,
    Pause,
    Program,
    Rdmsr,
    Rdtsc,
    ScriptedEngine,
    Spin,
    Sti,
    Vmcall,
    Wrmsr,
)
from kvmtick.cpu.unicorn import UnicornEngine
from kvmtick.kvm import Kvm
from kvmtick.kvm.kernel import KernelVm

JOIN_S = 30

Build = Callable[[Guest], Machine]


any_engine = pytest.mark.parametrize(
    "build", ["unicorn", "blocks", "scripted", "kvm"], indirect=True
)
"""What holds for an engine that is not exact, too: nothing in between two blocks is looked at."""

REFUSES = "its accesses cannot be refused"
BUDGET = "it counts no instructions, so a budget bounds nothing"
KICK = "a kick before KVM_RUN gives the event back, undelivered"
CPUID_BEFORE = "what CPUID answers is asked for before the first entry"
HYPERCALLS = "KVM answers hypercalls"
CR8_WITHIN = "within an entry CR8 is KVM's"
PAUSES_UNSEEN = "KVM tells user space of no PAUSE"
EXCEPTIONS = "a kick behind an access finds its exception undelivered"
REGISTERS = "KVM refuses addresses that are not canonical"


def any_but_kvm(why: str) -> pytest.MarkDecorator:
    """What holds for any engine but a real CPU."""
    skipped = pytest.param("kvm", marks=pytest.mark.skip(reason=f"a vCPU of /dev/kvm: {why}"))
    engines = ["unicorn", "blocks", "scripted", skipped]
    return pytest.mark.parametrize("build", engines, indirect=True)


class HostMachine(Machine):
    """A real CPU asks for CPUID and CR8 when it enters the guest, not when the guest does; without
    RDTSCP it has no TSC_AUX."""

    def cr8_read(self, retired: int) -> int:
        return 0

    def cpuid(self, function: int, index: int) -> tuple[int, int, int, int]:
        answers = {0: (1, 0, 0, 0), 0x8000_0000: (0x8000_0001, 0, 0, 0)}
        rdtscp_long_mode_nx_syscall = 1 << 27 | 1 << 29 | 1 << 20 | 1 << 11
        answers[0x8000_0001] = 0, 0, 0, rdtscp_long_mode_nx_syscall
        return answers.get(function, (0, 0, 0, 0))

    def enter(self, intr_info: int = 0, **how: Any) -> ExitReason:
        stop = threading.Timer(JOIN_S, self.engine.kick)  # a bound for the test, never the cause
        stop.start()
        try:
            return super().enter(intr_info, **how)
        finally:
            stop.cancel()


def _host_kvm() -> HostKvm:
    """A VM of /dev/kvm; a skip that says why where there is none."""
    try:
        return HostKvm()
    except HostError as error:
        pytest.skip(f"needs /dev/kvm: {error}")


def host_has_rdtscp() -> bool:
    with Kvm("kernel") as system:
        leaves = {leaf.function: leaf for leaf in system.get_supported_cpuid()}
    return bool(leaves[0x8000_0001].edx >> 27 & 1)


# What this host's KVM may do otherwise, tried by its own calls: the engine has no part in it.


def _ends_with(code: str, **area: int) -> Exit:
    """How a guest of real mode leaves a vCPU without an irqchip."""
    with KernelVm(ram_bytes=1 << 20) as vm:
        vm.write_memory(0, b"\xf4")  # hlt, where the vectors that nobody set lead to
        vm.write_memory(CODE, bytes.fromhex(code))
        vcpu = vm.create_vcpu(0)
        vcpu.start_at(0, CODE, {"rsp": CODE})
        for name, value in area.items():
            setattr(vcpu.area, name, value)
        return vcpu.run(JOIN_S)


@functools.cache
def windows_come_at_once() -> bool:
    """A window that is asked for opens behind the shadow of STI (SDM 3C, 26.2)."""
    # sti; nop; nop; hlt
    return _ends_with("fb 90 90 f4", request_interrupt_window=1) == ExitIrqWindowOpen()


@functools.cache
def ivt_has_a_limit() -> bool:
    """An interrupt beyond the IDTR's limit ends in a triple fault (SDM 3A, 21.1.4)."""
    # lidt [0x1100] (zeros: no vector is inside the limit); int 0x40; hlt
    return _ends_with("0f011e0011 cd40 f4") == ExitShutdown()


def _needs(holds: Callable[[], bool], why: str, request: pytest.FixtureRequest) -> None:
    if request.node.callspec.params["build"] == "kvm":
        _host_kvm().close()
        if not holds():
            pytest.skip(f"this host's KVM {why}")


@pytest.fixture
def windows_at_once(request: pytest.FixtureRequest) -> None:
    """Skip where KVM cannot show it."""
    _needs(windows_come_at_once, "looks for windows once in many instructions only", request)


@pytest.fixture
def limit_of_the_ivt(request: pytest.FixtureRequest) -> None:
    """Skip where KVM cannot show it."""
    _needs(ivt_has_a_limit, "looks at no limit of the IVT", request)


@pytest.fixture(params=["unicorn", "scripted"])
def build(request: pytest.FixtureRequest) -> Iterator[Build]:
    machines = []

    def make(guest: Guest) -> Machine:
        if request.param == "kvm":
            machines.append(HostMachine(_host_kvm()(), guest))
        elif request.param == "scripted":
            handlers = {vector: routine for vector, (_, routine) in guest.handlers.items()}
            machines.append(Machine(ScriptedEngine(guest.routine, handlers), guest))
        else:
            machines.append(Machine(UnicornEngine(exact=request.param == "unicorn"), guest))
        return machines[-1]

    yield make
    for machine in machines:
        machine.engine.close()


def nothing() -> Program:
    yield from ()


IRET = ("cf", nothing)  # iret


def halt() -> Program:
    yield Hlt()


def spin() -> Program:
    while True:
        yield Spin(1000)


HALT = Guest("f4", halt)  # hlt
SPIN = Guest("ebfe", spin)  # jmp $


def test_is_an_engine(build: Build) -> None:
    engine: Engine = build(HALT).engine  # for the type checker
    assert engine.name in ("unicorn", "scripted")
    assert engine.exact
    assert engine.error == ""


@any_engine
def test_hlt_counts_and_stops_behind_itself(build: Build) -> None:
    def routine() -> Program:
        yield Spin(2)
        yield Hlt()
        yield Spin(3)
        yield Hlt()

    # nop; nop; hlt; nop; nop; nop; hlt
    machine = build(Guest("9090f4 909090f4", routine))
    assert machine.enter() is ExitReason.HLT
    assert machine.engine.retired == machine.counted(3)
    assert machine.enter() is ExitReason.HLT
    assert machine.engine.retired == machine.counted(4)
    assert machine.engine.interruptibility == 0
    assert not machine.interrupts_enabled


def test_out_gives_port_size_value_and_time(build: Build) -> None:
    def routine() -> Program:
        yield Spin(1)
        yield Out(0x43, 0x34)
        yield Spin(1)
        yield Out(0x40, 0x1234, 2)
        yield Spin(2)
        yield Out(0xCF8, 0x8000_0004, 4)
        yield Hlt()

    machine = build(
        Guest(
            "b034"  # mov al, 0x34
            "e643"  # out 0x43, al
            "b83412"  # mov ax, 0x1234
            "e740"  # out 0x40, ax
            "baf80c"  # mov dx, 0xcf8
            "66b804000080"  # mov eax, 0x80000004
            "66ef"  # out dx, eax
            "f4",  # hlt
            routine,
        )
    )
    assert machine.enter() is ExitReason.HLT
    assert machine.accesses == [
        ("out", 0x43, 1, 0x34, 1),
        ("out", 0x40, 2, 0x1234, 3),
        ("out", 0xCF8, 4, 0x8000_0004, 6),
    ]
    assert machine.engine.retired == 8


@pytest.mark.parametrize(
    ("size_bytes", "code"),
    [
        # in al, 0x61; out 0x80, al; hlt - then the same with ax and eax
        (1, "e461 e680 f4"),
        (2, "e561 e780 f4"),
        (4, "66e561 66e780 f4"),
    ],
)
def test_in_gives_the_guest_what_the_handler_returns(
    build: Build, size_bytes: int, code: str
) -> None:
    def routine() -> Program:
        value = yield In(0x61, size_bytes)
        yield Out(0x80, value, size_bytes)
        yield Hlt()

    machine = build(Guest(code, routine))
    machine.input = 0xFEDC_BA98
    assert machine.enter() is ExitReason.HLT
    value = machine.input & ((1 << 8 * size_bytes) - 1)
    assert machine.accesses == [
        ("in", 0x61, size_bytes, machine.input, 0),
        ("out", 0x80, size_bytes, value, 1),
    ]


def test_retired_starts_anew_at_each_entry(build: Build) -> None:
    def routine() -> Program:
        yield Spin(3)
        yield Out(0x80, 0)
        yield Hlt()

    machine = build(Guest("909090 e680 f4", routine))  # nop; nop; nop; out 0x80, al; hlt
    assert machine.enter(budget=2) is ExitReason.PREEMPTION_TIMER
    assert machine.enter() is ExitReason.HLT
    assert machine.accesses == [("out", 0x80, 1, 0, 1)]
    assert machine.engine.retired == 3


@pytest.mark.parametrize("budget", [1, 2, 3, 999, 1000, 1001, 12_345])
def test_the_budget_is_exact(build: Build, budget: int) -> None:
    machine = build(SPIN)
    assert machine.enter(budget=budget) is ExitReason.PREEMPTION_TIMER
    assert machine.engine.retired == budget


def count_and_out() -> Program:
    yield Spin(1 + 100 * 3 + 99 + 1)
    yield Out(0x80, 100)
    yield Hlt()


COUNT_AND_OUT = Guest(
    "b96400"  # mov cx, 100
    "40"  # again: inc ax
    "49"  # dec cx
    "7402"  # jz done
    "ebfa"  # jmp again
    "90"  # done: nop
    "e680"  # out 0x80, al
    "f4",  # hlt
    count_and_out,
)


@pytest.mark.parametrize("slices", [(PLENTY,), (1,), (2,), (3, 1), (7, 1, 2), (100,), (401, 1)])
def test_slices_do_not_change_the_run(build: Build, slices: tuple[int, ...]) -> None:
    machine = build(COUNT_AND_OUT)
    total = 0
    for budget in itertools.cycle(slices):
        reason = machine.enter(budget=budget, tsc=total)
        total += machine.engine.retired
        if reason is ExitReason.HLT:
            break
        assert reason is ExitReason.PREEMPTION_TIMER
        assert machine.engine.retired == budget
        assert total < PLENTY
    assert total == 1 + 100 * 3 + 99 + 1 + 2
    assert [access[:4] for access in machine.accesses] == [("out", 0x80, 1, 100)]


@any_engine
def test_hlt_beats_the_budget_it_ends_with(build: Build) -> None:
    machine = build(HALT)
    assert machine.enter(budget=1) is ExitReason.HLT
    assert machine.engine.retired == machine.counted(1)


def sti_spin_hlt() -> Program:
    yield Sti()
    yield Spin(2)
    yield Hlt()


def eoi() -> Program:
    yield Spin(1)
    yield Out(0x20, 0x20)


# mov al, 0x20; out 0x20, al; iret
EOI = ("b020 e620 cf", eoi)
STI_SPIN_HLT = Guest("fb 9090 f4", sti_spin_hlt, {VECTOR: EOI, 2: EOI})  # sti; nop; nop; hlt


def hlt_loop() -> Program:
    yield Sti()
    while True:
        yield Hlt()
        yield Spin(1)


HLT_LOOP = Guest("fb f4 ebfd", hlt_loop, {VECTOR: EOI, 2: EOI})  # sti; again: hlt; jmp again


def test_a_tick(build: Build) -> None:
    machine = build(HLT_LOOP)
    assert machine.enter() is ExitReason.HLT
    assert machine.engine.retired == 2
    for _ in range(100):
        assert machine.enter(IRQ) is ExitReason.HLT
        assert machine.engine.retired == 5  # mov, out, iret, jmp, hlt
    assert machine.accesses == [("out", 0x20, 1, 0x20, 1)] * 100


def test_injection_clears_if_and_iret_restores_it(build: Build) -> None:
    machine = build(HLT_LOOP)
    assert machine.enter() is ExitReason.HLT
    assert machine.interrupts_enabled
    assert machine.enter(IRQ, budget=1) is ExitReason.PREEMPTION_TIMER
    assert machine.engine.retired == 1
    assert not machine.interrupts_enabled
    assert machine.enter(budget=2) is ExitReason.PREEMPTION_TIMER
    assert machine.interrupts_enabled


@any_but_kvm(KICK)
def test_a_kick_before_entry_finds_the_event_delivered(build: Build) -> None:
    machine = build(HLT_LOOP)
    machine.enter()
    machine.engine.kick()
    assert machine.enter(IRQ) is ExitReason.EXTERNAL_INTERRUPT
    assert machine.engine.retired == 0
    assert not machine.interrupts_enabled
    assert machine.enter() is ExitReason.HLT
    assert machine.engine.retired == 5


@any_but_kvm(BUDGET)
def test_irq_window_opens_behind_the_shadow_of_sti(build: Build) -> None:
    machine = build(STI_SPIN_HLT)
    assert machine.enter(budget=1) is ExitReason.PREEMPTION_TIMER
    assert machine.interrupts_enabled
    assert machine.engine.interruptibility == Interruptibility.STI
    assert machine.enter(irq_window=True) is ExitReason.INTERRUPT_WINDOW
    assert machine.engine.retired == 1
    assert machine.engine.interruptibility == 0
    assert machine.enter(irq_window=True) is ExitReason.INTERRUPT_WINDOW
    assert machine.engine.retired == 0


@any_engine
@pytest.mark.usefixtures("windows_at_once")
def test_irq_window_waits_for_sti(build: Build) -> None:
    def routine() -> Program:
        yield Spin(5)
        yield Sti()
        yield Spin(2)
        yield Hlt()

    machine = build(Guest("9090909090 fb 9090 f4", routine))  # 5 nop; sti; 2 nop; hlt
    assert machine.enter(irq_window=True) is ExitReason.INTERRUPT_WINDOW
    assert machine.engine.retired == machine.counted(7)


@any_but_kvm(BUDGET)
def test_irq_window_stays_closed_without_if(build: Build) -> None:
    machine = build(SPIN)
    assert machine.enter(irq_window=True, budget=500) is ExitReason.PREEMPTION_TIMER
    assert machine.engine.retired == 500


@any_engine
def test_cli_closes_the_window(build: Build) -> None:
    def routine() -> Program:
        yield Sti()
        yield Cli()
        yield Spin(1)
        yield Hlt()

    machine = build(Guest("fb fa 90 f4", routine))  # sti; cli; nop; hlt
    assert machine.enter(irq_window=True) is ExitReason.HLT
    assert machine.engine.retired == machine.counted(4)
    assert not machine.interrupts_enabled


def test_sti_hlt_halts_and_opens_the_window(build: Build) -> None:
    machine = build(HLT_LOOP)
    assert machine.enter(irq_window=True) is ExitReason.HLT
    assert machine.engine.retired == 2
    assert machine.engine.interruptibility == 0
    assert machine.interrupts_enabled
    assert machine.enter(IRQ) is ExitReason.HLT
    assert machine.accesses == [("out", 0x20, 1, 0x20, 1)]


def mov_ss() -> Program:
    yield Sti()
    yield Spin(1)
    yield MovSs()
    yield Spin(2)
    yield Hlt()


MOV_SS = Guest("fb 31c0 8ed0 9090 f4", mov_ss)  # sti; xor ax, ax; mov ss, ax; nop; nop; hlt


@any_but_kvm(BUDGET)
def test_mov_ss_casts_a_shadow(build: Build) -> None:
    machine = build(MOV_SS)
    assert machine.enter(budget=3) is ExitReason.PREEMPTION_TIMER
    assert machine.engine.interruptibility == Interruptibility.MOV_SS
    assert machine.enter(irq_window=True, nmi_window=True) is ExitReason.NMI_WINDOW
    assert machine.engine.retired == 1
    assert machine.engine.interruptibility == 0


@any_but_kvm(BUDGET)
@pytest.mark.parametrize("shadow", [Interruptibility.STI, Interruptibility.MOV_SS])
def test_a_shadow_that_was_set_holds_for_one_instruction(
    build: Build, shadow: Interruptibility
) -> None:
    machine = build(STI_SPIN_HLT)
    assert machine.enter(budget=2) is ExitReason.PREEMPTION_TIMER
    machine.engine.set_interruptibility(shadow)
    assert machine.engine.interruptibility == shadow
    machine.engine.kick()
    assert machine.enter(irq_window=True) is ExitReason.EXTERNAL_INTERRUPT
    assert machine.engine.interruptibility == shadow
    assert machine.enter(irq_window=True, nmi_window=True) is ExitReason.NMI_WINDOW
    assert machine.engine.retired == 1
    assert machine.engine.interruptibility == 0


@any_but_kvm(BUDGET)
def test_a_shadow_can_be_taken_away(build: Build) -> None:
    machine = build(STI_SPIN_HLT)
    assert machine.enter(budget=1) is ExitReason.PREEMPTION_TIMER
    machine.engine.set_interruptibility(0)
    assert machine.enter(irq_window=True) is ExitReason.INTERRUPT_WINDOW
    assert machine.engine.retired == 0


def test_an_nmi_in_service_that_was_set_blocks_until_iret(build: Build) -> None:
    machine = build(HLT_LOOP)
    machine.enter()
    assert machine.enter(IRQ, budget=1) is ExitReason.PREEMPTION_TIMER
    machine.engine.set_interruptibility(Interruptibility.NMI)
    machine.engine.kick()
    assert machine.enter(nmi_window=True) is ExitReason.EXTERNAL_INTERRUPT
    assert machine.engine.interruptibility == Interruptibility.NMI
    assert machine.enter(nmi_window=True) is ExitReason.NMI_WINDOW
    assert machine.engine.interruptibility == 0
    machine.engine.set_interruptibility(Interruptibility.NMI)
    machine.engine.set_interruptibility(0)
    assert machine.enter(nmi_window=True) is ExitReason.NMI_WINDOW
    assert machine.engine.retired == 0


@any_engine
@pytest.mark.parametrize("state", [3, 4, 16, 1 << 32])
def test_no_other_interruptibility_can_be_set(build: Build, state: int) -> None:
    machine = build(HALT)
    with pytest.raises(ValueError, match=f"no such interruptibility: {state}"):
        machine.engine.set_interruptibility(state)
    assert machine.engine.interruptibility == 0


def test_nmi_blocks_nmis_until_iret(build: Build) -> None:
    machine = build(HLT_LOOP)
    machine.enter()
    assert machine.enter(NMI, budget=2) is ExitReason.PREEMPTION_TIMER
    assert machine.engine.interruptibility == Interruptibility.NMI
    assert not machine.interrupts_enabled
    assert machine.accesses == [("out", 0x20, 1, 0x20, 1)]
    assert machine.enter(irq_window=True, nmi_window=True) is ExitReason.NMI_WINDOW
    assert machine.engine.retired == 1  # the iret
    assert machine.engine.interruptibility == 0
    assert machine.interrupts_enabled


@any_engine
@pytest.mark.usefixtures("windows_at_once")
def test_any_iret_ends_nmi_blocking(build: Build) -> None:
    def nmi_handler() -> Program:
        yield Sti()
        yield Spin(3)

    # sti; nop; nop; nop; iret
    handlers = {2: ("fb 909090 cf", nmi_handler), VECTOR: IRET}
    machine = build(Guest("fb f4 ebfd", hlt_loop, handlers))
    machine.enter()
    assert machine.enter(NMI, irq_window=True) is ExitReason.INTERRUPT_WINDOW
    assert machine.engine.interruptibility == Interruptibility.NMI
    assert machine.enter(IRQ, nmi_window=True) is ExitReason.NMI_WINDOW
    assert machine.engine.retired == machine.counted(1)


@any_engine
def test_nmi_window_is_open_at_once_and_needs_no_if(build: Build) -> None:
    machine = build(SPIN)
    assert machine.enter(nmi_window=True) is ExitReason.NMI_WINDOW
    assert machine.engine.retired == 0


def test_order_at_one_boundary(build: Build) -> None:
    def routine() -> Program:
        yield Sti()
        yield Spin(1)
        yield Out(0x80, 0)
        yield from spin()

    # sti; nop; out 0x80, al; jmp $
    machine = build(Guest("fb 90 e680 ebfe", routine))
    assert machine.enter(budget=2) is ExitReason.PREEMPTION_TIMER
    machine.on_out = lambda port: machine.engine.kick()
    # One boundary behind the OUT: kick, both windows and the budget.
    assert machine.enter(budget=1) is ExitReason.EXTERNAL_INTERRUPT
    assert machine.engine.retired == 1
    machine.engine.kick()
    both = {"irq_window": True, "nmi_window": True, "budget": 1}
    assert machine.enter(**both) is ExitReason.EXTERNAL_INTERRUPT  # type: ignore[arg-type]
    assert machine.engine.retired == 0
    assert machine.enter(**both) is ExitReason.NMI_WINDOW  # type: ignore[arg-type]
    assert machine.enter(irq_window=True, budget=1) is ExitReason.INTERRUPT_WINDOW
    assert machine.enter(budget=1) is ExitReason.PREEMPTION_TIMER
    assert machine.engine.retired == 1


def outs() -> Program:
    while True:
        yield Spin(1)
        yield Out(0x80, 0)
        yield Spin(1)


OUTS = Guest("90 e680 ebfb", outs)  # again: nop; out 0x80, al; jmp again


def test_a_kick_in_a_handler_ends_behind_that_instruction(build: Build) -> None:
    machine = build(OUTS)
    machine.on_out = lambda port: machine.engine.kick()
    assert machine.enter() is ExitReason.EXTERNAL_INTERRUPT
    assert machine.engine.retired == 2
    for _ in range(10):
        assert machine.enter() is ExitReason.EXTERNAL_INTERRUPT
        assert machine.engine.retired == 3
    assert len(machine.accesses) == 11


FAR_SEGMENT = "b8ffff 8ed8"  # mov ax, 0xffff; mov ds, ax: offset 0x10 is MMIO


def mmio_accesses() -> Program:
    yield Spin(2)
    for size_bytes, value in ((1, 0x78), (2, 0x5678), (4, 0x1234_5678)):
        yield MmioWrite(MMIO + 0x20, value, size_bytes)
    for size_bytes in (1, 2, 4):
        value = yield MmioRead(MMIO + 0x30, size_bytes)
        yield Out(0x80, value, size_bytes)
    yield Hlt()


MMIO_ACCESSES = Guest(
    FAR_SEGMENT + "a23000"  # mov [0x30], al
    "a33000"  # mov [0x30], ax
    "66a33000"  # mov [0x30], eax
    "a04000 e680"  # mov al, [0x40]; out 0x80, al
    "a14000 e780"  # mov ax, [0x40]; out 0x80, ax
    "66a14000 66e780"  # mov eax, [0x40]; out 0x80, eax
    "f4",  # hlt
    mmio_accesses,
)


def test_mmio_gives_address_size_value_and_time(build: Build) -> None:
    def routine() -> Program:
        yield Spin(1)
        yield from mmio_accesses()

    # mov eax, 0x12345678 first; bx for the segment
    code = "66b878563412 bbffff 8edb" + MMIO_ACCESSES.code.removeprefix(FAR_SEGMENT)
    machine = build(Guest(code, routine))
    machine.input = 0xFEDC_BA98_7654_3210
    assert machine.enter() is ExitReason.HLT
    assert machine.accesses == [
        ("mmio write", MMIO + 0x20, 1, 0x78, 3),
        ("mmio write", MMIO + 0x20, 2, 0x5678, 4),
        ("mmio write", MMIO + 0x20, 4, 0x1234_5678, 5),
        ("mmio read", MMIO + 0x30, 1, 6),
        ("out", 0x80, 1, 0x10, 7),
        ("mmio read", MMIO + 0x30, 2, 8),
        ("out", 0x80, 2, 0x3210, 9),
        ("mmio read", MMIO + 0x30, 4, 10),
        ("out", 0x80, 4, 0x7654_3210, 11),
    ]
    assert machine.engine.retired == 13


@any_engine
def test_mmio_without_handlers_reads_all_ones_and_loses_writes(build: Build) -> None:
    machine = build(MMIO_ACCESSES)
    machine.attach_ports_only()
    assert machine.enter() is ExitReason.HLT
    assert [access[:4] for access in machine.accesses] == [
        ("out", 0x80, 1, 0xFF),
        ("out", 0x80, 2, 0xFFFF),
        ("out", 0x80, 4, 0xFFFF_FFFF),
    ]


def mmio_stores() -> Program:
    yield Spin(2)
    while True:
        yield MmioWrite(MMIO, 0xFF, 1)
        yield Spin(1)


MMIO_STORES = Guest(FAR_SEGMENT + "a21000 ebfb", mmio_stores)  # again: mov [0x10], al; jmp again


@pytest.mark.parametrize("release_gil", [False, True])
def test_a_kick_in_an_mmio_write_ends_behind_the_store(build: Build, release_gil: bool) -> None:
    machine = build(MMIO_STORES)
    machine.engine.release_gil(release_gil)
    machine.on_out = lambda gpa: machine.engine.kick()
    assert machine.enter() is ExitReason.EXTERNAL_INTERRUPT
    assert machine.engine.retired == 3
    assert machine.accesses == [("mmio write", MMIO, 1, 0xFF, 2)]
    for _ in range(10):
        assert machine.enter() is ExitReason.EXTERNAL_INTERRUPT
        assert machine.engine.retired == 2
        assert machine.accesses.pop() == ("mmio write", MMIO, 1, 0xFF, 1)
        assert len(machine.accesses) == 1


def test_an_interrupt_asked_for_in_an_mmio_write_comes_behind_the_store(build: Build) -> None:
    # A self-IPI: the write kicks, the next entry delivers.
    def routine() -> Program:
        yield Sti()
        yield Spin(2)
        yield MmioWrite(MMIO, 0xFF, 1)
        yield Hlt()

    # sti; ...; mov [0x10], al; hlt
    machine = build(Guest("fb" + FAR_SEGMENT + "a21000 f4", routine, {VECTOR: EOI}))
    machine.on_out = lambda gpa: machine.engine.kick() if gpa == MMIO else None
    assert machine.enter() is ExitReason.EXTERNAL_INTERRUPT
    assert machine.enter(IRQ) is ExitReason.HLT
    assert machine.engine.retired == 3 + 1
    assert machine.accesses == [("mmio write", MMIO, 1, 0xFF, 3), ("out", 0x20, 1, 0x20, 1)]


def msr_accesses() -> Program:
    yield Spin(3)
    yield Wrmsr(MSR, 0x1234_5678_9ABC_DEF0)
    value = yield Rdmsr(MSR)
    yield Out(0x80, value & 0xFFFF_FFFF, 4)
    yield Spin(1)
    yield Out(0x80, value >> 32, 4)
    yield Hlt()


MSR_ACCESSES = Guest(
    "66b930080000"  # mov ecx, 0x830
    "66ba78563412"  # mov edx, 0x12345678
    "66b8f0debc9a"  # mov eax, 0x9abcdef0
    "0f30"  # wrmsr
    "0f32"  # rdmsr
    "66e780"  # out 0x80, eax
    "6692"  # xchg eax, edx
    "66e780"  # out 0x80, eax
    "f4",  # hlt
    msr_accesses,
)


@pytest.mark.parametrize("release_gil", [False, True])
def test_msrs_give_index_value_and_time(build: Build, release_gil: bool) -> None:
    machine = build(MSR_ACCESSES)
    machine.engine.release_gil(release_gil)
    machine.input = 0xFEDC_BA98_7654_3210
    assert machine.enter() is ExitReason.HLT
    assert machine.accesses == [
        ("wrmsr", MSR, 0x1234_5678_9ABC_DEF0, 3),
        ("rdmsr", MSR, 4),
        ("out", 0x80, 4, 0x7654_3210, 5),
        ("out", 0x80, 4, 0xFEDC_BA98, 7),
    ]
    assert machine.engine.retired == 9


@any_engine
@pytest.mark.parametrize("index", sorted(CPU_MSRS))
def test_the_msrs_of_the_cpu_do_not_reach_the_handlers(build: Build, index: int) -> None:

    def routine() -> Program:
        yield Spin(1)
        yield Rdmsr(index)
        yield Hlt()

    # mov ecx, index; rdmsr; hlt
    machine = build(Guest(f"66b9{index.to_bytes(4, 'little').hex()} 0f32 f4", routine))
    if machine.engine.real_time and CPU_MSRS[index] == "tsc_aux" and not host_has_rdtscp():
        pytest.skip("this host's KVM offers no RDTSCP, and so no TSC_AUX")
    assert machine.enter() is ExitReason.HLT
    assert machine.accesses == []
    assert machine.engine.retired == machine.counted(3)


@pytest.mark.parametrize("index", [0, 0x10, 0x1B, 0x277, 0x6E0, 0x800, 0xC000_0104, 0xFFFF_FFFF])
def test_the_msrs_that_reach_the_handlers(build: Build, index: int) -> None:
    def routine() -> Program:
        yield Spin(1)
        yield Rdmsr(index)
        yield Hlt()

    machine = build(Guest(f"66b9{index.to_bytes(4, 'little').hex()} 0f32 f4", routine))
    assert machine.enter() is ExitReason.HLT
    assert machine.accesses == [("rdmsr", index, 1)]


def test_a_kick_in_wrmsr_ends_behind_it(build: Build) -> None:
    machine = build(MSR_ACCESSES)
    machine.on_out = lambda index: machine.engine.kick() if index == MSR else None
    assert machine.enter() is ExitReason.EXTERNAL_INTERRUPT
    assert machine.engine.retired == 4
    assert machine.enter() is ExitReason.EXTERNAL_INTERRUPT
    assert machine.engine.retired == 1
    assert machine.enter() is ExitReason.HLT
    assert [access[0] for access in machine.accesses] == ["wrmsr", "rdmsr", "out", "out"]


def refused() -> Program:
    yield Out(0x99, 0x99)


# The handler: mov al, 0x99; out 0x99, al; pop bx; inc bx; inc bx; push bx; iret: it steps over
REFUSED = ("b099 e699 5b 4343 53 cf", refused)


@any_engine
@pytest.mark.parametrize("handlers", [True, False], ids=["refused", "no handler attached"])
def test_a_refused_msr_access_is_a_general_protection(build: Build, handlers: bool) -> None:
    machine = build(Guest(MSR_ACCESSES.code, msr_accesses, {13: REFUSED}))
    machine.refused_msrs = {MSR}
    if not handlers:
        machine.attach_ports_only()
    assert machine.enter() is ExitReason.HLT
    log = [access[:2] for access in machine.accesses]
    wrmsr, rdmsr = ([("wrmsr", MSR)], [("rdmsr", MSR)]) if handlers else ([], [])
    assert log == [*wrmsr, ("out", 0x99), *rdmsr, ("out", 0x99), ("out", 0x80), ("out", 0x80)]


@any_but_kvm(EXCEPTIONS)
def test_a_general_protection_in_an_sti_shadow_ends_the_shadow(build: Build) -> None:
    def routine() -> Program:
        yield Spin(1)
        yield Sti()
        yield Wrmsr(MSR, 0)
        yield Hlt()

    # mov ecx, 0x830; sti; wrmsr; hlt
    machine = build(Guest("66b930080000 fb 0f30 f4", routine, {13: REFUSED}))
    machine.refused_msrs = {MSR}
    machine.on_out = lambda index: machine.engine.kick() if index == MSR else None
    assert machine.enter() is ExitReason.EXTERNAL_INTERRUPT
    assert machine.engine.retired == machine.counted(3)
    assert not machine.interrupts_enabled
    assert machine.engine.interruptibility == 0


def test_a_refused_msr_access_that_nothing_handles_is_a_triple_fault(build: Build) -> None:
    def routine() -> Program:
        yield Spin(2)
        yield Wrmsr(MSR, 0)
        yield Hlt()

    # lidt [0x1100] (zeros); mov ecx, 0x830; wrmsr; hlt
    machine = build(Guest("0f011e0011 66b930080000 0f30 f4", routine))
    machine.refused_msrs = {MSR}
    assert machine.enter() is ExitReason.TRIPLE_FAULT
    assert machine.engine.retired == 3


def cpuid() -> Program:
    yield Spin(2)
    answer = yield Cpuid(0x40, 7)
    for shift in (0, 32, 64, 96):
        yield Out(0x80, answer >> shift & 0xFFFF_FFFF, 4)
        yield Spin(1)
    yield Hlt()


CPUID = Guest(
    "66b840000000 66b907000000"  # mov eax, 0x40; mov ecx, 7
    "0fa2"  # cpuid
    "66e780 6693 66e780 6691 66e780 6692 66e780"  # out 0x80, eax; xchg eax, ebx; out; ecx; edx
    "90 f4",  # nop; hlt
    cpuid,
)


@any_but_kvm(CPUID_BEFORE)
def test_cpuid_answers_what_the_handler_says(build: Build) -> None:
    machine = build(CPUID)
    assert machine.enter() is ExitReason.HLT
    assert machine.accesses[0] == ("cpuid", 0x40, 7)
    values = [access[3] for access in machine.accesses[1:]]
    assert values == [0x41, 0xBBBB_BBBB, 7, 0xFFFF_FFFF]


def hypercall() -> Program:
    yield Spin(1)
    yield Out(0x80, (yield Vmcall()))
    yield Hlt()


HYPERCALL = Guest("b001 0f01c1 e680 f4", hypercall)  # mov al, 1; vmcall; out 0x80, al; hlt


def test_a_hypercall_gets_its_answer_in_rax(build: Build) -> None:
    machine = build(HYPERCALL)
    machine.engine.set_registers({"rax": 1})
    assert machine.enter() is ExitReason.HLT
    assert machine.accesses == [("hypercall", 1, 1), ("out", 0x80, 1, 0x5A, 2)]


@any_but_kvm(HYPERCALLS)
def test_a_hypercall_without_a_handler_is_an_invalid_opcode(build: Build) -> None:
    def invalid_opcode() -> Program:
        yield Out(0x81, 6)
        yield Hlt()

    # mov al, 6; out 0x81, al; hlt
    handlers = {6: ("b006 e681 f4", invalid_opcode)}
    machine = build(HYPERCALL._replace(handlers=handlers))
    machine.attach_ports_only()
    assert machine.enter() is ExitReason.HLT
    assert [access[:4] for access in machine.accesses] == [("out", 0x81, 1, 6)]


@any_engine
def test_cpuid_without_a_handler_reads_0(build: Build) -> None:
    machine = build(CPUID)
    machine.attach_ports_only()
    assert machine.enter() is ExitReason.HLT
    assert [access[3] for access in machine.accesses] == [0, 0, 0, 0]


def enter_long_mode(machine: Machine) -> None:
    """CR8 is in 64-bit mode only. One page of 1 GiB, no IDT."""
    machine.ram[PML4 : PML4 + 8] = (PDPT | 7).to_bytes(8, "little")
    machine.ram[PDPT : PDPT + 8] = (0x87).to_bytes(8, "little")
    machine.engine.set_registers(long_mode(CODE, 0) | {"idtr_limit": 0})


def cr8_accesses() -> Program:
    yield Spin(1)
    yield Cr8Write(11)
    value = yield Cr8Read()
    yield Out(0x80, value)
    yield Hlt()


# mov eax, 11; mov cr8, rax; mov rax, cr8; out 0x80, al; hlt
CR8_ACCESSES = Guest("b80b000000 440f22c0 440f20c0 e680 f4", cr8_accesses)


@pytest.mark.parametrize("release_gil", [False, True])
def test_cr8_gives_value_and_time(build: Build, release_gil: bool) -> None:
    machine = build(CR8_ACCESSES)
    machine.engine.release_gil(release_gil)
    enter_long_mode(machine)
    machine.input = 7
    assert machine.enter() is ExitReason.HLT
    assert machine.accesses == [("cr8 write", 11, 1), ("cr8 read", 2), ("out", 0x80, 1, 7, 3)]
    assert machine.engine.retired == 5


def test_cr8_without_handlers_reads_0(build: Build) -> None:
    machine = build(CR8_ACCESSES)
    machine.attach_ports_only()
    enter_long_mode(machine)
    assert machine.enter() is ExitReason.HLT
    assert machine.accesses == [("out", 0x80, 1, 0, 3)]


@any_but_kvm(CR8_WITHIN)
def test_a_kick_in_a_write_of_cr8_ends_behind_it(build: Build) -> None:
    machine = build(CR8_ACCESSES)
    enter_long_mode(machine)
    machine.on_out = lambda value: machine.engine.kick() if value == 11 else None
    assert machine.enter() is ExitReason.EXTERNAL_INTERRUPT
    assert machine.engine.retired == 2
    assert machine.enter() is ExitReason.HLT


@any_but_kvm(CR8_WITHIN)
@pytest.mark.parametrize(("value", "asked"), [(11, 1), (16, 0)], ids=["refused", "reserved bits"])
def test_writes_of_cr8_that_are_general_protections(build: Build, value: int, asked: int) -> None:
    def routine() -> Program:
        yield Spin(1)
        yield Cr8Write(value)
        yield Hlt()

    machine = build(Guest(f"b8{value:02x}000000 440f22c0 f4", routine))
    enter_long_mode(machine)
    machine.refused_priorities = {11}
    assert machine.enter() is ExitReason.TRIPLE_FAULT  # there is no IDT
    assert machine.engine.retired == 2
    assert len(machine.accesses) == asked


@any_but_kvm(CR8_WITHIN)
def test_an_exception_of_cr8s_handler_ends_enter(build: Build) -> None:
    machine = build(CR8_ACCESSES)
    enter_long_mode(machine)
    machine.on_out = fail
    with pytest.raises(DeviceError):
        machine.enter()
    assert machine.engine.retired == 2
    machine.on_out = lambda value: None
    assert machine.enter() is ExitReason.HLT


def pauses() -> Program:
    while True:
        yield Spin(1)
        yield Pause()
        yield Spin(1)


PAUSES = Guest("90 f390 ebfb", pauses)  # again: nop; pause; jmp again


@any_but_kvm(PAUSES_UNSEEN)
def test_pause_ends_an_entry_when_asked(build: Build) -> None:
    machine = build(PAUSES)
    assert machine.enter(budget=100) is ExitReason.PREEMPTION_TIMER
    machine.engine.reset(0, CODE)
    machine.engine.exit_on_pause(True)
    assert machine.enter() is ExitReason.PAUSE
    assert machine.engine.retired == 2
    for _ in range(10):
        assert machine.enter() is ExitReason.PAUSE
        assert machine.engine.retired == 3
    machine.engine.exit_on_pause(False)
    assert machine.enter(budget=100) is ExitReason.PREEMPTION_TIMER
    assert machine.engine.retired == 100


@any_but_kvm(PAUSES_UNSEEN)
def test_pause_is_retired_when_it_ends_an_entry(build: Build) -> None:
    machine = build(PAUSES)
    machine.engine.exit_on_pause(True)
    assert machine.enter(budget=2) is ExitReason.PAUSE
    machine.engine.kick()
    assert machine.enter() is ExitReason.EXTERNAL_INTERRUPT
    assert machine.engine.retired == 0
    assert machine.enter(budget=1) is ExitReason.PREEMPTION_TIMER


def steps() -> Program:
    for number in range(4):
        yield At(CODE + number)
        yield Spin(1)
    yield At(CODE + 4)
    yield Hlt()


STEPS = Guest("90909090 f4", steps)  # 4 nop; hlt


def test_a_breakpoint_stops_before_its_instruction(build: Build) -> None:
    machine = build(STEPS)
    machine.engine.set_breakpoints([CODE + 4, CODE + 2])
    assert machine.enter() is ExitReason.BREAKPOINT
    assert machine.engine.retired == 2
    assert machine.engine.registers()["rip"] == CODE + 2
    # No exception for the first instruction of an entry.
    assert machine.enter() is ExitReason.BREAKPOINT
    assert machine.engine.retired == 0
    machine.engine.set_breakpoints([CODE + 4])
    assert machine.enter() is ExitReason.BREAKPOINT
    assert machine.engine.retired == 2
    machine.engine.set_breakpoints(())
    assert machine.enter() is ExitReason.HLT
    assert machine.engine.retired == 1


def test_a_breakpoint_comes_last_at_a_boundary(build: Build) -> None:
    machine = build(STEPS)
    machine.engine.set_registers({"rflags": 0x202})
    machine.engine.set_breakpoints({CODE})
    machine.engine.kick()
    assert machine.enter() is ExitReason.EXTERNAL_INTERRUPT
    assert machine.enter(nmi_window=True, irq_window=True) is ExitReason.NMI_WINDOW
    assert machine.enter(irq_window=True) is ExitReason.INTERRUPT_WINDOW
    assert machine.enter(budget=1) is ExitReason.BREAKPOINT
    assert machine.engine.retired == 0


def test_a_breakpoint_in_the_handler_of_an_event(build: Build) -> None:
    def handler() -> Program:
        yield At(HANDLERS)
        yield Spin(1)

    machine = build(Guest("fb f4 ebfd", hlt_loop, {VECTOR: ("90 cf", handler)}))
    assert machine.enter() is ExitReason.HLT
    machine.engine.set_breakpoints([HANDLERS])
    assert machine.enter(IRQ) is ExitReason.BREAKPOINT
    assert machine.engine.retired == 0
    assert not machine.interrupts_enabled


@any_but_kvm(BUDGET)
def test_a_kick_is_used_up_by_its_exit(build: Build) -> None:
    machine = build(SPIN)
    machine.engine.kick()
    machine.engine.kick()
    assert machine.enter(budget=5) is ExitReason.EXTERNAL_INTERRUPT
    assert machine.enter(budget=5) is ExitReason.PREEMPTION_TIMER


@any_engine
def test_a_kick_outlives_other_exits(build: Build) -> None:
    def routine() -> Program:
        yield Hlt()
        yield from spin()

    machine = build(Guest("f4 ebfe", routine))  # hlt; jmp $
    assert machine.enter() is ExitReason.HLT
    machine.engine.kick()
    assert machine.enter(budget=5) is ExitReason.EXTERNAL_INTERRUPT
    assert machine.engine.retired == 0


@any_engine
def test_a_kick_from_another_thread_ends_an_endless_loop(build: Build) -> None:
    machine = build(OUTS)
    machine.engine.release_gil(True)
    running = threading.Event()
    machine.on_out = lambda port: running.set()
    stop = threading.Timer(JOIN_S, machine.engine.kick)  # a bound for the test, never the cause
    stop.start()

    def kicker() -> None:
        running.wait()
        machine.engine.kick()

    thread = threading.Thread(target=kicker)
    thread.start()
    assert machine.enter(budget=1 << 40) is ExitReason.EXTERNAL_INTERRUPT
    assert running.is_set()
    assert stop.is_alive()
    stop.cancel()
    thread.join(JOIN_S)
    assert not thread.is_alive()


def test_rdtsc_is_tsc_plus_retired(build: Build) -> None:
    def routine() -> Program:
        yield Spin(2)
        value = yield Rdtsc()
        yield Out(0x80, value & 0xFFFF_FFFF, 4)
        yield Hlt()

    # nop; nop; rdtsc; out 0x80, eax; hlt
    machine = build(Guest("9090 0f31 66e780 f4", routine))
    assert machine.enter(tsc=0x1_0000_1000) is ExitReason.HLT
    assert machine.accesses == [("out", 0x80, 4, 0x1002, 3)]
    machine.engine.reset(0, CODE)
    assert machine.enter(tsc=50, budget=1) is ExitReason.PREEMPTION_TIMER
    assert machine.enter(tsc=51) is ExitReason.HLT
    assert machine.accesses[-1][3] == 52


@pytest.mark.parametrize("khz", [1, 999_999, 1_000_000, 2_596_122, 0xFFFF_FFFF])
def test_rdtsc_counts_at_its_rate_from_its_value(build: Build, khz: int) -> None:
    def routine() -> Program:
        yield Spin(100)
        value = yield Rdtsc()
        yield Out(0x80, value & 0xFFFF_FFFF, 4)
        yield Hlt()

    machine = build(Guest("90" * 100 + "0f31 66e780 f4", routine))
    value, at_ns, now_ns = (1 << 64) - 5, 7_000_000_123, 9_000_000_000_000
    machine.engine.set_tsc(khz, value, at_ns, live=False)
    assert machine.enter(tsc=now_ns) is ExitReason.HLT
    expected = value + (now_ns + 100 - at_ns) * khz // 1_000_000
    assert machine.accesses[0][3] == expected & 0xFFFF_FFFF


class DeviceError(Exception):
    pass


def fail(place: int) -> None:
    raise DeviceError(place)


@pytest.mark.parametrize("release_gil", [False, True])
def test_an_exception_of_a_handler_ends_enter(build: Build, release_gil: bool) -> None:
    machine = build(OUTS)
    machine.engine.release_gil(release_gil)

    machine.on_out = fail
    with pytest.raises(DeviceError):
        machine.enter()
    assert machine.engine.retired == 2
    machine.on_out = lambda port: None
    assert machine.enter(budget=4) is ExitReason.PREEMPTION_TIMER
    assert machine.accesses[-1] == ("out", 0x80, 1, 0, 2)


def test_an_exception_in_a_read(build: Build) -> None:
    def routine() -> Program:
        value = yield In(0x60)
        yield Out(0x80, value)
        yield Hlt()

    machine = build(Guest("e460 e680 f4", routine))  # in al, 0x60; out 0x80, al; hlt

    machine.on_out = fail
    with pytest.raises(DeviceError):
        machine.enter()
    assert machine.engine.retired == 1
    machine.on_out = lambda port: None
    assert machine.enter() is ExitReason.HLT
    assert machine.accesses[-1] == ("out", 0x80, 1, 0xFF, 0)


@pytest.mark.parametrize("release_gil", [False, True])
@pytest.mark.parametrize(
    ("guest", "retired"),
    [
        pytest.param(MMIO_STORES, 3, id="mmio write"),
        pytest.param(MSR_ACCESSES, 4, id="wrmsr"),
        pytest.param(CPUID, 3, id="cpuid"),
        pytest.param(HYPERCALL, 2, id="hypercall"),
    ],
)
def test_an_exception_of_any_handler_ends_enter(
    build: Build, guest: Guest, retired: int, release_gil: bool
) -> None:
    machine = build(guest)
    machine.engine.release_gil(release_gil)

    machine.on_out = fail
    with pytest.raises(DeviceError):
        machine.enter()
    assert machine.engine.retired == retired
    assert len(machine.accesses) == 1
    machine.on_out = lambda place: None
    assert machine.enter(budget=1) is ExitReason.PREEMPTION_TIMER


@pytest.mark.parametrize(
    ("code", "operation", "value"),
    [
        # mov eax, [0x10] - rdmsr
        pytest.param("66a11000", MmioRead(MMIO), 0xFFFF_FFFF, id="mmio read"),
        pytest.param("0f32", Rdmsr(MSR), 0, id="rdmsr"),
    ],
)
def test_what_a_read_gives_when_its_handler_raises(
    build: Build, code: str, operation: MmioRead | Rdmsr, value: int
) -> None:
    def routine() -> Program:
        yield Spin(3)
        answer = yield operation
        yield Out(0x80, answer, 4)
        yield Hlt()

    # ...; mov ecx, 0x830; the read; out 0x80, eax; hlt
    machine = build(Guest(f"{FAR_SEGMENT} 66b930080000 {code} 66e780 f4", routine))

    machine.on_out = fail
    with pytest.raises(DeviceError):
        machine.enter()
    assert machine.engine.retired == 4
    machine.on_out = lambda place: None
    assert machine.enter() is ExitReason.HLT
    assert machine.accesses[-1] == ("out", 0x80, 4, value, 0)


@any_engine
def test_a_handler_may_not_enter_its_engine(build: Build) -> None:
    machine = build(OUTS)
    machine.on_out = lambda port: void(machine.enter())
    with pytest.raises(RuntimeError):
        machine.enter()


def void(value: object) -> None:
    pass


def test_two_engines_do_not_disturb_each_other(build: Build) -> None:
    first, second = build(COUNT_AND_OUT), build(OUTS)
    second.on_out = lambda port: second.engine.kick()
    total = 0
    while (reason := first.enter(budget=17)) is ExitReason.PREEMPTION_TIMER:
        total += first.engine.retired
        assert second.enter() is ExitReason.EXTERNAL_INTERRUPT
    assert reason is ExitReason.HLT
    assert total + first.engine.retired == 403
    assert first.accesses[0][3] == 100
    assert len(second.accesses) == 403 // 17


@any_engine
def test_an_engine_runs_inside_a_handler_of_another(build: Build) -> None:
    inner = build(HLT_LOOP)
    inner.enter()
    outer = build(HLT_LOOP)
    outer.enter()
    outer.on_out = lambda port: void(inner.enter(IRQ))
    for _ in range(20):
        assert outer.enter(IRQ) is ExitReason.HLT
        assert outer.engine.retired == outer.counted(5)
    assert len(inner.accesses) == len(outer.accesses) == 20


@any_but_kvm(BUDGET)
def test_runs_repeat(build: Build) -> None:
    def run() -> tuple[list[object], bytes]:
        machine = build(HLT_LOOP)
        log: list[object] = [machine.enter(), machine.engine.retired]
        for tick in range(50):
            intr_info = NMI if tick % 7 == 0 else IRQ
            for budget in (1 + tick % 4, PLENTY):
                reason = machine.enter(intr_info, budget=budget, tsc=tick)
                engine = machine.engine
                log += [reason, engine.retired, engine.rflags, engine.interruptibility]
                intr_info = 0
                if reason is ExitReason.HLT:
                    break
        return log + list(machine.accesses), bytes(machine.ram)

    assert run() == run()


@any_engine
def test_host_tsc_runs_by_itself(build: Build) -> None:
    def routine() -> Program:
        while True:
            value = yield Rdtsc()
            yield Out(0x80, value & 0xFFFF_FFFF, 4)
            yield Hlt()

    machine = build(Guest("0f31 66e780 f4 ebf8", routine))  # again: rdtsc; out; hlt; jmp again
    machine.engine.set_tsc(machine.engine.tsc_khz, 0, 0, live=True)
    machine.enter(tsc=5)
    machine.enter(tsc=5)
    first, second = (access[3] for access in machine.accesses)
    assert 0 < (second - first) % (1 << 32) < 60 * 10**9 % (1 << 32) + (1 << 31)


SEGMENTS = ("es", "cs", "ss", "ds", "fs", "gs", "ldtr", "tr")
REGISTER_NAMES = {
    *("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "rip", "rflags"),
    *(f"r{number}" for number in range(8, 16)),
    *(name + part for name in SEGMENTS for part in ("", "_base", "_limit", "_access")),
    *("gdtr_base", "gdtr_limit", "idtr_base", "idtr_limit"),
    *("cr0", "cr2", "cr3", "cr4", "dr0", "dr1", "dr2", "dr3", "dr6", "dr7"),
    *CPU_MSRS.values(),
}


@any_engine
def test_registers(build: Build) -> None:
    machine = build(SPIN)
    registers = machine.engine.registers()
    assert registers.keys() == REGISTER_NAMES
    assert registers["rip"] == CODE
    assert registers["rflags"] == 2
    machine.engine.set_registers({"rsi": 0x1234_5678_9ABC, "rflags": 0x202})
    assert machine.engine.rflags == 0x202
    assert machine.engine.registers() == registers | {"rsi": 0x1234_5678_9ABC, "rflags": 0x202}
    assert machine.enter(irq_window=True) is ExitReason.INTERRUPT_WINDOW


def odd_registers() -> dict[str, int]:
    """A value for each register that no other has, as far as its bits go."""
    values = {name: 0x1234_5678_9ABC_0000 + 7 * i for i, name in enumerate(sorted(REGISTER_NAMES))}
    for i, name in enumerate(SEGMENTS):
        values |= {name: 8 * i + 3, f"{name}_limit": 0xF_0000 + i, f"{name}_access": 0xA093 | i}
    for name in ("gdtr_limit", "idtr_limit", "sysenter_cs", "cr3"):
        values[name] &= 0xFFFF
    return values | {
        "rflags": 0x46,
        "cr0": 0x8001_0033,
        "cr4": 0x0006_06B0,
        "efer": 0x0D01,
        "dr6": 0xFFFF_4FF1,
        "dr7": 0x400,
        "tsc_aux": 0x1234,
    }


@any_but_kvm(REGISTERS)
def test_set_registers_takes_them_all(build: Build) -> None:
    machine = build(HALT)
    before = machine.engine.registers()
    values = odd_registers()
    machine.engine.set_registers(values)
    assert machine.engine.registers() == values
    # What was read can be written: the guest goes on as if nothing had been.
    machine.engine.set_registers(before)
    assert machine.engine.registers() == before
    assert machine.enter() is ExitReason.HLT


@any_engine
def test_set_registers_writes_all_or_nothing(build: Build) -> None:
    machine = build(HALT)
    before = machine.engine.registers()
    with pytest.raises(ValueError, match="xyz"):
        machine.engine.set_registers({"rax": 1, "xyz": 2, "rbx": 3})
    assert machine.engine.registers() == before


@any_engine
def test_a_selector_alone_loads_no_descriptor(build: Build) -> None:
    machine = build(HALT)
    before = machine.engine.registers()
    machine.engine.set_registers({"ds": 0x1234})
    assert machine.engine.registers() == before | {"ds": 0x1234}


@any_engine
def test_protected_mode(build: Build) -> None:
    machine = build(HALT)
    machine.engine.set_registers(protected_mode(CODE))
    registers = machine.engine.registers()
    assert registers["rip"] == CODE
    assert registers["cr0"] & 0x8000_0001 == 1  # protected mode without paging
    assert machine.enter() is ExitReason.HLT
    assert machine.engine.retired == machine.counted(1)
    # reset leaves nothing of it behind.
    machine.engine.reset(0, CODE)
    assert machine.engine.registers()["cr0"] & 1 == 0
    assert machine.enter() is ExitReason.HLT


@any_engine
def test_misuse(build: Build) -> None:
    machine = build(SPIN)
    with pytest.raises(ValueError, match="budget"):
        machine.enter(budget=0)
    machine.engine.close()
    machine.engine.close()
    with pytest.raises(RuntimeError, match="closed"):
        machine.enter()


def test_no_handler_attached() -> None:
    for engine in (UnicornEngine(), ScriptedEngine(halt)):
        with pytest.raises(ValueError, match="attach"):
            engine.enter(0, False, False, 1, 0)
        engine.close()


@any_engine
@pytest.mark.usefixtures("limit_of_the_ivt")
def test_a_vector_nobody_handles_is_a_triple_fault(build: Build) -> None:
    def routine() -> Program:
        yield Sti()
        yield Spin(1)
        yield Hlt()

    # sti; lidt [0x1100] (zeros: no vector is inside the limit); hlt
    machine = build(Guest("fb 0f011e0011 f4", routine))
    assert machine.enter() is ExitReason.HLT
    assert machine.enter(IRQ) is ExitReason.TRIPLE_FAULT
    assert machine.engine.retired == 0
    machine.engine.reset(0, CODE)
    assert machine.enter() is ExitReason.HLT
    assert machine.engine.retired == machine.counted(3)


def test_scripted_reports_an_injection_cut_short() -> None:
    engine = ScriptedEngine(hlt_loop, {VECTOR: eoi})
    machine = Machine(engine, HLT_LOOP)
    machine.enter()
    engine.cut_short(2)
    for _ in range(2):
        assert machine.enter(IRQ) is ExitReason.EXTERNAL_INTERRUPT
        assert engine.idt_vectoring_info == IRQ
        assert engine.retired == 0
        assert machine.interrupts_enabled
    assert machine.enter(engine.idt_vectoring_info) is ExitReason.HLT
    assert engine.idt_vectoring_info == 0
    assert machine.accesses == [("out", 0x20, 1, 0x20, 1)]


# ---- refused accesses ----------------------------------------------------------------------------


@any_but_kvm(REFUSES)
def test_a_refused_access_leaves_before_the_instruction(build: Build) -> None:
    def routine() -> Program:
        yield Spin(1)
        yield Out(0x40, (yield In(0x61)))
        yield Hlt()

    machine = build(Guest("90 e461 e640 f4", routine))  # nop; in al, 0x61; out 0x40, al; hlt
    machine.on_out = lambda port: machine.engine.refuse()
    assert machine.enter() is ExitReason.ACCESS
    if machine.engine.exact:
        assert machine.engine.retired == 1
    assert [access[0] for access in machine.accesses] == ["in"]
    machine.on_out = lambda port: None
    machine.input = 0x77
    assert machine.enter(budget=1) is ExitReason.PREEMPTION_TIMER
    assert machine.engine.retired == 1
    machine.accesses.clear()
    assert machine.enter() is ExitReason.HLT
    assert [access[:4] for access in machine.accesses] == [("out", 0x40, 1, 0x77)]


@any_but_kvm(REFUSES)
def test_a_refused_write_happens_when_it_is_let_through(build: Build) -> None:
    def routine() -> Program:
        yield Out(0x40, 0)
        yield Hlt()

    machine = build(Guest("e640 f4", routine))  # out 0x40, al; hlt
    machine.on_out = lambda port: machine.engine.refuse()
    for _ in range(3):
        assert machine.enter() is ExitReason.ACCESS
    machine.on_out = lambda port: None
    assert machine.enter() is ExitReason.HLT
    assert len(machine.accesses) == 4


def test_a_refused_access_keeps_the_shadow(build: Build) -> None:
    def routine() -> Program:
        yield Sti()
        yield In(0x61)
        yield Hlt()

    machine = build(Guest("fb e461 f4", routine, {VECTOR: IRET}))  # sti; in al, 0x61; hlt
    machine.on_out = lambda port: machine.engine.refuse()
    assert machine.enter(irq_window=True) is ExitReason.ACCESS
    assert machine.engine.interruptibility == Interruptibility.STI
    assert machine.interrupts_enabled
    machine.on_out = lambda port: None
    assert machine.enter(irq_window=True) is ExitReason.INTERRUPT_WINDOW
    assert machine.engine.retired == 1
