"""What `kvmtick run` shows: the guest's text as it comes, the trace file, the report."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from kvmtick.cli import UsageError
from kvmtick.guests import Guest
from kvmtick.machine.ports import PortMap
from kvmtick.machine.run import Run
from kvmtick.ticks.story import StoryTeller
from kvmtick.trace.encode import KtraceEncoder
from kvmtick.trace.events import Record
from kvmtick.trace.ftrace import FtraceWriter
from kvmtick.trace.ktrace import SUFFIX
from kvmtick.trace.recorder import Entry, EntryConsumer

if TYPE_CHECKING:
    from kvmtick.machine.crash import CrashReport

BUFFER_BYTES = 1 << 16
"""Of a trace file: a tick with all its events has about 1 kB."""

__all__ = ["TraceFile", "live_text", "reinject_of", "report", "trace_writer"]


def reinject_of(options: argparse.Namespace, guest: Guest) -> bool:
    """What the PIT's reinjection is set to when the guest starts."""
    return options.reinject is not False if guest.needs.reinject is None else guest.needs.reinject


class TraceFile(EntryConsumer):
    """Writes records to the trace file `name`: a recording (`encoder` makes it) if it ends in
    .ktrace, else ftrace text. `tasks` and `encoder` are asked at the first records.

    Raises UsageError where the file cannot be written.
    """

    def __init__(
        self,
        name: str,
        tasks: Callable[[], list[str]],
        encoder: Callable[[BinaryIO], KtraceEncoder],
        *,
        simulated: bool,
    ) -> None:
        self._name = name
        self._tasks = tasks
        self._encoder = encoder
        self._simulated = simulated
        with _is_trace_file(name):
            self._file = Path(name).open("wb", BUFFER_BYTES)  # noqa: SIM115 - closed below
            self._text = io.TextIOWrapper(self._file, encoding="utf-8")
        self._writer: KtraceEncoder | FtraceWriter | None = None

    def take(self, entries: list[Entry], begin: int, end: int) -> None:
        """The next of a recorder's entries."""
        with _is_trace_file(self._name):
            writer = self._writer = self._writer or self._make()
            if isinstance(writer, KtraceEncoder):
                writer.take(entries, begin, end)
            else:
                writer([entry.record() for entry in entries[begin:end]])

    def __call__(self, batch: list[Record]) -> None:
        """The next records."""
        with _is_trace_file(self._name):
            self._writer = self._writer or self._make()
            self._writer(batch)

    def _make(self) -> KtraceEncoder | FtraceWriter:
        if self._name.endswith(SUFFIX):
            return self._encoder(self._file)
        return FtraceWriter(self._text, self._tasks(), self._simulated)

    def end(self) -> None:
        """All records were written: a recording is whole."""
        if isinstance(self._writer, KtraceEncoder):
            with _is_trace_file(self._name):
                self._writer.end()

    def close(self) -> None:
        """Write what there is, and close the file."""
        with _is_trace_file(self._name):
            if isinstance(self._writer, KtraceEncoder):
                self._writer.flush()
            self._text.close()


@contextlib.contextmanager
def trace_writer(
    name: str | None,
    tasks: Callable[[], list[str]],
    encoder: Callable[[BinaryIO], KtraceEncoder],
    *,
    simulated: bool,
) -> Iterator[TraceFile | None]:
    """The trace file `name` (see `TraceFile`), ended and closed; None if there is none to write."""
    if name is None:
        yield None
        return
    file = TraceFile(name, tasks, encoder, simulated=simulated)
    try:
        yield file
        file.end()
    finally:
        file.close()


@contextlib.contextmanager
def _is_trace_file(name: str) -> Iterator[None]:
    """What cannot be done in here is the trace file's fault."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"--trace {name}: {error.strerror}; give a writable file") from None


@contextlib.contextmanager
def live_text(options: argparse.Namespace, ports: PortMap, guest: Guest) -> Iterator[None]:
    """What a file prints goes to stdout, byte for byte, as it comes; a blank line ends it."""
    if options.json or guest.parameters is not None:
        yield
        return
    stdout = sys.stdout.buffer
    at_once = sys.stdout.isatty()
    last = b""

    def show(byte: int) -> None:
        nonlocal last
        last = bytes((byte,))
        stdout.write(last)
        if at_once or last == b"\n":
            stdout.flush()

    ports.on_text = show
    try:
        yield
    finally:
        ports.on_text = None
    if last:
        stdout.write(b"\n" if last == b"\n" else b"\n\n")
        stdout.flush()


def report(
    options: argparse.Namespace,
    guest: Guest,
    run: Run,
    teller: StoryTeller | None = None,
    crash: CrashReport | None = None,
) -> None:
    """The report on stdout, or the JSON object; what became of a guest that failed on stderr."""
    if options.json:
        result = run.as_dict()
        if crash is not None:
            result["crash"] = crash.as_dict()
        if teller is not None:
            result["story"] = teller.as_dict()
        print(json.dumps(result))
    else:
        from kvmtick.cli.show import show_run

        show_run(run, with_text=guest.parameters is not None)
        if teller is not None:
            print()
            print(teller.text())
    if run.exit.is_failure:
        print(f"kvmtick: {run.guest}: {run.exit.reason}: {run.exit.detail}", file=sys.stderr)
        if crash is not None:
            print(crash.text(), file=sys.stderr)
