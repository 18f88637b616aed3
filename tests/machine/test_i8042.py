"""The keyboard controller by its commands, as the PC/AT technical reference has them."""

import pytest
from pc_host import FakePc

from kvmtick.machine.pc.i8042 import I8042

DATA, COMMAND = 0x60, 0x64
OUTPUT_FULL, INPUT_FULL, SYSTEM, WAS_COMMAND = 1, 2, 4, 8


class Controller(FakePc):
    def __init__(self) -> None:
        super().__init__()
        self.ports = I8042(self.host).ports()

    def answer(self, command: int) -> int:
        """What a command gives, through the output buffer."""
        assert not self.read(COMMAND) & OUTPUT_FULL
        self.write(COMMAND, command)
        assert self.read(COMMAND) & OUTPUT_FULL
        value = self.read(DATA)
        assert not self.read(COMMAND) & OUTPUT_FULL
        return value


@pytest.fixture
def i8042() -> Controller:
    return Controller()


def test_self_test_and_nobody_at_the_ports(i8042: Controller) -> None:
    assert i8042.answer(0xAA) == 0x55
    assert i8042.answer(0xAB) == 1  # the keyboard's clock line is stuck low
    assert i8042.answer(0xA9) == 1  # and the mouse's
    assert i8042.read(DATA) == 1  # an empty buffer shows its last byte


def test_status_tells_the_kind_of_the_last_write(i8042: Controller) -> None:
    assert i8042.read(COMMAND) == 0x10 | SYSTEM
    i8042.write(COMMAND, 0xAD)
    assert i8042.read(COMMAND) & WAS_COMMAND
    i8042.write(DATA, 0xED)
    assert not i8042.read(COMMAND) & (WAS_COMMAND | INPUT_FULL | OUTPUT_FULL)


def test_command_byte(i8042: Controller) -> None:
    i8042.write(COMMAND, 0x60)
    i8042.write(DATA, 0x47)
    assert i8042.answer(0x20) == 0x47
    i8042.write(COMMAND, 0xAD)
    assert i8042.answer(0x20) == 0x57
    i8042.write(COMMAND, 0xAE)
    assert i8042.answer(0x20) == 0x47
    # the system flag of the status is the command byte's
    i8042.write(COMMAND, 0x60)
    i8042.write(DATA, 0x43)
    assert not i8042.read(COMMAND) & SYSTEM


def test_a_byte_belongs_to_the_last_command_only(i8042: Controller) -> None:
    before = i8042.answer(0x20)
    i8042.write(COMMAND, 0x60)
    i8042.write(COMMAND, 0xAD)
    i8042.write(DATA, 0xFF)
    assert i8042.answer(0x20) == before | 0x10
    i8042.write(COMMAND, 0x60)
    i8042.write(DATA, 0x01)
    i8042.write(DATA, 0xF4)  # for a keyboard
    assert i8042.answer(0x20) == 0x01


def test_output_port_and_a20(i8042: Controller) -> None:
    assert i8042.answer(0xD0) & 3 == 3
    i8042.write(COMMAND, 0xD1)
    i8042.write(DATA, 0xDD)
    assert i8042.answer(0xD0) == 0xDD
    assert i8042.resets == []
    i8042.write(COMMAND, 0xD1)
    i8042.write(DATA, 0xDE)
    assert i8042.resets == ["the keyboard controller"]


def test_input_port_and_test_inputs(i8042: Controller) -> None:
    assert i8042.answer(0xC0) == 0xA0  # not locked, no manufacturer's jumper
    assert i8042.answer(0xE0) == 0x02  # the clock line is low, as the test 0xab says


def test_mouse_port_off_and_on(i8042: Controller) -> None:
    i8042.write(COMMAND, 0xA8)
    assert i8042.answer(0x20) & 0x30 == 0x10
    i8042.write(COMMAND, 0xA7)
    assert i8042.answer(0x20) & 0x30 == 0x30


def test_a_byte_for_the_mouse_is_lost(i8042: Controller) -> None:
    before = i8042.answer(0x20)
    i8042.write(COMMAND, 0xD4)
    i8042.write(DATA, 0xFF)
    assert not i8042.read(COMMAND) & OUTPUT_FULL
    assert i8042.answer(0x20) == before


@pytest.mark.parametrize("command", [0x21, 0x61, 0xA4, 0xAC, 0xC1, 0xC2, 0xDD, 0xDF])
def test_other_commands_have_no_answer(i8042: Controller, command: int) -> None:
    before = i8042.answer(0x20), i8042.answer(0xD0)
    i8042.write(COMMAND, command)
    assert not i8042.read(COMMAND) & OUTPUT_FULL
    i8042.write(DATA, 0)
    assert (i8042.answer(0x20), i8042.answer(0xD0)) == before


@pytest.mark.parametrize("loop", [0xD2, 0xD3])
def test_a_loop_gives_the_byte_back(i8042: Controller, loop: int) -> None:
    i8042.write(COMMAND, loop)
    assert not i8042.read(COMMAND) & OUTPUT_FULL
    i8042.write(DATA, 0x5A)
    assert i8042.read(COMMAND) & OUTPUT_FULL
    assert i8042.read(DATA) == 0x5A


@pytest.mark.parametrize("pulse", range(0xF0, 0x100))
def test_a_pulse_resets_where_bit_0_is_low(i8042: Controller, pulse: int) -> None:
    i8042.write(COMMAND, pulse)
    assert len(i8042.resets) == (0 if pulse & 1 else 1)


def test_words_are_nobody_s(i8042: Controller) -> None:
    i8042.write(COMMAND, 0xFEFE, 2)
    assert i8042.resets == []
    assert i8042.ports[DATA](DATA, 2, None) is None
    assert i8042.ports[COMMAND](COMMAND, 4, None) is None
