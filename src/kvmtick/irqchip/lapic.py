"""KVM's in-kernel local APIC (SDM vol. 3A chapter 12; arch/x86/kvm/lapic.c).

Every register of the xAPIC page and of the x2APIC's MSRs; priorities, EOI, the LVTs, IPIs, the
modes of IA32_APIC_BASE, KVM_GET_LAPIC and KVM_SET_LAPIC. The timer is `lapic_timer`, who takes a
message is `delivery`.

Where KVM differs from the silicon, KVM's way is kept:

* ESR is not maintained: writes are accepted, and nothing ever sets a bit; a vector below 16 sets
  its IRR bit and is never delivered;
* ARBPRI reads 0; ICR's busy bit is always clear; there is no CMCI LVT;
* the page takes aligned 32-bit writes only; others, and those to what is read-only, do nothing;
* a page that is disabled, or an x2APIC's, reads all ones and swallows writes (LAPIC_MMIO_HOLE);
* x2APIC registers have no reserved bits, but for ICR, SELF_IPI and ESR;
* KVM_SET_LAPIC takes the 1024 bytes as they are, padding included. Only the version, the current
  count and, in x2APIC mode, id and LDR are the kernel's own. PPR is made from what was in service
  before, and right again when the vCPU next looks for interrupts;
* LVT0 written in NMI mode counts as a watchdog even where it ends up masked.

Not modelled: APICv, paravirtual EOI, Hyper-V's synthetic interrupt controller, SMM (an SMI is
dropped), TPR access reporting, KVM_DISABLE_QUIRKS, what the kernel's emulator had read before when
a register cannot be read (0 here).
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Final, Protocol

from mypy_extensions import mypyc_attr

from kvmtick.abi.errors import KvmError
from kvmtick.irqchip.apicdef import (
    APIC_BASE_MSR,
    APIC_BROADCAST,
    APIC_DEFAULT_PHYS_BASE,
    APIC_DEST_LOGICAL,
    APIC_DFR,
    APIC_DFR_CLUSTER,
    APIC_DFR_FLAT,
    APIC_DFR_ONES,
    APIC_DM_EXTINT,
    APIC_DM_NMI,
    APIC_EOI,
    APIC_ESR,
    APIC_ICR,
    APIC_ICR2,
    APIC_ICR2_MASK,
    APIC_ICR_BUSY,
    APIC_ID,
    APIC_INT_ASSERT,
    APIC_INT_LEVELTRIG,
    APIC_LAST_MSR,
    APIC_LDR,
    APIC_LDR_MASK,
    APIC_LVR_DIRECTED_EOI,
    APIC_LVT0,
    APIC_LVT1,
    APIC_LVT_LEVEL_TRIGGER,
    APIC_LVT_MASKED,
    APIC_LVT_TIMER_MODES,
    APIC_LVT_TIMER_PERIODIC,
    APIC_LVTERR,
    APIC_LVTPC,
    APIC_LVTT,
    APIC_LVTTHMR,
    APIC_MODE_MASK,
    APIC_PROCPRI,
    APIC_REGS_BYTES,
    APIC_SELF_IPI,
    APIC_SHORT_SHIFT,
    APIC_SPIV,
    APIC_SPIV_APIC_ENABLED,
    APIC_SPIV_DIRECTED_EOI,
    APIC_SPIV_MASK,
    APIC_TASKPRI,
    APIC_TDCR,
    APIC_TMCCT,
    APIC_TMICT,
    APIC_VECTOR_MASK,
    APIC_VERSION,
    APICBASE_MODE_MASK,
    APICBASE_RESERVED,
    DELIVERY_MODE_SHIFT,
    DEST_ALLINC,
    DEST_NOSHORT,
    DEST_SELF,
    DM_INIT,
    DM_LOWEST,
    DM_NMI,
    DM_REMRD,
    DM_STARTUP,
    KVM_APIC_INIT,
    KVM_APIC_SIPI,
    LAPIC_MMIO_LENGTH,
    LINT_MASK,
    LVT_MASK,
    MSR_IA32_APICBASE_BSP,
    MSR_IA32_APICBASE_ENABLE,
    MSR_IA32_TSC_DEADLINE,
    NR_LVT_ENTRIES,
    SPIV_RESET,
    U32,
    X2APIC_BROADCAST,
    X2APIC_ENABLE,
    X2APIC_ICR_RESERVED,
)
from kvmtick.irqchip.delivery import IrqDelivery, LapicIrq, SuppressEoiBroadcast
from kvmtick.irqchip.lapic_registers import (
    FIELDS,
    READABLE,
    X2APIC_ABSENT,
    LapicRegisters,
    page_register,
    set_page_register,
)
from kvmtick.irqchip.vectors import NO_VECTOR
from kvmtick.timing.clock import Clock
from kvmtick.timing.hrtimer import HrTimer, HrTimerRestart
from kvmtick.trace.events import Function
from kvmtick.trace.recorder import Recorder

__all__ = [
    "DEFAULT_MAXPHYADDR",
    "Lapic",
    "LapicBoard",
    "LapicVcpu",
    "allows_apic_base",
    "x2apic_ldr",
]

DEFAULT_MAXPHYADDR: Final = 36
"""Bits of a guest-physical address as long as CPUID says nothing."""

_QUIRKED: Final = SuppressEoiBroadcast.QUIRKED
_ENABLED: Final = SuppressEoiBroadcast.ENABLED

_LVT_MASKS: Final = {
    APIC_LVTTHMR: LVT_MASK | APIC_MODE_MASK,
    APIC_LVTPC: LVT_MASK | APIC_MODE_MASK,
    APIC_LVT0: LINT_MASK,
    APIC_LVT1: LINT_MASK,
    APIC_LVTERR: LVT_MASK,
}


def allows_apic_base(
    old: int, value: int, has_x2apic: bool, maxphyaddr: int, host_initiated: bool
) -> bool:
    """Whether IA32_APIC_BASE can become `value`: no reserved bit, x2APIC mode only if CPUID has it
    and the APIC is enabled. The guest may not leave x2APIC mode but to disabled, nor enter it from
    there.
    """
    reserved = APICBASE_RESERVED if has_x2apic else APICBASE_RESERVED | X2APIC_ENABLE
    old_mode, mode = old & APICBASE_MODE_MASK, value & APICBASE_MODE_MASK
    if value & reserved or value >> maxphyaddr or mode == X2APIC_ENABLE:
        return False
    if host_initiated:
        return True
    if mode == APICBASE_MODE_MASK:
        return old_mode != 0
    return not (old_mode == APICBASE_MODE_MASK and mode == MSR_IA32_APICBASE_ENABLE)


def x2apic_ldr(x2apic_id: int) -> int:
    """`kvm_apic_calc_x2apic_ldr`: cluster (id / 16) and one bit of 16."""
    return (x2apic_id >> 4) << 16 | 1 << (x2apic_id & 0xF)


@mypyc_attr(allow_interpreted_subclasses=True)
class LapicVcpu:
    """What a local APIC asks of its vCPU."""

    __slots__ = ("tsc_khz", "vcpu_id")

    def __init__(self, vcpu_id: int, tsc_khz: int) -> None:
        """`tsc_khz`: what the guest's TSC counts a millisecond."""
        self.vcpu_id = vcpu_id
        self.tsc_khz = tsc_khz

    def request_event(self) -> None:
        """KVM_REQ_EVENT and a kick."""
        raise NotImplementedError

    def has_extint(self) -> bool:
        """`kvm_cpu_has_extint`: the PIC's interrupt waits, and would get in."""
        raise NotImplementedError

    def request_unblock(self) -> None:
        """KVM_REQ_UNBLOCK and a kick: the timer is pending."""
        raise NotImplementedError

    def request_scan_ioapic(self) -> None:
        """KVM_REQ_SCAN_IOAPIC: set `Lapic.handled_vectors` anew."""
        raise NotImplementedError

    def request_ioapic_eoi_exit(self, vector: int) -> None:
        """KVM_REQ_IOAPIC_EOI_EXIT: tell user space's IOAPIC."""
        raise NotImplementedError

    def queue_nmi(self) -> None:
        """`kvm_inject_nmi` and a kick."""
        raise NotImplementedError

    def guest_tsc(self) -> int:
        """The guest's TSC now, in its cycles."""
        raise NotImplementedError

    def has_cpuid(self, feature: str) -> bool:
        """Whether KVM_SET_CPUID2 gave the guest "x2apic" or "tsc_deadline"."""
        raise NotImplementedError


class LapicBoard(Protocol):
    """What the VM gives a local APIC to stand on."""

    clock: Clock
    recorder: Recorder
    delivery: IrqDelivery
    min_timer_period_ns: int

    def create_timer(self, function: Function, callback: Callable[[], HrTimerRestart]) -> HrTimer:
        """`hrtimer_setup` on CLOCK_MONOTONIC, absolute."""


class Lapic(LapicRegisters):
    """struct kvm_lapic.

    `pending_events` and `sipi_vector` wait for the vCPU (`kvm_apic_accept_events`), so does
    `pv_unhalted`, set by a remote-read message. `handled_vectors` are those whose EOI the IOAPIC
    wants. `maxphyaddr` limits the base address. `ppr_stale`: PPR is that of before
    KVM_SET_LAPIC until the vCPU looks for interrupts.
    """

    __slots__ = (
        "_isr_cached",
        "_recorder",
        "apic_base",
        "base_address",
        "delivery",
        "handled_vectors",
        "hw_enabled",
        "is_bsp",
        "lvt0_in_nmi_mode",
        "maxphyaddr",
        "pending_events",
        "ppr_stale",
        "pv_unhalted",
        "sipi_vector",
        "sw_enabled",
        "x2apic_mode",
    )

    def __init__(self, board: LapicBoard, vcpu: LapicVcpu, is_bsp: bool) -> None:
        """`kvm_create_lapic` and the reset of a new vCPU; it joins `board.delivery.lapics`."""
        super().__init__(board, vcpu)
        self._recorder = board.recorder
        self.delivery = board.delivery
        self.is_bsp = is_bsp
        self.maxphyaddr = DEFAULT_MAXPHYADDR
        self.apic_base = MSR_IA32_APICBASE_ENABLE
        self.base_address = 0
        self.hw_enabled = True
        self.x2apic_mode = False
        self.sw_enabled = False
        self.lvt0_in_nmi_mode = False
        self.pending_events = 0
        self.sipi_vector = 0
        self.pv_unhalted = False
        self.handled_vectors = 0
        self._isr_cached = False
        self.ppr_stale = False
        self.reset(init_event=False)
        # The kernel's reset runs before the vCPU is in the VM's list, and so does not map it: the
        # map has it from the next change of any APIC on.
        self.delivery.lapics.append(self)

    def reset(self, init_event: bool) -> None:
        """`kvm_lapic_reset`: INIT if `init_event`, else power-on, which also resets base and id."""
        if not init_event:
            base = APIC_DEFAULT_PHYS_BASE | MSR_IA32_APICBASE_ENABLE
            self._set_base(base | MSR_IA32_APICBASE_BSP if self.is_bsp else base)
        self.timer.cancel()
        if not init_event:
            self._set_xapic_id(self.vcpu.vcpu_id)
        self.update_version()
        self.lvtt = self.lvtthmr = self.lvtpc = APIC_LVT_MASKED
        self.lvt0 = self.lvt1 = self.lvterr = APIC_LVT_MASKED
        self.update_lvtt()
        if self.is_bsp:
            self.lvt0 = APIC_DM_EXTINT
        self._manage_nmi_watchdog(self.lvt0)
        self._set_dfr(APIC_DFR_FLAT)
        self._set_spiv(SPIV_RESET)
        self.taskpri = 0
        self.esr = 0
        self.icr = 0
        if self.x2apic_mode:
            self.icr_high = 0
        else:
            self._set_ldr(0)
            self.icr2 = 0
        self.tdcr = 0
        self.tmict = 0
        self.irr = self.isr = self.tmr = 0
        self._isr_cached = False
        self.ppr_stale = False
        self.update_divide_count()
        self.pending_timer = 0
        self._update_ppr()
        self.delivery.recalculate_map()

    def after_set_cpuid(
        self, maxphyaddr: int = DEFAULT_MAXPHYADDR, has_features: bool = True
    ) -> None:
        """`kvm_vcpu_after_set_cpuid`: KVM_SET_CPUID2 says what the version and the timer's modes
        are, if there is a leaf 1 (`has_features`). Until then the timer knows one-shot mode only.
        """
        self.maxphyaddr = maxphyaddr
        if not has_features:
            return
        self.timer_mode_mask = (
            APIC_LVT_TIMER_MODES if self.vcpu.has_cpuid("tsc_deadline") else APIC_LVT_TIMER_PERIODIC
        )
        self.update_version()

    # IA32_APIC_BASE.

    def set_base(self, value: int, host_initiated: bool = False) -> bool:
        """`kvm_apic_set_base`; False: refused, the guest gets #GP."""
        has_x2apic = self.vcpu.has_cpuid("x2apic")
        if value == self.apic_base:
            return True
        if not allows_apic_base(self.apic_base, value, has_x2apic, self.maxphyaddr, host_initiated):
            return False
        self._set_base(value)
        self.delivery.recalculate_map()
        if self.pending_timer:
            self.vcpu.request_unblock()
        return True

    def _set_base(self, value: int) -> None:
        """`__kvm_apic_set_base`."""
        changed = self.apic_base ^ value
        self.apic_base = value
        self.hw_enabled = value & MSR_IA32_APICBASE_ENABLE != 0
        self.x2apic_mode = value & APICBASE_MODE_MASK == APICBASE_MODE_MASK
        if changed & MSR_IA32_APICBASE_ENABLE:
            if self.hw_enabled:
                self._set_xapic_id(self.vcpu.vcpu_id)
            else:
                self.delivery.apic_map_dirty = True
        if changed & X2APIC_ENABLE:
            if self.x2apic_mode:
                self.id = self.vcpu.vcpu_id
                self.ldr = x2apic_ldr(self.id)
                self.delivery.apic_map_dirty = True
            elif self.hw_enabled:
                self._set_xapic_id(self.vcpu.vcpu_id)
        self.base_address = value & ~0xFFF

    # What the map is made from.

    def _set_xapic_id(self, xapic_id: int) -> None:
        self.id = xapic_id << 24 & U32
        self.delivery.apic_map_dirty = True

    def _set_ldr(self, value: int) -> None:
        self.ldr = value
        self.delivery.apic_map_dirty = True

    def _set_dfr(self, value: int) -> None:
        self.dfr = value
        self.delivery.apic_map_dirty = True

    def _set_spiv(self, value: int) -> None:
        """`apic_set_spiv`."""
        self.spiv = value
        enabled = value & APIC_SPIV_APIC_ENABLED != 0
        if enabled != self.sw_enabled:
            self.sw_enabled = enabled
            self.delivery.apic_map_dirty = True

    def matches(
        self, source: Lapic | None, shorthand: int, dest_id: int, dest_mode_logical: bool
    ) -> bool:
        """`kvm_apic_match_dest`: whether a message from `source` (None: no IPI) is for this one."""
        if shorthand != DEST_NOSHORT:
            if shorthand == DEST_ALLINC:
                return True
            return (self is source) == (shorthand == DEST_SELF)
        if (
            source is None
            and dest_id == APIC_BROADCAST
            and self.x2apic_mode
            and not self.delivery.x2apic_broadcast_quirk_disabled
        ):
            return True
        if dest_id == (X2APIC_BROADCAST if self.x2apic_mode else APIC_BROADCAST):
            return True
        if dest_mode_logical:
            return self._matches_logical(dest_id)
        # An id that 8 bits cannot name reaches a (hot-plugged) APIC in xAPIC mode all the same.
        if self.x2apic_mode or dest_id > APIC_BROADCAST:
            return dest_id == self.vcpu.vcpu_id
        return dest_id == self.id >> 24

    def _matches_logical(self, dest_id: int) -> bool:
        """`kvm_apic_match_logical_addr`."""
        if self.x2apic_mode:
            return self.ldr >> 16 == dest_id >> 16 and self.ldr & dest_id & 0xFFFF != 0
        logical_id = self.ldr >> 24
        if self.dfr == APIC_DFR_FLAT:
            return logical_id & dest_id != 0
        if self.dfr == APIC_DFR_CLUSTER:
            return logical_id >> 4 == dest_id >> 4 and logical_id & dest_id & 0xF != 0
        return False

    # Accepting interrupts.

    def accept_irq(
        self,
        delivery_mode: int,
        vector: int,
        level: bool,
        trig_mode_level: bool,
        dest_map: dict[int, int] | None = None,
    ) -> int:
        """`__apic_accept_irq`: 1 taken, 0 not. `dest_map`: see `IrqDelivery.deliver`."""
        vcpu = self.vcpu
        self._recorder.kvm_apic_accept_irq(
            vcpu.vcpu_id, delivery_mode << DELIVERY_MODE_SHIFT, trig_mode_level, vector
        )
        if delivery_mode <= DM_LOWEST:
            if (trig_mode_level and not level) or not self.hw_enabled or not self.sw_enabled:
                return 0
            if dest_map is not None:
                dest_map[vcpu.vcpu_id] = vector
            if trig_mode_level:
                self._tmr.add(vector)
            else:
                self._tmr.discard(vector)
            self._irr.add(vector)
            vcpu.request_event()
            return 1
        if delivery_mode == DM_NMI:
            vcpu.queue_nmi()
            return 1
        if delivery_mode == DM_INIT:
            if trig_mode_level and not level:
                return 0
            self.pending_events = KVM_APIC_INIT
        elif delivery_mode == DM_STARTUP:
            self.sipi_vector = vector
            self.pending_events |= KVM_APIC_SIPI
        elif delivery_mode == DM_REMRD:
            self.pv_unhalted = True
        else:
            # SMI: no SMM. EXTINT: LVT0's, and that is `accepts_pic_intr`'s business.
            return 0
        vcpu.request_event()
        return 1

    def local_deliver(self, lvt_register: int) -> int:
        """`kvm_apic_local_deliver`: what the LVT at that offset says; 1 if taken, else 0."""
        lvt = self.lvtt if lvt_register == APIC_LVTT else self.read_register(lvt_register)
        if not self.hw_enabled or lvt & APIC_LVT_MASKED:
            return 0
        taken = self.accept_irq(
            (lvt & APIC_MODE_MASK) >> DELIVERY_MODE_SHIFT,
            lvt & APIC_VECTOR_MASK,
            True,
            lvt & APIC_LVT_LEVEL_TRIGGER != 0,
        )
        if taken and lvt_register == APIC_LVTPC:
            self.lvtpc = lvt | APIC_LVT_MASKED
        return taken

    def deliver_nmi_watchdog(self) -> None:
        """`kvm_apic_nmi_wd_deliver`."""
        self.local_deliver(APIC_LVT0)

    def inject_pending_timer_irqs(self) -> None:
        """`kvm_inject_apic_timer_irqs`: a pending expiry becomes LVTT's interrupt; while that is
        masked or the APIC disabled it stays pending (`apic_has_pending_timer`).
        """
        enabled = self.hw_enabled and self.sw_enabled
        if self.pending_timer and enabled and not self.lvtt & APIC_LVT_MASKED:
            self.local_deliver(APIC_LVTT)
            self.taken()

    def accepts_pic_intr(self) -> bool:
        """`kvm_apic_accept_pic_intr`: the PIC's INTR gets in, by LVT0 or past a disabled APIC."""
        return not self.hw_enabled or (
            self.lvt0 & (APIC_LVT_MASKED | APIC_MODE_MASK) == APIC_DM_EXTINT
        )

    def _manage_nmi_watchdog(self, lvt0: int) -> None:
        """`apic_manage_nmi_watchdog`."""
        nmi_mode = lvt0 & (APIC_LVT_MASKED | APIC_MODE_MASK) == APIC_DM_NMI
        if nmi_mode != self.lvt0_in_nmi_mode:
            self.lvt0_in_nmi_mode = nmi_mode
            self.delivery.vapics_in_nmi_mode += 1 if nmi_mode else -1

    # Priorities and EOI.

    def has_interrupt(self) -> int:
        """`kvm_apic_has_interrupt`: the highest request if its class is above PPR, else -1."""
        if not self.hw_enabled:
            return NO_VECTOR
        if self.ppr_stale:
            self._set_ppr()
        vector = self._irr.highest
        return vector if vector >= 0 and vector & 0xF0 > self.procpri else NO_VECTOR

    def get_interrupt(self) -> int:
        """`kvm_get_apic_interrupt`: that request goes into service; -1 if there is none."""
        vector = self.has_interrupt()
        if vector >= 0:
            self._irr.discard(vector)
            self._isr.add(vector)
            self._isr_cached = True
            self._set_ppr()
        return vector

    def pending_eoi(self, vector: int) -> bool:
        """`kvm_apic_pending_eoi`: requested or in service."""
        return self._isr.has(vector) or self._irr.has(vector)

    def is_level(self, vector: int) -> bool:
        """Its bit in TMR: the last message of that vector was level triggered."""
        return self._tmr.has(vector)

    @property
    def directed_eoi(self) -> bool:
        """`kvm_lapic_suppress_eoi_broadcast`: SVR's bit 12 keeps EOIs from the IOAPIC.

        KVM's own IOAPIC has always obeyed it, though only KVM_SET_LAPIC can set it there.
        """
        if not self.spiv & APIC_SPIV_DIRECTED_EOI:
            return False
        suppress = self.delivery.suppress_eoi_broadcast
        return suppress is _ENABLED or (suppress is _QUIRKED and not self.delivery.split)

    def eoi(self) -> None:
        """`apic_set_eoi`: the highest interrupt in service is done; a spurious EOI does nothing.

        The kernel has the vCPU look for events in any case; here that would be an exit of its own,
        so it looks when a lower PPR lets a request through, or the PIC's interrupt waits: LVT0 may
        let it in since the vCPU last looked.
        """
        vector = self._isr.highest
        self._recorder.kvm_eoi(self.vcpu.vcpu_id, vector)
        if vector < 0:
            return
        self._isr.discard(vector)
        self._isr_cached = False
        self._update_ppr()
        if self.handled_vectors >> vector & 1:
            self._send_eoi(vector)
        if self.vcpu.has_extint():
            self.vcpu.request_event()

    def _send_eoi(self, vector: int) -> None:
        """`kvm_ioapic_send_eoi`."""
        delivery = self.delivery
        if not delivery.split:
            if delivery.eoi_target is not None:
                delivery.eoi_target.update_eoi(self, vector, self.is_level(vector))
        elif not self.directed_eoi:
            self.vcpu.request_ioapic_eoi_exit(vector)

    def get_cr8(self) -> int:
        """`kvm_lapic_get_cr8`."""
        return self.taskpri >> 4 & 0xF

    def set_tpr(self, cr8: int) -> None:
        """`kvm_lapic_set_tpr`: a write to CR8."""
        self._set_taskpri((cr8 & 0xF) << 4)

    def _set_taskpri(self, value: int) -> None:
        self.taskpri = value
        self._update_ppr()

    def _set_ppr(self) -> int:
        """`__apic_update_ppr`: PPR from TPR and what is in service; returns it."""
        self.ppr_stale = False
        ppr = self.procpri = _priority(self.taskpri, self._isr.highest)
        return ppr

    def _update_ppr(self) -> None:
        """`apic_update_ppr`: where the priority fell, a request may come through now."""
        old = self.procpri
        if self._set_ppr() < old and self.has_interrupt() >= 0:
            self.vcpu.request_event()

    # Access by the guest.

    def mmio_read(self, gpa: int, size_bytes: int) -> int | None:
        """`apic_mmio_read`; None: not its address. What cannot be read gives 0."""
        offset = gpa - self.base_address
        if not 0 <= offset < LAPIC_MMIO_LENGTH:
            return None
        if not self.hw_enabled or self.x2apic_mode:
            return (1 << 8 * size_bytes) - 1
        value = self._read(offset, size_bytes)
        return 0 if value is None else value

    def mmio_write(self, gpa: int, size_bytes: int, value: int) -> bool:
        """`apic_mmio_write`; False: not its address."""
        offset = gpa - self.base_address
        if not 0 <= offset < LAPIC_MMIO_LENGTH:
            return False
        if self.hw_enabled and not self.x2apic_mode and size_bytes == 4 and not offset & 0xF:
            self._write(offset, value & U32)
        return True

    def read_msr(self, index: int) -> int | None:
        """RDMSR of IA32_TSC_DEADLINE or an x2APIC register; None: #GP."""
        if index == MSR_IA32_TSC_DEADLINE:
            return self.get_tsc_deadline()
        if not self.x2apic_mode or not APIC_BASE_MSR <= index <= APIC_LAST_MSR:
            return None
        offset = (index - APIC_BASE_MSR) << 4
        if offset == APIC_ICR:
            return self.icr | self.icr_high << 32
        return self._read(offset, 4)

    def write_msr(self, index: int, value: int) -> bool:
        """WRMSR of IA32_TSC_DEADLINE or an x2APIC register; False: #GP."""
        if index == MSR_IA32_TSC_DEADLINE:
            self.set_tsc_deadline(value)
            return True
        if not self.x2apic_mode or not APIC_BASE_MSR <= index <= APIC_LAST_MSR:
            return False
        offset = (index - APIC_BASE_MSR) << 4
        if offset == APIC_ICR:
            return self._write_x2apic_icr(value)
        return not value >> 32 and self._write(offset, value)

    def set_tsc_deadline(self, value: int) -> None:
        """`kvm_set_lapic_tscdeadline_msr`: nothing happens unless the timer is in that mode."""
        if self.hw_enabled and self.is_tscdeadline:
            self.set_deadline(value)

    def get_tsc_deadline(self) -> int:
        """`kvm_get_lapic_tscdeadline_msr`: 0 unless the timer is in that mode."""
        return self.tscdeadline if self.hw_enabled and self.is_tscdeadline else 0

    def _read(self, offset: int, size_bytes: int) -> int | None:
        """`kvm_lapic_reg_read`; None: no such register, or not within one."""
        register, alignment = offset & ~0xF, offset & 0xF
        if alignment + size_bytes > 4 or register not in READABLE:
            return None
        if self.x2apic_mode and register in X2APIC_ABSENT:
            return None
        if register == APIC_PROCPRI:
            self._update_ppr()
        value = self.read_register(register)
        if self._recorder.detail:
            self._recorder.kvm_apic(0, offset, value, is_detail=True)
        return value >> 8 * alignment & (1 << 8 * size_bytes) - 1

    def _write(self, register: int, value: int) -> bool:
        """`kvm_lapic_reg_write`: 32 bits; False: no such register, or not writable so."""
        # Verdicts need to know when the timer's interrupt was masked.
        is_detail = register != APIC_LVTT and register != APIC_SPIV
        if self._recorder.detail or not is_detail:
            self._recorder.kvm_apic(1, register, value, is_detail)
        if register == APIC_EOI:
            self.eoi()
            return True
        accepted = self._write_register(register, value)
        self.delivery.recalculate_map()
        return accepted

    def _write_register(self, register: int, value: int) -> bool:
        x2apic = self.x2apic_mode
        if register == APIC_TASKPRI:
            self._set_taskpri(value & 0xFF)
        elif register == APIC_TMICT:
            self.write_tmict(value)
        elif register == APIC_LVTT:
            self._write_lvtt(value)
        elif register in _LVT_MASKS:
            self._write_lvt(register, value)
        elif register == APIC_TDCR:
            self.write_tdcr(value)
        elif register == APIC_SPIV:
            self._write_spiv(value)
        elif register == APIC_ESR:
            return not x2apic or not value
        elif register == APIC_SELF_IPI:
            if not x2apic or value & ~APIC_VECTOR_MASK:
                return False
            self._send_ipi(DEST_SELF << APIC_SHORT_SHIFT | value, 0)
        elif x2apic:
            # The others exist in xAPIC mode only, or (ICR) are written elsewhere.
            return False
        elif register == APIC_ICR:
            value &= ~APIC_ICR_BUSY
            self._send_ipi(value, self.icr2)
            self.icr = value
        elif register == APIC_ICR2:
            self.icr2 = value & APIC_ICR2_MASK
        elif register == APIC_ID:
            self._set_xapic_id(value >> 24)
        elif register == APIC_LDR:
            self._set_ldr(value & APIC_LDR_MASK)
        elif register == APIC_DFR:
            self._set_dfr(value | APIC_DFR_ONES)
        else:
            return False
        return True

    def _write_lvtt(self, value: int) -> None:
        if not self.sw_enabled:
            value |= APIC_LVT_MASKED
        self.lvtt = value & (LVT_MASK | self.timer_mode_mask)
        self.update_lvtt()
        if self.pending_timer:
            # The kernel looks before every entry; here an unmasked expiry asks for it.
            self.vcpu.request_unblock()

    def _write_lvt(self, register: int, value: int) -> None:
        if register == APIC_LVT0:
            # As written: a software-disabled APIC masks the entry, and still counts as a watchdog.
            self._manage_nmi_watchdog(value)
        if not self.sw_enabled:
            value |= APIC_LVT_MASKED
        setattr(self, FIELDS[register], value & _LVT_MASKS[register])

    def _write_spiv(self, value: int) -> None:
        mask = APIC_SPIV_MASK
        if self.lvr & APIC_LVR_DIRECTED_EOI:
            mask |= APIC_SPIV_DIRECTED_EOI
        self._set_spiv(value & mask)
        if not self.sw_enabled:
            self.lvtthmr |= APIC_LVT_MASKED
            self.lvtpc |= APIC_LVT_MASKED
            self.lvt0 |= APIC_LVT_MASKED
            self.lvt1 |= APIC_LVT_MASKED
            self.lvterr |= APIC_LVT_MASKED
            self.lvtt |= APIC_LVT_MASKED
            self.update_lvtt()
            self.pending_timer = 0

    def _write_x2apic_icr(self, value: int) -> bool:
        """`kvm_x2apic_icr_write`."""
        if value & X2APIC_ICR_RESERVED:
            return False
        value &= ~APIC_ICR_BUSY
        low, high = value & U32, value >> 32
        self._send_ipi(low, high)
        self.icr, self.icr_high = low, high
        if self._recorder.detail:
            self._recorder.kvm_apic(1, APIC_ICR, value, is_detail=True)
        return True

    def _send_ipi(self, icr_low: int, icr_high: int) -> None:
        """`kvm_apic_send_ipi`."""
        dest_id = icr_high if self.x2apic_mode else icr_high >> 24
        self._recorder.kvm_apic_ipi(icr_low, dest_id)
        self.delivery.deliver(
            LapicIrq(
                vector=icr_low & APIC_VECTOR_MASK,
                delivery_mode=(icr_low & APIC_MODE_MASK) >> DELIVERY_MODE_SHIFT,
                dest_mode_logical=icr_low & APIC_DEST_LOGICAL != 0,
                trig_mode_level=icr_low & APIC_INT_LEVELTRIG != 0,
                level=icr_low & APIC_INT_ASSERT != 0,
                shorthand=icr_low >> APIC_SHORT_SHIFT & 3,
                dest_id=dest_id,
                msi_redir_hint=False,
            ),
            self,
        )

    def update_version(self) -> None:
        """`kvm_apic_set_version`: a guest may suppress EOI broadcasts only where the IOAPIC is user
        space's, for KVM's own has no EOI register.
        """
        delivery = self.delivery
        self.lvr = APIC_VERSION | (NR_LVT_ENTRIES - 1) << 16
        suppress = delivery.suppress_eoi_broadcast
        offered = suppress is _ENABLED or (suppress is _QUIRKED and delivery.split)
        if offered and self.vcpu.has_cpuid("x2apic"):
            self.lvr |= APIC_LVR_DIRECTED_EOI

    # KVM_GET_LAPIC and KVM_SET_LAPIC.

    def save(self) -> bytes:
        """KVM_GET_LAPIC: 1024 bytes."""
        page = self.to_page()
        if self.x2apic_mode:
            if not self.delivery.x2apic_format:
                # User space without 32-bit ids knows an id by its xAPIC form.
                set_page_register(page, APIC_ID, self.id << 24 & U32)
            set_page_register(page, APIC_ICR2, self.icr_high)
        return bytes(page)

    def restore(self, state: bytes) -> None:
        """KVM_SET_LAPIC. KvmError EINVAL: in x2APIC mode, with 32-bit ids, an id that is not the
        vCPU's; SVR has been taken over all the same.
        """
        if len(state) != APIC_REGS_BYTES:
            raise KvmError(errno.EINVAL, "KVM_SET_LAPIC", f"{APIC_REGS_BYTES} bytes are needed")
        self._set_spiv(page_register(state, APIC_SPIV))
        if (
            self.x2apic_mode
            and self.delivery.x2apic_format
            and page_register(state, APIC_ID) != self.vcpu.vcpu_id
        ):
            self.delivery.recalculate_map()
            raise KvmError(
                errno.EINVAL, "KVM_SET_LAPIC", "an x2APIC's id cannot change; give the vCPU's"
            )
        # The kernel counts what is in service after it has made PPR. Until then it goes by the
        # count of before, and if it has the highest vector at hand, by that.
        in_service = self._isr.highest
        self.load_page(state)
        if self.x2apic_mode:
            self.id = self.vcpu.vcpu_id
            self.ldr = x2apic_ldr(self.id)
            self.icr_high = self.icr2
        self.delivery.apic_map_dirty = True
        self.delivery.recalculate_map()
        self.update_version()
        if in_service != NO_VECTOR and not self._isr_cached:
            in_service = self._isr.highest
        self.procpri = _priority(self.taskpri, in_service)
        self.ppr_stale = True
        self._isr_cached = False
        self.cancel_timer()
        self.update_lvtt()
        self._manage_nmi_watchdog(self.lvt0)
        self.update_divide_count()
        self.start_timer(page_register(state, APIC_TMCCT))
        self.vcpu.request_event()
        if self.delivery.eoi_target is not None:
            self.delivery.eoi_target.restore_rtc_tracking(self)


def _priority(taskpri: int, in_service: int) -> int:
    """PPR: TPR, or the class of the vector `in_service` if that is higher."""
    highest = in_service & 0xF0 if in_service != NO_VECTOR else 0
    return taskpri & 0xFF if taskpri & 0xF0 >= highest else highest
