"""`kvmtick run --kernel` at a terminal, and with a pipe."""

import os
import select
import signal
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmtick.cli import EXIT_INTERRUPTED, EXIT_OK

START = "import sys; from kvmtick.cli import main; sys.exit(main(sys.argv[1:]))"
DEADLINE_S = 20.0
LFLAG = 3


class Person:
    """Somebody who runs `kvmtick` at a terminal of their own."""

    def __init__(self, *arguments: str) -> None:
        self._screen, self.line = os.openpty()
        self.before = termios.tcgetattr(self.line)
        self.process = subprocess.Popen(
            [sys.executable, "-c", START, *arguments],
            stdin=self.line,
            stdout=self.line,
            stderr=self.line,
            start_new_session=True,
        )
        self._process_fd = os.pidfd_open(self.process.pid)
        self.seen = b""
        self._at = 0

    def sees(self, text: bytes) -> None:
        """Wait for it, behind what was seen before."""
        while (at := self.seen.find(text, self._at)) < 0:
            more = self._read()
            if not more:
                raise AssertionError(f"{text!r} did not come, but {self.seen[self._at :]!r}")
            self.seen += more
        self._at = at + len(text)

    def _read(self) -> bytes:
        """What comes next; nothing when the process is gone, or after `DEADLINE_S`."""
        ready, _, _ = select.select([self._screen, self._process_fd], [], [], DEADLINE_S)
        return os.read(self._screen, 4096) if self._screen in ready else b""

    def types(self, keys: bytes) -> None:
        os.write(self._screen, keys)

    def leaves(self) -> int:
        """Read until the process is gone; its exit code."""
        while more := self._read():
            self.seen += more
        return self.process.wait(timeout=DEADLINE_S)

    def is_cooked(self) -> bool:
        """The terminal is as it was before."""
        return termios.tcgetattr(self.line) == self.before

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for fd in (self._screen, self.line, self._process_fd):
            os.close(fd)


@pytest.fixture
def person(echo: Path) -> Iterator[Person]:
    """At the prompt of the kernel that gives everything back."""
    person = Person("run", "--kernel", str(echo), "--ram", "4M")
    try:
        person.sees(b"Ctrl-] ends the run")
        person.sees(b">")
        yield person
    finally:
        person.close()


def test_what_is_typed_reaches_the_guest_and_ctrl_d_is_a_key(person: Person) -> None:
    person.types(b"hello\r")
    person.sees(b"hello\r")
    assert not termios.tcgetattr(person.line)[LFLAG] & (termios.ICANON | termios.ECHO)
    person.types(b"\x04")
    assert person.leaves() == EXIT_OK
    assert b"done after" in person.seen
    assert person.is_cooked()


def test_ctrl_c_is_the_guests_and_the_escape_key_leaves(person: Person) -> None:
    person.types(b"a\x03b")
    person.sees(b"a\x03b")
    person.types(b"lost\x1dlost")
    assert person.leaves() == EXIT_INTERRUPTED
    assert b"interrupted after" in person.seen
    assert person.is_cooked()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT])
def test_a_signal_leaves_the_terminal_as_it_was(person: Person, number: signal.Signals) -> None:
    person.process.send_signal(number)
    code = person.leaves()
    assert code == (EXIT_INTERRUPTED if number == signal.SIGINT else -number)
    assert person.is_cooked()


def run(echo: Path, *arguments: str, typed: bytes | None) -> "subprocess.CompletedProcess[bytes]":
    """With a pipe, or stdin closed."""
    command = [sys.executable, "-c", START, "run", "--kernel", str(echo), "--ram", "4M", *arguments]
    if typed is None:
        command = ["sh", "-c", 'exec "$@" <&-', "sh", *command]
        return subprocess.run(command, capture_output=True, timeout=DEADLINE_S)
    return subprocess.run(command, input=typed, capture_output=True, timeout=DEADLINE_S)


def without_wall_clock(text: bytes) -> list[bytes]:
    return [line for line in text.split(b"\n") if b"wall time" not in line]


def test_a_pipe_is_read_as_the_guest_takes_it_then_ctrl_d(echo: Path, tmp_path: Path) -> None:
    typed = b"more than a FIFO of 16"
    first = run(echo, "--trace", str(tmp_path / "1"), typed=typed)
    again = run(echo, "--trace", str(tmp_path / "2"), typed=typed)
    assert (first.returncode, first.stderr) == (EXIT_OK, b"")
    assert first.stdout.startswith(b">" + typed)
    assert without_wall_clock(first.stdout) == without_wall_clock(again.stdout)
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


@pytest.mark.parametrize("typed", [b"", None])
def test_no_input_is_ctrl_d(echo: Path, typed: bytes | None) -> None:
    result = run(echo, typed=typed)
    assert (result.returncode, result.stderr) == (EXIT_OK, b"")
    assert result.stdout.startswith(b">\n")


def test_a_slow_writer_is_waited_for(echo: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", START, "run", "--kernel", str(echo), "--ram", "4M"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"one\n")
        assert process.stdout.readline() == b">one\n"
        process.stdin.write(b"two\n")
        assert process.stdout.readline() == b"two\n"
        process.stdin.close()
        assert b"done after" in process.stdout.read()
    assert process.returncode == EXIT_OK


def test_who_waits_for_the_guest_is_not_waited_for(echo: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", START, "run", "--kernel", str(echo), "--ram", "4M"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        assert b"nothing came by stdin" in process.stderr.readline()
        process.stdin.write(b"now\n")
        assert process.stdout.readline() == b">now\n"
        process.stdin.close()
        assert b"done after" in process.stdout.read()
        assert process.stderr.read() == b""
    assert process.returncode == EXIT_OK


def test_a_pipe_that_does_not_block_is_no_end_of_input(echo: Path) -> None:
    out, into = os.pipe()
    os.set_blocking(out, False)
    with subprocess.Popen(
        [sys.executable, "-c", START, "run", "--kernel", str(echo), "--ram", "4M"],
        stdin=out,
        stdout=subprocess.PIPE,
    ) as process:
        os.close(out)
        assert process.stdout is not None
        assert process.stdout.read(1) == b">"
        os.write(into, b"later\n")
        os.close(into)
        assert process.stdout.readline() == b"later\n"
        assert b"done after" in process.stdout.read()
    assert process.returncode == EXIT_OK
