"""Whether details are recorded or not is no difference to any tick: a trace changes no verdict."""

import pytest

from kvmtick import Kvm, guests
from kvmtick.ticks.source import Source

LATE = {"worker_delay": "exp:500us", "vcpu_off": "5%:3ms"}
RUNS = [
    *((guest, True, {}) for guest in ("tick-pic", "tick-ioapic", "tick-lapic", "nmi-watchdog")),
    *((guest, True, LATE) for guest in ("tick-pic", "tick-ioapic", "tick-lapic", "tick-mask")),
    *((guest, False, LATE) for guest in ("tick-pic", "tick-if0", "nmi-watchdog")),
]


def facts(guest: str, detail: bool, reinject: bool, faults: dict[str, str]) -> list[object]:
    with Kvm("model").create_vm() as vm:
        image = guests.load(guest, ticks=50)
        vm.prepare(image.needs, reinject)
        for name, delay in faults.items():
            vm.machine.host.set_fault(name, delay)
        vm.machine.recorder.detail = detail
        vm.load(image)
        run = vm.run(limit_s=60)
        return [run.exit, *map(of_source, vm.assembler.sources())]


def of_source(source: Source) -> object:
    lives = [
        (tick.expiry_ns, tick.accept_ns, tick.inject_ns, tick.eoi_ns, tick.verdict, tick.detail)
        for tick in source.lives
    ]
    latencies = {hop: histogram.buckets() for hop, histogram in source.latency_ns().items()}
    return source.name, source.expired, source.extra, source.arrivals(), latencies, lives


@pytest.mark.parametrize(("guest", "reinject", "faults"), RUNS)
def test_a_trace_changes_no_verdict(guest: str, reinject: bool, faults: dict[str, str]) -> None:
    assert facts(guest, True, reinject, faults) == facts(guest, False, reinject, faults)
