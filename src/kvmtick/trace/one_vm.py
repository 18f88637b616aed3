"""Of the records of a whole host those of one VM.

Its vCPUs' threads are told to it. The rest follows: a timer is the VM's if one of them programmed
it, a work item if such a timer's callback or such a thread queued it, a worker if it ran one. For
timers fire in whatever thread was running, and kvm-pit workers of one process have one name. The
idle threads of several CPUs have to be several tasks.

Not told apart, for no record tells: what other threads of its user space do, such as KVM_IRQ_LINE
(`add_task` for them), and irqfds.
"""

from collections.abc import Iterable

from kvmtick.trace.events import IRQ_CONTEXT, Event, Function, Record

__all__ = ["OneVm"]

_HRTIMER_START = int(Event.HRTIMER_START)
_HRTIMER_EXPIRE_ENTRY = int(Event.HRTIMER_EXPIRE_ENTRY)
_TIMER_EVENTS = (_HRTIMER_START, int(Event.HRTIMER_CANCEL), _HRTIMER_EXPIRE_ENTRY)
_WORK_QUEUE = int(Event.WORK_QUEUE)
_WORK_START = int(Event.WORK_START)
_WORK_EVENTS = (_WORK_QUEUE, _WORK_START, int(Event.WORK_END))
_LOST_EVENTS = int(Event.LOST_EVENTS)
_PIT = int(Function.PIT_TIMER_FN)


class OneVm:
    """Keeps the records of one VM."""

    def __init__(self) -> None:
        self.workers: set[int] = set()
        """Tasks that ran its work items."""
        self._tasks: set[int] = set()
        self._timers: set[int] = set()
        self._works: set[int] = set()
        self._expired: set[int] = set()
        """Tasks in whose interrupt the VM's PIT was the last to expire: they queue its own work.
        Work that still is queued is not queued again, so an expiry need not have any.
        """

    def add_task(self, task: int) -> None:
        """A thread of the VM: a vCPU's, or a worker known beforehand."""
        self._tasks.add(task)

    def keep(self, records: Iterable[Record]) -> list[Record]:
        """Those of this VM, and every gap."""
        return [record for record in records if self._is_own(record)]

    def _is_own(self, record: Record) -> bool:
        event, task = record[1], record[2]
        own_task = task in self._tasks
        if event in _TIMER_EVENTS:
            return self._is_own_timer(record, own_task)
        if event in _WORK_EVENTS:
            return self._is_own_work(record, own_task)
        return own_task or event == _LOST_EVENTS

    def _is_own_timer(self, record: Record, own_task: bool) -> bool:
        event, task, timer = record[1:4]
        if event == _HRTIMER_START and own_task:
            self._timers.add(timer)
        own = timer in self._timers
        if event == _HRTIMER_EXPIRE_ENTRY and record[4] == _PIT:
            (self._expired.add if own else self._expired.discard)(task)
        return own

    def _is_own_work(self, record: Record, own_task: bool) -> bool:
        event, task, work = record[1:4]
        is_queued = event == _WORK_QUEUE and task in self._expired
        if is_queued or (own_task and event in (_WORK_QUEUE, _WORK_START)):
            self._works.add(work)
        if work not in self._works:
            return False
        if event == _WORK_START:
            self.workers.add(task & ~IRQ_CONTEXT)
            self._tasks.add(task & ~IRQ_CONTEXT)
        return True
