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
comes too late, by something being in service.

Not modelled: the vector of an interrupt of the PIC other than IRQ 0, which no record has (IRQ 0's
is given); of several interrupts of the PIC at once only the timer's.
"""

from collections.abc import Iterable, Iterator

from kvmtick.trace.events import IRQ_CONTEXT, ApicvInhibitReason, Event, Function, Record

__all__ = ["Inferred"]

_PIT_TIMER_FN = int(Function.PIT_TIMER_FN)
_PIT_GSI = 0
_PIC_COMMAND, _PIC_DATA = 0x20, 0x21
_ICW1, _ICW1_ICW4_NEEDED, _ICW2_BASE = 0x10, 0x01, 0xF8
_IRQ0 = 1
_IOAPIC_SELECT, _IOAPIC_WINDOW = 0xFEC0_0000, 0xFEC0_0010
_IOAPIC_REDIRECTION = 0x10
_IOAPIC_MASKED = 1 << 16
_APIC_EOI = 0xB0
_PAGE = 0xFFF
_MMIO_WRITE = 2
_APIC_BASE_MSR, _X2APIC_ENABLED = 0x1B, 1 << 10
_INTR_TYPE, _INTR_NMI, _INTR_VALID = 0x700, 0x200, 1 << 31
_MOST_NMIS = 2
_NOTHING = -1


class _PicSetup:
    """The master PIC's vector base and mask, from the guest's port writes (i8259 datasheet)."""

    def __init__(self) -> None:
        self.base = 0
        self.imr = 0
        self._left: list[str] = []

    def write(self, port: int, value: int) -> bool:
        """The guest wrote a port; True: it unmasked IRQ 0 (OCW1)."""
        if port == _PIC_COMMAND and value & _ICW1:
            self._left = ["icw2", "icw3"] + ["icw4"] * (value & _ICW1_ICW4_NEEDED)
            self.imr = 0
        elif port == _PIC_DATA and self._left:
            if self._left.pop(0) == "icw2":
                self.base = value & _ICW2_BASE
        elif port == _PIC_DATA:
            before, self.imr = self.imr, value
            return bool(before & ~value & _IRQ0)
        return False


class Inferred:
    """Completes the records of one VM, in order."""

    def __init__(self) -> None:
        self._pic = _PicSetup()
        self._reinject = False
        self._expires_ns: dict[int, int] = {}
        self._ioapic_index = 0
        self._ioapic_masked: dict[int, bool] = {}
        self._gsi: dict[int, int] = {}
        self._pin = 0
        self._eoi_is_injection = True
        self._wrote_eoi: set[int] = set()
        self._in_service: dict[int, list[int]] = {}
        self._x2apic: set[int] = set()

    @property
    def sees_nmis(self) -> bool:
        """Whether this host's records show when an NMI is injected."""
        return not self._eoi_is_injection

    def __call__(self, records: Iterable[Record]) -> list[Record]:
        """The records with what is inferred from them, in order."""
        return [out for record in records for out in self._complete(record)]

    def _complete(self, record: Record) -> Iterator[Record]:
        event = record[1]
        if event == Event.KVM_EOI:
            yield from self._eoi(record)
            return
        if event == Event.HRTIMER_START and self._is_programming(record):
            yield _reset(record)
        yield record
        if event == Event.KVM_PIO:
            if record[3] and self._pic.write(record[4], record[7]) and self._reinject:
                yield _reset(record)
        elif event == Event.KVM_MMIO:
            if record[3] == _MMIO_WRITE and self._mmio_unmasks(record) and self._reinject:
                yield _reset(record)
        elif event == Event.KVM_SET_IRQ:
            self._gsi[record[2]] = record[3]
        elif event == Event.KVM_IOAPIC_SET_IRQ:
            self._ioapic_set_irq(record)
        elif event == Event.KVM_APICV_INHIBIT_CHANGED:
            if record[3] == ApicvInhibitReason.PIT_REINJ:
                self._reinject = bool(record[4])
        elif event == Event.KVM_INJ_VIRQ:
            self._eoi_is_injection = False
        elif event == Event.KVM_MSR:
            self._msr(record)
        elif event == Event.KVM_ENTRY and _is_nmi(record[5]):
            yield (record[0], int(Event.KVM_INJ_NMI), record[2], record[3], _MOST_NMIS)

    # The PIT.

    def _is_programming(self, record: Record) -> bool:
        """Counter 0's timer starts anew; one that only moved to another CPU keeps its time."""
        _, _, task, timer, function, expires_ns, _ = record
        if function != _PIT_TIMER_FN:
            return False
        before_ns = self._expires_ns.get(timer)
        self._expires_ns[timer] = expires_ns
        return not task & IRQ_CONTEXT and before_ns not in (None, expires_ns)

    def _mmio_unmasks(self, record: Record) -> bool:
        _, _, task, _, _, gpa, value = record
        if gpa & _PAGE == _APIC_EOI and gpa & ~_PAGE != _IOAPIC_SELECT:
            self._wrote_eoi.add(task)
        elif gpa == _IOAPIC_SELECT:
            self._ioapic_index = value & 0xFF
        elif gpa == _IOAPIC_WINDOW:
            pin, high = divmod(self._ioapic_index - _IOAPIC_REDIRECTION, 2)
            if pin >= 0 and not high:
                before = self._ioapic_masked.get(pin, True)
                after = self._ioapic_masked[pin] = bool(value & _IOAPIC_MASKED)
                return pin == self._pin and before and not after
        return False

    def _ioapic_set_irq(self, record: Record) -> None:
        _, _, task, entry, pin, _ = record
        if self._gsi.get(task) == _PIT_GSI:
            self._pin = pin
        self._ioapic_masked[pin] = bool(entry & _IOAPIC_MASKED)

    # Injections.

    def _eoi(self, record: Record) -> Iterator[Record]:
        if not self._eoi_is_injection:
            yield record
            return
        ts_ns, event, task, vcpu, vector = record
        in_service = self._in_service.setdefault(vcpu, [])
        if vector != _NOTHING:
            in_service.append(vector)
            yield (ts_ns, int(Event.KVM_INJ_VIRQ), task, vector, 0, 0)
        elif self._by_guest(task, bool(in_service)):
            yield (ts_ns, event, task, vcpu, in_service.pop() if in_service else _NOTHING)
        else:
            yield (ts_ns, int(Event.KVM_INJ_VIRQ), task, self._pic.base, 0, 0)

    def _by_guest(self, task: int, in_service: bool) -> bool:
        if task in self._wrote_eoi:
            self._wrote_eoi.discard(task)
            return True
        return in_service and task in self._x2apic

    def _msr(self, record: Record) -> None:
        _, _, task, is_write, number, value, _ = record
        if is_write and number == _APIC_BASE_MSR:
            (self._x2apic.add if value & _X2APIC_ENABLED else self._x2apic.discard)(task)


def _reset(record: Record) -> Record:
    """How many were pending is not known."""
    return (record[0], int(Event.PIT_RESET_REINJECT), record[2], 0)


def _is_nmi(intr_info: int) -> bool:
    return bool(intr_info & _INTR_VALID) and intr_info & _INTR_TYPE == _INTR_NMI
