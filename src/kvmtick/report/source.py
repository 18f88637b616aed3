"""One timer's lives in order, as they become final: what the findings and the pictures need.

Everything is bounded: lives to draw are thinned out, causes are counted.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from kvmtick.report.causes import Cause, CauseKind, Causes
from kvmtick.ticks.tick import Tick
from kvmtick.ticks.verdict import Verdict, Where

__all__ = ["Held", "Run", "SourceLives", "believed_ns"]

PIT_HZ = 1193181
"""KVM's PIT (arch/x86/kvm/i8254.h, KVM_PIT_FREQ)."""
BELIEVED_HZ = 1193182
"""What guests take it for: 105/88 MHz."""
MIN_PERIOD_NS = 200_000
"""KVM's `min_timer_period_us`, unless the module was loaded with another."""
SLOW_ONE_SHOT_NS = 1_000_000
"""A one-shot tick that takes so long is told of as one that was held up."""

MOST_UNSEEN = 50_000
"""Ticks kept until the guest is seen again."""
POINTS_OF_INTEREST = 8_000
POINTS_DELIVERED = 4_000

_DELIVERED = Verdict.DELIVERED
_NOT_LOST = (Verdict.DELIVERED, Verdict.LATE, Verdict.REINJECTED)


@dataclass(slots=True)
class Held:
    """Ticks that one cause held up."""

    ticks: int = 0
    worst_ns: int = 0
    worst_index: int = 0

    def add(self, cause: Cause, tick: Tick) -> None:
        self.ticks += 1
        if cause.ns >= self.worst_ns:
            self.worst_ns, self.worst_index = cause.ns, tick.index


@dataclass(slots=True)
class Run:
    """Ticks of one verdict in a row: the longest, and how many rows there were."""

    ticks: int = 0
    rows: int = 0
    """Rows of at least `RUN_TICKS`."""
    longest: int = 0
    longest_from_ns: int = 0
    longest_ns: int = 0
    """From its first expiry to its last, or (reinjected) from its first injection to its last."""


RUN_TICKS = 3
"""Fewer ticks of a verdict in a row are no burst."""


@dataclass(slots=True)
class _Row:
    verdict: Verdict
    ticks: int
    from_ns: int
    to_ns: int


class SourceLives:
    """Takes the lives of one timer."""

    def __init__(
        self, causes: Causes, is_told: Callable[[int], bool], seen_ns: Callable[[], int]
    ) -> None:
        """`is_told`: whether the cause of a tick will be asked for, by its index; `seen_ns`: when
        the guest was last seen to do something.
        """
        self._seen_ns = seen_ns
        self._unseen: deque[Tick] = deque()
        self.gone = 0
        """Ticks after the last moment the guest was seen, which nobody took: they count neither for
        its rate and its clock nor as held up."""
        self._causes = causes
        self._is_told = is_told
        self._before: Tick | None = None
        self._standing_ns: int | None = None
        """When the PIC's request was first found set that no tick has come from since."""
        self._cause: Cause | None = None
        self._row: _Row | None = None
        self.held: dict[CauseKind, dict[Cause, Held]] = {}
        """By kind, then by who it was (a `Cause` of 0 ns)."""
        self._gone_periods: Counter[int] = Counter()
        self.never_acknowledged = False
        """The last tick that reached a vCPU was not acknowledged by the end."""
        self.causes: dict[int, Cause] = {}
        """By index, of those that are told."""
        self.runs = {verdict: Run() for verdict in Verdict}
        self.details: Counter[tuple[Verdict, str, str]] = Counter()
        """Verdict, where, why: of ticks that did not come through."""
        self.periods: Counter[int] = Counter()
        self.reached_periods: Counter[int] = Counter()
        self.first_ns: int | None = None
        self.last_ns = 0
        self.unknown: Counter[int] = Counter()
        """By period, ticks of which nobody knows whether they came."""
        self._merged_replays: Counter[int] = Counter()
        """By period, replayed ticks whose pulse merged with one before."""
        self.came_as_others = 0
        """So many of those came all the same, by interrupts that belong to no tick."""
        self._one_shots_came = 0
        self.last_arrival: Tick | None = None
        self._interesting = Thinned(POINTS_OF_INTEREST)
        self._delivered = Thinned(POINTS_DELIVERED)

    def take(self, lives: Iterable[Tick]) -> None:
        """The next lives, in order."""
        seen_ns = self._seen_ns()
        unseen = self._unseen
        for tick in lives:
            if tick.verdict is _DELIVERED:
                self._delivered.add(tick)
            else:
                self._interesting.add(tick)
            if tick.inject_ns is None and tick.expiry_ns > seen_ns:
                unseen.append(tick)
                if len(unseen) > MOST_UNSEEN:
                    self._forget(unseen.popleft())
                continue
            while unseen:
                self._take(unseen.popleft())
            self._take(tick)

    def _take(self, tick: Tick) -> None:
        if self.first_ns is None:
            self.first_ns = tick.expiry_ns
        self.last_ns = tick.expiry_ns
        if tick.period_ns:
            self.periods[tick.period_ns] += 1
            if tick.verdict is Verdict.UNKNOWN:
                self.unknown[tick.period_ns] += 1
            elif tick.verdict is Verdict.REINJECTED and tick.inject_ns is None:
                self._merged_replays[tick.period_ns] += 1
        if tick.inject_ns is not None:
            self.last_arrival = tick
            if not tick.period_ns:
                self._one_shots_came += 1
            elif tick.verdict is not Verdict.UNKNOWN:
                self.reached_periods[tick.period_ns] += 1
        if tick.verdict is _DELIVERED and not _is_slow_one_shot(tick):
            self._cause = None
        else:
            self._disturbed(tick)
        if tick.inject_ns is not None:
            self._standing_ns = None
        elif tick.where is Where.PIC and self._standing_ns is None:
            self._standing_ns = tick.fired_ns
        self._follow_row(tick)
        self._before = tick

    def _disturbed(self, tick: Tick) -> None:
        cause = self._cause = self._causes.of(
            tick, self._before, self._cause, self.last_arrival, self._standing_ns
        )
        if self._is_told(tick.index):
            self.causes[tick.index] = cause
        who = Cause(cause.kind, 0, cause.thread, cause.cpu, cause.holder)
        self.held.setdefault(cause.kind, {}).setdefault(who, Held()).add(cause, tick)
        if tick.verdict not in _NOT_LOST:
            where = tick.where.value if tick.where else ""
            self.details[tick.verdict, where, tick.detail] += 1

    def _follow_row(self, tick: Tick) -> None:
        row = self._row
        at_ns = tick.expiry_ns
        if tick.verdict is Verdict.REINJECTED and tick.inject_ns is not None:
            at_ns = tick.inject_ns
        if row is not None and row.verdict is tick.verdict:
            row.ticks += 1
            row.to_ns = at_ns
            return
        self._end_row()
        self._row = _Row(tick.verdict, 1, at_ns, at_ns)

    def _end_row(self) -> None:
        row = self._row
        if row is None:
            return
        run = self.runs[row.verdict]
        run.ticks += row.ticks
        run.rows += row.ticks >= RUN_TICKS
        if row.ticks > run.longest:
            run.longest, run.longest_from_ns = row.ticks, row.from_ns
            run.longest_ns = row.to_ns - row.from_ns

    def _forget(self, tick: Tick) -> None:
        self.gone += 1
        if tick.period_ns:
            self._gone_periods[tick.period_ns] += 1

    def finish(self, sees_eoi: bool, reinject: bool, extra: int) -> None:
        """There are no more. Those behind a tick that the guest never acknowledged count, though
        nothing was seen of it since; `sees_eoi`: whether the trace shows when it does; `reinject`:
        whether KVM holds ticks back until then; `extra`: interrupts that belong to no tick.
        """
        last, seen_ns = self.last_arrival, self._seen_ns()
        if last is not None and last.eoi_ns is None:
            self.never_acknowledged = sees_eoi or (reinject and self._holds_back(last))
        for tick in self._unseen:
            if tick.expiry_ns <= seen_ns or self.never_acknowledged:
                self._take(tick)
            else:
                self._forget(tick)
        self._unseen.clear()
        if self.never_acknowledged:
            self.periods += self._gone_periods
        self._end_row()
        self._row = None
        for period, count in self._merged_replays.items():
            # KVM replays by count: what merged here came as another's.
            came = min(count, extra - self.came_as_others)
            self.reached_periods[period] += came
            self.came_as_others += came

    def _holds_back(self, last: Tick) -> bool:
        """Whether the tick behind the last that came was not even pulsed."""
        first = self._unseen[0] if self._unseen else None
        return first is not None and first.index == last.index + 1 and first.work_ns is None

    def points(self) -> list[Tick]:
        """Lives to draw, in order."""
        points = [*self._interesting.ticks, *self._delivered.ticks]
        return sorted(points, key=lambda tick: tick.index)

    # Rates.

    @property
    def period_ns(self) -> int | None:
        """The period most ticks had; None for one-shots."""
        if not self.periods:
            return None
        return max(self.periods, key=lambda period: (self.periods[period], -period))

    @property
    def ran_ns(self) -> int:
        """For how long it ticked, as far as that is known: the sum of the periods; of a one-shot
        timer the time it took.
        """
        if self.periods:
            return sum(p * count for p, count in (self.periods - self.unknown).items())
        return self.last_ns - (self.first_ns or 0)

    def got_hz(self, reached: int) -> float | None:
        """Ticks per second, of `reached` that came: if it has a period, while it had; None if
        nobody can know.
        """
        came = reached + self.came_as_others - (self._one_shots_came if self.periods else 0)
        return came * 1e9 / self.ran_ns if self.ran_ns else None

    @property
    def missing(self) -> int:
        """How many ticks such a clock did not count, as far as that is known."""
        known = self.periods - self.unknown
        return sum(known.values()) - sum(self.reached_periods.values())

    def drift_ppm(self, is_pit: bool) -> float | None:
        """How fast a clock runs that counts the ticks that came; None if nobody can know."""
        if not self.ran_ns or not self.reached_periods:
            return None
        if is_pit and MIN_PERIOD_NS in self.periods:
            return None
        believed = believed_ns if is_pit else float
        counted = sum(believed(p) * count for p, count in self.reached_periods.items())
        return round((counted / self.ran_ns - 1) * 1e6, 3)


def _is_slow_one_shot(tick: Tick) -> bool:
    """It has no period to be late by, and its verdict does not tell."""
    if tick.period_ns is not None or tick.inject_ns is None:
        return False
    return tick.inject_ns - tick.expiry_ns >= SLOW_ONE_SHOT_NS


def believed_ns(period_ns: int) -> float:
    """What a guest takes a period of the PIT's for: its count by 1193182 Hz."""
    return round(period_ns * PIT_HZ / 1e9) * 1e9 / BELIEVED_HZ


class Thinned:
    """Ticks, at most so many: where there are more, every second one, every fourth ..."""

    def __init__(self, most: int) -> None:
        self.ticks: list[Tick] = []
        self._most = most
        self._step = 1
        self._seen = 0

    def add(self, tick: Tick) -> None:
        """One more; in order."""
        if self._seen % self._step == 0:
            if len(self.ticks) >= self._most:
                self.ticks = self.ticks[::2]
                self._step *= 2
            if self._seen % self._step == 0:
                self.ticks.append(tick)
        self._seen += 1
