"""How fast ftrace text is read, beside `trace-cmd report`, which makes such text of a recording.

    PYTHONPATH=src python benchmarks/read_text.py

A million real events: those of tests/trace/recorded.json again and again, each time later, in a
trace.dat. `trace-cmd report` turns it into text, then that text is read. Both are taken in turns,
in processes of their own, pinned to one core; the best of each counts. It is CPU time, for a
machine is rarely alone. `--dat FILE` takes a trace.dat of yours instead. Needs trace-cmd.

Source: trace-cmd.dat.v6(5).
"""

import argparse
import json
import os
import resource
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvmtick.trace.events import TRACEPOINTS
from kvmtick.trace.formats import EventFormat, Field, parse_format
from kvmtick.trace.pages import PageLayout

RECORDED = Path(__file__).resolve().parents[1] / "tests" / "trace" / "recorded.json"
PAGE_BYTES = 4096
START_NS = 10_000_000_000_000
PAUSE_NS = 1_000_000
PADDING, TIME_EXTEND = 29, 30
MOVED = ("expires", "softexpires", "now")
"""Fields that are times."""
READ = """
import sys, time
from pathlib import Path
from kvmtick.trace.reading import open_trace
begin_s = time.process_time()
with open_trace(Path(sys.argv[1])) as trace:
    records = sum(map(len, trace.batches()))
    print(time.process_time() - begin_s, records, trace.unknown, trace.cut)
"""


class Pages:
    """The recorded pages, moved in time: one run directly after the other, again and again."""

    def __init__(self, recorded: dict[str, Any]) -> None:
        self.formats = [parse_format(text) for text in recorded["formats"]]
        self._by_id = {format_.id: format_ for format_ in self.formats}
        self._layout = PageLayout(recorded["header_page"])
        self._runs: list[tuple[int, list[tuple[int, bytes]]]] = []
        """When each began, and its pages by CPU."""
        self._lengths_ns: list[int] = []
        self.events = 0
        for run in recorded["runs"].values():
            pages = [(cpu, bytes.fromhex(page)) for cpu, page in run["pages"]]
            times_ns = [event[0] for _, page in pages for event in self._events(page)]
            self._runs.append((min(times_ns), pages))
            self._lengths_ns.append(max(times_ns) - min(times_ns) + PAUSE_NS)
            self.events += len(times_ns)

    def moved(self, turn: int) -> Iterator[tuple[int, bytes]]:
        """All pages of one turn with their CPUs; no wake-up lasts as long as another."""
        at_ns = START_NS + turn * sum(self._lengths_ns)
        for (start_ns, pages), length_ns in zip(self._runs, self._lengths_ns, strict=True):
            for cpu, page in pages:
                data = bytearray(page)
                _add(data, 0, Field(0, 8, signed=False), at_ns - start_ns)
                for _, at in self._events(page):
                    format_ = self._by_id[int.from_bytes(page[at : at + 2], "little")]
                    self._move(data, at, format_, at_ns - start_ns, turn)
                yield cpu, bytes(data.ljust(PAGE_BYTES, b"\0"))
            at_ns += length_ns

    def _events(self, page: bytes) -> Iterator[tuple[int, int]]:
        """When each event was, and where it is (events/header_event of tracefs)."""
        head = self._layout.read(page)
        now_ns, at = head.first_ns, head.start
        while at < head.end:
            word, more = struct.unpack_from("<II", page, at)
            kind, delta_ns = word & 31, word >> 5
            now_ns += delta_ns
            at += 4
            if kind == TIME_EXTEND:
                now_ns += more << 27
                at += 4
            elif 0 < kind < PADDING:
                yield now_ns, at
                at += 4 * kind
            else:
                raise SystemExit(f"read_text: {RECORDED.name} has an event of type {kind}")

    @staticmethod
    def _move(data: bytearray, at: int, format_: EventFormat, by_ns: int, turn: int) -> None:
        for name in MOVED:
            if name in format_.fields:
                _add(data, at, format_.fields[name], by_ns)
        if format_.name == "kvm_vcpu_wakeup":
            _add(data, at, format_.fields["ns"], turn)


def _add(data: bytearray, at: int, field: Field, value: int) -> None:
    place = slice(at + field.offset, at + field.offset + field.size)
    moved = int.from_bytes(data[place], "little") + value
    data[place] = moved.to_bytes(field.size, "little")


def write_dat(path: Path, events: int) -> int:
    """A trace.dat of version 6 with at least so many events; how many it has."""
    recorded = json.loads(RECORDED.read_text())
    pages = Pages(recorded)
    turns = -(-events // pages.events)
    data: dict[int, list[bytes]] = {}
    for turn in range(turns):
        for cpu, page in pages.moved(turn):
            data.setdefault(cpu, []).append(page)
    head = _head(recorded, pages.formats) + struct.pack("<I", len(data))
    head += b"options  \0" + struct.pack("<H", 0) + b"flyrecord\0"
    at = -(-(len(head) + 16 * len(data)) // PAGE_BYTES) * PAGE_BYTES
    with path.open("wb") as file:
        start = at
        for cpu in sorted(data):
            size = len(data[cpu]) * PAGE_BYTES
            head += struct.pack("<QQ", start, size)
            start += size
        file.write(head.ljust(at, b"\0"))
        for cpu in sorted(data):
            file.writelines(data[cpu])
    return turns * pages.events


def _head(recorded: dict[str, Any], formats: list[EventFormat]) -> bytes:
    head = b"\x17\x08\x44tracing6\0\0\x08" + struct.pack("<I", PAGE_BYTES)
    head += b"header_page\0" + _sized(recorded["header_page"])
    head += b"header_event\0" + _sized("# compressed entry header\n") + struct.pack("<I", 0)
    systems = {tracepoint.name: tracepoint.system for tracepoint in TRACEPOINTS.values()}
    counts = Counter(systems[format_.name] for format_ in formats)
    head += struct.pack("<I", len(counts))
    for system, count in counts.items():
        head += system.encode() + b"\0" + struct.pack("<I", count)
        for format_, text in zip(formats, recorded["formats"], strict=True):
            if systems[format_.name] == system:
                head += _sized(text)
    symbols = "".join(f"{int(at, 16):x} t {name}\n" for at, name in recorded["functions"].items())
    head += struct.pack("<I", len(symbols)) + symbols.encode() + struct.pack("<I", 0)
    return head + _sized("".join(f"{pid} {comm}\n" for pid, comm in _comms(recorded).items()))


def _sized(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def _comms(recorded: dict[str, Any]) -> dict[int, str]:
    names: dict[int, str] = {}
    for run in recorded["runs"].values():
        for line in run["text"]:
            comm, _, pid = line.partition("[")[0].rstrip().rpartition("-")
            names[int(pid)] = comm.strip()
    return names


def report_s(dat: Path, text: Path) -> float:
    """How long `trace-cmd report` takes to write its text to a file."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with text.open("wb") as file:
        command = ("trace-cmd", "report", "-i", str(dat))
        subprocess.run(command, stdout=file, stderr=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def read_s(text: Path) -> tuple[float, int]:
    """How long it takes to read that text, and how many records it has."""
    command = (sys.executable, "-c", READ, str(text))
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    if told[2:] != ["0"]:
        raise SystemExit(f"read_text: {told[2]} lines were not understood, cut: {told[3:]}")
    return float(told[0]), int(told[1])


def main() -> None:
    """Compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--events", type=int, default=1_000_000)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--dat", type=Path)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory() as place:
        dat, text = options.dat or Path(place, "trace.dat"), Path(place, "trace.txt")
        if options.dat is None:
            write_dat(dat, options.events)
        taken = [(report_s(dat, text), *read_s(text)) for _ in range(options.runs)]
    report, read = (min(run[column] for run in taken) for column in (0, 1))
    events = taken[0][2]
    found = {"events": events, "report_s": report, "read_s": read, "ratio": report / read}
    if options.json:
        print(json.dumps(found))
        return
    print(f"{events} events, best of {options.runs} runs")
    print(f"trace-cmd report  {report:6.2f} s  {events / report / 1e6:5.2f} million events/s")
    print(f"kvmtick           {read:6.2f} s  {events / read / 1e6:5.2f} million events/s")
    print(f"ratio {report / read:.2f}")


if __name__ == "__main__":
    main()
