"""The chips alone: ticks a second with verdicts, under a scripted guest that costs next to nothing.

    python -m kvmtick.bench.chips TICKS

is the process that is measured: PIT, PICs and one vCPU, whose guest is a list of operations that
waits in HLT; its handler writes the EOI.
"""

import json
import sys
from functools import partial
from typing import Any, Final

from kvmtick.bench.figure import Demand, Figure, Taken
from kvmtick.bench.kvmtick_run import told
from kvmtick.bench.process import MeasureError, Spent, run_process
from kvmtick.bench.session import Session
from kvmtick.cpu.listed import ListedEngine
from kvmtick.kvm.model import ModelVm
from kvmtick.machine.fleet_guests import tick_pic

__all__ = ["FIGURES", "run_ticks"]

MARK: Final = 1_500_000.0
LENGTHS: Final = (10_000, 600_000)
PERIOD_NS: Final = 1_000_000
"""A little more than the guest's: it gets a tick more now and then."""


def run_ticks(ticks: int) -> dict[str, Any]:
    """So many ticks or a few more; the verdicts."""
    with ModelVm(engine=lambda: ListedEngine(tick_pic())) as vm:
        vm.create_irqchip()
        vm.create_pit2()
        vm.create_vcpu(0)
        run = vm.run(for_ns=(ticks + 1) * PERIOD_NS, limit_s=None)
    return run.ticks.as_dict() if run.ticks else {}


def main() -> None:
    """The process that is measured."""
    print(json.dumps(run_ticks(int(sys.argv[1]))))


def _run(ticks: int) -> Spent:
    spent = run_process([sys.executable, "-m", "kvmtick.bench.chips", str(ticks)])
    verdicts = told(spent)
    if verdicts["expired"] < ticks or verdicts["delivered"] != verdicts["expired"]:
        raise MeasureError(f"of {ticks:,} ticks these came: {verdicts}")
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
