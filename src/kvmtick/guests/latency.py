"""What `tick-latency` measured: how long after its expiry each tick's handler began.

The guest leaves samples of the PIT's counters and of the TSC in its memory (its source says where
and which); `read` makes latencies of them. That way they are measured the same on everything that
runs the guest: all it needs is the guest's memory from 1 MiB on after the run.

Not modelled: a period other than the count asked for, as KVM's floor for short ones makes it. The
counter that tells the latency then says nothing about the timer.
"""

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Final

from kvmtick.guests import PARAMETERS, PIT_HZ, Parameters

__all__ = ["SAMPLES_AT", "Latencies", "read"]

SAMPLES_AT: Final = 0x10_0000
"""Guest-physical address of the first sample."""

_SAMPLE: Final = struct.Struct("<HHI")
_ROUND: Final = 0x1_0000
"""Counts of channel 2 until it is back where it was, 55 ms."""
_WAITS: Final = 8
_LEAST_SAMPLES: Final = _WAITS + 4
_TSC_WORD: Final = 1 << 32
_NS_PER_S: Final = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Latencies:
    """The ticks of one run of `tick-latency`."""

    counts: list[int]
    """From expiry to handler, of each tick that came while the timer ran: in PIT counts."""
    expired: int
    """How often the timer expired, by its own counter."""
    taken: int
    """How many ticks the guest took, those that were owed when the timer stopped included."""

    @property
    def lost(self) -> int:
        """Expiries that never reached the guest."""
        return self.expired - self.taken

    def percentile_ns(self, percent: float) -> int:
        """The latency in ns that so many of the ticks taken do not exceed; 100 is the maximum."""
        return self._ranked_ns(percent, len(self.counts)) or 0

    def percentile_of_expired_ns(self, percent: float) -> int | None:
        """The same of all expiries; None where that one never reached the guest."""
        return self._ranked_ns(percent, len(self.counts) + max(0, self.lost))

    def _ranked_ns(self, percent: float, of: int) -> int | None:
        rank = max(1, math.ceil(of * percent / 100))
        if rank > len(self.counts):
            return None
        return sorted(self.counts)[rank - 1] * _NS_PER_S // PIT_HZ


@dataclass(frozen=True, slots=True)
class _Sample:
    """Counters 0 and 2 and the low half of the TSC, at one moment."""

    channel0: int
    channel2: int
    tsc: int

    def counts_since(self, before: "_Sample", tsc_per_count: float) -> int:
        """PIT counts from one sample to a later one, at most 2^32 TSC ticks apart."""
        counts = (before.channel2 - self.channel2) % _ROUND
        by_tsc = (self.tsc - before.tsc) % _TSC_WORD / tsc_per_count
        return counts + max(0, round((by_tsc - counts) / _ROUND)) * _ROUND


def read(read_memory: Callable[[int, int], bytes], replays: bool) -> Latencies:
    """The latencies of a guest that is done; `read_memory` takes address and size in bytes.

    `replays`: the ticks that the guest could not take in time come later, all of them and in order
    (KVM's PIT with reinjection on): the n-th that is taken is the n-th expiry. Else a tick is the
    first expiry since the one before was taken, for a request that is still set takes the rest.

    ValueError if there is no parameter block, or the guest did not come to its end.
    """
    block = Parameters.read(read_memory(PARAMETERS.magic, Parameters.SIZE_BYTES), 0)
    count, owed, *_ = block.snapshot
    if count < _LEAST_SAMPLES:
        raise ValueError("the guest has left no samples: run tick-latency until it is done")
    memory = read_memory(SAMPLES_AT, count * _SAMPLE.size)
    samples = [_Sample(*each) for each in _SAMPLE.iter_unpack(memory)]
    tsc_per_count = _tsc_per_count(samples[: _WAITS + 1])
    *handlers, stop = _expiries(samples[_WAITS + 1 :], block.divisor, tsc_per_count)
    taken = len(handlers) + owed
    # What fell due while the guest was stopping the timer may have expired, or been too late to.
    expired = min(max(taken, handlers[-1][0]), stop[0])
    return Latencies(_late(handlers, block.divisor, replays), expired, taken)


def _tsc_per_count(samples: list[_Sample]) -> float:
    """How fast the TSC runs: the median, for in a wait that the host makes long the counter may
    have gone round.
    """
    return median(
        (after.tsc - before.tsc) % _TSC_WORD / ((before.channel2 - after.channel2) % _ROUND)
        for before, after in pairwise(samples)
    )


def _expiries(samples: list[_Sample], divisor: int, tsc_per_count: float) -> list[tuple[int, int]]:
    """For each sample but the first: how often the timer had expired, and counts since then.

    The counters drift against each other, for a timer's period is whole nanoseconds: by less than a
    count from one sample to the next.
    """
    expiries: list[tuple[int, int]] = []
    expired, before = 0, samples[0]
    phase = (divisor - before.channel0) % divisor
    for sample in samples[1:-1]:
        passed = sample.counts_since(before, tsc_per_count)
        before, phase_before = sample, phase
        phase = (divisor - sample.channel0) % divisor
        expired += round((passed + phase_before - phase) / divisor)
        expiries.append((expired, phase))
    # channel 0 does not count any more
    passed = phase + samples[-1].counts_since(before, tsc_per_count)
    expiries.append((expired + passed // divisor, passed % divisor))
    return expiries


def _late(handlers: list[tuple[int, int]], divisor: int, replays: bool) -> list[int]:
    """What each handler was late by, in PIT counts; `read` says after which expiry."""
    late: list[int] = []
    done = 0
    for expired, phase in handlers:
        # With none since then it is one that came between that handler's start and its look at the
        # counter, or one too many.
        taken = min(done + 1, expired)
        late.append((expired - taken) * divisor + phase)
        done = taken if replays else expired
    return late
