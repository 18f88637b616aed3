"""The recording format `.ktrace`: pages of a kernel's ring buffer, and all that reading them takes.

A file is MAGIC, then chunks: 8 bytes (kind, CPU, length of the payload; little-endian), then the
payload. The first chunk is the header, a JSON object; `Header` names its keys. Pages stand as
`trace_pipe_raw` hands them out, cut behind their last event. A MARK says that every event before
its time is in the file by then: readers hand out in order of time up to there. UPDATE brings what
was learnt of VMs and threads since the header, END says that the recording is whole and what was
lost. A file may be compressed with gzip.

A simulated run is stored the same way (`kvmtick.trace.encode`), with formats of its own.

A file that was cut short gives what it has: `KtraceReader.cut` says so. A damaged page is left
out: a LOST_EVENTS record stands where its CPU's next page begins, and `KtraceReader.unknown` counts
it. Where a recorder died, the last MARK is old: what comes after it is put in order at the end of
the file. At most 500,000 records wait for a MARK; then those of a time that all waiting CPUs have
passed are handed out, and what comes for them later is lost.
"""

import gzip
import io
import json
import os
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from kvmtick.abi.closing import Closing
from kvmtick.trace.decoder import Decoder, Merge, TaskNames
from kvmtick.trace.events import BY_NAME, FUNCTIONS, Event, Record
from kvmtick.trace.formats import FormatError, parse_format
from kvmtick.trace.pages import UNKNOWN_COUNT
from kvmtick.trace.vms import VmInfo

__all__ = ["MAGIC", "SUFFIX", "Header", "KtraceReader", "KtraceWriter"]

MAGIC = b"ktrace1\n"
SUFFIX = ".ktrace"
"""Of the names of recordings."""
_GZIP = b"\x1f\x8b"
_CHUNK = struct.Struct("<BxHI")
_U64 = struct.Struct("<Q")
_HEADER, _PAGE, _MARK, _UPDATE, _END = range(1, 6)
_MOST_BYTES = {_HEADER: 1 << 24, _PAGE: 1 << 20, _MARK: 8, _UPDATE: 1 << 24, _END: 1 << 16}
"""Kinds of chunks; one that is longer is damage."""
_MOST_WAITING = 500_000
_KINDS = ("host", "model")
_VERSION = 1

_UNREADABLE = (EOFError, OSError, zlib.error)
"""What reading a damaged file raises."""
_NOT_MEANT = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError)
"""What JSON raises that has another shape."""


@dataclass(slots=True)
class Header:
    """What is known when a recording begins."""

    kind: str
    """`host`: a real kernel's; `model`: a simulated run."""
    header_page: str
    """The text of `events/header_page`."""
    formats: list[str]
    """The texts of the events' `format` files: these events were recorded."""
    functions: dict[str, str]
    """Kernel functions by address (hexadecimal)."""
    start_ns: int = 0
    """When it began, by the records' clock."""
    origin: str = ""
    """The kernel and the machine, for people."""
    missing: list[str] = field(default_factory=list)
    """Events that were asked for and that this kernel does not have."""
    vms: list[VmInfo] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "version": _VERSION,
            "kind": self.kind,
            "origin": self.origin,
            "start_ns": self.start_ns,
            "header_page": self.header_page,
            "formats": self.formats,
            "functions": self.functions,
            "missing": self.missing,
            "vms": [vm.as_dict() for vm in self.vms],
        }

    @classmethod
    def from_dict(cls, told: dict[str, Any]) -> "Header":
        """From JSON; what else is there is no matter. Raises `FormatError` if it is no header."""
        try:
            version, kind = int(told["version"]), str(told["kind"])
            if version > _VERSION:
                raise FormatError(f"version {version}, this kvmtick reads {_VERSION}: update it")
            if kind not in _KINDS:
                raise FormatError(f"kind {kind[:20]!r} is none of {', '.join(_KINDS)}")
            return cls(
                kind=kind,
                header_page=str(told["header_page"]),
                formats=[str(text) for text in told["formats"]],
                functions={str(at): str(name) for at, name in told["functions"].items()},
                start_ns=int(told.get("start_ns", 0)),
                origin=str(told.get("origin", "")),
                missing=[str(name) for name in told.get("missing", [])],
                vms=[VmInfo.from_dict(vm) for vm in told.get("vms", [])],
            )
        except FormatError:
            raise
        except _NOT_MEANT as error:
            raise FormatError(_what(error)) from None


def _what(error: BaseException) -> str:
    """One short line."""
    name = type(error).__name__
    return " ".join(f"{name}: {error}".split())[:80] if str(error) else name


class KtraceWriter:
    """Writes a recording to a binary file. OSError where the file cannot be written."""

    def __init__(self, file: BinaryIO, header: Header) -> None:
        self._file = file
        self.pages = 0
        """So many pages were written."""
        file.write(MAGIC)
        self._json(_HEADER, header.as_dict())

    def page(self, cpu: int, page: bytes) -> None:
        """The next page of a CPU's buffer."""
        self.pages += 1
        self._file.write(_CHUNK.pack(_PAGE, cpu, len(page)) + page)

    def mark(self, ts_ns: int) -> None:
        """All events before `ts_ns` are in the file."""
        self._file.write(_CHUNK.pack(_MARK, 0, _U64.size) + _U64.pack(ts_ns))

    def update(self, vms: list[VmInfo], tasks: Mapping[int, str] | None = None) -> None:
        """What is known of the VMs now, and of other threads: tid to name."""
        told = {str(tid): comm for tid, comm in (tasks or {}).items()}
        self._json(_UPDATE, {"vms": [vm.as_dict() for vm in vms], "tasks": told})

    def end(self, end_ns: int, lost: int) -> None:
        """The recording is whole; `lost`: events that the kernel could not store."""
        self._json(_END, {"end_ns": end_ns, "lost": lost})

    def _json(self, kind: int, value: dict[str, Any]) -> None:
        payload = json.dumps(value).encode()
        self._file.write(_CHUNK.pack(kind, 0, len(payload)) + payload)


class KtraceReader(Closing):
    """Reads a recording: a `Trace` (see `kvmtick.trace.reading`)."""

    def __init__(self, path: Path) -> None:
        """Raises OSError, and `FormatError` where the file is no recording."""
        self.unknown = 0
        self.lost = 0
        self.cut = ""
        self._raw = path.open("rb")
        try:
            self.size_bytes = os.fstat(self._raw.fileno()).st_size
            file = io.BufferedReader(self._raw)
            self._file: BinaryIO = file
            if file.peek(2)[:2] == _GZIP:
                self._file = gzip.GzipFile(fileobj=file)  # type: ignore[assignment]
            self._start(path)
        except BaseException:
            self._raw.close()
            raise

    def _start(self, path: Path) -> None:
        if self._read(len(MAGIC)) != MAGIC:
            raise FormatError(f"{path}: no recording of kvmtick: give a .ktrace file")
        chunk = self._chunk()
        if chunk is None or chunk[0] != _HEADER:
            raise FormatError(f"{path}: the recording ends before its header: record it anew")
        try:
            header = self.header = Header.from_dict(json.loads(chunk[2]))
            self._vms = {vm.pid: vm for vm in header.vms}
            self._tasks = TaskNames()
            self._name_tasks()
            functions = {
                int(at, 16): FUNCTIONS[name]
                for at, name in header.functions.items()
                if name in FUNCTIONS
            }
            self._decoder = Decoder(header.header_page, header.formats, functions, self._tasks)
            names = {parse_format(text).name for text in header.formats}
        except _NOT_MEANT as error:
            what = str(error) if isinstance(error, FormatError) else _what(error)
            what = f"{path}: its header cannot be read ({what}): record it anew"
            raise FormatError(what) from None
        self.events = frozenset(BY_NAME[name] for name in names if name in BY_NAME) - {
            Event.LOST_EVENTS
        }
        self.is_complete = header.kind == "model"

    @property
    def tasks(self) -> list[str]:
        """Names of the records' tasks; may still grow."""
        return self._tasks.names

    @property
    def vms(self) -> list[VmInfo]:
        """What is known of the VMs so far."""
        return list(self._vms.values())

    @property
    def position_bytes(self) -> int:
        """How much of the file was read."""
        return self._raw.tell()

    def batches(self) -> Iterator[list[Record]]:
        """The records in order of time, in batches."""
        merge = Merge()
        gaps: set[int] = set()
        whole = False
        while not whole and (chunk := self._chunk()) is not None:
            kind, cpu, payload = chunk
            try:
                if kind == _PAGE:
                    merge.add(cpu, self._records(cpu, payload, gaps))
                    if merge.waiting > _MOST_WAITING:
                        yield merge.until(merge.known_ns() + 1)
                elif kind == _MARK:
                    yield merge.until(_U64.unpack(payload)[0])
                elif kind == _UPDATE:
                    self._update(json.loads(payload))
                elif kind == _END:
                    whole = True
                    self.lost = max(self.lost, int(json.loads(payload)["lost"]))
            except (*_NOT_MEANT, struct.error):
                self.unknown += 1
        if not whole and not self.cut:
            self.cut = "the recording was not ended: its last moments may be missing"
        for cpu in gaps:
            merge.lose(cpu)
        yield merge.until(None)

    def pages(self) -> Iterator[tuple[int, bytes]]:
        """The raw pages instead, each with its CPU, as they stand in the file."""
        while (chunk := self._chunk()) is not None:
            if chunk[0] == _PAGE:
                yield chunk[1], chunk[2]

    def _records(self, cpu: int, page: bytes, gaps: set[int]) -> list[Record]:
        """Those of a page. `gaps`: CPUs of which the page before was damaged."""
        try:
            records = self._decoder.decode(page, cpu)
        except FormatError:
            self.unknown += 1
            gaps.add(cpu)
            return []
        if cpu in gaps and records:
            gaps.discard(cpu)
            gap = (records[0][0], int(Event.LOST_EVENTS), 0, cpu, UNKNOWN_COUNT)
            records.insert(0, gap)
        return records

    def _chunk(self) -> tuple[int, int, bytes] | None:
        """The next chunk; None at the end, and where nobody can tell the next one."""
        head = self._read(_CHUNK.size)
        if not head:
            return None
        if len(head) == _CHUNK.size:
            kind, cpu, length = _CHUNK.unpack(head)
            if length > _MOST_BYTES.get(kind, -1):
                self.cut = (
                    f"the file is damaged: a chunk of kind {kind} and {length} bytes;"
                    " what follows was not read"
                )
                return None
            payload = self._read(length)
            if len(payload) == length:
                return kind, cpu, payload
        self.cut = self.cut or "the file ends in the middle: it was cut short"
        return None

    def _read(self, size: int) -> bytes:
        """So many bytes of the file, fewer at its end."""
        try:
            return self._file.read(size)
        except _UNREADABLE as error:
            self.cut = f"the file cannot be read to its end ({_what(error)})"
            return b""

    def _update(self, told: dict[str, Any]) -> None:
        for vm in [VmInfo.from_dict(vm) for vm in told["vms"]]:
            self._vms[vm.pid] = vm
        for tid, comm in told.get("tasks", {}).items():
            self._tasks.name(int(tid), str(comm))
        self._name_tasks()

    def _name_tasks(self) -> None:
        for vm in self._vms.values():
            for tid, comm in vm.threads.items():
                self._tasks.name(tid, comm)

    def close(self) -> None:
        """Close the file; harmless when repeated."""
        self._raw.close()
