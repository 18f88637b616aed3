"""How several vCPUs share the host CPU: messages, PAUSE, and the length of a turn."""

from itertools import pairwise

import pytest
from scripted_pc import EOI, EXIT, FIXED_42, ICR, ICR2, LOG, NMI, SVR, US, Pc

from kvmtick.abi.structs import KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED
from kvmtick.cpu.scripted import (
    Hlt,
    MmioWrite,
    Out,
    Pause,
    Program,
    Routine,
    Spin,
    Sti,
)
from kvmtick.kvm.model import ModelVm
from kvmtick.machine.machine import QUANTUM_NS, SHORT_QUANTUM_NS


def spins() -> Program:
    yield MmioWrite(SVR, 0x1FF)
    yield Sti()
    while True:
        yield Spin(100)


def says(value: int) -> Routine:
    """A handler."""

    def handler() -> Program:
        yield Out(LOG, value)
        yield MmioWrite(EOI, 0)

    return handler


def sends(*commands: int, after: int = 250_000) -> Routine:
    def guest() -> Program:
        yield Spin(after)
        for command in commands:
            yield MmioWrite(ICR2, 1 << 24)
            yield Out(LOG, 0)
            yield MmioWrite(ICR, command)
        while True:
            yield Spin(100)

    return guest


@pytest.mark.parametrize("command", [FIXED_42, NMI], ids=["interrupt", "NMI"])
def test_a_message_to_a_vcpu_that_waits_for_its_turn_cuts_the_quantum(command: int) -> None:
    handlers = {0x42: says(1), 2: says(1)}
    pc = Pc(sends(command), spins, handlers=handlers, started=True)
    pc.run(for_ns=600 * US)
    (sent,), (taken,) = pc.times(0), pc.times(1)
    assert 0 < taken - sent <= SHORT_QUANTUM_NS + 10


def test_a_message_wakes_a_halted_vcpu_within_a_short_quantum() -> None:
    def sleeps() -> Program:
        yield MmioWrite(SVR, 0x1FF)
        yield Sti()
        yield Hlt()

    pc = Pc(sends(FIXED_42), sleeps, handlers={0x42: says(1)}, started=True)
    pc.run(for_ns=600 * US)
    (sent,), (taken,) = pc.times(0), pc.times(1)
    assert 0 < taken - sent <= SHORT_QUANTUM_NS + 10


def test_quanta_grow_back_when_no_message_comes() -> None:
    def talks(value: int) -> Routine:
        def guest() -> Program:
            yield MmioWrite(SVR, 0x1FF)
            yield Sti()
            while True:
                yield Out(LOG, value)
                yield Spin(99)

        return guest

    def sends_once() -> Program:
        yield MmioWrite(ICR2, 1 << 24)
        yield MmioWrite(ICR, FIXED_42)
        yield from talks(0)()

    def empty() -> Program:
        yield MmioWrite(EOI, 0)

    pc = Pc(sends_once, talks(1), handlers={0x42: empty}, started=True)
    pc.run(for_ns=1500 * US)
    changes = [at for (_, was), (at, value) in pairwise(pc.log) if value != was]
    turns = [round((end - start) / US) for start, end in pairwise(changes)]
    assert turns[:8] == [1, 2, 4, 8, 16, 32, 64, 100]
    assert set(turns[7:]) == {QUANTUM_NS // US}


def test_pause_gives_the_turn_to_a_vcpu_that_could_run() -> None:
    """Who waits by spinning spends next to nothing of the time the other one needs."""
    done: list[int] = []

    def waits() -> Program:
        while not done:
            yield Pause()
        yield Out(EXIT, 0)

    def works() -> Program:
        yield Spin(1_000_000)
        done.append(1)
        while True:
            yield Pause()

    pc = Pc(waits, works, started=True)
    assert pc.run(for_ns=5_000 * US) == "done"
    assert pc.vm.machine.clock.now_ns < 1_001 * US


def test_pause_is_an_instruction_like_any_other_where_no_vcpu_could_run() -> None:
    def waits() -> Program:
        while True:
            yield Pause()

    def sleeps() -> Program:
        yield Hlt()

    pc = Pc(waits, sleeps, started=True)
    assert pc.run(for_ns=500 * US) == "time"
    assert pc.engines[0].entries < 20
    assert pc.vcpus[1].get_mp_state() == KVM_MP_STATE_HALTED


def test_a_vcpu_alone_runs_without_an_end_of_turn() -> None:
    def sleeps() -> Program:
        yield Hlt()

    pc = Pc(spins, sleeps, quantum_ns=1_000, started=True)
    assert pc.run(for_ns=900 * US) == "time"
    assert pc.engines[0].entries < 10


@pytest.mark.parametrize("quantum_us", [1, 7, 250])
def test_the_quantum_is_the_callers_choice(quantum_us: int) -> None:
    def talks(value: int) -> Routine:
        def guest() -> Program:
            while True:
                yield Out(LOG, value)
                yield Spin(999)

        return guest

    pc = Pc(talks(0), talks(1), irqchip=False, quantum_ns=quantum_us * US)
    pc.run(for_ns=4 * quantum_us * US)
    said = [value for _, value in pc.log]
    assert said == ([0] * quantum_us + [1] * quantum_us) * 2


@pytest.mark.parametrize("quantum_ns", [0, -1])
def test_a_quantum_of_nothing_is_refused(quantum_ns: int) -> None:
    with pytest.raises(ValueError, match=f"quantum_ns={quantum_ns}: give more than 0"):
        ModelVm(quantum_ns=quantum_ns)


def test_a_vcpu_that_waits_for_sipi_is_no_deadlock_while_another_runs() -> None:
    def boots() -> Program:
        yield Spin(300_000)
        yield Out(EXIT, 0)

    pc = Pc(boots, spins, started=True)
    pc.vcpus[1].set_mp_state(KVM_MP_STATE_INIT_RECEIVED)
    assert pc.run() == "done"


def test_it_is_one_when_the_others_are_halted_for_good() -> None:
    def stops() -> Program:
        yield Hlt()

    pc = Pc(stops, spins, started=True)
    pc.vcpus[1].set_mp_state(KVM_MP_STATE_INIT_RECEIVED)
    run = pc.vm.run()
    assert run.exit.reason == "deadlock"
    snapshot = pc.vm.machine.snapshot()
    assert (snapshot["vCPU 0 state"], snapshot["vCPU 1 state"]) == ("halted", "init received")
