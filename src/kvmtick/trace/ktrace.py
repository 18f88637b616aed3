"""The recording format `.ktrace`: pages of a kernel's ring buffer, and all that reading them takes.

A file is MAGIC, then chunks: 8 bytes (kind, CPU, length of the payload; little-endian), then the
payload. The first chunk is the header, a JSON object; `Header` names its keys. Pages stand as
`trace_pipe_raw` hands them out, cut behind their last event. A MARK says that every event before
its time is in the file by then: readers hand out in order of time up to there. UPDATE brings what
was learnt of VMs and threads since the header, END says that the recording is whole and what was
lost. A file may be compressed with gzip.

A simulated run is stored the same way (`kvmtick.trace.encode`), with formats of its own.

A file that was cut short gives what it has: `KtraceReader.cut` says so.
"""

import gzip
import io
import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from kvmtick.trace.decoder import Decoder, Merge, TaskNames
from kvmtick.trace.events import TRACEPOINTS, Function, Record
from kvmtick.trace.formats import FormatError, parse_format
from kvmtick.trace.vms import VmInfo

__all__ = ["MAGIC", "Header", "KtraceReader", "KtraceWriter"]

MAGIC = b"ktrace1\n"
_GZIP = b"\x1f\x8b"
_CHUNK = struct.Struct("<BxHI")
_U64 = struct.Struct("<Q")
_HEADER, _PAGE, _MARK, _UPDATE, _END = range(1, 6)
_MOST_BYTES = 1 << 24
"""A chunk longer than that is damage."""

_FUNCTIONS = {function.name.lower(): function for function in Function}
_BY_NAME = {tracepoint.name: event for event, tracepoint in TRACEPOINTS.items()}


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
            "version": 1,
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
        """From JSON. KeyError, TypeError or ValueError where it is no header."""
        return cls(
            kind=str(told["kind"]),
            header_page=str(told["header_page"]),
            formats=[str(text) for text in told["formats"]],
            functions={str(at): str(name) for at, name in told["functions"].items()},
            start_ns=int(told["start_ns"]),
            origin=str(told["origin"]),
            missing=[str(name) for name in told["missing"]],
            vms=[VmInfo.from_dict(vm) for vm in told["vms"]],
        )


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


class KtraceReader:
    """Reads a recording: a `Trace` (see `kvmtick.trace.reading`)."""

    unknown = 0

    def __init__(self, path: Path) -> None:
        """Raises OSError, and `FormatError` where the file is no recording."""
        self._raw = path.open("rb")
        self.size_bytes = path.stat().st_size
        try:
            file = io.BufferedReader(self._raw)
            self._file: BinaryIO = file
            if file.peek(2)[:2] == _GZIP:
                self._file = gzip.GzipFile(fileobj=file)  # type: ignore[assignment]
            self._start(path)
        except BaseException:
            self._raw.close()
            raise

    def _start(self, path: Path) -> None:
        try:
            if self._file.read(len(MAGIC)) != MAGIC:
                raise FormatError(f"{path}: no recording of kvmtick: give a .ktrace file")
            chunk = self._chunk()
            if chunk is None or chunk[0] != _HEADER:
                raise FormatError(f"{path}: the recording ends before its header: record it anew")
            header = self.header = Header.from_dict(json.loads(chunk[2]))
            self._vms = {vm.pid: vm for vm in header.vms}
            self._tasks = TaskNames()
            self._name_tasks()
            functions = {
                int(at, 16): _FUNCTIONS[name]
                for at, name in header.functions.items()
                if name in _FUNCTIONS
            }
            self._decoder = Decoder(header.header_page, header.formats, functions, self._tasks)
            names = {parse_format(text).name for text in header.formats}
        except (KeyError, TypeError, ValueError, OSError, EOFError) as error:
            if isinstance(error, FormatError):
                raise
            what = f"{path}: its header cannot be read ({error}): record it anew"
            raise FormatError(what) from None
        self.events = frozenset(_BY_NAME[name] for name in names if name in _BY_NAME)
        self.is_complete = header.kind == "model"
        self.lost = 0
        self.cut = ""

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
        """The records in order of time, in batches. Raises `FormatError` for a damaged page."""
        merge = Merge()
        whole = False
        while (chunk := self._chunk()) is not None:
            kind, cpu, payload = chunk
            if kind == _PAGE:
                merge.add(cpu, self._decoder.decode(payload, cpu))
            elif kind == _MARK:
                yield merge.until(_U64.unpack(payload)[0])
            elif kind == _UPDATE:
                self._update(json.loads(payload))
            elif kind == _END:
                self.lost = max(self.lost, int(json.loads(payload)["lost"]))
                whole = True
        if not whole and not self.cut:
            self.cut = "the recording was not ended: its last moments may be missing"
        yield merge.until(None)

    def _chunk(self) -> tuple[int, int, bytes] | None:
        """The next chunk; None at the end."""
        try:
            head = self._file.read(_CHUNK.size)
            if not head:
                return None
            if len(head) == _CHUNK.size:
                kind, cpu, length = _CHUNK.unpack(head)
                if length > _MOST_BYTES:
                    raise FormatError(f"a chunk of {length} bytes: the recording is damaged")
                payload = self._file.read(length)
                if len(payload) == length:
                    return kind, cpu, payload
        except EOFError:
            pass
        self.cut = "the file ends in the middle: it was cut short"
        return None

    def _update(self, told: dict[str, Any]) -> None:
        for vm in map(VmInfo.from_dict, told["vms"]):
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

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
