"""The user-space side of a small PC on the real kernel: `run_until_exit`.

Every vCPU runs in a thread of its own, vCPU 0 in the caller's; ports that no chip of the kernel
answers are answered here.
"""

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from kvmtick.abi.exits import (
    Exit,
    ExitHlt,
    ExitIntr,
    ExitIo,
    ExitIoapicEoi,
    ExitMmio,
    ExitShutdown,
)
from kvmtick.machine.ports import PortHandler

if TYPE_CHECKING:
    from kvmtick.kvm.kernel import KernelVcpu

__all__ = [
    "PORT_CONSOLE",
    "PORT_EXIT",
    "PORT_SERIAL",
    "PORT_SLEEP",
    "GuestExit",
    "Session",
    "UserPorts",
]

PORT_SLEEP: Final = 0xD8
"""A write sleeps that many microseconds with the vCPU outside KVM_RUN."""
PORT_CONSOLE: Final = 0xE9
PORT_EXIT: Final = 0xF4
PORT_SERIAL: Final = 0x3F8

_UART_LCR, _UART_LSR = PORT_SERIAL + 3, PORT_SERIAL + 5
_UART_LCR_DLAB = 0x80
_UART_LSR_IDLE = 0x60
"""Transmitter and holding register empty: a guest that waits for them goes on at once."""


@dataclass(frozen=True, slots=True)
class GuestExit:
    """How `run_until_exit` ended.

    `reason`: `done` (the guest wrote `code` to the exit port), `limit` (wall time), `interrupted`
    (a kick), `triple-fault`, `deadlock` (HLT that nothing can end), `guest-error` (`detail` holds
    the exit). `console` is what it wrote to the console ports, `exits` how often its vCPUs left
    KVM_RUN. `vcpu_id` is who ended it.
    """

    reason: Literal["done", "limit", "interrupted", "triple-fault", "deadlock", "guest-error"]
    code: int
    console: bytes
    exits: int
    elapsed_ns: int
    detail: Exit
    vcpu_id: int = 0


class UserPorts:
    """The ports user space answers: exit 0xf4, console 0xe9 and 0x3f8, sleep 0xd8.

    `handlers` come first; a port nobody knows reads all ones and swallows writes. One access at a
    time, from whichever thread: only a sleeping vCPU holds nobody up.
    """

    def __init__(self, handlers: Mapping[int, PortHandler], sleep: Callable[[float], None]) -> None:
        self.handlers = handlers
        self.console = bytearray()
        self.exit_value: int | None = None
        self._sleep = sleep
        self._lcr = 0
        self._lock = threading.RLock()

    def write(self, port: int, size_bytes: int, value: int) -> None:
        """The guest wrote `value`."""
        if port == PORT_SLEEP and port not in self.handlers:
            self._sleep(value / 1e6)
            return
        with self._lock:
            if handler := self.handlers.get(port):
                handler(port, size_bytes, value)
            elif port == PORT_EXIT:
                if self.exit_value is None:
                    self.exit_value = value
            elif port == PORT_CONSOLE or (port == PORT_SERIAL and not self._lcr & _UART_LCR_DLAB):
                self.console.append(value & 0xFF)
            elif port == _UART_LCR:
                # with DLAB set, 0x3f8 is the divisor and no text
                self._lcr = value & 0xFF

    def read(self, port: int, size_bytes: int) -> int:
        """What the guest reads."""
        ones = (1 << 8 * size_bytes) - 1
        if handler := self.handlers.get(port):
            with self._lock:
                value = handler(port, size_bytes, None)
            return ones if value is None else value & ones
        return _UART_LSR_IDLE if port == _UART_LSR else ones


class Session:
    """One `run_until_exit`: the threads, and how the first of them ended."""

    def __init__(
        self, vcpus: "Iterable[KernelVcpu]", handlers: Mapping[int, PortHandler], limit_s: float
    ) -> None:
        self._vcpus = list(vcpus)
        self._ports = UserPorts(handlers, self._sleep)
        self._begin_ns = time.monotonic_ns()
        self._deadline_s = time.monotonic() + limit_s
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._end: tuple[KernelVcpu, Exit | BaseException] | None = None
        self._exits = 0

    def run(self, first: "KernelVcpu") -> GuestExit:
        """`first` here, the others in threads; returns when all are out of the guest."""
        threads = [
            threading.Thread(
                target=self._run_vcpu, args=(vcpu,), name=f"vcpu {vcpu.vcpu_id}", daemon=True
            )
            for vcpu in self._vcpus
            if vcpu is not first
        ]
        try:
            for thread in threads:
                thread.start()
            self._run_vcpu(first)
        finally:
            # also where this thread was interrupted: nobody may stay in a VM that is given back
            self._stop()
            for thread in threads:
                if thread.ident is not None:
                    thread.join()
        assert self._end is not None
        vcpu, how = self._end
        if isinstance(how, BaseException):
            raise how
        return GuestExit(
            reason=_reason(how),
            code=self._ports.exit_value or 0,
            console=bytes(self._ports.console),
            exits=self._exits,
            elapsed_ns=time.monotonic_ns() - self._begin_ns,
            detail=how,
            vcpu_id=vcpu.vcpu_id,
        )

    def _run_vcpu(self, vcpu: "KernelVcpu") -> None:
        exits = 0
        how: Exit | BaseException
        try:
            with vcpu.file.bounded(max(0.0, self._deadline_s - time.monotonic())):
                # `_stop` finds either this thread in `bounded` or `_over` set here
                while not self._over.is_set():
                    how = vcpu.file.enter()
                    exits += 1
                    if not self._go_on(vcpu, how):
                        break
                else:
                    return
        except BaseException as error:
            how = error
        finally:
            with self._lock:
                self._exits += exits
        with self._lock:
            if self._end is None:
                self._end = vcpu, how
        self._stop()

    def _go_on(self, vcpu: "KernelVcpu", exit_: Exit) -> bool:
        """Serve an exit; False: it ends the run."""
        if isinstance(exit_, ExitIo):
            _port_access(vcpu, self._ports, exit_)
            ours = exit_.port == PORT_EXIT and PORT_EXIT not in self._ports.handlers
            return not (ours and exit_.is_write)
        if isinstance(exit_, ExitMmio):
            if not exit_.is_write:
                vcpu.answer(b"\xff" * exit_.len)
            return True
        return isinstance(exit_, ExitIoapicEoi)

    def _stop(self) -> None:
        if self._over.is_set():
            return
        self._over.set()
        for vcpu in self._vcpus:
            vcpu.file.end()

    def _sleep(self, seconds: float) -> None:
        self._over.wait(max(0.0, min(seconds, self._deadline_s - time.monotonic())))


def _port_access(vcpu: "KernelVcpu", ports: UserPorts, exit_: ExitIo) -> None:
    """Serve one KVM_EXIT_IO; a string instruction makes `count` accesses."""
    if exit_.is_write:
        for value in exit_.values():
            ports.write(exit_.port, exit_.size, value)
        return
    values = (ports.read(exit_.port, exit_.size) for _ in range(exit_.count))
    vcpu.answer(b"".join(value.to_bytes(exit_.size, "little") for value in values))


def _reason(
    exit_: Exit,
) -> Literal["done", "limit", "interrupted", "triple-fault", "deadlock", "guest-error"]:
    if isinstance(exit_, ExitIo):
        return "done"
    if isinstance(exit_, ExitIntr):
        return "limit" if exit_.reason == "time" else "interrupted"
    if isinstance(exit_, ExitShutdown):
        return "triple-fault"
    return "deadlock" if isinstance(exit_, ExitHlt) else "guest-error"
