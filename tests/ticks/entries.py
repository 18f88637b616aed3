"""Records as the recorder's ring has them."""

from collections.abc import Iterable

from kvmtick.ticks.life import TickAssembler
from kvmtick.trace.events import Record
from kvmtick.trace.recorder import Entry


def entry(record: Record) -> Entry:
    """One of them; -99 in the fields that its event has not."""
    made = Entry()
    made.ts_ns, made.event, made.task, *fields = record
    made.a, made.b, made.c, made.d, made.e = (*fields, *[-99] * (5 - len(fields)))
    return made


def take(assembler: TickAssembler, records: list[Record], cuts: Iterable[int] = ()) -> None:
    """Hand all to it, in portions that end where `cuts` says."""
    ring = [entry(record) for record in records]
    begin = 0
    for end in (*sorted(cut for cut in cuts if cut < len(ring)), len(ring)):
        assembler.take(ring, begin, end)
        begin = end
