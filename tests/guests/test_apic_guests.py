"""The guests of the APICs on model and real kernel, with no more than what they say they need."""

from collections.abc import Callable

import pytest

from kvmtick import guests
from kvmtick.abi import HostError
from kvmtick.abi.structs import kvm_cpuid_entry2
from kvmtick.guests import Needs
from kvmtick.guests.script import (
    EXIT_CODE,
    Op,
    Results,
    Scenario,
    apic_eoi_off,
    apic_eoi_on,
    cpuid,
    end,
    ioapic_read,
    ioapic_write,
    lapic_read,
    lapic_write,
    mmio_read,
    mmio_write,
    out8,
    pit,
    rdmsr,
    snap_vector,
    tsc_read,
    unreal,
    wait_nmis,
    wait_vector,
    wrmsr,
    x2apic_write,
)
from kvmtick.host.kvmdev import open_kvm
from kvmtick.kvm.kernel import KernelVm
from kvmtick.kvm.model import ModelVm
from kvmtick.machine.run import Run

TICKS = 100
LIMIT_S = 20.0
HANG_LIMIT_S = 0.4
"""For guests that stop taking ticks: a few hundred periods."""

CPUID_1_ECX = {"x2apic": 1 << 21, "tsc_deadline": 1 << 24}

ID, VERSION, EOI, SVR, ICR, LVTT, LVT0, TMICT, TDCR = (
    0x20,
    0x30,
    0xB0,
    0xF0,
    0x300,
    0x320,
    0x350,
    0x380,
    0x3E0,
)
APIC_BASE, TSC_DEADLINE, X2APIC_ID, X2APIC_EOI = 0x1B, 0x6E0, 0x802, 0x80B


Vm = ModelVm | KernelVm
MakeVm = Callable[[], Vm]


@pytest.fixture(params=["model", "kernel"])
def make_vm(request: pytest.FixtureRequest) -> MakeVm:
    """VMs of one back end; skips, saying why, where /dev/kvm cannot be used."""
    if request.param == "model":
        return ModelVm
    try:
        open_kvm().close()
    except HostError as error:
        pytest.skip(f"needs /dev/kvm: {error}")
    return KernelVm


def prepare(vm: Vm, needs: Needs, reinject: bool) -> None:
    """The VMM's part, but unlike `Vm.prepare` with a CPUID that has what is needed and no more."""
    vm.create_irqchip()
    vm.create_pit2()
    vm.reinject_control(reinject if needs.reinject is None else needs.reinject)
    table = guests.gsi_routing(needs)
    if table is not None:
        vm.set_gsi_routing(table)
    for vcpu_id in range(needs.vcpus):
        vcpu = vm.create_vcpu(vcpu_id)
        if needs.cpuid is not None:
            bits = sum(CPUID_1_ECX[name] for name in needs.cpuid)
            vcpu.set_cpuid2([kvm_cpuid_entry2(function=1, ecx=bits)])


def play(
    make_vm: MakeVm,
    name: str,
    *,
    reinject: bool = True,
    needs: Needs | None = None,
    limit_s: float = LIMIT_S,
    hz: float | None = None,
    timer: guests.TimerMode | None = None,
    ack: bool = True,
    hurry: int = 1,
) -> tuple[Run, guests.Parameters]:
    """A guest's run, and its parameter block afterwards; `needs` instead of what it asks for.

    It waits `hurry` times shorter than it means to.
    """
    with make_vm() as vm:
        tsc_khz = vm.get_tsc_khz() // hurry
        guest = guests.load(name, ticks=TICKS, hz=hz, tsc_khz=tsc_khz, timer=timer, ack=ack)
        prepare(vm, guest.needs if needs is None else needs, reinject)
        vm.load(guest)
        run = vm.run(limit_s=limit_s)
        return run, guests.Parameters.read(vm.read_memory(0, 0x10000))


def ended(run: Run) -> tuple[str, int, str]:
    """What the guest left behind."""
    return run.exit.reason, run.exit.code, run.console


@pytest.mark.parametrize("reinject", [False, True], ids=["once", "reinject"])
@pytest.mark.parametrize("name", ["tick-ioapic", "tick-msi", "nmi-watchdog", "ipi-tick"])
def test_ticks_of_the_pit(make_vm: MakeVm, name: str, reinject: bool) -> None:
    run, block = play(make_vm, name, reinject=reinject)
    assert ended(run) == ("done", 0, "")
    assert run.guest_ticks == block.counter == TICKS
    if name == "ipi-tick":
        assert block.snapshot[0] >= TICKS
    else:
        assert block.snapshot == (0,) * 8


@pytest.mark.parametrize("hz", [None, 2000])
@pytest.mark.parametrize("timer", ["periodic", "oneshot", "tsc-deadline"])
def test_ticks_of_the_local_apic(
    make_vm: MakeVm, timer: guests.TimerMode, hz: float | None
) -> None:
    run, block = play(make_vm, "tick-lapic", timer=timer, hz=hz)
    assert ended(run) == ("done", 0, "")
    assert block.counter == TICKS


def test_ticks_in_x2apic_mode(make_vm: MakeVm) -> None:
    run, block = play(make_vm, "tick-x2apic")
    assert ended(run) == ("done", 0, "")
    assert block.counter == TICKS


def test_without_acknowledgement_one_nmi_comes(make_vm: MakeVm) -> None:
    run, block = play(make_vm, "nmi-watchdog", ack=False, limit_s=HANG_LIMIT_S)
    assert run.exit.reason in ("time", "limit")
    assert block.counter == 1


def test_without_reinjection_nmis_need_no_acknowledgement(make_vm: MakeVm) -> None:
    run, block = play(make_vm, "nmi-watchdog", ack=False, reinject=False)
    assert ended(run) == ("done", 0, "")
    assert block.counter == TICKS


@pytest.mark.parametrize(
    ("name", "timer", "needs", "code", "text"),
    [
        ("tick-x2apic", None, Needs(), 1, "CPUID has no x2APIC"),
        ("tick-x2apic", None, Needs(cpuid=("tsc_deadline",)), 1, "CPUID has no x2APIC"),
        ("tick-lapic", "tsc-deadline", Needs(), 2, "CPUID has no TSC deadline"),
        ("tick-lapic", "tsc-deadline", Needs(cpuid=("x2apic",)), 2, "CPUID has no TSC deadline"),
        ("tick-lapic", "periodic", Needs(), 4, "LVTT does not keep its timer mode"),
        ("ipi-tick", None, Needs(), 3, "CPU 1 did not start"),
    ],
)
def test_a_guest_says_what_it_misses(
    make_vm: MakeVm, name: str, timer: guests.TimerMode | None, needs: Needs, code: int, text: str
) -> None:
    # a vCPU that is not there does not start later either
    hurry = 20 if name == "ipi-tick" else 1
    run, block = play(make_vm, name, timer=timer, needs=needs, hurry=hurry)
    assert (run.exit.code, block.counter) == (code, 0)
    assert run.console.startswith(f"{name}: {text}")
    assert run.console.endswith("\n")


def test_a_cpuid_without_leaf_1_opens_no_timer_mode(make_vm: MakeVm) -> None:
    with make_vm() as vm:
        guest = guests.load("tick-lapic", ticks=TICKS, timer="periodic")
        prepare(vm, Needs(vcpus=0), reinject=True)
        vm.create_vcpu(0).set_cpuid2([kvm_cpuid_entry2(function=0, eax=1)])
        vm.load(guest)
        run = vm.run(limit_s=LIMIT_S)
    text = "tick-lapic: LVTT does not keep its timer mode; set CPUID leaf 1\n"
    assert ended(run) == ("guest-error", 4, text)


# --- the scenario guest's operations ------------------------------------------------------------


def play_script(
    make_vm: MakeVm,
    *script: Op | tuple[Op, ...],
    needs: Needs = guests.DEFAULT_NEEDS,
    reinject: bool = True,
) -> Results:
    """What a script left behind."""
    with make_vm() as vm:
        prepare(vm, needs, reinject)
        scenario = Scenario("test", "a test's", (*script, end(EXIT_CODE)), needs)
        vm.load(scenario.guest(vm.get_tsc_khz()))
        assert vm.run(limit_s=LIMIT_S).exit.code == EXIT_CODE
        return Results.read(vm.read_memory(0, 0x10000))


def test_memory_of_all_widths(make_vm: MakeVm) -> None:
    got = play_script(
        make_vm,
        unreal(),
        mmio_write(0x7000, 0x1122_3344),
        mmio_write(0x7001, 0xFFAA, 1),
        mmio_write(0x7002, 0xFFFF_BBCC, 2),
        mmio_read(0x7000, 0),
        mmio_read(0x7001, 1, 2),
        mmio_read(0x7003, 2, 1),
        mmio_read(0x7002, 128 + 3, 1),
    )
    assert got.results[:5] == (0xBBCC_AA44, 0xCCAA, 0xBB, 0xCC, 0)


def test_registers_of_the_apics(make_vm: MakeVm) -> None:
    got = play_script(
        make_vm,
        unreal(),
        lapic_read(VERSION, 0),
        lapic_write(SVR, 0x1FF),
        lapic_read(SVR, 1),
        ioapic_read(1, 2),
        ioapic_write(0x14, 0x1_0040),
        ioapic_read(0x14, 3),
    )
    assert got.results[:4] == (0x50014, 0x1FF, 0x17_0011, 0x1_0040)


def test_msrs_cpuid_and_tsc(make_vm: MakeVm) -> None:
    got = play_script(
        make_vm,
        rdmsr(APIC_BASE, 0),
        rdmsr(X2APIC_ID, 2),
        wrmsr(X2APIC_EOI, 0),
        cpuid(1, 4),
        tsc_read(8),
        tsc_read(10),
        unreal(),
        lapic_write(SVR, 0x1FF),
        lapic_write(LVTT, 0x4_0055),
        wrmsr(TSC_DEADLINE, 0x7654_3210_89AB_CDEF),
        rdmsr(TSC_DEADLINE, 12),
        wrmsr(TSC_DEADLINE, 0),
        needs=Needs(cpuid=("tsc_deadline",)),
    )
    assert got.results[:4] == (0xFEE0_0900, 0, 0xFFFF_FFFF, 0xFFFF_FFFF)
    assert got.faults == 2
    assert got.results[6] & sum(CPUID_1_ECX.values()) == CPUID_1_ECX["tsc_deadline"]
    first, second, deadline = (got.results[at] | got.results[at + 1] << 32 for at in (8, 10, 12))
    assert first < second
    assert deadline == 0x7654_3210_89AB_CDEF


def test_every_apic_vector_is_counted_on_its_own(make_vm: MakeVm) -> None:
    vectors = (0x30, 0x31, 0x7F, 0xEE, 0xEF)
    sent = tuple(lapic_write(ICR, 0x4_4000 | vector) for vector in vectors)
    waits = tuple(wait_vector(vector, 1) for vector in vectors)
    got = play_script(
        make_vm, unreal(), lapic_write(SVR, 0x1FF), *sent, waits, snap_vector(0x7F, 9)
    )
    assert {vector for vector, times in enumerate(got.apic_vectors) if times} == set(vectors)
    assert got.results[9] == 1


def test_timer_ticks_with_eoi_by_mmio_and_by_msr(make_vm: MakeVm) -> None:
    needs = Needs(cpuid=("x2apic",))
    timer = ((TDCR, 0xB), (LVTT, 0x2_0055), (TMICT, 500_000))
    by_mmio = [lapic_write(register, value) for register, value in ((SVR, 0x1FF), *timer)]
    got = play_script(make_vm, unreal(), *by_mmio, wait_vector(0x55, 5), needs=needs)
    assert got.apic_vectors[0x55] >= 5
    by_msr = [x2apic_write(register, value) for register, value in ((SVR, 0x1FF), *timer)]
    got = play_script(
        make_vm,
        wrmsr(APIC_BASE, 0xFEE0_0D00),
        unreal(),
        apic_eoi_on(x2apic=True),
        *by_msr,
        wait_vector(0x55, 5),
        rdmsr(X2APIC_ID, 0),
        needs=needs,
    )
    assert got.apic_vectors[0x55] >= 5
    assert (got.faults, got.results[0]) == (0, 0)


def test_a_handler_without_eoi_leaves_it_to_the_script(make_vm: MakeVm) -> None:
    got = play_script(
        make_vm,
        unreal(),
        apic_eoi_off(),
        lapic_write(SVR, 0x1FF),
        lapic_write(ICR, 0x4_4050),
        wait_vector(0x50, 1),
        lapic_write(EOI, 0),
        lapic_write(ICR, 0x4_4050),
        wait_vector(0x50, 2),
    )
    assert got.apic_vectors[0x50] == 2


def test_nmis_of_the_watchdog(make_vm: MakeVm) -> None:
    got = play_script(
        make_vm,
        unreal(),
        lapic_write(SVR, 0x1FF),
        lapic_write(LVT0, 0x400),
        out8(0x21, 0xFF),
        pit(1193),
        wait_nmis(5),
        reinject=False,
    )
    assert got.nmis >= 5
