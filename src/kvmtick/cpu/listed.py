"""The `listed` engine: guests that are lists of operations, for fleets and for the chips alone.

A guest is a `Listing`: the operations of its program and of its handlers, as
`kvmtick.cpu.scripted` has them. An engine keeps nothing of its own but where it is, so thousands
share one listing:

    TICKS = Listing((Out(0x43, 0x34), ..., Sti()), {0x20: [Out(0x20, 0x20)]})
    engine = ListedEngine(TICKS)

What happens is what a `ScriptedEngine` makes of the same operations (`Listing.routine` gives it
these), HLT for ever behind the program's end included.

Not modelled, beside what the scripted engine does not: operations for whose answer a guest would
have to be code (RDTSC, RDMSR, CPUID, CR8, hypercalls), breakpoints, deliveries cut short.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from ctypes import Array, c_char
from functools import partial
from mmap import mmap
from typing import Final

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
)
from kvmtick.cpu.scripted import (
    Cli,
    Hlt,
    In,
    MmioRead,
    MmioWrite,
    MovSs,
    Operation,
    Out,
    Pause,
    Program,
    Routine,
    Spin,
    Sti,
    Wrmsr,
)
from kvmtick.irqchip.lapic_timer import GUEST_TSC_KHZ

__all__ = ["ListedEngine", "Listing"]

FLAGS_FIXED: Final = 1 << 1
FLAGS_IF: Final = 1 << 9
NMI_VECTOR: Final = 2
GP_VECTOR: Final = 13
KIND_NMI: Final = int(EventType.NMI)
RESERVED_KINDS: Final = (1, 7)

_EXIT_EXTERNAL_INTERRUPT: Final = int(ExitReason.EXTERNAL_INTERRUPT)
_EXIT_TRIPLE_FAULT: Final = int(ExitReason.TRIPLE_FAULT)
_EXIT_INTERRUPT_WINDOW: Final = int(ExitReason.INTERRUPT_WINDOW)
_EXIT_NMI_WINDOW: Final = int(ExitReason.NMI_WINDOW)
_EXIT_HLT: Final = int(ExitReason.HLT)
_EXIT_PAUSE: Final = int(ExitReason.PAUSE)
_EXIT_ACCESS: Final = int(ExitReason.ACCESS)
_EXIT_PREEMPTION_TIMER: Final = int(ExitReason.PREEMPTION_TIMER)
_SHADOW_STI: Final = int(Interruptibility.STI)
_SHADOW_MOV_SS: Final = int(Interruptibility.MOV_SS)
_SHADOW_NMI: Final = int(Interruptibility.NMI)
_SHADOWS: Final = _SHADOW_STI | _SHADOW_MOV_SS

# Codes of steps: the most frequent first, as they are asked for.
_OUT: Final = 0
_HLT: Final = 1
_END: Final = 2
_MMIO_WRITE: Final = 3
_SPIN: Final = 4
_STI: Final = 5
_CLI: Final = 6
_MOV_SS: Final = 7
_PAUSE: Final = 8
_IN: Final = 9
_MMIO_READ: Final = 10
_WRMSR: Final = 11


class _Step:
    """One operation; `at` is its port, address or MSR, or how many instructions a spin has."""

    __slots__ = ("at", "code", "size_bytes", "value")

    def __init__(self, code: int, at: int = 0, size_bytes: int = 0, value: int = 0) -> None:
        self.code = code
        self.at = at
        self.size_bytes = size_bytes
        self.value = value


def _step(operation: Operation) -> _Step:
    if isinstance(operation, Out):
        return _Step(_OUT, operation.port, operation.size_bytes, operation.value)
    if isinstance(operation, In):
        return _Step(_IN, operation.port, operation.size_bytes)
    if isinstance(operation, MmioWrite):
        return _Step(_MMIO_WRITE, operation.gpa, operation.size_bytes, operation.value)
    if isinstance(operation, MmioRead):
        return _Step(_MMIO_READ, operation.gpa, operation.size_bytes)
    if isinstance(operation, Wrmsr):
        return _Step(_WRMSR, operation.index, 0, operation.value)
    if isinstance(operation, Spin):
        return _Step(_SPIN, operation.instructions)
    if isinstance(operation, Hlt):
        return _Step(_HLT)
    if isinstance(operation, Sti):
        return _Step(_STI)
    if isinstance(operation, Cli):
        return _Step(_CLI)
    if isinstance(operation, MovSs):
        return _Step(_MOV_SS)
    if isinstance(operation, Pause):
        return _Step(_PAUSE)
    name = operation.__class__.__name__
    raise ValueError(f"a listing cannot hold {name}: use a routine and the scripted engine")


def _steps(operations: Iterable[Operation]) -> list[_Step]:
    return [*map(_step, operations), _Step(_END)]


class Listing:
    """A guest: its program, and its handlers by interrupt vector. Never changes.

    ValueError: an operation that a listing cannot hold.
    """

    __slots__ = ("handler_steps", "handlers", "program", "program_steps")

    def __init__(
        self,
        program: Sequence[Operation],
        handlers: Mapping[int, Sequence[Operation]] | None = None,
    ) -> None:
        self.program = tuple(program)
        self.handlers = {vector: tuple(each) for vector, each in (handlers or {}).items()}
        self.program_steps = _steps(self.program)
        self.handler_steps = {vector: _steps(each) for vector, each in self.handlers.items()}

    def __reduce__(self) -> tuple[type[Listing], tuple[object, ...]]:
        return Listing, (self.program, self.handlers)

    def routine(self) -> Routine:
        """The program for a `ScriptedEngine`."""
        return _routine(self.program)

    def handler_routines(self) -> dict[int, Routine]:
        """The handlers for a `ScriptedEngine`."""
        return {vector: _routine(each) for vector, each in self.handlers.items()}


def _program(operations: tuple[Operation, ...]) -> Program:
    for operation in operations:  # noqa: UP028 - a tuple's iterator takes no answers
        yield operation


def _routine(operations: tuple[Operation, ...]) -> Routine:
    return partial(_program, operations)


class _Interrupted:
    """What a handler comes back to."""

    __slots__ = ("at", "rflags", "spin_left", "steps")

    def __init__(self, steps: list[_Step], at: int, spin_left: int, rflags: int) -> None:
        self.steps = steps
        self.at = at
        self.spin_left = spin_left
        self.rflags = rflags


class ListedEngine:
    """The engine contract (`kvmtick.cpu.engine.Engine`) over a `Listing`.

    An event whose vector has no handler is a triple fault.
    """

    __slots__ = (
        "_at",
        "_closed",
        "_exits_on_pause",
        "_interrupted",
        "_kicked",
        "_on_in",
        "_on_mmio_read",
        "_on_mmio_write",
        "_on_out",
        "_on_wrmsr",
        "_refused",
        "_registers",
        "_running",
        "_spin_left",
        "_steps",
        "cr4_bits",
        "deadline_ns",
        "entry_error_code",
        "error",
        "exact",
        "has_deadline",
        "idt_vectoring_info",
        "interruptibility",
        "listing",
        "name",
        "real_time",
        "retired",
        "rflags",
        "rounds",
        "tsc_khz",
    )

    def __init__(self, listing: Listing) -> None:
        self.listing = listing
        self.name = "listed"
        self.cr4_bits = (1 << 64) - 1
        self.exact = True
        self.real_time = False
        self.has_deadline = False
        self.deadline_ns = 0
        self.tsc_khz = GUEST_TSC_KHZ
        self.rflags = FLAGS_FIXED
        self.interruptibility = 0
        self.retired = 0
        self.idt_vectoring_info = 0
        self.entry_error_code = 0
        self.error = ""
        self.rounds = 1
        self._exits_on_pause = False
        self._on_out: PortOut | None = None
        self._on_in: PortIn | None = None
        self._on_mmio_write: contract.MmioWrite | None = None
        self._on_mmio_read: contract.MmioRead | None = None
        self._on_wrmsr: contract.MsrWrite | None = None
        self._registers: dict[str, int] | None = None
        """None: those of RESET."""
        self._kicked = False
        self._refused = False
        self._running = False
        self._closed = False
        self._steps = listing.program_steps
        self._at = 0
        self._spin_left = 0
        self._interrupted: list[_Interrupted] = []

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
        """Nothing."""

    def set_tsc(self, khz: int, value: int, at_ns: int, live: bool) -> None:
        """Nothing: no guest reads it."""

    @property
    def read_tsc(self) -> Callable[[], int] | None:
        return None

    @property
    def last_exit(self) -> int:
        """RFLAGS, interruptibility from bit 24 on, what retired from bit 32 on."""
        return self.rflags | self.interruptibility << 24 | self.retired << 32

    def reset(self, cs: int, ip: int) -> None:
        self._registers = None
        if cs or ip:
            self._registers = {**RESET_REGISTERS, "cs": cs, "cs_base": cs << 4, "rip": ip}
        self._steps = self.listing.program_steps
        self._at = 0
        self._spin_left = 0
        self._interrupted.clear()
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
        if addresses:
            raise ValueError("a listing has no addresses to stop at: use the unicorn CPU")

    @property
    def rip(self) -> int:
        return 0 if self._registers is None else self._registers["rip"]

    def registers(self) -> dict[str, int]:
        registers = RESET_REGISTERS if self._registers is None else self._registers
        return {**registers, "rflags": self.rflags}

    def set_registers(self, values: Mapping[str, int]) -> None:
        unknown = sorted(values.keys() - RESET_REGISTERS.keys() - {"rflags"})
        if unknown:
            raise ValueError(f"no such register: {unknown[0]}")
        registers = {**self.registers(), **values}
        self.rflags = registers.pop("rflags") | FLAGS_FIXED
        self._registers = registers

    def set_interruptibility(self, state: int) -> None:
        shadows = state & _SHADOWS
        if state & ~_SHADOW_NMI != shadows or shadows == _SHADOWS:
            raise ValueError(f"no such interruptibility: {state}")
        self.interruptibility = state

    def close(self) -> None:
        self._closed = True
        self._interrupted.clear()

    def enter(
        self, intr_info: int, irq_window: bool, nmi_window: bool, budget: int, tsc: int
    ) -> int:
        if self._closed or self._running:
            raise RuntimeError("the engine is closed" if self._closed else "the guest runs")
        if self._on_out is None:
            raise ValueError("attach() must precede the first enter()")
        if budget <= 0:
            raise ValueError("the budget must be positive")
        self.retired = 0
        if intr_info & INTR_INFO_VALID:
            kind = (intr_info >> 8) & 7
            vector = intr_info & 0xFF
            if kind in RESERVED_KINDS or (kind == KIND_NMI and vector != NMI_VECTOR):
                raise ValueError(f"no such event: {intr_info:#x}")
            if not self._start_handler(vector):
                return _EXIT_TRIPLE_FAULT
            if kind == KIND_NMI:
                self.interruptibility |= _SHADOW_NMI
        self._running = True
        try:
            return self._run(irq_window, nmi_window, budget)
        finally:
            self._running = False

    def _start_handler(self, vector: int) -> bool:
        """False: there is none."""
        handler = self.listing.handler_steps.get(vector)
        if handler is None:
            return False
        self._interrupted.append(_Interrupted(self._steps, self._at, self._spin_left, self.rflags))
        self._steps = handler
        self._at = 0
        self._spin_left = 0
        self.rflags &= ~FLAGS_IF
        self.interruptibility &= _SHADOW_NMI
        return True

    def _run(self, irq_window: bool, nmi_window: bool, budget: int) -> int:
        windows = irq_window or nmi_window
        while True:
            if self._kicked:
                self._kicked = False
                return _EXIT_EXTERNAL_INTERRUPT
            if windows:
                state = self.interruptibility
                if nmi_window and not state:
                    return _EXIT_NMI_WINDOW
                if irq_window and self.rflags & FLAGS_IF and not state & _SHADOWS:
                    return _EXIT_INTERRUPT_WINDOW
            if self.retired >= budget:
                return _EXIT_PREEMPTION_TIMER
            if self._spin_left:
                self._spin(budget - self.retired)
                continue
            reason = self._execute(self._steps[self._at])
            if reason:
                return reason

    def _spin(self, left: int) -> None:
        """As much of a spin as changes nothing that a boundary looks at."""
        count = 1 if self.interruptibility & _SHADOWS else min(self._spin_left, left)
        self._spin_left -= count
        self.retired += count
        self.interruptibility &= _SHADOW_NMI

    def _execute(self, step: _Step) -> int:
        """One instruction; an exit reason when it has one, else 0. A spin only begins."""
        code = step.code
        if code == _END:
            return self._return()
        self._at += 1
        if code == _SPIN:
            self._spin_left = step.at
            return 0
        shadow = self.interruptibility & _SHADOWS
        self.interruptibility &= _SHADOW_NMI
        if code == _OUT:
            assert self._on_out is not None
            self._on_out(step.at, step.size_bytes, step.value, self.retired)
        elif code == _HLT:
            self.retired += 1
            return _EXIT_HLT
        elif code == _MMIO_WRITE:
            if self._on_mmio_write is not None:
                self._on_mmio_write(step.at, step.size_bytes, step.value, self.retired)
        elif code == _STI:
            if not self.rflags & FLAGS_IF and not shadow:
                self.interruptibility |= _SHADOW_STI
            self.rflags |= FLAGS_IF
        elif code == _CLI:
            self.rflags &= ~FLAGS_IF
        elif code == _MOV_SS:
            if not shadow:
                self.interruptibility |= _SHADOW_MOV_SS
        elif code == _PAUSE:
            self.retired += 1
            return _EXIT_PAUSE if self._exits_on_pause else 0
        elif code == _IN:
            assert self._on_in is not None
            self._on_in(step.at, step.size_bytes, self.retired)
        elif code == _MMIO_READ:
            if self._on_mmio_read is not None:
                self._on_mmio_read(step.at, step.size_bytes, self.retired)
        elif not self._wrmsr(step):
            self.retired += 1
            return 0 if self._start_handler(GP_VECTOR) else _EXIT_TRIPLE_FAULT
        if self._refused:
            self._refused = False
            self.interruptibility |= shadow
            self._at -= 1
            return _EXIT_ACCESS
        self.retired += 1
        return 0

    def _wrmsr(self, step: _Step) -> bool:
        """False: #GP."""
        if step.at in CPU_MSRS:
            return True
        return self._on_wrmsr is not None and self._on_wrmsr(step.at, step.value, self.retired)

    def _return(self) -> int:
        """A list ended: IRET in a handler (0), HLT in the program (its exit reason)."""
        self.retired += 1
        self.interruptibility &= _SHADOW_NMI
        if not self._interrupted:
            return _EXIT_HLT
        back = self._interrupted.pop()
        self._steps = back.steps
        self._at = back.at
        self._spin_left = back.spin_left
        self.rflags = back.rflags
        self.interruptibility = 0
        return 0
