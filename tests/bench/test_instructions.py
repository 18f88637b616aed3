"""Ticks may not get dearer unnoticed: host instructions a tick, beside `baseline.json`.

Callgrind counts them, so it does not matter what else this host does. They do depend on the
interpreter and on whether the hot rooms are compiled; each has a baseline of its own.

    PYTHONPATH=src python tests/bench/test_instructions.py

counts them again and writes the baseline of this build. Look at the difference before you keep it.
"""

import json
import shutil
import sys
from pathlib import Path

import pytest

from kvmtick.bench.instructions import VALGRIND, instructions_per_tick
from kvmtick.host.probe import is_compiled

BASELINE = Path(__file__).with_name("baseline.json")
GUESTS = ("tick-pic", "tick-ioapic")
TICKS = 100
MARGIN = 1.3
"""Compilers and libraries differ by less; what is worth a look does not."""


def build() -> str:
    """Whose baseline counts here."""
    kind = "compiled" if is_compiled() else "pure"
    return f"{kind}, {sys.implementation.name} {sys.version_info[0]}.{sys.version_info[1]}"


def is_dearer(counted: float, baseline: float) -> bool:
    """By more than what a change of compiler makes."""
    return counted > baseline * MARGIN


@pytest.mark.skipif(
    shutil.which(VALGRIND) is None, reason="valgrind is not installed: apt-get install valgrind"
)
@pytest.mark.parametrize("guest", GUESTS)
def test_a_tick_is_not_dearer_than_it_was(guest: str) -> None:
    baseline = json.loads(BASELINE.read_text()).get(build())
    if baseline is None:
        pytest.skip(f"baseline.json has no baseline for {build()}")
    counted = instructions_per_tick(guest, TICKS)
    assert not is_dearer(counted, baseline[guest]), (
        f"{counted:,.0f} instructions a tick of {guest}, {baseline[guest]:,} in baseline.json"
    )


def test_a_dearer_tick_is_found() -> None:
    assert is_dearer(1_400, 1_000)
    assert not is_dearer(1_200, 1_000)


def main() -> None:
    """Write the baseline of this build."""
    baselines = json.loads(BASELINE.read_text()) if BASELINE.exists() else {}
    baselines[build()] = {guest: round(instructions_per_tick(guest, TICKS)) for guest in GUESTS}
    BASELINE.write_text(json.dumps(baselines, indent=1) + "\n")
    print(f"{build()}: {baselines[build()]}")


if __name__ == "__main__":
    main()
