"""How fast and how large `kvmtick run` is: ticks a second, memory, start-up.

Each figure is taken in processes of its own, pinned to one core, several times; best and median
are shown, for the machine is rarely alone. `--json` for programs, `--runs N` for how often.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

KVMTICK = (sys.executable, "-m", "kvmtick")
SPEED_TICKS = 100_000
MEMORY_TICKS = 1_000_000
MARKS = {
    "tick-pic": (60_000, "ticks/s", "at least"),
    "memory": (200, "MB peak RSS over 1,000,000 ticks", "at most"),
    "start-help": (100, "ms for kvmtick --help", "at most"),
}


def ticks_per_second() -> float:
    """`tick-pic` in virtual time, verdicts on, no trace."""
    run = json.loads(_output("run", "--ticks", str(SPEED_TICKS), "--json"))
    return float(run["ticks"]["expired"] / run["wall_s"])


def peak_rss_mb() -> float:
    """The largest resident set of a run of 1,000,000 ticks."""
    process = subprocess.Popen(
        [*KVMTICK, "run", "--ticks", str(MEMORY_TICKS), "--limit", "10m", "--json"],
        stdout=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"kvmtick run ended with status {status}")
    return usage.ru_maxrss / 1024


def help_ms() -> float:
    """From starting the process to its end."""
    started_s = time.perf_counter()
    _output("--help")
    return (time.perf_counter() - started_s) * 1000


def _output(*arguments: str) -> str:
    command = [*KVMTICK, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5, help="how often to take each figure (5)")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    options = parser.parse_args()
    # The processes that are measured inherit it.
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    takes: dict[str, tuple[Callable[[], float], int]] = {
        "tick-pic": (ticks_per_second, options.runs),
        "memory": (peak_rss_mb, 1),
        "start-help": (help_ms, options.runs),
    }
    marks = []
    for name, (take, runs) in takes.items():
        values = [take() for _ in range(runs)]
        mark, unit, sense = MARKS[name]
        best = max(values) if sense == "at least" else min(values)
        met = best >= mark if sense == "at least" else best <= mark
        median = statistics.median(values)
        marks.append(
            {"name": name, "best": best, "median": median, "unit": unit, "mark": mark, "met": met}
        )
        if not options.json:
            verdict = "met" if met else "missed"
            print(
                f"{name:<12} best {best:>10,.1f}  median {median:>10,.1f}  {unit}"
                f"  ({sense} {mark:,}: {verdict})",
                flush=True,
            )
    if options.json:
        print(json.dumps({"marks": marks}))


if __name__ == "__main__":
    main()
