"""What the devices of a PC ask of whoever runs it: the model's machine, or user space of a real VM.

A device is handed a `PcHost`, registers `ports()` (`PortHandler` by port), reads `clock.now_ns`
(nanoseconds; of the real clock it is refreshed before every access) and puts what it has to do
later into `queue`, whose callbacks come one at a time with all accesses.
"""

from collections.abc import Callable
from dataclasses import dataclass

from kvmtick.timing.clock import Clock
from kvmtick.timing.queue import EventQueue

__all__ = ["PcHost"]


@dataclass(frozen=True, slots=True)
class PcHost:
    """`set_irq_line(gsi, level)` is KVM_IRQ_LINE. `date_ns`: CLOCK_REALTIME at this moment, in ns
    since 1970; in virtual time it is a date of the machine's own that goes on with its clock.
    """

    clock: Clock
    queue: EventQueue
    set_irq_line: Callable[[int, int], None]
    date_ns: Callable[[], int]
    transmit: Callable[[int], None]
    """A byte leaves by the serial line."""
    reset: Callable[[str], None]
    """The guest resets the machine; the argument says by what, for people."""
    power_off: Callable[[], None]
    """The guest switches the machine off."""
    ram_bytes: int
    vcpus: Callable[[], int]
    """How many there are at the moment of the question."""
