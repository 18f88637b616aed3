"""`kvmtick run --chips kernel`: the guest on /dev/kvm alone, its ticks read from tracefs."""

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator

from kvmtick.abi.errors import HostError
from kvmtick.cli.run_console import Input
from kvmtick.cli.run_options import address
from kvmtick.cli.run_output import live_text, reinject_of, report, trace_writer
from kvmtick.guests import Guest
from kvmtick.host.tracefs import TICK_EVENTS, open_tracefs
from kvmtick.kvm.kernel import KernelVm
from kvmtick.kvm.kernel_run import UserSpace
from kvmtick.kvm.kernel_trace import TickTrace
from kvmtick.machine.run import Run
from kvmtick.trace.encode import KtraceEncoder
from kvmtick.trace.events import TRACEPOINTS, Event
from kvmtick.trace.vms import VmInfo

__all__ = ["run_on_kernel"]


def run_on_kernel(
    options: argparse.Namespace,
    guest: Guest,
    typed: Input | None,
    *,
    ticks: int | None,
    for_ns: int | None,
    limit_s: float | None,
) -> Run:
    """Run it, and report; `typed` is its console's input. Without tracefs nobody sees the events:
    `ticks` is then null.

    HostError where /dev/kvm is missing, or tracefs where the trace or a foreign guest's ticks are
    asked for.
    """
    foreign_ticks = ticks if guest.parameters is None else None
    with KernelVm(ram_bytes=guest.needs.ram_bytes) as vm:
        with _observer(options, guest, vm) as observer:
            if observer is None and foreign_ticks is not None:
                _check_tracefs(f"--ticks {foreign_ticks}: the ticks of a file are counted there")
            vm.prepare(guest.needs, options.reinject is not False)
            vm.load(guest)
            if guest.parameters is not None:
                tsc_khz = vm.get_tsc_khz().to_bytes(4, "little")
                vm.write_memory(guest.parameters.tsc_khz, tsc_khz)
            with live_text(options, vm.user.ports, guest), _console(vm.user, typed):
                run = vm.run(
                    ticks=foreign_ticks,
                    for_ns=for_ns,
                    limit_s=limit_s,
                    counter=address("--counter", options.counter),
                    observer=observer,
                )
        report(options, guest, run)
        return run


@contextlib.contextmanager
def _console(user: UserSpace, typed: Input | None) -> Iterator[None]:
    """The guest gets what is typed."""
    if typed is None:
        yield
        return
    user.console = typed.console(user.pc.uart, user.clock, user.queue, user.leave, real_time=True)
    with typed.raw():
        yield


@contextlib.contextmanager
def _observer(
    options: argparse.Namespace, guest: Guest, vm: KernelVm
) -> Iterator[TickTrace | None]:
    """A reader of the kernel's trace; None where tracefs is out of reach."""
    try:
        with open_tracefs() as tracefs:
            tracefs.instance().close()
    except HostError as error:
        if options.trace is not None:
            raise
        print(f"kvmtick: nobody sees the ticks: {error}", file=sys.stderr)
        yield None
        return
    reinject = reinject_of(options, guest)
    about = VmInfo(os.getpid(), guest.name, reinject=reinject, from_start=True)
    with trace_writer(
        options.trace,
        lambda: trace.tasks,
        lambda file: KtraceEncoder(file, trace.tasks, about, "host", _events(trace), _origin()),
        simulated=False,
    ) as writer:
        trace = TickTrace(vm, as_written=[] if writer is None else [writer])
        yield trace


def _events(trace: TickTrace) -> list[Event]:
    """The events that are recorded."""
    recorded = TICK_EVENTS.keys() - set(trace.missing)
    return [
        event
        for event, tracepoint in TRACEPOINTS.items()
        if f"{tracepoint.system}:{tracepoint.name}" in recorded
    ]


def _origin() -> str:
    """The kernel and the machine."""
    host = os.uname()
    return f"{host.sysname} {host.release} {host.machine}"


def _check_tracefs(why: str) -> None:
    """It is out of reach: say what it was for."""
    try:
        open_tracefs().close()
    except HostError as error:
        raise HostError(f"{why}, but {error.what}", f"{error.remedy}; or give --for") from None
