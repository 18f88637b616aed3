"""`kvmtick conform`: options, report, exit codes."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest
from terminal import Terminal

from kvmtick.conform import case as cases
from kvmtick.conform.bench import Bench
from kvmtick.conform.case import Case, Skipped, equal

SOME = ("--case", "pit.after-creation-*", "--case", "pic.after-creation-*")
NAMES = [
    *("pit.after-creation-counter0", "pit.after-creation-counter1", "pit.after-creation-counter2"),
    *("pic.after-creation-master", "pic.after-creation-slave"),
]


def fails(bench: Bench) -> None:
    equal([2], [1], "a [list]")


def breaks(bench: Bench) -> None:
    raise ValueError("no [such] thing")


def skips(bench: Bench) -> None:
    raise Skipped("not [here]")


@pytest.fixture
def planted() -> Iterator[None]:
    """Three more cases of the PIT."""
    list(cases.all_cases())
    pit = cases._REGISTERED["pit"]
    before = list(pit)
    pit += [
        Case("pit.planted-failure", "It is [1].", fails),
        Case("pit.planted-break", "It does not break.", breaks),
        Case("pit.planted-skip", "It is here.", skips),
    ]
    yield
    pit[:] = before


def test_the_report_counts_by_module(kvmtick: Terminal) -> None:
    result = kvmtick("conform", *SOME)
    assert (result.code, result.err) == (0, "")
    lines = result.out.splitlines()
    assert lines[0] == "5 conformance cases on the model"
    assert [line.split() for line in lines[1:3]] == [["pit", "3", "passed"], ["pic", "2", "passed"]]
    assert lines[-1] == "5 passed, 0 failed, 0 skipped"
    assert "\x1b" not in result.out


def test_verbose_names_every_case(kvmtick: Terminal) -> None:
    result = kvmtick("conform", "--verbose", *SOME)
    assert [line.split() for line in result.out.splitlines()[:5]] == [
        ["passed", name] for name in NAMES
    ]


def test_json(kvmtick: Terminal) -> None:
    result = kvmtick("conform", "--json", *SOME)
    assert (result.code, result.err, result.out.count("\n")) == (0, "", 1)
    assert json.loads(result.out) == {
        "backend": "model",
        "cases": 5,
        "passed": 5,
        "failed": 0,
        "skipped": 0,
        "results": [{"case": name, "outcome": "passed", "reason": ""} for name in NAMES],
    }


def test_the_model_gives_the_same_each_time(kvmtick: Terminal) -> None:
    arguments = ("conform", "--json", "--case", "pit.c*", "--case", "reinject.*all*")
    assert kvmtick(*arguments).out == kvmtick(*arguments).out


def test_list(kvmtick: Terminal) -> None:
    result = kvmtick("conform", "--list", "--case", "pic.after*")
    assert (result.code, result.err) == (0, "")
    lines = result.out.splitlines()
    assert lines[::2] == NAMES[3:]
    assert all(line.startswith("    ") and line.endswith(".") for line in lines[1::2])
    told = json.loads(kvmtick("conform", "--list", "--json", "--case", "pic.after*").out)
    assert [each["case"] for each in told["cases"]] == NAMES[3:]
    assert [each["right"] for each in told["cases"]] == [line.strip() for line in lines[1::2]]


@pytest.mark.usefixtures("planted")
def test_a_failing_case_says_what_and_how_to_repeat_it(kvmtick: Terminal) -> None:
    result = kvmtick("conform", "--case", "pit.planted-*")
    assert (result.code, result.err) == (1, "")
    report = " ".join(result.out.split())
    for text in (
        "failed: pit.planted-failure right: It is [1]. looked at: a [list] expected: [1] got: [2]"
        " repeat: kvmtick conform --backend model --case pit.planted-failure",
        "failed: pit.planted-break right: It does not break. error: ValueError: no [such] thing"
        " repeat: kvmtick conform --backend model --case pit.planted-break",
        "skipped: not [here] pit.planted-skip",
        "0 passed, 2 failed, 1 skipped",
    ):
        assert text in report
    assert "Traceback" not in result.out


@pytest.mark.usefixtures("planted")
def test_verbose_shows_where_an_exception_rose(kvmtick: Terminal) -> None:
    result = kvmtick("conform", "--verbose", "--case", "pit.planted-break")
    assert result.code == 1
    assert 'raise ValueError("no [such] thing")' in result.out


@pytest.mark.usefixtures("planted")
def test_the_json_of_failures(kvmtick: Terminal) -> None:
    result = kvmtick("conform", "--json", "--case", "pit.planted-*")
    assert result.code == 1
    assert json.loads(result.out)["results"] == [
        {
            "case": "pit.planted-failure",
            "outcome": "failed",
            "reason": "a [list]: expected [1], got [2]",
        },
        {
            "case": "pit.planted-break",
            "outcome": "failed",
            "reason": "ValueError: no [such] thing",
        },
        {"case": "pit.planted-skip", "outcome": "skipped", "reason": "not [here]"},
    ]


@pytest.mark.usefixtures("planted")
def test_junit(kvmtick: Terminal, tmp_path: Path) -> None:
    file = tmp_path / "junit.xml"
    assert kvmtick("conform", "--junit", str(file), "--case", "pit.planted-*").code == 1
    suite = ElementTree.parse(file).getroot()[0]
    assert [suite.get(name) for name in ("tests", "failures", "skipped")] == ["3", "2", "1"]
    assert [test.get("name") for test in suite] == [
        *("planted-failure", "planted-break", "planted-skip")
    ]


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--case", "pot.*"), "--case 'pot.*': no case has such a name; there are pit.*, pic.*"),
        (("--case", "pit.*", "--case", "Pit.*"), "'Pit.*'"),
        (("--case",), "--case"),
        (("--backend", "qemu"), "'qemu'"),
        (("--junit", "/nowhere/junit.xml", *SOME), "--junit /nowhere/junit.xml: No such file"),
        (("pit",), "pit"),
    ],
)
def test_a_wrong_command_line(kvmtick: Terminal, arguments: tuple[str, ...], said: str) -> None:
    result = kvmtick("conform", *arguments)
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("kvmtick: ")
    assert said in result.err
    assert result.err.count("\n") == 1


def test_a_wrong_case_leaves_the_junit_file_alone(kvmtick: Terminal, tmp_path: Path) -> None:
    file = tmp_path / "junit.xml"
    file.write_text("before")
    assert kvmtick("conform", "--junit", str(file), "--case", "pot").code == 2
    assert file.read_text() == "before"


def test_help(kvmtick: Terminal) -> None:
    result = kvmtick("conform", "--help")
    assert result.code == 0
    for word in ("--backend", "--case", "--list", "--json", "--junit", "pit.*", "130 interrupted"):
        assert word in result.out
    assert max(len(line) for line in result.out.splitlines()) <= 100


# --- hosts ----------------------------------------------------------------------------------------


def test_without_dev_kvm_the_kernel_is_refused() -> None:
    command = [sys.executable, "-m", "kvmtick", "conform", "--backend", "kernel", *SOME]
    if os.path.exists("/dev/kvm"):
        shell = 'mount --bind /dev/null /dev/kvm && exec "$@"'
        command = ["unshare", "--mount", "sh", "-c", shell, "sh", *command]
        probe = ["unshare", "--mount", "mount", "--bind", "/dev/null", "/dev/kvm"]
        if shutil.which("unshare") is None or subprocess.run(probe, capture_output=True).returncode:
            pytest.skip("needs root and unshare, to hide /dev/kvm")
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.startswith("kvmtick: /dev/kvm ")
    assert done.stderr.endswith("run the model: --backend model\n")
    assert done.stderr.count("\n") == 1


def test_a_kvm_without_a_capability_is_refused(
    kvmtick: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Poor:
        def __enter__(self) -> "Poor":
            return self

        def __exit__(self, *exception: object) -> None:
            pass

        def check_extension(self, cap: int) -> int:
            return int(cap != 33)

    monkeypatch.setattr("kvmtick.conform.bench.KernelSystem", Poor)
    result = kvmtick("conform", "--backend", "kernel", *SOME)
    assert (result.code, result.out) == (3, "")
    assert result.err == (
        "kvmtick: this host's KVM has no KVM_CAP_PIT2; take a kernel with CONFIG_KVM_IOAPIC,"
        " or run the model: --backend model\n"
    )


WAITING = """
import signal, sys, threading
signal.signal(signal.SIGINT, signal.default_int_handler)
from kvmtick.cli import main
from kvmtick.conform import case
def wait(bench):
    print("here", flush=True)
    threading.Event().wait()
list(case.all_cases())
case._REGISTERED["pit"].append(case.Case("pit.planted", "It ends.", wait))
sys.exit(main(["conform", "--case", "pit.planted"]))
"""


def test_ctrl_c_ends_it_with_130() -> None:
    running = subprocess.Popen(
        [sys.executable, "-c", WAITING], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert running.stdout is not None
        assert running.stdout.readline() == "here\n"
        running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=30)
    finally:
        running.kill()
        running.wait()
    assert (running.returncode, out, err) == (130, "", "kvmtick: interrupted\n")
