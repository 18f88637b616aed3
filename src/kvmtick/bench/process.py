"""Processes that are measured: their time, CPU time and memory, and how they ended."""

import contextlib
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

__all__ = ["KVMTICK", "MeasureError", "Spent", "pinned", "run_process"]

KVMTICK: Final = (sys.executable, "-m", "kvmtick")
TIMEOUT_S: Final = 600.0


class MeasureError(Exception):
    """A figure could not be taken; one line that says why."""


@dataclass(frozen=True, slots=True)
class Spent:
    """What a process took, from its start to its end."""

    wall_s: float
    cpu_s: float
    peak_rss_bytes: int
    code: int
    output: str
    """What it printed on stdout."""
    errors: str
    """What it printed on stderr."""


@contextlib.contextmanager
def pinned() -> Iterator[int]:
    """This process and those it starts stay on one core, the last they may use; its number."""
    before = os.sched_getaffinity(0)
    core = max(before)
    os.sched_setaffinity(0, {core})
    try:
        yield core
    finally:
        os.sched_setaffinity(0, before)


def run_process(
    command: Sequence[str],
    *,
    expected: Sequence[int] = (0,),
    environment: Mapping[str, str] | None = None,
    output: Path | None = None,
    timeout_s: float = TIMEOUT_S,
) -> Spent:
    """Run a command to its end, away from the terminal; what it prints may go to a file.

    MeasureError, with its last line, if it cannot be started, takes too long, or ends with an exit
    code that is not `expected`.
    """
    with (
        tempfile.TemporaryFile() if output is None else output.open("wb+") as out,
        tempfile.TemporaryFile() as err,
    ):
        begin_s = time.perf_counter()
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env=None if environment is None else {**os.environ, **environment},
            )
        except OSError as error:
            raise MeasureError(f"{command[0]} cannot be started: {error.strerror}") from None
        late = threading.Timer(timeout_s, process.kill)
        late.daemon = True
        try:
            late.start()
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            process.wait()
            raise
        finally:
            late.cancel()
        wall_s = time.perf_counter() - begin_s
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        errors = err.read().decode(errors="replace").strip()
        printed = "" if output else out.read().decode(errors="replace")
        if process.returncode not in expected:
            raise MeasureError(_failure(command[0], process.returncode, wall_s, timeout_s, errors))
    cpu_s = usage.ru_utime + usage.ru_stime
    return Spent(wall_s, cpu_s, usage.ru_maxrss * 1024, process.returncode, printed, errors)


def _failure(name: str, code: int, wall_s: float, timeout_s: float, errors: str) -> str:
    name = os.path.basename(name)
    if wall_s >= timeout_s:
        return f"{name} did not end within {timeout_s:g} s"
    lines = errors.splitlines()
    ended = f"ended with exit code {code}" if code >= 0 else f"was ended by signal {-code}"
    return f"{name} {ended}" + (f": {lines[-1].strip()}" if lines else "")
