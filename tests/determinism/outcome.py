"""What a random system came to: everything a run leaves behind, and all events of it.

``python -m determinism.outcome fast 1 2 3``, in the directory of the tests, runs the systems with
these numbers in this process and prints a line of JSON for each.
"""

import hashlib
import io
import json
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import partial

from determinism.programs import INTERRUPTS, ROUNDS, System, Vcpu, system
from kvmtick.cpu.unicorn import UnicornEngine
from kvmtick.guests import Guest
from kvmtick.kvm.model import ModelVm
from kvmtick.trace.ftrace import FtraceWriter
from kvmtick.vcpu.vcpu import MpState

__all__ = ["FOR_NS", "Outcome", "play"]

FOR_NS = 300_000
LIMIT_S = 60.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """The end of a run. Traces are told apart by their hashes; `play` hands them out, too."""

    exit: tuple[str, int, str]
    elapsed_ns: int
    instructions: tuple[int, ...]
    """Of each vCPU."""
    registers: tuple[str, ...]
    ram: str
    trace: str
    lines: int
    rounds: tuple[int, ...]
    """How often each vCPU came to the end of its program."""
    interrupts: tuple[int, ...]
    """How many each vCPU's handlers took."""


def play(seed: int, fast: bool) -> tuple[Outcome, str]:
    """Run a system; its outcome, and its trace as text."""
    plan = system(seed)
    engine = partial(UnicornEngine, seed=seed, exact=not fast)
    with ModelVm(seed=seed, detail=True, engine=engine) as vm:
        machine = vm.machine
        vm.prepare(plan.needs, plan.reinject)
        text = io.StringIO()
        machine.recorder.add_consumer(FtraceWriter(text, machine.recorder.tasks))
        vm.load(_guest(plan))
        for vcpu, start in zip(machine.board.vcpus[1:], plan.vcpus[1:], strict=True):
            vcpu.start_at(0, 0, start.registers)
            vcpu.set_mp_state(int(MpState.RUNNABLE))
        run = vm.run(for_ns=FOR_NS, limit_s=LIMIT_S)
        trace = text.getvalue()
        outcome = Outcome(
            exit=(run.exit.reason, run.exit.code, run.exit.detail),
            elapsed_ns=run.elapsed_ns,
            instructions=tuple(vcpu.instructions for vcpu in machine.board.vcpus),
            registers=tuple(
                _hash(repr(vcpu.engine.registers()).encode()) for vcpu in machine.board.vcpus
            ),
            ram=_hash(vm.read_memory(0, plan.needs.ram_bytes)),
            trace=_hash(trace.encode()),
            lines=trace.count("\n"),
            rounds=tuple(_count(vm, vcpu, ROUNDS) for vcpu in plan.vcpus),
            interrupts=tuple(_count(vm, vcpu, INTERRUPTS) for vcpu in plan.vcpus),
        )
    return outcome, trace


def _guest(plan: System) -> Guest:
    (load_at, image), *pieces = plan.pieces
    start = plan.vcpus[0].registers
    return Guest("random", image, load_at, (0, 0), None, plan.needs, tuple(pieces), start)


def _count(vm: ModelVm, vcpu: Vcpu, offset: int) -> int:
    return int.from_bytes(vm.read_memory(vcpu.region + offset, 4), "little")


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def as_json(outcome: Outcome) -> str:
    """One line, the same for equal outcomes."""
    return json.dumps(asdict(outcome), sort_keys=True)


def main(arguments: Iterable[str]) -> None:
    """The outcomes of some systems."""
    speed, *numbers = arguments
    for number in numbers:
        print(as_json(play(int(number), fast=speed == "fast")[0]))


if __name__ == "__main__":
    main(sys.argv[1:])
