"""How KVM_RUN ends, as typed values: `decode` reads them from the kvm_run area.

Source: api.rst, "The kvm_run structure". Exits that no interrupt, timer or access of a guest causes
come as `ExitOther`.
"""

from dataclasses import dataclass
from mmap import mmap
from struct import Struct
from typing import Literal, TypeAlias

from kvmtick.abi import structs
from kvmtick.abi.structs import kvm_run, offset_of

__all__ = [
    "Exit",
    "ExitDebug",
    "ExitFailEntry",
    "ExitHlt",
    "ExitInternalError",
    "ExitIntr",
    "ExitIo",
    "ExitIoapicEoi",
    "ExitIrqWindowOpen",
    "ExitMmio",
    "ExitOther",
    "ExitRdmsr",
    "ExitSetTpr",
    "ExitShutdown",
    "ExitWrmsr",
    "answer_place",
    "decode",
    "trouble",
]


@dataclass(frozen=True, slots=True)
class ExitIo:
    """KVM_EXIT_IO: `count` accesses of `size` bytes to `port`; `data` holds what was written.

    A read must be answered (`Vcpu.answer`) before the next KVM_RUN.
    """

    port: int
    size: int
    count: int
    is_write: bool
    data: bytes

    def values(self) -> list[int]:
        """What the guest wrote, one number an access."""
        step = self.size
        return [
            int.from_bytes(self.data[at : at + step], "little")
            for at in range(0, len(self.data), step)
        ]


@dataclass(frozen=True, slots=True)
class ExitMmio:
    """KVM_EXIT_MMIO: `len` bytes at `phys_addr`; `data` holds what was written."""

    phys_addr: int
    len: int
    is_write: bool
    data: bytes


@dataclass(frozen=True, slots=True)
class ExitHlt:
    """KVM_EXIT_HLT: only without an in-kernel irqchip; with one, HLT waits in the kernel."""


@dataclass(frozen=True, slots=True)
class ExitDebug:
    """KVM_EXIT_DEBUG: what KVM_SET_GUEST_DEBUG asked for has happened."""


@dataclass(frozen=True, slots=True)
class ExitShutdown:
    """KVM_EXIT_SHUTDOWN: the guest took a triple fault."""


@dataclass(frozen=True, slots=True)
class ExitIrqWindowOpen:
    """KVM_EXIT_IRQ_WINDOW_OPEN: the window asked for by `request_interrupt_window`."""


@dataclass(frozen=True, slots=True)
class ExitSetTpr:
    """KVM_EXIT_SET_TPR: the guest lowered CR8 (`kvm_run.cr8`); only with a userspace irqchip."""


@dataclass(frozen=True, slots=True)
class ExitIoapicEoi:
    """KVM_EXIT_IOAPIC_EOI: the guest ended `vector`, which is level-triggered (split irqchip)."""

    vector: int


@dataclass(frozen=True, slots=True)
class ExitRdmsr:
    """KVM_EXIT_X86_RDMSR: the guest reads MSR `index`; answer in `kvm_run.u.msr`.

    `reason` is one of KVM_MSR_EXIT_REASON_*, as KVM_CAP_X86_USER_SPACE_MSR was enabled with.
    """

    index: int
    reason: int


@dataclass(frozen=True, slots=True)
class ExitWrmsr:
    """KVM_EXIT_X86_WRMSR: the guest writes `data` to MSR `index`; else as `ExitRdmsr`."""

    index: int
    reason: int
    data: int


@dataclass(frozen=True, slots=True)
class ExitInternalError:
    """KVM_EXIT_INTERNAL_ERROR: KVM could not go on; `suberror`: KVM_INTERNAL_ERROR_*."""

    suberror: int
    data: tuple[int, ...]

    def instruction(self) -> bytes:
        """The bytes KVM could not emulate, where it tells them (suberror 1, flag bit 0)."""
        if self.suberror != structs.KVM_INTERNAL_ERROR_EMULATION or len(self.data) < 3:
            return b""
        if not self.data[0] & 1:
            return b""
        raw = b"".join(word.to_bytes(8, "little") for word in self.data[1:3])
        return raw[1 : 1 + raw[0]]


@dataclass(frozen=True, slots=True)
class ExitFailEntry:
    """KVM_EXIT_FAIL_ENTRY: the hardware refused the VM entry."""

    hardware_entry_failure_reason: int
    cpu: int


@dataclass(frozen=True, slots=True)
class ExitIntr:
    """KVM_RUN was ended from outside: `time` (the limit is over) or `kick`."""

    reason: Literal["time", "kick"]


@dataclass(frozen=True, slots=True)
class ExitOther:
    """Any other `exit_reason` (KVM_EXIT_*)."""

    exit_reason: int


Exit: TypeAlias = (
    ExitIo
    | ExitMmio
    | ExitHlt
    | ExitDebug
    | ExitShutdown
    | ExitIrqWindowOpen
    | ExitSetTpr
    | ExitIoapicEoi
    | ExitRdmsr
    | ExitWrmsr
    | ExitInternalError
    | ExitFailEntry
    | ExitIntr
    | ExitOther
)

Buffer: TypeAlias = mmap | bytearray

_UNION_AT = offset_of(kvm_run, "u")
_IO = Struct("<BBHIQ")

_PLAIN: dict[int, Exit] = {
    structs.KVM_EXIT_HLT: ExitHlt(),
    structs.KVM_EXIT_DEBUG: ExitDebug(),
    structs.KVM_EXIT_SHUTDOWN: ExitShutdown(),
    structs.KVM_EXIT_IRQ_WINDOW_OPEN: ExitIrqWindowOpen(),
    structs.KVM_EXIT_SET_TPR: ExitSetTpr(),
}


def decode(run: kvm_run, area: Buffer) -> Exit:
    """The exit that `run` tells of; `area` is the whole shared area, with the port data."""
    reason = run.exit_reason
    if known := _PLAIN.get(reason):
        return known
    if reason == structs.KVM_EXIT_IO:
        return _decode_io(area)
    if reason == structs.KVM_EXIT_MMIO:
        mmio = run.u.mmio
        write = bool(mmio.is_write)
        return ExitMmio(
            mmio.phys_addr, mmio.len, write, bytes(mmio.data[: mmio.len]) if write else b""
        )
    if reason == structs.KVM_EXIT_IOAPIC_EOI:
        return ExitIoapicEoi(run.u.eoi.vector)
    if reason == structs.KVM_EXIT_X86_RDMSR:
        return ExitRdmsr(run.u.msr.index, run.u.msr.reason)
    if reason == structs.KVM_EXIT_X86_WRMSR:
        return ExitWrmsr(run.u.msr.index, run.u.msr.reason, run.u.msr.data)
    if reason == structs.KVM_EXIT_INTERNAL_ERROR:
        internal = run.u.internal
        return ExitInternalError(internal.suberror, tuple(internal.data[: internal.ndata]))
    if reason == structs.KVM_EXIT_FAIL_ENTRY:
        fail = run.u.fail_entry
        return ExitFailEntry(fail.hardware_entry_failure_reason, fail.cpu)
    return ExitOther(reason)


def _decode_io(area: Buffer) -> ExitIo:
    direction, size, port, count, at = _IO.unpack_from(area, _UNION_AT)
    write = direction == structs.KVM_EXIT_IO_OUT
    return ExitIo(port, size, count, write, bytes(area[at : at + size * count]) if write else b"")


def trouble(exit_: Exit) -> str:
    """Why KVM cannot run the guest any further, in words; for the exits that nobody can serve."""
    if isinstance(exit_, ExitInternalError):
        if code := exit_.instruction():
            return f"KVM cannot emulate the instruction at {code.hex(' ')}: use the model's CPU"
        return f"KVM_EXIT_INTERNAL_ERROR, suberror {exit_.suberror}: see dmesg"
    if isinstance(exit_, ExitFailEntry):
        reason = exit_.hardware_entry_failure_reason
        return f"the processor refused the VM entry (reason {reason:#x}): see dmesg"
    if isinstance(exit_, ExitOther):
        return f"KVM_RUN ended with exit_reason {exit_.exit_reason}, which nobody here serves"
    return f"KVM_RUN ended with {exit_}"


def answer_place(run: kvm_run, answer: bytes) -> int:
    """Where in the shared area the answer to the read of the last exit (IO or MMIO) goes.

    Raises ValueError when it was no read, or the answer has another size than was asked for.
    """
    if run.exit_reason == structs.KVM_EXIT_IO and not run.u.io.direction:
        at, size_bytes = run.u.io.data_offset, run.u.io.size * run.u.io.count
    elif run.exit_reason == structs.KVM_EXIT_MMIO and not run.u.mmio.is_write:
        at, size_bytes = _MMIO_DATA, run.u.mmio.len
    else:
        raise ValueError(f"nothing to answer: exit_reason {run.exit_reason} is not a read")
    if len(answer) != size_bytes:
        raise ValueError(f"the guest reads {size_bytes} bytes, the answer has {len(answer)}")
    return at


_MMIO_DATA = _UNION_AT + offset_of(structs.kvm_run_mmio, "data")
