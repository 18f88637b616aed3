"""Files that are written whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EDQUOT, ENOSPC
from io import FileIO
from pathlib import Path
from typing import Any

from kvmtick.abi.errors import HostError

__all__ = ["output_errors", "replaced"]


@contextmanager
def replaced(path: Path) -> Iterator[FileIO]:
    """A file, without a buffer, that takes the place of `path` when all went well.

    What is no regular file (a pipe, a device) is written to directly. Raises `HostError`, also from
    the file's `write`.
    """
    with output_errors(path):
        if path.is_dir():
            raise IsADirectoryError(0, "it is a directory")
        final = path.resolve()
        if not final.parent.is_dir():
            raise NotADirectoryError(0, f"{final.parent} is no directory")
    beside = final.with_name(f".{final.name}.{os.getpid()}")
    if final.exists() and not final.is_file():
        beside = final
    file = _Output(beside, path)
    try:
        with file:
            yield file
        if beside != final:
            with output_errors(path):
                os.replace(beside, final)
    finally:
        if beside != final:
            beside.unlink(missing_ok=True)


class _Output(FileIO):
    """Writes all it is given; what goes wrong is told by the name of the output."""

    def __init__(self, path: Path, output: Path) -> None:
        self._output = output
        with output_errors(output):
            super().__init__(path, "w")

    def write(self, data: Any) -> int:
        """Write all of it."""
        rest = memoryview(data).cast("B")
        with output_errors(self._output):
            while rest:
                rest = rest[super().write(rest) or 0 :]
        return len(data)


@contextmanager
def output_errors(path: Path, remedy: str = "give a writable file") -> Iterator[None]:
    """An OSError in here is the fault of the output `path`: `HostError` in one line."""
    try:
        yield
    except OSError as error:
        if error.errno in (ENOSPC, EDQUOT):
            remedy = "free some, or write to another disk"
        raise HostError(f"{path}: {error.strerror or error}", remedy) from None
