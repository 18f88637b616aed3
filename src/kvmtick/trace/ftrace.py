"""Records as ftrace text: the lines `trace` in tracefs would hold, in the kernel's own wording.

The wording of each event is its `print fmt` in `events/*/*/format` (Linux 6.18); hexadecimal
pointers are the model's fixed numbers. A trailing blank of kvm_pio is left out.
"""

from collections.abc import Callable, Sequence
from typing import TextIO

from kvmtick.trace.events import IRQ_CONTEXT, TRACEPOINTS, Event, Function, Record
from kvmtick.trace.exit_reasons import VMX_EXIT_REASONS

__all__ = [
    "APIC_REGISTERS",
    "DELIVERY_MODES",
    "IRQCHIPS",
    "MMIO_TYPES",
    "SHORTHANDS",
    "SIMULATED",
    "FtraceWriter",
    "event_name",
    "event_text",
    "format_line",
]

SIMULATED = "# kvmtick: a simulated run"
"""Second line of a simulated run's text."""


DELIVERY_MODES = ("Fixed", "LowPrio", "SMI", "Res3", "NMI", "INIT", "SIPI", "ExtINT")
IRQCHIPS = ("PIC master", "PIC slave", "IOAPIC")
_APICV_INHIBITS = (
    "DISABLED",
    "HYPERV",
    "ABSENT",
    "BLOCKIRQ",
    "PHYSICAL_ID_ALIASED",
    "APIC_ID_MODIFIED",
    "APIC_BASE_MODIFIED",
    "NESTED",
    "IRQWIN",
    "PIT_REINJ",
)
MMIO_TYPES = ("unsatisfied-read", "read", "write")
_U64 = (1 << 64) - 1
SHORTHANDS = ("dst", "self", "all", "all-but-self")
APIC_REGISTERS = {
    0x20: "ID",
    0x30: "LVR",
    0x80: "TASKPRI",
    0x90: "ARBPRI",
    0xA0: "PROCPRI",
    0xB0: "EOI",
    0xC0: "RRR",
    0xD0: "LDR",
    0xE0: "DFR",
    0xF0: "SPIV",
    0x100: "ISR",
    0x180: "TMR",
    0x200: "IRR",
    0x280: "ESR",
    0x300: "ICR",
    0x310: "ICR2",
    0x320: "LVTT",
    0x330: "LVTTHMR",
    0x340: "LVTPC",
    0x350: "LVT0",
    0x360: "LVT1",
    0x370: "LVTERR",
    0x380: "TMICT",
    0x390: "TMCCT",
    0x3E0: "TDCR",
    0x3F0: "SELF_IPI",
    0x400: "EFEAT",
    0x410: "ECTRL",
}


def _function(value: int) -> str:
    return Function(value).name.lower()


def _symbol(value: int, names: Sequence[str]) -> str:
    """`__print_symbolic`: what has no name is a number."""
    return names[value] if 0 <= value < len(names) else f"0x{value & _U64:x}"


def _hrtimer_start(r: Record) -> str:
    return (
        f"hrtimer={r[3]:016x} function={_function(r[4])} expires={r[5]} softexpires={r[5]}"
        f" mode=ABS was_armed={r[6]:d}"
    )


def _hrtimer_expire_entry(r: Record) -> str:
    return f"hrtimer={r[3]:016x} function={_function(r[4])} now={r[5]}"


def _work_queue(r: Record) -> str:
    return f"work struct={r[3]:016x} function={_function(r[4])} worker={r[5]:016x}"


def _work_execute(r: Record) -> str:
    return f"work struct {r[3]:016x}: function {_function(r[4])}"


def _pic_set_irq(r: Record) -> str:
    pin = r[4] & 31
    trigger = "level" if r[5] >> pin & 1 else "edge"
    masked = "|masked" if r[6] >> pin & 1 else ""
    return f"chip {r[3]} pin {r[4]} ({trigger}{masked}){' (coalesced)' if r[7] else ''}"


def _ioapic_set_irq(r: Record) -> str:
    e = r[3]
    return (
        f"pin {r[4]} dst {e >> 56:x} vec {e & 0xFF} ({DELIVERY_MODES[e >> 8 & 7]}"
        f"|{'logical' if e >> 11 & 1 else 'physical'}|{'level' if e >> 15 & 1 else 'edge'}"
        f"{'|masked' if e >> 16 & 1 else ''}){' (coalesced)' if r[5] else ''}"
    )


def _inj_virq(r: Record) -> str:
    vector = "of unknown vector" if r[3] < 0 else f"0x{r[3]:x}"  # inferred (kvmtick.trace.inferred)
    return f"{'Soft/INTn' if r[4] else 'IRQ'} {vector}{' [reinjected]' if r[5] else ''}"


def _vcpu_wakeup(r: Record) -> str:
    return f"{'wait' if r[4] else 'poll'} time {r[3]} ns, polling {'valid' if r[5] else 'invalid'}"


def _pio(r: Record) -> str:
    text = (
        f"pio_{'write' if r[3] else 'read'} at 0x{r[4]:x} size {r[5]} count {r[6]} val 0x{r[7]:x}"
    )
    return f"{text} (...)" if r[6] > 1 else text


def _entry(r: Record) -> str:
    return f"vcpu {r[3]}, rip 0x{r[4]:x} intr_info 0x{r[5]:08x} error_code 0x00000000"


def _exit(r: Record) -> str:
    return (
        f"vcpu {r[3]} reason {VMX_EXIT_REASONS.get(r[4], f'0x{r[4]:x}')} rip 0x{r[5]:x}"
        f" info1 0x{r[6]:016x} info2 0x{0:016x} intr_info 0x{r[7]:08x} error_code 0x00000000"
        f" requests 0x{0:016x}"
    )


def _apicv_inhibit_changed(r: Record) -> str:
    names = "|".join(name for bit, name in enumerate(_APICV_INHIBITS) if r[5] >> bit & 1)
    return f"{'set' if r[4] else 'cleared'} reason={r[3]}, inhibits=0x{r[5]:x} {names}".rstrip()


def _apic_accept_irq(r: Record) -> str:
    return (
        f"apicid {r[3]:x} vec {r[6]} ({DELIVERY_MODES[r[4] >> 8 & 7]}"
        f"|{'level' if r[5] else 'edge'})"
    )


def _msi_set_irq(r: Record) -> str:
    address, data = r[3], r[4]
    return (
        f"dst {address >> 12 & 0xFF | address >> 32 & 0xFFFFFF00:x} vec {data & 0xFF}"
        f" ({DELIVERY_MODES[data >> 8 & 7]}|{'logical' if address >> 2 & 1 else 'physical'}"
        f"|{'level' if data >> 15 & 1 else 'edge'}{'|rh' if address >> 3 & 1 else ''})"
    )


def _apic_ipi(r: Record) -> str:
    icr = r[3]
    return (
        f"dst {r[4]:x} vec {icr & 0xFF} ({DELIVERY_MODES[icr >> 8 & 7]}"
        f"|{'logical' if icr >> 11 & 1 else 'physical'}"
        f"|{'assert' if icr >> 14 & 1 else 'de-assert'}|{'level' if icr >> 15 & 1 else 'edge'}"
        f"|{SHORTHANDS[icr >> 18 & 3]})"
    )


def _mmio(r: Record) -> str:
    return f"mmio {_symbol(r[3], MMIO_TYPES)} len {r[4]} gpa 0x{r[5]:x} val 0x{r[6]:x}"


def _apic(r: Record) -> str:
    register = f"APIC_{APIC_REGISTERS[r[4]]}" if r[4] in APIC_REGISTERS else f"0x{r[4]:x}"
    return f"apic_{'write' if r[3] else 'read'} {register} = 0x{r[5]:x}"


def _delayed_eoi_inj(r: Record) -> str:
    e = r[3]
    return (
        f"dst {e >> 56:x} vec {e & 0xFF} ({DELIVERY_MODES[e >> 8 & 7]}"
        f"|{'logical' if e >> 11 & 1 else 'physical'}|{'level' if e >> 15 & 1 else 'edge'}"
        f"{'|masked' if e >> 16 & 1 else ''})"
    )


_TASK_STATES = "SDTtXZPI"
_PREEMPTED = 1 << len(_TASK_STATES)


def _comm(pid: int, tasks: Sequence[str]) -> str:
    end = f"-{pid}"
    return next((task[: -len(end)] for task in tasks if task.endswith(end)), "<...>")


def _sched_waking(r: Record, tasks: Sequence[str]) -> str:
    return f"comm={_comm(r[3], tasks)} pid={r[3]} prio={r[5]} target_cpu={r[4]:03d}"


def _sched_switch(r: Record, tasks: Sequence[str]) -> str:
    _, _, _, prev_pid, prev_state, next_pid, cpu, prev_prio, next_prio = r
    idle = f"swapper/{cpu}"
    states = [name for bit, name in enumerate(_TASK_STATES) if prev_state >> bit & 1]
    return (
        f"prev_comm={_comm(prev_pid, tasks) if prev_pid else idle} prev_pid={prev_pid}"
        f" prev_prio={prev_prio} prev_state={'|'.join(states) or 'R'}"
        f"{'+' if prev_state & _PREEMPTED else ''}"
        f" ==> next_comm={_comm(next_pid, tasks) if next_pid else idle} next_pid={next_pid}"
        f" next_prio={next_prio}"
    )


_TEXT: dict[int, Callable[[Record], str]] = {
    Event.HRTIMER_START: _hrtimer_start,
    Event.HRTIMER_CANCEL: lambda r: f"hrtimer={r[3]:016x}",
    Event.HRTIMER_EXPIRE_ENTRY: _hrtimer_expire_entry,
    Event.WORK_QUEUE: _work_queue,
    Event.WORK_START: _work_execute,
    Event.WORK_END: _work_execute,
    Event.KVM_SET_IRQ: lambda r: f"gsi {r[3]} level {r[4]} source {r[5]}",
    Event.KVM_PIC_SET_IRQ: _pic_set_irq,
    Event.KVM_IOAPIC_SET_IRQ: _ioapic_set_irq,
    Event.KVM_ACK_IRQ: lambda r: f"irqchip {_symbol(r[3], IRQCHIPS)} pin {r[4]}",
    Event.KVM_INJ_VIRQ: _inj_virq,
    Event.KVM_VCPU_WAKEUP: _vcpu_wakeup,
    Event.KVM_PIO: _pio,
    Event.KVM_ENTRY: _entry,
    Event.KVM_EXIT: _exit,
    Event.KVM_APICV_INHIBIT_CHANGED: _apicv_inhibit_changed,
    Event.PIT_RESET_REINJECT: lambda r: f"pending {r[3]}",
    Event.KVM_APIC_ACCEPT_IRQ: _apic_accept_irq,
    Event.KVM_EOI: lambda r: f"apicid {r[3]:x} vector {r[4]}",
    Event.KVM_MSI_SET_IRQ: _msi_set_irq,
    Event.KVM_APIC_IPI: _apic_ipi,
    Event.KVM_APIC: _apic,
    Event.KVM_MMIO: _mmio,
    Event.KVM_MSR: lambda r: (
        f"msr_{'write' if r[3] else 'read'} {r[4]:x} = 0x{r[5]:x}{' (#GP)' if r[6] else ''}"
    ),
    Event.KVM_IOAPIC_DELAYED_EOI_INJ: _delayed_eoi_inj,
    Event.KVM_INJ_NMI: lambda r: f"vcpu {r[3]} pending {r[4]}",
    Event.LOST_EVENTS: lambda r: f"cpu {r[3]} count {r[4]}",
    Event.KVM_APICV_ACCEPT_IRQ: _apic_accept_irq,
}

_TEXT_OF_TASKS: dict[int, Callable[[Record, Sequence[str]], str]] = {
    Event.SCHED_WAKING: _sched_waking,
    Event.SCHED_SWITCH: _sched_switch,
}


def event_name(record: Record) -> str:
    """The tracepoint's name, as tracefs has it."""
    return TRACEPOINTS[Event(record[1])].name


def event_text(record: Record, tasks: Sequence[str] = ()) -> str:
    """What follows the name on an event's line; `tasks` have the names of threads in it."""
    text = _TEXT.get(record[1])
    return text(record) if text else _TEXT_OF_TASKS[record[1]](record, tasks)


def format_line(record: Record, tasks: list[str]) -> str:
    """One line of ftrace text. The machine's host has one CPU, number 0; a record knows no other,
    but that of sched_switch.
    """
    comm, _, pid = tasks[record[2] & ~IRQ_CONTEXT].rpartition("-")
    flags = "d.h1." if record[2] & IRQ_CONTEXT else "....."
    cpu = record[6] if record[1] == Event.SCHED_SWITCH else 0
    seconds, ns = divmod(record[0], 1_000_000_000)
    return (
        f"{comm:>16}-{pid:<7} [{cpu:03d}] {flags} {seconds:5d}.{ns // 1000:06d}:"
        f" {event_name(record)}: {event_text(record, tasks)}"
    )


class FtraceWriter:
    """A recorder's consumer that writes ftrace text to a file."""

    def __init__(self, file: TextIO, tasks: list[str], simulated: bool = True) -> None:
        """`tasks` is the recorder's, which may still grow."""
        self._file = file
        self._tasks = tasks
        self.lines = 0
        file.write(f"# tracer: nop\n{SIMULATED if simulated else '#'}\n")
        file.write("#           TASK-PID     CPU#  |||||  TIMESTAMP  FUNCTION\n")
        file.write("#              | |         |   |||||     |         |\n")

    def __call__(self, batch: list[Record]) -> None:
        """Write a batch of records."""
        tasks = self._tasks
        self._file.writelines(f"{format_line(record, tasks)}\n" for record in batch)
        self.lines += len(batch)
