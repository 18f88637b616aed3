"""Guests on the real kernel, recorded and reported from end to end.

The guest's own count cannot lie, and who watches from within the VMM sees the same kernel at the
same time: with both a recording has to agree, however late the host is. What the numbers are on a
host that is on time is asked of runs in which it was.
"""

import pytest
from kernel_guest import Guest
from recorded_guests import Recorded, differences, is_first_seen, record

from kvmtick.abi import HostError
from kvmtick.host.tracefs import open_tracefs
from kvmtick.kvm.kernel import KernelVm
from kvmtick.ticks.verdict import Verdict

TICKS = 40
HOLD = {"param_ms": 50}
WATCHED = [
    Guest("pic", "tick-pic", TICKS, watched=True),
    Guest("if0", "tick-if0", TICKS, options=HOLD, watched=True),
    Guest("mask", "tick-mask", TICKS, options=HOLD, watched=True),
    Guest("ioapic", "tick-ioapic", TICKS, watched=True),
    Guest("if0 discard", "tick-if0", TICKS, False, HOLD, watched=True),
    Guest("mask discard", "tick-mask", TICKS, False, HOLD, watched=True),
    Guest("msi", "tick-msi", TICKS, watched=True),
    Guest("lapic", "tick-lapic", TICKS, watched=True),
    Guest("nmi", "nmi-watchdog", TICKS, watched=True),
    Guest("both", "tick-long", TICKS, watched=True),
]
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
