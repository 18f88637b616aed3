"""A fleet of machines with scripted guests: ticks a second on all cores, and what a machine weighs.

    python -m kvmtick.bench.fleet MACHINES TICKS PROCESSES

is what is measured: so many machines that take so many ticks each.
"""

import json
import os
import sys
from functools import partial
from typing import Final

from kvmtick.bench.figure import Demand, Figure, Taken
from kvmtick.bench.kvmtick_run import told
from kvmtick.bench.process import MeasureError, Spent, pinned, run_process
from kvmtick.bench.session import Session

__all__ = ["FIGURES"]

MACHINES: Final = 10_000
LEAST_SHARE: Final = 0.8
MOST_BYTES: Final = 16_000
ALONE: Final = "one"
"""As a peer: one machine alone, times the cores."""
LENGTHS: Final = {1: (10_000, 200_000), 100: (50, 2_000)}
"""Few and many ticks of each, by the number of machines."""
FLEET_LENGTHS: Final = (50, 300)
WEIGHED: Final = (100, 1_000, MACHINES)
PERIOD_NS: Final = 1_000_000


def ticks_per_second(session: Session) -> Taken:
    """One machine on one core and the fleet on all, in turns; then what machines weigh."""
    cores = len(os.sched_getaffinity(0))
    machines = session.scaled(MACHINES)
    taken = Taken(peers={ALONE: []}, details={"machines": machines, "cores": cores})
    for _ in range(session.runs):
        session.progress("one machine")
        with pinned():
            taken.peers[ALONE].append(_rate(session, 1, 1) * cores)
        session.progress(f"{machines:,} machines")
        value = _rate(session, machines, cores)
        # by CPU time it is the rate of one core
        taken.values.append(value * cores if session.cpu_time else value)
    with pinned():
        session.progress("100 machines")
        taken.details["ticks_per_s_of_100_on_one_core"] = _rate(session, 100, 1)
        session.progress("weighing them")
        weights = {count: _bytes_per_machine(count) for count in WEIGHED if count <= machines}
    taken.details["bytes_per_machine"] = weights
    heaviest = max(weights.values())
    taken.note = ", ".join(f"{b:,.0f} bytes a machine of {n:,}" for n, b in weights.items())
    if heaviest >= MOST_BYTES:
        taken.faults.append(f"a machine weighs {heaviest:,.0f} bytes, not under {MOST_BYTES:,}")
    return taken


def _rate(session: Session, machines: int, processes: int) -> float:
    few, many = LENGTHS.get(machines, FLEET_LENGTHS)
    if machines in LENGTHS:  # a quick session has a smaller fleet instead
        many = session.scaled(many)
    return session.rate(partial(_run, machines, processes), few, few + many) * machines


def _run(machines: int, processes: int, ticks: int) -> Spent:
    words = (str(machines), str(ticks), str(processes))
    spent = run_process([sys.executable, "-m", "kvmtick.bench.fleet", *words])
    counts = told(spent)
    if counts["expired"] < machines * ticks or counts["delivered"] != counts["expired"]:
        raise MeasureError(f"of {machines:,} x {ticks:,} ticks these came: {counts}")
    return spent


def _bytes_per_machine(count: int) -> float:
    """All in one process, after some ticks, beside a process with one machine."""
    ticks = 60
    one, all_ = (_weigh(machines, ticks) for machines in (1, count))
    return (all_ - one) / (count - 1)


def _weigh(machines: int, ticks: int) -> int:
    spent = run_process(
        [sys.executable, "-m", "kvmtick.bench.fleet", str(machines), str(ticks), "0"]
    )
    return int(told(spent)["rss_bytes"])


def main() -> None:
    """The process that is measured; with 0 processes it says how large it is."""
    from kvmtick.machine.fleet import Fleet, total
    from kvmtick.machine.fleet_pool import run_fleet

    machines, ticks, processes = map(int, sys.argv[1:])
    for_ns = (ticks + 1) * PERIOD_NS
    if processes:
        print(json.dumps(total(run_fleet(machines, for_ns, processes=processes))))
        return
    with Fleet(machines) as fleet:
        fleet.run(for_ns)
        print(json.dumps({"rss_bytes": _rss_bytes()}))


def _rss_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


FIGURES: Final = (
    Figure(
        "fleet",
        f"{MACHINES:,} scripted machines on all cores, under {MOST_BYTES // 1000} kB each",
        "ticks/s",
        ticks_per_second,
        (Demand(LEAST_SHARE, ALONE),),
        pinned=False,
    ),
)

if __name__ == "__main__":
    main()
