"""A timer whose ticks are followed: the lives, the counts by verdict, the latencies.

What the PIT and the local APICs' timers have in common. Lives are kept to a bound; the counts and
the latencies cover all.
"""

from collections import Counter
from typing import Final

from kvmtick.ticks.histogram import Histogram
from kvmtick.ticks.lives import Keep, Lives
from kvmtick.ticks.tick import Claim, Tick
from kvmtick.ticks.verdict import Path, Verdict, Where

__all__ = ["HOPS", "Source"]

HOPS: Final = (
    "expiry_to_work",
    "work_to_accept",
    "accept_to_inject",
    "inject_to_eoi",
    "expiry_to_eoi",
)

NO_VECTOR: Final = -1
"""Of an interrupt whose vector is not known."""

_OPEN: Final = Verdict.OUTSTANDING
_DELIVERED: Final = Verdict.DELIVERED
_LATE: Final = Verdict.LATE
_DROPPED: Final = Verdict.DROPPED
_COALESCED: Final = Verdict.COALESCED
_UNKNOWN: Final = Verdict.UNKNOWN


class Source:
    """One timer's ticks so far."""

    def __init__(self, name: str, path: Path, keep: Keep, has_worker: bool) -> None:
        """`name`: `pit` or `lapic`; `path`: the one to name while no tick has reached a vCPU;
        `has_worker`: a thread of its own passes its ticks on.
        """
        self.name = name
        self.expired = 0
        self.reached = 0
        self.extra = 0
        self._path = path
        self._keep = keep.lives
        self._kept = Lives(keep)
        self._delivered = 0
        self._late = 0
        self._judged: dict[Verdict, int] = {}
        """The other verdicts."""
        self._arrivals: dict[tuple[Path, int], int] = {}
        self._has_worker = has_worker
        self._expiry_to_work = Histogram()
        self._work_to_accept = Histogram()
        self._accept_to_inject = Histogram()
        self._inject_to_eoi = Histogram()
        self._expiry_to_eoi = Histogram()
        self.blind = ""
        """Why none of its ticks can be judged: records that it takes were never made."""
        self._no_expiry: Tick | None = None
        """The tick of a timer that was armed before the records begin: `expiry_ns` is a guess."""
        self._plain_path = path
        self._plain_vcpu = 0
        self._plain_vector = NO_VECTOR
        self._plain_arrivals = 0
        """Ticks that reached `_plain_vcpu` by `_plain_path` and that `_arrivals` has not."""
        self.plain = 0
        """How many were taken whole, by `take_plain`."""

    # For readers.

    @property
    def kept(self) -> int:
        """How many lives are kept: the last ones."""
        return len(self._kept)

    @property
    def lives(self) -> list[Tick]:
        """The lives that are kept, in order."""
        return self._kept.all()

    def life(self, position: int) -> Tick:
        """One of the lives that are kept, counted from 0; IndexError if there is none."""
        return self._kept.life(position)

    def count(self, verdict: Verdict) -> int:
        """How many ticks have this verdict; the verdicts add up to `expired`."""
        if verdict is _DELIVERED:
            return self._delivered
        if verdict is _LATE:
            return self._late
        if verdict is _OPEN:
            return self.expired - self._delivered - self._late - sum(self._judged.values())
        return self._judged.get(verdict, 0)

    def arrivals(self) -> dict[tuple[Path, int], int]:
        """How many ticks reached which vCPU by which path."""
        self._count_arrivals()
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
        histograms = (
            self._expiry_to_work,
            self._work_to_accept,
            self._accept_to_inject,
            self._inject_to_eoi,
            self._expiry_to_eoi,
        )
        return dict(zip(HOPS, histograms, strict=True))

    def take_old(self, also_kept: bool = False) -> list[Tick]:
        """The lives before the last `Keep.lives`, in order, each once; `also_kept`: all."""
        return self._kept.take(len(self._kept) - (0 if also_kept else self._keep))

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
        self._kept.add(tick)
        return tick

    def take_plain(
        self,
        fired_ns: int,
        next_ns: int,
        expiry_ns: int,
        work_ns: int,
        accept_ns: int,
        inject_ns: int,
        eoi_ns: int,
    ) -> None:
        """A whole life that nothing disturbed: its interrupt reached the vCPU of `go_plain`."""
        self.expired += 1
        self.reached += 1
        self._plain_arrivals += 1
        self.plain += 1
        if inject_ns < next_ns:
            self._delivered += 1
        else:
            self._late += 1
        plain = self._kept.add_plain()
        plain.index = self.expired
        plain.expiry_ns = expiry_ns
        plain.fired_ns = fired_ns
        plain.next_ns = next_ns
        plain.work_ns = work_ns
        plain.accept_ns = accept_ns
        plain.inject_ns = inject_ns
        plain.eoi_ns = eoi_ns
        plain.path = self._plain_path
        plain.vcpu = self._plain_vcpu
        plain.vector = self._plain_vector
        self._expiry_to_work.count(work_ns - expiry_ns)
        if self._has_worker:
            self._work_to_accept.count(accept_ns - work_ns)
        self._accept_to_inject.count(inject_ns - accept_ns)
        self._inject_to_eoi.count(eoi_ns - inject_ns)
        self._expiry_to_eoi.count(eoi_ns - expiry_ns)

    def go_plain(self, path: Path, vcpu: int, vector: int) -> None:
        """The next plain ticks take this way."""
        if path is not self._plain_path or vcpu != self._plain_vcpu:
            self._count_arrivals()
            self._plain_path = path
            self._plain_vcpu = vcpu
        self._plain_vector = vector

    def _arrived(self, path: Path, vcpu: int, count: int = 1) -> None:
        """So many ticks more reached a vCPU by a path."""
        if path is self._plain_path and vcpu == self._plain_vcpu:
            self._plain_arrivals += count
        else:
            self._arrivals[path, vcpu] = self._arrivals.get((path, vcpu), 0) + count

    def _count_arrivals(self) -> None:
        if self._plain_arrivals:
            way = self._plain_path, self._plain_vcpu
            self._arrivals[way] = self._arrivals.get(way, 0) + self._plain_arrivals
            self._plain_arrivals = 0

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
        self._count(verdict, 1)

    def _count(self, verdict: Verdict, change: int) -> None:
        if verdict is _DELIVERED:
            self._delivered += change
        elif verdict is _LATE:
            self._late += change
        else:
            self._judged[verdict] = self._judged.get(verdict, 0) + change

    def reopen(self, tick: Tick) -> None:
        """What was said of it was said too early."""
        self._count(tick.verdict, -1)
        tick.verdict = _OPEN
        tick.where = None
        tick.detail = ""

    def lose_sight(self, why: str) -> None:
        """Records are missing: of those still under way nobody can tell what became of them."""
        for tick in self._kept.all_open():
            if tick.verdict is _OPEN:
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
        self._arrived(claim.path, vcpu)
        if tick.verdict is _OPEN:
            on_time = tick.period_ns is None or ts_ns < tick.expiry_ns + tick.period_ns
            self.judge(tick, _DELIVERED if on_time else _LATE)
        if tick is not self._no_expiry and tick.work_ns is not None:
            self._expiry_to_work.count(tick.work_ns - tick.expiry_ns)
            if self._has_worker:
                self._work_to_accept.count(claim.accept_ns - tick.work_ns)
            self._accept_to_inject.count(ts_ns - claim.accept_ns)

    def finish(self, claim: Claim, ts_ns: int) -> None:
        """The guest ended the interrupt that it arrived by."""
        if claim.arrived:
            tick = claim.tick
            assert tick.inject_ns is not None
            tick.eoi_ns = ts_ns
            if tick is not self._no_expiry:
                self._inject_to_eoi.count(ts_ns - tick.inject_ns)
                self._expiry_to_eoi.count(ts_ns - tick.expiry_ns)

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
        self._arrived(claim.path, vcpu)
        on_time = tick.period_ns is None or eoi_ns < tick.expiry_ns + tick.period_ns
        self.judge(tick, _DELIVERED if on_time else _UNKNOWN, detail="" if on_time else why)

    def rename(self, claim: Claim, path: Path) -> None:
        """A later record tells which way it came."""
        if claim.arrived and claim.tick.vcpu is not None:
            self._arrived(claim.path, claim.tick.vcpu, -1)
            self._arrived(path, claim.tick.vcpu)
            claim.tick.path = path
        claim.path = path
