"""Debian's kernel boots to our prompt, finds its timer at the first attempt, and counts our ticks.

Three set-ups always, all of them with KVMTICK_ALL_BOOTS=1 (`make test-all`).
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kvmtick.cli import EXIT_OK

START = "import sys; from kvmtick.cli import main; sys.exit(main(sys.argv[1:]))"
DEADLINE_S = 600.0
TSC_MHZ = 1000.0
BUSYBOX = Path("/bin/busybox")
COMMANDS = b"ticks\nsleep 1\nticks\nexit\n"

UNWANTED = (
    "MP-BIOS bug",
    "timer doesn't work",
    "timer not connected",
    "trying to set up timer",
    "calibration failed",
    "calibration inconsistent",
    "not consistent with PM-Timer",
    "adjusted to PM-Timer",
    "PM-Timer had inconsistent",
    "PM-Timer failed",
    "PM-Timer Bug",
    "frequency too slow",
    "verification failure",
    "unstable",
    "TSC warp",
    "TSC ADJUST",
    "read-back delay",
    "skipping watchdog check",
    "lost ticks",
    "interrupt took",
    "purious 8259A",
    "Spurious APIC",
    "Spurious LAPIC",
    "Spurious interrupt (",
    "No irq handler",
    "nobody cared",
    "APIC error",
    "NMI received",
    "ACPI Error",
    "ACPI Warning",
    "BUG:",
    "WARNING:",
    "Call Trace",
    "Kernel panic",
    "soft lockup",
    "detected stall",
)
"""What no boot may print."""

all_boots = pytest.mark.skipif(
    not os.environ.get("KVMTICK_ALL_BOOTS"),
    reason="one of all set-ups: make test-all, or KVMTICK_ALL_BOOTS=1",
)

SETUPS = [
    pytest.param("noapic nolapic", 1, id="PIT through the PIC"),
    pytest.param("", 1, id="default"),
    # a kernel that knows that it is a guest of KVM does not check its timer
    pytest.param("nopv", 1, id="nopv"),
    *(
        pytest.param(append, vcpus, id=f"{append or 'default'}, {vcpus} vCPUs", marks=all_boots)
        for append, vcpus in (
            ("nolapic_timer", 1),
            ("noapictimer", 1),
            ("nox2apic", 1),
            ("lapic=notscdeadline", 1),
            ("nohz=off", 1),
            ("highres=off", 1),
            ("clocksource=acpi_pm", 1),
            ("clocksource=tsc tsc=reliable", 1),
            ("acpi=off", 1),
            ("nmi_watchdog=1", 1),
            ("", 2),
            ("", 4),
        )
    ),
]


def timer_interrupts(printed: str) -> tuple[int, int]:
    """By the first and the last `ticks` there: IRQ 0 and the local APICs' timers."""
    counts = [
        [int(count) for count in re.findall(rf"\b{label}: (\d+) = ", printed)]
        for label in ("0", "LOC")
    ]
    seen = [each for each in counts if each]
    assert seen, printed[-1000:]
    assert all(len(each) == 2 for each in seen), printed[-1000:]
    return sum(each[0] for each in seen), sum(each[1] for each in seen)


def boot(
    kernel: Path, append: str, vcpus: int, *options: str, commands: bytes = COMMANDS
) -> "subprocess.CompletedProcess[bytes]":
    """With `commands` for the prompt."""
    return subprocess.run(
        [
            *(sys.executable, "-c", START, "run", "--kernel", str(kernel)),
            *("--append", append, "--vcpus", str(vcpus), *options),
        ],
        input=commands,
        capture_output=True,
        timeout=DEADLINE_S,
    )


@pytest.mark.parametrize(("append", "vcpus"), SETUPS)
def test_a_kernel_boots_to_the_prompt(kernel: Path, append: str, vcpus: int) -> None:
    run = boot(kernel, append, vcpus)
    printed = run.stdout.decode(errors="replace").replace("\r", "")
    assert (run.returncode, run.stderr) == (EXIT_OK, b""), printed[-2000:]
    release = kernel.name.removeprefix("vmlinuz-")
    assert f"Linux version {release} " in printed
    assert printed.count("kvmtick# ") == 4
    for text in UNWANTED:
        assert text not in printed
    measured_mhz = re.findall(r"tsc: (?:Detected|Refined TSC .*:) ([\d.]+) MHz", printed)
    assert measured_mhz
    assert [float(mhz) for mhz in measured_mhz] == pytest.approx(
        [TSC_MHZ] * len(measured_mhz), 1e-3
    )
    before, after = timer_interrupts(printed)
    assert after > before
    # without ACPI nothing can switch the machine off
    assert ("reset after" if "acpi=off" in append else "power-off after") in printed


@all_boots
def test_the_shell_of_a_busybox(kernel: Path) -> None:
    if not BUSYBOX.exists():
        pytest.skip(f"no {BUSYBOX}: apt-get install busybox-static")
    commands = b"sh\nps | grep -c '[r]cu_preempt'\npoweroff -f\n"
    run = boot(kernel, "quiet", 1, "--busybox", str(BUSYBOX), commands=commands)
    assert (run.returncode, run.stderr) == (EXIT_OK, b"")
    assert b"\r\n1\r\n" in run.stdout, run.stdout[-1000:]


@all_boots
def test_a_boot_repeats_exactly(kernel: Path, tmp_path: Path) -> None:
    traces = [tmp_path / "1.ktrace", tmp_path / "2.ktrace"]
    runs = [boot(kernel, "", 1, "--trace", str(trace)).stdout for trace in traces]
    first, again = (re.sub(rb"\n[^\n]* ticks/s, (?=\d)", b"\n", printed) for printed in runs)
    assert b"instructions" in first.splitlines()[-1]
    assert first == again
    assert traces[0].read_bytes() == traces[1].read_bytes()
