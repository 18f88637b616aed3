"""What this process may do with its own memory (proc(5), /proc/self/maps)."""

from enum import Flag, auto
from pathlib import Path

__all__ = ["Rights", "rights_of"]

MAPS = Path("/proc/self/maps")


class Rights(Flag):
    """Rights to memory."""

    NONE = 0
    READ = auto()
    WRITE = auto()


def rights_of(address: int, size_bytes: int) -> Rights:
    """What is allowed for every page of a range."""
    rights = Rights.READ | Rights.WRITE
    at, end = address, address + size_bytes
    for line in MAPS.read_text().splitlines():
        span, letters = line.split(maxsplit=2)[:2]
        start, stop = (int(part, 16) for part in span.split("-"))
        if stop <= at:
            continue
        if start > at or at >= end:
            break
        allowed = Rights.NONE
        if letters[0] == "r":
            allowed |= Rights.READ
        if letters[1] == "w":
            allowed |= Rights.WRITE
        rights &= allowed
        at = stop
    return rights if at >= end else Rights.NONE
