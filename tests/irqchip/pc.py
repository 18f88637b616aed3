"""A PC of real parts for the chip tests: a board, a virtual clock, and a guest's hands on it."""

from kvmtick.irqchip.i8254 import Pit
from kvmtick.irqchip.i8259 import Pic, PicState
from kvmtick.machine.board import Board
from kvmtick.machine.ports import PortMap, PortOwner
from kvmtick.timing.clock import VirtualClock
from kvmtick.timing.host import HostModel
from kvmtick.trace.events import TRACEPOINTS, Event, Record
from kvmtick.trace.recorder import Recorder
from kvmtick.vcpu.vcpu import Vcpu

HZ = 1193181
"""What KVM divides by; the silicon has 1193182."""

MASTER, MASTER_DATA, SLAVE, SLAVE_DATA = 0x20, 0x21, 0xA0, 0xA1
ELCR1, ELCR2 = 0x4D0, 0x4D1
CONTROL, SPEAKER = 0x43, 0x61
EOI = 0x20


def clocks(count: int) -> int:
    """The first nanosecond at which `count` input clocks have passed since a load at 0."""
    return -(-count * 1_000_000_000 // HZ)


def interval_ns(count: int) -> int:
    """What KVM makes of a count: nanoseconds, rounded down."""
    return count * 1_000_000_000 // HZ


class VcpuStub(Vcpu):
    """Counts how often it was asked to look at its events."""

    def __init__(self, accepts_extint: bool = True) -> None:
        self.extint = accepts_extint
        self.requests = 0

    def accepts_extint(self) -> bool:
        return self.extint

    def request_event(self) -> None:
        self.requests += 1


class Pc:
    """Board, irqchip and (unless `pit` is None) a PIT created with those flags."""

    def __init__(self, pit: int | None = 0, detail: bool = False, start_ns: int = 0) -> None:
        self.clock = VirtualClock()
        self.clock.now_ns = start_ns
        self.host = HostModel()
        self.recorder = Recorder(self.clock, detail)
        self._records: list[Record] = []
        self.recorder.add_consumer(self._records.extend)
        ports = PortMap(PortOwner())
        self.board = Board(self.clock, self.host, self.recorder, ports)
        self.vcpu = VcpuStub()
        self.add_vcpu(self.vcpu)
        self.board.create_irqchip()
        if pit is not None:
            self.board.create_pit(pit)

    def add_vcpu(self, vcpu: VcpuStub) -> None:
        self.board.vcpus.append(vcpu)

    @property
    def pit(self) -> Pit:
        assert self.board.pit is not None
        return self.board.pit

    @property
    def pic(self) -> Pic:
        assert self.board.pic is not None
        return self.board.pic

    @property
    def chips(self) -> tuple[PicState, PicState]:
        return self.pic.master, self.pic.slave

    # Time.

    def run_to(self, now_ns: int) -> None:
        """Let time pass, stopping at every deadline on the way as the machine does."""
        queue, clock = self.board.queue, self.clock
        while queue.next_ns <= now_ns:
            clock.now_ns = max(clock.now_ns, queue.next_ns)
            queue.run_due(clock)
        clock.now_ns = now_ns

    def run(self, elapsed_ns: int) -> None:
        self.run_to(self.clock.now_ns + elapsed_ns)

    def settle(self) -> None:
        """Let the worker run."""
        self.run(0)

    # The guest.

    def out(self, port: int, *values: int, size: int = 1) -> None:
        for value in values:
            device = self.board.bus.find(port, size)
            assert device is not None, f"nobody takes a write to {port:#x}"
            device.io_write(port, size, value)

    def inp(self, port: int, size: int = 1, stale: int = 0) -> int:
        device = self.board.bus.find(port, size)
        assert device is not None, f"nobody takes a read of {port:#x}"
        return device.io_read(port, size, stale)

    def word(self, port: int) -> int:
        return self.inp(port) | self.inp(port) << 8

    def load(self, channel: int, mode: int, count: int) -> None:
        """Program a counter, LSB then MSB."""
        self.out(CONTROL, channel << 6 | 0x30 | mode << 1)
        self.out(0x40 + channel, count & 0xFF, count >> 8)

    def count(self, channel: int) -> int:
        """What a word-mode counter reads after a latch command."""
        self.out(CONTROL, channel << 6)
        return self.word(0x40 + channel)

    def status(self, channel: int) -> int:
        """What a status-only read-back command gives."""
        self.out(CONTROL, 0xE0 | 2 << channel)
        return self.inp(0x40 + channel)

    def init_pics(self, icw4: int = 0x01, master: int = 0x20, slave: int = 0x28) -> None:
        """ICW1-ICW4 to both, nothing masked."""
        self.out(MASTER, 0x11)
        self.out(MASTER_DATA, master, 0x04, icw4, 0x00)
        self.out(SLAVE, 0x11)
        self.out(SLAVE_DATA, slave, 0x02, icw4, 0x00)

    def line(self, gsi: int, level: int, source: int = 0) -> int:
        """KVM_IRQ_LINE_STATUS."""
        return self.board.routing.set_irq(source, gsi, level)

    def pulse(self, *gsis: int) -> None:
        for gsi in gsis:
            self.line(gsi, 1)
            self.line(gsi, 0)

    def inta(self) -> int:
        """The processor takes the interrupt; -1 if INTR is low."""
        return self.pic.read_irq() if self.pic.output else -1

    # What was recorded.

    def records(self, *events: Event) -> list[Record]:
        """The records since the last call, of these events if given."""
        self.recorder.flush()
        records, self._records[:] = list(self._records), []
        return [record for record in records if not events or record[1] in events]

    def names(self) -> list[str]:
        return [TRACEPOINTS[Event(record[1])].name for record in self.records()]

    def pulses(self) -> int:
        """How often the PIT raised GSI 0 since the last call."""
        return sum(
            record[3:] == (0, 1, self.pit.irq_source_id)
            for record in self.records(Event.KVM_SET_IRQ)
        )

    def expiries(self) -> list[int]:
        """When the PIT's timer expired since the last call."""
        return [record[0] for record in self.records(Event.HRTIMER_EXPIRE_ENTRY)]
