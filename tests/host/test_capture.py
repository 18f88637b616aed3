"""The tool that records goldens: its file, and its errors."""

import importlib.util
import os
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
from tiny_guests import SPIN, ticker

from kvmtick.host.tracefs import Tracefs

TOOL = Path(__file__).parents[1] / "golden" / "capture.py"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    """tests/golden/capture.py as a module."""
    spec = importlib.util.spec_from_file_location("capture", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["capture"] = module
    spec.loader.exec_module(module)
    return module


def words(tmp_path: Path, image: bytes, *more: str) -> list[str]:
    """A command line for `image`."""
    (tmp_path / "guest.bin").write_bytes(image)
    return [
        *("--image", str(tmp_path / "guest.bin"), "--load-at", "0x1000", "--entry", "0:0x1000"),
        *("--title", "three ticks a/b", "--out", str(tmp_path / "out.txt"), *more),
    ]


@pytest.mark.usefixtures("kvm")
@pytest.mark.parametrize("reinject", ["0", "1"])
def test_capture(tool: ModuleType, tracefs: Tracefs, tmp_path: Path, reinject: str) -> None:
    assert tool.main(words(tmp_path, ticker(3), "--reinject", reinject)) == 0
    lines = (tmp_path / "out.txt").read_text().splitlines()
    head = [line for line in lines if line.startswith("# ")]
    body = lines[len(head) :]
    assert head[0] == "# three ticks a/b"
    assert head[1] == f"# clock: mono; complete, {len(body)} lines, lost 0"
    assert f"# reinject: {reinject}" in head
    assert not [line for line in head if str(tmp_path) in line]
    assert "'three ticks a/b'" in head[-1]
    assert body == [line.rstrip() for line in body]
    assert body[-1].endswith("pio_write at 0xf4 size 1 count 1 val 0x3")
    assert [name for name in tracefs.instances() if f"-{os.getpid()}-" in name] == []

    def count(event: str) -> int:
        return sum(f": {event}: " in line for line in body)

    assert count("kvm_ack_irq") == 3
    assert count("hrtimer_expire_entry") >= 1
    # the trace may end between the two halves of a pulse
    assert sum("gsi 0 level 1" in line for line in body) - count("kvm_set_irq") // 2 in (0, 1)
    timers = {m[0] for line in body if (m := re.search(r"hrtimer=\w+", line))}
    assert len(timers) == 1


@pytest.mark.usefixtures("kvm", "tracefs")
def test_gsi0_on_an_ioapic_pin(tool: ModuleType, tmp_path: Path) -> None:
    assert tool.main(words(tmp_path, ticker(2), "--gsi0-pin", "2")) == 0
    text = (tmp_path / "out.txt").read_text()
    assert "kvm_ioapic_set_irq: pin 2 " in text
    assert "kvm_ioapic_set_irq: pin 0 " not in text
    assert "--gsi0-pin 2" in text


@pytest.mark.usefixtures("kvm", "tracefs")
def test_a_guest_that_does_not_finish(tool: ModuleType, tmp_path: Path) -> None:
    assert tool.main(words(tmp_path, SPIN, "--limit-s", "0.1")) == 1
    text = (tmp_path / "out.txt").read_text()
    assert "# clock: mono; incomplete, 0 lines, lost 0" in text
    assert "# end: limit" in text


def test_bad_input_is_told(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = words(tmp_path, b"")
    (tmp_path / "guest.bin").unlink()
    assert tool.main(argv) == 2
    assert "name a flat binary with --image" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        tool.main([*argv, "--reinject", "2"])
    assert caught.value.code == 2


@pytest.mark.usefixtures("kvm", "tracefs")
def test_an_image_that_does_not_fit_is_told(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool.main([*words(tmp_path, SPIN), "--load-at", "0x200000"]) == 2
    assert "outside guest RAM" in capsys.readouterr().err


def test_only_this_vm_s_lines_are_kept(tool: ModuleType) -> None:
    def line(task: str, flags: str, rest: str) -> str:
        return f"  {task}    [000] {flags}  12.000001: {rest} "

    mine = [
        line("python3-7", "d..1.", "hrtimer_start: hrtimer=000000000000000a function=pit_timer_fn"),
        line("<idle>-0", "d.h1.", "hrtimer_expire_entry: hrtimer=000000000000000a function=p"),
        line("<idle>-0", "d.h2.", "sched_kthread_work_queue_work: work struct=000000000000000c f"),
        line(
            "kvm-pit/7-9",
            ".....",
            "sched_kthread_work_execute_start: work struct 000000000000000c: f",
        ),
        line("kvm-pit/7-9", ".....", "kvm_set_irq: gsi 0 level 1 source 2"),
        line("python3-7", ".....", "kvm_pio: pio_write at 0xf4 size 1 count 1 val 0x1"),
    ]
    others = [
        line("python3-7", "d.h1.", "hrtimer_start: hrtimer=000000000000000b function=pit_timer_fn"),
        line("qemu-8", ".....", "kvm_pio: pio_write at 0x20 size 1 count 1 val 0x20"),
        line(
            "kvm-pit/8-5",
            ".....",
            "sched_kthread_work_execute_start: work struct 000000000000000d: f",
        ),
    ]
    after = line("python3-7", ".....", "kvm_set_irq: gsi 0 level 1 source 2")
    text = "\n".join(["# tracer: nop", *others, *mine, after])
    assert tool.only_this_vm(text, {7, 9}) == [each.rstrip() for each in mine]
