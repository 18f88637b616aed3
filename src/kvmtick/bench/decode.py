"""How fast a million real events are read: raw pages of a recording, and ftrace text, which
`trace-cmd report` makes of the same pages. CPU time.

    python -m kvmtick.bench.decode FILE

is the process that is measured; start-up is outside.
"""

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Final

from kvmtick.bench.figure import Demand, Figure, Taken
from kvmtick.bench.kvmtick_run import told
from kvmtick.bench.process import MeasureError, run_process
from kvmtick.bench.recorded import write_dat, write_ktrace
from kvmtick.bench.session import NOT_INSTALLED, Session

__all__ = ["FIGURES"]

EVENTS: Final = 1_000_000
LEAST_RAW: Final = 2.0
TIMES_TRACE_CMD: Final = 1.5
UNIT: Final = "M events/s"


def main() -> None:
    """The process that is measured: all records of a file, in order."""
    from kvmtick.trace.reading import open_trace

    begin_s = time.process_time()
    with open_trace(Path(sys.argv[1])) as trace:
        records = sum(map(len, trace.batches()))
        cpu_s = time.process_time() - begin_s
        print(json.dumps({"cpu_s": cpu_s, "records": records, "unknown": trace.unknown}))


def raw(session: Session) -> Taken:
    """A recording of ours."""
    path = session.folder / "events.ktrace"
    session.progress("making a recording")
    events = write_ktrace(path, session.scaled(EVENTS))
    return session.in_turns(lambda: _read(path, events), {})


def text(session: Session) -> Taken:
    """The text trace-cmd makes, and how fast it makes it."""
    if shutil.which("trace-cmd") is None:
        return Taken(
            absent={"trace-cmd": NOT_INSTALLED}, note="trace-cmd is not installed: nothing to read"
        )
    dat, path = session.folder / "trace.dat", session.folder / "trace.txt"
    session.progress("making a trace.dat")
    events = write_dat(dat, session.scaled(EVENTS))
    taken = Taken(peers={"trace-cmd": []})
    for _ in range(session.runs):
        session.progress("trace-cmd")
        taken.peers["trace-cmd"].append(_report(dat, path, events))
        session.progress("kvmtick")
        taken.values.append(_read(path, events))
    return taken


def _read(path: Path, events: int) -> float:
    found = told(run_process([sys.executable, "-m", "kvmtick.bench.decode", str(path)]))
    if found["records"] != events or found["unknown"]:
        raise MeasureError(f"{found['records']} of {events} events were read: {found}")
    return events / float(found["cpu_s"]) / 1e6


def _report(dat: Path, text: Path, events: int) -> float:
    spent = run_process(["trace-cmd", "report", "-i", str(dat)], output=text)
    return events / spent.cpu_s / 1e6


FIGURES: Final = (
    Figure(
        "decode-raw", "raw pages of a recording, read in order", UNIT, raw, (Demand(LEAST_RAW),)
    ),
    Figure(
        "decode-text",
        "ftrace text, read in order",
        UNIT,
        text,
        (Demand(TIMES_TRACE_CMD, "trace-cmd"),),
    ),
)

if __name__ == "__main__":
    main()
