"""A real gdb on a real `kvmtick run --gdb`: what it prints for each command, how both end."""

import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO

import pytest

__all__ = ["Session", "debug", "needs_gdb"]

LIMIT_S = 120
MARK = "@@@"
WAITING = "kvmtick: waiting for gdb: target remote "

needs_gdb = pytest.mark.skipif(
    shutil.which("gdb") is None, reason="gdb is not installed: apt-get install gdb"
)


@dataclass(frozen=True, slots=True)
class Session:
    """`printed` holds what each command printed, without blank lines at the end."""

    printed: list[str]
    code: int
    out: str
    err: str


def debug(
    arguments: Sequence[str], commands: Sequence[str], gdb_options: Sequence[str] = ()
) -> Session:
    """Run `kvmtick run ARGUMENTS` under gdb, which connects and then executes `commands`.

    The first output is that of connecting. Whatever hangs is killed, and raises TimeoutExpired.
    """
    command = [sys.executable, "-m", "kvmtick", "run", *arguments, "--gdb", "0"]
    kvmtick = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL
    )
    try:
        assert kvmtick.stderr is not None
        address, before = _address(kvmtick.stderr)
        printed = _gdb(address, commands, gdb_options)
        out, err = kvmtick.communicate(timeout=LIMIT_S)
    finally:
        kvmtick.kill()
        kvmtick.wait()
    return Session(printed, kvmtick.returncode, out, before + err)


def _address(err: IO[str]) -> tuple[str, str]:
    """Where kvmtick waits for gdb, and what it said before."""
    before = ""
    for line in err:
        if line.startswith(WAITING):
            return line.removeprefix(WAITING).strip(), before
        before += line
    raise AssertionError(f"kvmtick does not wait for gdb: {before}")


def _gdb(address: str, commands: Sequence[str], options: Sequence[str]) -> list[str]:
    settings = ["set pagination off", "set confirm off", "set width 0", "set style enabled off"]
    words = ["gdb", "-nx", "-q", "-batch", *options]
    for command in [*settings, f"target remote {address}", *commands]:
        words += ["-ex", f"echo {MARK}\\n", "-ex", command]
    run = subprocess.run(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    parts = run.stdout.split(f"{MARK}\n")[1 + len(settings) :]
    return [part.rstrip() for part in parts]
