"""Debian's kernel, from the start of the process to the power-off, beside QEMU.

Both boot the same kernel and initramfs with the same command line, on one vCPU and 256 MiB. Init's
script tells what the kernel made of the clocks and ends, which switches the machine off: that takes
a millisecond of the guest's time, so the boot to init is what is measured. kvmtick runs in fast
virtual time, where waiting costs nothing; QEMU, under TCG, in real time.

Nothing is believed that the guest does not print, and our boots must all have executed the same
number of instructions.
"""

import re
from functools import partial
from pathlib import Path
from typing import Final

from kvmtick.abi.errors import HostError
from kvmtick.bench.figure import Demand, Figure, Taken
from kvmtick.bench.kvmtick_run import told
from kvmtick.bench.peers import QEMU
from kvmtick.bench.process import KVMTICK, MeasureError, run_process
from kvmtick.bench.session import Session
from kvmtick.guests.linux import tiny_initrd
from kvmtick.machine.installed import COMMAND_LINE, find_kernel

__all__ = ["FIGURES", "boots"]

TIMES_QEMU: Final = 2.5
MOST_S: Final = 15.0
RAM: Final = "256M"
SCRIPT: Final = b"""\
echo init: reached
cat /sys/devices/system/clocksource/clocksource0/current_clocksource
cat /proc/interrupts
"""
_REACHED: Final = re.compile(r"^init: reached\n(?P<clock>[\w-]+)\n", re.MULTILINE)
_LOC: Final = re.compile(r"^ *LOC: +(?P<ticks>[1-9]\d*)", re.MULTILINE)
_OFF: Final = "reboot: Power down"

Said = dict[str, int | str]
"""What a guest told of itself, for the JSON."""


def boots(session: Session) -> Taken:
    """Seconds of a boot, in turns with QEMU."""
    try:
        kernel = find_kernel()
    except HostError as error:
        return Taken(note=f"{error.what}: nothing to boot")
    initrd = session.folder / "init.cpio"
    initrd.write_bytes(tiny_initrd(script=SCRIPT))
    said: dict[str, list[Said]] = {"kvmtick": [], "qemu": []}
    taken = session.in_turns(
        partial(_by_kvmtick, session, kernel, initrd, said["kvmtick"]),
        {"qemu": partial(_by_qemu, session, kernel, initrd, said["qemu"])},
    )
    taken.details = {"kernel": kernel.name, "said": said}
    counts = sorted({int(each["instructions"]) for each in said["kvmtick"]})
    if len(counts) > 1:
        taken.faults.append(f"boots differ: {' and '.join(f'{n:,}' for n in counts)} instructions")
    taken.note = f"{kernel.name}, {counts[0]:,} instructions"
    return taken


def _by_kvmtick(session: Session, kernel: Path, initrd: Path, said: list[Said]) -> float:
    command = [*KVMTICK, "run", "--kernel", str(kernel), "--initrd", str(initrd), "--ram", RAM]
    spent = run_process([*command, "--json"])
    run = told(spent)
    said.append(_said("kvmtick", run["serial"]) | {"instructions": run["instructions"]})
    return session.seconds(spent)


def _by_qemu(session: Session, kernel: Path, initrd: Path, said: list[Said]) -> float:
    command = [
        *(QEMU.program, "-accel", "tcg", "-smp", "1", "-m", RAM, "-nodefaults", "-no-user-config"),
        *("-display", "none", "-serial", "stdio", "-no-reboot"),
        *("-kernel", str(kernel), "-initrd", str(initrd), "-append", COMMAND_LINE),
    ]
    spent = run_process(command)
    said.append(_said("qemu", spent.output))
    return session.seconds(spent)


def _said(who: str, printed: str) -> Said:
    """Clock source and the timer interrupts of the local APIC; MeasureError if the guest did not
    come to its init and from there to the power-off.
    """
    lines = printed.replace("\r", "")
    reached, ticks = _REACHED.search(lines), _LOC.search(lines)
    if reached is None or ticks is None or _OFF not in lines:
        last = (lines.strip().splitlines() or ["nothing"])[-1]
        raise MeasureError(f"{who}: Linux did not come to init and the power-off; last: {last}")
    return {"clocksource": reached["clock"], "lapic_ticks": int(ticks["ticks"])}


FIGURES: Final = (
    Figure(
        "boot-linux",
        "Debian's kernel to init, one vCPU, fast time, the whole process",
        "s",
        boots,
        (Demand(TIMES_QEMU, "qemu"), Demand(MOST_S)),
        at_most=True,
    ),
)
