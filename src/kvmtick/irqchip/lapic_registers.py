"""The registers of a local APIC: a field each, and the page of 1024 bytes they make.

KVM_SET_LAPIC may store anything anywhere in the page, and KVM_GET_LAPIC gives it back: what belongs
to no register is kept as it came.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from kvmtick.irqchip.apicdef import (
    APIC_ARBPRI,
    APIC_DFR,
    APIC_ESR,
    APIC_ICR,
    APIC_ICR2,
    APIC_ICR_HIGH,
    APIC_ID,
    APIC_IRR,
    APIC_ISR,
    APIC_LDR,
    APIC_LVR,
    APIC_LVT0,
    APIC_LVT1,
    APIC_LVTERR,
    APIC_LVTPC,
    APIC_LVTT,
    APIC_LVTTHMR,
    APIC_PROCPRI,
    APIC_REGS_BYTES,
    APIC_SPIV,
    APIC_TASKPRI,
    APIC_TDCR,
    APIC_TMCCT,
    APIC_TMICT,
    APIC_TMR,
    U32,
)
from kvmtick.irqchip.lapic_timer import LapicTimer
from kvmtick.irqchip.vectors import VectorSet

if TYPE_CHECKING:
    from kvmtick.irqchip.lapic import LapicBoard, LapicVcpu

__all__ = [
    "FIELDS",
    "READABLE",
    "VECTOR_FIELDS",
    "VECTOR_REGISTERS",
    "X2APIC_ABSENT",
    "LapicRegisters",
    "page_register",
    "set_page_register",
]

FIELDS: Final = {
    APIC_ID: "id",
    APIC_LVR: "lvr",
    APIC_TASKPRI: "taskpri",
    APIC_PROCPRI: "procpri",
    APIC_LDR: "ldr",
    APIC_DFR: "dfr",
    APIC_SPIV: "spiv",
    APIC_ESR: "esr",
    APIC_ICR: "icr",
    APIC_ICR_HIGH: "icr_high",
    APIC_ICR2: "icr2",
    APIC_LVTT: "lvtt",
    APIC_LVTTHMR: "lvtthmr",
    APIC_LVTPC: "lvtpc",
    APIC_LVT0: "lvt0",
    APIC_LVT1: "lvt1",
    APIC_LVTERR: "lvterr",
    APIC_TMICT: "tmict",
    APIC_TDCR: "tdcr",
}
"""The registers of 32 bits that are kept, by offset."""

VECTOR_FIELDS: Final = {APIC_ISR: "isr", APIC_TMR: "tmr", APIC_IRR: "irr"}
"""The registers of 256 bits, by the offset of the first of their eight."""

VECTOR_REGISTERS: Final = 8
REGISTER_STRIDE: Final = 16
WORD_BYTES: Final = 4

READABLE: Final = (frozenset(FIELDS) - {APIC_ICR_HIGH}) | {
    APIC_ARBPRI,
    APIC_TMCCT,
    *(first + REGISTER_STRIDE * i for first in VECTOR_FIELDS for i in range(VECTOR_REGISTERS)),
}
"""The registers a guest can read (`kvm_lapic_readable_reg_mask`)."""

X2APIC_ABSENT: Final = frozenset({APIC_ARBPRI, APIC_DFR, APIC_ICR2})
"""Of these, the ones an x2APIC has not."""


_NO_PADDING: Final = bytes(APIC_REGS_BYTES)


class LapicRegisters(LapicTimer):
    """`struct kvm_lapic.regs`, under the names of asm/apicdef.h.

    `icr2` is the xAPIC's destination register, `icr_high` bits 63:32 of the x2APIC's ICR.
    """

    __slots__ = (
        "_irr",
        "_isr",
        "_padding",
        "_tmr",
        "dfr",
        "esr",
        "icr",
        "icr2",
        "icr_high",
        "id",
        "ldr",
        "lvr",
        "lvt0",
        "lvt1",
        "lvterr",
        "lvtpc",
        "lvtthmr",
        "procpri",
        "spiv",
        "taskpri",
    )

    def __init__(self, board: LapicBoard, vcpu: LapicVcpu) -> None:
        """All 0."""
        super().__init__(board, vcpu)
        self.id = 0
        self.lvr = 0
        self.taskpri = 0
        self.procpri = 0
        self.ldr = 0
        self.dfr = 0
        self.spiv = 0
        self._isr = VectorSet()
        self._tmr = VectorSet()
        self._irr = VectorSet()
        self.esr = 0
        self.icr = 0
        self.icr_high = 0
        self.icr2 = 0
        self.lvtthmr = 0
        self.lvtpc = 0
        self.lvt0 = 0
        self.lvt1 = 0
        self.lvterr = 0
        self._padding = _NO_PADDING

    @property
    def irr(self) -> int:
        """The vectors requested, as one number of 256 bits."""
        return self._irr.bits

    @irr.setter
    def irr(self, bits: int) -> None:
        self._irr.load(bits)

    @property
    def isr(self) -> int:
        """The vectors in service."""
        return self._isr.bits

    @isr.setter
    def isr(self, bits: int) -> None:
        self._isr.load(bits)

    @property
    def tmr(self) -> int:
        """The vectors whose last message was level triggered."""
        return self._tmr.bits

    @tmr.setter
    def tmr(self, bits: int) -> None:
        self._tmr.load(bits)

    def read_register(self, offset: int) -> int:
        """`__apic_read` of a `READABLE` register."""
        if offset == APIC_TMCCT:
            return self.current_count()
        if offset == APIC_ARBPRI:
            return 0
        if APIC_ISR <= offset < APIC_ESR:
            bits: int = getattr(self, VECTOR_FIELDS[offset & ~0x7F])
            return bits >> 2 * (offset & 0x70) & U32
        value: int = getattr(self, FIELDS[offset])
        return value

    def to_page(self) -> bytearray:
        """The 1024 bytes, the current count computed."""
        page = bytearray(self._padding)
        with memoryview(page).cast("I") as words:
            for offset, name in FIELDS.items():
                words[offset // WORD_BYTES] = getattr(self, name)
            for first, name in VECTOR_FIELDS.items():
                bits: int = getattr(self, name)
                for at in range(first, first + REGISTER_STRIDE * VECTOR_REGISTERS, REGISTER_STRIDE):
                    words[at // WORD_BYTES] = bits & U32
                    bits >>= 32
            words[APIC_TMCCT // WORD_BYTES] = self.current_count()
        return page

    def load_page(self, page: bytes) -> None:
        """Every field from 1024 bytes, unchecked; nothing else happens."""
        self._padding = bytes(page)
        for offset, name in FIELDS.items():
            setattr(self, name, page_register(page, offset))
        for first, name in VECTOR_FIELDS.items():
            bits = 0
            for i in range(VECTOR_REGISTERS):
                bits |= page_register(page, first + REGISTER_STRIDE * i) << 32 * i
            setattr(self, name, bits)


def page_register(page: bytes | bytearray, offset: int) -> int:
    """The 32 bits at `offset`."""
    return int.from_bytes(page[offset : offset + 4], "little")


def set_page_register(page: bytearray, offset: int, value: int) -> None:
    """Store 32 bits at `offset`."""
    page[offset : offset + 4] = value.to_bytes(4, "little")
