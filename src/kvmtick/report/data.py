"""The report as data: what the text, the JSON, the page and the picture all show.

`kvmtick.report.build` makes it from a trace. Times are ns by the trace's own clock.
"""

from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from kvmtick.ticks.histogram import Histogram
from kvmtick.ticks.report import TickReport
from kvmtick.ticks.tick import Tick

__all__ = [
    "Finding",
    "Phase",
    "Report",
    "Severity",
    "SourceReport",
    "StoryLine",
    "VmReport",
    "WorstTick",
]


class Severity(StrEnum):
    """How much a finding matters."""

    PROBLEM = "problem"
    """The guest loses ticks or gets them late."""
    NOTICE = "notice"
    """Worth knowing; the guest may be meant to be so."""
    GOOD = "good"
    """All is well, and what that was seen by."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One plain sentence, with the remedy."""

    kind: str
    """A fixed word for programs, such as `worker-late`; docs/reporting.md lists them."""
    severity: Severity
    text: str
    """What was seen: how many ticks, because of what, where."""
    remedy: str
    """What to do about it; empty if there is nothing to do."""
    pid: int | None = None
    """Whose it is; None: the whole host's, or the trace's."""
    source: str | None = None
    """`pit` or `lapic`; None: the VM's."""
    vcpu: int | None = None
    ticks: int = 0
    """How many ticks it concerns."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "kind": self.kind,
            "severity": self.severity.value,
            "text": self.text,
            "remedy": self.remedy,
            "pid": self.pid,
            "source": self.source,
            "vcpu": self.vcpu,
            "ticks": self.ticks,
        }


@dataclass(frozen=True, slots=True)
class StoryLine:
    """One event of a tick's life."""

    ts_ns: int
    thread: str
    """`comm-pid` of the thread it happened in; in an interrupt, the thread it interrupted."""
    event: str
    """The tracepoint."""
    text: str
    """Its fields, as ftrace writes them."""
    what: str
    """The step, in words."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "ts_ns": self.ts_ns,
            "thread": self.thread,
            "event": self.event,
            "text": self.text,
            "what": self.what,
        }


@dataclass(frozen=True, slots=True)
class WorstTick:
    """A tick that came late or not at all, and its story."""

    tick: Tick
    held_up: str
    """Which hop took longest and who caused that, as far as the trace shows; a sentence."""
    story: list[StoryLine]
    """From the expiry (or what armed it) to the EOI; empty if it was not kept."""

    @property
    def waited_ns(self) -> int | None:
        """From its expiry to its interrupt; None if it never came."""
        return None if self.tick.inject_ns is None else self.tick.inject_ns - self.tick.expiry_ns

    def as_dict(self) -> dict[str, Any]:
        """For JSON, without the story."""
        tick = self.tick
        return {
            "tick": tick.index,
            "verdict": tick.verdict.value,
            "where": tick.where.value if tick.where else None,
            "detail": tick.detail,
            "expiry_ns": tick.expiry_ns,
            "waited_ns": self.waited_ns,
            "held_up": self.held_up,
        }


@dataclass(slots=True)
class SourceReport:
    """One timer of one VM."""

    source: str
    """`pit` or `lapic`."""
    vcpu: int
    ticks: TickReport
    """Counts by verdict, latency per hop, path."""
    histograms: dict[str, Histogram]
    """Latency per hop (`kvmtick.ticks.source.HOPS`)."""
    period_ns: int | None
    """The period it was mostly set to; None for a one-shot timer."""
    asked_hz: float | None
    """Ticks per second by that period."""
    got_hz: float | None
    """Ticks per second that reached a vCPU."""
    drift_ppm: float | None
    """A clock that counts its ticks goes wrong by so much; negative: it is slow."""
    drift_constant: str = ""
    """What a tick was counted as: the PIT frequency that the guest is taken to believe."""
    points: list[Tick] = field(default_factory=list)
    """Lives to draw, in order. All that were not simply delivered, up to a bound, and of the others
    as many as there is room for, evenly: `expired` of `ticks` tells whether some are left out.
    """
    worst: list[WorstTick] = field(default_factory=list)
    """The worst first: how long after its expiry an interrupt of the timer's came. Of those that
    were disturbed in a row only the worst."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON; `ticks` and `latency_ns` are those of `kvmtick run --json`."""
        return {
            "source": self.source,
            "vcpu": self.vcpu,
            "path": self.ticks.path,
            "period_ns": self.period_ns,
            "asked_hz": self.asked_hz,
            "got_hz": self.got_hz,
            "ticks": self.ticks.as_dict(),
            "latency_ns": self.ticks.latency_ns,
            "drift_ppm": self.drift_ppm,
            "worst": [tick.as_dict() for tick in self.worst],
        }


@dataclass(frozen=True, slots=True)
class Phase:
    """A stretch in which the guest had set one timer in one way, and what came of it."""

    source: str
    """`pit` or `lapic`."""
    vcpu: int
    """Whose local APIC; 0 of the PIT."""
    channel: int | None
    """The PIT's counter, 0 to 2; only 0 has ticks. None of a local APIC's timer."""
    mode: str | None
    """The PIT's, `0` to `5`; `one-shot`, `periodic` or `tsc-deadline`. None: it was set before the
    trace began, or its setting was not recorded."""
    count: int | None
    """The PIT's count, 1-65536; None of a local APIC's timer, and if one-shots had several."""
    period_ns: int | None
    """Of its ticks; None of one-shots."""
    start_ns: int
    """When it was set, or its first tick."""
    end_ns: int
    """Its last tick or reading."""
    reads: int
    """How often the guest read its count (or, of counter 2, its output)."""
    path: str | None
    """By which way most of its ticks came, and as which vector; None if none did."""
    vector: int | None
    verdicts: dict[str, int]
    intervals: Histogram
    """From tick to tick, ns."""

    @property
    def ticks(self) -> int:
        """How often it expired."""
        return sum(self.verdicts.values())

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "source": self.source,
            "vcpu": self.vcpu,
            "channel": self.channel,
            "mode": self.mode,
            "count": self.count,
            "period_ns": self.period_ns,
            "start_ns": self.start_ns,
            "end_ns": self.end_ns,
            "reads": self.reads,
            "path": self.path,
            "vector": self.vector,
            "ticks": self.ticks,
            "verdicts": self.verdicts,
            "interval_ns": self.intervals.summary(),
        }


@dataclass(slots=True)
class VmReport:
    """One VM."""

    pid: int
    name: str
    sources: list[SourceReport]
    phases: list[Phase] = field(default_factory=list)
    """How the guest set its timers, by when it did."""
    notes: list[str] = field(default_factory=list)
    """What cannot be told of it, and why."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "pid": self.pid,
            "name": self.name,
            "notes": self.notes,
            "phases": [phase.as_dict() for phase in self.phases],
            "sources": [source.as_dict() for source in self.sources],
        }


@dataclass(slots=True)
class Report:
    """Everything a trace says."""

    path: Path
    origin: str
    """Where the trace comes from: a host's kernel, a text, a simulated run."""
    start_ns: int
    end_ns: int
    records: int
    lost_events: int
    unknown_lines: int
    vms: list[VmReport]
    findings: list[Finding]
    """The most important first."""
    notes: list[str] = field(default_factory=list)
    """What is missing of the trace, and why."""

    def as_dict(self) -> dict[str, Any]:
        """The object of `kvmtick report --json` (docs/json.md)."""
        return {
            "file": str(self.path),
            "origin": self.origin,
            "start_ns": self.start_ns,
            "end_ns": self.end_ns,
            "events": self.records,
            "lost_events": self.lost_events,
            "unknown_lines": self.unknown_lines,
            "notes": self.notes,
            "vms": [vm.as_dict() for vm in self.vms],
            "findings": [finding.as_dict() for finding in self.findings],
        }
