"""A thread in KVM_RUN: who may be one, how its sleep ends, how it is closed."""

import errno
import threading
from collections.abc import Iterator

import pytest
from threads import JOIN_S, nothing_leaks, thread

from kvmtick.abi.errors import KvmError
from kvmtick.cpu.unicorn import UnicornEngine
from kvmtick.machine.machine import Machine
from kvmtick.machine.vcpu_thread import VcpuThread
from kvmtick.timing.queue import NEVER_NS
from kvmtick.vcpu.vcpu import MpState


@pytest.fixture
def machine() -> Iterator[Machine]:
    made = Machine()
    made.board.create_irqchip()
    yield made
    made.close()


def halted(machine: Machine, vcpu_id: int = 0) -> VcpuThread:
    vcpu = machine.create_vcpu(UnicornEngine(), vcpu_id)
    vcpu.set_mp_state(MpState.HALTED)
    return VcpuThread(machine, vcpu)


def test_one_at_a_time(machine: Machine) -> None:
    one = halted(machine)
    with one.running():
        assert machine.threads == [one]
        with pytest.raises(RuntimeError, match="running already"), one.running():
            pass
        with pytest.raises(RuntimeError, match="running already"):
            machine.run()
    assert machine.threads == []
    assert not machine.lock.is_mine


def test_a_limit_ends_the_sleep(machine: Machine) -> None:
    one = halted(machine)
    with one.running():
        assert not one.is_ready(0.001)
        assert (machine.clock.now_ns, machine.sleepers) == (0, [])
    one.close()


def test_virtual_time_jumps_to_the_deadline_of_one_that_is_alone(machine: Machine) -> None:
    one = halted(machine)
    machine.board.queue.add(5_000, lambda: one.vcpu.set_mp_state(MpState.RUNNABLE))
    one.vcpu.vmcs.guest_rflags |= 1 << 9
    with one.running():
        assert not one.is_ready(None)
        assert machine.clock.now_ns == 5_000
        assert one.is_ready(None)


def test_another_thread_wakes_it(machine: Machine) -> None:
    one = halted(machine)

    def wake() -> None:
        with machine.lock:
            one.vcpu.set_mp_state(MpState.RUNNABLE)
            machine.wake_sleepers()

    with one.running(), thread(wake):
        while not one.is_ready(JOIN_S):
            pass
    one.close()


def test_the_last_that_sleeps_lets_time_pass(machine: Machine) -> None:
    """Two sleep: time jumps once the second does, too."""
    one, two = halted(machine), halted(machine, 1)
    for each in (one, two):
        each.vcpu.vmcs.guest_rflags |= 1 << 9
    machine.board.queue.add(7_000, lambda: [each.vcpu.set_mp_state(0) for each in (one, two)])
    times = []

    def run(each: VcpuThread) -> None:
        with each.running():
            while not each.is_ready(JOIN_S):
                pass
            times.append(machine.clock.now_ns)

    with thread(lambda: run(two)):
        run(one)
    assert times == [7_000, 7_000]
    for each in (one, two):
        each.close()


def test_a_closed_one_does_not_run(machine: Machine) -> None:
    one = halted(machine)
    one.close()
    one.close()
    with pytest.raises(KvmError) as failure, one.running():
        pass
    assert failure.value.errno == errno.EBADF
    one.wake()


def test_closing_calls_it_out_and_waits_for_nobody(machine: Machine) -> None:
    one, out = halted(machine), threading.Event()

    def run() -> None:
        with one.running():
            out.set()
            while not one.closed:
                one.is_ready(JOIN_S)
        one.close()

    with nothing_leaks(), thread(run):
        assert out.wait(JOIN_S)
        with machine.lock:
            one.close()


def test_the_machine_is_given_back_by_the_last_that_leaves(machine: Machine) -> None:
    one = halted(machine)
    machine.board.create_pit(0)
    with one.running():
        machine.close()
        assert machine.board.pit is not None
        with pytest.raises(KvmError):
            one.check_open()
    assert machine.board.pit is None
    assert machine.board.queue.next_ns == NEVER_NS
