"""What a host's KVM may do otherwise, found out by trying: no kernel version is asked for.

A case that needs ordinary behaviour which some back end of KVM lacks says `bench.needs(NAME)`, with
a name of `PROBES`; where the probe says no, the case is skipped with the probe's reason. Probes
are run on every back end, and must be sure within a few milliseconds on a busy host.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvmtick.guests.script import (
    apic_eoi_off,
    cli,
    eoi_off,
    in8,
    ioapic_write,
    lapic_write,
    out8,
    pit,
    sti,
    unreal,
    user_sleep_us,
    wait_ticks,
)

if TYPE_CHECKING:
    from kvmtick.conform.bench import Bench

__all__ = ["PROBES", "Probe"]


@dataclass(frozen=True, slots=True)
class Probe:
    """`holds` tries it; `reason` is why a case that needs it cannot run where it does not hold."""

    reason: str
    holds: Callable[["Bench"], bool]


def _in_service_after_injection(bench: "Bench") -> bool:
    """A handler that writes no EOI leaves its vector in service (SDM 12.8.4)."""
    from kvmtick.conform.bench import ENABLED, ISR, PORT_ACT, SVR, WINDOWS

    with bench.pc() as pc:
        pc.run(
            *(unreal(), lapic_write(SVR, ENABLED), apic_eoi_off(), ioapic_write(0x1E, 0x45)),
            *(sti(), out8(PORT_ACT, 0), *WINDOWS, cli()),
            acts=[lambda: pc.pulse(7)],
        )
        return pc.vectors(ISR) == {0x45}


def _tick_acknowledged_by_eoi_alone(bench: "Bench") -> bool:
    """With reinjection, a tick without EOI is not followed by a pulse (pit_do_work, irq_ack)."""
    from kvmtick.conform.bench import COUNT

    with bench.pc(pit=True) as pc:
        got = pc.run(
            *(eoi_off(), pit(COUNT), wait_ticks(1), cli(), user_sleep_us(20_000)),
            *(out8(0x20, 0x0A), in8(0x20, 0)),
        )
        return got.results[0] & 1 == 0


PROBES = {
    "in-service-after-injection": Probe(
        "this host's KVM writes EOI to the local APIC when it injects an interrupt",
        _in_service_after_injection,
    ),
    "tick-acknowledged-by-eoi-alone": Probe(
        "this host's KVM acknowledges the PIT's tick when it injects it",
        _tick_acknowledged_by_eoi_alone,
    ),
}
