"""`kvmtick run linux` and `kvmtick run --kernel FILE`: which kernel, and what it is told."""

import argparse
import os
from pathlib import Path

from kvmtick.cli import UsageError
from kvmtick.cli.run_options import ram_size_bytes, refuse_for, vcpu_count, with_cpuid
from kvmtick.guests import Guest
from kvmtick.machine import linux
from kvmtick.machine.image_file import LoadError, read_image
from kvmtick.machine.installed import COMMAND_LINE, find_kernel, is_kernel

__all__ = ["LIMIT_S", "is_linux", "linux_guest"]

NAME = "linux"
REMEDY_INITRD = f"give an initramfs, or {os.devnull} for none"
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
    """The file that was asked for, or the tiny one of ours."""
    if options.initrd is None:
        return _tiny_initrd(options.busybox)
    if options.busybox is not None:
        raise UsageError(
            f"--busybox {options.busybox}: is for our initramfs, not for {options.initrd!r}; leave"
            " one of them out"
        )
    if options.initrd == os.devnull:
        return b""
    try:
        return read_image(Path(options.initrd), REMEDY_INITRD)
    except LoadError as error:
        raise UsageError(f"--initrd: {error}") from None


def _tiny_initrd(busybox: str | None) -> bytes:
    from kvmtick.guests.linux import tiny_initrd

    try:
        return tiny_initrd(busybox=None if busybox is None else Path(busybox))
    except OSError as error:
        raise UsageError(
            f"--busybox: cannot read {error.filename!r}: {error.strerror}: give a readable file"
        ) from None
    except ValueError as error:
        raise UsageError(f"--busybox: {error}") from None
