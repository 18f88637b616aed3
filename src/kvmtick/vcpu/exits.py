"""What the guest's accesses lead to while the engine is inside: exits KVM handles itself.

Ports (kvm_fast_pio, kernel_pio), memory that is no RAM (vcpu_mmio_read, vcpu_mmio_write: the local
APIC, then the devices on the bus, then user space), MSRs (`kvmtick.vcpu.msr`), CR8, hypercalls and
CPUID. The engine calls these with the instructions retired since the entry, so the time of an
access is exact.

CR8 is the local APIC's task priority; as with a TPR shadow its accesses leave no trace.

Whoever wants the vCPU's attention makes a request and kicks it; an access that armed an earlier
timer than the slice was cut for kicks too.

Not modelled: the fast path of MMIO ioeventfds, coalesced MMIO, one exit for several accesses of an
instruction (an access over the end of a page is two; a read-modify-write, too).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

from kvmtick.vcpu.hypercalls import emulate_hypercall

if TYPE_CHECKING:
    from kvmtick.vcpu.vcpu import Vcpu, VcpuBoard

__all__ = ["ExitHandlers", "UserSpace"]

# Basic exit reasons (SDM appendix C); engines report none of these.
EXIT_VMCALL: Final = 18
EXIT_IO_INSTRUCTION: Final = 30
EXIT_MSR_READ: Final = 31
EXIT_MSR_WRITE: Final = 32
EXIT_EPT_MISCONFIG: Final = 49

CR8_RESERVED: Final = ~0xF

MMIO_READ_UNSATISFIED: Final = 0
MMIO_READ: Final = 1
MMIO_WRITE: Final = 2

RAX_BYTES: Final = {1: 0xFF, 2: 0xFFFF, 4: 0xFFFF_FFFF}


class UserSpace(Protocol):
    """What no in-kernel device answers: an exit to user space."""

    defers: bool
    """Not now: leave the guest before a write. A read then has no answer."""

    def read(self, port: int, size_bytes: int) -> int | None:
        """The value the guest reads from a port; None: not known yet, leave the guest before it."""

    def write(self, port: int, size_bytes: int, value: int) -> None:
        """The guest wrote `value` to a port."""

    def mmio_read(self, gpa: int, size_bytes: int) -> int | None:
        """The value the guest reads from memory that is no RAM; None as for `read`."""

    def mmio_write(self, gpa: int, size_bytes: int, value: int) -> None:
        """The guest wrote `value` to memory that is no RAM."""

    def ioapic_eoi(self, vector: int) -> bool:
        """KVM_EXIT_IOAPIC_EOI: the guest ended an interrupt of the IOAPIC in user space. Whether
        to leave now, before anything else is done for the vCPU.
        """

    def set_tpr(self) -> None:
        """KVM_EXIT_SET_TPR: without a local APIC in the kernel the guest lowered CR8."""

    def unknown_msr(self, vcpu_id: int, access: str, index: int, rip: int) -> None:
        """KVM_EXIT_X86_RDMSR (`access` is "read") or _WRMSR ("write"), reason UNKNOWN: #GP."""


class ExitHandlers:
    """The handlers of one vCPU; `entered_ns` is when it entered the guest last."""

    __slots__ = (
        "_board",
        "_bus",
        "_clock",
        "_pio_data",
        "_queue",
        "_recorder",
        "_vcpu",
        "cr8",
        "entered_ns",
        "user_space",
    )

    def __init__(self, board: VcpuBoard, vcpu: Vcpu) -> None:
        self._board = board
        self._vcpu = vcpu
        self._clock = board.clock
        self._queue = board.queue
        self._recorder = board.recorder
        self._bus = board.bus
        self.user_space: UserSpace = board.ports
        self._pio_data = 0
        self.cr8 = 0
        """CR8 of a vCPU whose local APIC is user space's business."""
        self.entered_ns = 0
        vcpu.engine.attach(
            self.pio_out,
            self.pio_in,
            self.mmio_write,
            self.mmio_read,
            self.wrmsr,
            self.rdmsr,
            self.cpuid,
            self.write_cr8,
            self.read_cr8,
            self.hypercall,
        )

    def _set_clock(self, retired: int) -> None:
        clock = self._clock
        if clock.live:
            clock.refresh()
        else:
            clock.now_ns = self.entered_ns + retired

    def _record_exit(self, reason: int, info1: int) -> None:
        self._vcpu.record_exit(reason, info1)

    def _record_entry(self) -> None:
        vcpu, recorder = self._vcpu, self._recorder
        recorder.kvm_entry(vcpu.vcpu_id, vcpu.engine.rip, 0)

    # Ports.

    def pio_out(self, port: int, size_bytes: int, value: int, retired: int) -> None:
        """OUT and OUTS."""
        # `_set_clock`, without the call: every tick of the PIT has at least one OUT.
        clock = self._clock
        if clock.live:
            clock.refresh()
        else:
            clock.now_ns = self.entered_ns + retired
        device = self._bus.find(port, size_bytes)
        if device is None and self.user_space.defers:
            self._vcpu.engine.refuse()
            return
        recorder = self._recorder
        if recorder.detail:
            self._record_exit(EXIT_IO_INSTRUCTION, _io_qualification(port, size_bytes, 0))
        recorder.kvm_pio(1, port, size_bytes, 1, value)
        deadline_ns = self._queue.next_ns
        if device is not None:
            device.io_write(port, size_bytes, value)
        elif not self._board.signal_ioeventfd(True, port, size_bytes, value):
            self.user_space.write(port, size_bytes, value)
        # The slice was cut for the deadline there was; an earlier one needs a new slice.
        if self._queue.next_ns < deadline_ns:
            self._vcpu.engine.kick()
        if recorder.detail:
            self._record_entry()

    def pio_in(self, port: int, size_bytes: int, retired: int) -> int:
        """IN and INS."""
        self._set_clock(retired)
        recorder = self._recorder
        if recorder.detail:
            self._record_exit(EXIT_IO_INSTRUCTION, _io_qualification(port, size_bytes, 1))
        deadline_ns = self._queue.next_ns
        device = self._bus.find(port, size_bytes)
        value = (
            self.user_space.read(port, size_bytes)
            if device is None
            else device.io_read(port, size_bytes, self._pio_data)
        )
        if value is None:
            self._vcpu.engine.refuse()
            return 0
        value &= RAX_BYTES[size_bytes]
        self._pio_data = value
        recorder.kvm_pio(0, port, size_bytes, 1, value)
        if self._queue.next_ns < deadline_ns:
            self._vcpu.engine.kick()
        if recorder.detail:
            self._record_entry()
        return value

    # Memory that is no RAM.

    def mmio_write(self, gpa: int, size_bytes: int, value: int, retired: int) -> None:
        """`vcpu_mmio_write`."""
        self._set_clock(retired)
        recorder = self._recorder
        if recorder.detail:
            self._record_exit(EXIT_EPT_MISCONFIG, 0)
            recorder.kvm_mmio(MMIO_WRITE, size_bytes, gpa, value)
        deadline_ns = self._queue.next_ns
        lapic = self._vcpu.lapic
        if (lapic is None or not lapic.mmio_write(gpa, size_bytes, value)) and not (
            self._board.mmio_write(gpa, size_bytes, value)
        ):
            if self.user_space.defers:
                self._vcpu.engine.refuse()
                return
            self.user_space.mmio_write(gpa, size_bytes, value)
        self._after_access(deadline_ns)

    def mmio_read(self, gpa: int, size_bytes: int, retired: int) -> int:
        """`vcpu_mmio_read`."""
        self._set_clock(retired)
        recorder = self._recorder
        if recorder.detail:
            self._record_exit(EXIT_EPT_MISCONFIG, 0)
        deadline_ns = self._queue.next_ns
        lapic = self._vcpu.lapic
        value = None if lapic is None else lapic.mmio_read(gpa, size_bytes)
        if value is None:
            value = self._board.mmio_read(gpa, size_bytes)
        kind = MMIO_READ
        if value is None:
            kind = MMIO_READ_UNSATISFIED
            value = self.user_space.mmio_read(gpa, size_bytes)
            if value is None:
                self._vcpu.engine.refuse()
                return 0
        if recorder.detail:
            recorder.kvm_mmio(kind, size_bytes, gpa, value)
        self._after_access(deadline_ns)
        return value

    def _after_access(self, deadline_ns: int) -> None:
        if self._queue.next_ns < deadline_ns:
            self._vcpu.engine.kick()
        if self._recorder.detail:
            self._record_entry()

    # Model-specific registers.

    def wrmsr(self, index: int, value: int, retired: int) -> bool:
        """WRMSR: `kvm_emulate_wrmsr`; False: #GP."""
        self._set_clock(retired)
        recorder = self._recorder
        if recorder.detail:
            self._record_exit(EXIT_MSR_WRITE, 0)
        deadline_ns = self._queue.next_ns
        done = self._vcpu.msrs.set(index, value)
        if not done:
            self._refused("write", index)
        if recorder.detail:
            recorder.kvm_msr(1, index, value, not done)
        self._after_access(deadline_ns)
        return done

    def rdmsr(self, index: int, retired: int) -> int | None:
        """RDMSR: `kvm_emulate_rdmsr`; None: #GP."""
        self._set_clock(retired)
        recorder = self._recorder
        if recorder.detail:
            self._record_exit(EXIT_MSR_READ, 0)
        value = self._vcpu.msrs.get(index)
        if value is None:
            self._refused("read", index)
        if recorder.detail:
            recorder.kvm_msr(0, index, value or 0, value is None)
            self._record_entry()
        return value

    def _refused(self, access: str, index: int) -> None:
        """`kvm_msr_ignored_check`: user space hears of an MSR that the guest has not."""
        vcpu = self._vcpu
        if not vcpu.msrs.is_known(index):
            self.user_space.unknown_msr(vcpu.vcpu_id, access, index, vcpu.engine.rip)

    # CR8.

    def write_cr8(self, value: int, retired: int) -> bool:
        """`kvm_set_cr8`; False: #GP."""
        if value & CR8_RESERVED:
            return False
        self._set_clock(retired)
        lapic = self._vcpu.lapic
        if lapic is None:
            lowered = value < self.cr8
            self.cr8 = value
            if lowered:
                self.user_space.set_tpr()
        else:
            lapic.set_tpr(value)
        return True

    def read_cr8(self, retired: int) -> int:
        """`kvm_get_cr8`."""
        lapic = self._vcpu.lapic
        return self.cr8 if lapic is None else lapic.get_cr8()

    # Hypercalls.

    def hypercall(self, retired: int) -> int:
        """VMCALL and VMMCALL: `kvm_emulate_hypercall`; returns RAX."""
        self._set_clock(retired)
        vcpu = self._vcpu
        if self._recorder.detail:
            self._record_exit(EXIT_VMCALL, 0)
        result = emulate_hypercall(vcpu.engine.registers(), self._board.delivery)
        if self._recorder.detail:
            self._record_entry()
        return result

    # CPUID.

    def cpuid(self, function: int, index: int) -> tuple[int, int, int, int]:
        """CPUID: what user space set, with the bits that follow the vCPU's state."""
        lapic = self._vcpu.lapic
        enabled = lapic is None or lapic.hw_enabled
        return self._vcpu.cpuid.answer(function, index, apic_enabled=enabled)


def _io_qualification(port: int, size_bytes: int, is_in: int) -> int:
    """The exit qualification of a port access (SDM table 29-5)."""
    return port << 16 | is_in << 3 | (size_bytes - 1)
