"""A real vCPU of /dev/kvm that executes the guest under the model's chips: `HostKvmEngine`.

The VM has no in-kernel irqchip (api.rst, KVM_RUN and KVM_INTERRUPT: the interrupt controllers are
user space's), so accesses to ports and to memory that is no RAM leave KVM_RUN and reach the
handlers. Events go in by KVM_INTERRUPT, which looks at no IF, and KVM_SET_VCPU_EVENTS;
`request_interrupt_window` is the interrupt window, and an NMI window is found by single steps
(KVM_SET_GUEST_DEBUG) from the entry to the IRET. MSRs but `CPU_MSRS` come by a filter
(KVM_X86_SET_MSR_FILTER) and KVM_CAP_X86_USER_SPACE_MSR, CR8 by `kvm_run.cr8`. A kick is a signal.

Time is the host's: nothing counts instructions, so `retired` is 0, a budget bounds nothing, and the
TSC is the host's own (`tsc_khz`). An event whose delivery a kick cut short comes back in
`idt_vectoring_info`, as from a real processor.

Not modelled, because KVM does not let user space do it:

* PAUSE does not end an entry, there are no breakpoints;
* hypercalls are answered by KVM;
* CPUID is what its handler says before the first entry, the subleaves up to the first that is
  empty; the APIC bit does not follow IA32_APIC_BASE;
* CR8 is KVM's within an entry: its handlers learn of a write at the next exit and cannot refuse
  it;
* software interrupts and exceptions cannot be injected; an NMI window behind an external interrupt,
  and one that is open after `MOST_STEPS` steps, is found late;
* registers that contradict each other cannot be set, and no access can be refused;
* without KVM_CAP_X86_MSR_FILTER (Linux 5.10) KVM answers the MSRs, and the guest gets no x2APIC and
  no TSC deadline.
"""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from ctypes import Array, c_char
from dataclasses import dataclass
from itertools import count
from mmap import mmap
from typing import Final

from kvmtick.abi import KvmError, ioctls
from kvmtick.abi.caps import KVM_CAP_X86_MSR_FILTER, KVM_CAP_X86_USER_SPACE_MSR
from kvmtick.abi.closing import Closing
from kvmtick.abi.exits import (
    Exit,
    ExitDebug,
    ExitHlt,
    ExitIntr,
    ExitIo,
    ExitIrqWindowOpen,
    ExitMmio,
    ExitRdmsr,
    ExitSetTpr,
    ExitShutdown,
    ExitWrmsr,
    trouble,
)
from kvmtick.abi.registers import put_registers, register_values
from kvmtick.abi.structs import (
    KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
    KVM_GUESTDBG_ENABLE,
    KVM_GUESTDBG_SINGLESTEP,
    KVM_MEM_READONLY,
    KVM_MSR_EXIT_REASON_FILTER,
    KVM_MSR_EXIT_REASON_INVAL,
    KVM_MSR_EXIT_REASON_UNKNOWN,
    KVM_MSR_FILTER_DEFAULT_DENY,
    KVM_MSR_FILTER_READ,
    KVM_MSR_FILTER_WRITE,
    KVM_VCPUEVENT_VALID_NMI_PENDING,
    KVM_VCPUEVENT_VALID_SHADOW,
    KVM_X86_SHADOW_INT_MOV_SS,
    KVM_X86_SHADOW_INT_STI,
    kvm_cpuid_entry2,
    kvm_debugregs,
    kvm_enable_cap,
    kvm_guest_debug,
    kvm_interrupt,
    kvm_msr_entry,
    kvm_msr_filter,
    kvm_msrs,
    kvm_regs,
    kvm_sregs,
    kvm_vcpu_events,
    make_cpuid2,
    make_msrs,
)
from kvmtick.cpu import engine as contract
from kvmtick.cpu.engine import (
    CPU_MSRS,
    INTR_INFO_DELIVER_CODE,
    INTR_INFO_VALID,
    RESET_REGISTERS,
    EventType,
    ExitReason,
    Interruptibility,
    pack_exit,
)
from kvmtick.host.kvmdev import KVM_PATH, VcpuFile, VmFile, open_kvm
from kvmtick.irqchip.apicdef import U64
from kvmtick.timing.clock import MonotonicClock

__all__ = ["MOST_STEPS", "HostKvm", "HostKvmEngine"]

MOST_STEPS: Final = 1000
"""Single steps of an entry that waits for an NMI window; a guest that is longer in its NMI handler
than that goes on at full speed, and is looked at when it leaves the guest."""

TSS_ADDRESS: Final = 0xFFFB_D000
"""KVM_SET_TSS_ADDR: three pages below 4 GiB, out of the guest's way; Intel's CPUs want them."""

MSR_IA32_TSC: Final = 0x10
RFLAGS_FIXED: Final = 1 << 1
RFLAGS_IF: Final = 1 << 9
NS_PER_MS: Final = 1_000_000
MAX_SUBLEAVES: Final = 64
CPUID_RANGES: Final = (0, 0x4000_0000, 0x8000_0000)
"""Where CPUID's ranges begin; EAX of the first leaf is the last."""
MAX_LEAVES: Final = 256
CR4_BITS: Final = 0x75_17FF
"""VME to OSXMMEXCPT, LA57, FSGSBASE, OSXSAVE, SMEP, SMAP, PKE; KVM has a say in it, too."""

_SHADOW: Final = int(Interruptibility.STI | Interruptibility.MOV_SS)
_HOLDS_BACK: Final = _SHADOW | int(Interruptibility.NMI)
_SREGS_MSRS: Final = ("efer", "fs_base", "gs_base")
"""Those of `CPU_MSRS` that KVM_SET_SREGS has."""
_MSR_OF: Final = {name: index for index, name in CPU_MSRS.items() if name not in _SREGS_MSRS}
_DEBUG_REGISTERS: Final = ("dr0", "dr1", "dr2", "dr3", "dr6", "dr7")
_GENERAL: Final = frozenset(name for name, *_ in kvm_regs._fields_)


@dataclass(slots=True)
class _Slot:
    """A memory slot, and how many engines have put the RAM there."""

    number: int
    ram: mmap | Array[c_char]
    users: int = 0


class HostKvm(Closing):
    """A VM of /dev/kvm for one machine: call it for an engine a vCPU. A context manager.

    It closes with the last of its engines, too. Raises `HostError` where /dev/kvm is absent or
    forbidden.
    """

    def __init__(self, path: str = KVM_PATH) -> None:
        self._vm: VmFile | None = None
        self._slots: dict[int, _Slot] = {}
        self._created = 0
        self._open = 0
        with open_kvm(path) as device:
            self._vm = vm = device.create_vm()
        try:
            vm.ioctl(ioctls.KVM_SET_TSS_ADDR, TSS_ADDRESS)
            self.tsc_khz = vm.ioctl(ioctls.KVM_GET_TSC_KHZ)
            """What the guest's TSC counts a millisecond."""
            self.filters_msrs = _filter_msrs(vm)
            """Whether the guest's MSRs are the model's."""
        except BaseException:
            self.close()
            raise

    def __call__(self) -> HostKvmEngine:
        """KVM_CREATE_VCPU. RuntimeError after `close`."""
        if self._vm is None:
            raise RuntimeError("this HostKvm was closed: make another for the next machine")
        vcpu = self._vm.create_vcpu(self._created)
        self._created += 1
        self._open += 1
        return HostKvmEngine(self, vcpu)

    def map_ram(self, gpa: int, ram: mmap | Array[c_char], writable: bool) -> None:
        """A memory slot; the engines of one machine, which all ask for it, share it."""
        assert self._vm is not None
        slot = self._slots.get(gpa)
        if slot is None:
            number = next(number for number in count() if number not in self._numbers())
            self._vm.map_memory(gpa, ram, number, 0 if writable else KVM_MEM_READONLY)
            slot = self._slots[gpa] = _Slot(number, ram)
        elif slot.ram is not ram:
            raise ValueError(f"there is other RAM at {gpa:#x}: unmap_ram it first")
        slot.users += 1

    def unmap_ram(self, gpa: int) -> None:
        """Take it away with the last engine that asks for it; ValueError: there is none."""
        slot = self._slots.get(gpa)
        if slot is None:
            raise ValueError(f"no RAM was put at {gpa:#x}")
        slot.users -= 1
        if not slot.users and self._vm is not None:
            del self._slots[gpa]
            self._vm.unmap_memory(gpa, slot.number)

    def _numbers(self) -> set[int]:
        return {slot.number for slot in self._slots.values()}

    def engine_closed(self) -> None:
        """One fewer."""
        self._open -= 1
        if not self._open:
            self.close()

    def close(self) -> None:
        """Give the VM back; engines that are still open keep it alive."""
        if self._vm is not None:
            self._vm.close()
            self._vm = None
        self._slots.clear()


def _filter_msrs(vm: VmFile) -> bool:
    """Let all MSRs but `CPU_MSRS` come to user space; False: this KVM cannot."""
    if not all(map(vm.check_extension, (KVM_CAP_X86_USER_SPACE_MSR, KVM_CAP_X86_MSR_FILTER))):
        return False
    enable = kvm_enable_cap(cap=KVM_CAP_X86_USER_SPACE_MSR)
    # x2APIC's are never filtered: those KVM has no local APIC for are invalid
    enable.args[0] = (
        KVM_MSR_EXIT_REASON_FILTER | KVM_MSR_EXIT_REASON_INVAL | KVM_MSR_EXIT_REASON_UNKNOWN
    )
    vm.ioctl(ioctls.KVM_ENABLE_CAP, enable)
    filter_ = kvm_msr_filter(flags=KVM_MSR_FILTER_DEFAULT_DENY)
    bits = ctypes.c_uint64(1)
    for range_, index in zip(filter_.ranges, CPU_MSRS, strict=False):
        range_.flags = KVM_MSR_FILTER_READ | KVM_MSR_FILTER_WRITE
        range_.base, range_.nmsrs, range_.bitmap = index, 1, ctypes.addressof(bits)
    vm.ioctl(ioctls.KVM_X86_SET_MSR_FILTER, filter_)
    return True


class HostKvmEngine:
    """One vCPU of a `HostKvm`; see `kvmtick.cpu.engine.Engine`."""

    name = "kvm"
    exact = False
    real_time = True
    has_deadline = False
    deadline_ns = 0
    cr4_bits = CR4_BITS

    def __init__(self, host: HostKvm, vcpu: VcpuFile) -> None:
        self.rflags = RFLAGS_FIXED
        self.interruptibility = 0
        self.retired = 0
        self.idt_vectoring_info = 0
        self.entry_error_code = 0
        self.error = ""
        self.rounds = 1
        self.tsc_khz = host.tsc_khz
        self._host: HostKvm | None = host
        self._vcpu = vcpu
        self._has_cpuid = False
        self._nmi_in_service = False
        self._on_out: contract.PortOut | None = None
        self._on_in: contract.PortIn | None = None
        self._on_mmio_write: contract.MmioWrite | None = None
        self._on_mmio_read: contract.MmioRead | None = None
        self._on_wrmsr: contract.MsrWrite | None = None
        self._on_rdmsr: contract.MsrRead | None = None
        self._on_cpuid: contract.Cpuid | None = None
        self._on_cr8_write: contract.Cr8Write | None = None
        self._on_cr8_read: contract.Cr8Read | None = None

    @property
    def last_exit(self) -> int:
        """`pack_exit` of what the last exit left."""
        return pack_exit(self.rflags, self.interruptibility, self.retired, self.idt_vectoring_info)

    def attach(
        self,
        on_out: contract.PortOut,
        on_in: contract.PortIn,
        on_mmio_write: contract.MmioWrite | None = None,
        on_mmio_read: contract.MmioRead | None = None,
        on_wrmsr: contract.MsrWrite | None = None,
        on_rdmsr: contract.MsrRead | None = None,
        on_cpuid: contract.Cpuid | None = None,
        on_cr8_write: contract.Cr8Write | None = None,
        on_cr8_read: contract.Cr8Read | None = None,
        on_hypercall: contract.Hypercall | None = None,
    ) -> None:
        """Set who answers; KVM keeps hypercalls to itself."""
        self._on_out = on_out
        self._on_in = on_in
        self._on_mmio_write = on_mmio_write
        self._on_mmio_read = on_mmio_read
        self._on_wrmsr = on_wrmsr
        self._on_rdmsr = on_rdmsr
        self._on_cpuid = on_cpuid
        self._on_cr8_write = on_cr8_write
        self._on_cr8_read = on_cr8_read

    def map_ram(
        self, gpa: int, ram: mmap | Array[c_char], *, writable: bool = True, shared: bool = False
    ) -> None:
        """As the contract says; RAM may come and go at any time."""
        self._open_host().map_ram(gpa, ram, writable)

    def unmap_ram(self, gpa: int) -> None:
        self._open_host().unmap_ram(gpa)

    def ram_written(self, gpa: int, size_bytes: int) -> None:
        """Nothing: the processor sees it."""

    def forget_changed_code(self) -> None:
        """Nothing: the processor sees it."""

    def refuse(self) -> None:
        """RuntimeError: it has no instructions to count, so none can be entered alone."""
        raise RuntimeError("a vCPU of /dev/kvm cannot leave before an access: use the unicorn CPU")

    def kick(self) -> None:
        self._vcpu.kick()

    def release_gil(self, enabled: bool) -> None:
        """Nothing: KVM_RUN always does."""

    def exit_on_pause(self, enabled: bool) -> None:
        """Nothing: KVM tells user space of no PAUSE."""

    def set_breakpoints(self, addresses: Collection[int]) -> None:
        if addresses:
            raise ValueError("a vCPU of /dev/kvm takes no breakpoints here: use the unicorn CPU")

    def close(self) -> None:
        host, self._host = self._host, None
        self._vcpu.close()
        if host is not None:
            host.engine_closed()

    def _open_host(self) -> HostKvm:
        if self._host is None:
            raise RuntimeError("the engine is closed")
        return self._host

    # One entry.

    def enter(
        self, intr_info: int, irq_window: bool, nmi_window: bool, budget: int, tsc: int
    ) -> int:
        self._open_host()
        if self._on_out is None:
            raise ValueError("attach() must precede the first enter()")
        if budget <= 0:
            raise ValueError("the budget must be positive")
        self.idt_vectoring_info = 0
        with self._vcpu.bounded(None):
            if not self._has_cpuid:
                self._set_cpuid()
            if intr_info & INTR_INFO_VALID:
                self._inject(intr_info)
            self._vcpu.area.request_interrupt_window = int(irq_window)
            try:
                if irq_window and not nmi_window and not intr_info and self._takes_interrupt():
                    return ExitReason.INTERRUPT_WINDOW
                if nmi_window:
                    reason = self._run_to_nmi_window(delivers=intr_info != 0)
                else:
                    reason = self._run()
            except BaseException:
                self._complete_access()
                self._take_state(0)
                raise
        self._take_state(intr_info if reason == ExitReason.EXTERNAL_INTERRUPT else 0)
        return reason

    def _inject(self, intr_info: int) -> None:
        """Queue the event; KVM delivers it before the first instruction."""
        kind, vector = intr_info >> 8 & 7, intr_info & 0xFF
        if kind == EventType.EXTERNAL:
            self._vcpu.ioctl(ioctls.KVM_INTERRUPT, kvm_interrupt(irq=vector))
            return
        events = self._vcpu.get(ioctls.KVM_GET_VCPU_EVENTS, kvm_vcpu_events)
        if kind == EventType.NMI and vector == 2:
            events.nmi.injected = 1
            self._nmi_in_service = True
        elif kind == EventType.HARDWARE_EXCEPTION:
            events.exception.injected, events.exception.nr = 1, vector
            events.exception.has_error_code = int(intr_info & INTR_INFO_DELIVER_CODE != 0)
            events.exception.error_code = self.entry_error_code
        else:
            raise ValueError(f"KVM injects no such event: {intr_info:#x}")
        self._vcpu.ioctl(ioctls.KVM_SET_VCPU_EVENTS, events)

    def _run(self) -> int:
        """To the next exit that is not an access."""
        while (reason := self._step()) is None:
            pass
        return reason

    def _step(self) -> int | None:
        """One KVM_RUN; None: it was an access, or a single step."""
        area = self._vcpu.area
        cr8 = area.cr8 = 0 if self._on_cr8_read is None else self._on_cr8_read(0)
        exit_ = self._vcpu.enter()
        if area.cr8 != cr8 and self._on_cr8_write is not None:
            self._on_cr8_write(area.cr8, 0)
        if isinstance(exit_, ExitIo):
            self._port_access(exit_)
        elif isinstance(exit_, ExitMmio):
            self._mmio_access(exit_)
        elif isinstance(exit_, ExitRdmsr):
            self._read_msr(exit_)
        elif isinstance(exit_, ExitWrmsr):
            self._write_msr(exit_)
        elif not isinstance(exit_, ExitSetTpr | ExitDebug):
            return self._reason(exit_)
        return None

    def _reason(self, exit_: Exit) -> int:
        if isinstance(exit_, ExitIntr):
            return ExitReason.EXTERNAL_INTERRUPT
        if isinstance(exit_, ExitHlt):
            return ExitReason.HLT
        if isinstance(exit_, ExitIrqWindowOpen):
            return ExitReason.INTERRUPT_WINDOW
        if isinstance(exit_, ExitShutdown):
            return ExitReason.TRIPLE_FAULT
        self.error = trouble(exit_)
        return ExitReason.INTERNAL_ERROR

    def _run_to_nmi_window(self, delivers: bool) -> int:
        """Step by step, until NMIs are open or something else ends the entry.

        With an event to deliver the first step leads into its handler.
        """
        with self._single_stepping():
            for _ in range(MOST_STEPS):
                # a kick comes first
                if not delivers and not self._vcpu.area.immediate_exit and self._takes_nmi():
                    return ExitReason.NMI_WINDOW
                delivers = False
                if (reason := self._step()) is not None:
                    return reason
        return self._run()

    def _takes_interrupt(self) -> bool:
        """The window is open before the first instruction: not every KVM looks there. A kick comes
        first.
        """
        is_open = self.rflags & RFLAGS_IF and not self.interruptibility & _SHADOW
        return bool(is_open and not self._vcpu.area.immediate_exit)

    def _takes_nmi(self) -> bool:
        events = self._vcpu.get(ioctls.KVM_GET_VCPU_EVENTS, kvm_vcpu_events)
        return not events.nmi.masked and not events.interrupt.shadow

    @contextmanager
    def _single_stepping(self) -> Iterator[None]:
        debug = kvm_guest_debug(control=KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP)
        self._vcpu.ioctl(ioctls.KVM_SET_GUEST_DEBUG, debug)
        try:
            yield
        finally:
            self._vcpu.ioctl(ioctls.KVM_SET_GUEST_DEBUG, kvm_guest_debug())

    def _take_state(self, injected: int) -> None:
        """RFLAGS and what holds events back; `injected`: this event may still wait."""
        self.rflags = self._vcpu.get(ioctls.KVM_GET_REGS, kvm_regs).rflags
        events = self._vcpu.get(ioctls.KVM_GET_VCPU_EVENTS, kvm_vcpu_events)
        if injected and (
            events.interrupt.injected or events.nmi.injected or events.exception.injected
        ):
            self.idt_vectoring_info = injected
            events.interrupt.injected = events.nmi.injected = 0
            events.exception.injected = events.exception.pending = 0
            self._vcpu.ioctl(ioctls.KVM_SET_VCPU_EVENTS, events)
        self.interruptibility = _interruptibility(events)
        self._nmi_in_service = events.nmi.masked != 0

    # Accesses. The answer of a handler that raises is in place before it is called.

    def _port_access(self, exit_: ExitIo) -> None:
        self._refresh_nmi_blocking()
        port, size_bytes = exit_.port, exit_.size
        assert self._on_out is not None
        assert self._on_in is not None
        if exit_.is_write:
            for value in exit_.values():
                self._on_out(port, size_bytes, value, 0)
            return
        answer = bytearray(b"\xff" * (size_bytes * exit_.count))
        self._vcpu.answer(bytes(answer))
        ones = (1 << 8 * size_bytes) - 1
        for at in range(0, len(answer), size_bytes):
            value = self._on_in(port, size_bytes, 0) & ones
            answer[at : at + size_bytes] = value.to_bytes(size_bytes, "little")
        self._vcpu.answer(bytes(answer))

    def _mmio_access(self, exit_: ExitMmio) -> None:
        self._refresh_nmi_blocking()
        gpa, size_bytes = exit_.phys_addr, exit_.len
        if exit_.is_write:
            if self._on_mmio_write is not None:
                self._on_mmio_write(gpa, size_bytes, int.from_bytes(exit_.data, "little"), 0)
            return
        self._vcpu.answer(b"\xff" * size_bytes)
        if self._on_mmio_read is not None:
            value = self._on_mmio_read(gpa, size_bytes, 0) & ((1 << 8 * size_bytes) - 1)
            self._vcpu.answer(value.to_bytes(size_bytes, "little"))

    def _read_msr(self, exit_: ExitRdmsr) -> None:
        self._refresh_nmi_blocking()
        msr = self._vcpu.area.u.msr
        msr.error = msr.data = 0
        value = None
        if self._on_rdmsr is not None and exit_.index not in CPU_MSRS:
            value = self._on_rdmsr(exit_.index, 0)
        msr.error = int(value is None)
        msr.data = value or 0

    def _write_msr(self, exit_: ExitWrmsr) -> None:
        self._refresh_nmi_blocking()
        msr = self._vcpu.area.u.msr
        msr.error = 0
        done = False
        if self._on_wrmsr is not None and exit_.index not in CPU_MSRS:
            done = self._on_wrmsr(exit_.index, exit_.data, 0)
        msr.error = int(not done)

    def _refresh_nmi_blocking(self) -> None:
        """`interruptibility` behind the access: no shadow, and whether an NMI is in service."""
        if self._nmi_in_service:
            events = self._vcpu.get(ioctls.KVM_GET_VCPU_EVENTS, kvm_vcpu_events)
            self._nmi_in_service = events.nmi.masked != 0
        self.interruptibility = int(Interruptibility.NMI) if self._nmi_in_service else 0

    def _complete_access(self) -> None:
        """Let KVM finish the instruction that a handler's exception left half done (api.rst,
        KVM_RUN: before the state is looked at).
        """
        while True:
            self._vcpu.kick()
            exit_ = self._vcpu.enter()
            if isinstance(exit_, ExitIntr):
                return
            # the next part of the same instruction
            if isinstance(exit_, ExitIo | ExitMmio) and not exit_.is_write:
                size_bytes = exit_.len if isinstance(exit_, ExitMmio) else exit_.size * exit_.count
                self._vcpu.answer(b"\xff" * size_bytes)

    # Registers.

    @property
    def rip(self) -> int:
        return int(self._vcpu.get(ioctls.KVM_GET_REGS, kvm_regs).rip)

    def reset(self, cs: int, ip: int) -> None:
        self.set_registers(
            RESET_REGISTERS | {"cs": cs, "cs_base": cs << 4, "rip": ip, "rflags": RFLAGS_FIXED}
        )
        # nothing injected, pending or masked
        flags = KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SHADOW
        self._vcpu.ioctl(ioctls.KVM_SET_VCPU_EVENTS, kvm_vcpu_events(flags=flags))
        self._take_state(0)
        self.idt_vectoring_info = 0

    def registers(self) -> dict[str, int]:
        vcpu = self._vcpu
        regs = vcpu.get(ioctls.KVM_GET_REGS, kvm_regs)
        sregs = vcpu.get(ioctls.KVM_GET_SREGS, kvm_sregs)
        debug = vcpu.get(ioctls.KVM_GET_DEBUGREGS, kvm_debugregs)
        values = dict(register_values(regs, sregs)) | self._get_msrs()
        return values | dict(zip(_DEBUG_REGISTERS, (*debug.db, debug.dr6, debug.dr7), strict=True))

    def set_registers(self, values: Mapping[str, int]) -> None:
        """As the contract says; `KvmError` EINVAL where KVM finds a contradiction."""
        special = dict(values)
        msrs = {name: special.pop(name) for name in values if name in _MSR_OF}
        debug = {name: special.pop(name) for name in values if name in _DEBUG_REGISTERS}
        vcpu = self._vcpu
        regs = vcpu.get(ioctls.KVM_GET_REGS, kvm_regs)
        sregs = vcpu.get(ioctls.KVM_GET_SREGS, kvm_sregs)
        put_registers(special, regs, sregs)
        if special.keys() - _GENERAL:
            vcpu.ioctl(ioctls.KVM_SET_SREGS, sregs)
        vcpu.ioctl(ioctls.KVM_SET_REGS, regs)
        if debug:
            self._set_debug_registers(debug)
        if msrs:
            self._set_msrs({_MSR_OF[name]: value for name, value in msrs.items()})
        self.rflags = vcpu.get(ioctls.KVM_GET_REGS, kvm_regs).rflags

    def set_interruptibility(self, state: int) -> None:
        if state & ~_HOLDS_BACK or state & _SHADOW == _SHADOW:
            raise ValueError(f"no such interruptibility: {state}")
        events = self._vcpu.get(ioctls.KVM_GET_VCPU_EVENTS, kvm_vcpu_events)
        events.interrupt.shadow = _kvm_shadow(state)
        events.nmi.masked = int(state & Interruptibility.NMI != 0)
        self._vcpu.ioctl(ioctls.KVM_SET_VCPU_EVENTS, events)
        self.interruptibility = state

    def _set_debug_registers(self, values: Mapping[str, int]) -> None:
        debug = self._vcpu.get(ioctls.KVM_GET_DEBUGREGS, kvm_debugregs)
        for name, value in values.items():
            if name in ("dr6", "dr7"):
                setattr(debug, name, value)
            else:
                debug.db[int(name[2:])] = value
        self._vcpu.ioctl(ioctls.KVM_SET_DEBUGREGS, debug)

    def _get_msrs(self) -> dict[str, int]:
        """The values of `CPU_MSRS` that KVM_GET_SREGS has not."""
        data = make_msrs(kvm_msr_entry(index=index) for index in _MSR_OF.values())
        self._vcpu.ioctl(ioctls.KVM_GET_MSRS, data)
        return {name: entry.data for name, entry in zip(_MSR_OF, _entries(data), strict=True)}

    def _set_msrs(self, values: Mapping[int, int]) -> None:
        entries = [kvm_msr_entry(index=index, data=value) for index, value in values.items()]
        done = self._vcpu.ioctl(ioctls.KVM_SET_MSRS, make_msrs(entries))
        if done < len(entries):
            index, value = entries[done].index, entries[done].data
            why = f"MSR {index:#x} takes no {value:#x}"
            raise KvmError(errno.EINVAL, "KVM_SET_MSRS", why)

    # Time and CPUID.

    def set_tsc(self, khz: int, value: int, at_ns: int, live: bool) -> None:
        if khz != self.tsc_khz:
            self._vcpu.ioctl(ioctls.KVM_SET_TSC_KHZ, khz)
            self.tsc_khz = khz
        cycles = value + (MonotonicClock().now_ns - at_ns) * khz // NS_PER_MS
        self._set_msrs({MSR_IA32_TSC: cycles & U64})

    def read_tsc(self) -> int:
        data = make_msrs([kvm_msr_entry(index=MSR_IA32_TSC)])
        self._vcpu.ioctl(ioctls.KVM_GET_MSRS, data)
        return int(next(_entries(data)).data)

    def _set_cpuid(self) -> None:
        """KVM_SET_CPUID2, which has to come before the first KVM_RUN."""
        self._has_cpuid = True
        if self._on_cpuid is not None:
            self._vcpu.ioctl(ioctls.KVM_SET_CPUID2, make_cpuid2(_leaves(self._on_cpuid)))


def _interruptibility(events: kvm_vcpu_events) -> int:
    """An exception that KVM itself has still to deliver holds other events back like MOV SS."""
    if events.exception.injected or events.exception.pending:
        return int(Interruptibility.MOV_SS)
    state = int(Interruptibility.NMI) if events.nmi.masked else 0
    if events.interrupt.shadow & KVM_X86_SHADOW_INT_STI:
        state |= Interruptibility.STI
    if events.interrupt.shadow & KVM_X86_SHADOW_INT_MOV_SS:
        state |= Interruptibility.MOV_SS
    return state


def _kvm_shadow(state: int) -> int:
    shadow = KVM_X86_SHADOW_INT_STI if state & Interruptibility.STI else 0
    return shadow | (KVM_X86_SHADOW_INT_MOV_SS if state & Interruptibility.MOV_SS else 0)


def _entries(msrs: bytearray) -> Iterator[kvm_msr_entry]:
    """What `make_msrs` put together."""
    for at in range(ctypes.sizeof(kvm_msrs), len(msrs), ctypes.sizeof(kvm_msr_entry)):
        yield kvm_msr_entry.from_buffer_copy(msrs, at)


def _leaves(answer: contract.Cpuid) -> list[kvm_cpuid_entry2]:
    """What CPUID answers, as KVM_SET_CPUID2 wants it."""
    leaves: list[kvm_cpuid_entry2] = []
    for first in CPUID_RANGES:
        last = min(answer(first, 0)[0], first + MAX_LEAVES - 1)
        for function in range(first, max(first, last) + 1):
            leaves += _leaf(answer, function)
    return leaves


def _leaf(answer: contract.Cpuid, function: int) -> Iterator[kvm_cpuid_entry2]:
    """A leaf, with its subleaves if they differ."""
    values = answer(function, 0)
    if not any(values):
        return
    has_subleaves = answer(function, 1) != values
    flags = KVM_CPUID_FLAG_SIGNIFCANT_INDEX if has_subleaves else 0
    for index in range(MAX_SUBLEAVES if has_subleaves else 1):
        eax, ebx, ecx, edx = values = answer(function, index)
        if index and not (eax or ebx):
            return
        yield kvm_cpuid_entry2(
            function=function, index=index, flags=flags, eax=eax, ebx=ebx, ecx=ecx, edx=edx
        )
