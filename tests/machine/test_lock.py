"""Who works on a machine: `MachineLock`."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from threads import JOIN_S, thread

from kvmtick.machine.lock import MachineLock, Ticket

PAUSE_S = 0.001
ROUNDS = 300


class Watched(MachineLock):
    """A lock that tells when somebody waits for it, and when urgently."""

    def __init__(self) -> None:
        self.waits = threading.Event()
        self.urgent = threading.Semaphore(0)
        super().__init__(lambda holder: self.urgent.release())

    def _await(self, ticket: Ticket, urgent: bool) -> None:
        if self._queue[0] is not ticket:
            self.waits.set()
        super()._await(ticket, urgent)

    def await_urgent(self, times: int = 1) -> None:
        for _ in range(times):
            assert self.urgent.acquire(timeout=JOIN_S)


def note(lock: MachineLock, seen: list[str], name: str) -> Callable[[], None]:
    """A call that takes the lock."""

    def call() -> None:
        with lock:
            seen.append(name)

    return call


def test_a_thread_takes_it_as_often_as_it_likes() -> None:
    lock, seen = Watched(), list[str]()
    with lock, lock:
        assert lock.is_mine
        with thread(note(lock, seen, "other")), lock:
            lock.await_urgent()
            assert (lock.wanted, seen) == (True, [])
            lock.pass_on()
            assert seen == ["other"]
            assert lock.is_mine
    assert not lock.is_mine
    assert not lock.wanted


def test_nobody_is_called_for_a_free_lock() -> None:
    lock = Watched()
    with lock:
        lock.pass_on()
    assert not lock.urgent.acquire(blocking=False)


def test_they_get_it_in_the_order_of_asking() -> None:
    lock, seen = Watched(), list[str]()
    with lock:
        threads = []
        for name in "abc":
            threads.append(threading.Thread(target=note(lock, seen, name), daemon=True))
            threads[-1].start()
            lock.await_urgent()
    for each in threads:
        each.join(JOIN_S)
    assert seen == ["a", "b", "c"]


def test_whoever_waits_when_it_is_passed_on_comes_first() -> None:
    """Two that share it by turns, as vCPU threads do."""
    lock, seen = Watched(), list[str]()
    there = threading.Event()

    def other() -> None:
        with lock:
            there.set()
            for _ in range(3):
                seen.append("b")
                lock.pass_on()

    with lock, thread(other):
        lock.await_urgent()
        for _ in range(3):
            lock.pass_on()
            seen.append("a")
        with lock.released():
            assert there.wait(JOIN_S)
    assert seen == list("bababa")


def test_released_is_free_meanwhile_whatever_the_depth() -> None:
    lock, seen = Watched(), list[str]()
    with lock, lock:
        with lock.released():
            assert not lock.is_mine
            with thread(note(lock, seen, "other")):
                pass
        assert lock.is_mine
        assert seen == ["other"]
    assert not lock.is_mine


def test_what_the_block_raises_comes_out_with_the_lock() -> None:
    lock = Watched()
    with lock:
        with pytest.raises(KeyError), lock.released():
            raise KeyError
        assert lock.is_mine
    assert not lock.is_mine


class Interrupt(Exception):
    """What a signal's handler raises."""


def interrupt() -> None:
    raise Interrupt


@contextmanager
def on_signal(handler: Callable[[], None]) -> Iterator[Callable[[], None]]:
    """Gives a call for other threads: `handler` is called in the main thread, once."""
    called = threading.Event()

    def handle(*_: object) -> None:
        if not called.is_set():
            called.set()
            handler()

    def send() -> None:
        ident = threading.main_thread().ident
        assert ident is not None
        # one that comes just before the thread begins to wait is seen at the next
        while not called.is_set():
            signal.pthread_kill(ident, signal.SIGUSR1)
            called.wait(PAUSE_S)

    before = signal.signal(signal.SIGUSR1, handle)
    try:
        yield send
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_an_interrupt_while_waiting_leaves_no_trace() -> None:
    lock, held, done = Watched(), threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            held.set()
            lock.await_urgent()
            send()
            assert done.wait(JOIN_S)

    with on_signal(interrupt) as send, thread(hold):
        assert held.wait(JOIN_S)
        with pytest.raises(Interrupt), lock:
            pass
        assert not lock.wanted
        done.set()


def test_an_interrupt_on_the_way_back_comes_with_the_lock() -> None:
    lock, held = Watched(), threading.Event()

    def hold() -> None:
        with lock:
            held.set()
            assert lock.waits.wait(JOIN_S)
            send()
            lock.await_urgent()  # as it comes back once more

    running = threading.Thread(target=hold, daemon=True)

    def let_it_hold() -> None:
        with lock.released():
            running.start()
            assert held.wait(JOIN_S)

    with on_signal(interrupt) as send, lock:
        with pytest.raises(Interrupt):
            let_it_hold()
        assert lock.is_mine
    assert not lock.is_mine
    assert not lock.wanted
    running.join(JOIN_S)
    assert not running.is_alive()


def test_a_signals_handler_takes_it_while_its_thread_waits() -> None:
    lock, seen = Watched(), list[str]()
    held = threading.Event()

    def hold() -> None:
        with lock:
            held.set()
            lock.await_urgent()
            send()
            lock.await_urgent()  # the handler waits, too

    with on_signal(note(lock, seen, "handler")) as send, thread(hold):
        assert held.wait(JOIN_S)
        note(lock, seen, "thread")()
    assert seen == ["handler", "thread"]


def test_no_turn_is_lost_among_many() -> None:
    """Calls, turns and signals all at once: everybody comes to an end, and one at a time works."""
    lock, inside, most = MachineLock(lambda holder: None), list[int](), list[int]()

    def work() -> None:
        inside.append(1)
        most.append(len(inside))
        inside.pop()

    def call() -> None:
        for _ in range(ROUNDS):
            with lock, lock:
                work()

    def take_turns() -> None:
        with lock:
            for _ in range(ROUNDS):
                work()
                lock.pass_on()

    def handle(*_: object) -> None:
        with lock:
            handled.append(1)

    def signal_main() -> None:
        ident = threading.main_thread().ident
        assert ident is not None
        signal.pthread_kill(ident, signal.SIGUSR1)
        while not done.wait(PAUSE_S):
            signal.pthread_kill(ident, signal.SIGUSR1)

    handled, done = list[int](), threading.Event()
    before = signal.signal(signal.SIGUSR1, handle)
    try:
        with thread(signal_main):
            with thread(call), thread(call), thread(take_turns), thread(take_turns):
                call()
                take_turns()
            done.set()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert handled
    assert set(most) == {1}
    assert len(most) == 6 * ROUNDS
    assert not lock.wanted
    assert not lock.is_mine
