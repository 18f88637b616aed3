"""Files that are written whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EDQUOT, ENOSPC
from pathlib import Path

from kvmtick.abi.errors import HostError

__all__ = ["output_errors", "replaced"]


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
            raise OSError(0, "its directory is not there or cannot be written to")
    try:
        yield beside
        with output_errors(path):
            os.replace(beside, final)
    finally:
        if beside != final:
            beside.unlink(missing_ok=True)


@contextmanager
def output_errors(path: Path, remedy: str = "give a writable file") -> Iterator[None]:
    """An OSError in here is the fault of the output `path`: `HostError` in one line."""
    try:
        yield
    except OSError as error:
        if error.errno in (ENOSPC, EDQUOT):
            remedy = "free some, or write to another disk"
        raise HostError(f"{path}: {error.strerror or error}", remedy) from None
