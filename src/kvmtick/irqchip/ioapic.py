"""The I/O APIC of KVM (82093AA datasheet, order 290566; arch/x86/kvm/ioapic.c).

Implements the register window of datasheet 3.1 (IOREGSEL, IOWIN), the registers of 3.2 (ID,
version, arbitration, 24 redirection entries), edge and level triggering with remote IRR, and what
KVM builds around it: the memory of requests (`irr`, `irr_delivered`), delivery to the local APICs,
the end of interrupt with its notifiers, the pause in an interrupt storm, and the tracking of the
RTC's interrupt (pin 8), whose coalescing KVM_IRQ_LINE_STATUS tells.

Where KVM differs from the silicon, KVM's way is kept:

* polarity is stored without effect; an edge while masked is forgotten as soon as it is over;
* a level line that stays high over 10,000 ends of interrupt in a row asks again only 10 ms later;
* a level request whose line fell while the pin was masked is sent at the unmasking all the same,
  unless an irqfd resampler can be asked instead;
* remote IRR goes away when an entry is written as edge triggered;
* the registers answer where `base_address` says, but only within the default page's first 256
  bytes: KVM never moves them on its bus.

Not modelled: the lock, and the log lines that tell of odd access sizes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from kvmtick.abi.structs import (
    KVM_IOAPIC_NUM_PINS,
    KVM_IRQCHIP_IOAPIC,
    kvm_ioapic_state,
)
from kvmtick.irqchip.apicdef import DELIVERY_MODE_SHIFT
from kvmtick.irqchip.delivery import IrqDelivery, LapicIrq, SuppressEoiBroadcast
from kvmtick.irqchip.notifiers import Notifiers
from kvmtick.irqchip.routing import IrqTarget
from kvmtick.timing.clock import Clock
from kvmtick.timing.queue import EventQueue
from kvmtick.trace.recorder import Recorder

if TYPE_CHECKING:
    from kvmtick.irqchip.lapic import Lapic

__all__ = [
    "DELIVERY_STATUS",
    "DEST_ID_SHIFT",
    "DEST_MODE_LOGICAL",
    "EOI_INJECT_DELAY_NS",
    "IOAPIC_DEFAULT_BASE_ADDRESS",
    "IOAPIC_MEM_LENGTH",
    "IOAPIC_SUCCESSIVE_IRQ_MAX_COUNT",
    "MASK",
    "POLARITY_LOW",
    "REDIRECTION_RESET",
    "REMOTE_IRR",
    "RESERVED",
    "RTC_GSI",
    "TRIG_MODE_LEVEL",
    "VERSION",
    "Ioapic",
    "lapic_irq_of",
]

IOAPIC_DEFAULT_BASE_ADDRESS: Final = 0xFEC0_0000
IOAPIC_MEM_LENGTH: Final = 0x100
ADDRESS_MASK: Final = (1 << 64) - 1

# Offsets in the page.
IOAPIC_REG_SELECT: Final = 0x00
IOAPIC_REG_WINDOW: Final = 0x10

# What IOREGSEL selects.
IOAPIC_REG_APIC_ID: Final = 0x00
IOAPIC_REG_VERSION: Final = 0x01
IOAPIC_REG_ARB_ID: Final = 0x02
IOAPIC_REG_REDIRECTION: Final = 0x10

VERSION: Final = (KVM_IOAPIC_NUM_PINS - 1) << 16 | 0x11

# A redirection entry (IOREDTBL, datasheet 3.2.4).
VECTOR: Final = 0xFF
DELIVERY_MODE: Final = 7 << DELIVERY_MODE_SHIFT
DEST_MODE_LOGICAL: Final = 1 << 11
DELIVERY_STATUS: Final = 1 << 12
POLARITY_LOW: Final = 1 << 13
REMOTE_IRR: Final = 1 << 14
TRIG_MODE_LEVEL: Final = 1 << 15
MASK: Final = 1 << 16
RESERVED: Final = (1 << 56) - (1 << 17)
"""Bits 17-55: stored and read back, without meaning."""
DEST_ID_SHIFT: Final = 56

READ_ONLY: Final = DELIVERY_STATUS | REMOTE_IRR
REDIRECTION_RESET: Final = MASK
"""A redirection entry after reset: masked, everything else 0."""

RTC_GSI: Final = 8
IOAPIC_SUCCESSIVE_IRQ_MAX_COUNT: Final = 10_000
EOI_INJECT_DELAY_NS: Final = 10_000_000
"""`schedule_delayed_work(..., HZ / 100)`."""

KWORKER: Final = "kworker/0:1-11"

LOW_WORD: Final = (1 << 32) - 1
MASKED: Final = -1
COALESCED: Final = 0
IN_SERVICE: Final = TRIG_MODE_LEVEL | REMOTE_IRR

_SUPPRESS_DISABLED: Final = SuppressEoiBroadcast.DISABLED


def lapic_irq_of(entry: int) -> LapicIrq:
    """The message a redirection entry sends."""
    return LapicIrq(
        vector=entry & VECTOR,
        delivery_mode=(entry & DELIVERY_MODE) >> DELIVERY_MODE_SHIFT,
        dest_mode_logical=bool(entry & DEST_MODE_LOGICAL),
        trig_mode_level=bool(entry & TRIG_MODE_LEVEL),
        level=True,
        shorthand=0,
        dest_id=entry >> DEST_ID_SHIFT,
        msi_redir_hint=False,
    )


class Ioapic(IrqTarget):
    """24 pins, each with a redirection entry that says what message its interrupt is.

    `irr` holds the requests: of a level pin its line, of an edge pin a line that is high.
    `irr_delivered` says which of the edges in `irr` were sent. It sets
    `notifiers.ack_list_changed`: when the list of ack notifiers changes, every vCPU has to scan the
    handled vectors anew.
    """

    __slots__ = (
        "_clock",
        "_delivery",
        "_eoi_inject_queued",
        "_kworker",
        "_messages",
        "_notifiers",
        "_pad",
        "_queue",
        "_recorder",
        "_rtc_dest",
        "_stale_eoi",
        "base_address",
        "id",
        "ioregsel",
        "irq_eoi",
        "irq_states",
        "irr",
        "irr_delivered",
        "redirtbl",
        "rtc_pending_eoi",
    )

    def __init__(
        self,
        recorder: Recorder,
        notifiers: Notifiers,
        delivery: IrqDelivery,
        clock: Clock,
        queue: EventQueue,
    ) -> None:
        """`kvm_ioapic_init`."""
        self._recorder = recorder
        self._notifiers = notifiers
        self._delivery = delivery
        self._clock = clock
        self._queue = queue
        self.base_address = IOAPIC_DEFAULT_BASE_ADDRESS
        self.ioregsel = 0
        self.id = 0
        self.irr = 0
        self.irr_delivered = 0
        self.irq_states: dict[int, int] = {}
        """By pin, of those that are high: the sources that hold it so."""
        self.redirtbl = [REDIRECTION_RESET] * KVM_IOAPIC_NUM_PINS
        self.irq_eoi: dict[int, int] = {}
        """By pin, if any: how many ends of interrupt in a row found its line still high."""
        self.rtc_pending_eoi = 0
        """How many local APICs have yet to end the RTC's interrupt."""
        # The vector by vcpu_id of those who got the RTC's interrupt and have not ended it.
        self._rtc_dest: dict[int, int] = {}
        # By vcpu_id: the highest vector whose end is wanted of one who gets it no more.
        self._stale_eoi: dict[int, int] = {}
        self._messages: dict[int, LapicIrq] = {}
        """By pin, of those that were sent."""
        self._eoi_inject_queued = False
        self._kworker = -1
        self._pad = 0
        notifiers.ack_list_changed = delivery.request_scan_ioapic

    # Lines.

    def set_irq(self, pin: int, irq_source_id: int, level: int, line_status: bool = False) -> int:
        """`kvm_ioapic_set_irq`: drive a pin.

        Returns how many local APICs took the interrupt, 1 for a low line; 0: coalesced, or nobody
        took it; -1: masked, or a level interrupt is still in service. With `line_status`
        (KVM_IRQ_LINE_STATUS) the RTC's pin is coalesced until its last interrupt was ended
        everywhere.
        """
        # `__kvm_irq_line_state`: the line is the OR over all sources.
        states = self.irq_states
        source = 1 << irq_source_id
        line = states.get(pin, 0) | source if level else states.get(pin, 0) & ~source
        if line:
            states[pin] = line
        else:
            states.pop(pin, None)
        entry = self.redirtbl[pin]
        result = self._set_line(pin, line, line_status)
        recorder = self._recorder
        is_detail = not level or entry & MASK != 0
        if recorder.detail or not is_detail:
            recorder.kvm_ioapic_set_irq(entry, pin, result == COALESCED, is_detail)
        return result

    def pulse(self, pin: int, irq_source_id: int) -> None:
        """`set_irq` to 1 and then to 0, in one go where nothing else has a hand in it.

        For when no details are recorded. The PIT drives a masked pin this way at each tick.
        """
        entry = self.redirtbl[pin]
        if entry & TRIG_MODE_LEVEL or pin in self.irq_states or (self.irr and self.irr >> pin & 1):
            self.set_irq(pin, irq_source_id, 1)
            self.set_irq(pin, irq_source_id, 0)
        elif entry & MASK:
            # A masked pin forgets an edge as soon as it is over.
            if self.irr_delivered:
                self.irr_delivered &= ~(1 << pin)
        else:
            self.irr_delivered |= 1 << pin
            result = self._delivery.deliver(self._message(pin, entry))
            self._recorder.kvm_ioapic_set_irq(entry, pin, result == COALESCED)

    def _set_line(self, pin: int, line: int, line_status: bool) -> int:
        """`ioapic_set_irq`."""
        mask = 1 << pin
        if not line:
            self.irr &= ~mask
            return 1
        if pin == RTC_GSI and line_status and self.rtc_pending_eoi > 0:
            return COALESCED
        requested = self.irr & mask
        self.irr |= mask
        if not self.redirtbl[pin] & TRIG_MODE_LEVEL:
            self.irr_delivered &= ~mask
            if requested:
                return COALESCED
        return self._service(pin, line_status)

    def _service(self, pin: int, line_status: bool) -> int:
        """`ioapic_service`: send the pin's interrupt unless it is masked or in service."""
        entry = self.redirtbl[pin]
        if entry & MASK or entry & IN_SERVICE == IN_SERVICE:
            return MASKED
        message = self._message(pin, entry)
        if not entry & TRIG_MODE_LEVEL:
            self.irr_delivered |= 1 << pin
        if pin == RTC_GSI and line_status:
            result = self._delivery.deliver(message, None, self._rtc_dest)
            self.rtc_pending_eoi = max(result, 0)
        else:
            result = self._delivery.deliver(message)
        if result and entry & TRIG_MODE_LEVEL:
            self.redirtbl[pin] |= REMOTE_IRR
        return result

    def messages(self) -> list[LapicIrq]:
        """What its unmasked pins send."""
        return [
            self._message(pin, entry) for pin, entry in enumerate(self.redirtbl) if not entry & MASK
        ]

    def _message(self, pin: int, entry: int) -> LapicIrq:
        message = self._messages.get(pin)
        if message is None:
            message = self._messages[pin] = lapic_irq_of(entry)
        return message

    # The end of an interrupt.

    def update_eoi(self, lapic: Lapic, vector: int, trig_mode_level: bool) -> None:
        """`kvm_ioapic_update_eoi`: `lapic` ended `vector`, which was level triggered or not."""
        if self._stale_eoi.get(lapic.vcpu.vcpu_id) == vector:
            lapic.vcpu.request_scan_ioapic()
        if self._rtc_dest.get(lapic.vcpu.vcpu_id) == vector:
            del self._rtc_dest[lapic.vcpu.vcpu_id]
            self._add_rtc_pending_eoi(-1)
        for pin, entry in enumerate(self.redirtbl):
            if entry & VECTOR == vector:
                self._update_eoi_of(lapic, pin, trig_mode_level)

    def _update_eoi_of(self, lapic: Lapic, pin: int, trig_mode_level: bool) -> None:
        # A resampler drops the line now, before the look at it.
        self._notifiers.notify_acked_irq(KVM_IRQCHIP_IOAPIC, pin)
        if not trig_mode_level or (
            lapic.directed_eoi and self._delivery.suppress_eoi_broadcast is not _SUPPRESS_DISABLED
        ):
            return
        entry = self.redirtbl[pin] = self.redirtbl[pin] & ~REMOTE_IRR
        if entry & MASK or not self.irr >> pin & 1:
            self.irq_eoi.pop(pin, None)
            return
        ends = self.irq_eoi[pin] = self.irq_eoi.get(pin, 0) + 1
        if ends < IOAPIC_SUCCESSIVE_IRQ_MAX_COUNT:
            self._service(pin, False)
            return
        # A guest that never quiets its device shall get somewhere all the same.
        del self.irq_eoi[pin]
        if not self._eoi_inject_queued:
            self._eoi_inject_queued = True
            self._queue.add(self._clock.now_ns + EOI_INJECT_DELAY_NS, self._eoi_inject_work)
        self._recorder.kvm_ioapic_delayed_eoi_inj(entry)

    def _eoi_inject_work(self) -> None:
        """`kvm_ioapic_eoi_inject_work`."""
        self._eoi_inject_queued = False
        recorder = self._recorder
        if self._kworker < 0:
            self._kworker = recorder.add_task(KWORKER)
        task, recorder.task = recorder.task, self._kworker
        for pin in range(KVM_IOAPIC_NUM_PINS):
            if self.redirtbl[pin] & IN_SERVICE == TRIG_MODE_LEVEL and self.irr >> pin & 1:
                self._service(pin, False)
        recorder.task = task

    def handled_vectors(self, lapic: Lapic) -> int:
        """`kvm_ioapic_scan_entry`: the vectors whose end `lapic` has to tell, as a 256-bit mask."""
        vcpu_id = lapic.vcpu.vcpu_id
        rtc_vector = self._rtc_dest.get(vcpu_id)
        vectors = 0 if rtc_vector is None else 1 << rtc_vector
        stale = -1
        for pin, entry in enumerate(self.redirtbl):
            if (
                entry & TRIG_MODE_LEVEL
                or pin == RTC_GSI
                or self._notifiers.has_ack_notifier(KVM_IRQCHIP_IOAPIC, pin)
            ):
                vector = entry & VECTOR
                logical = bool(entry & DEST_MODE_LOGICAL)
                if lapic.matches(None, 0, entry >> DEST_ID_SHIFT, logical):
                    vectors |= 1 << vector
                elif lapic.pending_eoi(vector):
                    vectors |= 1 << vector
                    stale = max(stale, vector)
        self._stale_eoi[vcpu_id] = stale
        return vectors

    # The RTC, whose interrupt's end KVM_IRQ_LINE_STATUS waits for.

    def restore_rtc_tracking(self, lapic: Lapic) -> None:
        """`kvm_rtc_eoi_tracking_restore_one`: KVM_SET_LAPIC gave `lapic` another state."""
        entry = self.redirtbl[RTC_GSI]
        if not lapic.matches(None, 0, entry >> DEST_ID_SHIFT, bool(entry & DEST_MODE_LOGICAL)):
            return
        vector = entry & VECTOR
        pending, vcpu_id = lapic.pending_eoi(vector), lapic.vcpu.vcpu_id
        if pending == (vcpu_id in self._rtc_dest):
            return
        if pending:
            self._rtc_dest[vcpu_id] = vector
            self._add_rtc_pending_eoi(1)
        else:
            del self._rtc_dest[vcpu_id]
            self._add_rtc_pending_eoi(-1)

    def _add_rtc_pending_eoi(self, change: int) -> None:
        self.rtc_pending_eoi += change
        if self.rtc_pending_eoi < 0:
            self._restore_rtc_tracking_of_all()

    def _restore_rtc_tracking_of_all(self) -> None:
        self.rtc_pending_eoi = 0
        self._rtc_dest.clear()
        for lapic in self._delivery.lapics:
            self.restore_rtc_tracking(lapic)

    # Registers.

    def mmio_read(self, gpa: int, size_bytes: int) -> int | None:
        """`ioapic_mmio_read`; None: not our address. Only 1, 2, 4 and 8 bytes give a value."""
        if not self._in_range(gpa, size_bytes):
            return None
        offset = gpa & 0xFF
        if offset == IOAPIC_REG_SELECT:
            value = self.ioregsel
        elif offset == IOAPIC_REG_WINDOW:
            value = self._read_indirect()
        else:
            value = 0
        if size_bytes not in (1, 2, 4, 8):
            return 0
        return value & (1 << 8 * size_bytes) - 1

    def mmio_write(self, gpa: int, size_bytes: int, value: int) -> bool:
        """`ioapic_mmio_write`; False: not our address. Sizes other than 1, 2, 4, 8 do nothing."""
        if not self._in_range(gpa, size_bytes):
            return False
        if size_bytes not in (1, 2, 4, 8):
            return True
        data = value & (1 << 8 * min(size_bytes, 4)) - 1
        offset = gpa & 0xFF
        if offset == IOAPIC_REG_SELECT:
            self.ioregsel = data & 0xFF
        elif offset == IOAPIC_REG_WINDOW:
            self._write_indirect(data)
        return True

    def _in_range(self, gpa: int, size_bytes: int) -> bool:
        # The bus knows the default page only; `base_address` can but take from it.
        return (
            gpa >= IOAPIC_DEFAULT_BASE_ADDRESS
            and gpa + size_bytes <= IOAPIC_DEFAULT_BASE_ADDRESS + IOAPIC_MEM_LENGTH
            and self.base_address <= gpa < (self.base_address + IOAPIC_MEM_LENGTH & ADDRESS_MASK)
        )

    def _read_indirect(self) -> int:
        register = self.ioregsel
        if register == IOAPIC_REG_VERSION:
            return VERSION
        if register in (IOAPIC_REG_APIC_ID, IOAPIC_REG_ARB_ID):
            return (self.id & 0xF) << 24
        pin = register - IOAPIC_REG_REDIRECTION >> 1
        if not 0 <= pin < KVM_IOAPIC_NUM_PINS:
            return LOW_WORD
        entry = self.redirtbl[pin]
        return entry >> 32 if register & 1 else entry & LOW_WORD

    def _write_indirect(self, value: int) -> None:
        register = self.ioregsel
        if register == IOAPIC_REG_APIC_ID:
            self.id = value >> 24 & 0xF
            return
        pin = register - IOAPIC_REG_REDIRECTION >> 1
        if 0 <= pin < KVM_IOAPIC_NUM_PINS:
            self._write_redirection(pin, value, bool(register & 1))

    def _write_redirection(self, pin: int, value: int, high: bool) -> None:
        old = self.redirtbl[pin]
        if high:
            entry = old & LOW_WORD | value << 32
        else:
            entry = old & ~LOW_WORD | value & ~READ_ONLY | old & READ_ONLY
        if not entry & TRIG_MODE_LEVEL:
            # What an EOI register would be for: guests end a level interrupt by this.
            entry &= ~REMOTE_IRR
        self.redirtbl[pin] = entry
        self._messages.pop(pin, None)
        if (old ^ entry) & MASK:
            self._notifiers.fire_mask_notifiers(KVM_IRQCHIP_IOAPIC, pin, bool(entry & MASK))
        if entry & (IN_SERVICE | MASK) == TRIG_MODE_LEVEL and self.irr >> pin & 1:
            # The line may have fallen since. A resampler raises it again if it has not.
            if self._notifiers.notify_irqfd_resampler(KVM_IRQCHIP_IOAPIC, pin):
                self.irr &= ~(1 << pin)
            else:
                self._service(pin, False)
        self._request_scan(old, entry)

    def _request_scan(self, old: int, entry: int) -> None:
        """Those the pin's interrupt goes to, or went to, look again which vectors we handle."""
        if entry & DELIVERY_MODE:
            self._delivery.request_scan_ioapic()
            return
        logical = bool(entry & DEST_MODE_LOGICAL)
        destinations = {entry >> DEST_ID_SHIFT, old >> DEST_ID_SHIFT}
        for lapic in self._delivery.lapics:
            if any(lapic.matches(None, 0, dest_id, logical) for dest_id in destinations):
                lapic.vcpu.request_scan_ioapic()

    # State.

    def save(self) -> kvm_ioapic_state:
        """KVM_GET_IRQCHIP: edges that were sent are no requests any more."""
        state = kvm_ioapic_state(
            base_address=self.base_address,
            ioregsel=self.ioregsel,
            id=self.id,
            irr=self.irr & ~self.irr_delivered,
            pad=self._pad,
        )
        for pin, entry in enumerate(self.redirtbl):
            state.redirtbl[pin].bits = entry
        return state

    def restore(self, state: kvm_ioapic_state) -> None:
        """KVM_SET_IRQCHIP: take over any state, unchecked, and raise its requests anew."""
        self.base_address = state.base_address
        self.ioregsel = state.ioregsel
        self.id = state.id
        self._pad = state.pad
        self.redirtbl[:] = [entry.bits for entry in state.redirtbl]
        self._messages.clear()
        self.irr = 0
        self.irr_delivered = 0
        self._delivery.request_scan_ioapic()
        self.rtc_pending_eoi = 0
        self._rtc_dest.clear()
        recorder = self._recorder
        for pin in range(KVM_IOAPIC_NUM_PINS):
            if state.irr >> pin & 1:
                entry = self.redirtbl[pin]
                result = self._set_line(pin, 1, True)
                is_detail = entry & MASK != 0
                if recorder.detail or not is_detail:
                    recorder.kvm_ioapic_set_irq(entry, pin, result == COALESCED, is_detail)
        self._restore_rtc_tracking_of_all()
