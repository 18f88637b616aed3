"""Findings: what brings each about, what it says, and what must not bring it about."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from traces import MadeTrace, ends_work, halts, kinds, made, report_of, switch, the, with_switches

from kvmtick.report.build import build
from kvmtick.report.data import Severity
from kvmtick.ticks.verdict import Where
from kvmtick.trace.events import Event, Record
from kvmtick.trace.reading import open_trace
from kvmtick.trace.vms import VmInfo

IF0 = ("tick-if0", "--ticks", "100", "--hold", "5ms")
MASK = ("tick-mask", "--ticks", "100", "--hold", "50ms")
LATE_WORKER = ("tick-pic", "--ticks", "400", "--fault", "worker_delay=2%:3ms")
LATE_VCPU = ("tick-pic", "--ticks", "400", "--fault", "vcpu_off=2%:3ms")
AVIC = "reinject-inhibits-avic"


def without(trace: MadeTrace, *events: Event) -> MadeTrace:
    """The same trace, where these were not recorded."""
    trace.records = [record for record in trace.records if record[1] not in events]
    trace.without |= frozenset(events)
    return trace


def test_a_healthy_guest_has_one_good_finding(tmp_path: Path) -> None:
    report = report_of(tmp_path, "tick-pic", "--ticks", "100", "--no-reinject")
    assert kinds(report) == {"healthy"}
    good = the(report, "healthy")
    assert good.severity is Severity.GOOD
    assert good.text.startswith("100 of 100 ticks of the PIT reached the guest within their period")


@pytest.mark.parametrize("guest", ["tick-ioapic", "tick-lapic", "nmi-watchdog", "tick-oneshot"])
def test_every_way_is_healthy(tmp_path: Path, guest: str) -> None:
    report = report_of(tmp_path, guest, "--ticks", "100")
    assert kinds(report) - {AVIC} == {"healthy"}


# What the guest does.


def test_interrupts_off_with_reinjection(tmp_path: Path) -> None:
    report = report_of(tmp_path, *IF0)
    off = the(report, "interrupts-off")
    assert off.severity is Severity.PROBLEM
    assert off.ticks == 5
    assert "did not take them for up to 4 ms" in off.text
    replayed = the(report, "replayed")
    assert replayed.ticks == 4
    assert "in 1 burst; the longest had 4" in replayed.text
    assert "tickpolicy='discard'" in replayed.remedy
    assert kinds(report) == {"interrupts-off", "replayed", AVIC}


def test_interrupts_off_without_reinjection(tmp_path: Path) -> None:
    report = report_of(tmp_path, *IF0, "--no-reinject")
    lost = the(report, "coalesced")
    assert lost.ticks == 4
    assert "4 while the PIC's request was still set; up to 4 in a row" in lost.text
    assert "tickpolicy='delay'" in lost.remedy
    drift = the(report, "drift")
    assert "-38,462 ppm" in drift.text
    assert "1193182 Hz" in drift.text
    assert kinds(report) == {"interrupts-off", "coalesced", "drift"}


def test_ticks_that_merge_in_the_pic_are_held_up_by_the_one_before_them(tmp_path: Path) -> None:
    """Others that merged at the worker stand between: those have a cause of their own."""
    late = ("--hold", "30ms", "--no-reinject", "--fault", "worker_delay=20%:1500us")
    report = report_of(tmp_path, "tick-if0", "--ticks", "100", *late)
    lives = report.vms[0].sources[0].points
    holder = report.vms[0].sources[0].worst[0].tick
    assert holder.inject_ns is not None
    behind = [tick for tick in lives if holder.expiry_ns < tick.expiry_ns < holder.inject_ns]
    pic = [tick.index for tick in behind if tick.where is Where.PIC]
    worker = [tick.index for tick in behind if tick.where is Where.WORKER]
    assert any(index - 1 in worker for index in pic)
    assert len(pic) + len(worker) == len(behind)
    assert the(report, "interrupts-off").ticks == 1 + len(pic)


def test_a_request_that_stood_before_the_trace_began(tmp_path: Path) -> None:
    """Nobody knows whose it is, but it is not the worker that held up those behind it."""
    late = ("--hold", "60ms", "--no-reinject", "--fault", "worker_delay=20%:1500us")
    trace = made(tmp_path, "tick-if0", "--ticks", "100", *late)
    trace.records = [record for record in trace.records if record[0] > 10_100_000]
    report = trace.report()
    (source,) = report.vms[0].sources
    disturbed = [tick for tick in source.points if tick.verdict != "delivered"]
    pic = [tick for tick in disturbed if tick.where is Where.PIC]
    worker = [tick for tick in disturbed if tick.where is Where.WORKER]
    assert any(tick.expiry_ns < 60_000_000 for tick in worker)
    assert len(pic) - 2 <= the(report, "interrupts-off").ticks <= len(pic)
    assert the(report, "worker-late-unexplained").ticks == len(disturbed) - len(pic)
    assert "vcpu-out" not in kinds(report)


def test_without_evidence_no_cause(tmp_path: Path) -> None:
    trace = without(made(tmp_path, *IF0), Event.KVM_ENTRY, Event.KVM_EXIT)
    report = trace.report()
    assert "interrupts-off" not in kinds(report)
    assert "the trace cannot tell which" in the(report, "not-taken").text
    assert "kvm_entry" in the(report, "not-taken").remedy


def test_the_thread_had_a_cpu(tmp_path: Path) -> None:
    """All its switches are known, and none is where the tick waits."""
    trace = without(made(tmp_path, *IF0), Event.KVM_ENTRY, Event.KVM_EXIT)
    vcpu = trace.tid("CPU 0")
    trace.records[1:1] = [switch(1, vcpu, 0, 0), switch(2, 0, 0, vcpu)]
    report = trace.report()
    assert (
        "though its vCPU's thread CPU 0/KVM-1002 had a CPU" in the(report, "not-taken-on-cpu").text
    )
    assert "not-taken" not in kinds(report)


def test_masked_with_reinjection(tmp_path: Path) -> None:
    """The pending count is thrown away at the unmask; one tick waits latched in the PIC."""
    report = report_of(tmp_path, *MASK)
    assert the(report, "dropped").ticks == 49
    assert "49 ms" in the(report, "masked-in-pic").text
    assert "interrupts-off" not in kinds(report)


def test_masked_without_reinjection(tmp_path: Path) -> None:
    report = report_of(tmp_path, *MASK, "--no-reinject")
    masked = the(report, "masked")
    assert masked.severity is Severity.NOTICE
    assert masked.ticks == 49
    assert "up to 49 in a row, for 47.99 ms from 5 ms on" in masked.text
    assert "drift" not in kinds(report)


@pytest.mark.parametrize("option", ["--reinject", "--no-reinject"])
def test_never_acknowledged(tmp_path: Path, option: str) -> None:
    report = report_of(tmp_path, "tick-noeoi", "--for", "100ms", option)
    never = the(report, "never-acknowledged")
    assert never.severity is Severity.PROBLEM
    assert "took tick 1 of the PIT and never acknowledged it" in never.text
    assert never.ticks == 99
    assert not {"stopped", "not-taken-at-the-end"} & kinds(report)


def test_an_nmi_that_nobody_acknowledges(tmp_path: Path) -> None:
    """With reinjection one comes, and KVM holds back all behind it."""
    report = report_of(tmp_path, "nmi-watchdog", "--ticks", "100", "--no-ack", "--for", "100ms")
    never = the(report, "never-acknowledged")
    assert never.ticks == 99
    assert "poll the PIC" in never.remedy
    assert the(report, "drift").ticks == 99
    assert not {"healthy", "stopped"} & kinds(report)


def test_nmis_without_reinjection_need_no_acknowledgement(tmp_path: Path) -> None:
    report = report_of(tmp_path, "nmi-watchdog", "--ticks", "50", "--no-ack", "--no-reinject")
    assert kinds(report) == {"healthy"}


def test_not_taken_at_the_end(tmp_path: Path) -> None:
    report = report_of(tmp_path, "tick-if0", "--hold", "1s", "--for", "20ms")
    end = the(report, "not-taken-at-the-end")
    assert end.ticks == 17
    assert not {"stopped", "never-acknowledged"} & kinds(report)


def test_a_guest_that_is_gone(tmp_path: Path) -> None:
    trace = made(tmp_path, "tick-pic", "--ticks", "100")
    vcpu = next(i for i, task in enumerate(trace.tasks) if task.startswith("CPU 0"))
    trace.records = [r for r in trace.records if r[0] < 50_100_000 or r[2] != vcpu]
    report = trace.report()
    stopped = the(report, "stopped")
    assert stopped.severity is Severity.NOTICE
    assert stopped.ticks == 50
    assert "nothing was seen of the guest after 49.9" in stopped.text
    assert not {"coalesced", "drift", "replayed"} & kinds(report)
    assert the(report, "healthy").text.startswith("50 of 50 ticks of the PIT")


def test_a_clock_does_not_miss_the_ticks_of_a_guest_that_is_gone(tmp_path: Path) -> None:
    trace = made(tmp_path, *IF0, "--no-reinject")
    vcpu = next(i for i, task in enumerate(trace.tasks) if task.startswith("CPU 0"))
    trace.records = [r for r in trace.records if r[0] < 50_100_000 or r[2] != vcpu]
    report = trace.report()
    assert the(report, "stopped").ticks == 54
    assert the(report, "drift").ticks == 4


def test_a_guest_that_was_hardly_there_is_not_called_healthy(tmp_path: Path) -> None:
    trace = made(tmp_path, "tick-pic", "--ticks", "100")
    vcpu = next(i for i, task in enumerate(trace.tasks) if task.startswith("CPU 0"))
    trace.records = [r for r in trace.records if r[0] < 20_100_000 or r[2] != vcpu]
    report = trace.report()
    assert the(report, "stopped").ticks == 80
    assert "healthy" not in kinds(report)


def test_a_rate_beyond_the_limit(tmp_path: Path) -> None:
    report = report_of(tmp_path, "tick-pic", "--ticks", "100", "--hz", "20000")
    assert "asked for more than 5,000 ticks a second" in the(report, "clamped").text
    assert the(report, "flood").ticks == 100
    assert report.vms[0].sources[0].drift_ppm is None


def test_reinjection_keeps_avic_off(tmp_path: Path) -> None:
    assert AVIC in kinds(report_of(tmp_path, "tick-pic", "--ticks", "20"))
    assert AVIC not in kinds(report_of(tmp_path, "tick-pic", "--ticks", "20", "--no-reinject"))


def test_avic_that_is_off_anyway(tmp_path: Path) -> None:
    trace = made(tmp_path, "tick-pic", "--ticks", "20")
    trace.records = [
        (*r[:5], r[5] | 1) if r[1] == Event.KVM_APICV_INHIBIT_CHANGED else r for r in trace.records
    ]
    assert AVIC not in kinds(trace.report())


# What the host does.


def test_a_late_timer(tmp_path: Path) -> None:
    report = report_of(tmp_path, "tick-pic", "--ticks", "400", "--fault", "late_expiry=2%:3ms")
    late = the(report, "timer-late")
    assert "fired up to 3 ms late" in late.text
    assert "--fault" in late.remedy
    assert not {"worker-late", "worker-late-unexplained", "vcpu-out"} & kinds(report)


def test_a_late_worker_that_nothing_explains(tmp_path: Path) -> None:
    report = made(tmp_path, *LATE_WORKER).report()
    late = the(report, "worker-late-unexplained")
    assert "up to 3 ms" in late.text
    assert "the trace cannot tell" in late.text
    assert "worker-late" not in kinds(report)


def test_a_worker_that_waited_for_a_cpu(tmp_path: Path) -> None:
    trace = made(tmp_path, *LATE_WORKER)
    with_switches(trace, "kvm-pit/", ends_work)
    report = trace.report()
    late = the(report, "worker-late")
    assert late.severity is Severity.PROBLEM
    assert "kvm-pit/1000-1001 waited up to 3 ms for CPU 5, where burner-77 ran" in late.text
    assert "taskset -p -c CPUS 1001" in late.remedy
    assert "worker-late-unexplained" not in kinds(report)
    worst = report.vms[0].sources[0].worst[0]
    assert worst.held_up == "kvm-pit/1000-1001 waited 3 ms for CPU 5, where burner-77 ran"


def test_switches_that_are_missing_explain_nothing(tmp_path: Path) -> None:
    """Every second switch to the worker was not recorded: what is there may mean anything."""
    trace = made(tmp_path, *LATE_WORKER)
    with_switches(trace, "kvm-pit/", ends_work)
    gets = [r for r in trace.records if r[1] == Event.SCHED_SWITCH and r[5] == 1001]
    missing = set(map(id, gets[::2]))
    trace.records = [record for record in trace.records if id(record) not in missing]
    assert "worker-late" not in kinds(trace.report())


def test_a_vcpu_that_waited_for_a_cpu(tmp_path: Path) -> None:
    trace = made(tmp_path, *LATE_VCPU)
    with_switches(trace, "CPU 0", halts)
    report = trace.report()
    late = the(report, "vcpu-waited")
    assert "CPU 0/KVM-1002 waited up to 3 ms for CPU 5, where burner-77 ran" in late.text
    assert "vcpu-out" not in kinds(report)


def test_a_vcpu_that_slept(tmp_path: Path) -> None:
    """Nobody woke it until it ran."""
    trace = made(tmp_path, *LATE_VCPU)
    with_switches(trace, "CPU 0", halts)
    trace.records = [record for record in trace.records if record[1] != Event.SCHED_WAKING]
    assert "slept up to 3" in the(trace.report(), "vcpu-asleep").text


def test_a_vcpu_that_was_out(tmp_path: Path) -> None:
    report = report_of(tmp_path, *LATE_VCPU)
    assert "did not enter the guest for up to 3 ms" in the(report, "vcpu-out").text
    assert "interrupts-off" not in kinds(report)


def test_one_shot_ticks_have_no_period_to_be_late_by(tmp_path: Path) -> None:
    """Their verdict is `delivered`, however long they took."""
    off = ("--timer", "tsc-deadline", "--fault", "vcpu_off=2%:3ms")
    report = report_of(tmp_path, "tick-lapic", "--ticks", "200", *off)
    (source,) = report.vms[0].sources
    slow = [t for t in source.points if t.inject_ns and t.inject_ns - t.expiry_ns >= 1_000_000]
    assert source.ticks.count("delivered") == source.ticks.expired
    assert the(report, "vcpu-out").ticks == len(slow) > 0
    assert kinds(report) == {"vcpu-out"}


def test_some_entries_prove_nothing(tmp_path: Path) -> None:
    """Where exits are not recorded, entries may be missing as well."""
    trace = without(made(tmp_path, *LATE_VCPU), Event.KVM_EXIT)
    report = trace.report()
    assert "vcpu-out" not in kinds(report)
    assert "not-taken" in kinds(report)


def test_a_local_apic_may_serve_others(tmp_path: Path) -> None:
    trace = made(tmp_path, "tick-lapic", "--ticks", "200", "--fault", "vcpu_off=2%:3ms")

    def enter(record: Record) -> Iterator[Record]:
        yield record
        if record[1] == Event.KVM_APIC_ACCEPT_IRQ:
            yield (record[0] + 1, int(Event.KVM_ENTRY), record[2], 0, 0, 0)

    trace.change(enter)
    lates = [r for r in trace.records if r[1] == Event.KVM_INJ_VIRQ]
    moved = {id(r): r[0] + 1_500_000 for r in lates[::20]}
    trace.change(lambda r: [(moved.get(id(r), r[0]), *r[1:])])
    trace.records.sort(key=lambda record: record[0])
    assert "of a higher priority" in the(trace.report(), "not-taken-in-guest").text


def test_a_few_late_ticks_are_a_notice(tmp_path: Path) -> None:
    report = report_of(
        tmp_path, "tick-pic", "--ticks", "3000", "--fault", "worker_delay=0.05%:1500us"
    )
    assert the(report, "worker-late-unexplained").severity is Severity.NOTICE
    assert "healthy" in kinds(report)


# The trace.


def test_lost_events(tmp_path: Path) -> None:
    trace = made(tmp_path, "tick-pic", "--ticks", "50", "--no-reinject")
    middle = len(trace.records) // 2
    trace.records[middle:middle] = [(trace.records[middle][0], int(Event.LOST_EVENTS), 0, 0, 7)]
    report = trace.report()
    assert report.lost_events == 7
    assert "lost 7 events" in the(report, "lost-events").text


def test_one_tick_that_is_unknown_takes_nobodys_health() -> None:
    """Where a recording begins, one may be under way."""
    path = Path(__file__).parents[2] / "docs" / "recordings" / "interrupts-off.ktrace"
    with contextlib.closing(open_trace(path)) as trace:
        report = build(trace, path)
    (mail,) = [vm for vm in report.vms if vm.name == "mail"]
    assert mail.sources[0].ticks.count("unknown") == 1
    assert the(report, "healthy").pid == mail.pid


def test_verdicts_that_are_unknown(tmp_path: Path) -> None:
    trace = without(made(tmp_path, "tick-pic", "--ticks", "50"), Event.KVM_PIC_SET_IRQ)
    report = trace.report()
    unknown = the(report, "unknown")
    assert unknown.ticks == report.vms[0].sources[0].ticks.count("unknown") > 0
    assert "kvm_pic_set_irq" in unknown.text
    assert "healthy" not in kinds(report)


def test_what_is_wrong_with_the_file(tmp_path: Path) -> None:
    trace = made(tmp_path, "tick-pic", "--ticks", "20")
    assert not {"cut", "unknown-lines"} & kinds(trace.report())
    trace.cut, trace.unknown = "the file ends in the middle: it was cut short", 3
    report = trace.report()
    assert the(report, "cut").text == trace.cut
    assert report.notes == [trace.cut]
    assert the(report, "unknown-lines").text.startswith("3 lines")


def test_a_vm_without_ticks(tmp_path: Path) -> None:
    trace = made(tmp_path, "tick-pic", "--ticks", "20")
    trace.vms.append(VmInfo(4711, "quiet", {4711: "qemu"}))
    report = trace.report()
    assert the(report, "no-ticks").pid == 4711
    assert the(report, "healthy").pid == 1000
