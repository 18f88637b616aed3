"""One expiry of a timer, and its claim on an interrupt that is under way."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from kvmtick.ticks.verdict import Path, Verdict, Where

if TYPE_CHECKING:
    from kvmtick.ticks.source import Source

__all__ = ["Claim", "PlainTick", "Tick"]

_OPEN: Final = Verdict.OUTSTANDING


class Tick:
    """One expiry and what became of it; times in ns, None for a step it never reached.

    `path`, `vcpu`, `vector` and the times from `accept_ns` on are those of its first arrival.
    """

    __slots__ = (
        "accept_ns",
        "claims",
        "detail",
        "eoi_ns",
        "expiry_ns",
        "fired_ns",
        "index",
        "inject_ns",
        "path",
        "period_ns",
        "vcpu",
        "vector",
        "verdict",
        "where",
        "work_ns",
    )

    def __init__(
        self,
        index: int,
        expiry_ns: int,
        fired_ns: int,
        period_ns: int | None = None,
        work_ns: int | None = None,
        accept_ns: int | None = None,
        inject_ns: int | None = None,
        eoi_ns: int | None = None,
        vector: int | None = None,
        verdict: Verdict = _OPEN,
        path: Path | None = None,
        vcpu: int | None = None,
    ) -> None:
        """`index` counts from 1; `expiry_ns` is the timer's `expires`, `fired_ns` the late now."""
        self.index = index
        self.expiry_ns = expiry_ns
        self.fired_ns = fired_ns
        self.period_ns = period_ns
        self.work_ns = work_ns
        self.accept_ns = accept_ns
        self.inject_ns = inject_ns
        self.eoi_ns = eoi_ns
        self.vector = vector
        self.verdict = verdict
        self.path = path
        self.vcpu = vcpu
        self.where: Where | None = None
        self.detail = ""
        self.claims = 0
        """How many interrupts of its own may still reach a vCPU."""

    def __repr__(self) -> str:
        where = f" at {self.where.value}" if self.where else ""
        return f"<Tick {self.index} expiry_ns={self.expiry_ns} {self.verdict.value}{where}>"


class PlainTick:
    """A finished life of a tick that was `delivered` or `late`, in numbers."""

    __slots__ = (
        "accept_ns",
        "eoi_ns",
        "expiry_ns",
        "fired_ns",
        "index",
        "inject_ns",
        "next_ns",
        "path",
        "vcpu",
        "vector",
        "work_ns",
    )

    def __init__(self) -> None:
        self.index = 0
        self.expiry_ns = 0
        self.fired_ns = 0
        self.next_ns = 0
        self.work_ns = 0
        self.accept_ns = 0
        self.inject_ns = 0
        self.eoi_ns = 0
        self.path = Path.PIC
        self.vcpu = 0
        self.vector = 0
        """Below 0 if it is not known."""

    def tick(self) -> Tick:
        """The same to look at."""
        return Tick(
            self.index,
            self.expiry_ns,
            self.fired_ns,
            self.next_ns - self.expiry_ns,
            self.work_ns,
            self.accept_ns,
            self.inject_ns,
            self.eoi_ns,
            None if self.vector < 0 else self.vector,
            Verdict.DELIVERED if self.inject_ns < self.next_ns else Verdict.LATE,
            self.path,
            self.vcpu,
        )


class Claim:
    """A tick's request in one chip: whoever takes that interrupt takes the tick."""

    __slots__ = ("accept_ns", "arrived", "path", "source", "tick")

    def __init__(self, source: Source, tick: Tick, path: Path, accept_ns: int) -> None:
        self.source = source
        self.tick = tick
        self.path = path
        self.accept_ns = accept_ns
        self.arrived = False
        """It was the tick's first arrival."""
