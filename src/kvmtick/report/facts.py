"""What was gathered of a trace while it was read: the ground of the findings."""

from dataclasses import dataclass

from kvmtick.report.causes import Namer
from kvmtick.report.data import SourceReport
from kvmtick.report.source import SourceLives
from kvmtick.report.vcpus import Vcpus
from kvmtick.ticks.host import VmTicks
from kvmtick.trace.events import Event

__all__ = ["SourceFacts", "TraceFacts", "VmFacts"]


@dataclass(frozen=True, slots=True)
class TraceFacts:
    """The trace as a whole."""

    start_ns: int
    end_ns: int
    lost: int
    unknown: int
    cut: str
    events: frozenset[Event]
    is_complete: bool


@dataclass(frozen=True, slots=True)
class SourceFacts:
    """One timer."""

    report: SourceReport
    lives: SourceLives


@dataclass(frozen=True, slots=True)
class VmFacts:
    """One VM."""

    ticks: VmTicks
    vcpus: Vcpus
    reinject: bool | None
    """Whether its PIT replays ticks; None if the trace does not tell."""
    sources: list[SourceFacts]
    trace: TraceFacts
    name: Namer
