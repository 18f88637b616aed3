"""A second opinion on every tick, from the chips themselves instead of from their trace.

A scripted guest and user space do what a script says, on the real board. Spies sit where the board
lets one be put: the timer's and the work item's callbacks, the routing's way to the PIC, the
engine's port handlers and its interrupt vectors. What a tick's verdict must be follows from what
they saw and from the chips' registers; neither the recorder nor the assembler is asked.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from kvmtick.abi.structs import kvm_pic_state
from kvmtick.cpu.engine import PortIn, PortOut
from kvmtick.cpu.scripted import (
    Cli,
    Hlt,
    In,
    Out,
    Program,
    Routine,
    ScriptedEngine,
    Spin,
    Sti,
)
from kvmtick.irqchip.i8254 import Pit
from kvmtick.irqchip.i8259 import Pic
from kvmtick.irqchip.routing import IrqTarget
from kvmtick.kvm.model import ModelVm
from kvmtick.ticks.life import TickAssembler
from kvmtick.ticks.tick import Tick
from kvmtick.ticks.verdict import Verdict, Where
from kvmtick.timing.hrtimer import HrTimerRestart
from kvmtick.trace.events import Record

Step = tuple[object, ...]
"""A step of a script: a name and what it needs; see `guest_step` and `Rig.do`."""

BASE = 0x20
PIT_SOURCE = 2
RW_WORD0 = 3
"""The next byte is the low one of two: it loads nothing yet."""
CONTROL_LOHI = 0x30


@dataclass
class Seen:
    """What happened to one expiry."""

    index: int
    expiry_ns: int
    fired_ns: int
    period_ns: int | None = None
    merged_in_worker: bool = False
    count_reset: bool = False
    passed_by: bool = False
    reinjected: bool = False
    pulse_ns: int | None = None
    masked: bool = False
    coalesced: bool = False
    request_lost: bool = False
    reach_ns: int | None = None

    @property
    def verdict(self) -> Verdict:
        """DESIGN.md section 2: the first that matches."""
        if self.count_reset:
            return Verdict.DROPPED
        if self.reinjected:
            return Verdict.REINJECTED
        if self.masked:
            return Verdict.MASKED
        if self.merged_in_worker or self.coalesced:
            return Verdict.COALESCED
        if self.request_lost:
            return Verdict.DROPPED
        if self.reach_ns is None:
            return Verdict.OUTSTANDING
        if self.period_ns is None or self.reach_ns < self.expiry_ns + self.period_ns:
            return Verdict.DELIVERED
        return Verdict.LATE

    @property
    def where(self) -> Where | None:
        """Where a tick that did not come through ended."""
        if self.verdict is Verdict.COALESCED and self.merged_in_worker:
            return Where.WORKER
        in_pic = self.masked or self.coalesced or self.request_lost
        return Where.PIC if in_pic and self.verdict is not Verdict.REINJECTED else None


@dataclass
class Oracle(IrqTarget):
    """Watches the board of `vm`; `seen` holds all expiries in order."""

    vm: ModelVm
    seen: list[Seen] = field(default_factory=list)
    unpulsed: list[Seen] = field(default_factory=list)
    latched: Seen | None = None
    """Whose the PIC's request of IRQ 0 is; None if nobody's we know."""
    injections: int = 0
    polls: int = 0
    extra: int = 0
    pulses: int = 0
    stolen: bool = False
    """An acknowledgement that was not a tick's own took a tick's count: from here on only numbers
    can be compared, for which tick lost its count is a matter of words."""
    tampered: bool = False
    """User space set or cleared IRQ 0's request itself; no trace tells of it."""
    worker_ns: int = 0

    def __post_init__(self) -> None:
        pit = self.pit
        pit.timer.callback = partial(self.on_expiry, pit.timer.callback)
        pit.work.callback = partial(self.on_work, pit.work.callback)
        ioapic = self.vm.machine.board.ioapic
        assert ioapic is not None
        self.vm.machine.board.routing.set_default(self, ioapic)

    @property
    def pit(self) -> Pit:
        pit = self.vm.machine.board.pit
        assert pit is not None
        return pit

    @property
    def pic(self) -> Pic:
        pic = self.vm.machine.board.pic
        assert pic is not None
        return pic

    @property
    def now_ns(self) -> int:
        return self.vm.machine.clock.now_ns

    @property
    def requested(self) -> int:
        return self.pic.master.irr & 1

    def owed(self) -> int:
        """How many pulses are still to come if the timer never expires again."""
        pit = self.pit
        if not pit.reinject:
            return int(pit.work.queued)
        if pit.irq_ack:
            return max(1, pit.pending) if pit.work.queued else 0
        return max(0, pit.pending - 1)

    def look(self) -> None:
        """Between two events: are all that wait still owed a pulse?"""
        if not self.pit.work.queued and len(self.unpulsed) > self.owed():
            self.stolen = True

    # Timer, worker, line.

    def on_expiry(self, callback: Callable[[], HrTimerRestart]) -> HrTimerRestart:
        self.look()
        pit = self.pit
        tick = Seen(len(self.seen) + 1, pit.timer.expires_ns, self.now_ns)
        self.seen.append(tick)
        tick.merged_in_worker = pit.work.queued and not pit.reinject
        restart = callback()
        tick.period_ns = pit.period_ns if pit.is_periodic else None
        if not tick.merged_in_worker:
            self.unpulsed.append(tick)
        return restart

    def on_work(self, callback: Callable[[], None]) -> None:
        self.worker_ns = self.now_ns
        pit = self.pit
        pulses, may_pulse = self.pulses, pit.irq_ack or not pit.reinject
        callback()
        assert self.pulses == pulses + may_pulse
        if not may_pulse:
            for tick in self.unpulsed:
                tick.passed_by = True

    # In the routing table the oracle stands where the PIC would.

    def set_irq(self, pin: int, irq_source_id: int, level: int, line_status: bool = False) -> int:
        before = self.requested
        result = self.pic.set_irq(pin, irq_source_id, level, line_status)
        if level:
            self.on_rise(pin, irq_source_id, before)
        return result

    def pulse(self, pin: int, irq_source_id: int) -> None:
        before = self.requested
        self.pic.pulse(pin, irq_source_id)
        self.on_rise(pin, irq_source_id, before)

    def on_rise(self, pin: int, source: int, before: int) -> None:
        if pin:
            return
        is_new = self.requested and not before
        tick = None
        if source == PIT_SOURCE:
            self.pulses += 1
            assert self.unpulsed, "a pulse that is no tick's"
            tick = self.unpulsed.pop(0)
            tick.pulse_ns = self.worker_ns
            tick.reinjected = tick.passed_by and self.pit.reinject
            masked = bool(self.pic.master.imr & 1)
            tick.masked = masked and not is_new
            tick.coalesced = not masked and not is_new
        if is_new:
            self.latched = tick

    def reset(self) -> None:
        """The counts were thrown away: work that is queued pulses once more, then none is owed."""
        keep = 1 if self.pit.work.queued else 0
        for tick in self.unpulsed[keep:]:
            tick.count_reset = True
        del self.unpulsed[keep:]

    # The guest.

    def on_out(self, out: PortOut, port: int, size: int, value: int, retired: int) -> None:
        master, channel = self.pic.master, self.pit.channels[0]
        requested, imr, state = self.requested, master.imr, channel.write_state
        out(port, size, value, retired)
        if port == 0x20 and requested and not self.requested:  # ICW1
            if self.latched is not None:
                self.latched.request_lost = self.latched.reach_ns is None
            self.latched = None
        elif self.pit.reinject:
            unmasked = port == 0x21 and imr & 1 and not master.imr & 1
            loaded = port == 0x40 and state != RW_WORD0 and channel.mode <= 4
            if unmasked or loaded:
                self.reset()
        self.look()

    def on_in(self, read: PortIn, port: int, size: int, retired: int) -> int:
        polled = self.pic.master.poll and port in (0x20, 0x21)
        value = read(port, size, retired)
        if polled and value == 0x80:
            self.polls += 1
            self.reach()
        self.look()
        return value

    def on_vector(self, vector: int) -> None:
        self.injections += 1
        # A handler that meddles with an initialisation under way can move the vectors.
        if vector != self.pic.master.irq_base or not self.reach():
            self.extra += 1
        self.look()

    def reach(self) -> bool:
        tick, self.latched = self.latched, None
        if tick is not None:
            tick.reach_ns = self.now_ns
        return tick is not None


class SpiedEngine(ScriptedEngine):
    """A scripted CPU whose port accesses and interrupts the oracle sees."""

    oracle: Oracle

    def __init__(self, main: Sequence[Step], handler: Sequence[str]) -> None:
        self.answers = list(handler)
        vectors = {vector: partial(self.handle, vector) for vector in range(256)}
        super().__init__(partial(guest, main), vectors)

    def attach(self, on_out: PortOut, on_in: PortIn, *others: Any) -> None:
        super().attach(
            lambda *access: self.oracle.on_out(on_out, *access),
            lambda *access: self.oracle.on_in(on_in, *access),
            *others,
        )

    def handle(self, vector: int) -> Program:
        """Called when the event is delivered; the program runs after that."""
        self.oracle.on_vector(vector)
        answer = self.answers.pop(0) if self.answers else "eoi"
        return run_steps(HANDLERS[answer if vector == BASE else "eoi"])


HANDLERS: dict[str, list[Step]] = {
    "eoi": [("out", 0x20, 0x20)],
    "none": [],
    "slow": [("spin", 700_000), ("out", 0x20, 0x20)],
    "late": [("out", 0x20, 0x20), ("spin", 1_500_000)],
    "specific": [("out", 0x20, 0x60)],
    "poll": [("out", 0x20, 0x20), ("poll",)],
    "nested": [("out", 0x20, 0x20), ("sti",), ("spin", 400_000)],
    "twice": [("out", 0x20, 0x60), ("out", 0x20, 0x60)],
    "mask": [("out", 0x21, 0x01), ("out", 0x20, 0x20)],
}


def guest(steps: Iterable[Step]) -> Program:
    """A guest: the PICs and 1 kHz, the steps, then HLT with interrupts on."""
    yield from run_steps([("init", 0x01), ("pit", 2, 1193), ("sti",), *steps])
    while True:
        yield Sti()
        yield Hlt()


def run_steps(steps: Iterable[Step]) -> Program:
    """The steps, one after the other."""
    for step in steps:
        yield from guest_step(step)


def guest_step(step: Step) -> Program:
    """A guest's step as instructions."""
    name, *numbers = step
    values = [int(str(number)) for number in numbers]
    if name == "out":
        yield Out(values[0], values[1])
    elif name == "spin":
        yield Spin(values[0])
    elif name == "masked":
        yield Out(0x21, 0x01)
        yield Spin(values[0])
        yield Out(0x21, 0x00)
    elif name == "deaf":
        yield Cli()
        yield Spin(values[0])
        yield Sti()
    elif name == "poll":
        yield Out(0x20, 0x0C)
        yield In(0x20)
    elif name == "init":
        for port, value in ((0x20, 0x11), (0x21, BASE), (0x21, 4), (0x21, values[0])):
            yield Out(port, value)
    elif name == "pit":
        mode, count = values
        yield Out(0x43, CONTROL_LOHI | mode << 1)
        yield Out(0x40, count & 0xFF)
        yield Out(0x40, count >> 8)
    else:
        plain: dict[str, type[Cli | Sti | Hlt]] = {"cli": Cli, "sti": Sti, "hlt": Hlt}
        yield plain[str(name)]()


class Rig:
    """A model VM with a scripted guest, the oracle, and a second assembler fed record by record."""

    def __init__(self, main: Sequence[Step], handler: Sequence[str], seed: int = 0) -> None:
        self.engine = SpiedEngine(main, handler)
        self.vm = ModelVm(seed=seed, engine=lambda: self.engine)
        self.vm.create_irqchip()
        self.vm.create_pit2()
        self.oracle = self.engine.oracle = Oracle(self.vm)
        self.singly = TickAssembler()
        self.vm.machine.recorder.add_consumer(self.feed_singly)
        # The second assembler begins where the first does: with the PIT's creation.
        self.singly._pit._reinject = True
        self.vm.create_vcpu(0)
        self.runs = 0

    def feed_singly(self, batch: list[Record]) -> None:
        for record in batch:
            self.singly([record])

    def do(self, step: Step) -> None:
        """A step of user space or of the host."""
        name, *values = step
        if name == "run":
            self.runs += 1
            self.vm.run(for_ns=int(str(values[0])))
        elif name == "fault":
            self.vm.machine.host.set_fault(str(values[0]), values[1] and str(values[1]))  # type: ignore[arg-type]
        elif name == "off":
            self.vm.machine.take_vcpu_off(int(str(values[0])))
        elif name == "migrate":
            assert self.vm.machine.vcpu is not None
            self.vm.machine.vcpu.request_migrate_timer()
        elif name == "line":
            self.vm.irq_line(int(str(values[0])), 1)
            self.vm.irq_line(int(str(values[0])), 0)
        elif name == "reinject":
            if bool(values[0]) != self.oracle.pit.reinject:
                self.vm.reinject_control(bool(values[0]))
                self.oracle.reset()
        elif name == "set_pit2":
            self.vm.set_pit2(self.vm.get_pit2())
            if self.oracle.pit.reinject and self.oracle.pit.channels[0].mode <= 4:
                self.oracle.reset()
        elif name == "set_irqchip":
            self.set_irqchip(str(values[0]), int(str(values[1])))
        else:
            raise AssertionError(f"no such step: {step}")
        self.oracle.look()

    def set_irqchip(self, field_name: str, value: int) -> None:
        chip = self.vm.get_irqchip(0)
        state: kvm_pic_state = chip.chip.pic
        if field_name == "irr":
            self.oracle.tampered |= bool((state.irr ^ value) & 1)
        setattr(state, field_name, value)
        self.vm.set_irqchip(chip)

    def lives(self) -> list[Tick]:
        """All lives; none may have been forgotten."""
        lives = list(self.vm.ticks())
        assert len(lives) == len(self.oracle.seen)
        return lives

    def close(self) -> None:
        self.vm.close()


__all__ = ["BASE", "HANDLERS", "Oracle", "Rig", "Routine", "Seen", "SpiedEngine", "Step"]
