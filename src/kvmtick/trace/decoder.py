"""Raw pages of the kernel's ring buffer as typed records (`kvmtick.trace.events`).

A `Decoder` knows the events of which it was given the `format` file; what else is in a page is
skipped. Fields are found by name, so a layout of another kernel is no matter; a field that older
kernels lack and no verdict needs is 0. `Merge` puts the pages of several CPUs in order of time.

Source: `events/header_event` of tracefs, which describes the word before each event.

Not modelled: events of which TRACEPOINTS has no entry.
"""

import struct
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from operator import itemgetter
from typing import Any, Final

from kvmtick.trace.events import (
    BY_NAME,
    HAS_FUNCTION,
    IRQ_CONTEXT,
    TRACEPOINTS,
    Event,
    Function,
    Record,
)
from kvmtick.trace.formats import EventFormat, Field, FormatError, parse_format
from kvmtick.trace.pages import UNKNOWN_COUNT, PageLayout

__all__ = ["Decoder", "Merge", "TaskNames", "pid_of"]

_MAY_LACK: Final = frozenset({"was_armed", "intr_info", "info1", "inhibits"})
"""Fields that came with later kernels, and that nobody is judged by."""

_CPU: Final = "cpu"
"""Not in the record: the CPU whose buffer it was in."""

_COMMS: Final = {
    Event.SCHED_SWITCH: {"prev_comm": "prev_pid", "next_comm": "next_pid"},
    Event.SCHED_WAKING: {"comm": "pid"},
}
"""Names of threads in an event, and whose they are."""

_IN_INTERRUPT: Final = 0x08 | 0x10 | 0x40
"""`common_flags`: in a hard interrupt, a soft one, an NMI (the h, s and z of ftrace text)."""

_CODES: Final = {1: "B", 2: "H", 4: "I", 8: "Q"}
_LAST_BYTE: Final = 4096
"""No field of an event lies behind it."""

_WORD_AND_COMMON: Final = struct.Struct("<IQ")
"""The word before an event, and what all events begin with."""
_COMMON_BYTES: Final = 8
_WORD: Final = 4
_U32: Final = struct.Struct("<I")
_LENGTH_BITS: Final = 5
_LENGTH_MASK: Final = (1 << _LENGTH_BITS) - 1
_PADDING, _TIME_EXTEND, _TIME_STAMP = 29, 30, 31
_DELTA_BITS: Final = 27
_STAMP_BITS: Final = 59
"""What a time stamp holds; the bits above are those of the time before it."""
_MOST_KNOWN: Final = 1 << 16

_LOST_EVENTS: Final = int(Event.LOST_EVENTS)
_BY_TIME: Final = itemgetter(0)

_Values = tuple[int, ...]
_Unpack = Callable[[bytes, int], _Values]
_Finish = Callable[[_Values], _Values | None]
"""Makes a record's fields of what was unpacked; None: nobody wants it."""
_Known = tuple[int, int, int, _Unpack, _Finish | None] | None
"""Event, task, least size, and how to read it; None: skip it."""


def pid_of(task_name: str) -> int:
    """The pid in `comm-pid`."""
    return int(task_name.rpartition("-")[2])


class TaskNames:
    """Threads as a recorder has them: `comm-pid` by index. Those not named are `<...>-pid`.

    Every CPU has an idle thread; all of them have pid 0. A name may change while a trace is read.
    """

    def __init__(self) -> None:
        self.names = ["<idle>-0"]
        self._index: dict[int, int] = {}
        self._idle = {0: 0}
        self._told: set[int] = set()
        self.seen: dict[int, bytes] = {}
        """By pid: the name that an event had last, as it stood there."""

    def index(self, pid: int) -> int:
        """A thread's index. A simulated run's idle thread of CPU n, n > 0, is -n."""
        if pid <= 0:
            return self.idle(-pid)
        index = self._index.get(pid)
        if index is None:
            index = self._index[pid] = len(self.names)
            self.names.append(f"<...>-{pid}")
        return index

    def idle(self, cpu: int) -> int:
        """The index of a CPU's idle thread."""
        index = self._idle.get(cpu)
        if index is None:
            index = self._idle[cpu] = len(self.names)
            self.names.append("<idle>-0")
        return index

    def name(self, pid: int, comm: str) -> int:
        """Give a thread its name; its index."""
        index = self.index(pid)
        self.names[index] = f"{comm}-{pid}"
        self._told.add(pid)
        return index

    def saw(self, pid: int, comm: bytes) -> None:
        """An event has a thread's name, padded with zeros: the thread is so called if nobody
        names it otherwise.
        """
        self.seen[pid] = comm
        if pid > 0 and pid not in self._told:
            text = comm.partition(b"\0")[0].decode(errors="replace")
            self.names[self.index(pid)] = f"{text}-{pid}"


class _EventReader:
    """Unpacks one event, and puts what it unpacked into the order of the tracepoint."""

    def __init__(self, event: Event, format_: EventFormat) -> None:
        self.event = int(event)
        self._has_function = event in HAS_FUNCTION
        fields, own = format_.fields, TRACEPOINTS[event].fields
        for name in own:
            if name not in fields and name not in _MAY_LACK and name != _CPU:
                raise FormatError(f"{format_.name} has no field {name} here: it cannot be read")
        comms = {comm: pid for comm, pid in _COMMS.get(event, {}).items() if comm in fields}
        wanted = [name for name in (*own, *comms) if name in fields]
        wanted.sort(key=lambda name: fields[name].offset)
        code = _struct_code(fields, wanted, comms)
        self.unpack: _Unpack = code.unpack_from
        self.size = code.size
        places = {name: place for place, name in enumerate(wanted)}
        # Behind what was unpacked come a 0 and the CPU.
        places.setdefault(_CPU, len(wanted) + 1)
        order = [places.get(name, len(wanted)) for name in own]
        self._order = None if order == list(range(len(wanted))) else order
        self._comms = [(places[pid], places[comm]) for comm, pid in comms.items()]

    def finish(
        self, cpu: int, functions: Mapping[int, Function], tasks: TaskNames
    ) -> _Finish | None:
        """What makes the fields; None: what is unpacked are the fields."""
        if self._has_function:
            return self._finish_function(cpu, functions)
        if self._comms:
            return self._finish_comms(cpu, tasks)
        return None if self._order is None else self._finish_order(cpu, self._order)

    @staticmethod
    def _finish_order(cpu: int, order: list[int]) -> Callable[[_Values], _Values]:
        pick: Callable[[_Values], _Values] = itemgetter(*order)
        return lambda values: pick((*values, 0, cpu))

    def _finish_function(self, cpu: int, functions: Mapping[int, Function]) -> _Finish:
        reorder = None if self._order is None else self._finish_order(cpu, self._order)
        by_address = {address: int(function) for address, function in functions.items()}

        def finish(values: _Values) -> _Values | None:
            if reorder is not None:
                values = reorder(values)
            function = by_address.get(values[1])
            return None if function is None else (values[0], function, *values[2:])

        return finish

    def _finish_comms(self, cpu: int, tasks: TaskNames) -> _Finish:
        reorder = self._finish_order(cpu, self._order or [])
        comms, seen, saw = self._comms, tasks.seen, tasks.saw

        def finish(values: tuple[Any, ...]) -> _Values:
            for pid, comm in comms:
                if seen.get(values[pid]) != values[comm]:
                    saw(values[pid], values[comm])
            return reorder(values)

        return finish


def _struct_code(
    fields: Mapping[str, Field], names: Iterable[str], texts: Iterable[str]
) -> struct.Struct:
    """Unpacks these fields, of which some are text."""
    code, at = "<", 0
    for name in names:
        field = fields[name]
        end = field.offset + field.size
        if field.offset < at or end > _LAST_BYTE:
            raise FormatError(f"field {name} cannot lie at {field.offset}")
        if name in texts:
            letter = f"{field.size}s"
        elif field.size in _CODES:
            letter = _CODES[field.size].lower() if field.signed else _CODES[field.size]
        else:
            raise FormatError(f"field {name} of {field.size} bytes at {field.offset} is no number")
        code += f"{field.offset - at}x{letter}"
        at = end
    return struct.Struct(code)


class Decoder:
    """Decodes pages of one kernel."""

    def __init__(
        self,
        header_page: str,
        formats: Iterable[str],
        functions: Mapping[int, Function],
        tasks: TaskNames | None = None,
    ) -> None:
        """`formats`: texts of `format` files; `functions`: by address. Raises `FormatError`."""
        self.layout = PageLayout(header_page)
        self.tasks = tasks or TaskNames()
        self._functions = dict(functions)
        self._readers: dict[int, _EventReader] = {}
        self._common: dict[str, Field] = {}
        for text in formats:
            format_ = parse_format(text)
            event = BY_NAME.get(format_.name)
            if event is None:
                continue
            self._readers[format_.id] = _EventReader(event, format_)
            self._common = _common_fields(format_)
        longest = max((reader.size for reader in self._readers.values()), default=0)
        self._beyond = bytes(_WORD_AND_COMMON.size + _WORD + longest)
        """Put behind a page so that unpacking its last event never fails."""
        self._known: dict[int, dict[int, _Known]] = {}
        """For each CPU by what an event begins with."""

    def decode(self, page: bytes, cpu: int = 0) -> list[Record]:
        """The records of a page; first LOST_EVENTS if some are missing before it.

        Raises `FormatError` where it is no page of that kernel.
        """
        head = self.layout.read(page)
        ts_ns, at, end = head.first_ns, head.start, head.end
        records: list[Record] = []
        if head.missed:
            records.append((ts_ns, _LOST_EVENTS, 0, cpu, head.missed))
        append, unpack_head = records.append, _WORD_AND_COMMON.unpack_from
        data = page[:end] + self._beyond
        known = self._known.setdefault(cpu, {})
        while at < end:
            word, common = unpack_head(data, at)
            length = word & _LENGTH_MASK
            at += _WORD
            if 0 < length < _PADDING:
                ts_ns += word >> _LENGTH_BITS
                next_at = at + length * _WORD
            elif length:
                ts_ns, at = _no_event(data, at, end, ts_ns, word)
                continue
            else:
                # The first word says how long both are.
                ts_ns += word >> _LENGTH_BITS
                next_at = at + _U32.unpack_from(data, at)[0]
                at += _WORD
                if not at < next_at <= end:
                    raise FormatError(f"an event passes the page's end {end} or has no length")
                common = unpack_head(data, at - _WORD)[1]
            try:
                entry = known[common]
            except KeyError:
                entry = self._learn(known, common, cpu)
            if entry is not None:
                event, task, size, unpack, finish = entry
                if next_at - at < size:
                    raise FormatError(f"an event of {next_at - at} bytes is too short for {size}")
                if finish is None:
                    append((ts_ns, event, task) + unpack(data, at))  # noqa: RUF005 - faster
                else:
                    fields = finish(unpack(data, at))
                    if fields is not None:
                        append((ts_ns, event, task) + fields)  # noqa: RUF005 - faster
            at = next_at
        if at > end:
            raise FormatError(f"what is at the end of a page passes the page's end {end}")
        return records

    def _learn(self, known: dict[int, _Known], common: int, cpu: int) -> _Known:
        """How to read events that begin so."""
        if len(known) >= _MOST_KNOWN:
            known.clear()
        known[common] = None
        if not self._readers:
            return None
        number, flags, pid = (_number(common, field) for field in self._common.values())
        reader = self._readers.get(number)
        if reader is not None:
            task = self.tasks.index(pid) if pid else self.tasks.idle(cpu)
            if flags & _IN_INTERRUPT:
                task |= IRQ_CONTEXT
            finish = reader.finish(cpu, self._functions, self.tasks)
            known[common] = (reader.event, task, reader.size, reader.unpack, finish)
        return known[common]


def _common_fields(format_: EventFormat) -> dict[str, Field]:
    common = {}
    for name in ("common_type", "common_flags", "common_pid"):
        field = format_.fields.get(name)
        if field is None or field.offset + field.size > _COMMON_BYTES:
            raise FormatError(f"{format_.name} has no {name} in its first bytes: it cannot be read")
        common[name] = field
    return common


def _number(common: int, field: Field) -> int:
    """A field of what all events begin with."""
    text = common.to_bytes(_COMMON_BYTES, "little")[field.offset : field.offset + field.size]
    return int.from_bytes(text, "little", signed=field.signed)


def _no_event(data: bytes, at: int, end: int, ts_ns: int, word: int) -> tuple[int, int]:
    """Padding, or the time: the time from here on, and where the next word is."""
    kind, delta_ns = word & _LENGTH_MASK, word >> _LENGTH_BITS
    value = _U32.unpack_from(data, at)[0]
    if kind == _PADDING:
        # Without a time it fills the page; else it is an event that was discarded.
        return ts_ns, at + value if delta_ns else end
    at += _WORD
    if kind == _TIME_EXTEND:
        return ts_ns + (value << _DELTA_BITS) + delta_ns, at
    stamp_ns = ts_ns >> _STAMP_BITS << _STAMP_BITS | (value << _DELTA_BITS) + delta_ns
    if stamp_ns < ts_ns:
        raise FormatError(f"a time stamp of {stamp_ns} ns comes after {ts_ns} ns")
    return stamp_ns, at


class Merge:
    """Puts the records of several CPUs in order: of equal times, the CPU first given is first.

    What comes too late, when later records were handed out already, is lost: a LOST_EVENTS record
    counts it.
    """

    def __init__(self) -> None:
        self._waiting: dict[int, list[Record]] = {}
        self._disordered: set[int] = set()
        self._handed_ns = 0
        self.waiting = 0
        """So many records wait."""

    def add(self, cpu: int, records: list[Record]) -> None:
        """The next records of a CPU, in order."""
        if not records:
            return
        waiting = self._waiting.setdefault(cpu, [])
        if records[0][0] < (waiting[-1][0] if waiting else self._handed_ns):
            self._disordered.add(cpu)
        waiting.extend(records)
        self.waiting += len(records)

    def lose(self, cpu: int) -> None:
        """A CPU's next records are lost, nobody knows how many."""
        last_ns = max((run[-1][0] for run in self._waiting.values() if run), default=0)
        ts_ns = max(last_ns, self._handed_ns)
        self.add(cpu, [(ts_ns, _LOST_EVENTS, 0, cpu, UNKNOWN_COUNT)])

    def until(self, end_ns: int | None) -> list[Record]:
        """All before `end_ns`, in order; the others wait. None: all."""
        for cpu in self._disordered:
            self._order(cpu, self._waiting[cpu])
        self._disordered.clear()
        ready: list[Record] = []
        for records in self._waiting.values():
            cut = len(records) if end_ns is None else bisect_left(records, end_ns, key=_BY_TIME)
            if cut:
                ready += records[:cut]
                del records[:cut]
        ready.sort(key=_BY_TIME)
        if ready:
            self._handed_ns = ready[-1][0]
            self.waiting = sum(map(len, self._waiting.values()))
        return ready

    def _order(self, cpu: int, records: list[Record]) -> None:
        """Only damage makes a CPU's pages come in another order than that of their time."""
        records.sort(key=_BY_TIME)
        late = bisect_left(records, self._handed_ns, key=_BY_TIME)
        if late:
            records[:late] = [(self._handed_ns, _LOST_EVENTS, 0, cpu, late)]

    def known_ns(self) -> int:
        """Up to here every CPU of which records wait has some; 0 if none wait."""
        return min((records[-1][0] for records in self._waiting.values() if records), default=0)
