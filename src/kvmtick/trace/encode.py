"""Records as pages of a ring buffer, with formats of their own: a run stored as a recording.

    encoder = KtraceEncoder(file, recorder.tasks, VmInfo(1000, "a guest"))
    recorder.add_entry_consumer(encoder)
    ...
    encoder.end()

The formats are made of TRACEPOINTS: every field has 8 bytes, unsigned where the kernel's is an
address, a register or an entry. What `kvmtick.trace.ktrace` reads from it are the same records in
the same order; tasks are the same threads, their indices may be others.

All records stand in the buffer of CPU 0, so that those of one time stay in order. Idle threads of
other CPUs have negative pids there (`TaskNames.index`).

Not modelled: the preempt count, and interrupts other than hard ones.
"""

import itertools
import struct
from collections.abc import Iterable
from dataclasses import replace
from typing import BinaryIO, Final

from librt.strings import BytesWriter, write_i32_le, write_i64_le
from mypy_extensions import i64

from kvmtick.trace.decoder import pid_of
from kvmtick.trace.events import HAS_FUNCTION, IRQ_CONTEXT, TRACEPOINTS, Event, Function, Record
from kvmtick.trace.ktrace import Header, KtraceWriter
from kvmtick.trace.recorder import Entry, EntryConsumer
from kvmtick.trace.vms import VmInfo, vcpu_of_name

__all__ = ["MODEL_EVENTS", "KtraceEncoder"]

MODEL_EVENTS: Final = frozenset(Event) - {
    Event.KVM_APICV_ACCEPT_IRQ,
    Event.SCHED_WAKING,
    Event.SCHED_SWITCH,
}
"""What a simulated run records."""

_HEADER_PAGE: Final = """\
	field: u64 timestamp;	offset:0;	size:8;	signed:0;
	field: local_t commit;	offset:8;	size:8;	signed:1;
	field: char data;	offset:16;	size:4080;	signed:0;
"""
_COMMON: Final = """\
	field:unsigned short common_type;	offset:0;	size:2;	signed:0;
	field:unsigned char common_flags;	offset:2;	size:1;	signed:0;
	field:unsigned char common_preempt_count;	offset:3;	size:1;	signed:0;
	field:int common_pid;	offset:4;	size:4;	signed:1;
"""
_UNSIGNED: Final = frozenset(
    ("hrtimer", "function", "work", "worker", "e", "rip", "guest_rip", "info1", "intr_info")
) | frozenset(("val", "gpa", "address", "data", "inhibits"))
_FIRST_FIELD: Final = 8
_FIELD_BYTES: Final = 8
_HARD_INTERRUPT: Final = 0x08
_DATA_BYTES: Final = 4080
_MOST_DELTA_NS: Final = (1 << 27) - 1
_WORD: Final = 4
_COMMON_WORDS: Final = 2
_FIELD_WORDS: Final = 2
_LENGTH_BITS: Final = 5
_ID_SHIFT: Final = 32
_FLAGS_SHIFT: Final = 48
"""Of the id and the flags, which come right behind the word before an event."""
_FEW: Final = 1 << 60
"""What is less is so as a signed number, too."""
_PAGE_HEAD: Final = struct.Struct("<QQ")
_PAGES_A_MARK: Final = 32
_CPU: Final = 0
_FIRST_FUNCTION: Final = 1
_FUNCTIONS: Final = {function: _FIRST_FUNCTION + int(function) for function in Function}
"""Their addresses."""
_LOST_EVENTS: Final = int(Event.LOST_EVENTS)
_FIELD_COUNTS: Final = [len(TRACEPOINTS[event].fields) for event in Event]
_SECOND: Final = [_FIRST_FUNCTION if event in HAS_FUNCTION else 0 for event in Event]
"""What is added to an event's second field: functions stand there by their addresses."""
_IDLE: Final = "<idle>-0"
_UNNAMED: Final = "<...>"


def _id(event: i64) -> i64:
    return 1 + event


def _format(event: Event) -> str:
    """The text of an event's `format` file."""
    lines = [f"name: {TRACEPOINTS[event].name}", f"ID: {_id(event)}", "format:", _COMMON]
    for place, name in enumerate(TRACEPOINTS[event].fields):
        offset = _FIRST_FIELD + place * _FIELD_BYTES
        kind, signed = ("u64", 0) if name in _UNSIGNED else ("s64", 1)
        lines.append(f"\tfield:{kind} {name};\toffset:{offset};\tsize:8;\tsigned:{signed};")
    return "\n".join(lines) + "\n"


def _write(data: BytesWriter, value: int) -> None:
    """A field, signed or not. ValueError: it is too large."""
    if value >= _FEW and value >> 63 == 1:
        value -= 1 << 64
    write_i64_le(data, value)


class KtraceEncoder(EntryConsumer):
    """A recorder's consumer that writes a recording. OSError where the file cannot be written,
    ValueError where a field has more than 64 bits.
    """

    def __init__(
        self,
        file: BinaryIO,
        tasks: list[str],
        vm: VmInfo,
        kind: str = "model",
        events: Iterable[Event] = MODEL_EVENTS,
        origin: str = "",
    ) -> None:
        """`tasks` is the recorder's, which may still grow: those with a name are threads of `vm`.

        `events`: classes that are recorded.
        """
        self._tasks = tasks
        self._vm = vm
        self._pids: list[int] = []
        self._data = BytesWriter()
        self._first_ns: i64 = 0
        self._last_ns: i64 = 0
        self._lost = 0
        formats = [_format(event) for event in sorted({*events, Event.LOST_EVENTS})]
        functions = {hex(at): function.name.lower() for function, at in _FUNCTIONS.items()}
        self._writer = KtraceWriter(
            file, Header(kind, _HEADER_PAGE, formats, functions, origin=origin)
        )

    def take(self, entries: list[Entry], begin: int, end: int) -> None:
        """The next records, in order of time."""
        if len(self._tasks) != len(self._pids):
            self._know_tasks()
        data = self._data
        at: i64
        for at in range(begin, end):
            entry = entries[at]
            event = entry.event
            count: i64 = _FIELD_COUNTS[event]
            self._head(entry.ts_ns, event, entry.task, count)
            _write(data, entry.a)
            if count > 1:
                _write(data, entry.b + _SECOND[event])
            if count > 2:
                _write(data, entry.c)
            if count > 3:
                _write(data, entry.d)
            if count > 4:
                _write(data, entry.e)

    def __call__(self, batch: list[Record]) -> None:
        """The next records as tuples, in order of time."""
        self._know_tasks()
        data = self._data
        for record in batch:
            ts_ns, event, task, first, *others = record
            if event == _LOST_EVENTS:
                self._lost += max(1, record[4])
            self._head(ts_ns, event, task, len(record) - 3)
            _write(data, first)
            add = _SECOND[event]
            for value in others:
                _write(data, value + add)
                add = 0

    def _head(self, ts_ns: i64, event: i64, task: i64, count: i64) -> None:
        """What comes before an event's `count` fields; a page that is full is written."""
        data = self._data
        length = _COMMON_WORDS + count * _FIELD_WORDS
        delta_ns = ts_ns - self._last_ns
        size: i64 = len(data)
        full = size + (length + 1) * _WORD > _DATA_BYTES
        if full or delta_ns < 0 or delta_ns > _MOST_DELTA_NS or not size:
            self.flush()
            self._first_ns = ts_ns
            delta_ns = 0
        self._last_ns = ts_ns
        head = length | delta_ns << _LENGTH_BITS | _id(event) << _ID_SHIFT
        if task & IRQ_CONTEXT:
            head |= _HARD_INTERRUPT << _FLAGS_SHIFT
        write_i64_le(data, head)
        write_i32_le(data, self._pids[task & ~IRQ_CONTEXT])

    def flush(self) -> None:
        """Write what there is."""
        if len(self._data):
            page = self._data.getvalue()
            self._data.truncate(0)
            self._writer.page(_CPU, _PAGE_HEAD.pack(self._first_ns, len(page)) + page)
            if not self._writer.pages % _PAGES_A_MARK:
                self._writer.mark(self._last_ns)

    def end(self) -> None:
        """The run is over: the recording is whole."""
        self.flush()
        self._writer.end(self._last_ns, self._lost)

    def _know_tasks(self) -> None:
        """Give new tasks their pids, and tell of their names."""
        idle = itertools.count(0, -1)
        self._pids = [next(idle) if task == _IDLE else pid_of(task) for task in self._tasks]
        before = self._vm
        threads, vcpus = dict(before.threads), dict(before.vcpus)
        for pid, task in zip(self._pids, self._tasks, strict=True):
            comm = task.rpartition("-")[0]
            if pid > 0 and comm != _UNNAMED:
                threads[pid] = comm
                vcpu = vcpu_of_name(comm)
                if vcpu is not None:
                    vcpus[pid] = vcpu
        self._vm = replace(before, threads=threads, vcpus=vcpus)
        if self._vm != before:
            self._writer.update([self._vm])
