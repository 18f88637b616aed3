"""The file that a recording goes into; it is there, and can be read, while it is written."""

import io
import os
from contextlib import suppress
from pathlib import Path
from typing import Final

from kvmtick.abi.errors import HostError

__all__ = ["OutFile", "UnwritableError"]

_BUFFER_BYTES: Final = 1 << 20
_FLAGS: Final = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NONBLOCK
"""Not to wait for the reader of a named pipe: no signal ends that."""
_MODE: Final = 0o600
"""It tells kernel addresses."""


class UnwritableError(Exception):
    """The file cannot be opened; one line that says why."""


class OutFile(io.BufferedWriter):
    """A binary file; errors of writing are `HostError` and name it."""

    def __init__(self, path: Path) -> None:
        """Empties the file. Raises `UnwritableError`."""
        self.path = path
        try:
            fd = os.open(path, _FLAGS, _MODE)
            os.set_blocking(fd, True)
        except OSError as error:
            raise UnwritableError(f"{path}: {error.strerror}") from None
        super().__init__(io.FileIO(fd, "w"), _BUFFER_BYTES)

    @property
    def size_bytes(self) -> int:
        """How long it is."""
        with suppress(OSError):
            return self.path.stat().st_size
        return 0

    def write(self, data: bytes) -> int:  # type: ignore[override]
        """Write all of it. Raises `HostError`."""
        try:
            return super().write(data)
        except OSError as error:
            raise self._told(error) from None

    def flush(self) -> None:
        """Hand everything to the kernel. Raises `HostError`."""
        try:
            super().flush()
        except OSError as error:
            raise self._told(error) from None

    def _told(self, error: OSError) -> HostError:
        kept = f"; what was recorded until then can be read: kvmtick report {self.path}"
        what = f"{self.path}: {error.strerror}{kept if self.size_bytes else ''}"
        return HostError(what, "give --out a place with more room")

    def close(self) -> None:
        """Close it; harmless when repeated. What could not be written is lost."""
        with suppress(OSError, HostError):
            super().close()
