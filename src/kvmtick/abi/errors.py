"""What a failed call raises: `KvmError` with the kernel's errno, `HostError` for a poor host."""

import errno as _errno
import os

__all__ = ["NO_IRQCHIP", "NO_VCPU", "HostError", "KvmError"]

_EEXIST, _EINVAL, _ENOENT, _ENXIO = _errno.EEXIST, _errno.EINVAL, _errno.ENOENT, _errno.ENXIO
_E2BIG = _errno.E2BIG

NO_IRQCHIP = "no in-kernel irqchip; call create_irqchip() first"
NO_VCPU = "the VM has no vCPU; call create_vcpu(0)"
_NO_PIT = "the VM has no PIT; call create_irqchip() and create_pit2() first"
_BAD_CHIP = "no such chip_id; 0 is the PIC master, 1 the PIC slave, 2 the IOAPIC"
_NO_DESCRIPTOR = "fd is no open descriptor; give one of os.eventfd()"
_NO_ROOM = "there are more entries than nent says there is room for; give more"
_MANY_MSRS = "fewer than 256 MSRs a call"
_NO_LAPIC = "no in-kernel local APIC; call create_irqchip() before create_vcpu()"

_WHY: dict[tuple[str, int], str] = {
    ("KVM_CREATE_VM", _EINVAL): "unknown machine type; use 0",
    ("KVM_SET_USER_MEMORY_REGION", _EEXIST): "it overlaps another slot; choose another gpa",
    ("KVM_SET_USER_MEMORY_REGION", _EINVAL): "gpa, size and address must be multiples of 4096"
    " bytes; to change what a slot has, delete it first",
    ("KVM_RUN", _errno.EFAULT): "guest memory went away; keep it open while the vCPU runs",
    ("KVM_RUN", _errno.EINTR): "a signal, a kick or kvm_run.immediate_exit; run it again",
    ("KVM_CREATE_IRQCHIP", _EEXIST): "the VM already has an irqchip; create it once",
    ("KVM_CREATE_IRQCHIP", _EINVAL): "a vCPU exists already; call create_irqchip() first",
    ("KVM_CREATE_PIT", _ENOENT): NO_IRQCHIP,
    ("KVM_CREATE_PIT2", _ENOENT): NO_IRQCHIP,
    ("KVM_CREATE_PIT", _EEXIST): "the VM already has a PIT; create it once",
    ("KVM_CREATE_PIT2", _EEXIST): "the VM already has a PIT; create it once",
    ("KVM_GET_PIT", _ENXIO): _NO_PIT,
    ("KVM_SET_PIT", _ENXIO): _NO_PIT,
    ("KVM_GET_PIT2", _ENXIO): _NO_PIT,
    ("KVM_SET_PIT2", _ENXIO): _NO_PIT,
    ("KVM_REINJECT_CONTROL", _ENXIO): _NO_PIT,
    ("KVM_GET_IRQCHIP", _ENXIO): NO_IRQCHIP,
    ("KVM_SET_IRQCHIP", _ENXIO): NO_IRQCHIP,
    ("KVM_GET_IRQCHIP", _EINVAL): _BAD_CHIP,
    ("KVM_SET_IRQCHIP", _EINVAL): _BAD_CHIP,
    ("KVM_IRQ_LINE", _ENXIO): NO_IRQCHIP,
    ("KVM_IRQ_LINE_STATUS", _ENXIO): NO_IRQCHIP,
    ("KVM_SET_GSI_ROUTING", _EINVAL): "no irqchip, or an entry's gsi, type, pin or flags is bad",
    ("KVM_CREATE_VCPU", _EEXIST): "the VM already has a vCPU of this id; choose another",
    ("KVM_CREATE_VCPU", _EINVAL): "vcpu_id is out of range; stay below KVM_CAP_MAX_VCPU_ID",
    ("KVM_GET_LAPIC", _EINVAL): _NO_LAPIC,
    ("KVM_SET_LAPIC", _EINVAL): _NO_LAPIC,
    ("KVM_SIGNAL_MSI", _EINVAL): "no irqchip, unknown flags, or an address no x2APIC id fits",
    ("KVM_SIGNAL_MSI", _errno.EPERM): "there is no vCPU to take it; call create_vcpu() first",
    ("KVM_IRQFD", _EINVAL): "no irqchip, unknown flags, or a descriptor that is no eventfd",
    ("KVM_IRQFD", _errno.EBADF): _NO_DESCRIPTOR,
    ("KVM_IRQFD", _errno.EBUSY): "this eventfd has a GSI already; use another eventfd",
    ("KVM_IOEVENTFD", _EINVAL): "len must be 0, 1, 2, 4 or 8 bytes, fd an eventfd, flags known",
    ("KVM_IOEVENTFD", _errno.EBADF): _NO_DESCRIPTOR,
    ("KVM_IOEVENTFD", _EEXIST): "this address, length and datamatch are taken",
    ("KVM_IOEVENTFD", _ENOENT): "no such ioeventfd; give what assigned it",
    ("KVM_SET_BOOT_CPU_ID", _errno.EBUSY): "a vCPU exists already; call it before create_vcpu()",
    ("KVM_SET_BOOT_CPU_ID", _EINVAL): "no such vCPU id; stay below KVM_CAP_MAX_VCPU_ID",
    ("KVM_INTERRUPT", _ENXIO): "the PICs are in the kernel; raise a line by irq_line()",
    ("KVM_INTERRUPT", _EEXIST): "one interrupt waits already; run the vCPU first",
    ("KVM_INTERRUPT", _EINVAL): "a vector is 0 to 255",
    ("KVM_ENABLE_CAP", _EINVAL): "not a capability to enable, or bad args or flags; see api.rst",
    ("KVM_ENABLE_CAP", _EEXIST): "an irqchip or a vCPU exists already; call it before them",
    ("KVM_ENABLE_CAP", _ENXIO): NO_IRQCHIP,
    ("KVM_SET_MP_STATE", _EINVAL): "no such state; without an irqchip only runnable (0)",
    ("KVM_SET_VCPU_EVENTS", _EINVAL): "unknown flags, or an exception that is none",
    ("KVM_SET_SREGS", _EINVAL): "cr0, cr3, cr4, efer, cs and apic_base do not fit each other",
    ("KVM_SET_CPUID2", _EINVAL): "it changes after the first run, or a leaf is impossible",
    ("KVM_SET_CPUID2", _E2BIG): "256 entries at most",
    ("KVM_GET_CPUID2", _E2BIG): _NO_ROOM,
    ("KVM_GET_SUPPORTED_CPUID", _E2BIG): _NO_ROOM,
    ("KVM_GET_MSRS", _E2BIG): _MANY_MSRS,
    ("KVM_SET_MSRS", _E2BIG): _MANY_MSRS,
    ("KVM_SET_CLOCK", _EINVAL): "unknown flags; KVM_CLOCK_* are known",
    ("KVM_SET_TSC_KHZ", _EINVAL): "a rate this host cannot give; or it is the VM's, with a vCPU",
    ("KVM_SET_TSS_ADDR", _EINVAL): "it must be below 4 GiB less three pages",
    ("KVM_SET_IDENTITY_MAP_ADDR", _EINVAL): "a vCPU exists already; call it before create_vcpu()",
    ("KVM_SET_VAPIC_ADDR", _EINVAL): "no in-kernel local APIC, or no guest RAM there",
}

_WHY_ANY: dict[int, str] = {
    _errno.EIO: "this is another process than the VM's; create the VM after fork()",
    _errno.ENOTTY: "this descriptor has no such ioctl; see kvmtick.abi.ioctls",
    _errno.EFAULT: "the argument is not all memory of this process; pass a structure or a buffer",
}
"""The same for any call."""


class KvmError(OSError):
    """A KVM call failed: `errno` as the kernel gives it, `call` names the ioctl.

    The message is one line, `KVM_CREATE_PIT2: ENOENT: what was wrong; the remedy`. Without `why`
    the usual reason for that errno of that call is told (api.rst), else the system's text.
    """

    call: str
    why: str

    def __init__(self, errno: int, call: str, why: str = "") -> None:
        self.call = call
        self.why = why or _WHY.get((call, errno)) or _WHY_ANY.get(errno) or os.strerror(errno)
        name = _errno.errorcode.get(errno, str(errno))
        super().__init__(errno, f"{call}: {name}: {self.why}")

    def __str__(self) -> str:
        return str(self.strerror)

    def __reduce__(self) -> tuple[type["KvmError"], tuple[int | None, str, str]]:
        return KvmError, (self.errno, self.call, self.why)


class HostError(Exception):
    """The host lacks what was asked for (exit code 3): `what` is missing, `remedy` mends it."""

    exit_code = 3
    what: str
    remedy: str

    def __init__(self, what: str, remedy: str = "") -> None:
        self.what = what
        self.remedy = remedy
        super().__init__(what, remedy)

    def __str__(self) -> str:
        return f"{self.what}; {self.remedy}" if self.remedy else self.what

    def or_else(self, alternative: str) -> "HostError":
        """The same, with one more remedy."""
        return HostError(self.what, f"{self.remedy}, or {alternative}".removeprefix(", or "))
