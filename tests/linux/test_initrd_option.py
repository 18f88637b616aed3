"""`--initrd`: none, and what is no initramfs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from kvmtick.cli import EXIT_OK, EXIT_USAGE

START = "import sys; from kvmtick.cli import main; sys.exit(main(sys.argv[1:]))"
DEADLINE_S = 20.0


def run(echo: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", START, "run", "--kernel", str(echo), "--ram", "4M", *arguments],
        input="typed",
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )


@pytest.mark.parametrize(
    ("contents", "complaint"),
    [
        (b"", "is empty: give an initramfs, or /dev/null for none"),
        (bytes(4 << 20), "and it has 4194304: give more --ram or a smaller initrd"),
    ],
)
def test_what_is_no_initrd_is_refused(
    echo: Path, tmp_path: Path, contents: bytes, complaint: str
) -> None:
    (tmp_path / "initrd").write_bytes(contents)
    result = run(echo, "--initrd", str(tmp_path / "initrd"))
    assert (result.returncode, result.stdout) == (EXIT_USAGE, "")
    assert complaint in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_kernel_without_an_initrd_and_json_has_its_serial_line(echo: Path) -> None:
    result = run(echo, "--initrd", "/dev/null", "--json")
    assert (result.returncode, result.stderr) == (EXIT_OK, "")
    printed = json.loads(result.stdout)
    assert printed["serial"] == ">typed"
    assert printed["exit"] == {"reason": "done", "code": 0}
