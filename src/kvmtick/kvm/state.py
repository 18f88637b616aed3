"""The state of a VM, moved by `Vm.save` and `Vm.load`: `VmState`.

What KVM's calls give of a VM, what it was told (`kvmtick.kvm.told`), and its RAM; the file that
`write` makes of it is described in docs/state.md. Both back ends give and take the same.

Not here: what KVM does not tell. Ticks of the PIT that are owed (`pending`, `irq_ack`), and where
its counters stand: KVM_SET_PIT2 starts them anew. The levels of GSIs, but as requests in PIC and
IOAPIC. A vector that waits in KVM_INTERRUPT with a split irqchip; the vector of a SIPI. irqfds,
ioeventfds and memory of other slots, which are the process's. x87, SSE and debug registers, XCR0.
The PC's devices outside KVM (`kvmtick.machine.pc`), ROM and disk.
"""

import base64
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from os import PathLike
from typing import Literal

from kvmtick.abi.structs import (
    KvmStruct,
    kvm_cpuid_entry2,
    kvm_ioapic_state,
    kvm_irq_routing_entry,
    kvm_lapic_state,
    kvm_pic_state,
    kvm_pit_state2,
    kvm_regs,
    kvm_sregs,
    kvm_vcpu_events,
    struct_diff,
)
from kvmtick.guests import Guest, Needs, ParameterOffsets
from kvmtick.irqchip.apicdef import APIC_TMCCT
from kvmtick.kvm.told import IrqchipKind
from kvmtick.vcpu.msr import MSR_IA32_TSC

__all__ = [
    "RUN_BYTES",
    "GuestState",
    "IrqchipState",
    "PitState",
    "RamRun",
    "StateError",
    "VcpuState",
    "VmState",
]

TIMES = ("count_load_time",)
"""Fields of structures that tell a moment."""
TIME_MSRS = (MSR_IA32_TSC,)


RUN_BYTES = 1 << 20
"""The longest run of pages; a longer one is several."""


class StateError(ValueError):
    """A state that is none, or that this VM cannot take: what, where, and the remedy, in a line."""


@dataclass(frozen=True, slots=True)
class GuestState:
    """Whose code is in RAM, for `Vm.run` to tell of: fields of `Guest` and of its needs."""

    name: str
    parameters: ParameterOffsets | None
    has_rate: bool
    tick_source: Literal["pit", "lapic"]

    @classmethod
    def of(cls, guest: Guest) -> "GuestState":
        """What counts once the guest is in RAM."""
        return cls(guest.name, guest.parameters, guest.has_rate, guest.needs.tick_source)

    def guest(self) -> Guest:
        """As `Vm.load` took it, but without image and entry."""
        needs = Needs(tick_source=self.tick_source)
        return Guest(self.name, b"", 0, (0, 0), self.parameters, needs, has_rate=self.has_rate)


@dataclass(frozen=True, slots=True)
class PitState:
    """`flags` of KVM_CREATE_PIT2, KVM_REINJECT_CONTROL, and KVM_GET_PIT2."""

    flags: int
    reinject: bool
    state: kvm_pit_state2


@dataclass(frozen=True, slots=True)
class IrqchipState:
    """KVM_GET_IRQCHIP of each chip."""

    pic_master: kvm_pic_state
    pic_slave: kvm_pic_state
    ioapic: kvm_ioapic_state


@dataclass(frozen=True, slots=True)
class VcpuState:
    """One vCPU; `lapic` is None without a local APIC in the kernel, `msrs` are by index."""

    vcpu_id: int
    mp_state: int
    tsc_khz: int
    cpuid: tuple[kvm_cpuid_entry2, ...]
    regs: kvm_regs
    sregs: kvm_sregs
    msrs: dict[int, int]
    lapic: kvm_lapic_state | None
    events: kvm_vcpu_events


@dataclass(frozen=True, slots=True)
class RamRun:
    """Pages in a row that are not all zeros, from guest-physical `gpa` on: zlib's bytes of them.

    At most `RUN_BYTES` of them, so whoever inflates one knows how much that takes.
    """

    gpa: int
    size_bytes: int
    deflated: bytes

    @classmethod
    def of(cls, gpa: int, data: bytes) -> "RamRun":
        """Deflate the pages at `gpa`."""
        return cls(gpa, len(data), zlib.compress(data))

    def data(self) -> bytes:
        """The pages. StateError: they are not there."""
        inflate = zlib.decompressobj()
        try:
            data = inflate.decompress(self.deflated, self.size_bytes + 1)
        except zlib.error as error:
            raise StateError(f"RAM at {self.gpa:#x} is damaged ({error}); save again") from None
        if len(data) != self.size_bytes or not inflate.eof:
            raise StateError(f"RAM at {self.gpa:#x} has not {self.size_bytes} bytes; save again")
        return data

    def as_text(self) -> str:
        """For the file."""
        return base64.b64encode(self.deflated).decode()


@dataclass(frozen=True, slots=True)
class VmState:
    """All that moves. `caps` are KVM_ENABLE_CAP's numbers with their arguments, in order; `routing`
    is None for the default one; `clock_ns` is KVM_GET_CLOCK's.
    """

    backend: str
    guest: GuestState | None
    irqchip: IrqchipKind
    boot_cpu_id: int
    caps: tuple[tuple[int, tuple[int, ...]], ...]
    routing: tuple[kvm_irq_routing_entry, ...] | None
    clock_ns: int
    chips: IrqchipState | None
    pit: PitState | None
    vcpus: tuple[VcpuState, ...]
    ram_bytes: int
    ram: tuple[RamRun, ...]

    def write(self, path: str | PathLike[str]) -> None:
        """Write the file of docs/state.md; OSError as open() has it."""
        from kvmtick.kvm.state_file import write

        write(self, path)

    @classmethod
    def read(cls, path: str | PathLike[str]) -> "VmState":
        """Read what `write` wrote. StateError: a damaged, foreign or newer file; OSError."""
        from kvmtick.kvm.state_file import read

        return read(path)

    def differences(self, other: "VmState") -> list[str]:
        """The fields in which two states differ, as text. Times aside: kvmclock, the TSC, when a
        counter of the PIT was loaded, the current count of a local APIC's timer; and `backend`.
        """
        return list(_differences(self, other))


def _differences(a: VmState, b: VmState) -> Iterator[str]:
    plain = ("guest", "irqchip", "boot_cpu_id", "caps", "ram_bytes")
    yield from (name for name in plain if getattr(a, name) != getattr(b, name))
    yield from _list_differences("routing", a.routing, b.routing)
    for name in ("flags", "reinject"):
        if getattr(a.pit, name, None) != getattr(b.pit, name, None):
            yield f"pit {name}"
    states = (getattr(pit, "state", None) for pit in (a.pit, b.pit))
    yield from _struct_differences("pit", *states)
    for name in ("pic_master", "pic_slave", "ioapic"):
        yield from _struct_differences(
            name, getattr(a.chips, name, None), getattr(b.chips, name, None)
        )
    if [vcpu.vcpu_id for vcpu in a.vcpus] != [vcpu.vcpu_id for vcpu in b.vcpus]:
        yield "vcpus"
    for first, second in zip(a.vcpus, b.vcpus, strict=False):
        yield from (f"vcpu {first.vcpu_id} {name}" for name in _vcpu_differences(first, second))
    if [(run.gpa, run.data()) for run in a.ram] != [(run.gpa, run.data()) for run in b.ram]:
        yield "ram"


def _vcpu_differences(a: VcpuState, b: VcpuState) -> Iterator[str]:
    yield from (name for name in ("mp_state", "tsc_khz") if getattr(a, name) != getattr(b, name))
    yield from _list_differences("cpuid", a.cpuid, b.cpuid)
    for name in ("regs", "sregs", "events"):
        yield from _struct_differences(name, getattr(a, name), getattr(b, name))
    for index in sorted({*a.msrs, *b.msrs} - {*TIME_MSRS}):
        if a.msrs.get(index) != b.msrs.get(index):
            yield f"msr {index:#x}: {a.msrs.get(index)} != {b.msrs.get(index)}"
    yield from _struct_differences("lapic", _timeless(a.lapic), _timeless(b.lapic))


def _timeless(lapic: kvm_lapic_state | None) -> kvm_lapic_state | None:
    if lapic is None:
        return None
    lapic = kvm_lapic_state.from_buffer_copy(lapic)
    lapic.set_reg(APIC_TMCCT, 0)
    return lapic


def _list_differences(
    name: str, a: tuple[KvmStruct, ...] | None, b: tuple[KvmStruct, ...] | None
) -> Iterator[str]:
    if (a and [*map(bytes, a)]) != (b and [*map(bytes, b)]):
        yield name


def _struct_differences(name: str, a: KvmStruct | None, b: KvmStruct | None) -> Iterator[str]:
    if a is None or b is None:
        if a is not b:
            yield name
        return
    for field in struct_diff(a, b, TIMES):
        yield f"{name} {field.name}: {field.left!r} != {field.right!r}"
