"""The VMCS fields that carry events into and out of the guest (Intel SDM vol. 3C, chapter 26).

Not modelled: everything else of a VMCS; guest state lives in the engine.
"""

from typing import Final

from kvmtick.cpu.engine import INTR_INFO_VALID, EventType

__all__ = ["INTR_INFO_TYPE_SHIFT", "Vmcs", "intr_info", "intr_type", "intr_vector"]

INTR_INFO_TYPE_SHIFT: Final = 8
INTR_INFO_VECTOR_MASK: Final = 0xFF
INTR_INFO_TYPE_MASK: Final = 7


def intr_info(event_type: EventType, vector: int) -> int:
    """An interruption-information field, valid, without an error code (SDM 26.8.3)."""
    return INTR_INFO_VALID | int(event_type) << INTR_INFO_TYPE_SHIFT | vector


def intr_type(info: int) -> int:
    """Bits 10:8 of an interruption-information field."""
    return info >> INTR_INFO_TYPE_SHIFT & INTR_INFO_TYPE_MASK


def intr_vector(info: int) -> int:
    """Bits 7:0 of an interruption-information field."""
    return info & INTR_INFO_VECTOR_MASK


class Vmcs:
    """Event injection, windows, and what the last VM exit reported."""

    __slots__ = (
        "entry_error_code",
        "entry_intr_info",
        "exit_reason",
        "guest_interruptibility",
        "guest_rflags",
        "idt_vectoring_info",
        "intr_window_exiting",
        "nmi_window_exiting",
    )

    def __init__(self) -> None:
        self.entry_intr_info = 0
        """VM-entry interruption information; valid bit 31, cleared by every VM exit."""
        self.entry_error_code = 0
        """VM-entry exception error code; counts with INTR_INFO_DELIVER_CODE."""
        self.intr_window_exiting = False
        self.nmi_window_exiting = False
        self.exit_reason = 0
        self.guest_rflags = 2
        self.guest_interruptibility = 0
        self.idt_vectoring_info = 0
        """The event whose delivery the last VM exit cut short."""
