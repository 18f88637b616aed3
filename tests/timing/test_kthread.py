"""KthreadWorker against kernel/kthread.c."""

from collections.abc import Callable

import pytest
from timing_rig import WORK, WORKER, Rig

from kvmtick.timing.kthread import KthreadWork, KthreadWorker
from kvmtick.trace.events import Event, Function, field


class Works:
    """A worker and some items that note when they ran."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.worker: KthreadWorker = rig.worker()
        self.ran: list[tuple[str, int]] = []

    def work(self, name: str, then: Callable[[], object] = lambda: None) -> KthreadWork:
        def run() -> None:
            self.ran.append((name, self.rig.clock.now_ns))
            then()

        return self.rig.work(run)

    def names(self) -> list[str]:
        return [name for name, _ in self.ran]


@pytest.fixture
def works(rig: Rig) -> Works:
    return Works(rig)


def test_queued_work_runs_when_the_queue_is_run_not_in_the_call(rig: Rig, works: Works) -> None:
    work = works.work("a")
    rig.clock.now_ns = 70
    assert works.worker.queue_work(work) is True
    assert work.queued
    assert works.ran == []
    assert rig.queue.next_ns == 70
    rig.run_to(70)
    assert works.ran == [("a", 70)]
    assert not work.queued
    assert len(rig.queue) == 0


def test_an_item_is_queued_at_most_once(rig: Rig, works: Works) -> None:
    work = works.work("a")
    results = [works.worker.queue_work(work) for _ in range(3)]
    assert results == [True, False, False]
    rig.run_to(0)
    assert works.names() == ["a"]
    assert [name for name, _ in rig.events()].count("sched_kthread_work_queue_work") == 1


def test_an_item_may_be_queued_again_while_it_runs(rig: Rig, works: Works) -> None:
    results: list[bool] = []

    def again() -> None:
        if len(works.ran) < 3:
            results.append(works.worker.queue_work(work))

    work = works.work("a", again)
    works.worker.queue_work(work)
    rig.run_to(0)
    assert results == [True, True]
    assert works.names() == ["a"] * 3
    assert not work.queued


def test_items_run_in_the_order_they_were_queued(rig: Rig, works: Works) -> None:
    for name in "cab":
        works.worker.queue_work(works.work(name))
    rig.run_to(0)
    assert works.names() == list("cab")


def test_what_an_item_queues_runs_after_what_waits_already(rig: Rig, works: Works) -> None:
    late = works.work("late")
    works.worker.queue_work(works.work("first", lambda: works.worker.queue_work(late)))
    works.worker.queue_work(works.work("second"))
    rig.run_to(0)
    assert works.names() == ["first", "second", "late"]


def test_flush_work_runs_the_item_now_and_what_is_before_it(rig: Rig, works: Works) -> None:
    first, second, third = (works.work(name) for name in "abc")
    for work in (first, second, third):
        works.worker.queue_work(work)
    works.worker.flush_work(second)
    assert works.names() == ["a", "b"]
    assert third.queued
    rig.run_to(0)
    assert works.names() == ["a", "b", "c"]


def test_flush_work_of_an_idle_item_does_nothing(rig: Rig, works: Works) -> None:
    works.worker.queue_work(works.work("other"))
    works.worker.flush_work(works.work("idle"))
    assert works.ran == []
    assert len(rig.queue) == 1


def test_a_flushed_item_does_not_run_again_at_its_wake(rig: Rig, works: Works) -> None:
    work = works.work("a")
    works.worker.queue_work(work)
    works.worker.flush_work(work)
    assert len(rig.queue) == 0
    rig.run_to(100)
    assert works.names() == ["a"]


def test_flush_work_waits_for_one_run_only_of_an_item_that_queues_itself(
    rig: Rig, works: Works
) -> None:
    def again() -> None:
        assert len(works.ran) == 1
        works.worker.queue_work(work)

    work = works.work("a", again)
    works.worker.queue_work(work)
    works.worker.flush_work(work)
    assert works.names() == ["a"]
    assert work.queued
    assert len(rig.queue) == 1


def test_flush_runs_all_that_is_queued_but_not_what_that_queues(rig: Rig, works: Works) -> None:
    later = works.work("later")
    works.worker.queue_work(works.work("a", lambda: works.worker.queue_work(later)))
    works.worker.queue_work(works.work("b"))
    works.worker.flush()
    assert works.names() == ["a", "b"]
    assert later.queued
    rig.run_to(0)
    assert works.names() == ["a", "b", "later"]


def test_destroy_runs_what_is_queued_and_then_takes_no_work(rig: Rig, works: Works) -> None:
    work = works.work("a")
    works.worker.queue_work(work)
    works.worker.destroy()
    assert works.names() == ["a"]
    assert works.worker.destroyed
    assert len(rig.queue) == 0
    with pytest.raises(ValueError, match="kvm-pit/1-2 is destroyed"):
        works.worker.queue_work(work)


def test_destroy_may_be_repeated(rig: Rig, works: Works) -> None:
    works.worker.queue_work(works.work("a", lambda: works.worker.queue_work(works.work("b"))))
    works.worker.destroy()
    works.worker.destroy()
    rig.run_to(100)
    assert works.names() == ["a"]


def test_worker_delay_is_how_long_the_worker_waits_for_its_cpu(rig: Rig, works: Works) -> None:
    rig.host.set_fault("worker_delay", "30ns")
    works.worker.queue_work(works.work("a"))
    rig.run_to(20)
    works.worker.queue_work(works.work("b"))  # the same wake serves it
    rig.run_to(29)
    assert works.ran == []
    rig.run_to(100)
    assert works.ran == [("a", 30), ("b", 30)]
    works.worker.queue_work(works.work("c"))
    rig.run_to(200)
    assert works.ran[2:] == [("c", 130)]


def test_a_flush_does_not_wait_for_a_late_worker(rig: Rig, works: Works) -> None:
    rig.host.set_fault("worker_delay", "30ns")
    work = works.work("a")
    works.worker.queue_work(work)
    works.worker.flush_work(work)
    assert works.ran == [("a", 0)]
    assert len(rig.queue) == 0


def test_the_trace_names_work_function_worker_and_runs_in_the_workers_task() -> None:
    rig = Rig(detail=True)
    works = Works(rig)
    vcpu = rig.recorder.add_task("CPU 0/KVM-7")
    rig.recorder.task = vcpu
    assert rig.recorder.tasks[works.worker.task] == "kvm-pit/1-2"
    works.worker.queue_work(works.work("a"))
    rig.run_to(0)
    queue, start, end = rig.records()
    assert [record[1] for record in (queue, start, end)] == [
        Event.WORK_QUEUE,
        Event.WORK_START,
        Event.WORK_END,
    ]
    assert [record[2] for record in (queue, start, end)] == [
        vcpu,
        works.worker.task,
        works.worker.task,
    ]
    assert field(queue, "worker") == WORKER
    for record in (queue, start, end):
        assert field(record, "work") == WORK
        assert field(record, "function") == Function.PIT_DO_WORK
    assert rig.recorder.task == vcpu
