"""A million ticks take no more memory than twenty thousand."""

from collections.abc import Sized

from stream import PERIOD_NS, Stream

from kvmtick.ticks.life import KEEP, TickAssembler


def containers(assembler: TickAssembler) -> int:
    """What the assembler keeps beside the lives, in elements."""
    kept = sum(len(v) for v in vars(assembler).values() if isinstance(v, Sized))
    return kept - len(assembler.lives)


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
    assert sum(len(h) for h in s.assembler.latency_ns().values()) == 5 * (KEEP + 2_000)


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
