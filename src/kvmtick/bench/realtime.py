"""Real time: ticks lost, and how late the guest's handler begins, at 1 to 10 kHz.

The guest is tick-latency, which measures itself by the PIT's own count: in the same way on
kvmtick's chips and CPU, under QEMU's TCG, and with the kernel's PIT where /dev/kvm works.

Our figure is the p99 of all expiries. One that was lost never reaches the guest, so it counts as
later than all others: with more of them than 1 % the p99 is as long as the run. That of the others
is the p99 of the ticks their guest took, or QEMU, which loses some, would be a mark for nobody.

    python -m kvmtick.bench.realtime kvmtick|kernel HZ SECONDS

is the process that is measured.
"""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any, Final

from kvmtick import guests
from kvmtick.abi.errors import HostError
from kvmtick.bench.figure import Demand, Figure, Taken
from kvmtick.bench.kvmtick_run import told
from kvmtick.bench.peers import QEMU, QEMU_EXIT_CODES, QEMU_RAM
from kvmtick.bench.process import MeasureError, run_process
from kvmtick.bench.rom import rom_of
from kvmtick.bench.session import Session
from kvmtick.guests import Guest, latency
from kvmtick.guests.latency import Latencies
from kvmtick.irqchip.i8254 import MIN_TIMER_PERIOD_NS
from kvmtick.kvm.kernel import KernelVm
from kvmtick.kvm.model import ModelVm

__all__ = ["FIGURES", "measure"]

RATES_HZ: Final = {1_000: 1.0, 2_000: 1.0, 5_000: 1.0, 10_000: 2.0}
"""And how many times QEMU's p99 ours may be."""
DURATION_S: Final = 10
MOST_TURNS: Final = 2
MIN_TIMER_PERIOD_US: Final = Path("/sys/module/kvm/parameters/min_timer_period_us")
_NS_PER_S: Final = 1_000_000_000

Told = dict[str, Any]
"""What one engine gave: p50, p99 and max in ns of the ticks taken, p99 of all expiries, and how
many expired, were taken and were lost."""


def measure(rate_hz: int, duration_s: int, folder: Path) -> dict[str, Told | str]:
    """By engine, one after the other; a text where it could not be measured. kvmtick always can."""
    told: dict[str, Told | str] = {}
    for name in ("kvmtick", "qemu", "kernel"):
        try:
            told[name] = _measure_one(name, rate_hz, duration_s, folder)
        except MeasureError as error:
            if name == "kvmtick":
                raise
            told[name] = str(error)
    return told


def _measure_one(name: str, rate_hz: int, duration_s: int, folder: Path) -> Told:
    if name == "qemu":
        return _by_qemu(rate_hz, duration_s, folder)
    if name == "kernel" and (why := _why_not_by_kernel(rate_hz)):
        raise MeasureError(why)
    command = [sys.executable, "-m", "kvmtick.bench.realtime", name, str(rate_hz), str(duration_s)]
    return told(run_process(command))


def _guest(rate_hz: int, duration_s: int) -> Guest:
    return guests.load("tick-latency", ticks=rate_hz * duration_s, hz=rate_hz)


def _told(latencies: Latencies) -> Told:
    return {
        "p50": latencies.percentile_ns(50),
        "p99": latencies.percentile_ns(99),
        "max": latencies.percentile_ns(100),
        "p99_of_expired": latencies.percentile_of_expired_ns(99),
        "expired": latencies.expired,
        "taken": latencies.taken,
        "lost": latencies.lost,
    }


def _by_kvmtick(rate_hz: int, duration_s: int) -> Told:
    with ModelVm(clock="real", min_timer_period_us=0) as vm:
        told = _run(vm, _guest(rate_hz, duration_s))
        told["verdicts"] = vm.ticks().as_dict()
        told["model"] = vm.ticks().latency_ns
        return told


def _by_kernel(rate_hz: int, duration_s: int) -> Told:
    with KernelVm() as vm:
        return _run(vm, _guest(rate_hz, duration_s))


def _run(vm: ModelVm | KernelVm, guest: Guest) -> Told:
    vm.prepare(guest.needs, True)
    vm.load(guest)
    run = vm.run(limit_s=None)
    if run.exit.reason != "done":
        raise MeasureError(f"{guest.name} ended by {run.exit.reason}: {run.exit.detail}")
    return _told(latency.read(vm.read_memory, replays=True))


def _why_not_by_kernel(rate_hz: int) -> str | None:
    """Its PIT cannot be had, or not at that rate."""
    try:
        KernelVm(ram_bytes=0).close()
    except HostError as error:
        return str(error)
    least_ns = MIN_TIMER_PERIOD_NS
    if MIN_TIMER_PERIOD_US.exists():
        least_ns = int(MIN_TIMER_PERIOD_US.read_text()) * 1000
    if _NS_PER_S // rate_hz >= least_ns:
        return None
    return f"kvm's min_timer_period_us={least_ns // 1000} stops it at {_NS_PER_S // least_ns:,} Hz"


def _by_qemu(rate_hz: int, duration_s: int, folder: Path) -> Told:
    """TCG, in real time. Its RAM is a file, where the samples are when it is gone."""
    guest = _guest(rate_hz, duration_s)
    rom, ram = folder / "rom.bin", folder / "ram"
    rom.write_bytes(rom_of(guest.image))
    command = [
        *QEMU.command(rom, folder / "com1.txt"),
        *("-object", f"memory-backend-file,id=ram,size={QEMU_RAM},mem-path={ram},share=on"),
        *("-machine", "memory-backend=ram"),
    ]
    try:
        run_process(command, expected=QEMU_EXIT_CODES, timeout_s=10 * duration_s + 60)
        memory = ram.read_bytes()
    finally:
        ram.unlink(missing_ok=True)
    try:
        return _told(latency.read(lambda gpa, size: memory[gpa : gpa + size], replays=False))
    except ValueError as error:
        raise MeasureError(f"qemu: {error}") from None


def _take(session: Session, rate_hz: int) -> Taken:
    """The engines in turns: p99 in us."""
    taken = Taken(details={"runs": []})
    duration_s = session.scaled(DURATION_S)
    for _ in range(min(session.runs, MOST_TURNS)):
        session.progress(f"{duration_s} s of each engine")
        told = measure(rate_hz, duration_s, session.folder)
        taken.details["runs"].append(told)
        for name, each in told.items():
            if isinstance(each, str):
                taken.absent[name] = each
                continue
            p99_ns = each["p99_of_expired" if name == "kvmtick" else "p99"]
            p99_us = duration_s * 1e6 if p99_ns is None else p99_ns / 1000
            (taken.values if name == "kvmtick" else taken.peers.setdefault(name, [])).append(p99_us)
            if name == "kvmtick" and each["lost"]:
                taken.faults.append(f"{each['lost']} of {each['expired']} ticks were lost")
    for name in taken.absent:
        taken.peers.pop(name, None)
    taken.note = "; ".join(_in_words(name, each) for name, each in told.items())
    return taken


def _in_words(name: str, told: Told | str) -> str:
    """One engine's run, of the ticks that its guest took."""
    if isinstance(told, str):
        return f"{name} none"
    p50, p99, most = (told[key] // 1000 for key in ("p50", "p99", "max"))
    lost = f"{told['lost']:,} of {told['expired']:,} lost"
    return f"{name} p50 {p50:,}, p99 {p99:,}, max {most:,} us, {lost}"


def _figure(rate_hz: int, factor: float) -> Figure:
    return Figure(
        f"realtime-{rate_hz // 1000}k",
        f"real time, {rate_hz:,} Hz: p99 from expiry to handler, no tick lost",
        "us",
        partial(_take, rate_hz=rate_hz),
        (Demand(factor, "qemu"),),
        at_most=True,
    )


FIGURES: Final = tuple(_figure(rate_hz, factor) for rate_hz, factor in RATES_HZ.items())


def main() -> None:
    """The process that is measured."""
    engine, rate_hz, duration_s = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    by = {"kvmtick": _by_kvmtick, "kernel": _by_kernel}[engine]
    print(json.dumps(by(rate_hz, duration_s)))


if __name__ == "__main__":
    main()
