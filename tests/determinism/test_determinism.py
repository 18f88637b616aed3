"""The same system runs alike: twice in a process, and in a fresh one; in exact and in fast time.

KVMTICK_SEED=n looks at the system n alone, KVMTICK_SYSTEMS=n at n of them.
"""

import difflib
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
from seeds import again, seeds

import kvmtick.cpu.unicorn
from determinism.outcome import Outcome, as_json, play
from determinism.programs import MODES, system
from kvmtick.cpu.unicorn import UnicornEngine

SYSTEMS = int(os.environ.get("KVMTICK_SYSTEMS", "32"))
FAULT_SYSTEMS = 6
PROCESS_LIMIT_S = 600
LINES_SHOWN = 12


@pytest.fixture(scope="module", params=["exact", "fast"])
def speed(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def outcomes(speed: str) -> dict[int, Outcome]:
    """Of each system, how it came out the first time."""
    return {seed: play(seed, speed == "fast")[0] for seed in seeds(SYSTEMS)}


def first_difference(one: str, other: str) -> str:
    """Where two traces part."""
    lines = difflib.unified_diff(one.splitlines(), other.splitlines(), lineterm="", n=3)
    return "\n".join(islice(lines, 2, 2 + LINES_SHOWN))


def test_a_system_runs_alike_again(speed: str, outcomes: dict[int, Outcome]) -> None:
    for seed, before in outcomes.items():
        now, trace = play(seed, speed == "fast")
        if now != before:
            _, other = play(seed, speed == "fast")
            pytest.fail(
                f"system {seed}, {speed}:\n{before}\n{now}\n{first_difference(trace, other)}\n"
                + again(seed, __file__)
            )


def in_a_fresh_process(numbers: list[int], speed: str) -> list[str]:
    """What `determinism.outcome` prints; with another hash seed: no order of a set may tell."""
    done = subprocess.run(
        [sys.executable, "-m", "determinism.outcome", speed, *map(str, numbers)],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"PYTHONHASHSEED": "4711"},
        capture_output=True,
        text=True,
        timeout=PROCESS_LIMIT_S,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_fresh_process_comes_to_the_same(speed: str, outcomes: dict[int, Outcome]) -> None:
    # from the last to the first: what ran before leaves nothing behind
    numbers = sorted(outcomes, reverse=True)
    for seed, told in zip(numbers, in_a_fresh_process(numbers, speed), strict=True):
        assert told == as_json(outcomes[seed]), again(seed, __file__)


@pytest.mark.skipif("KVMTICK_SEED" in os.environ, reason="KVMTICK_SEED: says nothing of one system")
def test_the_systems_are_worth_running(outcomes: dict[int, Outcome]) -> None:
    """Most get through their programs, take interrupts, and are different."""
    count = len(outcomes)
    assert len({outcome.trace for outcome in outcomes.values()}) == count
    assert all(outcome.exit[0] != "limit" for outcome in outcomes.values())
    through = sum(all(outcome.rounds) for outcome in outcomes.values())
    interrupted = sum(any(outcome.interrupts) for outcome in outcomes.values())
    assert through > 0.4 * count
    assert interrupted > 0.6 * count
    vcpus = [vcpu for seed in outcomes for vcpu in system(seed).vcpus]
    assert {vcpu.mode for vcpu in vcpus} == set(MODES)
    assert count < len(vcpus) < 2 * count


def test_a_random_number_more_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """RDRAND from another seed: some of the systems must look at it."""
    monkeypatch.delenv("KVMTICK_SEED", raising=False)
    before = {seed: play(seed, fast=False)[0] for seed in seeds(FAULT_SYSTEMS)}

    def engine(seed: int, exact: bool) -> UnicornEngine:
        return UnicornEngine(seed=seed + 1, exact=exact)

    monkeypatch.setattr(kvmtick.cpu.unicorn, "UnicornEngine", engine)
    assert any(play(seed, fast=False)[0] != outcome for seed, outcome in before.items())


def test_another_system_is_told_apart() -> None:
    (one, trace), (other, another_trace) = play(1, fast=False), play(2, fast=False)
    assert as_json(one) != as_json(other)
    assert first_difference(trace, another_trace)
    assert in_a_fresh_process([2], "exact") != [as_json(one)]
