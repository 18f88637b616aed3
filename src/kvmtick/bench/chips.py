"""The chips alone: ticks a second with verdicts, under a scripted guest that costs next to nothing.

    python -m kvmtick.bench.chips TICKS

is the process that is measured: PIT, PICs and one vCPU on the scripted engine, whose guest waits in
HLT and whose handler writes the EOI.
"""

import json
import sys
from functools import partial
from typing import Any, Final

from kvmtick.bench.figure import Demand, Figure, Taken
from kvmtick.bench.kvmtick_run import told
from kvmtick.bench.process import MeasureError, Spent, run_process
from kvmtick.bench.session import Session
from kvmtick.cpu.scripted import Hlt, Out, Program, ScriptedEngine, Sti
from kvmtick.guests import DEFAULT_DIVISOR
from kvmtick.kvm.model import ModelVm

__all__ = ["FIGURES", "run_ticks"]

MARK: Final = 1_500_000.0
LENGTHS: Final = (10_000, 400_000)
VECTOR: Final = 0x20
EXIT_PORT: Final = 0xF4
PIC_MASTER: Final = ((0x20, 0x11), (0x21, VECTOR), (0x21, 0x04), (0x21, 0x01), (0x21, 0xFE))
"""ICW1 to ICW4, and IRQ 0 alone open."""
PIT_MODE_2: Final = ((0x43, 0x34), (0x40, DEFAULT_DIVISOR & 0xFF), (0x40, DEFAULT_DIVISOR >> 8))


def run_ticks(ticks: int) -> dict[str, Any]:
    """So many ticks; the verdicts."""
    taken = 0
    hlt, eoi = Hlt(), Out(0x20, 0x20)

    def guest() -> Program:
        for port, value in (*PIC_MASTER, *PIT_MODE_2):
            yield Out(port, value)
        yield Sti()
        while taken < ticks:
            yield hlt
        yield Out(EXIT_PORT, 0)

    def tick() -> Program:
        nonlocal taken
        taken += 1
        yield eoi

    vm = ModelVm(engine=lambda: ScriptedEngine(guest, {VECTOR: tick}))
    vm.create_irqchip()
    vm.create_pit2()
    vm.create_vcpu(0)
    run = vm.run()
    vm.close()
    return run.ticks.as_dict() if run.ticks else {}


def main() -> None:
    """The process that is measured."""
    print(json.dumps(run_ticks(int(sys.argv[1]))))


def _run(ticks: int) -> Spent:
    spent = run_process([sys.executable, "-m", __spec__.name, str(ticks)])
    verdicts = told(spent)
    if verdicts["delivered"] != ticks:
        raise MeasureError(f"of {ticks} ticks these came: {verdicts}")
    return spent


def ticks_per_second(session: Session) -> Taken:
    """The whole process, start-up subtracted."""
    few, many = LENGTHS
    return session.in_turns(partial(session.rate, _run, few, few + session.scaled(many)), {})


FIGURES: Final = (
    Figure(
        "chips",
        "PIT and PICs under a scripted guest, verdicts on",
        "ticks/s",
        ticks_per_second,
        (Demand(MARK),),
    ),
)

if __name__ == "__main__":
    main()
