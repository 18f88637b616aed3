"""A guest that exists twice, and an engine that runs it: what the engine tests share."""

from collections.abc import Callable, Mapping
from mmap import mmap
from typing import NamedTuple

from kvmtick.cpu.engine import INTR_INFO_VALID, EventType, ExitReason
from kvmtick.cpu.scripted import Routine, ScriptedEngine
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


class Guest(NamedTuple):
    """The same guest twice: main program and handlers by vector."""

    code: str
    routine: Routine
    handlers: Mapping[int, tuple[str, Routine]] = {}


class Machine:
    """An engine with a guest in it and a log of its port accesses."""

    def __init__(self, engine: UnicornEngine | ScriptedEngine, guest: Guest) -> None:
        self.engine = engine
        self.ram = mmap(-1, RAM_BYTES)
        self.accesses: list[tuple[str, int, int, int, int]] = []
        self.on_out: Callable[[int], None] = lambda port: None
        self.input = 0x5A
        write_code(self.ram, CODE, guest.code)
        for number, (vector, (code, _)) in enumerate(guest.handlers.items()):
            address = HANDLERS + 0x100 * number
            write_code(self.ram, address, code)
            self.ram[4 * vector : 4 * vector + 4] = address.to_bytes(4, "little")
        engine.map_ram(0, self.ram)
        engine.attach(self.port_out, self.port_in)
        engine.reset(0, CODE)

    def port_out(self, port: int, size_bytes: int, value: int, retired: int) -> None:
        self.accesses.append(("out", port, size_bytes, value, retired))
        self.on_out(port)

    def port_in(self, port: int, size_bytes: int, retired: int) -> int:
        self.accesses.append(("in", port, size_bytes, self.input, retired))
        self.on_out(port)
        return self.input

    def enter(
        self,
        intr_info: int = 0,
        *,
        irq_window: bool = False,
        nmi_window: bool = False,
        budget: int = PLENTY,
        tsc: int = 0,
    ) -> ExitReason:
        return ExitReason(self.engine.enter(intr_info, irq_window, nmi_window, budget, tsc))

    @property
    def interrupts_enabled(self) -> bool:
        return bool(self.engine.rflags & FLAGS_IF)


def write_code(ram: mmap, address: int, code: str) -> None:
    data = bytes.fromhex(code)
    ram[address : address + len(data)] = data
