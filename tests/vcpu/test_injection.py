"""What goes into the guest at the next entry: order, blocking, windows (x86.c, SDM 26.8.3, 7.8)."""

import pytest

from kvmtick.cpu.engine import INTR_INFO_VALID, EventType, Interruptibility
from kvmtick.trace.events import Event, Record, field
from kvmtick.trace.recorder import Now, Recorder
from kvmtick.vcpu.events import (
    RFLAGS_IF,
    Injected,
    InterruptSource,
    PendingEvents,
    QueuedException,
    complete_interrupts,
    inject_pending_event,
    interrupt_allowed,
    nmi_allowed,
)
from kvmtick.vcpu.vmcs import Vmcs, intr_info, intr_type, intr_vector

NMI_INFO = INTR_INFO_VALID | EventType.NMI << 8 | 2
STI, MOV_SS, NMI = Interruptibility.STI, Interruptibility.MOV_SS, Interruptibility.NMI


class Source(InterruptSource):
    """External interrupts waiting, highest first."""

    def __init__(self, *vectors: int) -> None:
        super().__init__(0, 1_000_000)
        self.vectors = list(vectors)

    def has_interrupt(self) -> bool:
        return bool(self.vectors)

    def get_interrupt(self) -> int:
        return self.vectors.pop(0) if self.vectors else -1


class Entry:
    """One vCPU's state before an entry."""

    def __init__(self, *vectors: int, interrupts_on: bool = True, blocked: int = 0) -> None:
        self.vmcs = Vmcs()
        self.vmcs.guest_rflags = 2 | (RFLAGS_IF if interrupts_on else 0)
        self.vmcs.guest_interruptibility = int(blocked)
        self.pending = PendingEvents()
        self.source = Source(*vectors)
        self.recorder = Recorder(Now(0))
        self.records: list[Record] = []
        self.recorder.add_consumer(self.records.extend)

    def inject(self) -> int:
        inject_pending_event(self.vmcs, self.pending, self.source, self.recorder)
        self.recorder.flush()
        return self.vmcs.entry_intr_info

    def traced(self) -> list[tuple[int, int, int]]:
        return [
            (field(r, "vector"), field(r, "soft"), field(r, "reinjected"))
            for r in self.records
            if r[1] == Event.KVM_INJ_VIRQ
        ]


def test_an_open_vcpu_takes_the_interrupt_and_traces_it() -> None:
    entry = Entry(0x20)
    assert entry.inject() == INTR_INFO_VALID | 0x20
    assert entry.traced() == [(0x20, False, False)]
    assert not entry.vmcs.intr_window_exiting


def test_nothing_pending_injects_nothing() -> None:
    entry = Entry()
    assert entry.inject() == 0
    assert entry.traced() == []
    assert not entry.vmcs.intr_window_exiting
    assert not entry.vmcs.nmi_window_exiting


@pytest.mark.parametrize(
    ("interrupts_on", "blocked", "allowed"),
    [
        (True, 0, True),
        (False, 0, False),
        (True, STI, False),
        (True, MOV_SS, False),
        (True, NMI, True),
        (False, STI, False),
    ],
)
def test_if_and_the_shadows_hold_an_interrupt_back_and_open_a_window(
    interrupts_on: bool, blocked: int, allowed: bool
) -> None:
    entry = Entry(0x20, interrupts_on=interrupts_on, blocked=blocked)
    assert interrupt_allowed(entry.vmcs) is allowed
    entry.inject()
    assert bool(entry.vmcs.entry_intr_info) is allowed
    assert entry.vmcs.intr_window_exiting is not allowed
    assert entry.source.vectors == ([] if allowed else [0x20]), (
        "an interrupt that is not taken must not be acknowledged"
    )


@pytest.mark.parametrize(
    ("blocked", "allowed"),
    [(0, True), (NMI, False), (MOV_SS, False), (STI, False), (NMI | STI, False)],
)
@pytest.mark.parametrize("interrupts_on", [True, False])
def test_an_nmi_waits_for_iret_and_mov_ss_only(
    blocked: int, allowed: bool, interrupts_on: bool
) -> None:
    entry = Entry(interrupts_on=interrupts_on, blocked=blocked)
    assert nmi_allowed(entry.vmcs) is allowed
    entry.pending.queue_nmi(False)
    assert entry.inject() == (NMI_INFO if allowed else 0)
    assert entry.pending.nmi_pending == (0 if allowed else 1)
    assert entry.vmcs.nmi_window_exiting is not allowed
    assert entry.traced() == [], "kvm_inj_virq is for external interrupts"


def test_an_nmi_goes_before_an_interrupt_which_gets_a_window() -> None:
    entry = Entry(0x20)
    entry.pending.queue_nmi(False)
    assert entry.inject() == NMI_INFO
    assert entry.source.vectors == [0x20]
    assert entry.vmcs.intr_window_exiting
    assert not entry.vmcs.nmi_window_exiting


def test_an_event_that_was_cut_short_goes_before_everything_and_is_marked() -> None:
    entry = Entry(0x21)
    entry.pending.queue_nmi(False)
    entry.pending.queue_interrupt(0x20)
    assert entry.inject() == INTR_INFO_VALID | 0x20
    assert entry.traced() == [(0x20, False, True)]
    assert entry.pending.injected == 0
    assert entry.vmcs.nmi_window_exiting
    assert entry.vmcs.intr_window_exiting
    assert entry.inject() == NMI_INFO
    assert entry.inject() == INTR_INFO_VALID | 0x21
    assert entry.traced()[1:] == [(0x21, False, False)]


def test_it_is_injected_again_whatever_if_and_the_shadow_say() -> None:
    entry = Entry(interrupts_on=False, blocked=STI)
    entry.pending.queue_interrupt(0x20)
    assert entry.inject() == INTR_INFO_VALID | 0x20, "it was taken once already"


def test_an_nmi_that_was_cut_short_is_not_traced_as_an_interrupt() -> None:
    entry = Entry()
    entry.pending.injected = Injected.NMI
    assert entry.inject() == NMI_INFO
    assert entry.traced() == []


def test_a_second_request_opens_the_window_at_once() -> None:
    entry = Entry(0x20, 0x21)
    assert entry.inject() == INTR_INFO_VALID | 0x20
    assert entry.vmcs.intr_window_exiting


@pytest.mark.parametrize(("in_service", "limit"), [(False, 2), (True, 1)])
def test_nmis_beyond_the_limit_are_merged(in_service: bool, limit: int) -> None:
    pending = PendingEvents()
    for _ in range(4):
        pending.queue_nmi(in_service)
    assert pending.nmi_pending == limit


@pytest.mark.parametrize("event", list(EventType))
@pytest.mark.parametrize("vector", [0, 2, 0x20, 0xFF])
def test_interruption_information_is_put_together_and_taken_apart(
    event: EventType, vector: int
) -> None:
    info = intr_info(event, vector)
    assert info >> 31 == 1
    assert (intr_type(info), intr_vector(info)) == (event, vector)


# Exceptions, and several at once (KVM_SET_VCPU_EVENTS).


@pytest.mark.parametrize(
    ("exception", "info", "error_code"),
    [
        (QueuedException(6), EventType.HARDWARE_EXCEPTION << 8 | 6, 0),
        (QueuedException(13, True, 0x1234), EventType.HARDWARE_EXCEPTION << 8 | 0x800 | 13, 0x1234),
        (QueuedException(14, True, 0x9_0005), EventType.HARDWARE_EXCEPTION << 8 | 0x80E, 5),
        (QueuedException(3), EventType.SOFTWARE_EXCEPTION << 8 | 3, 0),
        (QueuedException(4), EventType.SOFTWARE_EXCEPTION << 8 | 4, 0),
    ],
)
def test_an_injected_exception(exception: QueuedException, info: int, error_code: int) -> None:
    entry = Entry(0x20)
    entry.pending.injected, entry.pending.exception = Injected.EXCEPTION, exception
    assert entry.inject() == INTR_INFO_VALID | info
    assert entry.vmcs.entry_error_code == error_code
    assert entry.vmcs.intr_window_exiting
    assert entry.traced() == []
    assert entry.pending.exception == exception, "it is still told"


@pytest.mark.parametrize(
    ("injected", "kind"),
    [
        (Injected.EXCEPTION | Injected.NMI | Injected.INTERRUPT, EventType.HARDWARE_EXCEPTION),
        (Injected.NMI | Injected.INTERRUPT, EventType.NMI),
        (Injected.INTERRUPT, EventType.EXTERNAL),
    ],
)
def test_of_several_that_were_injected_the_first_goes_in_and_the_others_are_lost(
    injected: Injected, kind: EventType
) -> None:
    entry = Entry()
    entry.pending.queue_interrupt(0x30)
    entry.pending.exception = QueuedException(6)
    entry.pending.injected = injected
    assert intr_type(entry.inject()) == kind
    assert entry.pending.injected == 0


def test_a_software_interrupt_is_traced_as_one() -> None:
    entry = Entry()
    entry.pending.queue_interrupt(0x80, soft=True)
    assert entry.inject() == intr_info(EventType.SOFTWARE_INTERRUPT, 0x80)
    assert entry.traced() == [(0x80, True, True)]


@pytest.mark.parametrize(
    "info",
    [
        INTR_INFO_VALID | 0x31,
        NMI_INFO,
        INTR_INFO_VALID | EventType.SOFTWARE_INTERRUPT << 8 | 0x80,
        INTR_INFO_VALID | EventType.HARDWARE_EXCEPTION << 8 | 6,
        INTR_INFO_VALID | EventType.HARDWARE_EXCEPTION << 8 | 0x800 | 13,
    ],
)
def test_an_event_whose_delivery_was_cut_short_comes_again_as_it_was(info: int) -> None:
    entry = Entry()
    entry.vmcs.entry_error_code = 0x28
    entry.vmcs.idt_vectoring_info = info
    assert complete_interrupts(entry.vmcs, entry.pending)
    entry.vmcs.entry_error_code = 0
    assert entry.inject() == info
    assert entry.vmcs.entry_error_code == (0x28 if info & 0x800 else 0)


def test_an_exit_leaves_what_was_queued_meanwhile() -> None:
    entry = Entry()
    entry.pending.queue_interrupt(0x30)
    assert not complete_interrupts(entry.vmcs, entry.pending)
    assert entry.inject() == INTR_INFO_VALID | 0x30


def test_an_injected_nmi_leaves_room_for_one() -> None:
    pending = PendingEvents()
    pending.injected = Injected.NMI
    for _ in range(3):
        pending.queue_nmi(False)
    assert pending.nmi_pending == 1
