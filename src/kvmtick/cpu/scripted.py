"""The `scripted` engine: guests that are Python generators, for unit tests and fleets.

A guest routine yields one typed operation per instruction. Delivering an event suspends the running
routine and starts the handler of the vector; the end of the handler is its IRET. What follows the
engine contract follows the same parts of the Intel SDM as a real CPU would: STI and MOV SS shadows
(vol. 2B, STI; vol. 3A, 7.8.3), NMI blocking until IRET (vol. 3A, 7.7.1), RFLAGS.IF cleared on
delivery (vol. 3A, 7.12.1), IDT-vectoring information (vol. 3C, 26.9.3).

    def main() -> Program:
        yield Sti()
        while True:
            yield Hlt()

    def tick() -> Program:
        yield Out(0x20, 0x20)

    engine = ScriptedEngine(main, {0x20: tick})

A refused access to an MSR or to CR8 is #GP: it starts the handler of vector 13, and counts as an
instruction. When the handler ends, the routine goes on behind the access.

No code is at an address, but a routine may say where its next instruction would be (`At`): RIP
tells it, and a breakpoint there stops before that instruction.

Not modelled: registers other than RFLAGS (the others can be written and read, nothing uses them),
guest memory (a routine that wants some keeps the `mmap` itself; `MmioWrite` and `MmioRead` always
go to the handlers), code in RAM, stack, error codes, exceptions other than that
#GP, software interrupts of the guest itself, SYSCALL, string I/O; MSRs that handlers do not answer
read 0 and lose writes. An IRET restores the whole RFLAGS that delivery pushed; a routine cannot
change what was pushed.
"""

from collections.abc import Callable, Collection, Generator, Mapping
from ctypes import Array, c_char
from mmap import mmap
from typing import TypeAlias

from kvmtick.cpu import engine as contract
from kvmtick.cpu.engine import (
    CPU_MSRS,
    INTR_INFO_VALID,
    RESET_REGISTERS,
    EventType,
    ExitReason,
    Interruptibility,
    PortIn,
    PortOut,
    pack_exit,
)
from kvmtick.irqchip.lapic_timer import GUEST_TSC_KHZ
from kvmtick.timing.clock import MonotonicClock

__all__ = [
    "At",
    "Cli",
    "Cpuid",
    "Cr8Read",
    "Cr8Write",
    "Hlt",
    "In",
    "MmioRead",
    "MmioWrite",
    "MovSs",
    "Operation",
    "Out",
    "Pause",
    "Program",
    "Rdmsr",
    "Rdtsc",
    "Routine",
    "ScriptedEngine",
    "Spin",
    "Sti",
    "Vmcall",
    "Wrmsr",
]

FLAGS_FIXED = 1 << 1
FLAGS_IF = 1 << 9
NMI_VECTOR = 2
UD_VECTOR = 6
GP_VECTOR = 13

EXIT_EXTERNAL_INTERRUPT = int(ExitReason.EXTERNAL_INTERRUPT)
EXIT_TRIPLE_FAULT = int(ExitReason.TRIPLE_FAULT)
EXIT_INTERRUPT_WINDOW = int(ExitReason.INTERRUPT_WINDOW)
EXIT_NMI_WINDOW = int(ExitReason.NMI_WINDOW)
EXIT_HLT = int(ExitReason.HLT)
EXIT_PAUSE = int(ExitReason.PAUSE)
EXIT_BREAKPOINT = int(ExitReason.BREAKPOINT)
EXIT_ACCESS = int(ExitReason.ACCESS)
EXIT_PREEMPTION_TIMER = int(ExitReason.PREEMPTION_TIMER)
NS_PER_MS = 1_000_000
SHADOW_STI = int(Interruptibility.STI)
SHADOW_MOV_SS = int(Interruptibility.MOV_SS)
SHADOW_NMI = int(Interruptibility.NMI)


class Out:
    """OUT: writes `value` to `port`."""

    __slots__ = ("port", "size_bytes", "value")

    def __init__(self, port: int, value: int, size_bytes: int = 1) -> None:
        self.port = port
        self.value = value
        self.size_bytes = size_bytes


class In:
    """IN: the `yield` returns what `port` gave."""

    __slots__ = ("port", "size_bytes")

    def __init__(self, port: int, size_bytes: int = 1) -> None:
        self.port = port
        self.size_bytes = size_bytes


class MmioWrite:
    """MOV to memory that is no RAM: writes `value` at guest-physical `gpa`."""

    __slots__ = ("gpa", "size_bytes", "value")

    def __init__(self, gpa: int, value: int, size_bytes: int = 4) -> None:
        self.gpa = gpa
        self.value = value
        self.size_bytes = size_bytes


class MmioRead:
    """MOV from memory that is no RAM: the `yield` returns what is at guest-physical `gpa`."""

    __slots__ = ("gpa", "size_bytes")

    def __init__(self, gpa: int, size_bytes: int = 4) -> None:
        self.gpa = gpa
        self.size_bytes = size_bytes


class Wrmsr:
    """WRMSR: writes the 64 bits `value`."""

    __slots__ = ("index", "value")

    def __init__(self, index: int, value: int) -> None:
        self.index = index
        self.value = value


class Rdmsr:
    """RDMSR: the `yield` returns the 64 bits, 0 after #GP."""

    __slots__ = ("index",)

    def __init__(self, index: int) -> None:
        self.index = index


class Cr8Write:
    """MOV to CR8: writes `value`."""

    __slots__ = ("value",)

    def __init__(self, value: int) -> None:
        self.value = value


class Cr8Read:
    """MOV from CR8: the `yield` returns the task priority."""

    __slots__ = ()


class Cpuid:
    """CPUID: the `yield` returns EAX | EBX << 32 | ECX << 64 | EDX << 96."""

    __slots__ = ("function", "index")

    def __init__(self, function: int, index: int = 0) -> None:
        self.function = function
        self.index = index


class Vmcall:
    """VMCALL: the `yield` returns what RAX becomes, 0 after #UD."""

    __slots__ = ()


class At:
    """No instruction: the next one is at the linear `address`."""

    __slots__ = ("address",)

    def __init__(self, address: int) -> None:
        self.address = address


class Spin:
    """`instructions` (> 0) plain instructions; budget and windows may divide them."""

    __slots__ = ("instructions",)

    def __init__(self, instructions: int) -> None:
        self.instructions = instructions


class Hlt:
    """HLT: wait for an event."""

    __slots__ = ()


class Pause:
    """PAUSE: a turn of a loop that waits for another CPU."""

    __slots__ = ()


class Cli:
    """CLI: clear RFLAGS.IF."""

    __slots__ = ()


class Sti:
    """STI: set RFLAGS.IF; when it was clear, interrupts wait one more instruction."""

    __slots__ = ()


class MovSs:
    """MOV SS: interrupts and NMIs wait one more instruction."""

    __slots__ = ()


class Rdtsc:
    """RDTSC: the `yield` returns the time stamp counter."""

    __slots__ = ()


Operation: TypeAlias = (
    Out
    | In
    | MmioWrite
    | MmioRead
    | Wrmsr
    | Rdmsr
    | Cr8Write
    | Cr8Read
    | Cpuid
    | Vmcall
    | At
    | Spin
    | Hlt
    | Pause
    | Cli
    | Sti
    | MovSs
    | Rdtsc
)
Program: TypeAlias = Generator[Operation, int, None]
"""A running routine. A `yield` returns 0 for operations that read nothing."""
Routine: TypeAlias = Callable[[], Program]


class _Frame:
    """A routine that was started: the running one, or one that an event interrupted."""

    __slots__ = ("address", "again", "answer", "interrupted_rflags", "program", "spin_left")

    def __init__(self, program: Program, interrupted_rflags: int) -> None:
        self.program = program
        self.interrupted_rflags = interrupted_rflags
        self.answer: int | None = None  # a generator must be started with None
        self.spin_left = 0
        self.address: int | None = None  # of the next instruction, as far as `At` said
        self.again: Operation | None = None  # its access was refused


class ScriptedEngine:
    """The engine contract (`kvmtick.cpu.engine.Engine`) over generator guests.

    `guest` is the program `reset` starts; when it ends the guest executes HLT for ever. `handlers`
    holds the interrupt vectors; an event whose vector has none is a triple fault.
    """

    def __init__(self, guest: Routine, handlers: Mapping[int, Routine] | None = None) -> None:
        self.name = "scripted"
        self.cr4_bits = (1 << 64) - 1
        self.exact = True
        self.real_time = False
        self.has_deadline = False
        self.deadline_ns = 0
        self.tsc_khz = GUEST_TSC_KHZ
        self.read_tsc = None
        self.rflags = FLAGS_FIXED
        self.interruptibility = 0
        self.retired = 0
        self.idt_vectoring_info = 0
        self.entry_error_code = 0
        self.error = ""
        self.rounds = 1
        self._exits_on_pause = False
        self._guest = guest
        self._handlers = dict(handlers or {})
        self._on_out: PortOut | None = None
        self._on_in: PortIn | None = None
        self._on_mmio_write: contract.MmioWrite | None = None
        self._on_mmio_read: contract.MmioRead | None = None
        self._on_wrmsr: contract.MsrWrite | None = None
        self._on_rdmsr: contract.MsrRead | None = None
        self._on_cpuid: contract.Cpuid | None = None
        self._on_cr8_write: contract.Cr8Write | None = None
        self._on_cr8_read: contract.Cr8Read | None = None
        self._on_hypercall: contract.Hypercall | None = None
        self._breakpoints: frozenset[int] = frozenset()
        self._registers = dict(RESET_REGISTERS)
        self._kicked = False
        self._refused = False
        self._running = False
        self._closed = False
        self._cuts_left = 0
        self._tsc = 0
        self._guest_tsc = (GUEST_TSC_KHZ, 0, 0, False)
        self._frames = [_Frame(guest(), FLAGS_FIXED)]

    @property
    def last_exit(self) -> int:
        """`pack_exit` of what the last exit left."""
        return pack_exit(self.rflags, self.interruptibility, self.retired, self.idt_vectoring_info)

    def attach(
        self,
        on_out: PortOut,
        on_in: PortIn,
        on_mmio_write: contract.MmioWrite | None = None,
        on_mmio_read: contract.MmioRead | None = None,
        on_wrmsr: contract.MsrWrite | None = None,
        on_rdmsr: contract.MsrRead | None = None,
        on_cpuid: contract.Cpuid | None = None,
        on_cr8_write: contract.Cr8Write | None = None,
        on_cr8_read: contract.Cr8Read | None = None,
        on_hypercall: contract.Hypercall | None = None,
    ) -> None:
        self._on_out = on_out
        self._on_in = on_in
        self._on_mmio_write = on_mmio_write
        self._on_mmio_read = on_mmio_read
        self._on_wrmsr = on_wrmsr
        self._on_rdmsr = on_rdmsr
        self._on_cpuid = on_cpuid
        self._on_cr8_write = on_cr8_write
        self._on_cr8_read = on_cr8_read
        self._on_hypercall = on_hypercall

    def map_ram(
        self, gpa: int, ram: mmap | Array[c_char], *, writable: bool = True, shared: bool = False
    ) -> None:
        """Nothing: no guest code is in RAM."""

    def unmap_ram(self, gpa: int) -> None:
        """Nothing."""

    def ram_written(self, gpa: int, size_bytes: int) -> None:
        """Nothing."""

    def forget_changed_code(self) -> None:
        """Nothing."""

    def release_gil(self, enabled: bool) -> None:
        """Nothing: other threads run between instructions anyway."""

    def cut_short(self, injections: int) -> None:
        """Let the next `injections` event deliveries fail half-way.

        Such an entry executes nothing and exits with `EXTERNAL_INTERRUPT` and the event in
        `idt_vectoring_info`, for the vCPU to inject again (SDM vol. 3C, 26.9.3 and 29.2.4).
        """
        self._cuts_left = injections

    def reset(self, cs: int, ip: int) -> None:
        self._registers = dict(RESET_REGISTERS)
        self._registers.update(cs=cs, cs_base=cs << 4, rip=ip)
        self._frames = [_Frame(self._guest(), FLAGS_FIXED)]
        self.rflags = FLAGS_FIXED
        self.interruptibility = 0
        self.retired = 0
        self.idt_vectoring_info = 0

    def kick(self) -> None:
        self._kicked = True

    def refuse(self) -> None:
        self._refused = True

    def exit_on_pause(self, enabled: bool) -> None:
        self._exits_on_pause = enabled

    def set_breakpoints(self, addresses: Collection[int]) -> None:
        self._breakpoints = frozenset(addresses)

    def set_tsc(self, khz: int, value: int, at_ns: int, live: bool) -> None:
        self._guest_tsc = (khz, value, at_ns, live)

    @property
    def rip(self) -> int:
        return self._registers["rip"]

    def registers(self) -> dict[str, int]:
        return {**self._registers, "rflags": self.rflags}

    def set_registers(self, values: Mapping[str, int]) -> None:
        unknown = sorted(values.keys() - RESET_REGISTERS.keys() - {"rflags"})
        if unknown:
            raise ValueError(f"no such register: {unknown[0]}")
        self._registers.update(values)
        self.rflags = self._registers.pop("rflags", self.rflags) | FLAGS_FIXED

    def set_interruptibility(self, state: int) -> None:
        shadows = state & (SHADOW_STI | SHADOW_MOV_SS)
        if state & ~SHADOW_NMI != shadows or shadows == SHADOW_STI | SHADOW_MOV_SS:
            raise ValueError(f"no such interruptibility: {state}")
        self.interruptibility = state

    def close(self) -> None:
        self._closed = True
        self._frames.clear()

    def enter(
        self, intr_info: int, irq_window: bool, nmi_window: bool, budget: int, tsc: int
    ) -> int:
        self._check_entry(budget)
        self.retired = 0
        self.idt_vectoring_info = 0
        self._tsc = tsc
        if intr_info & INTR_INFO_VALID:
            reason = self._deliver(intr_info)
            if reason is not None:
                return reason
        self._running = True
        try:
            return self._run(irq_window, nmi_window, budget)
        finally:
            self._running = False

    def _check_entry(self, budget: int) -> None:
        if self._closed or self._running:
            raise RuntimeError("the engine is closed" if self._closed else "the guest runs")
        if self._on_out is None:
            raise ValueError("attach() must precede the first enter()")
        if budget <= 0:
            raise ValueError("the budget must be positive")

    def _deliver(self, intr_info: int) -> int | None:
        """Start the handler of the event; returns an exit reason when that does not work."""
        if self._cuts_left:
            self._cuts_left -= 1
            self.idt_vectoring_info = intr_info
            return EXIT_EXTERNAL_INTERRUPT
        kind = (intr_info >> 8) & 7
        vector = intr_info & 0xFF
        if kind in (1, 7) or (kind == EventType.NMI and vector != NMI_VECTOR):
            raise ValueError(f"no such event: {intr_info:#x}")
        handler = self._handlers.get(vector)
        if handler is None:
            return EXIT_TRIPLE_FAULT
        self._start_handler(handler)
        if kind == EventType.NMI:
            self.interruptibility |= SHADOW_NMI
        return None

    def _start_handler(self, handler: Routine) -> None:
        self._frames.append(_Frame(handler(), self.rflags))
        self.rflags &= ~FLAGS_IF
        self.interruptibility &= SHADOW_NMI

    def _run(self, irq_window: bool, nmi_window: bool, budget: int) -> int:
        windows = irq_window or nmi_window
        while True:
            if self._kicked:
                self._kicked = False
                return EXIT_EXTERNAL_INTERRUPT
            if windows:
                state = self.interruptibility
                if nmi_window and not state:
                    return EXIT_NMI_WINDOW
                if irq_window and self.rflags & FLAGS_IF and not state & ~SHADOW_NMI:
                    return EXIT_INTERRUPT_WINDOW
            left = budget - self.retired
            if left <= 0:
                return EXIT_PREEMPTION_TIMER
            frame = self._frames[-1]
            if frame.address is not None and frame.address in self._breakpoints:
                return EXIT_BREAKPOINT
            if frame.spin_left:
                self._spin(frame, left)
            else:
                reason = self._step(frame)
                if reason:
                    return reason

    def _spin(self, frame: _Frame, left: int) -> None:
        """As much of a spin as changes nothing that a boundary looks at."""
        frame.address = None
        count = 1 if self.interruptibility & ~SHADOW_NMI else min(frame.spin_left, left)
        frame.spin_left -= count
        self.retired += count
        self.interruptibility &= SHADOW_NMI

    def _step(self, frame: _Frame) -> int:
        """Execute one instruction; an exit reason when it has one, else 0.

        A Spin only begins, and counts nothing; neither does `At`.
        """
        operation, frame.again = frame.again, None
        if operation is None:
            try:
                operation = (
                    next(frame.program)
                    if frame.answer is None
                    else frame.program.send(frame.answer)
                )
            except StopIteration:
                return self._return(frame)
        frame.answer = 0
        kind = operation.__class__
        if kind is Spin:
            assert isinstance(operation, Spin)
            frame.spin_left = operation.instructions
            return 0
        if kind is At:
            assert isinstance(operation, At)
            frame.address = operation.address
            self._registers["rip"] = operation.address - self._registers["cs_base"]
            return 0
        address, frame.address = frame.address, None
        shadow = self.interruptibility & ~SHADOW_NMI
        self.interruptibility &= SHADOW_NMI
        self._refused = False
        try:
            reason = self._execute(frame, operation, shadow)
        finally:
            self.retired += 1
        if not self._refused:
            return reason
        self.retired -= 1
        self.interruptibility |= shadow
        frame.address, frame.again = address, operation
        return EXIT_ACCESS

    def _execute(self, frame: _Frame, operation: Operation, shadow: int) -> int:
        if isinstance(operation, Out):
            assert self._on_out is not None
            self._on_out(operation.port, operation.size_bytes, operation.value, self.retired)
        elif isinstance(operation, Hlt):
            return EXIT_HLT
        elif isinstance(operation, Pause):
            return EXIT_PAUSE if self._exits_on_pause else 0
        elif isinstance(operation, In):
            assert self._on_in is not None
            ones = (1 << (8 * operation.size_bytes)) - 1
            frame.answer = ones  # what is read when the handler raises
            frame.answer = self._on_in(operation.port, operation.size_bytes, self.retired) & ones
        elif isinstance(operation, MmioWrite):
            if self._on_mmio_write is not None:
                self._on_mmio_write(
                    operation.gpa, operation.size_bytes, operation.value, self.retired
                )
        elif isinstance(operation, MmioRead):
            self._read_mmio(frame, operation)
        elif isinstance(operation, Sti):
            if not self.rflags & FLAGS_IF and not shadow:
                self.interruptibility |= SHADOW_STI
            self.rflags |= FLAGS_IF
        elif isinstance(operation, Cli):
            self.rflags &= ~FLAGS_IF
        elif isinstance(operation, MovSs):
            if not shadow:
                self.interruptibility |= SHADOW_MOV_SS
        elif isinstance(operation, Rdtsc):
            frame.answer = self._read_tsc()
        elif isinstance(operation, Wrmsr):
            return self._wrmsr(operation)
        elif isinstance(operation, Rdmsr):
            return self._rdmsr(frame, operation)
        elif isinstance(operation, Cr8Write):
            return self._write_cr8(operation)
        elif isinstance(operation, Cr8Read):
            if self._on_cr8_read is not None:
                frame.answer = self._on_cr8_read(self.retired)
        elif isinstance(operation, Cpuid):
            if self._on_cpuid is not None:
                eax, ebx, ecx, edx = self._on_cpuid(operation.function, operation.index)
                frame.answer = eax | ebx << 32 | ecx << 64 | edx << 96
        elif isinstance(operation, Vmcall):
            if self._on_hypercall is None:
                return self._fault(UD_VECTOR)
            frame.answer = self._on_hypercall(self.retired)
        else:
            raise TypeError(f"a guest yielded {operation!r}, which is no operation")
        return 0

    def _read_mmio(self, frame: _Frame, operation: MmioRead) -> None:
        ones = (1 << (8 * operation.size_bytes)) - 1
        frame.answer = ones
        if self._on_mmio_read is not None:
            value = self._on_mmio_read(operation.gpa, operation.size_bytes, self.retired)
            frame.answer = value & ones

    def _wrmsr(self, operation: Wrmsr) -> int:
        if operation.index in CPU_MSRS:
            return 0
        on_wrmsr = self._on_wrmsr
        if on_wrmsr is not None and on_wrmsr(operation.index, operation.value, self.retired):
            return 0
        return self._general_protection()

    def _rdmsr(self, frame: _Frame, operation: Rdmsr) -> int:
        if operation.index in CPU_MSRS:
            return 0
        on_rdmsr = self._on_rdmsr
        value = None if on_rdmsr is None else on_rdmsr(operation.index, self.retired)
        if value is None:
            return self._general_protection()
        frame.answer = value
        return 0

    def _write_cr8(self, operation: Cr8Write) -> int:
        if operation.value > 15:
            return self._general_protection()
        on_cr8_write = self._on_cr8_write
        if on_cr8_write is None or on_cr8_write(operation.value, self.retired):
            return 0
        return self._general_protection()

    def _general_protection(self) -> int:
        return self._fault(GP_VECTOR)

    def _fault(self, vector: int) -> int:
        """Of the running instruction; an exit reason when nothing handles it, else 0."""
        handler = self._handlers.get(vector)
        if handler is None:
            return EXIT_TRIPLE_FAULT
        self._start_handler(handler)
        return 0

    def _read_tsc(self) -> int:
        khz, value, at_ns, live = self._guest_tsc
        now_ns = MonotonicClock().now_ns if live else self._tsc + self.retired
        return value + (now_ns - at_ns) * khz // NS_PER_MS & 0xFFFF_FFFF_FFFF_FFFF

    def _return(self, frame: _Frame) -> int:
        """A routine ended: IRET in a handler (0), HLT in the program (its exit reason)."""
        self.retired += 1
        frame.address = None
        self.interruptibility &= SHADOW_NMI
        if len(self._frames) == 1:
            return EXIT_HLT
        self._frames.pop()
        self.rflags = frame.interrupted_rflags
        self.interruptibility = 0
        return 0
