"""Verdicts of the local APICs' timers, from streams written by hand."""

import pytest
from apic_stream import (
    APIC_FN,
    APIC_TIMER,
    FIXED,
    INIT,
    LVTT,
    SPIV,
    TIMER_VECTOR,
    VECTOR,
    ApicStream,
)
from stream import PERIOD_NS

from kvmtick.ticks.verdict import Path, Verdict, Where

DELIVERED, LATE, MASKED = Verdict.DELIVERED, Verdict.LATE, Verdict.MASKED
COALESCED, DROPPED, OUTSTANDING = Verdict.COALESCED, Verdict.DROPPED, Verdict.OUTSTANDING
MS = PERIOD_NS
LVT_MASKED = 1 << 16


def armed(vcpu: int = 0, **keywords: int) -> ApicStream:
    s = ApicStream(**keywords)
    s.arm(vcpu=vcpu)
    return s


def live(s: ApicStream, vcpu: int = 0, ticks: int = 1) -> None:
    """Ticks that are taken at once."""
    for _ in range(ticks):
        at = s.timers_ns[vcpu]
        s.fire(vcpu)
        s.serve(at + 5, vcpu)
        s.inject(at + 6, TIMER_VECTOR, vcpu)
        s.eoi(at + 9, TIMER_VECTOR, vcpu)


def test_a_tick_has_its_times_and_two_hops_to_the_vcpu() -> None:
    s = armed(vcpu=1)
    tick = s.fire(1)
    s.serve(MS + 20, 1)
    s.inject(MS + 50, TIMER_VECTOR, 1)
    s.eoi(MS + 70, TIMER_VECTOR, 1)
    (report,) = s.reports()
    assert (report.source, report.vcpu, report.path) == ("lapic", 1, "lapic")
    assert (tick.verdict, tick.path, tick.vcpu) == (DELIVERED, Path.LAPIC, 1)
    assert (tick.expiry_ns, tick.period_ns, tick.vector) == (MS, MS, TIMER_VECTOR)
    assert (tick.work_ns, tick.accept_ns, tick.inject_ns, tick.eoi_ns) == (
        MS + 20,
        MS + 20,
        MS + 50,
        MS + 70,
    )
    assert {hop: values.get("max") for hop, values in report.latency_ns.items()} == {
        "expiry_to_work": 20,
        "work_to_accept": None,
        "accept_to_inject": 30,
        "inject_to_eoi": 20,
        "expiry_to_eoi": 70,
    }


def test_a_timer_that_user_space_started_ticks_though_an_eoi_came_before() -> None:
    # KVM_SET_LAPIC of a moved VM, with the vector requested already
    s = ApicStream()
    s.timers_ns[0] = MS
    s.recorder.task = s.vmm
    s.recorder.hrtimer_start(APIC_TIMER, APIC_FN, MS, False)
    s.inject(1, TIMER_VECTOR)
    s.eoi(2, TIMER_VECTOR)
    live(s, ticks=3)
    (report,) = s.reports()
    assert (report.expired, report.count(DELIVERED)) == (3, 3)


@pytest.mark.parametrize(("after_ns", "verdict"), [(MS - 1, DELIVERED), (MS, LATE)])
def test_a_period_after_the_expiry_is_late(after_ns: int, verdict: Verdict) -> None:
    s = armed()
    tick = s.fire()
    s.serve(MS)
    s.inject(MS + after_ns, TIMER_VECTOR)
    s.report()
    assert tick.verdict is verdict


def test_a_one_shot_or_deadline_tick_is_never_late() -> None:
    s = armed()
    tick = s.fire(restarts=False)
    s.serve(7 * MS)
    s.inject(9 * MS, TIMER_VECTOR)
    s.arm(9 * MS + 1)
    s.eoi(9 * MS + 2, TIMER_VECTOR)
    s.report()
    assert (tick.verdict, tick.period_ns) == (DELIVERED, None)


def test_expiries_before_the_vcpu_looks_are_one_interrupt() -> None:
    s = armed()
    live(s)
    ticks = [s.fire() for _ in range(4)]
    s.serve(5 * MS + 1)
    s.inject(5 * MS + 1, TIMER_VECTOR)
    report = s.report()
    assert ticks[0].verdict is LATE
    assert [(tick.verdict, tick.where) for tick in ticks[1:]] == [(COALESCED, Where.LAPIC)] * 3
    assert report.extra == 0


def test_an_interrupt_that_waits_takes_the_next_one_in() -> None:
    s = armed()
    first, second = s.fire(), None
    s.serve(MS)
    second = s.fire()
    s.serve(2 * MS)
    s.inject(2 * MS + 5, TIMER_VECTOR)
    s.report()
    assert first.verdict is LATE
    assert (second.verdict, second.where) == (COALESCED, Where.LAPIC)
    assert "injected since" in second.detail


def test_an_entry_that_was_never_open_masks_every_tick() -> None:
    s = armed()
    ticks = [s.fire() for _ in range(3)]
    report = s.report()
    assert [(tick.verdict, tick.where) for tick in ticks] == [(MASKED, Where.LAPIC)] * 3
    assert report.count(OUTSTANDING) == 0


def test_a_guest_that_runs_on_without_the_interrupt_has_masked_the_entry() -> None:
    s = armed()
    s.assembler.judge_by("", "", sees_masks=False)
    live(s)
    waits = s.fire()
    s.write(0x80, 1, at=2 * MS + 10)
    masked = s.fire()
    s.report()
    assert masked.verdict is MASKED
    assert waits.verdict is MASKED


@pytest.mark.parametrize("how", ["lvtt", "spiv"])
def test_an_entry_that_the_trace_shows_masked(how: str) -> None:
    s = armed()
    live(s)
    if how == "lvtt":
        s.on(0, MS + 50).kvm_apic(1, LVTT, LVT_MASKED | TIMER_VECTOR)
    else:
        s.on(0, MS + 50).kvm_apic(1, SPIV, 0xFF)
    ticks = [s.fire(), s.fire()]
    s.report()
    assert [tick.verdict for tick in ticks] == [MASKED, MASKED]


def test_an_open_entry_of_a_vcpu_that_is_away_coalesces() -> None:
    s = armed()
    s.on(0, 5).kvm_apic(1, LVTT, TIMER_VECTOR)
    ticks = [s.fire(), s.fire()]
    s.report()
    assert [tick.verdict for tick in ticks] == [OUTSTANDING, COALESCED]


def test_reads_and_other_registers_say_nothing() -> None:
    s = armed()
    live(s)
    s.on(0, MS + 50).kvm_apic(0, LVTT, LVT_MASKED)
    s.recorder.kvm_apic(1, 0x350, LVT_MASKED)
    s.recorder.kvm_apic(1, SPIV, 0x1FF)
    s.recorder.task = s.vmm
    s.recorder.kvm_apic(1, LVTT, LVT_MASKED)
    ticks = [s.fire(), s.fire()]
    s.report()
    assert [tick.verdict for tick in ticks] == [OUTSTANDING, COALESCED]


def test_that_a_first_expiry_was_only_late_shows_with_its_delivery() -> None:
    s = armed()
    ticks = [s.fire() for _ in range(3)]
    s.serve(3 * MS + 10)
    s.inject(3 * MS + 11, TIMER_VECTOR)
    s.eoi(3 * MS + 12, TIMER_VECTOR)
    live(s)
    report = s.report()
    assert [tick.verdict for tick in ticks] == [LATE, COALESCED, COALESCED]
    assert (report.count(COALESCED), report.count(MASKED), report.count(DELIVERED)) == (2, 0, 1)


def test_the_expiry_that_waited_behind_a_mask_comes_with_the_unmasking() -> None:
    s = armed()
    s.on(0, 5).kvm_apic(1, LVTT, LVT_MASKED | TIMER_VECTOR)
    waits, merged = s.fire(), s.fire()
    s.report()
    assert waits.verdict is MASKED, "as far as could be said then"
    s.on(0, 2 * MS + 9).kvm_apic(1, LVTT, TIMER_VECTOR)
    s.serve(2 * MS + 10)
    s.inject(2 * MS + 10, TIMER_VECTOR)
    report = s.report()
    assert (waits.verdict, waits.where, waits.detail) == (LATE, None, "")
    assert merged.verdict is MASKED
    assert report.count(MASKED) == 1


def test_programming_anew_forgets_the_expiry_that_waits() -> None:
    s = armed()
    live(s)
    lost = s.fire()
    s.arm(2 * MS + 7)
    live(s)
    report = s.report()
    assert (lost.verdict, lost.where) == (DROPPED, Where.LAPIC)
    assert (report.count(DELIVERED), report.extra) == (2, 0)


def test_programming_anew_with_a_masked_entry_is_masked() -> None:
    s = armed()
    s.on(0, 5).kvm_apic(1, LVTT, LVT_MASKED)
    masked = s.fire()
    s.arm(MS + 7)
    s.report()
    assert masked.verdict is MASKED


def test_a_timer_that_follows_its_vcpu_forgets_nothing() -> None:
    s = armed()
    live(s)
    tick = s.fire()
    recorder = s.on(0, 2 * MS + 3)
    recorder.hrtimer_cancel(APIC_TIMER)
    recorder.hrtimer_start(APIC_TIMER, APIC_FN, s.timers_ns[0], False)
    s.serve(2 * MS + 4)
    s.inject(2 * MS + 5, TIMER_VECTOR)
    s.report()
    assert (tick.verdict, tick.period_ns) == (DELIVERED, MS)


def test_an_init_drops_what_waits() -> None:
    s = armed(vcpu=1)
    live(s, 1)
    waits = s.fire(1)
    s.ipi(2 * MS + 5, 0, 0, 1, mode=INIT)
    s.report()
    assert (waits.verdict, waits.where) == (DROPPED, Where.LAPIC)


# --- whose it is --------------------------------------------------------------------------------


def test_every_vcpu_has_its_own_source() -> None:
    s = ApicStream(vcpus=3)
    for vcpu in (2, 0):
        s.arm(vcpu=vcpu)
    live(s, 2, ticks=3)
    live(s, 0, ticks=2)
    reports = s.reports()
    assert [(r.source, r.vcpu, r.expired) for r in reports] == [("lapic", 0, 2), ("lapic", 2, 3)]
    assert s.assembler.report().vcpu == 2, "the main one is that which expired most"
    assert (s.assembler.expired, s.assembler.reached, s.assembler.main.name) == (3, 3, "lapic")


def test_the_main_source_is_the_one_of_which_most_ticks_came() -> None:
    """Not a PIT that a guest used while it booted, nor one that ticks unheard."""
    s = armed()
    live(s, ticks=5)
    s.program(5 * MS + 20)
    for _ in range(6):
        s.expire()
    reports = s.reports()
    assert [(report.source, report.expired) for report in reports] == [("pit", 6), ("lapic", 5)]
    assert s.assembler.report().source == "lapic"


def test_the_pit_is_reported_where_nothing_expired() -> None:
    s = armed()
    (report,) = s.reports()
    assert (report.source, report.vcpu, report.path, report.expired) == ("pit", 0, "pic", 0)


def test_a_timer_that_user_space_started_is_known_by_its_delivery() -> None:
    s = ApicStream()
    s.recorder.task = s.vmm
    s.timers_ns[1] = MS
    s.recorder.hrtimer_start(APIC_TIMER + 1, APIC_FN, MS, False)
    tick = s.fire(1)
    s.serve(MS + 5, 1)
    s.inject(MS + 6, TIMER_VECTOR, 1)
    (report,) = s.reports()
    assert (report.vcpu, tick.verdict, tick.vcpu) == (1, DELIVERED, 1)


def test_without_names_of_tasks_the_delivery_tells_whose_timer_it_is() -> None:
    s = ApicStream()
    s.assembler._tasks = []
    s.assembler._timers._has_names = False
    s.arm(vcpu=1)
    live(s, 1)
    (report,) = s.reports()
    assert (report.vcpu, report.count(DELIVERED)) == (1, 1)


# --- what is not the timer's --------------------------------------------------------------------


def waiting_behind_a_mask() -> ApicStream:
    """Vector known, an expiry waits, the guest runs."""
    s = armed()
    live(s)
    s.fire()
    return s


def test_a_self_ipi_is_not_the_timers() -> None:
    s = waiting_behind_a_mask()
    s.ipi(2 * MS + 5, 0, 0x61, 0)
    s.inject(2 * MS + 6, 0x61)
    assert s.assembler._timers._timers[APIC_TIMER].waiting is not None


def test_a_self_ipi_with_the_timers_vector_reaches_the_local_apic_once() -> None:
    s = waiting_behind_a_mask()
    s.ipi(2 * MS + 5, 0, TIMER_VECTOR, 0)
    assert s.report()[2].work_ns is None
    s.serve(2 * MS + 6)
    s.report()
    assert s.report()[2].verdict is COALESCED, "the IPI was there before"


def test_a_message_from_another_task_is_not_the_timers() -> None:
    s = waiting_behind_a_mask()
    s.ipi(2 * MS + 5, 1, TIMER_VECTOR, 0)
    s.recorder.task = s.vmm
    s.msi(0, vector=0x62)
    s.recorder.flush()
    assert s.assembler._timers._timers[APIC_TIMER].waiting is not None


@pytest.mark.parametrize("by", ["line", "msi", "eoi"])
def test_what_a_vcpus_exit_makes_devices_send_is_not_the_timers(by: str) -> None:
    s = waiting_behind_a_mask()
    recorder = s.on(0, 2 * MS + 5)
    if by == "line":
        recorder.kvm_set_irq(5, 1, 0)
        s.accept(0, VECTOR)
        recorder.kvm_ioapic_set_irq(VECTOR, 5, False)
        recorder.kvm_set_irq(5, 0, 0)
    elif by == "msi":
        s.msi(0, vector=VECTOR)
    else:
        recorder.kvm_eoi(0, VECTOR)
        recorder.kvm_apic_accept_irq(0, 0, 1, VECTOR)
    recorder.flush()
    timer = s.assembler._timers._timers[APIC_TIMER]
    assert timer.waiting is not None
    s.serve(2 * MS + 7)
    recorder.flush()
    assert timer.waiting is None


def test_a_level_line_or_another_mode_is_not_the_timers() -> None:
    s = waiting_behind_a_mask()
    recorder = s.on(0, 2 * MS + 5)
    recorder.kvm_apic_accept_irq(0, FIXED, 1, TIMER_VECTOR)
    recorder.kvm_apic_accept_irq(0, 0x400, 0, TIMER_VECTOR)
    recorder.flush()
    assert s.assembler._timers._timers[APIC_TIMER].waiting is not None


def test_a_deadline_that_had_passed_has_no_expiry_and_is_extra() -> None:
    s = armed()
    live(s)
    s.serve(MS + 50)
    s.inject(MS + 51, TIMER_VECTOR)
    report = s.report()
    assert (report.expired, report.extra) == (1, 1)


def test_a_pit_tick_on_the_timers_vector_is_merged_with_it() -> None:
    s = armed()
    s.program()
    timer_tick = s.fire()
    s.serve(MS)
    tick = s.expire()
    s.work()
    s.msi(0, vector=TIMER_VECTOR)
    s.inject(MS + 5, TIMER_VECTOR)
    s.reports()
    assert timer_tick.verdict is DELIVERED
    assert (tick.verdict, tick.where) == (COALESCED, Where.LAPIC)
