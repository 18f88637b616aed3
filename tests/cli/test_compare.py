"""`kvmtick compare`: what it prints, its exit codes, and what it says of bad input."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
from terminal import Terminal

from kvmtick import guests
from kvmtick.abi import HostError
from kvmtick.cli import compare as verb
from kvmtick.conform.compare import Comparison, Side, Wanted, differences, run_model
from kvmtick.host.tracefs import open_tracefs
from kvmtick.kvm.kernel import KernelVm

NO_KVM = "mount --bind /dev/null /dev/kvm && exec {python} -m kvmtick compare tick-pic"


@pytest.fixture(scope="module")
def model() -> Side:
    """tick-pic on the model."""
    return run_model(Wanted(guests.load("tick-pic", ticks=5)))


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch, model: Side) -> list[Wanted]:
    """The kernel is the model, but for the PIC; what was wanted of it."""
    asked: list[Wanted] = []

    def compare(wanted: Wanted) -> Comparison:
        asked.append(wanted)
        steps = model.lines["pic"]
        kernel = replace(model, lines={**model.lines, "pic": (*steps[:1], "something else")})
        return Comparison(model, kernel, 2, differences(model, kernel))

    monkeypatch.setattr(verb, "compare", compare)
    return asked


@pytest.mark.usefixtures("kernel")
def test_a_difference_is_shown_side_by_side(kvmtick: Terminal) -> None:
    result = kvmtick("compare", "tick-pic")
    assert result.code == 1
    assert result.out == (
        "PIC pins:\n"
        "  model                           kernel\n"
        "  level 1: chip 0 pin 0 (edge)    level 1: chip 0 pin 0 (edge)\n"
        "> level 0: chip 0 pin 0 (edge)    something else\n"
        "\n"
        "tick-pic: the model and the kernel differ: 27 steps equal, 1 difference; 81 events of the"
        " model, 81 of the kernel (2 runs)\n"
    )


@pytest.mark.usefixtures("kernel")
def test_context_and_all(kvmtick: Terminal) -> None:
    lines = kvmtick("compare", "tick-pic", "--context", "0").out.splitlines()
    assert lines[1:4] == [
        "  model                           kernel",
        "  ...",
        "> level 0: chip 0 pin 0 (edge)    something else",
    ]
    everything = kvmtick("compare", "tick-pic", "--all").out
    for title in verb.LINES.values():
        assert f"{title}:\n" in everything
    assert "the local APIC's timer:\n  nothing\n" in everything


@pytest.mark.usefixtures("kernel")
def test_json(kvmtick: Terminal, model: Side) -> None:
    result = kvmtick("compare", "tick-pic", "--json")
    assert result.code == 1
    got = json.loads(result.out)
    assert got["guest"] == "tick-pic"
    assert got["equal"] is False
    assert got["runs"] == 2
    assert got["differences"] == [
        {"line": "pic", "at": 1, "model": [model.lines["pic"][1]], "kernel": ["something else"]}
    ]
    assert got["model"]["events"] == model.events
    assert got["kernel"]["lines"]["pic"][1] == "something else"


@pytest.mark.parametrize(
    ("words", "ticks"),
    [
        (["tick-pic"], 20),
        (["tick-pic", "--ticks", "7"], 7),
        (["tick-if0"], 70),
        (["tick-mask", "--hold", "10ms"], 30),
        (["tick-if0", "--hold", "10ms", "--hz", "200"], 21),
    ],
)
def test_how_many_ticks(
    kvmtick: Terminal, kernel: list[Wanted], words: list[str], ticks: int
) -> None:
    kvmtick("compare", *words)
    block = guests.Parameters.read(kernel[0].guest.image, 4)
    assert block.count == ticks
    assert kernel[0].reinject


def test_options_reach_the_guest(kvmtick: Terminal, kernel: list[Wanted]) -> None:
    kvmtick("compare", "nmi-watchdog", "--no-ack", "--no-reinject", "--for", "30ms")
    (wanted,) = kernel
    assert not wanted.reinject
    assert wanted.for_ns == 30_000_000
    assert guests.Parameters.read(wanted.guest.image, 4).flags == 0x10


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["tick-pci"], "unknown guest 'tick-pci': did you mean 'tick-pic'?"),
        ([], "the following arguments are required: GUEST"),
        (["tick-pic", "--context", "x"], "--context 'x' is not a whole number"),
        (["tick-pic", "--context", "-1"], "--context -1: give 0 or more"),
        (["tick-pic", "--hold", "5ms"], "--hold 5ms: 'tick-pic' holds nothing"),
        (["tick-if0", "--ticks", "20"], "--ticks 20: tick-if0 holds 50 back"),
        (["./absent.bin"], "absent.bin"),
        (["tick-pic", "--ticks", "0"], "--ticks 0: give 1 to"),
    ],
)
def test_bad_input_is_one_line(kvmtick: Terminal, words: list[str], told: str) -> None:
    result = kvmtick("compare", *words)
    assert result.code == 2
    assert told in result.err
    assert result.err.count("\n") == 1
    assert not result.out


def test_without_tracefs(kvmtick: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        KernelVm().close()
    except HostError as error:
        pytest.skip(f"needs /dev/kvm: {error}")

    def absent() -> None:
        raise HostError("tracefs is not mounted and cannot be", "mount it")

    monkeypatch.setattr("kvmtick.kvm.kernel_trace.open_tracefs", absent)
    result = kvmtick("compare", "tick-pic")
    assert result.code == 3
    assert result.err.startswith("kvmtick: tracefs is not mounted and cannot be; mount it, or ")
    assert result.err.count("\n") == 1


def test_without_dev_kvm(kvmtick: Terminal) -> None:
    """In a mount namespace of its own, where that can be made; else where there is none."""
    try:
        KernelVm().close()
    except HostError:
        result = kvmtick("compare", "tick-pic")
        code, err = result.code, result.err
    else:
        done = subprocess.run(
            ["unshare", "-m", "sh", "-c", NO_KVM.format(python=sys.executable)],
            capture_output=True,
            text=True,
            check=False,
        )
        if "unshare" in done.stderr or "mount" in done.stderr:
            pytest.skip(f"needs the right to hide /dev/kvm: {done.stderr.strip()}")
        code, err = done.returncode, done.stderr
    assert code == 3
    assert err.startswith("kvmtick: /dev/kvm")
    assert err.count("\n") == 1


def test_end_to_end(kvmtick: Terminal) -> None:
    try:
        KernelVm().close()
        with open_tracefs() as tracefs:
            tracefs.instance().close()
    except HostError as error:
        pytest.skip(f"needs /dev/kvm and a tracefs it may write to: {error}")
    result = kvmtick("compare", "tick-ioapic", "--json")
    if "too noisy" in result.err:
        pytest.skip(result.err)
    assert result.code == 0
    got = json.loads(result.out)
    assert got["equal"] is True
    assert got["differences"] == []
    assert got["model"]["guest_ticks"] == got["kernel"]["guest_ticks"] == 20
