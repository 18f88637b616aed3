"""Reports made by hand: every verdict, at known ticks, with known numbers."""

from collections.abc import Callable
from pathlib import Path

from kvmtick.report.data import (
    Finding,
    Phase,
    Report,
    Severity,
    SourceReport,
    StoryLine,
    VmReport,
    WorstTick,
)
from kvmtick.ticks import verdict
from kvmtick.ticks.histogram import Histogram
from kvmtick.ticks.lives import Keep
from kvmtick.ticks.report import TickReport
from kvmtick.ticks.source import Source
from kvmtick.ticks.tick import Tick
from kvmtick.ticks.verdict import Verdict, Where

START_NS = 41_633_183_075_123
PERIOD_NS = 999_848

Words = Callable[[str], str]
"""What becomes of a text on its way into the report: to make it hostile."""

VERDICTS = {
    7: Verdict.LATE,
    11: Verdict.REINJECTED,
    13: Verdict.COALESCED,
    17: Verdict.MASKED,
    19: Verdict.DROPPED,
    23: Verdict.UNKNOWN,
    29: Verdict.OUTSTANDING,
}
"""Of each 50 ticks these, counted from 0, were not delivered."""


def made_report(ticks: int = 200, vms: int = 1, words: Words = str) -> Report:
    """A report of some VMs with a PIT each."""
    reports = [
        VmReport(
            pid=1000 + number,
            name=words(f"vm-{number}"),
            sources=[made_source(ticks, words)],
            notes=[words("its threads are unknown")],
        )
        for number in range(vms)
    ]
    finding = Finding(
        "worker-late",
        Severity.PROBLEM,
        words("4 ticks late because kvm-pit/1000 waited"),
        words("pin it elsewhere"),
        pid=1000,
        source="pit",
        vcpu=0,
        ticks=4,
    )
    return Report(
        path=Path(words("some.ktrace").replace("/", "|")),
        origin=words("this host's kernel"),
        start_ns=START_NS,
        end_ns=START_NS + (ticks + 1) * PERIOD_NS,
        records=17 * ticks,
        lost_events=3,
        unknown_lines=2,
        vms=reports,
        findings=[finding],
        notes=[words("the end is missing")],
    )


def made_source(ticks: int = 200, words: Words = str) -> SourceReport:
    """A PIT at 1 kHz; tick 8, of those that came late, is the worst, tick 14 was merged."""
    source = Source("pit", verdict.Path.PIC, Keep(ticks), has_worker=True)
    for number in range(ticks):
        make_tick(source, number, words)
    lives = source.lives
    return SourceReport(
        source="pit",
        vcpu=0,
        ticks=TickReport(source),
        histograms=source.latency_ns(),
        period_ns=PERIOD_NS,
        asked_hz=1e9 / PERIOD_NS,
        got_hz=940.0,
        drift_ppm=-60_000.0,
        drift_constant=words("1193 at 1193182 Hz"),
        points=lives,
        worst=[made_worst(life, words) for life in (*lives[7:8], *lives[13:14])],
    )


def make_tick(source: Source, number: int, words: Words) -> None:
    """The tick `number`, counted from 0."""
    expiry_ns = START_NS + (number + 1) * PERIOD_NS
    tick = source.begin(expiry_ns, expiry_ns + 1_500 + number)
    tick.period_ns = PERIOD_NS
    told = VERDICTS.get(number % 50, Verdict.DELIVERED)
    if told is Verdict.OUTSTANDING:
        return
    tick.work_ns = expiry_ns + 20_000 + number
    if told in (Verdict.COALESCED, Verdict.MASKED, Verdict.DROPPED, Verdict.UNKNOWN):
        where = Where.PIC if told is Verdict.COALESCED else None
        source.judge(tick, told, where, words(f"why {number} did not come"))
        return
    if told is Verdict.REINJECTED:
        source.judge(tick, told)
    late_ns = 1_500_000 if told is Verdict.LATE else 30_000 + 100 * (number % 97)
    claim = source.claim(tick, verdict.Path.PIC, tick.work_ns + 2_500)
    source.arrive(claim, tick.work_ns + late_ns, 0, 0x20)
    source.finish(claim, tick.work_ns + late_ns + 5_000)


def made_phase(start_ns: int, end_ns: int, channel: int | None = 0) -> Phase:
    """A rate of the PIT, by the time since the trace began."""
    return Phase(
        source="pit",
        vcpu=0,
        channel=channel,
        mode="2",
        count=1193,
        period_ns=None,
        start_ns=START_NS + start_ns,
        end_ns=START_NS + end_ns,
        reads=1,
        path=None,
        vector=None,
        verdicts={},
        intervals=Histogram(),
    )


def made_worst(tick: Tick, words: Words) -> WorstTick:
    """With a story of three lines, two of them at one time."""
    assert tick.work_ns is not None
    story = [
        StoryLine(
            tick.fired_ns,
            words("swapper/1-0"),
            "hrtimer_expire_entry",
            words("hrtimer=0 function=pit_timer_fn"),
            words("the hrtimer expires"),
        ),
        StoryLine(
            tick.work_ns,
            words("make-77"),
            "sched_switch",
            words("prev_comm=make next_comm=kvm-pit/1000"),
            words("a CPU goes to another thread"),
        ),
        StoryLine(
            tick.work_ns,
            words("kvm-pit/1000-1002"),
            "sched_kthread_work_execute_start",
            words("work struct 0: function pit_do_work"),
            words("the worker runs"),
        ),
    ]
    return WorstTick(tick, words(f"make-77 held up tick {tick.index} for 3.1 ms"), story)
