"""A virtual CPU: its requests, its kick, and one VM entry and exit (arch/x86/kvm/x86.c).

`enter` is vcpu_enter_guest: it serves the requests, injects what is due, lets the engine run and
handles the exit. Port accesses are handled while the engine is inside, as exits the kernel handles
itself; whoever wants the vCPU's attention makes a request and kicks it.

Not modelled: the local APIC. ExtINT reaches vCPU 0 as after reset (LVT0 unmasked, ExtINT mode).
"""

from enum import IntEnum, IntFlag
from typing import Protocol

from kvmtick.cpu.engine import Engine, ExitReason, Interruptibility
from kvmtick.irqchip.i8259 import Pic
from kvmtick.irqchip.iobus import IoBus
from kvmtick.timing.clock import Clock
from kvmtick.timing.queue import EventQueue
from kvmtick.trace.recorder import Recorder
from kvmtick.vcpu.events import (
    PendingEvents,
    complete_interrupts,
    inject_pending_event,
    interrupt_allowed,
    nmi_allowed,
)
from kvmtick.vcpu.vmcs import Vmcs

__all__ = ["EXIT_IO_INSTRUCTION", "MpState", "Request", "UserPorts", "Vcpu"]

EXIT_IO_INSTRUCTION = 30
"""The basic exit reason of a port access (SDM appendix C); engines report none."""

RAX_BYTES = {1: 0xFF, 2: 0xFFFF, 4: 0xFFFF_FFFF}


class MpState(IntEnum):
    """KVM_MP_STATE_*: what the vCPU is about."""

    RUNNABLE = 0
    HALTED = 3


class Request(IntFlag):
    """KVM_REQ_*: what must be looked at before the next entry."""

    NONE = 0
    EVENT = 1 << 0
    MIGRATE_TIMER = 1 << 1


# Plain integers: arithmetic on enum members costs more than a port access.
_REQ_EVENT = int(Request.EVENT)
_REQ_MIGRATE_TIMER = int(Request.MIGRATE_TIMER)
_RUNNABLE = int(MpState.RUNNABLE)
_HALTED = int(MpState.HALTED)
_EXIT_HLT = int(ExitReason.HLT)
_EXIT_INTERRUPT_WINDOW = int(ExitReason.INTERRUPT_WINDOW)
_EXIT_NMI_WINDOW = int(ExitReason.NMI_WINDOW)


class UserPorts(Protocol):
    """The ports no in-kernel device answers: an exit to user space."""

    def read(self, port: int, size_bytes: int) -> int:
        """The value the guest reads."""

    def write(self, port: int, size_bytes: int, value: int) -> None:
        """The guest wrote `value`."""


class VcpuBoard(Protocol):
    """What a vCPU is wired to."""

    clock: Clock
    queue: EventQueue
    recorder: Recorder
    bus: IoBus
    ports: UserPorts
    pic: Pic | None

    def migrate_pit_timer(self) -> None:
        """`__kvm_migrate_timers`, the PIT's part."""


class Vcpu:
    """One vCPU over one engine."""

    __slots__ = (
        "_board",
        "_bus",
        "_clock",
        "_entered_ns",
        "_nmis_queued",
        "_pic",
        "_pio_data",
        "_ports",
        "_queue",
        "_recorder",
        "engine",
        "in_guest",
        "instructions",
        "kicked",
        "mp_state",
        "pending",
        "requests",
        "task",
        "vcpu_id",
        "vmcs",
    )

    def __init__(self, board: VcpuBoard, vcpu_id: int, engine: Engine, task: int) -> None:
        """`task` is the vCPU thread's index in the recorder."""
        self._board = board
        self._clock = board.clock
        self._queue = board.queue
        self._recorder = board.recorder
        self._bus = board.bus
        self._ports = board.ports
        # An irqchip comes before the first vCPU or never; only vCPU 0 takes ExtINT.
        self._pic = board.pic if vcpu_id == 0 else None
        self.vcpu_id = vcpu_id
        self.engine = engine
        self.task = task
        self.vmcs = Vmcs()
        self.pending = PendingEvents()
        self.requests = 0
        self.mp_state = _RUNNABLE
        self.in_guest = False
        self.kicked = False
        self.instructions = 0
        self._entered_ns = 0
        self._nmis_queued = 0
        self._pio_data = 0
        engine.attach(self._pio_out, self._pio_in)

    # Requests and kicks.

    def request_event(self) -> None:
        """`kvm_make_request(KVM_REQ_EVENT)` and `kvm_vcpu_kick`."""
        self.requests |= _REQ_EVENT
        self.kicked = True
        if self.in_guest:
            self.engine.kick()

    def kick(self) -> None:
        """`kvm_vcpu_kick`: out of the guest, or awake from HLT."""
        self.kicked = True
        if self.in_guest:
            self.engine.kick()

    def request_migrate_timer(self) -> None:
        """`kvm_make_request(KVM_REQ_MIGRATE_TIMER)`: the thread moved to another host CPU."""
        self.requests |= _REQ_MIGRATE_TIMER
        self.kick()

    def queue_nmi(self) -> None:
        """`kvm_inject_nmi`. What the guest blocks is known when it is out of the guest."""
        self._nmis_queued += 1
        if not self.in_guest:
            self._process_nmi()
        self.request_event()

    def _process_nmi(self) -> None:
        blocked = bool(self.vmcs.guest_interruptibility & Interruptibility.NMI)
        while self._nmis_queued:
            self._nmis_queued -= 1
            self.pending.queue_nmi(blocked)

    def mp_state_name(self) -> str:
        """`halted` or `runnable`."""
        return "halted" if self.mp_state == _HALTED else "runnable"

    # External interrupts (irq.c).

    def accepts_extint(self) -> bool:
        """`kvm_apic_accept_pic_intr`: LVT0 is in ExtINT mode and unmasked, as after reset."""
        return self.vcpu_id == 0

    def has_interrupt(self) -> bool:
        """`kvm_cpu_has_extint`."""
        pic = self._pic
        return pic is not None and pic.output

    def get_interrupt(self) -> int:
        """`kvm_cpu_get_extint`: the INTA cycle."""
        assert self._pic is not None
        return self._pic.read_irq()

    def has_events(self) -> bool:
        """`kvm_vcpu_has_events`: would the vCPU, halted, have something to run for?"""
        pic = self._pic
        if pic is not None and pic.output and interrupt_allowed(self.vmcs):
            return True
        pending = self.pending
        return pending.nmi_pending > 0 and nmi_allowed(self.vmcs)

    # One entry and exit.

    def enter(self, budget: int) -> int:
        """`vcpu_enter_guest`: at most `budget` instructions; returns the `ExitReason`."""
        if self.requests and not self.vmcs.entry_intr_info:
            self.serve_requests()
        vmcs, engine, recorder = self.vmcs, self.engine, self._recorder
        recorder.task = self.task
        if recorder.detail:
            recorder.kvm_entry(self.vcpu_id, engine.registers()["rip"], vmcs.entry_intr_info)
        self.kicked = False
        clock = self._clock
        entered_ns = clock.now_ns
        self._entered_ns = entered_ns
        self.in_guest = True
        try:
            reason = engine.enter(
                vmcs.entry_intr_info,
                vmcs.intr_window_exiting,
                vmcs.nmi_window_exiting,
                budget,
                entered_ns,
            )
        finally:
            self.in_guest = False
            retired = engine.retired
            self.instructions += retired
            if clock.live:
                clock.refresh()
            else:
                clock.now_ns = entered_ns + retired
        vmcs.exit_reason = reason
        vmcs.guest_rflags = engine.rflags
        vmcs.guest_interruptibility = engine.interruptibility
        vmcs.entry_intr_info = 0
        vmcs.idt_vectoring_info = engine.idt_vectoring_info
        if self._nmis_queued:
            self._process_nmi()
        if recorder.detail:
            self._record_exit(reason, 0)
        if reason == _EXIT_HLT:
            self.mp_state = _HALTED
        else:
            self._handle_exit(reason)
        return reason

    def serve_requests(self) -> None:
        """The first part of vcpu_enter_guest. It may create an earlier deadline: an automatic EOI
        at the injection can queue the PIT's worker.
        """
        self._recorder.task = self.task
        requests, self.requests = self.requests, 0
        if requests & _REQ_MIGRATE_TIMER:
            self._board.migrate_pit_timer()
        if requests & _REQ_EVENT:
            inject_pending_event(self.vmcs, self.pending, self, self._recorder)

    def _handle_exit(self, reason: int) -> None:
        if complete_interrupts(self.vmcs, self.pending):
            self.requests |= _REQ_EVENT
        if reason == _EXIT_INTERRUPT_WINDOW:
            self.vmcs.intr_window_exiting = False
            self.requests |= _REQ_EVENT
        elif reason == _EXIT_NMI_WINDOW:
            self.vmcs.nmi_window_exiting = False
            self.requests |= _REQ_EVENT

    def _record_exit(self, reason: int, info1: int) -> None:
        self._recorder.kvm_exit(
            self.vcpu_id,
            reason,
            self.engine.registers()["rip"],
            info1,
            self.vmcs.idt_vectoring_info,
        )

    # Port accesses, while the engine is inside.

    def _set_clock(self, retired: int) -> None:
        clock = self._clock
        if clock.live:
            clock.refresh()
        else:
            clock.now_ns = self._entered_ns + retired

    def _pio_out(self, port: int, size_bytes: int, value: int, retired: int) -> None:
        self._set_clock(retired)
        recorder = self._recorder
        if recorder.detail:
            self._record_exit(EXIT_IO_INSTRUCTION, _io_qualification(port, size_bytes, 0))
        recorder.kvm_pio(1, port, size_bytes, 1, value)
        deadline_ns = self._queue.next_ns
        device = self._bus.find(port, size_bytes)
        if device is None:
            self._ports.write(port, size_bytes, value)
        else:
            device.io_write(port, size_bytes, value)
        # The slice was cut for the deadline there was; an earlier one needs a new slice.
        if self._queue.next_ns < deadline_ns:
            self.engine.kick()
        if recorder.detail:
            recorder.kvm_entry(self.vcpu_id, self.engine.registers()["rip"], 0)

    def _pio_in(self, port: int, size_bytes: int, retired: int) -> int:
        self._set_clock(retired)
        recorder = self._recorder
        if recorder.detail:
            self._record_exit(EXIT_IO_INSTRUCTION, _io_qualification(port, size_bytes, 1))
        deadline_ns = self._queue.next_ns
        device = self._bus.find(port, size_bytes)
        if device is None:
            value = self._ports.read(port, size_bytes)
        else:
            value = device.io_read(port, size_bytes, self._pio_data)
        value &= RAX_BYTES[size_bytes]
        self._pio_data = value
        recorder.kvm_pio(0, port, size_bytes, 1, value)
        if self._queue.next_ns < deadline_ns:
            self.engine.kick()
        if recorder.detail:
            recorder.kvm_entry(self.vcpu_id, self.engine.registers()["rip"], 0)
        return value


def _io_qualification(port: int, size_bytes: int, is_in: int) -> int:
    """The exit qualification of a port access (SDM table 28-5)."""
    return port << 16 | is_in << 3 | (size_bytes - 1)
