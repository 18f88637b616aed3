"""Ack and mask notifiers (virt/kvm/eventfd.c and arch/x86/kvm: kvm_notify_acked_irq,
kvm_fire_mask_notifiers): who wants to know that the guest acknowledged or (un)masked a GSI.
"""

from collections.abc import Callable

from kvmtick.irqchip.routing import IrqRouting
from kvmtick.trace.recorder import Recorder

__all__ = ["AckNotifier", "MaskNotifier", "Notifiers"]

AckNotifier = Callable[[], None]
MaskNotifier = Callable[[bool], None]


class Notifiers:
    """The notifiers of one VM. Chips speak of pins; the routing table says which GSI that is.

    The last one registered is told first, as in the kernel's lists. The slave PIC's pins are 8-15.
    """

    __slots__ = ("_ack", "_mask", "_recorder", "_routing")

    def __init__(self, routing: IrqRouting, recorder: Recorder) -> None:
        self._routing = routing
        self._recorder = recorder
        self._ack: list[tuple[int, AckNotifier]] = []
        self._mask: list[tuple[int, MaskNotifier]] = []

    def __len__(self) -> int:
        return len(self._ack) + len(self._mask)

    def register_ack(self, gsi: int, notifier: AckNotifier) -> None:
        """`kvm_register_irq_ack_notifier`."""
        self._ack.insert(0, (gsi, notifier))

    def unregister_ack(self, gsi: int, notifier: AckNotifier) -> None:
        """`kvm_unregister_irq_ack_notifier`; ValueError if it is not registered."""
        self._ack.remove((gsi, notifier))

    def register_mask(self, gsi: int, notifier: MaskNotifier) -> None:
        """`kvm_register_irq_mask_notifier`."""
        self._mask.insert(0, (gsi, notifier))

    def unregister_mask(self, gsi: int, notifier: MaskNotifier) -> None:
        """`kvm_unregister_irq_mask_notifier`; ValueError if it is not registered."""
        self._mask.remove((gsi, notifier))

    def notify_acked_irq(self, irqchip: int, pin: int) -> None:
        """The guest acknowledged `pin` of `irqchip`."""
        self._recorder.kvm_ack_irq(irqchip, pin)
        gsi = self._routing.gsi_of_pin(irqchip, pin)
        if gsi < 0:
            return
        for wanted, notifier in self._ack:
            if wanted == gsi:
                notifier()

    def fire_mask_notifiers(self, irqchip: int, pin: int, masked: bool) -> None:
        """The guest masked or unmasked `pin` of `irqchip`."""
        gsi = self._routing.gsi_of_pin(irqchip, pin)
        if gsi < 0:
            return
        for wanted, notifier in self._mask:
            if wanted == gsi:
                notifier(masked)
