"""KVM_GET_VCPU_EVENTS and KVM_SET_VCPU_EVENTS of the model (api.rst 4.31).

Not modelled: an NMI that is injected or masked, shadows, SMM and exceptions cannot be set.
"""

import errno

from kvmtick.abi.errors import KvmError
from kvmtick.abi.structs import (
    KVM_VCPUEVENT_VALID_NMI_PENDING,
    KVM_VCPUEVENT_VALID_SHADOW,
    KVM_VCPUEVENT_VALID_SIPI_VECTOR,
    KVM_VCPUEVENT_VALID_SMM,
    KVM_X86_SHADOW_INT_MOV_SS,
    KVM_X86_SHADOW_INT_STI,
    kvm_vcpu_events,
)
from kvmtick.cpu.engine import EventType, Interruptibility
from kvmtick.vcpu.events import NMI_LIMIT, NMI_VECTOR
from kvmtick.vcpu.vcpu import Vcpu
from kvmtick.vcpu.vmcs import intr_type, intr_vector

__all__ = ["get_vcpu_events", "set_vcpu_events"]

NR_EXCEPTIONS = 32
_EVENT_FLAGS = (
    KVM_VCPUEVENT_VALID_NMI_PENDING
    | KVM_VCPUEVENT_VALID_SIPI_VECTOR
    | KVM_VCPUEVENT_VALID_SHADOW
    | KVM_VCPUEVENT_VALID_SMM
)


def get_vcpu_events(vcpu: Vcpu) -> kvm_vcpu_events:
    """`kvm_vcpu_ioctl_x86_get_vcpu_events`."""
    events = kvm_vcpu_events(
        flags=KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SHADOW | KVM_VCPUEVENT_VALID_SMM
    )
    info = vcpu.pending.reinject_info
    if info and intr_type(info) == EventType.EXTERNAL:
        events.interrupt.injected = 1
        events.interrupt.nr = intr_vector(info)
    events.nmi.injected = int(info != 0 and intr_type(info) == EventType.NMI)
    events.nmi.pending = vcpu.pending.nmi_pending
    state = vcpu.engine.interruptibility
    events.nmi.masked = int(state & Interruptibility.NMI != 0)
    if state & Interruptibility.STI:
        events.interrupt.shadow |= KVM_X86_SHADOW_INT_STI
    if state & Interruptibility.MOV_SS:
        events.interrupt.shadow |= KVM_X86_SHADOW_INT_MOV_SS
    return events


def set_vcpu_events(vcpu: Vcpu, events: kvm_vcpu_events) -> None:
    """`kvm_vcpu_ioctl_x86_set_vcpu_events`. KvmError EINVAL: unknown flags, or no exception."""
    exception = events.exception
    wrong = (exception.injected or exception.pending) and (
        exception.nr >= NR_EXCEPTIONS or exception.nr == NMI_VECTOR
    )
    if events.flags & ~_EVENT_FLAGS or wrong:
        raise KvmError(errno.EINVAL, "KVM_SET_VCPU_EVENTS")
    if events.interrupt.injected:
        vcpu.queue_interrupt(events.interrupt.nr)
    else:
        vcpu.pending.reinject_info = 0
    if events.flags & KVM_VCPUEVENT_VALID_NMI_PENDING:
        vcpu.pending.nmi_pending = min(events.nmi.pending, NMI_LIMIT)
    if events.flags & KVM_VCPUEVENT_VALID_SIPI_VECTOR and vcpu.lapic is not None:
        vcpu.lapic.sipi_vector = events.sipi_vector & 0xFF
    vcpu.request_event()
