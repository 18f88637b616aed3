"""A `PcHost` that keeps what its devices say: what the tests of the PC's devices share."""

from collections.abc import Mapping

from kvmtick.machine.pc.host import PcHost
from kvmtick.machine.ports import PortHandler
from kvmtick.timing.clock import VirtualClock
from kvmtick.timing.queue import EventQueue


class FakePc:
    """Time stands until `advance_to`; the date is `date_at_0_ns` at time 0."""

    def __init__(self, *, ram_bytes: int = 64 << 20, date_at_0_ns: int = 0, vcpus: int = 1) -> None:
        self.clock = VirtualClock()
        self.queue = EventQueue()
        self.lines: list[tuple[int, int, int]] = []
        """Changes of interrupt lines: when, which, level."""
        self.sent = bytearray()
        self.resets: list[str] = []
        self.power_offs = 0
        self.ports: Mapping[int, PortHandler] = {}
        self.host = PcHost(
            self.clock,
            self.queue,
            lambda gsi, level: self.lines.append((self.clock.now_ns, gsi, level)),
            lambda: date_at_0_ns + self.clock.now_ns,
            self.sent.append,
            self.resets.append,
            self._power_off,
            ram_bytes,
            lambda: vcpus,
        )

    def _power_off(self) -> None:
        self.power_offs += 1

    def advance_to(self, now_ns: int) -> None:
        """Run what is due up to then, each at its time."""
        while self.queue.next_ns <= now_ns:
            self.clock.now_ns = max(self.clock.now_ns, self.queue.next_ns)
            self.queue.run_due(self.clock)
        self.clock.now_ns = now_ns

    def read(self, port: int, size_bytes: int = 1) -> int:
        value = self.ports[port](port, size_bytes, None)
        assert value is not None
        return value

    def write(self, port: int, value: int, size_bytes: int = 1) -> None:
        self.ports[port](port, size_bytes, value)

    def levels(self) -> list[int]:
        return [level for _, _, level in self.lines]
