"""The lives of a timer's last ticks, as many as are kept.

Most are plain and never looked at: these are kept as numbers, in objects that are used again.
"""

from typing import NamedTuple

from kvmtick.ticks.tick import PlainTick, Tick

__all__ = ["Keep", "Lives"]


class Keep(NamedTuple):
    """Which lives a source keeps."""

    lives: int
    """So many."""
    all: bool = False
    """The older ones too, until `Source.take_old`."""


class Lives:
    """A ring; it grows up to its bound."""

    __slots__ = ("_all", "_bound", "_oldest", "_ring")

    def __init__(self, keep: Keep) -> None:
        self._bound = keep.lives
        self._all = keep.all
        self._ring: list[Tick | PlainTick] = []
        self._oldest = 0

    def __len__(self) -> int:
        return len(self._ring)

    def add(self, tick: Tick) -> None:
        """The newest."""
        if self._all or len(self._ring) < self._bound:
            self._ring.append(tick)
        elif self._bound:
            self._ring[self._next()] = tick

    def add_plain(self) -> PlainTick:
        """The newest, to be filled."""
        if self._all or len(self._ring) < self._bound:
            plain = PlainTick()
            self._ring.append(plain)
            return plain
        if not self._bound:
            return PlainTick()
        at = self._next()
        oldest = self._ring[at]
        if isinstance(oldest, PlainTick):
            return oldest
        plain = PlainTick()
        self._ring[at] = plain
        return plain

    def _next(self) -> int:
        """The place of the oldest, which is the newest's now."""
        at = self._oldest
        self._oldest = at + 1 if at + 1 < self._bound else 0
        return at

    def life(self, position: int) -> Tick:
        """One of them, from 0, the oldest; IndexError if there is none."""
        count = len(self._ring)
        if not -count <= position < count:
            raise IndexError(f"no life {position}: {count} are kept")
        at = (self._oldest + position) % count
        tick = self._ring[at] = _thaw(self._ring[at])
        return tick

    def all(self) -> list[Tick]:
        """In order."""
        oldest = self._oldest
        return [_thaw(life) for life in self._ring[oldest:] + self._ring[:oldest]]

    def all_open(self) -> list[Tick]:
        """Those that may be without a verdict, in order."""
        oldest = self._oldest
        lives = self._ring[oldest:] + self._ring[:oldest]
        return [life for life in lives if isinstance(life, Tick)]

    def take(self, count: int) -> list[Tick]:
        """The oldest, which are kept no more; only where all are kept."""
        if count <= 0:
            return []
        taken = [_thaw(life) for life in self._ring[:count]]
        del self._ring[:count]
        return taken


def _thaw(life: Tick | PlainTick) -> Tick:
    return life if isinstance(life, Tick) else life.tick()
