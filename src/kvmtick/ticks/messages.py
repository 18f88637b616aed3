"""Who sent what a local APIC accepts: needed where a vCPU's own task sends.

A vCPU's task delivers its timer's interrupt and everything the guest on it makes happen: IPIs,
lines that user space raises from an exit, level lines that an EOI delivers again. The record before
the acceptance tells which.
"""

from collections.abc import Callable
from typing import Final

from kvmtick.trace.events import IRQ_CONTEXT, Record

__all__ = ["Messages"]

VECTOR: Final = 0xFF
MODE: Final = 0x700
ANY: Final = -1
NO_TASK: Final = -1

Message = tuple[int, int]
"""Vector and delivery mode; ANY if the record does not say."""


class Messages:
    """The last thing each vCPU's task sent."""

    def __init__(self, vcpu_of: Callable[[int], int | None]) -> None:
        """`vcpu_of`: the vCPU whose thread a task is, None if it is none's."""
        self.vcpu_of = vcpu_of
        self._sent: dict[int, Message] = {}
        self._ended_task = NO_TASK
        """`_sent` holds its last EOI, of `_ended_vector`."""
        self._ended_vector = 0

    def __contains__(self, task: int) -> bool:
        return task in self._sent

    def ipi(self, record: Record) -> None:
        """kvm_apic_ipi."""
        self._send(record, (record[3] & VECTOR, record[3] & MODE))

    def msi(self, record: Record) -> None:
        """kvm_msi_set_irq."""
        self._send(record, (record[4] & VECTOR, record[4] & MODE))

    def line(self, record: Record) -> None:
        """kvm_set_irq: to which vector it leads is not known yet."""
        if record[4]:
            self._send(record, (ANY, ANY))
        else:
            self.forget(record[2])

    def eoi(self, record: Record) -> None:
        """kvm_eoi: a level line that is still high is delivered again."""
        if record[4] >= 0:
            self._send(record, (record[4], ANY))

    def end(self, task: int, vector: int) -> None:
        """The same of a vCPU's task."""
        if task != self._ended_task or vector != self._ended_vector:
            self._sent[task] = (vector, ANY)
            self._ended_task = task
            self._ended_vector = vector

    def forget(self, task: int) -> None:
        """The task went on to something else."""
        if self._sent:
            self._ended_task = NO_TASK
            self._sent.pop(task & ~IRQ_CONTEXT, None)

    def forget_eois(self) -> None:
        """Time has passed: what an EOI delivers again is accepted at once."""
        self._ended_task = NO_TASK
        self._sent = {task: sent for task, sent in self._sent.items() if sent[1] != ANY}

    def clear(self) -> None:
        """Records are missing."""
        self._ended_task = NO_TASK
        self._sent.clear()

    def may_explain(self, task: int) -> bool:
        """The task sent something that its own local APIC may accept."""
        if task == self._ended_task:
            return False
        sent = self._sent.get(task)
        return sent is not None and (sent[1] != ANY or sent[0] == ANY)

    def explains(self, record: Record, timer_vector: int | None) -> bool:
        """What was sent accounts for this kvm_apic_accept_irq on the sender's own local APIC.

        `timer_vector`: what its timer sends, None if not known.
        """
        task = record[2] & ~IRQ_CONTEXT
        sent = self._sent.get(task)
        if sent is None:
            return False
        vector, mode = sent
        if mode == ANY:
            if vector != ANY and not record[5]:
                return False
            return record[6] != timer_vector and vector in (ANY, record[6])
        if sent != (record[6], record[4]):
            return False
        # An IPI or MSI reaches a local APIC once.
        del self._sent[task]
        return True

    def _send(self, record: Record, message: Message) -> None:
        task = record[2] & ~IRQ_CONTEXT
        self._ended_task = NO_TASK
        if self.vcpu_of(task) is not None:
            self._sent[task] = message
