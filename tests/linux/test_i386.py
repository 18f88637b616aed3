"""An i386 kernel, the only kind that takes the PIT as its clock source, boots to a program of ours.

Debian's is in the package linux-image-686 of its i386 architecture: not to be had on every machine,
so KVMTICK_I386_KERNEL names its file.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_boots import DEADLINE_S, START, UNWANTED

from kvmtick.cli import EXIT_OK
from kvmtick.guests.linux import cpio

KERNEL = "KVMTICK_I386_KERNEL"

INIT = bytes.fromhex(
    "7f454c46010101000000000000000000 02000300 01000000 54800408 34000000 00000000 00000000"
    "3400 2000 0100 0000 0000 0000"
    "01000000 00000000 00800408 00800408 57010000 57010000 07000000 00100000"
    "b815000000 bbcb800408 b9d1800408 89da 31f6 31ff cd80"  # mount("sysfs", "/sys", "sysfs", 0, 0)
    "b805000000 bbd6800408 31c9 cd80"  #                      open(path, O_RDONLY)
    "89c3 b803000000 b917810408 ba40000000 cd80"  #           read(fd, buffer, 64)
    "89c2 b804000000 bb01000000 b917810408 cd80"  #           write(1, buffer, size)
    "b8a2000000 bbc3800408 31c9 cd80"  #                      nanosleep(&one_second, NULL)
    "b858000000 bbaddee1fe b969191228 ba67452301 cd80"  #     reboot(.., .., RB_AUTOBOOT)
    "01000000 00000000"
)
STRINGS = b"sysfs\0/sys\0/sys/devices/system/clocksource/clocksource0/current_clocksource\0"
"""A static ELF program of one segment; `STRINGS` and the buffer come behind its code."""


@pytest.fixture(scope="module")
def kernel() -> Path:
    if KERNEL not in os.environ:
        pytest.skip(f"{KERNEL} names no kernel: give it that of Debian's linux-image-686:i386")
    return Path(os.environ[KERNEL])


def test_the_pit_as_clock_source(kernel: Path, tmp_path: Path) -> None:
    initrd = tmp_path / "init.cpio"
    entries = [
        *(cpio.directory(name) for name in ("dev", "sys")),
        cpio.node("dev/console", 5, 1),
        cpio.file("init", INIT + STRINGS + bytes(64), 0o755),
    ]
    initrd.write_bytes(cpio.archive(entries))
    command_line = "noapic nolapic nosmp nohz=off highres=off clocksource=pit"
    run = subprocess.run(
        [
            *(sys.executable, "-c", START, "run", "--kernel", str(kernel)),
            *("--initrd", str(initrd), "--append", command_line),
        ],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=DEADLINE_S,
    )
    printed = run.stdout.decode(errors="replace").replace("\r", "")
    assert (run.returncode, run.stderr) == (EXIT_OK, b""), printed[-2000:]
    assert "clocksource: Switched to clocksource pit\n" in printed
    assert "\npit\n" in printed
    assert "\nreset after " in printed
    for text in UNWANTED:
        assert text not in printed
