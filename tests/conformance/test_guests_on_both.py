"""The guests of the APICs, set up by `prepare`: every tick they count is one their timer made.

What a guest says when it misses something is tested with the guests.
"""

from typing import Any

import pytest
from eventfds import LIMIT_S

from kvmtick import guests
from kvmtick.conform.bench import Bench
from kvmtick.kvm.api import Vm
from kvmtick.kvm.kernel import KernelVm
from kvmtick.kvm.model import ModelVm
from kvmtick.machine.run import Run

TICKS = 50
PLAYED = [
    *(("tick-ioapic", None), ("tick-msi", None), ("ipi-tick", None), ("nmi-watchdog", None)),
    *(("tick-lapic", timer) for timer in ("periodic", "oneshot", "tsc-deadline")),
    ("tick-x2apic", None),
]


def play(
    vm: Vm[Any], name: str, timer: guests.TimerMode | None, reinject: bool = True, ack: bool = True
) -> Run:
    guest = guests.load(name, ticks=TICKS, timer=timer, tsc_khz=vm.get_tsc_khz(), ack=ack)
    vm.prepare(guest.needs, reinject)
    vm.load(guest)
    return vm.run(limit_s=LIMIT_S)


@pytest.mark.parametrize(("name", "timer"), PLAYED, ids=[" ".join(filter(None, p)) for p in PLAYED])
def test_a_guest_takes_the_ticks_it_waits_for(
    backend: Bench, name: str, timer: guests.TimerMode | None
) -> None:
    with backend.make_vm() as vm:
        run = play(vm, name, timer)
        assert (run.exit.reason, run.exit.code, run.console) == ("done", 0, "")
        assert run.guest_ticks == TICKS


@pytest.mark.parametrize(
    "name", ["tick-ioapic", "tick-msi", "ipi-tick", "nmi-watchdog", "tick-lapic", "tick-x2apic"]
)
def test_the_model_finds_every_tick_of_the_source_with_the_guest(name: str) -> None:
    """What the guest counted is what the model says of the source's expiries."""
    with ModelVm() as vm:
        run = play(vm, name, None)
        assert run.ticks is not None
        assert run.guest_ticks == TICKS
        assert run.ticks.count("delivered") == TICKS
        assert TICKS <= run.ticks.expired <= TICKS + 1


@pytest.mark.parametrize("reinject", [False, True], ids=["once", "reinject"])
def test_the_watchdog_without_acknowledgement(backend: Bench, reinject: bool) -> None:
    """Without reinjection it gets all its ticks, with it one."""
    with backend.make_vm() as vm:
        if not reinject:
            assert play(vm, "nmi-watchdog", None, reinject, ack=False).guest_ticks == TICKS
            return
        guest = guests.load("nmi-watchdog", ticks=TICKS, ack=False)
        vm.prepare(guest.needs, reinject)
        vm.load(guest)
        if isinstance(vm, KernelVm):
            assert vm.run(limit_s=0.1).guest_ticks == 1
        else:
            assert vm.run(for_ns=100_000_000).guest_ticks == 1
