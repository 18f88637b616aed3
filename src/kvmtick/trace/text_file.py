"""The file of a text: blocks of whole lines, of a plain file or one that gzip packed."""

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path

__all__ = ["TextFile"]

_GZIP = b"\x1f\x8b"
_BLOCK_BYTES = 1 << 16
"""As much as stays in a CPU's cache while it is read."""


class TextFile:
    """An open text; `cut` says why its end is missing, empty if it is not. Raises OSError."""

    def __init__(self, path: Path) -> None:
        self.size_bytes = path.stat().st_size
        self.cut = ""
        self._raw = path.open("rb")
        packed = self._raw.peek(2)[:2] == _GZIP
        self._file = gzip.GzipFile(fileobj=self._raw) if packed else self._raw

    @property
    def position_bytes(self) -> int:
        """How much of the file was read."""
        return self._raw.tell()

    def blocks(self) -> Iterator[bytes]:
        """Whole lines, many at once; a last line that does not end is left out."""
        rest = b""
        while block := self._read():
            end = block.rfind(b"\n") + 1
            if end:
                yield rest + block[:end]
                rest = block[end:]
            else:
                rest += block
        if rest and not self.cut:
            self.cut = "the last line is not whole: the file was cut short"

    def _read(self) -> bytes:
        """The next block; of a packed file that ends in the middle all there is."""
        parts: list[bytes] = []
        left = _BLOCK_BYTES
        try:
            while left > 0 and (part := self._file.read1(left)):
                parts.append(part)
                left -= len(part)
        except EOFError:
            self.cut = "the file ends in the middle: it was cut short"
        except (zlib.error, gzip.BadGzipFile):
            self.cut = "the rest is damaged: gzip cannot unpack it"
        return b"".join(parts)

    def close(self) -> None:
        """Close the file; harmless when repeated."""
        self._raw.close()
