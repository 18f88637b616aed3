"""The model behind KVM's calls: `ModelSystem`, `ModelVm`, and `ModelVcpu` for its vCPUs.

They take the ioctls of `kvmtick.kvm.api`; the handlers are in `kvmtick.kvm.dev_ioctl`, `vm_ioctl`
and `vcpu_ioctl`. `ModelVm.run` runs all vCPUs to the guest's end and follows its ticks
(`kvmtick.kvm.guest_run`).

Not modelled: a user space that brings its own local APIC.
"""

import errno
from collections.abc import Callable, Mapping
from typing import ClassVar

from kvmtick.abi import ioctls
from kvmtick.abi.errors import NO_VCPU, KvmError
from kvmtick.abi.structs import kvm_cpuid_entry2
from kvmtick.cpu.engine import Engine
from kvmtick.cpu.hostkvm import HostKvm
from kvmtick.guests import DEFAULT_NEEDS, Guest, Parameters
from kvmtick.irqchip.i8254 import MIN_TIMER_PERIOD_NS
from kvmtick.irqchip.lapic_timer import GUEST_TSC_KHZ
from kvmtick.kvm.api import DEFAULT_RUN_LIMIT_S, Arg, System, Vm
from kvmtick.kvm.dev_ioctl import DEV_IOCTLS, KVM_MAX_VCPU_IDS, KVM_MAX_VCPUS, cpuid_entries
from kvmtick.kvm.guest_run import GuestRun
from kvmtick.kvm.host_cpuid import both_have
from kvmtick.kvm.kernel import KernelSystem
from kvmtick.kvm.kvmclock import KvmClock
from kvmtick.kvm.model_file import Handler, MachineFile, ModelFile
from kvmtick.kvm.model_vcpu import ModelVcpu
from kvmtick.kvm.told import Told
from kvmtick.kvm.vm_ioctl import VM_IOCTLS
from kvmtick.machine.machine import QUANTUM_NS, Machine
from kvmtick.machine.ports import PortHandler
from kvmtick.machine.run import Run
from kvmtick.ticks.report import TickReport

__all__ = ["ModelSystem", "ModelVcpu", "ModelVm"]

SEED_STRIDE = 1 << 48
SEED_MASK = (1 << 64) - 1
"""Each vCPU draws random numbers of its own."""


class ModelSystem(ModelFile, System):
    """What stands for /dev/kvm."""

    backend = "model"
    kind = "system"
    handlers: ClassVar[Mapping[int, Handler]] = DEV_IOCTLS
    unknown: ClassVar[int] = errno.EINVAL

    def create_vm(
        self,
        machine_type: int = 0,
        *,
        ram_bytes: int = DEFAULT_NEEDS.ram_bytes,
        clock: str | None = None,
        seed: int = 0,
        min_timer_period_us: int | None = None,
    ) -> "ModelVm":
        self.check_usable(ioctls.KVM_CREATE_VM)
        if machine_type:
            raise KvmError(errno.EINVAL, "KVM_CREATE_VM")
        return ModelVm(
            clock=clock or "virtual",
            seed=seed,
            ram_bytes=ram_bytes,
            min_timer_period_us=min_timer_period_us,
        )


class ModelVm(MachineFile, Vm[ModelVcpu]):
    """One VM of the model, with RAM at guest-physical 0. A context manager."""

    backend = "model"
    kind = "VM"
    handlers: ClassVar[Mapping[int, Handler]] = VM_IOCTLS
    unknown: ClassVar[int] = errno.ENOTTY

    def __init__(
        self,
        *,
        clock: str = "virtual",
        seed: int = 0,
        detail: bool = False,
        engine: Callable[[], Engine] | None = None,
        ram_bytes: int = DEFAULT_NEEDS.ram_bytes,
        quantum_ns: int = QUANTUM_NS,
        fast: bool | None = None,
        min_timer_period_us: int | None = None,
    ) -> None:
        """`clock`: `virtual` or `real`. `seed`: for the host model's faults and the CPU's random
        numbers. `detail`: record the events that only traces need. `engine`: who executes the
        guest, the unicorn engine if None; a `kvmtick.cpu.hostkvm.HostKvm` is the host's own CPU, in
        real time. `ram_bytes`: a multiple of 4096, `Guest.needs` says how many. `quantum_ns`: how
        long a vCPU runs at most while another one waits. `fast`: interrupts come where the next
        basic block begins, not at the next instruction; None: in real time. An `engine` of yours
        decides that itself. `min_timer_period_us`: kvm's module parameter, the least period of
        periodic timers, PIT and local APIC, None: 200; 0 lets them run as fast as the guest asks.
        """
        if engine is not None and fast is not None:
            raise ValueError(f"fast={fast}: your engine decides that itself, leave it out")
        least_ns = MIN_TIMER_PERIOD_NS
        if min_timer_period_us is not None:
            if min_timer_period_us < 0:
                raise ValueError(f"min_timer_period_us={min_timer_period_us}: give 0 or more")
            least_ns = min_timer_period_us * 1000
        super().__init__(Machine(clock, seed, detail, ram_bytes, quantum_ns, least_ns))
        self.told = Told()
        self.kvmclock = KvmClock(self.machine.clock)
        self.host_tsc_khz = engine.tsc_khz if isinstance(engine, HostKvm) else GUEST_TSC_KHZ
        self.default_tsc_khz = self.host_tsc_khz
        self._guest_run = GuestRun(self.machine)
        self.assembler = self._guest_run.assembler
        self._engine = engine
        self._exact = self.machine.virtual if fast is None else not fast
        self._vcpus: list[ModelVcpu] = []

    def ioctl(self, request: int, arg: Arg = 0) -> int:
        result = super().ioctl(request, arg)
        self.told.note(request, arg)
        return result

    @property
    def vcpus(self) -> list[ModelVcpu]:
        return self._vcpus

    def create_vcpu(self, vcpu_id: int = 0) -> ModelVcpu:
        with self.machine.lock:
            return self._create_vcpu(vcpu_id)

    def _create_vcpu(self, vcpu_id: int) -> ModelVcpu:
        self.check_usable(ioctls.KVM_CREATE_VCPU)
        if not 0 <= vcpu_id < KVM_MAX_VCPU_IDS or len(self._vcpus) >= KVM_MAX_VCPUS:
            raise KvmError(errno.EINVAL, "KVM_CREATE_VCPU")
        if any(vcpu.vcpu_id == vcpu_id for vcpu in self._vcpus):
            # The kernel has made the vCPU, and reset its local APIC, before it looks for the id.
            self.machine.board.delivery.apic_map_dirty = True
            self.machine.board.delivery.recalculate_map()
            raise KvmError(errno.EEXIST, "KVM_CREATE_VCPU")
        if self._engine is not None:
            engine = self._engine()
        else:
            seed = self.machine.host.seed + vcpu_id * SEED_STRIDE
            engine = _unicorn_engine(self._exact, seed & SEED_MASK)
        vcpu = ModelVcpu(self.machine.create_vcpu(engine, vcpu_id), self.machine)
        vcpu.vcpu.set_tsc_khz(self.default_tsc_khz)
        self._vcpus.append(vcpu)
        return vcpu

    def get_supported_cpuid(self) -> list[kvm_cpuid_entry2]:
        """KVM_GET_SUPPORTED_CPUID of the model, and of the host where its CPU runs the guest."""
        host = self._engine
        if not isinstance(host, HostKvm):
            return cpuid_entries()
        with KernelSystem() as system:
            executed = system.get_supported_cpuid()
        return both_have(cpuid_entries(), executed, host.tsc_khz, host.filters_msrs)

    @property
    def guest(self) -> Guest | None:
        loaded = self.machine.loaded
        return loaded[-1] if loaded else None

    def adopt(self, guest: Guest) -> None:
        self.machine.adopt(guest)

    @property
    def ram_bytes(self) -> int:
        return len(self.machine.ram)

    def load_guest(self, guest: Guest) -> None:
        with self.machine.lock:
            self._check_open("write_memory")
            self.machine.load(guest)

    def _check_open(self, call: str) -> None:
        if self.closed:
            raise KvmError(errno.EBADF, call, f"this {self.kind} was closed")

    def read_memory(self, gpa: int, size_bytes: int) -> bytes:
        with self.machine.lock:
            self._check_open("read_memory")
            return self.machine.read_memory(gpa, size_bytes)

    def write_memory(self, gpa: int, data: bytes) -> None:
        with self.machine.lock:
            self._check_open("write_memory")
            self.machine.write_memory(gpa, data)

    def close(self) -> None:
        """As `Vm.close`."""
        with self.closing():
            for vcpu in self._vcpus:
                vcpu.close()
            super().close()
            self.machine.close()

    # Running.

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
        """As `Vm.run`. A guest that does not get its ticks ends (reason `time`) after ten times the
        time they should take.
        """
        self._check_runs()
        run = self._guest_run.run(
            ticks, for_ns, limit_s, until, counter, handlers or {}, on_ioapic_eoi
        )
        self._check_runs()
        return run

    def _check_runs(self) -> None:
        self.check_usable(ioctls.KVM_RUN)
        if not self._vcpus:
            raise KvmError(errno.ENOENT, "KVM_RUN", NO_VCPU)
        for vcpu in self._vcpus:
            vcpu.check_usable(ioctls.KVM_RUN)

    def ticks(self) -> TickReport:
        """The ticks so far, of the PIT if it ever expired, else of the busiest local APIC timer."""
        with self.machine.lock:
            return self._guest_run.ticks()

    def parameters(self) -> Parameters | None:
        with self.machine.lock:
            return self._guest_run.parameters()


def _unicorn_engine(exact: bool, seed: int) -> Engine:
    # Loading the native library takes time that scripted guests need not pay.
    from kvmtick.cpu.unicorn import UnicornEngine

    return UnicornEngine(exact=exact, seed=seed)
