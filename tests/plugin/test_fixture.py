"""`kvmtick_machine`: boots a guest, runs until something holds, injects faults, gives ticks and
memory; and when a test fails, its report says how to repeat it."""

import json
import shlex
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvmtick import guests
from kvmtick.cli import main
from kvmtick.testing import GuestMachine

pytest_plugins = ["pytester"]

MakeMachine = Callable[..., GuestMachine]

PRINT_K = bytes.fromhex("b04b e6e9 b000 e6f4 f4")
"""mov al, 'K'; out 0xe9, al; mov al, 0; out 0xf4, al; hlt"""


# --- the fixture itself, used as a user would ---------------------------------------------------


def test_a_guest_runs_to_its_end(kvmtick_machine: MakeMachine) -> None:
    machine = kvmtick_machine("tick-pic", ticks=20)
    run = machine.run()
    assert run.exit.reason == "done"
    assert machine.last is run
    assert machine.guest_ticks == 20
    assert machine.ticks.expired == 20
    assert machine.ticks.count("delivered") == 20
    assert machine.ticks[20].eoi_ns is not None


def test_until_a_condition_holds_and_on(kvmtick_machine: MakeMachine) -> None:
    machine = kvmtick_machine("tick-pic", ticks=20)
    assert machine.run(until=lambda m: m.guest_ticks == 5).exit.reason == "until"
    assert machine.guest_ticks == 5
    assert machine.run(for_="3ms").exit.reason == "time"
    assert machine.guest_ticks == 8
    assert machine.run().exit.reason == "done"


def test_a_fault_in_the_middle(kvmtick_machine: MakeMachine) -> None:
    machine = kvmtick_machine("tick-pic", ticks=30)
    machine.run(until=lambda m: m.guest_ticks == 10)
    machine.fault("worker_delay", "1500us")
    machine.run(until=lambda m: m.ticks.expired == 20)
    machine.fault("worker_delay", None)
    machine.run()
    assert machine.ticks.count("late") + machine.ticks.count("reinjected") >= 5
    assert machine.guest_ticks == 30


def test_a_vcpu_that_loses_its_cpu(kvmtick_machine: MakeMachine) -> None:
    machine = kvmtick_machine("tick-pic", ticks=40, reinject=False)
    machine.run(for_="5500us")
    machine.vcpu_off("10ms")
    machine.run()
    assert machine.ticks.count("coalesced") == 9


def test_memory_and_console(kvmtick_machine: MakeMachine) -> None:
    machine = kvmtick_machine("tick-pic", ticks=7)
    machine.run()
    counter = guests.PARAMETERS.counter
    assert machine.word(counter) == 7
    assert machine.memory(counter, 4) == struct.pack("<I", 7)
    printing = kvmtick_machine(guests.Guest("k", PRINT_K, 0x1000, (0, 0x1000), None))
    printing.run()
    assert printing.console == "K"


def test_a_file_and_an_image_of_ones_own(kvmtick_machine: MakeMachine, tmp_path: Path) -> None:
    path = tmp_path / "own.bin"
    path.write_bytes(bytes.fromhex("b000 e6f4 f4"))
    assert kvmtick_machine(path).run().exit.reason == "done"
    own = guests.Guest("own", path.read_bytes(), 0x1000, (0, 0x1000), None)
    machine = kvmtick_machine(own)
    assert machine.run().exit.reason == "done"
    assert machine.guest_ticks is None


def test_faults_from_the_start_and_the_seed(kvmtick_machine: MakeMachine) -> None:
    def lives(seed: int) -> list[int | None]:
        machine = kvmtick_machine("tick-pic", ticks=20, seed=seed, faults={"vcpu_off": "exp:90us"})
        machine.run()
        return [tick.inject_ns for tick in machine.ticks]

    assert lives(1) == lives(1)
    assert lives(1) != lives(2)


def test_a_machine_is_a_context_manager_too() -> None:
    with GuestMachine("tick-pic", ticks=2) as machine:
        assert machine.run().guest_ticks == 2
    assert machine.vm.machine.board.pit is None
    machine.close()


# --- the command that repeats it ----------------------------------------------------------------


def repeat(machine: GuestMachine, capsys: pytest.CaptureFixture[str]) -> None:
    """What the command prints is the object the machine gave."""
    capsys.readouterr()
    program, *words = shlex.split(machine.command())
    assert program == "kvmtick"
    assert main([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert machine.last is not None
    mine = json.loads(json.dumps(machine.last.as_dict()))
    for result in (told, mine):
        del result["wall_s"]
    assert told == mine


@pytest.mark.parametrize(
    "parameters",
    [
        {"ticks": 25, "hz": 500, "param_ms": 9, "seed": 4, "reinject": False},
        {"ticks": 3, "divisor": 65535},
        {"divisor": 1, "ticks": 30, "seed": 123456789},
        {"hz": 18.2, "ticks": 2},
        {},
    ],
)
def test_the_command_repeats_the_run(
    kvmtick_machine: MakeMachine, capsys: pytest.CaptureFixture[str], parameters: dict[str, Any]
) -> None:
    machine = kvmtick_machine(
        "tick-if0" if "param_ms" in parameters else "tick-pic",
        faults={"worker_delay": "exp:100us", "late_expiry": "5%:1ms"},
        **parameters,
    )
    machine.run()
    repeat(machine, capsys)


def test_the_command_repeats_a_guest_without_an_end(
    kvmtick_machine: MakeMachine, capsys: pytest.CaptureFixture[str]
) -> None:
    machine = kvmtick_machine("tick-pic", ticks=0)
    machine.run(for_="12345us")
    repeat(machine, capsys)


def test_the_command_names_the_file_with_its_path(
    kvmtick_machine: MakeMachine, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "my guest.bin"
    path.write_bytes(bytes.fromhex("b000 e6f4 f4"))
    machine = kvmtick_machine(path)
    machine.run()
    repeat(machine, capsys)


# --- the report of a failure --------------------------------------------------------------------


@pytest.fixture
def failing(pytester: pytest.Pytester) -> pytest.Pytester:
    """A test file with one failing and one passing test."""
    pytester.makepyfile(
        test_mine="""
        def test_fails(kvmtick_machine):
            machine = kvmtick_machine("tick-pic", ticks=3, faults={"vcpu_off": "exp:50us"})
            machine.run()
            assert machine.guest_ticks == 4

        def test_passes(kvmtick_machine):
            assert kvmtick_machine("tick-pic", ticks=3).run().exit.reason == "done"

        def test_without_a_machine():
            assert False
        """
    )
    return pytester


def test_a_failure_names_the_seed_and_the_commands(failing: pytest.Pytester) -> None:
    result = failing.runpytest("-p", "no:cacheprovider", "-p", "no:hypothesispytest")
    result.assert_outcomes(passed=1, failed=2)
    result.stdout.fnmatch_lines(
        [
            "*- kvmtick -*",
            "seed: 0",
            "repeat: pytest test_mine.py::test_fails --kvmtick-seed=0",
            "guest:  kvmtick run tick-pic --seed 0 --ticks 3 --fault vcpu_off=exp:50us",
        ]
    )
    assert str(result.stdout).count("- kvmtick -") == 1, "only where a machine was used"


def test_the_seed_of_the_command_line_is_used_and_named(failing: pytest.Pytester) -> None:
    result = failing.runpytest("--kvmtick-seed=77", "-k", "fails", "-p", "no:cacheprovider")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["seed: 77", "repeat: *--kvmtick-seed=77", "guest:*--seed 77 *"])


def test_a_machines_own_seed_wins(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        def test_it(kvmtick_machine):
            assert kvmtick_machine("tick-pic", seed=5, ticks=1).seed == 5
            assert kvmtick_machine("tick-pic", ticks=1).seed == 9
        """
    )
    pytester.runpytest("--kvmtick-seed=9").assert_outcomes(passed=1)


def test_machines_are_closed_after_the_test_even_if_it_fails(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        MACHINES = []

        def test_fails(kvmtick_machine):
            MACHINES.extend((kvmtick_machine(ticks=1), kvmtick_machine(ticks=2)))
            assert False

        def test_closed():
            assert [machine.vm.machine.board.pit for machine in MACHINES] == [None, None]
        """
    )
    pytester.runpytest().assert_outcomes(passed=1, failed=1)


def test_the_option_and_the_fixture_are_listed(pytester: pytest.Pytester) -> None:
    assert "--kvmtick-seed" in pytester.runpytest("--help").stdout.str()
    pytester.runpytest("--fixtures").stdout.fnmatch_lines(["kvmtick_machine*"])
