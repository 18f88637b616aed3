"""What was gathered of a trace while it was read: the ground of the findings."""

from dataclasses import dataclass

from kvmtick.report.causes import Namer
from kvmtick.report.data import Phase, SourceReport
from kvmtick.report.source import SourceLives
from kvmtick.report.vcpus import Vcpus
from kvmtick.ticks.host import VmTicks
from kvmtick.ticks.verdict import Path
from kvmtick.trace.events import Event

__all__ = ["SourceFacts", "TraceFacts", "VmFacts", "sees_eoi"]


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
    inhibits: int | None
    """What keeps APICv off since that was set (a bit each); None if the trace does not tell."""
    sources: list[SourceFacts]
    phases: list[Phase]
    trace: TraceFacts
    name: Namer


def sees_eoi(path: Path, events: frozenset[Event]) -> bool:
    """Whether a trace of these events shows when the guest ends an interrupt that came this way."""
    if path in (Path.NMI, Path.MSI):
        return False
    return (Event.KVM_ACK_IRQ if path is Path.PIC else Event.KVM_EOI) in events
