"""The console of `kvmtick run`: the terminal's keys, or what comes by stdin, for the serial line.

stdin is a terminal: every key goes to the guest, Ctrl-C too; Ctrl-] ends the run. It is a pipe or
a file: the guest gets its bytes, then Ctrl-D. /dev/null, closed, or `--json` on a terminal: Ctrl-D.
"""

import argparse
import contextlib
import os
import signal
import sys
import termios
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType

from kvmtick.machine.pc.console import PATIENCE_MS, Console
from kvmtick.machine.pc.uart import Uart
from kvmtick.timing.clock import Clock
from kvmtick.timing.queue import EventQueue

__all__ = ["Input", "input_of"]

HINT = "kvmtick: every key goes to the guest; Ctrl-] ends the run"
WAITED = (
    f"kvmtick: nothing came by stdin for {PATIENCE_MS // 1000} s: the guest goes on, gets what"
    " comes when it comes, and the run does not repeat exactly; for no input at all give </dev/null"
)
_IFLAG, _LFLAG, _CC = 0, 3, 6
_DEADLY = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


@dataclass(frozen=True, slots=True)
class Input:
    """Where the guest's input comes from: `fd` None is nowhere."""

    fd: int | None
    is_terminal: bool = False

    def console(
        self,
        uart: Uart,
        clock: Clock,
        queue: EventQueue,
        leave: Callable[[], None],
        *,
        real_time: bool,
    ) -> Console:
        """What feeds it to the guest; `leave` ends the run."""
        live = self.is_terminal or (real_time and self.fd is not None)
        return Console(
            uart,
            clock,
            queue,
            self.fd,
            live=live,
            leave=leave if self.is_terminal else None,
            on_live=_tell_of_live,
        )

    @contextlib.contextmanager
    def raw(self) -> Iterator[None]:
        """Every key comes at once and as it is; afterwards the terminal is as it was, also where a
        signal ends the process. What is printed is treated as before.
        """
        if self.fd is None or not self.is_terminal:
            yield
            return
        fd = self.fd
        before = termios.tcgetattr(fd)

        def restore() -> None:
            termios.tcsetattr(fd, termios.TCSADRAIN, before)

        def die(number: int, frame: FrameType | None) -> None:
            restore()
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

        handlers = {number: signal.signal(number, die) for number in _DEADLY}
        try:
            print(HINT, file=sys.stderr, flush=True)
            termios.tcsetattr(fd, termios.TCSADRAIN, _raw_of(fd))
            yield
        finally:
            restore()
            for number, handler in handlers.items():
                signal.signal(number, handler)


def _tell_of_live() -> None:
    print(WAITED, file=sys.stderr, flush=True)


def _raw_of(fd: int) -> list[int | list[bytes | int]]:
    """As cfmakeraw(3), but for the output's treatment: a line feed of ours still begins a line."""
    mode = termios.tcgetattr(fd)
    mode[_IFLAG] &= ~(
        termios.BRKINT
        | termios.ICRNL
        | termios.IGNCR
        | termios.INLCR
        | termios.INPCK
        | termios.ISTRIP
        | termios.IXON
    )
    mode[_LFLAG] &= ~(termios.ECHO | termios.ICANON | termios.IEXTEN | termios.ISIG)
    mode[_CC][termios.VMIN], mode[_CC][termios.VTIME] = 1, 0
    return mode


def input_of(options: argparse.Namespace) -> Input:
    """By what stdin is."""
    if sys.stdin is None:
        return Input(None)
    fd = sys.stdin.fileno()
    if not os.isatty(fd):
        return Input(fd)
    return Input(None) if options.json else Input(fd, is_terminal=True)
