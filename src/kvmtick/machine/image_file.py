"""Files that guests are made of."""

import stat
from pathlib import Path

from kvmtick.machine.memory import MOST_RAM_BYTES

__all__ = ["LoadError", "read_image"]


class LoadError(ValueError):
    """An image that cannot be run; the message names it and the remedy."""


def read_image(path: Path, remedy: str | None) -> bytes:
    """A file's contents. LoadError if there are none, which `remedy` says what to do about; None:
    it may be empty.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
            raise LoadError(f"{str(path)!r} is a device or a pipe: give a readable file")
        if status.st_size > MOST_RAM_BYTES:
            raise LoadError(f"{str(path)!r} has {status.st_size} bytes: give a smaller file")
        contents = path.read_bytes()
    except OSError as error:
        raise LoadError(
            f"cannot read {str(path)!r}: {error.strerror}: give a readable file"
        ) from None
    if not contents and remedy is not None:
        raise LoadError(f"{str(path)!r} is empty: {remedy}")
    return contents
