"""The built-in guests: small real-mode programs that take timer ticks, and how to load them.

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
0x20   flags      0; no guest uses a flag yet
0x24   reserved   2 words
0x2c   snapshot   8 words: values of ``counter`` at moments a guest names
====== ========== ================================================================================

A guest leaves by writing to port 0xf4: 0 = done, anything else = its error code (0xff: an
exception or an interrupt it does not expect). What it prints goes to port 0xe9.

The sources are the ``.asm`` and ``.inc`` files beside this module; ``python -m
kvmtick.guests.build`` assembles them into the ``.bin`` files.
"""

import difflib
import math
import struct
from dataclasses import dataclass
from mmap import mmap
from pathlib import Path
from typing import Final

__all__ = [
    "DEFAULT_DIVISOR",
    "ENTRY",
    "LOAD_AT",
    "MAGIC",
    "PARAMETERS",
    "PIT_HZ",
    "Guest",
    "ParameterOffsets",
    "Parameters",
    "UnknownGuestError",
    "divisor_for",
    "load",
    "names",
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
_MAX_DIVISOR: Final = 65536
_MIN_HZ: Final = 18.2
_U32: Final = 0xFFFF_FFFF
_MAX_PARAM_MS: Final = 3_600_000
_MAX_TSC_KHZ: Final = 10_000_000

_DESCRIPTIONS: Final = {
    "tick-pic": "the plain case: PIT mode 2, PIC, one EOI a tick, HLT in between",
    "tick-if0": "3 ticks, then interrupts off (IF=0) for param_ms, then on to the count",
    "tick-mask": "3 ticks, then IRQ 0 masked in the PIC for param_ms, then on to the count",
    "tick-noeoi": "a handler without EOI: one tick, then HLT for ever",
    "tick-oneshot": "PIT mode 0: the handler loads the count of the next tick",
    "pit-registers": "prints what a program can read back from the PIT; takes no tick",
}
_UNLISTED: Final = ("scenario",)


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
    reserved: int
    snapshot: int
    end: int


PARAMETERS: Final = ParameterOffsets(
    *(LOAD_AT + offset for offset in (0x04, 0x0C, 0x10, 0x14, 0x18, 0x1C, 0x20, 0x24, 0x2C, 0x4C))
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
    reserved: tuple[int, int]
    snapshot: tuple[int, ...]

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
            reserved=(words[0], words[1]),
            snapshot=tuple(words[2:]),
        )


@dataclass(frozen=True, slots=True)
class Guest:
    """A flat image, ready to be put into guest memory and started."""

    name: str
    image: bytes
    """Goes to `load_at`, byte for byte."""
    load_at: int
    """Guest-physical address."""
    entry: tuple[int, int]
    """Real-mode (cs, ip) of the first instruction."""
    parameters: ParameterOffsets | None
    """Where to read the guest's own tick count; None for a foreign image."""


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


def load(
    name: str,
    *,
    ticks: int = 1000,
    hz: float | None = None,
    divisor: int | None = None,
    param_ms: int | None = None,
    tsc_khz: int = 1_000_000,
    flags: int = 0,
) -> Guest:
    """A built-in guest with its parameter block filled in.

    `ticks`: how many it waits for, 0 = for ever. Its tick rate is `hz` a second or the PIT count
    `divisor` (1..65536), default 1 kHz. `param_ms` (ms, up to an hour) is what the guest's
    description says, default 50. `tsc_khz` must be the rate of the TSC the guest will read.

    Raises UnknownGuestError for a name that is not there, ValueError for a value out of range.
    """
    if name not in _DESCRIPTIONS and name not in _UNLISTED:
        raise UnknownGuestError(name)
    if divisor is None:
        divisor = DEFAULT_DIVISOR if hz is None else divisor_for(hz)
    elif hz is not None:
        raise ValueError(f"hz={hz} and divisor={divisor}: give one of them, they mean the same")
    image = bytearray(Path(__file__).with_name(f"{name}.bin").read_bytes())
    at = PARAMETERS.magic - LOAD_AT
    block = Parameters.read(image, at)
    _BLOCK.pack_into(
        image,
        at,
        MAGIC,
        _checked("ticks", ticks, 0, _U32),
        _checked("divisor", divisor, 1, _MAX_DIVISOR),
        0,
        _checked("tsc_khz", tsc_khz, 1, _MAX_TSC_KHZ),
        block.param_ms if param_ms is None else _checked("param_ms", param_ms, 0, _MAX_PARAM_MS),
        _checked("flags", flags, 0, _U32),
        *block.reserved,
        *block.snapshot,
    )
    return Guest(name, bytes(image), LOAD_AT, ENTRY, PARAMETERS)


def _checked(name: str, value: int, low: int, high: int) -> int:
    """`value` if it is an integer in `low`..`high`; otherwise a ValueError of one line."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{name}={value!r}: give a whole number from {low} to {high}")
    return value
