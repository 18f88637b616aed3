"""The PC's wiring: which chip hangs on which line, who shares the clock, the bus and the recorder.

The calls that build it are KVM's: `create_irqchip` makes the PICs, the IOAPIC and the default
routing (kvm_create_irqchip), `create_pit` the PIT (kvm_create_pit).
"""

import errno
from collections.abc import Callable

from kvmtick.abi.errors import KvmError
from kvmtick.irqchip.i8254 import Pit, create_pit
from kvmtick.irqchip.i8259 import Pic
from kvmtick.irqchip.ioapic import Ioapic
from kvmtick.irqchip.iobus import IoBus
from kvmtick.irqchip.notifiers import Notifiers
from kvmtick.irqchip.routing import IrqRouting, IrqSourceIds
from kvmtick.timing.clock import Clock
from kvmtick.timing.host import HostModel
from kvmtick.timing.hrtimer import HrTimer, HrTimerRestart
from kvmtick.timing.kthread import KthreadWorker
from kvmtick.timing.queue import EventQueue
from kvmtick.trace.events import ApicvInhibitReason, Function
from kvmtick.trace.recorder import Recorder
from kvmtick.vcpu.vcpu import UserPorts, Vcpu

__all__ = ["VMM_PID", "Board"]

VMM_PID = 1000
"""The process id every machine's VMM has: nothing of the host enters a trace."""

FIRST_ADDRESS = 0xFFFF_8880_0000_1000


class Board:
    """The chips of one machine and the lines between them."""

    pid = VMM_PID

    def __init__(
        self,
        clock: Clock,
        host: HostModel,
        recorder: Recorder,
        ports: UserPorts,
    ) -> None:
        self.clock = clock
        self.host = host
        self.recorder = recorder
        self.queue = EventQueue()
        self.bus = IoBus()
        self.ports = ports
        self.routing = IrqRouting(recorder)
        self.notifiers = Notifiers(self.routing, recorder)
        self.source_ids = IrqSourceIds()
        self.vcpus: list[Vcpu] = []
        self.pic: Pic | None = None
        self.ioapic: Ioapic | None = None
        self.pit: Pit | None = None
        self.apicv_inhibits = 0
        self._objects = 0
        self._last_tid = VMM_PID

    def create_irqchip(self) -> None:
        """KVM_CREATE_IRQCHIP; the caller checks that there is none yet."""
        self.pic = Pic(self.recorder, self.notifiers, self._accepts_extint, self._raise_intr)
        self.pic.register(self.bus)
        self.ioapic = Ioapic(self.recorder)
        self.routing.set_default(self.pic, self.ioapic)

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

    def _accepts_extint(self) -> bool:
        return any(vcpu.accepts_extint() for vcpu in self.vcpus)

    def _raise_intr(self) -> None:
        """`pic_unlock`: the first vCPU that takes ExtINT looks at its events."""
        for vcpu in self.vcpus:
            if vcpu.accepts_extint():
                vcpu.request_event()
                return
