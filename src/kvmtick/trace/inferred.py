"""Events that a kernel does not write, inferred from those it does, so that one code judges all.

* **kvm_pit_reset_reinject**: i8254.c has no tracepoint. `pending` is forgotten when the guest
  programs counter 0 (its hrtimer is started for another time outside of an interrupt) and, with
  reinject on, when it unmasks IRQ 0 in the PIC's IMR or the IOAPIC pin of GSI 0.
* **kvm_inj_nmi**: `intr_info` of kvm_entry shows it (SDM 26.8.3, APM 15.20).
* **kvm_inj_virq**, where a back end never writes it and writes the local APIC's EOI itself when it
  injects: a kvm_eoi that the guest did not write is the injection. The guest's own EOI then finds
  nothing in service (vector -1): it ends what was injected last. A back end is one of these until
  it writes a kvm_inj_virq.

Whether the guest wrote an EOI is told by the kvm_mmio before it; in x2APIC mode, where kvm_msr
comes too late, by something being in service. The mode itself is told by kvm_msr, or by an EOI when
no request of the PIC is there to be injected.

A trace may begin in the middle: what may be a reset, and may be none, is one with `pending` -1, and
the vector of an injection of the PIC is -1 where its base is not known.

Not modelled: the vector of an interrupt of the PIC other than IRQ 0, which no record has (IRQ 0's
is given); of several interrupts of the PIC at once only the timer's; timers whose callbacks run in
a thread (PREEMPT_RT).
"""

import re
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Final

from kvmtick.trace.events import IRQ_CONTEXT, ApicvInhibitReason, Event, Function, Record

__all__ = ["BackEnd", "Inferred", "is_creation"]

_PIT_TIMER_FN: Final = int(Function.PIT_TIMER_FN)
_PIT_GSI: Final = 0
_PIC_COMMAND, _PIC_DATA, _PIT_COUNTER_0 = 0x20, 0x21, 0x40
_ICW1, _ICW1_ICW4_NEEDED, _ICW2_BASE = 0x10, 0x01, 0xF8
_IRQ0: Final = 1
_IOAPIC_SELECT, _IOAPIC_WINDOW = 0xFEC0_0000, 0xFEC0_0010
_IOAPIC_REDIRECTION: Final = 0x10
_IOAPIC_MASKED: Final = 1 << 16
_APIC_EOI: Final = 0xB0
_PAGE: Final = 0xFFF
_MMIO_WRITE: Final = 2
_APIC_BASE_MSR, _X2APIC_ENABLED = 0x1B, 1 << 10
_INTR_TYPE, _INTR_NMI, _INTR_VALID = 0x700, 0x200, 1 << 31
_MOST_NMIS: Final = 2
_NOTHING: Final = -1
_PERHAPS: Final = -1

_KVM_INJ_VIRQ: Final = int(Event.KVM_INJ_VIRQ)
_EVENT_OF: Final = itemgetter(1)
_KVM_SET_IRQ: Final = int(Event.KVM_SET_IRQ)
_IOAPIC_PIN: Final = bytes((Event.KVM_IOAPIC_SET_IRQ,))
_PIC_PIN: Final = bytes((Event.KVM_PIC_SET_IRQ,))
_MOST_MESSAGES: Final = 8
"""Between kvm_set_irq and kvm_ioapic_set_irq are the local APICs that accept the message."""


def is_creation(record: Record) -> bool:
    """This kvm_apicv_inhibit_changed comes with the VM itself (kvm_apicv_init)."""
    return bool(record[4]) and record[3] in (
        ApicvInhibitReason.DISABLED,
        ApicvInhibitReason.ABSENT,
    )


class BackEnd:
    """What a host writes when it injects: one of all its VMs."""

    def __init__(self) -> None:
        self.eoi_is_injection = True
        """A kvm_eoi is: until a kvm_inj_virq is there."""
        self.proven = False
        """A kvm_eoi came that no guest wrote, or one that finds nothing in service any more."""

    def learn(self, records: Sequence[Record]) -> None:
        """See which it is before they are judged."""
        if self.eoi_is_injection and _KVM_INJ_VIRQ in map(_EVENT_OF, records):
            self.eoi_is_injection = False


class _PicSetup:
    """The master PIC's vector base and mask, from the guest's port writes (i8259 datasheet); None
    while they are not known.
    """

    def __init__(self) -> None:
        self.base: int | None = None
        self.imr: int | None = None
        self._left: list[str] = []

    def write(self, port: int, value: int) -> int | None:
        """The guest wrote a port; 0: it unmasked IRQ 0 (OCW1), -1: perhaps."""
        if port == _PIC_COMMAND and value & _ICW1:
            self._left = ["icw2", "icw3"] + ["icw4"] * (value & _ICW1_ICW4_NEEDED)
            self.imr = 0
        elif port == _PIC_DATA and self._left:
            if self._left.pop(0) == "icw2":
                self.base = value & _ICW2_BASE
        elif port == _PIC_DATA:
            before, self.imr = self.imr, value
            if not value & _IRQ0:
                return _PERHAPS if before is None else 0 if before & _IRQ0 else None
        return None


class Inferred:
    """Completes the records of one VM, in order."""

    def __init__(self, back_end: BackEnd | None = None) -> None:
        self._back_end = back_end or BackEnd()
        self._handlers: dict[int, Callable[[Record], list[Record] | None]] = {
            Event.HRTIMER_START: self._hrtimer_start,
            Event.KVM_PIO: self._pio,
            Event.KVM_MMIO: self._mmio,
            Event.KVM_APICV_INHIBIT_CHANGED: self._apicv_inhibit_changed,
            Event.KVM_INJ_VIRQ: self._inj_virq,
            Event.KVM_MSR: self._msr,
            Event.KVM_ENTRY: self._entry,
            Event.KVM_EOI: self._eoi,
            Event.LOST_EVENTS: self._lost_events,
        }
        self._told_by_eoi = re.compile(b"[" + bytes(self._handlers) + b"]")
        others = bytes({*self._handlers} - {Event.KVM_EOI, Event.KVM_INJ_VIRQ})
        self._told = re.compile(b"[" + others + b"]")
        self._records: Sequence[Record] = ()
        self._events = b""
        self._at = self._looked = 0
        self._reinject: bool | None = None
        self._forget()

    def _forget(self) -> None:
        """Nothing is known of what was before."""
        self._pic = _PicSetup()
        self._expires_ns: dict[int, int] = {}
        self._counting = _NOTHING
        self._ioapic_index: int | None = None
        self._ioapic_masked: dict[int, bool] = {}
        self._pin: int | None = None
        self._wrote_eoi: set[int] = set()
        self._pic_asks = False
        self._in_service: dict[int, list[int]] = {}
        self._x2apic: dict[int, bool] = {}

    @property
    def sees_nmis(self) -> bool:
        """Whether this host's records show when an NMI is injected."""
        return not self._back_end.eoi_is_injection

    def __call__(self, records: list[Record]) -> list[Record]:
        """The records with what is inferred from them, in order."""
        self._records, self._looked = records, 0
        events = self._events = bytes(map(_EVENT_OF, records))
        handlers = self._handlers
        completed: list[Record] = []
        done = 0
        told = self._told_by_eoi if self._back_end.eoi_is_injection else self._told
        for match in told.finditer(events):
            at = self._at = match.start()
            new = handlers[events[at]](records[at])
            if new is not None:
                completed += records[done:at]
                completed += new
                done = at + 1
        self._at = len(records)
        self._look_at_lines()
        self._records = ()
        return completed + records[done:] if done else records

    def _lost_events(self, _: Record) -> None:
        self._forget()
        self._looked = self._at

    def _apicv_inhibit_changed(self, record: Record) -> None:
        if record[3] == ApicvInhibitReason.PIT_REINJ:
            self._reinject = bool(record[4])
        elif is_creation(record):
            self._pic.base = self._pic.imr = 0

    # The PIT.

    def _hrtimer_start(self, record: Record) -> list[Record] | None:
        """Counter 0's timer starts anew; one that only moved to another CPU keeps its time."""
        _, _, task, timer, function, expires_ns, _ = record
        if function != _PIT_TIMER_FN:
            return None
        before_ns = self._expires_ns.get(timer)
        self._expires_ns[timer] = expires_ns
        if task & IRQ_CONTEXT or before_ns == expires_ns:
            return None
        known = before_ns is not None or self._counting == task
        return [_reset(record, 0 if known else _PERHAPS), record]

    def _pio(self, record: Record) -> list[Record] | None:
        _, _, task, is_write, port, _, _, value = record
        self._counting = task if port == _PIT_COUNTER_0 and is_write else _NOTHING
        if not is_write or port not in (_PIC_COMMAND, _PIC_DATA):
            return None
        if port == _PIC_DATA:
            self._look_at_lines()
        return self._unmasks(record, self._pic.write(port, value))

    def _mmio(self, record: Record) -> list[Record] | None:
        _, _, task, kind, _, gpa, value = record
        if kind != _MMIO_WRITE:
            return None
        if gpa & _PAGE == _APIC_EOI and gpa & ~_PAGE != _IOAPIC_SELECT:
            self._wrote_eoi.add(task)
            self._x2apic[task] = False
        elif gpa == _IOAPIC_SELECT:
            self._ioapic_index = value & 0xFF
        elif gpa == _IOAPIC_WINDOW:
            return self._unmasks(record, self._ioapic_write(value))
        return None

    def _unmasks(self, record: Record, pending: int | None) -> list[Record] | None:
        if pending is None or self._reinject is False:
            return None
        return [record, _reset(record, pending)]

    def _ioapic_write(self, value: int) -> int | None:
        """The window was written; 0: that unmasked the pin of GSI 0, -1: perhaps."""
        self._look_at_lines()
        opens = not value & _IOAPIC_MASKED
        if self._ioapic_index is None:
            self._ioapic_masked.clear()
            return _PERHAPS if opens else None
        pin, high = divmod(self._ioapic_index - _IOAPIC_REDIRECTION, 2)
        if pin < 0 or high:
            return None
        before = self._ioapic_masked.get(pin)
        self._ioapic_masked[pin] = not opens
        if not opens or before is False or self._pin not in (pin, None):
            return None
        return 0 if before and pin == self._pin else _PERHAPS

    def _look_at_lines(self) -> None:
        """What the chips said when their pins were driven last: GSI 0's IOAPIC pin, the masks."""
        events, records = self._events, self._records
        at = events.rfind(_PIC_PIN, self._looked, self._at)
        if at >= 0:
            self._pic_asks = _is_open(records[at])
            if not records[at][3]:
                self._pic.imr = records[at][6]
        at = self._at
        while (at := events.rfind(_IOAPIC_PIN, self._looked, at)) >= 0:
            _, _, task, entry, pin, _ = records[at]
            if self._gsi(at, task) == _PIT_GSI:
                self._pin = pin
                self._ioapic_masked[pin] = bool(entry & _IOAPIC_MASKED)
                break
        self._looked = self._at

    def _gsi(self, at: int, task: int) -> int | None:
        """The GSI that a task drove before the record at `at`."""
        for record in reversed(self._records[max(0, at - _MOST_MESSAGES) : at]):
            if record[1] == _KVM_SET_IRQ and record[2] == task:
                return record[3]
        return None

    # Injections.

    def _inj_virq(self, _: Record) -> None:
        self._back_end.eoi_is_injection = False

    def _entry(self, record: Record) -> list[Record] | None:
        info = record[5]
        if info & _INTR_VALID and info & _INTR_TYPE == _INTR_NMI:
            return [record, (record[0], int(Event.KVM_INJ_NMI), record[2], record[3], _MOST_NMIS)]
        return None

    def _eoi(self, record: Record) -> list[Record] | None:
        if not self._back_end.eoi_is_injection:
            return None
        ts_ns, event, task, vcpu, vector = record
        in_service = self._in_service.setdefault(vcpu, [])
        if vector != _NOTHING:
            if vector in in_service:
                in_service.remove(vector)
            in_service.append(vector)
            return [(ts_ns, _KVM_INJ_VIRQ, task, vector, 0, 0)]
        if self._by_guest(task, bool(in_service)):
            self._back_end.proven |= bool(in_service)
            return [(ts_ns, event, task, vcpu, in_service.pop() if in_service else _NOTHING)]
        self._back_end.proven = True
        base = _NOTHING if self._pic.base is None else self._pic.base
        return [(ts_ns, _KVM_INJ_VIRQ, task, base, 0, 0)]

    def _by_guest(self, task: int, in_service: bool) -> bool:
        if task in self._wrote_eoi:
            self._wrote_eoi.discard(task)
            return True
        return in_service and self._x2apic.get(task, not self._pic_may_ask())

    def _pic_may_ask(self) -> bool:
        """The pin of the PIC's that was driven last is not masked."""
        at = self._events.rfind(_PIC_PIN, 0, self._at)
        return self._pic_asks if at < 0 else _is_open(self._records[at])

    def _msr(self, record: Record) -> None:
        _, _, task, is_write, number, value, _ = record
        if is_write and number == _APIC_BASE_MSR:
            self._x2apic[task] = bool(value & _X2APIC_ENABLED)


def _is_open(pulse: Record) -> bool:
    """The pin that was driven is not masked."""
    return not pulse[6] >> (pulse[4] & 7) & 1


def _reset(record: Record, pending: int) -> Record:
    """`pending` 0: how many were is not known; -1: whether it was one is not, either."""
    return (record[0], int(Event.PIT_RESET_REINJECT), record[2], pending)
