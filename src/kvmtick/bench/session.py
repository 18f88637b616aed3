"""One run of `kvmtick bench`: how often figures are taken, and what its figures share."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from kvmtick.bench.figure import Taken
from kvmtick.bench.peers import PEERS
from kvmtick.bench.process import MeasureError, Spent

__all__ = ["NOT_INSTALLED", "Session"]

NOT_INSTALLED = "not installed"

Measure = Callable[[], float]


@dataclass(slots=True)
class Session:
    """What a figure is handed."""

    runs: int
    quick: bool
    """Fewer and shorter runs: for a look, not for the record."""
    folder: Path
    """For files, until the end of the session."""
    cpu_time: bool = False
    """Rates and the boot are by CPU time: what else a host does then hardly counts."""
    progress: Callable[[str], None] = lambda _: None
    peer_ticks: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    """Ticks/s of a peer by its name and the guest's: more than one figure asks for them."""

    def scaled(self, amount: int) -> int:
        """A length of the full run, shorter in a quick one."""
        return max(1, amount // 10) if self.quick else amount

    def rate(self, run: Callable[[int], Spent], few: int, many: int) -> float:
        """Rounds a second between a run of `few` and one of `many`: start-up is in both.

        MeasureError if the longer run was not the longer one.
        """
        start_s, end_s = self.seconds(run(few)), self.seconds(run(many))
        if end_s <= start_s:
            raise MeasureError(
                f"{few:,} rounds took {start_s:.2f} s, {many:,} only {end_s:.2f} s: other work"
                " disturbs; try --cpu-time"
            )
        return (many - few) / (end_s - start_s)

    def seconds(self, spent: Spent) -> float:
        """What a process took, by the time that counts."""
        return spent.cpu_s if self.cpu_time else spent.wall_s

    def in_turns(self, ours: Measure, peers: dict[str, Measure]) -> Taken:
        """Take ours and each peer's, `runs` times in turns. A peer that is missing or fails is left
        out with the reason; MeasureError if we fail.
        """
        taken = Taken()
        for name in peers:
            if not PEERS[name].installed:
                taken.absent[name] = NOT_INSTALLED
        for _ in range(self.runs):
            self.progress("kvmtick")
            taken.values.append(ours())
            for name, measure in peers.items():
                if name not in taken.absent:
                    self._take_peer(taken, name, measure)
        return taken

    def _take_peer(self, taken: Taken, name: str, measure: Measure) -> None:
        self.progress(name)
        try:
            taken.peers.setdefault(name, []).append(measure())
        except MeasureError as error:
            taken.absent[name] = str(error)
            del taken.peers[name]
