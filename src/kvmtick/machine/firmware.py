"""Firmware: a PC's BIOS, which starts at the reset vector and finds the machine by itself.

The image is read-only memory that ends at 4 GiB; RAM below 1 MiB has a copy of its last 256 KiB,
as in the shadow RAM of a PC whose registers (PAM) let it be written from the start. The vCPU starts
as after RESET (SDM vol. 3A, 10.1.4): at f000:fff0, the base of CS being 0xffff0000.

Not modelled: those registers, flash that can be written.
"""

from pathlib import Path
from typing import Final

from kvmtick.guests import Guest, Needs
from kvmtick.machine.image_file import LoadError, read_image
from kvmtick.machine.pc.ata import MOST_SECTORS, SECTOR_BYTES

__all__ = ["FIRMWARE_RAM_BYTES", "load_firmware"]

FIRMWARE_RAM_BYTES: Final = 16 << 20
LEAST_RAM_BYTES: Final = 1 << 20
BLOCK_BYTES: Final = 64 << 10
MOST_BYTES: Final = 8 << 20
SHADOW_BYTES: Final = 256 << 10
FOUR_GIB: Final = 1 << 32

RESET_CS, RESET_IP = 0xF000, 0xFFF0
RESET_CS_BASE: Final = 0xFFFF_0000
RESET_VECTOR_BYTES: Final = 16
"""From the reset vector to the end."""
NOP: Final = b"\x90"
JUMPS: Final = (0xEA, 0xE9, 0xEB)
"""JMP far, near and short."""

REMEDY: Final = "give a PC's BIOS image, such as SeaBIOS's bios.bin"
REMEDY_DISK: Final = f"give a disk image of whole sectors of {SECTOR_BYTES} bytes"


def load_firmware(
    path: Path, *, ram_bytes: int | None = None, vcpus: int = 1, disk: Path | None = None
) -> Guest:
    """The guest that a firmware image is. LoadError, one line, if it cannot be one.

    `ram_bytes`: at least 1 MiB; default 16 MiB. `disk`: an image of whole sectors of 512 bytes,
    the first ATA disk; the file stays as it is, whatever the guest writes.
    """
    image = read_image(path, REMEDY)
    if len(image) % BLOCK_BYTES or len(image) > MOST_BYTES:
        raise LoadError(
            f"{str(path)!r} has {len(image)} bytes, which is no multiple of 64 KiB up to 8 MiB:"
            f" {REMEDY}"
        )
    if image[-RESET_VECTOR_BYTES:].lstrip(NOP)[:1] not in {bytes((jump,)) for jump in JUMPS}:
        raise LoadError(f"{str(path)!r} has no jump at its reset vector: {REMEDY}")
    if ram_bytes is None:
        ram_bytes = FIRMWARE_RAM_BYTES
    if ram_bytes < LEAST_RAM_BYTES:
        raise LoadError(f"ram_bytes={ram_bytes}: firmware needs 1 MiB or more")
    shadow = image[-SHADOW_BYTES:]
    return Guest(
        path.name,
        shadow,
        (1 << 20) - len(shadow),
        (RESET_CS, RESET_IP),
        None,
        Needs(vcpus=vcpus, ram_bytes=ram_bytes, gsi0="ioapic-pin-2"),
        start={"cs_base": RESET_CS_BASE},
        roms=((FOUR_GIB - len(image), image),),
        disk=b"" if disk is None else _read_disk(disk),
    )


def _read_disk(path: Path) -> bytes:
    """A disk image; LoadError if it is none."""
    data = read_image(path, REMEDY_DISK)
    if len(data) % SECTOR_BYTES or len(data) > MOST_SECTORS * SECTOR_BYTES:
        raise LoadError(f"{str(path)!r} has {len(data)} bytes: {REMEDY_DISK}")
    return data
