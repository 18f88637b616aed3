"""Record streams of a guest with local APICs, written by hand: one call a step.

The tasks have the names the machine gives them; so who sent what can be told.
"""

from stream import PERIOD_NS, PIT_FN, TIMER, WORK, WORK_FN, WORKER, Now

from kvmtick.ticks.life import TickAssembler
from kvmtick.ticks.report import TickReport
from kvmtick.ticks.tick import Tick
from kvmtick.ticks.verdict import Verdict
from kvmtick.trace.events import ApicvInhibitReason, Function
from kvmtick.trace.recorder import IDLE_TASK, Recorder

APIC_FN = int(Function.APIC_TIMER_FN)
FIXED, LOWEST, SMI, NMI, INIT, EXTINT = 0x000, 0x100, 0x200, 0x400, 0x500, 0x700
ENTRY = 0x40
"""A redirection entry: vector 0x40, fixed, edge, open."""
MASKED_ENTRY = 1 << 16
LEVEL_ENTRY = 1 << 15 | 0x40
REMOTE_IRR = 1 << 14
VECTOR = 0x40
IOAPIC_PIN = 2
TIMER_VECTOR = 0x50
APIC_TIMER = 0x400
LVTT, SPIV = 0x320, 0xF0


class ApicStream:
    """One PIT, some vCPUs with timers. Times are absolute, in ns."""

    def __init__(self, *, reinject: bool = True, vcpus: int = 2, keep: int = 1000) -> None:
        self.clock = Now(0)
        self.recorder = recorder = Recorder(self.clock)
        self.vmm = recorder.add_task("kvmtick-1000")
        self.worker = recorder.add_task("kvm-pit/1000-1001")
        self.vcpus = [recorder.add_task(f"CPU {n}/KVM-{1002 + n}") for n in range(vcpus)]
        self.assembler = TickAssembler(keep, recorder.tasks)
        recorder.add_consumer(self.assembler)
        self.expires_ns = 0
        self.timers_ns = [0] * vcpus
        recorder.task = self.vmm
        if reinject:
            recorder.kvm_apicv_inhibit_changed(ApicvInhibitReason.PIT_REINJ, True, 1 << 9)
        recorder.task = self.vcpus[0]
        self.write(0x20, 0x11)
        self.write(0x21, 0x20)
        self.write(0x21, 0x04)
        self.write(0x21, 0x01)
        self.write(0x21, 0xFF)

    # The guest.

    def on(self, vcpu: int, at: int | None = None) -> Recorder:
        """The recorder, as a vCPU's thread writes into it."""
        if at is not None:
            self.clock.now_ns = at
        self.recorder.task = self.vcpus[vcpu]
        return self.recorder

    def write(self, port: int, value: int, at: int | None = None, vcpu: int = 0) -> None:
        """OUT."""
        self.on(vcpu, at).kvm_pio(1, port, 1, 1, value)

    def program(self, at: int = 0) -> None:
        """The PIT is started."""
        recorder = self.on(0, at)
        self.expires_ns = at + PERIOD_NS
        recorder.hrtimer_start(TIMER, PIT_FN, self.expires_ns, False)

    def inject(self, at: int, vector: int = VECTOR, vcpu: int = 0) -> None:
        """A vector goes into the VMCS."""
        self.on(vcpu, at).kvm_inj_virq(vector, False, False)

    def inject_nmi(self, at: int, vcpu: int = 0, pending: int = 0) -> None:
        """An NMI goes into the VMCS."""
        self.on(vcpu, at).kvm_inj_nmi(vcpu, pending)

    def eoi(self, at: int, vector: int = VECTOR, vcpu: int = 0, pin: int | None = None) -> None:
        """The guest writes its local APIC's EOI; the IOAPIC hears of it for `pin`."""
        recorder = self.on(vcpu, at)
        recorder.kvm_eoi(vcpu, vector)
        if pin is not None:
            recorder.kvm_ack_irq(2, pin)

    def poll(self, at: int, vcpu: int = 0) -> None:
        """A poll that takes IRQ 0."""
        self.write(0x20, 0x0C, at, vcpu)
        self.recorder.kvm_ack_irq(0, 0)
        self.recorder.kvm_pio(0, 0x20, 1, 1, 0x80)

    def ipi(self, at: int, sender: int, vector: int, *targets: int, mode: int = FIXED) -> None:
        """A vCPU sends an interprocessor interrupt."""
        recorder = self.on(sender, at)
        recorder.kvm_apic_ipi(1 << 14 | mode | vector, targets[0] if targets else 9)
        for target in targets:
            recorder.kvm_apic_accept_irq(target, mode, 0, vector)

    # The host.

    def expire(self, *, queues: bool = True) -> Tick:
        """The PIT's timer expires; returns the tick."""
        recorder = self.recorder
        self.clock.now_ns = self.expires_ns
        recorder.task = IDLE_TASK
        recorder.enter_irq()
        recorder.hrtimer_expire_entry(TIMER, PIT_FN, self.clock.now_ns)
        if queues:
            recorder.sched_kthread_work_queue_work(WORK, WORK_FN, WORKER)
        self.expires_ns += PERIOD_NS
        recorder.hrtimer_start(TIMER, PIT_FN, self.expires_ns, False)
        recorder.flush()
        return self.assembler._pit.lives[-1]

    def work(self, at: int | None = None, *, pulses: bool = True) -> Recorder:
        """The worker runs, and pulses; what the chips make of it comes next."""
        if at is not None:
            self.clock.now_ns = at
        self.recorder.task = self.worker
        self.recorder.sched_kthread_work_execute_start(WORK, WORK_FN)
        if pulses:
            self.recorder.kvm_set_irq(0, 1, 2)
        return self.recorder

    def accept(self, vcpu: int = 0, vector: int = VECTOR, mode: int = FIXED) -> None:
        """A local APIC is sent a message by whoever runs now."""
        self.recorder.kvm_apic_accept_irq(vcpu, mode, 0, vector)

    def ioapic(
        self, *vcpus: int, entry: int = ENTRY, coalesced: bool = False, pin: int = IOAPIC_PIN
    ) -> None:
        """The IOAPIC's part of a pulse."""
        for vcpu in vcpus:
            self.accept(vcpu, entry & 0xFF, entry & 0x700)
        self.recorder.kvm_ioapic_set_irq(entry, pin, coalesced)

    def pic(self, *, imr: int = 0xFF, coalesced: bool = False) -> None:
        """The PIC's part of a pulse."""
        self.recorder.kvm_pic_set_irq(0, 0, 0, imr, coalesced)

    def msi(self, *vcpus: int, vector: int = VECTOR, mode: int = FIXED) -> None:
        """An MSI."""
        self.recorder.kvm_msi_set_irq(0xFEE0_0000, mode | vector)
        for vcpu in vcpus:
            self.accept(vcpu, vector, mode)

    def tick(self, *vcpus: int) -> Tick:
        """A whole expiry with a pulse into an open IOAPIC entry and a masked PIC."""
        tick = self.expire()
        self.work()
        self.ioapic(*vcpus)
        self.pic()
        return tick

    # The local APICs' timers.

    def arm(self, at: int = 0, vcpu: int = 0, after_ns: int = PERIOD_NS) -> None:
        """The guest starts its timer."""
        recorder = self.on(vcpu, at)
        self.timers_ns[vcpu] = at + after_ns
        recorder.hrtimer_start(APIC_TIMER + vcpu, APIC_FN, at + after_ns, False)

    def fire(self, vcpu: int = 0, *, restarts: bool = True) -> Tick:
        """A timer expires, in an interrupt that hits whoever runs; returns the tick."""
        recorder = self.recorder
        self.clock.now_ns = self.timers_ns[vcpu]
        task = recorder.enter_irq()
        recorder.hrtimer_expire_entry(APIC_TIMER + vcpu, APIC_FN, self.clock.now_ns)
        if restarts:
            self.timers_ns[vcpu] += PERIOD_NS
            recorder.hrtimer_start(APIC_TIMER + vcpu, APIC_FN, self.timers_ns[vcpu], False)
        recorder.task = task
        recorder.flush()
        return self.assembler._timers._timers[APIC_TIMER + vcpu].lives[-1]

    def serve(self, at: int, vcpu: int = 0, vector: int = TIMER_VECTOR) -> None:
        """A vCPU delivers its timer's expiry."""
        self.on(vcpu, at).kvm_apic_accept_irq(vcpu, FIXED, 0, vector)

    # The end.

    def reports(self) -> list[TickReport]:
        """What became of the ticks of every source so far."""
        self.recorder.flush()
        self.assembler.settle()
        reports = self.assembler.reports()
        for report in reports:
            assert sum(report.count(verdict) for verdict in Verdict) == report.expired
        return reports

    def report(self) -> TickReport:
        """As `reports`, of the main source."""
        self.reports()
        return self.assembler.report()
