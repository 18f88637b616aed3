"""`Session`'s threads, with vCPUs that are none."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from eventfds import LIMIT_S

from kvmtick.abi.exits import Exit, ExitIntr, ExitIo
from kvmtick.kvm.kernel_run import Ends, Session, UserSpace

NOBODYS_PORT = 0x80


class File:
    """Leaves the guest with each of `exits`; then stays in it to the end."""

    def __init__(self, *exits: Exit) -> None:
        self._exits = list(exits)
        self._ended = threading.Event()

    @contextmanager
    def bounded(self, limit_s: float | None) -> Iterator[None]:
        yield

    def enter(self) -> Exit:
        if self._exits:
            return self._exits.pop(0)
        assert self._ended.wait(LIMIT_S)
        return ExitIntr("kick")

    def end(self) -> None:
        self._ended.set()


def vcpu(vcpu_id: int, *exits: Exit) -> Any:
    return SimpleNamespace(vcpu_id=vcpu_id, file=File(*exits))


def test_one_thread_has_the_devices_however_early_a_vcpu_asks_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    vm: Any = SimpleNamespace(vcpus=[])
    user = UserSpace(vm, 1 << 20)
    user.queue.add(user.clock.now_ns + 3600 * 1_000_000_000, list)
    vcpus = [vcpu(0, ExitIntr("kick")), vcpu(1, ExitIo(NOBODYS_PORT, 1, 1, True, b"\0"))]
    started, devices = [], threading.Event()
    start = threading.Thread.start

    def start_and_wait(thread: threading.Thread) -> None:
        """vCPU 1 gets to its exit before the caller goes on."""
        started.append(thread.name)
        if started.count(thread.name) > 1:
            return  # two for one `Waker` might never end
        start(thread)
        if thread.name == "devices":
            devices.set()
        if thread.name == "vcpu 1":
            assert devices.wait(LIMIT_S)

    monkeypatch.setattr(threading.Thread, "start", start_and_wait)
    ended = Session(vcpus, user, Ends()).run(vcpus[0])
    assert ended.reason == "interrupted"
    assert started == ["vcpu 1", "devices"]
