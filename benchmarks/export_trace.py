"""What the exports cost, beside reading the same trace and putting its ticks together.

    python benchmarks/export_trace.py FILE

FILE: a trace, such as `kvmtick run --ticks 100000 --trace FILE.ktrace` writes. CPU time; each part
runs in a process of its own, so that its memory is its own.
"""

import multiprocessing
import resource
import sys
import tempfile
import time
from pathlib import Path

from kvmtick.report.perfetto import write_perfetto
from kvmtick.report.tables import write_tables
from kvmtick.ticks.host import HostTicks
from kvmtick.trace.reading import open_trace

PARTS = ("read", "parquet", "perfetto")


def measure(part: str, source: Path, scratch: Path) -> tuple[float, int]:
    """CPU seconds and peak memory in bytes of a part."""
    start_s = time.process_time()
    if part == "read":
        with open_trace(source) as trace:
            HostTicks(trace).read()
    elif part == "parquet":
        write_tables(source, scratch)
    else:
        write_perfetto(source, scratch / "t.pftrace")
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return time.process_time() - start_s, peak_bytes


def main() -> None:
    """Measure and print."""
    source = Path(sys.argv[1])
    with open_trace(source) as trace:
        events = sum(map(len, trace.batches()))
    context = multiprocessing.get_context("spawn")
    for part in PARTS:
        with tempfile.TemporaryDirectory() as scratch, context.Pool(1) as pool:
            cpu_s, peak_bytes = pool.apply(measure, (part, source, Path(scratch)))
        print(
            f"{part:<9}{events:>11,} events in {cpu_s:7.2f} s of CPU: {events / cpu_s:>9,.0f}/s,"
            f" peak {peak_bytes / 1e6:,.0f} MB"
        )


if __name__ == "__main__":
    main()
