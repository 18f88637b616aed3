"""The boot: what is believed of it."""

import json
from pathlib import Path
from typing import Any

import pytest

from kvmtick.abi.errors import HostError
from kvmtick.bench import boot_linux
from kvmtick.bench.figure import Result
from kvmtick.bench.figures import FIGURES
from kvmtick.bench.peers import QEMU
from kvmtick.bench.process import KVMTICK, MeasureError, Spent
from kvmtick.bench.session import Session

FIGURE = FIGURES["boot-linux"]
PRINTED = """\
[    1.2] Run /init as init process\r
init: reached\r
tsc\r
           CPU0\r
LOC:        295   Local timer interrupts\r
[    1.3] reboot: Power down\r
"""


class Programs:
    """What kvmtick and QEMU print, boot by boot, and how long that takes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.instructions = [100]
        self.serial = {"kvmtick": PRINTED, "qemu": PRINTED}
        self.wall_s = {"kvmtick": 4.0, "qemu": 2.0}
        self.commands: list[list[str]] = []
        monkeypatch.setattr(boot_linux, "run_process", self._run)
        monkeypatch.setattr(boot_linux, "find_kernel", lambda: Path("/boot/vmlinuz-6"))
        monkeypatch.setattr(type(QEMU), "installed", True)

    def _run(self, command: list[str]) -> Spent:
        self.commands.append(command)
        who = "kvmtick" if command[: len(KVMTICK)] == [*KVMTICK] else "qemu"
        output = self.serial[who]
        if who == "kvmtick":
            count = self.instructions[len(self.commands) // 2 % len(self.instructions)]
            output = json.dumps({"serial": output, "instructions": count})
        return Spent(self.wall_s[who], 1.0, 0, 0, output, "")


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> Programs:
    return Programs(monkeypatch)


def taken(folder: Path, runs: int = 2) -> dict[str, Any]:
    return Result(FIGURE, FIGURE.take(Session(runs, False, folder))).as_dict()


def test_both_boot_the_same_and_are_compared(programs: Programs, tmp_path: Path) -> None:
    told = taken(tmp_path)
    assert (told["value"], told["mark"], told["ratio"]) == (4.0, 5.0, 2.0)
    assert (told["met"], told["faults"]) == (True, [])
    assert told["details"]["said"]["qemu"][0] == {"clocksource": "tsc", "lapic_ticks": 295}
    initrds = {command[command.index("--initrd") + 1] for command in programs.commands[::2]}
    initrds |= {command[command.index("-initrd") + 1] for command in programs.commands[1::2]}
    assert [Path(name).parent for name in initrds] == [tmp_path]


def test_neither_mark_may_be_missed(programs: Programs, tmp_path: Path) -> None:
    programs.wall_s["kvmtick"] = 5.1
    assert taken(tmp_path)["met"] is False
    programs.wall_s = {"kvmtick": 15.1, "qemu": 10.0}
    assert taken(tmp_path)["met"] is False


def test_boots_that_differ_are_a_fault(programs: Programs, tmp_path: Path) -> None:
    programs.instructions = [100, 101]
    told = taken(tmp_path)
    assert told["met"] is False
    assert told["faults"] == ["boots differ: 100 and 101 instructions"]


@pytest.mark.parametrize("missing", ["init: reached", "LOC:", "reboot: Power down"])
def test_a_boot_that_stopped_on_the_way_counts_for_nothing(
    programs: Programs, tmp_path: Path, missing: str
) -> None:
    programs.serial["qemu"] = PRINTED.replace(missing, "Kernel panic")
    assert "did not come to init" in taken(tmp_path)["peers"]["qemu"]["absent"]
    programs.serial["kvmtick"] = PRINTED.replace(missing, "Kernel panic")
    with pytest.raises(MeasureError, match="did not come to init and the power-off"):
        taken(tmp_path)


def test_without_a_kernel_there_is_nothing_to_boot(
    programs: Programs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none() -> Path:
        raise HostError("no kernel in /boot", "install one")

    monkeypatch.setattr(boot_linux, "find_kernel", none)
    told = taken(tmp_path)
    assert (told["value"], told["note"]) == (None, "no kernel in /boot: nothing to boot")
    assert programs.commands == []
