"""Traces of hosts: several VMs, a beginning in the middle, gaps, events that were not recorded.

What matters: whatever is missing, a tick's verdict is that of the whole trace, or `unknown`.
"""

from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from host_records import ALL_EVENTS, Key, RecordsTrace, Told, contradictions, told
from recordings import GUESTS, write_recording
from test_any_records import all_facts

from kvmtick import guests
from kvmtick.kvm.model import ModelVm
from kvmtick.ticks.host import HostTicks, VmTicks
from kvmtick.ticks.life import TickAssembler
from kvmtick.ticks.source import Source
from kvmtick.ticks.tick import Tick
from kvmtick.ticks.verdict import Verdict
from kvmtick.trace.events import IRQ_CONTEXT, ApicvInhibitReason, Event, Function, Record
from kvmtick.trace.reading import open_trace
from kvmtick.trace.vms import VmInfo

OURS = {int(Event.PIT_RESET_REINJECT), int(Event.KVM_INJ_NMI)}
"""Events that only a simulated run has."""
LATE = {"worker_delay": "20%:1500us", "vcpu_off": "10%:2ms", "late_expiry": "30%:300us"}
SIMULATED = {
    "tick-pic": (True, LATE),
    "tick-if0": (True, {}),
    "tick-if0 discard": (False, {}),
    "tick-mask": (True, {"vcpu_off": "20%:3ms"}),
    "tick-mask discard": (False, LATE),
    "tick-noeoi": (True, {}),
    "tick-noeoi discard": (False, LATE),
    "tick-ioapic": (True, {"vcpu_off": "20%:3ms"}),
    "tick-ioapic discard": (False, LATE),
    "tick-msi": (False, LATE),
    "tick-lapic": (True, LATE),
    "nmi-watchdog": (True, {"worker_delay": "30%:2ms"}),
    "ipi-tick": (True, {"worker_delay": "30%:2ms"}),
    "tick-long": (False, LATE),
}

EXPIRED = {"tick-mask": 9, "tick-if0": 9}
"""How often the timer did in the recordings; in the others 3 times."""

Host = tuple[list[Record], list[str], VmInfo]


@cache
def recorded_host(name: str) -> Host:
    """A real kernel's records of a guest, and of what else was there."""
    with TemporaryDirectory() as folder:
        path = write_recording(Path(folder) / "it.ktrace", name)
        with open_trace(path) as trace:
            records = [record for batch in trace.batches() for record in batch]
            tasks, info = list(trace.tasks), trace.vms[0]
    threads = dict(info.threads)
    for worker in {record[2] for record in records if record[1] == Event.KVM_SET_IRQ}:
        tid = int(tasks[worker].rpartition("-")[2])
        threads[tid] = f"kvm-pit/{info.pid}"
        tasks[worker] = f"{threads[tid]}-{tid}"
    return records, tasks, replace(info, threads=threads, vcpus={})


@cache
def simulated_host(name: str) -> tuple[Host, dict[Key, Told]]:
    """What a kernel would have recorded of a simulated run, and what the run says itself."""
    reinject, faults = SIMULATED[name]
    with ModelVm(seed=1, detail=True) as vm:
        recorder, records = vm.machine.recorder, list[Record]()
        recorder.add_consumer(records.extend)
        held = {"param_ms": 12} if name.startswith(("tick-if0", "tick-mask")) else {}
        image = guests.load(name.partition(" ")[0], ticks=20, **held)  # type: ignore[arg-type]
        vm.prepare(image.needs, reinject)
        vm.load(image)
        for fault, delay in faults.items():
            vm.machine.host.set_fault(fault, delay)  # type: ignore[arg-type]
        vm.run(for_ns=60_000_000)
        recorder.flush()
        tasks = list(recorder.tasks)
    threads = {}
    for comm, _, tid in (task.rpartition("-") for task in tasks[1:]):
        threads[int(tid)] = comm
    info = VmInfo(1000, name, threads)
    whole = RecordsTrace(records, tasks, [info])
    whole.is_complete = True
    of_kernel = [record for record in records if record[1] not in OURS]
    return (of_kernel, tasks, info), told(whole)


def judged(
    host: Host, records: list[Record], events: frozenset[Event] = ALL_EVENTS
) -> dict[Key, Told]:
    _, tasks, info = host
    return told(RecordsTrace(records, tasks, [info], events))


def gap(record: Record, count: int) -> Record:
    """So many records are missing before this one."""
    return (record[0], int(Event.LOST_EVENTS), 0, 0, count)


def dropped_each(host: Host) -> dict[Event, dict[Key, Told]]:
    """The verdicts without each class of events."""
    records = host[0]
    classes = {Event(record[1]) for record in records} | {Event.KVM_INJ_VIRQ}
    return {
        event: judged(host, [r for r in records if r[1] != event], ALL_EVENTS - {event})
        for event in classes
    }


# What a real kernel recorded.


@pytest.mark.parametrize("reinject", [True, None])
@pytest.mark.parametrize("name", GUESTS)
def test_a_recording_that_begins_at_any_record(name: str, reinject: bool | None) -> None:
    records, tasks, info = recorded_host(name)
    host = records, tasks, VmInfo(info.pid, name, info.threads, {}, reinject)
    whole = judged(host, records)
    assert len(whole) == EXPIRED.get(name, 3)
    for start in range(len(records)):
        assert contradictions(whole, judged(host, records[start:])) == [], start


@pytest.mark.parametrize("name", GUESTS)
def test_a_recording_with_a_gap_anywhere(name: str) -> None:
    host = recorded_host(name)
    records = host[0]
    whole = judged(host, records)
    for length in (1, 3, 8):
        for start in range(len(records) - length):
            part = [*records[:start], gap(records[start], length), *records[start + length :]]
            assert contradictions(whole, judged(host, part)) == [], (start, length)


@pytest.mark.parametrize("name", GUESTS)
def test_a_recording_without_a_class_of_events(name: str) -> None:
    host = recorded_host(name)
    whole = judged(host, host[0])
    for event, part in dropped_each(host).items():
        assert contradictions(whole, part) == [], event


def test_ticks_are_exact_from_the_first_acknowledged_one_on() -> None:
    host = recorded_host("tick-pic")
    records = host[0]
    first = next(
        n for n, r in enumerate(records) if r[1] == Event.HRTIMER_EXPIRE_ENTRY and r[4] == 0
    )
    verdicts = [verdict for verdict, _, _ in judged(host, records[first:]).values()]
    assert verdicts == ["unknown", "delivered", "delivered"]


@pytest.mark.parametrize(
    ("event", "why"),
    [
        (Event.HRTIMER_START, "hrtimer_start was not recorded"),
        (Event.WORK_START, "sched_kthread_work_execute_start was not recorded"),
        (Event.KVM_SET_IRQ, "kvm_set_irq was not recorded"),
        (Event.KVM_ACK_IRQ, "kvm_ack_irq was not recorded"),
        (Event.KVM_EOI, "there is no kvm_inj_virq, and kvm_eoi was not recorded"),
    ],
)
def test_the_reason_names_the_missing_event(event: Event, why: str) -> None:
    part = dropped_each(recorded_host("tick-pic"))[event]
    assert {(verdict, detail) for verdict, _, detail in part.values()} == {("unknown", why)}


def test_hops_are_measured_where_no_verdict_can_be_given() -> None:
    records, tasks, info = recorded_host("tick-pic")
    without = [record for record in records if record[1] != Event.KVM_IOAPIC_SET_IRQ]
    events = ALL_EVENTS - {Event.KVM_IOAPIC_SET_IRQ}
    host = HostTicks(RecordsTrace(without, tasks, [info], events))
    host.read()
    (report,) = host.vms[0].assembler.reports()
    assert report.count("unknown") == 3
    assert report.latency_ns["accept_to_inject"]["max"] > 0


# What a simulated run would have left in a kernel's buffer.


@pytest.mark.parametrize("name", SIMULATED)
def test_a_host_s_records_of_a_run_give_what_the_run_says(name: str) -> None:
    host, whole = simulated_host(name)
    part = judged(host, host[0])
    assert part.keys() == whole.keys()
    assert contradictions(whole, part) == []
    assert sum(verdict == "unknown" for verdict, _, _ in part.values()) <= 2


@pytest.mark.parametrize("name", SIMULATED)
def test_a_run_cut_anywhere(name: str) -> None:
    host, whole = simulated_host(name)
    records = host[0]
    for start in range(0, len(records), 37):
        assert contradictions(whole, judged(host, records[start:])) == [], start
        part = [*records[:start], gap(records[start], 5), *records[start + 5 :]]
        assert contradictions(whole, judged(host, part)) == [], start


@pytest.mark.parametrize("name", SIMULATED)
def test_a_run_without_a_class_of_events(name: str) -> None:
    host, whole = simulated_host(name)
    for event, part in dropped_each(host).items():
        assert contradictions(whole, part) == [], event


# Several VMs.


def moved(host: Host, number: int) -> Host:
    """The same as another VM's: other threads, timers and work items."""
    records, tasks, info = host
    base, far = 1000 * number, number << 40
    of_timers = {int(e) for e in (Event.HRTIMER_START, Event.HRTIMER_EXPIRE_ENTRY)}
    of_works = {int(e) for e in (Event.WORK_QUEUE, Event.WORK_START, Event.WORK_END)}
    start_ns = records[0][0]
    out = []
    for record in records:
        ts_ns, event, task, *fields = record
        fields = list(fields)
        if event in of_timers | of_works:
            fields[0] ^= far
        if event in of_timers:
            fields[2] -= start_ns
        out.append((ts_ns - start_ns, event, task + base, *fields))
    names = [
        f"{comm}-{int(tid) + 100_000 * number}"
        for comm, _, tid in (t.rpartition("-") for t in tasks)
    ]
    threads = {tid + 100_000 * number: comm for tid, comm in info.threads.items()}
    return out, names, VmInfo(info.pid + 100_000 * number, info.name, threads)


def side_by_side(hosts: list[Host]) -> RecordsTrace:
    """All VMs in one trace."""
    tasks: list[str] = []
    for number, (_, names, _) in enumerate(hosts, 1):
        tasks += [f"other-{90_000 + n}" for n in range(len(tasks), 1000 * number)]
        tasks += names
    records = sorted(record for host in hosts for record in host[0])
    return RecordsTrace(records, tasks, [info for _, _, info in hosts])


NAMES = ["tick-pic", "tick-lapic", "tick-if0", "tick-ioapic", "nmi-watchdog"]


@pytest.mark.parametrize("batch", [1 << 20, 50])
def test_vms_side_by_side_are_judged_as_each_alone(batch: int) -> None:
    hosts = [moved(recorded_host(name), number) for number, name in enumerate(NAMES, 1)]
    trace = side_by_side(hosts)
    trace.batch = batch
    alone: dict[Key, Told] = {}
    for host in hosts:
        alone |= told(side_by_side([*[([], [], h[2]) for h in hosts[: hosts.index(host)]], host]))
    together = told(trace)
    assert together == alone
    assert len(together) == sum(EXPIRED.get(name, 3) for name in NAMES)


def test_lives_are_handed_out_once_in_order_and_few_are_kept() -> None:
    (records, tasks, info), whole = simulated_host("tick-if0")
    handed: list[int] = []
    most = 0

    def on_lives(vm: VmTicks, source: Source, lives: list[Tick]) -> None:
        nonlocal most
        most = max(most, source.kept)
        handed.extend(tick.index for tick in lives)

    host = HostTicks(RecordsTrace(records, tasks, [info], batch=40), keep=3, on_lives=on_lives)
    host._first = None
    host.read()
    assert handed == list(range(1, len(whole) + 1))
    assert most <= 3


# Texts say nothing of processes.


def text(*hosts: Host) -> HostTicks:
    trace = side_by_side(list(hosts))
    trace.vms = []
    trace.events = frozenset()
    host = HostTicks(trace)
    trace.events = ALL_EVENTS
    host.read()
    return host


def counts(host: HostTicks) -> Counter[tuple[str, str]]:
    return Counter(
        (source.name, tick.verdict.value)
        for vm in host.vms
        for source in vm.assembler.sources()
        for tick in source.lives
    )


def test_a_text_of_one_guest_is_one_vm() -> None:
    host = text(moved(recorded_host("tick-pic"), 1))
    assert len(host.vms) == 1
    assert counts(host) == {("pit", "delivered"): 3}


def test_threads_of_the_same_vcpu_are_different_vms() -> None:
    host = text(moved(recorded_host("tick-pic"), 1), moved(recorded_host("tick-if0"), 2))
    assert len(host.vms) == 2
    assert counts(host) == {("pit", "delivered"): 8, ("pit", "late"): 1, ("pit", "reinjected"): 3}


# Local APIC timers, by hand.

APIC, MS = int(Function.APIC_TIMER_FN), 1_000_000
CREATED = (0, int(Event.KVM_APICV_INHIBIT_CHANGED), 1, int(ApicvInhibitReason.ABSENT), 1, 4)


def timer_ticks(vcpu: int, task: int, timer: int, times: range, *middle: Event) -> list[Record]:
    """Undisturbed ticks of a periodic timer, in the idle thread's interrupts; `middle`: between
    acceptance and EOI.
    """
    fields = {
        Event.KVM_INJ_VIRQ: (0x41, 0, 0),
        Event.KVM_APICV_ACCEPT_IRQ: (vcpu, 0, 0, 0x41),
    }
    records = []
    for at in times:
        seen = at + 20_000
        records += [
            (at, int(Event.HRTIMER_EXPIRE_ENTRY), IRQ_CONTEXT, timer, APIC, at),
            (at + 1, int(Event.HRTIMER_START), IRQ_CONTEXT, timer, APIC, at + times.step, 0),
            (seen, int(Event.KVM_APIC_ACCEPT_IRQ), task, vcpu, 0, 0, 0x41),
            *[(seen + 1, int(event), task, *fields[event]) for event in middle],
            (seen + 2, int(Event.KVM_EOI), task, vcpu, 0x41),
        ]
    return records


def armed(task: int, timer: int, expires_ns: int) -> Record:
    """The guest arms its timer."""
    return (1, int(Event.HRTIMER_START), task, timer, APIC, expires_ns, 0)


def host_of(records: list[Record], created: bool = True) -> HostTicks:
    """Of one VM with two vCPUs."""
    tasks = ["<idle>-0", "CPU 0/KVM-11", "CPU 1/KVM-12"]
    info = VmInfo(10, "two", {11: "CPU 0/KVM", 12: "CPU 1/KVM"})
    records = [*[CREATED] * created, *sorted(records)]
    host = HostTicks(RecordsTrace(records, tasks, [info]))
    host.read()
    return host


def test_which_vcpu_a_timer_armed_before_belongs_to_shows_when_they_fall_out_of_step() -> None:
    first = timer_ticks(0, 1, 0x50, range(MS, 20 * MS, MS), Event.KVM_INJ_VIRQ)
    other = timer_ticks(1, 2, 0x60, range(MS + 300_000, 20 * MS, 3 * MS), Event.KVM_INJ_VIRQ)
    host = host_of([*first, *other], created=False)
    found = {s.vcpu: s.count(Verdict.DELIVERED) for s in host.vms[0].assembler.sources()}
    assert found == {0: 18, 1: 6}


def test_timers_in_step_are_not_told_apart() -> None:
    first = timer_ticks(0, 1, 0x50, range(MS, 20 * MS, MS), Event.KVM_INJ_VIRQ)
    other = timer_ticks(1, 2, 0x60, range(MS + 300_000, 20 * MS, MS), Event.KVM_INJ_VIRQ)
    host = host_of([*first, *other], created=False)
    assert not counts(host) or {verdict for _, verdict in counts(host)} == {"unknown"}


@pytest.mark.parametrize("has_eoi", [True, False])
def test_what_went_to_the_hardware_is_proven_by_its_eoi_alone(has_eoi: bool) -> None:
    times = range(2 * MS, 12 * MS, 2 * MS)
    posted = timer_ticks(0, 1, 0x50, times, Event.KVM_APICV_ACCEPT_IRQ)
    if not has_eoi:
        posted = [record for record in posted if record[1] != Event.KVM_EOI]
    somebody_else = (0, int(Event.KVM_INJ_VIRQ), 2, 0x99, 0, 0)
    host = host_of([somebody_else, armed(1, 0x50, 2 * MS), *posted])
    (source,) = host.vms[0].assembler.sources()
    assert source.count(Verdict.DELIVERED if has_eoi else Verdict.UNKNOWN) == 5
    if not has_eoi:
        why = "posted to the hardware (APICv): no event tells of its injection"
        assert {tick.detail for tick in source.lives} == {why}


def test_interrupts_without_an_expiry_are_no_ticks_and_are_noted() -> None:
    ticks = timer_ticks(0, 1, 0x50, range(MS, 6 * MS, MS), Event.KVM_INJ_VIRQ)
    preempted = [
        record
        for record in timer_ticks(0, 1, 0x50, range(7 * MS, 10 * MS, MS), Event.KVM_INJ_VIRQ)
        if record[1] not in (Event.HRTIMER_EXPIRE_ENTRY, Event.HRTIMER_START)
    ]
    host = host_of([armed(1, 0x50, MS), *ticks, *preempted])
    (source,) = host.vms[0].assembler.sources()
    assert (source.expired, source.count(Verdict.DELIVERED), source.extra) == (5, 5, 3)
    assert any("3 timer interrupts came without an expiry" in n for n in host.vms[0].notes)


def test_which_vcpu_a_thread_runs_may_show_after_it_armed_its_timer() -> None:
    ticks = timer_ticks(0, 1, 0x50, range(2 * MS, 8 * MS, MS), Event.KVM_INJ_VIRQ)
    info = VmInfo(10, "", {11: "vmm"})
    records = [CREATED, armed(1, 0x50, 2 * MS), *ticks]
    host = HostTicks(RecordsTrace(records, ["<idle>-0", "vmm-11"], [info], batch=2))
    host._first = None
    host.read()
    (source,) = host.vms[0].assembler.sources()
    assert source.vcpu == 0
    assert source.count(Verdict.DELIVERED) >= 4


# Undisturbed ticks are taken in one step.


@pytest.mark.parametrize("name", [*GUESTS, *SIMULATED])
def test_a_batch_of_a_host_s_records_and_one_by_one(name: str) -> None:
    records, tasks, info = simulated_host(name)[0] if name in SIMULATED else recorded_host(name)
    found = []
    for size in (1 << 20, 1):
        host = HostTicks(RecordsTrace(records, tasks, [info]))
        by_one: list[Record] = []

        def on_records(_: VmTicks, own: list[Record], into: list[Record] = by_one) -> None:
            into.extend(own)

        host = HostTicks(RecordsTrace(records, tasks, [info]), on_records=on_records)
        host.read()
        vm = host.vms[0]
        again = TickAssembler(tasks=tasks, vcpus=vm.share.vcpus)
        again.begin_in_the_middle(info.reinject)
        for start in range(0, len(by_one), size):
            again(by_one[start : start + size])
        found.append(all_facts(again))
    assert found[0] == found[1]
