"""How long a built-in guest's ticks should take, and how long it may take for them."""

from collections.abc import Callable
from typing import Final

from kvmtick.guests import Guest, Parameters
from kvmtick.irqchip.i8254 import MIN_TIMER_PERIOD_NS, nominal_period_ns

__all__ = ["NOMINAL_TIMES", "believed_period_ns", "most_ns", "parameters_of"]

NOMINAL_TIMES: Final = 10
"""A guest that never gets its ticks is stopped after so many times the time they should take."""


def parameters_of(
    guest: Guest | None, read_ram: Callable[[int, int], bytes | None]
) -> Parameters | None:
    """The guest's parameter block as it is now in RAM; None for a foreign guest, and for one that
    has overwritten it.
    """
    if guest is None or guest.parameters is None:
        return None
    data = read_ram(guest.parameters.magic, Parameters.SIZE_BYTES)
    try:
        return Parameters.read(data or b"", 0)
    except ValueError:
        return None


def believed_period_ns(guest: Guest | None, block: Parameters | None) -> int | None:
    """What a guest whose clock is not the PIT takes its tick for; None for all others."""
    if guest is None or block is None or guest.needs.tick_source != "lapic":
        return None
    return block.period_ns


def most_ns(guest: Guest | None, block: Parameters | None) -> int | None:
    """How long a built-in guest may take for the ticks it waits for; None: as long as it likes."""
    if guest is None or block is None or not block.count:
        return None
    if guest.needs.tick_source == "lapic":
        period_ns = max(block.period_ns, MIN_TIMER_PERIOD_NS)
    else:
        period_ns = nominal_period_ns(block.divisor)
    return NOMINAL_TIMES * block.count * period_ns
