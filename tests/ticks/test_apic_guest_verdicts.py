"""The guests of the local APIC on hosts with faults: the verdicts are held to what the chips did.

Spies count in the chips themselves: injections, requests that were set already, expiries that found
one pending. The trace is not asked.
"""

import io
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from compiled import skip_where_patching_fails
from rich.console import Console

from kvmtick import guests
from kvmtick.cli.show import show_run
from kvmtick.irqchip.i8259 import Pic
from kvmtick.irqchip.lapic import Lapic
from kvmtick.irqchip.lapic_timer import LapicTimer
from kvmtick.kvm.model import ModelVm
from kvmtick.machine.run import Run
from kvmtick.ticks.life import TickAssembler
from kvmtick.ticks.report import TickReport
from kvmtick.ticks.verdict import Verdict, Where
from kvmtick.trace.events import Record
from kvmtick.vcpu.events import PendingEvents

GUESTS = ("tick-ioapic", "tick-msi", "tick-lapic", "tick-x2apic", "nmi-watchdog", "ipi-tick")
FAULTS = (
    {},
    {"vcpu_off": "3500us"},
    {"vcpu_off": "30%:2500us"},
    {"worker_delay": "exp:900us"},
    {"late_expiry": "20%:1500us", "vcpu_off": "uniform:0us..2ms"},
)
IPI_SAFE = [faults for faults in FAULTS if "vcpu_off" not in faults]


@dataclass
class Seen:
    """What the chips did."""

    local: Counter[tuple[int, int]] = field(default_factory=Counter)
    """Injections by vCPU and vector."""
    merged: Counter[tuple[int, int]] = field(default_factory=Counter)
    """Messages that found their vector in IRR."""
    pic: int = 0
    nmis_merged: int = 0
    nmis: int = 0
    timers_merged: int = 0


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """Counts from here on."""
    skip_where_patching_fails()
    seen = Seen()

    def spy(kind: type, name: str, wrap: Callable[..., Any]) -> None:
        original = getattr(kind, name)

        def method(self: Any, *arguments: Any, **keywords: Any) -> Any:
            return wrap(lambda: original(self, *arguments, **keywords), self, *arguments)

        monkeypatch.setattr(kind, name, method)

    def accept(call: Callable[[], int], lapic: Lapic, mode: int, vector: int, *_: object) -> int:
        before = lapic.irr
        taken = call()
        if mode <= 1 and taken and before >> vector & 1:
            seen.merged[lapic.vcpu.vcpu_id, vector] += 1
        return taken

    def get_interrupt(call: Callable[[], int], lapic: Lapic) -> int:
        vector = call()
        seen.local[lapic.vcpu.vcpu_id, vector] += 1
        return vector

    def read_irq(call: Callable[[], int], _: Pic) -> int:
        seen.pic += 1
        return call()

    def queue_nmi(call: Callable[[], None], pending: PendingEvents, _: bool) -> None:
        before = pending.nmi_pending
        call()
        seen.nmis_merged += pending.nmi_pending == before
        seen.nmis += pending.nmi_pending != before

    def timer_fn(call: Callable[[], object], timer: LapicTimer) -> object:
        seen.timers_merged += timer.pending_timer
        return call()

    spy(Lapic, "accept_irq", accept)
    spy(Lapic, "get_interrupt", get_interrupt)
    spy(Pic, "read_irq", read_irq)
    spy(PendingEvents, "queue_nmi", queue_nmi)
    spy(LapicTimer, "timer_fn", timer_fn)
    return seen


def run(
    guest: str, faults: dict[str, str], *, reinject: bool, seed: int, detail: bool = False
) -> tuple[Run, TickAssembler]:
    """Run a guest; also an assembler that was fed record by record."""
    with ModelVm(seed=seed, detail=detail) as vm:
        recorder = vm.machine.recorder
        singly = TickAssembler(tasks=recorder.tasks)

        def feed(batch: list[Record]) -> None:
            for record in batch:
                singly([record])

        recorder.add_consumer(feed)
        image = guests.load(guest, ticks=40)
        vm.prepare(image.needs, reinject)
        vm.load(image)
        for name, delay in faults.items():
            vm.machine.host.set_fault(name, delay)  # type: ignore[arg-type]
        result = vm.run()
        recorder.flush()
        singly.settle()
        assert result.exit.reason == "done"
        return result, singly


def counts(report: TickReport) -> dict[str, object]:
    return {**report.as_dict(), "path": report.path, "vcpu": report.vcpu}


def merged_at(report: TickReport, where: Where) -> int:
    return sum(t.verdict is Verdict.COALESCED and t.where is where for t in report)


@pytest.mark.parametrize("reinject", [True, False])
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("faults", FAULTS, ids=lambda faults: ",".join(faults) or "none")
@pytest.mark.parametrize("guest", GUESTS)
def test_the_counts_are_those_of_the_chips(
    guest: str, faults: dict[str, str], seed: int, reinject: bool, seen: Seen
) -> None:
    if guest == "ipi-tick" and faults not in IPI_SAFE:
        faults = {"worker_delay": "30%:2ms"}
    result, singly = run(guest, faults, reinject=reinject, seed=seed)
    (report,) = result.reports()
    assert counts(report) == counts(singly.report())
    said = {verdict: report.count(verdict) for verdict in Verdict}
    assert sum(said.values()) == report.expired
    assert said[Verdict.UNKNOWN] == said[Verdict.MASKED] == said[Verdict.DROPPED] == 0
    reached = sum(tick.inject_ns is not None for tick in report)
    tick = next(iter(report))
    key = (tick.vcpu or 0, tick.vector or 0)
    if guest == "nmi-watchdog":
        waiting = seen.nmis - reached
        assert 0 <= waiting <= 2
        assert merged_at(report, Where.LAPIC) == seen.nmis_merged
    elif report.path == "pic":
        assert reached + report.extra == seen.pic
    else:
        assert reached == seen.local[key]
        merges = seen.merged[key] + seen.timers_merged
        assert merged_at(report, Where.LAPIC) == merges
    assert report.extra == 0
    assert said[Verdict.COALESCED] == merged_at(report, Where.LAPIC) + merged_at(
        report, Where.WORKER
    ) + merged_at(report, Where.PIC)
    if guest != "ipi-tick":
        assert result.guest_ticks == reached


@pytest.mark.parametrize("guest", GUESTS)
def test_details_change_no_verdict(guest: str) -> None:
    faults = FAULTS[3] if guest == "ipi-tick" else FAULTS[2]
    plain, _ = run(guest, faults, reinject=True, seed=3)
    detailed, _ = run(guest, faults, reinject=True, seed=3, detail=True)
    assert [counts(report) for report in plain.reports()] == [
        counts(report) for report in detailed.reports()
    ]


@pytest.mark.parametrize(
    ("guest", "source", "path", "drift"),
    [
        ("tick-ioapic", "pit", "ioapic", False),
        ("tick-msi", "pit", "msi", False),
        ("tick-lapic", "lapic", "lapic", True),
        ("tick-x2apic", "lapic", "lapic", True),
        ("nmi-watchdog", "pit", "nmi", False),
        ("ipi-tick", "pit", "pic", False),
    ],
)
def test_a_run_names_source_and_path(guest: str, source: str, path: str, drift: bool) -> None:
    result, _ = run(guest, {}, reinject=True, seed=0)
    told = result.as_dict()
    assert [(s["source"], s["vcpu"], s["path"]) for s in told["sources"]] == [(source, 0, path)]
    assert told["ticks"] == told["sources"][0]["ticks"]
    assert told["ticks"]["delivered"] == 40
    assert (result.believed_period_ns is not None) == drift
    assert result.drift_ppm is not None
    assert abs(result.drift_ppm) < 10_000, "within what the start-up of a short run takes"
    assert ("work_to_accept" in told["latency_ns"], bool(told["latency_ns"]["work_to_accept"])) == (
        True,
        source == "pit",
    )


@pytest.mark.parametrize(
    ("guest", "told", "not_told"),
    [
        ("tick-pic", ["worker -> PIC request"], ["ticks of", "local APIC"]),
        ("tick-ioapic", ["the pit by way of the ioapic:", "worker -> local APIC"], ["PIC r"]),
        ("nmi-watchdog", ["by way of the nmi watchdog:"], ["guest's EOI"]),
        (
            "tick-lapic",
            [
                *("the guest asks for a tick every 1,000,000 ns (1,000 Hz)", "its clock is off by"),
                *("ticks of the lapic timer of vcpu 0:", "hrtimer expiry -> local APIC"),
            ],
            ["worker", "1193182"],
        ),
    ],
)
def test_the_report_names_the_source_and_its_hops(
    guest: str, told: list[str], not_told: list[str]
) -> None:
    result, _ = run(guest, {}, reinject=True, seed=0)
    file = io.StringIO()
    show_run(result, Console(file=file, width=200))
    text = file.getvalue()
    assert all(words in text for words in told), text
    assert not any(words in text for words in not_told), text
    assert result.summary().count("ticks of the ") == len(result.reports())
