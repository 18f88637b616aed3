"""Guests from files, each loaded as what it is.

* Boot sector: 512 bytes that end in 55 aa; at 0x7c00, entered in real mode at 0000:7c00 (the BIOS
  boot convention).
* Multiboot 1 kernel: a header in the first 8192 bytes (`kvmtick.machine.multiboot`).
* Linux bzImage: `kvmtick.machine.linux`.
* Another ELF file: `kvmtick.machine.bare_elf`.
* Anything else is flat: at `load_at` (default 0x8000), entered there in real mode unless `entry`
  says otherwise. Who gives one of these wants it flat whatever it looks like, unless it is an ELF.

Files that are known to be something else (compressed, a PE, text, ...) are refused.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from kvmtick.guests import DEFAULT_NEEDS, Guest, Needs
from kvmtick.machine.bare_elf import load_bare_elf
from kvmtick.machine.elf import ELF_MAGIC
from kvmtick.machine.image_file import LoadError, read_image
from kvmtick.machine.layout import ImageError, Layout
from kvmtick.machine.linux import is_linux, linux_guest
from kvmtick.machine.multiboot import BootOptions, find_header, load_multiboot

__all__ = ["KERNEL_RAM_BYTES", "REAL_MODE_LIMIT", "LoadError", "load_file"]

BOOT_SECTOR_BYTES = 512
BOOT_SIGNATURE = b"\x55\xaa"
BOOT_ADDRESS = 0x7C00
FLAT_ADDRESS = 0x8000
REAL_MODE_LIMIT = 0x10_0000
SEGMENT_BYTES = 0x1_0000
KERNEL_RAM_BYTES = 128 << 20
"""RAM for ELF and Multiboot files; what starts in real mode gets less."""

REMEDY = "give a flat binary, a boot sector, a Multiboot or Linux kernel or an x86 ELF"
REMEDY_INITRD = "give an initramfs"
MAGICS = (
    (0, b"\x1f\x8b\x08", "a gzip file: unpack it first"),
    (0, b"\xfd7zXZ\0", "an xz file: unpack it first"),
    (0, b"\x28\xb5\x2f\xfd", "a zstd file: unpack it first"),
    (4, b"1AY&SY", "a bzip2 file: unpack it first"),
    (0, b"PK\x03\x04", "a zip file: unpack it first"),
    (0, b"!<arch>\n", "an archive of object files: link it"),
    (0, b"\xcf\xfa\xed\xfe", f"a Mach-O file: {REMEDY}"),
    (0, b"\xce\xfa\xed\xfe", f"a Mach-O file: {REMEDY}"),
    (0, b"QFI\xfb", f"a qcow2 disk image: {REMEDY}"),
    (0x8001, b"CD001", f"a CD image: {REMEDY}"),
    (0, b"#!", f"a script: {REMEDY}"),
)
"""Offset, bytes, what a file with these bytes is."""
PE_OFFSET_AT = 0x3C
TEXT = bytes(range(0x20, 0x7F)) + b"\t\n\r\f"


def load_file(
    path: Path,
    load_at: int | None = None,
    entry: int | None = None,
    *,
    ram_bytes: int | None = None,
    vcpus: int = 1,
    append: str = "",
    modules: Sequence[tuple[Path, str]] = (),
) -> Guest:
    """A guest from a file. LoadError, one line, if it cannot be one.

    `load_at` and `entry`, guest-physical, are for flat binaries. `ram_bytes`: at least 1 MiB;
    default 128 MiB, 256 MiB for Linux, 2 MiB for what starts in real mode. `append` and `modules`
    (files, each with its arguments) are what a Multiboot kernel is told; Linux takes one, its
    initrd.
    """
    image = read_image(path, REMEDY)
    wants_flat = load_at is not None or entry is not None
    try:
        if is_linux(image) and not wants_flat:
            initrd = _initrd(modules)
            return linux_guest(path.name, image, initrd, append, ram_bytes, vcpus)
        header = None if _is_real_mode(image, wants_flat) else find_header(image)
        if header is None and (append or modules):
            option = "--append" if append else "--module"
            raise ImageError(f"is no Multiboot kernel and takes no {option}: leave it out")
        if header is None and not image.startswith(ELF_MAGIC):
            if not wants_flat:
                _refuse_other_formats(image)
            needs = Needs(vcpus=vcpus, ram_bytes=ram_bytes or DEFAULT_NEEDS.ram_bytes)
            return _flat(path, image, load_at, entry, needs)
        if wants_flat:
            option = "--entry" if load_at is None else "--load-at"
            raise ImageError(f"is an ELF and has its addresses: leave {option} out")
        ram_bytes = ram_bytes or KERNEL_RAM_BYTES
        layout = Layout(ram_bytes)
        if header is None:
            start = load_bare_elf(image, layout)
        else:
            told = BootOptions(
                ram_bytes,
                _words(path, append),
                [(read_image(module, None), _words(module, text)) for module, text in modules],
            )
            start = load_multiboot(image, header, layout, told)
    except ImageError as error:
        raise LoadError(f"{str(path)!r} {error}") from None
    needs = Needs(vcpus=vcpus, ram_bytes=ram_bytes, gsi0="ioapic-pin-2")
    return Guest(path.name, b"", 0, (0, 0), None, needs, layout.pieces, start)


def is_boot_sector(image: bytes) -> bool:
    """512 bytes with the boot signature at the end."""
    return len(image) == BOOT_SECTOR_BYTES and image.endswith(BOOT_SIGNATURE)


def real_mode_address(address: int) -> tuple[int, int]:
    """`cs`, `ip` for a physical address: segment 0 below 64 KiB, else the 64 KiB-aligned one."""
    return (address & ~(SEGMENT_BYTES - 1)) >> 4, address & (SEGMENT_BYTES - 1)


def _initrd(modules: Sequence[tuple[Path, str]]) -> bytes:
    """Linux's one module."""
    if len(modules) > 1 or any(text for _, text in modules):
        raise ImageError("is a Linux kernel and takes one --module, its initrd, without arguments")
    return b"".join(read_image(module, REMEDY_INITRD) for module, _ in modules)


def _words(path: Path, arguments: str) -> bytes:
    """A command line: the file's name and its arguments."""
    return os.fsencode(f"{path.name} {arguments}".rstrip())


def _is_real_mode(image: bytes, wants_flat: bool) -> bool:
    """No kernel, whatever there is in it."""
    return is_boot_sector(image) or (wants_flat and not image.startswith(ELF_MAGIC))


def _refuse_other_formats(image: bytes) -> None:
    """ImageError for what is certainly no code."""
    if is_boot_sector(image):
        return
    for offset, magic, what in MAGICS:
        if image[offset : offset + len(magic)] == magic:
            raise ImageError(f"is {what}")
    pe_at = int.from_bytes(image[PE_OFFSET_AT : PE_OFFSET_AT + 4], "little")
    if image.startswith(b"MZ") and image[pe_at : pe_at + 4] == b"PE\0\0":
        raise ImageError(f"is a PE, a Windows or UEFI program: {REMEDY}")
    if b"\n" in image and not image.translate(None, TEXT):
        raise ImageError(f"is a text file: {REMEDY}")


def _flat(path: Path, image: bytes, load_at: int | None, entry: int | None, needs: Needs) -> Guest:
    """A flat binary or a boot sector."""
    if load_at is None:
        load_at = BOOT_ADDRESS if is_boot_sector(image) else FLAT_ADDRESS
    if entry is None:
        entry = load_at
    _check_reach("--load-at", load_at)
    _check_reach("--entry", entry)
    if load_at + len(image) > REAL_MODE_LIMIT:
        raise ImageError(
            f"has {len(image)} bytes and does not fit at {load_at:#x}:"
            f" real mode ends at {REAL_MODE_LIMIT:#x}, choose a lower --load-at or a smaller image"
        )
    return Guest(path.name, image, load_at, real_mode_address(entry), None, needs)


def _check_reach(option: str, address: int) -> None:
    """LoadError unless real mode can reach `address`."""
    if not 0 <= address < REAL_MODE_LIMIT:
        raise LoadError(
            f"{option} {address:#x} is out of real mode's reach: give 0 to {REAL_MODE_LIMIT - 1:#x}"
        )
