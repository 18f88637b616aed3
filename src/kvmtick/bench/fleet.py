"""A fleet of machines with scripted guests: ticks a second of 10,000, and what one weighs."""

from typing import Final

from kvmtick.bench.figure import Demand, Figure, Taken
from kvmtick.bench.session import Session

__all__ = ["FIGURES"]

MACHINES: Final = 10_000
LEAST_SHARE: Final = 0.8
MOST_BYTES: Final = 16_000


def ticks_per_second(session: Session) -> Taken:
    """Not there yet."""
    return Taken(note="not built: kvmtick.machine.fleet")


FIGURES: Final = (
    Figure(
        "fleet",
        f"{MACHINES:,} machines with scripted guests, on all cores",
        "ticks/s",
        ticks_per_second,
        (Demand(LEAST_SHARE, "one"),),
    ),
)
