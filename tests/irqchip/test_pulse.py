"""A pulse is `set_irq` to 1 and then to 0, whatever state the chips are in."""

from apics import LEVEL, MASK, REMOTE_IRR, Apics
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvmtick.irqchip.i8259 import Pic
from kvmtick.irqchip.notifiers import Notifiers
from kvmtick.irqchip.routing import IrqRouting
from kvmtick.timing.clock import VirtualClock
from kvmtick.trace.events import Record
from kvmtick.trace.recorder import Recorder

states = st.binary(min_size=16, max_size=16)
few_bits = st.sampled_from([0, 0, 0, 0, 0, 1, 4, 0x80])
sources = st.integers(0, 2)


class Chips:
    """A PIC pair that counts how often INTR rose."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.raised = 0
        recorder = Recorder(VirtualClock())
        recorder.add_consumer(self.records.extend)
        self.recorder = recorder
        routing = IrqRouting(recorder)
        self.pic = Pic(recorder, Notifiers(routing, recorder), lambda: True, self._raise)

    def _raise(self) -> None:
        self.raised += 1

    def facts(self) -> object:
        self.recorder.flush()
        pic = self.pic
        return (
            self.records,
            self.raised,
            pic.master.save(),
            pic.slave.save(),
            pic.irq_states,
            pic.output,
            pic._stale,
        )


def prepared(master: bytes, slave: bytes, held: bool, output: bool, icw1: bool, pin: int) -> Chips:
    chips = Chips()
    pic = chips.pic
    pic.master.restore(master)
    pic.slave.restore(slave)
    pic.output = output
    if icw1:
        pic.io_write(0x20, 1, 0x11)
    if held:
        pic.irq_states[pin] = 1
    return chips


def sparse(fields: tuple[int, int, int, int, int]) -> bytes:
    """A PIC state in which little is set, so that the short way is taken too."""
    last_irr, irr, imr, isr, elcr = fields
    state = bytearray(16)
    state[0], state[1], state[2], state[3], state[14], state[15] = (
        last_irr, irr, imr, isr, elcr, 0xFF,
    )  # fmt: skip
    return bytes(state)


pic_states = st.one_of(
    states, st.tuples(few_bits, few_bits, few_bits, few_bits, few_bits).map(sparse)
)


@example(
    master=sparse((4, 0, 0, 0, 0)),
    slave=sparse((0, 1, 0, 0, 0)),
    held=False,
    output=False,
    icw1=False,
    pin=0,
    source=2,
)
@settings(max_examples=500, deadline=None)
@given(
    master=pic_states,
    slave=pic_states,
    held=st.booleans(),
    output=st.booleans(),
    icw1=st.booleans(),
    pin=st.one_of(st.just(0), st.integers(0, 15)),
    source=sources,
)
def test_a_pulse_is_both_edges(
    master: bytes,
    slave: bytes,
    held: bool,
    output: bool,
    icw1: bool,
    pin: int,
    source: int,
) -> None:
    at_once = prepared(master, slave, held, output, icw1, pin)
    in_turn = prepared(master, slave, held, output, icw1, pin)
    at_once.pic.pulse(pin, source)
    in_turn.pic.set_irq(pin, source, 1)
    in_turn.pic.set_irq(pin, source, 0)
    assert at_once.facts() == in_turn.facts()


def with_entry(entry: int, pin: int, held: bool, delivered: bool) -> Apics:
    apics = Apics()
    if held:
        apics.ioapic.set_irq(pin, 0, 1)
    apics.ioapic.redirtbl[pin] = entry
    if delivered:
        apics.ioapic.irr_delivered |= 1 << pin
    apics.records()
    return apics


bits = st.sampled_from([0, MASK, LEVEL, LEVEL | MASK, LEVEL | REMOTE_IRR, MASK | REMOTE_IRR])


@settings(max_examples=300, deadline=None)
@given(
    entry=st.builds(
        lambda vector, mode, flags, dest: vector | mode << 8 | flags | dest << 56,
        st.integers(0x10, 0xFF),
        st.integers(0, 7),
        bits,
        st.sampled_from([0, 1, 0xFF]),
    ),
    pin=st.sampled_from([0, 2, 8, 23]),
    held=st.booleans(),
    delivered=st.booleans(),
    source=sources,
)
def test_a_pulse_of_the_ioapic_is_both_edges(
    entry: int, pin: int, held: bool, delivered: bool, source: int
) -> None:
    at_once = with_entry(entry, pin, held, delivered)
    in_turn = with_entry(entry, pin, held, delivered)
    at_once.ioapic.pulse(pin, source)
    in_turn.ioapic.set_irq(pin, source, 1)
    in_turn.ioapic.set_irq(pin, source, 0)
    facts = [
        (
            apics.records(),
            apics.ioapic.irr,
            apics.ioapic.irr_delivered,
            apics.ioapic.irq_states,
            apics.ioapic.redirtbl,
            apics.lapics[0].irr,
            apics.stubs[0].nmis,
        )
        for apics in (at_once, in_turn)
    ]
    assert facts[0] == facts[1]
