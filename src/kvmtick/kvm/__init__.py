"""The API: KVM's calls, on the model or on the real kernel.

`Kvm("model")` makes VMs of this project's chips, `Kvm("kernel")` VMs of /dev/kvm; both take the
same ioctls and have the same methods (`kvmtick.kvm.api`). `Kvm("auto")` takes the kernel where it
can.
"""

from typing import TYPE_CHECKING, Literal, overload

if TYPE_CHECKING:
    from kvmtick.kvm.api import System
    from kvmtick.kvm.kernel import KernelSystem
    from kvmtick.kvm.model import ModelSystem

__all__ = ["Kvm"]


@overload
def Kvm(backend: Literal["model"] = "model") -> "ModelSystem": ...


@overload
def Kvm(backend: Literal["kernel"]) -> "KernelSystem": ...


@overload
def Kvm(backend: str) -> "System": ...


def Kvm(backend: str = "model") -> "System":
    """The system side of KVM: `model`, `kernel`, or `auto`: the kernel where /dev/kvm can be
    opened, else the model (`backend` of the answer says which).

    ValueError for any other name. HostError where there is no `kernel`.
    """
    if backend == "auto":
        from kvmtick.abi.errors import HostError

        try:
            return Kvm("kernel")
        except HostError:
            return Kvm("model")
    if backend == "model":
        from kvmtick.kvm.model import ModelSystem

        return ModelSystem()
    if backend == "kernel":
        from kvmtick.kvm.kernel import KernelSystem

        return KernelSystem()
    raise ValueError(f"unknown back end {backend!r}: choose model, kernel or auto")
