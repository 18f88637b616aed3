"""The tracepoints as typed records, under the kernel's names and with the kernel's fields.

Sources: include/trace/events/{timer,sched}.h, arch/x86/kvm/trace.h and include/trace/events/kvm.h,
as their `events/*/*/format` files describe them. A record is a tuple
`(ts_ns, event, task, field, ...)`; `Tracepoint.fields` names what follows the task. `ts_ns` is the
machine's clock, `task` an index into the recorder's tasks, with `IRQ_CONTEXT` set in an interrupt.
"""

from enum import IntEnum
from typing import Final, NamedTuple

__all__ = [
    "BY_NAME",
    "FUNCTIONS",
    "FUNCTION_AT",
    "HAS_FUNCTION",
    "IRQ_CONTEXT",
    "TRACEPOINTS",
    "ApicvInhibitReason",
    "Event",
    "Function",
    "Irqchip",
    "Record",
    "Tracepoint",
    "field",
]

Record = tuple[int, ...]

IRQ_CONTEXT: Final = 1 << 22
"""Set in a record's task when the event happened in an interrupt on that task's CPU."""

HEADER_FIELDS: Final = 3


class Function(IntEnum):
    """Kernel functions that timer and work events name."""

    PIT_TIMER_FN = 0
    PIT_DO_WORK = 1
    APIC_TIMER_FN = 2


class Irqchip(IntEnum):
    """`irqchip` of kvm_ack_irq and of routing entries (KVM_IRQCHIP_*)."""

    PIC_MASTER = 0
    PIC_SLAVE = 1
    IOAPIC = 2


class ApicvInhibitReason(IntEnum):
    """`reason` of kvm_apicv_inhibit_changed (enum kvm_apicv_inhibit): that of the PIT, and those
    that come with a VM.
    """

    DISABLED = 0
    ABSENT = 2
    PIT_REINJ = 9


class Event(IntEnum):
    """Which tracepoint a record belongs to."""

    HRTIMER_START = 0
    HRTIMER_CANCEL = 1
    HRTIMER_EXPIRE_ENTRY = 2
    WORK_QUEUE = 3
    WORK_START = 4
    WORK_END = 5
    KVM_SET_IRQ = 6
    KVM_PIC_SET_IRQ = 7
    KVM_IOAPIC_SET_IRQ = 8
    KVM_ACK_IRQ = 9
    KVM_INJ_VIRQ = 10
    KVM_VCPU_WAKEUP = 11
    KVM_PIO = 12
    KVM_ENTRY = 13
    KVM_EXIT = 14
    KVM_APICV_INHIBIT_CHANGED = 15
    PIT_RESET_REINJECT = 16
    KVM_APIC_ACCEPT_IRQ = 17
    KVM_EOI = 18
    KVM_MSI_SET_IRQ = 19
    KVM_APIC_IPI = 20
    KVM_APIC = 21
    KVM_MMIO = 22
    KVM_MSR = 23
    KVM_IOAPIC_DELAYED_EOI_INJ = 24
    KVM_INJ_NMI = 25
    LOST_EVENTS = 26
    KVM_APICV_ACCEPT_IRQ = 27
    SCHED_WAKING = 28
    SCHED_SWITCH = 29


class Tracepoint(NamedTuple):
    """One tracepoint: the subsystem and name it has in tracefs, and its fields in order."""

    system: str
    name: str
    fields: tuple[str, ...]


TRACEPOINTS: dict[Event, Tracepoint] = {
    Event.HRTIMER_START: Tracepoint(
        "timer", "hrtimer_start", ("hrtimer", "function", "expires", "was_armed")
    ),
    Event.HRTIMER_CANCEL: Tracepoint("timer", "hrtimer_cancel", ("hrtimer",)),
    Event.HRTIMER_EXPIRE_ENTRY: Tracepoint(
        "timer", "hrtimer_expire_entry", ("hrtimer", "function", "now")
    ),
    Event.WORK_QUEUE: Tracepoint(
        "sched", "sched_kthread_work_queue_work", ("work", "function", "worker")
    ),
    Event.WORK_START: Tracepoint("sched", "sched_kthread_work_execute_start", ("work", "function")),
    Event.WORK_END: Tracepoint("sched", "sched_kthread_work_execute_end", ("work", "function")),
    Event.KVM_SET_IRQ: Tracepoint("kvm", "kvm_set_irq", ("gsi", "level", "irq_source_id")),
    Event.KVM_PIC_SET_IRQ: Tracepoint(
        "kvm", "kvm_pic_set_irq", ("chip", "pin", "elcr", "imr", "coalesced")
    ),
    Event.KVM_IOAPIC_SET_IRQ: Tracepoint("kvm", "kvm_ioapic_set_irq", ("e", "pin", "coalesced")),
    Event.KVM_ACK_IRQ: Tracepoint("kvm", "kvm_ack_irq", ("irqchip", "pin")),
    Event.KVM_INJ_VIRQ: Tracepoint("kvm", "kvm_inj_virq", ("vector", "soft", "reinjected")),
    Event.KVM_VCPU_WAKEUP: Tracepoint("kvm", "kvm_vcpu_wakeup", ("ns", "waited", "valid")),
    Event.KVM_PIO: Tracepoint("kvm", "kvm_pio", ("rw", "port", "size", "count", "val")),
    Event.KVM_ENTRY: Tracepoint("kvm", "kvm_entry", ("vcpu_id", "rip", "intr_info")),
    Event.KVM_EXIT: Tracepoint(
        "kvm", "kvm_exit", ("vcpu_id", "exit_reason", "guest_rip", "info1", "intr_info")
    ),
    Event.KVM_APICV_INHIBIT_CHANGED: Tracepoint(
        "kvm", "kvm_apicv_inhibit_changed", ("reason", "set", "inhibits")
    ),
    # The kernel has no tracepoint in i8254.c. This one is the model's own: without it a reader has
    # to guess which ticks an unmask or a reprogramming threw away.
    Event.PIT_RESET_REINJECT: Tracepoint("kvmtick", "kvm_pit_reset_reinject", ("pending",)),
    Event.KVM_APIC_ACCEPT_IRQ: Tracepoint(
        "kvm", "kvm_apic_accept_irq", ("apicid", "dm", "tm", "vec")
    ),
    Event.KVM_EOI: Tracepoint("kvm", "kvm_eoi", ("apicid", "vector")),
    Event.KVM_MSI_SET_IRQ: Tracepoint("kvm", "kvm_msi_set_irq", ("address", "data")),
    Event.KVM_APIC_IPI: Tracepoint("kvm", "kvm_apic_ipi", ("icr_low", "dest_id")),
    Event.KVM_APIC: Tracepoint("kvm", "kvm_apic", ("rw", "reg", "val")),
    Event.KVM_MMIO: Tracepoint("kvm", "kvm_mmio", ("type", "len", "gpa", "val")),
    Event.KVM_MSR: Tracepoint("kvm", "kvm_msr", ("write", "ecx", "data", "exception")),
    Event.KVM_IOAPIC_DELAYED_EOI_INJ: Tracepoint("kvm", "kvm_ioapic_delayed_eoi_inj", ("e",)),
    # The kernel has none for an NMI either: only intr_info of kvm_entry shows it.
    Event.KVM_INJ_NMI: Tracepoint("kvmtick", "kvm_inj_nmi", ("vcpu_id", "pending")),
    # No tracepoint at all: where the kernel's ring buffer says that records are missing. `count` is
    # -1 if it does not say how many.
    Event.LOST_EVENTS: Tracepoint("kvmtick", "lost_events", ("cpu", "count")),
    # The message went to the hardware (APICv, AVIC): no record will tell of its injection.
    Event.KVM_APICV_ACCEPT_IRQ: Tracepoint(
        "kvm", "kvm_apicv_accept_irq", ("apicid", "dm", "tm", "vec")
    ),
    # The names in these two (comm) are among the reader's tasks, by pid.
    Event.SCHED_WAKING: Tracepoint("sched", "sched_waking", ("pid", "target_cpu", "prio")),
    # `cpu` is no field of the kernel's: it is where the record came from.
    Event.SCHED_SWITCH: Tracepoint(
        "sched",
        "sched_switch",
        ("prev_pid", "prev_state", "next_pid", "cpu", "prev_prio", "next_prio"),
    ),
}


BY_NAME: dict[str, Event] = {tracepoint.name: event for event, tracepoint in TRACEPOINTS.items()}
"""Events by their tracepoint's name."""

FUNCTIONS: dict[str, Function] = {function.name.lower(): function for function in Function}
"""Functions by the kernel's name, in order."""

FUNCTION_AT: Final = HEADER_FIELDS + 1
"""Where records of `HAS_FUNCTION` have their function."""
HAS_FUNCTION: frozenset[int] = frozenset(
    int(event) for event, tracepoint in TRACEPOINTS.items() if "function" in tracepoint.fields
)
"""Events of timers and work items."""


def field(record: Record, name: str) -> int:
    """A field of a record by its tracepoint's name; ValueError if it has no such field."""
    return record[HEADER_FIELDS + TRACEPOINTS[Event(record[1])].fields.index(name)]
