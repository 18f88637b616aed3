"""Creating and freeing the PIT, and its state as user space reads and writes it."""

import errno
from collections.abc import Callable
from ctypes import sizeof

import pytest
from attributes import attributes
from compiled import skip_where_patching_fails
from hypothesis import given
from hypothesis import strategies as st
from pc import Pc

from kvmtick.abi.errors import KvmError
from kvmtick.abi.structs import (
    KVM_PIT_SPEAKER_DUMMY,
    kvm_pit_channel_state,
    kvm_pit_state,
    kvm_pit_state2,
)
from kvmtick.irqchip.i8254 import Pit, PitChannel
from kvmtick.irqchip.iobus import NR_IOBUS_DEVS, IoDevice
from kvmtick.timing.kthread import KthreadWorker
from kvmtick.trace.events import Event

Fail = Callable[[Pc, pytest.MonkeyPatch], None]


class Device(IoDevice):
    """Fills the bus."""

    def io_read(self, port: int, size_bytes: int, stale: int) -> int:
        return 0

    def io_write(self, port: int, size_bytes: int, value: int) -> None:
        pass


def fill_bus(pc: Pc, room: int) -> None:
    device = Device()
    while len(pc.board.bus) < NR_IOBUS_DEVS - room:
        pc.board.bus.register(0x1000, 1, device)


# The steps of creation that can fail, in order.


def source_id_fails(pc: Pc, monkeypatch: pytest.MonkeyPatch) -> None:
    while len(pc.board.source_ids) < 64:
        pc.board.source_ids.request()


def worker_fails(pc: Pc, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_thread(self: object, name: str) -> KthreadWorker:
        raise KvmError(errno.ENOMEM, "kthread_run_worker", name)

    monkeypatch.setattr(type(pc.board), "create_worker", no_thread)


def allocation_fails(pc: Pc, monkeypatch: pytest.MonkeyPatch) -> None:
    skip_where_patching_fails()

    def no_memory(*args: object) -> Pit:
        raise MemoryError("kvm_pit")

    monkeypatch.setattr("kvmtick.irqchip.i8254.Pit", no_memory)


def ports_fail(pc: Pc, monkeypatch: pytest.MonkeyPatch) -> None:
    fill_bus(pc, room=0)


def speaker_ports_fail(pc: Pc, monkeypatch: pytest.MonkeyPatch) -> None:
    fill_bus(pc, room=1)


STEPS: list[Fail] = [
    source_id_fails,
    worker_fails,
    allocation_fails,
    ports_fail,
    speaker_ports_fail,
]


class Registered:
    """All that a PIT registers somewhere, and the workers that were made."""

    def __init__(self, pc: Pc, monkeypatch: pytest.MonkeyPatch) -> None:
        self._board = pc.board
        self.workers: list[KthreadWorker] = []
        create_worker = type(pc.board).create_worker

        def noting(board: object, name: str) -> KthreadWorker:
            worker = create_worker(pc.board, name)
            self.workers.append(worker)
            return worker

        monkeypatch.setattr(type(pc.board), "create_worker", noting)

    def now(self) -> dict[str, object]:
        board = self._board
        return {
            "bus": len(board.bus),
            "ports": [board.bus.find(port, 1) for port in range(0x40, 0x66)],
            "notifiers": len(board.notifiers),
            "source ids": len(board.source_ids),
            "apicv": board.apicv_inhibits,
            "events": len(board.queue),
            "workers alive": sum(not worker.destroyed for worker in self.workers),
            "pit": board.pit,
        }


@pytest.mark.parametrize("step", STEPS)
def test_a_creation_that_fails_undoes_what_it_did(
    step: Fail, monkeypatch: pytest.MonkeyPatch
) -> None:
    pc = Pc(pit=None)
    registered = Registered(pc, monkeypatch)
    step(pc, monkeypatch)
    before = registered.now()
    with pytest.raises(KvmError) as raised:
        pc.board.create_pit(KVM_PIT_SPEAKER_DUMMY)
    assert raised.value.errno == errno.ENOMEM
    assert registered.now() == before
    assert len(registered.workers) == (step not in (source_id_fails, worker_fails))


def test_creation_may_succeed_after_it_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    pc = Pc(pit=None)
    with monkeypatch.context() as patch:
        allocation_fails(pc, patch)
        with pytest.raises(KvmError):
            pc.board.create_pit(0)
    pc.board.create_pit(0)
    assert pc.pit.irq_source_id == 2
    assert pc.pit.reinject


def test_the_last_room_on_the_bus_will_do_without_a_speaker(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pc = Pc(pit=None)
    fill_bus(pc, room=1)
    pc.board.create_pit(0)
    assert len(pc.board.bus) == NR_IOBUS_DEVS


def test_creation_takes_source_2_and_a_worker_named_after_the_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pc = Pc(pit=None)
    registered = Registered(pc, monkeypatch)
    pc.board.create_pit(0)
    assert pc.pit.irq_source_id == 2
    [worker] = registered.workers
    assert worker.name.startswith(f"kvm-pit/{pc.board.pid}-")
    assert worker is pc.pit.worker


@pytest.mark.parametrize("reinject", [True, False])
@pytest.mark.parametrize("flags", [0, KVM_PIT_SPEAKER_DUMMY])
def test_freeing_a_busy_pit_leaves_nothing_registered(
    flags: int, reinject: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pc = Pc(pit=None)
    registered = Registered(pc, monkeypatch)
    before = registered.now()
    pc.board.create_pit(flags)
    pc.pit.set_reinject(reinject)
    pc.host.set_fault("worker_delay", "5ms")
    pc.load(0, 2, 1193)
    pc.run(1_000_000)
    pit = pc.pit
    assert pit.timer.enqueued
    assert pit.work.queued
    pc.board.close()
    assert registered.now() == before
    assert not pit.timer.enqueued
    assert not pit.work.queued
    pc.board.close()  # harmless when repeated
    pc.records()
    pc.run(10_000_000)
    assert pc.records() == []


def test_a_pit_may_be_created_again_after_it_was_freed() -> None:
    pc = Pc()
    pc.board.close()
    pc.board.create_pit(0)
    assert pc.pit.irq_source_id == 2


# The state.


def distinct(channel: PitChannel) -> dict[str, int]:
    """A different value in every field."""
    return {name: index + 1 for index, name in enumerate(attributes(type(channel)))}


def test_save_and_restore_walk_every_field() -> None:
    names = [name for name, *_ in kvm_pit_channel_state._fields_]
    assert sorted(names) == sorted(attributes(PitChannel))
    channel = PitChannel(gate=0)
    values = distinct(channel)
    for name, value in values.items():
        setattr(channel, name, value)
    saved = channel.save()
    assert {name: getattr(saved, name) for name in names} == values
    other = PitChannel(gate=1)
    other.restore(saved)
    assert {name: getattr(other, name) for name in names} == values


def test_get_pit_and_get_pit2_give_the_three_channels_in_order(pc: Pc) -> None:
    for index, channel in enumerate(pc.pit.channels):
        channel.count = 100 + index
    pc.pit.flags = 0x12345678
    assert [channel.count for channel in pc.pit.get_state().channels] == [100, 101, 102]
    state2 = pc.pit.get_state2()
    assert [channel.count for channel in state2.channels] == [100, 101, 102]
    assert state2.flags == 0x12345678


CHANNEL_BYTES = sizeof(kvm_pit_channel_state)


@given(
    data=st.binary(min_size=3 * CHANNEL_BYTES, max_size=3 * CHANNEL_BYTES),
    flags=st.integers(0, 2**32 - 1),
    now_ns=st.integers(0, 10**9),
)
def test_set_pit2_stores_any_bytes_and_reloads(data: bytes, flags: int, now_ns: int) -> None:
    pc = Pc()
    pc.run_to(now_ns)
    state = kvm_pit_state2.from_buffer_copy(data + bytes(sizeof(kvm_pit_state2) - len(data)))
    state.flags = flags
    pc.pit.set_state2(state)
    for index, channel in enumerate(state.channels):
        channel.count = channel.count or 0x10000
        if index:
            channel.count_load_time = now_ns
    assert bytes(pc.pit.get_state2()) == bytes(state)


@given(data=st.binary(min_size=3 * CHANNEL_BYTES, max_size=3 * CHANNEL_BYTES))
def test_any_state_can_be_read_back_from_the_ports(data: bytes) -> None:
    pc = Pc(pit=KVM_PIT_SPEAKER_DUMMY)
    pc.pit.set_state(kvm_pit_state.from_buffer_copy(data))
    pc.run(1_000_000)
    for port in (0x40, 0x41, 0x42, 0x61):
        for _ in range(3):
            assert 0 <= pc.inp(port) <= 0xFF
    pc.out(0x43, 0xCE)  # read-back of everything
    for port in (0x40, 0x41, 0x42):
        assert 0 <= pc.inp(port) <= 0xFF


@pytest.mark.parametrize("mode", [255, 2])
def test_set_pit2_keeps_counts_beyond_16_bits_and_the_load_time_of_counter_0(
    pc: Pc, mode: int
) -> None:
    pc.run(5000)
    state = pc.pit.get_state2()
    state.channels[0].count_load_time = 77
    state.channels[0].mode = mode
    state.channels[2].count = 0x123456
    pc.pit.set_state2(state)
    after = pc.pit.get_state2()
    assert after.channels[0].count_load_time == 77
    assert [after.channels[index].count_load_time for index in (1, 2)] == [5000, 5000]
    assert after.channels[2].count == 0x123456
    assert pc.pit.timer.enqueued == (mode == 2)


def test_a_count_beyond_16_bits_is_read_byte_by_byte(pc: Pc) -> None:
    state = pc.pit.get_state2()
    state.channels[2].count, state.channels[2].mode = 0x123456, 2
    state.channels[2].rw_mode = state.channels[2].read_state = 3
    pc.pit.set_state2(state)
    assert pc.word(0x42) == 0x3456
    assert pc.count(2) == 0x3456


@pytest.mark.parametrize("call", ["set_pit", "set_pit2"])
def test_setting_the_state_restarts_counter_0s_timer(pc: Pc, call: str) -> None:
    pc.load(0, 2, 1193)
    pc.run(400_000)
    pc.records()
    if call == "set_pit":
        pc.pit.set_state(pc.pit.get_state())
    else:
        pc.pit.set_state2(pc.pit.get_state2())
    assert [record[1] for record in pc.records()] == [Event.HRTIMER_CANCEL, Event.HRTIMER_START]
    assert pc.pit.timer.expires_ns == 400_000 + 999_848


def test_set_pit_leaves_the_flags_alone(pc: Pc) -> None:
    pc.pit.flags = 0x80000002
    pc.pit.set_state(pc.pit.get_state())
    assert pc.pit.flags == 0x80000002
