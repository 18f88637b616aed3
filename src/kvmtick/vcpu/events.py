"""What goes into the guest at the next VM entry, and in which order.

`PendingEvents` are the queues of struct kvm_vcpu_arch. `inject_pending_event` follows
kvm_check_and_inject_events (arch/x86/kvm/x86.c) over the VMX functions vmx_inject_irq,
vmx_inject_nmi and vmx_enable_{irq,nmi}_window: first an event whose delivery was cut short, then an
NMI, then an external interrupt; what cannot be taken now opens a window. Blocking follows SDM vol.
3A, 7.8.1 (IF), 7.8.3 (MOV SS) and 7.7.1 (NMI).

Not modelled: SMI, pending exceptions (those that KVM itself raises; the engine does that, and
`PendingEvents.exception` does not show it), nested guests.
"""

from enum import IntFlag
from typing import Final, NamedTuple

from mypy_extensions import mypyc_attr

from kvmtick.cpu.engine import INTR_INFO_DELIVER_CODE, EventType, Interruptibility
from kvmtick.irqchip.lapic import LapicVcpu
from kvmtick.trace.recorder import Recorder
from kvmtick.vcpu.vmcs import Vmcs, intr_info, intr_type, intr_vector

__all__ = [
    "NMI_LIMIT",
    "NMI_VECTOR",
    "RFLAGS_IF",
    "Injected",
    "InterruptSource",
    "PendingEvents",
    "QueuedException",
    "complete_interrupts",
    "inject_pending_event",
    "interrupt_allowed",
    "nmi_allowed",
]

RFLAGS_IF: Final = 1 << 9
NMI_VECTOR: Final = 2
NMI_LIMIT: Final = 2
"""One NMI in service and one pending: more are merged (`process_nmi`)."""

BP_VECTOR: Final = 3
OF_VECTOR: Final = 4
ERROR_CODE_MASK: Final = 0xFFFF
"""What VMX delivers of an error code."""

_EXTERNAL_INTERRUPT: Final = intr_info(EventType.EXTERNAL, 0)
_SHADOW: Final = int(Interruptibility.STI | Interruptibility.MOV_SS)
_NMI_BLOCKED: Final = int(Interruptibility.NMI | Interruptibility.STI | Interruptibility.MOV_SS)


@mypyc_attr(allow_interpreted_subclasses=True)
class InterruptSource(LapicVcpu):
    """Where the vCPU's external interrupts come from."""

    __slots__ = ()

    def has_interrupt(self) -> bool:
        """`kvm_cpu_has_injectable_intr`."""
        raise NotImplementedError

    def get_interrupt(self) -> int:
        """`kvm_cpu_get_interrupt`: acknowledge and return the vector; -1 if none waits."""
        raise NotImplementedError


class Injected(IntFlag):
    """Events whose delivery has begun: they go in next, whatever IF and the shadows say."""

    EXCEPTION = 1 << 0
    NMI = 1 << 1
    INTERRUPT = 1 << 2


_EXCEPTION: Final = int(Injected.EXCEPTION)
_NMI: Final = int(Injected.NMI)
_INTERRUPT: Final = int(Injected.INTERRUPT)


class QueuedException(NamedTuple):
    """struct kvm_queued_exception: the number, and what goes with it."""

    nr: int = 0
    has_error_code: bool = False
    error_code: int = 0
    payload: int = 0

    @property
    def is_soft(self) -> bool:
        """`kvm_exception_is_soft`: INT3 and INTO raise it."""
        return self.nr in (BP_VECTOR, OF_VECTOR)


class PendingEvents:
    """Events on their way into the guest.

    `injected` says which go in at the next entry; of several the first one of `Injected` does, and
    the others are lost. `exception` and `interrupt_nr` stay when theirs has gone in.
    """

    __slots__ = ("exception", "injected", "interrupt_nr", "interrupt_soft", "nmi_pending")

    def __init__(self) -> None:
        self.injected = 0
        self.exception = QueuedException()
        self.interrupt_nr = 0
        self.interrupt_soft = False
        self.nmi_pending = 0

    def clear(self) -> None:
        """INIT: nothing waits any more."""
        self.injected = 0
        self.nmi_pending = 0

    def queue_interrupt(self, vector: int, soft: bool = False) -> None:
        """`kvm_queue_interrupt`."""
        self.injected |= _INTERRUPT
        self.interrupt_nr = vector
        self.interrupt_soft = soft

    def nmi_limit(self, nmi_blocked: bool) -> int:
        """How many NMIs can wait (`process_nmi`)."""
        return 1 if nmi_blocked or self.injected & _NMI else NMI_LIMIT

    def queue_nmi(self, nmi_blocked: bool) -> None:
        """`kvm_inject_nmi` and `process_nmi`: pends unless as many as can wait do already."""
        self.nmi_pending += 1
        self.process_nmi(nmi_blocked)

    def process_nmi(self, nmi_blocked: bool) -> None:
        """`process_nmi`: of NMIs that wait no more than can wait now are left."""
        self.nmi_pending = min(self.nmi_pending, self.nmi_limit(nmi_blocked))


def interrupt_allowed(vmcs: Vmcs) -> bool:
    """`vmx_interrupt_allowed`: IF is set and no STI or MOV SS shadow."""
    return vmcs.guest_rflags & RFLAGS_IF != 0 and not vmcs.guest_interruptibility & _SHADOW


def nmi_allowed(vmcs: Vmcs) -> bool:
    """`vmx_nmi_allowed`: no NMI in service and no STI or MOV SS shadow."""
    return not vmcs.guest_interruptibility & _NMI_BLOCKED


def complete_interrupts(vmcs: Vmcs, pending: PendingEvents) -> bool:
    """`vmx_complete_interrupts`: keep the event whose delivery the exit cut short, if any."""
    info = vmcs.idt_vectoring_info
    if not info:
        return False
    kind, vector = intr_type(info), intr_vector(info)
    if kind == EventType.NMI:
        pending.injected |= _NMI
    elif kind in (EventType.EXTERNAL, EventType.SOFTWARE_INTERRUPT):
        pending.queue_interrupt(vector, kind == EventType.SOFTWARE_INTERRUPT)
    else:
        pending.injected |= _EXCEPTION
        has_error_code = info & INTR_INFO_DELIVER_CODE != 0
        pending.exception = QueuedException(vector, has_error_code, vmcs.entry_error_code)
    return True


def _inject_again(vmcs: Vmcs, pending: PendingEvents, recorder: Recorder) -> None:
    """`kvm_event_needs_reinjection`: finish what was begun."""
    injected, pending.injected = pending.injected, 0
    if injected & _EXCEPTION:
        exception = pending.exception
        soft = EventType.SOFTWARE_EXCEPTION if exception.is_soft else EventType.HARDWARE_EXCEPTION
        vmcs.entry_intr_info = intr_info(soft, exception.nr)
        if exception.has_error_code:
            vmcs.entry_intr_info |= INTR_INFO_DELIVER_CODE
            vmcs.entry_error_code = exception.error_code & ERROR_CODE_MASK
    elif injected & _NMI:
        vmcs.entry_intr_info = intr_info(EventType.NMI, NMI_VECTOR)
    else:
        kind = EventType.SOFTWARE_INTERRUPT if pending.interrupt_soft else EventType.EXTERNAL
        vmcs.entry_intr_info = intr_info(kind, pending.interrupt_nr)
        recorder.kvm_inj_virq(pending.interrupt_nr, pending.interrupt_soft, True)


def inject_pending_event(
    vmcs: Vmcs, pending: PendingEvents, source: InterruptSource, recorder: Recorder
) -> None:
    """Fill the VM-entry interruption information and set the windows for what has to wait."""
    if pending.injected:
        _inject_again(vmcs, pending, recorder)
    elif pending.nmi_pending and nmi_allowed(vmcs):
        pending.nmi_pending -= 1
        vmcs.entry_intr_info = intr_info(EventType.NMI, NMI_VECTOR)
        recorder.kvm_inj_nmi(source.vcpu_id, pending.nmi_pending)
    elif interrupt_allowed(vmcs):
        vector = source.get_interrupt()
        if vector >= 0:
            recorder.kvm_inj_virq(vector, False, False)
            pending.interrupt_nr = vector
            pending.interrupt_soft = False
            vmcs.entry_intr_info = _EXTERNAL_INTERRUPT | vector
    vmcs.nmi_window_exiting = pending.nmi_pending > 0
    vmcs.intr_window_exiting = source.has_interrupt()
