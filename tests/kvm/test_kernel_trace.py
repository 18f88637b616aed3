"""`TickTrace` on the live kernel: verdicts, one VM of several, what is lost, nothing that stays."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmtick import guests
from kvmtick.abi import HostError
from kvmtick.host import tracefs as host_tracefs
from kvmtick.host.tracefs import Tracefs, open_tracefs
from kvmtick.kvm import kernel_trace
from kvmtick.kvm.kernel import KernelVm
from kvmtick.kvm.kernel_trace import TickTrace
from kvmtick.kvm.setup import cpuid_of
from kvmtick.machine.run import Run
from kvmtick.ticks.report import TickReport
from kvmtick.trace.events import Event, Record

LIMIT_S = 10.0
PIT_SOURCE_ID = 2
IPI_VECTOR = 0x42


@pytest.fixture(autouse=True)
def tracefs() -> Iterator[Tracefs]:
    """Skip, saying why, where the kernel cannot be run or watched; no instance stays."""
    try:
        KernelVm().close()
        opened = open_tracefs()
        opened.instance().close()
    except HostError as error:
        pytest.skip(f"needs /dev/kvm and a tracefs it may write to: {error}")
    with opened:
        yield opened
        assert [name for name in opened.instances() if f"-{os.getpid()}-" in name] == []


def traced(
    vm: KernelVm, name: str, reinject: bool = True, **load: int
) -> tuple[Run, TickTrace, list[Record]]:
    """One run of a built-in guest, its trace, and the records of that."""
    guest = guests.load(name, tsc_khz=vm.get_tsc_khz(), **load)
    vm.prepare(guest.needs, reinject)
    vm.load(guest)
    records: list[Record] = []
    trace = TickTrace(vm, consumers=[records.extend])
    return vm.run(limit_s=LIMIT_S, observer=trace), trace, records


def total(report: TickReport) -> int:
    """All verdicts."""
    return sum(count for _, count, _ in report.rows())


def taken(report: TickReport) -> int:
    """Interrupts that the guest took, each for a tick or `extra`."""
    return sum(tick.inject_ns is not None for tick in report) + report.extra


def pulses_nobody_asked_for(records: list[Record]) -> int:
    """Pulses of the PIT without an acknowledgement since the last one. There are none, but with a
    back end of KVM that has the PIT take its own injection for one (see docs/fidelity.md).
    """
    count, acknowledged = 0, True
    for record in records:
        if record[1] in (Event.KVM_ACK_IRQ, Event.PIT_RESET_REINJECT):
            acknowledged = True
        elif record[1] == Event.KVM_SET_IRQ and record[3:] == (0, 1, PIT_SOURCE_ID):
            count += not acknowledged
            acknowledged = False
    return count


def overtaken(records: list[Record], vector: int) -> int:
    """Requests of a local APIC's vector that seem merged with one before, and were not: KVM writes
    the record and then IRR, and in between the vCPU may take the request before (docs/fidelity.md).
    """
    count = merged = requested = 0
    for record in records:
        if record[1] == Event.KVM_APIC_ACCEPT_IRQ and record[-1] == vector:
            merged, requested = requested, 1
        elif record[1] == Event.KVM_INJ_VIRQ and record[3] == vector:
            count += merged and not requested
            merged, requested = merged and requested, 0
    return count


@pytest.mark.parametrize(
    ("name", "source", "path"),
    [
        ("tick-pic", "pit", "pic"),
        ("tick-ioapic", "pit", "ioapic"),
        ("tick-msi", "pit", "msi"),
        ("tick-lapic", "lapic", "lapic"),
        ("tick-x2apic", "lapic", "lapic"),
        ("tick-if0", "pit", "pic"),
        ("tick-mask", "pit", "pic"),
        ("nmi-watchdog", "pit", "pic"),
        ("ipi-tick", "pit", "pic"),
    ],
)
def test_every_tick_has_a_verdict(name: str, source: str, path: str) -> None:
    with KernelVm() as vm:
        run, trace, records = traced(vm, name, ticks=60)
    # between its tick and its look at the counter the guest may take one more
    assert run.exit.reason == "done"
    assert run.guest_ticks is not None
    assert run.guest_ticks >= 60
    assert run.ticks is not None
    assert (run.ticks.source, run.ticks.path) == (source, path)
    assert total(run.ticks) == run.ticks.expired
    # the guest's last NMI may find it leaving
    assert run.ticks.count("unknown") <= (name == "nmi-watchdog")
    assert trace.lost == 0
    # of ipi-tick CPU 1 counts, and IPIs merge
    assert taken(run.ticks) == run.guest_ticks or (
        name == "ipi-tick" and taken(run.ticks) > run.guest_ticks
    )
    unasked = pulses_nobody_asked_for(records) if source == "pit" else 0
    if name == "ipi-tick":
        unasked += overtaken(records, IPI_VECTOR)
    assert run.guest_ticks - unasked <= run.ticks.expired
    assert run.ticks.extra <= unasked
    if name == "tick-if0":
        assert run.ticks.count("reinjected") + run.ticks.count("late") >= 45
    if name == "tick-mask":
        assert run.ticks.count("dropped") >= 45
    assert run.as_dict()["ticks"]["expired"] == run.ticks.expired


def test_both_timers_of_one_guest() -> None:
    with KernelVm() as vm:
        run, _, _ = traced(vm, "tick-long", ticks=30)
    assert [(report.source, report.path) for report in run.sources] == [
        ("pit", "ioapic"),
        ("lapic", "lapic"),
    ]
    assert all(total(report) == report.expired for report in run.sources)


@pytest.mark.parametrize("reinject", [False, True])
def test_how_the_pit_was_set_up_before_is_known(reinject: bool) -> None:
    with KernelVm() as vm:
        run, _, _ = traced(vm, "tick-if0", reinject, ticks=60)
    assert run.ticks is not None
    assert (run.ticks.count("reinjected") > 20) is reinject
    assert (run.ticks.count("coalesced") > 20) is not reinject


def test_nmis_that_no_event_shows_are_unknown() -> None:
    with KernelVm() as vm:
        guest = guests.load("nmi-watchdog", ticks=10, ack=False, tsc_khz=vm.get_tsc_khz())
        vm.prepare(guest.needs, reinject=False)
        vm.load(guest)
        seen: list[Record] = []
        run = vm.run(limit_s=LIMIT_S, observer=TickTrace(vm, consumers=[seen.extend]))
    assert run.ticks is not None
    assert run.guest_ticks == 10
    assert total(run.ticks) == run.ticks.expired
    if Event.KVM_INJ_NMI in {record[1] for record in seen}:
        pytest.skip("this host's kvm_entry shows NMIs")
    assert run.ticks.count("unknown") >= 10
    assert {tick.detail for tick in run.ticks if tick.verdict == "unknown"} == {
        "this host writes no event when it injects an NMI"
    }


def test_two_vms_of_one_process_at_once() -> None:
    runs: dict[str, Run] = {}
    records: dict[str, list[Record]] = {}

    def play(name: str) -> None:
        with KernelVm() as vm:
            runs[name], _, records[name] = traced(vm, name, ticks=100)

    names = ("tick-pic", "tick-ioapic")
    threads = [threading.Thread(target=play, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, path in zip(names, ("pic", "ioapic"), strict=True):
        ticks = runs[name].ticks
        assert ticks is not None
        assert {tick.path for tick in ticks if tick.path} == {path}
        assert total(ticks) == ticks.expired
        assert taken(ticks) == runs[name].guest_ticks
        assert ticks.extra <= pulses_nobody_asked_for(records[name])


def test_a_vm_without_a_pit_does_not_take_the_worker_of_another() -> None:
    with KernelVm() as other, KernelVm() as vm:
        other.prepare(guests.load("tick-pic", tsc_khz=other.get_tsc_khz()).needs)
        vm.create_irqchip()
        vm.create_vcpu(0).set_cpuid2(cpuid_of(vm.get_supported_cpuid(), 0))
        guest = guests.load("tick-lapic", ticks=20, tsc_khz=vm.get_tsc_khz())
        vm.load(guest)
        trace = TickTrace(vm)
        run = vm.run(limit_s=LIMIT_S, observer=trace)
    assert run.guest_ticks == 20
    assert not [task for task in trace.tasks if task.startswith("kvm-pit/")]


def test_what_a_small_buffer_loses_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_trace, "BUFFER_KIB", 4)
    monkeypatch.setattr(kernel_trace, "READ_EVERY_S", LIMIT_S)
    with KernelVm() as vm:
        run, trace, _ = traced(vm, "tick-pic", ticks=300)
    assert run.guest_ticks == 300
    assert run.ticks is not None
    assert trace.lost > 0
    assert total(run.ticks) == run.ticks.expired < 300


def test_live_the_ticks_of_a_foreign_guest_end_its_run() -> None:
    with KernelVm() as vm:
        guest = guests.load("tick-pic", ticks=0, tsc_khz=vm.get_tsc_khz())
        vm.prepare(guest.needs)
        foreign = guests.Guest("foreign", guest.image, guest.load_at, guest.entry, None)
        vm.load(foreign)
        run = vm.run(ticks=50, limit_s=LIMIT_S, observer=TickTrace(vm))
    assert run.exit.reason == "done"
    assert run.ticks is not None
    assert sum(tick.inject_ns is not None for tick in run.ticks) >= 50


def test_an_error_in_a_consumer_is_raised_and_nothing_stays(tracefs: Tracefs) -> None:
    def consumer(batch: list[Record]) -> None:
        if len(batch) > 1:
            raise RuntimeError("no room")

    with KernelVm() as vm:
        guest = guests.load("tick-pic", ticks=20, tsc_khz=vm.get_tsc_khz())
        vm.prepare(guest.needs)
        vm.load(guest)
        with pytest.raises(RuntimeError, match="no room"):
            vm.run(limit_s=LIMIT_S, observer=TickTrace(vm, consumers=[consumer]))
    assert [name for name in tracefs.instances() if f"-{os.getpid()}-" in name] == []


def test_without_addresses_of_functions_it_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hidden = tmp_path / "kallsyms"
    hidden.write_text("0000000000000000 t pit_timer_fn\n")
    monkeypatch.setattr(host_tracefs, "KALLSYMS", hidden)
    with KernelVm() as vm, pytest.raises(HostError, match="kptr_restrict"):
        traced(vm, "tick-pic", ticks=1)
