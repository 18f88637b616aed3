"""Records as pages of a ring buffer, with formats of their own: a run stored as a recording.

    encoder = KtraceEncoder(file, recorder.tasks, VmInfo(1000, "a guest"))
    recorder.add_consumer(encoder)
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
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import BinaryIO, Final

from kvmtick.trace.decoder import pid_of
from kvmtick.trace.events import FUNCTION_AT, IRQ_CONTEXT, TRACEPOINTS, Event, Function, Record
from kvmtick.trace.ktrace import Header, KtraceWriter
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
_FIRST_FIELD, _FIELD_BYTES = 8, 8
_HARD_INTERRUPT: Final = 0x08
_DATA_BYTES: Final = 4080
_MOST_DELTA_NS: Final = (1 << 27) - 1
_WORD: Final = 4
_LENGTH_BITS: Final = 5
_PAGE_HEAD: Final = struct.Struct("<QQ")
_PAGES_A_MARK: Final = 32
_CPU: Final = 0
_FUNCTIONS: Final = {function: 1 + int(function) for function in Function}
"""Their addresses."""
_LOST_EVENTS: Final = int(Event.LOST_EVENTS)
_IDLE: Final = "<idle>-0"
_UNNAMED: Final = "<...>"


def _id(event: int) -> int:
    return 1 + event


def _format(event: Event) -> str:
    """The text of an event's `format` file."""
    lines = [f"name: {TRACEPOINTS[event].name}", f"ID: {_id(event)}", "format:", _COMMON]
    for place, name in enumerate(TRACEPOINTS[event].fields):
        offset = _FIRST_FIELD + place * _FIELD_BYTES
        kind, signed = ("u64", 0) if name in _UNSIGNED else ("s64", 1)
        lines.append(f"\tfield:{kind} {name};\toffset:{offset};\tsize:8;\tsigned:{signed};")
    return "\n".join(lines) + "\n"


def _packer(event: Event) -> tuple[int, int, bool, Callable[..., bytes]]:
    """Word without its time, id, whether it has a function, and what packs word and event."""
    names = TRACEPOINTS[event].fields
    code = struct.Struct("<IHBxi" + "".join("Q" if name in _UNSIGNED else "q" for name in names))
    return code.size // _WORD - 1, _id(event), "function" in names, code.pack


class KtraceEncoder:
    """A recorder's consumer that writes a recording. OSError where the file cannot be written."""

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
        self._packers = {int(event): _packer(event) for event in Event}
        self._data = bytearray()
        self._first_ns = 0
        self._last_ns = 0
        self._lost = 0
        formats = [_format(event) for event in sorted({*events, Event.LOST_EVENTS})]
        functions = {hex(at): function.name.lower() for function, at in _FUNCTIONS.items()}
        self._writer = KtraceWriter(
            file, Header(kind, _HEADER_PAGE, formats, functions, origin=origin)
        )

    def __call__(self, batch: list[Record]) -> None:
        """The next records, in order of time. struct.error: a field is too large."""
        if self._know_tasks():
            self._writer.update([self._vm])
        pids, packers, data = self._pids, self._packers, self._data
        for record in batch:
            ts_ns, event, task = record[:3]
            if event == _LOST_EVENTS:
                self._lost += max(1, record[4])
            length, number, has_function, pack = packers[event]
            delta_ns = ts_ns - self._last_ns
            full = len(data) + (length + 1) * _WORD > _DATA_BYTES
            if full or not 0 <= delta_ns <= _MOST_DELTA_NS or not data:
                self.flush()
                self._first_ns = ts_ns
                delta_ns = 0
            self._last_ns = ts_ns
            fields = record[3:]
            if has_function:
                fields = (record[3], _FUNCTIONS[Function(record[FUNCTION_AT])], *record[5:])
            flags = _HARD_INTERRUPT if task & IRQ_CONTEXT else 0
            word = length | delta_ns << _LENGTH_BITS
            data += pack(word, number, flags, pids[task & ~IRQ_CONTEXT], *fields)

    def flush(self) -> None:
        """Write what there is."""
        if self._data:
            head = _PAGE_HEAD.pack(self._first_ns, len(self._data))
            self._writer.page(_CPU, head + self._data)
            self._data.clear()
            if not self._writer.pages % _PAGES_A_MARK:
                self._writer.mark(self._last_ns)

    def end(self) -> None:
        """The run is over: the recording is whole."""
        self.flush()
        self._writer.end(self._last_ns, self._lost)

    def _know_tasks(self) -> bool:
        """Give new tasks their pids and names; whether there are any."""
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
        return self._vm != before
