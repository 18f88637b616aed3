"""Who works on a machine: one thread at a time, in the order of asking.

A thread that holds the lock may take it again. One that only wants to make a call is `urgent`: it
gets the machine at the next boundary of the guest. vCPU threads share it by turns. A signal's
handler may ask, too, whatever its thread waits for.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

__all__ = ["MachineLock"]


class MachineLock:
    """A fair lock. `on_urgent` is called when a thread wants it while another one, whose ident it
    gets, has it.
    """

    def __init__(self, on_urgent: Callable[[int], None]) -> None:
        self._on_urgent = on_urgent
        self._changed = threading.Condition()
        self._holder = 0
        self._depth = 0
        self._waiting: deque[int] = deque()

    @property
    def wanted(self) -> bool:
        """Somebody waits for it."""
        return bool(self._waiting)

    @property
    def is_mine(self) -> bool:
        """The calling thread has it."""
        return self._holder == threading.get_ident()

    def __enter__(self) -> None:
        me = threading.get_ident()
        if self._holder == me:
            self._depth += 1
        else:
            self._take(me, urgent=True)

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if not self._depth:
            self._give()

    @contextmanager
    def released(self) -> Iterator[None]:
        """Let others have it meanwhile. What interrupts the way back, does so on arrival."""
        me, depth = self._holder, self._depth
        self._give()
        try:
            yield
        finally:
            self._take_back(me)
            self._depth = depth

    def pass_on(self) -> None:
        """Let those have it who wait now."""
        if self._waiting:
            with self.released():
                pass

    def _give(self) -> None:
        with self._changed:
            self._holder = 0
            if self._waiting:
                self._changed.notify_all()

    def _take(self, me: int, urgent: bool) -> None:
        with self._changed:
            if self._holder or self._waiting:
                self._wait(me, urgent)
            self._holder = me
            self._depth = 1

    def _take_back(self, me: int) -> None:
        try:
            self._take(me, urgent=False)
        except BaseException:
            # Ctrl-C, most likely: the holder shall not keep it waiting
            while self._holder != me:
                with suppress(BaseException):
                    self._take(me, urgent=True)
            raise

    def _wait(self, me: int, urgent: bool) -> None:
        if me in self._waiting:
            # a signal's handler: what it interrupted waits for its end
            self._waiting.appendleft(me)
        else:
            self._waiting.append(me)
        try:
            if urgent and self._holder:
                self._on_urgent(self._holder)
            while self._holder or self._waiting[0] != me:
                self._changed.wait()
        finally:
            self._waiting.remove(me)
            self._changed.notify_all()
