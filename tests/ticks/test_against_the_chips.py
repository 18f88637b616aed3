"""Random guests on random hosts: every verdict is held to what the chips themselves did."""

from collections import Counter

import pytest
from attributes import attributes
from hypothesis import event, given, settings
from hypothesis import strategies as st
from oracle import HANDLERS, Rig, Step

from kvmtick.ticks.tick import Tick
from kvmtick.ticks.verdict import Verdict, Where

MASK, UNMASK = ("out", 0x21, 0xFF), ("out", 0x21, 0x00)

spins = st.integers(1, 3_000_000).map(lambda ns: ("spin", ns))
holds = st.tuples(st.sampled_from(("masked", "deaf")), st.integers(500_000, 5_000_000))
counts = st.one_of(st.integers(240, 4000), st.sampled_from((1, 10, 1193)))
calm_guest: st.SearchStrategy[Step] = st.one_of(
    spins,
    holds,
    st.sampled_from([("cli",), ("sti",), ("hlt",), MASK, UNMASK, ("out", 0x20, 0x0B)]),
    st.tuples(st.just("pit"), st.sampled_from((0, 2, 3, 4, 5)), counts),
)
wild_guest: st.SearchStrategy[Step] = st.one_of(
    calm_guest,
    st.sampled_from([("poll",), ("out", 0x20, 0x20), ("out", 0x20, 0x60), ("out", 0x20, 0xC0)]),
    st.sampled_from([("init", 0x01), ("init", 0x03), ("out", 0x20, 0x80), ("out", 0x20, 0xA0)]),
)
calm_handlers = st.lists(st.sampled_from(("eoi", "none", "slow", "late", "nested", "mask")))
wild_handlers = st.lists(st.sampled_from(sorted(HANDLERS)))
delays = st.sampled_from((None, "0ns", "3us", "1500us", "exp:300us", "10%:3ms", "uniform:0us..2ms"))
faults = st.sampled_from(("worker_delay", "vcpu_off", "late_expiry"))
runs = st.integers(1, 6_000_000).map(lambda ns: ("run", ns))
calm_user: st.SearchStrategy[Step] = st.one_of(
    runs,
    runs,
    st.tuples(st.just("fault"), faults, delays),
    st.integers(1, 4_000_000).map(lambda ns: ("off", ns)),
    st.sampled_from([("migrate",), ("set_pit2",), ("reinject", 0), ("reinject", 1)]),
)
wild_user: st.SearchStrategy[Step] = st.one_of(
    calm_user,
    st.sampled_from([("line", 0), ("line", 1), ("line", 9)]),
    st.tuples(
        st.just("set_irqchip"),
        st.sampled_from(("irr", "isr", "imr", "auto_eoi")),
        st.integers(0, 1),
    ),
)


def drive(
    main: list[Step], handler: list[str], user: list[Step], seed: int, watch: bool = False
) -> Rig:
    rig = Rig(main, handler, seed)
    rig.do(("run", 500_000))
    for step in user:
        rig.do(step)
        if watch:
            rig.vm.ticks()
    rig.do(("run", 5_000_000))
    return rig


def facts(tick: Tick) -> dict[str, object]:
    return {name: getattr(tick, name) for name in attributes(Tick)}


def check_numbers(rig: Rig) -> None:
    """What holds in every run."""
    oracle, report, lives = rig.oracle, rig.vm.ticks(), rig.lives()
    said = Counter(tick.verdict for tick in lives)
    assert all(report.count(verdict) == said[verdict] for verdict in Verdict)
    assert said[Verdict.UNKNOWN] == 0
    assert report.expired == len(oracle.seen) == sum(said.values())
    assert [tick.index for tick in lives] == list(range(1, len(lives) + 1))
    assert [(t.expiry_ns, t.fired_ns, t.period_ns) for t in lives] == [
        (s.expiry_ns, s.fired_ns, s.period_ns) for s in oracle.seen
    ]
    pulsed = [tick for tick in lives if tick.work_ns is not None]
    assert [tick.work_ns for tick in pulsed] == sorted(
        s.pulse_ns for s in oracle.seen if s.pulse_ns is not None
    ), "every pulse is one tick's, and they come in the order of their expiries"
    unpulsed = [tick for tick in lives if tick.work_ns is None]
    assert all(
        (tick.verdict, tick.where)
        in (
            (Verdict.COALESCED, Where.WORKER),
            (Verdict.DROPPED, None),
            (Verdict.OUTSTANDING, None),
        )
        for tick in unpulsed
    )
    waiting = sum(tick.verdict is Verdict.OUTSTANDING for tick in unpulsed)
    may_wait = len(oracle.unpulsed)
    must_wait = min(may_wait, oracle.owed())
    assert must_wait <= waiting <= (may_wait if oracle.pit.work.queued else must_wait), (
        "whoever is still owed a pulse is outstanding; nobody else, once the worker has looked"
    )
    for tick in lives:
        steps = (tick.expiry_ns, tick.fired_ns, tick.work_ns, tick.accept_ns, tick.inject_ns)
        times = [ns for ns in (*steps, tick.eoi_ns) if ns is not None]
        assert times == sorted(times), "no hop takes less than no time"
    reached = [tick for tick in lives if tick.inject_ns is not None]
    by_poll = [tick for tick in reached if tick.vector is None]
    assert all(
        tick.verdict in (Verdict.DELIVERED, Verdict.LATE, Verdict.REINJECTED) for tick in reached
    )
    assert {Verdict.DELIVERED, Verdict.LATE}.isdisjoint(
        tick.verdict for tick in lives if tick.inject_ns is None
    )
    assert oracle.injections == len(reached) - len(by_poll) + report.extra
    assert len(by_poll) <= oracle.polls


def check_each(rig: Rig) -> None:
    """What every single tick must be."""
    for tick, seen in zip(rig.lives(), rig.oracle.seen, strict=True):
        assert (tick.verdict, tick.where) == (seen.verdict, seen.where), seen
        assert (tick.work_ns, tick.inject_ns) == (seen.pulse_ns, seen.reach_ns), seen


def check_batches(rig: Rig) -> None:
    """The records one by one give what the batches gave."""
    rig.singly.settle()
    assert [facts(tick) for tick in rig.singly.main.lives] == [facts(tick) for tick in rig.lives()]
    assert rig.singly.main.extra == rig.vm.assembler.main.extra
    for hop, histogram in rig.vm.assembler.main.latency_ns().items():
        assert rig.singly.main.latency_ns()[hop].summary() == histogram.summary()


seeds = st.integers(0, 1000)


@given(st.lists(calm_guest, max_size=25), calm_handlers, st.lists(calm_user, max_size=8), seeds)
@settings(max_examples=150, deadline=None)
def test_a_guest_that_plays_by_the_rules(
    main: list[Step], handler: list[str], user: list[Step], seed: int
) -> None:
    rig = drive(main, handler, user, seed)
    try:
        check_numbers(rig)
        if not rig.oracle.stolen:
            event("each tick compared")
            check_each(rig)
        check_batches(rig)
    finally:
        rig.close()


@given(st.lists(wild_guest, max_size=25), wild_handlers, st.lists(wild_user, max_size=8), seeds)
@settings(max_examples=250, deadline=None)
def test_a_guest_and_a_user_space_that_do_not(
    main: list[Step], handler: list[str], user: list[Step], seed: int
) -> None:
    rig = drive(main, handler, user, seed)
    try:
        if not rig.oracle.tampered:
            check_numbers(rig)
            if not rig.oracle.stolen:
                event("each tick compared")
                check_each(rig)
        check_batches(rig)
    finally:
        rig.close()


@given(st.lists(wild_guest, max_size=25), wild_handlers, st.lists(calm_user, max_size=8), seeds)
@settings(max_examples=60, deadline=None)
def test_looking_at_the_ticks_on_the_way_changes_no_count(
    main: list[Step], handler: list[str], user: list[Step], seed: int
) -> None:
    watched = drive(main, handler, user, seed, watch=True)
    alone = drive(main, handler, user, seed)
    try:
        assert watched.vm.ticks().as_dict() == alone.vm.ticks().as_dict()
    finally:
        watched.close()
        alone.close()


@pytest.mark.parametrize("reinject", [0, 1])
def test_the_oracle_sees_the_common_cases(reinject: int) -> None:
    """The oracle itself is worth something: interrupts off for 10 ms, both ways."""
    rig = Rig([("spin", 3_000_000), ("cli",), ("spin", 10_000_000), ("sti",)], [])
    rig.do(("reinject", reinject))
    rig.do(("run", 20_500_000))
    said = Counter(seen.verdict for seen in rig.oracle.seen)
    check_numbers(rig)
    check_each(rig)
    assert sum(said.values()) == 20
    if reinject:
        assert said[Verdict.REINJECTED] == 9
        assert said[Verdict.LATE] == 1
    else:
        assert said[Verdict.COALESCED] == 9
        assert said[Verdict.LATE] == 1
    rig.close()
