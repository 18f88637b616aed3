"""Real time: ticks lost, and how late the guest's handler begins, at 1 to 10 kHz.

All run `tick-latency`, which measures by the PIT's own counter: kvmtick on the embedded CPU with
`--clock real --no-clamp`, QEMU under TCG without icount, and the chips of this host's kernel where
/dev/kvm works. The kernel's PIT has a floor of 200 us, so it is left out above 5 kHz.

    python -m kvmtick.bench.realtime model|kernel HZ TICKS

is the process that is measured. These processes are not pinned: real time is for whole hosts.
"""

import json
import os
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any, Final

from kvmtick import guests
from kvmtick.bench.figure import Demand, Figure, Taken
from kvmtick.bench.kvmtick_run import told
from kvmtick.bench.peers import QEMU, QEMU_EXIT_CODES
from kvmtick.bench.process import MeasureError, run_process
from kvmtick.bench.rom import rom_of
from kvmtick.bench.session import NOT_INSTALLED, Session
from kvmtick.guests.latency import Latencies, read

__all__ = ["FIGURES"]

RATES_HZ: Final = {1_000: 1.0, 2_000: 1.0, 5_000: 1.0, 10_000: 2.0}
"""And how many times QEMU's p99 ours may be."""
SECONDS: Final = 10
MOST_RUNS: Final = 3
"""Of each engine at each rate: they are long."""
KERNEL_MOST_HZ: Final = 5_000
LIMIT_S: Final = 60.0
PERCENTILES: Final = {"p50_us": 50.0, "p99_us": 99.0, "max_us": 100.0}


def latency(session: Session, rate_hz: int) -> Taken:
    """p99 in us of ours and of the peers', in turns; each has its lost ticks in the details."""
    ticks = session.scaled(SECONDS) * rate_hz
    engines = {
        "kvmtick": partial(_ours, "model", rate_hz, ticks),
        "qemu": partial(_qemu, rate_hz, ticks),
    }
    taken = Taken()
    if not QEMU.installed:
        taken.absent["qemu"] = NOT_INSTALLED
    if rate_hz <= KERNEL_MOST_HZ and os.access("/dev/kvm", os.R_OK | os.W_OK):
        engines["kernel"] = partial(_ours, "kernel", rate_hz, ticks)
    for _ in range(min(session.runs, MOST_RUNS)):
        for name, measure in engines.items():
            if name in taken.absent:
                continue
            session.progress(f"{name}, {session.scaled(SECONDS)} s")
            try:
                _add(taken, name, measure())
            except MeasureError as error:
                if name == "kvmtick":
                    raise
                taken.absent[name] = str(error)
                taken.peers.pop(name, None)
    runs = taken.details["kvmtick"]
    lost = [run["lost"] for run in runs]
    if any(lost):
        taken.faults.append(
            f"{' / '.join(map(str, lost))} ticks of {ticks:,} were lost in its runs"
        )
    return taken


def _add(taken: Taken, name: str, run: dict[str, Any]) -> None:
    taken.details.setdefault(name, []).append(run)
    values = taken.values if name == "kvmtick" else taken.peers.setdefault(name, [])
    values.append(run["p99_us"])


def _ours(chips: str, rate_hz: int, ticks: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "kvmtick.bench.realtime", chips, str(rate_hz), str(ticks)]
    return told(run_process(command))


def _qemu(rate_hz: int, ticks: int) -> dict[str, Any]:
    """QEMU's RAM is a file, so that the samples can be read when it is gone."""
    guest = guests.load("tick-latency", hz=rate_hz, ticks=ticks)
    with tempfile.TemporaryDirectory(prefix="kvmtick-bench-") as folder:
        rom, ram = Path(folder, "rom.bin"), Path(folder, "ram.bin")
        rom.write_bytes(rom_of(guest.image))
        command = [
            *QEMU.command(rom, Path(folder, "com1.txt")),
            *("-object", f"memory-backend-file,id=ram,size=16M,share=on,mem-path={ram}"),
            *("-machine", "memory-backend=ram"),
        ]
        run_process(command, expected=QEMU_EXIT_CODES, timeout_s=LIMIT_S)
        memory = ram.read_bytes()
    try:
        found = read(lambda at, size_bytes: memory[at : at + size_bytes], replays=False)
    except ValueError as error:
        raise MeasureError(f"qemu: {error}") from None
    return _told(found)


def _told(found: Latencies) -> dict[str, Any]:
    return {
        "expired": found.expired,
        "lost": found.lost,
        **{name: found.percentile_ns(percent) / 1e3 for name, percent in PERCENTILES.items()},
    }


def _run(chips: str, rate_hz: int, ticks: int) -> Latencies:
    from kvmtick.kvm.kernel import KernelVm
    from kvmtick.kvm.model import ModelVm

    tsc_khz = 1_000_000
    guest = guests.load("tick-latency", hz=rate_hz, ticks=ticks, tsc_khz=tsc_khz)
    ram_bytes = guest.needs.ram_bytes
    with (
        ModelVm(clock="real", ram_bytes=ram_bytes, min_timer_period_us=0)
        if chips == "model"
        else KernelVm(ram_bytes=ram_bytes)
    ) as vm:
        vm.prepare(guest.needs)
        vm.load(guest)
        run = vm.run(limit_s=LIMIT_S)
        if run.exit.reason != "done":
            raise SystemExit(f"tick-latency ended with {run.exit}")
        return read(vm.read_memory, replays=True)


def main() -> None:
    """The process that is measured."""
    chips, rate_hz, ticks = sys.argv[1:]
    print(json.dumps(_told(_run(chips, int(rate_hz), int(ticks)))))


def _figure(rate_hz: int, factor: float) -> Figure:
    def take(session: Session) -> Taken:
        return latency(session, rate_hz)

    return Figure(
        f"realtime-{rate_hz // 1000}k",
        f"real time, {rate_hz:,} Hz: p99 from expiry to handler, no tick lost",
        "us",
        take,
        (Demand(factor, "qemu"),),
        at_most=True,
        pinned=False,
    )


FIGURES: Final = tuple(_figure(rate_hz, factor) for rate_hz, factor in RATES_HZ.items())

if __name__ == "__main__":
    main()
