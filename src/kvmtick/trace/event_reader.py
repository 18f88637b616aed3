"""One event of a page as a record: its fields, found by name, in the order of the tracepoint.

Where this module is compiled, fields are read one by one; `struct` reads them at once where it is
not, and where there is text among them. A field that older kernels lack and no verdict needs is 0.

Not modelled: fields of other sizes than 1, 2, 4 and 8 bytes, but for the names of threads.
"""

import struct
from collections.abc import Callable, Iterable, Mapping
from operator import itemgetter
from typing import Any, Final

from librt.strings import read_i16_le, read_i32_le, read_i64_le
from mypy_extensions import i64

from kvmtick.trace.events import HAS_FUNCTION, TRACEPOINTS, Event, Function, Record
from kvmtick.trace.formats import EventFormat, Field, FormatError

__all__ = ["SKIP", "EventLayout", "EventReader"]

_MAY_LACK: Final = frozenset({"was_armed", "intr_info", "info1", "inhibits"})
"""Fields that came with later kernels, and that nobody is judged by."""

_CPU: Final = "cpu"
"""Not in the record: the CPU whose buffer it was in."""

_COMMS: Final = {
    Event.SCHED_SWITCH: {"prev_comm": "prev_pid", "next_comm": "next_pid"},
    Event.SCHED_WAKING: {"comm": "pid"},
}
"""Names of threads in an event, and whose they are."""

_CODES: Final = {1: "B", 2: "H", 4: "I", 8: "Q"}
_LAST_BYTE: Final = 4096
"""No field of an event lies behind it."""
_MOST_FIELDS: Final = 6
_NO_FUNCTION: Final = -1

_Values = tuple[int, ...]


class EventReader:
    """Reads events of one class, of one task, from the buffer of one CPU."""

    __slots__ = ("size",)

    def __init__(self, size: int) -> None:
        self.size: i64 = size
        """No event is shorter."""

    def read(self, data: bytes, at: i64, ts_ns: int) -> Record | None:
        """The record of the event at `at`; None: nobody wants it."""
        return None


SKIP: Final = EventReader(0)
"""Nobody wants these events."""


class EventLayout:
    """How a kernel lays out one event."""

    def __init__(self, event: Event, format_: EventFormat) -> None:
        """Raises `FormatError` where a field that is needed is missing, or is no number."""
        self.event: Final = int(event)
        self.has_function: Final = event in HAS_FUNCTION
        fields, own = format_.fields, TRACEPOINTS[event].fields
        for name in own:
            if name not in fields and name not in _MAY_LACK and name != _CPU:
                raise FormatError(f"{format_.name} has no field {name} here: it cannot be read")
        comms = {comm: pid for comm, pid in _COMMS.get(event, {}).items() if comm in fields}
        wanted = [name for name in (*own, *comms) if name in fields]
        wanted.sort(key=lambda name: fields[name].offset)
        self.code: Final = _struct_code(fields, wanted, comms)
        self.own: Final = own
        self.fields: Final = fields
        places = {name: place for place, name in enumerate(wanted)}
        # Behind what was unpacked come a 0 and the CPU.
        places.setdefault(_CPU, len(wanted) + 1)
        order = [places.get(name, len(wanted)) for name in own]
        self.order: Final = [] if order == list(range(len(wanted))) else order
        """Where its fields are in what is unpacked; empty: they are what is unpacked."""
        self.comms: Final = [(places[pid], places[comm]) for comm, pid in comms.items()]

    def reader(
        self,
        task: int,
        cpu: int,
        functions: Mapping[int, Function],
        seen: Mapping[int, bytes],
        saw: Callable[[int, bytes], None],
    ) -> EventReader:
        """`functions`: by address; of others nobody wants events. `saw` is told whose name it is
        that an event has, when it is not the one in `seen`.
        """
        by_address = {at: int(function) for at, function in functions.items()}
        if _IS_COMPILED and not self.comms and len(self.own) <= _MOST_FIELDS:
            return _ByField(self, task, cpu, by_address)
        return _ByStruct(self, task, cpu, by_address, seen, saw)


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


# All fields at once.


class _ByStruct(EventReader):
    def __init__(
        self,
        layout: EventLayout,
        task: int,
        cpu: int,
        by_address: dict[int, int],
        seen: Mapping[int, bytes],
        saw: Callable[[int, bytes], None],
    ) -> None:
        super().__init__(layout.code.size)
        self._unpack: Callable[[bytes, int], tuple[Any, ...]] = layout.code.unpack_from
        self._event, self._task = layout.event, task
        self._by_address = by_address if layout.has_function else None
        self._pick: Callable[[_Values], _Values] | None = None
        if layout.order:
            self._pick = itemgetter(*layout.order)
        self._others = (0, cpu)
        self._comms, self._seen, self._saw = layout.comms, seen, saw

    def read(self, data: bytes, at: i64, ts_ns: int) -> Record | None:
        values = self._unpack(data, at)
        if self._comms:
            for pid, comm in self._comms:
                if self._seen.get(values[pid]) != values[comm]:
                    self._saw(values[pid], values[comm])
        if self._pick is not None:
            values = self._pick(values + self._others)
        if self._by_address is not None:
            function = self._by_address.get(values[1])
            if function is None:
                return None
            return (ts_ns, self._event, self._task, values[0], function) + values[2:]  # noqa: RUF005 - faster
        return (ts_ns, self._event, self._task) + values  # noqa: RUF005 - faster


# Field by field.


class _Number:
    """A field; as it is, one that this kernel lacks."""

    __slots__ = ("offset", "value")

    def __init__(self, offset: int, value: int) -> None:
        self.offset: i64 = offset
        self.value = value
        """What there is without reading it."""

    def read(self, data: bytes, at: i64) -> int:
        return self.value


class _U8(_Number):
    def read(self, data: bytes, at: i64) -> int:
        return data[at + self.offset]


class _S8(_Number):
    def read(self, data: bytes, at: i64) -> int:
        value = data[at + self.offset]
        return value - 0x100 if value & 0x80 else value


class _U16(_Number):
    def read(self, data: bytes, at: i64) -> int:
        return int(read_i16_le(data, at + self.offset)) & 0xFFFF


class _S16(_Number):
    def read(self, data: bytes, at: i64) -> int:
        return read_i16_le(data, at + self.offset)


class _U32(_Number):
    def read(self, data: bytes, at: i64) -> int:
        return int(read_i32_le(data, at + self.offset)) & 0xFFFF_FFFF


class _S32(_Number):
    def read(self, data: bytes, at: i64) -> int:
        return read_i32_le(data, at + self.offset)


class _S64(_Number):
    def read(self, data: bytes, at: i64) -> int:
        return read_i64_le(data, at + self.offset)


class _Known(_Number):
    """A number of which often the same comes again, so that it is made once."""

    __slots__ = ("signed",)

    def __init__(self, offset: int) -> None:
        self.signed: i64 = 0
        super().__init__(offset, self.made(0))

    def read(self, data: bytes, at: i64) -> int:
        signed = read_i64_le(data, at + self.offset)
        if signed != self.signed:
            self.signed, self.value = signed, self.made(signed)
        return self.value

    def made(self, signed: i64) -> int:
        raise NotImplementedError


class _U64(_Known):
    """Mostly addresses."""

    def made(self, signed: i64) -> int:
        return signed if signed >= 0 else int(signed) + (1 << 64)


class _FunctionAt(_U64):
    """The function at an address."""

    __slots__ = ("by_address",)

    def __init__(self, offset: int, by_address: dict[int, int]) -> None:
        self.by_address = by_address
        super().__init__(offset)

    def made(self, signed: i64) -> int:
        return self.by_address.get(super().made(signed), _NO_FUNCTION)


_SIGNED: Final = {1: _S8, 2: _S16, 4: _S32, 8: _S64}
_UNSIGNED: Final[dict[int, type[_Number]]] = {1: _U8, 2: _U16, 4: _U32}


def _number(field: Field) -> _Number:
    if field.signed:
        return _SIGNED[field.size](field.offset, 0)
    if field.size in _UNSIGNED:
        return _UNSIGNED[field.size](field.offset, 0)
    return _U64(field.offset)


class _ByField(EventReader):
    def __init__(
        self, layout: EventLayout, task: int, cpu: int, by_address: dict[int, int]
    ) -> None:
        super().__init__(layout.code.size)
        self._event, self._task = layout.event, task
        self._has_function = layout.has_function
        numbers = []
        for name in layout.own:
            field = layout.fields.get(name)
            if field is None:
                numbers.append(_Number(0, cpu if name == _CPU else 0))
            elif name == "function":
                numbers.append(_FunctionAt(field.offset, by_address))
            else:
                numbers.append(_number(field))
        self._count: i64 = len(numbers)
        unused = [_Number(0, 0)] * (_MOST_FIELDS - len(numbers))
        self._a, self._b, self._c, self._d, self._e, self._f = numbers + unused

    def read(self, data: bytes, at: i64, ts_ns: int) -> Record | None:
        event, task, count = self._event, self._task, self._count
        a = self._a.read(data, at)
        if count == 1:
            return ts_ns, event, task, a
        b = self._b.read(data, at)
        if self._has_function and b == _NO_FUNCTION:
            return None
        if count == 2:
            return ts_ns, event, task, a, b
        c = self._c.read(data, at)
        if count == 3:
            return ts_ns, event, task, a, b, c
        d = self._d.read(data, at)
        if count == 4:
            return ts_ns, event, task, a, b, c, d
        e = self._e.read(data, at)
        if count == 5:
            return ts_ns, event, task, a, b, c, d, e
        return ts_ns, event, task, a, b, c, d, e, self._f.read(data, at)


_IS_COMPILED: Final = type(_number).__name__ != "function"
