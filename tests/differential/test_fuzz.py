"""`kvmtick fuzz`: the model against the live kernel, and what the verb does with a difference.

KVMTICK_SEED=n in the environment draws other sequences: those of `kvmtick fuzz --seed n`.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from differential.faults import FAULTS, faulty
from kvmtick import cli
from kvmtick.abi import HostError
from kvmtick.cli import EXIT_DIFFERENCE, EXIT_HOST, EXIT_OK, EXIT_USAGE
from kvmtick.cli import fuzz as verb
from kvmtick.conform.fuzz.generate import sequence
from kvmtick.conform.fuzz.operations import KINDS
from kvmtick.conform.fuzz.replay import load, save, show
from kvmtick.conform.fuzz.search import Backends, Finding, Fuzzer
from kvmtick.conform.fuzz.shrink import fewest
from kvmtick.host.kmsg import KernelLog
from kvmtick.kvm import Kvm
from kvmtick.kvm.api import System

OPERATIONS = 20_000
KERNEL_OPERATIONS = 2_000
MOST_LATE = 0.1
"""Of the sequences, the part that may be left out because the host was late."""
SEED = int(os.environ.get("KVMTICK_SEED", "0"))
FAULT = FAULTS["a wrong rotation"]


@pytest.fixture
def kernel() -> Iterator[System]:
    """/dev/kvm; a skip that says why where it cannot be used."""
    try:
        system = Kvm("kernel")
    except HostError as error:
        pytest.skip(f"needs /dev/kvm: {error}")
    with system:
        yield system


def nothing_differs(fuzzer: Fuzzer, operations: int, directory: Path) -> None:
    """AssertionError with the shortest sequence; it is kept for `kvmtick fuzz --replay`."""
    finding = fuzzer.run(operations)
    totals = fuzzer.totals
    if finding is not None:
        path = save(finding, fuzzer.backends.names, directory)
        found = finding.found
        lines = [finding.warning, *map(show, finding.sequence.operations)]
        lines += map(str, found.differences if found else ())
        raise AssertionError("\n".join([*lines, f"again: kvmtick fuzz --replay {path}"]))
    assert totals.ops >= operations
    if totals.late > MOST_LATE * totals.sequences:
        pytest.skip(f"this host was late for {totals.late} of {totals.sequences} sequences")


def test_the_model_does_what_the_kernel_does(kernel: System, tmp_path: Path) -> None:
    fuzzer = Fuzzer(Backends.of(Kvm("model"), kernel), SEED)
    nothing_differs(fuzzer, OPERATIONS, tmp_path)
    assert set(fuzzer.totals.coverage) == set(KINDS)


def test_the_kernel_agrees_with_itself(kernel: System, tmp_path: Path) -> None:
    """What differs between two runs on the kernel must not be compared."""
    nothing_differs(Fuzzer(Backends.of(kernel, kernel), SEED), KERNEL_OPERATIONS, tmp_path)


# A difference.


@pytest.fixture(scope="module")
def finding() -> Finding:
    """What the fuzzer makes of a fault in the model."""
    found = Fuzzer(faulty(FAULT, Kvm("model"))).run(20_000)
    assert found is not None
    return found


def test_a_difference_is_shrunk_to_what_shows_it(finding: Finding) -> None:
    """An irqchip and the write that rotates; not a write less."""
    operations = finding.sequence.operations
    assert finding.found is not None
    assert finding.found.step == len(operations) - 1
    assert {each.field for each in finding.found.differences} <= {
        "pic 0.priority_add",
        "pic 1.priority_add",
    }
    assert 2 <= len(operations) <= 4
    backends = faulty(FAULT, Kvm("model"))
    from kvmtick.conform.fuzz.search import first_difference

    for leave_out in range(len(operations)):
        fewer = operations[:leave_out] + operations[leave_out + 1 :]
        assert first_difference(backends, finding.sequence.config, fewer) is None


def test_what_shows_once_only_is_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvmtick.conform.fuzz import search
    from kvmtick.conform.fuzz.look import Difference

    model = Kvm("model")
    fuzzer = Fuzzer(Backends.of(model, model))
    found = search.Found(0, sequence(0, 0).operations[0], (Difference("answer", 0, 1),))
    once = [search.Outcome(1, found)]
    monkeypatch.setattr(search, "carry_out", lambda *_: once.pop() if once else search.Outcome(1))
    assert fuzzer.run(1) is None
    assert (fuzzer.totals.noise, fuzzer.totals.differences) == (1, 0)


def test_the_fewest() -> None:
    assert fewest(list(range(100)), lambda few: {7, 63, 64} <= set(few)) == [7, 63, 64]


# Replay files.


def test_a_replay_file_holds_the_sequence(finding: Finding, tmp_path: Path) -> None:
    path = save(finding, ("one", "other"), tmp_path)
    assert load(path) == finding.sequence
    content = json.loads(path.read_text())
    assert content["difference"]["step"] == finding.found.step if finding.found else None


def test_every_operation_can_be_kept(tmp_path: Path) -> None:
    """Sequences enough to have all kinds of operations."""
    kinds = set()
    for number in range(60):
        each = sequence(SEED, number)
        assert load(save(Finding(each), ("one", "other"), tmp_path)) == each
        kinds |= {type(operation).__name__ for operation in each.operations}
    assert kinds == set(KINDS)


def run(*arguments: str) -> int:
    return cli.main(["fuzz", *arguments])


def test_replay_shows_the_first_difference(
    finding: Finding,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = save(finding, ("model", "model"), tmp_path)
    model = ("--backends", "model,model")
    assert run("--replay", str(path), *model) == EXIT_OK
    assert "no difference" in capsys.readouterr().out
    monkeypatch.setattr(Backends, "of", lambda left, right: faulty(FAULT, right))
    assert run("--replay", str(path), *model) == EXIT_DIFFERENCE
    out = capsys.readouterr().out
    assert "priority_add: faulty model" in out
    assert run("--replay", str(path), *model, "--json") == EXIT_DIFFERENCE
    content = json.loads(capsys.readouterr().out)
    assert content["differences"] == 1
    assert content["finding"]["fields"][0]["field"].endswith("priority_add")


BAD: dict[str, Any] = {
    "foreign": b'{"kvmtick": 1}',
    "no object": b"[1, 2]",
    "no text": b"\xff\xfe\x00",
    "nothing": b"",
    "another version": b'{"format": "kvmtick-fuzz", "version": 2}',
    "not whole": b'{"format": "kvmtick-fuzz", "version": 1, "seed": 0}',
}


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_is_no_replay_file(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(BAD[name])
    refuses(path, capsys, monkeypatch)


def refuses(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line, exit code 2, and nothing is run."""
    monkeypatch.setattr(verb, "_fuzzer", pytest.fail)
    assert run("--replay", str(path)) == EXIT_USAGE
    told = capsys.readouterr()
    assert not told.out
    assert len(told.err.splitlines()) == 1
    assert str(path) in told.err


def test_a_replay_file_cut_short(
    finding: Finding,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = save(finding, ("one", "other"), tmp_path).read_bytes()
    path = tmp_path / "cut.json"
    for size_bytes in range(0, len(whole) - 2, 7):
        path.write_bytes(whole[:size_bytes])
        refuses(path, capsys, monkeypatch)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("op", "Reboot"), ("op", None), ("chip_id", "0"), ("chip_id", True), ("state", "0g"),
        ("state", 7), ("more", 1),
    ],
)  # fmt: skip
def test_an_operation_that_is_none(
    field: str,
    value: object,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    operation = {"op": "SetIrqchip", "chip_id": 0, "state": "00" * 16} | {field: value}
    content = {
        "format": "kvmtick-fuzz", "version": 1, "seed": 0, "number": 0, "runs": False,
        "operations": [operation],
    }  # fmt: skip
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(content))
    refuses(path, capsys, monkeypatch)


# The verb.


def test_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code = run("--backends", "model,model", "--ops", "300", "--json", "--seed", "5")
    assert code == EXIT_OK
    content = json.loads(capsys.readouterr().out)
    assert {"ops", "seed", "sequences", "differences", "ops_per_s"} <= set(content)
    assert (content["seed"], content["differences"], content["finding"]) == (5, 0, None)
    assert content["ops"] >= 300
    assert content["ops"] == sum(content["coverage"].values())


def test_a_difference_is_told_and_saved(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Backends, "of", lambda left, right: faulty(FAULT, right))
    code = run("--backends", "model,model", "--for", "60s", "--save", str(tmp_path))
    assert code == EXIT_DIFFERENCE
    out = capsys.readouterr().out
    (path,) = tmp_path.iterdir()
    assert out.splitlines()[-1] == f"again: kvmtick fuzz --replay {path}"
    assert "priority_add: faulty model" in out


def test_it_stops_at_a_warning_of_the_kernel(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Kvm("model")
    warning = "WARNING: CPU: 0 PID: 1 at arch/x86/kvm/lapic.c:1"
    monkeypatch.setattr(KernelLog, "__init__", lambda self: setattr(self, "_fd", -1))
    monkeypatch.setattr(KernelLog, "new_warning", lambda self: warning)
    finding = Fuzzer(Backends.of(model, model), log=KernelLog()).run(1_000)
    assert finding is not None
    assert (finding.found, finding.warning) == (None, warning)
    assert load(save(finding, ("model", "model"), tmp_path)) == finding.sequence


def test_a_kernel_log_that_cannot_be_read(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is said, and the search goes on."""

    def absent(self: KernelLog) -> None:
        raise HostError("/dev/kmsg cannot be read (Operation not permitted)", "read it as root")

    monkeypatch.setattr(KernelLog, "__init__", absent)
    monkeypatch.setattr(verb, "_system", lambda name: Kvm("model"))
    assert run("--backends", "model,kernel", "--ops", "50") == EXIT_OK
    told = capsys.readouterr()
    assert "the kernel log is not watched: /dev/kmsg cannot be read" in told.err
    assert "0 differences" in told.out


def test_without_a_kvm_device(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvmtick.host import kvmdev
    from kvmtick.kvm import kernel as kernel_module

    def absent(path: str) -> object:
        return kvmdev.open_kvm("/dev/there-is-no-kvm")

    monkeypatch.setattr(kernel_module, "open_kvm", absent)
    assert run("--ops", "100") == EXIT_HOST
    assert "/dev/there-is-no-kvm is not there; modprobe" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ("--ops", "-5"), ("--ops", "many"), ("--seed", "x"), ("--for", "10"), ("--for", "0s"),
        ("--backends", "model"), ("--backends", "model,tcg"), ("--save", "/nonexistent/dir"),
        ("--replay", "/nonexistent/file"), ("more",),
    ],
)  # fmt: skip
def test_usage(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*arguments) == EXIT_USAGE
    assert len(capsys.readouterr().err.splitlines()) == 1
