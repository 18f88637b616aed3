"""Traces from files: what every reader gives, and which reader a file needs.

    with open_trace(Path("host.ktrace")) as trace:
        for batch in trace.batches():
            for ts_ns, event, task, *fields in batch:
                ...

`kvmtick.trace.events` says what the fields are, `kvmtick.ticks.host` makes ticks of them.
"""

import gzip
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Protocol, Self

from kvmtick.trace.events import Event, Record
from kvmtick.trace.formats import FormatError
from kvmtick.trace.ktrace import MAGIC, KtraceReader
from kvmtick.trace.text import TextReader, is_text
from kvmtick.trace.vms import VmInfo

__all__ = ["Trace", "TraceFile", "open_trace"]

_GZIP: Final = b"\x1f\x8b"
_START_BYTES: Final = 1 << 16
_BINARY: Final = {
    b"\x17\x08\x44tracing": "a file of trace-cmd: run trace-cmd report -t -i",
    b"PERFILE2": "a file of perf: run perf script --ns -F comm,pid,tid,cpu,time,event,trace -i",
}


class Trace(Protocol):
    """A trace that is being read; what it says of itself is whole when `batches` is over."""

    @property
    def tasks(self) -> list[str]:
        """`comm-pid` of the records' tasks, by index; may still grow."""

    @property
    def events(self) -> frozenset[Event]:
        """Classes of events that were recorded; of a text those seen so far."""

    @property
    def vms(self) -> list[VmInfo]:
        """What is known of the VMs beside the records; a text knows nothing."""

    @property
    def is_complete(self) -> bool:
        """A simulated run: also what a kernel has no tracepoint for is in it."""

    @property
    def lost(self) -> int:
        """Events that the kernel could not store, as far as it says."""

    @property
    def unknown(self) -> int:
        """Lines that were not understood, pages that were damaged."""

    @property
    def cut(self) -> str:
        """Why the end is missing; empty if it is not."""

    @property
    def size_bytes(self) -> int:
        """The file's size."""

    @property
    def position_bytes(self) -> int:
        """How much of it was read."""

    def batches(self) -> Iterator[list[Record]]:
        """The records in order of time, in batches."""

    def close(self) -> None:
        """Close the file; harmless when repeated."""


class TraceFile(Trace, Protocol):
    """A trace that closes itself at the end of a `with`."""

    def __enter__(self) -> Self:
        """The trace."""

    def __exit__(self, *error: object) -> None:
        """Close the file."""


def open_trace(path: Path) -> TraceFile:
    """Open a file by what it holds. Raises OSError, and `FormatError` where nobody can read it."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise FormatError(f"{path}: no regular file: save the trace into one and give that")
    with path.open("rb") as file:
        start = file.read(_START_BYTES)
    if start[:2] == _GZIP:
        with gzip.open(path) as packed:
            try:
                start = packed.read1(_START_BYTES)  # all there is of a file that was cut
            except (OSError, EOFError, zlib.error):
                raise FormatError(f"{path}: damaged gzip file: record it anew") from None
    if start.startswith(MAGIC):
        return KtraceReader(path)
    for magic, what in _BINARY.items():
        if start.startswith(magic):
            raise FormatError(f"{path}: {what} {path} > {path}.txt and give that")
    if is_text(start):
        return TextReader(path)
    raise FormatError(
        f"{path}: neither a recording of kvmtick nor ftrace text (cat trace, trace-cmd report,"
        f" perf script): it begins {start[:16]!r}"
    )
