"""How large `kvmtick run` is: its peak resident set, which may not grow with the run."""

from typing import Final

from kvmtick.bench.figure import Demand, Figure, Taken
from kvmtick.bench.kvmtick_run import run_ticks
from kvmtick.bench.session import Session

__all__ = ["FIGURES"]

FEW_TICKS: Final = 1_000_000
MANY_TICKS: Final = 10_000_000
MOST_MB: Final = 150.0
SLACK_MB: Final = 2.0
"""Two runs of the same length may differ by so much: pages come and go."""


def peak_rss(session: Session) -> Taken:
    """Once over few and once over many ticks: it hardly varies."""
    few, many = session.scaled(FEW_TICKS), session.scaled(MANY_TICKS)
    session.progress(f"{few:,} ticks")
    few_mb = _peak_mb(few)
    session.progress(f"{many:,} ticks")
    many_mb = _peak_mb(many)
    taken = Taken([many_mb], details={"ticks": many, "at_a_tenth_of_the_ticks": few_mb})
    taken.note = f"{few_mb:.1f} MB over {few:,} ticks, {many_mb:.1f} MB over {many:,}"
    taken.undecided = session.quick
    if many_mb > few_mb + SLACK_MB:
        taken.faults.append(f"it grows: {taken.note}")
    return taken


def _peak_mb(ticks: int) -> float:
    return run_ticks("tick-pic", ticks).peak_rss_bytes / 1e6


FIGURES: Final = (
    Figure(
        "memory",
        f"peak resident set over {MANY_TICKS:,} ticks, and no more than over {FEW_TICKS:,}",
        "MB",
        peak_rss,
        (Demand(MOST_MB),),
        at_most=True,
    ),
)
