"""`kvmtick run seabios` and `kvmtick run --firmware FILE`: a PC's firmware and its disk."""

import argparse
from pathlib import Path
from typing import Final

from kvmtick.abi.errors import HostError
from kvmtick.cli import UsageError
from kvmtick.cli.run_options import ram_size_bytes, refuse_for, vcpu_count, with_cpuid
from kvmtick.guests import Guest
from kvmtick.machine.image_file import LoadError

__all__ = ["SEABIOS", "find_seabios", "firmware_guest", "is_firmware"]

NAME: Final = "seabios"
SEABIOS: Final = Path("/usr/share/seabios/bios.bin")
_NOT_FOR_FIRMWARE: Final = (
    "hz",
    "hold",
    "timer",
    "no_ack",
    "append",
    "module",
    "load_at",
    "entry",
)


def is_firmware(options: argparse.Namespace) -> bool:
    """Whether firmware is asked for; UsageError where that is not clear."""
    if options.firmware is None:
        if options.guest != NAME and options.disk is not None:
            raise UsageError(
                f"--disk {options.disk}: only firmware takes it; run seabios, or give --firmware"
                " FILE"
            )
        return bool(options.guest == NAME)
    if options.guest not in (None, NAME):
        raise UsageError(
            f"--firmware {options.firmware}: {options.guest!r} is a guest already; leave one of"
            " them out"
        )
    return True


def firmware_guest(options: argparse.Namespace) -> Guest:
    """The image that was asked for, with its disk. UsageError for what cannot be loaded, HostError
    where SeaBIOS is not installed.
    """
    from kvmtick.machine.firmware import load_firmware

    refuse_for(options, _NOT_FOR_FIRMWARE, "firmware goes its own way")
    ram_bytes, vcpus = ram_size_bytes(options.ram), vcpu_count(options.vcpus)
    path = find_seabios() if options.firmware is None else Path(options.firmware)
    disk = None if options.disk is None else Path(options.disk)
    try:
        guest = load_firmware(path, ram_bytes=ram_bytes, vcpus=vcpus, disk=disk)
    except LoadError as error:
        raise UsageError(str(error)) from None
    return with_cpuid(guest, options.cpuid)


def find_seabios(path: Path = SEABIOS) -> Path:
    """Where Debian's package has it. HostError if it is not there."""
    if path.exists():
        return path
    raise HostError(f"no SeaBIOS at {path}", "apt-get install seabios, or give --firmware FILE")
