"""Whatever the records say, in whatever order: nothing fails, the counts add up, and a batch gives
what its records one by one give.
"""

import pytest
from attributes import attributes
from entries import take
from hypothesis import given, settings
from hypothesis import strategies as st
from stream import PERIOD_NS
from test_batches import facts

from kvmtick.ticks.life import TickAssembler
from kvmtick.ticks.source import Source
from kvmtick.ticks.verdict import Verdict
from kvmtick.trace.events import IRQ_CONTEXT, TRACEPOINTS, Event, Record

TASKS = ["<idle>-0", "kvmtick-1000", "kvm-pit/1000-1001", "CPU 0/KVM-1002", "CPU 1/KVM-1003"]
WORKER, VCPU_0 = 2, 3
HANDLED = [event for event in Event if event not in (Event.KVM_VCPU_WAKEUP, Event.KVM_MSR)]

small = st.integers(0, 3)
vectors = st.sampled_from((0x20, 0x21, 0x40, 0x50, 5))
modes = st.sampled_from((0, 0, 0, 0x100, 0x200, 0x400, 0x400, 0x500, 0x700))
FIELDS: dict[str, st.SearchStrategy[int]] = {
    "function": small,
    "hrtimer": st.integers(0x300, 0x302),
    "gsi": st.sampled_from((0, 0, 0, 5)),
    "level": st.sampled_from((0, 1, 1)),
    "irq_source_id": st.sampled_from((0, 2, 2, 2)),
    "chip": st.sampled_from((0, 0, 1)),
    "imr": st.sampled_from((0, 0xFE, 0xFF)),
    "e": st.sampled_from((0x40, 0x20, 0x10000, 0xC040, 0x440)),
    "irqchip": st.integers(0, 2),
    "vector": vectors,
    "vec": vectors,
    "dm": modes,
    "tm": st.sampled_from((0, 0, 1)),
    "apicid": st.integers(0, 2),
    "vcpu_id": st.integers(0, 2),
    "reinjected": st.sampled_from((0, 0, 0, 1)),
    "port": st.sampled_from((0x20, 0x20, 0x21, 0xA0, 0xA1, 0x40)),
    "val": st.sampled_from((0x20, 0x60, 0x0C, 0x11, 0, 0xFE, 0xFF, 0x100FF)),
    "reason": st.sampled_from((9, 9, 1)),
    "reg": st.sampled_from((0x320, 0xF0, 0x350)),
    "icr_low": st.sampled_from((0x4040, 0x4440, 0x4050, 0x4500)),
    "data": st.sampled_from((0x40, 0x440, 0x50)),
}


@st.composite
def any_record(draw: st.DrawFn) -> Record:
    event = draw(st.sampled_from(HANDLED))
    task = draw(st.integers(0, 5)) | (draw(st.booleans()) and IRQ_CONTEXT)
    fields = [draw(FIELDS.get(name, small)) for name in TRACEPOINTS[event].fields]
    if event == Event.KVM_EOI and draw(st.booleans()):
        fields[1] = -1
    return (0, int(event), task, *fields)


def tick(*pulse: Record) -> list[Record]:
    """A tick of the PIT with what its pulse gives."""
    return [
        (0, Event.HRTIMER_EXPIRE_ENTRY, IRQ_CONTEXT, 0x300, 0, 0),
        (0, Event.WORK_QUEUE, IRQ_CONTEXT, 1, 1, 1),
        (0, Event.HRTIMER_START, IRQ_CONTEXT, 0x300, 0, PERIOD_NS, False),
        (0, Event.WORK_START, WORKER, 1, 1),
        (0, Event.KVM_SET_IRQ, WORKER, 0, 1, 2),
        *pulse,
    ]


def taken(vector: int) -> Record:
    return (0, Event.KVM_INJ_VIRQ, VCPU_0, vector, False, False)


PIC = (0, int(Event.KVM_PIC_SET_IRQ), WORKER, 0, 0, 0, 0xFE, False)
IOAPIC = (0, int(Event.KVM_IOAPIC_SET_IRQ), WORKER, 0x40, 2, False)
ACCEPT = (0, int(Event.KVM_APIC_ACCEPT_IRQ), WORKER, 0, 0, 0, 0x40)
NMI = (0, int(Event.KVM_APIC_ACCEPT_IRQ), WORKER, 0, 0x400, 0, 0)
EOI = (0, int(Event.KVM_EOI), VCPU_0, 0, 0x40)
PIC_EOI = [
    (0, int(Event.KVM_PIO), VCPU_0, 1, 0x20, 1, 1, 0x20),
    (0, int(Event.KVM_ACK_IRQ), VCPU_0, 0, 0),
]
PLAIN = [*tick(PIC), taken(0x20), *PIC_EOI]
WHOLE: list[list[Record]] = [
    PLAIN,
    PLAIN,
    PLAIN * 3,
    [*tick(PIC, NMI), (0, int(Event.KVM_INJ_NMI), VCPU_0, 0, 0), taken(0x20), *PIC_EOI],
    [*tick(ACCEPT, IOAPIC, PIC), taken(0x40), EOI, (0, int(Event.KVM_ACK_IRQ), VCPU_0, 2, 2)],
    [
        (0, Event.HRTIMER_START, VCPU_0, 0x301, 2, PERIOD_NS, False),
        (0, Event.HRTIMER_EXPIRE_ENTRY, IRQ_CONTEXT, 0x301, 2, 0),
        (0, Event.KVM_APIC_ACCEPT_IRQ, VCPU_0, 0, 0, 0, 0x50),
        taken(0x50),
    ],
    [(0, Event.HRTIMER_EXPIRE_ENTRY, IRQ_CONTEXT, 0x301, 2, 0)],
]
START: list[Record] = [
    (0, Event.KVM_APICV_INHIBIT_CHANGED, VCPU_0, 9, 1, 512),
    (0, Event.KVM_PIO, VCPU_0, 1, 0x20, 1, 1, 0x11),
    (0, Event.KVM_PIO, VCPU_0, 1, 0x21, 1, 1, 0x20),
    (0, Event.KVM_PIO, VCPU_0, 1, 0x21, 1, 1, 0x04),
    (0, Event.KVM_PIO, VCPU_0, 1, 0x21, 1, 1, 0x01),
]


def timed(records: list[Record], steps: list[int]) -> list[Record]:
    """The same with times, and the timers' times to come."""
    now_ns, timed = 0, []
    for n, record in enumerate(records):
        now_ns += steps[n % len(steps)]
        if record[1] == Event.HRTIMER_START:
            record = (*record[:5], now_ns + PERIOD_NS, *record[6:])
        timed.append((now_ns, *record[1:]))
    return timed


def all_facts(assembler: TickAssembler) -> object:
    def of(source: Source) -> object:
        lives = [
            {name: getattr(tick, name) for name in attributes(type(tick)) if name != "claims"}
            for tick in source.lives
        ]
        return source.name, source.vcpu, source.path, source.extra, source.reached, lives

    assembler.settle()
    return facts(assembler), [of(source) for source in assembler.sources()]


def check_sums(assembler: TickAssembler, lost: bool = False) -> None:
    for report in assembler.reports():
        counts = {verdict: report.count(verdict) for verdict in Verdict}
        assert sum(counts.values()) == report.expired
        assert all(count >= 0 for count in counts.values())
        assert lost or counts[Verdict.UNKNOWN] == 0
        lives = list(report)
        assert {verdict: sum(t.verdict is verdict for t in lives) for verdict in Verdict} == counts
        assert sum(tick.inject_ns is not None for tick in lives) <= report.expired
        for tick in lives:
            reached = tick.inject_ns is not None
            assert reached == (tick.path is not None) == (tick.vcpu is not None)
            if tick.verdict in (Verdict.DELIVERED, Verdict.LATE):
                assert reached
            if tick.verdict in (Verdict.COALESCED, Verdict.DROPPED, Verdict.OUTSTANDING):
                assert not reached
            times = (tick.work_ns, tick.accept_ns, tick.inject_ns, tick.eoi_ns)
            known = [ns for ns in times if ns is not None]
            assert known == sorted(known)
            assert tick.claims >= 0


pieces = st.lists(
    st.one_of(any_record().map(lambda record: [record]), st.sampled_from(WHOLE)), max_size=40
)
times = st.lists(st.sampled_from((0, 1, 400_000, 1_500_000)), min_size=1, max_size=7)


@given(pieces, times)
@settings(max_examples=600, deadline=None)
def test_any_order_of_any_records(script: list[list[Record]], steps: list[int]) -> None:
    records = timed([*START, *(record for piece in script for record in piece)], steps)
    assembler = TickAssembler(tasks=TASKS)
    lost = False
    for record in records:
        lost |= record[1] == Event.LOST_EVENTS
        assembler([record])
        assembler.settle()
        check_sums(assembler, lost)
    assert sum(report.expired for report in assembler.reports()) == sum(
        record[1] == Event.HRTIMER_EXPIRE_ENTRY and record[4] in (0, 2) for record in records
    )


FALLING = [
    (0, int(Event.KVM_SET_IRQ), WORKER, 0, 0, 2),
    (0, int(Event.KVM_IOAPIC_SET_IRQ), WORKER, 0x10000, 0, False),
    (0, int(Event.KVM_PIC_SET_IRQ), WORKER, 0, 0, 0, 0xFE, False),
]
OF_KERNEL = [
    *tick((0, int(Event.KVM_IOAPIC_SET_IRQ), WORKER, 0x10000, 0, False), PIC),
    *FALLING,
    (0, int(Event.WORK_END), WORKER, 1, 1),
    taken(0x20),
    *PIC_EOI,
]
OF_TIMER = [
    (0, int(Event.HRTIMER_EXPIRE_ENTRY), IRQ_CONTEXT, 0x301, 2, 0),
    (0, int(Event.HRTIMER_START), IRQ_CONTEXT, 0x301, 2, PERIOD_NS, False),
    (0, int(Event.KVM_APIC_ACCEPT_IRQ), VCPU_0, 0, 0, 0, 0x50),
    taken(0x50),
    (0, int(Event.KVM_EOI), VCPU_0, 0, 0x50),
]
KERNEL_WHOLE = [OF_KERNEL, OF_KERNEL * 2, OF_TIMER, OF_TIMER * 2, [*OF_KERNEL[:9], *PIC_EOI]]
kernel_pieces = st.lists(
    st.one_of(any_record().map(lambda record: [record]), st.sampled_from([*WHOLE, *KERNEL_WHOLE])),
    max_size=30,
)


@given(kernel_pieces, times, st.booleans())
@settings(max_examples=600, deadline=None)
def test_a_batch_of_a_kernel_s_records_and_one_by_one(
    script: list[list[Record]], steps: list[int], begun: bool
) -> None:
    records = [record for piece in script for record in piece]
    ends = [*OF_TIMER, *OF_KERNEL, *OF_TIMER, *OF_KERNEL]
    records = timed([*START, *ends, *records, *ends], steps)
    at_once, singly = (TickAssembler(tasks=TASKS, vcpus={3: 0, 4: 1}) for _ in range(2))
    if begun:
        at_once.begin_in_the_middle()
        singly.begin_in_the_middle()
    at_once(records)
    for record in records:
        singly([record])
    assert all_facts(at_once) == all_facts(singly)
    check_sums(at_once, lost=True)


OTHER_VCPU = VCPU_0 + 1
BEFORE: dict[str, list[Record]] = {
    "an ipi": [(0, Event.KVM_APIC_IPI, VCPU_0, 0x4050, 9)],
    "a masked run": tick(),
    "a masked run, acknowledged": [*tick(), *PIC_EOI],
    "a stale command": [(0, Event.KVM_PIO, VCPU_0, 1, 0x20, 1, 1, 0x20)],
    "a mask": [(0, Event.KVM_PIO, VCPU_0, 1, 0x21, 1, 1, 0xFF)],
    "another pin": [
        (0, Event.KVM_SET_IRQ, 1, 0, 1, 0),
        (0, Event.KVM_PIC_SET_IRQ, 1, 0, 3, 0, 0xFE, True),
        (0, Event.KVM_SET_IRQ, 1, 0, 0, 0),
    ],
    "another vcpu": [
        *tick(PIC),
        (0, Event.KVM_INJ_VIRQ, OTHER_VCPU, 0x20, False, False),
        *PIC_EOI,
    ],
    "an expiry that waits": [
        (0, Event.HRTIMER_START, VCPU_0, 0x301, 2, PERIOD_NS, False),
        (0, Event.KVM_APIC, VCPU_0, 1, 0x320, 0x50),
        (0, Event.HRTIMER_EXPIRE_ENTRY, IRQ_CONTEXT, 0x301, 2, 0),
    ],
    "a request": [ACCEPT],
    "the vector's request": [(0, Event.KVM_APIC_ACCEPT_IRQ, WORKER, 0, 0, 0, 0x20)],
}
AFTER: dict[str, list[Record]] = {
    "nothing": [],
    "a timer's interrupt": [
        (0, Event.HRTIMER_START, VCPU_0, 0x301, 2, PERIOD_NS, False),
        (0, Event.HRTIMER_EXPIRE_ENTRY, IRQ_CONTEXT, 0x301, 2, 0),
        (0, Event.KVM_APIC_ACCEPT_IRQ, VCPU_0, 0, 0, 0, 0x50),
        taken(0x50),
    ],
    "an expiry": [(0, Event.HRTIMER_EXPIRE_ENTRY, IRQ_CONTEXT, 0x301, 2, 0)],
    "the watchdog": [NMI, (0, Event.KVM_INJ_NMI, VCPU_0, 0, 0)],
    "an automatic eoi": [
        *tick(PIC)[4:],
        (0, Event.KVM_ACK_IRQ, VCPU_0, 0, 0),
        taken(0x20),
    ],
    "an unexplained eoi": [(0, Event.KVM_ACK_IRQ, VCPU_0, 0, 0), taken(0x20)],
    "the other pin's": [(0, Event.KVM_ACK_IRQ, VCPU_0, 0, 3), taken(0x23)],
    "the other pin's vector": [*PLAIN[:6], taken(0x23), *PIC_EOI],
    "its vector again": [taken(0x20), taken(0x40)],
}


@pytest.mark.parametrize("after", AFTER)
@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("rows", [1, 2])
def test_plain_ticks_between_everything_else(before: str, rows: int, after: str) -> None:
    records = timed([*START, *PLAIN, *BEFORE[before], *PLAIN * rows, *AFTER[after]], [1])
    at_once, singly = TickAssembler(tasks=TASKS), TickAssembler(tasks=TASKS)
    take(at_once, records)
    for record in records:
        singly([record])
    assert all_facts(at_once) == all_facts(singly)
    arrivals = [dict(source.arrivals()) for source in at_once.sources()]
    assert arrivals == [dict(source.arrivals()) for source in singly.sources()]


@pytest.mark.parametrize("row", [OF_KERNEL, OF_TIMER], ids=["pit", "timer"])
def test_a_kernel_s_tick_that_differs_in_any_field_of_any_record(row: list[Record]) -> None:
    ends = [*OF_TIMER, *OF_KERNEL, *OF_TIMER, *OF_KERNEL]
    for at, record in enumerate(row):
        for place in range(2, len(record)):
            for bit in (1, 2, 0x10, 0x10000, IRQ_CONTEXT):
                other = (*record[:place], record[place] ^ bit, *record[place + 1 :])
                odd = [*row[:at], other, *row[at + 1 :]]
                records = timed([*START, *ends, *odd, *ends], [1])
                at_once, singly = (TickAssembler(tasks=TASKS, vcpus={3: 0, 4: 1}) for _ in range(2))
                at_once(records)
                for each in records:
                    singly([each])
                assert all_facts(at_once) == all_facts(singly), (at, place, bit)
