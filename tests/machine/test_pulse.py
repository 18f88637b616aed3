"""The PIT's pulse is two calls of kvm_set_irq, whatever is taken together on the way."""

from hypothesis import given, settings
from hypothesis import strategies as st

from kvmtick.irqchip.i8259 import Pic
from kvmtick.irqchip.ioapic import Ioapic
from kvmtick.machine.board import Board
from kvmtick.machine.machine import Machine
from kvmtick.trace.events import Event, Record

SOURCES = (0, 1, 2)


def make(detail: bool) -> tuple[Machine, list[Record]]:
    machine = Machine(detail=detail)
    machine.board.create_irqchip()
    records: list[Record] = []
    machine.recorder.add_consumer(records.extend)
    return machine, records


def chips(board: Board) -> tuple[Pic, Ioapic]:
    assert board.pic is not None
    assert board.ioapic is not None
    return board.pic, board.ioapic


def state(board: Board) -> object:
    pic, ioapic = chips(board)
    return (
        (pic.master.save(), pic.slave.save(), list(pic.irq_states), pic.output),
        (ioapic.irr, list(ioapic.irq_states)),
    )


# A byte that is mostly plain: the interesting bits are those of pin 0 and of the cascade.
bytes_ = st.sampled_from((0, 0, 0, 1, 2, 4, 5, 0x80, 0xFE, 0xFF))
pics = st.lists(bytes_, min_size=16, max_size=16).map(bytes)


@given(
    pics,
    pics,
    st.lists(st.tuples(st.sampled_from((0, 0, 1, 2, 9)), st.sampled_from(SOURCES)), max_size=3),
    st.lists(st.tuples(st.sampled_from((0x20, 0x21, 0xA0)), bytes_), max_size=2),
    st.integers(0, 15),
    st.sampled_from(SOURCES),
    st.booleans(),
)
@settings(max_examples=400, deadline=None)
def test_a_pulse_is_a_one_and_then_a_nought(
    master: bytes,
    slave: bytes,
    held: list[tuple[int, int]],
    writes: list[tuple[int, int]],
    gsi: int,
    source: int,
    detail: bool,
) -> None:
    told = []
    for both in (False, True):
        machine, records = make(detail)
        board = machine.board
        pic, _ = chips(board)
        for pin, holder in held:
            board.routing.set_irq(holder, pin, 1)
        pic.master.restore(master)
        pic.slave.restore(slave)
        for port, value in writes:
            pic.io_write(port, 1, value)
        machine.recorder.flush()
        records.clear()
        if both:
            board.routing.pulse(source, gsi)
        else:
            board.routing.set_irq(source, gsi, 1)
            board.routing.set_irq(source, gsi, 0)
        machine.recorder.flush()
        # The falling edge is a detail; of other sources' lines the level matters to a reader.
        rising = [
            record
            for record in records
            if detail or not (record[1] == Event.KVM_SET_IRQ and record[4] == 0)
        ]
        told.append((state(board), rising))
        machine.close()
    assert told[0] == told[1]
