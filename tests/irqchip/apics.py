"""An IOAPIC, the routing and local APICs without a CPU: the tests take and end interrupts."""

from apic_board import ApicBoard

from kvmtick.abi.structs import to_chip
from kvmtick.irqchip.i8259 import Pic
from kvmtick.irqchip.ioapic import MASK, REMOTE_IRR, TRIG_MODE_LEVEL, Ioapic
from kvmtick.irqchip.lapic import Lapic
from kvmtick.irqchip.notifiers import Notifiers
from kvmtick.irqchip.routing import IrqRouting
from kvmtick.trace.events import TRACEPOINTS, Event, Record

__all__ = ["LEVEL", "MASK", "REMOTE_IRR", "Apics"]

LEVEL = TRIG_MODE_LEVEL
SVR, SVR_ENABLED = 0xF0, 0x1FF
IOREGSEL, IOWIN = 0xFEC0_0000, 0xFEC0_0010


class Apics(ApicBoard):
    """The chips of KVM_CREATE_IRQCHIP (or of the split irqchip) and `vcpus` enabled local APICs."""

    def __init__(
        self,
        vcpus: int = 1,
        detail: bool = False,
        split: int | None = None,
        enabled: bool = True,
    ) -> None:
        super().__init__(detail)
        self.routing = IrqRouting(self.recorder)
        self.notifiers = Notifiers(self.routing, self.recorder)
        if split is None:
            self.pic = Pic(self.recorder, self.notifiers, lambda: True, lambda: None)
            self.ioapic = Ioapic(
                self.recorder, self.notifiers, self.delivery, self.clock, self.queue
            )
            self.delivery.eoi_target = self.ioapic
            self.routing.set_chips(self.pic, self.ioapic, self.delivery)
        else:
            self.delivery.split = True
            self.routing.set_split(self.delivery, split)
        for vcpu_id in range(vcpus):
            self.add_vcpu(vcpu_id, enabled)
        self.records()

    def add_vcpu(self, vcpu_id: int, enabled: bool = True) -> Lapic:
        lapic = self.create_lapic(vcpu_id)
        if enabled:
            self.lapic_write(vcpu_id, SVR, SVR_ENABLED)
        return lapic

    # The guest.

    def lapic_write(self, vcpu: int, register: int, value: int) -> None:
        assert self.lapics[vcpu].mmio_write(0xFEE0_0000 + register, 4, value)

    def write(self, register: int, value: int) -> None:
        """Through the IOAPIC's register window."""
        assert self.ioapic.mmio_write(IOREGSEL, 4, register)
        assert self.ioapic.mmio_write(IOWIN, 4, value)

    def read(self, register: int) -> int:
        assert self.ioapic.mmio_write(IOREGSEL, 4, register)
        value = self.ioapic.mmio_read(IOWIN, 4)
        assert value is not None
        return value

    def program(self, number: int, low: int, dest_id: int = 0) -> None:
        """A redirection entry, high half first."""
        self.write(0x11 + 2 * number, dest_id << 24)
        self.write(0x10 + 2 * number, low)

    def enter(self, vcpu: int = 0) -> None:
        """The vCPU serves its requests, as before every entry."""
        if self.stubs[vcpu].scan_wanted:
            self.stubs[vcpu].scan_wanted = False
            lapic = self.lapics[vcpu]
            lapic.handled_vectors = (
                self.routing.scan_routes(lapic)
                if self.delivery.split
                else self.ioapic.handled_vectors(lapic)
            )

    def take(self, vcpu: int = 0) -> int:
        """The processor takes the highest interrupt; -1 if there is none."""
        self.enter(vcpu)
        return self.lapics[vcpu].get_interrupt()

    def eoi(self, vcpu: int = 0) -> None:
        self.enter(vcpu)
        self.lapic_write(vcpu, 0xB0, 0)

    # User space.

    def line(self, gsi: int, level: int, source: int = 0) -> int:
        """KVM_IRQ_LINE_STATUS."""
        return self.routing.set_irq(source, gsi, level, line_status=True)

    def lines(self, gsi: int, *levels: int) -> list[int]:
        return [self.line(gsi, level) for level in levels]

    def alone(self, number: int) -> None:
        """GSI n leads to IOAPIC pin n and nothing else anywhere."""
        self.routing.set_table([to_chip(number, 2, number)])

    def irrs(self, vcpu: int = 0) -> list[int]:
        """The vectors in the local APIC's IRR."""
        irr = self.lapics[vcpu].irr
        return [vector for vector in range(256) if irr >> vector & 1]

    # What was recorded.

    def records(self, *events: Event) -> list[Record]:
        """The records since the last call, of these events if given."""
        return self.take_records(*events)

    def names(self) -> list[str]:
        return [TRACEPOINTS[Event(record[1])].name for record in self.records()]
