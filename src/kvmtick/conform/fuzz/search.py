"""Looking for differences between two back ends."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import TypeAlias

from kvmtick.conform.fuzz.generate import Sequence
from kvmtick.conform.fuzz.observe import Difference
from kvmtick.conform.fuzz.operations import Operation
from kvmtick.conform.fuzz.side import Config, GuestLostError, LateHostError, Side

__all__ = ["Backends", "Found", "first_difference"]

MakeSide: TypeAlias = Callable[[Config], Side]
LATE_RETRIES = 3


@dataclass(frozen=True, slots=True)
class Found:
    """Where two back ends differ: after which step of a sequence, and in what."""

    step: int
    operation: Operation
    differences: tuple[Difference, ...]


@dataclass(frozen=True, slots=True)
class Backends:
    """The two that are compared, by name, and how to make a side of each."""

    names: tuple[str, str]
    make: tuple[MakeSide, MakeSide]


def first_difference(
    backends: Backends, config: Config, operations: tuple[Operation, ...]
) -> Found | None:
    """Carry the operations out on both; None: no difference.

    Raises LateHostError if the host is late every time.
    """
    for _ in range(LATE_RETRIES):
        with suppress(LateHostError), ExitStack() as stack:
            left, right = (stack.enter_context(make(config)) for make in backends.make)
            return _compare(left, right, operations)
    raise LateHostError


def _compare(left: Side, right: Side, operations: tuple[Operation, ...]) -> Found | None:
    for number, operation in enumerate(operations):
        seen = left.step(operation)
        other = right.step(operation)
        if seen != other:
            return Found(number, operation, tuple(seen.differences(other)))
    return None
