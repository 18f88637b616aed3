"""Guests on the kernel, recorded by `kvmtick record` while they run and reported by `kvmtick report`."""

import contextlib
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvmtick.cli import main

GUEST = Path(__file__).with_name("kernel_guest.py")
COMMAND = 'echo go > "$0/go"; cat "$0/over"'


@dataclass(frozen=True, slots=True)
class Recorded:
    """One guest, what it says itself, and what the report says of it."""

    name: str
    own: dict[str, Any]
    vm: dict[str, Any]


def kvmtick(*words: str | Path) -> str:
    """What a command prints; it has to end well."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main([str(word) for word in words]) == 0, out.getvalue()
    return out.getvalue()


def record(
    folder: Path, groups: Sequence[Sequence[dict[str, Any]]], *options: str
) -> dict[str, dict[str, Any]]:
    """Record into `folder`/t.ktrace; those of a group run at a time, one group after the other.

    What each guest says, by its name.
    """
    for name in ("go", "over"):
        os.mkfifo(folder / name)
    said: dict[str, dict[str, Any]] = {}
    with ExitStack() as stack:
        running = [[stack.enter_context(_started(guest)) for guest in group] for group in groups]
        conductor = threading.Thread(target=_conduct, args=(folder, running, said))
        conductor.start()
        words = ["record", "--json", "-o", str(folder / "t.ktrace"), *options]
        kvmtick(*words, "--", "sh", "-c", COMMAND, str(folder))
        conductor.join()
    names = [guest["name"] for group in groups for guest in group]
    return dict(zip(names, said.values(), strict=True))


@contextlib.contextmanager
def _started(guest: dict[str, Any]) -> Iterator[subprocess.Popen[str]]:
    """Its VM is there."""
    told = {key: value for key, value in guest.items() if key != "name"}
    words = [sys.executable, str(GUEST), "--name", guest["name"], json.dumps(told)]
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
        process.kill()


def _conduct(
    folder: Path,
    groups: Sequence[Sequence[subprocess.Popen[str]]],
    said: dict[str, dict[str, Any]],
) -> None:
    for group in groups:
        for process in group:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
    (folder / "go").read_text()
    with (folder / "over").open("w"):
        for group in groups:
            for process in group:
                assert process.stdin is not None
                process.stdin.write("go\n")
                process.stdin.flush()
            for process in group:
                assert process.stdout is not None
                said[str(process.pid)] = json.loads(process.stdout.readline())
