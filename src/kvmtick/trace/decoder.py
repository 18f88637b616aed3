"""Raw pages of the kernel's ring buffer as typed records (`kvmtick.trace.events`).

A `Decoder` knows the events of which it was given the `format` file; what else is in a page is
skipped. Fields are found by name, so a layout of another kernel is no matter; a field that older
kernels lack and no verdict needs is 0. `Merge` puts the pages of several CPUs in order of time.

Source: `events/header_event` of tracefs, which describes the word before each event.

Not modelled: events of which TRACEPOINTS has no entry.
"""

from bisect import bisect_left
from collections.abc import Iterable, Mapping
from operator import itemgetter
from typing import Final

from librt.strings import read_i64_le
from mypy_extensions import i64

from kvmtick.trace.event_reader import SKIP, EventLayout, EventReader
from kvmtick.trace.events import BY_NAME, IRQ_CONTEXT, Event, Function, Record
from kvmtick.trace.formats import EventFormat, Field, FormatError, parse_format
from kvmtick.trace.pages import UNKNOWN_COUNT, PageLayout

__all__ = ["Decoder", "Merge", "TaskNames", "pid_of"]

_IN_INTERRUPT: Final = 0x08 | 0x10 | 0x40
"""`common_flags`: in a hard interrupt, a soft one, an NMI (the h, s and z of ftrace text)."""

_COMMON_BYTES: Final = 8
_WORD: Final = 4
_U32_MASK: Final = 0xFFFF_FFFF
_LENGTH_BITS: Final = 5
_LENGTH_MASK: Final = (1 << _LENGTH_BITS) - 1
_PADDING, _TIME_EXTEND, _TIME_STAMP = 29, 30, 31
_DELTA_BITS: Final = 27
_STAMP_BITS: Final = 59
"""What a time stamp holds; the bits above are those of the time before it."""
_MOST_KNOWN: Final = 1 << 16

_LOST_EVENTS: Final = int(Event.LOST_EVENTS)
_BY_TIME: Final = itemgetter(0)


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
        self._layouts: dict[int, EventLayout] = {}
        self._common: dict[str, Field] = {}
        for text in formats:
            format_ = parse_format(text)
            event = BY_NAME.get(format_.name)
            if event is None:
                continue
            self._layouts[format_.id] = EventLayout(event, format_)
            self._common = _common_fields(format_)
        longest = max((layout.code.size for layout in self._layouts.values()), default=0)
        self._beyond = bytes(2 * _WORD + _COMMON_BYTES + longest)
        """Put behind a page so that reading its last event never fails."""
        self._known: dict[int, dict[int, EventReader]] = {}
        """For each CPU by what an event begins with."""

    def decode(self, page: bytes, cpu: int = 0) -> list[Record]:
        """The records of a page; first LOST_EVENTS if some are missing before it.

        Raises `FormatError` where it is no page of that kernel.
        """
        head = self.layout.read(page)
        ts_ns = head.first_ns
        at: i64 = head.start
        end: i64 = head.end
        records: list[Record] = []
        if head.missed:
            records.append((ts_ns, _LOST_EVENTS, 0, cpu, head.missed))
        data = page[:end] + self._beyond
        known = self._known.setdefault(cpu, {})
        while at < end:
            word = read_i64_le(data, at) & _U32_MASK
            length = word & _LENGTH_MASK
            at += _WORD
            if 0 < length < _PADDING:
                next_at = at + length * _WORD
            elif length:
                ts_ns, at = _no_event(data, at, end, ts_ns, word)
                continue
            else:
                # The first word says how long both are.
                next_at = at + (read_i64_le(data, at) & _U32_MASK)
                at += _WORD
                if not at < next_at <= end:
                    raise FormatError(f"an event passes the page's end {end} or has no length")
            delta_ns: int = word >> _LENGTH_BITS
            ts_ns += delta_ns
            common = read_i64_le(data, at)
            try:
                reader = known[common]
            except KeyError:
                reader = self._learn(known, common, cpu)
            if next_at - at < reader.size:
                raise FormatError(
                    f"an event of {next_at - at} bytes is too short for {reader.size}"
                )
            record = reader.read(data, at, ts_ns)
            if record is not None:
                records.append(record)
            at = next_at
        if at > end:
            raise FormatError(f"what is at the end of a page passes the page's end {end}")
        return records

    def _learn(self, known: dict[int, EventReader], common: int, cpu: int) -> EventReader:
        """How to read events that begin so."""
        if len(known) >= _MOST_KNOWN:
            known.clear()
        known[common] = SKIP
        if not self._layouts:
            return SKIP
        number, flags, pid = (_number(common, field) for field in self._common.values())
        layout = self._layouts.get(number)
        if layout is not None:
            tasks = self.tasks
            task = tasks.index(pid) if pid else tasks.idle(cpu)
            if flags & _IN_INTERRUPT:
                task |= IRQ_CONTEXT
            known[common] = layout.reader(task, cpu, self._functions, tasks.seen, tasks.saw)
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
    text = common.to_bytes(_COMMON_BYTES, "little", signed=True)
    text = text[field.offset : field.offset + field.size]
    return int.from_bytes(text, "little", signed=field.signed)


def _no_event(data: bytes, at: i64, end: i64, ts_ns: int, word: i64) -> tuple[int, i64]:
    """Padding, or the time: the time from here on, and where the next word is."""
    kind = word & _LENGTH_MASK
    # A damaged page may have any time, so sums of it are no native integers.
    delta_ns: int = word >> _LENGTH_BITS
    value: int = read_i64_le(data, at) & _U32_MASK
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
