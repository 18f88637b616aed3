"""Clock, queue, host and recorder, as a machine has them, with nothing else attached."""

from collections.abc import Callable

from kvmtick.timing.clock import VirtualClock
from kvmtick.timing.host import HostModel
from kvmtick.timing.hrtimer import HrTimer, HrTimerRestart
from kvmtick.timing.kthread import KthreadWork, KthreadWorker
from kvmtick.timing.queue import EventQueue
from kvmtick.trace.events import TRACEPOINTS, Event, Function, Record
from kvmtick.trace.recorder import Recorder

TIMER, WORKER, WORK = 0x1000, 0x2000, 0x3000


class Rig:
    """One host. `run_to` lets time pass, `events` says what was recorded since the last call."""

    def __init__(self, seed: int = 0, detail: bool = False) -> None:
        self.clock = VirtualClock()
        self.queue = EventQueue()
        self.host = HostModel(seed)
        self.recorder = Recorder(self.clock, detail)
        self._records: list[Record] = []
        self.recorder.add_consumer(self._records.extend)

    def timer(self, callback: Callable[[], HrTimerRestart]) -> HrTimer:
        function = Function.PIT_TIMER_FN
        return HrTimer(self.clock, self.queue, self.host, self.recorder, function, TIMER, callback)

    def worker(self) -> KthreadWorker:
        return KthreadWorker(
            "kvm-pit/1-2", self.clock, self.queue, self.host, self.recorder, WORKER
        )

    def work(self, callback: Callable[[], None], address: int = WORK) -> KthreadWork:
        return KthreadWork(callback, Function.PIT_DO_WORK, address)

    def run_to(self, now_ns: int) -> None:
        """Stop at every deadline on the way, as the machine does."""
        while self.queue.next_ns <= now_ns:
            self.clock.now_ns = max(self.clock.now_ns, self.queue.next_ns)
            self.queue.run_due(self.clock)
        self.clock.now_ns = now_ns

    def records(self) -> list[Record]:
        self.recorder.flush()
        records, self._records[:] = list(self._records), []
        return records

    def events(self) -> list[tuple[str, int]]:
        """The names of the tracepoints with their times."""
        return [(TRACEPOINTS[Event(record[1])].name, record[0]) for record in self.records()]
