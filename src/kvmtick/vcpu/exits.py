"""What the guest's accesses lead to while the engine is inside: exits KVM handles itself.

Ports (kvm_fast_pio, kernel_pio), memory that is no RAM (vcpu_mmio_read, vcpu_mmio_write: the local
APIC, then the devices on the bus, then user space), the MSRs of time and of the local APIC
(kvm_get_msr_common, kvm_set_msr_common) and CPUID. The engine calls these with the instructions
retired since the entry, so the time of an access is exact.

Whoever wants the vCPU's attention makes a request and kicks it; an access that armed an earlier
timer than the slice was cut for kicks too.

Not modelled: the fast path of MMIO ioeventfds, coalesced MMIO, one exit for several accesses of an
instruction (an access over the end of a page is two; a read-modify-write, too).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from kvmtick.irqchip.apicdef import MSR_IA32_APICBASE, MSR_IA32_TSC_DEADLINE, U64
from kvmtick.irqchip.lapic import is_valid_apic_base

if TYPE_CHECKING:
    from kvmtick.vcpu.vcpu import Vcpu, VcpuBoard

__all__ = ["ExitHandlers", "UserSpace"]

# Basic exit reasons (SDM appendix C); engines report none of these.
EXIT_IO_INSTRUCTION = 30
EXIT_MSR_READ = 31
EXIT_MSR_WRITE = 32
EXIT_EPT_MISCONFIG = 49

MSR_IA32_TSC = 0x10
MSR_IA32_TSC_ADJUST = 0x3B
MSR_KVM_SYSTEM_TIME_NEW = 0x4B56_4D01
MSR_KVM_PV_EOI_EN = 0x4B56_4D04
_ABSENT = frozenset({MSR_IA32_TSC_ADJUST, MSR_KVM_SYSTEM_TIME_NEW, MSR_KVM_PV_EOI_EN})
"""User space may read them, CPUID offers none to the guest."""
APIC_BASE_WITHOUT_LAPIC = 0xFEE0_0900

MMIO_READ_UNSATISFIED, MMIO_READ, MMIO_WRITE = range(3)

RAX_BYTES = {1: 0xFF, 2: 0xFFFF, 4: 0xFFFF_FFFF}


class UserSpace(Protocol):
    """What no in-kernel device answers: an exit to user space."""

    def read(self, port: int, size_bytes: int) -> int:
        """The value the guest reads from a port."""

    def write(self, port: int, size_bytes: int, value: int) -> None:
        """The guest wrote `value` to a port."""

    def mmio_read(self, gpa: int, size_bytes: int) -> int:
        """The value the guest reads from memory that is no RAM."""

    def mmio_write(self, gpa: int, size_bytes: int, value: int) -> None:
        """The guest wrote `value` to memory that is no RAM."""

    def ioapic_eoi(self, vector: int) -> None:
        """KVM_EXIT_IOAPIC_EOI: the guest ended an interrupt of the IOAPIC in user space."""


class ExitHandlers:
    """The handlers of one vCPU; `entered_ns` is when it entered the guest last."""

    __slots__ = (
        "_apic_base",
        "_board",
        "_bus",
        "_clock",
        "_pio_data",
        "_ports",
        "_queue",
        "_recorder",
        "_vcpu",
        "entered_ns",
    )

    def __init__(self, board: VcpuBoard, vcpu: Vcpu) -> None:
        self._board = board
        self._vcpu = vcpu
        self._clock = board.clock
        self._queue = board.queue
        self._recorder = board.recorder
        self._bus = board.bus
        self._ports = board.ports
        self._pio_data = 0
        # IA32_APIC_BASE of a vCPU whose local APIC is user space's business.
        self._apic_base = APIC_BASE_WITHOUT_LAPIC
        self.entered_ns = 0
        vcpu.engine.attach(
            self.pio_out,
            self.pio_in,
            self.mmio_write,
            self.mmio_read,
            self.wrmsr,
            self.rdmsr,
            self.cpuid,
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
        vcpu = self._vcpu
        self._recorder.kvm_entry(vcpu.vcpu_id, vcpu.engine.registers()["rip"], 0)

    # Ports.

    def pio_out(self, port: int, size_bytes: int, value: int, retired: int) -> None:
        """OUT and OUTS."""
        self._set_clock(retired)
        recorder = self._recorder
        if recorder.detail:
            self._record_exit(EXIT_IO_INSTRUCTION, _io_qualification(port, size_bytes, 0))
        recorder.kvm_pio(1, port, size_bytes, 1, value)
        deadline_ns = self._queue.next_ns
        device = self._bus.find(port, size_bytes)
        if device is not None:
            device.io_write(port, size_bytes, value)
        elif not self._board.signal_ioeventfd(True, port, size_bytes, value):
            self._ports.write(port, size_bytes, value)
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
        if device is None:
            value = self._ports.read(port, size_bytes)
        else:
            value = device.io_read(port, size_bytes, self._pio_data)
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
            self._ports.mmio_write(gpa, size_bytes, value)
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
            value = self._ports.mmio_read(gpa, size_bytes)
        if recorder.detail:
            recorder.kvm_mmio(kind, size_bytes, gpa, value)
        self._after_access(deadline_ns)
        return value

    def _after_access(self, deadline_ns: int) -> None:
        if self._queue.next_ns < deadline_ns:
            self._vcpu.engine.kick()
        recorder = self._recorder
        if recorder.detail:
            self._record_entry()
        # A guest can write registers for ever within one entry.
        if recorder.full:
            recorder.flush()

    # Model-specific registers.

    def wrmsr(self, index: int, value: int, retired: int) -> bool:
        """WRMSR: `kvm_emulate_wrmsr`; False: #GP."""
        self._set_clock(retired)
        recorder = self._recorder
        if recorder.detail:
            self._record_exit(EXIT_MSR_WRITE, 0)
        deadline_ns = self._queue.next_ns
        done = self.set_msr(index, value)
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
        value = self.get_msr(index)
        if recorder.detail:
            recorder.kvm_msr(0, index, value or 0, value is None)
            self._record_entry()
        return value

    def set_msr(self, index: int, value: int, host_initiated: bool = False) -> bool:
        """`kvm_set_msr_common`, as far as time and the local APIC go; False: refused."""
        vcpu = self._vcpu
        lapic = vcpu.lapic
        if index == MSR_IA32_TSC:
            vcpu.set_guest_tsc(value)
            return True
        if index in _ABSENT:
            # Taken from user space, and without effect as long as CPUID does not have it.
            return host_initiated and index == MSR_IA32_TSC_ADJUST
        if index == MSR_IA32_APICBASE:
            if lapic is not None:
                return lapic.set_base(value, host_initiated)
            if not is_valid_apic_base(value, vcpu.has_cpuid("x2apic"), vcpu.cpuid.maxphyaddr()):
                return False
            self._apic_base = value
            return True
        if lapic is None:
            return index == MSR_IA32_TSC_DEADLINE
        return lapic.write_msr(index, value)

    def get_msr(self, index: int) -> int | None:
        """`kvm_get_msr_common`, as far as time and the local APIC go; None: refused."""
        vcpu = self._vcpu
        lapic = vcpu.lapic
        if index == MSR_IA32_TSC:
            return vcpu.guest_tsc() & U64
        if index in _ABSENT:
            return 0
        if index == MSR_IA32_APICBASE:
            return self._apic_base if lapic is None else lapic.apic_base
        if lapic is None:
            return 0 if index == MSR_IA32_TSC_DEADLINE else None
        return lapic.read_msr(index)

    # CPUID.

    def cpuid(self, function: int, index: int) -> tuple[int, int, int, int]:
        """CPUID: what user space set, with the bits that follow the vCPU's state."""
        lapic = self._vcpu.lapic
        enabled = lapic is None or lapic.hw_enabled
        return self._vcpu.cpuid.answer(function, index, apic_enabled=enabled)


def _io_qualification(port: int, size_bytes: int, is_in: int) -> int:
    """The exit qualification of a port access (SDM table 28-5)."""
    return port << 16 | is_in << 3 | (size_bytes - 1)
