"""What a VM was told and KVM cannot be asked: `Told` listens to the ioctls of a VM.

KVM has no call that gives the GSI routing, the capabilities that were enabled, the flags of the
PIT, reinjection or the vCPU that boots; whoever saves a VM has to know them.
"""

from ctypes import sizeof, string_at
from typing import TYPE_CHECKING, Final, Literal, TypeVar

from kvmtick.abi import ioctls
from kvmtick.abi.caps import KVM_CAP_SPLIT_IRQCHIP
from kvmtick.abi.structs import (
    KVM_PIT_SPEAKER_DUMMY,
    KvmStruct,
    kvm_enable_cap,
    kvm_irq_routing,
    kvm_irq_routing_entry,
    kvm_pit_config,
    kvm_reinject_control,
)

if TYPE_CHECKING:
    from kvmtick.kvm.api import Arg

__all__ = ["IrqchipKind", "Told", "struct_of"]

IrqchipKind = Literal["none", "split", "kernel"]

_S = TypeVar("_S", bound=KvmStruct)


class Told:
    """The ioctls so far that no other tells of.

    `routing` is None while it is the default one; `caps` are pairs of number and arguments.
    """

    def __init__(self) -> None:
        self.irqchip: IrqchipKind = "none"
        self.boot_cpu_id = 0
        self.caps: list[tuple[int, tuple[int, ...]]] = []
        self.routing: list[kvm_irq_routing_entry] | None = None
        self.pit_flags: int | None = None
        self.reinject = True

    def note(self, request: int, arg: "Arg") -> None:
        """An ioctl of the VM has succeeded."""
        if request == ioctls.KVM_CREATE_IRQCHIP:
            self.irqchip = "kernel"
        elif request == ioctls.KVM_SET_BOOT_CPU_ID:
            assert isinstance(arg, int)
            self.boot_cpu_id = arg
        elif request == ioctls.KVM_ENABLE_CAP:
            self._note_cap(struct_of(arg, kvm_enable_cap))
        elif request == ioctls.KVM_SET_GSI_ROUTING:
            self.routing = _routing(arg)
        elif request == ioctls.KVM_CREATE_PIT:
            self.pit_flags = KVM_PIT_SPEAKER_DUMMY
        elif request == ioctls.KVM_CREATE_PIT2:
            self.pit_flags = struct_of(arg, kvm_pit_config).flags
        elif request == ioctls.KVM_REINJECT_CONTROL:
            self.reinject = struct_of(arg, kvm_reinject_control).pit_reinject != 0

    def _note_cap(self, enable: kvm_enable_cap) -> None:
        self.caps.append((enable.cap, tuple(enable.args)))
        if enable.cap == KVM_CAP_SPLIT_IRQCHIP:
            self.irqchip = "split"


_ROUTING_HEAD_BYTES: Final = sizeof(kvm_irq_routing)


def _bytes(arg: "Arg", size_bytes: int) -> bytes:
    """What the kernel has read."""
    return string_at(arg, size_bytes) if isinstance(arg, int) else bytes(arg)[:size_bytes]


def struct_of(arg: "Arg", struct: type[_S]) -> _S:
    """The structure that an ioctl's argument is, once the kernel has read it."""
    return struct.from_buffer_copy(_bytes(arg, sizeof(struct)))


def _routing(arg: "Arg") -> list[kvm_irq_routing_entry]:
    count = struct_of(arg, kvm_irq_routing).nr
    data = _bytes(arg, _ROUTING_HEAD_BYTES + count * sizeof(kvm_irq_routing_entry))
    return list((kvm_irq_routing_entry * count).from_buffer_copy(data, _ROUTING_HEAD_BYTES))
