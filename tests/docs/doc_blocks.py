"""The fenced blocks of the documentation, and what it takes to compare them with a run.

What follows the three backticks says what a block is:

* `console`: commands behind `$ ` and what they print; `console exit=4` for one that fails, `console
  numbers=any` where the kernel that is installed decides on numbers;
* `gdb ARGUMENTS`: commands behind `(gdb) `, the first of which connects to `kvmtick run ARGUMENTS
  --gdb PORT`, and what gdb prints;
* `python`: a program, run in a namespace of its own; its `test_*` functions are called;
* `text output`: what the `python` block before it prints;
* `text trace`: lines of a trace that a command of the same page wrote;
* `text kernel`: lines of a trace of a real kernel, kept in this repository;
* `json COMMAND`: the object COMMAND prints;
* `sql`: a question that tests/report/test_query.py asks;
* `text`, `sh`, `asm`: only shown.

A line `...` in a shown output stands for any number of lines.
"""

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

SHOWN_ONLY = frozenset({"text", "sh", "asm", "sql"})
ELISION = "..."
FENCE = "```"
KERNEL = re.compile(r"vmlinuz-\S+")
NUMBER = re.compile(r"\d[\d,.]*")
BLANKS = re.compile(r" +")
WALL_CLOCK = re.compile(r"[\d.]+ s of wall time|[\d,]+ ticks/s")


@dataclass(frozen=True, slots=True)
class Block:
    """One fenced block; `start` is the index of its first line within the page."""

    info: str
    start: int
    lines: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Command:
    """A line behind a prompt, and what follows; `start` is the index of its output within the
    page.
    """

    text: str
    start: int
    shown: tuple[str, ...]


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page, in order. ValueError if the last is not closed."""
    found: list[Block] = []
    info: str | None = None
    start = 0
    lines = page.split("\n")
    for at, line in enumerate(lines):
        if not line.startswith(FENCE):
            continue
        if info is None:
            info, start = line.removeprefix(FENCE).strip(), at + 1
        else:
            found.append(Block(info, start, tuple(lines[start:at])))
            info = None
    if info is not None:
        raise ValueError(f"the block that starts in line {start} is not closed")
    return found


def commands(block: Block, prompt: str = "$ ") -> list[Command]:
    """The commands of a block, behind its prompt. ValueError if it starts with anything else."""
    found: list[Command] = []
    for at, line in enumerate(block.lines):
        if line.startswith(prompt):
            found.append(Command(line.removeprefix(prompt), block.start + at + 1, ()))
        elif not found:
            raise ValueError(f"line {block.start + at + 1}: the block starts with no command")
        else:
            last = found[-1]
            found[-1] = Command(last.text, last.start, (*last.shown, line))
    return found


def normal(lines: Sequence[str]) -> list[str]:
    """Lines without trailing blanks and without what a wall clock decides."""
    return [WALL_CLOCK.sub("WALL CLOCK", line.rstrip()) for line in lines]


def agrees(shown: Sequence[str], actual: Sequence[str]) -> bool:
    """Whether an output is what the page shows."""
    return _agrees(normal(shown), normal(actual))


def without_numbers(lines: Sequence[str]) -> list[str]:
    """Lines as another kernel's would be: no numbers, no columns that depend on their width."""
    return [BLANKS.sub(" ", NUMBER.sub("N", KERNEL.sub("KERNEL", line))).rstrip() for line in lines]


def _agrees(shown: list[str], actual: list[str]) -> bool:
    segments = list(_segments(shown))
    first, last = segments[0], segments[-1]
    if len(segments) == 1:
        return first == actual
    if actual[: len(first)] != first:
        return False
    at = len(first)
    for segment in segments[1:-1]:
        found = _find(segment, actual, at)
        if found < 0:
            return False
        at = found + len(segment)
    return len(actual) - len(last) >= at and actual[len(actual) - len(last) :] == last


def difference(shown: Sequence[str], actual: Sequence[str]) -> str:
    """What differs, for people."""
    return "\n".join(
        difflib.unified_diff(normal(shown), normal(actual), "shown", "printed", lineterm="")
    )


def refreshed(shown: Sequence[str], actual: Sequence[str], wall_clock: bool) -> list[str]:
    """What the page should show: the actual output, elided where the page elides.

    An output that differs by nothing but the wall clock stays, unless `wall_clock`.
    """
    actual = [line.rstrip() for line in actual]
    if agrees(shown, actual) and not wall_clock:
        return list(shown)
    segments = list(_segments(shown))
    if len(segments) == 1:
        return actual
    fresh = actual[: len(segments[0])]
    at = len(fresh)
    for segment in segments[1:-1]:
        at = _most_alike(segment, actual, at)
        fresh += [ELISION, *actual[at : at + len(segment)]]
        at += len(segment)
    return [*fresh, ELISION, *actual[len(actual) - len(segments[-1]) :]]


def _segments(shown: Sequence[str]) -> Iterator[list[str]]:
    segment: list[str] = []
    for line in shown:
        if line.strip() == ELISION:
            yield segment
            segment = []
        else:
            segment.append(line)
    yield segment


def _find(segment: list[str], lines: list[str], at: int) -> int:
    for found in range(at, len(lines) - len(segment) + 1):
        if lines[found : found + len(segment)] == segment:
            return found
    return -1


def _most_alike(segment: Sequence[str], lines: Sequence[str], at: int) -> int:
    """Where, from `at` on, the lines look most like `segment`."""
    wanted = "\n".join(segment)
    places = range(at, max(at + 1, len(lines) - len(segment) + 1))
    return max(
        places,
        key=lambda place: difflib.SequenceMatcher(
            None, wanted, "\n".join(lines[place : place + len(segment)]), autojunk=False
        ).ratio(),
    )
