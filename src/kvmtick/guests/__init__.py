"""The built-in guests: small programs that take timer ticks, and how to load them.

A guest is a flat image for physical address 0x8000, entered in real mode at 0000:8000. Behind a
jump, at image offset 4, lies its parameter block; `load` fills it in, and the guest keeps its own
tick count there, so that what a guest saw can be told from what we believe it saw. All fields are
little-endian, 32 bits wide (offsets from the start of the image; add 0x8000 for the address):

====== ========== ================================================================================
offset field      meaning
====== ========== ================================================================================
0x04   magic      the 8 bytes ``KVMTICK1``
0x0c   count      ticks the guest waits for; 0 = for ever
0x10   divisor    PIT count, 1..65536: the period is ``divisor / 1193181`` s
0x14   counter    ticks taken so far, counted by the guest's handler
0x18   tsc_khz    TSC rate in kHz, for the guest's RDTSC delays; the virtual TSC has 1000000
0x1c   param_ms   a duration in milliseconds; each guest says what for
0x20   flags      each guest says what for: ``timer`` and ``ack`` of `load` set them
0x24   period_ns  period of the local APIC's timer in ns; 0 in guests that do not use it
0x28   reserved   1 word
0x2c   snapshot   8 words: values of ``counter`` at moments a guest names; in tick-long the local
                  APIC's ticks, in exceptions what its source says, in tick-latency how many samples
                  it took and how many ticks it was owed in the end
====== ========== ================================================================================

A guest leaves by writing to port 0xf4: 0 = done, anything else = its error code. What it prints
goes to port 0xe9; a guest that misses something says there what it is.

==== ===============================================================================================
1    CPUID has no x2APIC (tick-x2apic); a PIT register is wrong (pit-registers)
2    CPUID has no TSC deadline (tick-lapic)
3    vCPU 1 did not start (ipi-tick)
4    LVTT does not keep its timer mode (tick-lapic, tick-long)
5    CPUID has no long mode, or no no-execute pages (tick-long, exceptions)
6    what the CPU did is not what the SDM says (tick-long, exceptions)
0xff an exception or an interrupt the guest does not expect
==== ===============================================================================================

What a guest needs beyond a PIT, an irqchip and vCPU 0 stands in `Guest.needs`; `gsi_routing` makes
the routing table of it. Guests of the APICs switch to unreal mode (4 GiB limits) or to 64-bit mode
by themselves.

The sources are the ``.asm`` and ``.inc`` files beside this module; ``python -m
kvmtick.guests.build`` assembles them into the ``.bin`` files.
"""

import difflib
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from mmap import mmap
from pathlib import Path
from typing import ClassVar, Final, Literal

from kvmtick.guests.needs import DEFAULT_NEEDS, MSI_ADDRESS, Needs, gsi_routing

__all__ = [
    "DEFAULT_DIVISOR",
    "DEFAULT_NEEDS",
    "ENTRY",
    "LOAD_AT",
    "MAGIC",
    "MSI_ADDRESS",
    "PARAMETERS",
    "PIT_HZ",
    "Guest",
    "Needs",
    "ParameterOffsets",
    "Parameters",
    "TimerMode",
    "UnknownGuestError",
    "divisor_for",
    "gsi_routing",
    "load",
    "names",
    "period_ns_for",
]

LOAD_AT: Final = 0x8000
"""Guest-physical address of every built-in image."""

ENTRY: Final = (0x0000, 0x8000)
"""Where they start: real-mode (cs, ip)."""

MAGIC: Final = b"KVMTICK1"
"""What a parameter block starts with."""

PIT_HZ: Final = 1193181
"""PIT counts a second, as in KVM (`KVM_PIT_FREQ`)."""

DEFAULT_DIVISOR: Final = 1193
"""PIT count if none is asked for: 999848 ns, 1 kHz."""

_BLOCK: Final = struct.Struct("<8s6I2I8I")

TimerMode = Literal["periodic", "oneshot", "tsc-deadline"]
"""How tick-lapic lets the local APIC's timer run."""

_MAX_DIVISOR: Final = 65536
_MIN_HZ: Final = 18.2
_MIN_LAPIC_HZ, _MAX_LAPIC_HZ = 0.25, 1_000_000
_NS_PER_S: Final = 1_000_000_000
_U32: Final = 0xFFFF_FFFF
_MAX_PARAM_MS: Final = 3_600_000
_MAX_TSC_KHZ: Final = 10_000_000

_DESCRIPTIONS: Final = {
    "tick-pic": "the plain case: PIT mode 2, PIC, one EOI a tick, HLT in between",
    "tick-if0": "3 ticks, then interrupts off (IF=0) for param_ms, then on to the count",
    "tick-mask": "3 ticks, then IRQ 0 masked in the PIC for param_ms, then on to the count",
    "tick-noeoi": "a handler without EOI: one tick, then HLT for ever",
    "tick-oneshot": "PIT mode 0: the handler loads the count of the next tick",
    "tick-ioapic": "the PIT's tick through IOAPIC pin 2, the PICs closed, EOI to the local APIC",
    "tick-msi": "the PIT's tick as an MSI; reinjection off, for nothing acknowledges it",
    "tick-lapic": "the local APIC's own timer: periodic, one-shot or TSC deadline",
    "tick-x2apic": "the local APIC's timer, periodic, in x2APIC mode: all registers are MSRs",
    "nmi-watchdog": "the PIT through LVT0 as an NMI, IF=0 all the time; the handler polls the PIC",
    "ipi-tick": "two vCPUs: the first takes the PIT's tick and sends it to the second by IPI",
    "tick-long": "64-bit mode: the PIT's ticks by IOAPIC and the local APIC's, on interrupt stacks",
    "exceptions": "64-bit mode: every exception from rings 0 and 3, while the PIT ticks",
    "tick-latency": "tick-pic that measures how late its handler is, by the PIT's own count",
    "pit-registers": "prints what a program can read back from the PIT; takes no tick",
}
_UNLISTED: Final = ("scenario",)

_NEEDS: Final = {
    "tick-ioapic": Needs(gsi0="ioapic-pin-2"),
    "tick-msi": Needs(gsi0="msi", msi_vector=0x43, reinject=False),
    "tick-lapic": Needs(tick_source="lapic", cpuid=()),
    "tick-x2apic": Needs(tick_source="lapic", cpuid=("x2apic",)),
    "ipi-tick": Needs(vcpus=2),
    "exceptions": Needs(cpuid=()),
    "tick-long": Needs(gsi0="ioapic-pin-2", cpuid=()),
}
"""Of the guests that need more than the default."""

_TIMER_FLAGS: Final[dict[str, int]] = {"periodic": 0, "oneshot": 1, "tsc-deadline": 2}
_TIMER_GUEST: Final = "tick-lapic"
_RATELESS: Final = ("exceptions",)
_NO_ACK_FLAG: Final = 0x10
_NO_ACK_GUEST: Final = "nmi-watchdog"


class UnknownGuestError(ValueError):
    """There is no built-in guest of that name; the message, one line, lists those there are."""

    def __init__(self, name: str) -> None:
        near = difflib.get_close_matches(name, _DESCRIPTIONS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        super().__init__(f"unknown guest {name!r}: {hint}there are {', '.join(_DESCRIPTIONS)}")
        self.name = name


@dataclass(frozen=True, slots=True)
class ParameterOffsets:
    """Where a loaded guest's parameter block lies: guest-physical addresses of its fields."""

    magic: int
    count: int
    divisor: int
    counter: int
    tsc_khz: int
    param_ms: int
    flags: int
    period_ns: int
    reserved: int
    snapshot: int
    end: int


PARAMETERS: Final = ParameterOffsets(
    magic=LOAD_AT + 0x04,
    count=LOAD_AT + 0x0C,
    divisor=LOAD_AT + 0x10,
    counter=LOAD_AT + 0x14,
    tsc_khz=LOAD_AT + 0x18,
    param_ms=LOAD_AT + 0x1C,
    flags=LOAD_AT + 0x20,
    period_ns=LOAD_AT + 0x24,
    reserved=LOAD_AT + 0x28,
    snapshot=LOAD_AT + 0x2C,
    end=LOAD_AT + 0x4C,
)
"""The block of every built-in guest."""


@dataclass(frozen=True, slots=True)
class Parameters:
    """A parameter block, read at one moment. The fields are those of the module's table."""

    count: int
    divisor: int
    counter: int
    tsc_khz: int
    param_ms: int
    flags: int
    period_ns: int
    reserved: int
    snapshot: tuple[int, ...]

    SIZE_BYTES: ClassVar[int] = _BLOCK.size

    @classmethod
    def read(
        cls, memory: bytes | bytearray | memoryview | mmap, at: int = PARAMETERS.magic
    ) -> "Parameters":
        """Read the block at offset `at` of `memory`.

        The default is right for guest RAM that starts at physical address 0. To read the block of
        an image, give ``at=4``. Raises ValueError if there is no block.
        """
        if not 0 <= at <= len(memory) - _BLOCK.size:
            raise ValueError(
                f"no parameter block at {at:#x}: the memory has only {len(memory):#x} bytes"
            )
        magic, count, divisor, counter, tsc_khz, param_ms, flags, *words = _BLOCK.unpack_from(
            memory, at
        )
        if magic != MAGIC:
            raise ValueError(f"no parameter block at {at:#x}: found {magic!r}, not {MAGIC!r}")
        return cls(
            count=count,
            divisor=divisor,
            counter=counter,
            tsc_khz=tsc_khz,
            param_ms=param_ms,
            flags=flags,
            period_ns=words[0],
            reserved=words[1],
            snapshot=tuple(words[2:]),
        )


@dataclass(frozen=True, slots=True)
class Guest:
    """What goes into guest memory, and how the vCPU that boots starts on it."""

    name: str
    image: bytes
    """Goes to `load_at`, byte for byte."""
    load_at: int
    """Guest-physical address."""
    entry: tuple[int, int]
    """Real-mode (cs, ip) of the first instruction; unused if there is a `start`."""
    parameters: ParameterOffsets | None
    """Where to read the guest's own tick count; None for a foreign image."""
    needs: Needs = DEFAULT_NEEDS
    """What the VMM must set up before it starts."""
    pieces: tuple[tuple[int, bytes], ...] = ()
    """More bytes for guest memory, each with its guest-physical address."""
    start: Mapping[str, int] | None = None
    """The state it starts in: registers as `Engine.set_registers` takes them, over those of a reset
    (`kvmtick.guests.start`). None: real mode at `entry`."""
    has_rate: bool = True
    """Its ticks come at one rate, so its tick count is a clock."""
    roms: tuple[tuple[int, bytes], ...] = ()
    """Read-only memory beside the RAM: guest-physical addresses and contents, whole pages."""
    disk: bytes = b""
    """The PC's hard disk (`kvmtick.machine.pc.ata`), whole sectors; what the guest writes to it
    stays in the VM."""


def names() -> dict[str, str]:
    """The guests a user can ask for, each with a description of one line."""
    return dict(_DESCRIPTIONS)


def divisor_for(hz: float) -> int:
    """The PIT count nearest to `hz` ticks a second, 18.2 to 1193181.

    The slowest rate of the chip is 18.2065 Hz, known as 18.2: all below that gives 65536.
    """
    if isinstance(hz, bool) or not math.isfinite(hz) or not _MIN_HZ <= hz <= PIT_HZ:
        raise ValueError(f"hz={hz}: the PIT cannot tick at that rate, give {_MIN_HZ} to {PIT_HZ}")
    return min(max(round(PIT_HZ / hz), 1), _MAX_DIVISOR)


def period_ns_for(hz: float) -> int:
    """The period in ns of `hz` ticks a second of a local APIC's timer, 0.25 to 1000000."""
    if isinstance(hz, bool) or not math.isfinite(hz) or not _MIN_LAPIC_HZ <= hz <= _MAX_LAPIC_HZ:
        raise ValueError(
            f"hz={hz}: the local APIC's timer does not tick at that rate,"
            f" give {_MIN_LAPIC_HZ} to {_MAX_LAPIC_HZ}"
        )
    return round(_NS_PER_S / hz)


def load(
    name: str,
    *,
    ticks: int = 1000,
    hz: float | None = None,
    divisor: int | None = None,
    param_ms: int | None = None,
    tsc_khz: int = 1_000_000,
    flags: int = 0,
    timer: TimerMode | None = None,
    ack: bool = True,
) -> Guest:
    """A built-in guest with its parameter block filled in.

    `ticks`: how many it waits for, 0 = for ever. Its tick rate is `hz` a second or, if it uses the
    PIT, the PIT count `divisor` (1..65536); default 1 kHz. `param_ms` (ms, up to an hour) is what
    the guest's description says, default 50. `tsc_khz` must be the rate of the TSC the guest will
    read. `timer` is how tick-lapic uses its timer, default "periodic"; `ack=False` lets
    nmi-watchdog leave its ticks unacknowledged. Both are set in `flags` besides those given.

    Raises UnknownGuestError for a name that is not there, ValueError for a value out of range or
    an option the guest does not have.
    """
    if name not in _DESCRIPTIONS and name not in _UNLISTED:
        raise UnknownGuestError(name)
    if name in _RATELESS and (hz is not None or divisor is not None):
        asked = f"hz={hz}" if divisor is None else f"divisor={divisor}"
        raise ValueError(f"{asked}: {name!r} chooses the moments of its ticks; leave it out")
    flags = _checked("flags", flags, 0, _U32) | _option_flags(name, timer, ack)
    needs = _NEEDS.get(name, DEFAULT_NEEDS)
    if name == _TIMER_GUEST and flags & _TIMER_FLAGS["tsc-deadline"]:
        needs = replace(needs, cpuid=("tsc_deadline",))
    image = bytearray(Path(__file__).with_name(f"{name}.bin").read_bytes())
    at = PARAMETERS.magic - LOAD_AT
    block = Parameters.read(image, at)
    if needs.tick_source == "lapic":
        if divisor is not None:
            raise ValueError(f"divisor={divisor}: {name!r} does not tick by the PIT; give hz")
        divisor = block.divisor
        period_ns = block.period_ns if hz is None else period_ns_for(hz)
    else:
        divisor = _divisor(hz, divisor)
        period_ns = block.period_ns
    _BLOCK.pack_into(
        image,
        at,
        MAGIC,
        _checked("ticks", ticks, 0, _U32),
        divisor,
        0,
        _checked("tsc_khz", tsc_khz, 1, _MAX_TSC_KHZ),
        block.param_ms if param_ms is None else _checked("param_ms", param_ms, 0, _MAX_PARAM_MS),
        flags,
        period_ns,
        block.reserved,
        *block.snapshot,
    )
    has_rate = name not in _RATELESS
    return Guest(name, bytes(image), LOAD_AT, ENTRY, PARAMETERS, needs, has_rate=has_rate)


def _divisor(hz: float | None, divisor: int | None) -> int:
    """The PIT count that `load` was asked for."""
    if divisor is None:
        return DEFAULT_DIVISOR if hz is None else divisor_for(hz)
    if hz is not None:
        raise ValueError(f"hz={hz} and divisor={divisor}: give one of them, they mean the same")
    return _checked("divisor", divisor, 1, _MAX_DIVISOR)


def _option_flags(name: str, timer: str | None, ack: bool) -> int:
    """The parameter block's flags for the options only one guest has."""
    flags = 0
    if timer is not None:
        if name != _TIMER_GUEST:
            raise ValueError(
                f"timer={timer!r}: {name!r} has no choice of timer; use {_TIMER_GUEST}"
            )
        if timer not in _TIMER_FLAGS:
            raise ValueError(f"timer={timer!r}: there are {', '.join(_TIMER_FLAGS)}")
        flags |= _TIMER_FLAGS[timer]
    if not ack:
        if name != _NO_ACK_GUEST:
            raise ValueError(
                f"ack={ack}: {name!r} has no way to leave that out; use {_NO_ACK_GUEST}"
            )
        flags |= _NO_ACK_FLAG
    return flags


def _checked(name: str, value: int, low: int, high: int) -> int:
    """`value` if it is an integer in `low`..`high`; otherwise a ValueError of one line."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{name}={value!r}: give a whole number from {low} to {high}")
    return value
