"""What goes into the guest at the next VM entry, and in which order.

`inject_pending_event` follows kvm_check_and_inject_events (arch/x86/kvm/x86.c) over the VMX
functions vmx_inject_irq, vmx_inject_nmi and vmx_enable_{irq,nmi}_window: first an event whose
delivery was cut short, then an NMI, then an external interrupt; what cannot be taken now opens a
window. Blocking follows SDM vol. 3A, 6.8.1 (IF), 6.8.3 (MOV SS) and 6.7.1 (NMI).

Not modelled: SMI, pending exceptions raised by KVM itself, nested guests.
"""

from typing import Protocol

from kvmtick.cpu.engine import EventType, Interruptibility
from kvmtick.trace.recorder import Recorder
from kvmtick.vcpu.vmcs import Vmcs, intr_info, intr_type, intr_vector

__all__ = [
    "NMI_LIMIT",
    "NMI_VECTOR",
    "RFLAGS_IF",
    "InterruptSource",
    "PendingEvents",
    "complete_interrupts",
    "inject_pending_event",
    "interrupt_allowed",
    "nmi_allowed",
]

RFLAGS_IF = 1 << 9
NMI_VECTOR = 2
NMI_LIMIT = 2
"""One NMI in service and one pending: more are merged (`process_nmi`)."""

_EXTERNAL_INTERRUPT = intr_info(EventType.EXTERNAL, 0)
_SHADOW = int(Interruptibility.STI | Interruptibility.MOV_SS)
_NMI_BLOCKED = int(Interruptibility.NMI | Interruptibility.STI | Interruptibility.MOV_SS)


class InterruptSource(Protocol):
    """Where the vCPU's external interrupts come from."""

    vcpu_id: int

    def has_interrupt(self) -> bool:
        """`kvm_cpu_has_injectable_intr`."""

    def get_interrupt(self) -> int:
        """`kvm_cpu_get_interrupt`: acknowledge and return the vector; -1 if none waits."""


class PendingEvents:
    """Events on their way into the guest."""

    __slots__ = ("nmi_pending", "reinject_info")

    def __init__(self) -> None:
        self.nmi_pending = 0
        self.reinject_info = 0
        """The event to deliver again, as interruption information; 0 if none."""

    def queue_nmi(self, nmi_blocked: bool) -> None:
        """`kvm_inject_nmi` and `process_nmi`: pends unless as many as can wait do already."""
        limit = 1 if nmi_blocked or intr_type(self.reinject_info) == EventType.NMI else NMI_LIMIT
        self.nmi_pending = min(self.nmi_pending + 1, limit)


def interrupt_allowed(vmcs: Vmcs) -> bool:
    """`vmx_interrupt_allowed`: IF is set and no STI or MOV SS shadow."""
    return vmcs.guest_rflags & RFLAGS_IF != 0 and not vmcs.guest_interruptibility & _SHADOW


def nmi_allowed(vmcs: Vmcs) -> bool:
    """`vmx_nmi_allowed`: no NMI in service and no STI or MOV SS shadow."""
    return not vmcs.guest_interruptibility & _NMI_BLOCKED


def complete_interrupts(vmcs: Vmcs, pending: PendingEvents) -> bool:
    """`vmx_complete_interrupts`: keep the event whose delivery the exit cut short, if any."""
    pending.reinject_info = vmcs.idt_vectoring_info
    return pending.reinject_info != 0


def inject_pending_event(
    vmcs: Vmcs, pending: PendingEvents, source: InterruptSource, recorder: Recorder
) -> None:
    """Fill the VM-entry interruption information and set the windows for what has to wait."""
    info = pending.reinject_info
    if info:
        vmcs.entry_intr_info = info
        pending.reinject_info = 0
        if intr_type(info) == EventType.EXTERNAL:
            recorder.kvm_inj_virq(intr_vector(info), False, True)
    elif pending.nmi_pending and nmi_allowed(vmcs):
        pending.nmi_pending -= 1
        vmcs.entry_intr_info = intr_info(EventType.NMI, NMI_VECTOR)
        recorder.kvm_inj_nmi(source.vcpu_id, pending.nmi_pending)
    elif interrupt_allowed(vmcs):
        vector = source.get_interrupt()
        if vector >= 0:
            recorder.kvm_inj_virq(vector, False, False)
            vmcs.entry_intr_info = _EXTERNAL_INTERRUPT | vector
    vmcs.nmi_window_exiting = pending.nmi_pending > 0
    vmcs.intr_window_exiting = source.has_interrupt()
