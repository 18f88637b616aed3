"""Record streams written by hand: what the kernel would trace, one call a step."""

from kvmtick.ticks.life import TickAssembler
from kvmtick.ticks.report import TickReport
from kvmtick.ticks.tick import Tick
from kvmtick.ticks.verdict import Verdict
from kvmtick.trace.events import ApicvInhibitReason, Function
from kvmtick.trace.recorder import Now, Recorder

PERIOD_NS = 1_000_000
TIMER, WORK, WORKER = 0x300, 0x200, 0x100
PIT_FN, WORK_FN = int(Function.PIT_TIMER_FN), int(Function.PIT_DO_WORK)


class Stream:
    """A guest with one PIT, whose trace is written step by step. Times are absolute, in ns."""

    def __init__(self, *, reinject: bool = True, period_ns: int | None = PERIOD_NS) -> None:
        """`period_ns` None: one shot."""
        self.clock = Now(0)
        self.recorder = Recorder(self.clock)
        self.assembler = TickAssembler()
        self.recorder.add_consumer(self.assembler)
        self.period_ns = period_ns
        self.expires_ns = 0
        self.imr = 0
        if reinject:
            self.reinject_control(True)
        self.write(0x20, 0x11)
        self.write(0x21, 0x20)

    # What the guest does.

    def write(self, port: int, value: int) -> None:
        """OUT."""
        self.recorder.kvm_pio(1, port, 1, 1, value)

    def program(self, at: int = 0) -> None:
        """A completed count starts the timer."""
        self.clock.now_ns = at
        self.expires_ns = at + (self.period_ns or PERIOD_NS)
        self.recorder.hrtimer_start(TIMER, PIT_FN, self.expires_ns, False)

    def eoi(self, at: int) -> None:
        """A non-specific EOI that ends IRQ 0."""
        self.clock.now_ns = at
        self.write(0x20, 0x20)
        self.recorder.kvm_ack_irq(0, 0)

    def poll(self, at: int) -> None:
        """A poll that takes IRQ 0."""
        self.clock.now_ns = at
        self.write(0x20, 0x0C)
        self.recorder.kvm_ack_irq(0, 0)
        self.recorder.kvm_pio(0, 0x20, 1, 1, 0x80)

    def inject_auto_eoi(self, at: int) -> None:
        """The interrupt is taken in AEOI mode."""
        self.clock.now_ns = at
        self.recorder.kvm_ack_irq(0, 0)
        self.recorder.kvm_inj_virq(0x20, False, False)

    # What the host does.

    def expire(self, late_ns: int = 0, queues: bool = True) -> Tick:
        """As `fire`; returns the tick."""
        self.fire(late_ns, queues)
        self.recorder.flush()
        return self.assembler.main.lives[-1]

    def fire(self, late_ns: int = 0, queues: bool = True) -> None:
        """The timer expires, `late_ns` after its time; the work is queued unless it is already."""
        self.clock.now_ns = self.expires_ns + late_ns
        task = self.recorder.enter_irq()
        self.recorder.hrtimer_expire_entry(TIMER, PIT_FN, self.clock.now_ns)
        if queues:
            self.queue()
        if self.period_ns is not None:
            self.expires_ns += self.period_ns
            self.recorder.hrtimer_start(TIMER, PIT_FN, self.expires_ns, False)
        self.recorder.task = task

    def queue(self) -> None:
        """kthread_queue_work."""
        self.recorder.sched_kthread_work_queue_work(WORK, WORK_FN, WORKER)

    def work(self, at: int, *, pulses: bool = True, coalesced: bool = False) -> None:
        """The worker runs; `pulses` unless the last pulse was not acknowledged."""
        self.clock.now_ns = at
        self.recorder.sched_kthread_work_execute_start(WORK, WORK_FN)
        if pulses:
            self.pulse(coalesced=coalesced)

    def pulse(self, *, source: int = 2, coalesced: bool = False) -> None:
        """GSI 0 goes up and down."""
        self.recorder.kvm_set_irq(0, 1, source)
        self.recorder.kvm_ioapic_set_irq(0x10000, 0, False)
        self.recorder.kvm_pic_set_irq(0, 0, 0, self.imr, coalesced)
        self.recorder.kvm_set_irq(0, 0, source)
        self.recorder.kvm_pic_set_irq(0, 0, 0, self.imr, False)

    def inject(self, at: int, vector: int = 0x20, *, reinjected: bool = False) -> None:
        """The vector goes into the VMCS."""
        self.clock.now_ns = at
        self.recorder.kvm_inj_virq(vector, False, reinjected)

    def reset_reinject(self, at: int, pending: int) -> None:
        """The PIT forgets `pending` expiries."""
        self.clock.now_ns = at
        self.recorder.kvm_pit_reset_reinject(pending)

    def reinject_control(self, on: bool, at: int | None = None) -> None:
        """KVM_REINJECT_CONTROL."""
        if at is not None:
            self.clock.now_ns = at
        self.recorder.kvm_apicv_inhibit_changed(
            ApicvInhibitReason.PIT_REINJ, on, int(on) << ApicvInhibitReason.PIT_REINJ
        )

    # The end.

    def report(self) -> TickReport:
        """What became of the ticks so far."""
        self.recorder.flush()
        self.assembler.settle()
        report = self.assembler.report()
        assert sum(report.count(verdict) for verdict in Verdict) == report.expired
        return report
