"""The console over a scripted UART and over a machine: who gets what, and when time passes."""

import os
import time
from collections.abc import Iterator

import pytest

from kvmtick import guests
from kvmtick.kvm.model import ModelVm
from kvmtick.machine.pc import console as console_module
from kvmtick.machine.pc.console import CHARACTER_NS, END_OF_INPUT, Console
from kvmtick.timing.clock import VirtualClock
from kvmtick.timing.queue import EventQueue


class Line:
    """A UART whose guest reads when the test says so, and a pipe that leads there."""

    def __init__(self) -> None:
        self.clock, self.queue = VirtualClock(), EventQueue()
        self.out, self.into = os.pipe()
        self.wants_input = True
        self.room_bytes = 4
        self.got = b""
        self.left = 0
        self.became_live = 0
        self.on_room = lambda: None

    def receive(self, data: bytes) -> int:
        taken = data[: self.room_bytes]
        self.got += taken
        self.room_bytes -= len(taken)
        return len(taken)

    def guest_reads(self) -> None:
        self.room_bytes = 4
        self.on_room()
        self.passes()

    def passes(self) -> None:
        self.clock.now_ns += CHARACTER_NS
        self.queue.run_due(self.clock)

    def console(self, *, live: bool, escape: bool = False) -> Console:
        return Console(
            self,  # type: ignore[arg-type]
            self.clock,
            self.queue,
            self.out,
            live=live,
            leave=self.leave if escape else None,
            on_live=self.becomes_live,
        )

    def leave(self) -> None:
        self.left += 1

    def becomes_live(self) -> None:
        self.became_live += 1


@pytest.fixture
def line() -> Iterator[Line]:
    line = Line()
    yield line
    for fd in (line.out, line.into):
        os.close(fd)


def test_bytes_come_as_the_guest_reads_and_ctrl_d_behind_them(line: Line) -> None:
    os.write(line.into, b"ticks\n")
    console = line.console(live=False)
    assert (line.got, console.filenos()) == (b"", [])
    line.passes()
    assert line.got == b"tick"
    line.guest_reads()
    assert line.got == b"ticks\n"
    with open(os.devnull) as empty:
        os.dup2(empty.fileno(), line.out)
    line.guest_reads()
    line.guest_reads()
    assert line.got == b"ticks\n" + END_OF_INPUT


def test_a_live_console_never_waits(line: Line) -> None:
    console = line.console(live=True)
    line.passes()
    console.poll()
    assert (line.got, console.filenos()) == (b"", [line.out])
    os.write(line.into, b"quick")
    console.poll()
    assert (line.got, console.filenos()) == (b"quic", [])
    line.guest_reads()
    assert (line.got, console.filenos()) == (b"quick", [line.out])


def test_patience_ends_once(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console_module, "PATIENCE_MS", 0)
    console = line.console(live=False)
    line.passes()
    line.guest_reads()
    assert (console.live, line.became_live, line.got) == (True, 1, b"")
    os.write(line.into, b"here")
    console.poll()
    assert line.got == b"here"


def test_the_escape_key_is_heard_by_a_console_whose_guest_does_not_listen(line: Line) -> None:
    line.wants_input = False
    console = line.console(live=True, escape=True)
    os.write(line.into, b"a")
    console.poll()
    os.write(line.into, b"b\x1dc")
    console.poll()
    assert (line.left, line.got) == (1, b"")
    line.wants_input = True
    line.guest_reads()
    assert line.got == b"ab"


@pytest.mark.parametrize("live", [True, False])
def test_idle_virtual_time_keeps_the_hosts_pace_at_a_live_console(line: Line, live: bool) -> None:
    idle_ns = 300_000_000
    guest = guests.load("tick-pic", ticks=0, hz=100)
    with ModelVm(ram_bytes=guest.needs.ram_bytes) as vm:
        vm.prepare(guest.needs, True)
        vm.load(guest)
        machine = vm.machine
        machine.console = Console(
            machine.pc.uart, machine.clock, machine.board.queue, line.out, live=live
        )
        started_ns = time.monotonic_ns()
        machine.run(for_ns=idle_ns)
        passed_ns = time.monotonic_ns() - started_ns
        assert machine.elapsed_ns == idle_ns
        assert vm.ticks().expired == 29
    if live:
        assert passed_ns >= idle_ns
