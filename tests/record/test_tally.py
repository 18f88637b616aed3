"""Ticks counted in raw pages: as many as the decoder finds."""

from itertools import pairwise

import pytest
from fake_tracefs import FORMATS, RECORDED, pages_of

from kvmtick.record.tally import Tally
from kvmtick.trace.decoder import Decoder
from kvmtick.trace.events import IRQ_CONTEXT, Event, Function, Record

QUEUE, START, EXPIRE = Event.WORK_QUEUE, Event.WORK_START, Event.HRTIMER_EXPIRE_ENTRY
FUNCTIONS = {int(at, 16): name for at, name in RECORDED["functions"].items()}


def decoded(pages: list[tuple[int, bytes]]) -> tuple[list[str], list[Record]]:
    functions = {at: Function[name.upper()] for at, name in FUNCTIONS.items()}
    decoder = Decoder(RECORDED["header_page"], FORMATS.values(), functions)
    records = [record for cpu, page in pages for record in decoder.decode(page, cpu)]
    return decoder.tasks.names, records


def tallied(pages: list[tuple[int, bytes]]) -> Tally:
    tally = Tally(FORMATS, FUNCTIONS)
    for _, page in pages:
        tally.page(page)
    return tally


def own_timer(guest: str) -> int:
    """The timer that the guest's vCPU started."""
    _, records = decoded(pages_of(guest))
    (started,) = {
        record[3]
        for record in records
        if record[1] == Event.HRTIMER_START and not record[2] & IRQ_CONTEXT
    }
    return started


@pytest.mark.parametrize("guest", sorted(RECORDED["runs"]))
def test_as_many_as_the_decoder_finds(guest: str) -> None:
    tasks, records = decoded(pages_of(guest))
    tally = tallied(pages_of(guest))
    wanted: dict[int, int] = {}
    starters: dict[int, str] = {}
    for record in records:
        if record[1] == Event.HRTIMER_EXPIRE_ENTRY:
            wanted[record[3]] = wanted.get(record[3], 0) + 1
        elif record[1] == Event.HRTIMER_START and not record[2] & IRQ_CONTEXT:
            starters[record[3]] = tasks[record[2]].rpartition("-")[2]
    assert wanted
    found = {at: sum(timer.ticks.values()) for at, timer in tally.timers.items()}
    assert {at: ticks for at, ticks in found.items() if ticks} == wanted
    assert tally.ticks == sum(wanted.values())
    assert starters
    assert {at: str(tally.timers[at].tid) for at in starters} == starters
    main = max(starters, key=lambda at: found[at])
    is_lapic = guest in ("tick-lapic", "tick-x2apic")
    assert tally.timers[main].source == ("lapic" if is_lapic else "pit")


def without_starts(page: bytes) -> bytes:
    """As if it had begun later: no thread of the VM starts a timer."""
    starts = Tally(FORMATS, FUNCTIONS)._starts
    return starts.sub(lambda match: b"\xff\xff" + match[0][2:], page)


def test_a_pit_that_was_running_is_its_workers() -> None:
    at = own_timer("tick-pic")
    tasks, records = decoded(pages_of("tick-pic"))
    ordered = sorted(record for record in records if record[1] in (QUEUE, START, EXPIRE))
    works = {
        after[3]
        for record, after in pairwise(ordered)
        if record[1] == EXPIRE and record[3] == at and after[1] == QUEUE and after[2] == record[2]
    }
    workers = {
        tasks[record[2]].rpartition("-")[2]
        for record in ordered
        if record[1] == START and record[3] in works
    }
    assert len(workers) == 1
    tally = tallied([(cpu, without_starts(page)) for cpu, page in pages_of("tick-pic")])
    timer = tally.timers[at]
    assert {str(timer.tid)} == workers
    assert timer.ticks == {timer.tid: sum(timer.ticks.values())}
    assert tally.by_thread()[timer.tid, "pit"] == sum(timer.ticks.values())


def test_a_timer_at_an_address_that_is_used_again() -> None:
    tally = tallied(pages_of("tick-pic"))
    timer = tally.timers[own_timer("tick-pic")]
    before = dict(timer.ticks)
    timer.belongs_to(77)
    for _, page in pages_of("tick-pic"):
        tally.page(without_starts(page))
    assert timer.ticks == {**before, 77: sum(before.values())}


def test_a_page_without_ticks() -> None:
    tally = tallied([(0, bytes(4096))])
    assert (tally.ticks, tally.timers, tally.interrupted) == (0, {}, set())


def test_a_kernel_without_the_events_of_work() -> None:
    """Before Linux 5.11: a PIT that was running stays nobody's."""
    formats = {name: text for name, text in FORMATS.items() if name.startswith("hrtimer")}
    tally = Tally(formats, FUNCTIONS)
    for _, page in pages_of("tick-pic"):
        tally.page(without_starts(page))
    assert tally.ticks == tallied(pages_of("tick-pic")).ticks
    assert {timer.tid for timer in tally.timers.values()} == {0}
