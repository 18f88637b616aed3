"""What the cases of the APICs, of messages and of events have in common."""

import errno
from collections.abc import Callable

from kvmtick.abi.errors import KvmError
from kvmtick.conform.bench import (
    ENABLED,
    ICR,
    ICR_HIGH,
    SVR,
    Pc,
    Script,
    to_ioapic,
)
from kvmtick.guests.script import Op, lapic_write, unreal

__all__ = [
    "GSI",
    "ON",
    "PIN",
    "REDTBL_HIGH",
    "REDTBL_LOW",
    "VECTOR",
    "errno_of",
    "level_interrupt_in_service",
    "only_the_ioapic",
    "sends",
]

VECTOR = 0x45
GSI = PIN = 7
REDTBL_LOW = 0x10 + 2 * PIN
REDTBL_HIGH = REDTBL_LOW + 1
"""IOREGSEL of the pin's redirection entry."""

ON: Script = (unreal(), lapic_write(SVR, ENABLED))
"""The local APIC within reach, and software-enabled."""


def only_the_ioapic(pc: Pc, entry: int, gsi: int = GSI, pin: int = PIN) -> None:
    """`gsi` leads to the IOAPIC's pin alone, which has this redirection entry; the local APIC of
    vCPU 0 is enabled.
    """
    pc.vm.set_gsi_routing([to_ioapic(gsi, pin)])
    pc.enable_lapic()
    pc.set_pin(pin, entry)


def level_interrupt_in_service(pc: Pc) -> None:
    """Raise `GSI`, whose pin is level triggered, and take its interrupt into service.

    Works without a handler, and so where a handler would see something else.
    """
    pc.vm.irq_line(GSI, 1)
    pc.take_into_service(VECTOR)


def sends(icr: int, high: int = 0) -> tuple[Op, ...]:
    """Send an IPI: ICR's high half, then the low one."""
    return *lapic_write(ICR_HIGH, high), *lapic_write(ICR, icr)


def errno_of(call: Callable[..., object], *arguments: object) -> str | int:
    """The name of the error a call fails with, 0 if it does not."""
    try:
        call(*arguments)
    except KvmError as error:
        return errno.errorcode[error.errno]
    return 0
