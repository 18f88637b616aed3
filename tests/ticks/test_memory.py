"""A million ticks take no more memory than twenty thousand."""

import pytest
from apic_stream import TIMER_VECTOR, ApicStream
from attributes import attributes
from stream import PERIOD_NS, Stream

from kvmtick.ticks.life import KEEP, TickAssembler


def elements(thing: object, seen: set[int]) -> int:
    """Everything in containers below an object of ours, but the lives."""
    if id(thing) in seen:
        return 0
    seen.add(id(thing))
    if isinstance(thing, dict):
        return len(thing) + sum(elements(value, seen) for value in thing.values())
    if isinstance(thing, list | set | tuple) or hasattr(thing, "maxlen"):
        return len(thing) + sum(elements(value, seen) for value in thing)  # type: ignore[arg-type, attr-defined]
    if not type(thing).__module__.startswith("kvmtick.ticks"):
        return 0
    names = getattr(thing, "__dict__", None) or attributes(type(thing))
    return sum(elements(getattr(thing, name), seen) for name in names if name != "_kept")


def containers(assembler: TickAssembler) -> int:
    """What the assembler keeps beside the lives, in elements."""
    return elements(assembler, set())


def live(stream: Stream, ticks: int, *, eoi: bool) -> None:
    for _ in range(ticks):
        at = stream.expires_ns
        stream.fire()
        stream.work(at)
        if eoi:
            stream.inject(at + 7)
            stream.eoi(at + 20)
    stream.report()


def test_lives_are_kept_to_a_bound_and_counts_cover_all() -> None:
    s = Stream()
    s.program()
    live(s, KEEP + 2_000, eoi=True)
    report = s.report()
    assert report.expired == KEEP + 2_000
    assert report.count("delivered") == KEEP + 2_000
    assert [tick.index for tick in report][:1] == [2_001]
    assert report[2_001].index == 2_001
    assert report[KEEP + 2_000].expiry_ns == (KEEP + 2_000) * PERIOD_NS
    assert len(list(report)) == KEEP
    assert sum(len(h) for h in s.assembler.main.latency_ns().values()) == 5 * (KEEP + 2_000)


def test_nothing_else_grows_with_the_number_of_ticks() -> None:
    s = Stream()
    s.program()
    live(s, 500, eoi=True)
    early = containers(s.assembler)
    live(s, 3_000, eoi=True)
    assert containers(s.assembler) <= early


def test_a_guest_that_never_acknowledges_with_reinject_off_does_not_make_it_grow() -> None:
    s = Stream(reinject=False)
    s.program()
    live(s, 500, eoi=False)
    early = containers(s.assembler)
    live(s, 3_000, eoi=False)
    assert containers(s.assembler) <= early


def live_with_apics(s: ApicStream, ticks: int, *, taken: bool) -> None:
    """PIT ticks by the IOAPIC and the watchdog, timer ticks, IPIs."""
    for _ in range(ticks):
        at = s.expires_ns
        s.tick(0, 1)
        s.accept(0, 0, 0x400)
        s.fire(1)
        s.serve(at + 1, 1)
        s.ipi(at + 2, 1, 0x61, 0)
        if taken:
            s.inject(at + 3)
            s.inject_nmi(at + 3)
            s.inject(at + 4, TIMER_VECTOR, 1)
            s.inject(at + 5, 0x61)
            s.eoi(at + 6)
            s.eoi(at + 7, TIMER_VECTOR, 1)
    s.reports()


@pytest.mark.parametrize("taken", [True, False])
def test_what_the_local_apics_keep_does_not_grow(taken: bool) -> None:
    s = ApicStream(reinject=False)
    s.program()
    s.arm(vcpu=1)
    live_with_apics(s, 1_500, taken=taken)
    early = containers(s.assembler)
    live_with_apics(s, 1_500, taken=taken)
    assert containers(s.assembler) <= early


def test_a_masked_timer_keeps_one_expiry() -> None:
    s = ApicStream()
    s.arm()
    for _ in range(500):
        s.fire()
    early = containers(s.assembler)
    for _ in range(500):
        s.fire()
    assert containers(s.assembler) <= early
