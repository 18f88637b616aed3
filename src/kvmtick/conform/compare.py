"""One guest on the model and on the kernel: do the same things happen on every chip line?

Both traces go through `normalise.project`. The kernel runs in real time, on a host that may be
late; the model's host never is. So a difference counts when two runs of the kernel that were on
time (`punctual`) show the same one; or, late or not, when the model takes a step that none of
`NEVER` runs of the kernel took. A run that was late is made again, up to `ATTEMPTS` runs or
`MOST_S` in all.

How often things happened is compared exactly, too, but there the guest's own code, which takes time
on the kernel only, may decide: counts that are close have to differ in `SAME_CLOSE` runs on time,
and on a host that is always late close is equal.

Not modelled: guests whose ticks need events that the hardware keeps to itself (APICv, AVIC).
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from difflib import SequenceMatcher

from kvmtick.abi.errors import HostError
from kvmtick.conform.normalise import SET_ASIDE, ChipLines, project, tally
from kvmtick.conform.punctual import duration_us, reopened, worst_step_us
from kvmtick.guests import Guest
from kvmtick.host.probe import waited_for_cpu_ns
from kvmtick.kvm.kernel import KernelVm
from kvmtick.kvm.kernel_trace import TickTrace
from kvmtick.kvm.model import ModelVm
from kvmtick.machine.run import Run
from kvmtick.trace.events import Record
from kvmtick.trace.ftrace import event_name, format_line

__all__ = ["ATTEMPTS", "Comparison", "Difference", "NoisyHostError", "Side", "Wanted", "compare"]

ATTEMPTS = 20
MOST_S = 10.0
SAME = 2
"""So many runs that were on time have to show a difference."""
SAME_CLOSE = 4
NEVER = 5

CLOSE, CLOSE_SHARE = 2, 20
"""Counts are close that differ by so many and a twentieth."""

MOST_LATE_US = 500.0
IDLE_BY_ACK = "by ack:"

NOT_COMPARED = SET_ASIDE - {"kvm_vcpu_wakeup"}
"""Wake-ups tell how late a run was."""

Steps = tuple[str, ...]


class NoisyHostError(HostError):
    """No run of the kernel was on time."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to run: as `Vm.run`; `plant` gets the model before its run, for tests of the check."""

    guest: Guest
    reinject: bool = True
    ticks: int | None = None
    for_ns: int | None = None
    limit_s: float | None = None
    plant: Callable[[ModelVm], None] | None = None


@dataclass(frozen=True, slots=True)
class Side:
    """What one of them did: `lines` by name, after normalisation; `events`: how many went in."""

    run: Run
    trace: list[str]
    lines: dict[str, Steps]
    events: int


@dataclass(frozen=True, slots=True)
class Difference:
    """Where the steps of a line part: from step `at` of the model's on, `model` stands where the
    kernel has `kernel`.
    """

    line: str
    at: int
    model: Steps
    kernel: Steps


@dataclass(frozen=True, slots=True)
class Comparison:
    """The result; `runs`: how many runs of the kernel it took."""

    model: Side
    kernel: Side
    runs: int
    differences: list[Difference]

    @property
    def equal(self) -> bool:
        """They did the same."""
        return not self.differences


def compare(wanted: Wanted) -> Comparison:
    """Run both.

    Raises `HostError` without /dev/kvm or tracefs, and where KVM cannot run the guest;
    `NoisyHostError` if the host was never on time.
    """
    model = run_model(wanted)
    seen: Counter[tuple[str, ...]] = Counter()
    never = _steps(model)
    late, wall_s = 0, 0.0
    least: Comparison | None = None
    close: Comparison | None = None
    for attempt in range(1, ATTEMPTS + 1):
        waited_ns = waited_for_cpu_ns()
        kernel, lost = run_kernel(wanted)
        waited_ns = waited_for_cpu_ns() - waited_ns
        result = Comparison(model, kernel, attempt, differences(model, kernel))
        if result.equal and not lost:
            return result
        is_close = not differences(model, kernel, close=True)
        if is_close and not lost:
            close = replace(result, differences=[])
        never -= _steps(kernel)
        if not lost and (least is None or len(result.differences) <= len(least.differences)):
            least = result
        if lost or _was_late(model, kernel, waited_ns / 1e3):
            late += 1
        else:
            what = tuple(map(repr, result.differences))
            seen[what] += 1
            if seen[what] >= (SAME_CLOSE if is_close else SAME):
                return result
        if attempt >= NEVER and close is not None and not seen:
            return replace(close, runs=attempt)
        if attempt >= NEVER and never and least is not None:
            return replace(least, runs=attempt)
        wall_s += kernel.run.wall_s
        if wall_s > MOST_S:
            break
    raise NoisyHostError(
        f"the host is too noisy: of {attempt} runs of the kernel {late} were late, and no two of"
        " the others did the same",
        "compare on an idle host, or fewer ticks",
    )


def _steps(side: Side) -> set[tuple[str, str]]:
    """All steps there are, each once; not how often."""
    return {
        (line, step) for line, steps in side.lines.items() if line != "counts" for step in steps
    }


# The two sides.


def run_model(wanted: Wanted) -> Side:
    """The model's run."""
    guest = wanted.guest
    with ModelVm(detail=True, ram_bytes=guest.needs.ram_bytes) as vm:
        records: list[Record] = []
        vm.machine.recorder.add_consumer(records.extend)
        vm.prepare(guest.needs, wanted.reinject)
        vm.load(guest)
        if wanted.plant is not None:
            wanted.plant(vm)
        run = vm.run(ticks=wanted.ticks, for_ns=wanted.for_ns, limit_s=wanted.limit_s)
        return _side(run, records, vm.machine.recorder.tasks)


def run_kernel(wanted: Wanted) -> tuple[Side, int]:
    """The kernel's run, and how many of its records were lost."""
    guest = wanted.guest
    with KernelVm(ram_bytes=guest.needs.ram_bytes) as vm:
        vm.prepare(guest.needs, wanted.reinject)
        vm.load(guest)
        if guest.parameters is not None:
            vm.write_memory(guest.parameters.tsc_khz, vm.get_tsc_khz().to_bytes(4, "little"))
        records: list[Record] = []
        trace = TickTrace(vm, as_written=[records.extend])
        run = vm.run(
            ticks=wanted.ticks, for_ns=wanted.for_ns, limit_s=wanted.limit_s, observer=trace
        )
        if run.exit.reason == "guest-error" and not run.exit.code:
            raise HostError(f"KVM cannot run {run.guest} here: {run.exit.detail}", "take another")
        return _side(run, records, trace.tasks), trace.lost


def _side(run: Run, records: Iterable[Record], tasks: list[str]) -> Side:
    compared = [record for record in records if event_name(record) not in NOT_COMPARED]
    trace = [format_line(record, tasks) for record in compared]
    chips = project(trace)
    lines = {field.name: getattr(chips, field.name) for field in fields(ChipLines)}
    lines |= {"counts": _counts(run, trace), "guest": _facts(run)}
    events = sum(event_name(record) not in SET_ASIDE for record in compared)
    return Side(run, trace, lines, events)


def _counts(run: Run, trace: list[str]) -> Steps:
    """How often what happened, of a guest that counted its ticks to the end."""
    if run.exit.reason != "done" or not run.guest_ticks:
        return ()
    return tuple(f"{what} {count}" for what, count in sorted(tally(trace).items()) if count)


def _facts(run: Run) -> Steps:
    """What the guest itself has to say. What it counted until its time was over hangs on that."""
    facts = [f"{run.exit.reason}, code {run.exit.code}"]
    if run.exit.reason == "done" and run.guest_ticks is not None:
        facts.append(f"it counted {run.guest_ticks} ticks")
    return (*facts, *run.console.splitlines(), *run.serial.splitlines())


# What differs.


def differences(model: Side, kernel: Side, close: bool = False) -> list[Difference]:
    """Where they differ, line by line; `close`: counts that are close are equal."""
    found = []
    cut = "done" not in (model.run.exit.reason, kernel.run.exit.reason)
    for line, ours in model.lines.items():
        theirs = kernel.lines[line]
        if line == "counts":
            if close:
                theirs = tuple(_if_close(step, ours) for step in theirs)
        elif cut and line != "guest":
            ours, theirs = _cut(ours, theirs)
        matcher = SequenceMatcher(None, ours, theirs, autojunk=False)
        for tag, begin, end, their_begin, their_end in matcher.get_opcodes():
            if tag != "equal":
                found.append(
                    Difference(line, begin, ours[begin:end], theirs[their_begin:their_end])
                )
    return found


def _if_close(count: str, counts: Steps) -> str:
    """The one of `counts` that it is as good as, else itself."""
    what, _, number = count.partition(" ")
    for other in counts:
        other_what, _, other_number = other.partition(" ")
        apart = abs(int(number) - int(other_number))
        if what == other_what and apart <= CLOSE + int(other_number) // CLOSE_SHARE:
            return other
    return count


def _cut(ours: Steps, theirs: Steps) -> tuple[Steps, Steps]:
    """Where time ended both runs, they stand at different places: up to the shorter's last step."""
    length = max(0, min(len(ours), len(theirs)) - 1)
    return ours[:length], theirs[:length]


def _was_late(model: Side, kernel: Side, waited_us: float) -> bool:
    """The host was late by half a period, in a step of a tick or in all that the vCPU waited for a
    CPU, or by one at the end; or reinjection met an acknowledgement out of turn.
    """
    late_us = min(MOST_LATE_US, _period_us(model.run) / 2)
    reinject = model.run.pit is not None and model.run.pit.reinject
    if reinject and (reopened(kernel.trace) or IDLE_BY_ACK in kernel.lines["worker"]):
        return True
    if max(waited_us, worst_step_us(kernel.trace)) > late_us:
        return True
    return duration_us(kernel.trace) - duration_us(model.trace) > 2 * late_us


def _period_us(run: Run) -> float:
    if run.believed_period_ns:
        return run.believed_period_ns / 1e3
    return run.pit.period_ns / 1e3 if run.pit and run.pit.period_ns else 2 * MOST_LATE_US
