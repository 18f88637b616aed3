"""Events of ftrace text, by what stands behind the columns of a line; what comes again is kept."""

from collections.abc import Callable
from functools import partial
from typing import Final, TypeVar

from kvmtick.trace.decoder import TaskNames
from kvmtick.trace.events import Event
from kvmtick.trace.text_bodies import EVENTS, OTHER_FUNCTION, Fields, parse_body, thread_names
from kvmtick.trace.text_lines import line_cpu

__all__ = ["EventText", "EventTexts", "keep"]

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")

EventText = tuple[int, Fields]
"""An event and its fields."""

_START, _EXPIRE = int(Event.HRTIMER_START), int(Event.HRTIMER_EXPIRE_ENTRY)
_MOST: Final = 1 << 16
"""So many texts are kept."""
_HARDLY_AGAIN = frozenset({Event.KVM_VCPU_WAKEUP})
"""Their text has a time."""
_WAS_ARMED = "was_armed=1"


class EventTexts:
    """Reads them; names the threads that scheduler events name."""

    def __init__(self, tasks: TaskNames) -> None:
        self.known: dict[str, EventText] = {}
        """By text: look here first."""
        self.seen: set[Event] = set()
        self.unknown = 0
        """So many were worded otherwise than known."""
        self.named: set[int] = set()
        """Threads that scheduler events named."""
        self._tasks = tasks
        self._readers: dict[str, _Reader] = {}
        self._timers: dict[str, Fields] = {}
        self._switches: dict[tuple[int, str], EventText] = {}
        self._special = {
            Event.HRTIMER_START: self._hrtimer_start,
            Event.HRTIMER_EXPIRE_ENTRY: self._hrtimer_expire_entry,
            Event.SCHED_WAKING: self._sched_waking,
            Event.SCHED_SWITCH: self._sched_switch,
        }

    def read(self, text: str, line: str) -> EventText | None:
        """The event `NAME: ...` of a line; None for one of no interest, or not understood."""
        title, _, body = text.partition(": ")
        try:
            return self._readers[title](body, text, line)
        except KeyError:
            self._readers[title] = self._reader(title)
            return self.read(text, line)
        except ValueError:
            self.unknown += 1
            return None

    def _reader(self, title: str) -> "_Reader":
        event = EVENTS.get(title.strip(": ").rpartition(":")[2])
        if event is None:
            return _nothing
        return self._special.get(event) or partial(self._any, event)

    def _any(self, event: Event, body: str, text: str, line: str) -> EventText | None:
        del line
        fields = parse_body(event, body)
        if fields is OTHER_FUNCTION:
            return None
        self.seen.add(event)
        found = (int(event), fields)
        if event not in _HARDLY_AGAIN:
            keep(self.known, text, found)
        return found

    # Timers: every text is new, but not what stands before its time.

    def _hrtimer_start(self, body: str, text: str, line: str) -> EventText | None:
        timer, _, times = body.partition(" expires=")
        try:
            known = self._timers[timer]
        except KeyError:
            known = self._timer(Event.HRTIMER_START, timer, body)
        if not known:
            return None
        expires, _, more = times.partition(" ")
        return _START, (*known, int(expires), int(more[-11:] == _WAS_ARMED))

    def _hrtimer_expire_entry(self, body: str, text: str, line: str) -> EventText | None:
        timer, _, tail = body.partition(" now=")
        now, _, function = tail.partition(" ")
        if function:
            timer += function
        try:
            known = self._timers[timer]
        except KeyError:
            known = self._timer(Event.HRTIMER_EXPIRE_ENTRY, timer, body)
        return (_EXPIRE, (*known, int(now))) if known else None

    def _timer(self, event: Event, timer: str, body: str) -> Fields:
        known = parse_body(event, body)[:2]
        if known:
            self.seen.add(event)
        keep(self._timers, timer, known)
        return known

    # Scheduler events.

    def _sched_waking(self, body: str, text: str, line: str) -> EventText | None:
        self._name_threads(Event.SCHED_WAKING, body)
        return self._any(Event.SCHED_WAKING, body, text, line)

    def _sched_switch(self, body: str, text: str, line: str) -> EventText:
        cpu = line_cpu(line)
        found = self._switches.get((cpu, body))
        if found is None:
            self._name_threads(Event.SCHED_SWITCH, body)
            self.seen.add(Event.SCHED_SWITCH)
            found = int(Event.SCHED_SWITCH), (*parse_body(Event.SCHED_SWITCH, body), cpu)
            keep(self._switches, (cpu, body), found)
        return found

    def _name_threads(self, event: Event, body: str) -> None:
        for pid, comm in thread_names(event, body):
            if pid:
                self.named.add(pid)
                self._tasks.name(pid, comm)


_Reader = Callable[[str, str, str], EventText | None]
"""Of what follows the name, of all from the name on, of the line."""


def _nothing(body: str, text: str, line: str) -> None:
    del body, text, line


def keep(kept: dict[_Key, _Value], key: _Key, value: _Value) -> None:
    """Remember something, within bounds."""
    if len(kept) >= _MOST:
        kept.clear()
    kept[key] = value
