"""A vCPU over the scripted engine on the real board: kicks, windows, shadows, wake-up, EOI."""

from collections.abc import Iterator, Mapping

import pytest

from kvmtick.cpu.engine import INTR_INFO_VALID, ExitReason
from kvmtick.cpu.scripted import (
    Cli,
    Hlt,
    In,
    MovSs,
    Out,
    Program,
    Routine,
    ScriptedEngine,
    Spin,
    Sti,
)
from kvmtick.machine.board import Board
from kvmtick.machine.machine import Machine
from kvmtick.trace.events import Event, Record
from kvmtick.vcpu.vcpu import MpState, Vcpu

PERIOD_NS = 999_848
PLENTY = 1_000_000
IRQ0, IRQ1 = 0x20, 0x21


class Bench:
    """A machine whose guest is a routine; `log` is what its handlers and steps wrote down."""

    def __init__(self, guest: Routine, handlers: Mapping[int, Routine], detail: bool) -> None:
        self.machine = Machine(detail=detail)
        self.board: Board = self.machine.board
        self.board.create_irqchip()
        self.board.create_pit(0)
        self.engine = ScriptedEngine(guest, handlers)
        self.vcpu: Vcpu = self.machine.create_vcpu(self.engine)
        self.records: list[Record] = []
        self.machine.recorder.add_consumer(self.records.extend)

    def enter(self) -> ExitReason:
        return ExitReason(self.vcpu.enter(PLENTY))

    def pulse(self, gsi: int) -> None:
        for level in (1, 0):
            self.board.routing.set_irq(0, gsi, level)

    def events(self) -> list[Event]:
        self.machine.recorder.flush()
        return [Event(record[1]) for record in self.records]

    def injected(self) -> list[tuple[int, bool]]:
        self.machine.recorder.flush()
        return [(r[3], bool(r[5])) for r in self.records if r[1] == Event.KVM_INJ_VIRQ]


class Log(list[str]):
    """What happened, in order."""

    def handler(self, name: str, *ports: tuple[int, int]) -> Routine:
        def run() -> Program:
            self.append(name)
            for port, value in ports:
                yield Out(port, value)
            self.append(f"/{name}")

        return run


EOI = (0x20, 0x20)


def pic_init() -> Iterator[Out]:
    for port, value in ((0x20, 0x11), (0x21, 0x20), (0x21, 4), (0x21, 1)):
        yield Out(port, value)


def make(guest: Routine, handlers: Mapping[int, Routine], *, detail: bool = False) -> Bench:
    return Bench(guest, handlers, detail)


def test_an_interrupt_waits_out_the_sti_shadow() -> None:
    log = Log()

    def guest() -> Program:
        yield from pic_init()
        yield Cli()
        log.append("pulse")
        bench.pulse(0)
        yield Spin(5)
        yield Sti()
        log.append("shadow")
        yield Spin(1)
        log.append("after")
        yield Spin(1)
        yield Hlt()

    bench = make(guest, {IRQ0: log.handler("irq0", EOI)})
    reasons = [bench.enter() for _ in range(4)]
    assert log == ["pulse", "shadow", "irq0", "/irq0", "after"]
    assert reasons == [
        ExitReason.EXTERNAL_INTERRUPT,  # the kick
        ExitReason.INTERRUPT_WINDOW,  # after sti and one more instruction
        ExitReason.HLT,
        ExitReason.HLT,
    ]


def test_an_interrupt_waits_out_the_mov_ss_shadow() -> None:
    log = Log()

    def guest() -> Program:
        yield from pic_init()
        yield Sti()
        yield Spin(1)
        bench.pulse(0)
        yield MovSs()
        log.append("mov sp")
        yield Spin(1)
        log.append("after")
        yield Hlt()

    bench = make(guest, {IRQ0: log.handler("irq0", EOI)})
    while bench.enter() != ExitReason.HLT:
        pass
    assert log == ["mov sp", "irq0", "/irq0", "after"]


def test_a_kick_during_a_port_access_takes_effect_right_behind_it() -> None:
    log = Log()

    def guest() -> Program:
        yield from pic_init()
        yield Sti()
        yield Spin(10)
        log.append("out")
        yield Out(0x80, 1)
        log.append("behind")
        yield Hlt()

    bench = make(guest, {IRQ0: log.handler("irq0", EOI)})
    bench.machine.ports.handlers = {0x80: lambda *access: bench.pulse(0)}
    assert bench.enter() == ExitReason.EXTERNAL_INTERRUPT
    assert log == ["out"]
    assert bench.enter() == ExitReason.HLT
    assert log == ["out", "irq0", "/irq0", "behind"]


def test_an_eoi_that_makes_another_interrupt_pending_is_followed_by_it_at_once() -> None:
    log = Log()

    def first() -> Program:
        log.append("irq0")
        yield Out(*EOI)
        log.append("end of irq0")  # the scripted routine runs on to its IRET before IF is set
        yield Spin(1)

    def guest() -> Program:
        yield from pic_init()
        yield Cli()
        bench.pulse(0)
        bench.pulse(1)
        yield Sti()
        yield Spin(1)
        log.append("main")
        yield Hlt()

    bench = make(guest, {IRQ0: first, IRQ1: log.handler("irq1", EOI)})
    while bench.enter() != ExitReason.HLT:
        pass
    assert log == ["irq0", "end of irq0", "irq1", "/irq1", "main"]
    assert bench.injected() == [(IRQ0, False), (IRQ1, False)]


def test_an_automatic_eoi_that_makes_another_interrupt_pending_loses_neither() -> None:
    log = Log()

    def guest() -> Program:
        yield from pic_init()
        yield Out(0x20, 0x11)
        for port, value in ((0x21, 0x20), (0x21, 4), (0x21, 3)):
            yield Out(port, value)
        bench.pulse(0)
        bench.pulse(1)
        yield Sti()
        yield Spin(1)
        log.append("main")
        yield Spin(900)
        yield Hlt()

    bench = make(guest, {IRQ0: log.handler("irq0"), IRQ1: log.handler("irq1")})
    bench.machine.run(500)
    assert log == ["irq0", "/irq0", "irq1", "/irq1", "main"]
    assert bench.injected() == [(IRQ0, False), (IRQ1, False)]


def test_a_handler_that_sets_if_before_its_eoi_is_interrupted_by_a_higher_priority_only() -> None:
    log = Log()

    def low() -> Program:
        log.append("irq1")
        bench.pulse(1)
        bench.pulse(0)
        yield Sti()
        yield Spin(3)
        log.append("irq1 goes on")
        yield Out(*EOI)
        yield Spin(1)

    def guest() -> Program:
        yield from pic_init()
        yield Sti()
        yield Spin(1)
        bench.pulse(1)
        yield Spin(2)
        log.append("main")
        yield Cli()
        yield Hlt()

    bench = make(guest, {IRQ0: log.handler("irq0", EOI), IRQ1: low})
    for _ in range(12):
        if bench.enter() == ExitReason.HLT:
            break
    assert log[:4] == ["irq1", "irq0", "/irq0", "irq1 goes on"]
    assert log[4] == "irq1", "its own second request comes behind its EOI"


def test_hlt_stops_the_vcpu_and_an_interrupt_wakes_it() -> None:
    log = Log()

    def guest() -> Program:
        yield from pic_init()
        yield Sti()
        yield Hlt()
        log.append("awake")
        yield Hlt()

    bench = make(guest, {IRQ0: log.handler("irq0", EOI)})
    assert bench.enter() == ExitReason.HLT
    assert bench.vcpu.mp_state == MpState.HALTED
    assert bench.vcpu.mp_state_name() == "halted"
    assert not bench.vcpu.has_events()
    bench.pulse(0)
    assert bench.vcpu.has_events()
    bench.vcpu.mp_state = MpState.RUNNABLE
    bench.enter()
    assert log == ["irq0", "/irq0", "awake"]


def test_a_halted_vcpu_with_interrupts_off_wakes_for_an_nmi_only() -> None:
    log = Log()

    def guest() -> Program:
        yield Cli()
        yield Hlt()

    bench = make(guest, {2: log.handler("nmi")})
    assert bench.enter() == ExitReason.HLT
    bench.pulse(0)
    assert not bench.vcpu.has_events()
    bench.vcpu.queue_nmi()
    assert bench.vcpu.has_events()
    bench.vcpu.mp_state = MpState.RUNNABLE
    bench.enter()
    assert log == ["nmi", "/nmi"]


def test_nmis_two_pending_at_most_and_one_at_a_time() -> None:
    """kernel-contract section 5: KVM_NMI three times: 2 pending; in the handler 1, masked."""
    log = Log()

    def nmi() -> Program:
        log.append("nmi")
        yield Spin(5)
        log.append("iret")

    def guest() -> Program:
        yield Spin(100)
        yield Hlt()

    bench = make(guest, {2: nmi})
    for _ in range(3):
        bench.vcpu.queue_nmi()
    assert bench.vcpu.pending.nmi_pending == 2
    assert bench.vcpu.enter(3) == ExitReason.PREEMPTION_TIMER
    assert log == ["nmi"]
    for _ in range(3):
        bench.vcpu.queue_nmi()
    assert bench.vcpu.pending.nmi_pending == 1, "one is being handled, one more may wait"
    assert bench.enter() != ExitReason.HLT
    for _ in range(5):
        if bench.enter() == ExitReason.HLT:
            break
    assert log == ["nmi", "iret", "nmi", "iret"]


@pytest.mark.parametrize("cuts", [1, 2, 5])
def test_an_interrupt_whose_delivery_is_cut_short_is_injected_again_and_taken_once(
    cuts: int,
) -> None:
    log = Log()

    def guest() -> Program:
        yield from pic_init()
        yield Sti()
        yield Spin(1)
        bench.pulse(0)
        yield Spin(1)
        log.append("main")
        yield Hlt()

    bench = make(guest, {IRQ0: log.handler("irq0", EOI)})
    bench.engine.cut_short(cuts)
    for _ in range(cuts + 3):
        if bench.enter() == ExitReason.HLT:
            break
    assert log == ["irq0", "/irq0", "main"]
    assert bench.injected() == [(IRQ0, False)] + [(IRQ0, True)] * cuts
    assert bench.events().count(Event.KVM_ACK_IRQ) == 1, "acknowledged at the PIC once"


def test_an_nmi_whose_delivery_is_cut_short_is_taken_once() -> None:
    log = Log()

    def guest() -> Program:
        yield Spin(10)
        yield Hlt()

    bench = make(guest, {2: log.handler("nmi")})
    bench.engine.cut_short(2)
    bench.vcpu.queue_nmi()
    for _ in range(5):
        if bench.enter() == ExitReason.HLT:
            break
    assert log == ["nmi", "/nmi"]
    assert bench.injected() == []


def test_the_cut_event_is_seen_as_idt_vectoring_information() -> None:
    def guest() -> Program:
        yield Sti()
        yield Spin(1)
        bench.pulse(0)
        yield Spin(9)

    bench = make(guest, {0: Log().handler("irq0"), 8: Log().handler("?")})
    bench.engine.cut_short(1)
    assert bench.enter() == ExitReason.EXTERNAL_INTERRUPT
    bench.enter()
    assert bench.vcpu.vmcs.idt_vectoring_info == INTR_INFO_VALID | 0
    assert bench.vcpu.vmcs.entry_intr_info == 0, "every VM exit clears the entry field"


def test_a_deadline_that_a_port_write_brings_forward_ends_the_slice() -> None:
    """The guest programs 5 kHz in the middle of a long slice; the tick comes in time."""

    def guest() -> Program:
        yield Out(0x43, 0x34)
        yield Out(0x40, 0xEF)
        yield Out(0x40, 0x00)
        yield Spin(900_000)

    bench = make(guest, {})
    assert bench.enter() == ExitReason.EXTERNAL_INTERRUPT
    assert bench.machine.clock.now_ns == 3
    assert bench.board.queue.next_ns == 2 + 239 * 1_000_000_000 // 1193181


def test_migration_takes_the_timer_along_and_keeps_its_expiry() -> None:
    def guest() -> Program:
        yield Out(0x43, 0x34)
        yield Out(0x40, 0xA9)
        yield Out(0x40, 0x04)
        yield Spin(20)

    bench = make(guest, {})
    bench.enter()
    pit = bench.board.pit
    assert pit is not None
    expires_ns = pit.timer.expires_ns
    bench.vcpu.request_migrate_timer()
    bench.vcpu.enter(10)
    assert pit.timer.enqueued
    assert pit.timer.expires_ns == expires_ns
    assert bench.events()[-2:] == [Event.HRTIMER_CANCEL, Event.HRTIMER_START]


def test_details_tell_of_every_entry_and_exit() -> None:
    def guest() -> Program:
        yield Out(0x80, 1)
        yield In(0x80)
        yield Hlt()

    bench = make(guest, {}, detail=True)
    bench.enter()
    assert bench.events() == [
        Event.KVM_ENTRY,
        Event.KVM_EXIT,
        Event.KVM_PIO,
        Event.KVM_ENTRY,
        Event.KVM_EXIT,
        Event.KVM_PIO,
        Event.KVM_ENTRY,
        Event.KVM_EXIT,
    ]
    exits = [r for r in bench.records if r[1] == Event.KVM_EXIT]
    assert [r[4] for r in exits] == [30, 30, 12], "IO_INSTRUCTION twice, HLT"
    # exit qualification of a port access (SDM table 28-5): size - 1, bit 3 IN, port above
    assert [r[6] for r in exits][:2] == [0x80_0000, 0x80_0008]


def test_the_clock_moves_with_the_instructions() -> None:
    times: list[int] = []

    def guest() -> Program:
        for _ in range(3):
            yield Spin(100)
            times.append(bench.machine.clock.now_ns)
            yield Out(0x80, 0)
            times.append(bench.machine.clock.now_ns)
        yield Hlt()

    bench = make(guest, {})
    bench.enter()
    assert times[1::2] == [100, 201, 302], "during an access it is the access's time"
    assert bench.machine.clock.now_ns == bench.vcpu.instructions == 304
