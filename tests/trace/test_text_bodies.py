"""What stands behind an event's name: our own wording and the kernel's, and those of other tools.

`KERNEL` and `PLUGIN` lines are real ones of tests/golden/traces and tests/trace/texts, or made by
hand from the print fmt of the kernels that have them.
"""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmtick.trace.events import HEADER_FIELDS, TRACEPOINTS, Event, Function, Record
from kvmtick.trace.exit_reasons import SVM_EXIT_REASONS, VMX_EXIT_REASONS
from kvmtick.trace.ftrace import event_text
from kvmtick.trace.text_bodies import (
    EVENTS,
    OTHER_FUNCTION,
    UNKNOWN_EXIT_REASON,
    parse_body,
    thread_names,
)

PIT, WORK = int(Function.PIT_TIMER_FN), int(Function.PIT_DO_WORK)
U8, U16 = st.integers(0, 0xFF), st.integers(0, 0xFFFF)
U32, U64 = st.integers(0, (1 << 32) - 1), st.integers(0, (1 << 64) - 1)
S64 = st.integers(0, (1 << 63) - 1)
FLAG = st.integers(0, 1)
FUNCTION = st.sampled_from([int(function) for function in Function])
MODE = st.integers(0, 7).map(lambda mode: mode << 8)
PRIO = st.integers(-1, 139)
PIN = st.integers(0, 7)


@st.composite
def pic_fields(draw: st.DrawFn) -> tuple[int, ...]:
    pin = draw(PIN)
    return draw(FLAG), pin, draw(FLAG) << pin, draw(FLAG) << pin, draw(FLAG)


def entries(dst: st.SearchStrategy[int]) -> st.SearchStrategy[int]:
    """What the text has of a redirection entry."""
    return st.tuples(dst, U8, MODE, FLAG, FLAG, FLAG).map(
        lambda t: t[0] << 56 | t[1] | t[2] | t[3] << 11 | t[4] << 15 | t[5] << 16
    )


MSI_ADDRESS = st.tuples(U32, FLAG, FLAG).map(
    lambda t: 0xFEE0_0000 | (t[0] & 0xFF) << 12 | (t[0] & ~0xFF) << 32 | t[1] << 2 | t[2] << 3
)
MSI_DATA = st.tuples(U8, MODE, FLAG).map(lambda t: t[0] | t[1] | t[2] << 15)
ICR_LOW = st.tuples(U8, MODE, FLAG, FLAG, FLAG, st.integers(0, 3)).map(
    lambda t: t[0] | t[1] | t[2] << 11 | t[3] << 14 | t[4] << 15 | t[5] << 18
)
EXIT_REASON = st.sampled_from(sorted(VMX_EXIT_REASONS))

FIELDS: dict[Event, st.SearchStrategy[tuple[int, ...]]] = {
    Event.HRTIMER_START: st.tuples(U64, FUNCTION, S64, FLAG),
    Event.HRTIMER_CANCEL: st.tuples(U64),
    Event.HRTIMER_EXPIRE_ENTRY: st.tuples(U64, FUNCTION, S64),
    Event.WORK_QUEUE: st.tuples(U64, FUNCTION, U64),
    Event.WORK_START: st.tuples(U64, FUNCTION),
    Event.WORK_END: st.tuples(U64, FUNCTION),
    Event.KVM_SET_IRQ: st.tuples(U32, st.integers(-1, 1), st.integers(-1, 63)),
    Event.KVM_PIC_SET_IRQ: pic_fields(),
    Event.KVM_IOAPIC_SET_IRQ: st.tuples(entries(U8), st.integers(0, 23), FLAG),
    Event.KVM_ACK_IRQ: st.tuples(st.integers(0, 2), st.integers(0, 23)),
    Event.KVM_INJ_VIRQ: st.tuples(U8, FLAG, FLAG),
    Event.KVM_VCPU_WAKEUP: st.tuples(S64, FLAG, FLAG),
    Event.KVM_PIO: st.tuples(FLAG, U16, st.sampled_from([1, 2, 4]), U16, U32),
    Event.KVM_ENTRY: st.tuples(U32, U64, U32),
    Event.KVM_EXIT: st.tuples(U32, EXIT_REASON | st.just(0x7FFF), U64, U64, U32),
    Event.KVM_APICV_INHIBIT_CHANGED: st.tuples(st.integers(0, 9), FLAG, st.integers(0, 0x3FF)),
    Event.PIT_RESET_REINJECT: st.tuples(U32),
    Event.KVM_APIC_ACCEPT_IRQ: st.tuples(U32, MODE, FLAG, U8),
    Event.KVM_EOI: st.tuples(U32, st.integers(-1, 0xFF)),
    Event.KVM_MSI_SET_IRQ: st.tuples(MSI_ADDRESS, MSI_DATA),
    Event.KVM_APIC_IPI: st.tuples(ICR_LOW, U32),
    Event.KVM_APIC: st.tuples(FLAG, st.integers(0, 0x50).map(lambda n: n << 4), U64),
    Event.KVM_MMIO: st.tuples(st.integers(0, 2), st.integers(0, 8), U64, U64),
    Event.KVM_MSR: st.tuples(FLAG, U32, U64, FLAG),
    Event.KVM_IOAPIC_DELAYED_EOI_INJ: st.tuples(entries(U8)),
    Event.KVM_INJ_NMI: st.tuples(U32, st.integers(0, 2)),
    Event.LOST_EVENTS: st.tuples(U8, st.integers(-1, 1 << 40)),
    Event.KVM_APICV_ACCEPT_IRQ: st.tuples(U32, MODE, FLAG, U8),
    Event.SCHED_WAKING: st.tuples(U32, U16, PRIO),
    Event.SCHED_SWITCH: st.tuples(U32, st.integers(0, 0x1FF), U32, st.just(0), PRIO, PRIO),
}
"""Of every event what its text can hold."""


def record(event: Event, fields: tuple[int, ...]) -> Record:
    return (0, int(event), 0, *fields)


RECORDS = st.sampled_from(list(Event)).flatmap(
    lambda event: FIELDS[event].map(lambda fields: record(event, fields))
)


@given(RECORDS)
def test_what_was_written_is_read(made: Record) -> None:
    assert parse_body(Event(made[1]), event_text(made)) == made[HEADER_FIELDS:]


@given(RECORDS)
def test_blanks_around_it_are_no_matter(made: Record) -> None:
    event, text = Event(made[1]), event_text(made)
    assert parse_body(event, f"     {text} ") == parse_body(event, text)


@given(RECORDS, st.sampled_from(["", "x", "=1", " and more", "\0"]), st.data())
def test_what_is_cut_or_longer_is_not_taken_for_another(
    made: Record, more: str, data: st.DataObject
) -> None:
    """Either nothing is understood, or every field still has its kind: no crash, no odd record."""
    event, text = Event(made[1]), event_text(made)
    text = text[: data.draw(st.integers(0, len(text)))] + more
    try:
        fields = parse_body(event, text)
    except ValueError:
        return
    assert len(fields) in (len(TRACEPOINTS[event].fields), 0)


def test_every_event_has_its_name() -> None:
    assert len(EVENTS) == len(Event)


WORDINGS: list[tuple[str, str, tuple[int, ...]]] = [
    # Linux before 4.16 has no mode, before 6.18 no was_armed.
    (
        "hrtimer_start",
        "hrtimer=ffff8881 function=pit_timer_fn expires=5 softexpires=5",
        (0xFFFF8881, PIT, 5, 0),
    ),
    (
        "hrtimer_start",
        "hrtimer=ffff8881 function=pit_timer_fn expires=5 softexpires=5 mode=ABS|HARD",
        (0xFFFF8881, PIT, 5, 0),
    ),
    # KVM as a module: the symbol's module behind it.
    (
        "hrtimer_start",
        "hrtimer=1f function=pit_timer_fn [kvm] expires=5 softexpires=5 mode=ABS was_armed=1",
        (0x1F, PIT, 5, 1),
    ),
    ("hrtimer_expire_entry", "hrtimer=1f function=pit_timer_fn [kvm] now=7", (0x1F, PIT, 7)),
    (
        "hrtimer_expire_entry",
        "hrtimer=0x1f function=apic_timer_fn+0x0/0x80 [kvm] now=7",
        (0x1F, int(Function.APIC_TIMER_FN), 7),
    ),
    ("hrtimer_expire_entry", "hrtimer=1f function=pit_timer_fn.llvm.123 now=7", (0x1F, PIT, 7)),
    # trace-cmd's plugin.
    (
        "hrtimer_start",
        "hrtimer=0xffff888104335a70 function=pit_timer_fn/0x0 expires=42090289871862"
        " softexpires=42090289871862",
        (0xFFFF888104335A70, PIT, 42090289871862, 0),
    ),
    (
        "hrtimer_expire_entry",
        "hrtimer=0xffff888104335a70 now=42090289894585 function=pit_timer_fn/0x0",
        (0xFFFF888104335A70, PIT, 42090289894585),
    ),
    # perf.
    (
        "hrtimer_start",
        "hrtimer=0xffff888104335e70 function=pit_timer_fn expires=5 softexpires=5 mode=0x0"
        " was_armed=1",
        (0xFFFF888104335E70, PIT, 5, 1),
    ),
    ("hrtimer_start", "hrtimer=1 function=hrtimer_wakeup expires=5 softexpires=5", OTHER_FUNCTION),
    ("hrtimer_expire_entry", "hrtimer=1 function=tick_nohz_handler now=5", OTHER_FUNCTION),
    (
        "sched_kthread_work_queue_work",
        "work struct=2b function=pit_do_work [kvm] worker=ec",
        (0x2B, WORK, 0xEC),
    ),
    (
        "sched_kthread_work_execute_start",
        "work struct 0000002b: function pit_do_work [kvm]",
        (0x2B, WORK),
    ),
    ("sched_kthread_work_execute_end", "work struct 2b: function other", OTHER_FUNCTION),
    ("kvm_inj_virq", "irq 52", (52, 0, 0)),
    ("kvm_inj_virq", "Soft/INTn 0x20 [reinjected]", (0x20, 1, 1)),
    ("kvm_apic_accept_irq", "apicid 0 vec 78 (Fixed|edge) (coalesced)", (0, 0, 0, 78)),
    (
        "kvm_ioapic_set_irq",
        "pin 2 dst 1 vec=32 (Fixed|physical|edge)",
        (1 << 56 | 32, 2, 0),
    ),
    ("kvm_ack_irq", "irqchip 1 pin 3", (1, 3)),
    ("kvm_vcpu_wakeup", "wait time 5 ns", (5, 1, 0)),
    ("kvm_pio", "pio_write at 0x20 size 1 count 1", (1, 0x20, 1, 1, 0)),
    ("kvm_pio", "pio_read at 0x1f0 size 2 count 8 val 0x5 (...)", (0, 0x1F0, 2, 8, 5)),
    ("kvm_entry", "vcpu 1", (1, 0, 0)),
    ("kvm_entry", "vcpu 1, rip 0x40", (1, 0x40, 0)),
    (
        "kvm_entry",
        "vcpu 1, rip 0x40 intr_info 0x80000020 error_code 0x00000000[immediate exit]",
        (1, 0x40, 0x80000020),
    ),
    ("kvm_exit", "reason HLT rip 0x22 info 0 800000fd", (0, 12, 0x22, 0, 0)),
    ("kvm_exit", "reason IO_INSTRUCTION rip 0xff info e90008 0", (0, 30, 0xFF, 0xE90008, 0)),
    ("kvm_exit", "vcpu 3 reason npf rip 0xff info 1 2", (3, 0x400, 0xFF, 1, 0)),
    ("kvm_exit", "reason UNKNOWN (77) rip 0xff info 1 2 vcpu 4", (4, 77, 0xFF, 1, 0)),
    ("kvm_exit", "vcpu 0 reason 0x99 rip 0x1 info1 0x2", (0, 0x99, 1, 2, 0)),
    ("kvm_exit", "vcpu 0 reason TO_COME rip 0x1 info1 0x2", (0, UNKNOWN_EXIT_REASON, 1, 2, 0)),
    (
        "kvm_exit",
        "vcpu 0 reason INVALID_STATE FAILED_VMENTRY rip 0x1 info1 0x2",
        (0, 1 << 31 | 33, 1, 2, 0),
    ),
    (
        "kvm_exit",
        "vcpu 0 reason vintr rip 0x4004ae info1 0x0000000000000007 info2 0x0000000000000000"
        " intr_info 0x00000009 error_code 0x00000000",
        (0, 0x64, 0x4004AE, 7, 9),
    ),
    ("kvm_apicv_inhibit_changed", "set reason=9, inhibits=0x200", (9, 1, 0x200)),
    (
        "sched_switch",
        "prev_comm=CPU 0/KVM prev_pid=7 prev_prio=120 prev_state=R+ ==> next_comm=kvm-pit/5"
        " next_pid=8 next_prio=120",
        (7, 0x100, 8, 0, 120, 120),
    ),
    (
        "sched_switch",
        "prev_comm=a prev_pid=7 prev_prio=-5 prev_state=D|Z ==> next_comm=b next_pid=8 next_prio=1",
        (7, 0x22, 8, 0, -5, 1),
    ),
    ("sched_switch", "kvm-pit/5:8 [120] W ==> swapper/1:0 [120]", (8, 0x80, 0, 0, 120, 120)),
    ("sched_waking", "comm=kvm-pit/5 pid=8 prio=120 target_cpu=001", (8, 1, 120)),
    ("sched_waking", "comm=a b pid=8 prio=120 success=1 target_cpu=012", (8, 12, 120)),
]


@pytest.mark.parametrize(("name", "body", "fields"), WORDINGS)
def test_other_kernels_and_tools_say_it_otherwise(
    name: str, body: str, fields: tuple[int, ...]
) -> None:
    assert parse_body(EVENTS[name], body) == fields


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("hrtimer_start", "hrtimer=0xffff function=0xffffffff8141e2b0 expires=5 softexpires=5"),
        ("hrtimer_expire_entry", "hrtimer=0xffff now=42089774784329 function=0xffffffff8141e2b0"),
        ("kvm_pic_set_irq", "chip=0 pin=0 elcr=0 imr=254 coalesced=0"),
        ("kvm_ioapic_set_irq", "e=0 pin=0 coalesced=0"),
        ("kvm_apic_accept_irq", "apicid 0 vec 1 (Sometimes|edge)"),
        ("kvm_apic", "apic_write APIC_NEW = 0x0"),
        ("kvm_exit", "rip 0x5"),
        (
            "sched_switch",
            "prev_comm=a prev_pid=7 prev_prio=1 prev_state=q ==> next_comm=b next_pid=8"
            " next_prio=1",
        ),
        ("kvm_set_irq", ""),
    ],
)
def test_what_is_not_understood(name: str, body: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - the text itself is the message
        parse_body(EVENTS[name], body)


def test_threads_that_scheduler_events_name() -> None:
    switch = (
        "prev_comm=CPU 0/KVM prev_pid=7 prev_prio=1 prev_state=S"
        " ==> next_comm=b next_pid=8 next_prio=1"
    )
    plugin = "  CPU 0/KVM:7 [120] R ==> b:8 [120]"
    named = [(7, "CPU 0/KVM"), (8, "b")]
    assert thread_names(Event.SCHED_SWITCH, switch) == named
    assert thread_names(Event.SCHED_SWITCH, plugin) == named
    assert thread_names(Event.SCHED_WAKING, "comm=x y pid=8 prio=1 target_cpu=000") == [(8, "x y")]
    assert thread_names(Event.SCHED_WAKING, "comm=<...> pid=8 prio=1 target_cpu=000") == []


def test_no_exit_reason_has_two_numbers() -> None:
    names = [*VMX_EXIT_REASONS.values(), *SVM_EXIT_REASONS.values()]
    assert len(set(names)) == len(names)
