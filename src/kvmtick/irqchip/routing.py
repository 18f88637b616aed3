"""GSI routing, MSIs and irq source ids (arch/x86/kvm/irq.c, virt/kvm/irqchip.c; api.rst 4.52,
4.71; Intel SDM volume 3, "Message Signalled Interrupts").

A GSI leads to at most one pin of each chip, or to one message. Several sources may drive one pin;
its level is the OR over them, which each chip keeps in its `irq_states`. A message goes out when
its GSI rises.

The table is the kernel's default (`kvm_setup_default_irq_routing`: GSI n to IOAPIC pin n for n < 24
and to PIC pin n for n < 16, GSI 0 to pin 0) or the last one of KVM_SET_GSI_ROUTING.

Not modelled: S390 adapters, Hyper-V SINTs and Xen event channels, which no table may hold here; the
`kvm_msi_set_irq` event for every message looked at by a scan of the split irqchip.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from mypy_extensions import mypyc_attr

from kvmtick.abi.errors import NO_IRQCHIP, KvmError
from kvmtick.abi.structs import (
    KVM_IOAPIC_NUM_PINS,
    KVM_IRQ_ROUTING_IRQCHIP,
    KVM_IRQ_ROUTING_MSI,
    KVM_IRQCHIP_IOAPIC,
    KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE,
    KVM_MSI_VALID_DEVID,
    kvm_irq_routing_entry,
    kvm_msi,
)
from kvmtick.irqchip.delivery import IrqDelivery, LapicIrq
from kvmtick.trace.recorder import Recorder

if TYPE_CHECKING:
    from kvmtick.irqchip.lapic import Lapic

__all__ = [
    "IRQFD_RESAMPLE_IRQ_SOURCE_ID",
    "KVM_MAX_IRQ_ROUTES",
    "PIT_IRQ_SOURCE_ID",
    "USERSPACE_IRQ_SOURCE_ID",
    "IrqRouting",
    "IrqSourceIds",
    "IrqTarget",
    "parse_msi",
]


@mypyc_attr(allow_interpreted_subclasses=True)
class IrqTarget:
    """A chip that GSIs lead to, or a message."""

    __slots__ = ()

    def set_irq(self, pin: int, irq_source_id: int, level: int, line_status: bool = False) -> int:
        """Drive a pin; negative masked, 0 coalesced, positive delivered."""
        raise NotImplementedError

    def pulse(self, pin: int, irq_source_id: int) -> None:
        """`set_irq` to 1 and then to 0, with nothing in between."""
        raise NotImplementedError


USERSPACE_IRQ_SOURCE_ID: Final = 0
IRQFD_RESAMPLE_IRQ_SOURCE_ID: Final = 1
PIT_IRQ_SOURCE_ID: Final = 2

MAX_SOURCES: Final = 64
KVM_MAX_IRQ_ROUTES: Final = 4096
PIC_PINS: Final = 16
PIC_CHIP_PINS: Final = 8
UNROUTED: Final = -1
CHIP_SHIFT: Final = 8

# The address of a message; data as in a redirection entry.
MSI_DEST_MODE_LOGICAL: Final = 1 << 2
MSI_REDIRECTION_HINT: Final = 1 << 3
MSI_DEST_ID_SHIFT: Final = 12
MSI_HIGH_DEST_ID: Final = 0xFFFF_FF00
"""Bits 8-31 of the destination, in the high address word (KVM_X2APIC_API_USE_32BIT_IDS)."""
MSI_DATA_LEVEL: Final = 1 << 15

SET_GSI_ROUTING: Final = "KVM_SET_GSI_ROUTING"
SIGNAL_MSI: Final = "KVM_SIGNAL_MSI"


def parse_msi(address_lo: int, address_hi: int, data: int, x2apic_format: bool) -> LapicIrq:
    """`kvm_msi_to_lapic_irq`: the interrupt a message is."""
    dest_id = address_lo >> MSI_DEST_ID_SHIFT & 0xFF
    if x2apic_format:
        dest_id |= address_hi & MSI_HIGH_DEST_ID
    return LapicIrq(
        vector=data & 0xFF,
        delivery_mode=data >> 8 & 7,
        dest_mode_logical=bool(address_lo & MSI_DEST_MODE_LOGICAL),
        trig_mode_level=bool(data & MSI_DATA_LEVEL),
        level=True,
        shorthand=0,
        dest_id=dest_id,
        msi_redir_hint=bool(address_lo & MSI_REDIRECTION_HINT),
    )


def _bad_destination(delivery: IrqDelivery, address_hi: int) -> bool:
    """`kvm_msi_route_invalid`: with 32-bit ids the low byte of the high address is reserved."""
    return delivery.x2apic_format and address_hi & 0xFF != 0


class IrqSourceIds:
    """Which irq source ids are taken (`kvm_request_irq_source_id`); 0 and 1 always are."""

    __slots__ = ("_taken",)

    def __init__(self) -> None:
        # `irq_sources_bitmap`
        self._taken = 1 << USERSPACE_IRQ_SOURCE_ID | 1 << IRQFD_RESAMPLE_IRQ_SOURCE_ID

    def __len__(self) -> int:
        return self._taken.bit_count()

    def request(self) -> int:
        """The lowest free id; KvmError EFAULT when none is left."""
        for source in range(MAX_SOURCES):
            if not self._taken >> source & 1:
                self._taken |= 1 << source
                return source
        raise KvmError(errno.EFAULT, "kvm_request_irq_source_id", "all 64 irq source ids are taken")

    def free(self, source: int) -> None:
        """`kvm_free_irq_source_id`."""
        self._taken &= ~(1 << source)


class _Msi(IrqTarget):
    """A message a GSI leads to (`kvm_set_msi`)."""

    __slots__ = ("_delivery", "_recorder", "address_hi", "address_lo", "data")

    def __init__(
        self,
        recorder: Recorder,
        delivery: IrqDelivery,
        address_lo: int,
        address_hi: int,
        data: int,
    ) -> None:
        self._recorder = recorder
        self._delivery = delivery
        self.address_lo = address_lo
        self.address_hi = address_hi
        self.data = data

    def irq(self) -> LapicIrq:
        """What it asks of the local APICs."""
        return parse_msi(self.address_lo, self.address_hi, self.data, self._delivery.x2apic_format)

    def invalid(self) -> bool:
        """The table was set before KVM_CAP_X2APIC_API made the address a wrong one."""
        return _bad_destination(self._delivery, self.address_hi)

    def send(self) -> int:
        """How many took it; 0 or -1: nobody."""
        address = self.address_lo
        if self._delivery.x2apic_format:
            address |= self.address_hi << 32
        self._recorder.kvm_msi_set_irq(address, self.data)
        return self._delivery.deliver(self.irq())

    def set_irq(self, pin: int, irq_source_id: int, level: int, line_status: bool = False) -> int:
        if self.invalid():
            return -errno.EINVAL
        return self.send() if level else UNROUTED

    def pulse(self, pin: int, irq_source_id: int) -> None:
        self.set_irq(pin, irq_source_id, 1)


class _Route:
    """A GSI leads to `pin` of `target`."""

    __slots__ = ("pin", "target")

    def __init__(self, target: IrqTarget, pin: int) -> None:
        self.target = target
        self.pin = pin


_NOWHERE: Final[list[_Route]] = []


class IrqRouting:
    """The routing table of one VM: from GSIs to pins and back.

    Before `set_chips` or `set_split` the VM has no irqchip in the kernel. `nr_reserved_ioapic_pins`
    is how many GSIs belong to the IOAPIC of user space (KVM_CAP_SPLIT_IRQCHIP).
    """

    __slots__ = (
        "_delivery",
        "_gsi_of_pin",
        "_ioapic",
        "_is_default",
        "_pic",
        "_recorder",
        "_routes",
        "nr_reserved_ioapic_pins",
    )

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._routes: dict[int, list[_Route]] = {}
        """Of the default table those that were asked for."""
        self._gsi_of_pin: dict[int, int] = {}
        """By chip, from `CHIP_SHIFT` on, and pin."""
        self._is_default = False
        self._pic: IrqTarget | None = None
        self._ioapic: IrqTarget | None = None
        self._delivery: IrqDelivery | None = None
        self.nr_reserved_ioapic_pins = 0

    @property
    def in_kernel(self) -> bool:
        """`irqchip_in_kernel`: the local APICs at least are."""
        return self._delivery is not None

    @property
    def split(self) -> bool:
        """KVM_CAP_SPLIT_IRQCHIP: user space has the PICs and the IOAPIC."""
        return self._delivery is not None and self._delivery.split

    def set_chips(self, pic: IrqTarget, ioapic: IrqTarget, delivery: IrqDelivery) -> None:
        """KVM_CREATE_IRQCHIP: what tables may lead to, and the default table."""
        self._delivery = delivery
        self.set_default(pic, ioapic)

    def set_split(self, delivery: IrqDelivery, nr_reserved_ioapic_pins: int) -> None:
        """KVM_CAP_SPLIT_IRQCHIP: messages only, and an empty table."""
        self._delivery = delivery
        delivery.split = True
        self.nr_reserved_ioapic_pins = nr_reserved_ioapic_pins
        self._routes = {}
        self._gsi_of_pin = {}
        self._is_default = False

    def set_default(self, pic: IrqTarget, ioapic: IrqTarget) -> None:
        """`kvm_setup_default_irq_routing`. The IOAPIC comes first, as in the kernel's traces."""
        self._pic = pic
        self._ioapic = ioapic
        self._routes = {}
        self._gsi_of_pin = {}
        self._is_default = True

    def _routes_of(self, gsi: int) -> list[_Route]:
        routes = self._routes.get(gsi)
        if routes is not None:
            return routes
        if not self._is_default or not 0 <= gsi < KVM_IOAPIC_NUM_PINS:
            return _NOWHERE
        assert self._ioapic is not None
        assert self._pic is not None
        routes = [_Route(self._ioapic, gsi)]
        if gsi < PIC_PINS:
            routes = [routes[0], _Route(self._pic, gsi)]
        self._routes[gsi] = routes
        return routes

    def set_table(self, entries: Sequence[kvm_irq_routing_entry], flags: int = 0) -> None:
        """KVM_SET_GSI_ROUTING: replace the whole table, or leave it as it is and raise.

        KvmError EINVAL: no irqchip in the kernel, more than 4096 entries, `flags` not 0, or an
        entry whose gsi, type, flags, chip or pin is wrong, or which shares its GSI with a message
        or another entry of its chip.
        """
        delivery = self._delivery
        if delivery is None:
            raise KvmError(errno.EINVAL, SET_GSI_ROUTING, NO_IRQCHIP)
        _check_table(entries, flags)
        table: dict[int, list[_Route]] = {}
        chips: dict[int, set[int]] = {}
        gsi_of_pin: dict[int, int] = {}
        for index, entry in enumerate(entries):
            gsi, irqchip = entry.gsi, entry.u.irqchip.irqchip
            taken = chips.setdefault(gsi, set())
            if gsi in table:
                # One pin of each chip, or one message and nothing else.
                if entry.type != KVM_IRQ_ROUTING_IRQCHIP or not taken:
                    raise _bad_entry(index, f"a message must have gsi {gsi} for itself; move it")
                if irqchip in taken:
                    raise _bad_entry(index, f"gsi {gsi} leads to that chip already; leave it out")
            if entry.type == KVM_IRQ_ROUTING_IRQCHIP:
                target, pin = self._irqchip_target(index, entry)
                taken.add(irqchip)
                gsi_of_pin[irqchip << CHIP_SHIFT | pin] = gsi
            else:
                target, pin = self._msi_target(index, entry, delivery), 0
            table.setdefault(gsi, []).append(_Route(target, pin))
        self._routes = table
        self._gsi_of_pin = gsi_of_pin
        self._is_default = False
        if self.split:
            delivery.request_scan_ioapic()

    def _msi_target(
        self, index: int, entry: kvm_irq_routing_entry, delivery: IrqDelivery
    ) -> IrqTarget:
        """`kvm_set_routing_entry`, of the types it knows besides chips: messages."""
        if entry.type != KVM_IRQ_ROUTING_MSI:
            raise _bad_entry(index, f"type {entry.type}; 1 is a pin, 2 a message")
        msi = entry.u.msi
        target = _Msi(self._recorder, delivery, msi.address_lo, msi.address_hi, msi.data)
        if target.invalid():
            raise _bad_entry(index, f"address_hi {msi.address_hi:#x}; its low byte is 0")
        return target

    def _irqchip_target(self, index: int, entry: kvm_irq_routing_entry) -> tuple[IrqTarget, int]:
        """`kvm_set_routing_entry`: the chip and its pin, the slave PIC's from 8 on."""
        irqchip, pin = entry.u.irqchip.irqchip, entry.u.irqchip.pin
        if self._pic is None or self._ioapic is None:
            raise _bad_entry(index, "a pin, where user space has the chips; use messages")
        if irqchip == KVM_IRQCHIP_IOAPIC:
            if pin >= KVM_IOAPIC_NUM_PINS:
                raise _bad_entry(index, f"IOAPIC pin {pin}; it has 0-23")
            return self._ioapic, pin
        if irqchip not in (KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE):
            raise _bad_entry(index, f"irqchip {irqchip}; 0 and 1 are the PICs, 2 the IOAPIC")
        if pin >= PIC_CHIP_PINS:
            raise _bad_entry(index, f"PIC pin {pin}; each has 0-7")
        return self._pic, pin + (PIC_CHIP_PINS if irqchip == KVM_IRQCHIP_PIC_SLAVE else 0)

    def gsi_of_pin(self, irqchip: int, pin: int) -> int:
        """`kvm_irq_map_chip_pin`: the GSI that leads to this pin (slave PIC: 8-15), -1 if none."""
        if self._is_default:
            # each pin of the IOAPIC, and of the PICs, has the GSI of its number
            is_pic = irqchip != KVM_IRQCHIP_IOAPIC
            chip = pin >> 3 if is_pic else KVM_IRQCHIP_IOAPIC
            pins = PIC_PINS if is_pic else KVM_IOAPIC_NUM_PINS
            return pin if chip == irqchip and 0 <= pin < pins else UNROUTED
        return self._gsi_of_pin.get(irqchip << CHIP_SHIFT | pin, UNROUTED)

    def set_irq(self, irq_source_id: int, gsi: int, level: int, line_status: bool = False) -> int:
        """`kvm_set_irq`: drive every pin of `gsi`.

        Returns the sum of what the chips say, a negative answer counting as nothing once another
        chip gave one that is not; -1 if all did or the GSI has no route. `line_status`: somebody
        will look at it (KVM_IRQ_LINE_STATUS).
        """
        recorder = self._recorder
        is_detail = not level and irq_source_id == PIT_IRQ_SOURCE_ID
        if recorder.detail or not is_detail:
            recorder.kvm_set_irq(gsi, level, irq_source_id, is_detail)
        result = -1
        for route in self._routes_of(gsi):
            delivered = route.target.set_irq(route.pin, irq_source_id, level, line_status)
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
        for route in self._routes_of(gsi):
            route.target.pulse(route.pin, irq_source_id)

    # Messages.

    def signal_msi(self, msi: kvm_msi) -> int:
        """`kvm_send_userspace_msi` (KVM_SIGNAL_MSI): how many local APICs took it.

        KvmError EINVAL: no irqchip in the kernel, unknown flags, or a wrong address_hi; EPERM: the
        kernel's slow path found nobody, for there is no local APIC.
        """
        delivery = self._delivery
        if delivery is None:
            raise KvmError(errno.EINVAL, SIGNAL_MSI, NO_IRQCHIP)
        if msi.flags & ~KVM_MSI_VALID_DEVID:
            raise KvmError(errno.EINVAL, SIGNAL_MSI, f"flags {msi.flags:#x}; use 0")
        message = _Msi(self._recorder, delivery, msi.address_lo, msi.address_hi, msi.data)
        if message.invalid():
            raise KvmError(
                errno.EINVAL, SIGNAL_MSI, f"address_hi {msi.address_hi:#x}; its low byte must be 0"
            )
        taken = message.send()
        if taken < 0:
            raise KvmError(errno.EPERM, SIGNAL_MSI, "no local APIC; call create_vcpu() first")
        return taken

    def messages(self) -> list[LapicIrq]:
        """What the GSIs that lead to messages send."""
        return [
            route.target.irq()
            for routes in self._routes.values()
            for route in routes
            if isinstance(route.target, _Msi)
        ]

    def set_irq_inatomic(self, gsi: int) -> bool:
        """`kvm_arch_set_irq_inatomic`: send the message `gsi` is; False: use `set_irq`."""
        routes = self._routes_of(gsi)
        if len(routes) != 1:
            return False
        target = routes[0].target
        if not isinstance(target, _Msi):
            return False
        return target.invalid() or target.send() >= 0

    def scan_routes(self, lapic: Lapic) -> int:
        """`kvm_scan_ioapic_routes`: whose end `lapic` has to tell to user space's IOAPIC.

        A 256-bit mask of the vectors of the level-triggered messages on the reserved GSIs.
        """
        vectors = 0
        for gsi in range(self.nr_reserved_ioapic_pins):
            for route in self._routes_of(gsi):
                target = route.target
                if not isinstance(target, _Msi):
                    continue
                irq = target.irq()
                if irq.trig_mode_level and (
                    lapic.matches(None, 0, irq.dest_id, irq.dest_mode_logical)
                    or lapic.pending_eoi(irq.vector)
                ):
                    vectors |= 1 << irq.vector
        return vectors


def _check_table(entries: Sequence[kvm_irq_routing_entry], flags: int) -> None:
    """What is wrong whatever the chips are."""
    if len(entries) > KVM_MAX_IRQ_ROUTES:
        raise _bad_table(f"{len(entries)} entries; at most {KVM_MAX_IRQ_ROUTES} fit")
    if flags:
        raise _bad_table(f"table flags {flags:#x}; use 0")
    for index, entry in enumerate(entries):
        if entry.gsi >= KVM_MAX_IRQ_ROUTES:
            raise _bad_entry(index, f"gsi {entry.gsi}; stay below {KVM_MAX_IRQ_ROUTES}")
        allowed = KVM_MSI_VALID_DEVID if entry.type == KVM_IRQ_ROUTING_MSI else 0
        if entry.flags & ~allowed:
            raise _bad_entry(index, f"flags {entry.flags:#x}; use 0")


def _bad_table(why: str) -> KvmError:
    return KvmError(errno.EINVAL, SET_GSI_ROUTING, why)


def _bad_entry(index: int, why: str) -> KvmError:
    return KvmError(errno.EINVAL, SET_GSI_ROUTING, f"entry {index}: {why}")
