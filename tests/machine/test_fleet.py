"""Fleets: every machine does what it does alone, and is counted for itself."""

import gc
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest

from kvmtick.abi.errors import HostError
from kvmtick.abi.structs import KVM_PIT_SPEAKER_DUMMY
from kvmtick.cpu.listed import ListedEngine, Listing
from kvmtick.cpu.scripted import Cli, Hlt, Out, Rdtsc, ScriptedEngine, Spin, Sti
from kvmtick.kvm.model import ModelVm
from kvmtick.kvm.setup import cpuid_of
from kvmtick.machine.fleet import Fleet, MachineTicks, total
from kvmtick.machine.fleet_guests import GUESTS, tick_lapic, tick_pic
from kvmtick.machine.fleet_pool import run_fleet
from kvmtick.trace.events import Record
from kvmtick.trace.recorder import RING_ENTRIES

MS = 1_000_000
FAULTS = {"worker_delay": "exp:400us", "vcpu_off": "5%:3ms", "late_expiry": "uniform:0us..90us"}
RUN_NS = 300 * MS
MOST_TRACED_BYTES = 16_000
"""What one machine more takes, uncompiled too."""


class Alone:
    """One machine, made by the calls of the API, run in one go."""

    def __init__(self, guest: Listing, seed: int, faults: dict[str, str], scripted: bool) -> None:
        def engine() -> ListedEngine | ScriptedEngine:
            if scripted:
                return ScriptedEngine(guest.routine(), guest.handler_routines())
            return ListedEngine(guest)

        vm = ModelVm(engine=engine, seed=seed, ram_bytes=0)
        self.records: list[Record] = []
        vm.machine.recorder.add_consumer(self.records.extend)
        vm.create_irqchip()
        vm.create_pit2(KVM_PIT_SPEAKER_DUMMY)
        for name, delay in faults.items():
            vm.machine.host.set_fault(name, delay)
        vcpu = vm.create_vcpu(0)
        vcpu.set_cpuid2(cpuid_of(vm.get_supported_cpuid(), 0))
        vm.reinject_control(True)
        self.run = vm.run(for_ns=RUN_NS)
        self.report = vm.ticks()


@pytest.mark.parametrize("scripted", [False, True], ids=["listed", "scripted"])
@pytest.mark.parametrize("faults", [{}, FAULTS], ids=["on-time", "late"])
@pytest.mark.parametrize("guest", GUESTS)
def test_a_machine_of_a_fleet_does_what_it_does_alone(
    guest: str, faults: dict[str, str], scripted: bool
) -> None:
    with Fleet(3, guest, seed=7, faults=faults) as fleet:
        traces: list[list[Record]] = [[] for _ in fleet]
        for member, trace in zip(fleet, traces, strict=True):
            member.machine.recorder.add_consumer(trace.extend)
        fleet.run(RUN_NS, slice_ns=17 * MS)
        for member, trace in zip(fleet, traces, strict=True):
            member.machine.recorder.remove_consumer(trace.extend)
    for member, result, trace in zip(fleet, fleet.results(), traces, strict=True):
        alone = Alone(GUESTS[guest](), 7 + member.index, faults, scripted)
        # What is before the fleet's first turn was recorded when its machines were made.
        assert trace == alone.records[len(alone.records) - len(trace) :]
        assert len(trace) > 1_000
        ticks = alone.report.as_dict()
        assert (ticks.pop("source"), ticks) == (result.source, result.counts)
        assert result.latency_ns == alone.report.latency_ns
        assert result.instructions == alone.run.instructions
        assert result.elapsed_ns == alone.run.elapsed_ns == RUN_NS


def test_machines_have_seeds_and_faults_of_their_own() -> None:
    with Fleet(4, faults={"worker_delay": "exp:900us"}) as fleet:
        fleet[3].fault("worker_delay", None)
        fleet.run(400 * MS)
        results = fleet.results()
    assert [each.seed for each in results] == [0, 1, 2, 3]
    assert len({tuple(each.counts.values()) for each in results[:3]}) == 3
    assert results[3].counts["delivered"] == results[3].expired
    assert results[0].faults == {"worker_delay": "exp:900us"}
    assert results[3].faults == {}


def test_the_counts_add_up() -> None:
    with Fleet(5, faults=FAULTS) as fleet:
        fleet.run(100 * MS)
        results, ticks = fleet.results(), fleet.ticks()
    assert ticks == total(results)
    assert 490 < ticks["expired"] == sum(each.expired for each in results) <= 500
    verdicts = sum(count for name, count in ticks.items() if name not in ("expired", "extra"))
    assert verdicts == ticks["expired"]


def test_the_size_of_a_turn_changes_nothing() -> None:
    def run(slice_ns: int) -> list[MachineTicks]:
        with Fleet(2, faults=FAULTS) as fleet:
            fleet.run(RUN_NS, slice_ns=slice_ns)
        return fleet.results()

    assert run(RUN_NS) == run(1 * MS) == run(333_333)


def test_a_machine_that_ends_does_not_stop_the_others() -> None:
    guest = Listing((Out(0xF4, 3), Hlt()))
    with Fleet(2, guest) as fleet:
        fleet.run(10 * MS)
        exits = [each.exit for each in fleet.results()]
    assert [exit_ and (exit_.reason, exit_.code) for exit_ in exits] == [("guest-error", 3)] * 2


def test_a_fleet_can_be_ended_early() -> None:
    rounds: list[int] = []
    with Fleet(1) as fleet:
        fleet.run(
            100 * MS, slice_ns=10 * MS, until=lambda: bool(rounds.append(1)) or len(rounds) == 3
        )
        assert fleet[0].machine.elapsed_ns == 30 * MS


def test_what_a_worker_does_at_the_end_is_nobodys_tick() -> None:
    # More of it than the ring has room for.
    with Fleet(RING_ENTRIES // 3, faults={"worker_delay": "500us"}, keep=1) as fleet:
        fleet.run(1_200_000)
    for member in fleet:
        [tick] = member.assembler.main.lives
        assert (tick.work_ns, tick.accept_ns) == (None, None)


def test_no_machine_has_a_thread_or_a_descriptor() -> None:
    gc.collect()  # what earlier tests left open is closed now, not meanwhile
    descriptors, threads = os.listdir("/proc/self/fd"), threading.active_count()
    with Fleet(20) as fleet:
        fleet.run(20 * MS)
        assert threading.active_count() == threads
        assert os.listdir("/proc/self/fd") == descriptors


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Fleet(0), "count=0: give 1 to 1000000 machines"),
        (lambda: Fleet(-3), "count=-3: give 1 to 1000000 machines"),
        (lambda: Fleet(1, "tick"), "no fleet guest 'tick': choose one of tick-pic, "),
        (lambda: Fleet(1, faults={"slow": "1ms"}), "unknown fault 'slow': choose one of "),
        (lambda: Fleet(1, faults={"vcpu_off": "1"}), "duration '1' has no unit: give a number"),
        (lambda: Fleet(1).run(-1), "for_ns=-1 is negative: give 0 or more"),
        (lambda: Fleet(1).run(1, slice_ns=0), "slice_ns=0: give more than 0"),
        (lambda: tick_pic(0), "divisor=0: give 1 to 65536"),
        (lambda: tick_lapic(0), "period_ns=0: give 1 to 4294967295"),
        (
            lambda: Listing((Rdtsc(),)),
            "a listing cannot hold Rdtsc: use a routine and the scripted",
        ),
    ],
)
def test_damaged_use_is_told_in_one_line(make: Callable[[], object], says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)) as error:
        make()
    assert "\n" not in str(error.value)


def test_a_closed_fleet_says_so() -> None:
    fleet = Fleet(1)
    fleet.run(5 * MS)
    fleet.close()
    fleet.close()
    with pytest.raises(ValueError, match=r"^the fleet is closed: make another one$"):
        fleet.run(1)
    assert fleet.ticks()["expired"] == 5


def test_a_guest_that_computes_keeps_its_time_over_the_turns() -> None:
    guest = tick_pic()
    busy = Listing((*guest.program, *[Cli(), Spin(700_000), Sti(), Spin(3)] * 40), guest.handlers)
    with Fleet(2, busy) as fleet:
        fleet.run(60 * MS, slice_ns=MS // 3)
        results = fleet.results()
    alone = Alone(busy, 1, {}, True)
    with Fleet(2, busy) as fleet:
        fleet.run(RUN_NS)
    assert fleet.results()[1].counts == {
        k: v for k, v in alone.report.as_dict().items() if k != "source"
    }
    assert results[0].instructions > 28_000_000


def traced_bytes(count: int) -> int:
    """What a fleet takes after some ticks."""
    tracemalloc.start(1)
    try:
        with Fleet(count) as fleet:
            fleet.run(5 * MS)
            gc.collect()
            return tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()


def test_a_machine_stays_small() -> None:
    few, many = 100, 200  # with few, too, the ring that they share is full
    traced_bytes(few)  # caches of the whole process
    grown_bytes = traced_bytes(many) - traced_bytes(few)
    assert grown_bytes < (many - few) * MOST_TRACED_BYTES


# Over several processes.


@pytest.mark.parametrize("processes", [1, 3])
def test_a_pool_gives_what_one_process_gives(processes: int) -> None:
    progress: list[int] = []
    results = run_fleet(
        25, 60 * MS, seed=5, faults=FAULTS, processes=processes, on_progress=progress.append
    )
    with Fleet(25, seed=5, faults=FAULTS) as fleet:
        fleet.run(60 * MS)
    assert results == fleet.results()
    assert [each.index for each in results] == list(range(25))
    assert progress == sorted(progress)
    assert progress[-1] == 25


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"processes": 0}, "processes=0: give 1 or more, or None for one per core"),
        ({"count": 0}, "count=0: give 1 to 1000000 machines"),
        ({"for_ns": -1}, "for_ns=-1 is negative: give 0 or more"),
        ({"faults": {"vcpu_off": "soon"}}, "'soon' is not a duration: give a number and a unit"),
    ],
)
def test_a_pool_is_not_begun_for_damaged_use(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        run_fleet(**{"count": 4, "for_ns": MS, "processes": 2, **arguments})
    assert not multiprocessing.active_children()


def test_a_worker_that_dies_is_told_in_one_line() -> None:
    def kill_one(done: int) -> None:
        for child in multiprocessing.active_children():
            child.kill()

    with pytest.raises(HostError, match=r"^a worker process of the fleet died") as error:
        run_fleet(100, 100 * MS, processes=2, on_progress=kill_one)
    assert "\n" not in str(error.value)
    assert not multiprocessing.active_children()


def test_an_interrupt_ends_the_workers() -> None:
    def interrupt(done: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_fleet(100, 100 * MS, processes=2, on_progress=interrupt)
    assert not multiprocessing.active_children()


def test_workers_do_not_outlive_who_started_them() -> None:
    """They hold the pipe, too: it is at its end when all of them are gone."""
    code = (
        "import os, signal\n"
        "from kvmtick import run_fleet\n"
        "def die(done): os.kill(os.getpid(), signal.SIGKILL)\n"
        "run_fleet(100, 100_000_000, processes=2, on_progress=die)"
    )
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, stdout=subprocess.PIPE, timeout=60).returncode == -signal.SIGKILL
