"""A vCPU of the model behind KVM's calls: `ModelVcpu`.

Each method is one vCPU ioctl of Documentation/virt/kvm/api.rst, with the kernel's errno in
`KvmError`.

Not modelled: the MSRs that `kvmtick.vcpu.msr` does not model.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Mapping

from kvmtick.abi.errors import KvmError
from kvmtick.abi.structs import (
    KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
    kvm_cpuid_entry2,
    kvm_lapic_state,
    kvm_regs,
    kvm_sregs,
    kvm_vcpu_events,
)
from kvmtick.irqchip.lapic import Lapic
from kvmtick.kvm.registers import get_regs, get_sregs, set_regs, set_sregs
from kvmtick.kvm.vcpu_events import get_vcpu_events, set_vcpu_events
from kvmtick.machine.board import Board
from kvmtick.vcpu.cpuid import LEAF_FEATURES, CpuidLeaf, supported
from kvmtick.vcpu.vcpu import MpState, Vcpu

__all__ = ["ModelVcpu", "cpuid_entries"]

NR_VECTORS = 256


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
        return get_regs(self.vcpu)

    def set_regs(self, regs: kvm_regs) -> None:
        """KVM_SET_REGS."""
        set_regs(self.vcpu, regs)

    def get_sregs(self) -> kvm_sregs:
        """KVM_GET_SREGS."""
        return get_sregs(self.vcpu)

    def set_sregs(self, sregs: kvm_sregs) -> None:
        """KVM_SET_SREGS. EINVAL: the registers contradict each other."""
        set_sregs(self.vcpu, sregs)

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
        return get_vcpu_events(self.vcpu)

    def set_vcpu_events(self, events: kvm_vcpu_events) -> None:
        """KVM_SET_VCPU_EVENTS. EINVAL: unknown flags, or an exception that is none."""
        set_vcpu_events(self.vcpu, events)

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
