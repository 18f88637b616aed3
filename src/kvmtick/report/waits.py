"""When a VM's threads had no CPU, from sched_waking and sched_switch.

A recording may hold some of a thread's switches only, and kernels leave one out now and then. What
a missing one makes unsure is not told, and nothing at all of a thread if many are missing, or if
it was seen to switch with kvm-pit workers only: then those may be all that were followed.

Not modelled: who ran in between where several did; the one that ran last before the thread got its
CPU is named.
"""

from bisect import bisect_right
from collections import defaultdict
from dataclasses import dataclass, field

from kvmtick.trace.decoder import pid_of
from kvmtick.trace.events import IRQ_CONTEXT, Record

__all__ = ["CpuWaits", "Wait"]

SHORTEST_NS = 20_000
"""Shorter waits are not kept: none of them makes a tick late."""
MOST_WAITS = 100_000
"""Of each thread the last so many waits are kept."""
_MOST_OF_A_SPAN = 1000
"""So many waits of a span are looked at: enough to see what they were."""

_MANY = 20
"""One of so many switches is missing: not all are recorded."""

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
    """It has no CPU."""
    switches: int = 0
    missed: int = 0
    """It ran without having got a CPU, or got one that it had."""
    alone: bool = False
    """It is followed for itself, not as the one before or after a worker."""
    waits: list[Wait] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)

    def leave(self, ts_ns: int, asleep: bool, cpu: int, holder: int) -> None:
        """It left its CPU, or was woken."""
        if self.since_ns is None:
            self.since_ns = ts_ns
        self.off = Wait(ts_ns, ts_ns, asleep, cpu, holder)

    def over(self, ts_ns: int, cpu: int, holder: int) -> None:
        """What it waited for has come."""
        off, self.off = self.off, None
        self.switches += 1
        if off is None:
            self.missed += self.since_ns is not None
            return
        if ts_ns - off.start_ns < SHORTEST_NS:
            return
        if len(self.waits) >= MOST_WAITS:
            half = MOST_WAITS // 2
            self.since_ns = self.ends[half - 1]
            del self.waits[:half], self.ends[:half]
        self.waits.append(Wait(off.start_ns, ts_ns, off.asleep, cpu, holder or off.holder))
        self.ends.append(ts_ns)

    def runs(self) -> None:
        """It does something."""
        if self.off is not None:
            self.missed += 1
            self.off = None

    @property
    def is_known(self) -> bool:
        """Hardly any of its switches are missing."""
        return self.alone and self.missed * _MANY <= self.switches


class CpuWaits:
    """Follows a VM's threads, and what is seen of others."""

    def __init__(self, tasks: list[str]) -> None:
        """`tasks`: the trace's, which may still grow."""
        self._tasks = tasks
        self._threads: defaultdict[int, _Thread] = defaultdict(_Thread)
        self._by_task: dict[int, _Thread] = {}
        self._workers: list[int] = []
        """pids of kvm-pit workers among the tasks, by index; -1: it is none."""

    def runs(self, record: Record) -> None:
        """A thread did something."""
        task = record[2]
        if task & IRQ_CONTEXT:
            return
        thread = self._by_task.get(task)
        if thread is None:
            thread = self._by_task[task] = self._threads[pid_of(self._tasks[task])]
        if thread.off is not None:
            thread.runs()

    def switch(self, record: Record) -> None:
        """sched_switch of one of them."""
        ts_ns, _, _, before, state, after, cpu = record[:7]
        if before:
            thread = self._threads[before]
            thread.alone = thread.alone or self._is_alone(before, after)
            thread.leave(ts_ns, state not in _RUNNABLE, cpu, after)
        if after:
            thread = self._threads[after]
            thread.alone = thread.alone or self._is_alone(after, before)
            thread.over(ts_ns, cpu, before)

    def _is_alone(self, pid: int, other: int) -> bool:
        """Its switch with another thread was not recorded because of that."""
        if not other:
            return True
        if len(self._workers) != len(self._tasks):
            self._workers = [pid_of(t) if t.startswith("kvm-pit/") else -1 for t in self._tasks]
        return other not in self._workers or pid in self._workers

    def waking(self, record: Record) -> None:
        """sched_waking of one of them."""
        ts_ns, _, _, pid, cpu = record[:5]
        thread = self._threads[pid]
        if thread.off is not None and thread.off.asleep:
            thread.over(ts_ns, thread.off.cpu, 0)
            thread.leave(ts_ns, False, cpu, 0)

    def lost(self, record: Record) -> None:
        """Records are missing: who has a CPU is not known."""
        for thread in self._threads.values():
            thread.off = thread.since_ns = None

    def knows(self, pid: int, start_ns: int) -> bool:
        """Whether its waits are known from `start_ns` on."""
        thread = self._threads.get(pid)
        if thread is None or not thread.is_known or thread.since_ns is None:
            return False
        return thread.since_ns <= start_ns

    def waits(self, pid: int, start_ns: int, end_ns: int) -> list[Wait]:
        """Its waits that overlap a span, in order; they may begin before it and end after it."""
        thread = self._threads.get(pid)
        if thread is None or not thread.is_known:
            return []
        first = bisect_right(thread.ends, start_ns)
        found = []
        for wait in thread.waits[first : first + _MOST_OF_A_SPAN]:
            if wait.start_ns >= end_ns:
                break
            found.append(wait)
        return found
