"""The contract between a vCPU and whatever executes guest instructions.

An engine is the hardware side of VMX as far as events go (Intel SDM vol. 3C, chapters 26-29): the
vCPU (`kvmtick.vcpu`) decides, the engine obeys. `enter` is one VM entry and the guest execution up
to the next VM exit:

* the event in `intr_info` (VM-entry interruption information, SDM 26.8.3) is delivered through the
  guest's IVT or IDT before the first instruction; the vCPU has checked IF and the shadow. An
  exception whose bit 11 is set pushes `entry_error_code`;
* at every instruction boundary, the first included, in this order: a kick ends the execution
  (`EXTERNAL_INTERRUPT`), then an open NMI window if `nmi_window` (`NMI_WINDOW`), then an open
  interrupt window if `irq_window` (`INTERRUPT_WINDOW`), then an exhausted `budget`
  (`PREEMPTION_TIMER`);
* HLT ends it with `HLT`: it has retired, RIP is behind it and it lifts an STI shadow (so
  `sti; hlt` ends with HLT even when a window was asked for: look again before sleeping);
* a kick is used up by the exit it causes; one that comes too late for an exit ends the next entry,
  after that entry's event is delivered, with nothing retired;
* a breakpoint ends it with `BREAKPOINT` before the instruction at its address (linear), if nothing
  above does; the first instruction of an entry is no exception, so whoever goes on from a
  breakpoint takes it away for one step;
* PAUSE ends it with `PAUSE`, retired, if `exit_on_pause` asked for that;
* accesses to ports, to physical memory that is no RAM, to CR8 and to the MSRs that are not in
  `CPU_MSRS`, and hypercalls do not leave `enter`: the engine calls the handlers given to `attach`,
  with the number of instructions retired since the entry, the access itself not counted. To leave
  after it the handler kicks; the access is done once, and the kick ends the execution at the
  boundary behind the instruction;
* a handler of a port or of memory that is no RAM may `refuse` the access. Its answer does not
  count then, and the execution ends with `ACCESS` before the instruction: registers and shadow are
  as if it had not begun, the next entry begins it anew. What it has already asked of handlers, and
  stored to RAM, stays; of an access in the delivery of an event that is an `INTERNAL_ERROR`;
* memory accesses have any address and 1 to 8 bytes: one that crosses the end of a page comes as its
  two parts, in the order of their addresses;
* CPUID answers what the handler says;
* every exit leaves `rflags`, `interruptibility`, `retired` and `idt_vectoring_info` up to date, and
  `last_exit`, which holds them in one number (`pack_exit`): reading an attribute is what an entry
  costs most. In a handler `interruptibility` is that behind the access.

Instructions are the unit of virtual time: one instruction is 1 ns (each iteration of a REP string
instruction counts as one). The machine's own TSC counts these, from what was given to `enter` on,
or it is CLOCK_MONOTONIC; RDTSC and RDTSCP read what `set_tsc` makes of it, at first the same.

An engine whose `exact` is False looks at boundaries only where a basic block of guest code begins
(STI, MOV SS, POPF, IRET and HLT end one, so windows still open at once; so does a WRMSR whose
handler kicked). A block counts when it
begins: an access may tell a `retired` that is up to a block too late, and an entry may exceed its
budget by one, unless it is 1: that is one instruction with every engine. A block that ends with
`ACCESS` has counted whole. Either kind is deterministic: the same entries give the same run.

`cr4_bits` are the bits of CR4 that it can have.

An engine that is `real_time` is a real processor: nothing counts instructions, so `retired` is 0, a
budget bounds nothing, and it needs a clock that goes on by itself. Its TSC has a rate of its own
(`tsc_khz`). A kick that comes before the event of an entry is delivered gives the event back in
`idt_vectoring_info`.

An engine never asks a chip anything, keeps all state in itself, and is used by one thread; only
`kick` may be called from any thread.
"""

from collections.abc import Callable, Collection, Mapping
from ctypes import Array, c_char
from enum import IntEnum, IntFlag
from mmap import mmap
from typing import Final, Protocol

__all__ = [
    "CPU_MSRS",
    "EXIT_EVENT_CUT",
    "EXIT_INTERRUPTIBILITY",
    "EXIT_INTERRUPTIBILITY_SHIFT",
    "EXIT_RETIRED_SHIFT",
    "EXIT_RFLAGS",
    "INTR_INFO_DELIVER_CODE",
    "INTR_INFO_VALID",
    "RESET_REGISTERS",
    "Cpuid",
    "Cr8Read",
    "Cr8Write",
    "Engine",
    "EventType",
    "ExitReason",
    "Hypercall",
    "Interruptibility",
    "MmioRead",
    "MmioWrite",
    "MsrRead",
    "MsrWrite",
    "PortIn",
    "PortOut",
    "pack_exit",
]

INTR_INFO_DELIVER_CODE: Final = 1 << 11
INTR_INFO_VALID: Final = 1 << 31

CPU_MSRS: Final = {
    0x174: "sysenter_cs",
    0x175: "sysenter_esp",
    0x176: "sysenter_eip",
    0xC000_0080: "efer",
    0xC000_0081: "star",
    0xC000_0082: "lstar",
    0xC000_0083: "cstar",
    0xC000_0084: "fmask",
    0xC000_0100: "fs_base",
    0xC000_0101: "gs_base",
    0xC000_0102: "kernel_gs_base",
    0xC000_0103: "tsc_aux",
}
"""The MSRs that are the CPU's own, by the names that `registers` has them under: what instructions
work with. The handlers answer all others."""


_SEGMENTS: Final = ("es", "cs", "ss", "ds", "fs", "gs", "ldtr", "tr")
_CODE_ACCESS: Final = 0x9B
_DATA_ACCESS: Final = 0x93
RESET_REGISTERS: Final = {
    **dict.fromkeys(("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi"), 0),
    **{f"r{number}": 0 for number in range(8, 16)},
    "rip": 0,
    **dict.fromkeys(_SEGMENTS, 0),
    **{f"{name}_base": 0 for name in (*_SEGMENTS, "gdtr", "idtr")},
    **{f"{name}_limit": 0xFFFF for name in (*_SEGMENTS, "gdtr", "idtr")},
    **{f"{name}_access": _DATA_ACCESS for name in _SEGMENTS},
    "cs_access": _CODE_ACCESS,
    "ldtr_access": 0x82,
    "tr_access": 0x8B,
    "cr0": 0x6000_0010,
    "cr2": 0,
    "cr3": 0,
    "cr4": 0,
    "dr0": 0,
    "dr1": 0,
    "dr2": 0,
    "dr3": 0,
    "dr6": 0xFFFF_0FF0,
    "dr7": 0x400,
    **dict.fromkeys(CPU_MSRS.values(), 0),
}
"""All but RFLAGS, after RESET (SDM vol. 3A, table 11-1)."""


EXIT_RFLAGS: Final = 0xFF_FFFF
EXIT_INTERRUPTIBILITY_SHIFT: Final = 24
EXIT_INTERRUPTIBILITY: Final = 0xF
EXIT_EVENT_CUT: Final = 1 << 28
EXIT_RETIRED_SHIFT: Final = 32
"""Fields of `Engine.last_exit`. EVENT_CUT: `idt_vectoring_info` is valid."""


def pack_exit(rflags: int, interruptibility: int, retired: int, idt_vectoring_info: int) -> int:
    """`Engine.last_exit`."""
    state = rflags & EXIT_RFLAGS | interruptibility << EXIT_INTERRUPTIBILITY_SHIFT
    if idt_vectoring_info:
        state |= EXIT_EVENT_CUT
    return state | retired << EXIT_RETIRED_SHIFT


class EventType(IntEnum):
    """Interruption type, bits 10:8 of an interruption-information field (SDM 26.8.3)."""

    EXTERNAL = 0
    NMI = 2
    HARDWARE_EXCEPTION = 3
    SOFTWARE_INTERRUPT = 4
    PRIVILEGED_SOFTWARE_EXCEPTION = 5
    SOFTWARE_EXCEPTION = 6


class Interruptibility(IntFlag):
    """Guest interruptibility state (SDM 26.4.2): what holds an event back besides IF."""

    STI = 1 << 0
    MOV_SS = 1 << 1
    NMI = 1 << 3


class ExitReason(IntEnum):
    """Basic VM-exit reasons (SDM vol. 3D, appendix C); those from 0x10000 on are ours."""

    EXTERNAL_INTERRUPT = 1
    TRIPLE_FAULT = 2
    INTERRUPT_WINDOW = 7
    NMI_WINDOW = 8
    HLT = 12
    PAUSE = 40
    PREEMPTION_TIMER = 52
    INTERNAL_ERROR = 0x1_0000
    """The engine cannot go on: `error` says why (an address nothing answers, a broken decoder)."""
    BREAKPOINT = 0x1_0001
    ACCESS = 0x1_0002
    """A handler refused an access."""


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

Cr8Write = Callable[[int, int], bool]
"""`(value, retired)`: MOV to CR8; False: the guest gets #GP(0)."""

Cr8Read = Callable[[int], int]
"""`(retired)`: MOV from CR8; returns the task priority, 0 to 15."""

Hypercall = Callable[[int], int]
"""`(retired)`: VMCALL or VMMCALL, whichever the CPU's vendor has; what it asks is in `registers`.
Returns RAX, cut to 32 bits outside of 64-bit mode."""

Cpuid = Callable[[int, int], tuple[int, int, int, int]]
"""`(function, index)` are EAX and ECX; returns EAX, EBX, ECX, EDX."""


class Engine(Protocol):
    """Executes guest instructions for one vCPU."""

    name: str
    exact: bool
    real_time: bool
    tsc_khz: int
    cr4_bits: int
    has_deadline: bool
    """It looks at `deadline_ns`; another has to be kicked."""
    deadline_ns: int
    """When CLOCK_MONOTONIC is there the guest leaves by itself, as if kicked; 0: it does not."""
    rflags: int
    interruptibility: int
    retired: int
    idt_vectoring_info: int
    entry_error_code: int
    error: str
    rounds: int
    """After `ACCESS`: how many the REP INS at RIP has left; 1 for any other instruction."""

    @property
    def last_exit(self) -> int:
        """What the last exit left, packed as `pack_exit` does."""

    @property
    def rip(self) -> int:
        """RIP, without the rest of `registers`, which takes long to get."""

    def attach(
        self,
        on_out: PortOut,
        on_in: PortIn,
        on_mmio_write: MmioWrite | None = None,
        on_mmio_read: MmioRead | None = None,
        on_wrmsr: MsrWrite | None = None,
        on_rdmsr: MsrRead | None = None,
        on_cpuid: Cpuid | None = None,
        on_cr8_write: Cr8Write | None = None,
        on_cr8_read: Cr8Read | None = None,
        on_hypercall: Hypercall | None = None,
    ) -> None:
        """Set who answers the guest's accesses. Must precede the first `enter`.

        Without a handler memory that is no RAM reads all ones and swallows writes, MSRs that are
        not in `CPU_MSRS` give #GP(0), CPUID and CR8 read 0, and a hypercall is #UD.
        """

    def map_ram(
        self, gpa: int, ram: mmap | Array[c_char], *, writable: bool = True, shared: bool = False
    ) -> None:
        """Put `ram` (whole pages of 4096 bytes) at guest-physical address `gpa`.

        The guest and the host see the same bytes; what is not mapped is the MMIO handlers', and so
        are stores to RAM that is not `writable`. `shared`: the host may write it without saying so
        (`forget_changed_code`). ValueError: not whole pages, taken, or mapped already; RAM from 4
        GiB on must come and stay before the first `enter`.
        """

    def unmap_ram(self, gpa: int) -> None:
        """Take away the RAM that was put at `gpa`; ValueError: there is none."""

    def ram_written(self, gpa: int, size_bytes: int) -> None:
        """The host wrote guest RAM: forget what was translated from it."""

    def forget_changed_code(self) -> None:
        """The host may have written RAM that is `shared`: look at the pages with code there."""

    def reset(self, cs: int, ip: int) -> None:
        """Registers as after RESET (SDM table 11-1), but starting at `cs`:`ip` in real mode."""

    def enter(
        self, intr_info: int, irq_window: bool, nmi_window: bool, budget: int, tsc: int
    ) -> int:
        """Run the guest for at most `budget` (> 0) instructions; returns an `ExitReason` value.

        `tsc` is the machine's TSC, its time in ns.
        """

    def kick(self) -> None:
        """Leave the guest at the next instruction boundary (or at once, at the next `enter`)."""

    def refuse(self) -> None:
        """For the handler of a port or of memory that is no RAM, while it answers: not now."""

    def release_gil(self, enabled: bool) -> None:
        """Whether other Python threads run while the guest does; off, port accesses cost less.

        A `kick` from another thread needs it.
        """

    def set_tsc(self, khz: int, value: int, at_ns: int, live: bool) -> None:
        """The guest's TSC was `value` when the machine's was `at_ns`, and counts `khz` a ms.

        `live`: the machine's TSC is CLOCK_MONOTONIC.
        """

    @property
    def read_tsc(self) -> Callable[[], int] | None:
        """Tells what RDTSC would read now; None: it reads what `set_tsc` says."""

    def exit_on_pause(self, enabled: bool) -> None:
        """Whether PAUSE ends an entry: another vCPU could use the time."""

    def set_breakpoints(self, addresses: Collection[int]) -> None:
        """Linear addresses of instructions to stop before; these and no others.

        ValueError if the engine is not exact.
        """

    def registers(self) -> dict[str, int]:
        """All registers by SDM name in lower case.

        `rax` to `r15`, `rip`, `rflags`; selectors `es`, `cs`, `ss`, `ds`, `fs`, `gs`, `ldtr`, `tr`
        and for each `_base`, `_limit` and `_access` (access rights as in a VMCS, SDM 26.4.1);
        `gdtr_base`, `gdtr_limit`, `idtr_base`, `idtr_limit`; `cr0`, `cr2`, `cr3`, `cr4`; `dr0` to
        `dr3`, `dr6`, `dr7`; the values of `CPU_MSRS` (`fs_base` and `gs_base` are those of the
        segments).
        """

    def set_registers(self, values: Mapping[str, int]) -> None:
        """Write some of the registers of `registers`, whatever mode that makes: nothing is checked.

        A selector alone is stored and loads no descriptor. ValueError: there is none of that name;
        nothing is written then.
        """

    def set_interruptibility(self, state: int) -> None:
        """What holds events back from now on, in the bits of `Interruptibility`: the shadow of an
        STI or of a MOV SS that was the last instruction, an NMI in service. In a handler it is what
        holds behind the access; the handler kicks.

        ValueError: other bits, or both shadows.
        """

    def close(self) -> None:
        """Give everything back; harmless when repeated."""
