"""`kvmtick run linux` and `kvmtick run --kernel FILE`: which kernel, and what it is told."""

import argparse
from pathlib import Path

from kvmtick.cli import UsageError
from kvmtick.cli.run_options import ram_size_bytes, refuse_for, vcpu_count, with_cpuid
from kvmtick.guests import Guest
from kvmtick.machine import linux
from kvmtick.machine.installed import COMMAND_LINE, find_kernel, is_kernel
from kvmtick.machine.loader import LoadError

__all__ = ["LIMIT_S", "is_linux", "linux_guest"]

NAME = "linux"
LIMIT_S = 600.0
"""Of wall time, where nobody sits at the console."""

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
    if guest == NAME or (guest is not None and is_kernel(Path(guest))):
        return True
    for name, value in (("--initrd", options.initrd), ("--busybox", options.busybox)):
        if value is not None:
            raise UsageError(
                f"{name} {value}: only Linux takes it; give --kernel FILE, or run linux"
            )
    return False


def _kernel(options: argparse.Namespace) -> Path:
    if options.kernel is not None:
        return Path(options.kernel)
    return find_kernel() if options.guest == NAME else Path(options.guest)


def linux_guest(options: argparse.Namespace) -> Guest:
    """The kernel that was asked for, with its initramfs. UsageError for what cannot be loaded,
    HostError where no kernel is installed.
    """
    refuse_for(options, _NOT_FOR_LINUX, "Linux goes its own way")
    ram_bytes, vcpus = ram_size_bytes(options.ram), vcpu_count(options.vcpus)
    kernel = _kernel(options)
    initrd = _initrd(options)
    append = f"{COMMAND_LINE} {options.append or ''}".rstrip()
    try:
        guest = linux.load_linux(
            kernel, initrd=initrd, append=append, ram_bytes=ram_bytes, vcpus=vcpus
        )
    except LoadError as error:
        raise UsageError(str(error)) from None
    return with_cpuid(guest, options.cpuid)


def _initrd(options: argparse.Namespace) -> bytes:
    from kvmtick.guests.linux import tiny_initrd

    try:
        if options.initrd is None:
            return tiny_initrd(busybox=options.busybox and Path(options.busybox))
        if options.busybox is None:
            return Path(options.initrd).read_bytes()
    except OSError as error:
        option = "--initrd" if options.busybox is None else "--busybox"
        raise UsageError(
            f"{option}: cannot read {error.filename!r}: {error.strerror}: give a readable file"
        ) from None
    except ValueError as error:
        raise UsageError(f"--busybox: {error}") from None
    raise UsageError(
        f"--busybox {options.busybox}: is for our initramfs, not for {options.initrd!r}; leave one"
        " of them out"
    )
