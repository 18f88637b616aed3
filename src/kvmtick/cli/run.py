"""`kvmtick run`: boot a guest, follow its ticks, say what became of them."""

from __future__ import annotations

import argparse
import contextlib
import json
import mmap
import os
import sys
from argparse import BooleanOptionalAction
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from kvmtick import guests
from kvmtick.cli import EXIT_GUEST, EXIT_INTERRUPTED, EXIT_OK, UsageError
from kvmtick.cli.options import Parser
from kvmtick.guests import Guest
from kvmtick.kvm.model import DEFAULT_LIMIT_S, ModelVm
from kvmtick.machine.loader import LoadError, load_file
from kvmtick.machine.machine import QUANTUM_NS
from kvmtick.machine.run import Run
from kvmtick.ticks.story import StoryTeller
from kvmtick.timing.host import parse_duration_ns
from kvmtick.trace.events import Record
from kvmtick.trace.ftrace import FtraceWriter
from kvmtick.vcpu.cpuid import FEATURES

if TYPE_CHECKING:
    from kvmtick.machine.crash import CrashReport
    from kvmtick.machine.gdb import GdbServer

__all__ = ["main"]

DEFAULT_GUEST = "tick-pic"
DEFAULT_TICKS = 1000
MAX_TICKS = 0xFFFF_FFFF
MAX_HOLD_MS = 3_600_000
MAX_PORT = 0xFFFF
NS_PER_MS = 1_000_000
HOLDERS = ("tick-if0", "tick-mask")
VENDOR_CHARACTERS = 12
FILE_OPTIONS = ("ram", "vcpus", "cpuid", "append", "module", "load-at", "entry", "counter")
RAM_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
LEAST_RAM_BYTES, MOST_RAM_BYTES = 1 << 20, 3 << 30
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
        + "\n  FILE           a flat binary, boot sector, Multiboot kernel or ELF of your own",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument(
        "guest", nargs="?", default=DEFAULT_GUEST, metavar="GUEST", help=argparse.SUPPRESS
    )
    add = p.add_argument_group("what to run").add_argument
    add(
        "--hz",
        metavar="HZ",
        help="tick rate of a built-in guest (1000): 18.2 to 1193181 of the PIT, 0.25 to 1000000 of"
        " a local APIC's timer",
    )
    add("--ticks", metavar="N", help="how many ticks to wait for (1000)")
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
    add = p.add_argument_group("a file of your own").add_argument
    add("--ram", metavar="SIZE", help="its RAM, 1M to 3G (128M; 2M if it starts in real mode)")
    add("--vcpus", metavar="N", help="how many vCPUs it has, 1 to 8 (1)")
    add(
        "--cpuid",
        metavar="CHANGE",
        action="append",
        default=[],
        help="vendor=NAME, or x2apic=off, tsc_deadline=off, tsc_adjust=off; may be repeated",
    )
    add("--append", metavar="TEXT", help="a Multiboot kernel's command line, behind its file name")
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
    add = p.add_argument_group("how").add_argument
    add(
        "--clock",
        choices=("virtual", "real"),
        default="virtual",
        help="virtual: an instruction is 1 ns, HLT jumps to the next deadline; real: this host's"
        " CLOCK_MONOTONIC (virtual)",
    )
    add(
        "--fast",
        action="store_true",
        help="interrupts only where a basic block begins: several times the instructions a second,"
        " and runs still repeat",
    )
    add(
        "--quantum",
        metavar="DURATION",
        help="how long a vCPU runs at most while another one waits (100us)",
    )
    add(
        "--reinject",
        action=BooleanOptionalAction,
        default=None,
        help="replay ticks the guest could not take, as KVM does unless told otherwise (on, but"
        " off for tick-msi)",
    )
    add(
        "--fault",
        metavar="NAME=DELAY",
        action="append",
        default=[],
        help="a late host: worker_delay=, vcpu_off=, late_expiry=; may be repeated",
    )
    add("--seed", metavar="N", default="0", help="seed of the faults (0)")
    add("--limit", metavar="DURATION", help="wall time after which a guest counts as hung (60s)")
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
    add = p.add_argument_group("what to show").add_argument
    add("--story", metavar="N", help="tell the life of tick N, step by step")
    add("--trace", metavar="FILE", help="write the events as ftrace text")
    add("--json", action="store_true", help="one JSON object instead of the report")
    return p


def main(argv: list[str]) -> int:
    """Run the verb; returns the exit code."""
    options = parser().parse_command_line(argv)
    # All that can be wrong is looked at before a trace file is emptied.
    for_ns = _duration_ns("--for", vars(options)["for"])
    gdb_port = _port(options.gdb)
    if options.fast and options.gdb:
        raise UsageError("--fast: a debugger stops at any instruction; leave --fast or --gdb out")
    limit_s = None if options.gdb and not options.limit else _limit_s(options.limit)
    guest = _guest(options)
    ticks = _ticks(options, None if _is_kernel(guest) else DEFAULT_TICKS)
    with contextlib.ExitStack() as stack:
        vm, teller = _build(options, guest, stack)
        gdb = None if gdb_port is None else _gdb(gdb_port, vm, stack)
        with _progress(options, vm, guest, for_ns, ticks), _live_text(options, vm, guest):
            run = vm.run(
                until=None if gdb is None else gdb.poll,
                ticks=ticks if guest.parameters is None else None,
                for_ns=for_ns,
                limit_s=limit_s,
                counter=_address("--counter", options.counter),
            )
        crash = _crash(vm, run)
        if gdb is not None:
            gdb.finish(run.exit)
        _report(options, guest, run, teller, crash)
        if crash is not None:
            print(f"kvmtick: {run.guest}: {run.exit.reason}: {run.exit.detail}", file=sys.stderr)
            print(crash.text(), file=sys.stderr)
            return EXIT_GUEST
    return EXIT_INTERRUPTED if run.exit.reason == "interrupted" else EXIT_OK


def _build(
    options: argparse.Namespace, guest: Guest, stack: contextlib.ExitStack
) -> tuple[ModelVm, StoryTeller | None]:
    counter = _address("--counter", options.counter)
    detail = bool(options.trace or options.story)
    vm = ModelVm(
        clock=options.clock,
        seed=_integer("--seed", options.seed),
        detail=detail,
        ram_bytes=guest.needs.ram_bytes,
        quantum_ns=_duration_ns("--quantum", options.quantum) or QUANTUM_NS,
        fast=options.fast or (False if options.gdb else None),
    )
    stack.callback(vm.close)
    vm.machine.strict = options.strict
    if counter is not None and counter + 4 > len(vm.machine.ram):
        raise UsageError(f"--counter {counter:#x}: RAM ends at {len(vm.machine.ram):#x}")
    for fault in options.fault:
        name, equals, delay = fault.partition("=")
        if not equals:
            raise UsageError(f"--fault {fault!r}: give NAME=DELAY, such as worker_delay=200us")
        if name in vm.machine.host.faults():
            raise UsageError(f"--fault {fault!r}: {name} is given twice, give each fault once")
        try:
            vm.machine.host.set_fault(name, delay)
        except ValueError as error:
            raise UsageError(f"--fault {fault!r}: {error}") from None
    # Whoever follows the events needs those of the chips' creation too.
    teller = _tell(options, vm)
    stack.enter_context(_trace(options, vm))
    vm.prepare(guest.needs, options.reinject is not False)
    vm.load(guest)
    return vm, teller


# Reading the options.


def _guest(options: argparse.Namespace) -> Guest:
    """The built-in guest of that name, else the file."""
    name = options.guest
    path = Path(name)
    if name not in guests.names() and (os.path.exists(name) or "/" in name or path.suffix):
        return _file_guest(options, path)
    return _builtin_guest(options, name)


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
    load_at = _address("--load-at", options.load_at)
    entry = _address("--entry", options.entry)
    ram_bytes, vcpus = _ram_bytes(options.ram), _vcpus(options.vcpus)
    modules = [_module(text) for text in options.module]
    vendor, off = _cpuid_changes(options.cpuid)
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
    return replace(guest, needs=replace(guest.needs, cpuid_vendor=vendor, cpuid_off=off))


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
            ticks=_ticks(options) or 0,
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


def _is_kernel(guest: Guest) -> bool:
    """A file that does not start in real mode: one that need not be about ticks."""
    return guest.parameters is None and guest.start is not None


def _ticks(options: argparse.Namespace, default: int | None = DEFAULT_TICKS) -> int | None:
    """How many ticks end the run; None with `--for` alone."""
    if options.ticks is None:
        return None if vars(options)["for"] else default
    ticks = _integer("--ticks", options.ticks)
    if not 1 <= ticks <= MAX_TICKS:
        raise UsageError(f"--ticks {ticks}: give 1 to {MAX_TICKS}, or --for DURATION instead")
    return ticks


def _ram_bytes(text: str | None) -> int | None:
    if text is None:
        return None
    number, unit = text[:-1], text[-1:].upper()
    if unit not in RAM_UNITS or not (number.isascii() and number.isdigit()):
        raise UsageError(f"--ram {text!r} is no size: give a number and K, M or G, such as 128M")
    ram_bytes = int(number) * RAM_UNITS[unit]
    if not LEAST_RAM_BYTES <= ram_bytes <= MOST_RAM_BYTES or ram_bytes % mmap.PAGESIZE:
        raise UsageError(f"--ram {text}: give 1M to 3G, a multiple of 4K")
    return ram_bytes


def _vcpus(text: str | None) -> int:
    vcpus = 1 if text is None else _integer("--vcpus", text)
    if not 1 <= vcpus <= MAX_VCPUS:
        raise UsageError(f"--vcpus {vcpus}: give 1 to {MAX_VCPUS}")
    return vcpus


def _cpuid_changes(changes: Sequence[str]) -> tuple[str | None, tuple[str, ...]]:
    """The vendor, if one was given, and the features that are off."""
    vendor: str | None = None
    off = []
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
            off.append(name)
        else:
            known = ", ".join(f"{feature}=off" for feature in FEATURES)
            raise UsageError(f"--cpuid {change}: give vendor=NAME or one of {known}")
    return vendor, tuple(off)


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
    hold_ns = _duration_ns("--hold", text)
    if hold_ns is None:
        return None
    if hold_ns % NS_PER_MS:
        raise UsageError(f"--hold {text}: give whole milliseconds, such as 50ms")
    if hold_ns > MAX_HOLD_MS * NS_PER_MS:
        raise UsageError(f"--hold {text}: give at most {MAX_HOLD_MS}ms")
    return hold_ns // NS_PER_MS


def _duration_ns(option: str, text: str | None) -> int | None:
    if text is None:
        return None
    try:
        duration_ns = parse_duration_ns(text)
    except ValueError as error:
        raise UsageError(f"{option}: {error}") from None
    if not duration_ns:
        raise UsageError(f"{option} {text}: give more than nothing, such as 250ms")
    return duration_ns


def _limit_s(text: str | None) -> float:
    limit_ns = _duration_ns("--limit", text)
    return DEFAULT_LIMIT_S if limit_ns is None else limit_ns / 1e9


def _integer(option: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"{option} {text!r} is not a whole number: give digits only") from None


def _address(option: str, text: str | None) -> int | None:
    if text is None:
        return None
    try:
        address = int(text, 0)
    except ValueError:
        address = -1
    if address < 0:
        raise UsageError(f"{option} {text!r} is not an address: give a number such as 0x7c00")
    return address


def _port(text: str | None) -> int | None:
    if text is None:
        return None
    port = _integer("--gdb", text)
    if not 0 <= port <= MAX_PORT:
        raise UsageError(f"--gdb {text}: no TCP port; give 1 to {MAX_PORT}, or 0 for any")
    return port


# Around the run.


def _gdb(port: int, vm: ModelVm, stack: contextlib.ExitStack) -> GdbServer:
    """gdb is connected, and has let the guest run."""
    from kvmtick.machine.gdb import GdbServer

    server = GdbServer(vm.machine, lambda: vm.ticks().summary())
    stack.callback(server.close)
    try:
        number = server.listen(port)
    except OSError as error:
        raise UsageError(
            f"--gdb {port}: {os.strerror(error.errno or 0)}; give another port, or 0 for any"
        ) from None
    print(
        f"kvmtick: waiting for gdb: target remote 127.0.0.1:{number}", file=sys.stderr, flush=True
    )
    server.wait()
    return server


@contextlib.contextmanager
def _trace(options: argparse.Namespace, vm: ModelVm) -> Iterator[None]:
    """The recorder writes to the trace file, if one was asked for."""
    if options.trace is None:
        yield
        return
    with _is_trace_file(options.trace):
        file = Path(options.trace).open("w", encoding="utf-8")  # noqa: SIM115 - closed below
    writer = FtraceWriter(file, vm.machine.recorder.tasks)

    def write(batch: list[Record]) -> None:
        with _is_trace_file(options.trace):
            writer(batch)

    vm.machine.recorder.add_consumer(write)
    try:
        yield
    finally:
        with _is_trace_file(options.trace):
            file.close()


@contextlib.contextmanager
def _is_trace_file(name: str) -> Iterator[None]:
    """What cannot be done in here is the trace file's fault."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"--trace {name}: {error.strerror}; give a writable file") from None


def _tell(options: argparse.Namespace, vm: ModelVm) -> StoryTeller | None:
    if options.story is None:
        return None
    index = _integer("--story", options.story)
    if index < 1:
        raise UsageError(f"--story {index}: ticks count from 1, give 1 or more")
    return StoryTeller(index, vm.machine.recorder, vm.machine.snapshot)


@contextlib.contextmanager
def _progress(
    options: argparse.Namespace,
    vm: ModelVm,
    guest: Guest,
    for_ns: int | None,
    wanted: int | None,
) -> Iterator[None]:
    """A bar on the terminal for runs that take long; nothing when nobody watches, or where a file
    prints.
    """
    prints = guest.parameters is None and sys.stdout.isatty()
    if options.json or prints or not sys.stderr.isatty():
        yield
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    machine = vm.machine
    with Progress(
        TextColumn(guest.name),
        BarColumn(),
        TextColumn("{task.fields[expired]:,} ticks"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    ) as bar:
        task = bar.add_task(guest.name, total=1.0, expired=0)

        def show(batch: object) -> None:
            done = [machine.elapsed_ns / for_ns] if for_ns else []
            done += [vm.assembler.reached / wanted] if wanted else []
            bar.update(task, completed=max(done, default=0.0), expired=vm.assembler.expired)

        machine.recorder.add_consumer(show)
        try:
            yield
        finally:
            machine.recorder.remove_consumer(show)


@contextlib.contextmanager
def _live_text(options: argparse.Namespace, vm: ModelVm, guest: Guest) -> Iterator[None]:
    """What a file prints goes to stdout, byte for byte, as it comes; a blank line ends it."""
    if options.json or guest.parameters is not None:
        yield
        return
    stdout = sys.stdout.buffer
    at_once = sys.stdout.isatty()
    last = b""

    def show(byte: int) -> None:
        nonlocal last
        last = bytes((byte,))
        stdout.write(last)
        if at_once or last == b"\n":
            stdout.flush()

    vm.machine.ports.on_text = show
    try:
        yield
    finally:
        vm.machine.ports.on_text = None
    if last:
        stdout.write(b"\n" if last == b"\n" else b"\n\n")
        stdout.flush()


# The report.


def _crash(vm: ModelVm, run: Run) -> CrashReport | None:
    """What is left to see of a guest that failed."""
    if not run.exit.is_failure:
        return None
    from kvmtick.machine.crash import crash_report

    return crash_report(vm.machine)


def _report(
    options: argparse.Namespace,
    guest: Guest,
    run: Run,
    teller: StoryTeller | None,
    crash: CrashReport | None,
) -> None:
    if options.json:
        result = run.as_dict()
        if crash is not None:
            result["crash"] = crash.as_dict()
        if teller is not None:
            result["story"] = teller.as_dict()
        print(json.dumps(result))
        return
    from kvmtick.cli.show import show_run

    show_run(run, with_text=guest.parameters is not None)
    if teller is not None:
        print()
        print(teller.text())
