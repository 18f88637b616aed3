"""All figures of `kvmtick bench`, in the order in which they are taken and shown."""

from typing import Final

from kvmtick.bench import (
    boot_linux,
    chips,
    decode,
    fleet,
    guest_code,
    memory,
    realtime,
    start,
    ticks,
)
from kvmtick.bench.figure import Figure

__all__ = ["FIGURES"]

FIGURES: Final[dict[str, Figure]] = {
    figure.name: figure
    for module in (ticks, chips, fleet, guest_code, boot_linux, realtime, decode, start, memory)
    for figure in module.FIGURES
}
