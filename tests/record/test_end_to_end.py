"""Guests on the real kernel, recorded and reported from end to end.

The guest's own count cannot lie, and who watches from within the VMM sees the same kernel at the
same time: with both a recording has to agree, however late the host is. What the numbers are on a
host that is on time is asked of runs in which it was.
"""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from kernel_guest import Guest
from recorded_guests import (
    Recorded,
    RecordedVm,
    differences,
    is_first_seen,
    kvmtick,
    read,
    record,
    without_events,
)

from kvmtick.abi import HostError
from kvmtick.host.tracefs import open_tracefs
from kvmtick.kvm.kernel import KernelVm
from kvmtick.ticks.tick import Tick
from kvmtick.ticks.verdict import Verdict, Where

TICKS = 40
HOLD = {"param_ms": 50}
WATCHED = [
    Guest("pic", "tick-pic", TICKS, watched=True),
    Guest("if0", "tick-if0", 2 * TICKS, options=HOLD, watched=True),
    Guest("mask", "tick-mask", TICKS, options=HOLD, watched=True),
    Guest("ioapic", "tick-ioapic", TICKS, watched=True),
    Guest("if0 discard", "tick-if0", TICKS, False, HOLD, watched=True),
    Guest("mask discard", "tick-mask", TICKS, False, HOLD, watched=True),
    Guest("msi", "tick-msi", TICKS, watched=True),
    Guest("lapic", "tick-lapic", TICKS, watched=True),
    Guest("nmi", "nmi-watchdog", TICKS, watched=True),
    Guest("both", "tick-long", TICKS, watched=True),
]
HELD = 45
"""Ticks that the guest holds back at least; 49 or 50 on a host that is on time."""
GROUPS = [WATCHED[:4], WATCHED[4:8], WATCHED[8:]]


@pytest.fixture(scope="module", autouse=True)
def host() -> None:
    """Skip, saying why, where the kernel cannot be run or recorded."""
    try:
        KernelVm().close()
        with open_tracefs() as tracefs:
            tracefs.instance().close()
    except HostError as error:
        pytest.skip(f"needs /dev/kvm and a tracefs it may write to: {error}")


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    """One recording of them all, a few at a time."""
    return record(tmp_path_factory.mktemp("watched"), *GROUPS)


@pytest.mark.parametrize("name", [guest.name for guest in WATCHED])
def test_a_recording_says_what_the_vmm_sees(watched: Recorded, name: str) -> None:
    vm, said = watched.vms[name], watched.said[name]
    assert said.lost == 0
    assert vm.taken + sum(map(is_first_seen, vm.main)) == said.guest_ticks
    for lives, seen in zip(vm.sources, said.sources, strict=True):
        assert differences(lives, seen) == []
        assert sum(map(is_first_seen, lives)) <= 1
        assert sum(each.verdict is not Verdict.OUTSTANDING for each in seen) >= TICKS // 2


def held_back(vm: RecordedVm) -> tuple[Tick, list[Tick]]:
    """The tick that the guest kept waiting longest, and those that came meanwhile."""
    first = max(vm.main, key=lambda tick: (tick.inject_ns or 0) - tick.expiry_ns)
    assert first.inject_ns is not None
    return first, [t for t in vm.main if first.expiry_ns < t.expiry_ns < first.inject_ns]


@pytest.mark.parametrize(
    ("name", "becomes"),
    [
        ("if0", {Verdict.REINJECTED: None}),
        ("if0 discard", {Verdict.COALESCED: Where.PIC}),
        ("mask", {Verdict.DROPPED: None}),
        ("mask discard", {Verdict.MASKED: Where.PIC}),
    ],
)
def test_what_the_guest_holds_back(
    watched: Recorded, name: str, becomes: dict[Verdict, Where | None]
) -> None:
    first, others = held_back(watched.vms[name])
    assert first.verdict in (Verdict.LATE, Verdict.REINJECTED)
    # where ticks are not replayed, one that comes before the worker ran merges with that before it
    seen = [t for t in others if (t.verdict, t.where) != (Verdict.COALESCED, Where.WORKER)]
    assert len(seen) >= (1 if "discard" in name else HELD)
    assert len(others) >= HELD
    assert {t.verdict: t.where for t in seen} == becomes


# In the middle, and with events missing.


def test_a_recording_that_begins_in_the_middle(tmp_path: Path) -> None:
    names = ("tick-pic", "tick-lapic", "tick-ioapic")
    running = [Guest(name, name, 0, watched=True) for name in names]
    running.append(Guest("discard", "tick-pic", 0, reinject=False, watched=True))
    recorded = record(tmp_path, [*running, Guest("clock", "tick-pic", 2 * TICKS)])
    for guest in running:
        (lives,), (seen,) = recorded.vms[guest.name].sources, recorded.said[guest.name].sources
        before = [each for each in seen if each.expiry_ns < lives[0].expiry_ns]
        assert before
        known = next(at for at, life in enumerate(lives) if life.verdict is not Verdict.UNKNOWN)
        assert known <= TICKS // 2
        assert differences(lives[known:], seen[len(before) + known :]) == []


def test_without_an_event_ticks_are_unknown_but_not_wrong(
    watched: Recorded, tmp_path: Path
) -> None:
    whole = {name: vm.sources for name, vm in watched.vms.items()}
    for event in ("kvm_pic_set_irq", "kvm_ack_irq", "kvm_eoi", "sched_kthread_work_queue_work"):
        path = without_events(watched.path, tmp_path / f"{event}.ktrace", event)
        vms = read(path)
        unknown = 0
        for name, pid in watched.pids.items():
            for lives, fewer in zip(whole[name], vms[pid].sources, strict=True):
                assert len(lives) == len(fewer)
                told = [(a, b) for a, b in zip(lives, fewer) if b.verdict is not Verdict.UNKNOWN]
                unknown += len(lives) - len(told)
                assert [
                    p for p in told if (p[0].verdict, p[0].where) != (p[1].verdict, p[1].where)
                ] == []
        assert unknown > TICKS
        assert f"{event} was not recorded" in kvmtick("report", path)
