"""Taking figures: each in turn, so that one that fails does not end the others."""

import contextlib
import os
import platform
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from kvmtick import __version__
from kvmtick.bench.figure import Figure, Result, Taken
from kvmtick.bench.peers import PEERS
from kvmtick.bench.process import MeasureError, pinned
from kvmtick.bench.session import Session
from kvmtick.host.probe import is_compiled

__all__ = ["as_dict", "machine", "take_figures"]


def take_figures(
    figures: Sequence[Figure],
    runs: int,
    quick: bool,
    cpu_time: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> Iterator[Result]:
    """Take figures, each `runs` times, and give each as it is there."""
    with tempfile.TemporaryDirectory(prefix="kvmtick-bench-") as folder:
        session = Session(runs, quick, Path(folder), cpu_time)
        for at, figure in enumerate(figures, 1):
            session.progress = _progress(progress, f"{at}/{len(figures)} {figure.name}")
            session.progress("")
            yield Result(figure, _take(figure, session))


def _take(figure: Figure, session: Session) -> Taken:
    with pinned() if figure.pinned else contextlib.nullcontext():
        try:
            return figure.take(session)
        except MeasureError as error:
            return Taken(failed=True, note=str(error))


def _progress(progress: Callable[[str], None], figure: str) -> Callable[[str], None]:
    return lambda what: progress(f"{figure}: {what}" if what else figure)


def as_dict(
    results: Sequence[Result], runs: int, quick: bool, cpu_time: bool = False
) -> dict[str, Any]:
    """The JSON object (docs/benchmarks.md)."""
    return {
        "marks": [result.as_dict() for result in results],
        "runs": runs,
        "quick": quick,
        "time": "cpu" if cpu_time else "wall",
        "machine": machine(),
    }


def machine() -> dict[str, Any]:
    """Where and with what it was measured."""
    return {
        "kvmtick": __version__,
        "compiled": is_compiled(),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "kernel": platform.release(),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "peers": {name: peer.version() for name, peer in PEERS.items()},
    }


def _cpu_model() -> str:
    found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found[1] if found else platform.machine()
