"""Records of a host as a trace, and what `HostTicks` makes of them."""

from collections.abc import Iterable, Iterator

from kvmtick.ticks.host import HostTicks, VmTicks
from kvmtick.ticks.source import Source
from kvmtick.ticks.tick import Tick
from kvmtick.trace.events import Event, Record
from kvmtick.trace.vms import VmInfo

ALL_EVENTS = frozenset(Event)

Key = tuple[int, str, int, int]
"""A tick: its VM's pid, its source's name and vCPU, when it fired."""
Told = tuple[str, str | None, str]
"""Its verdict, where it ended, and why."""


class RecordsTrace:
    """A `Trace` of records that are there already."""

    is_complete = False
    lost = unknown = size_bytes = position_bytes = 0
    cut = ""

    def __init__(
        self,
        records: Iterable[Record],
        tasks: list[str],
        vms: list[VmInfo],
        events: frozenset[Event] = ALL_EVENTS,
        batch: int = 1 << 20,
    ) -> None:
        self.records = list(records)
        self.tasks = tasks
        self.vms = vms
        self.events = events
        self.batch = batch

    def batches(self) -> Iterator[list[Record]]:
        """So many records at a time."""
        for start in range(0, len(self.records), self.batch):
            yield self.records[start : start + self.batch]

    def close(self) -> None:
        """Nothing is open."""


def told(trace: RecordsTrace, keep: int = 1 << 20) -> dict[Key, Told]:
    """What became of every tick."""
    lives: dict[Key, Told] = {}

    def on_lives(vm: VmTicks, source: Source, ticks: list[Tick]) -> None:
        for tick in ticks:
            key = (vm.pid, source.name, source.vcpu if source.name == "lapic" else 0, tick.fired_ns)
            assert key not in lives
            lives[key] = (tick.verdict.value, tick.where and tick.where.value, tick.detail)

    HostTicks(trace, keep, on_lives=on_lives).read()
    return lives


def contradictions(whole: dict[Key, Told], part: dict[Key, Told]) -> list[str]:
    """Ticks that a part of a trace judges otherwise than the whole, and not `unknown`."""
    return [
        f"{key}: {whole.get(key, ('no tick',))} but {verdict}"
        for key, verdict in part.items()
        if verdict[0] != "unknown" and whole.get(key, ("", None, ""))[:2] != verdict[:2]
    ]
