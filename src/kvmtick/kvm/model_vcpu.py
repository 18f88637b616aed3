"""A vCPU of the model: `ModelVcpu`; its ioctls are in `kvmtick.kvm.vcpu_ioctl`."""

import errno
from collections.abc import Mapping
from typing import ClassVar

from kvmtick.abi import ioctls
from kvmtick.abi.exits import Exit as VcpuExit
from kvmtick.abi.structs import kvm_run
from kvmtick.kvm.api import DEFAULT_VCPU_LIMIT_S, Vcpu
from kvmtick.kvm.model_file import Handler, MachineFile
from kvmtick.kvm.model_run import KvmRun
from kvmtick.kvm.vcpu_ioctl import VCPU_IOCTLS
from kvmtick.machine.machine import Exit, Machine
from kvmtick.vcpu import vcpu as inner

__all__ = ["ModelVcpu"]


class ModelVcpu(MachineFile, Vcpu):
    """One vCPU of a model VM. `vcpu` is the vCPU itself, of `machine`."""

    kind = "vCPU"
    handlers: ClassVar[Mapping[int, Handler]] = VCPU_IOCTLS
    unknown: ClassVar[int] = errno.EINVAL

    def __init__(self, vcpu: inner.Vcpu, machine: Machine) -> None:
        super().__init__(machine)
        self.vcpu = vcpu
        self.vcpu_id = vcpu.vcpu_id
        self.host_tsc_khz = vcpu.engine.tsc_khz
        self._kvm_run = KvmRun(machine, vcpu)
        self.signal_mask: int | None = None
        """KVM_SET_SIGNAL_MASK: the signals blocked in KVM_RUN, bit n for signal n + 1."""

    def is_ram(self, gpa: int, size_bytes: int) -> bool:
        """Whether all of it is guest RAM."""
        return self.machine.read_ram(gpa, size_bytes) is not None

    # Running.

    @property
    def area(self) -> kvm_run:
        return self._kvm_run.area

    def enter(self) -> None:
        """KVM_RUN."""
        self._kvm_run.enter()

    def run(self, limit_s: float = DEFAULT_VCPU_LIMIT_S) -> VcpuExit:
        self.check_usable(ioctls.KVM_RUN)
        return self._kvm_run.run(limit_s)

    def kick(self) -> None:
        self._kvm_run.kick()

    def answer(self, data: bytes) -> None:
        self._kvm_run.answer(data)

    def close(self) -> None:
        """As `Vcpu.close`."""
        with self.closing():
            super().close()
            self._kvm_run.close()
            if self.machine.runs_all:
                self.machine.stop(Exit("interrupted", detail=f"vCPU {self.vcpu_id} was closed"))

    def start_at(self, cs: int, ip: int, registers: Mapping[str, int] | None = None) -> None:
        self.check_usable(ioctls.KVM_SET_REGS)
        with self.machine.lock:
            self.vcpu.start_at(cs, ip, registers)
            self.machine.wake_threads()
