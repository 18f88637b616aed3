"""A vCPU of the model behind KVM's calls: `ModelVcpu`.

Each method is one vCPU ioctl of Documentation/virt/kvm/api.rst, with the kernel's errno in
`KvmError`.

Not modelled: general, segment and control registers are read only (KVM_GET_REGS); of
KVM_SET_VCPU_EVENTS an NMI that is injected or masked, shadows, SMM and exceptions; the MSRs that
`kvmtick.vcpu.msr` does not model.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Mapping

from kvmtick.abi.errors import KvmError
from kvmtick.abi.structs import (
    KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
    KVM_VCPUEVENT_VALID_NMI_PENDING,
    KVM_VCPUEVENT_VALID_SHADOW,
    KVM_VCPUEVENT_VALID_SIPI_VECTOR,
    KVM_VCPUEVENT_VALID_SMM,
    KVM_X86_SHADOW_INT_MOV_SS,
    KVM_X86_SHADOW_INT_STI,
    kvm_cpuid_entry2,
    kvm_lapic_state,
    kvm_regs,
    kvm_vcpu_events,
)
from kvmtick.cpu.engine import EventType, Interruptibility
from kvmtick.irqchip.lapic import Lapic
from kvmtick.machine.board import Board
from kvmtick.vcpu.cpuid import LEAF_FEATURES, CpuidLeaf, supported
from kvmtick.vcpu.events import NMI_LIMIT, NMI_VECTOR
from kvmtick.vcpu.vcpu import MpState, Vcpu
from kvmtick.vcpu.vmcs import intr_type, intr_vector

__all__ = ["ModelVcpu", "cpuid_entries"]

NR_VECTORS = 256
NR_EXCEPTIONS = 32
_EVENT_FLAGS = (
    KVM_VCPUEVENT_VALID_NMI_PENDING
    | KVM_VCPUEVENT_VALID_SIPI_VECTOR
    | KVM_VCPUEVENT_VALID_SHADOW
    | KVM_VCPUEVENT_VALID_SMM
)


class ModelVcpu:
    """One vCPU of a model VM."""

    def __init__(self, vcpu: Vcpu, board: Board) -> None:
        self.vcpu = vcpu
        self.vcpu_id = vcpu.vcpu_id
        self._board = board

    def nmi(self) -> None:
        """KVM_NMI: make an NMI pending; two at most wait."""
        self.vcpu.queue_nmi()

    def interrupt(self, irq: int) -> None:
        """KVM_INTERRUPT: queue an external interrupt of vector `irq`.

        EINVAL: above 255. ENXIO: the PICs are in the kernel. EEXIST: one waits (split irqchip).
        """
        vcpu = self.vcpu
        if not 0 <= irq < NR_VECTORS:
            raise KvmError(errno.EINVAL, "KVM_INTERRUPT")
        if vcpu.lapic is None:
            vcpu.queue_interrupt(irq)
            return
        if vcpu.has_kernel_pic:
            raise KvmError(errno.ENXIO, "KVM_INTERRUPT")
        if vcpu.pending_external_vector >= 0:
            raise KvmError(errno.EEXIST, "KVM_INTERRUPT")
        vcpu.pending_external_vector = irq
        vcpu.request_event()

    def get_regs(self) -> kvm_regs:
        """KVM_GET_REGS."""
        registers = self.vcpu.engine.registers()
        names = (name for name, *_ in kvm_regs._fields_)
        return kvm_regs(**{name: registers[name] for name in names if name in registers})

    # The local APIC.

    def get_lapic(self) -> kvm_lapic_state:
        """KVM_GET_LAPIC. EINVAL: no in-kernel local APIC."""
        self._board.irqfds.poll()
        return kvm_lapic_state.from_buffer_copy(self._lapic("KVM_GET_LAPIC").save())

    def set_lapic(self, lapic: kvm_lapic_state) -> None:
        """KVM_SET_LAPIC. EINVAL: no in-kernel local APIC, or an id that is not the vCPU's."""
        self._lapic("KVM_SET_LAPIC").restore(bytes(lapic))

    def _lapic(self, call: str) -> Lapic:
        lapic = self.vcpu.lapic
        if lapic is None:
            raise KvmError(errno.EINVAL, call)
        return lapic

    # MP state and events.

    def get_mp_state(self) -> int:
        """KVM_GET_MP_STATE: a KVM_MP_STATE_* value."""
        self._board.irqfds.poll()
        vcpu = self.vcpu
        vcpu.accept_events()
        halted = vcpu.mp_state in (MpState.HALTED, MpState.AP_RESET_HOLD)
        if halted and vcpu.lapic is not None and vcpu.lapic.pv_unhalted:
            return int(MpState.RUNNABLE)
        return int(vcpu.mp_state)

    def set_mp_state(self, mp_state: int) -> None:
        """KVM_SET_MP_STATE. EINVAL: not runnable and no in-kernel irqchip, or unknown."""
        known = mp_state in MpState.__members__.values()
        if not known or (self.vcpu.lapic is None and mp_state != MpState.RUNNABLE):
            raise KvmError(errno.EINVAL, "KVM_SET_MP_STATE")
        self.vcpu.set_mp_state(mp_state)

    def get_vcpu_events(self) -> kvm_vcpu_events:
        """KVM_GET_VCPU_EVENTS."""
        self._board.irqfds.poll()
        vcpu = self.vcpu
        events = kvm_vcpu_events(
            flags=KVM_VCPUEVENT_VALID_NMI_PENDING
            | KVM_VCPUEVENT_VALID_SHADOW
            | KVM_VCPUEVENT_VALID_SMM
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

    def set_vcpu_events(self, events: kvm_vcpu_events) -> None:
        """KVM_SET_VCPU_EVENTS: the injected interrupt, pending NMIs and the SIPI vector.

        EINVAL: unknown flags, or an exception that is none.
        """
        exception = events.exception
        wrong = (exception.injected or exception.pending) and (
            exception.nr >= NR_EXCEPTIONS or exception.nr == NMI_VECTOR
        )
        if events.flags & ~_EVENT_FLAGS or wrong:
            raise KvmError(errno.EINVAL, "KVM_SET_VCPU_EVENTS")
        vcpu = self.vcpu
        if events.interrupt.injected:
            vcpu.queue_interrupt(events.interrupt.nr)
        else:
            vcpu.pending.reinject_info = 0
        if events.flags & KVM_VCPUEVENT_VALID_NMI_PENDING:
            vcpu.pending.nmi_pending = min(events.nmi.pending, NMI_LIMIT)
        if events.flags & KVM_VCPUEVENT_VALID_SIPI_VECTOR and vcpu.lapic is not None:
            vcpu.lapic.sipi_vector = events.sipi_vector & 0xFF
        vcpu.request_event()

    # CPUID, MSRs and time.

    def set_cpuid2(self, entries: Iterable[kvm_cpuid_entry2]) -> None:
        """KVM_SET_CPUID2: what CPUID answers; before the first run."""
        self.vcpu.cpuid.set(
            CpuidLeaf(
                entry.function,
                entry.index if entry.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX else None,
                entry.eax,
                entry.ebx,
                entry.ecx,
                entry.edx,
            )
            for entry in entries
        )
        if self.vcpu.lapic is not None:
            cpuid = self.vcpu.cpuid
            self.vcpu.lapic.after_set_cpuid(cpuid.maxphyaddr(), cpuid.has_leaf(LEAF_FEATURES))

    def get_cpuid2(self) -> list[kvm_cpuid_entry2]:
        """KVM_GET_CPUID2: what `set_cpuid2` was given."""
        return cpuid_entries(self.vcpu.cpuid.leaves())

    def get_msrs(self, indices: Iterable[int]) -> dict[int, int]:
        """KVM_GET_MSRS: values by index, up to the first MSR there is none of."""
        values: dict[int, int] = {}
        for index in indices:
            value = self.vcpu.msrs.get(index, host_initiated=True)
            if value is None:
                break
            values[index] = value
        return values

    def set_msrs(self, values: Mapping[int, int]) -> int:
        """KVM_SET_MSRS, in order, up to the first that is refused; returns how many were set."""
        done = 0
        for index, value in values.items():
            if not self.vcpu.msrs.set(index, value, host_initiated=True):
                break
            done += 1
        return done


def cpuid_entries(leaves: Iterable[CpuidLeaf] | None = None) -> list[kvm_cpuid_entry2]:
    """Leaves as the ioctls have them; without any, what the model supports."""
    return [
        kvm_cpuid_entry2(
            function=leaf.function,
            index=leaf.subleaf or 0,
            flags=0 if leaf.subleaf is None else KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            eax=leaf.eax,
            ebx=leaf.ebx,
            ecx=leaf.ecx,
            edx=leaf.edx,
        )
        for leaf in (supported() if leaves is None else leaves)
    ]
