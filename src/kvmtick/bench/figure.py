"""A figure: what is measured, what it should be, and what came of it."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvmtick.bench.session import Session

__all__ = ["Demand", "Figure", "Result", "Taken", "spread"]


NAMES = {"qemu": "QEMU", "bochs": "Bochs", "one": "one machine's x cores"}
"""Of peers, in sentences."""


@dataclass(frozen=True, slots=True)
class Demand:
    """What a figure should be: `factor`, or `factor` times what a peer gives."""

    factor: float
    peer: str = ""

    def of(self, peers: dict[str, float]) -> float | None:
        """In the figure's unit; None if the peer was not measured."""
        if not self.peer:
            return self.factor
        value = peers.get(self.peer)
        return None if value is None else self.factor * value

    def text(self, unit: str) -> str:
        """For people."""
        if not self.peer:
            return f"{self.factor:,.10g} {unit}"
        return f"{self.factor:.4g} x {NAMES.get(self.peer, self.peer)}"


@dataclass(slots=True)
class Taken:
    """What taking a figure gave."""

    values: list[float] = field(default_factory=list)
    """One a run; none if it could not be taken, and `note` says why."""
    peers: dict[str, list[float]] = field(default_factory=dict)
    """The same of the peers, measured in turns with ours."""
    absent: dict[str, str] = field(default_factory=dict)
    """Peers that gave nothing, and why."""
    faults: list[str] = field(default_factory=list)
    """What misses the mark beside the value."""
    note: str = ""
    failed: bool = False
    """It could not be taken, and that is a failure of kvmtick's."""
    undecided: bool = False
    """Too short a run to tell whether the mark is met."""
    details: dict[str, Any] = field(default_factory=dict)
    """What else was measured, for the JSON."""


@dataclass(frozen=True, slots=True)
class Figure:
    """One line of `kvmtick bench`."""

    name: str
    what: str
    unit: str
    take: "Callable[[Session], Taken]"
    demands: tuple[Demand, ...]
    """All have to be met."""
    stretch: tuple[Demand, ...] = ()
    """What is reported beside the mark."""
    at_most: bool = False
    """The value should be small, not large."""
    pinned: bool = True
    """It is taken on one core."""

    def best(self, values: list[float]) -> float:
        """The run that was disturbed least."""
        return min(values) if self.at_most else max(values)

    def meets(self, value: float, mark: float) -> bool:
        """Whether a value reaches a mark."""
        return value <= mark if self.at_most else value >= mark

    def mark_text(self) -> str:
        """Its mark, for people."""
        sense = "at most" if self.at_most else "at least"
        return f"{sense} " + " and ".join(demand.text(self.unit) for demand in self.demands)


@dataclass(frozen=True, slots=True)
class Result:
    """A figure and what taking it gave."""

    figure: Figure
    taken: Taken

    @property
    def value(self) -> float | None:
        """The best of the runs."""
        return self.figure.best(self.taken.values) if self.taken.values else None

    @property
    def peers(self) -> dict[str, float]:
        """The best of each peer."""
        return {name: self.figure.best(v) for name, v in self.taken.peers.items() if v}

    @property
    def demand(self) -> Demand | None:
        """Of those that can be told, the one hardest to meet."""
        known = [
            (mark, each)
            for each in self.figure.demands
            if (mark := each.of(self.peers)) is not None
        ]
        if not known:
            return None
        pick = min if self.figure.at_most else max
        return pick(known, key=lambda pair: pair[0])[1]

    @property
    def mark(self) -> float | None:
        """What the value should be, in its unit; None where a peer is needed and missing."""
        return None if self.demand is None else self.demand.of(self.peers)

    @property
    def met(self) -> bool | None:
        """None if it cannot be told."""
        if self.value is None or self.taken.undecided:
            return None
        if self.taken.faults:
            return False
        return self._meets(self.figure.demands)

    def _meets(self, demands: tuple[Demand, ...]) -> bool | None:
        value = self.value
        assert value is not None
        marks = [demand.of(self.peers) for demand in demands]
        if any(mark is not None and not self.figure.meets(value, mark) for mark in marks):
            return False
        return None if None in marks else True

    def ratio(self, peer: str) -> float | None:
        """Ours divided by the peer's, best by best."""
        value, theirs = self.value, self.peers.get(peer)
        return value / theirs if value is not None and theirs else None

    def ratios(self, peer: str) -> list[float]:
        """The same run by run: each has its own disturbances."""
        pairs = zip(self.taken.values, self.taken.peers.get(peer, []), strict=False)
        return [ours / theirs for ours, theirs in pairs if theirs]

    @property
    def peer(self) -> str | None:
        """Whom the mark compares with."""
        demand = self.demand or next((each for each in self.figure.demands if each.peer), None)
        return demand.peer or None if demand else None

    def as_dict(self) -> dict[str, Any]:
        """Its object in the JSON (docs/benchmarks.md)."""
        return {
            "name": self.figure.name,
            "value": self.value,
            "unit": self.figure.unit,
            "mark": self.mark,
            "met": self.met,
            "peer": self.peer,
            "ratio": self.ratio(self.peer) if self.peer else None,
            "rule": self.figure.mark_text(),
            **spread(self.figure, self.taken.values),
            "peers": {
                name: self._peer_dict(name) for name in (*self.taken.peers, *self.taken.absent)
            },
            "stretch": [self._stretch_dict(each) for each in self.figure.stretch],
            "faults": self.taken.faults,
            "note": self.taken.note,
            "details": self.taken.details,
        }

    def _peer_dict(self, name: str) -> dict[str, Any]:
        ratios = self.ratios(name)
        return {
            "value": self.peers.get(name),
            "ratio": self.ratio(name),
            "ratio_median": statistics.median(ratios) if ratios else None,
            **spread(self.figure, self.taken.peers.get(name, [])),
            "absent": self.taken.absent.get(name),
        }

    def _stretch_dict(self, demand: Demand) -> dict[str, Any]:
        met = None if self.value is None else self._meets((demand,))
        return {
            "rule": demand.text(self.figure.unit),
            "mark": demand.of(self.peers),
            "peer": demand.peer or None,
            "met": met,
        }


def spread(figure: Figure, values: list[float]) -> dict[str, float | int | None]:
    """Best, median and number of runs, and how far they lie apart as a part of the median."""
    if not values:
        return {"best": None, "median": None, "runs": 0, "spread": None}
    median = statistics.median(values)
    apart = (max(values) - min(values)) / median if median else None
    return {"best": figure.best(values), "median": median, "runs": len(values), "spread": apart}
