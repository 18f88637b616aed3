"""Verdicts of PIT ticks that take the paths of the local APICs, from streams written by hand."""

import pytest
from apic_stream import (
    ENTRY,
    EXTINT,
    FIXED,
    INIT,
    IOAPIC_PIN,
    LEVEL_ENTRY,
    LOWEST,
    MASKED_ENTRY,
    NMI,
    REMOTE_IRR,
    SMI,
    VECTOR,
    ApicStream,
)
from stream import PERIOD_NS

from kvmtick.ticks.verdict import Path, Verdict, Where

DELIVERED, LATE, REINJECTED = Verdict.DELIVERED, Verdict.LATE, Verdict.REINJECTED
MASKED, COALESCED, DROPPED = Verdict.MASKED, Verdict.COALESCED, Verdict.DROPPED
OUTSTANDING = Verdict.OUTSTANDING
MS = PERIOD_NS


def started(*, reinject: bool = False, vcpus: int = 2) -> ApicStream:
    s = ApicStream(reinject=reinject, vcpus=vcpus)
    s.program()
    return s


# --- the IOAPIC ---------------------------------------------------------------------------------


@pytest.mark.parametrize("pic_first", [True, False])
def test_a_tick_by_the_ioapic_has_its_times_its_path_and_its_vcpu(pic_first: bool) -> None:
    s = started(reinject=True)
    tick = s.expire()
    s.work(MS + 30)
    if pic_first:
        s.pic()
    s.clock.now_ns = MS + 40
    s.ioapic(1)
    if not pic_first:
        s.pic()
    s.inject(MS + 100, vcpu=1)
    s.eoi(MS + 250, vcpu=1, pin=IOAPIC_PIN)
    report = s.report()
    assert (tick.verdict, tick.path, tick.vcpu, tick.vector) == (DELIVERED, Path.IOAPIC, 1, VECTOR)
    assert (tick.work_ns, tick.accept_ns) == (MS + 30, MS + 40)
    assert (tick.inject_ns, tick.eoi_ns) == (MS + 100, MS + 250)
    assert (report.path, report.vcpu, report.source) == ("ioapic", 1, "pit")
    assert {hop: values["max"] for hop, values in report.latency_ns.items()} == {
        "expiry_to_work": 30,
        "work_to_accept": 10,
        "accept_to_inject": 60,
        "inject_to_eoi": 150,
        "expiry_to_eoi": 250,
    }


def test_the_acknowledgement_of_the_ioapics_pin_frees_the_next_tick() -> None:
    s = started(reinject=True)
    first = s.tick(0)
    held = [s.expire() for _ in range(2)]
    s.work(3 * MS, pulses=False)
    s.inject(3 * MS + 10)
    for n, tick in enumerate(held):
        at = 3 * MS + 20 + 20 * n
        s.eoi(at, pin=IOAPIC_PIN)
        s.work(at + 5)
        s.ioapic(0)
        s.pic()
        s.inject(at + 6)
        assert tick.inject_ns is None
    s.eoi(4 * MS - 1, pin=IOAPIC_PIN)
    s.report()
    assert first.verdict is LATE
    assert [tick.verdict for tick in held] == [REINJECTED, REINJECTED]
    assert [tick.path for tick in held] == [Path.IOAPIC] * 2
    assert s.assembler._pit._pending == 0


def test_another_pins_acknowledgement_is_not_the_pits() -> None:
    s = started(reinject=True)
    s.tick(0)
    s.inject(MS + 1)
    s.eoi(MS + 2, pin=5)
    s.report()
    assert s.assembler._pit._pending == 1


@pytest.mark.parametrize("recorded", [True, False])
def test_a_masked_entry_with_a_latched_pic_request_is_masked(recorded: bool) -> None:
    s = started()
    ticks = []
    for _ in range(2):
        ticks.append(s.expire())
        s.work()
        if recorded:
            s.ioapic(entry=MASKED_ENTRY, pin=0)
        s.pic()
    s.report()
    assert [tick.verdict for tick in ticks] == [OUTSTANDING, MASKED]
    assert ticks[1].where is Where.PIC
    assert ticks[0].accept_ns == MS, "its request waits in the PIC"


@pytest.mark.parametrize("recorded", [True, False])
def test_a_gsi_that_leads_to_a_masked_entry_only_is_masked_at_once(recorded: bool) -> None:
    s = started()
    tick = s.expire()
    s.work()
    if recorded:
        s.ioapic(entry=MASKED_ENTRY | 0x40, coalesced=True)
    s.report()
    assert (tick.verdict, tick.where) == (MASKED, Where.IOAPIC)
    assert tick.path is None


def test_a_line_that_another_source_holds_high_is_coalesced_at_the_ioapic() -> None:
    s = started()
    s.recorder.task = s.vmm
    s.recorder.kvm_set_irq(0, 1, 0)
    s.ioapic(0, pin=IOAPIC_PIN)
    tick = s.expire()
    s.work()
    s.ioapic(coalesced=True)
    s.report()
    assert (tick.verdict, tick.where) == (COALESCED, Where.IOAPIC)


def test_a_level_entry_whose_remote_irr_is_set_is_coalesced_at_the_ioapic() -> None:
    s = started()
    first = s.expire()
    s.work()
    s.ioapic(0, entry=LEVEL_ENTRY)
    second = s.expire()
    s.work()
    s.ioapic(entry=LEVEL_ENTRY | REMOTE_IRR)
    s.inject(2 * MS + 1)
    s.report()
    assert first.verdict is LATE
    assert (second.verdict, second.where) == (COALESCED, Where.IOAPIC)
    assert "remote IRR" in second.detail


@pytest.mark.parametrize("accepted", [True, False])
def test_a_message_that_no_local_apic_took_is_masked(accepted: bool) -> None:
    """Result 0 shows as `coalesced`; a software-disabled local APIC traces the message anyhow."""
    s = started()
    ticks = []
    for _ in range(3):
        ticks.append(s.expire())
        s.work()
        s.ioapic(*([0] if accepted else []), coalesced=True)
    s.report()
    assert [(tick.verdict, tick.where) for tick in ticks] == [(MASKED, Where.LAPIC)] * 3
    assert {tick.detail for tick in ticks} == {"no local APIC took the message"}
    s.inject(4 * MS)
    assert s.report().extra == 1, "nothing of theirs is left in an IRR"


def test_a_vector_that_is_still_requested_is_coalesced_in_the_local_apic() -> None:
    s = started()
    first, second = s.tick(0), s.tick(0)
    s.inject(2 * MS + 5)
    third = s.tick(0)
    s.report()
    assert first.verdict is LATE
    assert (second.verdict, second.where) == (COALESCED, Where.LAPIC)
    assert third.verdict is OUTSTANDING, "in service is not requested"


def test_of_several_ways_that_merged_it_the_deepest_is_told() -> None:
    s = started()
    for coalesced in (False, True):
        tick = s.expire()
        s.work()
        s.ioapic(0)
        s.pic(imr=0xFE, coalesced=coalesced)
    s.report()
    assert (tick.verdict, tick.where) == (COALESCED, Where.LAPIC)


def test_an_open_way_outranks_the_merged_ones() -> None:
    s = started()
    s.tick(0)
    tick = s.expire()
    s.work()
    s.ioapic(0, 1)
    s.pic()
    s.inject(2 * MS + 3, vcpu=1)
    s.report()
    assert (tick.verdict, tick.vcpu) == (DELIVERED, 1)


def test_a_message_to_several_vcpus_arrives_once() -> None:
    s = started()
    tick = s.tick(0, 1)
    s.inject(MS + 5, vcpu=1)
    s.eoi(MS + 9, vcpu=1)
    s.inject(MS + 20, vcpu=0)
    s.eoi(MS + 30, vcpu=0)
    report = s.report()
    assert (tick.vcpu, tick.inject_ns, tick.eoi_ns) == (1, MS + 5, MS + 9)
    assert (report.count(DELIVERED), report.extra, s.assembler.reached) == (1, 0, 1)


def test_lowest_priority_is_an_interrupt_like_a_fixed_one() -> None:
    s = started()
    tick = s.expire()
    s.work()
    s.ioapic(1, entry=ENTRY | LOWEST)
    s.inject(MS + 4, vcpu=1)
    s.report()
    assert (tick.verdict, tick.path, tick.vcpu) == (DELIVERED, Path.IOAPIC, 1)


@pytest.mark.parametrize("mode", [SMI, EXTINT])
def test_a_message_that_asks_for_no_interrupt_is_masked(mode: int) -> None:
    s = started()
    tick = s.expire()
    s.work()
    s.ioapic(0, entry=ENTRY | mode)
    s.report()
    assert (tick.verdict, tick.where) == (MASKED, Where.LAPIC)


def test_the_pic_takes_precedence_where_both_have_the_vector() -> None:
    s = started()
    tick = s.expire()
    s.work()
    s.ioapic(0, entry=0x20)
    s.pic(imr=0xFE)
    s.inject(MS + 1, vector=0x20)
    s.report()
    assert tick.path is Path.PIC
    s.inject(MS + 2, vector=0x20)
    assert s.report().extra == 0, "the second arrival is the tick's as well"


def test_a_masked_pic_request_does_not_take_the_local_apics_injection() -> None:
    s = started()
    tick = s.expire()
    s.work()
    s.ioapic(0, entry=0x20)
    s.pic(imr=0xFF)
    s.inject(MS + 1, vector=0x20)
    s.report()
    assert (tick.verdict, tick.path) == (DELIVERED, Path.IOAPIC)
    s.write(0x21, 0xFE)
    s.inject(MS + 9, vector=0x20)
    s.write(0x20, 0x20, at=MS + 10)
    s.recorder.kvm_ack_irq(0, 0)
    report = s.report()
    assert (report.extra, tick.inject_ns, tick.eoi_ns) == (0, MS + 1, None), (
        "the request that waited in the PIC was the same tick's; its first arrival counts"
    )


def test_icw1_takes_nothing_from_a_tick_that_a_local_apic_accepted() -> None:
    s = started()
    tick = s.tick(0)
    s.write(0x20, 0x11, at=MS + 1)
    s.recorder.kvm_ack_irq(0, 0)
    assert s.report()[1].verdict is OUTSTANDING
    s.inject(MS + 2)
    s.report()
    assert tick.verdict is DELIVERED


def test_the_watchdogs_acceptance_after_the_pic_is_not_the_ioapics() -> None:
    s = started()
    tick = s.expire()
    s.work()
    s.pic()
    s.ioapic(0)
    s.accept(1, 0x45)
    s.inject(MS + 1, vector=0x45, vcpu=1)
    s.report()
    assert (tick.path, tick.vcpu, tick.vector) == (Path.LAPIC, 1, 0x45)


def test_a_vector_injected_before_the_ioapics_own_record_is_the_ioapics() -> None:
    """On a host with several CPUs the vCPU may be faster than the worker."""
    s = started()
    tick = s.expire()
    s.work()
    s.accept(1)
    s.inject(MS + 1, vcpu=1)
    s.recorder.task = s.worker
    s.ioapic()
    report = s.report()
    assert (tick.verdict, tick.path, report.path) == (DELIVERED, Path.IOAPIC, "ioapic")


# --- MSI ----------------------------------------------------------------------------------------


def test_a_tick_by_an_msi() -> None:
    s = started()
    tick = s.expire()
    s.work()
    s.msi(1)
    s.inject(MS + 6, vcpu=1)
    s.eoi(MS + 8, vcpu=1)
    report = s.report()
    assert (tick.verdict, tick.path, tick.vcpu) == (DELIVERED, Path.MSI, 1)
    assert (report.path, report.vcpu) == ("msi", 1)
    assert tick.eoi_ns == MS + 8


def test_with_reinject_on_nothing_ever_acknowledges_an_msi() -> None:
    s = started(reinject=True)
    first = s.expire()
    s.work()
    s.msi(0)
    s.inject(MS + 1)
    s.eoi(MS + 2)
    rest = []
    for _ in range(3):
        rest.append(s.expire())
        s.work(pulses=False)
    s.report()
    assert first.verdict is DELIVERED
    assert [tick.verdict for tick in rest] == [OUTSTANDING] * 3


def test_an_msi_to_nobody_is_masked() -> None:
    s = started()
    tick = s.expire()
    s.work()
    s.msi()
    s.report()
    assert (tick.verdict, tick.where, tick.detail) == (
        MASKED,
        Where.LAPIC,
        "no local APIC took the message",
    )


def test_the_watchdogs_acceptance_after_an_msi_is_not_the_msis() -> None:
    s = started()
    tick = s.expire()
    s.work()
    s.msi(0)
    s.accept(1, 0x45)
    s.inject(MS + 1, vector=0x45, vcpu=1)
    assert s.report()[1] is tick
    assert tick.path is Path.LAPIC


# --- the NMI watchdog ---------------------------------------------------------------------------


def watchdog_tick(s: ApicStream, *vcpus: int, imr: int = 0xFF, coalesced: bool = False) -> None:
    s.work()
    s.pic(imr=imr, coalesced=coalesced)
    for vcpu in vcpus:
        s.accept(vcpu, 0, NMI)


def test_a_watchdog_nmi_delivers_its_tick_though_every_pin_is_masked() -> None:
    s = started()
    ticks = []
    for n in range(1, 4):
        ticks.append(s.expire())
        watchdog_tick(s, 0)
        s.inject_nmi(n * MS + 3)
    report = s.report()
    assert [(tick.verdict, tick.path, tick.vector) for tick in ticks] == [
        (DELIVERED, Path.NMI, 2)
    ] * 3
    assert all(tick.eoi_ns is None for tick in ticks)
    assert report.path == "nmi"
    assert report.latency_ns["inject_to_eoi"] == {}
    assert report.latency_ns["accept_to_inject"]["max"] == 3


def test_a_poll_in_the_nmis_handler_acknowledges_but_is_no_second_arrival() -> None:
    s = started(reinject=True)
    ticks = []
    for n in range(1, 4):
        ticks.append(s.expire())
        watchdog_tick(s, 0, imr=0xFE)
        s.inject_nmi(n * MS + 3)
        s.poll(n * MS + 5)
    report = s.report()
    assert [(tick.verdict, tick.path) for tick in ticks] == [(DELIVERED, Path.NMI)] * 3
    assert (report.extra, s.assembler.reached, s.assembler._pit._pending) == (0, 3, 0)


def test_a_poll_before_the_nmi_is_the_first_arrival() -> None:
    s = started()
    tick = s.expire()
    watchdog_tick(s, 1, imr=0xFE)
    s.poll(MS + 2, vcpu=0)
    s.inject_nmi(MS + 4, vcpu=1)
    report = s.report()
    assert (tick.path, tick.vcpu, tick.inject_ns) == (Path.PIC, 0, MS + 2)
    assert report.extra == 0


def test_an_nmi_that_finds_as_many_as_can_wait_is_coalesced_in_the_local_apic() -> None:
    s = started()
    ticks = []
    for _ in range(4):
        ticks.append(s.expire())
        watchdog_tick(s, 0)
    s.inject_nmi(4 * MS + 1, pending=1)
    s.inject_nmi(4 * MS + 2)
    report = s.report()
    assert [(tick.verdict, tick.where) for tick in ticks[2:]] == [(COALESCED, Where.LAPIC)] * 2
    assert [tick.inject_ns for tick in ticks[:2]] == [4 * MS + 1, 4 * MS + 2]
    assert report.extra == 0


def test_in_its_handler_one_nmi_can_wait_not_two() -> None:
    s = started()
    ticks = []
    for _ in range(3):
        ticks.append(s.expire())
        watchdog_tick(s, 0)
        if len(ticks) == 1:
            s.inject_nmi(MS + 1)
    s.inject_nmi(3 * MS + 1)
    s.report()
    assert [tick.verdict for tick in ticks] == [DELIVERED, LATE, COALESCED]
    assert ticks[2].where is Where.LAPIC


def test_a_fixed_lvt0_is_delivered_by_path_lapic() -> None:
    s = started()
    tick = s.expire()
    watchdog_tick(s)
    s.accept(1, 0x45)
    s.inject(MS + 3, vector=0x45, vcpu=1)
    s.eoi(MS + 5, vector=0x45, vcpu=1)
    report = s.report()
    assert (tick.verdict, tick.path, tick.vcpu, tick.eoi_ns) == (DELIVERED, Path.LAPIC, 1, MS + 5)
    assert report.path == "lapic"


def test_an_nmi_that_the_ioapic_sends_has_path_nmi() -> None:
    s = started()
    tick = s.expire()
    s.work()
    s.ioapic(0, entry=ENTRY | NMI)
    s.inject_nmi(MS + 1)
    s.report()
    assert (tick.verdict, tick.path) == (DELIVERED, Path.NMI)


# --- others' interrupts -------------------------------------------------------------------------


def test_ipis_and_devices_are_nobodys() -> None:
    s = started()
    s.tick(0)
    s.inject(MS + 1)
    s.eoi(MS + 2)
    s.ipi(MS + 10, 0, 0x61, 1)
    s.inject(MS + 11, vector=0x61, vcpu=1)
    s.recorder.task = s.vmm
    s.msi(1, vector=0x62)
    s.inject(MS + 13, vector=0x62, vcpu=1)
    s.ipi(MS + 14, 0, 0, 1, mode=NMI)
    s.inject_nmi(MS + 15, vcpu=1)
    report = s.report()
    assert (report.extra, report.count(DELIVERED)) == (0, 1)


def test_an_ipi_with_the_ticks_vector_is_extra_where_the_ticks_go() -> None:
    s = started()
    s.tick(0)
    s.inject(MS + 1)
    s.ipi(MS + 10, 1, VECTOR, 0)
    s.inject(MS + 11)
    s.ipi(MS + 12, 0, VECTOR, 1)
    s.inject(MS + 13, vcpu=1)
    assert s.report().extra == 1


def test_a_tick_that_finds_anothers_request_is_coalesced() -> None:
    s = started()
    s.ipi(MS - 10, 1, VECTOR, 0)
    tick = s.expire()
    s.work()
    s.ioapic(0)
    s.inject(MS + 1)
    report = s.report()
    assert (tick.verdict, tick.where, report.extra) == (COALESCED, Where.LAPIC, 1)


def test_another_sources_gsi_0_by_the_ioapic_is_extra_and_teaches_the_pin() -> None:
    s = started(reinject=True)
    s.tick(0)
    s.inject(MS + 1)
    s.eoi(MS + 2, pin=IOAPIC_PIN)
    s.recorder.task = s.vmm
    s.recorder.kvm_set_irq(0, 1, 0)
    s.ioapic(0, pin=7)
    s.recorder.kvm_set_irq(0, 0, 0)
    s.inject(MS + 10)
    assert s.report().extra == 1
    assert s.assembler._pit._ioapic_pin == 7


def test_an_init_takes_the_request_back() -> None:
    s = started()
    latched, tick, other = s.tick(1), s.tick(0), s.tick(1)
    s.inject(2 * MS + 1)
    s.inject(3 * MS + 4, vcpu=1)
    fourth = s.tick(1)
    s.ipi(4 * MS + 5, 0, 0, 1, mode=INIT)
    s.inject(4 * MS + 6, vcpu=1)
    report = s.report()
    assert (latched.verdict, tick.verdict) == (LATE, DELIVERED)
    assert (other.verdict, other.where) == (COALESCED, Where.LAPIC)
    assert (fourth.verdict, fourth.where) == (DROPPED, Where.LAPIC)
    assert report.extra == 1


def test_an_init_leaves_a_tick_what_waits_in_the_pic() -> None:
    s = started()
    tick = s.tick(1)
    s.ipi(MS + 5, 0, 0, 1, mode=INIT)
    assert s.report()[1].verdict is OUTSTANDING
    s.write(0x21, 0xFE)
    s.inject(MS + 9, vector=0x20)
    s.report()
    assert (tick.verdict, tick.path) == (DELIVERED, Path.PIC)


def test_a_spurious_eoi_ends_nothing() -> None:
    s = started()
    tick = s.tick(0)
    s.inject(MS + 1)
    s.eoi(MS + 2, vector=-1)
    s.eoi(MS + 3, vector=0x77)
    s.report()
    assert tick.eoi_ns is None
    s.eoi(MS + 4)
    s.report()
    assert tick.eoi_ns == MS + 4


def test_the_request_of_another_pic_pin_that_gsi_0_leads_to() -> None:
    s = started()
    tick = s.expire()
    s.write(0x21, 0x00)
    s.work()
    s.recorder.kvm_pic_set_irq(0, 3, 0, 0x00, False)
    s.inject(MS + 1, vector=0x23)
    s.write(0x20, 0x20, at=MS + 2)
    s.recorder.kvm_ack_irq(0, 3)
    s.report()
    assert (tick.verdict, tick.path, tick.eoi_ns) == (DELIVERED, Path.PIC, MS + 2)


def test_the_slaves_pin_has_the_slaves_vector_and_ports() -> None:
    s = started()
    s.write(0xA0, 0x11)
    s.write(0xA1, 0x28)
    tick = s.expire()
    s.work()
    s.recorder.kvm_pic_set_irq(1, 2, 0, 0x00, False)
    s.inject(MS + 1, vector=0x2A)
    s.write(0xA0, 0x20, at=MS + 2)
    s.recorder.kvm_ack_irq(1, 10)
    report = s.report()
    assert (tick.verdict, tick.vector, tick.eoi_ns) == (DELIVERED, 0x2A, MS + 2)
    assert report.extra == 0


def test_without_names_of_tasks_a_vector_still_finds_its_request() -> None:
    s = started()
    s.assembler._tasks = []
    tick = s.tick(1)
    s.inject(MS + 1, vcpu=1)
    s.report()
    assert (tick.verdict, tick.vcpu) == (DELIVERED, 1)


def test_the_run_ends_with_the_works_end_too() -> None:
    s = started()
    s.expire()
    s.work()
    tick = s.assembler._pit.lives[-1]
    s.recorder.sched_kthread_work_execute_end(0x200, 1)
    s.recorder.flush()
    assert tick.verdict is MASKED, "without asking for a report"


def test_modes_are_those_of_the_trace() -> None:
    assert tuple(n << 8 for n in (0, 1, 2, 4, 5, 7)) == (FIXED, LOWEST, SMI, NMI, INIT, EXTINT)
