"""`kvmtick run linux` and `kvmtick run --kernel FILE`: which kernel, and what it is told."""

import argparse
import os
import re
from pathlib import Path

from kvmtick.abi.errors import HostError
from kvmtick.cli import UsageError
from kvmtick.cli.run_options import ram_size_bytes, refuse_for, vcpu_count, with_cpuid
from kvmtick.guests import Guest
from kvmtick.machine import linux
from kvmtick.machine.loader import LoadError

__all__ = ["LIMIT_S", "find_kernel", "is_linux", "linux_guest"]

NAME = "linux"
BOOT = Path("/boot")
COMMAND_LINE = "console=ttyS0 panic=-1"
"""The console is the serial line, and a kernel that panics resets the machine at once, which ends
the run."""
LIMIT_S = 600.0
"""Of wall time, where nobody sits at the console."""

_HEADER_BYTES = 1024
_NOT_FOR_LINUX = (
    "hz",
    "hold",
    "timer",
    "no_ack",
    "module",
    "load_at",
    "entry",
    "counter",
    "firmware",
    "disk",
)


def is_linux(options: argparse.Namespace) -> bool:
    """Whether a Linux kernel is asked for; UsageError where that is not clear."""
    guest = options.guest
    if options.kernel is not None:
        if guest not in (None, NAME):
            raise UsageError(
                f"--kernel {options.kernel}: {guest!r} is a guest already; leave one of them out"
            )
        return True
    if guest == NAME or (guest is not None and _is_kernel(Path(guest))):
        return True
    if options.initrd is not None:
        raise UsageError(
            f"--initrd {options.initrd}: only Linux takes it; give --kernel FILE, or run linux"
        )
    return False


def _is_kernel(path: Path) -> bool:
    """It looks like a bzImage; false where it cannot be read."""
    try:
        with path.open("rb") as file:
            return linux.is_linux(file.read(_HEADER_BYTES))
    except OSError:
        return False


def _kernel(options: argparse.Namespace) -> Path:
    if options.kernel is not None:
        return Path(options.kernel)
    return find_kernel() if options.guest == NAME else Path(options.guest)


def linux_guest(options: argparse.Namespace) -> Guest:
    """The kernel that was asked for, with its initramfs. UsageError for what cannot be loaded,
    HostError where no kernel is installed.
    """
    from kvmtick.guests.linux import tiny_initrd

    refuse_for(options, _NOT_FOR_LINUX, "Linux goes its own way")
    ram_bytes, vcpus = ram_size_bytes(options.ram), vcpu_count(options.vcpus)
    kernel = _kernel(options)
    initrd = tiny_initrd() if options.initrd is None else _contents(options.initrd)
    append = f"{COMMAND_LINE} {options.append or ''}".rstrip()
    try:
        guest = linux.load_linux(
            kernel, initrd=initrd, append=append, ram_bytes=ram_bytes, vcpus=vcpus
        )
    except LoadError as error:
        raise UsageError(str(error)) from None
    return with_cpuid(guest, options.cpuid)


def find_kernel(boot: Path = BOOT) -> Path:
    """The newest kernel in `boot` that can be read. HostError if there is none."""
    installed = sorted(boot.glob("vmlinuz-*"), key=_version, reverse=True)
    for path in installed:
        if _is_kernel(path):
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


def _contents(name: str) -> bytes:
    try:
        return Path(name).read_bytes()
    except OSError as error:
        raise UsageError(
            f"--initrd: cannot read {name!r}: {error.strerror}: give a readable file"
        ) from None
