"""Leaving out of a sequence what a difference does not need."""

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from kvmtick.conform.fuzz.operations import Operation, SetGsiRouting, SetLapic

__all__ = ["fewest", "without_parts"]

T = TypeVar("T")


def fewest(items: list[T], is_enough: Callable[[list[T]], bool]) -> list[T]:
    """Leave out ever smaller parts of a list, as long as what is left is enough."""
    step = len(items)
    while step:
        at, before = 0, len(items)
        while at < len(items):
            fewer = items[:at] + items[at + step :]
            if is_enough(fewer):
                items = fewer
            else:
                at += step
        if step > 1 or len(items) == before:
            step //= 2
    return items


def without_parts(
    operations: list[Operation], at: int, is_enough: Callable[[list[Operation]], bool]
) -> list[Operation]:
    """Leave out what an operation that has parts can do without."""
    operation = operations[at]

    def with_it(changed: Operation) -> list[Operation]:
        return [*operations[:at], changed, *operations[at + 1 :]]

    if isinstance(operation, SetLapic):
        lapic = operation
        changes = fewest(
            list(lapic.changes), lambda few: is_enough(with_it(replace(lapic, changes=tuple(few))))
        )
        return with_it(replace(lapic, changes=tuple(changes)))
    if isinstance(operation, SetGsiRouting):
        routing = operation
        entries = fewest(
            list(routing.entries),
            lambda few: is_enough(with_it(replace(routing, entries=tuple(few)))),
        )
        return with_it(replace(routing, entries=tuple(entries)))
    return operations
