"""How fast recordings are read: million events a second from raw pages to records in order of time.

    python benchmarks/read_raw.py [FILE.ktrace] [--events N] [--runs N] [--dat FILE.dat]

The pages of FILE, or of tests/trace/recorded.json (a real kernel's, too), are repeated with later
times until there are N events. One process; seconds are those of its CPU time, and the best of
several runs counts, for the machine is rarely alone. With `--dat` (of `trace-cmd record`)
`trace-cmd report` of that file is timed too, and compared.
`--json` for programs.
"""

import argparse
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from kvmtick.trace.decoder import Decoder, Merge
from kvmtick.trace.events import Function
from kvmtick.trace.formats import FormatError
from kvmtick.trace.ktrace import Header, KtraceReader, KtraceWriter

RECORDED = Path(__file__).parents[1] / "tests" / "trace" / "recorded.json"
LEAST = 0.7
TIME_BYTES = 8
GAP_NS = 1_000_000
A_DAY_NS = 86_400_000_000_000
PAGES_A_MARK = 64
Pages = list[tuple[int, bytes]]


def first_ns(page: bytes) -> int:
    """The time of a page, as x86-64 has it."""
    return int.from_bytes(page[:TIME_BYTES], "little")


def shifted(page: bytes, by_ns: int) -> bytes:
    """The page, so much later."""
    return (first_ns(page) + by_ns).to_bytes(TIME_BYTES, "little") + page[TIME_BYTES:]


def recorded() -> tuple[Header, Pages]:
    """The recording of the tests."""
    told = json.loads(RECORDED.read_text())
    header = Header("host", told["header_page"], told["formats"], told["functions"])
    pages = [
        (cpu, bytes.fromhex(page)) for run in told["runs"].values() for cpu, page in run["pages"]
    ]
    return header, sorted(pages, key=lambda each: first_ns(each[1]))


def of_file(path: Path) -> tuple[Header, Pages]:
    """Header and pages of a recording."""
    with KtraceReader(path) as trace:
        return trace.header, list(trace.pages())


def decoder(header: Header) -> Decoder:
    """For the kernel of a recording."""
    names = {function.name.lower(): function for function in Function}
    functions = {int(at, 16): names[name] for at, name in header.functions.items() if name in names}
    return Decoder(header.header_page, header.formats, functions)


def has_no_time_of_its_own(by: Decoder, cpu: int, page: bytes) -> bool:
    """Whether all its times count from the page's: where an interrupt came amidst the writing of
    an event, the kernel writes a time stamp.
    """
    try:
        by.decode(shifted(page, A_DAY_NS), cpu)
    except FormatError:
        return False
    return True


def repeated(header: Header, pages: Pages, events: int) -> tuple[list[Pages], int]:
    """Pages again and again, later and later, until there are so many events; and how many."""
    by = decoder(header)
    pages = [(cpu, page) for cpu, page in pages if has_no_time_of_its_own(by, cpu, page)]
    times = [record[0] for cpu, page in pages for record in by.decode(page, cpu)]
    span_ns = max(times) - min(first_ns(page) for _, page in pages) + GAP_NS
    rounds = -(-events // len(times))
    again = [[(cpu, shifted(page, n * span_ns)) for cpu, page in pages] for n in range(rounds)]
    return again, rounds * len(times)


def write(path: Path, header: Header, rounds: list[Pages]) -> None:
    """All rounds as a recording, with marks as often as a recorder has them."""
    pages = [each for pages in rounds for each in pages]
    still_to_come: list[int] = []
    for _, page in reversed(pages):
        still_to_come.append(min([first_ns(page), *still_to_come[-1:]]))
    with path.open("wb") as file:
        writer = KtraceWriter(file, header)
        for (cpu, page), ts_ns in zip(pages, reversed(still_to_come), strict=True):
            if not writer.pages % PAGES_A_MARK:
                writer.mark(ts_ns)
            writer.page(cpu, page)
        writer.end(0, 0)


def read(path: Path) -> int:
    """The whole file."""
    with KtraceReader(path) as trace:
        return sum(map(len, trace.batches()))


def decode(header: Header, rounds: list[Pages]) -> int:
    """Pages alone, in memory."""
    by = decoder(header)
    return sum(len(by.decode(page, cpu)) for pages in rounds for cpu, page in pages)


def merge(header: Header, rounds: list[Pages]) -> Iterator[float]:
    """Seconds for putting each round in order."""
    by, merge = decoder(header), Merge()
    for pages in rounds:
        decoded = [(cpu, by.decode(page, cpu)) for cpu, page in pages]
        begin = time.process_time()
        for cpu, records in decoded:
            merge.add(cpu, records)
        merge.until(None)
        yield time.process_time() - begin


def best(runs: int, events: int, work: Callable[[], int]) -> float:
    """Million events a second."""
    fastest = float("inf")
    for _ in range(runs):
        begin = time.process_time()
        done = work()
        fastest = min(fastest, time.process_time() - begin)
        if done != events:
            raise SystemExit(f"read_raw: {done} events were read, not {events}")
    return events / fastest / 1e6


def trace_cmd(dat: Path, runs: int) -> float:
    """Million lines a second of `trace-cmd report`."""
    if shutil.which("trace-cmd") is None:
        raise SystemExit("read_raw: --dat needs trace-cmd; install it or leave --dat out")
    fastest, lines = float("inf"), 0
    for _ in range(runs):
        begin = os.times()
        done = subprocess.run(["trace-cmd", "report", str(dat)], capture_output=True, check=True)
        end = os.times()
        spent = end.children_user - begin.children_user + end.children_system
        fastest = min(fastest, spent - begin.children_system)
        lines = done.stdout.count(b"\n")
    return lines / fastest / 1e6


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="How fast recordings are read.")
    parser.add_argument("file", nargs="?", type=Path, help="a .ktrace file (recorded.json)")
    parser.add_argument("--events", type=int, default=1_000_000, help="at least so many (1000000)")
    parser.add_argument("--runs", type=int, default=5, help="the best of so many (5)")
    parser.add_argument("--dat", type=Path, help="time trace-cmd report on this file, too")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    options = parser.parse_args()
    header, pages = recorded() if options.file is None else of_file(options.file)
    rounds, events = repeated(header, pages, options.events)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "big.ktrace"
        write(path, header, rounds)
        size = path.stat().st_size
        whole = best(options.runs, events, lambda: read(path))
    alone = best(options.runs, events, lambda: decode(header, rounds))
    merged = events / min(sum(merge(header, rounds)) for _ in range(options.runs)) / 1e6
    told = {
        "events": events,
        "size_bytes": size,
        "read_million_per_s": round(whole, 3),
        "decode_million_per_s": round(alone, 3),
        "merge_million_per_s": round(merged, 3),
    }
    if options.dat is not None:
        theirs = trace_cmd(options.dat, options.runs)
        told["trace_cmd_million_per_s"] = round(theirs, 3)
        told["times_trace_cmd"] = round(whole / theirs, 2)
    if options.json:
        print(json.dumps(told))
        return
    print(f"{events:,} events, {size / 1e6:.0f} MB, best of {options.runs}")
    print(f"file to records in order  {whole:6.2f} million events/s (at least {LEAST})")
    print(f"  of that decoding alone  {alone:6.2f}")
    print(f"  of that merging alone   {merged:6.2f}")
    if options.dat is not None:
        print(f"trace-cmd report          {theirs:6.2f}, so {whole / theirs:.2f} times as fast")


if __name__ == "__main__":
    main()
