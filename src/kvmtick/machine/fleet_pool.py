"""A fleet over the cores of this host: parts of it in worker processes, each of one thread.

A part is a `kvmtick.machine.fleet.Fleet` of its own. Machines are numbered and seeded over the
whole fleet, so the number of processes changes no machine's run.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import signal
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from multiprocessing.synchronize import Event

from kvmtick.abi.errors import HostError
from kvmtick.cpu.listed import Listing
from kvmtick.machine.fleet import MOST_MACHINES, SLICE_NS, Fleet, MachineTicks, listing_of

__all__ = ["run_fleet"]

PART_MACHINES = 500
"""Of a large fleet: progress comes in such steps."""
PARTS_PER_PROCESS = 4
"""At least, if there are so many machines: who is done early takes another part."""
START_METHOD = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"

_PR_SET_PDEATHSIG = 1

_stop: Event | None = None
"""In a worker: the whole run is to end."""


@dataclass(frozen=True, slots=True)
class _Part:
    """Machines `first` to `first + count - 1`."""

    first: int
    count: int
    for_ns: int
    guest: Listing
    seed: int
    faults: dict[str, str]
    reinject: bool
    slice_ns: int

    def run(self, until: Callable[[], bool] | None = None) -> list[MachineTicks]:
        with Fleet(
            self.count,
            self.guest,
            seed=self.seed,
            faults=self.faults,
            reinject=self.reinject,
            first=self.first,
        ) as fleet:
            fleet.run(self.for_ns, slice_ns=self.slice_ns, until=until)
            return fleet.results()


def run_fleet(
    count: int,
    for_ns: int,
    guest: str | Listing = "tick-pic",
    *,
    seed: int = 0,
    faults: Mapping[str, str] | None = None,
    reinject: bool = True,
    slice_ns: int = SLICE_NS,
    processes: int | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> list[MachineTicks]:
    """What becomes of `count` machines in `for_ns` of their time, in their order.

    `processes`: None is one for each core this process may use; with 1 all is done here.
    `on_progress` gets the number of machines that are done. The rest is as for `Fleet`. ValueError:
    as there; HostError: a worker process died. Ctrl-C ends the workers too.
    """
    if processes is None:
        processes = len(os.sched_getaffinity(0))
    if processes < 1:
        raise ValueError(f"processes={processes}: give 1 or more, or None for one per core")
    if not 0 < count <= MOST_MACHINES:
        raise ValueError(f"count={count}: give 1 to {MOST_MACHINES} machines")
    whole = _Part(0, count, for_ns, listing_of(guest), seed, dict(faults or {}), reinject, slice_ns)
    _try_out(whole)
    parts = _divided(whole, processes)
    if processes == 1:
        return _run_here(parts, on_progress)
    return _run_in_pool(parts, min(processes, len(parts)), on_progress)


def _try_out(whole: _Part) -> None:
    """What is wrong with the arguments is told here, before there are processes."""
    replace(whole, count=1, for_ns=min(whole.for_ns, 0)).run()


def _divided(whole: _Part, processes: int) -> list[_Part]:
    size = max(1, min(PART_MACHINES, whole.count // (processes * PARTS_PER_PROCESS)))
    return [
        replace(whole, first=first, count=min(size, whole.count - first))
        for first in range(0, whole.count, size)
    ]


def _run_here(parts: list[_Part], on_progress: Callable[[int], None] | None) -> list[MachineTicks]:
    results: list[MachineTicks] = []
    for part in parts:
        results += part.run()
        if on_progress is not None:
            on_progress(len(results))
    return results


def _run_in_pool(
    parts: list[_Part], processes: int, on_progress: Callable[[int], None] | None
) -> list[MachineTicks]:
    context = multiprocessing.get_context(START_METHOD)
    stop = context.Event()
    done = 0
    with ProcessPoolExecutor(processes, context, _begin_worker, (stop,)) as pool:
        futures: list[Future[list[MachineTicks]]] = []
        try:
            futures += [pool.submit(_run_part, part) for part in parts]
            for future in as_completed(futures):
                done += len(future.result())
                if on_progress is not None:
                    on_progress(done)
        except BrokenProcessPool:
            raise HostError(
                "a worker process of the fleet died (out of memory, or killed)",
                "run fewer machines or processes, and see the kernel's log",
            ) from None
        finally:
            # After an exception, Ctrl-C's too: whoever still runs leaves at the end of its round.
            stop.set()
            pool.shutdown(cancel_futures=True)
        return [machine for future in futures for machine in future.result()]


def _begin_worker(stop: Event) -> None:
    """Ctrl-C reaches all of the terminal's processes; the one that started these tells them. When
    that one is killed it cannot: then the kernel ends them (prctl(2)).
    """
    global _stop
    _stop = stop
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Machines are made and dropped together: see `_run_part`.
    gc.disable()


def _run_part(part: _Part) -> list[MachineTicks]:
    assert _stop is not None
    try:
        return part.run(until=_stop.is_set)
    finally:
        gc.collect()
