"""What `kvmtick run` shows: the guest's text as it comes, the trace file, the report."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from kvmtick.cli import UsageError
from kvmtick.guests import Guest
from kvmtick.machine.ports import PortMap
from kvmtick.machine.run import Run
from kvmtick.ticks.story import StoryTeller
from kvmtick.trace.events import Record
from kvmtick.trace.ftrace import FtraceWriter

if TYPE_CHECKING:
    from kvmtick.machine.crash import CrashReport

__all__ = ["live_text", "report", "trace_writer"]


@contextlib.contextmanager
def trace_writer(
    name: str | None, tasks: Callable[[], list[str]], simulated: bool
) -> Iterator[Callable[[list[Record]], None] | None]:
    """A consumer that writes records to the trace file `name`; `tasks` is asked at the first batch.

    None if there is no file to write.
    """
    if name is None:
        yield None
        return
    with _is_trace_file(name):
        file = Path(name).open("w", encoding="utf-8")  # noqa: SIM115 - closed below
    writer: FtraceWriter | None = None

    def write(batch: list[Record]) -> None:
        nonlocal writer
        with _is_trace_file(name):
            writer = writer or FtraceWriter(file, tasks(), simulated)
            writer(batch)

    try:
        yield write
    finally:
        with _is_trace_file(name):
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
