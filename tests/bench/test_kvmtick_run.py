"""Runs of ours that are measured: a guest that is not done, or misses a tick, gives no figure."""

from pathlib import Path

import pytest

from kvmtick.bench.guest_code import loop
from kvmtick.bench.kvmtick_run import run_guest, run_ticks
from kvmtick.bench.process import MeasureError


def test_every_tick_is_taken() -> None:
    spent = run_ticks("tick-pic", 50)
    assert spent.cpu_s > 0
    assert spent.peak_rss_bytes > 10_000_000


def test_a_tick_that_does_not_reach_the_guest_is_found() -> None:
    with pytest.raises(MeasureError, match=r"tick-if0 took 9 of 9 ticks: .*'reinjected': "):
        run_ticks("tick-if0", 9, "--hold", "5ms")


def test_a_guest_that_is_not_done_is_found(tmp_path: Path) -> None:
    path = tmp_path / "loop.bin"
    path.write_bytes(loop("registers", 1000).image)
    with pytest.raises(MeasureError, match=r"ended with .*'time'"):
        run_guest(str(path), "--for", "1us")
    assert run_guest(str(path), "--fast")[1]["exit"]["reason"] == "done"


def test_a_run_that_fails_says_why() -> None:
    with pytest.raises(MeasureError, match=r"ended with exit code 2: kvmtick: .*tick-pick"):
        run_guest("tick-pick")
