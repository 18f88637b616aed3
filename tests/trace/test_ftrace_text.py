"""The text of a record is the kernel's: real lines of recorded traces, and the kernel's print fmt.

The file named with a line is one of tests/golden/traces (Linux 6.18, x86-64). `(fmt)` marks a line
made by hand from `events/*/*/format` of that kernel, where the recordings have no such event;
`(6.18)` is of such a kernel's `trace`.
"""

import io
import re

import pytest

from kvmtick.trace.events import (
    IRQ_CONTEXT,
    TRACEPOINTS,
    ApicvInhibitReason,
    Event,
    Function,
    Irqchip,
    Record,
    field,
)
from kvmtick.trace.ftrace import SIMULATED, FtraceWriter, event_name, event_text, format_line

PIT_FN = int(Function.PIT_TIMER_FN)
WORK_FN = int(Function.PIT_DO_WORK)
APIC_FN = int(Function.APIC_TIMER_FN)
FIXED, NMI = 0x000, 0x400
NO_EXIT_DETAIL = "error_code 0x00000000"

# (where it comes from, event, fields, what follows the name on the line)
LINES: list[tuple[str, Event, tuple[int, ...], str]] = [
    (
        "base_1.txt",
        Event.HRTIMER_START,
        (0x15E513D4, PIT_FN, 5432816934724, False),
        "hrtimer=0000000015e513d4 function=pit_timer_fn expires=5432816934724"
        " softexpires=5432816934724 mode=ABS was_armed=0",
    ),
    (
        "base_1.txt",
        Event.HRTIMER_EXPIRE_ENTRY,
        (0x15E513D4, PIT_FN, 5432816968437),
        "hrtimer=0000000015e513d4 function=pit_timer_fn now=5432816968437",
    ),
    ("(fmt)", Event.HRTIMER_CANCEL, (0x15E513D4,), "hrtimer=0000000015e513d4"),
    (
        "base_1.txt",
        Event.WORK_QUEUE,
        (0x2B4C4119, WORK_FN, 0xEC1B9D99),
        "work struct=000000002b4c4119 function=pit_do_work worker=00000000ec1b9d99",
    ),
    (
        "base_1.txt",
        Event.WORK_START,
        (0x2B4C4119, WORK_FN),
        "work struct 000000002b4c4119: function pit_do_work",
    ),
    (
        "base_1.txt",
        Event.WORK_END,
        (0x2B4C4119, WORK_FN),
        "work struct 000000002b4c4119: function pit_do_work",
    ),
    ("base_1.txt", Event.KVM_SET_IRQ, (0, 1, 2), "gsi 0 level 1 source 2"),
    ("base_1.txt", Event.KVM_SET_IRQ, (0, 0, 2), "gsi 0 level 0 source 2"),
    ("base_1.txt", Event.KVM_PIC_SET_IRQ, (0, 0, 0, 0xFE, False), "chip 0 pin 0 (edge)"),
    ("picmask_0.txt", Event.KVM_PIC_SET_IRQ, (0, 0, 0, 0xFF, False), "chip 0 pin 0 (edge|masked)"),
    ("if0_0.txt", Event.KVM_PIC_SET_IRQ, (0, 0, 0, 0xFE, True), "chip 0 pin 0 (edge) (coalesced)"),
    ("(fmt)", Event.KVM_PIC_SET_IRQ, (1, 3, 0x08, 0xF7, False), "chip 1 pin 3 (level)"),
    (
        "(fmt)",
        Event.KVM_PIC_SET_IRQ,
        (1, 3, 0x08, 0xFF, True),
        "chip 1 pin 3 (level|masked) (coalesced)",
    ),
    (
        "base_1.txt",
        Event.KVM_IOAPIC_SET_IRQ,
        (0x10000, 0, False),
        "pin 0 dst 0 vec 0 (Fixed|physical|edge|masked)",
    ),
    (
        "ioapic_if0_0.txt",
        Event.KVM_IOAPIC_SET_IRQ,
        (0x20, 2, False),
        "pin 2 dst 0 vec 32 (Fixed|physical|edge)",
    ),
    (
        "(fmt)",
        Event.KVM_IOAPIC_SET_IRQ,
        (0xAB << 56 | 0x8C00 | 0xFF, 23, True),
        "pin 23 dst ab vec 255 (NMI|logical|level) (coalesced)",
    ),
    ("base_1.txt", Event.KVM_ACK_IRQ, (Irqchip.PIC_MASTER, 0), "irqchip PIC master pin 0"),
    ("ioapic_if0_0.txt", Event.KVM_ACK_IRQ, (Irqchip.IOAPIC, 2), "irqchip IOAPIC pin 2"),
    ("(fmt)", Event.KVM_ACK_IRQ, (Irqchip.PIC_SLAVE, 9), "irqchip PIC slave pin 9"),
    ("(fmt)", Event.KVM_INJ_VIRQ, (0x20, False, False), "IRQ 0x20"),
    ("(fmt)", Event.KVM_INJ_VIRQ, (0x20, False, True), "IRQ 0x20 [reinjected]"),
    ("(fmt)", Event.KVM_INJ_VIRQ, (0x80, True, False), "Soft/INTn 0x80"),
    (
        "picmask_1.txt",
        Event.KVM_VCPU_WAKEUP,
        (1171758, True, True),
        "wait time 1171758 ns, polling valid",
    ),
    ("(fmt)", Event.KVM_VCPU_WAKEUP, (0, False, False), "poll time 0 ns, polling invalid"),
    (
        "base_1.txt",
        Event.KVM_PIO,
        (1, 0x20, 1, 1, 0x11),
        "pio_write at 0x20 size 1 count 1 val 0x11",
    ),
    (
        "notrun_1.txt",
        Event.KVM_PIO,
        (1, 0xD8, 4, 1, 0xC350),
        "pio_write at 0xd8 size 4 count 1 val 0xc350",
    ),
    (
        "(fmt)",
        Event.KVM_PIO,
        (0, 0x61, 1, 1, 0x30),
        "pio_read at 0x61 size 1 count 1 val 0x30",
    ),
    ("(fmt)", Event.KVM_PIO, (0, 0x1F0, 2, 8, 0), "pio_read at 0x1f0 size 2 count 8 val 0x0 (...)"),
    (
        "(fmt)",
        Event.KVM_ENTRY,
        (0, 0x80FD, 0x8000_0020),
        f"vcpu 0, rip 0x80fd intr_info 0x80000020 {NO_EXIT_DETAIL}",
    ),
    (
        "(fmt)",
        Event.KVM_EXIT,
        (0, 30, 0x8104, 0x20_0000, 0),
        "vcpu 0 reason IO_INSTRUCTION rip 0x8104 info1 0x0000000000200000 info2 0x0000000000000000"
        f" intr_info 0x00000000 {NO_EXIT_DETAIL} requests 0x0000000000000000",
    ),
    (
        "(fmt)",
        Event.KVM_APICV_INHIBIT_CHANGED,
        (ApicvInhibitReason.PIT_REINJ, True, 1 << 9),
        "set reason=9, inhibits=0x200 PIT_REINJ",
    ),
    (
        "(fmt)",
        Event.KVM_APICV_INHIBIT_CHANGED,
        (ApicvInhibitReason.PIT_REINJ, False, 1 << 2 | 1 << 8),
        "cleared reason=9, inhibits=0x104 ABSENT|IRQWIN",
    ),
    (
        "(fmt)",
        Event.KVM_APICV_INHIBIT_CHANGED,
        (ApicvInhibitReason.PIT_REINJ, False, 0),
        "cleared reason=9, inhibits=0x0",
    ),
    (
        "lapic_periodic.txt",
        Event.HRTIMER_EXPIRE_ENTRY,
        (0xF5F68099, APIC_FN, 2448453982143),
        "hrtimer=00000000f5f68099 function=apic_timer_fn now=2448453982143",
    ),
    (
        "ioapic_if0_0.txt",
        Event.KVM_APIC_ACCEPT_IRQ,
        (0, FIXED, 0, 32),
        "apicid 0 vec 32 (Fixed|edge)",
    ),
    (
        "nmi_wd_reinject0.txt",
        Event.KVM_APIC_ACCEPT_IRQ,
        (0, NMI, 0, 0),
        "apicid 0 vec 0 (NMI|edge)",
    ),
    (
        "(fmt)",
        Event.KVM_APIC_ACCEPT_IRQ,
        (0x1F, 0x100, 1, 255),
        "apicid 1f vec 255 (LowPrio|level)",
    ),
    (
        "(fmt)",
        Event.KVM_APICV_ACCEPT_IRQ,
        (0x1F, 0x100, 1, 255),
        "apicid 1f vec 255 (LowPrio|level)",
    ),
    ("ioapic_if0_0.txt", Event.KVM_EOI, (0, 32), "apicid 0 vector 32"),
    ("ioapic_if0_0.txt", Event.KVM_EOI, (0, -1), "apicid 0 vector -1"),
    ("(fmt)", Event.KVM_EOI, (0x10, 64), "apicid 10 vector 64"),
    (
        "(fmt)",
        Event.KVM_MSI_SET_IRQ,
        (0xFEE0_0000, 0x43),
        "dst 0 vec 67 (Fixed|physical|edge)",
    ),
    (
        "(fmt)",
        Event.KVM_MSI_SET_IRQ,
        (0x100 << 32 | 0xFEE0_0000 | 0xAB << 12 | 1 << 3 | 1 << 2, 0x8000 | NMI | 0x30),
        "dst 1ab vec 48 (NMI|logical|level|rh)",
    ),
    (
        "(fmt)",
        Event.KVM_APIC_IPI,
        (0x4000 | 0x61, 1),
        "dst 1 vec 97 (Fixed|physical|assert|edge|dst)",
    ),
    (
        "(fmt)",
        Event.KVM_APIC_IPI,
        (3 << 18 | 1 << 15 | 1 << 11 | 0x500, 0xFF),
        "dst ff vec 0 (INIT|logical|de-assert|level|all-but-self)",
    ),
    (
        "(fmt)",
        Event.KVM_APIC_IPI,
        (1 << 18 | 0x4600 | 8, 0),
        "dst 0 vec 8 (SIPI|physical|assert|edge|self)",
    ),
    (
        "(fmt)",
        Event.KVM_APIC_IPI,
        (2 << 18 | 0x4700 | 8, 0),
        "dst 0 vec 8 (ExtINT|physical|assert|edge|all)",
    ),
    ("(fmt)", Event.KVM_APIC, (1, 0x320, 0x2004E), "apic_write APIC_LVTT = 0x2004e"),
    ("(fmt)", Event.KVM_APIC, (0, 0x390, 999), "apic_read APIC_TMCCT = 0x3e7"),
    ("(fmt)", Event.KVM_APIC, (0, 0x110, 1), "apic_read 0x110 = 0x1"),
    ("(fmt)", Event.KVM_APIC, (1, 0x300, 1 << 32 | 0x61), "apic_write APIC_ICR = 0x100000061"),
    (
        "(fmt)",
        Event.KVM_MMIO,
        (2, 4, 0xFEE0_00B0, 0),
        "mmio write len 4 gpa 0xfee000b0 val 0x0",
    ),
    (
        "(fmt)",
        Event.KVM_MMIO,
        (1, 8, 0xFEC0_0010, 0x17_0011),
        "mmio read len 8 gpa 0xfec00010 val 0x170011",
    ),
    (
        "(fmt)",
        Event.KVM_MMIO,
        (0, 1, 0xD000_0000, 0),
        "mmio unsatisfied-read len 1 gpa 0xd0000000 val 0x0",
    ),
    ("(fmt)", Event.KVM_MSR, (1, 0x6E0, 1_000_000, False), "msr_write 6e0 = 0xf4240"),
    ("(fmt)", Event.KVM_MSR, (0, 0x802, 0, True), "msr_read 802 = 0x0 (#GP)"),
    (
        "(fmt)",
        Event.KVM_IOAPIC_DELAYED_EOI_INJ,
        (1 << 56 | 0x8140,),
        "dst 1 vec 64 (LowPrio|physical|level)",
    ),
    (
        "(fmt)",
        Event.KVM_IOAPIC_DELAYED_EOI_INJ,
        (0x1_0840,),
        "dst 0 vec 64 (Fixed|logical|edge|masked)",
    ),
    (
        "(fmt)",
        Event.KVM_APICV_ACCEPT_IRQ,
        (1, FIXED, 0, 236),
        "apicid 1 vec 236 (Fixed|edge)",
    ),
    (
        "(6.18)",
        Event.SCHED_WAKING,
        (18, 0, 0),
        "comm=migration/0 pid=18 prio=0 target_cpu=000",
    ),
    (
        "(fmt)",
        Event.SCHED_WAKING,
        (7, 12, 49),
        "comm=<...> pid=7 prio=49 target_cpu=012",
    ),
    (
        "(6.18)",
        Event.SCHED_SWITCH,
        (16372, 0x100, 18, 0, 120, 0),
        "prev_comm=bash prev_pid=16372 prev_prio=120 prev_state=R+"
        " ==> next_comm=migration/0 next_pid=18 next_prio=0",
    ),
    (
        "(6.18)",
        Event.SCHED_SWITCH,
        (16372, 1, 0, 1, 120, 120),
        "prev_comm=bash prev_pid=16372 prev_prio=120 prev_state=S"
        " ==> next_comm=swapper/1 next_pid=0 next_prio=120",
    ),
    (
        "(6.18)",
        Event.SCHED_SWITCH,
        (0, 0, 15, 1, 120, 120),
        "prev_comm=swapper/1 prev_pid=0 prev_prio=120 prev_state=R"
        " ==> next_comm=rcu_preempt next_pid=15 next_prio=120",
    ),
    (
        "(fmt)",
        Event.SCHED_SWITCH,
        (15, 0x82, 0, 0, 120, 120),
        "prev_comm=rcu_preempt prev_pid=15 prev_prio=120 prev_state=D|I"
        " ==> next_comm=swapper/0 next_pid=0 next_prio=120",
    ),
]
TASKS = ["<idle>-0", "migration/0-18", "bash-16372", "rcu_preempt-15", "<idle>-0"]


def record(event: Event, *fields: int) -> Record:
    return (1_000, int(event), 0, *fields)


@pytest.mark.parametrize(
    ("event", "fields", "text"),
    [(event, fields, text) for _, event, fields, text in LINES],
    ids=[f"{event.name.lower()}-{source}-{n}" for n, (source, event, *_) in enumerate(LINES)],
)
def test_the_text_is_the_kernels(event: Event, fields: tuple[int, ...], text: str) -> None:
    assert event_text(record(event, *fields), TASKS) == text


def test_every_event_of_the_kernel_has_a_line_above() -> None:
    ours = {Event.PIT_RESET_REINJECT, Event.KVM_INJ_NMI, Event.LOST_EVENTS}
    assert {event for _, event, *_ in LINES} == set(Event) - ours
    assert {tracepoint.system for event, tracepoint in TRACEPOINTS.items() if event in ours} == {
        "kvmtick"
    }, "an event the kernel does not have must not claim to be of one of its subsystems"


def test_the_models_own_events() -> None:
    assert event_text(record(Event.PIT_RESET_REINJECT, 3)) == "pending 3"
    assert event_text(record(Event.KVM_INJ_NMI, 1, 2)) == "vcpu 1 pending 2"
    assert event_text(record(Event.LOST_EVENTS, 1, -1)) == "cpu 1 count -1"


@pytest.mark.parametrize("event", list(Event))
def test_numbers_that_no_kernel_writes_have_a_text(event: Event) -> None:
    """A damaged recording may hold any."""
    for value in (-1, 3, 1 << 63):
        fields = [value] * len(TRACEPOINTS[event].fields)
        if "function" in TRACEPOINTS[event].fields:
            fields[1] = PIT_FN
        assert "\n" not in event_text(record(event, *fields))
    assert event_text(record(Event.KVM_ACK_IRQ, 3, 0)) == "irqchip 0x3 pin 0"


APIC_REGISTERS = """
020 ID   030 LVR  080 TASKPRI 090 ARBPRI  0a0 PROCPRI 0b0 EOI  0c0 RRR  0d0 LDR    0e0 DFR
0f0 SPIV 100 ISR  180 TMR     200 IRR     280 ESR     300 ICR  310 ICR2 320 LVTT   330 LVTTHMR
340 LVTPC 350 LVT0 360 LVT1   370 LVTERR  380 TMICT   390 TMCCT 3e0 TDCR 3f0 SELF_IPI
400 EFEAT 410 ECTRL
"""
"""kvm_apic's print fmt, `__print_symbolic`."""


def test_the_registers_of_a_local_apic_have_the_kernels_names() -> None:
    names = dict(re.findall(r"(\w{3}) (\w+)", APIC_REGISTERS))
    assert len(names) == 28
    for register in range(0, 0x500, 0x10):
        name = names.get(f"{register:03x}")
        wanted = f"APIC_{name}" if name else f"0x{register:x}"
        assert event_text(record(Event.KVM_APIC, 1, register, 0)) == f"apic_write {wanted} = 0x0"


@pytest.mark.parametrize(
    ("reason", "name"),
    [
        (1, "EXTERNAL_INTERRUPT"),
        (2, "TRIPLE_FAULT"),
        (7, "INTERRUPT_WINDOW"),
        (8, "NMI_WINDOW"),
        (12, "HLT"),
        (30, "IO_INSTRUCTION"),
        (31, "MSR_READ"),
        (32, "MSR_WRITE"),
        (49, "EPT_MISCONFIG"),
        (52, "PREEMPTION_TIMER"),
    ],
)
def test_exit_reasons_have_the_kernels_names(reason: int, name: str) -> None:
    assert f" reason {name} rip " in event_text(record(Event.KVM_EXIT, 0, reason, 0, 0, 0))


def test_an_exit_reason_without_a_name_is_a_number() -> None:
    assert " reason 0x10000 rip " in event_text(record(Event.KVM_EXIT, 0, 0x10000, 0, 0, 0))


@pytest.mark.parametrize("event", list(Event))
def test_a_record_has_the_fields_of_its_tracepoint(event: Event) -> None:
    names = TRACEPOINTS[event].fields
    made = record(event, *range(100, 100 + len(names)))
    assert [field(made, name) for name in names] == list(range(100, 100 + len(names)))
    with pytest.raises(ValueError, match="not in"):
        field(made, "no_such_field")


# --- the line -----------------------------------------------------------------------------------

REAL_LINE = (  # base_1.txt
    "    kvm-pit/6084-6132    [001] .....  5432.816989: kvm_set_irq: gsi 0 level 1 source 2"
)


def test_the_columns_are_those_of_tracefs() -> None:
    line = format_line(
        (5432_816989_123, int(Event.KVM_SET_IRQ), 1, 0, 1, 2), ["<idle>-0", "kvm-pit/6084-6132"]
    )
    assert line == REAL_LINE.replace("[001]", "[000]")


@pytest.mark.parametrize(
    ("ts_ns", "text"),
    [
        (0, "    0.000000"),
        (999, "    0.000000"),
        (1_000, "    0.000001"),
        (999_999_999, "    0.999999"),
        (123_456_000_001_000, "123456.000001"),
    ],
)
def test_seconds_and_microseconds_rounded_down(ts_ns: int, text: str) -> None:
    line = format_line((ts_ns, int(Event.KVM_SET_IRQ), 0, 0, 1, 2), ["<idle>-0"])
    assert (
        line == f"          <idle>-0       [000] ..... {text}: kvm_set_irq: gsi 0 level 1 source 2"
    )


def test_an_interrupt_is_marked_on_the_task_it_hit() -> None:
    made = (0, int(Event.HRTIMER_CANCEL), 1 | IRQ_CONTEXT, 7)
    line = format_line(made, ["<idle>-0", "CPU 0/KVM-1002"])
    # base_1.txt: `<idle>-0       [001] dNh1.`: interrupts off, hard interrupt context
    assert line.startswith("       CPU 0/KVM-1002    [000] d.h1. ")


def test_the_file_opens_as_tracefs_does_and_holds_every_record() -> None:
    file = io.StringIO()
    tasks = ["<idle>-0"]
    writer = FtraceWriter(file, tasks)
    tasks.append("kvm-pit/1000-1001")
    writer([(1, int(Event.KVM_SET_IRQ), 1, 0, 1, 2), (2, int(Event.KVM_SET_IRQ), 1, 0, 0, 2)])
    writer([(3, int(Event.KVM_ACK_IRQ), 0, 0, 0)])
    header = [line for line in file.getvalue().splitlines() if line.startswith("#")]
    lines = file.getvalue().splitlines()[len(header) :]
    assert header[:2] == ["# tracer: nop", SIMULATED]
    assert writer.lines == len(lines) == 3
    assert [re.split(r": ", line, maxsplit=2)[1] for line in lines] == [
        "kvm_set_irq",
        "kvm_set_irq",
        "kvm_ack_irq",
    ]


def test_event_name() -> None:
    assert event_name(record(Event.WORK_QUEUE, 0, 1, 0)) == "sched_kthread_work_queue_work"
