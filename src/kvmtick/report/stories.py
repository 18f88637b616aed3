"""The stories of the worst ticks, taken from the last records the moment a tick is over.

How bad a tick is: how long after its expiry an interrupt of the timer's came. Of ticks that were
disturbed in a row only the worst is told.
"""

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
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
SPARE = 2
"""Stories kept for each that is wanted: what is said of a tick may change until the end."""
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
                return [*armed, *_life(batch[at:], reversed(later), tick)]
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
        for records in (batch[:at], before):
            for record in reversed(records):
                if record[1] == _START and record[3] == timer:
                    return record if record[5] == tick.expiry_ns else None
        return None


def _life(first: list[Record], later: Iterable[list[Record]], tick: Tick) -> list[Record]:
    """From its expiry to its end: its timer's events, the host's threads, and those of the threads
    that have a part in it.
    """
    timer = first[0][3]
    end_ns = tick.eoi_ns or tick.inject_ns
    found: list[Record] = []
    for record in chain(first, *later):
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
    row: int
    """Ticks that were disturbed in a row have the same."""


class Watch:
    """Watches one source's ticks until they are over."""

    def __init__(self, source: Source, recent: RecentRecords, wanted: int) -> None:
        self._source = source
        self._recent = recent
        self._function = _PIT_FN if source.name == "pit" else _APIC_FN
        self._seen = 0
        self._open: deque[Tick] = deque()
        self._most = wanted * SPARE
        self._lost: Story | None = None
        """The first tick of those that nothing has come for yet."""
        self._row = 0
        self._last_ns = 0
        self.stories: list[Story] = []
        """The worst first."""

    def look(self) -> None:
        """After a batch: which ticks are over now?"""
        source = self._source
        fresh = min(source.expired - self._seen, source.kept)
        self._seen = source.expired
        for back in range(fresh, 0, -1):
            self._open.append(source.life(source.kept - back))
        while self._open and self._is_over(self._open[0]):
            self._take(self._open.popleft())

    def tells(self, index: int) -> bool:
        """Whether a tick is one of the worst so far."""
        return any(story.tick.index == index for story in self.stories)

    def finish(self) -> None:
        """There is no more: what is open stays so."""
        while self._open:
            self._take(self._open.popleft())
        self._give_lost(self._last_ns)

    def _is_over(self, tick: Tick) -> bool:
        if len(self._open) > MOST_OPEN or tick.eoi_ns is not None:
            return True
        if tick.inject_ns is not None:
            return tick.path is Path.NMI or len(self._open) > PATIENCE
        return tick.verdict not in (_OPEN, Verdict.REINJECTED)

    def _take(self, tick: Tick) -> None:
        self._last_ns = tick.expiry_ns
        if tick.verdict is Verdict.DELIVERED:
            self._row += 1
        if tick.inject_ns is None:
            if self._lost is None:
                self._lost = self._story(tick, 0)
            return
        self._give_lost(tick.inject_ns)
        waited_ns = tick.inject_ns - tick.expiry_ns
        if self._is_among_the_worst(waited_ns):
            self._give(self._story(tick, waited_ns))
        if tick.verdict is Verdict.DELIVERED:
            self._row += 1

    def _story(self, tick: Tick, waited_ns: int) -> Story:
        return Story(waited_ns, tick, self._recent.of(tick, self._function), self._row)

    def _give_lost(self, until_ns: int) -> None:
        lost, self._lost = self._lost, None
        if lost is not None:
            lost.waited_ns = until_ns - lost.tick.expiry_ns
            if self._is_among_the_worst(lost.waited_ns):
                self._give(lost)

    def _is_among_the_worst(self, waited_ns: int) -> bool:
        return len(self.stories) < self._most or waited_ns > self.stories[-1].waited_ns

    def _give(self, story: Story) -> None:
        for at, other in enumerate(self.stories):
            if other.row == story.row:
                if other.waited_ns >= story.waited_ns:
                    return
                del self.stories[at]
                break
        insort(self.stories, story, key=lambda s: -s.waited_ns)
        del self.stories[self._most :]


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
