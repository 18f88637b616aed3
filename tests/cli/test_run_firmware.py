"""`kvmtick run seabios`, `--firmware` and `--disk`."""

import json
from pathlib import Path

import pytest
from terminal import Terminal

from kvmtick.abi.errors import HostError
from kvmtick.cli.run_firmware import SEABIOS, find_seabios

needs_seabios = pytest.mark.skipif(
    not SEABIOS.exists(), reason=f"{SEABIOS} not found: install the package seabios"
)


@pytest.fixture
def bios(tmp_path: Path) -> str:
    """Prints "hi" and leaves with the code that the disk's status register has: 255 without one."""
    code = bytes.fromhex("b0 68 e6 e9 b0 69 e6 e9 ba f7 01 ec 04 01 e6 f4")
    image = bytearray(64 << 10)
    image[: len(code)] = code
    image[-16:-11] = bytes.fromhex("ea 00 00 00 f0")
    path = tmp_path / "bios"
    path.write_bytes(image)
    return str(path)


def test_any_image_is_run(kvmtick: Terminal, bios: str) -> None:
    result = kvmtick("run", "--firmware", bios)
    assert result.code == 0
    assert result.out.startswith("hi\n\nbios on the unicorn CPU")


def test_a_disk_is_there(kvmtick: Terminal, bios: str, tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(bytes(512))
    result = kvmtick("run", "--firmware", bios, "--disk", str(tmp_path / "disk"))
    assert result.code == 4
    assert "0x51 to the debug exit port" in result.err


@needs_seabios
def test_seabios_s_own_count_is_shown(kvmtick: Terminal) -> None:
    counts = []
    for ticks in (20, 50):
        arguments = ("--ticks", str(ticks), "--counter", "0x46c", "--json")
        result = kvmtick("run", "seabios", *arguments)
        assert result.code == 0
        run = json.loads(result.out)
        assert run["ticks"]["delivered"] == ticks
        counts.append(run["guest_ticks"])
    assert counts[1] - counts[0] == 30


def test_how_to_get_seabios() -> None:
    with pytest.raises(HostError, match="no SeaBIOS at /nowhere; apt-get install seabios"):
        find_seabios(Path("/nowhere"))


@pytest.mark.parametrize(
    ("arguments", "about"),
    [
        (["--disk", "x"], "--disk x: only firmware takes it; run seabios"),
        (["tick-pic", "--firmware", "x"], "--firmware x: 'tick-pic' is a guest already"),
        (["--firmware", "x", "--hz", "100"], "--hz: firmware goes its own way; leave it out"),
        (["--firmware", "x", "--append", "y"], "--append: firmware goes its own way"),
        (["--firmware", "no-such"], "cannot read 'no-such': No such file"),
        (["linux", "--disk", "x"], "--disk: Linux goes its own way; leave it out"),
    ],
)
def test_what_does_not_go_together(kvmtick: Terminal, arguments: list[str], about: str) -> None:
    result = kvmtick("run", *arguments)
    assert result.code == 2
    assert about in result.err
    assert result.err.count("\n") == 1
