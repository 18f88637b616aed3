"""What comes in by the serial line: bytes of a file descriptor, as fast as the guest takes them.

A live console takes bytes when they come: a person at a terminal, or whatever is written to a
machine of real time. Any other is asked for its bytes when the guest has room for them, and the
machine waits for them: then the moments at which a guest gets its input are decided by the guest
alone, and a run repeats exactly. Who writes nothing for `PATIENCE_MS` may be waiting for the guest
in turn: the console is live from then on. At the end of the input the guest gets Ctrl-D.

Not modelled: the line's speed. The UART's FIFO is filled at once, a character's time after the
guest has emptied it, and bytes wait at the other end for a guest that does not read.
"""

import os
import select
from collections.abc import Callable
from typing import Final

from kvmtick.machine.pc.uart import Uart
from kvmtick.timing.clock import Clock
from kvmtick.timing.queue import EventQueue
from kvmtick.timing.wall import Stopwatch

__all__ = ["END_OF_INPUT", "ESCAPE", "Console"]

END_OF_INPUT: Final = b"\x04"
"""Ctrl-D."""
ESCAPE: Final = b"\x1d"
"""Ctrl-], as of telnet(1)."""
CHARACTER_NS: Final = 86_806
"""Start bit, 8 bits, stop bit at 115200 baud."""
CHUNK_BYTES: Final = 4096
PATIENCE_MS: Final = 2_000
"""Of the host's time."""


class Console:
    """Feeds one UART."""

    def __init__(
        self,
        uart: Uart,
        clock: Clock,
        queue: EventQueue,
        fd: int | None,
        *,
        live: bool = False,
        leave: Callable[[], None] | None = None,
        on_live: Callable[[], None] | None = None,
    ) -> None:
        """`fd`: where bytes are read; None: there are none. `leave` is called for `ESCAPE`, which
        the guest then never gets; None: it is a byte as all others. `on_live` is called when the
        console becomes live.
        """
        self.live = live
        self._uart = uart
        self._clock = clock
        self._queue = queue
        self._fd = fd
        self._leave = leave
        self._on_live = on_live
        self._pending = b"" if fd is not None else END_OF_INPUT
        self._is_due = False
        self._stopwatch = Stopwatch()
        self._began_ns = clock.now_ns
        """The machine's time when the stopwatch began."""
        uart.on_room = self._plan
        if uart.wants_input:
            self._plan()

    def begin(self) -> None:
        """The machine runs: from now on its time and the host's are compared."""
        self._stopwatch = Stopwatch()
        self._began_ns = self._clock.now_ns

    def host_ns(self) -> int:
        """How late it is in the machine by the host's clock."""
        return self._began_ns + self._stopwatch.elapsed_ns()

    def catch_up(self, most_ns: int) -> None:
        """Of what the machine is behind the host, so much is made up for at most."""
        self._began_ns -= max(0, self.host_ns() - self._clock.now_ns - most_ns)

    def filenos(self) -> list[int]:
        """What ends a sleep: bytes have come that could be taken."""
        if self._fd is None or not self.live:
            return []
        # Ctrl-] is heard whether the guest listens or not
        listens = self._leave is not None or (not self._pending and self._uart.wants_input)
        return [self._fd] if listens else []

    def poll(self) -> None:
        """Take what has come."""
        for fd in self.filenos():
            if _has_come(fd, 0):
                self._read(fd)
                self._give()

    def _plan(self) -> None:
        """The guest has room."""
        if not self._is_due:
            self._is_due = True
            self._queue.add(self._clock.now_ns + CHARACTER_NS, self._on_time)

    def _on_time(self) -> None:
        self._is_due = False
        if self._fd is not None and not self.live and not self._pending:
            if _has_come(self._fd, PATIENCE_MS):
                self._read(self._fd)
            else:
                self._become_live()
        self._give()

    def _become_live(self) -> None:
        self.live = True
        self.begin()
        if self._on_live is not None:
            self._on_live()

    def _give(self) -> None:
        """As much as the guest takes; it tells when it has room again."""
        if self._pending and self._uart.wants_input:
            taken = self._uart.receive(self._pending)
            self._pending = self._pending[taken:]

    def _read(self, fd: int) -> None:
        """The next bytes, or the end, which have come."""
        try:
            data = os.read(fd, CHUNK_BYTES)
        except BlockingIOError:  # somebody else who has the descriptor was faster
            return
        except OSError:  # a terminal that is gone
            data = b""
        if not data:
            self._fd = None
            data = END_OF_INPUT
        if self._leave is not None and ESCAPE in data:
            data = data[: data.index(ESCAPE)]
            self._leave()
        self._pending += data


def _has_come(fd: int, patience_ms: int) -> bool:
    """Bytes, or the end, within that time."""
    waits = select.poll()
    waits.register(fd, select.POLLIN)
    return bool(waits.poll(patience_ms))
