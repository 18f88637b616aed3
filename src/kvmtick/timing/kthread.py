"""Kernel worker threads and their work items (kernel/kthread.c: kthread_worker, kthread_work).

A work item sits in the queue at most once; it may be queued again from the moment its function
starts. The worker runs items in order. How long it takes to get the CPU is the host model's
business (`worker_delay`).

Not modelled: delayed work, several workers a thread, affinity and priority.
"""

from __future__ import annotations

from collections.abc import Callable

from kvmtick.timing.clock import Clock
from kvmtick.timing.host import HostModel
from kvmtick.timing.queue import Deadline, EventQueue
from kvmtick.trace.events import Function
from kvmtick.trace.recorder import Recorder

__all__ = ["KthreadWork", "KthreadWorker"]


class KthreadWork:
    """A function a worker runs; `queued` while it waits."""

    __slots__ = ("address", "callback", "function", "later", "queued")

    def __init__(self, callback: Callable[[], None], function: Function, address: int) -> None:
        self.callback = callback
        self.function = int(function)
        self.address = address
        self.queued = False
        self.later: KthreadWork | None = None
        """The next one in the worker's queue."""


class KthreadWorker(Deadline):
    """One worker thread, for example `kvm-pit/1000`."""

    __slots__ = (
        "_clock",
        "_first",
        "_host",
        "_last",
        "_queue",
        "_recorder",
        "address",
        "destroyed",
        "name",
        "task",
    )

    def __init__(
        self,
        name: str,
        clock: Clock,
        queue: EventQueue,
        host: HostModel,
        recorder: Recorder,
        address: int,
    ) -> None:
        super().__init__()
        self._clock = clock
        self._queue = queue
        self._host = host
        self._recorder = recorder
        self.address = address
        self.task = recorder.add_task(name)
        self.name = recorder.tasks[self.task]
        self._first: KthreadWork | None = None
        self._last: KthreadWork | None = None
        self.destroyed = False

    def queue_work(self, work: KthreadWork) -> bool:
        """`kthread_queue_work`: False if it is queued already. ValueError once destroyed."""
        if self.destroyed:
            raise ValueError(f"worker {self.name} is destroyed: it takes no work")
        if work.queued:
            return False
        self._recorder.sched_kthread_work_queue_work(work.address, work.function, self.address)
        work.queued = True
        if self._last is None:
            self._first = work
        else:
            self._last.later = work
        self._last = work
        if not self.queued:
            due_ns = self._clock.now_ns
            if not self._host.on_time:
                due_ns += self._host.delay_ns("worker_delay")
            self._queue.enqueue(self, due_ns)
        return True

    def flush_work(self, work: KthreadWork) -> None:
        """`kthread_flush_work`: come back when the item, if queued, has run; once is enough.

        The caller would sleep until the worker gets there; here the worker runs at once, so a
        flush takes no time whatever the host's delays.
        """
        if work.queued:
            while self._run_one() is not work:
                pass

    def flush(self) -> None:
        """`kthread_flush_worker`: come back when everything queued so far has run."""
        last = self._last
        if last is not None:
            self.flush_work(last)

    def destroy(self) -> None:
        """`kthread_destroy_worker`: run what is queued, then stop. Harmless when repeated."""
        if self.destroyed:
            return
        self.flush()
        self._sleep()
        self.destroyed = True

    def _sleep(self) -> None:
        if self.queued:
            self._queue.cancel(self)

    def on_due(self) -> None:
        """`kthread_worker_fn`: one pass over the queue; work queued meanwhile gets its own wake."""
        last = self._last
        while self._first is not None and self._run_one() is not last:
            pass

    def _run_one(self) -> KthreadWork:
        work = self._first
        assert work is not None
        self._first = work.later
        work.later = None
        if self._first is None:
            self._last = None
            self._sleep()
        recorder = self._recorder
        task = recorder.task
        recorder.task = self.task
        recorder.sched_kthread_work_execute_start(work.address, work.function)
        work.queued = False
        work.callback()
        if recorder.detail:
            recorder.sched_kthread_work_execute_end(work.address, work.function)
        recorder.task = task
        return work
