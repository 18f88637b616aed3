"""`kvmtick run`: boot a guest, follow its ticks, say what became of them."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from kvmtick.abi.errors import HostError
from kvmtick.cli import EXIT_GUEST, EXIT_INTERRUPTED, EXIT_OK, UsageError
from kvmtick.cli.run_console import Input, input_of
from kvmtick.cli.run_firmware import firmware_guest, is_firmware
from kvmtick.cli.run_guest import guest_of, is_kernel
from kvmtick.cli.run_linux import LIMIT_S, is_linux, linux_guest
from kvmtick.cli.run_options import (
    DEFAULT_TICKS,
    address,
    duration_ns,
    integer,
    limit_s,
    parser,
    port,
    ticks_of,
)
from kvmtick.cli.run_output import live_text, reinject_of, report, trace_writer
from kvmtick.cli.run_where import Where, where_of
from kvmtick.guests import Guest
from kvmtick.kvm.api import DEFAULT_RUN_LIMIT_S
from kvmtick.kvm.model import ModelVm
from kvmtick.machine.board import VMM_PID
from kvmtick.machine.machine import QUANTUM_NS, Exit, Machine
from kvmtick.machine.run import Run
from kvmtick.ticks.story import StoryTeller
from kvmtick.trace.encode import KtraceEncoder
from kvmtick.trace.recorder import EntryConsumer
from kvmtick.trace.vms import VmInfo

if TYPE_CHECKING:
    from kvmtick.machine.crash import CrashReport
    from kvmtick.machine.gdb import GdbServer

__all__ = ["main"]

_RUN_THE_MODEL = "run the model: leave --cpu and --chips out"


def main(argv: list[str]) -> int:
    """Run the verb; returns the exit code."""
    options = parser().parse_command_line(argv)
    # The whole command line is looked at before a trace file is emptied.
    where = where_of(options)
    for_ns = duration_ns("--for", vars(options)["for"])
    gdb_port = port(options.gdb)
    if options.fast and options.gdb:
        raise UsageError("--fast: a debugger stops at any instruction; leave --fast or --gdb out")
    for_linux = is_linux(options)
    guest = _guest_of(options, for_linux)
    typed = input_of(options) if for_linux else None
    wall_limit_s = limit_s(options, _default_limit_s(typed))
    _check_counter(options, guest)
    ticks = ticks_of(options, None if is_kernel(guest) else DEFAULT_TICKS)
    if where.cpu == "kvm":
        _check_kvm(for_linux)
    if where.chips == "kernel":
        from kvmtick.cli.run_kernel import run_on_kernel

        run = run_on_kernel(options, guest, typed, ticks=ticks, for_ns=for_ns, limit_s=wall_limit_s)
        return _exit_code(run)
    with contextlib.ExitStack() as stack:
        traced = stack.enter_context(contextlib.ExitStack())
        vm, teller = _build(options, where, guest, stack, traced)
        gdb = None if gdb_port is None else _gdb(gdb_port, vm, stack)
        with (
            traced,
            _progress(options, vm, guest, for_ns, ticks),
            live_text(options, vm.machine.ports, guest),
            _console(vm.machine, typed),
        ):
            run = vm.run(
                until=None if gdb is None else gdb.poll,
                ticks=ticks if guest.parameters is None else None,
                for_ns=for_ns,
                limit_s=wall_limit_s,
                counter=address("--counter", options.counter),
            )
        crash = _crash(vm, run)
        if gdb is not None:
            gdb.finish(run.exit)
        report(options, guest, run, teller, crash)
    return _exit_code(run)


def _guest_of(options: argparse.Namespace, for_linux: bool) -> Guest:
    if for_linux:
        return linux_guest(options)
    return firmware_guest(options) if is_firmware(options) else guest_of(options)


def _exit_code(run: Run) -> int:
    if run.exit.is_failure:
        return EXIT_GUEST
    return EXIT_INTERRUPTED if run.exit.reason == "interrupted" else EXIT_OK


def _default_limit_s(typed: Input | None) -> float | None:
    if typed is None:
        return DEFAULT_RUN_LIMIT_S
    return None if typed.is_terminal else LIMIT_S


@contextlib.contextmanager
def _console(machine: Machine, typed: Input | None) -> Iterator[None]:
    """The guest gets what is typed."""
    if typed is None:
        yield
        return
    machine.console = typed.console(
        machine.pc.uart,
        machine.clock,
        machine.board.queue,
        lambda: machine.stop(Exit("interrupted")),
        real_time=not machine.virtual,
    )
    with typed.raw():
        yield


def _check_kvm(for_linux: bool) -> None:
    """HostError without a /dev/kvm that can run the guest, before a trace file is emptied."""
    from kvmtick.host.kvmdev import open_kvm
    from kvmtick.host.probe import probe_virtualization

    try:
        open_kvm().close()
    except HostError as error:
        raise error.or_else(_RUN_THE_MODEL) from None
    if for_linux and not probe_virtualization():
        raise HostError(
            "this host's CPU has neither VMX nor SVM: its KVM executes the guest's kernel by an"
            " instruction emulator, which unpacks Linux for minutes and then lacks instructions"
            " that Linux needs",
            _RUN_THE_MODEL,
        )


def _check_counter(options: argparse.Namespace, guest: Guest) -> None:
    counter = address("--counter", options.counter)
    if counter is not None and counter + 4 > guest.needs.ram_bytes:
        raise UsageError(f"--counter {counter:#x}: RAM ends at {guest.needs.ram_bytes:#x}")


def _build(
    options: argparse.Namespace,
    where: Where,
    guest: Guest,
    stack: contextlib.ExitStack,
    traced: contextlib.ExitStack,
) -> tuple[ModelVm, StoryTeller | None]:
    """The VM, its guest loaded. The caller closes `traced` when the run is over."""
    host = None
    if where.cpu == "kvm":
        from kvmtick.cpu.hostkvm import HostKvm

        host = stack.enter_context(HostKvm())
    fast = None if host is not None else _is_fast(options)
    vm = ModelVm(
        clock=where.clock,
        seed=integer("--seed", options.seed or "0"),
        detail=bool(options.trace or options.story),
        engine=host,
        ram_bytes=guest.needs.ram_bytes,
        quantum_ns=duration_ns("--quantum", options.quantum) or QUANTUM_NS,
        fast=fast,
        min_timer_period_us=0 if options.no_clamp else None,
    )
    stack.callback(vm.close)
    vm.machine.strict = options.strict
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
    recorder = vm.machine.recorder
    about = VmInfo(VMM_PID, guest.name, reinject=reinject_of(options, guest))
    writer = traced.enter_context(
        trace_writer(
            options.trace,
            lambda: recorder.tasks,
            lambda file: KtraceEncoder(file, recorder.tasks, about),
            simulated=True,
        )
    )
    if writer is not None:
        recorder.add_entry_consumer(writer)
        traced.callback(recorder.remove_entry_consumer, writer)
    vm.prepare(guest.needs, options.reinject is not False)
    vm.load(guest)
    if host is not None and guest.parameters is not None:
        vm.write_memory(guest.parameters.tsc_khz, host.tsc_khz.to_bytes(4, "little"))
    return vm, teller


def _is_fast(options: argparse.Namespace) -> bool | None:
    """`--fast`, or what is right for the guest; a debugger stops at any instruction."""
    if options.fast is None:
        return False if options.gdb else True if is_linux(options) else None
    return bool(options.fast)


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


def _tell(options: argparse.Namespace, vm: ModelVm) -> StoryTeller | None:
    if options.story is None:
        return None
    index = integer("--story", options.story)
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

        class Shown(EntryConsumer):
            def take(self, entries: object, begin: int, end: int) -> None:
                """Records have come: so far the run is."""
                done = [machine.elapsed_ns / for_ns] if for_ns else []
                done += [vm.assembler.reached / wanted] if wanted else []
                bar.update(task, completed=max(done, default=0.0), expired=vm.assembler.expired)

        shown = Shown()
        machine.recorder.add_entry_consumer(shown)
        try:
            yield
        finally:
            machine.recorder.remove_entry_consumer(shown)


# The report.


def _crash(vm: ModelVm, run: Run) -> CrashReport | None:
    """What is left to see of a guest that failed."""
    if not run.exit.is_failure:
        return None
    from kvmtick.machine.crash import crash_report

    return crash_report(vm.machine)
