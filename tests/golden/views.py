"""What of the model's trace is to be found in some of the recordings.

The **excerpts** among them lack starts of timers, the worker's work items and port accesses (and
wake-ups, which are set aside anyway). The guests recorded with the IOAPIC left out the six port
writes by which the `scenario` guest **initialises the PICs**, and closed the PICs as they were.
"""

from collections.abc import Iterable

from kvmtick.conform.normalise import LINE
from kvmtick.guests.script import PIC_INIT

NOT_IN_EXCERPTS = frozenset(
    {
        "hrtimer_start",
        "kvm_pio",
        "sched_kthread_work_execute_end",
        "sched_kthread_work_execute_start",
        "sched_kthread_work_queue_work",
    }
)


def as_excerpt(lines: Iterable[str]) -> list[str]:
    """The lines but for the events that the excerpts among the recordings lack."""
    matches = ((line, LINE.match(line)) for line in lines)
    return [line for line, m in matches if m is None or m["event"] not in NOT_IN_EXCERPTS]


def without_pic_setup(lines: Iterable[str]) -> list[str]:
    """The lines but for the `scenario` guest's first port writes, which initialise the PICs.

    Raises ValueError where it begins with others.
    """
    setup = [f"pio_write at {port:#x} size 1 count 1 val {value:#x}" for port, _, value in PIC_INIT]
    out = []
    for line in lines:
        match = LINE.match(line)
        if setup and match is not None and match["event"] == "kvm_pio":
            if match["rest"] != setup[0]:
                raise ValueError(f"{setup[0]} expected: {line!r}")
            setup.pop(0)
        else:
            out.append(line)
    return out
