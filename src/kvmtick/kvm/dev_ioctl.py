"""The ioctls of the model's /dev/kvm (kvm_dev_ioctl, kvm_arch_dev_ioctl; api.rst, "System ioctls").

The capabilities are those of this model, not of the host's KVM: what it does has the value an
ordinary KVM gives, all else is 0.
"""

import errno
from collections.abc import Iterable
from ctypes import sizeof
from typing import TYPE_CHECKING, Final

from kvmtick.abi import caps, ioctls
from kvmtick.abi.errors import KvmError
from kvmtick.abi.structs import (
    KVM_API_VERSION,
    KVM_CLOCK_HOST_TSC,
    KVM_CLOCK_REALTIME,
    KVM_CLOCK_TSC_STABLE,
    KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
    KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK,
    KVM_X2APIC_API_USE_32BIT_IDS,
    KVM_X2APIC_DISABLE_SUPPRESS_EOI_BROADCAST,
    KVM_X2APIC_ENABLE_SUPPRESS_EOI_BROADCAST,
    kvm_cpuid2,
    kvm_cpuid_entry2,
)
from kvmtick.guests.needs import KVM_MAX_VCPUS
from kvmtick.irqchip.routing import KVM_MAX_IRQ_ROUTES
from kvmtick.kvm.api import Arg
from kvmtick.kvm.model_file import Handler
from kvmtick.kvm.user_memory import as_number, copy_to_user, get_struct
from kvmtick.vcpu.cpuid import CpuidLeaf, supported

if TYPE_CHECKING:
    from kvmtick.kvm.model import ModelSystem

__all__ = [
    "DEV_IOCTLS",
    "KVM_MAX_VCPUS",
    "KVM_MAX_VCPU_IDS",
    "SUPPRESS_EOI_BROADCAST",
    "VCPU_MMAP_BYTES",
    "X2APIC_API_VALID",
    "check_extension",
    "cpuid_entries",
    "put_cpuid2",
]

KVM_MAX_VCPU_IDS: Final = 4096

VCPU_MMAP_BYTES: Final = 3 * 4096
"""kvm_run, the data of port accesses, and the ring of coalesced MMIO, which stays empty."""

SUPPRESS_EOI_BROADCAST: Final = (
    KVM_X2APIC_ENABLE_SUPPRESS_EOI_BROADCAST | KVM_X2APIC_DISABLE_SUPPRESS_EOI_BROADCAST
)
X2APIC_API_VALID: Final = (
    KVM_X2APIC_API_USE_32BIT_IDS | KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK | SUPPRESS_EOI_BROADCAST
)

_CAPS: Final = {
    **dict.fromkeys(
        (
            caps.KVM_CAP_IRQCHIP,
            caps.KVM_CAP_USER_MEMORY,
            caps.KVM_CAP_NR_VCPUS,
            caps.KVM_CAP_PIT,
            caps.KVM_CAP_MP_STATE,
            caps.KVM_CAP_USER_NMI,
            caps.KVM_CAP_REINJECT_CONTROL,
            caps.KVM_CAP_IRQ_INJECT_STATUS,
            caps.KVM_CAP_IRQFD,
            caps.KVM_CAP_PIT2,
            caps.KVM_CAP_SET_BOOT_CPU_ID,
            caps.KVM_CAP_PIT_STATE2,
            caps.KVM_CAP_IOEVENTFD,
            caps.KVM_CAP_VCPU_EVENTS,
            caps.KVM_CAP_GET_TSC_KHZ,
            caps.KVM_CAP_TSC_DEADLINE_TIMER,
            caps.KVM_CAP_SIGNAL_MSI,
            caps.KVM_CAP_IRQFD_RESAMPLE,
            caps.KVM_CAP_IOAPIC_POLARITY_IGNORED,
            caps.KVM_CAP_ENABLE_CAP_VM,
            caps.KVM_CAP_CHECK_EXTENSION_VM,
            caps.KVM_CAP_SPLIT_IRQCHIP,
            caps.KVM_CAP_IMMEDIATE_EXIT,
            caps.KVM_CAP_X86_APIC_BUS_CYCLES_NS,
        ),
        1,
    ),
    caps.KVM_CAP_IRQ_ROUTING: KVM_MAX_IRQ_ROUTES,
    caps.KVM_CAP_ADJUST_CLOCK: KVM_CLOCK_TSC_STABLE | KVM_CLOCK_REALTIME | KVM_CLOCK_HOST_TSC,
    caps.KVM_CAP_MAX_VCPUS: KVM_MAX_VCPUS,
    caps.KVM_CAP_MAX_VCPU_ID: KVM_MAX_VCPU_IDS,
    caps.KVM_CAP_X2APIC_API: X2APIC_API_VALID,
}


def check_extension(cap: int) -> int:
    """`kvm_vm_ioctl_check_extension`, as the system answers it."""
    return _CAPS.get(cap, 0)


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


def put_cpuid2(arg: Arg, call: str, entries: list[kvm_cpuid_entry2]) -> int:
    """Answer a KVM_GET_*CPUID2. E2BIG: the caller has room for fewer entries."""
    if get_struct(arg, kvm_cpuid2).nent < len(entries):
        raise KvmError(errno.E2BIG, call)
    copy_to_user(arg, sizeof(kvm_cpuid2), b"".join(map(bytes, entries)))
    copy_to_user(arg, 0, bytes(kvm_cpuid2(nent=len(entries))))
    return 0


def _get_api_version(system: "ModelSystem", arg: Arg) -> int:
    if as_number(arg):
        raise KvmError(errno.EINVAL, "KVM_GET_API_VERSION")
    return KVM_API_VERSION


def _create_vm(system: "ModelSystem", arg: Arg) -> int:
    return system.create_vm(as_number(arg), ram_bytes=0).hand_out()


def _check_extension(system: "ModelSystem", arg: Arg) -> int:
    return check_extension(as_number(arg))


def _get_vcpu_mmap_size(system: "ModelSystem", arg: Arg) -> int:
    if as_number(arg):
        raise KvmError(errno.EINVAL, "KVM_GET_VCPU_MMAP_SIZE")
    return VCPU_MMAP_BYTES


def _get_supported_cpuid(system: "ModelSystem", arg: Arg) -> int:
    return put_cpuid2(arg, "KVM_GET_SUPPORTED_CPUID", cpuid_entries())


DEV_IOCTLS: Final[dict[int, Handler]] = {
    ioctls.KVM_GET_API_VERSION: _get_api_version,
    ioctls.KVM_CREATE_VM: _create_vm,
    ioctls.KVM_CHECK_EXTENSION: _check_extension,
    ioctls.KVM_GET_VCPU_MMAP_SIZE: _get_vcpu_mmap_size,
    ioctls.KVM_GET_SUPPORTED_CPUID: _get_supported_cpuid,
}
