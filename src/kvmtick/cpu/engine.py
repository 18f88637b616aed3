"""The contract between a vCPU and whatever executes guest instructions.

An engine is the hardware side of VMX as far as events go (Intel SDM vol. 3C, chapters 25-28): the
vCPU (`kvmtick.vcpu`) decides, the engine obeys. `enter` is one VM entry and the guest execution up
to the next VM exit:

* the event in `intr_info` (VM-entry interruption information, SDM 25.8.3) is delivered through the
  guest's IVT or IDT before the first instruction; the vCPU has checked IF and the shadow;
* at every instruction boundary, the first included, in this order: a kick ends the execution
  (`EXTERNAL_INTERRUPT`), then an open NMI window if `nmi_window` (`NMI_WINDOW`), then an open
  interrupt window if `irq_window` (`INTERRUPT_WINDOW`), then an exhausted `budget`
  (`PREEMPTION_TIMER`);
* HLT ends it with `HLT`: it has retired, RIP is behind it and it lifts an STI shadow (so
  `sti; hlt` ends with HLT even when a window was asked for: look again before sleeping);
* a kick is used up by the exit it causes; one that comes too late for an exit ends the next entry,
  after that entry's event is delivered, with nothing retired;
* accesses to ports, to physical memory that is no RAM and to the MSRs in `MSRS` do not leave
  `enter`: the engine calls the handlers given to `attach`, with the number of instructions retired
  since the entry, the access itself not counted. To leave after it the handler kicks; the access is
  done once, and the kick ends the execution at the boundary behind the instruction;
* memory accesses have any address and 1 to 8 bytes: one that crosses the end of a page comes as its
  two parts, in the order of their addresses;
* CPUID answers what the handler says;
* every exit leaves `rflags`, `interruptibility`, `retired` and `idt_vectoring_info` up to date;
  in a handler `interruptibility` is that behind the access.

Instructions are the unit of virtual time: one instruction is 1 ns (each iteration of a REP string
instruction counts as one). RDTSC and RDTSCP read `tsc` as given to `enter` plus the instructions
retired since, or CLOCK_MONOTONIC after `use_host_tsc`.

An engine never asks a chip anything, keeps all state in itself, and is used by one thread; only
`kick` may be called from any thread.
"""

from collections.abc import Callable
from enum import IntEnum, IntFlag
from mmap import mmap
from typing import Protocol

__all__ = [
    "INTR_INFO_DELIVER_CODE",
    "INTR_INFO_VALID",
    "MSRS",
    "Cpuid",
    "Engine",
    "EventType",
    "ExitReason",
    "Interruptibility",
    "MmioRead",
    "MmioWrite",
    "MsrRead",
    "MsrWrite",
    "PortIn",
    "PortOut",
]

INTR_INFO_DELIVER_CODE = 1 << 11
INTR_INFO_VALID = 1 << 31

MSRS = frozenset({0x10, 0x1B, 0x6E0, *range(0x800, 0x900)})
"""The MSRs that handlers answer: IA32_TIME_STAMP_COUNTER, IA32_APIC_BASE, IA32_TSC_DEADLINE and the
x2APIC's. All others are the CPU's own."""


class EventType(IntEnum):
    """Interruption type, bits 10:8 of an interruption-information field (SDM 25.8.3)."""

    EXTERNAL = 0
    NMI = 2
    HARDWARE_EXCEPTION = 3
    SOFTWARE_INTERRUPT = 4
    PRIVILEGED_SOFTWARE_EXCEPTION = 5
    SOFTWARE_EXCEPTION = 6


class Interruptibility(IntFlag):
    """Guest interruptibility state (SDM 25.4.2): what holds an event back besides IF."""

    STI = 1 << 0
    MOV_SS = 1 << 1
    NMI = 1 << 3


class ExitReason(IntEnum):
    """Basic VM-exit reasons (SDM vol. 3D, appendix C); the last is ours."""

    EXTERNAL_INTERRUPT = 1
    TRIPLE_FAULT = 2
    INTERRUPT_WINDOW = 7
    NMI_WINDOW = 8
    HLT = 12
    PREEMPTION_TIMER = 52
    INTERNAL_ERROR = 0x1_0000
    """The engine cannot go on: `error` says why (an address nothing answers, a broken decoder)."""


PortOut = Callable[[int, int, int, int], None]
"""`(port, size_bytes, value, retired)`: the guest wrote `value` to `port`."""

PortIn = Callable[[int, int, int], int]
"""`(port, size_bytes, retired)`: the guest reads `port`; returns the value."""

MmioWrite = Callable[[int, int, int, int], None]
"""`(gpa, size_bytes, value, retired)`: the guest wrote `value` where no RAM is."""

MmioRead = Callable[[int, int, int], int]
"""`(gpa, size_bytes, retired)`: the guest reads where no RAM is; returns the value."""

MsrWrite = Callable[[int, int, int], bool]
"""`(index, value, retired)`: WRMSR of 64 bits; False: the guest gets #GP(0)."""

MsrRead = Callable[[int, int], int | None]
"""`(index, retired)`: RDMSR; returns the 64 bits, None: the guest gets #GP(0)."""

Cpuid = Callable[[int, int], tuple[int, int, int, int]]
"""`(function, index)` are EAX and ECX; returns EAX, EBX, ECX, EDX."""


class Engine(Protocol):
    """Executes guest instructions for one vCPU."""

    name: str
    rflags: int
    interruptibility: int
    retired: int
    idt_vectoring_info: int
    error: str

    def attach(
        self,
        on_out: PortOut,
        on_in: PortIn,
        on_mmio_write: MmioWrite | None = None,
        on_mmio_read: MmioRead | None = None,
        on_wrmsr: MsrWrite | None = None,
        on_rdmsr: MsrRead | None = None,
        on_cpuid: Cpuid | None = None,
    ) -> None:
        """Set who answers the guest's accesses. Must precede the first `enter`.

        Without a handler memory that is no RAM reads all ones and swallows writes, the MSRs of
        `MSRS` give #GP(0), and CPUID reads 0.
        """

    def map_ram(self, gpa: int, ram: mmap) -> None:
        """Put `ram` (anonymous, a multiple of 4096 bytes) at guest-physical address `gpa`.

        The guest and the host see the same bytes; what is not mapped is the MMIO handlers'.
        """

    def ram_written(self, gpa: int, size_bytes: int) -> None:
        """The host wrote guest RAM: forget what was translated from it."""

    def reset(self, cs: int, ip: int) -> None:
        """Registers as after RESET (SDM table 10-1), but starting at `cs`:`ip` in real mode."""

    def reset_protected(self, eip: int) -> None:
        """As `reset`, but in 32-bit protected mode without paging, at `eip`: CS and the data
        segments are flat (base 0, limit 4 GiB), GDTR and IDTR are empty, IF is clear.
        """

    def enter(
        self, intr_info: int, irq_window: bool, nmi_window: bool, budget: int, tsc: int
    ) -> int:
        """Run the guest for at most `budget` (> 0) instructions; returns an `ExitReason` value."""

    def kick(self) -> None:
        """Leave the guest at the next instruction boundary (or at once, at the next `enter`)."""

    def release_gil(self, enabled: bool) -> None:
        """Whether other Python threads run while the guest does; off, port accesses cost less.

        A `kick` from another thread needs it.
        """

    def use_host_tsc(self, offset_ns: int) -> None:
        """From now on the guest's TSC is CLOCK_MONOTONIC minus `offset_ns` (real time)."""

    def registers(self) -> dict[str, int]:
        """General, segment and control registers by SDM name in lower case (`rip`, `cs`, `cr0`)."""

    def set_register(self, name: str, value: int) -> None:
        """Write one general register, `rip` or `rflags`."""

    def close(self) -> None:
        """Give everything back; harmless when repeated."""
