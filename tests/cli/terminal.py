"""The command line under test: in this process, and as a process of its own."""

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass

import pytest

from kvmtick.cli import main

START = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
    " from kvmtick.cli import main; sys.exit(main(sys.argv[1:]))"
)
"""The entry point, with Ctrl-C as on a terminal whatever the tests' own process does with it."""


@dataclass(frozen=True)
class Result:
    """What a command gave."""

    code: int
    out: str
    err: str


class Terminal:
    """Runs commands in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *arguments: str) -> Result:
        self._capsys.readouterr()
        try:
            code = main(list(arguments))
        except SystemExit as leaving:  # argparse's --help
            code = leaving.code if isinstance(leaving.code, int) else 1
        captured = self._capsys.readouterr()
        return Result(code, captured.out, captured.err)


def process(
    *arguments: str,
    stdout: int = subprocess.PIPE,
    environment: Mapping[str, str] | None = None,
) -> "subprocess.Popen[str]":
    """Starts a command as a process."""
    return subprocess.Popen(
        [sys.executable, "-c", START, *arguments],
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
