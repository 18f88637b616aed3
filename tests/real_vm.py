"""A VM on the real kernel in a process of its own, for tests that look at it from outside."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from kvmtick.abi import HostError
from kvmtick.host.kvmdev import open_kvm
from kvmtick.host.tracefs import open_tracefs
from kvmtick.host.vms import is_initial_pid_namespace

GUEST = """
import sys
from kvmtick import guests
from kvmtick.kvm.kernel import KernelVm
name, milliseconds, ticks = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
guest = guests.load(name, ticks=ticks)
with KernelVm(ram_bytes=guest.needs.ram_bytes) as vm:
    vm.prepare(guest.needs)
    vm.load(guest)
    vm.run(for_ns=20_000_000)
    print("ticking", flush=True)
    run = vm.run(for_ns=milliseconds * 1_000_000)
sys.exit(7)
"""
"""Ends with 7: nobody else does."""
MANY_TICKS = 10_000_000


def needs_recording() -> None:
    """Skip, saying why, where no VM of this host can be recorded."""
    try:
        open_kvm().close()
        with open_tracefs() as tracefs:
            tracefs.instance().close()
    except HostError as error:
        pytest.skip(f"needs /dev/kvm and tracefs: {error}")
    if not is_initial_pid_namespace():
        pytest.skip("needs the host's pid namespace")


def guest_command(name: str = "tick-pic", milliseconds: int = 60_000) -> list[str]:
    """A process that runs a guest at 1 kHz so long, and says `ticking` when it does."""
    return [sys.executable, "-c", GUEST, name, str(milliseconds), str(MANY_TICKS)]


@contextmanager
def ticking_vm(name: str = "tick-pic") -> Iterator["subprocess.Popen[str]"]:
    """A guest that ticks at 1 kHz until the `with` ends."""
    with subprocess.Popen(guest_command(name), stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ticking\n"
            yield process
        finally:
            process.kill()
