"""The UART by its registers, as the PC16550D datasheet has them; and under a guest."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from pc_host import FakePc

import kvmtick
from kvmtick.abi import HostError
from kvmtick.guests import Guest
from kvmtick.guests.build import assemble
from kvmtick.kvm.kernel import KernelVm
from kvmtick.machine.pc.console import Console
from kvmtick.machine.pc.uart import FIFO_BYTES, Uart

DATA, IER, IIR, LCR, MCR, LSR, MSR, SCR = range(0x3F8, 0x400)
FCR = IIR
RECEIVED, EMPTY, LINE_STATUS, MODEM = 1, 2, 4, 8
DTR, RTS, OUT1, OUT2, LOOP = 1, 2, 4, 8, 0x10
FIFO_ON, CLEAR_RECEIVER, CLEAR_TRANSMITTER = 1, 2, 4
NONE, IIR_MODEM, IIR_EMPTY, IIR_RECEIVED, IIR_LINE_STATUS = 1, 0, 2, 4, 6
READY, OVERRUN = 1, 2


class Com1(FakePc):
    def __init__(self) -> None:
        super().__init__()
        self.uart = Uart(self.host)
        self.ports = self.uart.ports()
        self.rooms = 0
        self.uart.on_room = self._room

    def _room(self) -> None:
        self.rooms += 1

    def read_all(self) -> bytes:
        got = bytearray()
        while self.read(LSR) & READY:
            got.append(self.read(DATA))
        return bytes(got)


@pytest.fixture
def com1() -> Com1:
    return Com1()


# --- who it is: the steps of Linux's autoconfig ---------------------------------------------------


def test_identification_by_ier_and_loopback(com1: Com1) -> None:
    for value in (0, 0x0F):
        com1.write(IER, value)
        assert com1.read(IER) == value
    com1.write(IER, 0xFF)
    assert com1.read(IER) == 0x0F
    com1.write(IER, 0)
    com1.write(MCR, LOOP | RTS | OUT2)
    assert com1.read(MSR) & 0xF0 == 0x90
    com1.write(MCR, 0xFF)
    assert com1.read(MCR) == 0x1F


def test_identification_as_a_16550a_by_its_fifo(com1: Com1) -> None:
    assert com1.read(IIR) >> 6 == 0
    com1.write(FCR, FIFO_ON)
    assert com1.read(IIR) == 0xC1
    # no 16750: no FIFO of 64 bytes, whatever the divisor latch
    com1.write(LCR, 0x80)
    com1.write(FCR, FIFO_ON | 0x20)
    assert com1.read(IIR) == 0xC1
    com1.write(LCR, 0)
    com1.write(FCR, 0)
    assert com1.read(IIR) == NONE


def test_size_of_the_fifo_in_loopback(com1: Com1) -> None:
    com1.write(FCR, FIFO_ON | CLEAR_RECEIVER | CLEAR_TRANSMITTER)
    com1.write(MCR, LOOP)
    for value in range(256):
        com1.write(DATA, value)
    assert com1.read(LSR) == 0x60 | READY | OVERRUN
    assert com1.read(LSR) == 0x60 | READY
    assert com1.read_all() == bytes(range(16))
    assert com1.sent == b""


@pytest.mark.parametrize("value", [0, 0x55, 0xAA, 0xFF])
def test_scratch(com1: Com1, value: int) -> None:
    com1.write(SCR, value)
    assert com1.read(SCR) == value


def test_divisor_latch_hides_data_and_ier(com1: Com1) -> None:
    com1.write(IER, MODEM)
    com1.write(LCR, 0x83)
    com1.write(DATA, 0x34)
    com1.write(IER, 0x12)
    assert (com1.read(DATA), com1.read(IER), com1.uart.divisor) == (0x34, 0x12, 0x1234)
    com1.write(LCR, 0x03)
    assert (com1.read(LCR), com1.read(IER)) == (3, MODEM)
    assert com1.sent == b""
    com1.write(DATA, 0x34)
    assert com1.sent == b"4"


def test_other_sizes_are_nobody_s(com1: Com1) -> None:
    assert com1.ports[DATA](DATA, 2, None) is None
    com1.write(DATA, 0x4141, 2)
    assert com1.sent == b""


# --- interrupts -----------------------------------------------------------------------------------


def test_the_empty_transmitter_tells_once(com1: Com1) -> None:
    com1.write(MCR, OUT2)
    com1.write(IER, EMPTY)
    assert com1.lines == [(0, 4, 1)]
    assert com1.read(IIR) == IIR_EMPTY
    assert com1.read(IIR) == NONE
    assert com1.levels() == [1, 0]
    # the same IER again is no cause; the next byte is, and so is a new enabling
    com1.write(IER, EMPTY)
    assert com1.levels() == [1, 0]
    com1.write(DATA, ord("a"))
    assert com1.levels() == [1, 0, 1]
    assert com1.read(IIR) == IIR_EMPTY
    com1.write(IER, 0)
    com1.write(IER, EMPTY)
    assert com1.read(IIR) == IIR_EMPTY
    assert com1.sent == b"a"


def test_what_is_read_elsewhere_leaves_the_transmitters_interrupt(com1: Com1) -> None:
    com1.write(IER, EMPTY)
    for port in (LSR, MSR, IER, MCR, LCR):
        com1.read(port)
    assert com1.read(IIR) == IIR_EMPTY


def test_priorities(com1: Com1) -> None:
    """PC16550D, table IV: line status, data, transmitter, modem; each has a reset of its own."""
    com1.write(MCR, LOOP)  # DSR, CTS and DCD go away
    com1.write(DATA, 1)
    com1.write(DATA, 2)  # without the FIFO the receiver buffer is overrun
    com1.write(IER, RECEIVED | EMPTY | LINE_STATUS | MODEM)
    assert com1.read(IIR) == IIR_LINE_STATUS
    assert com1.read(LSR) & OVERRUN
    assert com1.read(IIR) == IIR_RECEIVED
    assert com1.read(IIR) == IIR_RECEIVED  # the transmitter's stays behind it
    assert com1.read(DATA) == 2
    assert com1.read(IIR) == IIR_EMPTY
    assert com1.read(IIR) == IIR_MODEM
    assert com1.read(MSR) == 0x0B
    assert com1.read(IIR) == NONE


def test_out2_is_the_gate_of_the_line(com1: Com1) -> None:
    com1.write(IER, RECEIVED)
    com1.uart.receive(b"a")
    assert com1.lines == []
    assert com1.read(IIR) == IIR_RECEIVED
    com1.write(MCR, OUT2)
    assert com1.levels() == [1]
    com1.write(MCR, 0)
    assert com1.levels() == [1, 0]
    # in loop mode the pin is inactive, and so the line is
    com1.write(MCR, OUT2)
    com1.write(MCR, OUT2 | LOOP)
    assert com1.levels() == [1, 0, 1, 0]
    assert com1.read(IIR) == IIR_RECEIVED


def test_modem_outputs_are_its_inputs_in_loop_mode(com1: Com1) -> None:
    assert com1.read(MSR) == 0xB0
    com1.write(MCR, LOOP)
    com1.read(MSR)
    for output, line, change in ((RTS, 0x10, 1), (DTR, 0x20, 2), (OUT2, 0x80, 8)):
        com1.write(MCR, LOOP | output)
        assert com1.read(MSR) == line | change
        com1.write(MCR, LOOP)
        assert com1.read(MSR) == change
    # TERI is the trailing edge only
    com1.write(MCR, LOOP | OUT1)
    assert com1.read(MSR) == 0x40
    com1.write(MCR, LOOP)
    assert com1.read(MSR) == 0x04


# --- input ----------------------------------------------------------------------------------------


def test_input_is_taken_as_far_as_the_fifo_goes(com1: Com1) -> None:
    com1.write(FCR, FIFO_ON)
    com1.write(MCR, OUT2)
    assert not com1.uart.wants_input
    com1.write(IER, RECEIVED)
    assert com1.uart.wants_input
    assert com1.rooms == 1
    assert com1.uart.receive(b"0123456789") == 10
    assert com1.uart.receive(b"abcdefghij") == 6
    assert com1.uart.receive(b"x") == 0
    assert not com1.uart.wants_input
    for _ in range(15):
        com1.read(DATA)
    assert (com1.rooms, com1.levels()) == (1, [1])
    assert com1.read(DATA) == ord("f")
    assert (com1.rooms, com1.levels()) == (2, [1, 0])
    assert com1.read(LSR) == 0x60


def test_without_the_fifo_there_is_room_for_one(com1: Com1) -> None:
    assert com1.uart.receive(b"ab") == 1
    assert com1.uart.receive(b"b") == 0
    assert com1.read(DATA) == ord("a")
    assert com1.uart.receive(b"b") == 1


def test_on_room_may_put_the_next_bytes_in(com1: Com1) -> None:
    rest = bytearray(b"hello, world: more than sixteen")

    def feed() -> None:
        del rest[: com1.uart.receive(bytes(rest))]

    com1.uart.on_room = feed
    com1.write(FCR, FIFO_ON)
    com1.write(MCR, OUT2)
    com1.write(IER, RECEIVED)
    assert com1.read_all() == b"hello, world: more than sixteen"
    assert com1.levels()[-1] == 0


@pytest.mark.parametrize("value", [FIFO_ON | CLEAR_RECEIVER, 0])
def test_a_cleared_fifo_has_room(com1: Com1, value: int) -> None:
    com1.write(FCR, FIFO_ON)
    com1.write(MCR, OUT2)
    com1.write(IER, RECEIVED)
    com1.uart.receive(bytes(16))
    rooms = com1.rooms
    com1.write(FCR, value)
    assert com1.rooms == rooms + 1
    assert com1.uart.wants_input
    assert com1.levels() == [1, 0]
    assert com1.read(LSR) == 0x60


def test_loop_mode_is_deaf_to_the_line(com1: Com1) -> None:
    com1.write(IER, RECEIVED)
    com1.write(MCR, LOOP)
    assert not com1.uart.wants_input
    assert com1.uart.receive(b"a") == 0
    rooms = com1.rooms
    com1.write(MCR, OUT2)
    assert com1.rooms == rooms + 1
    assert com1.uart.receive(b"a") == 1


def test_who_does_not_listen_has_no_room(com1: Com1) -> None:
    com1.uart.receive(b"a")
    com1.read(DATA)
    com1.write(MCR, LOOP)
    com1.write(MCR, OUT2)
    assert com1.rooms == 0
    com1.write(IER, RECEIVED)
    assert com1.rooms == 1


# --- a guest, on the model's chips and on the kernel's --------------------------------------------

SERIAL_IRQ = Path(__file__).with_name("serial-irq.bin")
LOAD_AT, EMPTIES, RECEIPTS, OTHERS = 0x8000, 0x8004, 0x8008, 0x800C
QUESTION, LINE = b"who is there?\n", b"a line of more bytes than the FIFO has\n"


@pytest.mark.skipif(shutil.which("nasm") is None, reason="nasm not found: source not assembled")
def test_the_guest_is_what_its_source_says() -> None:
    assert assemble(SERIAL_IRQ.with_suffix(".asm")) == SERIAL_IRQ.read_bytes()


def connect(vm: Any, fd: int) -> None:
    """COM1's input comes from there."""
    if isinstance(vm, KernelVm):
        user = vm.user
        user.console = Console(user.pc.uart, user.clock, user.queue, fd, live=True)
    else:
        machine = vm.machine
        machine.console = Console(machine.pc.uart, machine.clock, machine.board.queue, fd)


@pytest.mark.parametrize("backend", ["model", "kernel"])
def test_a_guest_prints_and_reads_a_line_by_irq_4(backend: str) -> None:
    try:
        created = kvmtick.Kvm(backend).create_vm()
    except HostError as error:
        pytest.skip(f"needs /dev/kvm: {error}")
    out, into = os.pipe()
    with created as vm, open(out, "rb"), open(into, "wb", buffering=0) as line:
        vm.create_irqchip()
        vm.create_vcpu(0)
        vm.load(Guest("serial-irq", SERIAL_IRQ.read_bytes(), LOAD_AT, (0, LOAD_AT), None))
        connect(vm, out)
        line.write(LINE)
        run = vm.run(limit_s=10.0)
        counts = [
            int.from_bytes(vm.read_memory(at, 4), "little") for at in (EMPTIES, RECEIPTS, OTHERS)
        ]
    said = QUESTION + b"hello, " + LINE
    assert (run.exit.reason, run.serial) == ("done", said.decode())
    empties, receipts, others = counts
    assert empties == len(said) + 2  # one for every byte, and one behind each line's last
    assert others == 0
    # by FIFOs; in real time the next bytes may come while the guest still reads
    fifos = -(-len(LINE) // FIFO_BYTES)
    assert receipts == fifos if backend == "model" else 1 <= receipts <= fifos
