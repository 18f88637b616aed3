"""The API on the real kernel: /dev/kvm takes the ioctls of `kvmtick.kvm.api`.

Everything closes in any order, more than once, and on garbage collection.

Not here: the chips user space has to bring with a split or a userspace irqchip.
"""

import errno
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Final

from kvmtick.abi import KvmError, ioctls
from kvmtick.abi.errors import NO_VCPU
from kvmtick.abi.exits import Exit
from kvmtick.abi.registers import put_registers
from kvmtick.abi.structs import (
    KVM_MEM_READONLY,
    KVM_MP_STATE_RUNNABLE,
    kvm_cpuid_entry2,
    kvm_run,
    kvm_userspace_memory_region,
)
from kvmtick.guests import DEFAULT_NEEDS, Guest, Parameters
from kvmtick.host.kvmdev import (
    DEFAULT_LIMIT_S,
    KVM_PATH,
    GuestMemory,
    KvmDevice,
    VcpuFile,
    VmFile,
    open_kvm,
)
from kvmtick.irqchip.i8254 import nominal_period_ns
from kvmtick.kvm.api import DEFAULT_RUN_LIMIT_S, Arg, System, Vcpu, Vm
from kvmtick.kvm.goal import TickGoal, any_of
from kvmtick.kvm.kernel_run import Ends, Observer, Session, UserSpace, observed
from kvmtick.kvm.length import believed_period_ns, most_ns, parameters_of
from kvmtick.kvm.told import Told, struct_of
from kvmtick.machine.machine import Exit as RunExit
from kvmtick.machine.memory import FIRST_ROM_SLOT, check_ram_bytes
from kvmtick.machine.memory import GuestMemory as Slots
from kvmtick.machine.ports import PortHandler
from kvmtick.machine.run import PitSettings, Run
from kvmtick.timing.wall import Stopwatch

__all__ = ["DEFAULT_RAM_BYTES", "KernelSystem", "KernelVcpu", "KernelVm"]

DEFAULT_RAM_BYTES: Final = DEFAULT_NEEDS.ram_bytes


class KernelSystem(System):
    """/dev/kvm. Raises `HostError` where it is absent or forbidden."""

    backend = "kernel"

    def __init__(self, path: str = KVM_PATH, device: KvmDevice | None = None) -> None:
        """`device`: an open /dev/kvm."""
        self.device: KvmDevice = device or open_kvm(path)

    def ioctl(self, request: int, arg: Arg = 0) -> int:
        return self.device.ioctl(request, arg)

    def fileno(self) -> int:
        return self.device.fileno()

    def create_vm(
        self,
        machine_type: int = 0,
        *,
        ram_bytes: int = DEFAULT_RAM_BYTES,
        clock: str | None = None,
        seed: int = 0,
        min_timer_period_us: int | None = None,
    ) -> "KernelVm":
        """KVM_CREATE_VM, as `System.create_vm`; nothing here is random, so `seed` is not used."""
        if clock not in (None, "real"):
            raise ValueError(f"clock {clock!r}: the kernel's is real; leave it out")
        if min_timer_period_us is not None:
            raise ValueError(
                f"min_timer_period_us={min_timer_period_us}: the host's administrator sets it, a"
                " parameter of the module kvm; leave it out"
            )
        return KernelVm(ram_bytes=ram_bytes, machine_type=machine_type, device=self.device.again())

    def close(self) -> None:
        """Give the descriptor back; VMs stay."""
        self.device.close()


class KernelVcpu(Vcpu):
    """One vCPU of the kernel."""

    def __init__(self, file: VcpuFile, vcpu_id: int) -> None:
        self.file = file
        self.vcpu_id = vcpu_id

    def ioctl(self, request: int, arg: Arg = 0) -> int:
        return self.file.ioctl(request, arg)

    def fileno(self) -> int:
        return self.file.fileno()

    @property
    def area(self) -> kvm_run:
        return self.file.area

    def run(self, limit_s: float = DEFAULT_LIMIT_S) -> Exit:
        return self.file.run(limit_s)

    def kick(self) -> None:
        self.file.kick()

    def answer(self, data: bytes) -> None:
        self.file.answer(data)

    def set_real_mode(self, cs: int, ip: int, *, unreal: bool = False) -> None:
        """Start over at `cs`:`ip` in real mode; `unreal`: data segments of 4 GiB."""
        self.file.set_real_mode(cs, ip, unreal=unreal)

    def start_at(self, cs: int, ip: int, registers: Mapping[str, int] | None = None) -> None:
        self.set_real_mode(cs, ip)
        if registers is not None:
            regs, sregs = self.get_regs(), self.get_sregs()
            put_registers(registers, regs, sregs)
            self.set_sregs(sregs)
            self.set_regs(regs)
        self.set_mp_state(KVM_MP_STATE_RUNNABLE)

    def close(self) -> None:
        """Give the vCPU back; harmless when repeated, the VM may be closed already."""
        self.file.close()


class KernelVm(Vm[KernelVcpu]):
    """One VM of the kernel, with `ram_bytes` of RAM at gpa 0.

    Raises `HostError` where /dev/kvm is absent or forbidden. A context manager.
    """

    backend = "kernel"

    def __init__(
        self,
        *,
        ram_bytes: int = DEFAULT_RAM_BYTES,
        path: str = KVM_PATH,
        machine_type: int = 0,
        device: KvmDevice | None = None,
    ) -> None:
        """`device`: an open /dev/kvm, which is then this VM's to close."""
        self._vcpus: list[KernelVcpu] = []
        self._guest: Guest | None = None
        self.told = Told()
        self._started_ns = 0
        self._ran_ns = 0
        self.slots = Slots()
        self.memory: GuestMemory | None = None
        self.device: KvmDevice = device or open_kvm(path)
        try:
            check_ram_bytes(ram_bytes)
            self.user = UserSpace(self, ram_bytes)
            self.file: VmFile = self.device.create_vm(machine_type)
            if ram_bytes:
                self.memory = self.file.add_memory(0, ram_bytes)
                self.slots.add_ram(0, self.memory.ram)
        except BaseException:
            self.close()
            raise

    def ioctl(self, request: int, arg: Arg = 0) -> int:
        result = self.file.ioctl(request, arg)
        self.told.note(request, arg)
        if request == ioctls.KVM_SET_USER_MEMORY_REGION:
            region = struct_of(arg, kvm_userspace_memory_region)
            self.slots.note_slot(
                region.slot,
                region.flags,
                region.guest_phys_addr,
                region.memory_size,
                region.userspace_addr,
            )
        return result

    def fileno(self) -> int:
        return self.file.fileno()

    @property
    def vcpus(self) -> list[KernelVcpu]:
        return self._vcpus

    def create_vcpu(self, vcpu_id: int = 0) -> KernelVcpu:
        vcpu = KernelVcpu(self.file.create_vcpu(vcpu_id), vcpu_id)
        self.vcpus.append(vcpu)
        if self._guest is not None:
            self._place(vcpu, self._guest)
        return vcpu

    def get_supported_cpuid(self) -> list[kvm_cpuid_entry2]:
        """KVM_GET_SUPPORTED_CPUID of /dev/kvm."""
        return KernelSystem(device=self.device).get_supported_cpuid()

    @property
    def guest(self) -> Guest | None:
        return self._guest

    def adopt(self, guest: Guest) -> None:
        self._guest = guest

    def load_guest(self, guest: Guest) -> None:
        for number, (gpa, data) in enumerate(guest.roms, FIRST_ROM_SLOT):
            self._place_rom(number, gpa, data)
        if guest.disk:
            self.user.pc.ata.insert(guest.disk)
        for gpa, data in ((guest.load_at, guest.image), *guest.pieces):
            self.write_memory(gpa, data)
        self._guest = guest
        self._ran_ns = 0
        for vcpu in self.vcpus:
            self._place(vcpu, guest)

    def _place_rom(self, number: int, gpa: int, data: bytes) -> None:
        old = next((slot for slot in self.slots.slots if slot.number == number), None)
        if old is not None:
            self.file.unmap_memory(old.gpa, number)
        rom = self.slots.place_rom(number, gpa, data)
        self.file.map_memory(gpa, rom, number, KVM_MEM_READONLY)

    def _place(self, vcpu: KernelVcpu, guest: Guest) -> None:
        if vcpu.vcpu_id == self.told.boot_cpu_id:
            vcpu.start_at(*guest.entry, guest.start)

    @property
    def ram_bytes(self) -> int:
        return 0 if self.memory is None else self.memory.size_bytes

    def write_memory(self, gpa: int, data: bytes) -> None:
        self._check_open("write_memory")
        if not self.slots.write(gpa, data):
            raise self.slots.outside(gpa, len(data))

    def read_memory(self, gpa: int, size_bytes: int) -> bytes:
        self._check_open("read_memory")
        data = self.slots.read(gpa, size_bytes)
        if data is None:
            raise self.slots.outside(gpa, size_bytes)
        return data

    def _check_open(self, call: str) -> None:
        if self.file.closed:
            raise KvmError(errno.EBADF, call, "this VM was closed")

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
        observer: Observer | None = None,
    ) -> Run:
        """As `Vm.run`, in real time: the vCPU that boots runs in the calling thread, each other one
        in its own.

        `handlers`, `until` and `on_ioapic_eoi` are called one at a time, in the thread of whichever
        vCPU left the guest; what one raises is raised here. A kick of any vCPU and Ctrl-C end the
        run (reason `interrupted`). `observer` sees the kernel's events: without one the result's
        `ticks` is None, and `ticks` of a foreign guest is a ValueError.
        """
        if not self.vcpus:
            raise KvmError(errno.ENOENT, "KVM_RUN", NO_VCPU)
        boots = (each for each in self.vcpus if each.vcpu_id == self.told.boot_cpu_id)
        first = next(boots, self.vcpus[0])
        if for_ns is not None and for_ns < 0:
            raise ValueError(f"for_ns={for_ns} is negative: give 0 or more")
        goal: TickGoal | None = None
        if ticks is not None and not (self._guest and self._guest.parameters):
            if observer is None:
                raise ValueError(f"ticks={ticks}: nobody sees a foreign guest's here, give for_ns")
            watcher = observer
            goal = TickGoal(ticks, lambda: watcher.assembler.reached)
        self.user.ports.handlers = handlers or {}
        self.user.ports.on_ioapic_eoi = on_ioapic_eoi
        with nullcontext() if observer is None else observed(observer, goal is not None):
            stopwatch = Stopwatch()
            self._started_ns = self._started_ns or stopwatch.started_ns
            lengths_ns = [each for each in (for_ns, self._rest_ns()) if each is not None]
            end_ns = stopwatch.started_ns + min(lengths_ns) if lengths_ns else None
            ends = Ends(end_ns, limit_s, any_of(goal.is_over if goal else None, until))
            exit_ = Session(self.vcpus, self.user, ends).run(first)
            ran_ns = stopwatch.elapsed_ns()
        if exit_.reason == "until" and goal is not None and goal.reason:
            exit_ = RunExit(goal.reason)
        return self._result(exit_, stopwatch.started_ns, ran_ns, counter, observer)

    def parameters(self) -> Parameters | None:
        return parameters_of(self._guest, self.read_memory) if self.memory else None

    def _rest_ns(self) -> int | None:
        """How much longer a built-in guest may take for the ticks it waits for."""
        whole_ns = most_ns(self._guest, self.parameters())
        if whole_ns is None:
            return None
        return max(0, whole_ns - self._ran_ns)

    def _result(
        self,
        exit_: RunExit,
        began_ns: int,
        ran_ns: int,
        counter: int | None,
        observer: Observer | None,
    ) -> Run:
        self._ran_ns += ran_ns
        guest, block, ports = self._guest, self.parameters(), self.user.ports
        guest_ticks = block.counter if block else None
        if counter is not None:
            guest_ticks = int.from_bytes(self.read_memory(counter, 4), "little")
        pit = self._pit_settings()
        assembler = None if observer is None else observer.assembler
        if assembler is not None and not pit and not assembler.expired:
            assembler = None
        return Run(
            guest=guest.name if guest else "",
            cpu="kvm",
            chips="kernel",
            clock="real",
            seed=0,
            elapsed_ns=began_ns + ran_ns - self._started_ns,
            wall_s=ran_ns / 1e9,
            instructions=None,
            exit=exit_,
            pit=pit,
            guest_ticks=guest_ticks,
            ticks=assembler.report() if assembler else None,
            sources=assembler.reports() if assembler else [],
            believed_period_ns=believed_period_ns(guest, block),
            has_rate=guest is None or guest.has_rate,
            console=ports.console.decode("utf-8", "replace"),
            serial=ports.serial.decode("utf-8", "replace"),
        )

    def _pit_settings(self) -> PitSettings | None:
        """Counter 0 as KVM_GET_PIT2 tells it; None without a PIT."""
        try:
            count = self.get_pit2().channels[0].count
        except KvmError as error:
            if error.errno != errno.ENXIO:
                raise
            return None
        return PitSettings(count, nominal_period_ns(count), self.told.reinject)

    def close(self) -> None:
        """Give everything back; harmless when repeated."""
        for vcpu in self.vcpus:
            vcpu.close()
        for name in ("file", "device", "memory"):
            if (part := getattr(self, name, None)) is not None:
                part.close()
