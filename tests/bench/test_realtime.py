"""Real time: what is made of the engines' turns."""

from pathlib import Path
from typing import Any

import pytest

from kvmtick.bench import realtime
from kvmtick.bench.figure import Result
from kvmtick.bench.figures import FIGURES
from kvmtick.bench.session import Session

FIGURE = FIGURES["realtime-1k"]


def gave(p99_ns: int | None, lost: int = 0) -> dict[str, Any]:
    """What an engine tells of 1,000 expiries."""
    times_ns = {"p50": 20_000, "p99": p99_ns or 30_000, "max": 90_000, "p99_of_expired": p99_ns}
    return {**times_ns, "expired": 1000, "taken": 1000 - lost, "lost": lost}


def taken(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *turns: dict[str, dict[str, Any] | str]
) -> Result:
    left = iter(turns)
    monkeypatch.setattr(realtime, "measure", lambda *_: next(left))
    return Result(FIGURE, FIGURE.take(Session(len(turns), False, tmp_path)))


def test_the_lower_p99_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    one = {"kvmtick": gave(60_000), "qemu": gave(90_000, lost=5), "kernel": "no /dev/kvm"}
    two = {"kvmtick": gave(70_000), "qemu": gave(80_000), "kernel": "no /dev/kvm"}
    told = taken(monkeypatch, tmp_path, one, two).as_dict()
    assert (told["value"], told["mark"], told["met"], told["faults"]) == (60, 80, True, [])
    assert (told["peer"], told["ratio"]) == ("qemu", 0.75)
    assert told["peers"]["kernel"]["absent"] == "no /dev/kvm"


def test_a_lost_tick_misses_the_mark(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    told = taken(
        monkeypatch, tmp_path, {"kvmtick": gave(60_000, lost=1), "qemu": gave(90_000)}
    ).as_dict()
    assert (told["met"], told["faults"]) == (False, ["1 of 1000 ticks were lost"])


def test_too_many_lost_are_as_late_as_the_run_is_long(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    turn = {"kvmtick": gave(None, lost=20), "qemu": gave(90_000)}
    assert taken(monkeypatch, tmp_path, turn).value == realtime.DURATION_S * 1e6


def test_a_peer_that_fails_once_is_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ours = gave(60_000)
    told = taken(
        monkeypatch,
        tmp_path,
        {"kvmtick": ours, "qemu": gave(90_000)},
        {"kvmtick": ours, "qemu": "qemu is gone"},
    ).as_dict()
    assert (told["met"], told["mark"], told["ratio"]) == (None, None, None)
    assert told["peers"]["qemu"]["absent"] == "qemu is gone"
