"""What record.py recorded of a real kernel, and how it is read."""

import json
from functools import cache
from pathlib import Path
from typing import Any

from kvmtick import bench
from kvmtick.ticks.life import TickAssembler
from kvmtick.ticks.report import TickReport
from kvmtick.trace.by_vm import ByVm
from kvmtick.trace.decoder import Decoder, Merge
from kvmtick.trace.events import ApicvInhibitReason, Event, Function, Record
from kvmtick.trace.inferred import Inferred
from kvmtick.trace.vms import VmInfo

RECORDED = Path(bench.__file__).with_name("recorded.json")
REINJECT = (0, int(Event.KVM_APICV_INHIBIT_CHANGED), 0, int(ApicvInhibitReason.PIT_REINJ), 1, 0)

RUNS: dict[str, dict[str, int]] = {
    "tick-pic": {"ticks": 3},
    "tick-ioapic": {"ticks": 3},
    "tick-lapic": {"ticks": 3},
    "tick-x2apic": {"ticks": 3},
    "tick-mask": {"ticks": 5, "param_ms": 4},
    "tick-if0": {"ticks": 9, "param_ms": 4},
    "nmi-watchdog": {"ticks": 3},
}
"""By guest, what `guests.load` gets; reinject is on."""

COUNTS = {
    "tick-mask": {"delivered": 4, "late": 1, "dropped": 4},
    "tick-if0": {"delivered": 5, "late": 1, "reinjected": 3},
}
"""What became of their ticks, where not all three were delivered."""


@cache
def kernel() -> dict[str, Any]:
    """The recording."""
    recorded: dict[str, Any] = json.loads(RECORDED.read_text())
    return recorded


def functions(recorded: dict[str, Any]) -> dict[int, Function]:
    """The kernel functions by address."""
    return {int(at, 16): Function[name.upper()] for at, name in recorded["functions"].items()}


def decoder(recorded: dict[str, Any]) -> Decoder:
    """For the kernel of the recording."""
    return Decoder(recorded["header_page"], recorded["formats"], functions(recorded))


def decode(run: dict[str, Any], by: Decoder) -> list[Record]:
    """All records of a run, in order."""
    merge = Merge()
    for cpu, page in run["pages"]:
        merge.add(cpu, by.decode(bytes.fromhex(page), cpu))
    return merge.until(None)


def reports(run: dict[str, Any], records: list[Record], by: Decoder) -> list[TickReport]:
    """What became of its ticks."""
    by_vm, inferred = ByVm(by.tasks.names), Inferred()
    vm = by_vm.add_vm(VmInfo(0, ""))
    for tid, vcpu in run["vcpus"].items():
        by_vm.add_task(vm, by.tasks.name(int(tid), f"CPU {vcpu}/KVM"))
    assembler = TickAssembler(tasks=by.tasks.names, sees_nmis=lambda: inferred.sees_nmis)
    ((_, own),) = by_vm(records)
    assembler(inferred([REINJECT, *own]))
    assembler.settle()
    return assembler.reports()


def verdicts(report: TickReport) -> dict[str, int]:
    """How many of each there are."""
    return {name: count for name, count, _ in report.rows() if count}
