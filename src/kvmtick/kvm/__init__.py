"""The API: KVM's calls, on the model or on the real kernel.

`Kvm("model")` makes VMs of this project's chips, `Kvm("kernel")` VMs of /dev/kvm; both have the
same methods for the irqchip, the PIT, memory and running a guest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, overload

if TYPE_CHECKING:
    from kvmtick.abi.structs import kvm_cpuid_entry2
    from kvmtick.kvm.kernel import KernelSystem
    from kvmtick.kvm.model import ModelVm

__all__ = ["Kvm", "ModelKvm"]


class ModelKvm:
    """Makes VMs of the model."""

    backend = "model"

    def create_vm(self, *, clock: str = "virtual", seed: int = 0) -> ModelVm:
        """KVM_CREATE_VM: a VM in `virtual` or `real` time; `seed` is for the host's faults."""
        from kvmtick.kvm.model import ModelVm

        return ModelVm(clock=clock, seed=seed)

    def get_supported_cpuid(self) -> list[kvm_cpuid_entry2]:
        """KVM_GET_SUPPORTED_CPUID of the model."""
        from kvmtick.kvm.model_vcpu import cpuid_entries

        return cpuid_entries()


@overload
def Kvm(backend: Literal["model"] = "model") -> ModelKvm: ...


@overload
def Kvm(backend: Literal["kernel"]) -> KernelSystem: ...


def Kvm(backend: str = "model") -> ModelKvm | KernelSystem:
    """The system side of KVM: `model` or `kernel`. ValueError for any other name."""
    if backend == "model":
        return ModelKvm()
    if backend == "kernel":
        from kvmtick.kvm.kernel import KernelSystem

        return KernelSystem()
    raise ValueError(f"unknown back end {backend!r}: choose model or kernel")
