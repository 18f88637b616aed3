"""The recorder: order, batches, who listens, what is dropped, and that it stays small."""

from collections.abc import Callable

import pytest

from kvmtick import guests
from kvmtick.kvm.model import ModelVm
from kvmtick.trace.events import IRQ_CONTEXT, Event, Record
from kvmtick.trace.recorder import IDLE_TASK, Now, Recorder

TAIL = 32


def make(detail: bool = False) -> tuple[Now, Recorder]:
    clock = Now(0)
    return clock, Recorder(clock, detail)


def write_ports(recorder: Recorder, clock: Now, count: int) -> None:
    for value in range(count):
        clock.now_ns += 1
        recorder.kvm_pio(1, 0x80, 1, 1, value)


def test_records_are_stamped_and_come_in_order_and_at_once_with_a_flush() -> None:
    clock, recorder = make()
    seen: list[list[Record]] = []
    recorder.add_consumer(seen.append)
    task = recorder.add_task("kvm-pit/1-2")
    clock.now_ns = 5
    recorder.kvm_set_irq(0, 1, 2)
    recorder.task = task
    clock.now_ns = 7
    recorder.kvm_ack_irq(0, 0)
    assert seen == []
    recorder.flush()
    recorder.flush()
    assert seen == [
        [(5, Event.KVM_SET_IRQ, IDLE_TASK, 0, 1, 2), (7, Event.KVM_ACK_IRQ, task, 0, 0)]
    ]
    assert recorder.tasks == ["<idle>-0", "kvm-pit/1-2"]


def test_every_consumer_gets_the_same_batches_from_when_it_came_to_when_it_left() -> None:
    clock, recorder = make()
    early: list[Record] = []
    late: list[Record] = []
    take_early: Callable[[list[Record]], None] = early.extend
    take_late: Callable[[list[Record]], None] = late.extend
    recorder.add_consumer(take_early)
    write_ports(recorder, clock, 3)
    recorder.add_consumer(take_late)
    write_ports(recorder, clock, 2)
    recorder.remove_consumer(take_early)
    write_ports(recorder, clock, 4)
    recorder.flush()
    assert [record[0] for record in early] == [1, 2, 3, 4, 5]
    assert [record[0] for record in late] == [4, 5, 6, 7, 8, 9]
    assert recorder.dropped == 0


def test_what_nobody_listens_to_is_counted_as_dropped() -> None:
    clock, recorder = make()
    write_ports(recorder, clock, 3)
    recorder.flush()
    assert recorder.dropped == 3
    recorder.add_consumer(lambda batch: None)
    write_ports(recorder, clock, 3)
    recorder.flush()
    assert recorder.dropped == 3


@pytest.mark.parametrize("flush_after", [1, 20, 50, 1000])
def test_the_tail_is_the_last_32_whatever_was_flushed(flush_after: int) -> None:
    clock, recorder = make()
    for count in range(1, 101):
        write_ports(recorder, clock, 1)
        if count % flush_after == 0:
            recorder.flush()
        assert [record[0] for record in recorder.tail()] == list(
            range(max(1, count - TAIL + 1), count + 1)
        )


def test_a_guest_that_writes_ports_for_ever_does_not_fill_memory() -> None:
    clock, recorder = make()
    biggest = 0
    taken = 0

    def take(batch: list[Record]) -> None:
        nonlocal biggest, taken
        biggest = max(biggest, len(batch))
        taken += len(batch)

    recorder.add_consumer(take)
    write_ports(recorder, clock, 50_000)
    assert 50_000 - taken < 10_000, "what is kept back must not grow with the run"
    assert biggest < 10_000
    recorder.flush()
    assert taken == 50_000


def test_a_full_buffer_says_so() -> None:
    clock, recorder = make()
    assert not recorder.full
    for _ in range(100_000):
        clock.now_ns += 1
        recorder.kvm_set_irq(0, 1, 2)
        if recorder.full:
            break
    else:
        pytest.fail("100,000 records and still not full")
    recorder.flush()
    assert not recorder.full


DETAILS = {
    Event.WORK_END,
    Event.KVM_IOAPIC_SET_IRQ,
    Event.KVM_VCPU_WAKEUP,
    Event.KVM_ENTRY,
    Event.KVM_EXIT,
}


@pytest.mark.parametrize("detail", [False, True])
def test_details_are_recorded_only_on_demand(detail: bool) -> None:
    batch: list[Record] = []
    with ModelVm(detail=detail) as vm:
        vm.machine.recorder.add_consumer(batch.extend)
        vm.create_irqchip()
        vm.create_pit2()
        vm.create_vcpu()
        vm.load(guests.load("tick-pic", ticks=3))
        vm.run()
    events = {Event(record[1]) for record in batch}
    assert (events >= DETAILS) if detail else events.isdisjoint(DETAILS)
    levels = {record[4] for record in batch if record[1] == Event.KVM_SET_IRQ}
    assert levels == ({0, 1} if detail else {1})


APIC_DETAILS = {Event.KVM_APIC, Event.KVM_MMIO}
APIC_EVENTS = {Event.KVM_APIC_ACCEPT_IRQ, Event.KVM_EOI, Event.KVM_INJ_VIRQ}


@pytest.mark.parametrize("detail", [False, True])
@pytest.mark.parametrize(
    ("guest", "always", "details"),
    [
        (
            "tick-ioapic",
            {*APIC_EVENTS, Event.KVM_IOAPIC_SET_IRQ, Event.KVM_ACK_IRQ},
            {*APIC_DETAILS, Event.WORK_END},
        ),
        ("tick-msi", {*APIC_EVENTS, Event.KVM_MSI_SET_IRQ}, APIC_DETAILS),
        ("tick-lapic", APIC_EVENTS, APIC_DETAILS),
        ("tick-x2apic", APIC_EVENTS, {Event.KVM_APIC, Event.KVM_MSR}),
        ("nmi-watchdog", {Event.KVM_APIC_ACCEPT_IRQ, Event.KVM_INJ_NMI}, APIC_DETAILS),
        ("ipi-tick", {*APIC_EVENTS, Event.KVM_APIC_IPI}, APIC_DETAILS),
    ],
)
def test_what_verdicts_need_of_the_local_apics_is_always_recorded(
    guest: str, always: set[Event], details: set[Event], detail: bool
) -> None:
    batch: list[Record] = []
    with ModelVm(detail=detail) as vm:
        vm.machine.recorder.add_consumer(batch.extend)
        image = guests.load(guest, ticks=3)
        vm.prepare(image.needs)
        vm.load(image)
        assert vm.run().exit.reason == "done"
    events = {Event(record[1]) for record in batch}
    assert events >= always
    quiet = (DETAILS | {Event.KVM_MMIO, Event.KVM_MSR}) - always
    assert (events >= details) if detail else events.isdisjoint(quiet)


def test_an_interrupt_borrows_the_task() -> None:
    _, recorder = make()
    task = recorder.add_task("CPU 0/KVM-7")
    recorder.task = task
    before = recorder.enter_irq()
    assert recorder.task == task | IRQ_CONTEXT
    recorder.task = before
    assert recorder.task == task


def test_a_follower_sees_each_record_the_moment_it_is_made_and_consumers_still_get_theirs() -> None:
    clock, recorder = make()
    batches: list[Record] = []
    recorder.add_consumer(batches.extend)
    write_ports(recorder, clock, 2)
    seen: list[int] = []
    recorder.follow(lambda record: seen.append(record[0]))
    for count in range(3, 10_000):
        write_ports(recorder, clock, 1)
        assert seen[-1] == count
    recorder.flush()
    assert [record[0] for record in batches] == list(range(1, 10_000))
    assert seen == list(range(3, 10_000))
