"""Faults to plant in the model, one at a time, and a side of the fuzzer that has one."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from compiled import skip_where_patching_fails

from kvmtick.conform.fuzz.look import Seen
from kvmtick.conform.fuzz.operations import Operation
from kvmtick.conform.fuzz.search import Backends
from kvmtick.conform.fuzz.side import Config, Side
from kvmtick.irqchip.delivery import IrqDelivery
from kvmtick.irqchip.i8254 import Pit
from kvmtick.irqchip.i8259 import Pic, PicState
from kvmtick.irqchip.ioapic import REMOTE_IRR, Ioapic
from kvmtick.irqchip.irqfd import IrqFds
from kvmtick.irqchip.lapic import Lapic
from kvmtick.irqchip.lapic_timer import LapicTimer
from kvmtick.irqchip.notifiers import Notifiers
from kvmtick.irqchip.routing import IrqRouting
from kvmtick.kvm import Kvm
from kvmtick.kvm.api import System
from kvmtick.vcpu.events import PendingEvents


@dataclass(frozen=True)
class Fault:
    """`name` of a class or module becomes what `change` makes of it."""

    owner: object
    name: str
    change: Callable[[Any], Any]

    @contextmanager
    def planted(self) -> Iterator[None]:
        """The model has the fault. What is compiled cannot have one: the test is skipped."""
        skip_where_patching_fails()
        sound = getattr(self.owner, self.name)
        setattr(self.owner, self.name, self.change(sound))
        try:
            yield
        finally:
            setattr(self.owner, self.name, sound)


def nothing(_: Callable[..., Any]) -> Callable[..., None]:
    """It is forgotten."""
    return lambda *args, **kwargs: None


def _rotate_too_far(write: Callable[..., None]) -> Callable[..., None]:
    def wrong(self: Pic, chip: PicState, value: int) -> None:
        before = chip.priority_add
        write(self, chip, value)
        if chip.priority_add != before:
            chip.priority_add = chip.priority_add + 1 & 7

    return wrong


def _keep_remote_irr(update: Callable[..., None]) -> Callable[..., None]:
    def wrong(self: Ioapic, lapic: Lapic, pin: int, trig_mode_level: bool) -> None:
        before = self.redirtbl[pin] & REMOTE_IRR
        update(self, lapic, pin, trig_mode_level)
        self.redirtbl[pin] |= before

    return wrong


def _forget_the_line(update: Callable[..., None]) -> Callable[..., None]:
    def wrong(self: Ioapic, lapic: Lapic, pin: int, trig_mode_level: bool) -> None:
        lines, self.irr = self.irr, 0
        update(self, lapic, pin, trig_mode_level)
        self.irr = lines

    return wrong


def _keep_in_service(eoi: Callable[..., None]) -> Callable[..., None]:
    def wrong(self: Lapic) -> None:
        isr = self.isr
        eoi(self)
        self.isr = isr

    return wrong


def _always_edge(accept: Callable[..., Any]) -> Callable[..., Any]:
    def wrong(
        self: Lapic, mode: int, vector: int, level: int, trigger: bool, *rest: object
    ) -> object:
        return accept(self, mode, vector, level, False, *rest)

    return wrong


def _never_coalesced(set_irq: Callable[..., int]) -> Callable[..., int]:
    return lambda *args, **kwargs: set_irq(*args, **kwargs) or 1


def _next_pin(set_irq: Callable[..., int]) -> Callable[..., int]:
    return lambda self, pin, *args: set_irq(self, (pin + 1) % 24, *args)


def _one_destination(deliver: Callable[..., int]) -> Callable[..., int]:
    return lambda *args: min(1, deliver(*args))


def _reset_at_init(reset: Callable[..., None]) -> Callable[..., None]:
    return lambda self, init_event: reset(self, False)


def _any_base(set_base: Callable[..., bool]) -> Callable[..., bool]:
    def wrong(self: Lapic, value: int, host_initiated: bool = False) -> bool:
        set_base(self, value, host_initiated)
        return True

    return wrong


FAULTS = {
    "a lost acknowledgement": Fault(Notifiers, "notify_acked_irq", nothing),
    "a wrong rotation": Fault(Pic, "_write_ocw2", _rotate_too_far),
    "a stuck remote IRR": Fault(Ioapic, "_update_eoi_of", _keep_remote_irr),
    "a level line forgotten": Fault(Ioapic, "_update_eoi_of", _forget_the_line),
    "a PIC's ISR not cleared": Fault(Pic, "_end_service", nothing),
    "a local APIC's ISR not cleared": Fault(Lapic, "eoi", _keep_in_service),
    "PPR not brought up to date": Fault(Lapic, "_update_ppr", nothing),
    "TMR never set": Fault(Lapic, "accept_irq", _always_edge),
    "a coalesced request told as delivered": Fault(IrqRouting, "set_irq", _never_coalesced),
    "lines that lead to the next pin": Fault(Ioapic, "set_irq", _next_pin),
    "one destination counted": Fault(IrqDelivery, "deliver", _one_destination),
    "three NMIs that wait": Fault(PendingEvents, "nmi_limit", lambda _: lambda *args: 3),
    "INIT as a reset": Fault(Lapic, "reset", _reset_at_init),
    "no IA32_APIC_BASE refused": Fault(Lapic, "set_base", _any_base),
    "a status not latched": Fault(Pit, "_latch_status", nothing),
    "a tick that is not pulsed": Fault(Pit, "do_work", nothing),
    "an irqfd that is not looked at": Fault(IrqFds, "poll", lambda _: lambda self: False),
}


def _ignore_the_acknowledgement(work: Callable[..., None]) -> Callable[..., None]:
    def wrong(self: Pit) -> None:
        self.irq_ack = True
        work(self)

    return wrong


def _drift(timer_fn: Callable[..., Any]) -> Callable[..., Any]:
    def wrong(self: Pit) -> Any:
        self.period_ns += 100_000
        try:
            return timer_fn(self)
        finally:
            self.period_ns -= 100_000

    return wrong


def _any_period_of_the_pit(start: Callable[..., None]) -> Callable[..., None]:
    def wrong(self: Pit, count: int, periodic: bool) -> None:
        board = self._board
        least_ns, board.min_timer_period_ns = board.min_timer_period_ns, 0
        start(self, count, periodic)
        board.min_timer_period_ns = least_ns

    return wrong


CONFORM_FAULTS = {
    "a PIT without the least period": (
        Fault(Pit, "_start_timer", _any_period_of_the_pit),
        "pit.short-periods-are-clamped",
    ),
    "a local APIC's timer without the least period": (
        Fault(LapicTimer, "_limit_period", nothing),
        "timer.short-period-is-raised",
    ),
    "ticks kept at the unmask": (Fault(Pit, "mask_changed", nothing), "reinject.unmask-drops"),
    "ticks kept at a new count": (Fault(Pit, "reset_reinject", nothing), "reinject.reload-drops"),
    "ticks that wait for nothing": (
        Fault(Pit, "do_work", _ignore_the_acknowledgement),
        "reinject.no-eoi-no-pulse",
    ),
    "a period that is too long": (Fault(Pit, "timer_fn", _drift), "pit.period"),
    "no NMI watchdog": (
        Fault(IrqDelivery, "deliver_nmi_watchdog", nothing),
        "nmi-watchdog.every-period-has-one-*",
    ),
}
"""Faults of ticks in time, and the conformance cases that find them."""


class FaultySide(Side):
    """A side that has a fault whenever it is its turn."""

    def __init__(self, system: System, config: Config, fault: Fault) -> None:
        super().__init__(system, config)
        self.fault = fault

    def step(self, operation: Operation) -> Seen:
        with self.fault.planted():
            return super().step(operation)


def faulty(fault: Fault, reference: System) -> Backends:
    """The model with a fault, and what it is compared with."""
    skip_where_patching_fails()
    model = Kvm("model")
    return Backends(
        ("faulty model", reference.backend),
        (lambda config: FaultySide(model, config, fault), lambda config: Side(reference, config)),
    )
