"""Real time: ticks lost, and how late the guest's handler begins, at 1 to 10 kHz."""

from typing import Final

from kvmtick.bench.figure import Demand, Figure, Taken
from kvmtick.bench.session import Session

__all__ = ["FIGURES"]

RATES_HZ: Final = {1_000: 1.0, 2_000: 1.0, 5_000: 1.0, 10_000: 2.0}
"""And how many times QEMU's p99 ours may be."""


def latency(session: Session, rate_hz: int) -> Taken:
    """Not there yet."""
    return Taken(note=f"not built: a guest that measures its latency at {rate_hz} Hz")


def _figure(rate_hz: int, factor: float) -> Figure:
    def take(session: Session) -> Taken:
        return latency(session, rate_hz)

    return Figure(
        f"realtime-{rate_hz // 1000}k",
        f"real time, {rate_hz:,} Hz: p99 from expiry to handler, no tick lost",
        "us",
        take,
        (Demand(factor, "qemu"),),
        at_most=True,
    )


FIGURES: Final = tuple(_figure(rate_hz, factor) for rate_hz, factor in RATES_HZ.items())
