"""What Linux finds as its first user space: an initramfs with an init of our own.

`tiny_initrd` makes it. Its init, a static program (``init.asm``), runs commands from the console or
from a script: ``cat``, ``ticks``, ``date``, ``sleep``, ``snapshot``; ``help`` lists them all. A
script has a command a line; ``#`` begins a comment. The machine powers off after the script, at
``exit`` and at the end of the console's input; without ACPI, which alone can do that, it is reset.

``snapshot NAME`` prints one line, ``snapshot NAME ...``, and waits until it is sent; then it reads
without printing anything, and prints what it read in one write::

    snapshot NAME begin
    <the text of /proc/interrupts>
    <the text of /proc/uptime>
    monotonic_ns <CLOCK_MONOTONIC>
    realtime_ns <CLOCK_REALTIME>
    snapshot NAME end

It has no kernel modules: the kernel's own drivers must do.
"""

import struct
from importlib.resources import files
from pathlib import Path

from kvmtick.guests.linux.cpio import Entry, archive, directory, file, node

__all__ = ["init", "tiny_initrd"]

DEVICES = (
    node("dev/console", 5, 1),
    node("dev/ttyS0", 4, 64),
    node("dev/null", 1, 3, 0o666),
)
ELF_X86_64 = b"\x7fELF\x02\x01"
EM_X86_64 = 62
PT_INTERP = 3


def init() -> bytes:
    """The program that Linux starts as process 1."""
    return files(__name__).joinpath("init.bin").read_bytes()


def tiny_initrd(*, script: bytes | None = None, busybox: Path | None = None) -> bytes:
    """An initramfs, not compressed: our init, and on wish a script and a busybox.

    `script`: commands that init runs in place of the console's. `busybox`: a static x86-64 busybox,
    for init's command ``sh``. ValueError, one line, if it is not one; OSError if it cannot be read.
    """
    entries: list[Entry] = [directory(path) for path in ("bin", "dev", "proc", "sys")]
    entries += [*DEVICES, file("init", init(), 0o755)]
    if script is not None:
        entries.append(file("script", script))
    if busybox is not None:
        entries.append(file("bin/busybox", _static(busybox), 0o755))
    return archive(entries)


def _static(path: Path) -> bytes:
    """The bytes of a program that needs no dynamic linker."""
    image = path.read_bytes()
    remedy = "give a static busybox (Debian: apt-get install busybox-static)"
    try:
        if not image.startswith(ELF_X86_64) or struct.unpack_from("<H", image, 18)[0] != EM_X86_64:
            raise ValueError(f"{path} is no x86-64 ELF program: {remedy}")
        dynamic = PT_INTERP in _segment_types(image)
    except struct.error:
        raise ValueError(f"{path} ends within its ELF headers: {remedy}") from None
    if dynamic:
        raise ValueError(f"{path} is linked dynamically: {remedy}")
    return image


def _segment_types(image: bytes) -> list[int]:
    """p_type of each program header of a 64-bit ELF file; struct.error where the file ends."""
    (offset,) = struct.unpack_from("<Q", image, 32)
    size, count = struct.unpack_from("<HH", image, 54)
    return [struct.unpack_from("<I", image, offset + size * each)[0] for each in range(count)]
