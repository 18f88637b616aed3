"""Request numbers of the KVM ioctls this project uses (<linux/kvm.h>, <asm-generic/ioctl.h>).

A request number packs direction, argument size, type and number. Where the header says `_IO`
for a call that takes a pointer (KVM_REINJECT_CONTROL), or swaps _IOR and _IOW (KVM_SET_PIT,
KVM_SET_IRQCHIP), that is the ABI and stays so.
"""

from ctypes import sizeof

from kvmtick.abi.structs import (
    KvmStruct,
    kvm_clock_data,
    kvm_cpuid2,
    kvm_debugregs,
    kvm_enable_cap,
    kvm_guest_debug,
    kvm_interrupt,
    kvm_ioeventfd,
    kvm_irq_level,
    kvm_irq_routing,
    kvm_irqchip,
    kvm_irqfd,
    kvm_lapic_state,
    kvm_mp_state,
    kvm_msi,
    kvm_msr_filter,
    kvm_msrs,
    kvm_pit_config,
    kvm_pit_state,
    kvm_pit_state2,
    kvm_regs,
    kvm_signal_mask,
    kvm_sregs,
    kvm_tpr_access_ctl,
    kvm_u64,
    kvm_userspace_memory_region,
    kvm_vapic_addr,
    kvm_vcpu_events,
)

__all__ = [
    "IOCTLS",
    "KVMIO",
    "KVM_CHECK_EXTENSION",
    "KVM_CREATE_IRQCHIP",
    "KVM_CREATE_PIT",
    "KVM_CREATE_PIT2",
    "KVM_CREATE_VCPU",
    "KVM_CREATE_VM",
    "KVM_ENABLE_CAP",
    "KVM_GET_API_VERSION",
    "KVM_GET_CLOCK",
    "KVM_GET_CPUID2",
    "KVM_GET_DEBUGREGS",
    "KVM_GET_IRQCHIP",
    "KVM_GET_LAPIC",
    "KVM_GET_MP_STATE",
    "KVM_GET_MSRS",
    "KVM_GET_PIT",
    "KVM_GET_PIT2",
    "KVM_GET_REGS",
    "KVM_GET_SREGS",
    "KVM_GET_SUPPORTED_CPUID",
    "KVM_GET_TSC_KHZ",
    "KVM_GET_VCPU_EVENTS",
    "KVM_GET_VCPU_MMAP_SIZE",
    "KVM_INTERRUPT",
    "KVM_IOEVENTFD",
    "KVM_IRQFD",
    "KVM_IRQ_LINE",
    "KVM_IRQ_LINE_STATUS",
    "KVM_NMI",
    "KVM_REINJECT_CONTROL",
    "KVM_RUN",
    "KVM_SET_BOOT_CPU_ID",
    "KVM_SET_CLOCK",
    "KVM_SET_CPUID2",
    "KVM_SET_DEBUGREGS",
    "KVM_SET_GSI_ROUTING",
    "KVM_SET_GUEST_DEBUG",
    "KVM_SET_IDENTITY_MAP_ADDR",
    "KVM_SET_IRQCHIP",
    "KVM_SET_LAPIC",
    "KVM_SET_MP_STATE",
    "KVM_SET_MSRS",
    "KVM_SET_PIT",
    "KVM_SET_PIT2",
    "KVM_SET_REGS",
    "KVM_SET_SIGNAL_MASK",
    "KVM_SET_SREGS",
    "KVM_SET_TSC_KHZ",
    "KVM_SET_TSS_ADDR",
    "KVM_SET_USER_MEMORY_REGION",
    "KVM_SET_VAPIC_ADDR",
    "KVM_SET_VCPU_EVENTS",
    "KVM_SIGNAL_MSI",
    "KVM_TPR_ACCESS_REPORTING",
    "KVM_X86_SET_MSR_FILTER",
    "io",
    "ioctl_name",
    "ior",
    "iow",
    "iowr",
]

_IOC_NONE, _IOC_WRITE, _IOC_READ = 0, 1, 2
_IOC_TYPESHIFT, _IOC_SIZESHIFT, _IOC_DIRSHIFT = 8, 16, 30
_IOC_SIZEMASK = (1 << 14) - 1


def _ioc(direction: int, type_: int, nr: int, size_bytes: int) -> int:
    return direction << _IOC_DIRSHIFT | size_bytes << _IOC_SIZESHIFT | type_ << _IOC_TYPESHIFT | nr


def io(type_: int, nr: int) -> int:
    """_IO: the argument is none, an integer, or a pointer the number says nothing about."""
    return _ioc(_IOC_NONE, type_, nr, 0)


def ior(type_: int, nr: int, arg: type[KvmStruct]) -> int:
    """_IOR: the kernel writes `arg`."""
    return _ioc(_IOC_READ, type_, nr, sizeof(arg))


def iow(type_: int, nr: int, arg: type[KvmStruct]) -> int:
    """_IOW: the kernel reads `arg`."""
    return _ioc(_IOC_WRITE, type_, nr, sizeof(arg))


def iowr(type_: int, nr: int, arg: type[KvmStruct]) -> int:
    """_IOWR: the kernel reads and writes `arg`."""
    return _ioc(_IOC_READ | _IOC_WRITE, type_, nr, sizeof(arg))


KVMIO = 0xAE

# on /dev/kvm
KVM_GET_API_VERSION = io(KVMIO, 0x00)
KVM_CREATE_VM = io(KVMIO, 0x01)
KVM_CHECK_EXTENSION = io(KVMIO, 0x03)
KVM_GET_VCPU_MMAP_SIZE = io(KVMIO, 0x04)
KVM_GET_SUPPORTED_CPUID = iowr(KVMIO, 0x05, kvm_cpuid2)

# on a VM
KVM_CREATE_VCPU = io(KVMIO, 0x41)
KVM_SET_USER_MEMORY_REGION = iow(KVMIO, 0x46, kvm_userspace_memory_region)
KVM_SET_TSS_ADDR = io(KVMIO, 0x47)
KVM_SET_IDENTITY_MAP_ADDR = iow(KVMIO, 0x48, kvm_u64)
KVM_CREATE_IRQCHIP = io(KVMIO, 0x60)
KVM_IRQ_LINE = iow(KVMIO, 0x61, kvm_irq_level)
KVM_GET_IRQCHIP = iowr(KVMIO, 0x62, kvm_irqchip)
KVM_SET_IRQCHIP = ior(KVMIO, 0x63, kvm_irqchip)
KVM_CREATE_PIT = io(KVMIO, 0x64)
KVM_GET_PIT = iowr(KVMIO, 0x65, kvm_pit_state)
KVM_SET_PIT = ior(KVMIO, 0x66, kvm_pit_state)
KVM_IRQ_LINE_STATUS = iowr(KVMIO, 0x67, kvm_irq_level)
KVM_SET_GSI_ROUTING = iow(KVMIO, 0x6A, kvm_irq_routing)
KVM_REINJECT_CONTROL = io(KVMIO, 0x71)
KVM_IRQFD = iow(KVMIO, 0x76, kvm_irqfd)
KVM_CREATE_PIT2 = iow(KVMIO, 0x77, kvm_pit_config)
KVM_SET_BOOT_CPU_ID = io(KVMIO, 0x78)
KVM_IOEVENTFD = iow(KVMIO, 0x79, kvm_ioeventfd)
KVM_SET_CLOCK = iow(KVMIO, 0x7B, kvm_clock_data)
KVM_GET_CLOCK = ior(KVMIO, 0x7C, kvm_clock_data)
KVM_GET_PIT2 = ior(KVMIO, 0x9F, kvm_pit_state2)
KVM_SET_PIT2 = iow(KVMIO, 0xA0, kvm_pit_state2)
KVM_SIGNAL_MSI = iow(KVMIO, 0xA5, kvm_msi)
KVM_X86_SET_MSR_FILTER = iow(KVMIO, 0xC6, kvm_msr_filter)

# on a vCPU
KVM_RUN = io(KVMIO, 0x80)
KVM_GET_REGS = ior(KVMIO, 0x81, kvm_regs)
KVM_SET_REGS = iow(KVMIO, 0x82, kvm_regs)
KVM_GET_SREGS = ior(KVMIO, 0x83, kvm_sregs)
KVM_SET_SREGS = iow(KVMIO, 0x84, kvm_sregs)
KVM_INTERRUPT = iow(KVMIO, 0x86, kvm_interrupt)
KVM_GET_MSRS = iowr(KVMIO, 0x88, kvm_msrs)
KVM_SET_MSRS = iow(KVMIO, 0x89, kvm_msrs)
KVM_SET_SIGNAL_MASK = iow(KVMIO, 0x8B, kvm_signal_mask)
KVM_GET_LAPIC = ior(KVMIO, 0x8E, kvm_lapic_state)
KVM_SET_LAPIC = iow(KVMIO, 0x8F, kvm_lapic_state)
KVM_SET_CPUID2 = iow(KVMIO, 0x90, kvm_cpuid2)
KVM_GET_CPUID2 = iowr(KVMIO, 0x91, kvm_cpuid2)
KVM_TPR_ACCESS_REPORTING = iowr(KVMIO, 0x92, kvm_tpr_access_ctl)
KVM_SET_VAPIC_ADDR = iow(KVMIO, 0x93, kvm_vapic_addr)
KVM_GET_MP_STATE = ior(KVMIO, 0x98, kvm_mp_state)
KVM_SET_MP_STATE = iow(KVMIO, 0x99, kvm_mp_state)
KVM_NMI = io(KVMIO, 0x9A)
KVM_SET_GUEST_DEBUG = iow(KVMIO, 0x9B, kvm_guest_debug)
KVM_GET_VCPU_EVENTS = ior(KVMIO, 0x9F, kvm_vcpu_events)
KVM_SET_VCPU_EVENTS = iow(KVMIO, 0xA0, kvm_vcpu_events)
KVM_GET_DEBUGREGS = ior(KVMIO, 0xA1, kvm_debugregs)
KVM_SET_DEBUGREGS = iow(KVMIO, 0xA2, kvm_debugregs)

# on a VM or a vCPU
KVM_SET_TSC_KHZ = io(KVMIO, 0xA2)
KVM_ENABLE_CAP = iow(KVMIO, 0xA3, kvm_enable_cap)
KVM_GET_TSC_KHZ = io(KVMIO, 0xA3)

IOCTLS: dict[str, int] = {
    name: number
    for name, number in globals().items()
    if name.startswith("KVM_") and isinstance(number, int)
}
"""All of the above by name."""

_NAMES = {number: name for name, number in IOCTLS.items()}


def argument_bytes(request: int) -> int:
    """The size of the argument that is part of a request number (_IOC_SIZE)."""
    return request >> _IOC_SIZESHIFT & _IOC_SIZEMASK


def ioctl_name(request: int) -> str:
    """The kernel's name of a request number, or the number in hexadecimal."""
    return _NAMES.get(request, f"ioctl {request:#x}")
