"""The PIC pair against a reference written another way, over any history of the machine.

The reference keeps sets of pins and lists them by priority; it drives INTR after every change of a
line, which the model leaves out where it can.
"""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pc import ELCR1, ELCR2, MASTER, MASTER_DATA, SLAVE, SLAVE_DATA, Pc

from kvmtick.irqchip.i8259 import PicState
from kvmtick.trace.events import Event


class Chip:
    """One 8259A as sets of pins."""

    def __init__(self, number: int, level_capable: int) -> None:
        self.number = number
        self.level_capable = pins(level_capable)
        self.high: set[int] = set()  # edge sense latches
        self.requests: set[int] = set()
        self.masked: set[int] = set()
        self.in_service: set[int] = set()
        self.level: set[int] = set()
        self.lowest = 7
        self.base = 0
        self.reads_isr = self.polled = self.aeoi = self.rotates = self.sfnm = False
        self.expects: list[str] = []

    def by_priority(self) -> list[int]:
        return [(self.lowest + 1 + step) % 8 for step in range(8)]

    def winner(self) -> int | None:
        for pin in self.by_priority():
            if pin in self.in_service and not (self.sfnm and self.number == 0 and pin == 2):
                return None
            if pin in self.requests - self.masked:
                return pin
        return None

    def drive(self, pin: int, high: bool) -> int:
        answer = 1
        if high and (pin in self.level or pin not in self.high):
            answer = int(pin not in self.requests)
            self.requests.add(pin)
        if not high and pin in self.level:
            self.requests.discard(pin)
        (self.high.add if high else self.high.discard)(pin)
        return -1 if pin in self.masked else answer


class Reference:
    """Both chips, INTR, and who was acknowledged."""

    def __init__(self) -> None:
        self.chips = (Chip(0, 0xF8), Chip(1, 0xDE))
        self.intr = False
        self.acked: list[int] = []

    def update(self) -> None:
        master, slave = self.chips
        if slave.winner() is not None:
            master.drive(2, True)
            master.drive(2, False)
        self.intr = master.winner() is not None

    def line(self, gsi: int, high: bool) -> int:
        answer = self.chips[gsi // 8].drive(gsi % 8, high)
        self.update()
        return answer

    def end(self, chip: Chip, pin: int) -> None:
        chip.in_service.discard(pin)
        self.acked.append(chip.number * 8 + pin)

    def take(self, chip: Chip) -> int | None:
        pin = chip.winner()
        if pin is None:
            return None
        chip.in_service.add(pin)
        if pin not in chip.level:
            chip.requests.discard(pin)
        if chip.aeoi:
            if chip.rotates:
                chip.lowest = pin
            self.end(chip, pin)
        return pin

    def inta(self) -> int:
        master, slave = self.chips
        pin = self.take(master)
        if pin == 2:
            slave_pin = self.take(slave)
            vector = slave.base + (7 if slave_pin is None else slave_pin)
        else:
            vector = master.base + (7 if pin is None else pin)
        self.update()
        return vector

    def read(self, port: int) -> int:
        if port in (ELCR1, ELCR2):
            return bits(self.chips[port - ELCR1].level)
        chip = self.chips[port >= SLAVE]
        if chip.polled:
            chip.polled = False
            return self.poll(chip)
        if port & 1:
            return bits(chip.masked)
        return bits(chip.in_service if chip.reads_isr else chip.requests)

    def poll(self, chip: Chip) -> int:
        pin = chip.winner()
        if pin is None:
            self.update()
            return 7
        if chip.number:
            self.chips[0].in_service.discard(2)
            self.chips[0].requests.discard(2)
        chip.requests.discard(pin)
        self.end(chip, pin)
        if chip.number or pin != 2:
            self.update()
        return 0x80 + pin

    def write(self, port: int, value: int) -> None:
        if port in (ELCR1, ELCR2):
            chip = self.chips[port - ELCR1]
            chip.level = pins(value) & chip.level_capable
            return
        chip = self.chips[port >= SLAVE]
        if port & 1:
            self.write_data(chip, value)
        elif value & 0x10:
            self.initialise(chip, bool(value & 1))
        elif value & 0x08:
            chip.polled |= bool(value & 4)
            if value & 2:
                chip.reads_isr = bool(value & 1)
        else:
            self.command(chip, value >> 5, value & 7)

    def initialise(self, chip: Chip, icw4: bool) -> None:
        forgotten = sorted(chip.requests - chip.level)
        chip.requests &= chip.level
        chip.high, chip.masked = set(), set()
        chip.lowest, chip.reads_isr = 7, False
        chip.expects = ["base", "cascade"] + ["mode"] * icw4
        if not icw4:
            chip.aeoi = chip.sfnm = False
        for pin in forgotten:
            self.end(chip, pin)

    def write_data(self, chip: Chip, value: int) -> None:
        word = chip.expects.pop(0) if chip.expects else "mask"
        if word == "base":
            chip.base = value - value % 8
        elif word == "mode":
            chip.sfnm, chip.aeoi = bool(value & 0x10), bool(value & 0x02)
        elif word == "mask":
            chip.masked = pins(value)
            self.update()

    def command(self, chip: Chip, command: int, pin: int) -> None:
        rotate, specific, end = command & 4, command & 2, command & 1
        if not specific and not end:
            chip.rotates = bool(rotate)
            return
        if not specific:
            served = [each for each in chip.by_priority() if each in chip.in_service]
            if not served:
                return
            pin = served[0]
        elif not end and not rotate:
            return
        if rotate:
            chip.lowest = pin
        if end:
            self.end(chip, pin)
        self.update()


def pins(value: int) -> set[int]:
    return {pin for pin in range(8) if value >> pin & 1}


def bits(pins: set[int]) -> int:
    return sum(1 << pin for pin in pins)


PORTS = st.sampled_from([MASTER, MASTER_DATA, SLAVE, SLAVE_DATA, ELCR1, ELCR2])
PINS = st.one_of(st.integers(0, 15), st.sampled_from([2, 3, 9, 12]))
LINES = st.tuples(st.just("line"), PINS, st.integers(0, 1))
COMMANDS = st.sampled_from([0x00, 0x0A, 0x0B, 0x0C, 0x10, 0x11, 0x20, 0x80, 0xA0, 0xC3, 0xC5, 0xE4])
ICW4S = [0x01, 0x03, 0x11, 0x13]
STEPS = st.one_of(
    LINES,
    LINES,
    st.tuples(st.just("pulse"), PINS, st.just(0)),
    st.tuples(st.sampled_from(["inta", "inta", "eoi"]), st.just(0), st.just(0)),
    st.tuples(st.just("write"), PORTS, st.integers(0, 0xFF)),
    st.tuples(st.just("write"), st.sampled_from([MASTER, SLAVE]), COMMANDS),
    st.tuples(st.just("init"), st.sampled_from([MASTER, SLAVE]), st.sampled_from(ICW4S)),
    st.tuples(st.just("read"), PORTS, st.just(0)),
)


def agree(chip: PicState, reference: Chip) -> None:
    assert chip.irr == bits(reference.requests)
    assert chip.isr == bits(reference.in_service)
    assert chip.imr == bits(reference.masked)
    assert chip.elcr == bits(reference.level)
    assert chip.last_irr == bits(reference.high)
    assert chip.priority_add == (reference.lowest + 1) % 8
    assert chip.irq_base == reference.base
    assert bool(chip.init_state) == bool(reference.expects)


@settings(max_examples=200)
@given(
    st.sampled_from([None, *ICW4S]),
    st.lists(STEPS, max_size=60),
)
def test_any_history_agrees_with_the_reference(
    icw4: int | None, steps: list[tuple[str, int, int]]
) -> None:
    pc, reference = Pc(pit=None), Reference()

    def write(port: int, *values: int) -> None:
        for value in values:
            pc.out(port, value)
            reference.write(port, value)

    if icw4 is not None:
        steps = [("init", MASTER, icw4), ("init", SLAVE, icw4), *steps]
    for kind, where, value in steps:
        if kind == "line":
            assert pc.pic.set_irq(where, 0, value) == reference.line(where, bool(value))
        elif kind == "pulse":
            for level in (1, 0):
                assert pc.pic.set_irq(where, 0, level) == reference.line(where, bool(level))
        elif kind == "inta":
            if pc.pic.output:
                assert pc.pic.read_irq() == reference.inta()
        elif kind == "eoi":
            write(SLAVE, 0x20)
            write(MASTER, 0x20)
        elif kind == "init":
            write(where, 0x11)
            write(where + 1, 0x20 if where == MASTER else 0x28, 0x04, value)
        elif kind == "write":
            write(where, value)
        else:
            assert pc.inp(where) == reference.read(where)
        assert pc.pic.output == reference.intr
        for chip, other in zip(pc.chips, reference.chips, strict=True):
            agree(chip, other)
    acked = [record[4] for record in pc.records(Event.KVM_ACK_IRQ)]
    assert acked == reference.acked


@pytest.mark.parametrize("add", range(8))
def test_priority_counts_from_the_pin_after_the_lowest(add: int) -> None:
    chip = PicState(0, 0)
    chip.priority_add = add
    for mask in range(256):
        order = [step for step in range(8) if mask >> (add + step) % 8 & 1]
        assert chip.priority(mask) == (order[0] if order else 8)


@given(st.integers(0, 0xFF), st.integers(0, 0xFF))
def test_priority_takes_any_rotation_user_space_stored(add: int, mask: int) -> None:
    chip, reduced = PicState(0, 0), PicState(0, 0)
    chip.priority_add, reduced.priority_add = add, add % 8
    assert chip.priority(mask) == reduced.priority(mask)
