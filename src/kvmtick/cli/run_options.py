"""The options of `kvmtick run`, and what their values mean; UsageError for a wrong one."""

import argparse
import mmap
from argparse import BooleanOptionalAction
from collections.abc import Sequence
from dataclasses import replace

from kvmtick import guests
from kvmtick.cli import UsageError
from kvmtick.cli.options import Parser
from kvmtick.guests import Guest
from kvmtick.kvm.api import DEFAULT_RUN_LIMIT_S
from kvmtick.machine.memory import MOST_RAM_BYTES
from kvmtick.timing.host import parse_duration_ns
from kvmtick.vcpu.cpuid import FEATURES

__all__ = [
    "DEFAULT_GUEST",
    "DEFAULT_TICKS",
    "add_file",
    "add_guest",
    "add_reinject",
    "address",
    "duration_ns",
    "integer",
    "limit_s",
    "parser",
    "port",
    "ram_size_bytes",
    "refuse_for",
    "ticks_of",
    "vcpu_count",
    "with_cpuid",
]

DEFAULT_GUEST = "tick-pic"
DEFAULT_TICKS = 1000
MAX_TICKS = 0xFFFF_FFFF
MAX_PORT = 0xFFFF
VENDOR_CHARACTERS = 12
CLOCKS = "clocks"
"""What `--cpuid` calls the leaves with the rates of clocks."""
RAM_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
LEAST_RAM_BYTES = 1 << 20
MAX_VCPUS = 8

EPILOG = """\
delays (for --fault):
  200us             always that long
  exp:200us         exponentially distributed, that mean
  uniform:10us..2ms anything between, equally likely
  1%:5ms            5 ms once in a hundred times, otherwise nothing

verdicts (every expiry gets one):
  delivered    reached the guest within its period
  late         reached the guest, but a period late or more
  reinjected   held back because the last tick was not acknowledged, pulsed on a later EOI
  coalesced    merged with a request that was still set: PIC, IOAPIC or local APIC
  masked       pulsed while every pin it leads to was masked, or nobody took the message
  dropped      the count it was owed a pulse by was thrown away (unmask, reprogramming)
  outstanding  still under way when the run ended

files (told apart by what is in them):
  boot sector  512 bytes that end in 55 aa; real mode at 0000:7c00
  flat binary  real mode at 0x8000, or at --load-at and --entry
  Multiboot 1  a kernel: an ELF of 32 or 64 bits, or any file whose header has address fields;
               32-bit protected mode, with command line, modules and memory map
  ELF          any other; flat segments and a stack of 64 KiB: 64 bits in long mode with the first
               4 GiB mapped to themselves, 32 bits in protected mode without paging

Linux (run linux, or --kernel FILE) gets the command line `console=ttyS0 panic=-1`, and what
--append says behind it. At a terminal every key goes to the guest, and Ctrl-] ends the run (exit
code 130); a pipe's or file's bytes are typed as the guest takes them, with Ctrl-D behind them. The
guest ends the run by switching the machine off or resetting it, both exit code 0.

Firmware (run seabios, or --firmware FILE) starts at the reset vector. It ends, as a file in real
mode does, when 1000 ticks have reached it; --counter 0x46c is the BIOS's own count of them.

A file gets a PC with PIT, PICs, IOAPIC and local APICs. It starts on vCPU 0; the others wait for
INIT and SIPI. What it prints to the serial line (port 0x3f8) and to the debug console (port 0xe9)
comes to stdout as it is. It leaves by a write to port 0xf4: 0 is success, all else exit code 4.

The run ends when the guest is done, after --for, or after --limit of wall time. A guest that cannot
get its ticks ends after ten times the time they should take. A file ends when --ticks ticks have
reached it: 1000 if it starts in real mode, Multiboot kernels and ELF files only if that is asked.
"""


def parser() -> Parser:
    """The options of `kvmtick run`."""
    listing = "\n".join(f"  {name:<14} {text}" for name, text in guests.names().items())
    p = Parser(
        prog="kvmtick run",
        usage="kvmtick run [GUEST] [OPTION ...]",
        description="Boot a guest and follow its timer ticks through KVM's chips.\n\nguests:\n"
        + listing
        + "\n  linux          the newest kernel in /boot, to a prompt on the serial line"
        + "\n  seabios        a PC's firmware, and what it boots from --disk"
        + "\n  FILE           a flat binary, boot sector, Multiboot kernel or ELF of your own",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument("guest", nargs="?", metavar="GUEST", help=argparse.SUPPRESS)
    add_guest(p)
    add_file(p)
    _add_linux(p)
    _add_firmware(p)
    _add_where(p)
    _add_how(p)
    add = p.add_argument_group("what to show").add_argument
    add("--story", metavar="N", help="tell the life of tick N, step by step")
    add(
        "--trace",
        metavar="FILE",
        help="write the events: a recording if FILE ends in .ktrace, else ftrace text",
    )
    add("--json", action="store_true", help="one JSON object instead of the report")
    return p


def add_guest(p: Parser, ticks: str = "1000") -> None:
    """What to run: the guest's own options; `ticks` is what their help calls the default."""
    add = p.add_argument_group("what to run").add_argument
    add(
        "--hz",
        metavar="HZ",
        help="tick rate of a built-in guest (1000): 18.2 to 1193181 of the PIT, 0.25 to 1000000 of"
        " a local APIC's timer",
    )
    add("--ticks", metavar="N", help=f"how many ticks to wait for ({ticks})")
    add("--for", metavar="DURATION", help="how long, on the machine's clock: 250ms, 10s")
    add("--hold", metavar="DURATION", help="how long tick-if0 and tick-mask hold ticks back (50ms)")
    add(
        "--timer",
        choices=("periodic", "oneshot", "tsc-deadline"),
        help="how tick-lapic uses its timer (periodic)",
    )
    add(
        "--no-ack",
        action="store_true",
        help="nmi-watchdog leaves its ticks unacknowledged: with reinject on one NMI comes",
    )


def add_file(p: Parser) -> None:
    """What a file needs."""
    add = p.add_argument_group("a file of your own").add_argument
    add("--ram", metavar="SIZE", help="its RAM, 1M to 3G (128M; 2M if it starts in real mode)")
    add("--vcpus", metavar="N", help="how many vCPUs it has, 1 to 8 (1)")
    add(
        "--cpuid",
        metavar="CHANGE",
        action="append",
        default=[],
        help="vendor=NAME, or x2apic=off, tsc_deadline=off, tsc_adjust=off, clocks=off (the guest"
        " measures them); may be repeated",
    )
    add(
        "--append",
        metavar="TEXT",
        help="added to the command line of Linux, or of a Multiboot kernel",
    )
    add(
        "--module",
        metavar="FILE[:TEXT]",
        action="append",
        default=[],
        help="a Multiboot module and its arguments; may be repeated",
    )
    add(
        "--load-at",
        metavar="ADDRESS",
        help="where a flat binary goes (0x8000, boot sectors 0x7c00)",
    )
    add("--entry", metavar="ADDRESS", help="where a flat binary starts (where it was loaded)")
    add("--counter", metavar="ADDRESS", help="where it keeps its own 32-bit tick count")


def _add_linux(p: Parser) -> None:
    add = p.add_argument_group("a Linux kernel").add_argument
    add("--kernel", metavar="FILE", help="a bzImage (with linux: the newest in /boot)")
    add("--initrd", metavar="FILE", help="its initramfs (a tiny one: a prompt that knows ticks)")
    add("--busybox", metavar="FILE", help="a static one, for the tiny initramfs: `sh` starts it")


def _add_firmware(p: Parser) -> None:
    add = p.add_argument_group("firmware").add_argument
    add("--firmware", metavar="FILE", help="a PC's BIOS image (with seabios: Debian's SeaBIOS)")
    add(
        "--disk",
        metavar="FILE",
        help="what it boots: the image of an ATA disk, which stays as it is whatever is written",
    )


def add_reinject(p: argparse._ArgumentGroup) -> None:
    """KVM_REINJECT_CONTROL."""
    p.add_argument(
        "--reinject",
        action=BooleanOptionalAction,
        default=None,
        help="replay ticks the guest could not take, as KVM does unless told otherwise (on, but"
        " off for tick-msi)",
    )


def _add_where(p: Parser) -> None:
    add = p.add_argument_group("where").add_argument
    add(
        "--cpu",
        choices=("unicorn", "kvm"),
        help="who executes the guest: unicorn, anywhere; kvm: a vCPU of /dev/kvm, in real time"
        " (unicorn)",
    )
    add(
        "--chips",
        choices=("model", "kernel"),
        help="whose PIT, PICs, IOAPIC and local APICs: the model's, or those of /dev/kvm, whose"
        " ticks are read from tracefs if that is allowed (model)",
    )


def _add_how(p: Parser) -> None:
    group = p.add_argument_group("how")
    add = group.add_argument
    add(
        "--clock",
        choices=("virtual", "real"),
        help="virtual: an instruction is 1 ns, HLT jumps to the next deadline; real: this host's"
        " CLOCK_MONOTONIC (virtual; with --cpu kvm real)",
    )
    add(
        "--fast",
        action=BooleanOptionalAction,
        default=None,
        help="interrupts only where a basic block begins: several times the instructions a second,"
        " and runs still repeat (off, but on for Linux)",
    )
    add(
        "--quantum",
        metavar="DURATION",
        help="how long a vCPU runs at most while another one waits (100us)",
    )
    add_reinject(group)
    add(
        "--no-clamp",
        action="store_true",
        help="periodic timers may be faster than 200 us (kvm's min_timer_period_us=0)",
    )
    add(
        "--fault",
        metavar="NAME=DELAY",
        action="append",
        default=[],
        help="a late host: worker_delay=, vcpu_off=, late_expiry=; may be repeated",
    )
    add("--seed", metavar="N", help="seed of the faults and of RDRAND (0)")
    add(
        "--limit",
        metavar="DURATION",
        help="wall time after which a guest counts as hung (60s; Linux: 10m, none at a terminal)",
    )
    add(
        "--strict",
        action="store_true",
        help="an access to an MSR that does not exist ends the run; else the guest gets #GP",
    )
    add(
        "--gdb",
        metavar="PORT",
        help="wait for gdb on 127.0.0.1:PORT (0: any) before the first instruction; no --limit"
        " unless you give one",
    )


def duration_ns(option: str, text: str | None) -> int | None:
    """A duration of more than 0; None if there is none."""
    if text is None:
        return None
    try:
        duration_ns = parse_duration_ns(text)
    except ValueError as error:
        raise UsageError(f"{option}: {error}") from None
    if not duration_ns:
        raise UsageError(f"{option} {text}: give more than nothing, such as 250ms")
    return duration_ns


def limit_s(
    options: argparse.Namespace, default: float | None = DEFAULT_RUN_LIMIT_S
) -> float | None:
    """`--limit` in seconds; None under gdb, unless it is given."""
    limit_ns = duration_ns("--limit", options.limit)
    if limit_ns is not None:
        return limit_ns / 1e9
    return default if options.gdb is None else None


def integer(option: str, text: str) -> int:
    """A whole number."""
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"{option} {text!r} is not a whole number: give digits only") from None


def address(option: str, text: str | None) -> int | None:
    """A guest-physical address, hexadecimal too; None if there is none."""
    if text is None:
        return None
    try:
        address = int(text, 0)
    except ValueError:
        address = -1
    if address < 0:
        raise UsageError(f"{option} {text!r} is not an address: give a number such as 0x7c00")
    return address


def port(text: str | None) -> int | None:
    """`--gdb`'s TCP port; None if there is none."""
    if text is None:
        return None
    port = integer("--gdb", text)
    if not 0 <= port <= MAX_PORT:
        raise UsageError(f"--gdb {text}: no TCP port; give 1 to {MAX_PORT}, or 0 for any")
    return port


def ticks_of(options: argparse.Namespace, default: int | None = DEFAULT_TICKS) -> int | None:
    """How many ticks end the run; None with `--for` alone."""
    if options.ticks is None:
        return None if vars(options)["for"] else default
    ticks = integer("--ticks", options.ticks)
    if not 1 <= ticks <= MAX_TICKS:
        raise UsageError(f"--ticks {ticks}: give 1 to {MAX_TICKS}, or --for DURATION instead")
    return ticks


def ram_size_bytes(text: str | None) -> int | None:
    """`--ram`; None if there is none."""
    if text is None:
        return None
    number, unit = text[:-1], text[-1:].upper()
    if unit not in RAM_UNITS or not (number.isascii() and number.isdigit()):
        raise UsageError(f"--ram {text!r} is no size: give a number and K, M or G, such as 128M")
    ram_bytes = int(number) * RAM_UNITS[unit]
    if not LEAST_RAM_BYTES <= ram_bytes <= MOST_RAM_BYTES or ram_bytes % mmap.PAGESIZE:
        raise UsageError(f"--ram {text}: give 1M to 3G, a multiple of 4K")
    return ram_bytes


def vcpu_count(text: str | None) -> int:
    """`--vcpus`, 1 if there is none."""
    vcpus = 1 if text is None else integer("--vcpus", text)
    if not 1 <= vcpus <= MAX_VCPUS:
        raise UsageError(f"--vcpus {vcpus}: give 1 to {MAX_VCPUS}")
    return vcpus


def with_cpuid(guest: Guest, changes: Sequence[str]) -> Guest:
    """The guest with what `--cpuid` changes."""
    vendor = guest.needs.cpuid_vendor
    features: list[str] = []
    clocks = True
    for change in changes:
        name, _, value = change.partition("=")
        if name == "vendor":
            if len(value) != VENDOR_CHARACTERS or not value.isascii():
                raise UsageError(
                    f"--cpuid {change}: a vendor's name has {VENDOR_CHARACTERS} characters, such as"
                    " GenuineIntel or AuthenticAMD"
                )
            vendor = value
        elif name in FEATURES and value == "off":
            features.append(name)
        elif change == f"{CLOCKS}=off":
            clocks = False
        else:
            known = ", ".join(f"{feature}=off" for feature in (*FEATURES, CLOCKS))
            raise UsageError(f"--cpuid {change}: give vendor=NAME or one of {known}")
    needs = replace(
        guest.needs, cpuid_vendor=vendor, cpuid_off=tuple(features), cpuid_clocks=clocks
    )
    return replace(guest, needs=needs)


def refuse_for(options: argparse.Namespace, names: Sequence[str], why: str) -> None:
    """UsageError for the first of the options `names` that was given."""
    for name in names:
        value = vars(options)[name]
        if value not in (None, False, []):
            raise UsageError(f"--{name.replace('_', '-')}: {why}; leave it out")
