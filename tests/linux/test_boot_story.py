"""What `kvmtick report` tells of a boot (docs/linux-boot.md), whichever kernel is installed."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_boots import START, all_boots

COMMANDS = b"sleep 2\n"
DEADLINE_S = 300.0
LONG_NS = 100_000_000
"""No tick comes so late in a kernel that has work to do."""

SETUPS = {
    "nopv": [("pit", "2"), ("pit", "0"), ("lapic", "tsc-deadline")],
    "lapic=notscdeadline": [
        ("pit", "2"),
        ("pit", "0"),
        ("lapic", "periodic"),
        ("lapic", "one-shot"),
    ],
    "noapic nolapic": [("pit", "2"), ("pit", "4")],
}
"""Which timers the guest lives on, one after the other, and in which mode."""


def kvmtick(*arguments: str, typed: bytes = b"") -> bytes:
    """What it prints."""
    return subprocess.run(
        [sys.executable, "-c", START, *arguments],
        input=typed,
        capture_output=True,
        check=True,
        timeout=DEADLINE_S,
    ).stdout


@all_boots
@pytest.mark.parametrize("append", SETUPS)
def test_the_phases_of_a_boot(kernel: Path, tmp_path: Path, append: str) -> None:
    trace = str(tmp_path / "boot.ktrace")
    words = ("--kernel", str(kernel), "--append", append, "--trace", trace)
    kvmtick("run", *words, typed=COMMANDS)
    (vm,) = json.loads(kvmtick("report", trace, "--json"))["vms"]
    calibration, *phases = vm["phases"]
    assert (calibration["channel"], calibration["mode"], calibration["ticks"]) == (2, "0", 0)
    assert calibration["reads"] > 100
    assert [(phase["source"], phase["mode"]) for phase in phases] == SETUPS[append]
    assert not [phase for phase in phases if set(phase["verdicts"]) != {"delivered"}]
    assert sum(phase["ticks"] for phase in phases) == ticks_of(vm)
    assert is_tickless(phases[-1]) == (append != "noapic nolapic")


def ticks_of(vm: dict[str, Any]) -> int:
    """How often its timers expired."""
    return sum(int(source["ticks"]["expired"]) for source in vm["sources"])


def is_tickless(phase: dict[str, Any]) -> bool:
    """The guest let ticks out while it slept; a PIT cannot count for long enough to see it."""
    return int(phase["interval_ns"]["max"]) > LONG_NS
