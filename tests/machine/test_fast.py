"""Machines whose engine looks at boundaries where blocks begin: late by a block, never wrong."""

import pytest
from images import LOAD_AT, SPIN

from kvmtick import guests
from kvmtick.guests import Guest
from kvmtick.kvm.model import ModelVm
from kvmtick.machine.run import Run
from kvmtick.ticks.verdict import Verdict

MS = 1_000_000
BLOCK_NS = 1_000
"""More than a block of translated code has instructions."""
GUESTS = ["tick-pic", "tick-ioapic", "tick-lapic", "tick-x2apic", "tick-oneshot", "ipi-tick"]


def run(name: str, ticks: int = 50, **options: bool) -> tuple[Run, bytes]:
    with ModelVm(**options) as vm:  # type: ignore[arg-type]
        guest = guests.load(name, ticks=ticks)
        vm.prepare(guest.needs)
        vm.load(guest)
        result = vm.run()
        return result, bytes(vm.machine.ram)


@pytest.mark.parametrize("name", GUESTS)
def test_every_tick_is_delivered_and_counted(name: str) -> None:
    fast, _ = run(name, fast=True)
    exact, _ = run(name)
    assert fast.exit.reason == "done"
    assert fast.guest_ticks == exact.guest_ticks == 50
    assert fast.ticks is not None
    assert exact.ticks is not None
    assert fast.ticks.as_dict() == exact.ticks.as_dict()
    assert fast.ticks.count(Verdict.UNKNOWN) == 0
    assert abs(fast.elapsed_ns - exact.elapsed_ns) < BLOCK_NS


@pytest.mark.parametrize("name", GUESTS)
def test_a_run_repeats_to_the_byte(name: str) -> None:
    first, second = run(name, fast=True), run(name, fast=True)
    assert (first[0].instructions, first[0].elapsed_ns) == (
        second[0].instructions,
        second[0].elapsed_ns,
    )
    assert first[1] == second[1]


def test_a_run_ends_within_a_block_of_its_time_and_can_go_on() -> None:
    with ModelVm(fast=True) as vm:
        vm.create_irqchip()
        vm.create_vcpu(0)
        vm.load(Guest("spin", SPIN, LOAD_AT, (0, LOAD_AT), None))
        for done in range(1, 6):
            before_ns = vm.machine.elapsed_ns
            result = vm.run(for_ns=MS)
            assert result.exit.reason == "time"
            assert MS <= vm.machine.elapsed_ns - before_ns < MS + BLOCK_NS, done
        assert result.instructions == vm.machine.elapsed_ns


def test_two_that_spin_get_the_same_time() -> None:
    with ModelVm(fast=True) as vm:
        vcpus = [vm.create_vcpu(vcpu_id) for vcpu_id in range(2)]
        vm.load(Guest("spin", SPIN, LOAD_AT, (0, LOAD_AT), None))
        vcpus[1].vcpu.start_at(0, LOAD_AT)
        vm.run(for_ns=2 * MS)
        first, second = (vcpu.vcpu.instructions for vcpu in vcpus)
    assert abs(first - second) < 20 * BLOCK_NS


def test_the_engine_is_exact_in_virtual_time_and_not_in_real_time_unless_asked() -> None:
    for clock, fast, exact in [
        ("virtual", None, True),
        ("virtual", True, False),
        ("real", None, False),
        ("real", False, True),
    ]:
        with ModelVm(clock=clock, fast=fast) as vm:
            assert vm.create_vcpu(0).vcpu.engine.exact is exact
