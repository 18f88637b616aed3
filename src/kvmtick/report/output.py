"""Files that are written whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EDQUOT, ENOSPC
from io import FileIO
from pathlib import Path
from typing import Any

from kvmtick.abi.errors import HostError

__all__ = ["OutputFile", "output_errors", "replaced", "replaced_file"]


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A place beside `path` to write to; it takes the place of `path` when all went well.

    What is no regular file (a pipe, a device) is written to directly. Raises `HostError`.
    """
    with output_errors(path):
        if path.is_dir():
            raise IsADirectoryError(0, "it is a directory")
        final = path.resolve()
        beside = final.with_name(f".{final.name}.{os.getpid()}")
        if final.exists() and not final.is_file():
            beside = final
        elif not os.access(final.parent, os.W_OK | os.X_OK):
            why = "is not writable" if final.parent.is_dir() else "is no directory"
            raise OSError(0, f"{final.parent} {why}")
    try:
        yield beside
        if beside != final:
            with output_errors(path):
                os.replace(beside, final)
    finally:
        if beside != final:
            beside.unlink(missing_ok=True)


@contextmanager
def replaced_file(path: Path) -> Iterator[FileIO]:
    """The same, as a file that is open. What goes wrong in writing raises `HostError`, too."""
    with replaced(path) as beside, OutputFile(beside, path) as file:
        yield file


class OutputFile(FileIO):
    """A file without a buffer that writes all it is given, and whose faults are `HostError`s."""

    def __init__(self, path: Path, output: Path) -> None:
        """Raises `HostError` by the name of `output`, which is what the user asked for."""
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
