"""A virtual CPU: its requests, its kick, and one VM entry and exit (arch/x86/kvm/x86.c).

`enter` is vcpu_enter_guest: it serves the requests, injects what is due, lets the engine run and
handles the exit. The guest's accesses are handled while the engine is inside
(`kvmtick.vcpu.exits`); whoever wants the vCPU's attention makes a request and kicks it.

Not modelled: SMM, nested guests, APICv (the local APIC is always emulated in software).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import IntEnum, IntFlag
from typing import Final, Protocol

from mypy_extensions import mypyc_attr

from kvmtick.cpu.engine import (
    EXIT_EVENT_CUT,
    EXIT_INTERRUPTIBILITY,
    EXIT_INTERRUPTIBILITY_SHIFT,
    EXIT_RETIRED_SHIFT,
    EXIT_RFLAGS,
    INTR_INFO_DELIVER_CODE,
    Engine,
    ExitReason,
    Interruptibility,
)
from kvmtick.irqchip.apicdef import KVM_APIC_INIT, KVM_APIC_SIPI, MSR_IA32_APICBASE_BSP, U64
from kvmtick.irqchip.i8259 import Pic
from kvmtick.irqchip.iobus import IoBus
from kvmtick.irqchip.lapic import Lapic, LapicBoard
from kvmtick.timing.queue import EventQueue
from kvmtick.vcpu.cpuid import Cpuid
from kvmtick.vcpu.events import (
    InterruptSource,
    PendingEvents,
    complete_interrupts,
    inject_pending_event,
    interrupt_allowed,
    nmi_allowed,
)
from kvmtick.vcpu.exits import ExitHandlers, UserSpace
from kvmtick.vcpu.msr import Msrs
from kvmtick.vcpu.vmcs import Vmcs

__all__ = ["MpState", "Request", "Vcpu", "VcpuBoard"]

NO_VECTOR: Final = -1
NS_PER_MS: Final = 1_000_000
RESET_CS_IP: Final = (0xF000, 0xFFF0)
"""Where a processor starts after RESET and INIT (SDM table 11-1), but for CS's base: it is the
real-mode 0xF0000 and not 0xFFFF0000, for most guests have nothing at the top of 4 GiB. With
firmware (`kvmtick.machine.firmware`) its copy below 1 MiB starts, not the ROM."""
SIPI_PAGE_SHIFT: Final = 8
"""A SIPI vector is the number of the 4 KiB page to start at: CS is vector << 8."""


class MpState(IntEnum):
    """KVM_MP_STATE_*: what the vCPU is about."""

    RUNNABLE = 0
    UNINITIALIZED = 1
    INIT_RECEIVED = 2
    HALTED = 3
    SIPI_RECEIVED = 4
    AP_RESET_HOLD = 9


class Request(IntFlag):
    """KVM_REQ_*: what must be looked at before the next entry."""

    NONE = 0
    EVENT = 1 << 0
    MIGRATE_TIMER = 1 << 1
    UNBLOCK = 1 << 2
    SCAN_IOAPIC = 1 << 3
    IOAPIC_EOI_EXIT = 1 << 4
    NMI = 1 << 5


# Plain integers: arithmetic on enum members costs more than a port access.
_REQ_EVENT: Final = int(Request.EVENT)
_REQ_MIGRATE_TIMER: Final = int(Request.MIGRATE_TIMER)
_REQ_UNBLOCK: Final = int(Request.UNBLOCK)
_REQ_SCAN_IOAPIC: Final = int(Request.SCAN_IOAPIC)
_REQ_IOAPIC_EOI_EXIT: Final = int(Request.IOAPIC_EOI_EXIT)
_REQ_NMI: Final = int(Request.NMI)
_RUNNABLE: Final = int(MpState.RUNNABLE)
_HALTED: Final = int(MpState.HALTED)
_INIT_RECEIVED: Final = int(MpState.INIT_RECEIVED)
_UNINITIALIZED: Final = int(MpState.UNINITIALIZED)
_SIPI_RECEIVED: Final = int(MpState.SIPI_RECEIVED)
_AWAIT_SIPI: Final = (_UNINITIALIZED, _INIT_RECEIVED)
_EXIT_BREAKPOINT: Final = int(ExitReason.BREAKPOINT)
_EXIT_EXTERNAL_INTERRUPT: Final = int(ExitReason.EXTERNAL_INTERRUPT)
_EXIT_HLT: Final = int(ExitReason.HLT)
_EXIT_INTERRUPT_WINDOW: Final = int(ExitReason.INTERRUPT_WINDOW)
_EXIT_NMI_WINDOW: Final = int(ExitReason.NMI_WINDOW)
_EXIT_PREEMPTION_TIMER: Final = int(ExitReason.PREEMPTION_TIMER)
_FATAL_EXITS: Final = (int(ExitReason.TRIPLE_FAULT), int(ExitReason.INTERNAL_ERROR))


class VcpuBoard(LapicBoard, Protocol):
    """What a vCPU is wired to."""

    queue: EventQueue
    bus: IoBus
    ports: UserSpace
    pic: Pic | None
    running: Vcpu | None

    @property
    def irqchip_in_kernel(self) -> bool:
        """Whether vCPUs get a local APIC."""

    def migrate_pit_timer(self) -> None:
        """`__kvm_migrate_timers`, the PIT's part."""

    def handled_vectors(self, lapic: Lapic) -> int:
        """`vcpu_scan_ioapic`: the vectors whose EOI an IOAPIC wants from `lapic`."""

    def mmio_read(self, gpa: int, size_bytes: int) -> int | None:
        """`kvm_io_bus_read(KVM_MMIO_BUS)`; None: no device there."""

    def mmio_write(self, gpa: int, size_bytes: int, value: int) -> bool:
        """`kvm_io_bus_write(KVM_MMIO_BUS)`; False: no device there."""

    def signal_ioeventfd(self, is_pio: bool, address: int, size_bytes: int, value: int) -> bool:
        """Whether an ioeventfd took the write."""


@mypyc_attr(allow_interpreted_subclasses=True)
class Vcpu(InterruptSource):
    """One vCPU over one engine."""

    __slots__ = (
        "_board",
        "_clock",
        "_eoi_exit_vector",
        "_exits_on_pause",
        "_pic",
        "_recorder",
        "_step_over",
        "_tsc_at_ns",
        "_tsc_value",
        "cpuid",
        "engine",
        "exits",
        "has_run",
        "in_guest",
        "instructions",
        "is_bsp",
        "kicked",
        "lapic",
        "mp_state",
        "msrs",
        "off_until_ns",
        "on_debug",
        "pending",
        "pending_external_vector",
        "requests",
        "single_step",
        "slept_from_ns",
        "task",
        "vmcs",
        "wants_window",
    )

    def __init__(
        self, board: VcpuBoard, vcpu_id: int, engine: Engine, task: int, is_bsp: bool = True
    ) -> None:
        """`task` is the vCPU thread's index in the recorder; `is_bsp`: it boots the machine, the
        others wait for INIT and SIPI.
        """
        super().__init__(vcpu_id, engine.tsc_khz)
        self._board = board
        self._clock = board.clock
        self._recorder = board.recorder
        # An irqchip comes before the first vCPU or never.
        self._pic = board.pic
        self.is_bsp = is_bsp
        self.engine = engine
        self.task = task
        self.vmcs = Vmcs()
        self.pending = PendingEvents()
        self.pending_external_vector = NO_VECTOR
        self.requests = 0
        self.mp_state = _RUNNABLE if is_bsp or not board.irqchip_in_kernel else _UNINITIALIZED
        self.in_guest = False
        self.has_run = False
        self.kicked = False
        self.instructions = 0
        self.off_until_ns = 0
        self.slept_from_ns = 0
        # KVM_EXIT_DEBUG: a breakpoint, or after KVM_GUESTDBG_SINGLESTEP an instruction or an event.
        self.on_debug: Callable[[Vcpu], None] | None = None
        self.single_step = False
        self.wants_window = False
        """KVM_RUN's request_interrupt_window: leave when an interrupt could be taken."""
        self._step_over = False
        self._eoi_exit_vector = NO_VECTOR
        self._exits_on_pause = False
        self._tsc_value = 0
        self._tsc_at_ns = 0
        self.cpuid = Cpuid()
        self.lapic: Lapic | None = None
        if board.irqchip_in_kernel:
            self.lapic = Lapic(board, self, is_bsp)
        self.msrs = Msrs(self)
        self.exits = ExitHandlers(board, self)

    # Requests and kicks.

    def request_event(self) -> None:
        """`kvm_make_request(KVM_REQ_EVENT)` and `kvm_vcpu_kick`."""
        self.requests |= _REQ_EVENT
        # `kick`, as it is done for every tick.
        self.kicked = True
        if self.in_guest:
            self.engine.kick()
        elif self._board.running is not None:
            self._board.running.engine.kick()

    def request_unblock(self) -> None:
        """`kvm_make_request(KVM_REQ_UNBLOCK)` and `kvm_vcpu_kick`: a timer has expired."""
        self.requests |= _REQ_UNBLOCK
        self.kick()

    def request_scan_ioapic(self) -> None:
        """`kvm_make_request(KVM_REQ_SCAN_IOAPIC)`: which vectors are the IOAPIC's has changed."""
        self.requests |= _REQ_SCAN_IOAPIC
        self.kick()

    def request_ioapic_eoi_exit(self, vector: int) -> None:
        """`kvm_make_request(KVM_REQ_IOAPIC_EOI_EXIT)`: user space's IOAPIC wants to know."""
        self._eoi_exit_vector = vector
        self.requests |= _REQ_IOAPIC_EOI_EXIT
        self.kick()

    def request_migrate_timer(self) -> None:
        """`kvm_make_request(KVM_REQ_MIGRATE_TIMER)`: the thread moved to another host CPU."""
        self.requests |= _REQ_MIGRATE_TIMER
        self.kick()

    def kick(self) -> None:
        """`kvm_vcpu_kick`: out of the guest, or awake from HLT. Where it waits for its turn, the
        one that runs has to make room soon.
        """
        self.kicked = True
        if self.in_guest:
            self.engine.kick()
        elif self._board.running is not None:
            self._board.running.engine.kick()

    def queue_nmi(self) -> None:
        """`kvm_inject_nmi` and `process_nmi`; never called while guest code runs, at most from
        within one of its accesses.
        """
        self.pending.queue_nmi(bool(self.engine.interruptibility & Interruptibility.NMI))
        self.requests |= _REQ_NMI
        self.request_event()

    def process_nmi(self) -> None:
        """`process_nmi`: user space looks at the NMIs that wait, or sets them."""
        self.pending.process_nmi(bool(self.engine.interruptibility & Interruptibility.NMI))

    # Time.

    def guest_tsc(self) -> int:
        """The guest's time stamp counter: from 0 at power-on, unless it was written."""
        read = self.engine.read_tsc
        if read is not None:
            return read()
        elapsed_ns = self._clock.now_ns - self._tsc_at_ns
        return self._tsc_value + elapsed_ns * self.tsc_khz // NS_PER_MS & U64

    def set_guest_tsc(self, value: int) -> None:
        """The guest, or KVM_SET_MSRS, wrote IA32_TIME_STAMP_COUNTER."""
        self._set_tsc(self.tsc_khz, value & U64, self._clock.now_ns)

    def set_tsc_khz(self, khz: int) -> None:
        """KVM_SET_TSC_KHZ: as if it counted so since it was last set (`compute_guest_tsc`)."""
        self._set_tsc(khz, self._tsc_value, self._tsc_at_ns)

    def power_on(self, now_ns: int) -> None:
        """The machine's time starts, and with it the TSC, unless user space has set it before."""
        if not self._tsc_value and not self._tsc_at_ns:
            self._set_tsc(self.tsc_khz, 0, now_ns)

    def _set_tsc(self, khz: int, value: int, at_ns: int) -> None:
        self.tsc_khz, self._tsc_value, self._tsc_at_ns = khz, value, at_ns
        self.engine.set_tsc(khz, value, at_ns, self._clock.live)

    def has_cpuid(self, feature: str) -> bool:
        """Whether user space gave the guest one of `cpuid.FEATURES`."""
        return self.cpuid.has(feature)

    # External interrupts (irq.c).

    def accepts_extint(self) -> bool:
        """`kvm_apic_accept_pic_intr`: would the vCPU take the PIC's interrupt?"""
        lapic = self.lapic
        return lapic is not None and lapic.accepts_pic_intr()

    def has_extint(self) -> bool:
        """`kvm_cpu_has_extint`."""
        pic = self._pic
        waits = self.pending_external_vector != NO_VECTOR if pic is None else pic.output
        return waits and self.accepts_extint()

    def has_interrupt(self) -> bool:
        """`kvm_cpu_has_injectable_intr`: the PIC's, or the local APIC's."""
        lapic = self.lapic
        return lapic is not None and (self.has_extint() or lapic.has_interrupt() != NO_VECTOR)

    def get_interrupt(self) -> int:
        """`kvm_cpu_get_interrupt`: the INTA cycle, else IRR to ISR in the local APIC; -1: none."""
        lapic, pic = self.lapic, self._pic
        if lapic is None:
            return NO_VECTOR
        if pic is None:
            if self.pending_external_vector != NO_VECTOR and lapic.accepts_pic_intr():
                vector, self.pending_external_vector = self.pending_external_vector, NO_VECTOR
                return vector
        elif pic.output and lapic.accepts_pic_intr():
            return pic.read_irq()
        return lapic.get_interrupt()

    @property
    def has_kernel_pic(self) -> bool:
        """ExtINT comes from the in-kernel PIC, not from KVM_INTERRUPT."""
        return self._pic is not None

    def queue_interrupt(self, vector: int) -> None:
        """`kvm_queue_interrupt`: user space's own interrupt controller injects `vector`."""
        self.pending.queue_interrupt(vector)
        self.request_event()

    def has_events(self) -> bool:
        """`kvm_vcpu_has_events`: would the vCPU, halted, have something to run for?"""
        if self.requests & _REQ_UNBLOCK:
            self._serve_unblock()
        lapic = self.lapic
        if lapic is not None and (lapic.pending_events or lapic.pv_unhalted):
            return True
        # An NMI ends HLT when it comes, even where it has to wait for the end of another.
        if self.requests & _REQ_NMI and self.mp_state == _HALTED:
            return True
        if self.mp_state != _HALTED:
            return False
        if self.has_interrupt() and interrupt_allowed(self.vmcs):
            return True
        return self.pending.nmi_pending > 0 and nmi_allowed(self.vmcs)

    # INIT and SIPI.

    def accept_events(self) -> None:
        """`kvm_apic_accept_events`: what INIT and SIPI do to the vCPU's state."""
        lapic = self.lapic
        if lapic is None or not lapic.pending_events:
            return
        events, lapic.pending_events = lapic.pending_events, 0
        if events & KVM_APIC_INIT:
            self._reset(lapic)
            if lapic.apic_base & MSR_IA32_APICBASE_BSP:
                self.make_runnable()
            else:
                self.mp_state = _INIT_RECEIVED
        if events & KVM_APIC_SIPI and self.mp_state == _INIT_RECEIVED:
            # `kvm_vcpu_deliver_sipi_vector` is no reset: what holds events back stays.
            held_back = self.engine.interruptibility
            self.engine.reset(lapic.sipi_vector << SIPI_PAGE_SHIFT, 0)
            self.engine.set_interruptibility(held_back)
            self.take_over_state()
            self.make_runnable()

    def make_runnable(self) -> None:
        """`kvm_set_mp_state(KVM_MP_STATE_RUNNABLE)`: a remote read's wake-up is used up by it."""
        self.mp_state = _RUNNABLE
        if self.lapic is not None:
            self.lapic.pv_unhalted = False

    def _reset(self, lapic: Lapic) -> None:
        """`kvm_vcpu_reset(init_event=true)`."""
        lapic.reset(init_event=True)
        self.pending.clear()
        self.engine.reset(*RESET_CS_IP)
        self.take_over_state()

    def start_at(self, cs: int, ip: int, registers: Mapping[str, int] | None = None) -> None:
        """Real mode at `cs`:`ip`, or the state that `registers` make of it, as user space starts a
        vCPU (KVM_SET_SREGS, KVM_SET_REGS).
        """
        self.engine.reset(cs, ip)
        if registers is not None:
            self.engine.set_registers(registers)
        self.take_over_state()
        self.make_runnable()

    def take_over_state(self) -> None:
        """The engine's state was set from outside: nothing of the last entry holds any more."""
        vmcs, engine = self.vmcs, self.engine
        vmcs.guest_rflags = engine.rflags
        vmcs.guest_interruptibility = engine.interruptibility
        vmcs.entry_intr_info = 0
        vmcs.intr_window_exiting = False
        vmcs.nmi_window_exiting = False
        self.requests |= _REQ_EVENT

    def set_mp_state(self, mp_state: int) -> None:
        """KVM_SET_MP_STATE, checked by the caller; SIPI_RECEIVED starts the vCPU at the vector of
        the last SIPI (KVM_SET_VCPU_EVENTS sets it too).
        """
        if mp_state == _SIPI_RECEIVED and self.lapic is not None:
            self.mp_state = _INIT_RECEIVED
            self.lapic.pending_events |= KVM_APIC_SIPI
        elif mp_state == _RUNNABLE:
            self.make_runnable()
        else:
            self.mp_state = mp_state
        self.request_event()

    @property
    def awaits_sipi(self) -> bool:
        """It was never started, or INIT stopped it."""
        return self.mp_state in _AWAIT_SIPI

    def mp_state_name(self) -> str:
        """KVM_MP_STATE_* in lower case."""
        return MpState(self.mp_state).name.lower().replace("_", " ")

    # One entry and exit.

    def exit_on_pause(self, enabled: bool) -> None:
        """PAUSE exiting (SDM vol. 3C, 26.6.2): whether another vCPU could use the time."""
        if enabled != self._exits_on_pause:
            self._exits_on_pause = enabled
            self.engine.exit_on_pause(enabled)

    def enter(self, budget: int) -> int:
        """`vcpu_enter_guest`: at most `budget` instructions; returns the `ExitReason`."""
        if self.requests and not self.vmcs.entry_intr_info:
            self.serve_requests()
        vmcs, engine, recorder = self.vmcs, self.engine, self._recorder
        recorder.task = self.task
        if recorder.detail:
            recorder.kvm_entry(self.vcpu_id, engine.rip, vmcs.entry_intr_info)
        self.kicked = False
        on_debug = self.on_debug
        try:
            if on_debug is None:
                reason = self._enter_guest(vmcs.entry_intr_info, budget)
            else:
                reason = self._enter_debugged(vmcs.entry_intr_info, budget, on_debug)
        finally:
            vmcs.entry_intr_info = 0
        vmcs.exit_reason = reason
        if recorder.detail:
            self.record_exit(reason, 0)
        if reason == _EXIT_HLT:
            self.mp_state = _HALTED
            self.slept_from_ns = self._clock.now_ns
        else:
            self._handle_exit(reason)
        if self._step_over and on_debug is not None:
            self._step_over = False
            on_debug(self)
        return reason

    def complete_access(self, rounds: int) -> int:
        """`complete_userspace_io`: the instruction at RIP, or so many rounds of a REP, now that
        user space has answered its accesses, and no event before it; returns the `ExitReason`.
        """
        vmcs = self.vmcs
        self._recorder.task = self.task
        windows = vmcs.intr_window_exiting, vmcs.nmi_window_exiting
        vmcs.intr_window_exiting = vmcs.nmi_window_exiting = False
        reason = self._enter_guest(0, rounds)
        vmcs.intr_window_exiting, vmcs.nmi_window_exiting = windows
        return reason

    def may_take_interrupt(self) -> bool:
        """`kvm_vcpu_ready_for_interrupt_injection`: one that user space injects would go in now."""
        accepts = self.lapic is None or self.lapic.accepts_pic_intr()
        return accepts and interrupt_allowed(self.vmcs) and not self.pending.injected

    def _enter_guest(self, intr_info: int, budget: int) -> int:
        """Let the engine run, and the clock with it."""
        vmcs, engine, clock = self.vmcs, self.engine, self._clock
        entered_ns = clock.now_ns
        if intr_info & INTR_INFO_DELIVER_CODE:
            engine.entry_error_code = vmcs.entry_error_code
        self.exits.entered_ns = entered_ns
        self.in_guest = self.has_run = True
        try:
            return engine.enter(
                intr_info,
                vmcs.intr_window_exiting,
                vmcs.nmi_window_exiting,
                budget,
                entered_ns,
            )
        finally:  # of an exception, too: the guest has gone on up to the handler's access
            self.in_guest = False
            state = engine.last_exit
            vmcs.guest_rflags = state & EXIT_RFLAGS
            vmcs.guest_interruptibility = (
                state >> EXIT_INTERRUPTIBILITY_SHIFT & EXIT_INTERRUPTIBILITY
            )
            vmcs.idt_vectoring_info = engine.idt_vectoring_info if state & EXIT_EVENT_CUT else 0
            retired = state >> EXIT_RETIRED_SHIFT
            self.instructions += retired
            if clock.live:
                clock.refresh()
            else:
                clock.now_ns = entered_ns + retired

    # A debugger (KVM_SET_GUEST_DEBUG).

    def _enter_debugged(self, intr_info: int, budget: int, on_debug: Callable[[Vcpu], None]) -> int:
        """One entry, however often a breakpoint or a step interrupts it: `on_debug` has the vCPU
        meanwhile. So time, slices and trace are those of a run without a debugger.
        """
        engine = self.engine
        while True:
            steps = self.single_step
            # With an event to deliver, a step leads to the first instruction of its handler. A
            # budget of 1 may have come with a kick of the machine's own, which must not be lost,
            # and neither must one from the kicker's thread.
            delivers = steps and intr_info != 0 and budget > 1 and not self._clock.live
            if delivers:
                engine.kick()
            reason = self._enter_guest(intr_info, 1 if steps else budget)
            if steps and (intr_info or engine.retired) and reason not in _FATAL_EXITS:
                self._step_over = not engine.idt_vectoring_info
            intr_info = 0
            budget -= engine.retired
            if reason == _EXIT_PREEMPTION_TIMER:
                is_ours = steps and budget > 0
            elif reason == _EXIT_EXTERNAL_INTERRUPT:
                is_ours = delivers and self._step_over
            else:
                is_ours = reason == _EXIT_BREAKPOINT
            if not is_ours:
                return reason
            self._step_over = False
            on_debug(self)

    def serve_requests(self) -> None:
        """The first part of vcpu_enter_guest. It may create an earlier deadline: an automatic EOI
        at the injection can queue the PIT's worker.
        """
        self._recorder.task = self.task
        if self.requests & _REQ_UNBLOCK:
            self._serve_unblock()
        requests, self.requests = self.requests, 0
        if requests & ~_REQ_EVENT and self._serve_rare(requests):
            self.requests |= requests & ~_REQ_IOAPIC_EOI_EXIT
            return
        if requests & _REQ_EVENT:
            lapic = self.lapic
            if lapic is not None and lapic.pending_events:
                self.accept_events()
                if self.mp_state != _RUNNABLE:
                    return
            inject_pending_event(self.vmcs, self.pending, self, self._recorder)
            if self.wants_window:
                self.vmcs.intr_window_exiting = True

    def _serve_unblock(self) -> None:
        """`kvm_inject_pending_timer_irqs`: the vCPU itself puts its timer's interrupt in IRR."""
        self.requests &= ~_REQ_UNBLOCK
        lapic = self.lapic
        if lapic is not None and lapic.pending_timer:
            self._recorder.task = self.task
            lapic.inject_pending_timer_irqs()

    def _serve_rare(self, requests: int) -> bool:
        """True: leave to user space first."""
        lapic = self.lapic
        if requests & _REQ_MIGRATE_TIMER:
            self._board.migrate_pit_timer()
            if lapic is not None:
                lapic.migrate_timer()
        if lapic is None:
            return False
        vector = self._eoi_exit_vector
        wanted = requests & _REQ_IOAPIC_EOI_EXIT and lapic.handled_vectors >> vector & 1
        if wanted and self.exits.user_space.ioapic_eoi(vector):
            return True
        if requests & _REQ_SCAN_IOAPIC and lapic.hw_enabled:
            lapic.handled_vectors = self._board.handled_vectors(lapic)
        return False

    def _handle_exit(self, reason: int) -> None:
        if complete_interrupts(self.vmcs, self.pending):
            self.requests |= _REQ_EVENT
        if reason == _EXIT_INTERRUPT_WINDOW:
            self.vmcs.intr_window_exiting = False
            self.requests |= _REQ_EVENT
        elif reason == _EXIT_NMI_WINDOW:
            self.vmcs.nmi_window_exiting = False
            self.requests |= _REQ_EVENT

    def record_exit(self, reason: int, info1: int) -> None:
        """The kvm_exit tracepoint."""
        self._recorder.kvm_exit(
            self.vcpu_id,
            reason,
            self.engine.rip,
            info1,
            self.vmcs.idt_vectoring_info,
        )
