"""What became of the ticks, for people (`summary`) and for programs (`as_dict`)."""

from collections.abc import Iterator

from kvmtick.ticks.source import Source
from kvmtick.ticks.tick import Tick
from kvmtick.ticks.verdict import Verdict

__all__ = ["TickReport"]

_MEANING = {
    Verdict.DELIVERED: "reached the guest within their period",
    Verdict.LATE: "reached the guest a period late, or more",
    Verdict.REINJECTED: "held back, pulsed on a later EOI",
    Verdict.COALESCED: "merged with a request that was still set",
    Verdict.MASKED: "pulsed while every pin was masked",
    Verdict.DROPPED: "taken back before they reached the guest",
    Verdict.OUTSTANDING: "still under way at the end",
    Verdict.UNKNOWN: "the trace cannot tell",
}


_WAYS = {
    "pic": "the pic",
    "ioapic": "the ioapic",
    "lapic": "the lapic",
    "msi": "an msi",
    "nmi": "the nmi watchdog",
}


class TickReport:
    """The ticks of one source: counts by verdict, latency per hop, and the lives themselves."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def __len__(self) -> int:
        return self._source.expired

    def __iter__(self) -> Iterator[Tick]:
        """The lives that were kept, in order: the last 16,384."""
        return iter(self._source.lives)

    def __getitem__(self, index: int) -> Tick:
        """Tick `index`, counting from 1 as `--story` does; IndexError names what there is."""
        last, kept = self._source.expired, self._source.kept
        first = last - kept + 1
        if not first <= index <= last:
            have = f"{first} to {last}" if kept else "none"
            raise IndexError(f"no tick {index}: the ticks kept are {have}")
        return self._source.life(index - first)

    @property
    def source(self) -> str:
        """Which timer: `pit` or `lapic`."""
        return self._source.name

    @property
    def vcpu(self) -> int:
        """Whose timer it is (`lapic`), or the vCPU most ticks reached (`pit`)."""
        return self._source.vcpu

    @property
    def path(self) -> str:
        """By which way most reached a vCPU: `pic`, `ioapic`, `lapic`, `msi` or `nmi`."""
        return self._source.path.value

    @property
    def expired(self) -> int:
        """How often the timer expired."""
        return self._source.expired

    @property
    def extra(self) -> int:
        """Injections that belong to no tick: the PIC's, and those of a vector its ticks use."""
        return self._source.extra

    def count(self, verdict: Verdict | str) -> int:
        """How many ticks got this verdict."""
        return self._source.count(Verdict(verdict))

    @property
    def latency_ns(self) -> dict[str, dict[str, int]]:
        """`p50`, `p99` and `max` of each hop, in ns; empty for a hop no tick made."""
        return {hop: h.summary() for hop, h in self._source.latency_ns().items()}

    def as_dict(self) -> dict[str, str | int]:
        """`source`, `expired` and a count for each verdict; the verdicts add up to `expired`."""
        counts = {verdict.value: self.count(verdict) for verdict in Verdict}
        return {"source": self.source, "expired": self.expired, **counts, "extra": self.extra}

    def rows(self) -> list[tuple[str, int, str]]:
        """`(verdict, count, meaning)` in the order a reader wants them."""
        return [(v.value, self.count(v), meaning) for v, meaning in _MEANING.items()]

    def title(self) -> str:
        """Which timer and which way, in words."""
        if self.source == "lapic":
            return f"the lapic timer of vcpu {self.vcpu}"
        return f"the {self.source} by way of {_WAYS[self.path]}"

    def summary(self) -> str:
        """A few lines for the terminal: counts by verdict, then latencies."""
        lines = [f"{self.expired} ticks of {self.title()}:"]
        lines += [f"  {name:<12}{count:>9}" for name, count, _ in self.rows() if count]
        lines += [
            f"  {hop:<18}p50 {s['p50']:>9} ns   p99 {s['p99']:>9} ns   max {s['max']:>9} ns"
            for hop, s in self.latency_ns.items()
            if s
        ]
        return "\n".join(lines)
