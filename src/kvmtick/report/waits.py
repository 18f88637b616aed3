"""When a VM's threads had no CPU, from sched_waking and sched_switch of the whole host.

Not modelled: who ran in between where several did; the one that ran last before the thread got its
CPU is named.
"""

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, field

from kvmtick.trace.events import Event, Record

__all__ = ["CpuWaits", "Wait"]

SHORTEST_NS = 20_000
"""Shorter waits are not kept: none of them makes a tick late."""
MOST_WAITS = 100_000
"""Of each thread the last so many waits are kept."""
_MOST_OF_A_SPAN = 1000
"""So many waits of a span are looked at: enough to see what they were."""

_LOST = int(Event.LOST_EVENTS)
_WAKING = int(Event.SCHED_WAKING)
_SWITCH = int(Event.SCHED_SWITCH)
_RUNNABLE = (0, 0x100)
"""`prev_state` of a thread that still wants to run; with 0x100 (R+) it was preempted."""


@dataclass(frozen=True, slots=True)
class Wait:
    """A thread was off its CPU."""

    start_ns: int
    end_ns: int
    asleep: bool
    """It slept, and nobody had woken it; else it wanted to run."""
    cpu: int
    """Where it ran afterwards (or, asleep, before)."""
    holder: int
    """pid of who ran there instead; 0: the CPU was idle."""

    @property
    def ns(self) -> int:
        """How long."""
        return self.end_ns - self.start_ns

    def within(self, start_ns: int, end_ns: int) -> int:
        """How long within a span, in ns."""
        return max(0, min(self.end_ns, end_ns) - max(self.start_ns, start_ns))


@dataclass(slots=True)
class _Thread:
    since_ns: int | None = None
    """When it was first seen; before that nothing is known of it."""
    off: Wait | None = None
    waits: list[Wait] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)

    def leave(self, ts_ns: int, asleep: bool, cpu: int, holder: int) -> None:
        """It left its CPU, or was woken."""
        self._see(ts_ns)
        self.off = Wait(ts_ns, ts_ns, asleep, cpu, holder)

    def over(self, ts_ns: int, cpu: int, holder: int) -> None:
        """What it waited for has come."""
        self._see(ts_ns)
        off, self.off = self.off, None
        if off is None or ts_ns - off.start_ns < SHORTEST_NS:
            return
        if len(self.waits) >= MOST_WAITS:
            half = MOST_WAITS // 2
            self.since_ns = self.ends[half - 1]
            del self.waits[:half], self.ends[:half]
        self.waits.append(Wait(off.start_ns, ts_ns, off.asleep, cpu, holder or off.holder))
        self.ends.append(ts_ns)

    def _see(self, ts_ns: int) -> None:
        if self.since_ns is None:
            self.since_ns = ts_ns


class CpuWaits:
    """Follows the threads that it was told of."""

    def __init__(self) -> None:
        self._threads: dict[int, _Thread] = {}

    def follow(self, pids: Iterable[int]) -> None:
        """Threads to follow from now on."""
        for pid in pids:
            if pid not in self._threads:
                self._threads[pid] = _Thread()

    def take(self, records: Iterable[Record]) -> None:
        """The next records of the whole host."""
        for record in records:
            event = record[1]
            if event == _SWITCH:
                self._switch(record)
            elif event == _WAKING:
                self._waking(record)
            elif event == _LOST:
                self._forget()

    def _switch(self, record: Record) -> None:
        ts_ns, _, _, before, state, after, cpu = record[:7]
        if before in self._threads:
            self._threads[before].leave(ts_ns, state not in _RUNNABLE, cpu, after)
        if after in self._threads:
            self._threads[after].over(ts_ns, cpu, before)

    def _waking(self, record: Record) -> None:
        ts_ns, _, _, pid, cpu = record[:5]
        if pid not in self._threads:
            return
        thread = self._threads[pid]
        if thread.off is not None and thread.off.asleep:
            thread.over(ts_ns, thread.off.cpu, 0)
            thread.leave(ts_ns, False, cpu, 0)

    def _forget(self) -> None:
        """Records are missing: who has a CPU is not known."""
        for thread in self._threads.values():
            thread.off = thread.since_ns = None

    def knows(self, pid: int, start_ns: int) -> bool:
        """Whether its waits are known from `start_ns` on."""
        thread = self._threads.get(pid)
        return thread is not None and thread.since_ns is not None and thread.since_ns <= start_ns

    def waits(self, pid: int, start_ns: int, end_ns: int) -> list[Wait]:
        """Its waits that overlap a span, in order; they may begin before it and end after it."""
        thread = self._threads.get(pid)
        if thread is None:
            return []
        first = bisect_right(thread.ends, start_ns)
        found = []
        for wait in thread.waits[first : first + _MOST_OF_A_SPAN]:
            if wait.start_ns >= end_ns:
                break
            found.append(wait)
        return found
