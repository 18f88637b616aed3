"""The expiries of KVM's timers, counted in raw pages without decoding them.

A record that names a kernel function holds its address; where that stands, and the record's id
fits, is an expiry, a start or the work of a PIT. That takes some us a page, decoding it takes half
a millisecond.

A timer is its VM's who starts it from a thread of its own. A PIT that was started before the
recording goes on by itself: it is its VM's whose worker runs the work that its expiry queued.
"""

import struct
from collections.abc import Mapping
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
_HARDIRQ: Final = 0x08
"""In `common_flags`."""

_U16 = struct.Struct("<H")
_U64 = struct.Struct("<Q")
_PID = struct.Struct("<i")


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


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where things stand in an event's record, by the place of its function's address."""

    id: int
    to_start: int
    object: int
    pid: int
    flags: int

    @classmethod
    def of(cls, format_: EventFormat, object_: str) -> "_Layout":
        fields = format_.fields
        return cls(
            format_.id,
            fields["function"].offset,
            fields[object_].offset,
            fields["common_pid"].offset,
            fields["common_flags"].offset,
        )


class Tally:
    """Counts expiries by timer."""

    def __init__(self, formats: Mapping[str, str], functions: Mapping[int, str]) -> None:
        """`formats`: texts of `format` files by the event's name; `functions`: by address."""
        self.timers: dict[int, Timer] = {}
        """By address."""
        self.interrupted: set[int] = set()
        """Threads in whose interrupts they expired."""
        self._layouts = {
            name: _Layout.of(parse_format(formats[name]), object_)
            for name, object_ in (
                (_START, "hrtimer"),
                (_EXPIRE, "hrtimer"),
                (_QUEUE, "work"),
                (_EXECUTE, "work"),
            )
            if name in formats
        }
        self._timer_functions = [
            (_U64.pack(address), _SOURCES[name])
            for address, name in functions.items()
            if name in _SOURCES
        ]
        self._work_function = next(
            (_U64.pack(address) for address, name in functions.items() if name == _WORK_FUNCTION),
            b"",
        )
        self._works: dict[int, int] = {}
        """Work items of PITs that nobody is known to own: their timer."""

    @property
    def ticks(self) -> int:
        """All expiries."""
        return sum(sum(timer.ticks.values()) for timer in self.timers.values())

    def by_thread(self) -> dict[tuple[int, str], int]:
        """Expiries by a thread of the timer's VM (0: nobody knows) and source."""
        sums: dict[tuple[int, str], int] = {}
        for timer in self.timers.values():
            for tid, ticks in timer.ticks.items():
                key = tid, timer.source
                sums[key] = sums.get(key, 0) + ticks
        return sums

    def page(self, page: bytes) -> None:
        """Count the next page of a CPU."""
        for pattern, source in self._timer_functions:
            at = page.find(pattern)
            while at >= 0:
                self._timer_event(page, at, source)
                at = page.find(pattern, at + 8)
        if self._work_function and self._has_unowned_pit():
            self._learn_owners(page)

    def _timer_event(self, page: bytes, at: int, source: str) -> None:
        expire = self._layouts[_EXPIRE]
        record = at - expire.to_start
        if _has_id(page, record, expire.id):
            timer = self._timer(page, record + expire.object, source)
            timer.ticks[timer.tid] += 1
            self.interrupted.add(_PID.unpack_from(page, record + expire.pid)[0])
            return
        start = self._layouts[_START]
        record = at - start.to_start
        if _has_id(page, record, start.id) and not page[record + start.flags] & _HARDIRQ:
            timer = self._timer(page, record + start.object, source)
            timer.belongs_to(_PID.unpack_from(page, record + start.pid)[0])

    def _timer(self, page: bytes, at: int, source: str) -> Timer:
        address = _U64.unpack_from(page, at)[0]
        timer = self.timers.get(address)
        if timer is None:
            timer = self.timers[address] = Timer(source)
        return timer

    # Whose is a PIT that was running already?

    def _has_unowned_pit(self) -> bool:
        return any(not timer.tid and timer.source == "pit" for timer in self.timers.values())

    def _learn_owners(self, page: bytes) -> None:
        """An expiry queues its work in the same interrupt: it is the next record of its kind."""
        expired = None
        for _, name, address, flags, pid in self._pit_records(page):
            if name == _EXPIRE:
                expired = address
            elif name == _EXECUTE:
                timer = self.timers.get(self._works.get(address, 0))
                if timer is not None and not timer.tid:
                    timer.belongs_to(pid)
            elif expired is not None and flags & _HARDIRQ:
                self._works[address] = expired
                expired = None

    def _pit_records(self, page: bytes) -> list[tuple[int, str, int, int, int]]:
        """Expiries and works of PITs: where, which, whose, `common_flags`, `common_pid`."""
        found = []
        patterns = [(pattern, (_EXPIRE,)) for pattern, of in self._timer_functions if of == "pit"]
        for pattern, names in (*patterns, (self._work_function, (_QUEUE, _EXECUTE))):
            at = page.find(pattern)
            while at >= 0:
                for name in names:
                    layout = self._layouts[name]
                    record = at - layout.to_start
                    if _has_id(page, record, layout.id):
                        address = _U64.unpack_from(page, record + layout.object)[0]
                        pid = _PID.unpack_from(page, record + layout.pid)[0]
                        found.append((record, name, address, page[record + layout.flags], pid))
                at = page.find(pattern, at + 8)
        return sorted(found)


def _has_id(page: bytes, record: int, number: int) -> bool:
    return record >= 0 and bool(_U16.unpack_from(page, record)[0] == number)
