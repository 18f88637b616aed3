"""The examples of README.md and docs/*.md print what the pages show.

`KVMTICK_REFRESH_DOCS=1` writes the present outputs into the pages instead of comparing;
`KVMTICK_REFRESH_DOCS=all` also where only the wall clock made a difference. What the kinds of
blocks are is in `doc_blocks`.
"""

import contextlib
import difflib
import functools
import io
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from doc_blocks import (
    ELISION,
    PAGES,
    ROOT,
    SHOWN_ONLY,
    Block,
    agrees,
    blocks,
    commands,
    difference,
    refreshed,
    without_numbers,
)
from gdb_session import debug, needs_gdb

from kvmtick.abi.errors import HostError
from kvmtick.cli import main
from kvmtick.cli.run_firmware import SEABIOS
from kvmtick.machine.installed import find_kernel
from kvmtick.testing import GuestMachine

REFRESH = os.environ.get("KVMTICK_REFRESH_DOCS", "")
KERNEL_TRACES = ROOT / "tests/golden/traces"
PIPE = "| kvmtick "
RUN_LINUX = "kvmtick run linux"
PIPELINE_DEADLINE_S = 300.0
GDB_PROMPT = "(gdb) "
HOST_KEYS = ("wall_s",)
"""What a `json` block may show differently."""

RUN_BLOCKS = {
    "README.md": 9,
    "debugger.md": 2,
    "fleet.md": 6,
    "walkthrough.md": 35,
    "json.md": 3,
    "reporting.md": 1,
    "conformance.md": 5,
    "benchmarks.md": 1,
    "reading-traces.md": 1,
    "firmware.md": 5,
    "linux.md": 1,
    "linux-boot.md": 5,
}
"""How many blocks of a page are checked at least: a page that loses its examples is found."""

MakeMachine = Callable[..., GuestMachine]
Fresh = Callable[[bool], list[str]]
"""What a page should show, given whether wall-clock figures are to be new."""


def no_kernel() -> str:
    """What `RUN_LINUX` lacks here; "" for nothing."""
    try:
        find_kernel()
    except HostError as error:
        return str(error)
    return ""


@functools.cache
def pipeline(text: str) -> tuple[int, list[str]]:
    """Exit code and output of a command that reads from another; pages that show the same share a
    run.
    """
    run = subprocess.run(
        ["sh", "-c", text.replace(PIPE, f"| {shlex.quote(sys.executable)} -m kvmtick ")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=PIPELINE_DEADLINE_S,
    )
    return run.returncode, run.stdout.decode(errors="replace").splitlines()


class PageRun:
    """Runs a page's blocks from top to bottom in one directory, and notes what differs."""

    def __init__(self, name: str, text: str, folder: Path, make_machine: MakeMachine) -> None:
        self.name = name
        self.failures: list[str] = []
        self.checked = 0
        self.missing = ""
        """What the host lacks for one of the commands."""
        self._text = text
        self._folder = folder
        self._make_machine = make_machine
        self._printed: list[str] | None = None
        self._edits: list[tuple[int, int, Fresh]] = []

    def run(self) -> "PageRun":
        """Run and compare all blocks."""
        for block in blocks(self._text):
            kind, _, rest = block.info.partition(" ")
            printed, self._printed = self._printed, None
            if kind == "console":
                self._console(block, rest)
            elif kind == "gdb":
                self._gdb(block, rest)
            elif block.info == "python":
                self._python(block)
            elif block.info == "text output":
                self._output(block, printed)
            elif block.info == "text trace":
                self._quoted(block, self._folder.glob("*.txt"))
            elif block.info == "text kernel":
                self._quoted(block, KERNEL_TRACES.glob("*.txt"))
            elif kind == "json" and rest:
                self._json(block, rest)
            elif block.info in SHOWN_ONLY:
                continue
            else:
                self._fail(block.start, f"unknown kind of block: {block.info!r}")
            self.checked += 1
        return self

    def refreshed(self, wall_clock: bool = False) -> str:
        """The page with the present outputs; with `wall_clock` those figures are new as well."""
        lines = self._text.split("\n")
        for start, end, fresh in reversed(self._edits):
            lines[start:end] = fresh(wall_clock)
        return "\n".join(lines)

    def _fail(self, line: int, why: str) -> None:
        self.failures.append(f"{self.name}:{line + 1}: {why}")

    def _compare(self, start: int, shown: tuple[str, ...], actual: list[str], what: str) -> None:
        self._edits.append((start, start + len(shown), partial(refreshed, shown, actual)))
        if not agrees(shown, actual):
            self._fail(start, f"{what} prints something else:\n{difference(shown, actual)}")

    def _console(self, block: Block, rest: str) -> None:
        settings = dict(word.split("=") for word in rest.split())
        expected = int(settings.get("exit", "0"))
        for command in commands(block):
            if RUN_LINUX in command.text and (missing := no_kernel()):
                self.missing = missing
                continue
            code, printed = self._command(command.text)
            if code != expected:
                self._fail(command.start - 1, f"exit code {code}, not {expected}: {command.text}")
            shown = command.shown
            if settings.get("numbers") == "any" and agrees(*map(without_numbers, (shown, printed))):
                continue
            self._compare(command.start, shown, printed, command.text)

    def _gdb(self, block: Block, rest: str) -> None:
        first, *others = commands(block, GDB_PROMPT)
        assert first.text.startswith("target remote "), f"{self.name}: gdb connects first"
        session = debug(shlex.split(rest), [command.text for command in others])
        if session.code:
            self._fail(block.start, f"exit code {session.code}: {session.err}")
        for command, printed in zip((first, *others), session.printed, strict=True):
            self._compare(command.start, command.shown, printed.splitlines(), command.text)

    def _command(self, text: str) -> tuple[int, list[str]]:
        if PIPE in text:
            return pipeline(text)
        words = shlex.split(text)
        if words == ["make", "run"]:
            recipe = (ROOT / "Makefile").read_text(encoding="utf-8")
            assert "\t@$(BIN)/kvmtick run\n" in recipe, "make run does not run `kvmtick run`"
            words = ["kvmtick", "run"]
        assert words[0] == "kvmtick", f"{self.name}: cannot run {text!r} in a test"
        # a guest's text goes there byte for byte
        out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            code = main(words[1:])
        out.seek(0)
        return code, out.read().splitlines()

    def _python(self, block: Block) -> None:
        namespace: dict[str, Any] = {"__name__": "example"}
        out = io.StringIO()
        try:
            code = compile("\n".join(block.lines), f"{self.name}:{block.start + 1}", "exec")
            with contextlib.redirect_stdout(out):
                exec(code, namespace)
                for name, function in namespace.items():
                    if name.startswith("test_"):
                        function(self._make_machine)
        except Exception as error:
            self._fail(block.start, f"{type(error).__name__}: {error}")
        self._printed = out.getvalue().splitlines()

    def _output(self, block: Block, printed: list[str] | None) -> None:
        if printed is None:
            self._fail(block.start, "an output without a python block before it")
        else:
            self._compare(block.start, block.lines, printed, "the python block")

    def _quoted(self, block: Block, files: Any) -> None:
        traces = [line for file in files for line in file.read_text().splitlines()]
        there = set(traces)
        fresh = []
        for at, line in enumerate(block.lines):
            if line.strip() == ELISION or line in there:
                fresh.append(line)
                continue
            self._fail(block.start + at, f"not a line of the trace: {line}")
            fresh.append(_nearest(line, traces))
        self._edits.append((block.start, block.start + len(block.lines), lambda _: fresh))

    def _json(self, block: Block, command: str) -> None:
        code, printed = self._command(command)
        if code:
            self._fail(block.start, f"exit code {code}: {command}")
            return
        actual = json.loads("\n".join(printed))
        try:
            shown = json.loads("\n".join(block.lines))
        except ValueError as error:
            self._fail(block.start, f"no JSON: {error}")
            shown = {}
        fresh = json.dumps(actual, indent=2).split("\n")
        for key in HOST_KEYS:
            shown.pop(key, None)
            actual.pop(key, None)
        if shown != actual:
            self._edits.append((block.start, block.start + len(block.lines), lambda _: fresh))
            before, after = (json.dumps(o, indent=2).split("\n") for o in (shown, actual))
            self._fail(
                block.start, f"{command} prints another object:\n{difference(before, after)}"
            )


def _nearest(line: str, traces: list[str]) -> str:
    """The trace's line of the same event that is most like `line`; `line` if there is none."""
    event = line.partition(": ")[2].partition(": ")[0]
    alike = [other for other in dict.fromkeys(traces) if f": {event}: " in other]
    return (difflib.get_close_matches(line, alike, n=1, cutoff=0) or [line])[0]


@pytest.fixture
def run_page(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kvmtick_machine: MakeMachine,
) -> Callable[[str, str], PageRun]:
    """Runs a page, given its name and its text."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "recordings").symlink_to(ROOT / "docs" / "recordings")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delenv("FORCE_COLOR", raising=False)

    def run(name: str, text: str) -> PageRun:
        return PageRun(name, text, tmp_path, kvmtick_machine).run()

    return run


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_examples(page: Path, run_page: Callable[[str, str], PageRun]) -> None:
    text = page.read_text(encoding="utf-8")
    if "\n```gdb " in text and shutil.which("gdb") is None:
        pytest.skip("gdb is not installed: apt-get install gdb")
    if "kvmtick run seabios" in text and not SEABIOS.exists():
        pytest.skip("SeaBIOS is not installed: apt-get install seabios")
    if "\n$ kvmtick query " in text:
        pytest.importorskip("duckdb", reason="needs duckdb: pip install 'kvmtick[export]'")
    run = run_page(page.name, text)
    if REFRESH:
        fresh = run.refreshed(wall_clock=REFRESH == "all")
        if fresh != text:
            page.write_text(fresh, encoding="utf-8")
            pytest.skip(f"{page.name} refreshed: look at the change, then test again")
        return
    remedy = "\n\nIf the page is out of date: KVMTICK_REFRESH_DOCS=1 pytest tests/docs"
    assert not run.failures, "\n\n".join(run.failures) + remedy
    assert run.checked >= RUN_BLOCKS.get(page.name, 0)
    if run.missing:
        pytest.skip(f"all examples but those that boot Linux are right: {run.missing}")


# That these tests can fail.

WRONG_PAGES = {
    "output": ("```console\n$ kvmtick --version\nkvmtick 0.0\n```", "prints something else"),
    "elided output": ("```console\n$ kvmtick run --ticks 2\n...\nnonsense\n...\n```", "nonsense"),
    "missing output": ("```console\n$ kvmtick --version\n```", "prints something else"),
    "exit code": ("```console\n$ kvmtick run no-such-guest\n...\n```", "exit code 2, not 0"),
    "python": ("```python\nassert 1 == 2\n```", "AssertionError"),
    "python's test": ("```python\ndef test_x(kvmtick_machine):\n    assert 0\n```", "Assert"),
    "python's output": ("```python\nprint(1)\n```\n\n```text output\n2\n```", "the python block"),
    "trace": (
        "```console\n$ kvmtick run --ticks 1 --trace t.txt\n...\n```\n"
        "```text trace\n    kvm-pit/1000-1001    [000] .....     0.5: kvm_set_irq: gsi 7\n```",
        "not a line of the trace",
    ),
    "kernel's trace": ("```text kernel\nkvm_set_irq: gsi 7\n```", "not a line of the trace"),
    "json": ('```json kvmtick run --ticks 1 --json\n{"guest": "x"}\n```', "another object"),
    "pipeline": (
        "```console numbers=any\n$ true | kvmtick run --ticks 2\n...\nnonsense 5\n```",
        "nonsense",
    ),
    "kind": ("```pythn\nprint(1)\n```", "unknown kind"),
}


WRONG_GDB = "```gdb --ticks 2\n(gdb) target remote :1\n...\n(gdb) p 1\n$1 = 2\n```"


@needs_gdb
def test_a_wrong_gdb_session_is_found(run_page: Callable[[str, str], PageRun]) -> None:
    [failure] = run_page("page", WRONG_GDB).failures
    assert "p 1 prints something else" in failure
    run = run_page("page", WRONG_GDB)
    assert not run_page("page", run.refreshed()).failures


@pytest.mark.parametrize(("text", "message"), WRONG_PAGES.values(), ids=WRONG_PAGES)
def test_a_wrong_page_is_found(
    text: str, message: str, run_page: Callable[[str, str], PageRun]
) -> None:
    failures = run_page("page", text).failures
    assert len(failures) == 1
    assert message in failures[0]


def test_a_host_without_a_kernel_is_told(
    run_page: Callable[[str, str], PageRun], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(find_kernel, "__defaults__", (tmp_path,))
    run = run_page("page", "```console\n$ true | kvmtick run linux\nnonsense\n```")
    assert not run.failures
    assert "apt-get install linux-image-cloud-amd64" in run.missing


RIGHT_PAGE = """\
```console
$ kvmtick run --ticks 2
...
9.999 s of wall time: 1 ticks/s, 310 instructions
```

```console numbers=any
$ true | kvmtick run --ticks 2
...
delivered 99,999 reached the guest within their period
...
```

```console exit=2
$ kvmtick run no-such-guest
...
```

```python
print("one")
print("two")
```

```text output
...
two
```
"""


def test_a_right_page_passes(run_page: Callable[[str, str], PageRun]) -> None:
    assert not run_page("page", RIGHT_PAGE).failures


def test_refreshing_leaves_a_right_page_alone(run_page: Callable[[str, str], PageRun]) -> None:
    run = run_page("page", RIGHT_PAGE)
    assert run.refreshed() == RIGHT_PAGE
    assert "9.999 s" not in run.refreshed(wall_clock=True)


def test_refreshing_mends_a_page(run_page: Callable[[str, str], PageRun]) -> None:
    text = "\n\n".join(
        WRONG_PAGES[kind][0] for kind in ("output", "missing output", "python's output", "trace")
    )
    assert not run_page("page", run_page("page", text).refreshed()).failures
