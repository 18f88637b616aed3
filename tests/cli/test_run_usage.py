"""Bad input to `kvmtick run`: one line that names the value and the remedy, exit code 2."""

from pathlib import Path

import elf_images
import pytest
from terminal import Terminal

HZ_REMEDY = "give 18.2 to 1193181"
DURATION_REMEDY = "give a number and a unit: 40us, 250ms, 10s, 2m"
DELAY_REMEDY = "give a duration (200us), exp:200us, uniform:10us..2ms or 1%:5ms"

REFUSED: list[tuple[list[str], str, str]] = [
    (["tick-pix"], "unknown guest 'tick-pix'", "did you mean 'tick-pic'?"),
    (["nothing"], "unknown guest 'nothing'", "or give a file"),
    (["/no/such/guest.bin"], "'/no/such/guest.bin'", "give a readable file"),
    (["guest.bin"], "'guest.bin'", "give a readable file"),
    (["--hz", "18.1"], "--hz 18.1", HZ_REMEDY),
    (["--hz", "1193182"], "--hz 1193182", HZ_REMEDY),
    (["--hz", "0"], "--hz 0", HZ_REMEDY),
    (["--hz", "-5"], "--hz -5", HZ_REMEDY),
    (["--hz", "fast"], "--hz fast", "give ticks a second, such as 1000"),
    (["--hz", "nan"], "--hz nan", HZ_REMEDY),
    (["--hz", "1e999"], "--hz 1e999", HZ_REMEDY),
    (["--hz", "1,000"], "--hz 1,000", "give ticks a second, such as 1000"),
    (["--ticks", "0"], "--ticks 0", "give 1 to 4294967295, or --for DURATION instead"),
    (["--ticks", "-1"], "--ticks -1", "give 1 to"),
    (["--ticks", "4294967296"], "--ticks 4294967296", "give 1 to"),
    (["--ticks", "ten"], "'ten'", "give digits only"),
    (["--ticks", "1.5"], "'1.5'", "give digits only"),
    (["--for", "5"], "'5' has no unit", DURATION_REMEDY),
    (["--for", "5h"], "'5h'", DURATION_REMEDY),
    (["--for", "ms"], "'ms'", DURATION_REMEDY),
    (["--for", ""], "''", DURATION_REMEDY),
    (["--for", "0ms"], "--for 0ms", "give more than nothing"),
    (["--for=-5ms"], "'-5ms'", DURATION_REMEDY),
    (["--for", "1e30s"], "'1e30s'", DURATION_REMEDY),
    (["--for", "infs"], "'infs'", DURATION_REMEDY),
    (["--for", "nans"], "'nans'", DURATION_REMEDY),
    (["--quantum", "100"], "--quantum: duration '100' has no unit", DURATION_REMEDY),
    (["--quantum", "0us"], "--quantum 0us", "give more than nothing"),
    (["--fast", "--gdb", "0"], "--fast", "leave --fast or --gdb out"),
    (["--limit", "60"], "--limit: duration '60' has no unit", DURATION_REMEDY),
    (["tick-if0", "--hold", "50"], "--hold: duration '50' has no unit", DURATION_REMEDY),
    (["tick-if0", "--hold", "1500us"], "--hold 1500us", "give whole milliseconds"),
    (["--hold", "50ms"], "'tick-pic' holds nothing", "use tick-if0 or tick-mask"),
    (["tick-mask", "--hold", "3600001ms"], "--hold 3600001ms", "give at most 3600000ms"),
    (["--fault", "worker_delay"], "'worker_delay'", "give NAME=DELAY, such as worker_delay=200us"),
    (["--fault", "lost=1ms"], "'lost'", "choose one of worker_delay, vcpu_off, late_expiry"),
    (["--fault", "vcpu_off=3"], "'3' has no unit", DURATION_REMEDY),
    (["--fault", "vcpu_off=exp:3"], "'3' has no unit", DURATION_REMEDY),
    (["--fault", "vcpu_off=200%:1ms"], "'200%:1ms'", DELAY_REMEDY),
    (["--fault", "vcpu_off=uniform:2ms..1ms"], "'uniform:2ms..1ms'", DELAY_REMEDY),
    (["--fault", "vcpu_off=normal:1ms"], "'normal:1ms'", DELAY_REMEDY),
    (["tick-lapic", "--hz", "0.1"], "--hz 0.1", "give 0.25 to 1000000"),
    (["tick-lapic", "--timer", "hourly"], "'hourly'", "see kvmtick run --help"),
    (["exceptions", "--hz", "100"], "--hz 100", "leave it out"),
    (["--timer", "oneshot"], "'tick-pic' has no choice of timer", "use tick-lapic"),
    (["--no-ack"], "'tick-pic' has no way to leave that out", "use nmi-watchdog"),
    (["tick-msi", "--reinject"], "nothing acknowledges the ticks of 'tick-msi'", "leave it out"),
    (["--seed", "lucky"], "'lucky'", "give digits only"),
    (["--story", "0"], "--story 0", "ticks count from 1"),
    (["--story", "first"], "'first'", "give digits only"),
    (["--trace", "/no/such/folder/t.txt"], "/no/such/folder/t.txt", "give a writable file"),
    (["--clock", "fast"], "'fast'", "see kvmtick run --help"),
    (["--load-at", "0x1000"], "--load-at", "leave it out"),
    (["--entry", "0x1000"], "--entry", "leave it out"),
    (["--counter", "0x1000"], "--counter", "leave it out"),
    (["--ram", "64M"], "--ram", "leave it out"),
    (["--vcpus", "2"], "--vcpus", "leave it out"),
    (["--cpuid", "x2apic=off"], "--cpuid", "leave it out"),
    (["--append", "x"], "--append", "leave it out"),
    (["--module", "x"], "--module", "leave it out"),
    (["--no-such-option"], "--no-such-option", "see kvmtick run --help"),
    (["--tick", "5"], "--tick", "see kvmtick run --help"),
    (["tick-pic", "tick-if0"], "tick-if0", "see kvmtick run --help"),
    (["--hz"], "--hz", "see kvmtick run --help"),
]


@pytest.mark.parametrize(
    ("arguments", "names", "remedy"), REFUSED, ids=[" ".join(row[0]) for row in REFUSED]
)
def test_one_line_names_the_value_and_the_remedy(
    kvmtick: Terminal, arguments: list[str], names: str, remedy: str
) -> None:
    result = kvmtick("run", *arguments)
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("kvmtick: ")
    assert result.err.count("\n") == 1
    assert names in result.err
    assert remedy in result.err


@pytest.mark.parametrize("json", [[], ["--json"]])
def test_images_that_cannot_be_run(kvmtick: Terminal, tmp_path: Path, json: list[str]) -> None:
    empty, big, small = tmp_path / "empty.bin", tmp_path / "big.bin", tmp_path / "small.bin"
    empty.write_bytes(b"")
    big.write_bytes(bytes(0xF_8001))
    small.write_bytes(b"\xfa\xf4")
    mb = tmp_path / "mb.elf"
    mb.write_bytes(elf_images.kernel())
    for arguments, names, remedy in (
        ([str(empty)], f"'{empty}' is empty", "give a flat binary, a boot sector, a Multiboot"),
        ([str(big)], "1015809 bytes and does not fit at 0x8000", "choose a lower --load-at"),
        ([str(small), "--load-at", "0xfffff"], "does not fit at 0xfffff", "or a smaller image"),
        ([str(small), "--load-at", "0x100000"], "--load-at 0x100000", "give 0 to 0xfffff"),
        ([str(small), "--load-at", "top"], "'top'", "give a number such as 0x7c00"),
        ([str(small), "--entry", "1048576"], "--entry 0x100000", "give 0 to 0xfffff"),
        ([str(small), "--counter", "0x1ffffd"], "--counter 0x1ffffd", "RAM ends at 0x200000"),
        ([str(small), "--hz", "100"], "--hz 100", "leave it out"),
        ([str(small), "--append", "x"], "takes no --append", "leave it out"),
        ([str(small), "--module", str(big)], "takes no --module", "leave it out"),
        ([str(small), "--ram", "128"], "--ram '128'", "such as 128M"),
        ([str(small), "--ram", ""], "--ram ''", "such as 128M"),
        ([str(small), "--ram", "M"], "--ram 'M'", "such as 128M"),
        ([str(small), "--ram", "-1M"], "--ram '-1M'", "such as 128M"),
        ([str(small), "--ram", "1.5G"], "--ram '1.5G'", "such as 128M"),
        ([str(small), "--ram", "1023K"], "--ram 1023K", "give 1M to 3G"),
        ([str(small), "--ram", "4G"], "--ram 4G", "give 1M to 3G"),
        ([str(small), "--ram", "2049K"], "--ram 2049K", "a multiple of 4K"),
        ([str(small), "--vcpus", "0"], "--vcpus 0", "give 1 to 8"),
        ([str(small), "--vcpus", "9"], "--vcpus 9", "give 1 to 8"),
        ([str(small), "--cpuid", "vendor=AMD"], "--cpuid vendor=AMD", "has 12 characters"),
        ([str(small), "--cpuid", "x2apic"], "--cpuid x2apic", "x2apic=off"),
        ([str(small), "--cpuid", "sse=off"], "--cpuid sse=off", "give vendor=NAME or one of"),
        ([str(small), "--cpuid", "clocks=on"], "--cpuid clocks=on", "clocks=off"),
        ([str(small), "--vcpus", "two"], "'two'", "give digits only"),
        ([str(small), "--module", ":x"], "':x'", "give FILE or FILE:TEXT"),
        ([str(small), "--ram", "1M", "--counter", "0x100000"], "0x100000", "RAM ends at 0x100000"),
        ([str(mb), "--module", "/no/such"], "'/no/such'", "give a readable file"),
        ([str(mb), "--ram", "1M"], "RAM ends at 0x100000", "give more --ram"),
        (
            [str(mb), "--ram", "2M", "--module", str(big), "--module", str(big)],
            "has its module at 0x1fa000 to 0x2f2001",
            "give more --ram",
        ),
        ([str(mb), "--load-at", "0x8000"], "has its addresses", "leave --load-at out"),
        ([str(mb), "--entry", "0x8000"], "has its addresses", "leave --entry out"),
        ([str(small), "--hold", "5ms"], "--hold 5ms", "leave it out"),
        ([str(tmp_path)], f"'{tmp_path}'", "give a readable file"),
        (["./" + "x" * 300], "File name too long", "give a readable file"),
        (["x" * 300], "unknown guest 'xxx", "or give a file"),
    ):
        result = kvmtick("run", *arguments, *json)
        assert (result.code, result.out) == (2, "")
        assert result.err.count("\n") == 1
        assert names in result.err
        assert remedy in result.err


def test_a_bad_command_line_leaves_the_trace_file_alone(kvmtick: Terminal, tmp_path: Path) -> None:
    kept = tmp_path / "trace.txt"
    kept.write_text("precious")
    for wrong in ("--hz", "--ticks", "--for", "--limit", "--fault", "--story", "--seed"):
        assert kvmtick("run", "--trace", str(kept), wrong, "x").code == 2
    assert kept.read_text() == "precious"


@pytest.mark.parametrize(
    ("arguments", "names", "remedy"),
    [
        (["rum"], "'rum'", "choose run or record or report or query or compare or"),
        (["--verbose"], "'--verbose'", "see kvmtick --help"),
        (["doctor", "--yaml"], "--yaml", "see kvmtick doctor --help"),
        (["doctor", "me"], "me", "see kvmtick doctor --help"),
    ],
)
def test_unknown_verbs_and_options(
    kvmtick: Terminal, arguments: list[str], names: str, remedy: str
) -> None:
    result = kvmtick(*arguments)
    assert (result.code, result.out, result.err.count("\n")) == (2, "", 1)
    assert names in result.err
    assert remedy in result.err
