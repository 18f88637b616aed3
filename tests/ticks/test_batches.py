"""The same records in one batch or one by one: the same lives.

The assembler takes an undisturbed tick, nine records in a row, in one step. Here are rows that look
like it and are not, each with every state that may come before.
"""

import pytest
from attributes import attributes
from entries import take
from hypothesis import given, settings
from hypothesis import strategies as st
from stream import PERIOD_NS, PIT_FN, TIMER, WORK, WORK_FN, Stream

from kvmtick.ticks.life import TickAssembler
from kvmtick.ticks.tick import Tick
from kvmtick.ticks.verdict import Verdict

FAULTS = {
    "source": 0,
    "gsi": 1,
    "imr": 0x01,
    "coalesced": 1,
    "chip": 1,
    "pin": 1,
    "vector": 0x27,
    "again": 1,
    "port": 0xA0,
    "read": 1,
    "poll": 0x0C,
    "icw1": 0x11,
    "specific": 0x60,
    "slave": 1,
    "acked": 1,
    "late": PERIOD_NS,
    "just": PERIOD_NS - 1,
}
"""What may be different about a tick, and how."""

Step = tuple[str, str]


def row(s: Stream, fault: str = "", at: int | None = None) -> None:
    """The nine records of a tick, with one of them changed."""
    f = {fault: FAULTS[fault]} if fault else {}
    r = s.recorder
    s.clock.now_ns = at = s.expires_ns if at is None else at
    task = r.enter_irq()
    r.hrtimer_expire_entry(TIMER, PIT_FN, at)
    s.queue()
    s.expires_ns += PERIOD_NS
    r.hrtimer_start(TIMER, PIT_FN, s.expires_ns, False)
    r.task = task
    r.sched_kthread_work_execute_start(WORK, WORK_FN)
    r.kvm_set_irq(f.get("gsi", 0), 1, f.get("source", 2))
    r.kvm_pic_set_irq(
        f.get("chip", 0), f.get("pin", 0), 0, f.get("imr", 0), bool(f.get("coalesced"))
    )
    s.clock.now_ns += f.get("late", f.get("just", 0))
    r.kvm_inj_virq(f.get("vector", 0x20), False, bool(f.get("again")))
    value = f.get("poll", f.get("icw1", f.get("specific", 0x20)))
    r.kvm_pio(0 if "read" in f else 1, f.get("port", 0x20), 1, 1, value)
    r.kvm_ack_irq(f.get("slave", 0), f.get("acked", 0))


def before(s: Stream, what: str) -> None:
    """Something that leaves a tick, a request or a piece of work under way."""
    at = s.expires_ns
    if what == "expiry":
        s.recorder.hrtimer_expire_entry(TIMER, PIT_FN, at)
        s.queue()
        s.expires_ns += PERIOD_NS
        s.recorder.hrtimer_start(TIMER, PIT_FN, s.expires_ns, False)
    elif what == "work":
        s.work(at - PERIOD_NS, pulses=False)
    elif what == "pulse":
        s.work(at - PERIOD_NS)
    elif what == "request":
        s.pulse(source=0)
    elif what == "injection":
        s.inject(at - 5)
    elif what == "eoi":
        s.eoi(at - 5)
    elif what == "automatic":
        s.inject_auto_eoi(at - 5)
    elif what == "acknowledgement":
        s.write(0x20, 0x60)
        s.recorder.kvm_ack_irq(0, 0)
    elif what == "base":
        s.write(0x20, 0x11)
        s.write(0x21, 0x30)
    elif what == "reset":
        s.reset_reinject(at - 5, 1)
    else:
        s.reinject_control(what == "on")


BEFORE = (
    *("expiry", "work", "pulse", "request", "injection", "eoi", "automatic"),
    *("acknowledgement", "base", "reset", "on", "off"),
)
steps: st.SearchStrategy[Step] = st.one_of(
    st.just(("row", "")),
    st.tuples(st.just("row"), st.sampled_from(sorted(FAULTS))),
    st.tuples(st.just("before"), st.sampled_from(BEFORE)),
)


def facts(assembler: TickAssembler) -> object:
    assembler.settle()
    main = assembler.main
    lives = [{name: getattr(tick, name) for name in attributes(Tick)} for tick in main.lives]
    counts = {verdict: main.count(verdict) for verdict in Verdict}
    hops = {hop: (len(h), h.summary()) for hop, h in main.latency_ns().items()}
    return lives, counts, hops, main.expired, main.extra, main.reached


def both_ways(script: list[Step], reinject: bool) -> tuple[object, object]:
    s = Stream(reinject=reinject)
    records = s.recorder.tail()
    s.recorder.add_consumer(records.extend)
    s.program()
    for kind, what in script:
        if kind == "row":
            row(s, what)
        else:
            before(s, what)
    s.recorder.flush()
    at_once, singly = TickAssembler(), TickAssembler()
    take(at_once, records)
    for record in records:
        singly([record])
    return facts(at_once), facts(singly)


@given(st.lists(steps, max_size=8), st.booleans())
@settings(max_examples=500, deadline=None)
def test_a_batch_and_its_records_one_by_one_give_the_same(
    script: list[Step], reinject: bool
) -> None:
    at_once, singly = both_ways([*script, ("row", ""), ("row", "")], reinject)
    assert at_once == singly


@pytest.mark.parametrize("reinject", [True, False])
@pytest.mark.parametrize("what", BEFORE)
@pytest.mark.parametrize("fault", ["", *FAULTS])
def test_every_difference_after_every_beginning(what: str, fault: str, reinject: bool) -> None:
    plain = ("row", "")
    for script in (
        [("before", what), ("row", fault), plain],
        [plain, ("before", "expiry"), ("before", what), ("row", fault), plain],
        [("before", "expiry"), ("before", "pulse"), ("before", what), ("row", fault), plain],
    ):
        at_once, singly = both_ways(script, reinject)
        assert at_once == singly


@pytest.mark.parametrize(
    ("fault", "verdict"),
    [("", Verdict.DELIVERED), ("just", Verdict.DELIVERED), ("late", Verdict.LATE)],
)
def test_an_undisturbed_tick_is_judged_by_its_period_also_at_once(
    fault: str, verdict: Verdict
) -> None:
    s = Stream()
    s.program()
    row(s, fault)
    (tick,) = s.report()
    assert tick.verdict is verdict
