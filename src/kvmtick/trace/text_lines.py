"""The columns of ftrace text before an event's name, as each of its writers has them.

    comm-PID     [CPU] FLAGS  seconds: event: ...     tracefs (`trace`, `trace_pipe`)
    comm-PID  (TGID)  [CPU] FLAGS  seconds: event: ...     ... with the option record-tgid
    comm-PID [CPU] seconds: event: ...                trace-cmd report
    comm-PID  CPUFLAGS seconds: event: ...            trace-cmd report -l
    comm TID [CPU] seconds: system:event: ...         perf script
    comm PID/TID [CPU] seconds: system:event: ...     perf script -F comm,pid,tid,...

FLAGS are four to six characters by kernel, or absent (the option irq-info). A `comm` may hold
blanks, colons and dashes. Seconds have six digits behind the point, or nine.

Source: Documentation/trace/ftrace.rst; trace-cmd-report(1), perf-script(1).

Not modelled: the option latency-format of tracefs, whose times are relative; clocks that count no
time (`counter`, `x86-tsc`).
"""

import re
from typing import NamedTuple

__all__ = ["Line", "is_remark", "line_cpu", "lost_events", "overwritten_events", "parse_line"]

_TIME = r" +(?P<seconds>\d+)\.(?P<fraction>\d{6}|\d{9}): (?P<rest> *[\w.:-]+:(?: .*|$))"
_FLAGS = r"(?P<flags>[^\s\d]\S{2,5})"
_CPU = r"\[(?P<cpu>\d+)\]"
_SHAPES = tuple(
    re.compile(columns + _TIME)
    for columns in (
        rf" *(?P<comm>.*)-(?P<pid>\d+) +(?:\( *(?P<tgid>\d+|-+)\) +)?{_CPU}(?: +{_FLAGS})?",
        rf" *(?P<comm>.*)-(?P<pid>\d+) +(?P<tgid>)(?P<cpu>\d+){_FLAGS}",
        rf" *(?P<comm>.*?) +(?:(?P<tgid>\d+)/)?(?P<pid>\d+) +{_CPU}(?P<flags>)",
    )
)
_LOST = re.compile(
    r"CPU:(?P<cpu>\d+) \[(?:LOST (?P<lost>\d+) EVENTS|LOST EVENTS|(?P<dropped>\d+) EVENTS DROPPED"
    r"|EVENTS DROPPED)\]"
    r"|\#+ CPU (?P<started>\d+) buffer started \#+"
    r"|.*\[(?P<on>\d+)\].*PERF_RECORD_LOST lost (?P<perf>\d+)"
    r"|LOST (?P<told>\d+) events!?"
)
_ENTRIES = re.compile(r"# entries-in-buffer/entries-written: (\d+)/(\d+)")
_REMARK = re.compile(r"\s*|#.*|cpus=\d+|version = .*")
_UNKNOWN_COUNT = -1

_IN_INTERRUPT = frozenset("hHsZz")
"""Of the flags: a hard interrupt, one in a soft one, a soft one, an NMI (ftrace.rst)."""


class Line(NamedTuple):
    """A line's columns."""

    who: str
    """All before the time."""
    columns: str
    """All before the point of the time."""
    comm: str
    pid: int
    tgid: int | None
    """None if the text does not tell."""
    cpu: int
    in_interrupt: bool
    """As the flags say."""
    second_ns: int
    ts_ns: int
    digits: int
    """So many digits are behind the point of the time."""
    rest: str
    """The event's name, a colon, and what follows; perf puts the system before the name."""


def parse_line(line: str) -> Line | None:
    """An event's columns; None where this is no line of an event."""
    for shape in _SHAPES:
        match = shape.fullmatch(line)
        if match is not None:
            break
    else:
        return None
    tgid, fraction = match["tgid"] or "", match["fraction"]
    second_ns = int(match["seconds"]) * 1_000_000_000
    return Line(
        who=line[: match.start("seconds")],
        columns=line[: match.end("seconds")],
        comm=match["comm"],
        pid=int(match["pid"]),
        tgid=int(tgid) if tgid.isdigit() else None,
        cpu=int(match["cpu"]),
        in_interrupt=not _IN_INTERRUPT.isdisjoint(match["flags"] or ""),
        second_ns=second_ns,
        ts_ns=second_ns + int(fraction.ljust(9, "0")),
        digits=len(fraction),
        rest=match["rest"],
    )


def line_cpu(line: str) -> int:
    """The CPU of an event's line. ValueError for any other."""
    parsed = parse_line(line)
    if parsed is None:
        raise ValueError(line)
    return parsed.cpu


def lost_events(line: str) -> tuple[int, int] | None:
    """A line that says that events are missing here: CPU and how many, -1 if it does not say.

    `buffer started`: the CPU's buffer had been overwritten, what came before is gone.
    """
    match = _LOST.match(line.strip())
    if match is None:
        return None
    cpu = match["cpu"] or match["started"] or match["on"] or 0
    count = match["lost"] or match["dropped"] or match["perf"] or match["told"] or _UNKNOWN_COUNT
    return int(cpu), int(count)


def overwritten_events(line: str) -> int:
    """How many events `trace` had no room for, as its head says; 0 in any other line."""
    match = _ENTRIES.match(line)
    return int(match[2]) - int(match[1]) if match else 0


def is_remark(line: str) -> bool:
    """A line that is no event and is not meant to be one."""
    return _REMARK.fullmatch(line) is not None
