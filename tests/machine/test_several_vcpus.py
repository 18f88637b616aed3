"""Several vCPUs on one host CPU: turns, start-up by INIT and SIPI, wake-ups, what repeats."""

import pytest
from scripted_pc import EOI, EXIT, FIXED_42, ICR, ICR2, LOG, NMI, SVR, US, Pc

from kvmtick import guests
from kvmtick.abi.errors import KvmError
from kvmtick.abi.structs import (
    KVM_MP_STATE_HALTED,
    KVM_MP_STATE_INIT_RECEIVED,
    KVM_MP_STATE_RUNNABLE,
    KVM_MP_STATE_UNINITIALIZED,
)
from kvmtick.cpu.scripted import (
    Cli,
    Hlt,
    MmioWrite,
    Out,
    Program,
    Routine,
    Spin,
    Sti,
)
from kvmtick.kvm.model import ModelVm
from kvmtick.machine.machine import QUANTUM_NS
from kvmtick.trace.events import Event

MS = 1_000_000
INIT, SIPI_AT_9000 = 0x4500, 0x4609


def spinner(name: int) -> Routine:
    """Writes its name every microsecond."""

    def guest() -> Program:
        while True:
            yield Out(LOG, name)
            yield Spin(999)

    return guest


def say(name: int) -> Routine:
    def guest() -> Program:
        yield Out(LOG, name)

    return guest


def send(*commands: int, to: int = 1) -> Program:
    """IPIs to one APIC, from one that is enabled."""
    yield MmioWrite(SVR, 0x1FF)
    yield MmioWrite(ICR2, to << 24)
    for command in commands:
        yield MmioWrite(ICR, command)


def test_without_an_irqchip_all_vcpus_run_from_the_start_a_quantum_each() -> None:
    pc = Pc(spinner(0), spinner(1), spinner(2), irqchip=False)
    assert pc.run(for_ns=9 * QUANTUM_NS) == "time"
    turns = [value for index, value in enumerate(pc.values()) if index % 100 == 0]
    assert turns == [0, 1, 2, 0, 1, 2, 0, 1, 2]
    for start in range(0, 900, 100):
        assert len(set(pc.values()[start : start + 100])) == 1
    assert [ns for ns, _ in pc.log] == [index * US for index in range(900)]


def test_a_vcpu_that_halts_gives_the_rest_of_its_quantum_away() -> None:
    def napper() -> Program:
        yield Out(LOG, 0)
        yield Hlt()

    pc = Pc(napper, spinner(1), irqchip=False)
    assert pc.run(for_ns=3 * QUANTUM_NS) == "time"
    assert pc.values()[:2] == [0, 1]
    assert 0 not in pc.values()[1:]
    assert pc.log[1][0] == 2


def test_only_the_vcpu_that_boots_runs_the_others_wait_for_init_and_sipi() -> None:
    pc = Pc(spinner(0), spinner(1))
    assert pc.states() == [KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_UNINITIALIZED]
    pc.run(for_ns=3 * QUANTUM_NS)
    assert set(pc.values()) == {0}


def test_set_boot_cpu_id_chooses_who_boots() -> None:
    pc = Pc(spinner(0), spinner(1), boot=1)
    assert pc.states() == [KVM_MP_STATE_UNINITIALIZED, KVM_MP_STATE_RUNNABLE]
    pc.run(for_ns=3 * QUANTUM_NS)
    assert set(pc.values()) == {1}
    with pytest.raises(KvmError, match="KVM_SET_BOOT_CPU_ID"):
        pc.vm.set_boot_cpu_id(0)


def test_init_and_sipi_start_a_vcpu_at_the_page_of_the_vector() -> None:
    def boots() -> Program:
        yield from send(INIT, SIPI_AT_9000)
        yield Hlt()

    pc = Pc(boots, say(1))
    assert pc.run() == "deadlock"
    assert pc.values() == [1]
    registers = pc.vcpus[1].vcpu.engine.registers()
    assert (registers["cs"], registers["rip"]) == (0x900, 0)
    accepted = [record[3:] for record in pc.records if record[1] == Event.KVM_APIC_ACCEPT_IRQ]
    assert accepted == [(1, 0x500, 0, 0), (1, 0x600, 0, 9)]


def test_sipi_without_init_is_ignored_and_init_alone_leaves_the_vcpu_waiting() -> None:
    def boots() -> Program:
        yield from send(SIPI_AT_9000)
        yield Spin(500_000)
        yield Out(LOG, 0)
        yield from send(INIT)
        yield Spin(500_000)
        yield Out(EXIT, 0)

    pc = Pc(boots, say(1))
    assert pc.run() == "done"
    assert pc.values() == [0]
    assert pc.states()[1] == KVM_MP_STATE_INIT_RECEIVED


def test_init_stops_a_running_vcpu_and_sipi_starts_it_anew() -> None:
    def boots() -> Program:
        yield from send(INIT, SIPI_AT_9000)
        yield Spin(250_000)
        yield from send(INIT)
        yield Out(LOG, 0)
        yield Spin(1_000_000)
        yield Out(LOG, 0)
        yield from send(SIPI_AT_9000)
        yield Spin(250_000)
        yield Out(EXIT, 0)

    pc = Pc(boots, spinner(1))
    assert pc.run() == "done"
    first, second = (index for index, value in enumerate(pc.values()) if value == 0)
    assert set(pc.values()[:first]) == {1}
    assert second == first + 1
    assert set(pc.values()[second + 1 :]) == {1}


def test_init_makes_the_vcpu_that_boots_start_over() -> None:
    def boots() -> Program:
        yield Out(LOG, 7)
        yield from send(INIT, to=0)
        yield Spin(10)
        yield Out(LOG, 8)

    pc = Pc(boots)
    pc.run(until=lambda: len(pc.log) >= 3)
    assert pc.values()[:3] == [7, 7, 7]
    assert pc.states() == [KVM_MP_STATE_RUNNABLE]


def test_an_ipi_wakes_a_halted_vcpu_and_an_nmi_one_that_takes_no_interrupts() -> None:
    def boots() -> Program:
        yield from send(INIT, SIPI_AT_9000)
        yield Spin(500_000)
        yield from send(FIXED_42)
        yield Spin(500_000)
        yield from send(NMI)
        yield Spin(500_000)
        yield Out(EXIT, 0)

    def sleeps() -> Program:
        yield MmioWrite(SVR, 0x1FF)
        yield Sti()
        yield Hlt()
        yield Cli()
        yield Out(LOG, 1)
        yield Hlt()
        yield Out(LOG, 2)

    def tick() -> Program:
        yield Out(LOG, 0x42)
        yield MmioWrite(EOI, 0)

    pc = Pc(boots, sleeps, handlers={0x42: tick, 2: say(0x02)})
    assert pc.run() == "done"
    assert pc.values() == [0x42, 1, 2, 2]
    assert pc.states()[1] == KVM_MP_STATE_HALTED


def test_an_ipi_reaches_a_running_vcpu_when_its_turn_comes() -> None:
    def boots() -> Program:
        yield from send(INIT, SIPI_AT_9000)
        yield Spin(350_000)
        yield from send(FIXED_42)
        yield Out(LOG, 0)
        yield Spin(350_000)
        yield Out(EXIT, 0)

    def busy() -> Program:
        yield MmioWrite(SVR, 0x1FF)
        yield Sti()
        while True:
            yield Spin(1000)

    pc = Pc(boots, busy, handlers={0x42: say(1)})
    assert pc.run() == "done"
    assert pc.values() == [0, 1]
    assert 0 < pc.log[1][0] - pc.log[0][0] <= QUANTUM_NS


def test_time_stands_still_for_a_vcpu_the_host_took_away_not_for_the_others() -> None:
    pc = Pc(spinner(0), spinner(1), irqchip=False)
    pc.vm.machine.take_vcpu_off(2 * MS, pc.vcpus[0].vcpu)
    pc.run(for_ns=3 * MS)
    assert all(value == 1 for ns, value in pc.log if ns < 2 * MS)
    assert any(value == 0 for ns, value in pc.log if ns >= 2 * MS)


def test_a_vcpu_that_the_host_took_away_is_no_deadlock() -> None:
    with ModelVm() as vm:
        guest = guests.load("ipi-tick", ticks=20)
        vm.prepare(guest.needs)
        vm.load(guest)
        vm.machine.host.set_fault("vcpu_off", "10us")
        run = vm.run()
    assert (run.exit.reason, run.guest_ticks) == ("done", 20)


def test_all_halted_with_interrupts_off_is_a_deadlock_that_names_the_reason() -> None:
    def stops() -> Program:
        yield Cli()
        yield Hlt()

    pc = Pc(stops, stops, irqchip=False)
    run = pc.vm.run()
    assert (run.exit.reason, "interrupts off" in run.exit.detail) == ("deadlock", True)


def test_set_mp_state_halts_and_releases_a_vcpu() -> None:
    pc = Pc(spinner(0), spinner(1))
    pc.vcpus[1].set_mp_state(KVM_MP_STATE_RUNNABLE)
    pc.vcpus[0].set_mp_state(KVM_MP_STATE_HALTED)
    pc.run(for_ns=3 * QUANTUM_NS)
    assert set(pc.values()) == {1}


def test_a_run_repeats_record_by_record() -> None:
    def boots() -> Program:
        yield from send(INIT, SIPI_AT_9000)
        for _ in range(20):
            yield Spin(70_000)
            yield from send(FIXED_42)
        yield Out(EXIT, 0)

    def busy() -> Program:
        yield MmioWrite(SVR, 0x1FF)
        yield Sti()
        while True:
            yield Spin(333)
            yield Out(LOG, 1)

    def tick() -> Program:
        yield Out(LOG, 0x42)
        yield MmioWrite(EOI, 0)

    runs = [Pc(boots, busy, handlers={0x42: tick}) for _ in range(2)]
    for pc in runs:
        assert pc.run() == "done"
    assert runs[0].records == runs[1].records
    assert runs[0].values().count(0x42) >= 10
