"""A guest as a ROM, so that QEMU and Bochs run the very image that kvmtick runs (`boot.asm`).

The only bytes changed are those behind the guest's end: where it would halt for good, it jumps to
the ROM's `ended`, which says on COM1 how the guest ended.
"""

import re
from pathlib import Path
from typing import Final

from kvmtick.guests import LOAD_AT

__all__ = ["ENDED", "ROM_BYTES", "exit_and_count", "rom_of"]

ROM_BYTES: Final = 0x10000
ENDED: Final = 0x7E00
"""Where boot.asm has `ended`."""

_GUEST_BYTES: Final = 0x6000
_DEAD: Final = bytes.fromhex("fa f4 eb fc")  # dead: cli; hlt; jmp dead (common.inc)
_JUMP_BYTES: Final = 3
_SAID: Final = re.compile("([0-9a-f]{2}) ([0-9a-f]{8})\n")


def rom_of(image: bytes) -> bytes:
    """A ROM for the last 64 KiB below 4 GiB that starts `image`, a real-mode guest.

    ValueError if it has no end to be found, or is too long.
    """
    at = image.find(_DEAD)
    if at < 0 or image.find(_DEAD, at + 1) >= 0:
        raise ValueError("the guest's end (cli; hlt; jmp) is not there, or not alone")
    if len(image) > _GUEST_BYTES:
        raise ValueError(f"the guest has {len(image)} bytes: {_GUEST_BYTES} at most")
    distance = ENDED - (LOAD_AT + at + _JUMP_BYTES) & 0xFFFF
    jump = b"\xe9" + distance.to_bytes(2, "little")
    ended = image[:at] + jump + image[at + _JUMP_BYTES :]
    boot = Path(__file__).with_name("boot.bin").read_bytes()
    return ended.ljust(ROM_BYTES - len(boot), b"\0") + boot


def exit_and_count(line: str) -> tuple[int, int]:
    """The guest's exit code and its own count, of what it said on COM1; ValueError if nothing."""
    found = _SAID.fullmatch(line)
    if found is None:
        raise ValueError(f"{line!r} does not say how the guest ended")
    return int(found[1], 16), int(found[2], 16)
