"""Raw pages of the kernel's ring buffer as typed records (`kvmtick.trace.events`).

A `Decoder` knows the events of which it was given the `format` file; what else is in a page is
skipped. Fields are found by name, so a layout of another kernel is no matter; a field that older
kernels lack and no verdict needs is 0. `Merge` puts the pages of several CPUs in order of time.

Not modelled: events of which TRACEPOINTS has no entry.
"""

import heapq
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import itemgetter

from kvmtick.trace.events import IRQ_CONTEXT, TRACEPOINTS, Event, Function, Record
from kvmtick.trace.formats import EventFormat, Field, FormatError, parse_format
from kvmtick.trace.pages import PageLayout

__all__ = ["Decoder", "Merge", "TaskNames"]

_BY_NAME = {tracepoint.name: event for event, tracepoint in TRACEPOINTS.items()}

_MAY_LACK = frozenset({"was_armed", "intr_info", "info1", "inhibits"})
"""Fields that came with later kernels, and that nobody is judged by."""

_CPU = "cpu"
"""Not in the record: the CPU whose buffer it was in."""

_COMMON = ("common_type", "common_flags", "common_pid")
_IN_INTERRUPT = 0x08 | 0x10 | 0x40
"""`common_flags`: in a hard interrupt, a soft one, an NMI (the h, s and z of ftrace text)."""

_CODES = {1: "B", 2: "H", 4: "I", 8: "Q"}
_FUNCTION_FIELD = 4
"""Where records of timers and work items have their function."""
_FUNCTION_EVENTS = frozenset(
    event for event, tracepoint in TRACEPOINTS.items() if "function" in tracepoint.fields
)
_BY_TIME = itemgetter(0)


class TaskNames:
    """Threads as a recorder has them: `comm-pid` by index. Those not named are `<...>-pid`.

    Every CPU has an idle thread; all of them have pid 0.
    """

    def __init__(self) -> None:
        self.names = ["<idle>-0"]
        self._index: dict[int, int] = {}
        self._idle = {0: 0}

    def index(self, pid: int) -> int:
        """A thread's index."""
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
        return index


class _EventReader:
    """Reads the fields of one event, in the order of its tracepoint."""

    def __init__(self, event: Event, format_: EventFormat) -> None:
        self.event = int(event)
        self.has_function = event in _FUNCTION_EVENTS
        fields, own = format_.fields, TRACEPOINTS[event].fields
        self.wants_cpu = own[-1] == _CPU and _CPU not in fields
        own = own[:-1] if self.wants_cpu else own
        for name in own:
            if name not in fields and name not in _MAY_LACK:
                raise FormatError(f"{format_.name} has no field {name} here: it cannot be read")
        wanted = (*_COMMON[1:], *own)
        self.read, self.size = _reader(fields, wanted)


def _reader(
    fields: Mapping[str, Field], names: Sequence[str]
) -> tuple[Callable[[bytes, int], tuple[int, ...]], int]:
    """What unpacks these fields of `(bytes, offset)`, in this order, and how far it looks."""
    present = sorted({name for name in names if name in fields}, key=lambda n: fields[n].offset)
    code, at = "<", 0
    for name in present:
        field = fields[name]
        if field.size not in _CODES or field.offset < at:
            raise FormatError(f"field {name} of {field.size} bytes at {field.offset} is no number")
        letter = _CODES[field.size]
        code += f"{field.offset - at}x{letter.lower() if field.signed else letter}"
        at = field.offset + field.size
    unpack = struct.Struct(code).unpack_from
    order = [present.index(name) if name in fields else -1 for name in names]
    if order == list(range(len(present))):
        return unpack, at
    return (lambda data, at: _reorder(unpack(data, at), order)), at


def _reorder(values: tuple[int, ...], order: Sequence[int]) -> tuple[int, ...]:
    return tuple(values[at] if at >= 0 else 0 for at in order)


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
        self._id = Field(0, 2, signed=False)
        for text in formats:
            format_ = parse_format(text)
            event = _BY_NAME.get(format_.name)
            if event is None:
                continue
            self._readers[format_.id] = _EventReader(event, format_)
            self._id = format_.fields[_COMMON[0]]

    def decode(self, page: bytes, cpu: int = 0) -> list[Record]:
        """The records of a page; first LOST_EVENTS if some are missing before it.

        Raises `FormatError` where it is no page of that kernel.
        """
        taken = self.layout.read(page)
        data, tasks, functions = taken.data, self.tasks, self._functions
        id_at, id_end = self._id.offset, self._id.offset + self._id.size
        records: list[Record] = []
        if taken.missed:
            records.append((taken.first_ns, int(Event.LOST_EVENTS), 0, cpu, taken.missed))
        for ts_ns, at, size in taken.events:
            number = int.from_bytes(data[at + id_at : at + id_end], "little")
            reader = self._readers.get(number)
            if reader is None:
                continue
            if size < reader.size:
                raise FormatError(f"an event of {size} bytes is too short for {reader.size}")
            flags, pid, *values = reader.read(data, at)
            if reader.has_function:
                function = functions.get(values[1])
                if function is None:
                    continue
                values[1] = function
            if reader.wants_cpu:
                values.append(cpu)
            task = tasks.index(pid) if pid else tasks.idle(cpu)
            if flags & _IN_INTERRUPT:
                task |= IRQ_CONTEXT
            records.append((ts_ns, reader.event, task, *values))
        return records


class Merge:
    """Puts the records of several CPUs in order: of equal times, the CPU first given is first."""

    def __init__(self) -> None:
        self._waiting: dict[int, list[Record]] = {}

    def add(self, cpu: int, records: Iterable[Record]) -> None:
        """The next records of a CPU, in order."""
        self._waiting.setdefault(cpu, []).extend(records)

    def until(self, end_ns: int | None) -> list[Record]:
        """All before `end_ns`, in order; the others wait. None: all."""
        ready = []
        for cpu, records in self._waiting.items():
            cut = len(records)
            while end_ns is not None and cut and records[cut - 1][0] >= end_ns:
                cut -= 1
            ready.append(records[:cut])
            self._waiting[cpu] = records[cut:]
        return list(heapq.merge(*ready, key=_BY_TIME))
