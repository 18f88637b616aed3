"""Ticks read from the ring, most in one step, are those of the same records one by one: of the
three guests' ticks, plain and disturbed, in any order, cut anywhere.
"""

import pytest
from entries import take
from hypothesis import given, settings
from hypothesis import strategies as st
from test_any_records import (
    ACCEPT,
    EOI,
    HANDLED,
    IOAPIC,
    NMI,
    OF_TIMER,
    PIC_EOI,
    PLAIN,
    START,
    TASKS,
    VCPU_0,
    WORKER,
    all_facts,
    any_record,
    check_sums,
    taken,
    tick,
    timed,
)

from kvmtick.ticks.life import TickAssembler
from kvmtick.ticks.pit import PitTicks
from kvmtick.ticks.source import Source
from kvmtick.ticks.verdict import Verdict
from kvmtick.trace.events import IRQ_CONTEXT, TRACEPOINTS, Event, Record

MASKED_PIC = (0, int(Event.KVM_PIC_SET_IRQ), WORKER, 0, 0, 0, 0xFF, False)
OF_IOAPIC = [
    *tick(MASKED_PIC, ACCEPT, IOAPIC),
    taken(0x40),
    EOI,
    (0, int(Event.KVM_ACK_IRQ), VCPU_0, 2, 2),
]
ARMED: list[Record] = [
    (0, int(Event.KVM_APIC), VCPU_0, 1, 0x320, 0x20050),
    (0, int(Event.HRTIMER_START), VCPU_0, 0x301, 2, 1_000_000, False),
]
ROWS = {"pic": PLAIN, "ioapic": OF_IOAPIC, "lapic": OF_TIMER}
OTHERS = [
    [*tick(MASKED_PIC, ACCEPT, IOAPIC, NMI), taken(0x40), EOI],
    tick(MASKED_PIC),
    OF_IOAPIC[-1:],
    PIC_EOI,
    ARMED,
    ARMED[1:],
    [(0, int(Event.KVM_PIO), VCPU_0, 1, 0x21, 1, 1, 0xFF)],
    [(0, int(Event.KVM_APIC_IPI), VCPU_0, 0x4050, 9)],
    [(0, int(Event.LOST_EVENTS), 0, 0, 3)],
]


def both(records: list[Record], cuts: list[int]) -> tuple[TickAssembler, TickAssembler]:
    at_once, singly = TickAssembler(tasks=TASKS), TickAssembler(tasks=TASKS)
    take(at_once, records, cuts)
    for record in records:
        singly([record])
    return at_once, singly


def assert_same(at_once: TickAssembler, singly: TickAssembler) -> None:
    assert all_facts(at_once) == all_facts(singly)
    arrivals = [dict(source.arrivals()) for source in at_once.sources()]
    assert arrivals == [dict(source.arrivals()) for source in singly.sources()]


RING_FIELDS = 5
simulated = any_record().filter(lambda record: len(record) <= 3 + RING_FIELDS)
pieces = st.lists(
    st.one_of(
        st.sampled_from([*ROWS.values()]),
        st.tuples(st.sampled_from([*ROWS.values()]), st.integers(1, 4)).map(lambda x: x[0] * x[1]),
        st.sampled_from(OTHERS),
        simulated.map(lambda record: [record]),
        st.tuples(
            st.sampled_from([*ROWS.values()]), st.integers(0, 10), st.integers(1, 3), simulated
        ).map(lambda x: [*x[0][: x[1]], *[x[3]][: x[2] - 1], *x[0][x[1] + 1 :]]),
    ),
    max_size=20,
)
times = st.lists(st.sampled_from((0, 1, 1, 400_000, 1_500_000)), min_size=1, max_size=7)


@given(pieces, times, st.lists(st.integers(0, 150), max_size=6))
@settings(max_examples=400, deadline=None)
def test_plain_and_disturbed_ticks_in_any_order(
    script: list[list[Record]], steps: list[int], cuts: list[int]
) -> None:
    rows = [*ARMED, *PLAIN * 2, *OF_TIMER * 2, *OF_IOAPIC * 3]
    records = [*START, *rows, *(record for piece in script for record in piece), *rows]
    at_once, singly = both(timed(records, steps), cuts)
    assert_same(at_once, singly)
    check_sums(at_once, lost=True)


@pytest.mark.parametrize("way", ROWS)
def test_a_tick_that_differs_in_any_field_of_any_record(way: str) -> None:
    row = ROWS[way]
    before = [*START, *ARMED, *row * 3]
    for at, record in enumerate(row):
        for place in range(1, len(record)):
            for bit in (1, 2, 0x10, 0x10000, IRQ_CONTEXT):
                value = record[place] ^ bit
                if place == 1 and value not in HANDLED:
                    continue
                other = [*record[:place], value, *record[place + 1 :]]
                if place == 1:
                    fields = len(TRACEPOINTS[Event(value)].fields)
                    other = [*other, 0, 0, 0][: 3 + fields]
                odd = [*row[:at], tuple(other), *row[at + 1 :]]
                records = timed([*before, *odd, *row * 2], [1])
                assert_same(*both(records, []))


@pytest.mark.parametrize("way", ROWS)
@pytest.mark.parametrize("missing", range(11))
def test_a_tick_without_one_of_its_records(way: str, missing: int) -> None:
    row = ROWS[way]
    odd = [*row[:missing], *row[missing + 1 :]]
    for rows in ([*row * 3, *odd, *row * 2], [*row * 2, *odd, *odd, *row * 2]):
        assert_same(*both(timed([*START, *ARMED, *rows], [1]), []))


@pytest.mark.parametrize("way", ROWS)
def test_a_tick_is_cut_anywhere(way: str) -> None:
    records = timed([*START, *ARMED, *ROWS[way] * 4], [1])
    for cut in range(len(records) + 1):
        assert_same(*both(records, [cut]))


@pytest.mark.parametrize("way", ROWS)
def test_most_ticks_are_taken_in_one_step(way: str) -> None:
    assembler = TickAssembler(tasks=TASKS)
    take(assembler, timed([*START, *ARMED, *ROWS[way] * 100], [1]))
    source: Source = assembler.main
    assert source.expired == source.reached == 100
    assert source.count(Verdict.DELIVERED) == 100
    assert source.plain >= 98
    assert isinstance(source, PitTicks) == (way != "lapic")
