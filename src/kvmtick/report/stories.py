"""The stories of the worst ticks, taken from the last records the moment a tick is over.

How bad a tick is: how long after its expiry an interrupt of the timer's came. Of ticks that were
disturbed in a row only the worst is told.
"""

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain, islice
from operator import itemgetter

from kvmtick.report.data import StoryLine
from kvmtick.ticks.source import Source
from kvmtick.ticks.story import words_of
from kvmtick.ticks.tick import Tick
from kvmtick.ticks.verdict import Path, Verdict
from kvmtick.trace.events import IRQ_CONTEXT, Event, Function, Record
from kvmtick.trace.ftrace import event_name, event_text

__all__ = ["RecentRecords", "Story", "Watch", "story_lines"]

MOST_LINES = 240
"""Of a longer story the middle is left out."""
WORSE = 1.25
"""A tick that is so much worse than the one before it in a row has its story kept at once: at the
row's end its records may be gone."""
SPARE = 2
"""Stories kept for each that is wanted: what is said of a tick may change until the end."""
MOST_BEFORE = 20_000
"""So many records before an expiry are looked at for what armed the timer."""
MOST_OPEN = 20_000
"""Ticks of a source that are watched at once."""
PATIENCE = 64
"""An EOI that has not come so many ticks later is not waited for."""

_EXPIRE = int(Event.HRTIMER_EXPIRE_ENTRY)
_START = int(Event.HRTIMER_START)
_CANCEL = int(Event.HRTIMER_CANCEL)
_TIMERS = (_START, _CANCEL, _EXPIRE)
_PIT_FN, _APIC_FN = int(Function.PIT_TIMER_FN), int(Function.APIC_TIMER_FN)
_OPEN = Verdict.OUTSTANDING
_TIME = itemgetter(0)
_SAME_INTERRUPT_NS = 1_000_000
"""An expiry is recorded at most so long after the `now` it has."""


class RecentRecords:
    """A VM's last records, in order."""

    def __init__(self) -> None:
        self.most = 0
        """So many are kept, or a batch more."""
        self._batches: deque[list[Record]] = deque()
        self._count = 0

    def add(self, batch: list[Record]) -> None:
        """The next records."""
        if not batch:
            return
        self._batches.append(batch)
        self._count += len(batch)
        while len(self._batches) > 1 and self._count - len(self._batches[0]) >= self.most:
            self._count -= len(self._batches.popleft())

    def of(self, tick: Tick, function: int) -> list[Record]:
        """A tick's records: what armed its timer, then from its expiry to its end those that may
        concern it; empty if it is too long ago.
        """
        later: list[list[Record]] = []
        for batch in reversed(self._batches):
            if batch[-1][0] < tick.fired_ns:
                break
            found = self._expiry(batch, tick, function)
            if found is not None:
                armed, at = found
                return [*armed, *_life(islice(batch, at, None), reversed(later), tick)]
            later.append(batch)
        return []

    def _expiry(
        self, batch: list[Record], tick: Tick, function: int
    ) -> tuple[list[Record], int] | None:
        """What set the timer to this tick's time, if that is there, and where it expires."""
        first = None
        at = bisect_left(batch, tick.fired_ns, key=_TIME)
        for position in range(at, len(batch)):
            record = batch[position]
            if record[1] != _EXPIRE or record[5] != tick.fired_ns or record[4] != function:
                if record[0] > tick.fired_ns + _SAME_INTERRUPT_NS:
                    break
                continue
            armed = self._armed(record[3], tick, batch, position)
            if armed is not None:
                return [armed], position
            first = position if first is None else first
        return None if first is None else ([], first)

    def _armed(self, timer: int, tick: Tick, batch: list[Record], at: int) -> Record | None:
        before: list[Record] = []
        for other in self._batches:
            if other is batch:
                break
            before = other
        earlier = chain((batch[i] for i in range(at - 1, -1, -1)), reversed(before))
        for record in islice(earlier, MOST_BEFORE):
            if record[1] == _START and record[3] == timer:
                return record if record[5] == tick.expiry_ns else None
        return None


def _life(first: Iterable[Record], later: Iterable[list[Record]], tick: Tick) -> list[Record]:
    """From its expiry to its end: its timer's events, the host's threads, and those of the threads
    that have a part in it.
    """
    end_ns = tick.eoi_ns or tick.inject_ns
    found: list[Record] = []
    timer = None
    for record in chain(first, *later):
        if timer is None:
            timer = record[3]
        if record[0] > end_ns if end_ns is not None else len(found) >= MOST_LINES // 4:
            break
        if record[1] in _TIMERS and record[3] != timer:
            continue
        found.append(record)
    return found


@dataclass(slots=True)
class Story:
    """A tick that may be one of the worst."""

    waited_ns: int
    tick: Tick
    records: list[Record]


class Watch:
    """Watches one source's ticks until they are over."""

    def __init__(self, source: Source, recent: RecentRecords, wanted: int) -> None:
        self._source = source
        self._recent = recent
        self._function = _PIT_FN if source.name == "pit" else _APIC_FN
        self._seen = 0
        self._open: deque[Tick] = deque()
        self._most = wanted * SPARE
        self._lost: Tick | None = None
        """The first tick of those that nothing has come for yet."""
        self._lost_ticks = 0
        self._lost_records: list[Record] | None = None
        self._best: tuple[int, Tick] | None = None
        """The worst of the present row, and how long it waited."""
        self._story: Story | None = None
        """The worst of the present row whose records were taken."""
        self._last_ns = 0
        self.stories: list[Story] = []
        """The worst first."""

    def look(self) -> None:
        """After a batch: which ticks are over now?"""
        source = self._source
        fresh = min(source.expired - self._seen, source.kept)
        self.see([source.life(source.kept - back) for back in range(fresh, 0, -1)])

    def see(self, lives: Iterable[Tick]) -> None:
        """The next lives; those that were seen before are left out."""
        seen = self._seen
        for tick in lives:
            if tick.index > seen:
                self._open.append(tick)
                self._seen = tick.index
        while self._open and self._is_over(self._open[0]):
            self._take(self._open.popleft())

    def tells(self, index: int) -> bool:
        """Whether a tick is one of the worst so far."""
        if self._best is not None and self._best[1].index == index:
            return True
        return any(story.tick.index == index for story in self.stories)

    def finish(self) -> None:
        """There is no more: what is open stays so."""
        while self._open:
            self._take(self._open.popleft())
        self._arrive(self._last_ns)
        self._end_row()

    def _is_over(self, tick: Tick) -> bool:
        if len(self._open) > MOST_OPEN or tick.eoi_ns is not None:
            return True
        if tick.inject_ns is not None:
            return tick.path is Path.NMI or len(self._open) > PATIENCE
        return tick.verdict not in (_OPEN, Verdict.REINJECTED)

    def _take(self, tick: Tick) -> None:
        self._last_ns = tick.expiry_ns
        is_delivered = tick.verdict is Verdict.DELIVERED
        if tick.inject_ns is None:
            self._lose(tick)
        else:
            if self._lost is not None:
                self._arrive(tick.inject_ns)
            if is_delivered and self._best is not None:
                self._end_row()
            waited_ns = tick.inject_ns - tick.expiry_ns
            if self._is_among_the_worst(waited_ns):
                self._candidate(waited_ns, tick, None)
        if is_delivered and self._best is not None:
            self._end_row()

    def _lose(self, tick: Tick) -> None:
        """Nothing has come for it; long rows of such have the story of the first kept at once."""
        if self._lost is None:
            self._lost, self._lost_ticks, self._lost_records = tick, 0, None
        self._lost_ticks += 1
        if self._lost_ticks == PATIENCE:
            self._lost_records = self._recent.of(self._lost, self._function)

    def _arrive(self, ts_ns: int) -> None:
        """Now an interrupt came, too late for the ticks that are lost."""
        lost, self._lost = self._lost, None
        if lost is not None and self._is_among_the_worst(ts_ns - lost.expiry_ns):
            self._candidate(ts_ns - lost.expiry_ns, lost, self._lost_records)

    def _candidate(self, waited_ns: int, tick: Tick, records: list[Record] | None) -> None:
        if self._best is not None and waited_ns <= self._best[0]:
            return
        self._best = (waited_ns, tick)
        story = self._story
        if story is None or waited_ns > story.waited_ns * WORSE:
            self._keep(waited_ns, tick, records)

    def _keep(self, waited_ns: int, tick: Tick, records: list[Record] | None) -> None:
        records = records or self._recent.of(tick, self._function)
        if records or self._story is None:
            self._story = Story(waited_ns, tick, records)

    def _is_among_the_worst(self, waited_ns: int) -> bool:
        return len(self.stories) < self._most or waited_ns > self.stories[-1].waited_ns

    def _end_row(self) -> None:
        if self._best is not None and self._story is not None:
            if self._best[1] is not self._story.tick:
                self._keep(*self._best, None)
            insort(self.stories, self._story, key=lambda s: -s.waited_ns)
            del self.stories[self._most :]
        self._best = self._story = None


def story_lines(records: list[Record], tasks: list[str]) -> list[StoryLine]:
    """The records in words; of very many the middle is left out."""
    half = MOST_LINES // 2
    left_out = len(records) - 2 * half
    if left_out <= 0:
        return [_line(record, tasks) for record in records]
    gap = StoryLine(records[half][0], "", "", "", f"... {left_out} events ...")
    first, last = records[:half], records[-half:]
    return [*(_line(r, tasks) for r in first), gap, *(_line(r, tasks) for r in last)]


def _line(record: Record, tasks: list[str]) -> StoryLine:
    return StoryLine(
        ts_ns=record[0],
        thread=tasks[record[2] & ~IRQ_CONTEXT],
        event=event_name(record),
        text=event_text(record, tasks),
        what=words_of(record)[0],
    )
