"""min_timer_period_us: how fast periodic timers may be, PIT and local APIC."""

import pytest

import kvmtick
from kvmtick import guests
from kvmtick.abi import HostError
from kvmtick.kvm.model import ModelVm
from kvmtick.trace.events import Event, Record, field

HZ_10K_COUNT = 119
HZ_10K_NS = 99_733
"""119 counts of 1193181 Hz, rounded down."""


def expiries_ns(vm: ModelVm, name: str, ticks: int) -> list[int]:
    """When the first ticks of a guest at 10 kHz were to expire, from the first on."""
    records: list[Record] = []
    guest = guests.load(name, ticks=ticks, hz=10_000)
    with vm:
        vm.machine.recorder.add_consumer(records.extend)
        vm.prepare(guest.needs, True)
        vm.load(guest)
        assert vm.run().exit.reason == "done"
    starts = [field(each, "expires") for each in records if each[1] == Event.HRTIMER_START]
    return [expires_ns - starts[0] for expires_ns in starts][:ticks]


@pytest.mark.parametrize(
    ("min_timer_period_us", "period_ns"),
    [(None, 200_000), (200, 200_000), (150, 150_000), (99, HZ_10K_NS), (0, HZ_10K_NS)],
)
def test_the_pits_period(min_timer_period_us: int | None, period_ns: int) -> None:
    vm = ModelVm(min_timer_period_us=min_timer_period_us)
    assert expiries_ns(vm, "tick-pic", 500) == [n * period_ns for n in range(500)]


@pytest.mark.parametrize(("min_timer_period_us", "period_ns"), [(None, 200_000), (0, 100_000)])
def test_the_local_apics_period(min_timer_period_us: int | None, period_ns: int) -> None:
    vm = ModelVm(min_timer_period_us=min_timer_period_us)
    assert expiries_ns(vm, "tick-lapic", 500) == [n * period_ns for n in range(500)]


def test_the_library_has_it_where_vms_are_created() -> None:
    with kvmtick.Kvm("model").create_vm(min_timer_period_us=0) as vm:
        assert vm.machine.board.min_timer_period_ns == 0
    with pytest.raises(ValueError, match="min_timer_period_us=-1: give 0 or more"):
        kvmtick.Kvm("model").create_vm(min_timer_period_us=-1)


def test_the_kernels_is_its_administrators() -> None:
    try:
        system = kvmtick.Kvm("kernel")
    except HostError as error:
        pytest.skip(f"needs /dev/kvm: {error}")
    with system, pytest.raises(ValueError, match="administrator sets it"):
        system.create_vm(min_timer_period_us=0)
