"""A thread in KVM_RUN: it lets one vCPU of a machine run or sleep (vcpu_run, vcpu_block).

Several such threads take turns, each for a quantum, and sleep while their vCPU does. Who sleeps is
woken by whoever gives its vCPU something to run for. Virtual time is that of the guest that runs;
when all sleep, it jumps to the next deadline. While user space has a vCPU that could run, it does
so no sooner than wall time passes; and it stands still while nothing could come of it: then only
a call of another thread ends the sleep.
"""

import errno
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from kvmtick.abi.errors import KvmError
from kvmtick.machine.machine import Machine
from kvmtick.timing.queue import NEVER_NS
from kvmtick.timing.wall import Waker
from kvmtick.trace.recorder import IDLE_TASK
from kvmtick.vcpu.vcpu import MpState, Vcpu

__all__ = ["VcpuThread"]

_RUNNABLE = int(MpState.RUNNABLE)


class VcpuThread:
    """What a vCPU's thread does in the kernel; `machine.threads` are those in KVM_RUN."""

    def __init__(self, machine: Machine, vcpu: Vcpu) -> None:
        self.machine = machine
        self.vcpu = vcpu
        self.ident = 0
        """Of the thread in KVM_RUN, or last there."""
        self.until_ns = NEVER_NS
        self.closed = False
        self._waker = Waker()
        self._entered = threading.Lock()

    @contextmanager
    def running(self) -> Iterator[None]:
        """In KVM_RUN; the thread has the machine. RuntimeError: somebody runs this vCPU. KvmError
        EBADF: it was closed.
        """
        machine = self.machine
        if machine.runs_all or machine.lock.is_mine or not self._entered.acquire(blocking=False):
            raise RuntimeError("this vCPU is running already; one thread at a time")
        try:
            with machine.lock:
                if machine.runs_all:
                    raise RuntimeError("the VM is running all its vCPUs already")
                self.check_open()
                self._waker.open()
                machine.begin()
                self.ident = threading.get_ident()
                machine.threads.append(self)
                if machine.virtual:
                    self.vcpu.engine.release_gil(threading.active_count() > 1)
                try:
                    yield
                finally:
                    machine.threads.remove(self)
                    machine.wake_threads()
                    if machine.closed:
                        machine.close()
        finally:
            self._entered.release()

    def is_ready(self, limit_s: float | None) -> bool:
        """Look after what is due; then whether the vCPU may enter the guest. If not, some of its
        sleep is over, at most `limit_s` wall seconds.
        """
        machine, vcpu = self.machine, self.vcpu
        machine.wake_threads()
        machine.lock.pass_on()
        machine.serve_due()
        if vcpu.kicked:
            machine.meet_busy_host(vcpu)
        if machine.clock.now_ns >= vcpu.off_until_ns and (
            vcpu.mp_state == _RUNNABLE or machine.wake(vcpu)
        ):
            return True
        self._sleep(limit_s)
        return False

    def enter(self, limit_s: float | None) -> int:
        """Run the guest for a slice; returns the `ExitReason`."""
        machine = self.machine
        end_ns = NEVER_NS
        if limit_s is not None and not machine.virtual:
            end_ns = machine.clock.now_ns + int(limit_s * 1e9)
        others = machine.awake_threads > 1
        if others or machine.lock.wanted:
            end_ns = min(end_ns, machine.clock.now_ns + machine.quantum_ns)
        self.vcpu.exit_on_pause(others)
        machine.board.running = self.vcpu if others else None
        try:
            return machine.run_slice(self.vcpu, end_ns)
        finally:
            machine.board.running = None

    def wake(self) -> None:
        """End its sleep, from any thread."""
        self._waker.wake()

    def call_out(self) -> None:
        """Let it look up, wherever it is."""
        self.vcpu.engine.kick()
        self.wake()

    def check_open(self) -> None:
        """KvmError EBADF after `close`, of the machine too."""
        if self.closed or self.machine.closed:
            raise KvmError(errno.EBADF, "KVM_RUN", "this vCPU was closed")

    def close(self) -> None:
        """Give the descriptor back; may be repeated. One in KVM_RUN is called out, and has to be
        closed again.
        """
        self.closed = True
        if self in self.machine.threads:
            self.call_out()
        else:
            self._waker.close()

    # Sleeping.

    def _sleep(self, limit_s: float | None) -> None:
        """`kvm_vcpu_block`."""
        machine, clock = self.machine, self.machine.clock
        next_ns = machine.board.queue.next_ns
        machine.recorder.task = IDLE_TASK
        if not machine.virtual:
            self._wait(next_ns, limit_s)
        elif machine.awake_threads > 1 or machine.is_asleep_for_good(self.vcpu):
            self._wait(NEVER_NS, limit_s)
        elif not machine.could_run_elsewhere(self.vcpu) or not self._wait(next_ns, limit_s):
            clock.now_ns = max(clock.now_ns, min(next_ns, machine.board.queue.next_ns))

    def _wait(self, until_ns: int, limit_s: float | None) -> bool:
        """Let others work on the machine up to `until_ns` of its clock; whether that was cut short:
        by `wake`, a signalled irqfd, or `limit_s`.
        """
        machine = self.machine
        wait_ns = NEVER_NS if until_ns == NEVER_NS else max(0, until_ns - machine.clock.now_ns)
        limit_ns = NEVER_NS if limit_s is None else int(limit_s * 1e9)
        least_ns = min(wait_ns, limit_ns)
        irqfds = machine.board.irqfds.filenos()
        self.until_ns = until_ns
        machine.sleepers.append(self)
        machine.recorder.flush()
        machine.wake_threads()
        try:
            with machine.lock.released():
                woken = self._waker.sleep(None if least_ns == NEVER_NS else least_ns, irqfds)
        finally:
            machine.sleepers.remove(self)
        machine.clock.refresh()
        return woken or limit_ns < wait_ns
