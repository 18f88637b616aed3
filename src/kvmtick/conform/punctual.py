"""Whether the host was on time in a run of the kernel, so that what it did can be compared.

A host that is late has expiries merged, ticks replayed and work that finds nothing to do, which is
right for KVM and no concern of a model whose host is never late. Works on ftrace text.
"""

import re
from collections.abc import Iterable

from kvmtick.conform.normalise import LINE

__all__ = ["duration_us", "reopened", "worst_step_us"]


def worst_step_us(lines: Iterable[str]) -> float:
    """The longest of: expiry due to its callback, work queued to started and started to done, line
    raised to the halted vCPU awake, expiry of its local APIC's timer to its interrupt accepted,
    injection to EOI.
    """
    worst = 0.0
    due_us = queued_us = injected_us = raised_us = started_us = expired_us = -1.0
    eois = _Eois()
    for match in filter(None, map(LINE.match, lines)):
        event, rest, now_us = match["event"], match["rest"], float(match["ts"]) * 1e6
        since_us = -1.0
        if event == "hrtimer_start":
            due_us = int(rest.partition("expires=")[2].split()[0]) / 1e3
        elif event == "hrtimer_expire_entry":
            since_us = due_us
            expired_us = now_us if "function=apic_timer_fn" in rest else -1.0
        elif event == "kvm_apic_accept_irq":
            since_us, expired_us = expired_us, -1.0
        elif event == "sched_kthread_work_queue_work":
            queued_us = now_us
        elif event == "sched_kthread_work_execute_start":
            since_us, started_us = queued_us, now_us
        elif event == "sched_kthread_work_execute_end":
            since_us = started_us
        elif event == "kvm_set_irq" and " level 1 " in rest:
            raised_us = now_us
        elif event == "kvm_vcpu_wakeup":
            asleep_us = int(rest.partition(" time ")[2].split()[0]) / 1e3
            since_us = raised_us if raised_us > now_us - asleep_us else -1.0
        elif eois.is_injection(match):
            injected_us = now_us
        elif event in ("kvm_eoi", "kvm_ack_irq"):
            since_us, injected_us = injected_us, -1.0
        if since_us >= 0:
            worst = max(worst, now_us - since_us)
    return worst


def duration_us(lines: Iterable[str]) -> float:
    """From the first start of a timer to the end of the trace; 0 without a timer."""
    times = [
        (match["event"], float(match["ts"]) * 1e6) for match in filter(None, map(LINE.match, lines))
    ]
    started_us = [time_us for event, time_us in times if event == "hrtimer_start"]
    return times[-1][1] - started_us[0] if started_us else 0.0


def reopened(lines: Iterable[str]) -> bool:
    """Whether the timer expired, or the line was raised, between a PIC's injection and its EOI.

    A back end that writes EOI to the local APIC when it injects also tells the PIT by it that its
    tick was acknowledged: work that comes then pulses the line once more, which on no other host it
    does (reinject on). It is a matter of luck while ticks are replayed back to back. Of an
    IOAPIC's tick that EOI is the only one it hears of.
    """
    in_service = False
    eois = _Eois()
    for match in filter(None, map(LINE.match, lines)):
        if eois.is_injection(match):
            in_service = True
        elif match["event"] in ("kvm_eoi", "kvm_ack_irq"):
            in_service = False
        elif in_service and (
            match["event"] == "hrtimer_expire_entry"
            or (match["event"] == "kvm_set_irq" and " level 1 " in match["rest"])
        ):
            return True
    return False


class _Eois:
    """Tells injections from the guest's EOIs: see normalise.py."""

    def __init__(self) -> None:
        self._in_service = False

    def is_injection(self, match: re.Match[str]) -> bool:
        """Whether this event stands for an injection."""
        if match["event"] != "kvm_eoi":
            return match["event"] == "kvm_inj_virq"
        by_guest, self._in_service = self._in_service, not match["rest"].endswith(" -1")
        return self._in_service or not by_guest
