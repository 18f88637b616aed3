"""What tick-latency measures: held to the model's own trace, and on real clocks to what must be."""

from collections.abc import Callable

import pytest

from kvmtick import guests
from kvmtick.abi import HostError
from kvmtick.guests import PIT_HZ, Guest, latency
from kvmtick.guests.latency import Latencies
from kvmtick.kvm.kernel import KernelSystem, KernelVm
from kvmtick.kvm.model import ModelVm
from kvmtick.trace.events import Event, Record, field

NS_PER_S = 1_000_000_000
CONTROL_PORT = 0x43
LATCH_0_AND_2 = 0xDA
LIMIT_S = 60.0


class Traced:
    """A run in virtual time: what the guest measured, and its trace."""

    def __init__(self, guest: Guest, reinject: bool = True, **faults: str) -> None:
        self.guest = guest
        records: list[Record] = []
        with ModelVm(detail=True, seed=7) as vm:
            vm.machine.recorder.add_consumer(records.extend)
            vm.prepare(guest.needs, reinject)
            for name, delay in faults.items():
                vm.machine.host.set_fault(name, delay)
            vm.load(guest)
            assert vm.run(limit_s=LIMIT_S).exit.reason == "done"
            self.measured = latency.read(vm.read_memory, reinject)
            self.divisor = guests.Parameters.read(guest.image, 4).divisor
        self.samples_ns = [
            record[0]
            for record in records
            if record[1] == Event.KVM_PIO
            and field(record, "port") == CONTROL_PORT
            and field(record, "val") == LATCH_0_AND_2
        ]
        started_ns = self.samples_ns[-self.handlers - 2]
        self.expiries_ns = [
            field(record, "expires")
            for record in records
            if record[1] == Event.HRTIMER_START and field(record, "expires") > started_ns
        ]

    @property
    def handlers(self) -> int:
        return len(self.measured.counts)

    def counts(self, replays: bool) -> list[int]:
        """What the guest must have measured, by the trace."""
        counts, done = [], 0
        for now_ns in self.samples_ns[-self.handlers - 1 : -1]:
            expired = sum(expiry_ns <= now_ns for expiry_ns in self.expiries_ns)
            taken = min(done + 1, expired)
            since_ns = now_ns - self.expiries_ns[expired - 1]
            counts.append((expired - taken) * self.divisor + since_ns * PIT_HZ // NS_PER_S)
            done = taken if replays else expired
        return counts


@pytest.mark.parametrize("hz", [1000, 5000])
@pytest.mark.parametrize("delay", ["0us", "exp:150us", "2%:2500us", "uniform:10us..190us"])
def test_the_guest_measures_what_the_trace_says(hz: int, delay: str) -> None:
    run = Traced(guests.load("tick-latency", ticks=100, hz=hz), worker_delay=delay)
    assert run.handlers >= 100
    assert run.measured.counts == run.counts(replays=True)
    assert run.measured.lost == 0
    assert run.measured.taken >= run.handlers


@pytest.mark.parametrize("reinject", [True, False])
def test_ticks_that_come_together_are_replayed_or_lost(reinject: bool) -> None:
    guest = guests.load("tick-latency", ticks=100)
    run = Traced(guest, reinject, vcpu_off="5%:5ms")
    assert run.measured.counts == run.counts(reinject)
    assert max(run.measured.counts) > 3 * run.divisor
    assert (run.measured.lost == 0) is reinject


def test_a_stall_in_which_channel_2_goes_round_is_not_short() -> None:
    guest = guests.load("tick-latency", ticks=50, hz=100)
    run = Traced(guest, vcpu_off="4%:130ms")
    assert run.measured.counts == run.counts(replays=True)
    assert run.measured.percentile_ns(100) >= 129_000_000
    assert run.measured.lost == 0


def test_percentiles_are_ranks_and_a_lost_tick_is_later_than_all() -> None:
    counts = list(range(1, 101))
    whole = Latencies(counts, expired=100, taken=100)
    assert [whole.percentile_ns(p) * PIT_HZ / NS_PER_S for p in (50, 99, 100)] == pytest.approx(
        [50, 99, 100], abs=0.01
    )
    assert whole.percentile_of_expired_ns(99) == whole.percentile_ns(99)
    two_lost = Latencies(counts, expired=102, taken=100)
    assert two_lost.lost == 2
    assert two_lost.percentile_of_expired_ns(50) == whole.percentile_ns(51)
    assert two_lost.percentile_of_expired_ns(99) is None
    assert two_lost.percentile_ns(99) == whole.percentile_ns(99)


def test_a_guest_that_is_not_done_has_measured_nothing() -> None:
    with ModelVm() as vm:
        guest = guests.load("tick-latency")
        vm.prepare(guest.needs, True)
        vm.load(guest)
        vm.run(for_ns=50_000_000)
        with pytest.raises(ValueError, match="until it is done"):
            latency.read(vm.read_memory, replays=True)
        vm.load(guests.load("tick-pic", ticks=1))
        vm.run()
        with pytest.raises(ValueError, match="run tick-latency"):
            latency.read(vm.read_memory, replays=True)


# --- real time ----------------------------------------------------------------------------------


def measured(build: Callable[[], ModelVm | KernelVm], hz: int, ticks: int) -> Latencies:
    guest = guests.load("tick-latency", ticks=ticks, hz=hz)
    with build() as vm:
        vm.prepare(guest.needs, True)
        vm.load(guest)
        assert vm.run(limit_s=LIMIT_S).exit.reason == "done"
        return latency.read(vm.read_memory, replays=True)


@pytest.mark.parametrize(("hz", "ticks"), [(1000, 1000), (10_000, 2000)])
def test_in_real_time_no_tick_is_lost(hz: int, ticks: int) -> None:
    result = measured(lambda: ModelVm(clock="real", min_timer_period_us=0), hz, ticks)
    assert len(result.counts) >= ticks
    assert result.lost == 0
    assert min(result.counts) >= 0
    assert result.counts[-1] < result.expired * PIT_HZ // hz


def test_the_kernels_pit_is_measured_the_same_way() -> None:
    try:
        KernelSystem().close()
    except HostError as error:
        pytest.skip(f"needs /dev/kvm: {error}")
    result = measured(KernelVm, 1000, 300)
    assert len(result.counts) >= 300
    # a back end without VMX and SVM may pulse too often, none too seldom
    assert result.lost <= 0
    assert 0 <= min(result.counts) < result.percentile_ns(100)
