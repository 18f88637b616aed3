"""The events that are read: as many as is said, in order, and trace-cmd takes them."""

import shutil
import subprocess
from pathlib import Path

import pytest

from kvmtick.bench.chips import run_ticks
from kvmtick.bench.recorded import write_dat, write_ktrace
from kvmtick.trace.reading import open_trace

EVENTS = 3_000


def test_a_recording_has_so_many_events_in_order(tmp_path: Path) -> None:
    path = tmp_path / "t.ktrace"
    events = write_ktrace(path, EVENTS)
    assert events >= EVENTS
    with open_trace(path) as trace:
        times_ns = [record[0] for batch in trace.batches() for record in batch]
    assert len(times_ns) == events
    assert times_ns == sorted(times_ns)


@pytest.mark.skipif(shutil.which("trace-cmd") is None, reason="trace-cmd is not installed")
def test_trace_cmd_makes_text_of_as_many(tmp_path: Path) -> None:
    dat, text = tmp_path / "trace.dat", tmp_path / "trace.txt"
    events = write_dat(dat, EVENTS)
    with text.open("wb") as file:
        subprocess.run(["trace-cmd", "report", "-i", str(dat)], stdout=file, check=True, timeout=60)
    with open_trace(text) as trace:
        assert sum(map(len, trace.batches())) == events
        assert trace.unknown == 0


def test_the_scripted_guest_takes_every_tick() -> None:
    verdicts = run_ticks(100)
    assert 100 <= verdicts["expired"] == verdicts["delivered"]
