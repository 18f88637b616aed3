"""The `unicorn` engine: memory that is no RAM, where the guest's page tables have it."""

from mmap import mmap

import pytest
from engine_machine import CODE, PLENTY, RAM_BYTES, Cpu, write_code

from kvmtick.cpu.engine import ExitReason

POINTERS = 0x9000
DIRECTORY = 0xA000
IDTR = 0x3008
IDT = 0x3800
GDT = 0x3100
HANDLER = 0x2800
PRESENT_WRITABLE_2_MIB = 0x83
PRESENT_2_MIB = 0x81
READ_ONLY = 0x20_0000
IOAPIC = 0x40_0000
ABOVE = 0x60_0000
RAM_AGAIN = 0x80_0000
NOTHING = 0xA0_0000
"""Linear addresses, 2 MiB each: 0xfec00000 twice, 4 GiB, physical 0, not present."""
END_OF_IOAPIC = 0xFEC0_0000 + 0x20_0000
FOUR_GIB = 1 << 32
DATA = 0x1122_3344_5566_7788
PROLOGUE = "0f011d08300000 0f6f0500600000"  # lidt [IDTR]; movq mm0, [0x6000]
PROLOGUE_STEPS = 2


@pytest.fixture(params=[True, False], ids=["exact", "fast"])
def exact(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def paged(code: str, exact: bool, ram: mmap | None = None) -> Cpu:
    """32-bit code with PAE; a page fault halts with CR2."""
    cpu = Cpu(PROLOGUE + code + "f4", ram=ram, exact=exact)
    for number, entry in enumerate(
        (
            PRESENT_WRITABLE_2_MIB,
            0xFEC0_0000 | PRESENT_2_MIB,
            0xFEC0_0000 | PRESENT_WRITABLE_2_MIB,
            FOUR_GIB | PRESENT_WRITABLE_2_MIB,
            PRESENT_WRITABLE_2_MIB,
        )
    ):
        at = DIRECTORY + 8 * number
        cpu.ram[at : at + 8] = entry.to_bytes(8, "little")
    cpu.ram[POINTERS : POINTERS + 8] = (DIRECTORY | 1).to_bytes(8, "little")
    cpu.ram[0x6000:0x6008] = DATA.to_bytes(8, "little")
    cpu.ram[IDTR : IDTR + 6] = (IDT << 16 | 0x7FF).to_bytes(6, "little")
    gate = HANDLER >> 16 << 48 | 0x8E00 << 32 | 8 << 16 | HANDLER & 0xFFFF
    cpu.ram[IDT + 8 * 14 : IDT + 8 * 15] = gate.to_bytes(8, "little")
    cpu.ram[GDT + 8 : GDT + 16] = 0x00CF_9B00_0000_FFFF.to_bytes(8, "little")
    write_code(cpu.ram, HANDLER, "f4")
    cpu.reset_protected(CODE)
    cpu.set_registers(
        cr0=0x8001_0011,
        cr3=POINTERS,
        cr4=0x20,
        rax=DATA,
        rsp=0xF000,
        gdtr_base=GDT,
        gdtr_limit=0xFF,
    )
    return cpu


def dword(value: int) -> str:
    return value.to_bytes(4, "little").hex()


STORE = {1: "a2", 2: "66a3", 4: "a3", 8: "0f7f05"}
LOAD = {1: "a0", 2: "66a1", 4: "a1", 8: "0f6f05"}
PLACES = [(IOAPIC, 0xFEC0_0000), (ABOVE, FOUR_GIB), (ABOVE + 0x1F_FFF0, FOUR_GIB + 0x1F_FFF0)]


def mask(size_bytes: int) -> int:
    return (1 << 8 * size_bytes) - 1


@pytest.mark.parametrize("offset", [0, 1, 2, 3, 7])
@pytest.mark.parametrize("size_bytes", STORE)
@pytest.mark.parametrize(("linear", "gpa"), PLACES)
def test_an_access_comes_whole(
    linear: int, gpa: int, size_bytes: int, offset: int, exact: bool
) -> None:
    at = dword(linear + offset)
    cpu = paged(f"eb00 {STORE[size_bytes]}{at} eb00 {LOAD[size_bytes]}{at} eb00", exact)
    cpu.input = DATA >> 8
    assert cpu.enter() is ExitReason.HLT
    # A fast engine's block is the access and the jump behind it.
    write_at, read_at = (3, 5) if exact else (4, 6)
    assert cpu.accesses == [
        ("mmio write", gpa + offset, size_bytes, DATA & mask(size_bytes), write_at),
        ("mmio read", gpa + offset, size_bytes, read_at),
    ]
    if size_bytes == 4:
        assert cpu.register("rax") == cpu.input & mask(4)


@pytest.mark.parametrize("first_bytes", [1, 2, 3])
def test_an_access_over_two_pages_goes_to_two_places(first_bytes: int, exact: bool) -> None:
    at = dword(ABOVE - first_bytes)
    cpu = paged(f"a3{at} a1{at}", exact)
    cpu.input = 0xFF
    assert cpu.enter() is ExitReason.HLT
    low, high = DATA & mask(first_bytes), (DATA & mask(4)) >> 8 * first_bytes
    assert [access[:-1] for access in cpu.accesses] == [
        ("mmio write", END_OF_IOAPIC - first_bytes, first_bytes, low),
        ("mmio write", FOUR_GIB, 4 - first_bytes, high),
        ("mmio read", END_OF_IOAPIC - first_bytes, first_bytes),
        ("mmio read", FOUR_GIB, 4 - first_bytes),
    ]
    assert cpu.register("rax") == 0xFF | 0xFF << 8 * first_bytes


def test_an_access_half_in_ram(exact: bool) -> None:
    ram = mmap(-1, 4 * RAM_BYTES)
    at = dword(RAM_AGAIN - 2)
    cpu = paged(f"a3{at} a1{at}", exact, ram)
    cpu.input = 0xABCD
    assert cpu.enter() is ExitReason.HLT
    low, high = DATA & 0xFFFF, DATA >> 16 & 0xFFFF
    assert [access[:-1] for access in cpu.accesses] == [
        ("mmio write", FOUR_GIB + 0x1F_FFFE, 2, low),
        ("mmio read", FOUR_GIB + 0x1F_FFFE, 2),
    ]
    assert cpu.word(0) == high
    assert cpu.register("rax") == high << 16 | 0xABCD


@pytest.mark.parametrize("instruction", ["a3", "a1"], ids=["store", "load"])
def test_a_fault_on_the_second_page_comes_before_the_first_access(
    instruction: str, exact: bool
) -> None:
    cpu = paged(instruction + dword(NOTHING - 1), exact)
    assert cpu.enter() is ExitReason.HLT
    assert (cpu.register("cr2"), cpu.register("rip"), cpu.accesses) == (NOTHING, HANDLER + 1, [])


def test_a_device_on_a_page_that_may_not_be_written(exact: bool) -> None:
    at = dword(READ_ONLY)
    cpu = paged(f"a1{at} a3{at}", exact)
    assert cpu.enter() is ExitReason.HLT
    assert [access[:3] for access in cpu.accesses] == [("mmio read", 0xFEC0_0000, 4)]
    assert (cpu.register("cr2"), cpu.long(0xF000 - 16)) == (READ_ONLY, 3)
    assert cpu.long(0xF000 - 12) == CODE + len(bytes.fromhex(PROLOGUE)) + 5


def test_other_page_tables_give_other_devices(exact: bool) -> None:
    """The same linear address, before and after CR3 is written."""
    at = dword(IOAPIC)
    cpu = paged(f"a3{at} b800b00000 0f22d8 a3{at}", exact)
    other = 0xC000
    cpu.ram[0xB000:0xB008] = (other | 1).to_bytes(8, "little")
    cpu.ram[other : other + 8] = PRESENT_WRITABLE_2_MIB.to_bytes(8, "little")
    cpu.ram[other + 16 : other + 24] = (0xFEE0_0000 | PRESENT_WRITABLE_2_MIB).to_bytes(8, "little")
    assert cpu.enter() is ExitReason.HLT
    assert [access[1] for access in cpu.accesses] == [0xFEC0_0000, 0xFEE0_0000]


def test_ins_to_a_device_writes_it_once(exact: bool) -> None:
    cpu = paged(f"bf{dword(IOAPIC)} ba10000000 b902000000 f36d", exact)
    assert cpu.enter() is ExitReason.HLT
    assert [access[:2] for access in cpu.accesses if access[0] == "mmio write"] == [
        ("mmio write", 0xFEC0_0000),
        ("mmio write", 0xFEC0_0004),
    ]


def test_a_kick_in_a_device_leaves_behind_the_access() -> None:
    cpu = paged(f"a3{dword(IOAPIC)} 90", True)
    cpu.on_out = lambda gpa: cpu.engine.kick()
    assert cpu.enter() is ExitReason.EXTERNAL_INTERRUPT
    assert cpu.engine.retired == PROLOGUE_STEPS + 1
    assert (cpu.enter(), len(cpu.accesses)) == (ExitReason.HLT, 1)


def test_ram_above_4_gib_is_mapped_before_the_first_entry() -> None:
    cpu = Cpu("f4")
    high = mmap(-1, RAM_BYTES)
    cpu.engine.map_ram(FOUR_GIB - RAM_BYTES, mmap(-1, 2 * RAM_BYTES))
    cpu.engine.map_ram(FOUR_GIB + 2 * RAM_BYTES, high)
    assert cpu.enter(budget=PLENTY) is ExitReason.HLT
    with pytest.raises(ValueError, match="must be mapped before the first enter"):
        cpu.engine.map_ram(2 * FOUR_GIB, mmap(-1, RAM_BYTES))
    with pytest.raises(ValueError, match="ends above the last address"):
        cpu.engine.map_ram((1 << 40) - 4096, mmap(-1, RAM_BYTES))


def test_ram_above_4_gib_is_ram(exact: bool) -> None:
    at = dword(ABOVE + 8)
    cpu = paged(f"a3{at} a1{dword(ABOVE + RAM_BYTES)} f4", exact)
    high = mmap(-1, RAM_BYTES)
    cpu.engine.map_ram(FOUR_GIB, high)
    assert cpu.enter() is ExitReason.HLT
    assert high[8:12] == (DATA & mask(4)).to_bytes(4, "little")
    assert [access[:2] for access in cpu.accesses] == [("mmio read", FOUR_GIB + RAM_BYTES)]


def test_no_page_table_is_read_from_a_device(exact: bool) -> None:
    """As in KVM, nothing is mapped there."""
    entry = 0x40_0000
    cpu = Cpu("f4", exact=exact)
    cpu.set_long(POINTERS, 0x83)  # 4 MiB from 0
    cpu.set_long(POINTERS + 4, 0x10_0000 | 3)  # the next 4 MiB by a page table behind the RAM
    cpu.ram[IDTR : IDTR + 6] = (IDT << 16 | 0x7FF).to_bytes(6, "little")
    gate = HANDLER >> 16 << 48 | 0x8E00 << 32 | 8 << 16 | HANDLER & 0xFFFF
    cpu.ram[IDT + 8 * 14 : IDT + 8 * 15] = gate.to_bytes(8, "little")
    cpu.ram[GDT + 8 : GDT + 16] = 0x00CF_9B00_0000_FFFF.to_bytes(8, "little")
    write_code(cpu.ram, HANDLER, "f4")
    cpu.input = 0x5063
    cpu.reset_protected(entry)
    cpu.set_registers(
        cr0=0x8001_0011,
        cr3=POINTERS,
        cr4=0x10,
        rsp=0x8000,
        idtr_base=IDT,
        idtr_limit=0x7FF,
        gdtr_base=GDT,
        gdtr_limit=0xFF,
    )
    assert cpu.enter() is ExitReason.HLT
    assert cpu.register("rip") == HANDLER + 1
    assert cpu.register("cr2") == entry
    assert cpu.accesses == []
