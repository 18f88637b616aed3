"""The PC's wiring: which chip hangs on which line, who shares the clock, the bus and the recorder.

The calls that build it are KVM's: `create_irqchip` makes the PICs, the IOAPIC and the default
routing (kvm_create_irqchip), `split_irqchip` leaves these to user space and keeps the local APICs
in the kernel (KVM_CAP_SPLIT_IRQCHIP), `create_pit` makes the PIT (kvm_create_pit).
"""

import errno
from collections.abc import Callable
from typing import Final

from kvmtick.abi.errors import KvmError
from kvmtick.irqchip.apicdef import DM_INIT, DM_NMI
from kvmtick.irqchip.delivery import IrqDelivery
from kvmtick.irqchip.i8254 import MIN_TIMER_PERIOD_NS, Pit, create_pit
from kvmtick.irqchip.i8259 import Pic
from kvmtick.irqchip.ioapic import Ioapic
from kvmtick.irqchip.iobus import IoBus
from kvmtick.irqchip.irqfd import IoEventFds, IrqFds
from kvmtick.irqchip.lapic import Lapic
from kvmtick.irqchip.notifiers import Notifiers
from kvmtick.irqchip.routing import USERSPACE_IRQ_SOURCE_ID, IrqRouting, IrqSourceIds
from kvmtick.timing.clock import Clock
from kvmtick.timing.host import HostModel
from kvmtick.timing.hrtimer import HrTimer, HrTimerRestart
from kvmtick.timing.kthread import KthreadWorker
from kvmtick.timing.queue import EventQueue
from kvmtick.trace.events import ApicvInhibitReason, Function
from kvmtick.trace.recorder import Recorder
from kvmtick.vcpu.exits import UserSpace
from kvmtick.vcpu.vcpu import Vcpu

__all__ = ["VMM_PID", "Board"]

VMM_PID: Final = 1000
"""The process id every machine's VMM has: nothing of the host enters a trace."""

FIRST_ADDRESS: Final = 0xFFFF_8880_0000_1000


class Board:
    """The chips of one machine and the lines between them."""

    pid = VMM_PID

    def __init__(
        self,
        clock: Clock,
        host: HostModel,
        recorder: Recorder,
        ports: UserSpace,
        min_timer_period_ns: int = MIN_TIMER_PERIOD_NS,
    ) -> None:
        self.clock = clock
        self.host = host
        self.recorder = recorder
        self.min_timer_period_ns = min_timer_period_ns
        self.queue = EventQueue()
        self.bus = IoBus()
        self.ports = ports
        self.delivery = IrqDelivery()
        self.routing = IrqRouting(recorder)
        self.notifiers = Notifiers(self.routing, recorder)
        self.irqfds = IrqFds(self.routing, self.notifiers)
        self.ioeventfds = IoEventFds()
        self.source_ids = IrqSourceIds()
        self.vcpus: list[Vcpu] = []
        self.running: Vcpu | None = None
        """Of several vCPUs the one whose turn it is."""
        self.pic: Pic | None = None
        self.ioapic: Ioapic | None = None
        self.pit: Pit | None = None
        self.apicv_inhibits = 0
        self.bsp_vcpu_id = 0
        self._objects = 0
        self._last_tid = VMM_PID

    def create_irqchip(self) -> None:
        """KVM_CREATE_IRQCHIP; the caller checks that there is none yet."""
        self.pic = Pic(self.recorder, self.notifiers, self._accepts_extint, self._raise_intr)
        self.pic.register(self.bus)
        self.ioapic = Ioapic(self.recorder, self.notifiers, self.delivery, self.clock, self.queue)
        self.delivery.eoi_target = self.ioapic
        self.routing.set_chips(self.pic, self.ioapic, self.delivery)

    def split_irqchip(self, reserved_pins: int) -> None:
        """KVM_CAP_SPLIT_IRQCHIP; the caller checks that there is no irqchip yet. GSIs below
        `reserved_pins` are those of user space's IOAPIC.
        """
        self.routing.set_split(self.delivery, reserved_pins)

    @property
    def irqchip_in_kernel(self) -> bool:
        """Local APICs are ours: with or without the PICs and the IOAPIC."""
        return self.routing.in_kernel

    def create_pit(self, flags: int) -> None:
        """KVM_CREATE_PIT2; whatever step fails, nothing stays registered and it is ENOMEM."""
        try:
            self.pit = create_pit(self, flags)
        except (KvmError, MemoryError) as failure:
            raise KvmError(errno.ENOMEM, "KVM_CREATE_PIT2", str(failure)) from failure

    def close(self) -> None:
        """Free the chips, as when the VM's last descriptor is closed."""
        if self.pit is not None:
            self.pit.free()
            self.pit = None
        self.irqfds.close()
        self.ioeventfds.close()

    # What chips and vCPUs ask of the board (PitBoard, VcpuBoard).

    def new_address(self) -> int:
        """A made-up kernel address, the same in every run."""
        self._objects += 1
        return FIRST_ADDRESS + 0x100 * self._objects

    def new_tid(self) -> int:
        """The next thread id of the VMM process."""
        self._last_tid += 1
        return self._last_tid

    def create_timer(self, function: Function, callback: Callable[[], HrTimerRestart]) -> HrTimer:
        """`hrtimer_setup(CLOCK_MONOTONIC, HRTIMER_MODE_ABS)`."""
        return HrTimer(
            self.clock,
            self.queue,
            self.host,
            self.recorder,
            function,
            self.new_address(),
            callback,
        )

    def create_worker(self, name: str) -> KthreadWorker:
        """`kthread_run_worker`."""
        return KthreadWorker(
            f"{name}-{self.new_tid()}",
            self.clock,
            self.queue,
            self.host,
            self.recorder,
            self.new_address(),
        )

    def set_apicv_inhibit(self, reason: ApicvInhibitReason, inhibit: bool) -> None:
        """`kvm_set_or_clear_apicv_inhibit`."""
        if inhibit:
            self.apicv_inhibits |= 1 << reason
        else:
            self.apicv_inhibits &= ~(1 << reason)
        self.recorder.kvm_apicv_inhibit_changed(reason, inhibit, self.apicv_inhibits)

    def migrate_pit_timer(self) -> None:
        """`__kvm_migrate_pit_timer`."""
        if self.pit is not None:
            self.pit.migrate_timer()

    def handled_vectors(self, lapic: Lapic) -> int:
        """`vcpu_scan_ioapic`: the vectors whose EOI the IOAPIC, ours or user space's, wants."""
        if self.ioapic is not None:
            return self.ioapic.handled_vectors(lapic)
        return self.routing.scan_routes(lapic)

    def mmio_read(self, gpa: int, size_bytes: int) -> int | None:
        """`kvm_io_bus_read(KVM_MMIO_BUS)`; None: no device there."""
        return None if self.ioapic is None else self.ioapic.mmio_read(gpa, size_bytes)

    def mmio_write(self, gpa: int, size_bytes: int, value: int) -> bool:
        """`kvm_io_bus_write(KVM_MMIO_BUS)`; False: no device there."""
        if self.ioapic is not None and self.ioapic.mmio_write(gpa, size_bytes, value):
            return True
        return self.ioeventfds.signal(False, gpa, size_bytes, value)

    def signal_ioeventfd(self, is_pio: bool, address: int, size_bytes: int, value: int) -> bool:
        """Whether an ioeventfd took the write."""
        return self.ioeventfds.signal(is_pio, address, size_bytes, value)

    def nmi_may_come(self) -> bool:
        """Something could send an NMI or an INIT to a vCPU that takes no interrupts."""
        if self.delivery.vapics_in_nmi_mode:
            return True
        messages = self.routing.messages()
        if self.ioapic is not None:
            messages += self.ioapic.messages()
        return any(irq.delivery_mode in (DM_NMI, DM_INIT) for irq in messages)

    def set_irq_line(self, gsi: int, level: int) -> None:
        """A device in user space drives a GSI (KVM_IRQ_LINE); without an irqchip nobody listens."""
        if self.irqchip_in_kernel:
            self.routing.set_irq(USERSPACE_IRQ_SOURCE_ID, gsi, level, False)

    def _accepts_extint(self) -> bool:
        return any(vcpu.accepts_extint() for vcpu in self.vcpus)

    def _raise_intr(self) -> None:
        """`pic_unlock`: the first vCPU that takes ExtINT looks at its events."""
        for vcpu in self.vcpus:
            if vcpu.accepts_extint():
                vcpu.request_event()
                return
