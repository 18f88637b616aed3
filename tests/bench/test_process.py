"""Processes that are measured."""

import os
import sys
from pathlib import Path

import pytest

from kvmtick.bench.process import MeasureError, pinned, run_process

PYTHON = (sys.executable, "-c")


def test_what_a_process_took() -> None:
    spent = run_process([*PYTHON, "import sys; print('out'); print('err', file=sys.stderr)"])
    assert (spent.output, spent.errors) == ("out\n", "err")
    assert spent.cpu_s > 0
    assert spent.wall_s > 0
    assert spent.peak_rss_bytes > 1_000_000


def test_the_output_goes_to_a_file_if_asked(tmp_path: Path) -> None:
    path = tmp_path / "out.txt"
    assert run_process([*PYTHON, "print('out')"], output=path).output == ""
    assert path.read_text() == "out\n"


def test_its_input_is_empty_and_its_environment_ours() -> None:
    code = "import os, sys; print(repr(sys.stdin.read()), os.environ['KVMTICK_TEST'])"
    spent = run_process([*PYTHON, code], environment={"KVMTICK_TEST": "set"})
    assert spent.output == "'' set\n"


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("raise SystemExit('no such guest')", "ended with exit code 1: no such guest"),
        ("import os; os.abort()", "was ended by signal 6"),
    ],
)
def test_a_process_that_fails(code: str, told: str) -> None:
    with pytest.raises(MeasureError, match=told) as error:
        run_process([*PYTHON, code])
    assert "\n" not in str(error.value)


def test_an_exit_code_that_is_expected() -> None:
    assert run_process([*PYTHON, "raise SystemExit(3)"], expected=(1, 3)).code == 3


def test_a_process_that_cannot_be_started() -> None:
    with pytest.raises(MeasureError, match="no-such-program cannot be started: No such file"):
        run_process(["no-such-program"])


def test_a_process_that_does_not_end() -> None:
    code = "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)"
    with pytest.raises(MeasureError, match=r"did not end within 0\.2 s"):
        run_process([*PYTHON, code], timeout_s=0.2)


def test_pinned_to_one_core_and_back() -> None:
    before = os.sched_getaffinity(0)
    with pinned() as core:
        assert os.sched_getaffinity(0) == {core}
        code = "import os; print(len(os.sched_getaffinity(0)))"
        assert run_process([*PYTHON, code]).output == "1\n"
    assert os.sched_getaffinity(0) == before
