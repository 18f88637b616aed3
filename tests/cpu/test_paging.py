"""Page walks against tables made by hand (Intel SDM vol. 3A, chapter 4)."""

import pytest

from kvmtick.cpu.mode import code_bits, linear_rip, linear_rsp, mode_name
from kvmtick.cpu.paging import read_linear, translate

PE, PG = 1, 1 << 31
PSE, PAE, LA57 = 1 << 4, 1 << 5, 1 << 12
LMA = 1 << 10
PRESENT, LARGE = 1, 1 << 7
RAM_BYTES = 1 << 20

PAGING_32 = {"cr0": PE | PG, "cr3": 0x1000, "cr4": 0, "efer": 0}
PAGING_PSE = PAGING_32 | {"cr4": PSE}
PAGING_PAE = PAGING_32 | {"cr4": PAE, "cr3": 0x1020}
PAGING_64 = PAGING_32 | {"cr4": PAE, "efer": LMA, "cr3": 0x1000 | 0x18}
PAGING_57 = PAGING_64 | {"cr4": PAE | LA57}


class Ram:
    """RAM with tables in it; nothing is mapped at first."""

    def __init__(self) -> None:
        self.bytes = bytearray(RAM_BYTES)

    def put(self, gpa: int, value: int, size_bytes: int = 8) -> None:
        self.bytes[gpa : gpa + size_bytes] = value.to_bytes(size_bytes, "little")

    def read(self, gpa: int, size_bytes: int) -> bytes | None:
        if gpa + size_bytes > RAM_BYTES:
            return None
        return bytes(self.bytes[gpa : gpa + size_bytes])


@pytest.fixture
def ram() -> Ram:
    return Ram()


def test_without_paging_an_address_is_what_it_is(ram: Ram) -> None:
    for registers in ({"cr0": 0x10, "cr3": 0x1000}, {"cr0": PE}, {}):
        assert translate(registers, ram.read, 0x12345) == 0x12345
        assert translate(registers, ram.read, 0x1_0000_0005) == 5


def test_32_bit_tables(ram: Ram) -> None:
    linear = 0x0040_3123  # directory 1, table 3
    assert translate(PAGING_32, ram.read, linear) is None
    ram.put(0x1004, 0x2000 | PRESENT, 4)
    assert translate(PAGING_32, ram.read, linear) is None
    ram.put(0x200C, 0x7000 | PRESENT, 4)
    assert translate(PAGING_32, ram.read, linear) == 0x7123
    assert translate(PAGING_32, ram.read, linear + 0x1000) is None
    ram.put(0x200C, 0x7000, 4)
    assert translate(PAGING_32, ram.read, linear) is None


def test_a_large_page_needs_pse_and_may_lie_above_4_gib(ram: Ram) -> None:
    ram.put(0x1004, 0x0080_0000 | PRESENT | LARGE | 3 << 13, 4)
    assert translate(PAGING_PSE, ram.read, 0x0045_6789) == 0x3_0085_6789
    assert translate(PAGING_32, ram.read, 0x0045_6789) is None


def test_pae(ram: Ram) -> None:
    linear = 0xC020_3456  # PDPTE 3, directory 1, table 3
    ram.put(0x1020 + 3 * 8, 0x2000 | PRESENT)
    ram.put(0x2008, 0x3000 | PRESENT)
    ram.put(0x3018, 0x5_0000_7000 | PRESENT | 1 << 63)
    assert translate(PAGING_PAE, ram.read, linear) == 0x5_0000_7456
    assert translate(PAGING_PAE, ram.read, linear & 0x3FFF_FFFF) is None
    ram.put(0x2008, 0x0060_0000 | PRESENT | LARGE)
    assert translate(PAGING_PAE, ram.read, linear) == 0x0060_3456


@pytest.mark.parametrize(("registers", "top"), [(PAGING_64, 47), (PAGING_57, 56)])
def test_4_and_5_levels(ram: Ram, registers: dict[str, int], top: int) -> None:
    linear = (1 << 64) - (1 << top) + 0x4080_6123  # the lowest of the upper half
    first = 256
    ram.put(0x1000 + first * 8, 0x2000 | PRESENT)
    table = 0x2000
    if registers is PAGING_57:
        ram.put(0x2000, 0x8000 | PRESENT)
        table = 0x8000
    ram.put(table + 8, 0x3000 | PRESENT)
    ram.put(0x3000 + 4 * 8, 0x4000 | PRESENT)
    ram.put(0x4000 + 6 * 8, 0x9000 | PRESENT | 1 << 63)
    assert translate(registers, ram.read, linear) == 0x9123
    assert translate(registers, ram.read, linear & (1 << 64) - 1 ^ 1 << 63) is None, "canonical"
    ram.put(0x3000 + 4 * 8, 0x0A00_0000 | PRESENT | LARGE)
    assert translate(registers, ram.read, linear) == 0x0A00_6123
    ram.put(table + 8, 0x8000_0000 | PRESENT | LARGE)
    assert translate(registers, ram.read, linear) == 0x8080_6123
    ram.put(0x1000 + first * 8, 0x2000)
    assert translate(registers, ram.read, linear) is None


def test_the_top_level_has_no_large_pages(ram: Ram) -> None:
    ram.put(0x1000, 0x2000 | PRESENT | LARGE)
    assert translate(PAGING_64, ram.read, 0) is None


def test_tables_where_no_ram_is_map_nothing(ram: Ram) -> None:
    for registers in (PAGING_32, PAGING_PAE, PAGING_64):
        assert translate(registers | {"cr3": 0xF000_0000}, ram.read, 0) is None


def test_reading_stops_where_nothing_is_mapped(ram: Ram) -> None:
    ram.put(0x1000, 0x2000 | PRESENT, 4)
    ram.put(0x2000, 0x8000 | PRESENT, 4)
    ram.put(0x2004, 0x6000 | PRESENT, 4)
    ram.bytes[0x8FFE:0x9002] = b"abXX"
    ram.bytes[0x6000:0x6002] = b"cd"
    assert read_linear(PAGING_32, ram.read, 0xFFE, 4) == b"abcd"
    assert len(read_linear(PAGING_32, ram.read, 0xFFE, 0x2000)) == 0x1002
    assert read_linear(PAGING_32, ram.read, 0x5000, 4) == b""


# --- modes --------------------------------------------------------------------------------------

REAL = {"cr0": 0x10, "cs": 0x1234, "rip": 0x10, "ss": 0x2000, "rsp": 0x1_FFFE}
FLAT_32 = {"cr0": PE, "cs_access": 0xC09B, "cs_base": 0, "rip": 0x10_0000, "rsp": 0x9000}
LONG = {"cr0": PE | PG, "efer": LMA, "cs_access": 0xA09B, "cs_base": 5, "rip": 1 << 63, "rsp": 8}


@pytest.mark.parametrize(
    ("registers", "name", "bits", "rip"),
    [
        (REAL, "real mode", 16, 0x12350),
        (REAL | {"cs_base": 0xFFFF_0000}, "real mode", 16, 0xFFFF_0010),
        (FLAT_32, "32-bit protected mode", 32, 0x10_0000),
        (FLAT_32 | {"cs_access": 0x9B, "cs_base": 0x100}, "16-bit protected mode", 16, 0x10_0100),
        (FLAT_32 | {"rflags": 1 << 17}, "virtual-8086 mode", 16, 0x10_0000),
        (LONG, "64-bit mode", 64, 1 << 63),
        (LONG | {"cs_access": 0xC09B, "rip": 1}, "32-bit compatibility mode", 32, 6),
    ],
)
def test_the_mode_is_told_from_the_registers(
    registers: dict[str, int], name: str, bits: int, rip: int
) -> None:
    assert (mode_name(registers), code_bits(registers)) == (name, bits)
    assert linear_rip(registers) == rip


def test_the_stack_of_16_bit_code_has_a_16_bit_pointer() -> None:
    assert linear_rsp(REAL) == 0x2_FFFE
    assert linear_rsp(FLAT_32 | {"ss_base": 0x100}) == 0x9100
    assert linear_rsp(LONG | {"ss_base": 0x100}) == 8
