"""The IOAPIC as it is after reset (82093AA datasheet 3.2; arch/x86/kvm/ioapic.c).

It is part of the default routing, so every GSI 0 pulse reaches its pin 0 too: masked, edge,
physical, vector 0. Its answer counts in what KVM_IRQ_LINE_STATUS returns.

Not modelled: everything a guest could program, for nothing can reach its registers yet: the MMIO
window, unmasked pins, level triggering, remote IRR, delivery to local APICs.
"""

from kvmtick.irqchip.routing import IOAPIC_PINS
from kvmtick.trace.recorder import Recorder

__all__ = ["REDIRECTION_RESET", "Ioapic"]

REDIRECTION_RESET = 1 << 16
"""A redirection entry after reset: masked, everything else 0."""

_MASKED = -1


class Ioapic:
    """24 pins, all masked."""

    __slots__ = ("_recorder", "irq_states", "irr")

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self.irr = 0
        self.irq_states = [0] * IOAPIC_PINS

    def set_irq(self, pin: int, irq_source_id: int, level: int) -> int:
        """`kvm_ioapic_set_irq`: -1 for a rising edge (masked), 0 if already high, 1 for low."""
        states = self.irq_states
        source = 1 << irq_source_id
        line = states[pin] = states[pin] | source if level else states[pin] & ~source
        mask = 1 << pin
        if not line:
            self.irr &= ~mask
            result = 1
        elif self.irr & mask:
            result = 0
        else:
            self.irr |= mask
            result = _MASKED
        if self._recorder.detail:
            self._recorder.kvm_ioapic_set_irq(REDIRECTION_RESET, pin, result == 0)
        return result

    def pulse(self, pin: int, irq_source_id: int) -> None:
        """`set_irq` to 1 and then to 0: a masked pin forgets an edge as soon as it is over."""
        if self.irq_states[pin] or self.irr >> pin & 1:
            self.set_irq(pin, irq_source_id, 1)
            self.set_irq(pin, irq_source_id, 0)
