"""The API on the real kernel: `KernelVm` and `KernelVcpu` make the model's calls on /dev/kvm.

Each method is one ioctl of Documentation/virt/kvm/api.rst and raises `KvmError` with the kernel's
errno. `KernelVm.run_until_exit` is the user-space side of a small PC: exit port, console, sleep.
It runs every vCPU in a thread of its own, vCPU 0 in the caller's.

Not here: the chips user space has to bring with a split or a userspace irqchip.
"""

import errno
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Literal, Protocol

from kvmtick import guests
from kvmtick.abi import KvmError, ioctls
from kvmtick.abi.closing import Closing
from kvmtick.abi.structs import (
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
    kvm_sregs,
    kvm_vcpu_events,
    make_cpuid2,
    make_irq_routing,
    make_msrs,
)
from kvmtick.host.kvmdev import (
    DEFAULT_LIMIT_S,
    KVM_PATH,
    Exit,
    ExitHlt,
    ExitIntr,
    ExitIo,
    ExitIoapicEoi,
    ExitMmio,
    ExitShutdown,
    GuestMemory,
    KvmDevice,
    VcpuFile,
    VmFile,
    open_kvm,
)
from kvmtick.irqchip.i8254 import nominal_period_ns
from kvmtick.kvm.registers import put_registers
from kvmtick.kvm.setup import prepare
from kvmtick.machine.machine import Exit as RunExit
from kvmtick.machine.ports import PortHandler
from kvmtick.machine.run import PitSettings, Run
from kvmtick.timing.wall import Stopwatch

__all__ = [
    "DEFAULT_RAM_BYTES",
    "DEFAULT_RUN_LIMIT_S",
    "PORT_CONSOLE",
    "PORT_EXIT",
    "PORT_SERIAL",
    "PORT_SLEEP",
    "Guest",
    "GuestExit",
    "KernelVcpu",
    "KernelVm",
    "PortHandler",
    "UserPorts",
]

DEFAULT_RAM_BYTES: Final = 2 << 20
DEFAULT_RUN_LIMIT_S: Final = 60.0

PORT_SLEEP: Final = 0xD8
"""A write sleeps that many microseconds with the vCPU outside KVM_RUN."""
PORT_CONSOLE: Final = 0xE9
PORT_EXIT: Final = 0xF4
PORT_SERIAL: Final = 0x3F8

_UART_LCR, _UART_LSR = PORT_SERIAL + 3, PORT_SERIAL + 5
_UART_LCR_DLAB = 0x80
_UART_LSR_IDLE = 0x60
"""Transmitter and holding register empty: a guest that waits for them goes on at once."""


class Guest(Protocol):
    """What `load` takes: a flat real-mode image, or a `kvmtick.guests.Guest`, which may be more."""

    @property
    def image(self) -> bytes:
        """The bytes."""

    @property
    def load_at(self) -> int:
        """Guest-physical address of the first one."""

    @property
    def entry(self) -> tuple[int, int]:
        """Where vCPU 0 starts: real-mode (cs, ip)."""


@dataclass(frozen=True, slots=True)
class GuestExit:
    """How `run_until_exit` ended.

    `reason`: `done` (the guest wrote `code` to the exit port), `limit` (wall time), `interrupted`
    (a kick), `triple-fault`, `deadlock` (HLT that nothing can end), `guest-error` (`detail` holds
    the exit). `console` is what it wrote to the console ports, `exits` how often its vCPUs left
    KVM_RUN. `vcpu_id` is who ended it.
    """

    reason: Literal["done", "limit", "interrupted", "triple-fault", "deadlock", "guest-error"]
    code: int
    console: bytes
    exits: int
    elapsed_ns: int
    detail: Exit
    vcpu_id: int = 0


class KernelVcpu:
    """One vCPU of the kernel (api.rst, "vcpu ioctls")."""

    def __init__(self, file: VcpuFile, vcpu_id: int) -> None:
        self.file = file
        self.vcpu_id = vcpu_id

    def run(self, limit_s: float = DEFAULT_LIMIT_S) -> Exit:
        """One KVM_RUN to the next exit, at most `limit_s` wall seconds (`ExitIntr("time")`).

        Raises `KvmError`: EIO in another process than the VM's, EFAULT where guest memory is gone.
        """
        return self.file.run(limit_s)

    def kick(self) -> None:
        """End the `run` under way, or the next one, with `ExitIntr("kick")`; any thread may."""
        self.file.kick()

    def answer(self, data: bytes) -> None:
        """Give the bytes a port or MMIO read asked for, before the next `run`."""
        self.file.answer(data)

    def set_real_mode(self, cs: int, ip: int, *, unreal: bool = False) -> None:
        """Start over at `cs`:`ip` in real mode; `unreal`: data segments of 4 GiB."""
        self.file.set_real_mode(cs, ip, unreal=unreal)

    def start_at(self, cs: int, ip: int, registers: Mapping[str, int] | None = None) -> None:
        """Real mode at `cs`:`ip`, or the state that `registers` make of it (`Guest.start`)."""
        self.set_real_mode(cs, ip)
        if registers is not None:
            regs, sregs = self.get_regs(), self.get_sregs()
            put_registers(registers, regs, sregs)
            self.set_sregs(sregs)
            self.set_regs(regs)

    def get_regs(self) -> kvm_regs:
        """KVM_GET_REGS."""
        return self.file.get(ioctls.KVM_GET_REGS, kvm_regs)

    def set_regs(self, regs: kvm_regs) -> None:
        """KVM_SET_REGS."""
        self.file.ioctl(ioctls.KVM_SET_REGS, regs)

    def get_sregs(self) -> kvm_sregs:
        """KVM_GET_SREGS."""
        return self.file.get(ioctls.KVM_GET_SREGS, kvm_sregs)

    def set_sregs(self, sregs: kvm_sregs) -> None:
        """KVM_SET_SREGS. EINVAL: the registers contradict each other."""
        self.file.ioctl(ioctls.KVM_SET_SREGS, sregs)

    def nmi(self) -> None:
        """KVM_NMI: make an NMI pending; two at most wait."""
        self.file.ioctl(ioctls.KVM_NMI)

    def get_lapic(self) -> kvm_lapic_state:
        """KVM_GET_LAPIC. EINVAL: no in-kernel local APIC."""
        return self.file.get(ioctls.KVM_GET_LAPIC, kvm_lapic_state)

    def set_lapic(self, lapic: kvm_lapic_state) -> None:
        """KVM_SET_LAPIC. EINVAL: no in-kernel local APIC."""
        self.file.ioctl(ioctls.KVM_SET_LAPIC, lapic)

    def get_mp_state(self) -> int:
        """KVM_GET_MP_STATE: a KVM_MP_STATE_* value."""
        return self.file.get(ioctls.KVM_GET_MP_STATE, kvm_mp_state).mp_state

    def set_mp_state(self, mp_state: int) -> None:
        """KVM_SET_MP_STATE. EINVAL: not runnable and no in-kernel irqchip, or unknown."""
        self.file.ioctl(ioctls.KVM_SET_MP_STATE, kvm_mp_state(mp_state=mp_state))

    def get_vcpu_events(self) -> kvm_vcpu_events:
        """KVM_GET_VCPU_EVENTS."""
        return self.file.get(ioctls.KVM_GET_VCPU_EVENTS, kvm_vcpu_events)

    def set_vcpu_events(self, events: kvm_vcpu_events) -> None:
        """KVM_SET_VCPU_EVENTS. EINVAL: unknown flags, or an exception that is none."""
        self.file.ioctl(ioctls.KVM_SET_VCPU_EVENTS, events)

    def get_tsc_khz(self) -> int:
        """KVM_GET_TSC_KHZ: what the guest's TSC counts a millisecond."""
        return self.file.ioctl(ioctls.KVM_GET_TSC_KHZ)

    def set_tsc_khz(self, khz: int) -> None:
        """KVM_SET_TSC_KHZ; 0: the host's. EINVAL: a rate this host cannot give."""
        self.file.ioctl(ioctls.KVM_SET_TSC_KHZ, khz)

    def set_cpuid2(self, entries: Iterable[kvm_cpuid_entry2]) -> None:
        """KVM_SET_CPUID2: what CPUID answers. E2BIG: too many. EINVAL: changed after a run."""
        self.file.ioctl(ioctls.KVM_SET_CPUID2, make_cpuid2(entries))

    def get_cpuid2(self) -> list[kvm_cpuid_entry2]:
        """KVM_GET_CPUID2: what KVM_SET_CPUID2 set, as the kernel keeps it."""
        return self.file.cpuid(ioctls.KVM_GET_CPUID2)

    def get_msrs(self, indices: Iterable[int]) -> dict[int, int]:
        """KVM_GET_MSRS: values by index, up to the first MSR there is none of."""
        data = make_msrs(kvm_msr_entry(index=index) for index in indices)
        read = self.file.ioctl(ioctls.KVM_GET_MSRS, data)
        entries = (kvm_msr_entry.from_buffer_copy(data, 8 + 16 * at) for at in range(read))
        return {entry.index: entry.data for entry in entries}

    def set_msrs(self, values: Mapping[int, int]) -> int:
        """KVM_SET_MSRS, in order, up to the first that is refused; returns how many were set."""
        entries = (kvm_msr_entry(index=index, data=value) for index, value in values.items())
        return self.file.ioctl(ioctls.KVM_SET_MSRS, make_msrs(entries))

    def interrupt(self, irq: int) -> None:
        """KVM_INTERRUPT: queue an external interrupt of vector `irq`.

        EINVAL: above 255. ENXIO: the PICs are in the kernel. EEXIST: one waits (split irqchip).
        """
        self.file.ioctl(ioctls.KVM_INTERRUPT, kvm_interrupt(irq=irq & 0xFFFF_FFFF))

    def close(self) -> None:
        """Give the vCPU back; harmless when repeated, the VM may be closed already."""
        self.file.close()


class UserPorts:
    """The ports user space answers: exit 0xf4, console 0xe9 and 0x3f8, sleep 0xd8.

    `handlers` come first; a port nobody knows reads all ones and swallows writes. One access at a
    time, from whichever thread: only a sleeping vCPU holds nobody up.
    """

    def __init__(self, handlers: Mapping[int, PortHandler], sleep: Callable[[float], None]) -> None:
        self.handlers = handlers
        self.console = bytearray()
        self.exit_value: int | None = None
        self._sleep = sleep
        self._lcr = 0
        self._lock = threading.RLock()

    def write(self, port: int, size_bytes: int, value: int) -> None:
        """The guest wrote `value`."""
        if port == PORT_SLEEP and port not in self.handlers:
            self._sleep(value / 1e6)
            return
        with self._lock:
            if handler := self.handlers.get(port):
                handler(port, size_bytes, value)
            elif port == PORT_EXIT:
                if self.exit_value is None:
                    self.exit_value = value
            elif port == PORT_CONSOLE or (port == PORT_SERIAL and not self._lcr & _UART_LCR_DLAB):
                self.console.append(value & 0xFF)
            elif port == _UART_LCR:
                # with DLAB set, 0x3f8 is the divisor and no text
                self._lcr = value & 0xFF

    def read(self, port: int, size_bytes: int) -> int:
        """What the guest reads."""
        ones = (1 << 8 * size_bytes) - 1
        if handler := self.handlers.get(port):
            with self._lock:
                value = handler(port, size_bytes, None)
            return ones if value is None else value & ones
        return _UART_LSR_IDLE if port == _UART_LSR else ones


class KernelVm(Closing):
    """One VM of the kernel (api.rst, "VM ioctls"), with `ram_bytes` of RAM at gpa 0.

    Raises `HostError` where /dev/kvm is absent or forbidden. A context manager.
    """

    def __init__(self, *, ram_bytes: int = DEFAULT_RAM_BYTES, path: str = KVM_PATH) -> None:
        self.vcpus: list[KernelVcpu] = []
        self._guest: Guest | None = None
        self._reinject = True
        self.device: KvmDevice = open_kvm(path)
        try:
            self.file: VmFile = self.device.create_vm()
            self.memory: GuestMemory = self.file.add_memory(0, ram_bytes)
        except BaseException:
            self.close()
            raise

    def check_extension(self, cap: int) -> int:
        """KVM_CHECK_EXTENSION of this VM; 0: absent."""
        return self.file.check_extension(cap)

    def create_irqchip(self) -> None:
        """KVM_CREATE_IRQCHIP: two PICs, an IOAPIC, and a local APIC for every later vCPU.

        EEXIST: it has one. EINVAL: a vCPU exists.
        """
        self.file.ioctl(ioctls.KVM_CREATE_IRQCHIP)

    def create_pit2(self, flags: int = 0) -> None:
        """KVM_CREATE_PIT2; `flags`: KVM_PIT_SPEAKER_DUMMY. ENOENT: no irqchip. EEXIST: a PIT."""
        self.file.ioctl(ioctls.KVM_CREATE_PIT2, kvm_pit_config(flags=flags))

    def create_pit(self) -> None:
        """KVM_CREATE_PIT: as create_pit2 with KVM_PIT_SPEAKER_DUMMY. ENOENT, EEXIST as there."""
        self.file.ioctl(ioctls.KVM_CREATE_PIT)

    def create_vcpu(self, vcpu_id: int = 0) -> KernelVcpu:
        """KVM_CREATE_VCPU. EEXIST: the id is taken. EINVAL: it is out of range."""
        vcpu = KernelVcpu(self.file.create_vcpu(vcpu_id), vcpu_id)
        self.vcpus.append(vcpu)
        if self._guest is not None:
            self._place(vcpu, self._guest)
        return vcpu

    def prepare(self, needs: guests.Needs, reinject: bool = True) -> list[KernelVcpu]:
        """Set up what a guest needs (`Guest.needs`): irqchip, PIT, routing, vCPUs, their CPUID.

        `reinject` is KVM_REINJECT_CONTROL, unless the guest leaves no choice.
        """
        return prepare(self, needs, reinject)

    def load(self, guest: Guest) -> None:
        """Put a guest into RAM and let vCPU 0 (this one or the next) start on it.

        Raises ValueError where the image does not fit.
        """
        pieces = guest.pieces if isinstance(guest, guests.Guest) else ()
        for gpa, data in ((guest.load_at, guest.image), *pieces):
            self.write_memory(gpa, data)
        self._guest = guest
        for vcpu in self.vcpus:
            self._place(vcpu, guest)

    @staticmethod
    def _place(vcpu: KernelVcpu, guest: Guest) -> None:
        if vcpu.vcpu_id == 0:
            registers = guest.start if isinstance(guest, guests.Guest) else None
            vcpu.start_at(*guest.entry, registers)

    def write_memory(self, gpa: int, data: bytes) -> None:
        """Store bytes at a guest-physical address. Raises ValueError outside RAM."""
        self.memory.write(gpa, data)

    def read_memory(self, gpa: int, size: int) -> bytes:
        """`size` bytes at a guest-physical address. Raises ValueError outside RAM."""
        return self.memory.read(gpa, size)

    def get_pit2(self) -> kvm_pit_state2:
        """KVM_GET_PIT2. ENXIO: no PIT."""
        return self.file.get(ioctls.KVM_GET_PIT2, kvm_pit_state2)

    def set_pit2(self, state: kvm_pit_state2) -> None:
        """KVM_SET_PIT2: restarts channel 0 from a full period. ENXIO: no PIT."""
        self.file.ioctl(ioctls.KVM_SET_PIT2, state)

    def get_pit(self) -> kvm_pit_state:
        """KVM_GET_PIT. ENXIO: no PIT."""
        return self.file.get(ioctls.KVM_GET_PIT, kvm_pit_state)

    def set_pit(self, state: kvm_pit_state) -> None:
        """KVM_SET_PIT. ENXIO: no PIT."""
        self.file.ioctl(ioctls.KVM_SET_PIT, state)

    def reinject_control(self, reinject: bool) -> None:
        """KVM_REINJECT_CONTROL: replay ticks the guest could not take, or not. ENXIO: no PIT."""
        control = kvm_reinject_control(pit_reinject=int(reinject))
        self.file.ioctl(ioctls.KVM_REINJECT_CONTROL, control)
        self._reinject = reinject

    def get_irqchip(self, chip_id: int) -> kvm_irqchip:
        """KVM_GET_IRQCHIP; `chip_id`: KVM_IRQCHIP_*. ENXIO: no irqchip. EINVAL: no such chip."""
        chip = kvm_irqchip(chip_id=chip_id & 0xFFFF_FFFF)
        self.file.ioctl(ioctls.KVM_GET_IRQCHIP, chip)
        return chip

    def set_irqchip(self, chip: kvm_irqchip) -> None:
        """KVM_SET_IRQCHIP. ENXIO: no irqchip. EINVAL: no such chip."""
        self.file.ioctl(ioctls.KVM_SET_IRQCHIP, chip)

    def irq_line(self, gsi: int, level: int) -> None:
        """KVM_IRQ_LINE: set a GSI's level for source 0. ENXIO: no irqchip."""
        self.file.ioctl(ioctls.KVM_IRQ_LINE, kvm_irq_level(irq=gsi & 0xFFFF_FFFF, level=level))

    def irq_line_status(self, gsi: int, level: int) -> int:
        """KVM_IRQ_LINE_STATUS: as `irq_line`; >0 delivered, 0 coalesced, <0 ignored or masked."""
        line = kvm_irq_level(irq=gsi & 0xFFFF_FFFF, level=level)
        self.file.ioctl(ioctls.KVM_IRQ_LINE_STATUS, line)
        return line.status

    def set_gsi_routing(self, entries: Iterable[kvm_irq_routing_entry], flags: int = 0) -> None:
        """KVM_SET_GSI_ROUTING: replace the whole table. EINVAL: no irqchip, or a bad entry."""
        self.file.ioctl(ioctls.KVM_SET_GSI_ROUTING, make_irq_routing(entries, flags))

    def signal_msi(self, address: int, data: int, flags: int = 0) -> int:
        """KVM_SIGNAL_MSI: a message as a device writes it; >0 delivered, 0 nobody took it.

        EINVAL: no irqchip, or `flags` but KVM_MSI_VALID_DEVID. EPERM: no vCPU.
        """
        msi = kvm_msi(address_lo=address, address_hi=address >> 32, data=data, flags=flags)
        return self.file.ioctl(ioctls.KVM_SIGNAL_MSI, msi)

    def irqfd(self, fd: int, gsi: int, flags: int = 0, resamplefd: int = -1) -> None:
        """KVM_IRQFD: let an eventfd pulse `gsi`; `flags`: KVM_IRQFD_FLAG_*.

        EINVAL: no irqchip, bad flags, no eventfd. EBUSY: it has a GSI. EBADF: no descriptor.
        """
        irqfd = kvm_irqfd(fd=fd, gsi=gsi, flags=flags, resamplefd=resamplefd)
        self.file.ioctl(ioctls.KVM_IRQFD, irqfd)

    def ioeventfd(
        self, addr: int, len_bytes: int, fd: int, flags: int = 0, datamatch: int = 0
    ) -> None:
        """KVM_IOEVENTFD: let a guest's write signal an eventfd; `flags`: KVM_IOEVENTFD_FLAG_*.

        EINVAL: bad length or flags, no eventfd. EEXIST: taken. ENOENT: nothing to deassign.
        """
        event = kvm_ioeventfd(addr=addr, len=len_bytes, fd=fd, flags=flags, datamatch=datamatch)
        self.file.ioctl(ioctls.KVM_IOEVENTFD, event)

    def enable_cap(self, cap: int, *args: int, flags: int = 0) -> None:
        """KVM_ENABLE_CAP of the VM; `cap`: KVM_CAP_*. EINVAL: not to be enabled, or bad `args`."""
        enable = kvm_enable_cap(cap=cap, flags=flags)
        for index, arg in enumerate(args):
            enable.args[index] = arg
        self.file.ioctl(ioctls.KVM_ENABLE_CAP, enable)

    def set_boot_cpu_id(self, vcpu_id: int) -> None:
        """KVM_SET_BOOT_CPU_ID: which vCPU starts by itself. EBUSY: a vCPU exists. EINVAL: id."""
        self.file.ioctl(ioctls.KVM_SET_BOOT_CPU_ID, vcpu_id)

    def get_supported_cpuid(self) -> list[kvm_cpuid_entry2]:
        """KVM_GET_SUPPORTED_CPUID: what `KernelVcpu.set_cpuid2` may be given."""
        return self.device.supported_cpuid()

    def get_tsc_khz(self) -> int:
        """KVM_GET_TSC_KHZ: what the TSC of a new vCPU counts a millisecond."""
        return self.file.ioctl(ioctls.KVM_GET_TSC_KHZ)

    def run(
        self,
        *,
        limit_s: float = DEFAULT_RUN_LIMIT_S,
        handlers: Mapping[int, PortHandler] | None = None,
    ) -> Run:
        """Run the guest on the kernel's chips, as `ModelVm.run` does on the model's.

        Nobody sees the events here, so the result's `ticks` is None; `guest_ticks` is the guest's
        own count. `handlers` and errors as `run_until_exit`.
        """
        stopwatch = Stopwatch()
        ended = self.run_until_exit(handlers, limit_s)
        reason: str = ended.reason
        if reason == "done" and ended.code:
            reason = "guest-error"
        guest = self._guest
        block = guest.parameters if isinstance(guest, guests.Guest) else None
        return Run(
            guest=guest.name if isinstance(guest, guests.Guest) else "",
            cpu="kvm",
            chips="kernel",
            clock="real",
            seed=0,
            elapsed_ns=ended.elapsed_ns,
            wall_s=stopwatch.elapsed_s(),
            instructions=None,
            exit=RunExit(reason, ended.code),
            pit=self._pit_settings(),
            guest_ticks=int.from_bytes(self.read_memory(block.counter, 4), "little")
            if block
            else None,
            ticks=None,
            console=ended.console.decode("utf-8", "replace"),
            has_rate=not isinstance(guest, guests.Guest) or guest.has_rate,
        )

    def _pit_settings(self) -> PitSettings | None:
        """Counter 0 as KVM_GET_PIT2 tells it; None without a PIT."""
        try:
            count = self.get_pit2().channels[0].count
        except KvmError as error:
            if error.errno != errno.ENXIO:
                raise
            return None
        return PitSettings(count, nominal_period_ns(count), self._reinject)

    def run_until_exit(
        self,
        handlers: Mapping[int, PortHandler] | None = None,
        limit_s: float = DEFAULT_LIMIT_S,
    ) -> GuestExit:
        """Run all vCPUs until one writes the exit port, or `limit_s` wall seconds are over.

        vCPU 0 runs in the calling thread, each other one in a thread of its own; the first that
        ends ends all. `handlers` answer ports of their own (or ours instead), one access at a
        time, in the thread of whichever vCPU made it; what one raises is raised here. MMIO nobody
        claims reads all ones. Raises `KvmError` ENOENT without vCPU 0, and what KVM_RUN raises.
        """
        first = next((each for each in self.vcpus if each.vcpu_id == 0), None)
        if first is None:
            raise KvmError(errno.ENOENT, "KVM_RUN", "the VM has no vCPU 0; call create_vcpu(0)")
        return _Session(self.vcpus, handlers or {}, limit_s).run(first)

    def close(self) -> None:
        """Give everything back; harmless when repeated."""
        for vcpu in self.vcpus:
            vcpu.close()
        for name in ("file", "device", "memory"):
            if (part := getattr(self, name, None)) is not None:
                part.close()


class _Session:
    """One `run_until_exit`: the threads, and how the first of them ended."""

    def __init__(
        self, vcpus: Iterable[KernelVcpu], handlers: Mapping[int, PortHandler], limit_s: float
    ) -> None:
        self._vcpus = list(vcpus)
        self._ports = UserPorts(handlers, self._sleep)
        self._begin_ns = time.monotonic_ns()
        self._deadline_s = time.monotonic() + limit_s
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._end: tuple[KernelVcpu, Exit | BaseException] | None = None
        self._exits = 0

    def run(self, first: KernelVcpu) -> GuestExit:
        """`first` here, the others in threads; returns when all are out of the guest."""
        threads = [
            threading.Thread(
                target=self._run_vcpu, args=(vcpu,), name=f"vcpu {vcpu.vcpu_id}", daemon=True
            )
            for vcpu in self._vcpus
            if vcpu is not first
        ]
        try:
            for thread in threads:
                thread.start()
            self._run_vcpu(first)
        finally:
            # also where this thread was interrupted: nobody may stay in a VM that is given back
            self._stop()
            for thread in threads:
                if thread.ident is not None:
                    thread.join()
        assert self._end is not None
        vcpu, how = self._end
        if isinstance(how, BaseException):
            raise how
        return GuestExit(
            reason=_reason(how),
            code=self._ports.exit_value or 0,
            console=bytes(self._ports.console),
            exits=self._exits,
            elapsed_ns=time.monotonic_ns() - self._begin_ns,
            detail=how,
            vcpu_id=vcpu.vcpu_id,
        )

    def _run_vcpu(self, vcpu: KernelVcpu) -> None:
        exits = 0
        how: Exit | BaseException
        try:
            with vcpu.file.bounded(max(0.0, self._deadline_s - time.monotonic())):
                # `_stop` finds either this thread in `bounded` or `_over` set here
                while not self._over.is_set():
                    how = vcpu.file.enter()
                    exits += 1
                    if not self._go_on(vcpu, how):
                        break
                else:
                    return
        except BaseException as error:
            how = error
        finally:
            with self._lock:
                self._exits += exits
        with self._lock:
            if self._end is None:
                self._end = vcpu, how
        self._stop()

    def _go_on(self, vcpu: KernelVcpu, exit_: Exit) -> bool:
        """Serve an exit; False: it ends the run."""
        if isinstance(exit_, ExitIo):
            _port_access(vcpu, self._ports, exit_)
            ours = exit_.port == PORT_EXIT and PORT_EXIT not in self._ports.handlers
            return not (ours and exit_.is_write)
        if isinstance(exit_, ExitMmio):
            if not exit_.is_write:
                vcpu.answer(b"\xff" * exit_.len)
            return True
        return isinstance(exit_, ExitIoapicEoi)

    def _stop(self) -> None:
        if self._over.is_set():
            return
        self._over.set()
        for vcpu in self._vcpus:
            vcpu.file.end()

    def _sleep(self, seconds: float) -> None:
        self._over.wait(max(0.0, min(seconds, self._deadline_s - time.monotonic())))


def _port_access(vcpu: KernelVcpu, ports: UserPorts, exit_: ExitIo) -> None:
    """Serve one KVM_EXIT_IO; a string instruction makes `count` accesses."""
    if exit_.is_write:
        for value in exit_.values():
            ports.write(exit_.port, exit_.size, value)
        return
    values = (ports.read(exit_.port, exit_.size) for _ in range(exit_.count))
    vcpu.answer(b"".join(value.to_bytes(exit_.size, "little") for value in values))


def _reason(
    exit_: Exit,
) -> Literal["done", "limit", "interrupted", "triple-fault", "deadlock", "guest-error"]:
    if isinstance(exit_, ExitIo):
        return "done"
    if isinstance(exit_, ExitIntr):
        return "limit" if exit_.reason == "time" else "interrupted"
    if isinstance(exit_, ExitShutdown):
        return "triple-fault"
    return "deadlock" if isinstance(exit_, ExitHlt) else "guest-error"
