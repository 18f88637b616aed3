"""What a kernel does not write, from what it writes."""

import pytest

from kvmtick.trace.events import IRQ_CONTEXT, ApicvInhibitReason, Event, Function, Record
from kvmtick.trace.inferred import Inferred

VCPU, WORKER = 1, 2
TIMER = 0x10
PIT, APIC = Function.PIT_TIMER_FN, Function.APIC_TIMER_FN
NMI, NMI_OF_SVM, EXTERNAL, EXCEPTION = 0x8000_0202, 0x8000_0200, 0x8000_0020, 0x8000_030E
EOI_GPA, SELECT, WINDOW = 0xFEE0_00B0, 0xFEC0_0000, 0xFEC0_0010
MASKED = 1 << 16


def record(event: Event, *fields: int, task: int = VCPU) -> Record:
    """A record at time 5."""
    return (5, int(event), task, *fields)


def eoi(vector: int, vcpu: int = 0) -> Record:
    """The kernel's kvm_eoi."""
    return record(Event.KVM_EOI, vcpu, vector)


def injected(vector: int) -> Record:
    """What is inferred."""
    return record(Event.KVM_INJ_VIRQ, vector, 0, 0)


def mmio(gpa: int, value: int) -> Record:
    """The guest writes."""
    return record(Event.KVM_MMIO, 2, 4, gpa, value)


def pio(port: int, value: int) -> Record:
    """The guest writes a port."""
    return record(Event.KVM_PIO, 1, port, 1, 1, value)


def start(expires_ns: int, function: int = PIT, task: int = VCPU) -> Record:
    """hrtimer_start."""
    return record(Event.HRTIMER_START, TIMER, function, expires_ns, 0, task=task)


def reinject(on: int) -> Record:
    """KVM_REINJECT_CONTROL."""
    return record(Event.KVM_APICV_INHIBIT_CHANGED, ApicvInhibitReason.PIT_REINJ, on, 0)


SETUP = [pio(0x20, 0x11), pio(0x21, 0x28), pio(0x21, 4), pio(0x21, 1), pio(0x21, 0xFE)]
RESET = record(Event.PIT_RESET_REINJECT, 0)
PERHAPS = record(Event.PIT_RESET_REINJECT, -1)


def test_an_eoi_of_the_back_end_is_the_injection() -> None:
    given = [eoi(64), mmio(EOI_GPA, 0), eoi(-1), eoi(64)]
    assert Inferred()(given) == [injected(64), mmio(EOI_GPA, 0), eoi(64), injected(64)]


def test_in_x2apic_mode_what_is_in_service_tells() -> None:
    on = record(Event.KVM_MSR, 1, 0x1B, 0xFEE0_0D00, 0)
    assert Inferred()([on, eoi(65), eoi(-1)]) == [on, injected(65), eoi(65)]


def test_an_injection_of_the_pic_has_the_vector_of_irq_0() -> None:
    assert Inferred()([*SETUP, eoi(-1)]) == [*SETUP, injected(0x28)]


def test_the_pic_within_a_handler_of_the_local_apic_s() -> None:
    pulse = record(Event.KVM_PIC_SET_IRQ, 0, 0, 0, 0xFE, 0, task=WORKER)
    given = [*SETUP, eoi(64), pulse, eoi(-1), mmio(EOI_GPA, 0), eoi(-1)]
    inferred = [*SETUP, injected(64), pulse, injected(0x28), mmio(EOI_GPA, 0), eoi(64)]
    assert Inferred()(given) == inferred


def test_nested_vectors_end_last_in_first_out() -> None:
    end = mmio(EOI_GPA, 0)
    given = [eoi(64), eoi(80), end, eoi(-1), end, eoi(-1)]
    assert Inferred()(given) == [injected(64), injected(80), end, eoi(80), end, eoi(64)]


def test_each_vcpu_has_its_own_service() -> None:
    other = record(Event.KVM_EOI, 1, 66, task=3)
    end = mmio(EOI_GPA, 0)
    given = [eoi(64), other, end, eoi(-1)]
    assert Inferred()(given)[-1] == eoi(64)


def test_an_ordinary_kernel_is_left_as_it_is() -> None:
    given = [injected(64), eoi(64), record(Event.KVM_ACK_IRQ, 2, 2), injected(0x20), eoi(-1)]
    inferred = Inferred()
    assert not inferred.sees_nmis
    assert inferred(given) == given
    assert inferred.sees_nmis


@pytest.mark.parametrize("info", [NMI, NMI_OF_SVM])
def test_an_nmi_is_seen_in_kvm_entry(info: int) -> None:
    entry = record(Event.KVM_ENTRY, 3, 0x1000, info)
    assert Inferred()([entry]) == [entry, record(Event.KVM_INJ_NMI, 3, 2)]


@pytest.mark.parametrize("info", [0, EXTERNAL, EXCEPTION, 0x202])
def test_other_entries_are_no_nmi(info: int) -> None:
    entry = record(Event.KVM_ENTRY, 3, 0x1000, info)
    assert Inferred()([entry]) == [entry]


def test_programming_forgets_what_is_pending() -> None:
    irq = VCPU | IRQ_CONTEXT
    given = [start(100), start(200, task=irq), start(200), start(250)]
    assert Inferred()(given) == [PERHAPS, *given[:3], RESET, given[3]]


def test_a_count_that_is_written_first_of_all_is_programming() -> None:
    assert Inferred()([pio(0x40, 4), start(100)]) == [pio(0x40, 4), RESET, start(100)]


def test_a_local_apic_s_timer_resets_nothing() -> None:
    given = [start(100, APIC), start(200, APIC)]
    assert Inferred()(given) == given


@pytest.mark.parametrize("on", [0, 1])
def test_unmasking_irq_0_forgets_it_with_reinject_on(on: int) -> None:
    mask, other, unmask = pio(0x21, 0xFF), pio(0x21, 0xFD), pio(0x21, 0xFE)
    given = [reinject(on), *SETUP, mask, other, unmask, unmask]
    expected = [*given[:-1], *[RESET] * on, unmask]
    assert Inferred()(given) == expected


@pytest.mark.parametrize("on", [0, 1])
def test_unmasking_the_ioapic_s_pin_does_too(on: int) -> None:
    pulse = [
        record(Event.KVM_SET_IRQ, 0, 1, 2, task=WORKER),
        record(Event.KVM_IOAPIC_SET_IRQ, 0x40, 2, 0, task=WORKER),
        record(Event.KVM_SET_IRQ, 4, 1, 0, task=WORKER),
        record(Event.KVM_IOAPIC_SET_IRQ, 0x44, 4, 0, task=WORKER),
    ]
    mask = [mmio(SELECT, 0x14), mmio(WINDOW, 0x40 | MASKED)]
    other = [mmio(SELECT, 0x15), mmio(WINDOW, 0), mmio(SELECT, 0x16), mmio(WINDOW, 0)]
    unmask = [mmio(SELECT, 0x14), mmio(WINDOW, 0x40)]
    given = [reinject(on), *pulse, *mask, *other, *unmask]
    assert Inferred()(given) == [*given, *[RESET] * on]
