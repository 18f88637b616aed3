"""What the searches for differences share: seeds, shrinking, and hosts that are late.

KVMTICK_SEED=n in the environment makes a search look at the seed n alone.
"""

import os
from collections.abc import Callable, Iterable
from typing import TypeVar

import pytest

MOST_LATE = 0.1
"""Of a search, the part that may be left out because the host was late."""

T = TypeVar("T")


class LateHostError(Exception):
    """The host took so long that a timer may have fired that should not."""


def seeds(count: int) -> Iterable[int]:
    """Those of this run: `count` of them, or the one that was asked for."""
    told = os.environ.get("KVMTICK_SEED")
    return range(count) if told is None else (int(told),)


def again(seed: int, file: str) -> str:
    """For people: how to repeat what a seed of the tests in `file` showed."""
    return f"again: KVMTICK_SEED={seed} pytest {os.path.relpath(file)}"


def search(count: int, check: Callable[[int], None]) -> None:
    """`check` each seed; where it raises `LateHostError`, only that seed is left out.

    Skips, saying how many these were, if they were too many for the rest to count.
    """
    looked_at = late = 0
    for seed in seeds(count):
        looked_at += 1
        try:
            check(seed)
        except LateHostError:
            late += 1
    skip_if_too_late(late, looked_at)


def skip_if_too_late(late: int, looked_at: int) -> None:
    """Skip, saying why, if the host was late too often."""
    if late > MOST_LATE * looked_at:
        pytest.skip(f"this host is too slow: late for {late} of {looked_at} seeds")


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
