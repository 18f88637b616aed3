"""A timer whose ticks are followed: the lives, the counts by verdict, the latencies.

What the PIT and the local APICs' timers have in common. Lives are kept to a bound; the counts and
the latencies cover all.
"""

from collections import Counter, deque
from typing import Final, NamedTuple

from kvmtick.ticks.histogram import Histogram
from kvmtick.ticks.tick import Claim, PlainTick, Tick
from kvmtick.ticks.verdict import Path, Verdict, Where

__all__ = ["HOPS", "Keep", "Source"]

HOPS: Final = (
    "expiry_to_work",
    "work_to_accept",
    "accept_to_inject",
    "inject_to_eoi",
    "expiry_to_eoi",
)
_END_HOPS: Final = HOPS[3:]

MANY_ROWS: Final = 512

_OPEN: Final = Verdict.OUTSTANDING
_DELIVERED: Final = Verdict.DELIVERED
_LATE: Final = Verdict.LATE
_DROPPED: Final = Verdict.DROPPED
_COALESCED: Final = Verdict.COALESCED
_UNKNOWN: Final = Verdict.UNKNOWN


class Keep(NamedTuple):
    """Which lives a source keeps."""

    lives: int
    """So many."""
    all: bool = False
    """The older ones too, until `Source.take_old`."""


class Source:
    """One timer's ticks so far."""

    def __init__(
        self, name: str, path: Path, keep: Keep, reach_hops: tuple[str, ...] = HOPS[:3]
    ) -> None:
        """`name`: `pit` or `lapic`; `path`: the one to name while no tick has reached a vCPU;
        `reach_hops`: what `_reach_row` gives.
        """
        self.name = name
        self.expired = 0
        self.reached = 0
        self.extra = 0
        self._path = path
        self._keep = keep.lives
        self._kept: deque[Tick | PlainTick] = deque(maxlen=None if keep.all else keep.lives)
        self._judged = dict.fromkeys(Verdict, 0)
        self._arrivals: Counter[tuple[Path, int]] = Counter()
        self._latency_ns = {hop: Histogram() for hop in HOPS}
        self._reach_hops = reach_hops
        self.blind = ""
        """Why none of its ticks can be judged: records that it takes were never made."""
        self._no_expiry: Tick | None = None
        """The tick of a timer that was armed before the records begin: `expiry_ns` is a guess."""
        self._reach_rows: list[tuple[int, ...]] = []
        self._end_rows: list[tuple[int, int]] = []

    # For readers.

    @property
    def kept(self) -> int:
        """How many lives are kept: the last ones."""
        return len(self._kept)

    @property
    def lives(self) -> list[Tick]:
        """The lives that are kept, in order."""
        return [_thaw(kept) for kept in self._kept]

    def life(self, position: int) -> Tick:
        """One of the lives that are kept, counted from 0; IndexError if there is none."""
        tick = self._kept[position] = _thaw(self._kept[position])
        return tick

    def count(self, verdict: Verdict) -> int:
        """How many ticks have this verdict; the verdicts add up to `expired`."""
        if verdict is _OPEN:
            return self.expired - sum(self._judged.values())
        return self._judged[verdict]

    def arrivals(self) -> Counter[tuple[Path, int]]:
        """How many ticks reached which vCPU by which path."""
        return self._arrivals

    @property
    def path(self) -> Path:
        """The way most ticks took."""
        ways: Counter[Path] = Counter()
        for (path, _), count in self.arrivals().items():
            ways[path] += count
        return max(Path, key=lambda path: ways[path]) if ways else self._path

    @property
    def vcpu(self) -> int:
        """The vCPU that most ticks reached; 0 if none did."""
        vcpus: Counter[int] = Counter()
        for (_, vcpu), count in self.arrivals().items():
            vcpus[vcpu] += count
        return max(sorted(vcpus), key=lambda vcpu: vcpus[vcpu], default=0)

    def latency_ns(self) -> dict[str, Histogram]:
        """The hops of the ticks that reached a vCPU."""
        self._count_rows()
        return self._latency_ns

    def take_old(self, also_kept: bool = False) -> list[Tick]:
        """The lives before the last `Keep.lives`, in order, each once; `also_kept`: all."""
        kept = self._kept
        count = len(kept) if also_kept else len(kept) - self._keep
        return [_thaw(kept.popleft()) for _ in range(count)]

    def judge_blind(self) -> None:
        """Everything was read: of those still open nobody can tell."""
        if self.blind:
            self.lose_sight(self.blind)

    # For those who follow the trace.

    def begin(self, expiry_ns: int, fired_ns: int) -> Tick:
        """The timer expired; `expiry_ns` is 0 if it is not known for when it was armed."""
        self.expired += 1
        tick = Tick(self.expired, expiry_ns or fired_ns, fired_ns)
        if not expiry_ns:
            self._no_expiry = tick
        self._kept.append(tick)
        return tick

    def rearmed(self, tick: Tick, expires_ns: int) -> None:
        """Its callback armed the timer for the next tick; that tells the expiry before it."""
        tick.period_ns = expires_ns - tick.expiry_ns
        first = self._no_expiry
        if first is not None and first is not tick:
            first.period_ns = tick.period_ns
            first.expiry_ns = tick.expiry_ns - tick.period_ns
            self._no_expiry = None

    def judge(
        self, tick: Tick, verdict: Verdict, where: Where | None = None, detail: str = ""
    ) -> None:
        """The one word about it."""
        if self.blind:
            verdict, where, detail = _UNKNOWN, None, self.blind
        tick.verdict = verdict
        tick.where = where
        tick.detail = detail
        self._judged[verdict] += 1

    def reopen(self, tick: Tick) -> None:
        """What was said of it was said too early."""
        self._judged[tick.verdict] -= 1
        tick.verdict = _OPEN
        tick.where = None
        tick.detail = ""

    def lose_sight(self, why: str) -> None:
        """Records are missing: of those still under way nobody can tell what became of them."""
        for tick in self._kept:
            if isinstance(tick, Tick) and tick.verdict is _OPEN:
                self.judge(tick, _UNKNOWN, detail=why)

    def claim(self, tick: Tick, path: Path, ts_ns: int) -> Claim:
        """A chip has its request now."""
        tick.claims += 1
        if tick.accept_ns is None:
            tick.accept_ns = ts_ns
        return Claim(self, tick, path, ts_ns)

    def lose(self, claim: Claim, where: Where, detail: str) -> None:
        """A chip forgot its request: `dropped`, unless another has one or it has arrived."""
        tick = claim.tick
        tick.claims -= 1
        if not tick.claims and tick.verdict is _OPEN:
            self.judge(tick, _DROPPED, where, detail)

    def merge(self, claim: Claim, where: Where, detail: str) -> None:
        """Its request turned out to be part of one before it."""
        tick = claim.tick
        tick.claims -= 1
        if not tick.claims and tick.verdict is _OPEN:
            self.judge(tick, _COALESCED, where, detail)

    def arrive(self, claim: Claim, ts_ns: int, vcpu: int, vector: int | None) -> None:
        """A vCPU takes its interrupt; only the first time counts."""
        tick = claim.tick
        tick.claims -= 1
        if tick.inject_ns is not None:
            return
        claim.arrived = True
        tick.path = claim.path
        tick.vcpu = vcpu
        tick.vector = vector
        tick.accept_ns = claim.accept_ns
        tick.inject_ns = ts_ns
        self.reached += 1
        self._arrivals[claim.path, vcpu] += 1
        if tick.verdict is _OPEN:
            on_time = tick.period_ns is None or ts_ns < tick.expiry_ns + tick.period_ns
            self.judge(tick, _DELIVERED if on_time else _LATE)
        row = self._reach_row(tick, claim.accept_ns, ts_ns)
        if row is not None and tick is not self._no_expiry:
            self._reach_rows.append(row)

    def finish(self, claim: Claim, ts_ns: int) -> None:
        """The guest ended the interrupt that it arrived by."""
        if claim.arrived:
            tick = claim.tick
            assert tick.inject_ns is not None
            tick.eoi_ns = ts_ns
            if tick is not self._no_expiry:
                self._end_rows.append((ts_ns - tick.inject_ns, ts_ns - tick.expiry_ns))

    def give_up(self, claim: Claim, why: str) -> None:
        """Nobody can tell what became of its request."""
        tick = claim.tick
        tick.claims -= 1
        if not tick.claims and tick.verdict is _OPEN:
            self.judge(tick, _UNKNOWN, detail=why)

    def prove(self, claim: Claim, eoi_ns: int, vcpu: int, vector: int, why: str) -> None:
        """The guest ended it: it had arrived, nobody knows when, if not in time for sure."""
        tick = claim.tick
        tick.claims -= 1
        if tick.inject_ns is not None or tick.verdict is not _OPEN:
            return
        tick.path, tick.vcpu, tick.vector, tick.eoi_ns = claim.path, vcpu, vector, eoi_ns
        self.reached += 1
        self._arrivals[claim.path, vcpu] += 1
        on_time = tick.period_ns is None or eoi_ns < tick.expiry_ns + tick.period_ns
        self.judge(tick, _DELIVERED if on_time else _UNKNOWN, detail="" if on_time else why)

    def rename(self, claim: Claim, path: Path) -> None:
        """A later record tells which way it came."""
        if claim.arrived and claim.tick.vcpu is not None:
            self._arrivals[claim.path, claim.tick.vcpu] -= 1
            self._arrivals[path, claim.tick.vcpu] += 1
            claim.tick.path = path
        claim.path = path

    def fold(self) -> None:
        """Take the latencies into the histograms, many at a time."""
        if len(self._end_rows) >= MANY_ROWS or len(self._reach_rows) >= MANY_ROWS:
            self._count_rows()

    def _count_rows(self) -> None:
        for names, rows in ((self._reach_hops, self._reach_rows), (_END_HOPS, self._end_rows)):
            if rows:
                for name, values in zip(names, zip(*rows, strict=True), strict=True):
                    self._latency_ns[name].add(values)
                rows.clear()

    def _reach_row(self, tick: Tick, accept_ns: int, inject_ns: int) -> tuple[int, ...] | None:
        """The latencies up to the injection, in the order of `reach_hops`."""
        raise NotImplementedError


def _thaw(kept: Tick | PlainTick) -> Tick:
    return kept if isinstance(kept, Tick) else Tick(*kept)
