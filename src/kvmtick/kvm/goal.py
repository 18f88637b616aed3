"""What ends a run besides the guest and the clock: the ticks of a foreign guest, questions."""

from collections.abc import Callable

__all__ = ["TickGoal", "any_of"]


class TickGoal:
    """A foreign guest's end: `ticks` of them reached it, or it had its time for them.

    `reason` is then `done` or `time`, as of `machine.Exit`, and empty before.
    """

    def __init__(
        self,
        ticks: int,
        reached: Callable[[], int],
        is_time_up: Callable[[int], bool] = lambda ticks: False,
    ) -> None:
        self._ticks = ticks
        self._reached = reached
        self._is_time_up = is_time_up
        self.reason = ""

    def is_over(self) -> bool:
        """Whether they have, or it had."""
        if self._reached() >= self._ticks:
            self.reason = "done"
        elif self._is_time_up(self._ticks):
            self.reason = "time"
        return bool(self.reason)


def any_of(*questions: Callable[[], bool] | None) -> Callable[[], bool] | None:
    """The answer to all that are not None, asked in that order; None if there is none."""
    asked = [question for question in questions if question is not None]
    return (lambda: any(question() for question in asked)) if asked else None
