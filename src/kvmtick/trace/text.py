"""A reader of ftrace text: `cat trace`, `cat trace_pipe`, `trace-cmd report`, `perf script`, ours.

Which columns and wordings are read is told in `kvmtick.trace.text_lines` and `text_bodies`, what
becomes of another clock than the timers' in `text_clock`. Lines of events that are no tracepoint of
`kvmtick.trace.events` are passed over; what has not the shape of an event's line, or is worded
otherwise than known, is counted in `unknown`.

**Order.** Such texts are in order of time, but for what happened at nearly the same time on several
CPUs. Records are put in order among `REORDERED` neighbours; a file that goes further back is not in
order: `FormatError`.

**Interrupts.** The flags say what happened in one. Where a text has none (`trace-cmd report`,
`perf script`), hrtimer_expire_entry always is in one, and so is what the callback does in the same
task directly after: it queues work, wakes somebody, and has its own timer started anew, which is
the end; so is any other event of that task. A one-shot timer is not started there: its next start
follows other events of the task, as far as these were recorded.

**Threads.** A text names them; sched_waking and sched_switch know better than the line, as perf
names a kernel thread after the one it was made from. Where a text has the processes too
(record-tgid, perf's pid/tid), `vms` are those of which a thread did what only vCPUs do.

Not modelled: raw fields, times relative to the first; which vCPU a thread runs.
"""

import gc
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import Self

from kvmtick.trace.decoder import TaskNames
from kvmtick.trace.events import IRQ_CONTEXT, TRACEPOINTS, Event, Record
from kvmtick.trace.formats import FormatError
from kvmtick.trace.ftrace import SIMULATED
from kvmtick.trace.text_clock import ClockOffset, first_offset_ns
from kvmtick.trace.text_events import EventTexts, keep
from kvmtick.trace.text_file import TextFile
from kvmtick.trace.text_lines import (
    Line,
    is_remark,
    lost_events,
    overwritten_events,
    parse_line,
)
from kvmtick.trace.vms import VmInfo

__all__ = ["REORDERED", "TextReader", "is_text"]

REORDERED = 1000
"""So many neighbours are put in order."""

_BATCH = 8000

_START_LINES = 200
_SAMPLED = 30
_FEW = 10
_BY_TIME = itemgetter(0)
_UNNAMED = "<...>"
_WORKER = "kvm-pit/"

_START = int(Event.HRTIMER_START)
_EXPIRE = int(Event.HRTIMER_EXPIRE_ENTRY)
_WAS_ARMED = "was_armed=1"
_LOST = int(Event.LOST_EVENTS)
_IN_EXPIRY = frozenset({_EXPIRE, int(Event.WORK_QUEUE), int(Event.SCHED_WAKING)})
_OF_VCPUS = frozenset(
    int(event)
    for event, tracepoint in TRACEPOINTS.items()
    if tracepoint.name
    in (
        "kvm_entry",
        "kvm_exit",
        "kvm_pio",
        "kvm_mmio",
        "kvm_msr",
        "kvm_apic",
        "kvm_eoi",
        "kvm_inj_virq",
        "kvm_vcpu_wakeup",
    )
)


def is_text(start: bytes) -> bool:
    """Whether a file that starts so is ftrace text."""
    lines = start.decode(errors="replace").split("\n")[:_START_LINES]
    return any(line.startswith(("# tracer:", "cpus=")) or parse_line(line) for line in lines)


class TextReader:
    """Reads ftrace text: a `Trace` (see `kvmtick.trace.reading`)."""

    def __init__(self, path: Path) -> None:
        """Raises OSError."""
        self.lost = 0
        self._unknown_lines = 0
        self._tasks = TaskNames()
        self._texts = EventTexts(self._tasks)
        self._whos: dict[str, int] = {}
        self._expiring: dict[int, int] = {}
        """Timers whose callback runs, by task, where no flags say when it is over."""
        self._gaps: list[tuple[int, int]] = []
        self._columns: dict[str, tuple[int, int]] = {}
        """By what stands before the point of a time: the task, and the seconds in ns."""
        self._digits = 6
        """So many are behind the point of a time."""
        self._unit_ns = 1000
        """What the last of them stands for."""
        self._cut = itemgetter(slice(None), slice(0), slice(0), slice(0))
        """Of a line: itself, what stands before the point, the digits behind it, the event."""
        self._others = 1 << 30
        """Lines of the last block that were not cut there."""
        self._tgids: dict[int, int] = {}
        self._vcpu_tasks: set[int] = set()
        self._end_ns = 0
        self.is_complete, first_ns = _prepared(path)
        self._offset = ClockOffset(first_ns) if first_ns else None
        self._file = TextFile(path)
        self.size_bytes = self._file.size_bytes

    @property
    def tasks(self) -> list[str]:
        """Names of the records' tasks; may still grow."""
        return self._tasks.names

    @property
    def events(self) -> frozenset[Event]:
        """Classes of events seen so far."""
        return frozenset(self._texts.seen)

    @property
    def unknown(self) -> int:
        """Lines that were not understood."""
        return self._unknown_lines + self._texts.unknown

    @property
    def cut(self) -> str:
        """Why the end is missing; empty if it is not."""
        return self._file.cut

    @property
    def position_bytes(self) -> int:
        """How much of the file was read."""
        return self._file.position_bytes

    @property
    def vms(self) -> list[VmInfo]:
        """Processes with vCPUs; none where the text names no processes."""
        pids = {self._tasks.index(pid): pid for pid in self._tgids}
        processes = {self._tgids[pids[task]] for task in self._vcpu_tasks if task in pids}
        return [self._vm(process) for process in sorted(processes)]

    def _vm(self, process: int) -> VmInfo:
        comms = {pid: self._comm(pid) for pid in self._tgids}
        threads = {
            pid: comm
            for pid, comm in comms.items()
            if self._tgids[pid] == process or comm == f"{_WORKER}{process}"
        }
        name = comms.get(process) or threads[min(threads)]
        return VmInfo(process, name, threads)

    def _comm(self, pid: int) -> str:
        return self._tasks.names[self._tasks.index(pid)].rpartition("-")[0]

    def batches(self) -> Iterator[list[Record]]:
        """The records in order of time, in batches. Raises `FormatError` if they are in none."""
        held: list[Record] = []
        blocks = self._file.blocks()
        while self._fill(held, blocks):
            yield self._next(held[:-REORDERED])
            del held[:-REORDERED]
        yield self._next(held)

    def _fill(self, held: list[Record], blocks: Iterator[bytes]) -> bool:
        """Add a batch; False where the text ends. Records are tuples of numbers: the collector
        would look in vain for cycles in them, and take its time.
        """
        was_enabled = gc.isenabled()
        gc.disable()
        try:
            for block in blocks:
                records = self._records(block.decode(errors="replace").split("\n"))
                if self._tgids:
                    self._vcpu_tasks |= {r[2] & ~IRQ_CONTEXT for r in records if r[1] in _OF_VCPUS}
                held += self._moved(records)
                if len(held) > _BATCH + REORDERED:
                    return True
            return False
        finally:
            held.sort(key=_BY_TIME)
            if was_enabled:
                gc.enable()

    def _next(self, records: list[Record]) -> list[Record]:
        if records:
            if records[0][0] < self._end_ns:
                back_ns = self._end_ns - records[0][0]
                raise FormatError(
                    f"not in order of time: it goes back by {back_ns} ns; give a text of all CPUs,"
                    " as `cat trace`, `trace-cmd report` and `perf script` write it"
                )
            self._end_ns = records[-1][0]
        return records

    def _moved(self, records: list[Record]) -> list[Record]:
        """By the timers' clock."""
        if self._offset is None or not records:
            return records
        seen_ns = max((r[5] - r[0] for r in records if r[1] == _EXPIRE), default=None)
        offset_ns = self._offset.follow(records[-1][0], seen_ns)
        first_ns = self._end_ns
        return [(max(r[0] + offset_ns, first_ns), *r[1:]) for r in records]

    # Lines.

    def _records(self, lines: list[str]) -> list[Record]:
        """The records of these lines. Here is where the time goes: a line takes less than 1 us.

        Of the columns all but the fraction of a second is looked up, for it comes again; so is an
        event's text, where nothing is in it that is new each time.
        """
        columns, texts = self._columns, self._texts
        known, readers = texts.known, texts.readers
        timers, timer_bytes = texts.timers, texts.timer_bytes
        expiring = self._expiring
        if self._others * _FEW >= len(lines):
            self._set_cut(lines)
        self._others = 0
        unit_ns = self._unit_ns
        records: list[Record] = []
        append = records.append
        for line, column, fraction, text in map(self._cut, lines):
            try:
                task, second_ns = columns[column]
                ts_ns = second_ns + int(fraction) * unit_ns
            except (ValueError, KeyError):
                parsed = self._other_line(line)
                if parsed is None:
                    continue
                task, ts_ns, text = parsed
                records += [(ts_ns, _LOST, 0, cpu, count) for cpu, count in self._gaps]
                self._gaps.clear()
            found = known.get(text)
            if found is None:
                timer = timers.get(text[:timer_bytes])
                try:
                    if timer is not None and text.startswith(timer[0]) and text.endswith(timer[2]):
                        _, start, _, stop, event, fields = timer
                        if not fields:
                            continue
                        if event == _START:
                            expires = int(text[start : text.index(" ", start)])
                            fields += expires, +text.endswith(_WAS_ARMED)
                        else:
                            fields += (int(text[start:stop]),)
                    else:
                        title, _, body = text.partition(": ")
                        found = readers[title](body, text, line)
                        if found is None:
                            continue
                        event, fields = found
                except ValueError:
                    texts.unknown += 1
                    continue
                if event == _EXPIRE and not task & IRQ_CONTEXT:
                    expiring[task] = fields[0]
            else:
                event, fields = found
            if (
                expiring
                and task in expiring
                and (event in _IN_EXPIRY or (expiring.pop(task) == fields[0] and event == _START))
            ):
                task |= IRQ_CONTEXT
            append((ts_ns, event, task) + fields)  # noqa: RUF005 - twice as fast
        return records

    def _set_cut(self, lines: list[str]) -> None:
        """Where most lines have the point. The others are read in another way, not as fast."""
        events = [event for event in map(parse_line, lines[::_SAMPLED]) if event is not None]
        if events:
            self._digits = events[0].digits
            self._unit_ns = 10 ** (9 - self._digits)
            points = Counter(len(event.columns) for event in events)
            point = points.most_common(1)[0][0]
            end = point + 1 + self._digits
            self._cut = itemgetter(
                slice(None), slice(point), slice(point + 1, end), slice(end + 2, None)
            )

    def _other_line(self, line: str) -> tuple[int, int, str] | None:
        """Task, time and text of an event whose columns are new, at least in this second; None for
        a line of another kind.
        """
        self._others += 1
        head, _, text = line.partition(": ")
        found = self._columns.get(head[: -1 - self._digits])
        fraction = head[-self._digits :]
        if found is not None and fraction.isdecimal():
            return found[0], found[1] + int(fraction) * self._unit_ns, text
        parsed = parse_line(line)
        if parsed is not None:
            task = self._whos.get(parsed.who)
            if task is None:
                task = self._whos[parsed.who] = self._introduce(parsed)
            keep(self._columns, parsed.columns, (task, parsed.second_ns))
            return task, parsed.ts_ns, parsed.rest
        gap = lost_events(line)
        if gap is not None:
            self._gaps.append(gap)
            self._columns.clear()  # so that the next event is an other line, too
            self.lost += max(1, gap[1])
        elif is_remark(line):
            self.lost += overwritten_events(line)
        else:
            self._unknown_lines += 1
        return None

    def _introduce(self, line: Line) -> int:
        """A thread, or one on another CPU, or with other flags."""
        if line.tgid is not None:
            self._tgids[line.pid] = line.tgid
        if not line.pid:
            task = self._tasks.idle(line.cpu)
        elif line.pid in self._texts.named or line.comm == _UNNAMED:
            task = self._tasks.index(line.pid)
        else:
            task = self._tasks.name(line.pid, line.comm)
        return task | IRQ_CONTEXT if line.in_interrupt else task

    def close(self) -> None:
        """Close the file; harmless when repeated."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _prepared(path: Path) -> tuple[bool, int]:
    """Whether it is a simulated run, and the clock's first offset."""
    file = TextFile(path)
    try:
        blocks = file.blocks()
        first = next(blocks, b"")
        if SIMULATED.encode() in first:
            return True, 0
        return False, first_offset_ns(chain([first], blocks))
    finally:
        file.close()
