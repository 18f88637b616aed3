"""The native shim over libunicorn 2.1.4; see `kvmtick.cpu.engine` for the contract."""

from collections.abc import Collection, Mapping
from ctypes import Array, c_char
from mmap import mmap

from kvmtick.cpu.engine import (
    Cpuid,
    Cr8Read,
    Cr8Write,
    Hypercall,
    MmioRead,
    MmioWrite,
    MsrRead,
    MsrWrite,
    PortIn,
    PortOut,
)

def load(path: str, /) -> None:
    """Load libunicorn from `path` and prove that it is the build the shim knows.

    Raises ImportError when it is missing or another version, when another copy is in use, or when
    something else loaded it first: the shim must be in front of it in the process.
    """

class Engine:
    """One x86 CPU; `load` first. The attributes report the last exit."""

    deadline_ns: int
    rflags: int
    interruptibility: int
    retired: int
    idt_vectoring_info: int
    entry_error_code: int
    error: str
    rounds: int
    exact: bool

    def __init__(self, *, seed: int = 0, exact: bool = True) -> None: ...
    @property
    def last_exit(self) -> int: ...
    @property
    def rip(self) -> int: ...
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
    ) -> None: ...
    def map_ram(
        self, gpa: int, ram: mmap | Array[c_char], *, writable: bool = True, shared: bool = False
    ) -> None: ...
    def unmap_ram(self, gpa: int) -> None: ...
    def ram_written(self, gpa: int, size_bytes: int) -> None: ...
    def reset(self, cs: int, ip: int) -> None: ...
    def enter(
        self, intr_info: int, irq_window: bool, nmi_window: bool, budget: int, tsc: int
    ) -> int: ...
    def forget_changed_code(self) -> None: ...
    def refuse(self) -> None: ...
    def kick(self) -> None: ...
    def set_tsc(self, khz: int, value: int, at_ns: int, live: bool) -> None: ...
    def release_gil(self, enabled: bool) -> None:
        """Whether other Python threads run while the guest does (off: port accesses are cheaper).

        Needed for a `kick` from another thread to arrive.
        """

    def exit_on_pause(self, enabled: bool) -> None: ...
    def set_breakpoints(self, addresses: Collection[int]) -> None: ...
    def registers(self) -> dict[str, int]: ...
    def set_registers(self, values: Mapping[str, int]) -> None: ...
    def set_interruptibility(self, state: int, /) -> None: ...
    def close(self) -> None: ...
