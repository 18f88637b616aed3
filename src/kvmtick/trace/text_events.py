"""Events of ftrace text, by what stands behind the columns of a line; what comes again is kept."""

from collections.abc import Callable
from functools import partial
from typing import Final, NamedTuple, TypeVar

from kvmtick.trace.decoder import TaskNames
from kvmtick.trace.events import TRACEPOINTS, Event
from kvmtick.trace.text_bodies import EVENTS, OTHER_FUNCTION, Fields, parse_body, thread_names
from kvmtick.trace.text_lines import line_cpu

__all__ = ["EventText", "EventTexts", "KnownTimer", "Reader", "keep"]

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")

EventText = tuple[int, Fields]
"""An event and its fields."""

_TIMER, _POINTER_BYTES = "hrtimer=", len("0x0123456789abcdef")
_TIME_OF = {Event.HRTIMER_START: " expires=", Event.HRTIMER_EXPIRE_ENTRY: " now="}
_WAKEUP = int(Event.KVM_VCPU_WAKEUP)
_CPU = TRACEPOINTS[Event.SCHED_SWITCH].fields.index("cpu")
_MOST: Final = 1 << 16
"""So many texts are kept."""


Reader = Callable[[str, str, str], EventText | None]
"""Of what follows the name, of all from the name on, of the line; None: of no interest."""


class _Readers(dict[str, Reader]):
    """By name, with what perf puts before it."""

    def __init__(self, by_event: dict[Event, Reader]) -> None:
        super().__init__()
        self._by_event = by_event

    def __missing__(self, title: str) -> Reader:
        event = EVENTS.get(title.strip(": ").rpartition(":")[2])
        reader = _nothing if event is None else self._by_event[event]
        keep(self, title, reader)
        return reader


def _nothing(body: str, text: str, line: str) -> None:
    del body, text, line


class KnownTimer(NamedTuple):
    """What the text of a timer's event has but for its time."""

    before: str
    start: int
    """Where the time starts."""
    after: str
    """What follows the time of an expiry."""
    stop: int | None
    """Where that time stops, from the end."""
    event: int
    fields: Fields
    """Timer and function; nothing if it is no tick's."""


class EventTexts:
    """Reads them; names the threads that scheduler events name."""

    def __init__(self, tasks: TaskNames) -> None:
        self.known: dict[str, EventText] = {}
        """By text: look here first."""
        self.timers: dict[str, KnownTimer] = {}
        """By the first `timer_bytes` of a text: name and timer."""
        self.timer_bytes = 0
        self.seen: set[Event] = set()
        self.unknown = 0
        """So many were worded otherwise than known."""
        self.named: set[int] = set()
        """Threads that scheduler events named."""
        self._tasks = tasks
        self._wakeups: dict[tuple[str, str], Fields] = {}
        self._switches: dict[tuple[int, str], EventText] = {}
        special: dict[Event, Reader] = {
            Event.HRTIMER_START: partial(self._hrtimer, Event.HRTIMER_START),
            Event.HRTIMER_EXPIRE_ENTRY: partial(self._hrtimer, Event.HRTIMER_EXPIRE_ENTRY),
            Event.KVM_VCPU_WAKEUP: self._kvm_vcpu_wakeup,
            Event.SCHED_WAKING: self._sched_waking,
            Event.SCHED_SWITCH: self._sched_switch,
        }
        self.readers = _Readers(
            {event: special.get(event) or partial(self._any, event) for event in Event}
        )
        """What reads an event, by what stands before its `: `. They raise ValueError."""

    def _any(self, event: Event, body: str, text: str, line: str) -> EventText | None:
        del line
        fields = parse_body(event, body)
        if fields is OTHER_FUNCTION:
            return None
        self.seen.add(event)
        found = (int(event), fields)
        keep(self.known, text, found)
        return found

    # Every text of these is new, but not what stands around its time.

    def _hrtimer(self, event: Event, body: str, text: str, line: str) -> EventText | None:
        """One that is not known yet."""
        del line
        fields = parse_body(event, body)
        name = _TIME_OF[event]
        start = text.index(name) + len(name)
        after = "" if event is Event.HRTIMER_START else text[start:].lstrip("0123456789")
        self.timer_bytes = max(self.timer_bytes, text.index(_TIMER) + len(_TIMER) + _POINTER_BYTES)
        known = KnownTimer(text[:start], start, after, -len(after) or None, int(event), fields[:2])
        keep(self.timers, text[: self.timer_bytes], known)
        if not known.fields:
            return None
        self.seen.add(event)
        return int(event), fields

    def _kvm_vcpu_wakeup(self, body: str, text: str, line: str) -> EventText:
        what, _, rest = body.strip().partition(" time ")
        ns, _, polling = rest.partition(" ")
        try:
            known = self._wakeups[what, polling]
        except KeyError:
            known = parse_body(Event.KVM_VCPU_WAKEUP, body)[1:]
            keep(self._wakeups, (what, polling), known)
            self.seen.add(Event.KVM_VCPU_WAKEUP)
        return _WAKEUP, (int(ns), *known)

    # Scheduler events.

    def _sched_waking(self, body: str, text: str, line: str) -> EventText | None:
        found = self._any(Event.SCHED_WAKING, body, text, line)
        self._name_threads(Event.SCHED_WAKING, body)
        return found

    def _sched_switch(self, body: str, text: str, line: str) -> EventText:
        cpu = line_cpu(line)
        found = self._switches.get((cpu, body))
        if found is None:
            fields = parse_body(Event.SCHED_SWITCH, body)
            self._name_threads(Event.SCHED_SWITCH, body)
            self.seen.add(Event.SCHED_SWITCH)
            found = int(Event.SCHED_SWITCH), (*fields[:_CPU], cpu, *fields[_CPU + 1 :])
            keep(self._switches, (cpu, body), found)
        return found

    def _name_threads(self, event: Event, body: str) -> None:
        for pid, comm in thread_names(event, body):
            if pid:
                self.named.add(pid)
                self._tasks.name(pid, comm)


def keep(kept: dict[_Key, _Value], key: _Key, value: _Value) -> None:
    """Remember something, within bounds."""
    if len(kept) >= _MOST:
        kept.clear()
    kept[key] = value
