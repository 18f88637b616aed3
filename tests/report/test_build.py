"""The report's numbers: those of the run, whichever way they are read."""

import contextlib
import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from traces import made, report_of, run_json, simulated, switch

from kvmtick.report import build as building
from kvmtick.report import stories
from kvmtick.report.build import build
from kvmtick.report.causes import Cause, CauseKind, Causes
from kvmtick.report.masks import PicMask
from kvmtick.report.source import SourceLives, Thinned, believed_ns
from kvmtick.report.waits import CpuWaits
from kvmtick.ticks.tick import Tick
from kvmtick.ticks.verdict import Verdict
from kvmtick.trace.events import Event
from kvmtick.trace.reading import open_trace

RUNS = {
    "plain": ("tick-pic", "--ticks", "300"),
    "replayed": ("tick-if0", "--ticks", "100", "--hold", "5ms"),
    "lost": ("tick-if0", "--ticks", "100", "--hold", "5ms", "--no-reinject"),
    "dropped": ("tick-mask", "--ticks", "100", "--hold", "5ms"),
    "masked": ("tick-mask", "--ticks", "100", "--hold", "5ms", "--no-reinject"),
    "never acknowledged": ("tick-noeoi", "--for", "50ms"),
    "late": ("tick-pic", "--ticks", "300", "--fault", "worker_delay=5%:3ms"),
    "ioapic": ("tick-ioapic", "--ticks", "100"),
    "lapic": ("tick-lapic", "--ticks", "200", "--fault", "vcpu_off=2%:5ms"),
    "one shot": ("tick-lapic", "--ticks", "100", "--timer", "oneshot"),
    "nmi": ("nmi-watchdog", "--ticks", "100"),
    "two sources": ("tick-long", "--ticks", "50"),
}
START_NS = 10_000
"""A guest takes less than that to program its timer, and from its last tick to its end."""


@pytest.mark.parametrize("name", RUNS)
def test_as_the_run_says(tmp_path: Path, name: str) -> None:
    run = run_json(*RUNS[name], "--trace", str(tmp_path / "run.ktrace"))
    with contextlib.closing(open_trace(tmp_path / "run.ktrace")) as trace:
        report = build(trace, Path("run.ktrace"))
    (vm,) = report.vms
    told = [source.as_dict() for source in vm.sources]
    wanted = ("source", "vcpu", "path", "ticks", "latency_ns")
    assert [{key: source[key] for key in wanted} for source in told] == [
        {key: source[key] for key in wanted} for source in run["sources"]
    ]
    assert (report.lost_events, vm.name, vm.notes) == (0, run["guest"], [])


@pytest.mark.parametrize("name", ["plain", "replayed", "lost", "masked", "late", "lapic"])
def test_drift_as_the_run_says(tmp_path: Path, name: str) -> None:
    """The run's time includes the guest's start and end."""
    run = run_json(*RUNS[name], "--trace", str(tmp_path / "run.ktrace"))
    with contextlib.closing(open_trace(tmp_path / "run.ktrace")) as trace:
        source = build(trace, Path("run.ktrace")).vms[0].sources[0]
    assert source.drift_ppm == pytest.approx(
        run["drift_ppm"], abs=1e6 * START_NS / run["elapsed_ns"]
    )


def test_rates(tmp_path: Path) -> None:
    source = report_of(tmp_path, *RUNS["lost"]).vms[0].sources[0]
    assert source.period_ns == 999_848
    assert source.asked_hz == pytest.approx(1000.152, abs=0.001)
    assert source.got_hz == pytest.approx(1000.152 * 100 / 104, abs=0.1)
    assert "1193182 Hz" in source.drift_constant


def test_a_one_shot_timer_has_no_rate_that_was_asked_for(tmp_path: Path) -> None:
    source = report_of(tmp_path, *RUNS["one shot"]).vms[0].sources[0]
    assert (source.period_ns, source.asked_hz, source.drift_ppm) == (None, None, None)
    assert source.got_hz == pytest.approx(1000, rel=0.05)


@pytest.mark.parametrize(("extra", "missing"), [(0, 3), (2, 1), (9, 0)])
def test_replays_that_merged_and_came_as_others(extra: int, missing: int) -> None:
    """A clock counts the interrupts: which tick one belongs to is nothing to it."""
    causes = SimpleNamespace(of=lambda *_: Cause(CauseKind.OTHER))
    lives = SourceLives(cast(Causes, causes), lambda _: False, lambda: 100)
    ticks = [Tick(n, n, n, 10, n, n, n, n, verdict=Verdict.DELIVERED) for n in range(1, 8)]
    ticks += [Tick(n, n, n, 10, n, verdict=Verdict.REINJECTED) for n in range(8, 11)]
    lives.take(ticks)
    lives.finish(sees_eoi=True, reinject=True, extra=extra)
    assert (lives.missing, lives.came_as_others) == (missing, 3 - missing)
    assert lives.drift_ppm(is_pit=False) == -100_000 * missing


def test_a_guest_believes_another_frequency() -> None:
    """Count 1193: KVM ticks every 999848 ns, the guest takes them for 1193 / 1193182 s."""
    assert believed_ns(999_848) == pytest.approx(999_847.466, abs=0.001)


# Worst ticks and their stories.


def test_the_worst_ticks_and_their_stories(tmp_path: Path) -> None:
    source = report_of(tmp_path, *RUNS["replayed"]).vms[0].sources[0]
    worst = source.worst[0]
    assert (worst.tick.index, worst.tick.verdict) == (4, Verdict.LATE)
    assert (
        worst.held_up
        == "the guest was running and did not take it for 4 ms: its interrupts were off"
    )
    events = [line.event for line in worst.story]
    assert events[:3] == ["hrtimer_start", "hrtimer_expire_entry", "sched_kthread_work_queue_work"]
    assert "kvm_ack_irq" in events
    assert worst.story[0].what == "the hrtimer is armed"
    assert f"expires={worst.tick.expiry_ns}" in worst.story[0].text
    assert worst.story[-1].ts_ns == worst.tick.eoi_ns
    assert worst.story[-1].thread == "CPU 0/KVM-1002"
    # Of the ticks that were held up with it, none.
    assert not {each.tick.index for each in source.worst} & {5, 6, 7}


def test_a_long_story_has_its_middle_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stories, "MOST_LINES", 20)
    story = report_of(tmp_path, *RUNS["replayed"]).vms[0].sources[0].worst[0].story
    (gap,) = [line for line in story if not line.event]
    assert story.index(gap) == 10
    assert gap.what.startswith("... ")
    assert len(story) == 21


def test_how_many_are_told(tmp_path: Path) -> None:
    path = simulated(tmp_path, *RUNS["plain"])
    with contextlib.closing(open_trace(path)) as trace:
        (vm,) = build(trace, path, worst=3).vms
    assert len(vm.sources[0].worst) == 3


def test_stories_from_records_that_are_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where hardly any records are kept, numbers are the same and stories may be empty."""
    whole = report_of(tmp_path, *RUNS["late"])
    monkeypatch.setattr(building, "RECENT_RECORDS", 1)
    short = report_of(tmp_path, *RUNS["late"])
    assert short.vms[0].sources[0].as_dict() == whole.vms[0].sources[0].as_dict()


def test_sched_events_are_in_the_story(tmp_path: Path) -> None:
    trace = made(tmp_path, *RUNS["late"])
    first = next(r for r in trace.records if r[1] == Event.WORK_START)
    trace.records.insert(trace.records.index(first), switch(first[0], 0, 0, 1001, cpu=3))
    told = trace.report().vms[0].sources[0].worst
    lines = [line for worst in told for line in worst.story if line.event == "sched_switch"]
    assert all("next_pid=1001" in line.text for line in lines)


def test_points_are_all_that_were_disturbed_and_some_of_the_others(tmp_path: Path) -> None:
    source = report_of(tmp_path, *RUNS["late"]).vms[0].sources[0]
    indices = [tick.index for tick in source.points]
    assert indices == sorted(set(indices))
    assert len(indices) == source.ticks.expired


def test_ticks_are_thinned_evenly() -> None:
    thinned = Thinned(100)
    for index in range(1, 10_001):
        thinned.add(Tick(index, index, index))
    kept = [tick.index for tick in thinned.ticks]
    assert 50 <= len(kept) <= 100
    assert len({b - a for a, b in itertools.pairwise(kept)}) == 1


# What causes are told by.


def test_waits_are_found_by_time() -> None:
    waits = CpuWaits(["<idle>-0", "worker-7", "burner-9"])
    waits.switch(switch(1_000_000, 7, 1, 0))
    waits.waking((2_000_000, int(Event.SCHED_WAKING), 0, 7, 3, 120))
    waits.switch(switch(5_000_000, 9, 0, 7, cpu=4))
    (asleep, wait) = waits.waits(7, 0, 9_000_000)
    assert (asleep.asleep, asleep.ns) == (True, 1_000_000)
    assert (wait.asleep, wait.ns, wait.cpu, wait.holder) == (False, 3_000_000, 4, 9)
    assert waits.waits(7, 2_500_000, 3_000_000) == [wait]
    assert wait.within(2_500_000, 3_000_000) == 500_000
    assert not waits.waits(7, 5_000_000, 9_000_000)


def test_a_preempted_thread_waits_where_it_was(tmp_path: Path) -> None:
    waits = CpuWaits(["<idle>-0"])
    waits.switch(switch(1_000_000, 7, 0x100, 9, cpu=2))
    waits.switch(switch(4_000_000, 0, 0, 7, cpu=2))
    (wait,) = waits.waits(7, 0, 9_000_000)
    assert (wait.asleep, wait.ns, wait.holder) == (False, 3_000_000, 9)


def test_nothing_is_told_of_a_thread_that_only_workers_show() -> None:
    waits = CpuWaits(["<idle>-0", "kvm-pit/1-9", "vcpu-7"])
    waits.switch(switch(1_000_000, 7, 0, 9))
    waits.switch(switch(4_000_000, 9, 1, 7))
    assert not waits.waits(7, 0, 9_000_000)
    assert not waits.knows(7, 5_000_000)


def pio(ts_ns: int, port: int, value: int) -> tuple[int, ...]:
    """The guest writes a port."""
    return (ts_ns, int(Event.KVM_PIO), 0, 1, port, 1, 1, value)


def test_initialisation_words_mask_nothing() -> None:
    mask = PicMask()
    for ts_ns, port, value in ((1, 0x20, 0x11), (2, 0x21, 0x21), (3, 0x21, 0x05), (4, 0x21, 0x01)):
        mask.pio(pio(ts_ns, port, value))
    assert mask.masked_ns(0, 100) == 0
    mask.pio(pio(10, 0x21, 0xFF))
    mask.pio(pio(30, 0x21, 0xFE))
    assert mask.masked_ns(0, 100) == 20
    assert mask.masked_ns(15, 25) == 10
    assert mask.masked_ns(40, 100) == 0
