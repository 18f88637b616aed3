"""A million real events: the pages of `recorded.json`, a real kernel's, again and again, later and
later; as a recording of ours, and as a trace.dat of trace-cmd.

Source: trace-cmd.dat.v6(5).
"""

import json
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from kvmtick.trace.events import TRACEPOINTS
from kvmtick.trace.formats import EventFormat, Field, parse_format
from kvmtick.trace.ktrace import Header, KtraceWriter
from kvmtick.trace.pages import PageLayout

__all__ = ["Pages", "write_dat", "write_ktrace"]

RECORDED: Final = Path(__file__).with_name("recorded.json")
PAGE_BYTES: Final = 4096
START_NS: Final = 10_000_000_000_000
PAUSE_NS: Final = 1_000_000
PADDING, TIME_EXTEND = 29, 30
MOVED: Final = ("expires", "softexpires", "now")
"""Fields that are times."""


class Pages:
    """The recorded pages, moved in time: one run directly after the other, again and again."""

    def __init__(self) -> None:
        self.recorded: dict[str, Any] = json.loads(RECORDED.read_text())
        self.formats = [parse_format(text) for text in self.recorded["formats"]]
        self._by_id = {format_.id: format_ for format_ in self.formats}
        self._layout = PageLayout(self.recorded["header_page"])
        self._runs: list[tuple[int, list[tuple[int, bytes]]]] = []
        """When each began, and its pages by CPU."""
        self._lengths_ns: list[int] = []
        self.events = 0
        for run in self.recorded["runs"].values():
            pages = [(cpu, bytes.fromhex(page)) for cpu, page in run["pages"]]
            times_ns = [event[0] for _, page in pages for event in self._events(page)]
            self._runs.append((min(times_ns), pages))
            self._lengths_ns.append(max(times_ns) - min(times_ns) + PAUSE_NS)
            self.events += len(times_ns)

    def turns(self, events: int) -> int:
        """How often all pages have to come for at least so many events."""
        return -(-events // self.events)

    def moved(self, turn: int) -> Iterator[list[tuple[int, bytes]]]:
        """Run by run the pages of a turn, with their CPUs; no wake-up lasts as long as another."""
        at_ns = START_NS + turn * sum(self._lengths_ns)
        for (start_ns, pages), length_ns in zip(self._runs, self._lengths_ns, strict=True):
            yield [(cpu, self._moved(page, at_ns - start_ns, turn)) for cpu, page in pages]
            at_ns += length_ns

    def first_ns(self, page: bytes) -> int:
        """The time a page begins with."""
        return self._layout.read(page).first_ns

    def _moved(self, page: bytes, by_ns: int, turn: int) -> bytes:
        data = bytearray(page)
        _add(data, 0, Field(0, 8, signed=False), by_ns)
        for _, at in self._events(page):
            format_ = self._by_id[int.from_bytes(page[at : at + 2], "little")]
            for name in MOVED:
                if name in format_.fields:
                    _add(data, at, format_.fields[name], by_ns)
            if format_.name == "kvm_vcpu_wakeup":
                _add(data, at, format_.fields["ns"], turn)
        return bytes(data.ljust(PAGE_BYTES, b"\0"))

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
                raise ValueError(f"{RECORDED.name} has an event of type {kind}")


def _add(data: bytearray, at: int, field: Field, value: int) -> None:
    place = slice(at + field.offset, at + field.offset + field.size)
    moved = int.from_bytes(data[place], "little") + value
    data[place] = moved.to_bytes(field.size, "little")


def write_ktrace(path: Path, events: int) -> int:
    """A recording of at least so many events, marked run by run; how many it has."""
    pages = Pages()
    told = pages.recorded
    header = Header("host", told["header_page"], told["formats"], told["functions"])
    with path.open("wb") as file:
        writer = KtraceWriter(file, header)
        for turn in range(pages.turns(events)):
            for run in pages.moved(turn):
                writer.mark(min(pages.first_ns(page) for _, page in run))
                for cpu, page in run:
                    writer.page(cpu, page)
        writer.end(0, 0)
    return pages.turns(events) * pages.events


def write_dat(path: Path, events: int) -> int:
    """A trace.dat of version 6 with at least so many events; how many it has."""
    pages = Pages()
    data: dict[int, list[bytes]] = {}
    for turn in range(pages.turns(events)):
        for run in pages.moved(turn):
            for cpu, page in run:
                data.setdefault(cpu, []).append(page)
    head = _head(pages.recorded, pages.formats) + struct.pack("<I", len(data))
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
    return pages.turns(events) * pages.events


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
