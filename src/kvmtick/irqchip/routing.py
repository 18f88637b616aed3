"""GSI routing and irq source ids (arch/x86/kvm/irq.c, virt/kvm/irqchip.c; api.rst 4.52).

A GSI leads to at most one pin of each chip. Several sources may drive one pin; its level is the OR
over them, which each chip keeps in its `irq_states`. The table is the kernel's default
(`kvm_setup_default_irq_routing`): GSI n to IOAPIC pin n (n < 24) and to PIC pin n (n < 16), GSI 0
to pin 0.

Not modelled: tables set by user space (KVM_SET_GSI_ROUTING) and MSI entries.
"""

import errno
from typing import Protocol

from kvmtick.abi.errors import KvmError
from kvmtick.trace.events import Irqchip
from kvmtick.trace.recorder import Recorder

__all__ = [
    "IRQFD_RESAMPLE_IRQ_SOURCE_ID",
    "PIT_IRQ_SOURCE_ID",
    "USERSPACE_IRQ_SOURCE_ID",
    "IrqRouting",
    "IrqSourceIds",
    "IrqTarget",
]


class IrqTarget(Protocol):
    """A chip that GSIs lead to."""

    def set_irq(self, pin: int, irq_source_id: int, level: int) -> int:
        """Drive a pin; negative masked, 0 coalesced, 1 delivered."""

    def pulse(self, pin: int, irq_source_id: int) -> None:
        """`set_irq` to 1 and then to 0, with nothing in between."""


USERSPACE_IRQ_SOURCE_ID = 0
IRQFD_RESAMPLE_IRQ_SOURCE_ID = 1
PIT_IRQ_SOURCE_ID = 2

MAX_SOURCES = 64
PIC_PINS = 16
IOAPIC_PINS = 24
UNROUTED = -1


class IrqSourceIds:
    """Which irq source ids are taken (`kvm_request_irq_source_id`); 0 and 1 always are."""

    __slots__ = ("_taken",)

    def __init__(self) -> None:
        self._taken = {USERSPACE_IRQ_SOURCE_ID, IRQFD_RESAMPLE_IRQ_SOURCE_ID}

    def __len__(self) -> int:
        return len(self._taken)

    def request(self) -> int:
        """The lowest free id; KvmError EFAULT when none is left."""
        for source in range(MAX_SOURCES):
            if source not in self._taken:
                self._taken.add(source)
                return source
        raise KvmError(errno.EFAULT, "kvm_request_irq_source_id", "all 64 irq source ids are taken")

    def free(self, source: int) -> None:
        """`kvm_free_irq_source_id`."""
        self._taken.discard(source)


class IrqRouting:
    """The routing table of one VM: from GSIs to pins and back."""

    __slots__ = ("_entries", "_gsi_of_pin", "_recorder")

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._entries: dict[int, list[tuple[IrqTarget, int]]] = {}
        self._gsi_of_pin: dict[tuple[int, int], int] = {}

    def set_default(self, pic: IrqTarget, ioapic: IrqTarget) -> None:
        """`kvm_setup_default_irq_routing`. The IOAPIC comes first, as in the kernel's traces."""
        self._entries.clear()
        self._gsi_of_pin.clear()
        for gsi in range(IOAPIC_PINS):
            self._add(gsi, ioapic, Irqchip.IOAPIC, gsi)
            if gsi < PIC_PINS:
                chip = Irqchip.PIC_MASTER if gsi < PIC_PINS // 2 else Irqchip.PIC_SLAVE
                self._add(gsi, pic, chip, gsi)

    def _add(self, gsi: int, target: IrqTarget, irqchip: Irqchip, pin: int) -> None:
        self._entries.setdefault(gsi, []).append((target, pin))
        self._gsi_of_pin[int(irqchip), pin] = gsi

    def gsi_of_pin(self, irqchip: int, pin: int) -> int:
        """`kvm_irq_map_chip_pin`: the GSI that leads to this pin (slave PIC: 8-15), -1 if none."""
        return self._gsi_of_pin.get((irqchip, pin), UNROUTED)

    def set_irq(self, irq_source_id: int, gsi: int, level: int) -> int:
        """`kvm_set_irq`: drive every pin of `gsi`.

        Returns the sum of what the chips say, a negative answer counting as nothing once another
        chip gave one that is not; -1 if all did or the GSI has no route.
        """
        recorder = self._recorder
        if level or recorder.detail or irq_source_id != PIT_IRQ_SOURCE_ID:
            recorder.kvm_set_irq(gsi, level, irq_source_id)
        result = -1
        for target, pin in self._entries.get(gsi, ()):
            delivered = target.set_irq(pin, irq_source_id, level)
            if delivered >= 0:
                result = delivered + (result if result > 0 else 0)
        return result

    def pulse(self, irq_source_id: int, gsi: int) -> None:
        """`kvm_set_irq` to 1 and then to 0, what the PIT does to GSI 0 at each tick.

        The chips see both edges at once. That is no difference while nobody watches: nothing runs
        between the two calls.
        """
        recorder = self._recorder
        if recorder.detail:
            self.set_irq(irq_source_id, gsi, 1)
            self.set_irq(irq_source_id, gsi, 0)
            return
        recorder.kvm_set_irq(gsi, 1, irq_source_id)
        for target, pin in self._entries.get(gsi, ()):
            target.pulse(pin, irq_source_id)
