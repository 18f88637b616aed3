"""What the cases of the APICs, of messages and of events have in common."""

import errno
from collections.abc import Callable

from kvmtick.abi.errors import KvmError
from kvmtick.conform.bench import (
    ENABLED,
    ICR,
    ICR_HIGH,
    LEAVE,
    READ_AT,
    SVR,
    Pc,
    Script,
    to_ioapic,
)
from kvmtick.conform.case import equal
from kvmtick.guests.script import EXIT_CODE, Op, lapic_write, unreal

__all__ = [
    "GSI",
    "ON",
    "PIN",
    "QUADWORD",
    "REDTBL_HIGH",
    "REDTBL_LOW",
    "VECTOR",
    "errno_of",
    "level_interrupt_in_service",
    "load",
    "only_the_ioapic",
    "run_quadwords",
    "sends",
    "store",
    "store_byte",
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
        return errno.errorcode[error.errno or 0]
    return 0


# Accesses of 8 bytes, by MMX: real-mode code that needs 32-bit addresses.

QUADWORD = bytes(range(0x11, 0x19))
"""What MM0 begins with."""
_QUADWORD_AT, _GDT_AT = READ_AT + 0x10, READ_AT + 0x20
_GDT = bytes(8) + bytes.fromhex("ffff00000092cf00")
_GDTR = b"\x0f\x00" + (_GDT_AT + 8).to_bytes(4, "little") + bytes(2)
# cli; xor ax, ax; mov ds, ax; lgdt [_GDT_AT]; PE on; mov ds, 8; PE off; mov ds, 0
_UNREAL = bytes.fromhex("fa31c08ed8 0f0116") + _GDT_AT.to_bytes(2, "little")
_UNREAL += bytes.fromhex("0f20c00c010f22c0 bb08008edb 24fe0f22c0 31db8edb")


def load(address: int) -> bytes:
    """movq mm0, [address]"""
    return b"\x67\x0f\x6f\x05" + address.to_bytes(4, "little")


def store(address: int) -> bytes:
    """movq [address], mm0"""
    return b"\x67\x0f\x7f\x05" + address.to_bytes(4, "little")


def store_byte(address: int, value: int) -> bytes:
    """mov byte [address], value"""
    return b"\x67\xc6\x05" + address.to_bytes(4, "little") + bytes((value,))


def run_quadwords(pc: Pc, code: bytes) -> bytes:
    """Run code that may leave 8 bytes at READ_AT, with QUADWORD in MM0."""
    pc.vm.write_memory(_GDT_AT, _GDTR + _GDT)
    pc.vm.write_memory(_QUADWORD_AT, QUADWORD)
    code = _UNREAL + load(_QUADWORD_AT) + code + LEAVE
    equal(pc.run_image(code), EXIT_CODE, "exit code of the guest")
    return pc.vm.read_memory(READ_AT, 8)
