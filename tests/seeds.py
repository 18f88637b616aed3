"""Seeds of random tests: KVMTICK_SEED=n in the environment makes them look at the seed n alone."""

import os
from collections.abc import Iterable


def seeds(count: int) -> Iterable[int]:
    """Those of this run: `count` of them, or the one that was asked for."""
    told = os.environ.get("KVMTICK_SEED")
    return range(count) if told is None else (int(told),)


def again(seed: int, file: str) -> str:
    """For people: how to repeat what a seed of the tests in `file` showed."""
    return f"again: KVMTICK_SEED={seed} pytest {os.path.relpath(file)}"
