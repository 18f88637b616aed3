"""Looking for differences between two back ends: sequence after sequence, until one is found.

A difference counts when the sequence shows it twice more: on a host that is late a timer, or the
work of an irqfd, may come after the look at it. What shows once is `noise`, and counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as Seq
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from kvmtick.conform.fuzz.generate import Sequence, sequence
from kvmtick.conform.fuzz.look import Difference
from kvmtick.conform.fuzz.operations import Operation
from kvmtick.conform.fuzz.shrink import fewest, without_parts
from kvmtick.conform.fuzz.side import LOST, Config, LateHostError, Side
from kvmtick.host.kmsg import KernelLog
from kvmtick.kvm.api import System
from kvmtick.timing.wall import Stopwatch

__all__ = ["Backends", "Finding", "Found", "Fuzzer", "Totals", "carry_out", "first_difference"]

LATE_RETRIES = 3
CONFIRMATIONS = 2
PATIENCE_US = (200, 1_000, 5_000, 20_000)
"""The work of an irqfd, or of the PIT, may come after the first look: so long until the next."""
SHRINK_S = 60.0

MakeSide: TypeAlias = Callable[[Config], Side]


@dataclass(frozen=True, slots=True)
class Backends:
    """The two that are compared: what they are called, and how to make a side of each."""

    names: tuple[str, str]
    make: tuple[MakeSide, MakeSide]

    @classmethod
    def of(cls, left: System, right: System) -> Backends:
        """Those of two systems."""
        sides = (lambda config: Side(left, config), lambda config: Side(right, config))
        return cls((left.backend, right.backend), sides)


@dataclass(frozen=True, slots=True)
class Found:
    """Where two back ends differ: after which step of a sequence, and in what."""

    step: int
    operation: Operation
    differences: tuple[Difference, ...]

    def is_like(self, other: Found) -> bool:
        """Whether it is the same thing that went wrong, as far as can be told: the kind of the
        operation and what differs first, with a vCPU or register of its own.
        """
        kinds = type(self.operation), type(other.operation)
        ends = [LOST in (each.left, each.right) for each in (self.first, other.first)]
        fields = [each.field.split(" ")[0].split("[")[0] for each in (self.first, other.first)]
        return kinds[0] is kinds[1] and fields[0] == fields[1] and ends[0] == ends[1]

    @property
    def first(self) -> Difference:
        """The first of the differences."""
        return self.differences[0]


@dataclass(frozen=True, slots=True)
class Finding:
    """A sequence that shows something: a difference (`found`), or a line of the kernel log."""

    sequence: Sequence
    found: Found | None = None
    warning: str = ""


@dataclass(slots=True)
class Totals:
    """What a search did."""

    seed: int
    ops: int = 0
    sequences: int = 0
    differences: int = 0
    noise: int = 0
    late: int = 0
    coverage: Counter[str] = field(default_factory=Counter)
    """How often each kind of operation was carried out."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How many steps of a sequence were carried out, and the difference that ended it."""

    steps: int
    found: Found | None = None


def first_difference(
    backends: Backends, config: Config, operations: Seq[Operation]
) -> Found | None:
    """Carry the operations out on both; None: no difference.

    Raises LateHostError if the host is late every time.
    """
    return carry_out(backends, config, operations).found


def carry_out(backends: Backends, config: Config, operations: Seq[Operation]) -> Outcome:
    """As `first_difference`. A guest that is lost on both sides alike is an end, too."""
    for _ in range(LATE_RETRIES):
        with suppress(LateHostError), ExitStack() as stack:
            left, right = (stack.enter_context(make(config)) for make in backends.make)
            return _compare(left, right, operations)
    raise LateHostError


def _compare(left: Side, right: Side, operations: Seq[Operation]) -> Outcome:
    for number, operation in enumerate(operations):
        seen, other = left.step(operation), right.step(operation)
        for patience_us in PATIENCE_US:
            if seen == other:
                break
            seen, other = left.look_again(seen, patience_us), right.look_again(other, patience_us)
        if seen != other:
            found = Found(number, operation, tuple(seen.differences(other)))
            return Outcome(number + 1, found)
        if left.lost:
            return Outcome(number + 1)
    return Outcome(len(operations))


class Fuzzer:
    """Searches two back ends for differences."""

    def __init__(
        self,
        backends: Backends,
        seed: int = 0,
        log: KernelLog | None = None,
        shrinks: bool = True,
    ) -> None:
        """`log`: the kernel log to watch. `shrinks`: a difference comes with the shortest sequence
        that shows it, not with the one that was found.
        """
        self.backends = backends
        self._shrinks = shrinks
        self.totals = Totals(seed)
        self._log = log

    def run(
        self,
        ops: int | None = None,
        for_s: float | None = None,
        tell: Callable[[], None] | None = None,
    ) -> Finding | None:
        """Go on for at least `ops` operations, or `for_s` seconds of wall time, or to the first
        finding; `tell` is called after each sequence.
        """
        totals, stopwatch = self.totals, Stopwatch()
        end_ops = None if ops is None else totals.ops + ops
        while (end_ops is None or totals.ops < end_ops) and (
            for_s is None or stopwatch.elapsed_s() < for_s
        ):
            finding = self._try(sequence(totals.seed, totals.sequences))
            if tell is not None:
                tell()
            if finding is not None:
                return finding
        return None

    def _try(self, each: Sequence) -> Finding | None:
        totals = self.totals
        totals.sequences += 1
        try:
            outcome = carry_out(self.backends, each.config, each.operations)
        except LateHostError:
            totals.late += 1
            return None
        found, done = outcome.found, each.operations[: outcome.steps]
        totals.ops += len(done)
        totals.coverage.update(type(operation).__name__ for operation in done)
        warning = self._log.new_warning() if self._log is not None else None
        if warning is not None:
            return Finding(each, warning=warning)
        if found is None:
            return None
        cut = replace(each, operations=done)
        if not all(self._shows(cut) for _ in range(CONFIRMATIONS)):
            totals.noise += 1
            return None
        totals.differences += 1
        finding = Finding(cut, found)
        return self.shrunk(finding) if self._shrinks else finding

    def _shows(self, each: Sequence) -> Found | None:
        """The difference a sequence shows; None too if the host was late."""
        with suppress(LateHostError):
            return first_difference(self.backends, each.config, each.operations)
        return None

    def shrunk(self, finding: Finding) -> Finding:
        """The same difference, shown by as few operations as possible."""
        whole, found = finding.sequence, finding.found
        assert found is not None
        stopwatch = Stopwatch()

        def shows(operations: list[Operation]) -> bool:
            if stopwatch.elapsed_s() > SHRINK_S:
                return False
            shown = self._shows(replace(whole, operations=tuple(operations)))
            return shown is not None and shown.is_like(found)

        operations = fewest(list(whole.operations), shows)
        for at in range(len(operations)):
            operations = without_parts(operations, at, shows)
        less = replace(whole, operations=tuple(operations))
        shown = self._shows(less)
        return Finding(less, shown) if shown and shown.is_like(found) else finding
