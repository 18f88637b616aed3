"""The machine: vCPUs, RAM, the board, and the loop that runs them in one thread.

The loop is: fire what is due, look after a halted or descheduled vCPU, enter the guest up to the
next deadline. In virtual time the clock moves by the instructions the guest retired and jumps over
the time it sleeps; in real time the guest leaves at the deadline by the clock, or is kicked by a
thread where its CPU cannot, and a halted one sleeps.

Several vCPUs share the machine's one host CPU: each runs for a quantum, round robin, and gives up
the rest of it when it halts, or with PAUSE while another one could run. So at any moment only one
of them runs, an event that one causes finds the others where they stopped, and a run repeats
exactly. Who sends a message to another vCPU often waits for what comes of it: the message cuts the
quantum short, and quanta grow back as long as none comes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from mmap import mmap
from typing import TYPE_CHECKING, Final

from kvmtick.cpu.engine import Engine, ExitReason
from kvmtick.guests import DEFAULT_NEEDS, Guest
from kvmtick.irqchip.i8254 import MIN_TIMER_PERIOD_NS
from kvmtick.machine.board import VMM_PID, Board
from kvmtick.machine.lock import MachineLock
from kvmtick.machine.memory import FIRST_ROM_SLOT, GuestMemory, check_ram_bytes
from kvmtick.machine.pc.console import Console
from kvmtick.machine.pc.host import PcHost
from kvmtick.machine.pc.pc import Pc
from kvmtick.machine.ports import PortHandler, PortMap, PortOwner
from kvmtick.timing.clock import Clock, MonotonicClock, VirtualClock
from kvmtick.timing.host import HostModel
from kvmtick.timing.queue import NEVER_NS
from kvmtick.timing.wall import (
    Kicker,
    Stopwatch,
    Waker,
    collections_held_back,
    realtime_ns,
    short_slices,
)
from kvmtick.trace.recorder import IDLE_TASK, Recorder, Ring
from kvmtick.vcpu.events import RFLAGS_IF
from kvmtick.vcpu.vcpu import MpState, Vcpu

if TYPE_CHECKING:
    from kvmtick.machine.vcpu_thread import VcpuThread

__all__ = ["QUANTUM_NS", "Exit", "Machine", "debug_exit", "power_off_exit", "reset_exit"]

SLICE_INSTRUCTIONS: Final = 1_000_000
"""The longest stay in the guest without a look at Ctrl-C and the wall-time limit: 10 ms, or a
second of nothing but port accesses."""
SLICE_REAL_NS: Final = 100_000_000
LEAST_SLICE_REAL_NS: Final = 20_000
BLOCK_PASSES: Final = 16
"""How many deadlines may pass over a halted vCPU before the loop looks up."""
UNLIMITED_INSTRUCTIONS: Final = 1 << 40
QUANTUM_NS: Final = 100_000
"""How long a vCPU runs while another one could, at most: two that compute get through 1,650 million
instructions a second (not exact) with 100 us, 750 with 10 us, 160 with 1 us."""
SHORT_QUANTUM_NS: Final = 1_000
"""The same, when something has come up for another vCPU. kvm-unit-tests' apic on two vCPUs, which
send each other over a million messages, takes 31 s of CPU time with 500 ns, 33 with 1 us, 45 with
5 us."""

VIRTUAL_DATE_NS: Final = 1_577_836_800 * 1_000_000_000
"""Midnight of 2020-01-01 UTC: when every machine of virtual time is switched on."""

_EXIT_HLT: Final = int(ExitReason.HLT)
_EXIT_PAUSE: Final = int(ExitReason.PAUSE)
_HALTED: Final = int(MpState.HALTED)
_RUNNABLE: Final = int(MpState.RUNNABLE)


@dataclass(frozen=True, slots=True)
class Exit:
    """Why a run ended: `reason` as in the JSON, the guest's exit code, a line on what happened."""

    reason: str
    code: int = 0
    detail: str = ""

    @property
    def is_failure(self) -> bool:
        """The guest failed (exit code 4), rather than finished or ran out of time."""
        return self.reason in ("limit", "deadlock", "triple-fault", "guest-error")


def debug_exit(value: int) -> Exit:
    """The guest wrote `value` to the debug exit port."""
    detail = f"the guest wrote {value:#x} to the debug exit port" if value else ""
    return Exit("guest-error" if value else "done", value, detail)


def reset_exit(by: str) -> Exit:
    """The guest resets the machine, which ends the run: nobody starts it again."""
    return Exit("reset", detail=f"the guest reset the machine by {by}")


def power_off_exit() -> Exit:
    """The guest switches the machine off."""
    return Exit("power-off", detail="the guest switched the machine off")


class Machine(PortOwner):
    """One PC."""

    def __init__(
        self,
        clock: str = "virtual",
        seed: int = 0,
        detail: bool = False,
        ram_bytes: int = DEFAULT_NEEDS.ram_bytes,
        quantum_ns: int = QUANTUM_NS,
        min_timer_period_ns: int = MIN_TIMER_PERIOD_NS,
        ring: Ring | None = None,
    ) -> None:
        """`clock` is `virtual` or `real`; `detail` records the events only traces need;
        `quantum_ns` is the longest turn of one of several vCPUs; no periodic timer of a chip is
        faster than `min_timer_period_ns`; `ring`: the recorder's, of several machines that run in
        turn.
        """
        if clock not in ("virtual", "real"):
            raise ValueError(f"clock {clock!r}: choose virtual or real")
        if quantum_ns <= 0:
            raise ValueError(f"quantum_ns={quantum_ns}: give more than 0")
        check_ram_bytes(ram_bytes)
        self.virtual = clock == "virtual"
        self.clock: Clock = VirtualClock() if self.virtual else MonotonicClock()
        self.started_ns = NEVER_NS
        self.recorder = Recorder(self.clock, detail, ring)
        self.recorder.task = self.recorder.add_task(f"kvmtick-{VMM_PID}")
        self.host = HostModel(seed)
        self.ports = PortMap(self)
        self.board = Board(self.clock, self.host, self.recorder, self.ports, min_timer_period_ns)
        self.strict = False
        """An access to an unknown MSR ends the run, and the vCPU stands before it."""
        self._pc: Pc | None = None
        self._refused: tuple[Vcpu, dict[str, int]] | None = None
        self.ram: mmap | bytes = mmap(-1, ram_bytes) if ram_bytes else b""
        """The RAM the machine was made with; `memory` has all of it."""
        self.memory = GuestMemory()
        if isinstance(self.ram, mmap):
            self.memory.add_ram(0, self.ram)
        self.lock = MachineLock(self._call_out)
        self.closed = False
        self.runs_all = False
        """`run` is under way."""
        self._waker = Waker()
        """Of the thread in `run`."""
        self.threads: list[VcpuThread] = []
        """Those in KVM_RUN, `sleepers` among them."""
        self.sleepers: list[VcpuThread] = []
        self.loaded: list[Guest] = []
        self.loaded_ns = 0
        self._exit: Exit | None = None
        self._current = 0
        self.quantum_ns = quantum_ns
        self._shortest_quantum_ns = min(quantum_ns, SHORT_QUANTUM_NS)
        self._quantum_ns = quantum_ns
        self._quantum_end_ns = NEVER_NS
        self._slice_over = False
        self._kicker: Kicker | None = None
        self._entering: Vcpu | None = None
        """In real time, the vCPU that the kicker is armed for."""

    # Putting it together.

    def port_devices(self) -> dict[int, PortHandler]:
        return self.pc.ports()

    @property
    def pc(self) -> Pc:
        """The PC's devices, made when they are first asked for."""
        if self._pc is None:
            self._pc = Pc(
                PcHost(
                    self.clock,
                    self.board.queue,
                    self.board.set_irq_line,
                    self._date_ns,
                    self.ports.print_serial,
                    self._reset,
                    self._power_off,
                    len(self.ram),
                    lambda: len(self.board.vcpus),
                )
            )
        return self._pc

    @property
    def console(self) -> Console | None:
        """What the serial line's input comes from. With a live one, virtual time in which no vCPU
        runs passes at the host's pace: nobody shall find a prompt that has waited for hours.
        """
        return None if self._pc is None else self._pc.console

    @console.setter
    def console(self, console: Console | None) -> None:
        self.pc.console = console

    def _date_ns(self) -> int:
        if self.virtual:
            return VIRTUAL_DATE_NS + self.clock.now_ns
        return realtime_ns()

    @property
    def vcpu(self) -> Vcpu | None:
        """The first vCPU that was created; None before that."""
        vcpus = self.board.vcpus
        return vcpus[0] if vcpus else None

    @property
    def current_vcpu(self) -> Vcpu:
        """The vCPU whose turn it is, or was last; IndexError if there is none."""
        return self.board.vcpus[self._current]

    def create_vcpu(self, engine: Engine, vcpu_id: int = 0) -> Vcpu:
        """Wire up a vCPU over `engine`; the caller checks that the id is free.

        ValueError: a real CPU in a machine of virtual time.
        """
        if engine.real_time and self.virtual:
            raise ValueError(
                f"the {engine.name} CPU counts no instructions: it needs clock='real', not virtual"
            )
        task = self.recorder.add_task(f"CPU {vcpu_id}/KVM-{self.board.new_tid()}")
        self.memory.add_engine(engine)
        vcpu = Vcpu(self.board, vcpu_id, engine, task, vcpu_id == self.board.bsp_vcpu_id)
        self.board.vcpus.append(vcpu)
        if not self.virtual:
            engine.release_gil(True)
            if self._kicker is None and not engine.has_deadline:
                self._kicker = Kicker(self._kick_entering)
        if self.loaded:
            self._place(vcpu)
        return vcpu

    def load(self, guest: Guest) -> None:
        """Copy a guest into RAM and let the vCPU that boots start on it."""
        for number, (gpa, data) in enumerate(guest.roms, FIRST_ROM_SLOT):
            self.memory.place_rom(number, gpa, data)
        for gpa, data in ((guest.load_at, guest.image), *guest.pieces):
            self.write_memory(gpa, data)
        if guest.disk:
            self.pc.ata.insert(guest.disk)
        self.adopt(guest)
        for vcpu in self.board.vcpus:
            self._place(vcpu)

    def adopt(self, guest: Guest) -> None:
        """The guest is in RAM already, and its vCPUs are where they are."""
        self.loaded.append(guest)
        self.loaded_ns = self.clock.now_ns
        self._exit = None

    def _place(self, vcpu: Vcpu) -> None:
        if vcpu.is_bsp:
            guest = self.loaded[-1]
            vcpu.start_at(*guest.entry, guest.start)

    def write_memory(self, gpa: int, data: bytes) -> None:
        """Write guest RAM; ValueError if it does not fit."""
        if not self.memory.write(gpa, data):
            raise self.memory.outside(gpa, len(data))

    def read_memory(self, gpa: int, size_bytes: int) -> bytes:
        """Read guest RAM; ValueError if the range is not all RAM."""
        data = self.read_ram(gpa, size_bytes)
        if data is None:
            raise self.memory.outside(gpa, size_bytes)
        return data

    def read_ram(self, gpa: int, size_bytes: int) -> bytes | None:
        """As `read_memory`, but None if the range is not all RAM: for page walks."""
        return self.memory.read(gpa, size_bytes)

    def close(self) -> None:
        """Give everything back; harmless when repeated. Where vCPUs run, they are called out of the
        guest, and the last of them does it. The caller has the lock.
        """
        self.closed = True
        if self.runs_all or self.threads:
            self.stop(Exit("interrupted", detail="the machine was closed"))
            self.wake_sleepers()
            return
        if self._kicker is not None:
            self._kicker.close()
            self._kicker = None
        self._waker.close()
        self.board.close()
        for vcpu in self.board.vcpus:
            vcpu.engine.close()

    # Running.

    @property
    def elapsed_ns(self) -> int:
        """The machine's time since it was first run."""
        return max(0, self.clock.now_ns - self.started_ns)

    @property
    def instructions(self) -> int | None:
        """What all vCPUs have retired; None if their CPU does not count."""
        if any(vcpu.engine.real_time for vcpu in self.board.vcpus):
            return None
        return sum(vcpu.instructions for vcpu in self.board.vcpus)

    def take_vcpu_off(self, duration_ns: int, vcpu: Vcpu | None = None) -> None:
        """The host keeps a vCPU (the first) from running for that long, from now on."""
        vcpu = vcpu or self.vcpu
        if vcpu is None:
            raise ValueError("the machine has no vCPU: create one first")
        vcpu.off_until_ns = max(vcpu.off_until_ns, self.clock.now_ns + duration_ns)
        self.board.queue.add(vcpu.off_until_ns, _nothing)

    def run(
        self,
        for_ns: int | None = None,
        limit_s: float | None = None,
        until: Callable[[], bool] | None = None,
    ) -> Exit:
        """Run until the guest ends, `for_ns` of the machine's time are over (reason `time`),
        `limit_s` wall seconds are over (`limit`), or `until`, asked whenever the vCPU is out of
        the guest, says so (`until`).

        May be called again to go on, unless the guest itself ended; then after another `load`.
        """
        if not self.board.vcpus:
            raise ValueError("the machine has no vCPU: create one before running")
        if for_ns is not None and for_ns < 0:
            raise ValueError(f"for_ns={for_ns} is negative: give 0 or more")
        with self.lock:
            if self.threads:
                raise RuntimeError("a vCPU of this machine is running already")
            self._waker.open()
            self.runs_all = True
            try:
                # from here on whoever asks calls this thread out; those before it come first
                self.lock.pass_on()
                return self._run(for_ns, limit_s, until)
            finally:
                self.runs_all = False
                if self.closed:
                    self.close()

    def run_alone(self, for_ns: int) -> Exit:
        """As `run`, in virtual time and for the only thread that knows the machine: nobody calls it
        out.
        """
        return self._run(for_ns, None, None)

    def _run(
        self, for_ns: int | None, limit_s: float | None, until: Callable[[], bool] | None
    ) -> Exit:
        stopwatch = Stopwatch()
        self.begin()
        console = self.console
        if console is not None:
            console.begin()
        if len(self.board.vcpus) > 1 and self._quantum_end_ns == NEVER_NS:
            self._quantum_end_ns = self.clock.now_ns + self._quantum_ns
        end_ns = NEVER_NS if for_ns is None else self.clock.now_ns + for_ns
        try:
            if self.virtual:
                return self._loop(end_ns, limit_s, until, stopwatch)
            with short_slices(), collections_held_back():
                return self._loop(end_ns, limit_s, until, stopwatch)
        except KeyboardInterrupt:
            return Exit("interrupted")
        finally:
            if self._kicker is not None:
                self._kicker.disarm()
            self._stand_before_refused()
            self.recorder.flush()

    def stop(self, exit_: Exit) -> None:
        """End the run, from within it: a debugger's last word."""
        self._exit = exit_
        self._kick_all()

    def begin(self) -> None:
        """A thread wants vCPUs to run. At the first time the machine's time starts: what was set
        up before took none of it.
        """
        self.clock.refresh()
        if self.started_ns == NEVER_NS:
            self.started_ns = self.clock.now_ns
            for vcpu in self.board.vcpus:
                vcpu.power_on(self.started_ns)
        if self.memory.shared:
            for vcpu in self.board.vcpus:
                vcpu.engine.forget_changed_code()

    def _loop(
        self,
        end_ns: int,
        limit_s: float | None,
        until: Callable[[], bool] | None,
        stopwatch: Stopwatch,
    ) -> Exit:
        clock, queue, irqfds = self.clock, self.board.queue, self.board.irqfds
        vcpu = self.board.vcpus[0]
        alone = len(self.board.vcpus) == 1
        block_passes = BLOCK_PASSES if until is None else 1
        passes = 0
        while self._exit is None:
            if clock.live:
                clock.refresh()
            if queue.next_ns <= clock.now_ns:
                queue.run_due(clock)
            if irqfds.assigned:
                irqfds.poll()
            if clock.now_ns >= end_ns:
                return Exit("time")
            passes += 1
            if (self._slice_over or passes & 15 == 0) and (
                end := self._look_up(limit_s, stopwatch)
            ):
                return end
            if not alone:
                if self._take_turns(end_ns):
                    return Exit("deadlock", detail=self._deadlock_detail())
            else:
                if vcpu.kicked:
                    self.meet_busy_host(vcpu)
                if clock.now_ns < vcpu.off_until_ns:
                    self._sleep(end_ns)
                elif vcpu.mp_state == _RUNNABLE or self.wake(vcpu):
                    self._enter(vcpu, end_ns)
                elif self._is_deadlocked(end_ns):
                    return Exit("deadlock", detail=self._deadlock_detail())
                elif self._block(vcpu, end_ns, block_passes):
                    self._enter(vcpu, end_ns)
            if until is not None and not self._is_over() and until():
                return Exit("until")
        return self._exit

    def _look_up(self, limit_s: float | None, stopwatch: Stopwatch) -> Exit | None:
        """Now and then: hand the records on, let others have the machine; whether they ended the
        run, or the wall-time limit is over.
        """
        self._slice_over = False
        if self.recorder.full:
            self.recorder.flush()
        console = self.console
        if console is not None:
            console.poll()
        self.lock.pass_on()
        if self._exit is None and limit_s is not None and stopwatch.elapsed_s() > limit_s:
            return Exit("limit", detail=f"still running after {limit_s:g} s of wall time")
        return self._exit

    # Threads that each run a vCPU.

    @property
    def awake_threads(self) -> int:
        """How many are in KVM_RUN and do not sleep."""
        return len(self.threads) - len(self.sleepers)

    def serve_due(self) -> None:
        """Timers, workers and irqfds whose time has come."""
        self.clock.refresh()
        if self.board.queue.next_ns <= self.clock.now_ns:
            self.board.queue.run_due(self.clock)
        if self.board.irqfds.assigned:
            self.board.irqfds.poll()
        if self.recorder.full:
            self.recorder.flush()

    def wake_threads(self) -> None:
        """Of those that sleep, the ones with something to do: run the vCPU, wait for an earlier
        deadline, or let virtual time pass now that nobody else does.
        """
        next_ns = self.board.queue.next_ns
        nobody = self.virtual and not self.awake_threads
        for thread in self.sleepers:
            is_earlier = next_ns < thread.until_ns
            if self.virtual and thread.until_ns == NEVER_NS:
                is_earlier = nobody and not self.is_asleep_for_good(thread.vcpu)
            if thread.vcpu.kicked or is_earlier:
                thread.wake()

    def wake_sleepers(self) -> None:
        """All look up: what they wait for has changed."""
        for thread in self.sleepers:
            thread.wake()

    def is_asleep_for_good(self, vcpu: Vcpu) -> bool:
        """As time passes nothing wakes it: only a call or another vCPU can."""
        return self.board.queue.next_ns == NEVER_NS or (
            _is_deaf(vcpu) and not self.board.nmi_may_come()
        )

    def could_run_elsewhere(self, vcpu: Vcpu) -> bool:
        """User space has another vCPU that is not halted."""
        running = [thread.vcpu for thread in self.threads]
        return any(
            other is not vcpu and other.mp_state == _RUNNABLE and other not in running
            for other in self.board.vcpus
        )

    # Several vCPUs on one host CPU.

    def _take_turns(self, end_ns: int) -> bool:
        """Let the vCPU whose turn it is run, or let time pass if none can; true: a deadlock."""
        vcpu = self._schedule()
        if vcpu is not None:
            if vcpu.mp_state == _RUNNABLE or self.wake(vcpu):
                self._enter_one_of_several(vcpu, end_ns)
        elif self._is_deadlocked(end_ns):
            return True
        else:
            self._sleep(end_ns)
        return False

    def _schedule(self) -> Vcpu | None:
        """Round robin: the current vCPU until its quantum is over or it halts, then the next."""
        vcpus, now_ns = self.board.vcpus, self.clock.now_ns
        current = vcpus[self._current]
        for vcpu in vcpus:
            if vcpu.kicked:
                self.meet_busy_host(vcpu)
                if vcpu is not current:
                    self._cut_quantum(now_ns)
        if self._is_ready(current):
            if now_ns < self._quantum_end_ns:
                return current
            self._quantum_ns = min(2 * self._quantum_ns, self.quantum_ns)
        for step in range(1, len(vcpus) + 1):
            index = (self._current + step) % len(vcpus)
            if self._is_ready(vcpus[index]):
                self._current = index
                self._quantum_end_ns = now_ns + self._quantum_ns
                return vcpus[index]
        return None

    def _cut_quantum(self, now_ns: int) -> None:
        """There is something to do for a vCPU whose turn it is not."""
        end_ns = now_ns
        if self.virtual:
            # In real time a kick costs more than so short a turn.
            self._quantum_ns = self._shortest_quantum_ns
            end_ns += self._quantum_ns
        self._quantum_end_ns = min(self._quantum_end_ns, end_ns)

    def _enter_one_of_several(self, vcpu: Vcpu, end_ns: int) -> None:
        """A kick of another vCPU ends its stay in the guest. While another could run, so do the end
        of its quantum and PAUSE (`kvm_vcpu_on_spin`).
        """
        others = any(other is not vcpu and self._is_ready(other) for other in self.board.vcpus)
        vcpu.exit_on_pause(others)
        self.board.running = vcpu
        try:
            self._enter(vcpu, min(end_ns, self._quantum_end_ns) if others else end_ns)
        finally:
            self.board.running = None

    def _is_ready(self, vcpu: Vcpu) -> bool:
        if self.clock.now_ns < vcpu.off_until_ns:
            return False
        return vcpu.mp_state == _RUNNABLE or vcpu.has_events()

    # One vCPU.

    def _enter(self, vcpu: Vcpu, end_ns: int) -> None:
        if vcpu.requests:
            vcpu.serve_requests()
            if vcpu.mp_state != _RUNNABLE:
                return
        reason = self.run_slice(vcpu, end_ns)
        if reason == _EXIT_HLT:
            return
        if reason in (ExitReason.PREEMPTION_TIMER, ExitReason.EXTERNAL_INTERRUPT):
            self._slice_over = True
        elif reason == _EXIT_PAUSE:
            self._quantum_end_ns = self.clock.now_ns
        elif reason == ExitReason.TRIPLE_FAULT:
            self._end(Exit("triple-fault", detail="the CPU shut down on a triple fault"))
        elif reason == ExitReason.INTERNAL_ERROR:
            self._end(Exit("guest-error", detail=vcpu.engine.error))

    def run_slice(self, vcpu: Vcpu, end_ns: int) -> int:
        """Enter the guest, up to the next deadline or `end_ns`; returns the `ExitReason`."""
        now_ns = self.clock.now_ns
        next_ns = self.board.queue.next_ns
        deadline_ns = next_ns if next_ns < end_ns else end_ns
        if deadline_ns <= now_ns:
            if self.virtual:
                # Serving the requests made something due: deliver the event, then look after it.
                vcpu.engine.kick()
                deadline_ns = now_ns + 1
            else:
                # A host that is always behind its timers has to let the guest do something all the
                # same.
                deadline_ns = now_ns + LEAST_SLICE_REAL_NS
        if self.virtual:
            budget = deadline_ns - now_ns
            return vcpu.enter(budget if budget < SLICE_INSTRUCTIONS else SLICE_INSTRUCTIONS)
        return self._enter_until(vcpu, min(deadline_ns, now_ns + SLICE_REAL_NS))

    def _enter_until(self, vcpu: Vcpu, end_ns: int) -> int:
        """In real time."""
        if self._kicker is None:
            vcpu.engine.deadline_ns = end_ns
            return vcpu.enter(UNLIMITED_INSTRUCTIONS)
        self._entering = vcpu
        self._kicker.arm(end_ns)
        try:
            return vcpu.enter(UNLIMITED_INSTRUCTIONS)
        finally:
            self._entering = None
            self._kicker.disarm()

    def meet_busy_host(self, vcpu: Vcpu) -> None:
        """A kicked or woken vCPU thread may find its CPU busy (`vcpu_off`)."""
        vcpu.kicked = False
        if not self.host.on_time and self.clock.now_ns >= vcpu.off_until_ns:
            delay_ns = self.host.delay_ns("vcpu_off")
            if delay_ns:
                self.take_vcpu_off(delay_ns, vcpu)

    def wake(self, vcpu: Vcpu) -> bool:
        """`kvm_vcpu_check_block`: awake if there is something to run for."""
        if not vcpu.has_events():
            return False
        lapic = vcpu.lapic
        if lapic is not None and lapic.pending_events:
            vcpu.accept_events()
            if vcpu.awaits_sipi:
                return False
        vcpu.make_runnable()
        self.recorder.task = vcpu.task
        if self.recorder.detail:
            slept_ns = self.clock.now_ns - vcpu.slept_from_ns
            self.recorder.kvm_vcpu_wakeup(slept_ns, slept_ns > 0, True)
        return True

    def _is_deadlocked(self, end_ns: int) -> bool:
        """No vCPU runs, and nothing can ever wake one: they take no interrupt and there is no NMI
        source, or no timer is running and nobody set an end."""
        if self.board.irqfds.assigned:
            return False
        if self.board.queue.next_ns == NEVER_NS == end_ns and not self._filenos():
            return True
        for vcpu in self.board.vcpus:
            # Most often it is a HLT with interrupts on: `_is_deaf`, without the call.
            if vcpu.vmcs.guest_rflags & RFLAGS_IF and vcpu.mp_state == _HALTED:
                return False
            if not _is_deaf(vcpu):
                return False
        return not self.board.nmi_may_come()

    def _deadlock_detail(self) -> str:
        if all(vcpu.awaits_sipi for vcpu in self.board.vcpus):
            boots = self.board.bsp_vcpu_id
            return f"every vCPU waits for INIT and SIPI: the one that boots has id {boots}"
        if not all(map(_is_deaf, self.board.vcpus)):
            return "halted with interrupts on, but no timer runs: nothing can wake it"
        return "halted with interrupts off (cli; hlt) and no NMI source: nothing can wake it"

    def _block(self, vcpu: Vcpu, end_ns: int, passes: int) -> bool:
        """`kvm_vcpu_block`: sleep from deadline to deadline until somebody kicks the vCPU, at most
        over `passes` deadlines; true if it woke and may enter the guest now.
        """
        clock, queue = self.clock, self.board.queue
        for _ in range(passes):
            self._sleep(end_ns)
            if clock.now_ns >= end_ns or self._slice_over:
                return False
            queue.run_due(clock)
            if vcpu.kicked:
                return self.host.on_time and self.wake(vcpu)
        return False

    def _sleep(self, end_ns: int) -> None:
        """Let time pass up to the next deadline, or in real time a part of it."""
        next_ns = self.board.queue.next_ns
        until_ns = next_ns if next_ns < end_ns else end_ns
        self.recorder.task = IDLE_TASK
        console = self.console
        if self.virtual and console is not None and console.live:
            self._sleep_at_hosts_pace(console, until_ns)
            return
        if self.virtual and until_ns < NEVER_NS:
            self.clock.now_ns = until_ns
            return
        # In real time, or in virtual time when only an irqfd can end the wait. Whoever reads the
        # records does so now: a whole batch takes milliseconds, which the guest would be late by.
        self.recorder.flush()
        self.clock.refresh()
        most_ns = self.clock.now_ns + SLICE_REAL_NS
        if self.virtual:
            self._waker.sleep(SLICE_REAL_NS, self._filenos())
        elif until_ns > self.clock.now_ns:
            self._waker.sleep_until(min(until_ns, most_ns), self._filenos())
        self.clock.refresh()
        self._slice_over = True

    def _sleep_at_hosts_pace(self, console: Console, until_ns: int) -> None:
        """Virtual time passes as fast as the host's. What a sleep was too long by is made up for,
        and not what the guest computed for: a second's sleep is a second then, too.
        """
        console.catch_up(SLICE_REAL_NS)
        ahead_ns = until_ns - console.host_ns()
        if ahead_ns > 0:
            self.recorder.flush()
            self._waker.sleep(min(ahead_ns, SLICE_REAL_NS), self._filenos())
            until_ns = min(until_ns, console.host_ns())
            self._slice_over = True
        self.clock.now_ns = max(self.clock.now_ns, until_ns)

    def _filenos(self) -> list[int]:
        """The descriptors that end a sleep."""
        filenos = self.board.irqfds.filenos()
        console = self.console
        return filenos if console is None else filenos + console.filenos()

    def _call_out(self, holder: int) -> None:
        """Another thread wants the machine; `holder` may be in the guest or asleep, or about to."""
        if self.runs_all:
            self._kick_all()
            self._waker.wake()
        for thread in self.threads:
            if thread.ident == holder:
                thread.vcpu.engine.kick()

    def _kick_all(self) -> None:
        for vcpu in self.board.vcpus:
            vcpu.engine.kick()

    def _kick_entering(self) -> None:
        vcpu = self._entering
        if vcpu is not None:
            vcpu.engine.kick()

    def _kick_running(self) -> None:
        for vcpu in self.board.vcpus:
            if vcpu.in_guest:
                vcpu.engine.kick()

    def _is_over(self) -> bool:
        # mypyc takes `_exit` for None all through a loop `while self._exit is None`.
        return self._exit is not None

    def _end(self, exit_: Exit) -> None:
        """The run is over; what the guest still does on its way out changes nothing any more."""
        if self._exit is None:
            self._exit = exit_
        self._kick_running()

    def guest_exit(self, value: int) -> None:
        self._end(debug_exit(value))

    def _reset(self, by: str) -> None:
        self._end(reset_exit(by))

    def _power_off(self) -> None:
        self._end(power_off_exit())

    def guest_sleep(self, microseconds: int) -> None:
        """The guest asked user space to keep its vCPU out of the guest for a while."""
        for vcpu in self.board.vcpus:
            if vcpu.in_guest:
                self.take_vcpu_off(microseconds * 1000, vcpu)
        self._kick_running()

    def unknown_msr(self, vcpu_id: int, access: str, index: int, rip: int) -> None:
        """The guest gets #GP; if that shall not pass unseen, the run ends."""
        if self.strict and self._exit is None:
            vcpu = next(vcpu for vcpu in self.board.vcpus if vcpu.vcpu_id == vcpu_id)
            self._refused = vcpu, vcpu.engine.registers()
            what = f"vCPU {vcpu_id} at {rip:#x}: {access} of the unknown MSR {index:#x}"
            self._end(Exit("guest-error", detail=f"{what}; without strict it gets #GP"))

    def _stand_before_refused(self) -> None:
        """Of the #GP that was the way out of the guest nothing is left in the registers."""
        if self._refused is not None:
            vcpu, registers = self._refused
            self._refused = None
            vcpu.engine.set_registers(registers)

    # For people.

    def snapshot(self) -> dict[str, str]:
        """The state a tick passes through, by name: what a story compares from event to event."""
        state: dict[str, str] = {}
        pit, pic, ioapic = self.board.pit, self.board.pic, self.board.ioapic
        if pit is not None:
            state["pending"] = str(pit.pending)
            state["irq_ack"] = str(int(pit.irq_ack))
            state["work queued"] = "yes" if pit.work.queued else "no"
            state["timer"] = f"expires at {pit.timer.expires_ns}" if pit.timer.enqueued else "idle"
        if pic is not None:
            state["PIC IRR"] = f"{pic.master.irr:08b}"
            state["PIC ISR"] = f"{pic.master.isr:08b}"
            state["PIC IMR"] = f"{pic.master.imr:08b}"
            state["INTR"] = str(int(pic.output))
        if ioapic is not None:
            state["IOAPIC IRR"] = f"{ioapic.irr:#08x}"
        for vcpu in self.board.vcpus:
            prefix = f"vCPU {vcpu.vcpu_id} " if len(self.board.vcpus) > 1 else ""
            state.update(_vcpu_snapshot(vcpu, prefix))
        return state

    def crash_report(self) -> str:
        """Registers, code, stack and the last events, for a guest that failed."""
        from kvmtick.machine.crash import crash_report

        return crash_report(self).text()


def _nothing() -> None:
    """A deadline that only ends a slice."""


def _is_deaf(vcpu: Vcpu) -> bool:
    """It does not run, and no interrupt changes that."""
    if vcpu.mp_state == _HALTED:
        return not vcpu.vmcs.guest_rflags & RFLAGS_IF
    return vcpu.mp_state != _RUNNABLE


def _vcpu_snapshot(vcpu: Vcpu, prefix: str) -> dict[str, str]:
    state = {
        f"{prefix}state" if prefix else "vCPU": vcpu.mp_state_name(),
        f"{prefix}KVM_REQ_EVENT": str(vcpu.requests & 1),
        f"{prefix}VM-entry intr info": f"{vcpu.vmcs.entry_intr_info:#010x}",
        f"{prefix}interrupt window": "asked for" if vcpu.vmcs.intr_window_exiting else "no",
        f"{prefix}NMI pending": str(vcpu.pending.nmi_pending),
    }
    if vcpu.lapic is not None:
        state[f"{prefix}LAPIC IRR"] = _vectors(vcpu.lapic.irr)
        state[f"{prefix}LAPIC ISR"] = _vectors(vcpu.lapic.isr)
        state[f"{prefix}LAPIC timer pending"] = str(vcpu.lapic.pending_timer)
    return state


def _vectors(bits: int) -> str:
    """The vectors whose bits are set, or `none`."""
    return " ".join(f"{vector:#x}" for vector in range(256) if bits >> vector & 1) or "none"
