"""A set of interrupt vectors, as the local APIC's IRR, ISR and TMR are one (Intel SDM vol. 3A,
12.8.4): eight registers of 32 bits, of which the highest bit set counts most.
"""

from typing import Final

from mypy_extensions import mypyc_attr

__all__ = ["NO_VECTOR", "VectorSet"]

NO_VECTOR: Final = -1
REGISTERS: Final = 8
REGISTER_BITS: Final = 32
U32: Final = (1 << REGISTER_BITS) - 1

_CLEAR: Final = [0] * REGISTERS
"""The registers of every set in which none was ever set: most stay so."""


@mypyc_attr(acyclic=True)
class VectorSet:
    """Vectors 0 to 255; `highest` is kept up to date, `NO_VECTOR` while there is none."""

    __slots__ = ("highest", "registers")

    def __init__(self) -> None:
        self.highest = NO_VECTOR
        self.registers = _CLEAR

    def add(self, vector: int) -> None:
        """Set its bit."""
        registers, at = self.registers, vector >> 5
        if registers is _CLEAR:
            registers = self.registers = [0] * REGISTERS
        registers[at] = registers[at] | 1 << (vector & 31)
        if vector > self.highest:
            self.highest = vector

    def discard(self, vector: int) -> None:
        """Clear its bit."""
        registers, at = self.registers, vector >> 5
        if registers is _CLEAR:
            return
        registers[at] = registers[at] & ~(1 << (vector & 31))
        if vector == self.highest:
            self._find_highest(at)

    def has(self, vector: int) -> bool:
        """Whether its bit is set."""
        return self.registers[vector >> 5] >> (vector & 31) & 1 != 0

    @property
    def bits(self) -> int:
        """All of it as one number of 256 bits."""
        bits = 0
        for register in reversed(self.registers):
            bits = bits << REGISTER_BITS | register
        return bits

    def load(self, bits: int) -> None:
        """All of it from one number of 256 bits."""
        self.registers = _CLEAR
        if bits:
            self.registers = [bits >> REGISTER_BITS * at & U32 for at in range(REGISTERS)]
        self._find_highest(REGISTERS - 1)

    def _find_highest(self, at: int) -> None:
        """All registers above `at` are 0."""
        while at > 0 and not self.registers[at]:
            at -= 1
        # NO_VECTOR where the last one is 0 as well
        self.highest = at * REGISTER_BITS + self.registers[at].bit_length() - 1
