"""Foreign guest images: flat binaries and boot sectors, entered in real mode.

A boot sector is a file of 512 bytes that ends in 55 aa; it goes to 0x7c00 and starts at 0000:7c00
(the BIOS boot convention). Anything else is flat: it goes to `load_at` (default 0x8000) and starts
there unless `entry` says otherwise.
"""

from pathlib import Path

from kvmtick.guests import Guest

__all__ = ["REAL_MODE_LIMIT", "LoadError", "load_file"]

BOOT_SECTOR_BYTES = 512
BOOT_SIGNATURE = b"\x55\xaa"
BOOT_ADDRESS = 0x7C00
FLAT_ADDRESS = 0x8000
REAL_MODE_LIMIT = 0x10_0000
SEGMENT_BYTES = 0x1_0000


class LoadError(ValueError):
    """An image that cannot be run; the message names it and the remedy."""


def load_file(path: Path, load_at: int | None = None, entry: int | None = None) -> Guest:
    """Read an image; addresses are guest-physical. LoadError if it is missing, empty, too large."""
    try:
        image = path.read_bytes()
    except OSError as error:
        raise LoadError(
            f"cannot read {str(path)!r}: {error.strerror}: give a readable file"
        ) from None
    if not image:
        raise LoadError(f"{str(path)!r} is empty: give a flat binary or a 512-byte boot sector")
    if load_at is None:
        load_at = BOOT_ADDRESS if is_boot_sector(image) else FLAT_ADDRESS
    if entry is None:
        entry = load_at
    check_range("--load-at", load_at)
    check_range("--entry", entry)
    if load_at + len(image) > REAL_MODE_LIMIT:
        raise LoadError(
            f"{str(path)!r} has {len(image)} bytes and does not fit at {load_at:#x}:"
            f" real mode ends at {REAL_MODE_LIMIT:#x}, choose a lower --load-at or a smaller image"
        )
    return Guest(path.name, image, load_at, real_mode_address(entry), None)


def is_boot_sector(image: bytes) -> bool:
    """512 bytes with the boot signature at the end."""
    return len(image) == BOOT_SECTOR_BYTES and image.endswith(BOOT_SIGNATURE)


def check_range(option: str, address: int) -> None:
    """LoadError unless real mode can reach `address`."""
    if not 0 <= address < REAL_MODE_LIMIT:
        raise LoadError(
            f"{option} {address:#x} is out of real mode's reach: give 0 to {REAL_MODE_LIMIT - 1:#x}"
        )


def real_mode_address(address: int) -> tuple[int, int]:
    """`cs`, `ip` for a physical address: segment 0 below 64 KiB, else the 64 KiB-aligned one."""
    return (address & ~(SEGMENT_BYTES - 1)) >> 4, address & (SEGMENT_BYTES - 1)
