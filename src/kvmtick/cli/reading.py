"""How far a trace has been read, on a terminal."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from kvmtick.trace.reading import Trace

__all__ = ["reading_progress"]


@contextmanager
def reading_progress(what: str) -> Iterator[Callable[[Trace], None] | None]:
    """A bar on stderr for those who read a trace; None if stderr is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    ) as progress:
        bar = progress.add_task(what)

        def tell(trace: Trace) -> None:
            progress.update(bar, total=trace.size_bytes or 1, completed=trace.position_bytes)

        yield tell
