"""Traces to report on: simulated runs, changed record by record where that makes the case."""

import contextlib
import io
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvmtick.cli import main
from kvmtick.report.build import build
from kvmtick.report.data import Finding, Report
from kvmtick.trace.events import IRQ_CONTEXT, Event, Record
from kvmtick.trace.reading import open_trace
from kvmtick.trace.vms import VmInfo


def run_json(*arguments: str) -> dict[str, Any]:
    """What `kvmtick run --json` prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main(["run", *arguments, "--json"]) == 0
    result: dict[str, Any] = json.loads(out.getvalue())
    return result


def simulated(folder: Path, *arguments: str) -> Path:
    """The recording of a simulated run."""
    path = folder / "run.ktrace"
    run_json(*arguments, "--trace", str(path))
    return path


def report_of(folder: Path, *arguments: str) -> Report:
    """The report of a simulated run."""
    path = simulated(folder, *arguments)
    with contextlib.closing(open_trace(path)) as trace:
        return build(trace, path)


@dataclass
class MadeTrace:
    """A trace in memory; a `Trace` of `kvmtick.trace.reading`."""

    records: list[Record]
    tasks: list[str]
    vms: list[VmInfo]
    is_complete: bool = False
    lost: int = 0
    unknown: int = 0
    cut: str = ""
    size_bytes: int = 0
    position_bytes: int = 0
    without: frozenset[Event] = field(default_factory=frozenset)

    @property
    def events(self) -> frozenset[Event]:
        """Classes that were recorded."""
        return frozenset(Event) - self.without

    def batches(self) -> Iterator[list[Record]]:
        """All at once."""
        yield self.records

    def close(self) -> None:
        """There is no file."""

    def report(self) -> Report:
        """The report on it."""
        return build(self, Path("made.ktrace"))

    def tid(self, comm: str) -> int:
        """The pid of a thread of this name."""
        (name,) = [name for name in self.tasks if name.startswith(comm)]
        return int(name.rpartition("-")[2])

    def change(self, each: Callable[[Record], Iterable[Record]]) -> None:
        """Every record by those that `each` makes of it."""
        self.records = [new for record in self.records for new in each(record)]


def made(folder: Path, *arguments: str) -> MadeTrace:
    """A simulated run as a host would have recorded it: without what no kernel writes."""
    with contextlib.closing(open_trace(simulated(folder, *arguments))) as trace:
        records = [record for batch in trace.batches() for record in batch]
        own = (Event.PIT_RESET_REINJECT, Event.KVM_INJ_NMI)
        return MadeTrace([r for r in records if r[1] not in own], trace.tasks, trace.vms)


def with_switches(trace: MadeTrace, comm: str, leaves: Callable[[Record], bool]) -> None:
    """A thread sleeps after each record that `leaves`, and gets a CPU where it goes on, on which
    `burner` ran. It is woken when work is queued (the worker) or the PIC has a request (a vCPU).
    """
    tid = trace.tid(comm)
    burner = 77
    trace.tasks.append(f"burner-{burner}")
    wakes = Event.WORK_QUEUE if comm.startswith("kvm-pit") else Event.KVM_PIC_SET_IRQ
    state = {"on": True, "woken": False}

    def each(record: Record) -> Iterator[Record]:
        ts_ns, event = record[:2]
        own = trace.tasks[record[2] & ~IRQ_CONTEXT].startswith(comm)
        if own and not state["on"]:
            state["on"] = True
            yield switch(ts_ns, burner, 0, tid, cpu=5)
        yield record
        if own and event in (Event.WORK_START, Event.KVM_INJ_VIRQ):
            state["woken"] = False
        if event == wakes and not state["woken"]:
            state["woken"] = True
            if not state["on"]:
                yield waking(ts_ns, tid, cpu=5)
        if own and leaves(record) and not state["woken"]:
            state["on"] = False
            yield switch(ts_ns, tid, 1, 0, cpu=5)

    trace.change(each)


def ends_work(record: Record) -> bool:
    """The worker is done."""
    return record[1] == Event.WORK_END


def halts(record: Record) -> bool:
    """The guest does nothing until the next interrupt (exit reason HLT)."""
    return record[1] == Event.KVM_EXIT and record[4] == 12


def switch(ts_ns: int, before: int, state: int, after: int, cpu: int = 0) -> Record:
    """sched_switch."""
    return (ts_ns, int(Event.SCHED_SWITCH), 0, before, state, after, cpu, 120, 120)


def waking(ts_ns: int, pid: int, cpu: int = 0) -> Record:
    """sched_waking."""
    return (ts_ns, int(Event.SCHED_WAKING), 0, pid, cpu, 120)


def kinds(report: Report) -> set[str]:
    """The kinds of its findings."""
    return {finding.kind for finding in report.findings}


def the(report: Report, kind: str) -> Finding:
    """The one finding of a kind."""
    (found,) = [finding for finding in report.findings if finding.kind == kind]
    return found
