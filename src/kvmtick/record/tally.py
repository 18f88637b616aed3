"""The expiries of KVM's timers, counted in raw pages without decoding them.

A record of a timer or of a PIT's work has a kernel function's address, at a fixed distance from the
event's id: a regular expression over the page finds both. That takes some 10 us a page; decoding it
takes ten times as long and more.

A timer is its VM's who starts it from a thread of its own. A PIT that was started before the
recording goes on by itself: it is its VM's whose worker runs the work that its expiry queued.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from kvmtick.trace.formats import EventFormat, parse_format

__all__ = ["Tally", "Timer"]

_SOURCES: Final = {"pit_timer_fn": "pit", "apic_timer_fn": "lapic"}
_WORK_FUNCTION: Final = "pit_do_work"

_START = "hrtimer_start"
_EXPIRE = "hrtimer_expire_entry"
_QUEUE = "sched_kthread_work_queue_work"
_EXECUTE = "sched_kthread_work_execute_start"
_EVENTS = (_START, _EXPIRE, _QUEUE, _EXECUTE)
_HARDIRQ: Final = 0x08
"""In `common_flags`."""
_IN_HARDIRQ = re.escape(bytes(flags for flags in range(256) if flags & _HARDIRQ))
_IN_A_THREAD = re.escape(bytes(flags for flags in range(256) if not flags & _HARDIRQ))

_Match = tuple[bytes, bytes, bytes]
"""`common_pid`, the timer or work item, the function."""


@dataclass(slots=True)
class Timer:
    """One hrtimer of KVM."""

    source: str
    """`pit` or `lapic`."""
    tid: int = 0
    """A thread of its VM; 0: none is known."""
    ticks: dict[int, int] = field(default_factory=lambda: {0: 0})
    """How often it expired, by its `tid` of that time: addresses are used again."""

    def belongs_to(self, tid: int) -> None:
        """A thread of its VM is known now."""
        if tid != self.tid:
            self.tid = tid
            self.ticks[tid] = self.ticks.get(tid, 0) + self.ticks.pop(0, 0)


class Tally:
    """Counts expiries by timer."""

    def __init__(self, formats: Mapping[str, str], functions: Mapping[int, str]) -> None:
        """`formats`: texts of `format` files by the event's name; `functions`: by address."""
        self.timers: dict[int, Timer] = {}
        """By address."""
        self.interrupted: set[int] = set()
        """Threads in whose interrupts they expired."""
        by_name = {name: parse_format(formats[name]) for name in _EVENTS if name in formats}
        packed = {name: at.to_bytes(8, "little") for at, name in functions.items()}
        self._sources = {
            packed[name]: source for name, source in _SOURCES.items() if name in packed
        }
        pit = [at for at, source in self._sources.items() if source == "pit"]
        works = [packed[_WORK_FUNCTION]] if _WORK_FUNCTION in packed else []
        timers = list(self._sources)
        self._expiries = _pattern(by_name[_EXPIRE], "hrtimer", timers)
        self._starts = _pattern(by_name[_START], "hrtimer", timers, _IN_A_THREAD)
        self._pit_patterns = (
            (_EXPIRE, _pattern(by_name[_EXPIRE], "hrtimer", pit)),
            (_QUEUE, _pattern(by_name.get(_QUEUE), "work", works, _IN_HARDIRQ)),
            (_EXECUTE, _pattern(by_name.get(_EXECUTE), "work", works)),
        )
        self._works: dict[int, int] = {}
        """Work items of PITs that nobody is known to own: their timer."""

    @property
    def ticks(self) -> int:
        """All expiries."""
        return sum(sum(timer.ticks.values()) for timer in self.timers.values())

    def by_thread(self) -> dict[tuple[int, str], int]:
        """Expiries by a thread of the timer's VM (0: nobody knows) and source."""
        sums: Counter[tuple[int, str]] = Counter()
        for timer in self.timers.values():
            for tid, ticks in timer.ticks.items():
                sums[tid, timer.source] += ticks
        return sums

    def page(self, page: bytes) -> None:
        """Count the next page of a CPU."""
        starts = self._starts.findall(page)
        if starts:
            self._count_in_order(page)
        else:
            self._count(self._expiries.findall(page))
        if self._has_unowned_pit():
            self._learn_owners(page)

    def _count(self, expiries: Iterable[_Match]) -> None:
        for (pid, address, function), times in Counter(expiries).items():
            timer = self._timer(address, function)
            timer.ticks[timer.tid] += times
            self.interrupted.add(int.from_bytes(pid, "little"))

    def _count_in_order(self, page: bytes) -> None:
        """An expiry counts for the one who started the timer last before it."""
        found = [(match.start(), True, match) for match in self._starts.finditer(page)]
        found += [(match.start(), False, match) for match in self._expiries.finditer(page)]
        for _, is_start, match in sorted(found, key=lambda each: each[0]):
            pid, address, function = match.groups()
            if is_start:
                self._timer(address, function).belongs_to(int.from_bytes(pid, "little"))
            else:
                self._count([(pid, address, function)])

    def _timer(self, address: bytes, function: bytes) -> Timer:
        at = int.from_bytes(address, "little")
        timer = self.timers.get(at)
        if timer is None:
            timer = self.timers[at] = Timer(self._sources[function])
        return timer

    # Whose is a PIT that was running already?

    def _has_unowned_pit(self) -> bool:
        return any(not timer.tid and timer.source == "pit" for timer in self.timers.values())

    def _learn_owners(self, page: bytes) -> None:
        """An expiry queues its work in the same interrupt: it is the next record of its kind."""
        expired = None
        found = [
            (match.start(), name, match)
            for name, pattern in self._pit_patterns
            for match in pattern.finditer(page)
        ]
        for _, name, match in sorted(found, key=lambda each: each[0]):
            pid, address = (int.from_bytes(group, "little") for group in match.groups()[:2])
            if name == _EXPIRE:
                expired = address
            elif name == _EXECUTE:
                timer = self.timers.get(self._works.get(address, 0))
                if timer is not None and not timer.tid:
                    timer.belongs_to(pid)
            elif expired is not None:
                self._works[address] = expired
                expired = None


def _pattern(
    format_: EventFormat | None,
    object_: str,
    functions: Sequence[bytes],
    flags: bytes | None = None,
) -> re.Pattern[bytes]:
    """What finds an event's records of these functions; `flags`: what `common_flags` may be.
    Without the event or a function it finds nothing.
    """
    if format_ is None or not functions:
        return re.compile(rb"(?!)")
    fields = format_.fields
    parts = [
        (fields["common_type"], re.escape(format_.id.to_bytes(2, "little"))),
        (fields["common_flags"], b"[%s]" % flags if flags else b"."),
        (fields["common_pid"], b"(.{4})"),
        (fields[object_], b"(.{8})"),
        (fields["function"], b"(%s)" % b"|".join(map(re.escape, functions))),
    ]
    pattern, at = b"", 0
    for where, part in sorted(parts, key=lambda each: each[0].offset):
        pattern += b".{%d}%s" % (where.offset - at, part)
        at = where.offset + where.size
    return re.compile(pattern.replace(b".{0}", b""), re.DOTALL)
