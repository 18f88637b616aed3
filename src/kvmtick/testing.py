"""A machine for tests: boot a guest, run it up to a point, disturb the host, look at the ticks.

The pytest fixture `kvmtick_machine` (`kvmtick.pytest_plugin`) makes these; any other test framework
can do the same by hand.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvmtick import guests
from kvmtick.abi.closing import Closing
from kvmtick.guests import Guest
from kvmtick.kvm.api import DEFAULT_RUN_LIMIT_S
from kvmtick.kvm.model import ModelVm
from kvmtick.machine.loader import load_file
from kvmtick.machine.run import Run
from kvmtick.ticks.report import TickReport
from kvmtick.timing.host import parse_duration_ns

__all__ = ["GuestMachine"]


class GuestMachine(Closing):
    """A model VM with irqchip, PIT and vCPUs, and a guest in it, ready to run.

    `guest` is a built-in guest's name, a path to an image, or a `Guest`; further keywords go to
    `kvmtick.guests.load` (`ticks`, `hz`, `param_ms`, ...). `faults` maps fault names to delays.
    """

    def __init__(
        self,
        guest: str | Path | Guest = "tick-pic",
        *,
        seed: int = 0,
        clock: str = "virtual",
        fast: bool | None = None,
        reinject: bool = True,
        faults: dict[str, str] | None = None,
        **parameters: Any,
    ) -> None:
        self._source = guest.name if isinstance(guest, Guest) else str(guest)
        if isinstance(guest, Path):
            guest = load_file(guest)
        elif isinstance(guest, str):
            guest = guests.load(guest, **parameters)
        self.seed = seed
        self.guest = guest
        self.vm = ModelVm(clock=clock, seed=seed, fast=fast, ram_bytes=guest.needs.ram_bytes)
        self.last: Run | None = None
        self._fast = fast
        self._parameters = parameters
        self._reinject = reinject
        self._faults = dict(faults or {})
        for name, delay in self._faults.items():
            self.fault(name, delay)
        self.vm.prepare(guest.needs, reinject)
        self.vm.load(guest)

    def run(
        self,
        *,
        until: Callable[[GuestMachine], bool] | None = None,
        for_: str | None = None,
        ticks: int | None = None,
        limit_s: float = DEFAULT_RUN_LIMIT_S,
    ) -> Run:
        """Run on: until the guest ends, `until(machine)` is true (asked whenever the vCPU is out
        of the guest), `for_` (such as `250ms`) has passed on the machine's clock, or, for a
        foreign guest, `ticks` ticks have reached it.
        """
        self.last = self.vm.run(
            ticks=ticks,
            for_ns=None if for_ is None else parse_duration_ns(for_),
            limit_s=limit_s,
            until=None if until is None else lambda: until(self),
        )
        return self.last

    def fault(self, name: str, delay: str | None) -> None:
        """Make the host late from now on (`worker_delay`, `exp:200us`); None ends it."""
        self.vm.machine.host.set_fault(name, delay)

    def vcpu_off(self, duration: str) -> None:
        """The vCPU loses its CPU for that long, from now on."""
        self.vm.machine.take_vcpu_off(parse_duration_ns(duration))

    @property
    def ticks(self) -> TickReport:
        """The ticks so far: `ticks.count("late")`, `ticks[3].eoi_ns`, `for tick in ticks`."""
        return self.vm.ticks()

    @property
    def guest_ticks(self) -> int | None:
        """The guest's own count, from its parameter block; None for a foreign guest."""
        block = self.vm.parameters()
        return block.counter if block else None

    def memory(self, gpa: int, size_bytes: int) -> bytes:
        """Guest RAM."""
        return self.vm.read_memory(gpa, size_bytes)

    def word(self, gpa: int) -> int:
        """A 32-bit little-endian word of guest RAM."""
        return int.from_bytes(self.memory(gpa, 4), "little")

    @property
    def console(self) -> str:
        """What the guest printed on the debug console."""
        return self.vm.machine.ports.console.decode("utf-8", "replace")

    def command(self) -> str:
        """The `kvmtick run` that starts like this machine; what the test did later is not in it."""
        words = ["kvmtick", "run", self._source, "--seed", str(self.seed)]
        if not self.vm.machine.virtual:
            words += ["--clock", "real"]
        if self._fast:
            words.append("--fast")
        if self._parameters.get("divisor"):
            words += ["--hz", str(guests.PIT_HZ / self._parameters["divisor"])]
        if self._parameters.get("ticks") == 0:
            words += ["--for", f"{max(1, self.vm.machine.elapsed_ns)}ns"]
        for name, option in (("ticks", "--ticks"), ("hz", "--hz")):
            if self._parameters.get(name):
                words += [option, str(self._parameters[name])]
        if self._parameters.get("param_ms") is not None:
            words += ["--hold", f"{self._parameters['param_ms']}ms"]
        if self._parameters.get("timer"):
            words += ["--timer", self._parameters["timer"]]
        if not self._parameters.get("ack", True):
            words.append("--no-ack")
        if not self._reinject:
            words.append("--no-reinject")
        for name, delay in self._faults.items():
            words += ["--fault", f"{name}={delay}"]
        return shlex.join(words)

    def close(self) -> None:
        """Free the VM. Harmless when repeated."""
        self.vm.close()
