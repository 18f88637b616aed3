"""The 8042 keyboard controller without a keyboard (IBM PC/AT technical reference, "Keyboard
controller"): enough for A20, for a reset by command 0xfe, and to be told that nobody is there.

It answers at once. Of the output port, bit 0 resets and the others are only kept.

Not modelled: keyboard and mouse, their interrupts and their commands (bytes for them are lost,
where a real controller would tell a time-out), A20 (always on), its internal RAM but the command
byte (0x21-0x3f, 0x61-0x7f), diagnostic dump 0xac, passwords 0xa4-0xa6, polling 0xc1 and 0xc2, and
what only some makers have, as A20 by 0xdd and 0xdf: such commands have no answer.
"""

from typing import Final

from kvmtick.machine.pc.host import PcHost
from kvmtick.machine.ports import PortHandler

__all__ = ["I8042"]

PORT_DATA: Final = 0x60
PORT_COMMAND: Final = 0x64

STATUS_OUTPUT_FULL, STATUS_SYSTEM, STATUS_COMMAND, STATUS_UNLOCKED = 0x01, 0x04, 0x08, 0x10

READ_COMMAND_BYTE, WRITE_COMMAND_BYTE = 0x20, 0x60
SELF_TEST, SELF_TEST_PASSED = 0xAA, 0x55
TEST_MOUSE, TEST_KEYBOARD, CLOCK_LINE_STUCK_LOW = 0xA9, 0xAB, 0x01
LOOP_KEYBOARD, LOOP_MOUSE = 0xD2, 0xD3
"""Give a byte back as if the keyboard or the mouse had sent it; without a mouse's port it comes as
the keyboard's: a driver that waited in vain would do so for half a second with interrupts off."""
WRITE_MOUSE: Final = 0xD4
DISABLE_MOUSE, ENABLE_MOUSE = 0xA7, 0xA8
DISABLE_KEYBOARD, ENABLE_KEYBOARD = 0xAD, 0xAE
READ_OUTPUT_PORT, WRITE_OUTPUT_PORT = 0xD0, 0xD1
READ_INPUT_PORT, INPUT_PORT = 0xC0, 0xA0
"""The keyboard is not locked (bit 7), the manufacturer's jumper is not installed (bit 5)."""
READ_TEST_INPUTS, TEST_INPUTS = 0xE0, 0x02
"""The keyboard's clock line is low, its data line high."""
HAVE_A_BYTE: Final = (
    WRITE_COMMAND_BYTE, WRITE_OUTPUT_PORT, LOOP_KEYBOARD, LOOP_MOUSE, WRITE_MOUSE,
)  # fmt: skip
PULSE: Final = 0xF0
"""The low four bits pull bits of the output port low for 6 us where they are 0."""
OUTPUT_NO_RESET, OUTPUT_A20 = 0x01, 0x02
COMMAND_SYSTEM, COMMAND_KEYBOARD_OFF, COMMAND_MOUSE_OFF = 0x04, 0x10, 0x20

ANSWERS: Final = {
    SELF_TEST: SELF_TEST_PASSED,
    TEST_KEYBOARD: CLOCK_LINE_STUCK_LOW,
    TEST_MOUSE: CLOCK_LINE_STUCK_LOW,
    READ_INPUT_PORT: INPUT_PORT,
    READ_TEST_INPUTS: TEST_INPUTS,
}
"""Those that are always the same."""
SET_OR_CLEAR: Final = {
    DISABLE_KEYBOARD: (COMMAND_KEYBOARD_OFF, 0),
    ENABLE_KEYBOARD: (0, COMMAND_KEYBOARD_OFF),
    DISABLE_MOUSE: (COMMAND_MOUSE_OFF, 0),
    ENABLE_MOUSE: (0, COMMAND_MOUSE_OFF),
}
"""What a command sets, and what it clears in the command byte."""


class I8042:
    """Its registers. `expects` is the command whose byte comes next by the data port."""

    def __init__(self, host: PcHost) -> None:
        self._host = host
        self.command_byte = COMMAND_SYSTEM | COMMAND_KEYBOARD_OFF | COMMAND_MOUSE_OFF
        self.output_port = OUTPUT_NO_RESET | OUTPUT_A20
        self.output: int | None = None
        """What the guest has to read."""
        self.last_output = 0
        self.last_was_command = False
        self.expects = 0

    def ports(self) -> dict[int, PortHandler]:
        """Who answers which port."""
        return {PORT_DATA: self._access_data, PORT_COMMAND: self._access_command}

    def _access_data(self, port: int, size_bytes: int, value: int | None) -> int | None:
        if size_bytes != 1:
            return None
        if value is None:
            if self.output is not None:
                self.last_output, self.output = self.output, None
            return self.last_output
        self.last_was_command = False
        expects, self.expects = self.expects, 0
        if expects == WRITE_COMMAND_BYTE:
            self.command_byte = value
        elif expects == WRITE_OUTPUT_PORT:
            self._write_output_port(value)
        elif expects in (LOOP_KEYBOARD, LOOP_MOUSE):
            self.output = value
        return None

    def _access_command(self, port: int, size_bytes: int, value: int | None) -> int | None:
        if size_bytes != 1:
            return None
        if value is None:
            return self._status()
        self.last_was_command = True
        self.expects = value if value in HAVE_A_BYTE else 0
        self._command(value)
        return None

    def _status(self) -> int:
        status = STATUS_UNLOCKED | self.command_byte & STATUS_SYSTEM
        if self.output is not None:
            status |= STATUS_OUTPUT_FULL
        return status | (STATUS_COMMAND if self.last_was_command else 0)

    def _command(self, command: int) -> None:
        if command == READ_COMMAND_BYTE:
            self.output = self.command_byte
        elif command in ANSWERS:
            self.output = ANSWERS[command]
        elif command in SET_OR_CLEAR:
            bits_set, bits_clear = SET_OR_CLEAR[command]
            self.command_byte = (self.command_byte | bits_set) & ~bits_clear
        elif command == READ_OUTPUT_PORT:
            self.output = self.output_port
        elif command & PULSE == PULSE and not command & OUTPUT_NO_RESET:
            self._host.reset("the keyboard controller")

    def _write_output_port(self, value: int) -> None:
        self.output_port = value
        if not value & OUTPUT_NO_RESET:
            self._host.reset("the keyboard controller")
