"""What local APICs are built on when there is no machine: a clock, a queue, a recorder, and vCPUs
that note what they are asked for.
"""

from collections.abc import Callable, Iterable

from kvmtick.irqchip.delivery import IrqDelivery
from kvmtick.irqchip.i8254 import MIN_TIMER_PERIOD_NS
from kvmtick.irqchip.lapic import Lapic, LapicVcpu
from kvmtick.irqchip.lapic_timer import GUEST_TSC_KHZ
from kvmtick.timing.clock import Clock, VirtualClock
from kvmtick.timing.host import HostModel
from kvmtick.timing.hrtimer import HrTimer, HrTimerRestart
from kvmtick.timing.queue import EventQueue
from kvmtick.trace.events import Event, Function, Record
from kvmtick.trace.recorder import Recorder

FEATURES = ("x2apic", "tsc_deadline")


class VcpuStub(LapicVcpu):
    """A vCPU, as far as its local APIC and the IOAPIC can tell."""

    def __init__(self, clock: Clock, vcpu_id: int, features: Iterable[str]) -> None:
        super().__init__(vcpu_id, GUEST_TSC_KHZ)
        self._clock = clock
        self.features = frozenset(features)
        self.events = 0
        self.unblocks = 0
        self.scans = 0
        self.scan_wanted = False
        self.eoi_exits: list[int] = []
        self.nmis = 0

    def request_event(self) -> None:
        self.events += 1

    def has_extint(self) -> bool:
        return False

    def request_unblock(self) -> None:
        self.unblocks += 1

    def request_scan_ioapic(self) -> None:
        self.scans += 1
        self.scan_wanted = True

    def request_ioapic_eoi_exit(self, vector: int) -> None:
        self.eoi_exits.append(vector)

    def queue_nmi(self) -> None:
        self.nmis += 1

    def guest_tsc(self) -> int:
        return self._clock.now_ns

    def has_cpuid(self, feature: str) -> bool:
        return feature in self.features


class ApicBoard:
    """A board without chips; the first vCPU created boots."""

    def __init__(self, detail: bool = False) -> None:
        self.clock: Clock = VirtualClock()
        self.queue = EventQueue()
        self.host = HostModel()
        self.recorder = Recorder(self.clock, detail)
        self._records: list[Record] = []
        self.recorder.add_consumer(self._records.extend)
        self.delivery = IrqDelivery()
        self.min_timer_period_ns = MIN_TIMER_PERIOD_NS
        self.stubs: list[VcpuStub] = []

    def create_timer(self, function: Function, callback: Callable[[], HrTimerRestart]) -> HrTimer:
        address = 0x1000 + len(self.stubs)
        return HrTimer(
            self.clock, self.queue, self.host, self.recorder, function, address, callback
        )

    def create_lapic(self, vcpu_id: int, features: Iterable[str] = FEATURES) -> Lapic:
        """A vCPU's, as KVM_CREATE_VCPU makes it."""
        stub = VcpuStub(self.clock, vcpu_id, features)
        self.stubs.append(stub)
        return Lapic(self, stub, is_bsp=len(self.stubs) == 1)

    @property
    def lapics(self) -> list[Lapic]:
        return self.delivery.lapics

    def run_to(self, now_ns: int) -> None:
        """Let time pass, to a moment."""
        while self.queue.next_ns <= now_ns:
            self.clock.now_ns = max(self.clock.now_ns, self.queue.next_ns)
            self.queue.run_due(self.clock)
        self.clock.now_ns = now_ns

    def run(self, elapsed_ns: int) -> None:
        """Let time pass."""
        self.run_to(self.clock.now_ns + elapsed_ns)

    def take_records(self, *events: Event) -> list[Record]:
        """The records since the last call, of these events if given."""
        self.recorder.flush()
        records, self._records[:] = list(self._records), []
        return [record for record in records if not events or record[1] in events]
