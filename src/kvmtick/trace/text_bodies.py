"""What follows an event's name in ftrace text, as the fields of its tracepoint.

The wordings are those of Linux 4.8 to 6.18 (`print fmt` of `events/*/*/format`), those that
libtraceevent's plugins give `trace-cmd report` (hrtimer_*, sched_switch, kvm_exit), and that of
`kvmtick.trace.ftrace`. A field that a wording does not have is 0; of kvm_pic_set_irq's `elcr` and
`imr` the text has the pin's bit only.

Not modelled: raw fields (`trace-cmd report -R`, the option `fields` of tracefs): there trace-cmd
prints 64-bit fields only in part.
"""

import re
from collections.abc import Callable

from kvmtick.trace.events import TRACEPOINTS, Event, Function
from kvmtick.trace.exit_reasons import SVM_EXIT_REASONS, VMX_EXIT_REASONS
from kvmtick.trace.ftrace import APIC_REGISTERS, DELIVERY_MODES, IRQCHIPS, MMIO_TYPES, SHORTHANDS

__all__ = [
    "EVENTS",
    "OTHER_FUNCTION",
    "UNKNOWN_EXIT_REASON",
    "Fields",
    "parse_body",
    "thread_names",
]

Fields = tuple[int, ...]

EVENTS = {tracepoint.name: event for event, tracepoint in TRACEPOINTS.items()}
"""By the tracepoint's name."""

OTHER_FUNCTION: Fields = ()
"""What a timer or work item gives that has nothing to do with ticks."""

UNKNOWN_EXIT_REASON = -1
"""An exit whose reason has a name that is not known here."""

_FUNCTIONS = {function.name.lower(): int(function) for function in Function}
_DELIVERY_MODES = {name: number << 8 for number, name in enumerate(DELIVERY_MODES)}
_IRQCHIPS = {name: number for number, name in enumerate(IRQCHIPS)}
_MMIO_TYPES = {name: number for number, name in enumerate(MMIO_TYPES)}
_SHORTHANDS = {name: number << 18 for number, name in enumerate(SHORTHANDS)}
_APIC_REGISTERS = {f"APIC_{name}": register for register, name in APIC_REGISTERS.items()}
_EXIT_REASONS = {
    name: number for table in (VMX_EXIT_REASONS, SVM_EXIT_REASONS) for number, name in table.items()
}
_FAILED_VMENTRY = 1 << 31
_UNNAMED = "<...>"
_TASK_STATES = {letter: 1 << bit for bit, letter in enumerate("SDTtXZPI+")} | {"R": 0}
"""`prev_state` of sched_switch as Linux 4.14 and later print it; `+`: it was preempted."""
_PLUGIN_STATES = {letter: 1 << bit for bit, letter in enumerate("SDTtZXxW")} | {"R": 0}
"""The same in trace-cmd's words: those of an older kernel, and nothing of a preemption."""


def _wording(pattern: str) -> Callable[[str], re.Match[str]]:
    """What matches a whole text, but for blanks at its end. Raises ValueError."""
    fullmatch = re.compile(pattern + r"\s*").fullmatch

    def match(text: str) -> re.Match[str]:
        found = fullmatch(text)
        if found is None:
            raise ValueError(text)
        return found

    return match


def _number(digits: str | None, base: int = 16) -> int:
    return int(digits, base) if digits else 0


# A symbol, maybe with offset and size, or trace-cmd's /0x0; the module it is in, if it is in one.
_FUNCTION = r"(?P<function>[\w.]+)(?:\+0x[0-9a-f]+)?(?:/0x[0-9a-f]+)?(?: \[\w+\])?"
_TIMER = r"hrtimer=(?:0x)?(?P<hrtimer>[0-9a-f]+)"


def _function(name: str) -> int | None:
    """A function of ticks; None: of something else. ValueError: an address, nobody knows whose."""
    if name.startswith("0x"):
        raise ValueError(name)
    return _FUNCTIONS.get(name.partition(".")[0])


_START = _wording(_TIMER + " function=" + _FUNCTION + r" expires=(?P<expires>\d+)(?P<more> .*)")


def _hrtimer_start(body: str) -> Fields:
    m = _START(body)
    function = _function(m["function"])
    if function is None:
        return OTHER_FUNCTION
    was_armed = m["more"].endswith("was_armed=1")
    return int(m["hrtimer"], 16), function, int(m["expires"]), int(was_armed)


_CANCEL = _wording(_TIMER)
_EXPIRE = _wording(rf"{_TIMER} function={_FUNCTION} now=(?P<now>\d+)")
_PLUGIN_EXPIRE = _wording(rf"{_TIMER} now=(?P<now>\d+) function={_FUNCTION}")


def _hrtimer_expire_entry(body: str) -> Fields:
    m = _PLUGIN_EXPIRE(body) if body.partition(" ")[2].startswith("now=") else _EXPIRE(body)
    function = _function(m["function"])
    if function is None:
        return OTHER_FUNCTION
    return int(m["hrtimer"], 16), function, int(m["now"])


_WORK = _wording(
    rf"work struct[ =](?:0x)?(?P<work>[0-9a-f]+):? function[ =]{_FUNCTION}"
    r"(?: worker=(?:0x)?(?P<worker>[0-9a-f]+))?"
)


def _work_queue(body: str) -> Fields:
    m = _WORK(body)
    function = _function(m["function"])
    if function is None:
        return OTHER_FUNCTION
    return int(m["work"], 16), function, _number(m["worker"])


def _work_execute(body: str) -> Fields:
    return _work_queue(body)[:2]


_SET_IRQ = _wording(r"gsi (\d+) level (-?\d+) source (-?\d+)")
_PIC = _wording(r"chip (\d+) pin (\d+) \((level|edge)(\|masked)?\)( \(coalesced\))?")


def _set_irq(body: str) -> Fields:
    return tuple(map(int, _SET_IRQ(body).groups()))


def _pic_set_irq(body: str) -> Fields:
    chip, pin, trigger, masked, coalesced = _PIC(body).groups()
    bit = 1 << int(pin)
    return (
        int(chip),
        int(pin),
        bit if trigger == "level" else 0,
        bit if masked else 0,
        int(coalesced is not None),
    )


_MESSAGE = (
    r"dst (?P<dst>[0-9a-f]+) vec[ =](?P<vec>\d+)"
    r" \((?P<dm>\w+)\|(?P<logical>logical|physical)(?P<assert>\|assert|\|de-assert)?"
    r"\|(?P<level>level|edge)"
)
_ENTRY = _MESSAGE + r"(?P<masked>\|masked)?\)"
_IOAPIC = _wording(r"pin (?P<pin>\d+) " + _ENTRY + r"(?P<coalesced> \(coalesced\))?")
_DELAYED = _wording(_ENTRY)
_MSI = _wording(_MESSAGE + r"(?P<rh>\|rh)?\)")
_IPI = _wording(_MESSAGE + r"\|(?P<shorthand>[\w-]+)\)")


def _low(m: re.Match[str]) -> int:
    """Vector, delivery mode, trigger: at the same bits in IOAPIC entries, ICR and MSI data."""
    return int(m["vec"]) | _DELIVERY_MODES[m["dm"]] | (m["level"] == "level") << 15


def _redirection_entry(m: re.Match[str]) -> int:
    masked = m["masked"] is not None
    return _low(m) | (m["logical"] == "logical") << 11 | masked << 16 | int(m["dst"], 16) << 56


def _ioapic_set_irq(body: str) -> Fields:
    m = _IOAPIC(body)
    return _redirection_entry(m), int(m["pin"]), int(m["coalesced"] is not None)


def _delayed_eoi_inj(body: str) -> Fields:
    return (_redirection_entry(_DELAYED(body)),)


def _msi_set_irq(body: str) -> Fields:
    m = _MSI(body)
    dst = int(m["dst"], 16)
    address = (dst & 0xFF) << 12 | (dst & 0xFFFFFF00) << 32 | _MSI_ADDRESS
    address |= (m["logical"] == "logical") << 2 | (m["rh"] is not None) << 3
    return address, _low(m)


_MSI_ADDRESS = 0xFEE0_0000


def _apic_ipi(body: str) -> Fields:
    m = _IPI(body)
    icr_low = _low(m) | (m["logical"] == "logical") << 11 | _SHORTHANDS[m["shorthand"]]
    return icr_low | (m["assert"] == "|assert") << 14, int(m["dst"], 16)


_ACK = _wording(r"irqchip (PIC master|PIC slave|IOAPIC|\d+) pin (\d+)")
_INJ_VIRQ = _wording(r"(?:(Soft/INTn|IRQ) 0x([0-9a-f]+)|irq (\d+))( \[reinjected\])?")
_WAKEUP = _wording(r"(wait|poll) time (-?\d+) ns(?:, polling (valid|invalid))?")
_PIO = _wording(
    r"pio_(write|read) at 0x([0-9a-f]+) size (\d+) count (\d+)(?: val 0x([0-9a-f]+))?"
    r"(?: +\(\.\.\.\))?"
)


def _ack_irq(body: str) -> Fields:
    irqchip, pin = _ACK(body).groups()
    return _IRQCHIPS[irqchip] if irqchip in _IRQCHIPS else int(irqchip), int(pin)


def _inj_virq(body: str) -> Fields:
    kind, vector, irq, reinjected = _INJ_VIRQ(body).groups()
    number = int(vector, 16) if vector else int(irq)
    return number, int(kind == "Soft/INTn"), int(reinjected is not None)


def _vcpu_wakeup(body: str) -> Fields:
    what, ns, valid = _WAKEUP(body).groups()
    return int(ns), int(what == "wait"), int(valid == "valid")


def _pio(body: str) -> Fields:
    rw, port, size, count, value = _PIO(body).groups()
    return int(rw == "write"), int(port, 16), int(size), int(count), _number(value)


_ENTER = _wording(r"vcpu (\d+)(?:, rip 0x([0-9a-f]+))?(?:.* intr_info 0x([0-9a-f]+))?.*")
_REASON = re.compile(r"reason (?:UNKNOWN \((\d+)\)|([\w-]+))( FAILED_VMENTRY)?")
_VCPU = re.compile(r"\bvcpu (\d+)")
_RIP = re.compile(r" rip 0x([0-9a-f]+)")
_INFO1 = re.compile(r" info1? (?:0x)?([0-9a-f]+)")
_INTR_INFO = re.compile(r" intr_info 0x([0-9a-f]+)")


def _entry(body: str) -> Fields:
    vcpu, rip, intr_info = _ENTER(body).groups()
    return int(vcpu), _number(rip), _number(intr_info)


def _exit(body: str) -> Fields:
    reason = _REASON.search(body)
    if reason is None:
        raise ValueError(body)
    number, name, failed = reason.groups()
    value = int(number) if number else _exit_reason(name)
    if failed:
        value |= _FAILED_VMENTRY
    vcpu = _VCPU.search(body)
    more = (_RIP.search(body), _INFO1.search(body), _INTR_INFO.search(body))
    return (int(vcpu[1]) if vcpu else 0, value, *(int(m[1], 16) if m else 0 for m in more))


def _exit_reason(name: str) -> int:
    if name.startswith("0x"):
        return int(name, 16)
    return _EXIT_REASONS.get(name, UNKNOWN_EXIT_REASON)


_INHIBIT = _wording(r"(set|cleared) reason=(\d+), inhibits=0x([0-9a-f]+)(?: [\w|]+)?")
_ACCEPT = _wording(r"apicid ([0-9a-f]+) vec (\d+) \((\w+)\|(level|edge)\)(?: \(coalesced\))?")
_EOI = _wording(r"apicid ([0-9a-f]+) vector (-?\d+)")
_APIC = _wording(r"apic_(write|read) (\w+) = 0x([0-9a-f]+)")
_MMIO = _wording(
    r"mmio (unsatisfied-read|read|write) len (\d+) gpa 0x([0-9a-f]+) val 0x([0-9a-f]+)"
)
_MSR = _wording(r"msr_(write|read) ([0-9a-f]+) = 0x([0-9a-f]+)( \(#GP\))?")


def _apicv_inhibit_changed(body: str) -> Fields:
    how, reason, inhibits = _INHIBIT(body).groups()
    return int(reason), int(how == "set"), int(inhibits, 16)


def _apic_accept_irq(body: str) -> Fields:
    apicid, vec, mode, trigger = _ACCEPT(body).groups()
    return int(apicid, 16), _DELIVERY_MODES[mode], int(trigger == "level"), int(vec)


def _eoi(body: str) -> Fields:
    apicid, vector = _EOI(body).groups()
    return int(apicid, 16), int(vector)


def _apic(body: str) -> Fields:
    rw, register, value = _APIC(body).groups()
    number = int(register, 16) if register.startswith("0x") else _APIC_REGISTERS[register]
    return int(rw == "write"), number, int(value, 16)


def _mmio(body: str) -> Fields:
    kind, length, gpa, value = _MMIO(body).groups()
    return _MMIO_TYPES[kind], int(length), int(gpa, 16), int(value, 16)


def _msr(body: str) -> Fields:
    rw, number, value, exception = _MSR(body).groups()
    return int(rw == "write"), int(number, 16), int(value, 16), int(exception is not None)


_WAKING = _wording(
    r"comm=(?P<comm>.*) pid=(?P<pid>\d+) prio=(?P<prio>-?\d+)(?: success=\d)?"
    r" target_cpu=(?P<cpu>\d+)"
)
_SWITCH = _wording(
    r"prev_comm=(?P<prev_comm>.*) prev_pid=(?P<prev_pid>\d+) prev_prio=(?P<prev_prio>-?\d+)"
    r" prev_state=(?P<state>[\w|+]+) ==>"
    r" next_comm=(?P<next_comm>.*) next_pid=(?P<next_pid>\d+) next_prio=(?P<next_prio>-?\d+)"
)
_PLUGIN_SWITCH = _wording(
    r"(?P<prev_comm>.*):(?P<prev_pid>\d+) \[(?P<prev_prio>-?\d+)\] (?P<state>\w+) ==>"
    r" (?P<next_comm>.*):(?P<next_pid>\d+) \[(?P<next_prio>-?\d+)\]"
)


def _switch(body: str) -> tuple[re.Match[str], dict[str, int]]:
    if "prev_pid=" in body:
        return _SWITCH(body), _TASK_STATES
    return _PLUGIN_SWITCH(body), _PLUGIN_STATES


def _sched_waking(body: str) -> Fields:
    m = _WAKING(body)
    return int(m["pid"]), int(m["cpu"]), int(m["prio"])


def _sched_switch(body: str) -> Fields:
    m, states = _switch(body)
    state = sum(states[letter] for letter in m["state"].replace("|", ""))
    cpu = 0
    return (
        int(m["prev_pid"]),
        state,
        int(m["next_pid"]),
        cpu,
        int(m["prev_prio"]),
        int(m["next_prio"]),
    )


def thread_names(event: Event, body: str) -> list[tuple[int, str]]:
    """Threads that sched_waking or sched_switch name: `(pid, comm)`. Raises ValueError."""
    body = body.strip()
    if event is Event.SCHED_WAKING:
        m = _WAKING(body)
        named = [(m["pid"], m["comm"])]
    else:
        m, _ = _switch(body)
        named = [(m["prev_pid"], m["prev_comm"]), (m["next_pid"], m["next_comm"])]
    return [(int(pid), comm) for pid, comm in named if comm != _UNNAMED]


_PENDING = _wording(r"pending (\d+)")
_INJ_NMI = _wording(r"vcpu (\d+) pending (\d+)")
_LOST = _wording(r"cpu (\d+) count (-?\d+)")


def _numbers(wording: Callable[[str], re.Match[str]]) -> Callable[[str], Fields]:
    return lambda body: tuple(map(int, wording(body).groups()))


_PARSERS: dict[Event, Callable[[str], Fields]] = {
    Event.HRTIMER_START: _hrtimer_start,
    Event.HRTIMER_CANCEL: lambda body: (int(_CANCEL(body)["hrtimer"], 16),),
    Event.HRTIMER_EXPIRE_ENTRY: _hrtimer_expire_entry,
    Event.WORK_QUEUE: _work_queue,
    Event.WORK_START: _work_execute,
    Event.WORK_END: _work_execute,
    Event.KVM_SET_IRQ: _set_irq,
    Event.KVM_PIC_SET_IRQ: _pic_set_irq,
    Event.KVM_IOAPIC_SET_IRQ: _ioapic_set_irq,
    Event.KVM_ACK_IRQ: _ack_irq,
    Event.KVM_INJ_VIRQ: _inj_virq,
    Event.KVM_VCPU_WAKEUP: _vcpu_wakeup,
    Event.KVM_PIO: _pio,
    Event.KVM_ENTRY: _entry,
    Event.KVM_EXIT: _exit,
    Event.KVM_APICV_INHIBIT_CHANGED: _apicv_inhibit_changed,
    Event.PIT_RESET_REINJECT: _numbers(_PENDING),
    Event.KVM_APIC_ACCEPT_IRQ: _apic_accept_irq,
    Event.KVM_EOI: _eoi,
    Event.KVM_MSI_SET_IRQ: _msi_set_irq,
    Event.KVM_APIC_IPI: _apic_ipi,
    Event.KVM_APIC: _apic,
    Event.KVM_MMIO: _mmio,
    Event.KVM_MSR: _msr,
    Event.KVM_IOAPIC_DELAYED_EOI_INJ: _delayed_eoi_inj,
    Event.KVM_INJ_NMI: _numbers(_INJ_NMI),
    Event.LOST_EVENTS: _numbers(_LOST),
    Event.KVM_APICV_ACCEPT_IRQ: _apic_accept_irq,
    Event.SCHED_WAKING: _sched_waking,
    Event.SCHED_SWITCH: _sched_switch,
}


def parse_body(event: Event, body: str) -> Fields:
    """The fields of an event's tracepoint; `cpu` of sched_switch is 0, the line has it.

    `OTHER_FUNCTION` for timers and work items that are not of ticks. ValueError where the wording
    is not understood.
    """
    try:
        return _PARSERS[event](body.strip())
    except KeyError as error:
        raise ValueError(body) from error
