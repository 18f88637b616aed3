"""Guests on the kernel, recorded by `kvmtick record` while they run, and read again."""

import contextlib
import io
import json
import os
import struct
import threading
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from kernel_guest import Guest, KernelGuest, Said, Seen

from kvmtick.cli import main
from kvmtick.conform.punctual import worst_step_us
from kvmtick.ticks.host import HostTicks, VmTicks
from kvmtick.ticks.pit import REINJECT_UNKNOWN
from kvmtick.ticks.source import Source
from kvmtick.ticks.tick import Tick
from kvmtick.ticks.verdict import Verdict
from kvmtick.trace.events import Record
from kvmtick.trace.formats import parse_format
from kvmtick.trace.ftrace import FtraceWriter
from kvmtick.trace.ktrace import MAGIC
from kvmtick.trace.reading import open_trace

_CHUNK = struct.Struct("<BxHI")
"""Before each part of a recording: kind, CPU, length (see `kvmtick.trace.ktrace`)."""

_WAIT_FOR_GUESTS = 'echo go > "$0/go"; cat "$0/over"'

CLOSE_NS = 100_000
"""Two who watch write each event down one after the other, and an interrupt may come in between:
of what is closer to each other they may see another order.
"""


class RecordedVm:
    """What a recording has of one VM."""

    def __init__(self, ticks: VmTicks) -> None:
        self._ticks = ticks
        self._text = io.StringIO()
        self._write = FtraceWriter(self._text, ticks.tasks)
        self._lives: dict[Source, list[Tick]] = {}

    def take(self, records: list[Record]) -> None:
        """The next ones."""
        self._write(records)

    def take_lives(self, source: Source, lives: list[Tick]) -> None:
        """The next ones."""
        self._lives.setdefault(source, []).extend(lives)

    @property
    def sources(self) -> list[list[Tick]]:
        """The lives of each timer."""
        return [self._lives.get(source, []) for source in self._ticks.assembler.sources()]

    @property
    def main(self) -> list[Tick]:
        """Those of the timer that the guest counts."""
        return self.sources[0]

    @property
    def taken(self) -> int:
        """Interrupts of that timer that the guest took, each for a tick or none."""
        extra = self._ticks.assembler.sources()[0].extra
        return sum(tick.inject_ns is not None for tick in self.main) + extra

    def counts(self) -> Counter[str]:
        """Verdicts of its ticks before the guest's last."""
        end_ns = max(tick.eoi_ns or 0 for tick in self.main)
        return Counter(tick.verdict.value for tick in self.main if tick.expiry_ns < end_ns)

    @property
    def worst_step_us(self) -> float:
        """How late the host was at worst."""
        return worst_step_us(self._text.getvalue().splitlines())


@dataclass(frozen=True, slots=True)
class Recorded:
    """A recording, what it has of each guest, and what each says itself; by our names."""

    path: Path
    pids: dict[str, int]
    vms: dict[str, RecordedVm]
    said: dict[str, Said]


def kvmtick(*words: str | Path) -> str:
    """What a command prints; it has to end well."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main([str(word) for word in words]) == 0, out.getvalue()
    return out.getvalue()


def read(path: Path) -> dict[int, RecordedVm]:
    """All VMs of a recording, by pid."""
    with open_trace(path) as trace:
        vms: dict[int, RecordedVm] = {}

        def vm(ticks: VmTicks) -> RecordedVm:
            if ticks.pid not in vms:
                vms[ticks.pid] = RecordedVm(ticks)
            return vms[ticks.pid]

        HostTicks(
            trace,
            on_records=lambda ticks, records: vm(ticks).take(records),
            on_lives=lambda ticks, source, lives: vm(ticks).take_lives(source, lives),
        ).read()
    return vms


def record(folder: Path, *groups: Sequence[Guest]) -> Recorded:
    """Record those of a group at a time, one group after the other; those that run for ever begin
    before the recording and end last. The recorder's command waits for all.
    """
    for name in ("go", "over"):
        os.mkfifo(folder / name)
    path = folder / "t.ktrace"
    said: dict[str, Said] = {}
    with ExitStack() as stack:
        running = [[stack.enter_context(KernelGuest(g)) for g in group] for group in groups]
        endless = [each for group in running for each in group if not each.guest.ticks]
        others = [[each for each in group if each.guest.ticks] for group in running]
        for each in endless:
            each.begin()
        conductor = threading.Thread(target=_conduct, args=(folder, others, endless, said))
        conductor.start()
        pids = {each.guest.name: each.pid for group in running for each in group}
        only = [f"--pid={pid}" for pid in pids.values()]
        kvmtick("record", "-o", path, *only, "--", "sh", "-c", _WAIT_FOR_GUESTS, folder)
        conductor.join()
    vms = read(path)
    return Recorded(path, pids, {name: vms[pid] for name, pid in pids.items()}, said)


def _conduct(
    folder: Path,
    groups: Sequence[Sequence[KernelGuest]],
    endless: Sequence[KernelGuest],
    said: dict[str, Said],
) -> None:
    (folder / "go").read_text()
    with (folder / "over").open("w"):
        for group in groups:
            for each in group:
                each.begin()
            said |= {each.guest.name: each.said() for each in group}
        for each in endless:
            each.end()
        said |= {each.guest.name: each.said() for each in endless}


def without_events(path: Path, to: Path, *names: str) -> Path:
    """The recording as it were if the kernel had no such events."""
    data = path.read_bytes()
    kind, cpu, length = _CHUNK.unpack_from(data, len(MAGIC))
    start = len(MAGIC) + _CHUNK.size
    header = json.loads(data[start : start + length])
    header["formats"] = [t for t in header["formats"] if parse_format(t).name not in names]
    text = json.dumps(header).encode()
    to.write_bytes(MAGIC + _CHUNK.pack(kind, cpu, len(text)) + text + data[start + length :])
    return to


def is_first_seen(life: Tick) -> bool:
    """The VM was there before the recording: what was pending then nobody knows."""
    return (life.verdict, life.detail) == (Verdict.UNKNOWN, "the trace begins here")


def differences(lives: Sequence[Tick], seen: Sequence[Seen]) -> list[tuple[Tick, Seen]]:
    """Where a recording says something else than the guest's process saw. That stopped looking when
    its guest had ended.
    """
    return [
        (life, each)
        for life, before, each in zip(lives, [None, *lives], seen, strict=False)
        if not (
            is_first_seen(life)
            or (life.verdict is Verdict.UNKNOWN and life.detail == REINJECT_UNKNOWN)
            or each.verdict is Verdict.OUTSTANDING
            or _same(life, each)
            or (before is not None and _is_close(before.work_ns, life.fired_ns))
        )
    ]


def _is_close(one_ns: int | None, other_ns: int) -> bool:
    return one_ns is not None and abs(one_ns - other_ns) < CLOSE_NS


def _same(life: Tick, seen: Seen) -> bool:
    if (life.expiry_ns, life.inject_ns is None) != (seen.expiry_ns, seen.inject_ns is None):
        return False
    verdicts = {life.verdict, seen.verdict}
    if seen.inject_ns is not None and seen.period_ns is not None:
        is_borderline = _is_close(seen.inject_ns, seen.expiry_ns + seen.period_ns)
        if is_borderline and verdicts == {Verdict.DELIVERED, Verdict.LATE}:
            return True
    return len(verdicts) == 1 and life.where == seen.where
