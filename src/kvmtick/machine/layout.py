"""Where the parts of a guest go in RAM: some have their place, for others one is found."""

from bisect import bisect_right, insort

from kvmtick.cpu.paging import PAGE_BYTES

__all__ = ["LOW_END", "LOW_START", "ImageError", "Layout"]

LOW_START = 0x1000
"""The interrupt vectors and the BIOS data area lie below."""
LOW_END = 0x9_F000
"""The end of conventional memory, whole pages of it: what a kernel is told goes below. Behind it a
PC has the extended BIOS data area and the VGA's memory."""
HIGH_START = 0x10_0000


class ImageError(ValueError):
    """What is wrong with an image, as a sentence whose subject, the file's name, is left out."""


class Layout:
    """The parts placed so far; no two overlap and none leaves RAM."""

    def __init__(self, ram_bytes: int) -> None:
        self._ram_bytes = ram_bytes
        self._parts: list[tuple[int, int, str]] = []
        self._pieces: list[tuple[int, bytes]] = []

    @property
    def pieces(self) -> tuple[tuple[int, bytes], ...]:
        """For `Guest.pieces`."""
        return tuple(self._pieces)

    def put(self, what: str, gpa: int, data: bytes, size_bytes: int | None = None) -> None:
        """Place `data` at `gpa`, with zeros behind it up to `size_bytes`. ImageError if there is no
        RAM or something else.
        """
        size_bytes = len(data) if size_bytes is None else size_bytes
        if not size_bytes:
            return
        end = gpa + size_bytes
        if end > self._ram_bytes:
            raise ImageError(
                f"has its {what} at {gpa:#x} to {end:#x}, but RAM ends at {self._ram_bytes:#x}:"
                " give more --ram, or link it for lower physical addresses"
            )
        other = self._overlapped(gpa, end)
        if other is not None:
            raise ImageError(f"has its {what} at {gpa:#x} to {end:#x}, over its {other}: relink it")
        insort(self._parts, (gpa, end, what))
        self._pieces.append((gpa, data))
        if size_bytes > len(data):
            self._pieces.append((gpa + len(data), bytes(size_bytes - len(data))))

    def low(self, size_bytes: int) -> int:
        """The address of free pages as high in conventional memory as there are, else of `high`."""
        gpa = (LOW_END - size_bytes) & -PAGE_BYTES
        for start, end, _ in reversed(self._parts):
            if start < gpa + size_bytes and gpa < end:
                gpa = (start - size_bytes) & -PAGE_BYTES
        return gpa if gpa >= LOW_START else self.high(size_bytes)

    def high(self, size_bytes: int) -> int:
        """The address of the first free page above 1 MiB that has nothing behind it."""
        end = max([HIGH_START, *(end for _, end, _ in self._parts)])
        return (end + PAGE_BYTES - 1) & -PAGE_BYTES

    def _overlapped(self, gpa: int, end: int) -> str | None:
        """What lies between `gpa` and `end`; parts are in order and so are their ends."""
        before = bisect_right(self._parts, end, key=lambda part: part[0] + 1)
        if before and self._parts[before - 1][1] > gpa:
            return self._parts[before - 1][2]
        return None
