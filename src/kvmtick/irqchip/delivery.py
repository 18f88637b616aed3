"""Interrupt messages and who takes them (arch/x86/kvm: kvm_irq_delivery_to_apic, kvm_apic_map).

Implements the SDM's vol. 3A 12.6.2 (physical, logical flat and cluster, x2APIC cluster
destinations, broadcasts, shorthands) the way KVM does it:

* the fast path looks the destination up in a map. It is made anew when an APIC's id, LDR, DFR,
  software enable bit or base changes, and whoever made it asks every vCPU to scan the IOAPIC. A
  message to an id that is not in the map is lost: the result is 0;
* where the map cannot tell (a broadcast, a shorthand, two APICs of one id or one logical id, APICs
  in different logical modes) the slow path asks every APIC; if none matches the result is -1;
* lowest priority goes by vector hashing: the vector modulo the number of candidates picks one;
* a software-disabled APIC is in no logical map, one that is disabled by IA32_APIC_BASE in none.

Not modelled: the module parameter that turns vector hashing off, posted interrupts, Hyper-V and Xen
routes, APICv's inhibit reasons.
"""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

from kvmtick.irqchip.apicdef import (
    APIC_BROADCAST,
    APIC_DFR_FLAT,
    DEST_NOSHORT,
    DEST_SELF,
    DM_FIXED,
    DM_LOWEST,
    X2APIC_BROADCAST,
)

if TYPE_CHECKING:
    from kvmtick.irqchip.lapic import Lapic

__all__ = [
    "ApicMap",
    "EoiTarget",
    "IrqDelivery",
    "LapicIrq",
    "LogicalMode",
    "SuppressEoiBroadcast",
]

NOBODY: Final = -1
XAPIC_IDS: Final = 0x100
FLAT_MEMBERS: Final = 8
CLUSTER_MEMBERS: Final = 4
X2APIC_CLUSTER_MEMBERS: Final = 16


class LapicIrq(NamedTuple):
    """An interrupt message (struct kvm_lapic_irq)."""

    vector: int
    delivery_mode: int
    """0-7: FIXED LOWEST SMI REMRD NMI INIT STARTUP EXTINT."""
    dest_mode_logical: bool
    trig_mode_level: bool
    level: bool
    """Assert."""
    shorthand: int
    """0 none, 1 self, 2 all, 3 all but self."""
    dest_id: int
    msi_redir_hint: bool


class SuppressEoiBroadcast(IntEnum):
    """Whether the guest may suppress EOI broadcasts (KVM_CAP_X2APIC_API bits 2 and 3)."""

    QUIRKED = 0
    """As ever: offered with a split irqchip, and not obeyed."""
    ENABLED = 1
    DISABLED = 2


class LogicalMode(IntEnum):
    """How the APICs in the map read logical destinations (enum kvm_apic_logical_mode)."""

    SW_DISABLED = 0
    XAPIC_CLUSTER = 1
    XAPIC_FLAT = 2
    X2APIC = 3
    MAP_DISABLED = 4


_SW_DISABLED: Final = LogicalMode.SW_DISABLED
_XAPIC_CLUSTER: Final = LogicalMode.XAPIC_CLUSTER
_XAPIC_FLAT: Final = LogicalMode.XAPIC_FLAT
_X2APIC: Final = LogicalMode.X2APIC
_MAP_DISABLED: Final = LogicalMode.MAP_DISABLED


class EoiTarget(Protocol):
    """The IOAPIC, as far as a local APIC's EOI is concerned."""

    def update_eoi(self, lapic: Lapic, vector: int, trig_mode_level: bool) -> None:
        """`kvm_ioapic_update_eoi`: `lapic` has finished with `vector`."""

    def restore_rtc_tracking(self, lapic: Lapic) -> None:
        """`kvm_rtc_eoi_tracking_restore_one`: KVM_SET_LAPIC gave `lapic` another state."""


class ApicMap:
    """struct kvm_apic_map: from destinations to local APICs, where that is one to one."""

    __slots__ = ("cluster_map", "flat_map", "logical_mode", "max_apic_id", "phys_map")

    def __init__(self, max_apic_id: int) -> None:
        self.max_apic_id = max_apic_id
        self.logical_mode = _SW_DISABLED
        self.phys_map: dict[int, Lapic] = {}
        self.flat_map: dict[int, Lapic] = {}
        self.cluster_map: dict[tuple[int, int], Lapic] = {}

    def add_physical(self, lapic: Lapic, x2apic_format: bool) -> bool:
        """`kvm_recalculate_phys_map`; False: the id is taken, so no map is possible."""
        x2apic_id, xapic_id = lapic.vcpu.vcpu_id, lapic.id >> 24
        if x2apic_format:
            # With 32-bit ids an APIC that cannot be reached by 8 bits is reached by its x2APIC id
            # even in xAPIC mode, and an 8-bit id is the first one's.
            if lapic.x2apic_mode or x2apic_id >= XAPIC_IDS:
                self.phys_map[x2apic_id] = lapic
            if not lapic.x2apic_mode:
                self.phys_map.setdefault(xapic_id, lapic)
            return True
        return self.phys_map.setdefault(x2apic_id if lapic.x2apic_mode else xapic_id, lapic) is (
            lapic
        )

    def add_logical(self, lapic: Lapic) -> None:
        """`kvm_recalculate_logical_map`."""
        if self.logical_mode is _MAP_DISABLED or not lapic.sw_enabled or not lapic.ldr:
            return
        if lapic.x2apic_mode:
            mode = _X2APIC
        elif lapic.dfr == APIC_DFR_FLAT:
            mode = _XAPIC_FLAT
        else:
            mode = _XAPIC_CLUSTER
        if self.logical_mode is _SW_DISABLED:
            self.logical_mode = mode
        elif self.logical_mode is not mode:
            self.logical_mode = _MAP_DISABLED
            return
        if mode is _X2APIC:
            # The LDR is made from the id, so the physical map serves.
            return
        logical_id = lapic.ldr >> 24
        member = logical_id if mode is _XAPIC_FLAT else logical_id & 0xF
        if not member:
            return
        taken = True
        if not member & (member - 1):
            index = member.bit_length() - 1
            if mode is _XAPIC_FLAT:
                taken = self.flat_map.setdefault(index, lapic) is not lapic
            else:
                taken = self.cluster_map.setdefault((logical_id >> 4, index), lapic) is not lapic
        if taken:
            self.logical_mode = _MAP_DISABLED

    def logical_dest(self, dest_id: int) -> list[Lapic | None] | None:
        """`kvm_apic_map_get_logical_dest`: what each bit of `dest_id` names, lowest first.

        None entries are ids nobody has; the result is None if the map cannot tell.
        """
        mode = self.logical_mode
        if mode is _XAPIC_FLAT:
            return [self.flat_map.get(i) for i in range(FLAT_MEMBERS) if dest_id >> i & 1]
        if mode is _X2APIC:
            first = (dest_id >> 16) * X2APIC_CLUSTER_MEMBERS
            members = min(self.max_apic_id - first + 1, X2APIC_CLUSTER_MEMBERS)
            return [self.phys_map.get(first + i) for i in range(members) if dest_id >> i & 1]
        if mode is _XAPIC_CLUSTER:
            cluster = dest_id >> 4 & 0xF
            return [
                self.cluster_map.get((cluster, i))
                for i in range(CLUSTER_MEMBERS)
                if dest_id >> i & 1
            ]
        return [] if mode is _SW_DISABLED else None


class IrqDelivery:
    """The VM-wide part of the local APICs (struct kvm_arch).

    `x2apic_format`, `x2apic_broadcast_quirk_disabled` and `suppress_eoi_broadcast` are bits of
    KVM_CAP_X2APIC_API, `apic_bus_cycle_ns` is KVM_CAP_X86_APIC_BUS_CYCLES_NS, `split` is
    KVM_CAP_SPLIT_IRQCHIP. The last three must be set before the first vCPU exists.
    """

    __slots__ = (
        "apic_bus_cycle_ns",
        "apic_map",
        "apic_map_dirty",
        "eoi_target",
        "lapics",
        "split",
        "suppress_eoi_broadcast",
        "vapics_in_nmi_mode",
        "x2apic_broadcast_quirk_disabled",
        "x2apic_format",
    )

    def __init__(self) -> None:
        self.lapics: list[Lapic] = []
        self.x2apic_format = False
        self.x2apic_broadcast_quirk_disabled = False
        self.suppress_eoi_broadcast = SuppressEoiBroadcast.QUIRKED
        self.apic_bus_cycle_ns = 1
        self.vapics_in_nmi_mode = 0
        self.eoi_target: EoiTarget | None = None
        self.split = False
        self.apic_map: ApicMap | None = None
        self.apic_map_dirty = False

    def deliver(
        self, irq: LapicIrq, source: Lapic | None = None, dest_map: dict[int, int] | None = None
    ) -> int:
        """`kvm_irq_delivery_to_apic`: how many took the message, 0 nobody, -1 nobody matched.

        `source` is the APIC that sends an IPI. `dest_map` is filled with the vector by vcpu_id of
        those who accepted a fixed or lowest-priority interrupt (struct rtc_status).
        """
        if irq.shorthand == DEST_SELF and source is not None:
            return _set_irq(source, irq, dest_map)
        if irq.shorthand == DEST_NOSHORT and self.apic_map is not None:
            destinations = self._mapped(self.apic_map, irq, source)
            if destinations is not None:
                taken = 0
                for lapic in destinations:
                    if lapic is not None:
                        taken += _set_irq(lapic, irq, dest_map)
                return taken
        return self._deliver_slowly(irq, source, dest_map)

    def deliver_to_id(self, apic_id: int, irq: LapicIrq) -> int:
        """To the APIC that has this id in the map, if any: 1 if it took the message, else 0."""
        lapic = None if self.apic_map is None else self.apic_map.phys_map.get(apic_id)
        return 0 if lapic is None else _set_irq(lapic, irq, None)

    def deliver_nmi_watchdog(self) -> None:
        """`kvm_apic_nmi_wd_deliver` of every vCPU: LVT0 locally."""
        for lapic in self.lapics:
            lapic.deliver_nmi_watchdog()

    def request_scan_ioapic(self) -> None:
        """`kvm_make_scan_ioapic_request`: every vCPU shall ask again which EOIs are wanted."""
        for lapic in self.lapics:
            lapic.vcpu.request_scan_ioapic()

    def recalculate_map(self) -> None:
        """`kvm_recalculate_apic_map`: make the map anew if something in it changed."""
        if not self.apic_map_dirty:
            return
        self.apic_map_dirty = False
        self.apic_map = self._new_map()
        self.request_scan_ioapic()

    def _new_map(self) -> ApicMap | None:
        present = [lapic for lapic in self.lapics if lapic.hw_enabled]
        new = ApicMap(max([XAPIC_IDS - 1, *(lapic.vcpu.vcpu_id for lapic in present)]))
        for lapic in present:
            if not new.add_physical(lapic, self.x2apic_format):
                return None
            new.add_logical(lapic)
        return new

    def _mapped(
        self, apic_map: ApicMap, irq: LapicIrq, source: Lapic | None
    ) -> list[Lapic | None] | None:
        """`kvm_apic_map_get_dest_lapic` without shorthands; None: the map cannot tell."""
        dest_id = irq.dest_id
        if self._is_broadcast(apic_map, dest_id, source):
            return None
        if not irq.dest_mode_logical:
            return [apic_map.phys_map.get(dest_id)]
        destinations = apic_map.logical_dest(dest_id)
        if destinations and _is_lowest_priority(irq):
            return [destinations[irq.vector % len(destinations)]]
        return destinations

    def _is_broadcast(self, apic_map: ApicMap, dest_id: int, source: Lapic | None) -> bool:
        """`kvm_apic_is_broadcast_dest`."""
        if self.x2apic_broadcast_quirk_disabled:
            return dest_id == X2APIC_BROADCAST or (
                dest_id == APIC_BROADCAST and apic_map.logical_mode is not _X2APIC
            )
        if source is not None and source.x2apic_mode:
            return dest_id == X2APIC_BROADCAST
        return dest_id == APIC_BROADCAST

    def _deliver_slowly(
        self, irq: LapicIrq, source: Lapic | None, dest_map: dict[int, int] | None
    ) -> int:
        if not irq.dest_mode_logical and irq.dest_id == APIC_BROADCAST and _is_lowest_priority(irq):
            irq = irq._replace(delivery_mode=DM_FIXED)
        lowest = _is_lowest_priority(irq)
        result = NOBODY
        candidates: list[Lapic] = []
        for lapic in self.lapics:
            if not lapic.hw_enabled or not lapic.matches(
                source, irq.shorthand, irq.dest_id, irq.dest_mode_logical
            ):
                continue
            if lowest:
                if lapic.sw_enabled:
                    candidates.append(lapic)
            else:
                result = max(result, 0) + _set_irq(lapic, irq, dest_map)
        if candidates:
            return _set_irq(candidates[irq.vector % len(candidates)], irq, dest_map)
        return result


def _is_lowest_priority(irq: LapicIrq) -> bool:
    """`kvm_lowest_prio_delivery`."""
    return irq.delivery_mode == DM_LOWEST or irq.msi_redir_hint


def _set_irq(lapic: Lapic, irq: LapicIrq, dest_map: dict[int, int] | None) -> int:
    """`kvm_apic_set_irq`."""
    return lapic.accept_irq(irq.delivery_mode, irq.vector, irq.level, irq.trig_mode_level, dest_map)
