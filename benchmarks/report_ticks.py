"""How long `kvmtick report` takes for 1,000,000 ticks, and how much memory.

The trace is that of a simulated guest at 1 kHz, with every VM entry and exit: 19 events a tick; or
`--file` names one. The report is made in a process of its own, several times (`--runs`); best and
median are shown, of wall time and of CPU time, for the machine is rarely alone. `--json` for
programs, `--ticks` for fewer, `--keep FILE` keeps the trace.

    python benchmarks/report_ticks.py
    python benchmarks/report_ticks.py --file t.ktrace --runs 1
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

KVMTICK = (sys.executable, "-m", "kvmtick")
TICKS = 1_000_000
MARKS = {"wall_s": 30.0, "memory_mb": 1000.0}
"""At most, for 1,000,000 ticks."""


def main() -> None:
    """Measure and print."""
    options = _options()
    with tempfile.TemporaryDirectory() as folder:
        if options.file:
            path = Path(options.file)
        else:
            path = Path(options.keep or f"{folder}/run.ktrace")
            _make(path, options.ticks)
        runs = [_report(path) for _ in range(options.runs)]
    told = runs[0]
    result = {
        "ticks": told["ticks"],
        "events": told["events"],
        "file_mb": told["file_mb"],
        **{
            name: {"best": min(values), "median": statistics.median(values)}
            for name in ("wall_s", "cpu_s", "memory_mb")
            for values in [[run[name] for run in runs]]
        },
    }
    print(json.dumps(result) if options.json else _text(result))


def _options() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    p.add_argument("--ticks", type=int, default=TICKS)
    p.add_argument("--runs", type=int, default=3)
    p.add_argument("--file", help="report on this trace")
    p.add_argument("--keep", metavar="FILE", help="where to leave the trace that is made")
    p.add_argument("--json", action="store_true")
    return p.parse_args()


def _make(path: Path, ticks: int) -> None:
    arguments = ("run", "tick-pic", "--ticks", str(ticks), "--trace", str(path), "--limit", "30m")
    subprocess.run([*KVMTICK, *arguments, "--json"], check=True, stdout=subprocess.DEVNULL)


def _report(path: Path) -> dict[str, float]:
    """One report, in a process whose peak memory is asked for when it ends."""
    start_s = time.perf_counter()
    process = subprocess.Popen([*KVMTICK, "report", str(path), "--json"], stdout=subprocess.PIPE)
    assert process.stdout is not None
    told = json.loads(process.stdout.read())
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    wall_s = time.perf_counter() - start_s
    if process.returncode:
        sys.exit(f"kvmtick report ended with exit code {process.returncode}")
    sources = [source for vm in told["vms"] for source in vm["sources"]]
    return {
        "ticks": sum(source["ticks"]["expired"] for source in sources),
        "events": told["events"],
        "file_mb": path.stat().st_size / 1e6,
        "wall_s": wall_s,
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "memory_mb": usage.ru_maxrss * 1024 / 1e6,
    }


def _text(result: dict[str, object]) -> str:
    lines = [
        f"{result['ticks']:,} ticks, {result['events']:,} events, {result['file_mb']:,.0f} MB",
    ]
    for name in ("wall_s", "cpu_s", "memory_mb"):
        value = result[name]
        assert isinstance(value, dict)
        mark = ""
        if name in MARKS and result["ticks"] == TICKS:
            mark = f"   (at most {MARKS[name]:g})"
        lines.append(
            f"{name:<10} best {value['best']:>8,.1f}   median {value['median']:>8,.1f}{mark}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
