"""A small VMM for tests of what is recorded: one built-in guest on the kernel, in a process."""

import contextlib
import os
import threading
import time
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Self

from kvmtick import guests
from kvmtick.host.kvmdev import pit_worker_tids
from kvmtick.kvm.kernel import KernelVm
from kvmtick.kvm.kernel_trace import TickTrace
from kvmtick.ticks.verdict import Verdict, Where

LIMIT_S = 30.0
URGENT = 10
SOME_TICKS = 5

_PROCESSES = get_context("forkserver")
_PROCESSES.set_forkserver_preload(["kvmtick.guests", "kvmtick.kvm.kernel_trace"])


@dataclass(frozen=True, slots=True)
class Guest:
    """A guest and its VM."""

    name: str
    """Ours."""
    guest: str
    ticks: int
    """0: it runs until `KernelGuest.end`."""
    reinject: bool = True
    options: dict[str, int] = field(default_factory=dict)
    watched: bool = False
    """Its process reads the kernel's trace too."""
    urgent: bool = False
    """Its vCPU and its kvm-pit thread go before everything else on a busy host, where possible."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What became of a tick by the trace that the guest's own process read."""

    expiry_ns: int
    period_ns: int | None
    verdict: Verdict
    where: Where | None
    inject_ns: int | None


@dataclass(frozen=True, slots=True)
class Said:
    """What a guest's process says at its end."""

    guest_ticks: int
    """The guest's own count."""
    lost: int
    """Events that its process did not see."""
    sources: list[list[Seen]]
    """If it watched: its timers and their ticks."""


class KernelGuest:
    """The process of one guest, which waits with its VM made."""

    def __init__(self, guest: Guest) -> None:
        self.guest = guest
        self._ours, theirs = _PROCESSES.Pipe()
        self._process = _PROCESSES.Process(target=_run, args=(guest, theirs), daemon=True)
        self._process.start()
        theirs.close()
        self.pid: int = self._ours.recv()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.join()
        self._ours.close()

    def begin(self) -> None:
        """Let the guest run; one that runs for ever ticks when this returns."""
        self._ours.send("begin")
        if not self.guest.ticks:
            assert self._ours.recv() == "ticks"

    def end(self) -> None:
        """Let one that runs for ever end."""
        self._ours.send("end")

    def said(self) -> Said:
        """When it has ended."""
        said = self._ours.recv()
        assert isinstance(said, Said)
        return said


def _run(guest: Guest, test: Connection) -> None:
    with KernelVm() as vm:
        tsc_khz = vm.get_tsc_khz()
        loaded = guests.load(guest.guest, ticks=guest.ticks, tsc_khz=tsc_khz, **guest.options)
        vm.prepare(loaded.needs, guest.reinject)
        vm.load(loaded)
        if guest.urgent:
            _go_first()
        observer = TickTrace(vm) if guest.watched else None
        test.send(os.getpid())
        test.recv()
        if not guest.ticks:
            threading.Thread(target=_end, args=(vm, test), daemon=True).start()
        run = vm.run(limit_s=LIMIT_S, observer=observer)
    assert run.guest_ticks is not None
    sources = [
        [Seen(t.expiry_ns, t.period_ns, t.verdict, t.where, t.inject_ns) for t in report]
        for report in run.sources
    ]
    test.send(Said(run.guest_ticks, observer.lost if observer else 0, sources))


def _go_first() -> None:
    with contextlib.suppress(PermissionError):
        for tid in (os.getpid(), *pit_worker_tids(os.getpid())):
            os.sched_setscheduler(tid, os.SCHED_FIFO, os.sched_param(URGENT))


def _end(vm: KernelVm, test: Connection) -> None:
    while (block := vm.parameters()) is None or block.counter < SOME_TICKS:
        time.sleep(0.001)
    test.send("ticks")
    test.recv()
    vm.vcpus[0].kick()
