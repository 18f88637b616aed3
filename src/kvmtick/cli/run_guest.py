"""The guest that `kvmtick run` was asked for: a built-in one, or a file."""

import argparse
import os
from pathlib import Path

from kvmtick import guests
from kvmtick.cli import UsageError
from kvmtick.cli.run_options import (
    DEFAULT_GUEST,
    address,
    duration_ns,
    ram_size_bytes,
    ticks_of,
    vcpu_count,
    with_cpuid,
)
from kvmtick.guests import Guest
from kvmtick.machine.loader import LoadError, load_file

__all__ = ["guest_of", "is_kernel"]

MAX_HOLD_MS = 3_600_000
NS_PER_MS = 1_000_000
HOLDERS = ("tick-if0", "tick-mask")
FILE_OPTIONS = ("ram", "vcpus", "cpuid", "append", "module", "load-at", "entry", "counter")


def guest_of(options: argparse.Namespace) -> Guest:
    """The built-in guest of that name, else the file."""
    name = options.guest or DEFAULT_GUEST
    path = Path(name)
    if name not in guests.names() and (os.path.exists(name) or "/" in name or path.suffix):
        return _file_guest(options, path)
    return _builtin_guest(options, name)


def is_kernel(guest: Guest) -> bool:
    """A file that does not start in real mode: one that need not be about ticks."""
    return guest.parameters is None and guest.start is not None and not guest.roms


def _file_guest(options: argparse.Namespace, path: Path) -> Guest:
    for option, value in (
        ("--hz", options.hz),
        ("--hold", options.hold),
        ("--timer", options.timer),
        ("--no-ack", "" if options.no_ack else None),
    ):
        if value is not None:
            raise UsageError(
                f"{f'{option} {value}'.rstrip()}: {options.guest!r} is a file and goes its own way;"
                " leave it out"
            )
    load_at = address("--load-at", options.load_at)
    entry = address("--entry", options.entry)
    ram_bytes, vcpus = ram_size_bytes(options.ram), vcpu_count(options.vcpus)
    modules = [_module(text) for text in options.module]
    try:
        guest = load_file(
            path,
            load_at,
            entry,
            ram_bytes=ram_bytes,
            vcpus=vcpus,
            append=options.append or "",
            modules=modules,
        )
    except LoadError as error:
        raise UsageError(str(error)) from None
    return with_cpuid(guest, options.cpuid)


def _builtin_guest(options: argparse.Namespace, name: str) -> Guest:
    for option in FILE_OPTIONS:
        if vars(options)[option.replace("-", "_")] not in (None, []):
            raise UsageError(f"--{option}: {name!r} is a built-in guest, no file; leave it out")
    if options.hold is not None and name in guests.names() and name not in HOLDERS:
        raise UsageError(
            f"--hold {options.hold}: {name!r} holds nothing; use {' or '.join(HOLDERS)}"
        )
    try:
        guest = guests.load(
            name,
            ticks=ticks_of(options) or 0,
            hz=_hz(options.hz),
            param_ms=_hold_ms(options.hold),
            timer=options.timer,
            ack=not options.no_ack,
        )
    except guests.UnknownGuestError as error:
        raise UsageError(f"{error}; or give a file") from None
    except ValueError as error:
        # "hz=5.0: the reason" names a parameter of `guests.load`, the user knows the option.
        about, _, reason = str(error).partition(": ")
        parameter = about.partition("=")[0]
        option = (
            "--no-ack" if parameter == "ack" else f"--{parameter} {vars(options).get(parameter)}"
        )
        raise UsageError(f"{option}: {reason}") from None
    if options.reinject and guest.needs.reinject is False:
        raise UsageError(f"--reinject: nothing acknowledges the ticks of {name!r}; leave it out")
    return guest


def _module(text: str) -> tuple[Path, str]:
    name, _, arguments = text.partition(":")
    if not name:
        raise UsageError(f"--module {text!r} names no file: give FILE or FILE:TEXT")
    return Path(name), arguments


def _hz(text: str | None) -> float | None:
    """A rate as a number; which ones a timer can tick at is the guest's business."""
    if text is None:
        return None
    try:
        return float(text)
    except ValueError:
        raise UsageError(f"--hz {text}: no rate; give ticks a second, such as 1000") from None


def _hold_ms(text: str | None) -> int | None:
    hold_ns = duration_ns("--hold", text)
    if hold_ns is None:
        return None
    if hold_ns % NS_PER_MS:
        raise UsageError(f"--hold {text}: give whole milliseconds, such as 50ms")
    if hold_ns > MAX_HOLD_MS * NS_PER_MS:
        raise UsageError(f"--hold {text}: give at most {MAX_HOLD_MS}ms")
    return hold_ns // NS_PER_MS
