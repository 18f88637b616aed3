"""Two VMs of one process, and a third of somebody else's: only the first is kept."""

import pytest

from kvmtick.trace.by_vm import ByVm
from kvmtick.trace.events import IRQ_CONTEXT, Event, Function, Record
from kvmtick.trace.vms import VmInfo

IDLE, VCPU, WORKER, OTHER_VCPU, OTHER_WORKER = range(5)
TIMER, OTHER_TIMER, LAPIC_TIMER = 0x10, 0x20, 0x30
WORK, OTHER_WORK = 0x11, 0x21
PIT, APIC, WORK_FN = Function.PIT_TIMER_FN, Function.APIC_TIMER_FN, Function.PIT_DO_WORK


class OneVm:
    """One VM whose threads are told; the others' records are nobody's."""

    def __init__(self) -> None:
        self.by_vm = ByVm([f"thread-{task}" for task in range(10)])
        self.share = self.by_vm.add_vm(VmInfo(0, ""))
        self.workers = self.share.workers

    def add_task(self, task: int) -> None:
        self.by_vm.add_task(self.share, task)

    def keep(self, records: list[Record]) -> list[Record]:
        return [record for _, own in self.by_vm(records) for record in own]


def record(event: Event, task: int, *fields: int) -> Record:
    """A record without a time."""
    return (0, int(event), task, *fields)


def tick(timer: int, work: int, worker: int, victim: int) -> list[Record]:
    """An expiry in an interrupt of whoever ran, and the run of its work item."""
    irq = victim | IRQ_CONTEXT
    return [
        record(Event.HRTIMER_EXPIRE_ENTRY, irq, timer, PIT, 0),
        record(Event.WORK_QUEUE, irq, work, WORK_FN, worker),
        record(Event.HRTIMER_START, irq, timer, PIT, 0, 0),
        record(Event.WORK_START, worker, work, WORK_FN),
        record(Event.KVM_SET_IRQ, worker, 0, 1, 2),
        record(Event.WORK_END, worker, work, WORK_FN),
    ]


def started(vcpu: int, timer: int) -> list[Record]:
    """A guest programs its counter."""
    return [
        record(Event.KVM_PIO, vcpu, 1, 0x40, 1, 1, 4),
        record(Event.HRTIMER_START, vcpu, timer, PIT, 1, 0),
    ]


def test_by_the_timer_its_vcpu_started() -> None:
    vm = OneVm()
    vm.add_task(VCPU)
    ours = [*started(VCPU, TIMER), *tick(TIMER, WORK, WORKER, OTHER_VCPU)]
    theirs = [*started(OTHER_VCPU, OTHER_TIMER), *tick(OTHER_TIMER, OTHER_WORK, OTHER_WORKER, VCPU)]
    assert vm.keep([*theirs, *ours, *theirs, *tick(TIMER, WORK, WORKER, IDLE), *theirs]) == [
        *ours,
        *tick(TIMER, WORK, WORKER, IDLE),
    ]
    assert vm.workers == {WORKER}


def test_across_batches_record_by_record() -> None:
    at_once, singly = OneVm(), OneVm()
    records = [
        *started(OTHER_VCPU, OTHER_TIMER),
        *started(VCPU, TIMER),
        *tick(OTHER_TIMER, OTHER_WORK, OTHER_WORKER, IDLE),
        *tick(TIMER, WORK, WORKER, IDLE),
    ]
    for vm in (at_once, singly):
        vm.add_task(VCPU)
    assert [kept for each in records for kept in singly.keep([each])] == at_once.keep(records)


def test_two_expiries_at_once_on_two_cpus_are_not_mixed_up() -> None:
    vm = OneVm()
    vm.add_task(VCPU)
    vm.keep(started(VCPU, TIMER))
    ours, theirs = tick(TIMER, WORK, WORKER, 7), tick(OTHER_TIMER, OTHER_WORK, OTHER_WORKER, 8)
    mixed = [each for pair in zip(ours, theirs, strict=True) for each in pair]
    assert vm.keep(mixed) == ours


def test_by_a_worker_that_is_known_and_by_the_vcpu_s_acknowledgement() -> None:
    queued = record(Event.WORK_QUEUE, VCPU, WORK, WORK_FN, WORKER)
    run = tick(TIMER, WORK, WORKER, IDLE)[3:]
    for known, before in ((WORKER, []), (VCPU, [queued])):
        vm = OneVm()
        vm.add_task(known)
        assert vm.keep([*before, *run]) == [*before, *run]


def test_a_local_apic_s_timer_and_gaps() -> None:
    vm = OneVm()
    vm.add_task(VCPU)
    records = [
        record(Event.LOST_EVENTS, 0, 1, 5),
        record(Event.HRTIMER_START, VCPU, LAPIC_TIMER, APIC, 1, 0),
        record(Event.HRTIMER_EXPIRE_ENTRY, IDLE | IRQ_CONTEXT, LAPIC_TIMER, APIC, 1),
        record(Event.KVM_EOI, VCPU, 0, 65),
    ]
    foreign = record(Event.HRTIMER_EXPIRE_ENTRY, IDLE | IRQ_CONTEXT, OTHER_TIMER, APIC, 1)
    assert vm.keep([*records, foreign]) == records


@pytest.mark.parametrize("event", [Event.KVM_SET_IRQ, Event.KVM_PIO, Event.KVM_ACK_IRQ])
def test_another_thread_s_is_not_kept(event: Event) -> None:
    vm = OneVm()
    vm.add_task(VCPU)
    assert vm.keep([record(event, OTHER_VCPU, 0, 0, 0, 0, 0)]) == []


def test_an_expiry_whose_work_is_queued_already_claims_no_work_of_another_vm() -> None:
    vm = OneVm()
    vm.add_task(VCPU)
    vm.keep(started(VCPU, TIMER))
    expiry, _, restart, *run = tick(TIMER, WORK, WORKER, IDLE)
    ours = [*tick(TIMER, WORK, WORKER, IDLE)[:3], expiry, restart]
    theirs = tick(OTHER_TIMER, OTHER_WORK, OTHER_WORKER, IDLE)
    assert vm.keep([*ours, *theirs, *run, *theirs]) == [*ours, *run]
    assert vm.workers == {WORKER}


def test_another_vm_s_timer_where_one_that_is_gone_had_its() -> None:
    by_vm = ByVm([f"thread-{task}" for task in range(10)])
    shares = [by_vm.add_vm(VmInfo(0, "")) for _ in range(2)]
    for share, task in zip(shares, (VCPU, OTHER_VCPU), strict=True):
        by_vm.add_task(share, task)
    first = [*started(VCPU, TIMER), *tick(TIMER, WORK, WORKER, IDLE)]
    second = [*started(OTHER_VCPU, TIMER), *tick(TIMER, WORK, OTHER_WORKER, IDLE)]
    assert by_vm(first) == [(shares[0], first)]
    assert by_vm(second) == [(shares[1], second)]
    assert shares[1].workers == {OTHER_WORKER}
