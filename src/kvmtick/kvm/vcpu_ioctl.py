"""The ioctls of a model's vCPU (kvm_vcpu_ioctl, kvm_arch_vcpu_ioctl; api.rst, "vcpu ioctls").

Each handler does what the kernel's function of its name does, in the kernel's order of checks.

Not modelled: KVM_TPR_ACCESS_REPORTING and KVM_SET_VAPIC_ADDR are checked, and no access to the TPR
is reported or put off; KVM_ENABLE_CAP knows no capability; the MSRs that `kvmtick.vcpu.msr` does
not model.
"""

import errno
from collections.abc import Iterable
from ctypes import sizeof
from typing import TYPE_CHECKING, Final

from kvmtick.abi import ioctls
from kvmtick.abi.errors import KvmError
from kvmtick.abi.structs import (
    KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
    kvm_cpuid2,
    kvm_cpuid_entry2,
    kvm_enable_cap,
    kvm_interrupt,
    kvm_lapic_state,
    kvm_mp_state,
    kvm_msr_entry,
    kvm_msrs,
    kvm_regs,
    kvm_signal_mask,
    kvm_sregs,
    kvm_tpr_access_ctl,
    kvm_vapic_addr,
    kvm_vcpu_events,
)
from kvmtick.irqchip.lapic import Lapic
from kvmtick.kvm.api import MAX_CPUID_ENTRIES, Arg
from kvmtick.kvm.dev_ioctl import cpuid_entries, put_cpuid2
from kvmtick.kvm.model_file import Handler
from kvmtick.kvm.registers import get_regs, get_sregs, set_regs, set_sregs
from kvmtick.kvm.user_memory import (
    as_number,
    copy_from_user,
    copy_to_user,
    get_struct,
    put_struct,
)
from kvmtick.kvm.vcpu_events import get_vcpu_events, set_vcpu_events
from kvmtick.vcpu.cpuid import LEAF_ADDRESS_SIZES, LEAF_FEATURES, CpuidLeaf
from kvmtick.vcpu.vcpu import MpState

if TYPE_CHECKING:
    from kvmtick.kvm.model_vcpu import ModelVcpu

__all__ = ["VCPU_IOCTLS"]

NR_VECTORS: Final = 256
MAX_IO_MSRS: Final = 256
"""KVM_GET_MSRS and KVM_SET_MSRS take fewer."""
SIGSET_BYTES: Final = 8
VAPIC_BYTES: Final = 4
TSC_TOLERANCE_PPM: Final = 250
"""KVM's parameter `tsc_tolerance_ppm`: so much slower needs no scaling."""

_U32 = 0xFFFF_FFFF

_MP_STATES = frozenset(MpState)


# Running.


def _run(vcpu: "ModelVcpu", arg: Arg) -> int:
    if as_number(arg):
        raise KvmError(errno.EINVAL, "KVM_RUN")
    vcpu.enter()
    return 0


def _set_signal_mask(vcpu: "ModelVcpu", arg: Arg) -> int:
    if not as_number(arg):
        vcpu.signal_mask = None
        return 0
    head = get_struct(arg, kvm_signal_mask)
    if head.len != SIGSET_BYTES:
        raise KvmError(errno.EINVAL, "KVM_SET_SIGNAL_MASK")
    sigset = copy_from_user(arg, sizeof(head), SIGSET_BYTES)
    vcpu.signal_mask = int.from_bytes(sigset, "little")
    return 0


# Registers.


def _get_regs(vcpu: "ModelVcpu", arg: Arg) -> int:
    put_struct(arg, get_regs(vcpu.vcpu))
    return 0


def _set_regs(vcpu: "ModelVcpu", arg: Arg) -> int:
    set_regs(vcpu.vcpu, get_struct(arg, kvm_regs))
    return 0


def _get_sregs(vcpu: "ModelVcpu", arg: Arg) -> int:
    put_struct(arg, get_sregs(vcpu.vcpu))
    return 0


def _set_sregs(vcpu: "ModelVcpu", arg: Arg) -> int:
    set_sregs(vcpu.vcpu, get_struct(arg, kvm_sregs))
    return 0


def _get_msrs(vcpu: "ModelVcpu", arg: Arg) -> int:
    entries, done = _msr_entries(arg, "KVM_GET_MSRS"), 0
    for entry in entries:
        value = vcpu.vcpu.msrs.get(entry.index, host_initiated=True)
        if value is None:
            break
        entry.data = value
        done += 1
    copy_to_user(arg, sizeof(kvm_msrs), b"".join(map(bytes, entries)))
    return done


def _set_msrs(vcpu: "ModelVcpu", arg: Arg) -> int:
    done = 0
    for entry in _msr_entries(arg, "KVM_SET_MSRS"):
        if not vcpu.vcpu.msrs.set(entry.index, entry.data, host_initiated=True):
            break
        done += 1
    return done


def _msr_entries(arg: Arg, call: str) -> list[kvm_msr_entry]:
    """`msr_io`: a copy of the entries."""
    count = get_struct(arg, kvm_msrs).nmsrs
    if count >= MAX_IO_MSRS:
        raise KvmError(errno.E2BIG, call)
    data = copy_from_user(arg, sizeof(kvm_msrs), count * sizeof(kvm_msr_entry))
    return list((kvm_msr_entry * count).from_buffer_copy(data))


def _set_cpuid2(vcpu: "ModelVcpu", arg: Arg) -> int:
    count = get_struct(arg, kvm_cpuid2).nent
    if count > MAX_CPUID_ENTRIES:
        raise KvmError(errno.E2BIG, "KVM_SET_CPUID2")
    data = copy_from_user(arg, sizeof(kvm_cpuid2), count * sizeof(kvm_cpuid_entry2))
    leaves = _leaves((kvm_cpuid_entry2 * count).from_buffer_copy(data))
    cpuid, lapic = vcpu.vcpu.cpuid, vcpu.vcpu.lapic
    changed_late = vcpu.vcpu.has_run and leaves != cpuid.leaves()
    if changed_late or any(_has_odd_addresses(leaf) for leaf in leaves):
        raise KvmError(errno.EINVAL, "KVM_SET_CPUID2")
    cpuid.set(leaves)
    if lapic is not None:
        lapic.after_set_cpuid(cpuid.maxphyaddr(), cpuid.has_leaf(LEAF_FEATURES))
    return 0


def _has_odd_addresses(leaf: CpuidLeaf) -> bool:
    """`kvm_check_cpuid`: page tables have four levels or five."""
    return leaf.function == LEAF_ADDRESS_SIZES and leaf.eax >> 8 & 0xFF not in (0, 48, 57)


def _get_cpuid2(vcpu: "ModelVcpu", arg: Arg) -> int:
    return put_cpuid2(arg, "KVM_GET_CPUID2", cpuid_entries(vcpu.vcpu.cpuid.leaves()))


def _leaves(entries: Iterable[kvm_cpuid_entry2]) -> list[CpuidLeaf]:
    return [
        CpuidLeaf(
            entry.function,
            entry.index if entry.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX else None,
            entry.eax,
            entry.ebx,
            entry.ecx,
            entry.edx,
        )
        for entry in entries
    ]


# Interrupts.


def _interrupt(vcpu: "ModelVcpu", arg: Arg) -> int:
    """`kvm_vcpu_ioctl_interrupt`."""
    vector, inner = get_struct(arg, kvm_interrupt).irq, vcpu.vcpu
    if vector >= NR_VECTORS:
        raise KvmError(errno.EINVAL, "KVM_INTERRUPT")
    if inner.lapic is None:
        inner.queue_interrupt(vector)
        return 0
    if inner.has_kernel_pic:
        raise KvmError(errno.ENXIO, "KVM_INTERRUPT")
    if inner.pending_external_vector >= 0:
        raise KvmError(errno.EEXIST, "KVM_INTERRUPT")
    inner.pending_external_vector = vector
    inner.request_event()
    return 0


def _nmi(vcpu: "ModelVcpu", arg: Arg) -> int:
    vcpu.vcpu.queue_nmi()
    return 0


def _get_lapic(vcpu: "ModelVcpu", arg: Arg) -> int:
    lapic = _lapic(vcpu, "KVM_GET_LAPIC")
    put_struct(arg, kvm_lapic_state.from_buffer_copy(lapic.save()))
    return 0


def _set_lapic(vcpu: "ModelVcpu", arg: Arg) -> int:
    lapic = _lapic(vcpu, "KVM_SET_LAPIC")
    lapic.restore(bytes(get_struct(arg, kvm_lapic_state)))
    return 0


def _lapic(vcpu: "ModelVcpu", call: str) -> Lapic:
    lapic = vcpu.vcpu.lapic
    if lapic is None:
        raise KvmError(errno.EINVAL, call)
    return lapic


def _get_vcpu_events(vcpu: "ModelVcpu", arg: Arg) -> int:
    put_struct(arg, get_vcpu_events(vcpu.vcpu))
    return 0


def _set_vcpu_events(vcpu: "ModelVcpu", arg: Arg) -> int:
    set_vcpu_events(vcpu.vcpu, get_struct(arg, kvm_vcpu_events))
    return 0


def _get_mp_state(vcpu: "ModelVcpu", arg: Arg) -> int:
    """`kvm_arch_vcpu_ioctl_get_mpstate`."""
    inner = vcpu.vcpu
    inner.accept_events()
    mp_state = int(inner.mp_state)
    halted = mp_state in (MpState.HALTED, MpState.AP_RESET_HOLD)
    if halted and inner.lapic is not None and inner.lapic.pv_unhalted:
        mp_state = int(MpState.RUNNABLE)
    put_struct(arg, kvm_mp_state(mp_state=mp_state))
    return 0


def _set_mp_state(vcpu: "ModelVcpu", arg: Arg) -> int:
    """`kvm_arch_vcpu_ioctl_set_mpstate`."""
    mp_state, inner = get_struct(arg, kvm_mp_state).mp_state, vcpu.vcpu
    without_lapic = inner.lapic is None and mp_state != MpState.RUNNABLE
    if mp_state not in _MP_STATES or without_lapic:
        raise KvmError(errno.EINVAL, "KVM_SET_MP_STATE")
    inner.set_mp_state(mp_state)
    return 0


def _tpr_access_reporting(vcpu: "ModelVcpu", arg: Arg) -> int:
    control = get_struct(arg, kvm_tpr_access_ctl)
    if control.flags:
        raise KvmError(errno.EINVAL, "KVM_TPR_ACCESS_REPORTING")
    put_struct(arg, control)
    return 0


def _set_vapic_addr(vcpu: "ModelVcpu", arg: Arg) -> int:
    _lapic(vcpu, "KVM_SET_VAPIC_ADDR")
    gpa = get_struct(arg, kvm_vapic_addr).vapic_addr
    if gpa and not vcpu.is_ram(gpa, VAPIC_BYTES):
        raise KvmError(errno.EINVAL, "KVM_SET_VAPIC_ADDR")
    return 0


# Time and capabilities.


def _get_tsc_khz(vcpu: "ModelVcpu", arg: Arg) -> int:
    return vcpu.vcpu.tsc_khz


def _set_tsc_khz(vcpu: "ModelVcpu", arg: Arg) -> int:
    """`kvm_set_tsc_khz` of a host without TSC scaling: no rate below its own (250 ppm aside)."""
    khz = as_number(arg) & _U32 or vcpu.host_tsc_khz
    if khz < vcpu.host_tsc_khz * (1_000_000 - TSC_TOLERANCE_PPM) // 1_000_000:
        raise KvmError(errno.EINVAL, "KVM_SET_TSC_KHZ")
    vcpu.vcpu.set_tsc_khz(khz)
    return 0


def _enable_cap(vcpu: "ModelVcpu", arg: Arg) -> int:
    get_struct(arg, kvm_enable_cap)
    raise KvmError(errno.EINVAL, "KVM_ENABLE_CAP")


VCPU_IOCTLS: Final[dict[int, Handler]] = {
    ioctls.KVM_RUN: _run,
    ioctls.KVM_SET_SIGNAL_MASK: _set_signal_mask,
    ioctls.KVM_GET_REGS: _get_regs,
    ioctls.KVM_SET_REGS: _set_regs,
    ioctls.KVM_GET_SREGS: _get_sregs,
    ioctls.KVM_SET_SREGS: _set_sregs,
    ioctls.KVM_GET_MSRS: _get_msrs,
    ioctls.KVM_SET_MSRS: _set_msrs,
    ioctls.KVM_SET_CPUID2: _set_cpuid2,
    ioctls.KVM_GET_CPUID2: _get_cpuid2,
    ioctls.KVM_INTERRUPT: _interrupt,
    ioctls.KVM_NMI: _nmi,
    ioctls.KVM_GET_LAPIC: _get_lapic,
    ioctls.KVM_SET_LAPIC: _set_lapic,
    ioctls.KVM_GET_VCPU_EVENTS: _get_vcpu_events,
    ioctls.KVM_SET_VCPU_EVENTS: _set_vcpu_events,
    ioctls.KVM_GET_MP_STATE: _get_mp_state,
    ioctls.KVM_SET_MP_STATE: _set_mp_state,
    ioctls.KVM_TPR_ACCESS_REPORTING: _tpr_access_reporting,
    ioctls.KVM_SET_VAPIC_ADDR: _set_vapic_addr,
    ioctls.KVM_GET_TSC_KHZ: _get_tsc_khz,
    ioctls.KVM_SET_TSC_KHZ: _set_tsc_khz,
    ioctls.KVM_ENABLE_CAP: _enable_cap,
}
