"""Random programs for the PIT's and the PICs' ports, and what of their outcome is a matter of time.

A program is a list of operations. Those on ports are carried out by a guest (`assemble`), with
interrupts off; the others are calls of KVM's API that user space makes when the guest asks for it.

Channel 0's timer must not fire on its own: then the outcome would hang on how fast the host is. So
`settle` makes every count that starts it large (40 ms at least), and a timer that is to fire is an
operation of its own, `Tick`, which waits for it.

At the end the guest opens WINDOWS interrupt windows, each for one interrupt, and notes the vectors
it gets: only so the PICs' INTR line shows, which no state holds.
"""

import struct
from dataclasses import dataclass, replace
from typing import TypeAlias

from hypothesis import strategies as st

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

BYTE = st.integers(0, 0xFF)
PIC_PORTS = st.sampled_from((0x20, 0xA0))
PORTS = (0x20, 0x21, 0xA0, 0xA1, 0x4D0, 0x4D1, 0x40, 0x41, 0x42, 0x43, 0x61)
OCW2 = (0x00, 0x20, 0x40, 0x60, 0x61, 0x62, 0x67, 0x80, 0xA0, 0xC0, 0xC2, 0xE0, 0xE3, 0xE7)
OCW3 = (0x08, 0x0A, 0x0B, 0x0C, 0x0E, 0x0F, 0x48, 0x68, 0x6B, 0x6C)
ICW1 = (0x11, 0x11, 0x10, 0x13, 0x19, 0x1F)
ICW4 = (0x01, 0x03, 0x11, 0x13, 0x00, 0x0D)


def _initialise(args: tuple[int, int, int, int, int, int]) -> tuple[Operation, ...]:
    port, icw1, icw2, icw3, icw4, length = args
    words = (Out(port + 1, icw2), Out(port + 1, icw3), Out(port + 1, icw4))
    return (Out(port, icw1), *words[:length])


def _access(channel: int) -> st.SearchStrategy[tuple[Operation, ...]]:
    """A control word for `channel`, and some of the bytes it asks for."""
    control = st.integers(0, 0x3F).map(lambda low: Out(0x43, channel << 6 | low))
    data = st.one_of(
        BYTE.map(lambda value: Out(0x40 + channel, value)), st.just(In(0x40 + channel))
    )
    return st.tuples(control, st.lists(data, max_size=3)).map(lambda pair: (pair[0], *pair[1]))


def _one(strategy: st.SearchStrategy[Operation]) -> st.SearchStrategy[tuple[Operation, ...]]:
    return strategy.map(lambda operation: (operation,))


SIZES = st.sampled_from((1, 1, 1, 1, 1, 1, 1, 2))
PULSE = st.integers(0, 15).map(lambda gsi: (Line(gsi, 1), Line(gsi, 0)))


def _pit_channel(count: int, middle: bytes, mode: int, tail: tuple[int, int, int]) -> bytes:
    channel = kvm_pit_channel_state(count=count, mode=mode)
    channel.latched_count = middle[0] << 8 | middle[1]
    channel.count_latched, channel.status_latched, channel.status = middle[2:5]
    channel.read_state, channel.write_state, channel.write_latch = middle[5:8]
    channel.rw_mode, channel.bcd, channel.gate = tail
    return bytes(channel)


SMALL = st.one_of(st.integers(0, 4), BYTE)
CHANNEL = st.builds(
    _pit_channel,
    st.sampled_from((0, 1, 100, 0x1234, 0x10000, 0x123456, 0xFFFFFFFF)),
    st.tuples(BYTE, BYTE, SMALL, SMALL, BYTE, SMALL, SMALL, BYTE).map(bytes),
    st.one_of(st.integers(0, 5), BYTE),
    st.tuples(SMALL, BYTE, BYTE),
)


def _pit_state(channels: list[bytes], flags: int) -> Operation:
    state = kvm_pit_state2(flags=flags)
    for index, channel in enumerate(channels):
        state.channels[index] = kvm_pit_channel_state.from_buffer_copy(channel)
    return SetPit2(bytes(state))


FLAGS = st.sampled_from((0, 0, 1, 2, 3, 0xFFFFFFFE))
SET_PIT2 = st.builds(_pit_state, st.lists(CHANNEL, min_size=3, max_size=3), FLAGS)
SET_IRQCHIP = st.builds(
    SetIrqchip,
    st.integers(0, 1),
    st.lists(st.one_of(SMALL, BYTE), min_size=16, max_size=16).map(bytes),
)
INITIALISE: st.SearchStrategy[tuple[Operation, ...]] = st.tuples(
    PIC_PORTS,
    st.sampled_from(ICW1),
    BYTE,
    BYTE,
    st.sampled_from(ICW4),
    st.sampled_from((3, 3, 3, 0, 1, 2)),
).map(_initialise)
PIECES: st.SearchStrategy[tuple[Operation, ...]] = st.one_of(
    _one(st.builds(In, st.sampled_from(PORTS), SIZES)),
    _one(st.builds(Out, st.sampled_from(PORTS), BYTE, SIZES)),
    _one(st.builds(Out, PIC_PORTS, st.sampled_from(OCW2))),
    _one(st.builds(Out, PIC_PORTS, st.sampled_from(OCW3))),
    # A poll, or a register chosen, and read.
    st.tuples(st.builds(Out, PIC_PORTS, st.sampled_from(OCW3)), st.builds(In, PIC_PORTS)),
    INITIALISE,
    # A line that is high while the chip is initialised anew.
    st.tuples(st.integers(0, 15), INITIALISE).map(
        lambda pair: (Line(pair[0], 1), *pair[1], Line(pair[0], 0))
    ),
    _access(0),
    _access(1),
    _access(2),
    _one(st.integers(0, 0x3F).map(lambda low: Out(0x43, 0xC0 | low))),
    PULSE,
    PULSE,
    _one(st.builds(Line, st.integers(0, 15), st.integers(0, 1))),
    _one(
        st.one_of(
            SET_IRQCHIP, SET_IRQCHIP, SET_PIT2, st.builds(Reinject, st.booleans()), st.just(Tick())
        )
    ),
)


def _settled(pieces: list[tuple[Operation, ...]]) -> Program:
    return settle(tuple(operation for piece in pieces for operation in piece))


PROGRAMS: st.SearchStrategy[Program] = st.lists(PIECES, min_size=1, max_size=14).map(_settled)


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
