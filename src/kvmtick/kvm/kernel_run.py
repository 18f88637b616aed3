"""The user-space side of a PC on the real kernel, for `KernelVm.run`.

Every vCPU runs in a thread of its own, vCPU 0 in the caller's. What no chip of the kernel answers,
the machine's ports do (`kvmtick.machine.ports`), one access at a time.
"""

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from kvmtick.abi import KvmError
from kvmtick.abi.exits import (
    Exit,
    ExitHlt,
    ExitIntr,
    ExitIo,
    ExitIoapicEoi,
    ExitMmio,
    ExitShutdown,
    trouble,
)
from kvmtick.machine.machine import Exit as RunExit
from kvmtick.machine.machine import debug_exit, power_off_exit, reset_exit
from kvmtick.machine.pc.console import Console
from kvmtick.machine.pc.host import PcHost
from kvmtick.machine.pc.pc import Pc
from kvmtick.machine.ports import PortHandler, PortMap, PortOwner
from kvmtick.ticks.life import TickAssembler
from kvmtick.timing.clock import MonotonicClock
from kvmtick.timing.queue import NEVER_NS, EventQueue
from kvmtick.timing.wall import Waker, realtime_ns

if TYPE_CHECKING:
    from kvmtick.kvm.kernel import KernelVcpu, KernelVm

__all__ = ["Ends", "Observer", "Session", "UserSpace", "observed"]

SLICE_S: Final = 0.05
"""How often `until` is asked, where no exit of a vCPU does it sooner."""


class Observer(Protocol):
    """Who sees the events of a run: a reader of the kernel's trace."""

    assembler: TickAssembler
    """From `start` on."""

    def start(self, live: bool = False) -> None:
        """The run begins; `live`: the assembler has to keep up with it."""

    def stop(self) -> None:
        """The run is over, however it ended: hand over the rest."""


@contextmanager
def observed(observer: Observer, live: bool) -> Iterator[None]:
    """Started, and stopped whatever happens."""
    observer.start(live)
    try:
        yield
    finally:
        observer.stop()


class UserSpace(PortOwner):
    """The ports of one VM, and what the guest asked of user space by them.

    `serve` and `ioapic_eoi` are called by any of the vCPUs' threads, with `lock`.
    """

    def __init__(self, vm: "KernelVm", ram_bytes: int) -> None:
        self.lock = threading.RLock()
        self.clock = MonotonicClock()
        self.queue = EventQueue()
        self.waker = Waker()
        """Of the thread that looks after `queue`."""
        self.ports = PortMap(self)
        self.pc = Pc(
            PcHost(
                self.clock,
                self.queue,
                lambda gsi, level: _set_irq_line(vm, gsi, level),
                realtime_ns,
                self.ports.print_serial,
                self._reset,
                self._power_off,
                ram_bytes,
                lambda: len(vm.vcpus),
            )
        )
        self.console: Console | None = None
        """What the serial line's input comes from; a live one."""
        self.end: RunExit | None = None
        """How the guest has ended the run."""
        self._sleep_us = 0

    def serve(self, vcpu: "KernelVcpu", exit_: ExitIo | ExitMmio | ExitIoapicEoi) -> int:
        """Answer an exit; for how many microseconds the vCPU has to stay out of the guest."""
        ports, next_ns = self.ports, self.queue.next_ns
        self.clock.refresh()
        if isinstance(exit_, ExitIoapicEoi):
            ports.ioapic_eoi(exit_.vector)
        elif isinstance(exit_, ExitIo):
            self._port_access(vcpu, exit_)
        elif exit_.is_write:
            value = int.from_bytes(exit_.data, "little")
            ports.mmio_write(exit_.phys_addr, exit_.len, value)
        else:
            value = ports.mmio_read(exit_.phys_addr, exit_.len)
            vcpu.answer(value.to_bytes(exit_.len, "little"))
        if self.queue.next_ns < next_ns:
            self.waker.wake()
        sleep_us, self._sleep_us = self._sleep_us, 0
        return sleep_us

    def _port_access(self, vcpu: "KernelVcpu", exit_: ExitIo) -> None:
        """A string instruction makes `count` accesses."""
        if exit_.is_write:
            for value in exit_.values():
                self.ports.write(exit_.port, exit_.size, value)
            return
        values = (self.ports.read(exit_.port, exit_.size) for _ in range(exit_.count))
        vcpu.answer(b"".join(value.to_bytes(exit_.size, "little") for value in values))

    def port_devices(self) -> dict[int, PortHandler]:
        return self.pc.ports()

    def run_due(self) -> int:
        """What the devices had to do by now; when they have something to do next."""
        self.clock.refresh()
        self.queue.run_due(self.clock)
        if self.console is not None:
            self.console.poll()
        return self.queue.next_ns

    def filenos(self) -> list[int]:
        """What the devices wait for, besides the time."""
        return [] if self.console is None else self.console.filenos()

    @property
    def has_work(self) -> bool:
        """The devices have something to do later."""
        return self.queue.next_ns < NEVER_NS or self.console is not None

    def guest_exit(self, value: int) -> None:
        self._end(debug_exit(value))

    def _reset(self, by: str) -> None:
        self._end(reset_exit(by))

    def _power_off(self) -> None:
        self._end(power_off_exit())

    def leave(self) -> None:
        """The person at the console wants no more."""
        self._end(RunExit("interrupted"))

    def _end(self, end: RunExit) -> None:
        if self.end is None:
            self.end = end

    def guest_sleep(self, microseconds: int) -> None:
        self._sleep_us = microseconds


def _set_irq_line(vm: "KernelVm", gsi: int, level: int) -> None:
    """Without an irqchip nobody listens."""
    with suppress(KvmError):
        vm.irq_line(gsi, level)


@dataclass(frozen=True, slots=True)
class Ends:
    """What ends a session, if the guest does not: CLOCK_MONOTONIC, wall seconds, a question."""

    end_ns: int | None = None
    limit_s: float | None = None
    until: Callable[[], bool] | None = None


class Session:
    """One `KernelVm.run`: the threads, and how the first of them ended."""

    def __init__(self, vcpus: "Iterable[KernelVcpu]", user: UserSpace, ends: Ends) -> None:
        self._vcpus = list(vcpus)
        self._user = user
        self._ends = ends
        limit_s = ends.limit_s
        self._limit_ns = None if limit_s is None else time.monotonic_ns() + int(limit_s * 1e9)
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._end: RunExit | BaseException | None = None
        self._device_threads: list[threading.Thread] = []
        """One from when the devices have something to do later."""

    def run(self, first: "KernelVcpu") -> RunExit:
        """`first` here, the others in threads; returns when all are out of the guest."""
        threads = [
            threading.Thread(
                target=self._run_vcpu, args=(vcpu,), name=f"vcpu {vcpu.vcpu_id}", daemon=True
            )
            for vcpu in self._vcpus
            if vcpu is not first
        ]
        self._user.waker.open()
        try:
            for thread in threads:
                thread.start()
            with self._user.lock:
                self._start_devices_if_needed()
            self._run_first(first)
        except KeyboardInterrupt:
            self._finish(RunExit("interrupted"))
        finally:
            # also where this thread was interrupted: nobody may stay in a VM that is given back
            self._stop()
            # the devices last: until then a vCPU may have started them
            for group in (threads, self._device_threads):
                for thread in group:
                    if thread.ident is not None:
                        thread.join()
            self._user.waker.close()
        if isinstance(self._end, BaseException):
            raise self._end
        assert self._end is not None
        return self._end

    # The vCPUs' threads.

    def _run_first(self, vcpu: "KernelVcpu") -> None:
        """The caller's vCPU, whose time out of the guest is what looks at the clock."""
        while not self._over.is_set():
            if (end := self._time_is_up()) or (end := self._is_enough()):
                self._finish(end)
                return
            with vcpu.file.bounded(self._slice_s()):
                self._enter(vcpu)

    def _run_vcpu(self, vcpu: "KernelVcpu") -> None:
        """Any other: in a thread of its own, until `_stop`."""
        try:
            with vcpu.file.bounded(None):
                self._enter(vcpu)
        except BaseException as error:
            self._finish(error)

    def _start_devices_if_needed(self) -> None:
        """With `user.lock`: any vCPU's thread may find that there is something to do."""
        if self._device_threads or not self._user.has_work:
            return
        thread = threading.Thread(target=self._run_devices, name="devices", daemon=True)
        self._device_threads.append(thread)
        thread.start()

    def _run_devices(self) -> None:
        """What devices do by themselves when their time comes, until `_stop`."""
        user = self._user
        try:
            while not self._over.is_set():
                with user.lock:
                    next_ns = user.run_due()
                    end, user.end = user.end, None
                    filenos = user.filenos()
                if end is not None:
                    self._finish(end)
                    return
                user.waker.sleep_until(next_ns, filenos)
        except BaseException as error:
            self._finish(error)

    def _enter(self, vcpu: "KernelVcpu") -> None:
        """Enter the guest and serve its exits until the slice or the run is over."""
        # `_stop` finds either this thread in `bounded` or `_over` set here
        while not self._over.is_set():
            exit_ = vcpu.file.enter()
            if isinstance(exit_, ExitIo | ExitMmio | ExitIoapicEoi):
                end = self._serve(vcpu, exit_)
            elif isinstance(exit_, ExitIntr) and exit_.reason == "time":
                return
            else:
                end = _end_of(vcpu, exit_)
            if end is not None:
                self._finish(end)

    def _serve(
        self, vcpu: "KernelVcpu", exit_: ExitIo | ExitMmio | ExitIoapicEoi
    ) -> RunExit | None:
        """Answer an exit; how the run ends, if it does."""
        user, until = self._user, self._ends.until
        with user.lock:
            sleep_us = user.serve(vcpu, exit_)
            self._start_devices_if_needed()
            end, user.end = user.end, None
            if end is not None:
                return end
            if until is not None and until():
                return RunExit("until")
        if sleep_us:
            # only the vCPU that asked for it sleeps
            self._over.wait(self._rest_s(sleep_us / 1e6))
        return None

    # How it ends.

    def _finish(self, end: RunExit | BaseException) -> None:
        """The first to end the run is who tells how; the others are called out of the guest."""
        with self._lock:
            if self._end is None:
                self._end = end
        self._stop()

    def _stop(self) -> None:
        if self._over.is_set():
            return
        self._over.set()
        self._user.waker.wake()
        for vcpu in self._vcpus:
            vcpu.file.end()

    def _time_is_up(self) -> RunExit | None:
        now_ns = time.monotonic_ns()
        if self._ends.end_ns is not None and now_ns >= self._ends.end_ns:
            return RunExit("time")
        if self._limit_ns is not None and now_ns >= self._limit_ns:
            limit_s = self._ends.limit_s
            return RunExit("limit", detail=f"still running after {limit_s:g} s of wall time")
        return None

    def _is_enough(self) -> RunExit | None:
        until = self._ends.until
        if until is None:
            return None
        with self._user.lock:
            return RunExit("until") if until() else None

    def _rest_s(self, *also_s: float) -> float | None:
        """Seconds to the first of the ends and `also_s`; None: there is none."""
        now_ns = time.monotonic_ns()
        ends_ns = (self._ends.end_ns, self._limit_ns)
        rests_s = [max(0, end_ns - now_ns) / 1e9 for end_ns in ends_ns if end_ns is not None]
        return min([*rests_s, *also_s], default=None)

    def _slice_s(self) -> float | None:
        """How long the caller's vCPU may stay in the guest; None: as long as it likes."""
        return self._rest_s() if self._ends.until is None else self._rest_s(SLICE_S)


def _end_of(vcpu: "KernelVcpu", exit_: Exit) -> RunExit:
    """What an exit that nobody can serve means."""
    who = f"vCPU {vcpu.vcpu_id}"
    if isinstance(exit_, ExitIntr):
        return RunExit("interrupted", detail=f"{who} was kicked")
    if isinstance(exit_, ExitShutdown):
        return RunExit("triple-fault", detail=f"{who} shut down on a triple fault")
    if isinstance(exit_, ExitHlt):
        return RunExit("deadlock", detail=f"{who} halted, and there is no irqchip to wake it")
    return RunExit("guest-error", detail=f"{who}: {trouble(exit_)}")
