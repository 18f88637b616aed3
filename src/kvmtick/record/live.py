"""What became of the ticks, while they are recorded: an estimate from samples.

Decoding takes a core more than recording does. So all events of a tenth of a second are decoded and
judged now and then, as often as a thirtieth of one CPU allows.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from kvmtick.record.recording import Recording
from kvmtick.ticks.histogram import Histogram
from kvmtick.ticks.host import HostTicks
from kvmtick.ticks.source import Source
from kvmtick.ticks.tick import Tick
from kvmtick.ticks.verdict import Verdict
from kvmtick.trace.decoder import Decoder, Merge, TaskNames
from kvmtick.trace.events import BY_NAME, FUNCTIONS, Event, Record
from kvmtick.trace.vms import VmInfo

__all__ = ["LiveSamples", "Sampled"]

WINDOW_S: Final = 0.1
SHARE: Final = 1 / 30
"""So much of one CPU may go into samples."""
EVERY_S: Final = 1.0
MOST_BYTES: Final = 1 << 21
"""More are too many to be decoded while the buffers fill: a shorter window is taken next time."""

_CAME: Final = (Verdict.DELIVERED, Verdict.LATE, Verdict.REINJECTED)
_LOST: Final = (Verdict.COALESCED, Verdict.MASKED, Verdict.DROPPED)


@dataclass(slots=True)
class Sampled:
    """The sampled ticks of one VM."""

    ticks: int = 0
    """So many were judged."""
    lost: int = 0
    """So many of them did not reach the guest."""
    expiry_to_eoi: Histogram = field(default_factory=Histogram)


class LiveSamples:
    """Samples of a recording; `vms` holds what they say, by pid."""

    def __init__(self) -> None:
        self.vms: dict[int, Sampled] = {}
        self._window_s = WINDOW_S
        self._next_s = 0.0
        self._decoder: Decoder | None = None
        self._tasks = TaskNames()

    def window_s(self, now_s: float) -> float:
        """How long a sample is wanted now; 0: none."""
        return self._window_s if now_s >= self._next_s else 0.0

    def sample(self, recording: Recording, pages: list[tuple[int, bytes]]) -> None:
        """Judge the ticks of a short while."""
        start_s = time.thread_time()
        size_bytes = sum(len(page) for _, page in pages)
        if size_bytes <= MOST_BYTES:
            self._judge(recording, pages)
        else:
            self._window_s *= MOST_BYTES / 2 / size_bytes
        cost_s = time.thread_time() - start_s
        self._next_s = time.monotonic() + max(EVERY_S, cost_s / SHARE)

    def _judge(self, recording: Recording, pages: list[tuple[int, bytes]]) -> None:
        decoder = self._decoder = self._decoder or self._decoder_of(recording)
        merge = Merge()
        for cpu, page in pages:
            merge.add(cpu, decoder.decode(page, cpu))
        infos = recording.infos()
        for info in infos:
            for tid, comm in info.threads.items():
                self._tasks.name(tid, comm)
        names = {event.partition(":")[2] for event in recording.events}
        events = frozenset(BY_NAME[name] for name in names if name in BY_NAME)
        host = HostTicks(_Window(infos, self._tasks.names, events, merge.until(None)))
        host.read()
        for vm in host.vms:
            sampled = self.vms.setdefault(vm.pid, Sampled())
            for source in vm.assembler.sources():
                _add(sampled, source)

    def _decoder_of(self, recording: Recording) -> Decoder:
        functions = {at: FUNCTIONS[name] for at, name in recording.functions.items()}
        formats = recording.formats.values()
        return Decoder(recording.header_page, formats, functions, self._tasks)


def _add(sampled: Sampled, source: Source) -> None:
    lost = sum(source.count(verdict) for verdict in _LOST)
    sampled.lost += lost
    sampled.ticks += lost + sum(source.count(verdict) for verdict in _CAME)
    latencies = [ns for tick in source.lives if (ns := _expiry_to_eoi_ns(tick)) is not None]
    if latencies:
        sampled.expiry_to_eoi.add(latencies)


def _expiry_to_eoi_ns(tick: Tick) -> int | None:
    return None if tick.eoi_ns is None else max(0, tick.eoi_ns - tick.expiry_ns)


@dataclass(slots=True)
class _Window:
    """A short while as a `kvmtick.trace.reading.Trace`."""

    vms: list[VmInfo]
    tasks: list[str]
    events: frozenset[Event]
    records: list[Record]
    is_complete: bool = False
    lost: int = 0
    unknown: int = 0
    cut: str = ""
    size_bytes: int = 0
    position_bytes: int = 0

    def batches(self) -> Iterator[list[Record]]:
        yield self.records

    def close(self) -> None:
        pass
