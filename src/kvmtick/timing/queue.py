"""The one event queue of a machine: what is due when, ties by insertion."""

from collections.abc import Callable
from heapq import heapify, heappop, heappush
from typing import Final

from kvmtick.timing.clock import Clock

__all__ = ["NEVER_NS", "EventQueue"]

NEVER_NS: Final = (1 << 62) - 1
"""Later than any deadline: what `next_ns` reads when nothing is queued."""

COMPACT_ABOVE: Final = 64


class EventQueue:
    """Callbacks ordered by their due time in ns, and by insertion among equals.

    `next_ns` is the due time of the head, kept up to date so that a port access can see at the
    price of one comparison whether it created an earlier deadline. Cancelled entries are dropped
    when they come up, or all at once when they outnumber the live ones, so that a guest that
    reprograms its timer for ever does not make the queue grow.
    """

    __slots__ = ("_cancelled", "_heap", "_seq", "next_ns")

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, Callable[[], None]]] = []
        self._cancelled: set[int] = set()
        self._seq = 0
        self.next_ns = NEVER_NS

    def __len__(self) -> int:
        return len(self._heap) - len(self._cancelled)

    def add(self, due_ns: int, callback: Callable[[], None]) -> int:
        """Queue `callback` for `due_ns` (the past is due at once); the result is for `cancel`."""
        seq = self._seq
        self._seq = seq + 1
        heappush(self._heap, (due_ns, seq, callback))
        if due_ns < self.next_ns:
            self.next_ns = due_ns
        return seq

    def cancel(self, handle: int) -> None:
        """Take back an entry that has not run. Each handle may be cancelled once."""
        self._cancelled.add(handle)
        if len(self._cancelled) > COMPACT_ABOVE and len(self._cancelled) * 2 > len(self._heap):
            self._heap = [entry for entry in self._heap if entry[1] not in self._cancelled]
            heapify(self._heap)
            self._cancelled.clear()
        self._settle()

    def run_due(self, clock: Clock) -> None:
        """Run, in order, everything due by now, what the callbacks add included.

        What falls due while a live clock goes on is left for the next call: callbacks that take
        longer than the time between them would never end.
        """
        now_ns = clock.now_ns
        while self.next_ns <= now_ns:
            # The head is live: `cancel` and this loop keep it so.
            callback = heappop(self._heap)[2]
            if self._cancelled:
                self._settle()
            else:
                heap = self._heap
                self.next_ns = heap[0][0] if heap else NEVER_NS
            if clock.live:
                clock.refresh()
            callback()

    def _settle(self) -> None:
        heap = self._heap
        while heap and heap[0][1] in self._cancelled:
            self._cancelled.remove(heappop(heap)[1])
        self.next_ns = heap[0][0] if heap else NEVER_NS
