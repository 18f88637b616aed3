"""A guest that exists twice, and an engine that runs it: what the engine tests share."""

from collections.abc import Callable, Mapping
from mmap import mmap
from typing import Any, NamedTuple

from kvmtick.cpu.engine import INTR_INFO_VALID, EventType, ExitReason, pack_exit
from kvmtick.cpu.hostkvm import HostKvmEngine
from kvmtick.cpu.scripted import Hlt, Program, Routine, ScriptedEngine
from kvmtick.cpu.unicorn import UnicornEngine

RAM_BYTES = 1 << 20
CODE = 0x1000
HANDLERS = 0x2000
STACK_TOP = 0x1_0000
"""SS:SP is 0:0 after RESET: the first push goes to the end of the first 64 KiB."""
FLAGS_IF = 0x200
VECTOR = 0x20
IRQ = INTR_INFO_VALID | VECTOR
NMI = INTR_INFO_VALID | EventType.NMI << 8 | 2
PLENTY = 10_000
MMIO = 0x10_0000
"""Behind the RAM; real mode reaches it as 0xffff:0x0010."""
MSR = 0x830
"""The x2APIC's ICR: any of the MSRs that handlers answer."""
FLAT_CODE_ACCESS = 0xC09B
FLAT_DATA_ACCESS = 0xC093
"""32 bits wide, with 4 KiB granularity."""


def flat_segment(name: str, selector: int, access: int) -> dict[str, int]:
    return {
        name: selector,
        f"{name}_base": 0,
        f"{name}_limit": 0xFFFF_FFFF,
        f"{name}_access": access,
    }


def protected_mode(eip: int) -> dict[str, int]:
    """32-bit protected mode without paging at `eip`: flat segments, empty GDT and IDT."""
    registers = {"rip": eip, "cr0": 0x6000_0011, "gdtr_limit": 0, "idtr_limit": 0}
    for name in ("es", "ss", "ds", "fs", "gs"):
        registers |= flat_segment(name, 0x10, FLAT_DATA_ACCESS)
    return registers | flat_segment("cs", 8, FLAT_CODE_ACCESS)


class Guest(NamedTuple):
    """The same guest twice: main program and handlers by vector."""

    code: str
    routine: Routine
    handlers: Mapping[int, tuple[str, Routine]] = {}


class Machine:
    """An engine with a guest in it and a log of its accesses.

    `on_out` is called with the port, address or MSR of each. `input` is what all reads answer;
    accesses to `refused_msrs` and writes of `refused_priorities` to CR8 give #GP.
    """

    def __init__(
        self,
        engine: UnicornEngine | ScriptedEngine | HostKvmEngine,
        guest: Guest,
        ram: mmap | None = None,
    ) -> None:
        self.engine = engine
        self.ram = mmap(-1, RAM_BYTES) if ram is None else ram
        self.accesses: list[tuple[Any, ...]] = []
        self.on_out: Callable[[int], None] = lambda port: None
        self.input = 0x5A
        self.refused_msrs: set[int] = set()
        self.refused_priorities: set[int] = set()
        write_code(self.ram, CODE, guest.code)
        for number, (vector, (code, _)) in enumerate(guest.handlers.items()):
            address = HANDLERS + 0x100 * number
            write_code(self.ram, address, code)
            self.ram[4 * vector : 4 * vector + 4] = address.to_bytes(4, "little")
        engine.map_ram(0, self.ram)
        self.attach()
        engine.reset(0, CODE)

    def attach(self) -> None:
        self.engine.attach(
            self.port_out,
            self.port_in,
            self.mmio_write,
            self.mmio_read,
            self.wrmsr,
            self.rdmsr,
            self.cpuid,
            self.cr8_write,
            self.cr8_read,
            self.hypercall,
        )

    def attach_ports_only(self) -> None:
        self.engine.attach(self.port_out, self.port_in)

    def port_out(self, port: int, size_bytes: int, value: int, retired: int) -> None:
        self.accesses.append(("out", port, size_bytes, value, retired))
        self.on_out(port)

    def port_in(self, port: int, size_bytes: int, retired: int) -> int:
        self.accesses.append(("in", port, size_bytes, self.input, retired))
        self.on_out(port)
        return self.input

    def mmio_write(self, gpa: int, size_bytes: int, value: int, retired: int) -> None:
        self.accesses.append(("mmio write", gpa, size_bytes, value, retired))
        self.on_out(gpa)

    def mmio_read(self, gpa: int, size_bytes: int, retired: int) -> int:
        self.accesses.append(("mmio read", gpa, size_bytes, retired))
        self.on_out(gpa)
        return self.input

    def wrmsr(self, index: int, value: int, retired: int) -> bool:
        self.accesses.append(("wrmsr", index, value, retired))
        self.on_out(index)
        return index not in self.refused_msrs

    def rdmsr(self, index: int, retired: int) -> int | None:
        self.accesses.append(("rdmsr", index, retired))
        self.on_out(index)
        return None if index in self.refused_msrs else self.input

    def cpuid(self, function: int, index: int) -> tuple[int, int, int, int]:
        self.accesses.append(("cpuid", function, index))
        self.on_out(function)
        return function + 1, 0xBBBB_BBBB, index, 0xFFFF_FFFF

    def hypercall(self, retired: int) -> int:
        self.accesses.append(("hypercall", self.engine.registers()["rax"] & 0xFFFF_FFFF, retired))
        self.on_out(0)
        return self.input

    def cr8_write(self, value: int, retired: int) -> bool:
        self.accesses.append(("cr8 write", value, retired))
        self.on_out(value)
        return value not in self.refused_priorities

    def cr8_read(self, retired: int) -> int:
        self.accesses.append(("cr8 read", retired))
        self.on_out(0)
        return self.input & 15

    def enter(
        self,
        intr_info: int = 0,
        *,
        irq_window: bool = False,
        nmi_window: bool = False,
        budget: int = PLENTY,
        tsc: int = 0,
    ) -> ExitReason:
        """One entry; whatever ends it, `last_exit` says what the attributes say."""
        engine = self.engine
        reason = engine.enter(intr_info, irq_window, nmi_window, budget, tsc)
        assert engine.last_exit == pack_exit(
            engine.rflags, engine.interruptibility, engine.retired, engine.idt_vectoring_info
        )
        return ExitReason(reason)

    def counted(self, instructions: int) -> int:
        """What `retired` is after so many."""
        return 0 if self.engine.real_time else instructions

    @property
    def interrupts_enabled(self) -> bool:
        return bool(self.engine.rflags & FLAGS_IF)


def no_routine() -> Program:
    yield Hlt()


class Cpu(Machine):
    """A Unicorn engine with one program and code for some vectors."""

    def __init__(
        self,
        code: str,
        handlers: dict[int, str] | None = None,
        ram: mmap | None = None,
        *,
        exact: bool = True,
        seed: int = 0,
    ) -> None:
        vectors = {vector: (text, no_routine) for vector, text in (handlers or {}).items()}
        engine = UnicornEngine(exact=exact, seed=seed)
        super().__init__(engine, Guest(code, no_routine, vectors), ram)

    def word(self, address: int) -> int:
        return int.from_bytes(self.ram[address : address + 2], "little")

    def long(self, address: int) -> int:
        return int.from_bytes(self.ram[address : address + 4], "little")

    def set_long(self, address: int, value: int) -> None:
        self.ram[address : address + 4] = value.to_bytes(4, "little")

    def register(self, name: str) -> int:
        return self.engine.registers()[name]

    def set_registers(self, **values: int) -> None:
        self.engine.set_registers(values)

    def reset_protected(self, eip: int) -> None:
        self.engine.reset(0, 0)
        self.engine.set_registers(protected_mode(eip))


def write_code(ram: mmap, address: int, code: str) -> None:
    data = bytes.fromhex(code)
    ram[address : address + len(data)] = data
