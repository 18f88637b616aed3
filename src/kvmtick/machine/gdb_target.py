"""What gdb debugs: a machine whose vCPUs are its threads. No protocol in here.

A vCPU that meets a breakpoint, or has made its step, stands in the middle of its VM entry and of
the machine's time (`Vcpu.on_debug`); the others stand where the run loop left them. Going on
finishes the entry, so a run under a debugger is the run without one: the same slices and turns,
the same trace.

vCPUs take turns as they always do: a step of one ends when it has executed an instruction or taken
an event, which may be after another one's turn, or never if nothing wakes it.

Not modelled: hardware watchpoints, breakpoints that only some vCPUs see.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from kvmtick.cpu.mode import linear_rip, mode_name
from kvmtick.cpu.paging import PAGE_BYTES, read_linear, translate
from kvmtick.machine.gdb_registers import architecture_of
from kvmtick.machine.machine import Exit, Machine
from kvmtick.trace.ftrace import format_line
from kvmtick.vcpu.vcpu import Vcpu

__all__ = ["Target"]


class Target:
    """A machine under a debugger; threads are numbered from 1, in the order of the vCPUs."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.breakpoints: set[int] = set()
        self._seen: frozenset[int] = frozenset()
        self.choose_architecture(1)

    @property
    def threads(self) -> range:
        """The thread numbers."""
        return range(1, len(self.machine.board.vcpus) + 1)

    def thread_of(self, vcpu: Vcpu) -> int:
        """The thread that a vCPU is."""
        return self.machine.board.vcpus.index(vcpu) + 1

    @property
    def current_thread(self) -> int:
        """The thread whose turn it is."""
        return self.thread_of(self.machine.current_vcpu)

    def thread_info(self, thread: int) -> str:
        """One line on a vCPU."""
        vcpu = self._vcpu(thread)
        return f"vCPU {vcpu.vcpu_id} [{vcpu.mp_state_name()}]"

    def _vcpu(self, thread: int) -> Vcpu:
        return self.machine.board.vcpus[thread - 1]

    # Running.

    def attach(self, on_stop: Callable[[Vcpu], None]) -> None:
        """From now on `on_stop` gets a vCPU at a breakpoint or after its step."""
        for vcpu in self.machine.board.vcpus:
            vcpu.on_debug = on_stop

    def detach(self) -> None:
        """No breakpoints, no steps, nobody who is told."""
        self.breakpoints.clear()
        self.resume(())
        for vcpu in self.machine.board.vcpus:
            vcpu.on_debug = None

    def resume(self, stepping: Collection[int]) -> None:
        """Let the vCPUs go, those of the threads `stepping` for one step each.

        Who steps does not see the breakpoint it stands at. gdb takes that one out for the step, but
        the others, whose turn may come first, shall not miss it.
        """
        stand_at = {linear_rip(self._vcpu(thread).engine.registers()) for thread in stepping}
        self._seen = frozenset(self.breakpoints | (self._seen & stand_at))
        for thread in self.threads:
            vcpu = self._vcpu(thread)
            vcpu.single_step = thread in stepping
            vcpu.engine.set_breakpoints(() if vcpu.single_step else self._seen)

    def stand(self) -> None:
        """Forget the steps that are not made: all vCPUs stand."""
        for vcpu in self.machine.board.vcpus:
            vcpu.single_step = False

    def end(self, exit_: Exit) -> None:
        """End the run as soon as it goes on."""
        self.detach()
        self.machine.stop(exit_)

    def is_at_breakpoint(self, thread: int) -> bool:
        """Whether a vCPU stands before an instruction that has a breakpoint."""
        return linear_rip(self._vcpu(thread).engine.registers()) in self._seen

    # Registers.

    def choose_architecture(self, thread: int) -> None:
        """From now on registers are described as in the present mode of a vCPU."""
        self.architecture = architecture_of(self._vcpu(thread).engine.registers())

    def read_registers(self, thread: int) -> str:
        """All of them in hex digits."""
        registers = self._vcpu(thread).engine.registers()
        numbers = range(len(self.architecture.registers))
        return "".join(self.architecture.encode(number, registers) for number in numbers)

    def read_register(self, thread: int, number: int) -> str:
        """One in hex digits. IndexError: there is none of that number."""
        return self.architecture.encode(number, self._vcpu(thread).engine.registers())

    def write_register(self, thread: int, number: int, data: bytes) -> bool:
        """Write one; false if it is one we lack. IndexError, ValueError: there is none such."""
        vcpu = self._vcpu(thread)
        values = self.architecture.decode(number, data, vcpu.engine.registers())
        if values:
            vcpu.engine.set_registers(values)
            # What the vCPU decides by before its next entry.
            vcpu.vmcs.guest_rflags = vcpu.engine.rflags
        return bool(values)

    def write_registers(self, thread: int, data: bytes) -> None:
        """Write all of them; those we lack keep what they have. ValueError: too few bytes."""
        at = 0
        for number, register in enumerate(self.architecture.registers):
            end = at + register.size_bytes
            self.write_register(thread, number, data[at:end])
            at = end

    def write_pc(self, thread: int, address: int) -> None:
        """Let the vCPU go on at a linear address."""
        number, size_bytes = self.architecture.pc, self.architecture.width_bytes
        address &= (1 << 8 * size_bytes) - 1
        self.write_register(thread, number, address.to_bytes(size_bytes, "little"))

    # Memory, as a vCPU sees it.

    def read_memory(self, thread: int, address: int, size_bytes: int) -> bytes:
        """Up to `size_bytes`: less, or nothing, where no page or no RAM is."""
        registers = self._vcpu(thread).engine.registers()
        return read_linear(registers, self.machine.read_ram, address, size_bytes)

    def write_memory(self, thread: int, address: int, data: bytes) -> bool:
        """Write all of `data`, or nothing and return false. The guest's code may change by it."""
        registers = self._vcpu(thread).engine.registers()
        parts = []
        at = 0
        while at < len(data):
            length_bytes = min(len(data) - at, PAGE_BYTES - (address + at) % PAGE_BYTES)
            gpa = translate(registers, self.machine.read_ram, address + at)
            if gpa is None or self.machine.read_ram(gpa, length_bytes) is None:
                return False
            parts.append((gpa, data[at : at + length_bytes]))
            at += length_bytes
        for gpa, part in parts:
            self.machine.write_memory(gpa, part)
        return True

    # For people.

    def info(self) -> str:
        """Where the machine stands."""
        machine = self.machine
        lines = [f"time {machine.elapsed_ns} ns, {machine.instructions} instructions"]
        for thread in self.threads:
            registers = self._vcpu(thread).engine.registers()
            lines.append(
                f"{self.thread_info(thread)}: {mode_name(registers)}, cs {registers['cs']:#x},"
                f" rip {registers['rip']:#x}"
            )
        lines += [f"{name}: {value}" for name, value in machine.snapshot().items()]
        return "\n".join(lines)

    def events(self) -> str:
        """The last trace events."""
        recorder = self.machine.recorder
        return "\n".join(format_line(record, recorder.tasks) for record in recorder.tail())
