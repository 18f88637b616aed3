"""What only a process of its own can show: Ctrl-C, closed pipes, what is imported, repetition."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from terminal import process

HEAVY = (
    "rich",
    "unicorn",
    "argparse",
    "kvmtick.irqchip.i8254",
    "kvmtick.machine",
    "ctypes",
    "mmap",
)


@pytest.mark.parametrize("json_wanted", [False, True])
def test_ctrl_c_gives_the_report_so_far_and_130(tmp_path: Path, json_wanted: bool) -> None:
    fifo = tmp_path / "trace"
    os.mkfifo(fifo)
    words = ["run", "--for", "60000000s", "--trace", str(fifo), *["--json"][: int(json_wanted)]]
    with process(*words) as child, fifo.open() as trace:
        for line in trace:
            if "kvm_ack_irq" in line:
                break
        drain = threading.Thread(target=trace.read)
        child.send_signal(signal.SIGINT)
        drain.start()
        out, err = child.communicate(timeout=60)
        drain.join()
    assert child.returncode == 130
    assert "Traceback" not in err
    if json_wanted:
        told = json.loads(out)
        assert told["exit"]["reason"] == "interrupted"
        assert told["guest_ticks"] > 0
        assert told["ticks"]["expired"] > 0
    else:
        assert "interrupted after" in out
        assert "delivered" in out


@pytest.mark.parametrize(
    "words", [["--help"], ["run", "--ticks", "2"], ["run", "--ticks", "2", "--json"]]
)
def test_a_reader_that_has_seen_enough_is_no_error(words: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        with process(*words, stdout=writer) as child:
            _, err = child.communicate(timeout=60)
    finally:
        os.close(writer)
    assert (child.returncode, err) == (0, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("trace", [[], ["--trace", os.devnull]])
def test_output_that_cannot_be_written_is_one_line_and_3(trace: list[str]) -> None:
    with (
        Path("/dev/full").open("w") as full,
        process("run", "--ticks", "2", *trace, stdout=full.fileno()) as child,
    ):
        _, err = child.communicate(timeout=60)
    assert (child.returncode, err.count("\n")) == (3, 1)
    assert err.startswith("kvmtick: No space left")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("ticks", [1, 20_000], ids=["at the end", "on the way"])
def test_a_trace_that_cannot_be_written_is_one_line_and_2(ticks: int) -> None:
    with process("run", "--ticks", str(ticks), "--trace", "/dev/full") as child:
        _, err = child.communicate(timeout=60)
    assert child.returncode == 2
    assert err == "kvmtick: --trace /dev/full: No space left on device; give a writable file\n"


@pytest.mark.parametrize("words", [["--help"], ["--version"], []])
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    code = (
        "import sys; from kvmtick.cli import main\n"
        f"main({words!r})\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "[]\n"
    assert "kvmtick" in done.stdout


def test_the_verbs_help_needs_no_engine() -> None:
    code = (
        "import sys; from kvmtick.cli import main\n"
        "try: main(['run', '--help'])\n"
        "except SystemExit as leaving: assert not leaving.code\n"
        "heavy = ('rich', 'unicorn', 'kvmtick.cpu._shim')\n"
        "print([name for name in heavy if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "[]\n"


def test_python_m_kvmtick_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "kvmtick", "run", "nope"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("kvmtick: unknown guest 'nope'")


def test_another_process_gives_the_same_object_and_the_same_trace(tmp_path: Path) -> None:
    told = []
    for number in ("1", "2"):
        trace = tmp_path / number
        words = ["run", "--ticks", "40", "--seed", "5", "--json", "--trace", str(trace)]
        faults = ["--fault", "worker_delay=exp:300us", "--fault", "vcpu_off=10%:2ms"]
        done = subprocess.run(
            [sys.executable, "-m", "kvmtick", *words, *faults],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": number},
        )
        result = json.loads(done.stdout)
        del result["wall_s"]
        told.append((result, trace.read_text()))
    assert told[0] == told[1]
