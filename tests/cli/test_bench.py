"""`kvmtick bench`: names, options, the object, peers that are missing or fail."""

import json
import os
import select
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from terminal import Terminal, process

from kvmtick.bench import chips, ticks
from kvmtick.bench.figures import FIGURES
from kvmtick.bench.process import MeasureError, Spent

KEYS = {"name", "value", "unit", "mark", "met", "peer", "ratio"}


@pytest.fixture
def no_peers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """PATH is an empty folder; we take 1,000 ticks a second."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(
        ticks, "run_ticks", lambda _, count: Spent(1 + count / 1e3, 1, 1, 0, "", "")
    )
    return tmp_path


def marks(kvmtick: Terminal, *arguments: str) -> dict[str, dict[str, Any]]:
    result = kvmtick("bench", "--runs", "1", "--quick", "--json", *arguments)
    assert (result.code, result.err) == (0, "")
    return {mark["name"]: mark for mark in json.loads(result.out)["marks"]}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["tick-pick"], "there is no figure 'tick-pick': there are tick-pic, tick-ioapic,"),
        (["--runs", "0"], "--runs 0: give 1 to 1000"),
        (["--runs", "-3"], "--runs -3: give 1 to 1000"),
        (["--runs", "many"], "--runs 'many' is not a whole number: give digits only"),
        (["--fast"], "unrecognized arguments: --fast; see kvmtick bench --help"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(
    kvmtick: Terminal, arguments: list[str], told: str
) -> None:
    result = kvmtick("bench", *arguments)
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith(f"kvmtick: {told}")
    assert result.err.count("\n") == 1


def test_the_list_names_every_figure_with_its_mark(kvmtick: Terminal) -> None:
    lines = kvmtick("bench", "--list").out.splitlines()
    assert lines[::2] == list(FIGURES)
    assert lines[1].endswith("at least 10 x QEMU")
    told = json.loads(kvmtick("bench", "--list", "--json", "memory").out)
    assert [figure["name"] for figure in told["figures"]] == ["memory"]
    assert told["figures"][0]["mark"] == "at most 150 MB"


def test_the_object(kvmtick: Terminal) -> None:
    result = kvmtick("bench", "start-help", "--runs", "3", "--json")
    assert (result.code, result.err) == (0, "")
    told = json.loads(result.out)
    (mark,) = told["marks"]
    assert mark.keys() >= KEYS
    assert (mark["name"], mark["unit"], mark["mark"]) == ("start-help", "ms", 80)
    assert mark["met"] is (mark["value"] <= 80)
    assert mark["value"] == mark["best"] <= mark["median"]
    assert (mark["runs"], told["runs"], told["quick"], told["time"]) == (3, 3, False, "wall")
    assert told["machine"]["python"].endswith(sys.version.split()[0])
    assert isinstance(told["machine"]["compiled"], bool)


def test_without_peers_marks_are_not_told(kvmtick: Terminal, no_peers: Path) -> None:
    found = marks(kvmtick, "tick-pic", "decode-text")
    mark = found["tick-pic"]
    assert mark["value"] == pytest.approx(1_000)
    assert (mark["mark"], mark["met"], mark["peer"], mark["ratio"]) == (None, None, "qemu", None)
    assert mark["peers"]["qemu"]["absent"] == "not installed"
    assert mark["peers"]["bochs"]["absent"] == "not installed"
    assert [stretch["met"] for stretch in mark["stretch"]] == [None, False]
    assert (found["decode-text"]["value"], found["decode-text"]["met"]) == (None, None)


def test_a_peer_that_fails_is_a_line_in_the_table(kvmtick: Terminal, no_peers: Path) -> None:
    program = no_peers / "qemu-system-x86_64"
    program.write_text("#!/bin/sh\necho no such machine >&2\nexit 2\n")
    program.chmod(0o755)
    result = kvmtick("bench", "tick-pic", "--runs", "1", "--quick")
    assert (result.code, result.err) == (0, "")
    assert "qemu-system-x86_64 ended with exit code 2: no such machine" in result.out
    assert "bochs: not installed" in result.out


def test_a_figure_that_cannot_be_taken_does_not_end_the_others(
    kvmtick: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_: int) -> None:
        raise MeasureError("the guest was not done")

    monkeypatch.setattr(chips, "_run", fails)
    result = kvmtick("bench", "chips", "start-help", "--runs", "1", "--json")
    assert (result.code, result.err) == (1, "")
    found = json.loads(result.out)["marks"]
    assert [(mark["name"], mark["value"] is None) for mark in found] == [
        ("chips", True),
        ("start-help", False),
    ]
    assert found[0]["note"] == "the guest was not done"


@pytest.mark.parametrize("words", [["--list"], ["--runs", "1", "start-help"]])
def test_a_reader_that_has_seen_enough_is_no_error(words: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        with process("bench", *words, stdout=writer) as child:
            _, err = child.communicate(timeout=60)
    finally:
        os.close(writer)
    assert (child.returncode, err) == (0, "")


def test_ctrl_c_is_one_line(tmp_path: Path) -> None:
    """At a moment when a peer runs: it says when."""
    fifo = tmp_path / "running"
    os.mkfifo(fifo)
    qemu = tmp_path / "qemu-system-x86_64"
    qemu.write_text(
        f"#!/bin/sh\n[ $1 = --version ] && exit\necho now >{fifo}\nkill -STOP $$\n",
    )
    qemu.chmod(0o755)
    environment = dict(os.environ, PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    with process("bench", "tick-pic", "--quick", environment=environment) as child:
        with os.fdopen(os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)) as running:
            assert select.select([running], [], [], 60)[0], "the peer was never started"
            assert running.read() == "now\n"
        child.send_signal(signal.SIGINT)
        try:
            out, err = child.communicate(timeout=60)
        finally:
            child.kill()
    assert (child.returncode, out, err) == (130, "", "kvmtick: interrupted\n")
