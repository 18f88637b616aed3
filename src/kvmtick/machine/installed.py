"""Linux kernels that are installed on the host, and the command line that they are given."""

import os
import re
from pathlib import Path
from typing import Final

from kvmtick.abi.errors import HostError
from kvmtick.machine import linux

__all__ = ["COMMAND_LINE", "find_kernel", "is_kernel"]

BOOT: Final = Path("/boot")
COMMAND_LINE: Final = "console=ttyS0 panic=-1"
"""The console is the serial line, and a kernel that panics resets the machine at once, which ends
the run."""

_HEADER_BYTES: Final = 1024


def is_kernel(path: Path) -> bool:
    """It looks like a bzImage; false where it cannot be read."""
    try:
        with path.open("rb") as file:
            return linux.is_linux(file.read(_HEADER_BYTES))
    except OSError:
        return False


def find_kernel(boot: Path = BOOT) -> Path:
    """The newest kernel in `boot` that can be read. HostError if there is none."""
    installed = sorted(boot.glob("vmlinuz-*"), key=_version, reverse=True)
    for path in installed:
        if is_kernel(path):
            return path
    if installed and not os.access(installed[0], os.R_OK):
        raise HostError(
            f"the kernel {str(installed[0])!r} cannot be read",
            "run as root, or give --kernel FILE",
        )
    raise HostError(
        f"no kernel in {boot}", "apt-get install linux-image-cloud-amd64, or give --kernel FILE"
    )


def _version(path: Path) -> list[int]:
    """6.10 is newer than 6.9."""
    return [int(number) for number in re.findall(r"\d+", path.name)]
