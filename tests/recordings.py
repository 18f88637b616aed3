"""Small traces in files: of real runs, from what tests/trace/record.py took of a kernel, and of
simulated ones.
"""

import contextlib
import io
import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from kvmtick import bench
from kvmtick.cli import main
from kvmtick.trace.decoder import Decoder
from kvmtick.trace.events import Function
from kvmtick.trace.ktrace import Header, KtraceWriter
from kvmtick.trace.vms import VmInfo

RECORDED = Path(bench.__file__).with_name("recorded.json")
GUESTS = (
    "tick-pic",
    "tick-ioapic",
    "tick-lapic",
    "tick-x2apic",
    "tick-mask",
    "tick-if0",
    "nmi-watchdog",
)
"""The guests there is a recording of; a few ticks each, reinject on."""

RUNS = (
    "tick-if0 --ticks 15 --hold 5ms --no-reinject",
    "tick-mask --ticks 15 --hold 5ms",
    "tick-noeoi --for 80ms",
    "tick-oneshot --ticks 5",
    "ipi-tick --ticks 5",
    "nmi-watchdog --ticks 5",
    "tick-msi --ticks 5",
)
"""Simulated runs."""


def write_trace(path: Path, source: str) -> Path:
    """The trace of one of GUESTS or RUNS; a run's in the form that the path's suffix says."""
    if source in GUESTS:
        return write_recording(path, source)
    path.write_bytes(_simulated(source, path.suffix))
    return path


@cache
def _simulated(run: str, suffix: str) -> bytes:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, f"run{suffix}")
        with contextlib.redirect_stdout(io.StringIO()):
            code = main(["run", *run.split(), "--trace", str(path), "--json"])
        assert code == 0
        return path.read_bytes()


@cache
def _recorded() -> dict[str, Any]:
    recorded: dict[str, Any] = json.loads(RECORDED.read_text())
    return recorded


def write_recording(path: Path, guest: str) -> Path:
    """A recording of a guest on the kernel's chips: one VM among the events of other VMs."""
    recorded = _recorded()
    run = recorded["runs"][guest]
    header = Header(
        kind="host",
        header_page=recorded["header_page"],
        formats=recorded["formats"],
        functions=recorded["functions"],
        start_ns=_start_ns(run),
        origin=recorded["provenance"],
        vms=[_vm(run, guest)],
    )
    with path.open("wb") as file:
        writer = KtraceWriter(file, header)
        for cpu, page in run["pages"]:
            writer.page(cpu, bytes.fromhex(page))
        writer.end(header.start_ns + 1_000_000_000, 0)
    return path


def _vm(run: dict[str, Any], guest: str) -> VmInfo:
    vcpus = {int(tid): vcpu for tid, vcpu in run["vcpus"].items()}
    threads = {tid: f"CPU {vcpu}/KVM" for tid, vcpu in vcpus.items()}
    return VmInfo(min(vcpus), guest, threads, vcpus, reinject=True)


def _start_ns(run: dict[str, Any]) -> int:
    recorded = _recorded()
    functions = {int(at, 16): Function[name.upper()] for at, name in recorded["functions"].items()}
    by = Decoder(recorded["header_page"], recorded["formats"], functions)
    return min(by.decode(bytes.fromhex(page), cpu)[0][0] for cpu, page in run["pages"])
