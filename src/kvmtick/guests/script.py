"""Scripts for the `scenario` guest: what a test wants a guest to do, operation by operation.

The guest is `scenario.asm` beside this module: it initialises the PICs, then carries out operations
of 8 bytes each that lie at image offset 0x1000. A script is
``Scenario("name", "what it does", (pit(1193), idle_ms(5), end()))``.
"""

import struct
from dataclasses import dataclass, replace
from enum import IntEnum
from mmap import mmap
from typing import Final

from kvmtick import guests

__all__ = [
    "APIC_VECTORS_AT",
    "EXIT_CODE",
    "FAULTS_AT",
    "IOAPIC",
    "LAPIC",
    "MAX_OPERATIONS",
    "NMIS_AT",
    "PIC_INIT",
    "RESULTS",
    "RESULTS_AT",
    "SCRIPT_AT",
    "VECTORS_AT",
    "Code",
    "Op",
    "Results",
    "Scenario",
    "apic_eoi_off",
    "apic_eoi_on",
    "cli",
    "cpuid",
    "end",
    "eoi_off",
    "idle_ms",
    "in8",
    "ioapic_read",
    "ioapic_write",
    "lapic_read",
    "lapic_write",
    "mmio_read",
    "mmio_write",
    "nop",
    "out8",
    "out32",
    "pit",
    "rdmsr",
    "snap",
    "snap_vector",
    "spin_ms",
    "sti",
    "tsc_read",
    "unreal",
    "user_sleep_us",
    "wait_nmis",
    "wait_ticks",
    "wait_vector",
    "wrmsr",
    "x2apic_write",
]

SCRIPT_AT: Final = 0x1000
"""Image offset of the script."""

RESULTS_AT: Final = 0x100
"""Image offset of results[128]: u32, filled by `in8`, `snap` and all that reads."""

VECTORS_AT: Final = 0x300
"""Image offset of vectors[16]: u32, interrupts taken at vectors 0x20..0x2f."""

NMIS_AT: Final = 0x340
"""Image offset of the number of NMIs taken: u32."""

FAULTS_AT: Final = 0x344
"""Image offset of how many `wrmsr` and `rdmsr` were refused with #GP: u32."""

APIC_VECTORS_AT: Final = 0x400
"""Image offset of apic_vectors[256]: u32, interrupts taken at vectors 0x30..0xef."""

RESULTS: Final = 128
"""Entries of `results`; operations take an index modulo that."""

EXIT_CODE: Final = 0x5A
"""Exit code of the recorded guests."""

MAX_OPERATIONS: Final = (0x10000 - guests.LOAD_AT - SCRIPT_AT) // 8
"""The script must end below the 64 KiB a real-mode segment holds."""


class Code(IntEnum):
    """Operation codes."""

    END = 0
    NOP1 = 1
    CLI = 2
    STI = 3
    SPIN_MS = 4
    IDLE_MS = 5
    OUT8 = 6
    IN8 = 7
    OUT32 = 8
    EOI_OFF = 9
    EOI_ON = 10
    WAIT_TICKS = 11
    SNAP = 12
    UNREAL = 13
    ADDR = 14
    MMIO_W32 = 15
    MMIO_R32 = 16
    MMIO_W16 = 17
    MMIO_R16 = 18
    MMIO_W8 = 19
    MMIO_R8 = 20
    MSR_HI = 21
    WRMSR = 22
    RDMSR = 23
    CPUID = 24
    APIC_EOI_ON = 25
    APIC_EOI_OFF = 26
    TSC_READ = 27
    WAIT_VECTOR = 28
    SNAP_VECTOR = 29
    WAIT_NMIS = 30


@dataclass(frozen=True, slots=True)
class Op:
    """One operation; the table in `scenario.asm` says what the arguments are."""

    code: Code
    arg16: int = 0
    arg32: int = 0

    def pack(self) -> bytes:
        """As it lies in guest memory."""
        return struct.pack("<HHI", self.code, self.arg16, self.arg32)


def end(code: int = 0) -> Op:
    """Leave: `code` goes to port 0xf4."""
    return Op(Code.END, 0, code)


def nop() -> Op:
    """Do nothing."""
    return Op(Code.NOP1)


def cli() -> Op:
    """Interrupts off (IF=0)."""
    return Op(Code.CLI)


def sti() -> Op:
    """Interrupts on (IF=1)."""
    return Op(Code.STI)


def spin_ms(ms: int) -> Op:
    """Busy-wait `ms` milliseconds of TSC time, IF as it is."""
    return Op(Code.SPIN_MS, 0, ms)


def idle_ms(ms: int) -> Op:
    """HLT until the first wake-up at which `ms` milliseconds have passed; leaves IF=1.

    Only an interrupt wakes it: with none to come it never ends.
    """
    return Op(Code.IDLE_MS, 0, ms)


def out8(port: int, value: int) -> Op:
    """Write one byte to `port`."""
    return Op(Code.OUT8, port, value)


def in8(port: int, index: int) -> Op:
    """results[index] = one byte read from `port`."""
    return Op(Code.IN8, port, index)


def out32(port: int, value: int) -> Op:
    """Write 4 bytes to `port`."""
    return Op(Code.OUT32, port, value)


def eoi_off() -> Op:
    """From now on no handler writes an EOI."""
    return Op(Code.EOI_OFF)


def wait_ticks(ticks: int) -> Op:
    """HLT until `counter` has gone up by `ticks`; leaves IF=1."""
    return Op(Code.WAIT_TICKS, 0, ticks)


def snap(index: int) -> Op:
    """results[index] = `counter`."""
    return Op(Code.SNAP, 0, index)


def unreal() -> Op:
    """32-bit addresses from now on, and handlers for vectors 0x30..0xef that write EOI by MMIO.

    Must precede the first MMIO operation and the first interrupt of an APIC.
    """
    return Op(Code.UNREAL)


def mmio_write(address: int, value: int, size_bytes: int = 4) -> tuple[Op, Op]:
    """Write 4, 2 or 1 bytes to physical memory."""
    code = {4: Code.MMIO_W32, 2: Code.MMIO_W16, 1: Code.MMIO_W8}[size_bytes]
    return Op(Code.ADDR, 0, address), Op(code, 0, value)


def mmio_read(address: int, index: int, size_bytes: int = 4) -> tuple[Op, Op]:
    """results[index] = 4, 2 or 1 bytes read from physical memory."""
    code = {4: Code.MMIO_R32, 2: Code.MMIO_R16, 1: Code.MMIO_R8}[size_bytes]
    return Op(Code.ADDR, 0, address), Op(code, index)


def wrmsr(msr: int, value: int) -> tuple[Op, Op, Op]:
    """Write 64 bits to an MSR; #GP counts in `faults`."""
    high, low = divmod(value, 1 << 32)
    return Op(Code.ADDR, 0, msr), Op(Code.MSR_HI, 0, high), Op(Code.WRMSR, 0, low)


def rdmsr(msr: int, index: int) -> tuple[Op, Op]:
    """results[index], results[index + 1] = low, high half; all ones, and a fault, with #GP."""
    return Op(Code.ADDR, 0, msr), Op(Code.RDMSR, index)


def cpuid(leaf: int, index: int) -> Op:
    """results[index .. index + 3] = EAX, EBX, ECX, EDX of a leaf; sub-leaf 0."""
    return Op(Code.CPUID, index, leaf)


def apic_eoi_on(*, x2apic: bool = False) -> Op:
    """The handlers of 0x30..0xef write EOI: by MMIO (as after `unreal`), or by MSR 0x80b."""
    return Op(Code.APIC_EOI_ON, 0, int(x2apic))


def apic_eoi_off() -> Op:
    """From now on the handlers of vectors 0x30..0xef write no EOI."""
    return Op(Code.APIC_EOI_OFF)


def tsc_read(index: int) -> Op:
    """results[index], results[index + 1] = low, high half of the TSC."""
    return Op(Code.TSC_READ, index)


def wait_vector(vector: int, times: int) -> Op:
    """HLT until `vector` (0x30..0xef) was taken `times` times in all; leaves IF=1."""
    return Op(Code.WAIT_VECTOR, vector, times)


def snap_vector(vector: int, index: int) -> Op:
    """results[index] = how often `vector` (0x30..0xef) was taken."""
    return Op(Code.SNAP_VECTOR, vector, index)


def wait_nmis(nmis: int) -> Op:
    """HLT, IF as it is, until `nmis` NMIs were taken in all; one may be slept over."""
    return Op(Code.WAIT_NMIS, 0, nmis)


LAPIC: Final = 0xFEE0_0000
"""The local APIC's registers, in xAPIC mode."""

IOAPIC: Final = 0xFEC0_0000
"""The IOAPIC: which register at offset 0, its value at 0x10."""


def lapic_write(register: int, value: int) -> tuple[Op, Op]:
    """Write a register of the local APIC, by MMIO."""
    return mmio_write(LAPIC + register, value)


def lapic_read(register: int, index: int) -> tuple[Op, Op]:
    """results[index] = a register of the local APIC, by MMIO."""
    return mmio_read(LAPIC + register, index)


def x2apic_write(register: int, value: int) -> tuple[Op, Op, Op]:
    """Write a register of the local APIC, named by its xAPIC offset, in x2APIC mode."""
    return wrmsr(0x800 + register // 16, value)


def ioapic_write(register: int, value: int) -> tuple[Op, ...]:
    """Write a register of the IOAPIC; redirection entry n has 0x10 + 2n (low) and + 1 (high)."""
    return *mmio_write(IOAPIC, register), *mmio_write(IOAPIC + 0x10, value)


def ioapic_read(register: int, index: int) -> tuple[Op, ...]:
    """results[index] = a register of the IOAPIC."""
    return *mmio_write(IOAPIC, register), *mmio_read(IOAPIC + 0x10, index)


def pit(divisor: int, control: int = 0x34) -> tuple[Op, Op, Op]:
    """Program PIT channel 0: control word (0x34: mode 2), low byte, high byte of the count."""
    return out8(0x43, control), out8(0x40, divisor & 0xFF), out8(0x40, divisor >> 8 & 0xFF)


def user_sleep_us(us: int) -> Op:
    """Ask user space, by a dword to port 0xd8, to stay out of KVM_RUN for `us` microseconds."""
    return out32(0xD8, us)


PIC_INIT: Final = (
    (0x20, 1, 0x11),
    (0x21, 1, 0x20),
    (0x21, 1, 0x04),
    (0x21, 1, 0x01),
    (0x21, 1, 0xFE),
    (0xA1, 1, 0xFF),
)
"""The port writes (port, size, value) that come before those of any script."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """A script and what it is about; in `script` tuples of operations, as of `pit`, may nest."""

    name: str
    description: str
    script: tuple[Op | tuple[Op, ...], ...]
    needs: guests.Needs = guests.DEFAULT_NEEDS

    def ops(self) -> tuple[Op, ...]:
        """The script, flat."""
        flat: list[Op] = []
        for item in self.script:
            if isinstance(item, Op):
                flat.append(item)
            else:
                flat.extend(item)
        return tuple(flat)

    def writes(self) -> tuple[tuple[int, int, int], ...]:
        """All port writes (port, size, value) in order, but for the EOIs of handlers."""
        written = list(PIC_INIT)
        for op in self.ops():
            match op.code:
                case Code.OUT8:
                    written.append((op.arg16, 1, op.arg32))
                case Code.OUT32:
                    written.append((op.arg16, 4, op.arg32))
                case Code.END:
                    written.append((0xF4, 1, op.arg32))
        return tuple(written)

    def guest(self, tsc_khz: int = 1_000_000) -> guests.Guest:
        """The guest that carries out the script."""
        ops = self.ops()
        if not ops or ops[-1].code is not Code.END:
            raise ValueError(f"scenario {self.name!r}: the script must end with end()")
        if len(ops) > MAX_OPERATIONS:
            raise ValueError(f"scenario {self.name!r}: {len(ops)} operations, {MAX_OPERATIONS} fit")
        bare = guests.load("scenario", ticks=0, tsc_khz=tsc_khz)
        image = bare.image[:SCRIPT_AT] + b"".join(op.pack() for op in ops)
        return replace(bare, name=f"scenario-{self.name}", image=image, needs=self.needs)


@dataclass(frozen=True, slots=True)
class Results:
    """What a scenario left behind."""

    counter: int
    results: tuple[int, ...]
    vectors: tuple[int, ...]
    nmis: int
    faults: int = 0
    apic_vectors: tuple[int, ...] = (0,) * 256

    @classmethod
    def read(
        cls, memory: bytes | bytearray | memoryview | mmap, image_at: int = guests.LOAD_AT
    ) -> "Results":
        """Read from guest RAM that starts at physical address 0."""
        counter = guests.Parameters.read(memory, image_at + 4).counter
        results = struct.unpack_from(f"<{RESULTS}I", memory, image_at + RESULTS_AT)
        vectors = struct.unpack_from("<16I", memory, image_at + VECTORS_AT)
        nmis, faults = struct.unpack_from("<2I", memory, image_at + NMIS_AT)
        apic_vectors = struct.unpack_from("<256I", memory, image_at + APIC_VECTORS_AT)
        return cls(counter, results, vectors, nmis, faults, apic_vectors)
