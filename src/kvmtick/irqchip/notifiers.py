"""Ack and mask notifiers (arch/x86/kvm/irq.c, virt/kvm/eventfd.c: kvm_notify_acked_irq,
kvm_fire_mask_notifiers, kvm_notify_irqfd_resampler): who wants to know that the guest acknowledged
or (un)masked a GSI.
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
    `ack_list_changed` (`kvm_arch_post_irq_ack_notifier_list_update`) is the IOAPIC's, for a local
    APIC tells only of the vectors somebody waits for; `resampler` is the irqfds'.
    """

    __slots__ = ("_ack", "_mask", "_recorder", "_routing", "ack_list_changed", "resampler")

    def __init__(self, routing: IrqRouting, recorder: Recorder) -> None:
        self._routing = routing
        self._recorder = recorder
        self._ack: list[tuple[int, AckNotifier]] = []
        self._mask: list[tuple[int, MaskNotifier]] = []
        self.ack_list_changed: Callable[[], None] | None = None
        self.resampler: Callable[[int], bool] | None = None
        """Given a GSI: signal its resamplefds; False if it has none."""

    def __len__(self) -> int:
        return len(self._ack) + len(self._mask)

    def register_ack(self, gsi: int, notifier: AckNotifier) -> None:
        """`kvm_register_irq_ack_notifier`."""
        self._ack.insert(0, (gsi, notifier))
        if self.ack_list_changed is not None:
            self.ack_list_changed()

    def unregister_ack(self, gsi: int, notifier: AckNotifier) -> None:
        """`kvm_unregister_irq_ack_notifier`; ValueError if it is not registered."""
        self._ack.remove((gsi, notifier))
        if self.ack_list_changed is not None:
            self.ack_list_changed()

    def has_ack_notifier(self, irqchip: int, pin: int) -> bool:
        """`kvm_irq_has_notifier`: somebody waits for the acknowledgement of `pin`."""
        gsi = self._routing.gsi_of_pin(irqchip, pin)
        return gsi >= 0 and any(wanted == gsi for wanted, _ in self._ack)

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

    def notify_irqfd_resampler(self, irqchip: int, pin: int) -> bool:
        """`kvm_notify_irqfd_resampler`: have `pin` raised again by whoever still wants it raised.

        False if no resampling irqfd leads to it.
        """
        gsi = self._routing.gsi_of_pin(irqchip, pin)
        return gsi >= 0 and self.resampler is not None and self.resampler(gsi)
