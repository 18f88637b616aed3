"""One readable case for each verdict, from a record stream written by hand."""

import pytest
from stream import PERIOD_NS, Stream

from kvmtick.ticks.life import TickAssembler
from kvmtick.ticks.report import TickReport
from kvmtick.ticks.verdict import Verdict, Where
from kvmtick.trace.events import IRQ_CONTEXT, Event, Record

DELIVERED, LATE, REINJECTED = Verdict.DELIVERED, Verdict.LATE, Verdict.REINJECTED
MASKED, COALESCED, DROPPED = Verdict.MASKED, Verdict.COALESCED, Verdict.DROPPED
OUTSTANDING = Verdict.OUTSTANDING
MASK_IRQ0 = 0x01


def test_an_interrupt_within_the_period_is_delivered_and_every_step_has_its_time() -> None:
    s = Stream()
    s.program()
    tick = s.expire(late_ns=10)
    s.work(PERIOD_NS + 30)
    s.inject(PERIOD_NS + 100)
    s.eoi(PERIOD_NS + 250)
    report = s.report()
    assert tick.verdict is DELIVERED
    assert (tick.index, tick.vector, tick.period_ns, tick.where) == (1, 0x20, PERIOD_NS, None)
    assert (tick.expiry_ns, tick.fired_ns) == (PERIOD_NS, PERIOD_NS + 10), (
        "the expiry is the timer's `expires`, not the late `now`"
    )
    assert (tick.work_ns, tick.accept_ns) == (PERIOD_NS + 30, PERIOD_NS + 30)
    assert (tick.inject_ns, tick.eoi_ns) == (PERIOD_NS + 100, PERIOD_NS + 250)
    assert {hop: values["max"] for hop, values in report.latency_ns.items()} == {
        "expiry_to_work": 30,
        "work_to_accept": 0,
        "accept_to_inject": 70,
        "inject_to_eoi": 150,
        "expiry_to_eoi": 250,
    }


@pytest.mark.parametrize(
    ("injected_after_ns", "verdict"), [(PERIOD_NS - 1, DELIVERED), (PERIOD_NS, LATE)]
)
@pytest.mark.parametrize("reinject", [True, False])
def test_a_period_after_the_expiry_is_late(
    injected_after_ns: int, verdict: Verdict, reinject: bool
) -> None:
    s = Stream(reinject=reinject)
    s.program()
    tick = s.expire()
    s.work(PERIOD_NS)
    s.inject(PERIOD_NS + injected_after_ns)
    assert s.report()[1].verdict is verdict
    assert tick.eoi_ns is None, "the guest has not written EOI yet"


def test_the_lateness_of_the_host_timer_counts() -> None:
    s = Stream()
    s.program()
    tick = s.expire(late_ns=PERIOD_NS)
    s.work(2 * PERIOD_NS)
    s.inject(2 * PERIOD_NS)
    s.report()
    assert tick.verdict is LATE


def test_a_one_shot_tick_is_never_late() -> None:
    s = Stream(period_ns=None)
    s.program()
    tick = s.expire()
    s.work(50 * PERIOD_NS)
    s.inject(60 * PERIOD_NS)
    s.report()
    assert tick.verdict is DELIVERED
    assert tick.period_ns is None


def test_a_one_shot_loaded_again_by_its_handler_has_no_period_either() -> None:
    s = Stream(period_ns=None)
    s.program()
    tick = s.expire()
    s.work(PERIOD_NS)
    s.inject(PERIOD_NS + 5)
    s.program(at=PERIOD_NS + 10)
    s.eoi(PERIOD_NS + 20)
    s.report()
    assert (tick.verdict, tick.period_ns) == (DELIVERED, None)


def test_ticks_held_back_are_reinjected_first_in_first_out() -> None:
    s = Stream()
    s.program()
    first = s.expire()
    s.work(PERIOD_NS)
    held = []
    for _ in range(3):
        held.append(s.expire())
        s.work(s.expires_ns - PERIOD_NS, pulses=False)
    at = s.expires_ns - 100
    s.inject(at)
    for n in range(3):
        s.eoi(at + 10 + 10 * n)
        s.queue()
        s.work(at + 15 + 10 * n)
        s.inject(at + 16 + 10 * n)
    s.eoi(at + 40)
    report = s.report()
    assert first.verdict is LATE, "it was pulsed at once and taken three periods later"
    assert [tick.verdict for tick in held] == [REINJECTED] * 3
    assert [tick.inject_ns for tick in held] == [at + 16, at + 26, at + 36]
    assert [tick.work_ns for tick in held] == [at + 15, at + 25, at + 35]
    assert report.expired == 4


def test_a_late_worker_alone_does_not_make_a_tick_reinjected() -> None:
    s = Stream()
    s.program()
    tick = s.expire()
    s.work(PERIOD_NS + 900_000)
    s.inject(PERIOD_NS + 900_000)
    assert s.report()[1].verdict is DELIVERED
    assert tick.work_ns == PERIOD_NS + 900_000


def test_a_pulse_into_a_masked_pin_whose_request_is_set_is_masked() -> None:
    s = Stream(reinject=False)
    s.imr = MASK_IRQ0
    s.program()
    latched = s.expire()
    s.work(PERIOD_NS)
    lost = s.expire()
    s.work(2 * PERIOD_NS)
    s.imr = 0
    s.inject(2 * PERIOD_NS + 500)
    report = s.report()
    assert latched.verdict is LATE, "this pulse newly latched the request, and it came through"
    assert (lost.verdict, lost.where) == (MASKED, Where.PIC)
    assert report.count("masked") == 1


def test_a_request_latched_while_masked_waits_for_the_unmask() -> None:
    s = Stream(reinject=False)
    s.imr = MASK_IRQ0
    s.program()
    tick = s.expire()
    s.work(PERIOD_NS)
    assert s.report()[1].verdict is OUTSTANDING
    s.imr = 0
    s.inject(PERIOD_NS + 10)
    assert s.report()[1] is tick
    assert tick.verdict is DELIVERED


def test_with_reinject_off_a_second_expiry_before_the_worker_runs_is_coalesced_there() -> None:
    s = Stream(reinject=False)
    s.program()
    first = s.expire()
    second = s.expire(queues=False)
    s.work(2 * PERIOD_NS + 10)
    s.inject(2 * PERIOD_NS + 10)
    s.report()
    assert (second.verdict, second.where) == (COALESCED, Where.WORKER)
    assert (second.work_ns, second.inject_ns) == (None, None)
    assert first.verdict is LATE, "the pulse is the one's that queued the work"


def test_with_reinject_on_the_count_keeps_what_the_worker_merges() -> None:
    s = Stream()
    s.program()
    first = s.expire()
    second = s.expire(queues=False)
    s.work(2 * PERIOD_NS + 10)
    s.inject(2 * PERIOD_NS + 10)
    s.eoi(2 * PERIOD_NS + 20)
    s.queue()
    s.work(2 * PERIOD_NS + 20)
    s.inject(2 * PERIOD_NS + 20)
    s.eoi(2 * PERIOD_NS + 30)
    s.report()
    assert first.verdict is LATE
    assert second.verdict is DELIVERED, "no run of the worker refused it"
    assert second.inject_ns == 2 * PERIOD_NS + 20


def test_a_pulse_onto_a_request_that_is_set_is_coalesced_in_the_pic() -> None:
    s = Stream(reinject=False)
    s.program()
    first = s.expire()
    s.work(PERIOD_NS)
    second = s.expire()
    s.work(2 * PERIOD_NS, coalesced=True)
    s.inject(2 * PERIOD_NS + 10)
    s.report()
    assert (second.verdict, second.where) == (COALESCED, Where.PIC)
    assert (first.verdict, first.inject_ns) == (LATE, 2 * PERIOD_NS + 10)


def test_reinjected_outranks_what_became_of_the_pulse() -> None:
    s = Stream()
    s.program()
    s.expire()
    s.work(PERIOD_NS)
    held = s.expire()
    s.work(2 * PERIOD_NS, pulses=False)
    s.write(
        0x20, 0x60
    )  # a specific EOI although nothing is in service: it acknowledges all the same
    s.recorder.kvm_ack_irq(0, 0)
    s.queue()
    s.work(2 * PERIOD_NS + 10, coalesced=True)
    s.report()
    assert held.verdict is REINJECTED


@pytest.mark.parametrize("why", ["unmask", "reprogramming", "REINJECT_CONTROL"])
def test_ticks_whose_count_is_reset_before_their_pulse_are_dropped(why: str) -> None:
    s = Stream()
    s.program()
    pulsed = s.expire()
    s.work(PERIOD_NS)
    owed = [s.expire() for _ in range(2)]
    s.work(3 * PERIOD_NS, pulses=False)
    at = 3 * PERIOD_NS + 10
    if why == "unmask":
        s.write(0x21, 0xFE)
        s.reset_reinject(at, 3)
    elif why == "reprogramming":
        s.reset_reinject(at, 3)
        s.program(at)
    else:
        s.reinject_control(False, at)
    s.inject(at + 5)
    report = s.report()
    assert [tick.verdict for tick in owed] == [DROPPED, DROPPED]
    assert all(tick.work_ns is None and tick.detail for tick in owed)
    assert pulsed.verdict is LATE, "a reset after the pulse takes nothing from the guest"
    assert report.count(DROPPED) == 2


def test_work_that_is_queued_when_the_count_is_reset_still_pulses_for_the_first() -> None:
    s = Stream()
    s.program()
    first, second = s.expire(), s.expire(queues=False)
    s.reset_reinject(2 * PERIOD_NS + 5, 2)
    s.work(2 * PERIOD_NS + 10)
    s.inject(2 * PERIOD_NS + 10)
    s.report()
    assert first.verdict is LATE
    assert second.verdict is DROPPED


def test_a_request_that_icw1_clears_is_dropped_in_the_pic() -> None:
    s = Stream()
    s.program()
    tick = s.expire()
    s.work(PERIOD_NS)
    s.clock.now_ns = PERIOD_NS + 5
    s.write(0x20, 0x11)
    s.recorder.kvm_ack_irq(0, 0)
    s.report()
    assert (tick.verdict, tick.where) == (DROPPED, Where.PIC)


def test_a_poll_counts_as_reaching_the_guest() -> None:
    s = Stream()
    s.program()
    tick = s.expire()
    s.work(PERIOD_NS)
    s.poll(PERIOD_NS + 7)
    report = s.report()
    assert (tick.verdict, tick.inject_ns, tick.eoi_ns, tick.vector) == (
        DELIVERED,
        PERIOD_NS + 7,
        PERIOD_NS + 7,
        None,
    )
    assert report.extra == 0


def test_an_automatic_eoi_ends_the_tick_where_it_is_injected() -> None:
    s = Stream()
    s.program()
    ticks = []
    for n in range(1, 4):
        ticks.append(s.expire())
        s.work(n * PERIOD_NS)
        s.inject_auto_eoi(n * PERIOD_NS + 3)
    report = s.report()
    assert [tick.verdict for tick in ticks] == [DELIVERED] * 3
    assert [tick.eoi_ns for tick in ticks] == [n * PERIOD_NS + 3 for n in range(1, 4)]
    assert [tick.vector for tick in ticks] == [0x20] * 3
    assert report.extra == 0


def test_what_is_still_under_way_is_outstanding() -> None:
    s = Stream()
    s.program()
    pulsed, waiting = s.expire(), s.expire(queues=False)
    s.work(2 * PERIOD_NS)
    report = s.report()
    assert pulsed.verdict is OUTSTANDING
    assert waiting.verdict is OUTSTANDING
    assert report.count("outstanding") == 2


# --- injections that are nobody's ---------------------------------------------------------------


def test_another_sources_pulse_is_an_extra_injection() -> None:
    s = Stream()
    s.pulse(source=0)
    s.inject(5)
    s.eoi(6)
    report = s.report()
    assert (report.extra, report.expired) == (1, 0)


def test_another_vector_is_an_extra_injection_and_leaves_the_tick_its_request() -> None:
    s = Stream()
    s.program()
    tick = s.expire()
    s.work(PERIOD_NS)
    s.inject(PERIOD_NS + 1, vector=0x21)
    s.inject(PERIOD_NS + 2, vector=0x20)
    report = s.report()
    assert (report.extra, tick.verdict, tick.inject_ns) == (1, DELIVERED, PERIOD_NS + 2)


def test_an_injection_repeated_after_a_cut_delivery_is_not_a_second_one() -> None:
    s = Stream()
    s.program()
    tick = s.expire()
    s.work(PERIOD_NS)
    s.inject(PERIOD_NS + 1)
    s.inject(PERIOD_NS + 2, reinjected=True)
    report = s.report()
    assert (report.extra, tick.inject_ns) == (0, PERIOD_NS + 1)


def test_a_tick_merged_into_another_sources_request_is_coalesced() -> None:
    s = Stream(reinject=False)
    s.program()
    s.clock.now_ns = PERIOD_NS - 5
    s.pulse(source=0)
    tick = s.expire()
    s.work(PERIOD_NS, coalesced=True)
    s.inject(PERIOD_NS + 10)
    report = s.report()
    assert (tick.verdict, tick.where) == (COALESCED, Where.PIC)
    assert report.extra == 1


# --- looking ------------------------------------------------------------------------------------


def test_ticks_are_numbered_from_one_and_a_wrong_number_is_told() -> None:
    s = Stream(reinject=False)
    report = s.report()
    with pytest.raises(IndexError, match="no tick 1: the ticks kept are none"):
        report[1]
    s.program()
    for n in (1, 2):
        s.expire()
        s.work(n * PERIOD_NS, coalesced=n > 1)
    report = s.report()
    assert [tick.index for tick in report] == [1, 2]
    assert report[2].index == 2
    assert len(report) == 2
    with pytest.raises(IndexError, match="no tick 3: the ticks kept are 1 to 2"):
        report[3]
    with pytest.raises(IndexError):
        report[0]


def test_the_summary_names_the_counts_that_are_not_nought() -> None:
    s = Stream(reinject=False)
    s.program()
    s.expire()
    s.expire(queues=False)
    s.work(2 * PERIOD_NS)
    s.inject(2 * PERIOD_NS)
    text = s.report().summary()
    assert text.splitlines()[0] == "2 ticks of the pit by way of the pic:"
    assert "coalesced" in text
    assert "late" in text
    assert "masked" not in text


def test_the_dict_has_the_keys_of_the_json() -> None:
    report = Stream().report()
    assert report.as_dict() == {
        "source": "pit",
        "expired": 0,
        "delivered": 0,
        "late": 0,
        "reinjected": 0,
        "coalesced": 0,
        "masked": 0,
        "dropped": 0,
        "outstanding": 0,
        "unknown": 0,
        "extra": 0,
    }
    assert set(report.latency_ns) == {
        "expiry_to_work",
        "work_to_accept",
        "accept_to_inject",
        "inject_to_eoi",
        "expiry_to_eoi",
    }


def written(*records: Record) -> TickReport:
    """What these say of a PIT with reinjection and a PIC that is set up."""
    assembler = TickAssembler()
    assembler([START_REINJECT, *map(pic_write, ((0x20, 0x11), (0x21, 0x20), (0x21, 4), (0x21, 1)))])
    assembler([(n, *record[1:]) for n, record in enumerate(records)])
    assembler.settle()
    return assembler.report()


def pic_write(write: tuple[int, int]) -> Record:
    return (0, int(Event.KVM_PIO), 3, 1, write[0], 1, 1, write[1])


START_REINJECT = (0, int(Event.KVM_APICV_INHIBIT_CHANGED), 3, 9, 1, 0)
EXPIRY: list[Record] = [
    (0, int(Event.HRTIMER_EXPIRE_ENTRY), IRQ_CONTEXT, 0x300, 0, 0),
    (0, int(Event.WORK_QUEUE), IRQ_CONTEXT, 1, 1, 1),
    (0, int(Event.WORK_START), 2, 1, 1),
]
RAISE: Record = (0, int(Event.KVM_SET_IRQ), 2, 0, 1, 2)
LATCH: Record = (0, int(Event.KVM_PIC_SET_IRQ), 2, 0, 0, 0, 0, False)
WORK_END: Record = (0, int(Event.WORK_END), 2, 1, 1)
INJECT: Record = (0, int(Event.KVM_INJ_VIRQ), 3, 0x20, False, False)
ACK: Record = (0, int(Event.KVM_ACK_IRQ), 3, 0, 0)


def test_the_worker_may_raise_the_line_between_an_eoi_and_what_it_leads_to() -> None:
    first = [*EXPIRY, RAISE, LATCH, WORK_END, INJECT]
    second = [*EXPIRY, pic_write((0x20, 0x20)), RAISE, ACK, LATCH, WORK_END, INJECT]
    report = written(*first, *second)
    assert [tick.inject_ns is not None for tick in report] == [True, True]
    assert next(iter(report)).eoi_ns == 12
    assert report.extra == 0


def test_a_request_that_inta_took_is_injected_after_the_next_pulse_is_recorded() -> None:
    report = written(*EXPIRY, RAISE, LATCH, WORK_END, *EXPIRY, RAISE, LATCH, INJECT, INJECT)
    assert [tick.inject_ns for tick in report] == [11, 12]
    assert report.extra == 0


def test_work_that_was_queued_before_the_worker_said_that_it_runs() -> None:
    """The worker takes its work before its start is recorded: what was queued in between is there
    still, and the expiries after it queue none.
    """
    stream = Stream(reinject=False)
    stream.reinject_control(False)
    stream.program()
    first = stream.expire()
    second = stream.expire()
    stream.work(2_000_010)
    lost = [stream.expire(queues=False) for _ in range(3)]
    stream.inject(5_000_020)
    stream.eoi(5_000_030)
    stream.work(5_000_040)
    stream.inject(5_000_050)
    stream.eoi(5_000_060)
    third = stream.expire()
    stream.work(6_000_010)
    stream.inject(6_000_020)
    report = stream.report()
    assert [tick.verdict for tick in lost] == [Verdict.COALESCED] * 3
    assert [tick.where for tick in lost] == [Where.WORKER] * 3
    assert third.inject_ns == 6_000_020
    assert report.count("delivered") + report.count("late") == 2 + (second.inject_ns is not None)
    assert first.inject_ns == 5_000_020
