"""KVM_GET_VCPU_EVENTS and KVM_SET_VCPU_EVENTS of the model (api.rst 4.31 and 4.32).

As a kernel without SMM has them, with KVM_CAP_EXCEPTION_PAYLOAD and KVM_CAP_X86_TRIPLE_FAULT_EVENT
off: an exception is injected or not there. The numbers of the last exception and interrupt are told
also when they have gone in. Of two shadows that are given MOV SS counts, as with VMX.

Not modelled: SMM; exceptions that the guest raises (the engine delivers them, and they are not
told).
"""

import errno

from kvmtick.abi.errors import KvmError
from kvmtick.abi.structs import (
    KVM_VCPUEVENT_VALID_NMI_PENDING,
    KVM_VCPUEVENT_VALID_SHADOW,
    KVM_VCPUEVENT_VALID_SIPI_VECTOR,
    KVM_VCPUEVENT_VALID_SMM,
    KVM_VCPUEVENT_VALID_TRIPLE_FAULT,
    KVM_X86_SHADOW_INT_MOV_SS,
    KVM_X86_SHADOW_INT_STI,
    kvm_vcpu_events,
)
from kvmtick.cpu.engine import Interruptibility
from kvmtick.irqchip.apicdef import KVM_APIC_INIT
from kvmtick.vcpu.events import NMI_VECTOR, Injected, PendingEvents, QueuedException
from kvmtick.vcpu.vcpu import Vcpu

__all__ = ["get_vcpu_events", "set_vcpu_events"]

NR_EXCEPTIONS = 32
_TOLD = KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SHADOW | KVM_VCPUEVENT_VALID_SMM
_KNOWN = _TOLD | KVM_VCPUEVENT_VALID_SIPI_VECTOR | KVM_VCPUEVENT_VALID_TRIPLE_FAULT


def get_vcpu_events(vcpu: Vcpu) -> kvm_vcpu_events:
    """KVM_GET_VCPU_EVENTS."""
    vcpu.process_nmi()
    pending, lapic, state = vcpu.pending, vcpu.lapic, vcpu.engine.interruptibility
    events = kvm_vcpu_events(flags=_TOLD)
    exception = pending.exception
    # Without an instruction length a software exception could not be injected again: the guest
    # executes it once more.
    raised = pending.injected & Injected.EXCEPTION and not exception.is_soft
    events.exception.injected = int(bool(raised))
    events.exception.nr = exception.nr
    events.exception.has_error_code = int(exception.has_error_code)
    events.exception.error_code = exception.error_code
    events.exception_payload = exception.payload
    events.interrupt.injected = int(has_injected_interrupt(pending))
    events.interrupt.nr = pending.interrupt_nr
    if state & Interruptibility.STI:
        events.interrupt.shadow |= KVM_X86_SHADOW_INT_STI
    if state & Interruptibility.MOV_SS:
        events.interrupt.shadow |= KVM_X86_SHADOW_INT_MOV_SS
    events.nmi.injected = int(pending.injected & Injected.NMI != 0)
    events.nmi.pending = pending.nmi_pending
    events.nmi.masked = int(state & Interruptibility.NMI != 0)
    events.smi.latched_init = int(lapic is not None and lapic.pending_events & KVM_APIC_INIT != 0)
    return events


def has_injected_interrupt(pending: PendingEvents) -> bool:
    """An external interrupt goes in at the next entry."""
    return pending.injected & Injected.INTERRUPT != 0 and not pending.interrupt_soft


def set_vcpu_events(vcpu: Vcpu, events: kvm_vcpu_events) -> None:
    """KVM_SET_VCPU_EVENTS.

    EINVAL: unknown flags, or an exception that is none, with nothing changed; SMM, with all but
    the latched INIT taken over; a triple fault, with all else taken over.
    """
    exception = events.exception
    is_none = exception.nr >= NR_EXCEPTIONS or exception.nr == NMI_VECTOR
    if events.flags & ~_KNOWN or (exception.injected and is_none):
        raise KvmError(errno.EINVAL, "KVM_SET_VCPU_EVENTS")
    vcpu.process_nmi()
    _set_injected(vcpu.pending, events)
    _set_interruptibility(vcpu, events)
    if events.flags & KVM_VCPUEVENT_VALID_NMI_PENDING:
        masked = events.nmi.masked != 0
        vcpu.pending.nmi_pending = min(events.nmi.pending, vcpu.pending.nmi_limit(masked))
    if events.flags & KVM_VCPUEVENT_VALID_SIPI_VECTOR and vcpu.lapic is not None:
        vcpu.lapic.sipi_vector = events.sipi_vector & 0xFF
    if events.flags & KVM_VCPUEVENT_VALID_SMM:
        _set_smi(vcpu, events)
    vcpu.take_over_state()
    if events.flags & KVM_VCPUEVENT_VALID_TRIPLE_FAULT:
        why = "KVM_CAP_X86_TRIPLE_FAULT_EVENT is off"
        raise KvmError(errno.EINVAL, "KVM_SET_VCPU_EVENTS", why)
    vcpu.request_event()


def _set_injected(pending: PendingEvents, events: kvm_vcpu_events) -> None:
    exception, interrupt = events.exception, events.interrupt
    pending.exception = QueuedException(
        exception.nr,
        exception.has_error_code != 0,
        exception.error_code,
        events.exception_payload,
    )
    pending.interrupt_nr = interrupt.nr
    pending.interrupt_soft = interrupt.soft != 0
    pending.injected = (
        (Injected.EXCEPTION if exception.injected else 0)
        | (Injected.INTERRUPT if interrupt.injected else 0)
        | (Injected.NMI if events.nmi.injected else 0)
    )


def _set_interruptibility(vcpu: Vcpu, events: kvm_vcpu_events) -> None:
    shadow = Interruptibility(vcpu.engine.interruptibility) & ~Interruptibility.NMI
    if events.flags & KVM_VCPUEVENT_VALID_SHADOW:
        shadow = Interruptibility(0)
        if events.interrupt.shadow & KVM_X86_SHADOW_INT_MOV_SS:
            shadow = Interruptibility.MOV_SS
        elif events.interrupt.shadow & KVM_X86_SHADOW_INT_STI:
            shadow = Interruptibility.STI
    nmi = Interruptibility.NMI if events.nmi.masked else 0
    vcpu.engine.set_interruptibility(int(shadow | nmi))


def _set_smi(vcpu: Vcpu, events: kvm_vcpu_events) -> None:
    smi, lapic = events.smi, vcpu.lapic
    if smi.smm or smi.pending or smi.smm_inside_nmi:
        vcpu.take_over_state()
        raise KvmError(errno.EINVAL, "KVM_SET_VCPU_EVENTS", "the model has no SMM")
    if lapic is not None:
        lapic.pending_events &= ~KVM_APIC_INIT
        if smi.latched_init:
            lapic.pending_events |= KVM_APIC_INIT
