"""KVM's calls, one method an ioctl, the same on every back end: `System`, `Vm`, `Vcpu`.

The methods here do nothing but build the argument of Documentation/virt/kvm/api.rst and read the
answer; each stands on `ioctl`, which the back ends provide (`kvmtick.kvm.model` and `model_vcpu`,
`kvmtick.kvm.kernel`). What an ioctl refuses is a `KvmError` with the kernel's errno, checked in the
kernel's order.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Generic, TypeAlias, TypeVar

from kvmtick.abi import ioctls
from kvmtick.abi.closing import Closing
from kvmtick.abi.exits import Exit
from kvmtick.abi.structs import (
    KvmStruct,
    kvm_clock_data,
    kvm_cpuid2,
    kvm_cpuid_entry2,
    kvm_enable_cap,
    kvm_interrupt,
    kvm_ioeventfd,
    kvm_irq_level,
    kvm_irq_routing_entry,
    kvm_irqchip,
    kvm_irqfd,
    kvm_lapic_state,
    kvm_mp_state,
    kvm_msi,
    kvm_msr_entry,
    kvm_pit_config,
    kvm_pit_state,
    kvm_pit_state2,
    kvm_regs,
    kvm_reinject_control,
    kvm_run,
    kvm_sregs,
    kvm_tpr_access_ctl,
    kvm_u64,
    kvm_userspace_memory_region,
    kvm_vapic_addr,
    kvm_vcpu_events,
    make_cpuid2,
    make_irq_routing,
    make_msrs,
)
from kvmtick.guests import DEFAULT_NEEDS, Guest, Needs, Parameters
from kvmtick.kvm.setup import prepare
from kvmtick.kvm.state import VmState
from kvmtick.kvm.told import Told
from kvmtick.machine.ports import PortHandler
from kvmtick.machine.run import Run

__all__ = ["DEFAULT_RUN_LIMIT_S", "MAX_CPUID_ENTRIES", "Arg", "System", "Vcpu", "Vm"]

Arg: TypeAlias = int | KvmStruct | bytearray
"""What an ioctl takes: a number or a raw address, or something whose address is passed."""

DEFAULT_RUN_LIMIT_S = 60.0
"""Wall seconds a `Vm.run` may take when the caller names no limit."""

DEFAULT_VCPU_LIMIT_S = 10.0
"""The same for one KVM_RUN."""

MAX_CPUID_ENTRIES = 256
"""KVM_MAX_CPUID_ENTRIES: a kernel takes and gives no more."""

_U32 = 0xFFFF_FFFF
_CPUID_HEAD_BYTES, _CPUID_ENTRY_BYTES = len(bytes(kvm_cpuid2())), len(bytes(kvm_cpuid_entry2()))
_MSRS_HEAD_BYTES, _MSR_ENTRY_BYTES = 8, 16

_S = TypeVar("_S", bound=KvmStruct)


class Ioctls(Closing):
    """Something that takes ioctls."""

    @abstractmethod
    def ioctl(self, request: int, arg: Arg = 0) -> int:
        """ioctl(2). `arg`: the number itself, or the address of an argument; or a structure or
        buffer, whose address is passed and which the call may change.

        Raises `KvmError` with the kernel's errno: EFAULT where an address is not this process's.
        """

    @abstractmethod
    def fileno(self) -> int:
        """The descriptor, -1 after `close`; the model's is an empty file that stands for it."""

    def _get(self, request: int, struct: type[_S]) -> _S:
        out = struct()
        self.ioctl(request, out)
        return out

    def _get_cpuid2(self, request: int) -> list[kvm_cpuid_entry2]:
        data = bytearray(_CPUID_HEAD_BYTES + MAX_CPUID_ENTRIES * _CPUID_ENTRY_BYTES)
        data[:4] = MAX_CPUID_ENTRIES.to_bytes(4, "little")
        self.ioctl(request, data)
        count = int.from_bytes(data[:4], "little")
        return [
            kvm_cpuid_entry2.from_buffer_copy(data, _CPUID_HEAD_BYTES + at * _CPUID_ENTRY_BYTES)
            for at in range(count)
        ]

    def _enable_cap(self, cap: int, args: Iterable[int], flags: int) -> None:
        enable = kvm_enable_cap(cap=cap, flags=flags)
        for index, arg in enumerate(args):
            enable.args[index] = arg
        self.ioctl(ioctls.KVM_ENABLE_CAP, enable)


class System(Ioctls):
    """/dev/kvm, or what stands for it (api.rst, "System ioctls")."""

    backend: str

    @abstractmethod
    def create_vm(
        self,
        machine_type: int = 0,
        *,
        ram_bytes: int = DEFAULT_NEEDS.ram_bytes,
        clock: str | None = None,
        seed: int = 0,
        min_timer_period_us: int | None = None,
    ) -> "Vm[Any]":
        """KVM_CREATE_VM: a VM with `ram_bytes` of RAM at guest-physical 0 in slot 0 (0: none).

        `clock` is `virtual` or `real`, None what the back end has (model: virtual); `seed` is for
        what is random in the model; `min_timer_period_us` is the module parameter of kvm (None:
        200), 0 lets periodic timers run as fast as the guest asks. EINVAL: no such machine type.
        ValueError: no such clock here, `ram_bytes` not in pages or above 3 GiB, or a
        `min_timer_period_us` for the kernel, whose administrator sets it.
        """

    def get_api_version(self) -> int:
        """KVM_GET_API_VERSION: 12."""
        return self.ioctl(ioctls.KVM_GET_API_VERSION)

    def check_extension(self, cap: int) -> int:
        """KVM_CHECK_EXTENSION: 0 means no; other values as api.rst says."""
        return self.ioctl(ioctls.KVM_CHECK_EXTENSION, cap)

    def get_vcpu_mmap_size(self) -> int:
        """KVM_GET_VCPU_MMAP_SIZE: bytes of the area shared with a vCPU."""
        return self.ioctl(ioctls.KVM_GET_VCPU_MMAP_SIZE)

    def get_supported_cpuid(self) -> list[kvm_cpuid_entry2]:
        """KVM_GET_SUPPORTED_CPUID: what a vCPU's `set_cpuid2` may be given."""
        return self._get_cpuid2(ioctls.KVM_GET_SUPPORTED_CPUID)


class Vcpu(Ioctls):
    """One vCPU (api.rst, "vcpu ioctls")."""

    vcpu_id: int

    # Running.

    @property
    @abstractmethod
    def area(self) -> kvm_run:
        """The kvm_run that user space and KVM share. EBADF: the vCPU was closed."""

    @abstractmethod
    def run(self, limit_s: float = DEFAULT_VCPU_LIMIT_S) -> Exit:
        """KVM_RUN to the next exit, at most `limit_s` wall seconds (`ExitIntr("time")`).

        Signals for others do not end it. EFAULT: guest memory is gone. EIO: another process's VM.
        """

    @abstractmethod
    def kick(self) -> None:
        """End the `run` under way, or the next one, with `ExitIntr("kick")`; any thread may."""

    @abstractmethod
    def answer(self, data: bytes) -> None:
        """Give the bytes of the read that the last exit asked for, before the next `run`.

        ValueError: it was no read, or the size is wrong.
        """

    @abstractmethod
    def close(self) -> None:
        """Give the vCPU back; harmless when repeated. A `run` of another thread's ends with EBADF,
        and only then everything is given back.
        """

    # Registers.

    @abstractmethod
    def start_at(self, cs: int, ip: int, registers: Mapping[str, int] | None = None) -> None:
        """Real mode at `cs`:`ip`, or the state that `registers` make of it (`Guest.start`); and
        runnable, whatever it waited for (KVM_SET_SREGS, KVM_SET_REGS, KVM_SET_MP_STATE).
        """

    def get_regs(self) -> kvm_regs:
        """KVM_GET_REGS."""
        return self._get(ioctls.KVM_GET_REGS, kvm_regs)

    def set_regs(self, regs: kvm_regs) -> None:
        """KVM_SET_REGS."""
        self.ioctl(ioctls.KVM_SET_REGS, regs)

    def get_sregs(self) -> kvm_sregs:
        """KVM_GET_SREGS."""
        return self._get(ioctls.KVM_GET_SREGS, kvm_sregs)

    def set_sregs(self, sregs: kvm_sregs) -> None:
        """KVM_SET_SREGS. EINVAL: the registers contradict each other."""
        self.ioctl(ioctls.KVM_SET_SREGS, sregs)

    def get_msrs(self, indices: Iterable[int]) -> dict[int, int]:
        """KVM_GET_MSRS: values by index, up to the first MSR there is none of. E2BIG: over 255."""
        data = make_msrs(kvm_msr_entry(index=index) for index in indices)
        read = self.ioctl(ioctls.KVM_GET_MSRS, data)
        entries = (
            kvm_msr_entry.from_buffer_copy(data, _MSRS_HEAD_BYTES + at * _MSR_ENTRY_BYTES)
            for at in range(read)
        )
        return {entry.index: entry.data for entry in entries}

    def set_msrs(self, values: Mapping[int, int]) -> int:
        """KVM_SET_MSRS, in order, up to the first that is refused; returns how many were set.
        E2BIG: over 255.
        """
        entries = (kvm_msr_entry(index=index, data=value) for index, value in values.items())
        return self.ioctl(ioctls.KVM_SET_MSRS, make_msrs(entries))

    def set_cpuid2(self, entries: Iterable[kvm_cpuid_entry2]) -> None:
        """KVM_SET_CPUID2: what CPUID answers. E2BIG: too many. EINVAL: changed after a run."""
        self.ioctl(ioctls.KVM_SET_CPUID2, make_cpuid2(entries))

    def get_cpuid2(self) -> list[kvm_cpuid_entry2]:
        """KVM_GET_CPUID2: what `set_cpuid2` set, as KVM keeps it."""
        return self._get_cpuid2(ioctls.KVM_GET_CPUID2)

    # Interrupts.

    def interrupt(self, irq: int) -> None:
        """KVM_INTERRUPT: queue an external interrupt of vector `irq`.

        EINVAL: above 255. ENXIO: the PICs are in the kernel. EEXIST: one waits (split irqchip).
        """
        self.ioctl(ioctls.KVM_INTERRUPT, kvm_interrupt(irq=irq & _U32))

    def nmi(self) -> None:
        """KVM_NMI: make an NMI pending; two at most wait."""
        self.ioctl(ioctls.KVM_NMI)

    def get_lapic(self) -> kvm_lapic_state:
        """KVM_GET_LAPIC. EINVAL: no in-kernel local APIC."""
        return self._get(ioctls.KVM_GET_LAPIC, kvm_lapic_state)

    def set_lapic(self, lapic: kvm_lapic_state) -> None:
        """KVM_SET_LAPIC. EINVAL: no in-kernel local APIC, or an id that is not the vCPU's."""
        self.ioctl(ioctls.KVM_SET_LAPIC, lapic)

    def get_vcpu_events(self) -> kvm_vcpu_events:
        """KVM_GET_VCPU_EVENTS."""
        return self._get(ioctls.KVM_GET_VCPU_EVENTS, kvm_vcpu_events)

    def set_vcpu_events(self, events: kvm_vcpu_events) -> None:
        """KVM_SET_VCPU_EVENTS. EINVAL: unknown flags, or an exception that is none."""
        self.ioctl(ioctls.KVM_SET_VCPU_EVENTS, events)

    def get_mp_state(self) -> int:
        """KVM_GET_MP_STATE: a KVM_MP_STATE_* value."""
        return self._get(ioctls.KVM_GET_MP_STATE, kvm_mp_state).mp_state

    def set_mp_state(self, mp_state: int) -> None:
        """KVM_SET_MP_STATE. EINVAL: not runnable and no in-kernel irqchip, or unknown."""
        self.ioctl(ioctls.KVM_SET_MP_STATE, kvm_mp_state(mp_state=mp_state & _U32))

    def tpr_access_reporting(self, enabled: bool) -> None:
        """KVM_TPR_ACCESS_REPORTING."""
        self.ioctl(ioctls.KVM_TPR_ACCESS_REPORTING, kvm_tpr_access_ctl(enabled=int(enabled)))

    def set_vapic_addr(self, gpa: int) -> None:
        """KVM_SET_VAPIC_ADDR. EINVAL: no in-kernel local APIC."""
        self.ioctl(ioctls.KVM_SET_VAPIC_ADDR, kvm_vapic_addr(vapic_addr=gpa))

    # Time and capabilities.

    def get_tsc_khz(self) -> int:
        """KVM_GET_TSC_KHZ: what the guest's TSC counts a millisecond."""
        return self.ioctl(ioctls.KVM_GET_TSC_KHZ)

    def set_tsc_khz(self, khz: int) -> None:
        """KVM_SET_TSC_KHZ; 0: the host's. EINVAL: a rate this host cannot give."""
        self.ioctl(ioctls.KVM_SET_TSC_KHZ, khz)

    def enable_cap(self, cap: int, *args: int, flags: int = 0) -> None:
        """KVM_ENABLE_CAP of the vCPU. EINVAL: not to be enabled, or bad `args` or `flags`."""
        self._enable_cap(cap, args, flags)


_V = TypeVar("_V", bound=Vcpu, covariant=True)


class Vm(Ioctls, Generic[_V]):
    """One VM (api.rst, "VM ioctls"), with RAM at guest-physical 0. A context manager."""

    backend: str
    told: Told
    """What KVM cannot be asked; the back ends note every ioctl that succeeds."""

    # Making it.

    def check_extension(self, cap: int) -> int:
        """KVM_CHECK_EXTENSION of this VM; 0: absent."""
        return self.ioctl(ioctls.KVM_CHECK_EXTENSION, cap)

    def enable_cap(self, cap: int, *args: int, flags: int = 0) -> None:
        """KVM_ENABLE_CAP; `cap`: KVM_CAP_*. EINVAL: not to be enabled, or bad `args` or `flags`.

        KVM_CAP_SPLIT_IRQCHIP (pins): EEXIST: an irqchip or a vCPU. KVM_CAP_X2APIC_API (flags).
        KVM_CAP_X86_APIC_BUS_CYCLES_NS (ns): ENXIO: no irqchip; EINVAL: a vCPU.
        """
        self._enable_cap(cap, args, flags)

    def set_user_memory_region(
        self, slot: int, gpa: int, size_bytes: int, userspace_addr: int, flags: int = 0
    ) -> None:
        """KVM_SET_USER_MEMORY_REGION: memory of this process as guest RAM; size 0 takes it away.

        The memory must stay mapped as long as the slot. EINVAL: not page aligned, unknown flags,
        or it wraps. EEXIST: it overlaps another slot.
        """
        region = kvm_userspace_memory_region(
            slot=slot,
            flags=flags,
            guest_phys_addr=gpa,
            memory_size=size_bytes,
            userspace_addr=userspace_addr,
        )
        self.ioctl(ioctls.KVM_SET_USER_MEMORY_REGION, region)

    def set_tss_addr(self, gpa: int) -> None:
        """KVM_SET_TSS_ADDR. EINVAL: not below 4 GiB less three pages."""
        self.ioctl(ioctls.KVM_SET_TSS_ADDR, gpa)

    def set_identity_map_addr(self, gpa: int) -> None:
        """KVM_SET_IDENTITY_MAP_ADDR. EINVAL: a vCPU exists."""
        self.ioctl(ioctls.KVM_SET_IDENTITY_MAP_ADDR, kvm_u64(value=gpa))

    def set_boot_cpu_id(self, vcpu_id: int) -> None:
        """KVM_SET_BOOT_CPU_ID: which vCPU starts by itself. EBUSY: a vCPU exists. EINVAL: id."""
        self.ioctl(ioctls.KVM_SET_BOOT_CPU_ID, vcpu_id)

    @property
    @abstractmethod
    def vcpus(self) -> list[_V]:
        """The vCPUs made so far, oldest first."""

    @abstractmethod
    def create_vcpu(self, vcpu_id: int = 0) -> _V:
        """KVM_CREATE_VCPU. EEXIST: the id is taken. EINVAL: it is out of range."""

    @abstractmethod
    def get_supported_cpuid(self) -> list[kvm_cpuid_entry2]:
        """KVM_GET_SUPPORTED_CPUID of the system this VM is of."""

    def prepare(self, needs: Needs, reinject: bool = True) -> list[_V]:
        """Set up what a guest needs (`Guest.needs`): irqchip, PIT, routing, vCPUs, their CPUID.

        `reinject` is KVM_REINJECT_CONTROL, unless the guest leaves no choice.
        """
        return prepare(self, needs, reinject)

    # The irqchip.

    def create_irqchip(self) -> None:
        """KVM_CREATE_IRQCHIP: two PICs, an IOAPIC, and a local APIC for every later vCPU.

        EEXIST: it has one. EINVAL: a vCPU exists.
        """
        self.ioctl(ioctls.KVM_CREATE_IRQCHIP)

    def get_irqchip(self, chip_id: int) -> kvm_irqchip:
        """KVM_GET_IRQCHIP; `chip_id`: KVM_IRQCHIP_*. ENXIO: no irqchip. EINVAL: no such chip."""
        chip = kvm_irqchip(chip_id=chip_id & _U32)
        self.ioctl(ioctls.KVM_GET_IRQCHIP, chip)
        return chip

    def set_irqchip(self, chip: kvm_irqchip) -> None:
        """KVM_SET_IRQCHIP. ENXIO: no irqchip. EINVAL: no such chip."""
        self.ioctl(ioctls.KVM_SET_IRQCHIP, chip)

    def irq_line(self, gsi: int, level: int) -> None:
        """KVM_IRQ_LINE: set a GSI's level for source 0. ENXIO: no irqchip."""
        self.ioctl(ioctls.KVM_IRQ_LINE, kvm_irq_level(irq=gsi & _U32, level=level))

    def irq_line_status(self, gsi: int, level: int) -> int:
        """KVM_IRQ_LINE_STATUS: as `irq_line`; >0 delivered, 0 coalesced, <0 ignored or masked."""
        line = kvm_irq_level(irq=gsi & _U32, level=level)
        self.ioctl(ioctls.KVM_IRQ_LINE_STATUS, line)
        return line.status

    def set_gsi_routing(self, entries: Iterable[kvm_irq_routing_entry], flags: int = 0) -> None:
        """KVM_SET_GSI_ROUTING: replace the whole table. EINVAL: no irqchip, or a bad entry."""
        self.ioctl(ioctls.KVM_SET_GSI_ROUTING, make_irq_routing(entries, flags))

    def signal_msi(self, address: int, data: int, flags: int = 0) -> int:
        """KVM_SIGNAL_MSI: a message as a device writes it; >0 delivered, 0 nobody took it.

        EINVAL: no irqchip, or `flags` but KVM_MSI_VALID_DEVID. EPERM: no vCPU.
        """
        msi = kvm_msi(address_lo=address, address_hi=address >> 32, data=data, flags=flags)
        return self.ioctl(ioctls.KVM_SIGNAL_MSI, msi)

    def irqfd(self, fd: int, gsi: int, flags: int = 0, resamplefd: int = -1) -> None:
        """KVM_IRQFD: let an eventfd pulse `gsi`; `flags`: KVM_IRQFD_FLAG_*.

        EINVAL: no irqchip, bad flags, no eventfd. EBUSY: it has a GSI. EBADF: no descriptor.
        """
        irqfd = kvm_irqfd(fd=fd & _U32, gsi=gsi & _U32, flags=flags, resamplefd=resamplefd & _U32)
        self.ioctl(ioctls.KVM_IRQFD, irqfd)

    def ioeventfd(
        self, addr: int, len_bytes: int, fd: int, flags: int = 0, datamatch: int = 0
    ) -> None:
        """KVM_IOEVENTFD: let a guest's write signal an eventfd; `flags`: KVM_IOEVENTFD_FLAG_*.

        EINVAL: bad length or flags, no eventfd. EEXIST: taken. ENOENT: nothing to deassign.
        """
        event = kvm_ioeventfd(addr=addr, len=len_bytes, fd=fd, flags=flags, datamatch=datamatch)
        self.ioctl(ioctls.KVM_IOEVENTFD, event)

    # The PIT.

    def create_pit(self) -> None:
        """KVM_CREATE_PIT: as create_pit2 with KVM_PIT_SPEAKER_DUMMY. ENOENT, EEXIST as there."""
        self.ioctl(ioctls.KVM_CREATE_PIT)

    def create_pit2(self, flags: int = 0) -> None:
        """KVM_CREATE_PIT2; `flags`: KVM_PIT_SPEAKER_DUMMY. EEXIST: a PIT. ENOENT: no irqchip."""
        self.ioctl(ioctls.KVM_CREATE_PIT2, kvm_pit_config(flags=flags))

    def get_pit(self) -> kvm_pit_state:
        """KVM_GET_PIT. ENXIO: no PIT."""
        return self._get(ioctls.KVM_GET_PIT, kvm_pit_state)

    def set_pit(self, state: kvm_pit_state) -> None:
        """KVM_SET_PIT: restarts every counter. ENXIO: no PIT."""
        self.ioctl(ioctls.KVM_SET_PIT, state)

    def get_pit2(self) -> kvm_pit_state2:
        """KVM_GET_PIT2. ENXIO: no PIT."""
        return self._get(ioctls.KVM_GET_PIT2, kvm_pit_state2)

    def set_pit2(self, state: kvm_pit_state2) -> None:
        """KVM_SET_PIT2: restarts every counter. ENXIO: no PIT."""
        self.ioctl(ioctls.KVM_SET_PIT2, state)

    def reinject_control(self, reinject: bool) -> None:
        """KVM_REINJECT_CONTROL: replay ticks the guest could not take, or not. ENXIO: no PIT."""
        control = kvm_reinject_control(pit_reinject=int(reinject))
        self.ioctl(ioctls.KVM_REINJECT_CONTROL, control)

    # Time.

    def get_clock(self) -> kvm_clock_data:
        """KVM_GET_CLOCK: kvmclock in ns; `flags` (KVM_CLOCK_*) say what else is filled in."""
        return self._get(ioctls.KVM_GET_CLOCK, kvm_clock_data)

    def set_clock(self, clock: kvm_clock_data) -> None:
        """KVM_SET_CLOCK: kvmclock goes on from `clock.clock` ns. EINVAL: unknown flags."""
        self.ioctl(ioctls.KVM_SET_CLOCK, clock)

    def get_tsc_khz(self) -> int:
        """KVM_GET_TSC_KHZ: what the TSC of a new vCPU counts a millisecond."""
        return self.ioctl(ioctls.KVM_GET_TSC_KHZ)

    def set_tsc_khz(self, khz: int) -> None:
        """KVM_SET_TSC_KHZ of the VM. EINVAL: a vCPU exists, or a rate this host cannot give."""
        self.ioctl(ioctls.KVM_SET_TSC_KHZ, khz)

    # Guests.

    def load(self, what: Guest | VmState) -> None:
        """Put a guest into RAM; the vCPU that boots starts at its entry. ValueError: no room.

        A state (`save`) makes this VM the saved one. StateError, with nothing changed: the VM is
        not new, has not RAM enough, or the state contradicts itself; or a back end refuses it.
        """
        if isinstance(what, VmState):
            from kvmtick.kvm.save_load import load

            load(self, what)
        else:
            self.load_guest(what)

    def save(self) -> VmState:
        """The VM as it is, for `load` of a new VM of either back end; no vCPU may be running.

        A vCPU that stopped at an access of user space's finishes it, but executes no more.
        StateError: the guest has a ROM or a disk.
        """
        from kvmtick.kvm.save_load import save

        return save(self)

    @abstractmethod
    def load_guest(self, guest: Guest) -> None:
        """`load` of a guest."""

    @property
    @abstractmethod
    def guest(self) -> Guest | None:
        """What was loaded last; None before that."""

    @abstractmethod
    def adopt(self, guest: Guest) -> None:
        """`guest` is what this VM runs: it is in RAM, and its vCPUs are on their way."""

    @property
    @abstractmethod
    def ram_bytes(self) -> int:
        """The size of the RAM at guest-physical 0."""

    @abstractmethod
    def read_memory(self, gpa: int, size_bytes: int) -> bytes:
        """Bytes of guest RAM, of any slots; ValueError outside of it. EBADF: after `close`."""

    @abstractmethod
    def write_memory(self, gpa: int, data: bytes) -> None:
        """Store bytes in guest RAM; ValueError outside of it. EBADF: after `close`."""

    @abstractmethod
    def parameters(self) -> Parameters | None:
        """The guest's parameter block as it is now in RAM; None for a foreign guest, and for one
        that has overwritten it.
        """

    @abstractmethod
    def run(
        self,
        *,
        ticks: int | None = None,
        for_ns: int | None = None,
        limit_s: float | None = DEFAULT_RUN_LIMIT_S,
        until: Callable[[], bool] | None = None,
        counter: int | None = None,
        handlers: Mapping[int, PortHandler] | None = None,
        on_ioapic_eoi: Callable[[int], None] | None = None,
    ) -> Run:
        """Run all vCPUs to the guest's end, and follow its ticks.

        It ends when the guest does, after `for_ns` of the machine's time, after `limit_s` wall
        seconds, or when `until`, asked whenever a vCPU is out of the guest, is true. A foreign
        guest ends when `ticks` ticks have reached it. `counter`: where a foreign guest keeps a
        32-bit tick count, guest-physical. `handlers` answer ports of their own, or ours instead,
        and may call the VM. `on_ioapic_eoi` is told the vectors of KVM_EXIT_IOAPIC_EOI (split
        irqchip). May be called again to go on. ENOENT: there is no vCPU.
        """

    @abstractmethod
    def close(self) -> None:
        """Give the VM and its vCPUs back; harmless when repeated. What runs ends, as for
        `Vcpu.close`, and so does a `run` that calls it from a handler.
        """
