"""Wall time of short commands, from the start of the process to its end, with cached bytecode."""

from typing import Final

from kvmtick.bench.figure import Demand, Figure, Taken
from kvmtick.bench.process import KVMTICK, run_process
from kvmtick.bench.session import Session

__all__ = ["FIGURES"]


def _figure(name: str, arguments: tuple[str, ...], most_ms: float) -> Figure:
    def take(session: Session) -> Taken:
        cache = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(session.folder / "pyc")}
        command = [*KVMTICK, *arguments]
        run_process(command, environment=cache)
        return session.in_turns(lambda: run_process(command, environment=cache).wall_s * 1000, {})

    return Figure(
        name, f"kvmtick {' '.join(arguments)}", "ms", take, (Demand(most_ms),), at_most=True
    )


FIGURES: Final = (
    _figure("start-help", ("--help",), 80.0),
    _figure("start-run", ("run", "--ticks", "1000"), 300.0),
)
