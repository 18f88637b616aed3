"""Random programs for the PIT's and the PICs' ports, and what of their outcome is a matter of time.

A program is a list of operations; `program(seed)` makes one. Those on ports are carried out by a
guest (`assemble`), with interrupts off; the others are calls of KVM's API that user space makes
when the guest asks for it.

Channel 0's timer must not fire on its own: then the outcome would hang on how fast the host is. So
`settle` makes every count that starts it large (40 ms at least), and a timer that is to fire is an
operation of its own, `Tick`, which waits for it.

At the end the guest opens WINDOWS interrupt windows, each for one interrupt, and notes the vectors
it gets: only so the PICs' INTR line shows, which no state holds.
"""

import random
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

from kvmtick.abi.structs import kvm_pic_state, kvm_pit_channel_state, kvm_pit_state2

LOAD_AT = 0x8000
RESULTS_AT = 0xF000
PORT_ACT = 0x510
"""A write of n asks user space for the program's n-th call."""
HANDLER_AT = 0xE000
WINDOWS = 6
PORT_NOBODY = 0x80
PORT_SLEEP = 0xD8
PORT_EXIT = 0xF4
MAX_COUNT = 0x10000
LEAST_COUNT = 0xC000
"""41 ms: no program takes so long."""

TICK_COUNT = 100
TICK_WAIT_US = 1000


@dataclass(frozen=True, slots=True)
class Out:
    """Write 1 or 2 bytes to a port."""

    port: int
    value: int
    size: int = 1


@dataclass(frozen=True, slots=True)
class In:
    """Read 1 or 2 bytes from a port."""

    port: int
    size: int = 1


@dataclass(frozen=True, slots=True)
class Line:
    """KVM_IRQ_LINE_STATUS."""

    gsi: int
    level: int


@dataclass(frozen=True, slots=True)
class Reinject:
    """KVM_REINJECT_CONTROL."""

    on: bool


@dataclass(frozen=True, slots=True)
class SetIrqchip:
    """KVM_SET_IRQCHIP of a PIC: struct kvm_pic_state, any bytes."""

    chip_id: int
    state: bytes


@dataclass(frozen=True, slots=True)
class SetPit2:
    """KVM_SET_PIT2: struct kvm_pit_state2, any bytes."""

    state: bytes


@dataclass(frozen=True, slots=True)
class Tick:
    """Start channel 0 one-shot, wait until it has fired, and start it with a count that will not.

    Loading a count waits for the PIT's worker, so the tick has reached the PIC by then.
    """


Call: TypeAlias = Line | Reinject | SetIrqchip | SetPit2
Operation: TypeAlias = Out | In | Call | Tick
Program: TypeAlias = tuple[Operation, ...]


# Generation.

MOST_PIECES = 14
PIC_PORTS = (0x20, 0xA0)
PORTS = (0x20, 0x21, 0xA0, 0xA1, 0x4D0, 0x4D1, 0x40, 0x41, 0x42, 0x43, 0x61)
OCW2 = (0x00, 0x20, 0x40, 0x60, 0x61, 0x62, 0x67, 0x80, 0xA0, 0xC0, 0xC2, 0xE0, 0xE3, 0xE7)
OCW3 = (0x08, 0x0A, 0x0B, 0x0C, 0x0E, 0x0F, 0x48, 0x68, 0x6B, 0x6C)
ICW1 = (0x11, 0x11, 0x10, 0x13, 0x19, 0x1F)
ICW4 = (0x01, 0x03, 0x11, 0x13, 0x00, 0x0D)
SIZES = (1, 1, 1, 1, 1, 1, 1, 2)
PIT_COUNTS = (0, 1, 100, 0x1234, 0x10000, 0x123456, 0xFFFFFFFF)
PIT_FLAGS = (0, 0, 1, 2, 3, 0xFFFFFFFE)


class _Maker:
    """Makes pieces of programs: operations that belong together."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.pieces: tuple[Callable[[], list[Operation]], ...] = (
            lambda: [In(rng.choice(PORTS), rng.choice(SIZES))],
            lambda: [Out(rng.choice(PORTS), self.byte(), rng.choice(SIZES))],
            lambda: [Out(rng.choice(PIC_PORTS), rng.choice(OCW2))],
            lambda: [Out(rng.choice(PIC_PORTS), rng.choice(OCW3))],
            # A poll, or a register chosen, and read.
            lambda: [Out(rng.choice(PIC_PORTS), rng.choice(OCW3)), In(rng.choice(PIC_PORTS))],
            self.initialise,
            self.initialise_under_a_line,
            lambda: self.access(0),
            lambda: self.access(1),
            lambda: self.access(2),
            lambda: [Out(0x43, 0xC0 | rng.randrange(0x40))],
            self.pulse,
            self.pulse,
            lambda: [Line(rng.randrange(16), rng.randrange(2))],
            self.rare,
        )

    def byte(self) -> int:
        return self.rng.randrange(0x100)

    def small(self) -> int:
        """Mostly a value that means something."""
        return self.rng.randrange(5) if self.rng.random() < 0.5 else self.byte()

    def initialise(self) -> list[Operation]:
        """ICWs of a PIC, not always all of them."""
        rng = self.rng
        port = rng.choice(PIC_PORTS)
        words: list[Operation] = [Out(port, rng.choice(ICW1))]
        words += (Out(port + 1, each) for each in (self.byte(), self.byte(), rng.choice(ICW4)))
        return words[: 1 + rng.choice((3, 3, 3, 0, 1, 2))]

    def initialise_under_a_line(self) -> list[Operation]:
        """A line that is high while a PIC is initialised anew."""
        gsi = self.rng.randrange(16)
        return [Line(gsi, 1), *self.initialise(), Line(gsi, 0)]

    def access(self, channel: int) -> list[Operation]:
        """A control word for a channel, and some of the bytes it asks for."""
        rng, port = self.rng, 0x40 + channel
        data: list[Operation] = [
            In(port) if rng.random() < 0.5 else Out(port, self.byte())
            for _ in range(rng.randrange(4))
        ]
        return [Out(0x43, channel << 6 | rng.randrange(0x40)), *data]

    def pulse(self) -> list[Operation]:
        gsi = self.rng.randrange(16)
        return [Line(gsi, 1), Line(gsi, 0)]

    def rare(self) -> list[Operation]:
        """A state that is set, or what takes long."""
        kind = self.rng.randrange(5)
        if kind < 2:
            state = bytes(self.small() for _ in range(16))
            return [SetIrqchip(self.rng.randrange(2), state)]
        if kind == 2:
            return [self.set_pit2()]
        return [Reinject(self.rng.random() < 0.5)] if kind == 3 else [Tick()]

    def set_pit2(self) -> Operation:
        rng = self.rng
        state = kvm_pit_state2(flags=rng.choice(PIT_FLAGS))
        for channel in state.channels:
            channel.count = rng.choice(PIT_COUNTS)
            channel.latched_count = rng.randrange(0x10000)
            channel.count_latched, channel.status_latched = self.small(), self.small()
            channel.status = self.byte()
            channel.read_state, channel.write_state = self.small(), self.small()
            channel.write_latch = self.byte()
            channel.rw_mode, channel.bcd, channel.gate = self.small(), self.byte(), self.byte()
            channel.mode = rng.randrange(6) if rng.random() < 0.5 else self.byte()
        return SetPit2(bytes(state))


def program(seed: int) -> Program:
    """The random program with that number."""
    rng = random.Random(seed)
    maker = _Maker(rng)
    pieces = [rng.choice(maker.pieces)() for _ in range(rng.randint(1, MOST_PIECES))]
    return settle(tuple(operation for piece in pieces for operation in piece))


class _Pit:
    """As much of the PIT as says which count starts channel 0 and which read gives a status."""

    def __init__(self) -> None:
        self.mode = 0xFF
        self.write_state = 0
        self.status_latched = [0, 0, 0]

    def control(self, value: int) -> None:
        channel, access = value >> 6, value >> 4 & 3
        if channel == 3:
            for index in range(3):
                if value & 2 << index and not value & 0x10:
                    self.status_latched[index] = 1
        elif channel == 0 and access:
            self.mode = value >> 1 & 7
            self.write_state = access

    def set(self, state: kvm_pit_state2) -> None:
        self.mode = state.channels[0].mode
        self.write_state = state.channels[0].write_state
        self.status_latched = [channel.status_latched for channel in state.channels]

    def is_status(self, index: int) -> bool:
        """A read of counter `index`: is it the latched status?"""
        latched, self.status_latched[index] = self.status_latched[index], 0
        return bool(latched)

    def count_byte(self, value: int) -> int:
        """What to write to counter 0 instead of `value`."""
        if self.write_state == 3:
            self.write_state = 4
        elif self.write_state == 4:
            self.write_state = 3
            return value | LEAST_COUNT >> 8
        elif self.write_state == 2:
            return value | LEAST_COUNT >> 8
        else:
            return 0
        return value


def settle(program: Program) -> Program:
    """The program with every count that starts channel 0's timer made large."""
    pit = _Pit()
    out: list[Operation] = []
    for operation in program:
        match operation:
            case Out(0x40, value, size):
                value = pit.count_byte(value & 0xFF) | value & 0xFF00
                operation = Out(0x40, value, size)
            case Out(0x43, value, 1):
                pit.control(value)
            case SetPit2(state):
                changed = kvm_pit_state2.from_buffer_copy(state)
                if 0 < changed.channels[0].count < LEAST_COUNT:
                    changed.channels[0].count |= LEAST_COUNT
                operation = replace(operation, state=bytes(changed))
                pit.set(changed)
            case Tick():
                pit.control(0x30)
        out.append(operation)
    return tuple(out)


# What is compared.


def read_masks(program: Program) -> list[int]:
    """For each byte the guest reads, in order, the bits that do not depend on time.

    That is all of a byte but for: a count (nothing), bit 7 of a status (OUT), bits 4 and 5 of port
    0x61 (refresh clock, OUT). Port 0x43 leaves the buffer of port reads as the last read left it.
    """
    pit = _Pit()
    masks: list[int] = []
    last = 0xFF
    for operation in program:
        match operation:
            case In(port, size):
                handled = port + size <= 0x44
                if 0x40 <= port < 0x43 and handled:
                    last = 0x7F if pit.is_status(port - 0x40) else 0
                elif port == 0x61:
                    last = 0xCF
                elif port != 0x43 or not handled:
                    last = 0xFF
                masks += [last, 0xFF][:size]
            case Out(0x43, value, 1):
                pit.control(value)
            case SetPit2(state):
                pit.set(kvm_pit_state2.from_buffer_copy(state))
    return masks


def pit_without_times(state: kvm_pit_state2) -> kvm_pit_state2:
    """GET_PIT2's answer with what depends on time set to 0: when counters 1 and 2 were loaded,
    what a latch caught, OUT (bit 7) of a latched status.
    """
    out = kvm_pit_state2.from_buffer_copy(state)
    for index, channel in enumerate(out.channels):
        channel.latched_count = 0
        channel.status &= 0x7F
        if index:
            channel.count_load_time = 0
    return out


def pic_registers(state: kvm_pic_state) -> dict[str, int]:
    """By name, for people."""
    return {name: getattr(state, name) for name, *_ in kvm_pic_state._fields_}


def pit_registers(state: kvm_pit_state2) -> dict[str, int]:
    """By channel and name, for people."""
    out = {
        f"channels[{index}].{name}": getattr(channel, name)
        for index, channel in enumerate(state.channels)
        for name, *_ in kvm_pit_channel_state._fields_
    }
    return {**out, "flags": state.flags}


# The guest.


def calls(program: Program) -> list[Call]:
    """What user space does, in order."""
    return [op for op in program if isinstance(op, Line | Reinject | SetIrqchip | SetPit2)]


IVT = b"".join(struct.pack("<HH", HANDLER_AT - 16 * vector, vector) for vector in range(256))
"""To address 0: every vector leads to HANDLER_AT, with the vector in CS."""

HANDLER = (
    b"\x8c\xc8\x40\xab"  # mov ax, cs; inc ax; stosw
    b"\x55\x89\xe5\x81\x66\x06\xff\xfd\x5d\xcf"  # IF=0 in the flags on the stack; iret
)
"""Notes vector + 1; the interrupted program goes on with interrupts off."""


def assemble(program: Program) -> bytes:
    """The guest, for real mode at 0000:8000: interrupts off, every value it reads to RESULTS_AT,
    the vectors behind that.

    BL keeps the last byte read, and is in AL before each read: a port that answers nothing leaves
    AL, or the buffer of port reads, as it was, and both are the same then.
    """
    code = bytearray(b"\xfa\x31\xc0\x8e\xd8\x8e\xc0")  # cli; xor ax, ax; mov ds, ax; mov es, ax
    code += b"\x8e\xd0\xbc\x00\x70"  # mov ss, ax; mov sp, 0x7000
    code += b"\xfc\xbf" + struct.pack("<H", RESULTS_AT)  # cld; mov di, RESULTS_AT
    # A byte read to begin with: the buffer may hold anything.
    code += b"\xba\x21\x00\xec\x88\xc3"  # mov dx, 0x21; in al, dx; mov bl, al
    call = 0
    for operation in program:
        match operation:
            case Out(port, value, size):
                code += _out(port, value, size)
            case In(port, size):
                code += (
                    b"\xba" + struct.pack("<H", port) + b"\x31\xc0\x88\xd8"
                )  # xor ax; mov al, bl
                code += b"\xec\x88\xc3\xaa" if size == 1 else b"\xed\x88\xc3\xab"
            case Tick():
                code += _out(0x43, 0x30) + _out(0x40, TICK_COUNT) + _out(0x40, 0)
                code += b"\x66\xb8" + struct.pack("<I", TICK_WAIT_US)  # mov eax, TICK_WAIT_US
                code += b"\xba" + struct.pack("<H", PORT_SLEEP) + b"\x66\xef"  # out dx, eax
                code += _out(0x40, 0) + _out(0x40, 0)
            case _:
                code += _out(PORT_ACT, call)
                call += 1
    # An exit to user space, so that this kernel's back end looks for interrupts as well.
    window = b"\xfb\xba" + struct.pack("<H", PORT_NOBODY) + b"\xee\xfa"  # sti; mov dx; out; cli
    return bytes(code + window * WINDOWS + _out(PORT_EXIT, 0) + b"\xeb\xfe")  # jmp $


def _out(port: int, value: int, size: int = 1) -> bytes:
    where = b"\xba" + struct.pack("<H", port)  # mov dx, port
    if size == 1:
        return where + bytes((0xB0, value & 0xFF, 0xEE))  # mov al, value; out dx, al
    return where + b"\xb8" + struct.pack("<H", value) + b"\xef"  # mov ax, value; out dx, ax
