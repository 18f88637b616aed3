"""What a guest does wrong with the APICs: nothing happens, and it reads the same on both back ends.

What a local APIC gives for a register it has not got is whatever the emulator's buffer held before,
so no value is asked for there, only that nothing changes.
"""

import pytest

from kvmtick.guests.script import (
    IOAPIC,
    LAPIC,
    Op,
    ioapic_read,
    ioapic_write,
    lapic_write,
    mmio_read,
    mmio_write,
    out8,
    snap_vector,
    sti,
    unreal,
    wrmsr,
)
from kvmtick.kvm.kernel import DEFAULT_RAM_BYTES
from kvmtick.kvm.model import ModelVm

from .rig import (
    ENABLED,
    ICR,
    ICR_HIGH,
    LVT0,
    MASKED,
    MSR_APIC_BASE,
    PORT_ACT,
    SVR,
    TPR,
    WINDOWS,
    X2APIC_BASE,
    Backend,
    Pc,
    Script,
)

ON: Script = (unreal(), lapic_write(SVR, ENABLED))
VECTOR = 0x45


def read(backend: Backend, address: int, size_bytes: int) -> int:
    """What a guest reads there; the IOAPIC's index register names its version."""
    with backend.pc() as pc:
        return pc.run(unreal(), ioapic_write(1, 0), mmio_read(address, 0, size_bytes)).results[0]


@pytest.mark.parametrize(
    ("offset", "size_bytes", "expected"),
    [
        *((0x30, 4, 0x5_0014), (0x30, 2, 0x14), (0x32, 2, 5), (0x30, 1, 0x14), (0x32, 1, 5)),
        *((0x31, 1, 0), (0x33, 1, 0), (0xF0, 1, 0xFF), (0xF1, 1, 0), (0xE2, 2, 0xFFFF)),
        *((0x351, 1, 7), (0x350, 2, 0x700), (0x362, 1, 1), (0x90, 4, 0), (0x90, 1, 0)),
    ],
)
def test_parts_of_a_lapic_register(
    backend: Backend, offset: int, size_bytes: int, expected: int
) -> None:
    assert read(backend, LAPIC + offset, size_bytes) == expected


@pytest.mark.parametrize("size_bytes", [1, 2, 4])
@pytest.mark.parametrize("offset", [0x00, 0x04, 0x08, 0x0C, 0x10, 0x14, 0x20, 0x40, 0x80, 0xFC])
def test_ioapic_registers_of_any_width(backend: Backend, offset: int, size_bytes: int) -> None:
    """The low part of a register; what is none reads 0."""
    value = {0: 1, 0x10: 0x17_0011}.get(offset, 0)
    assert read(backend, IOAPIC + offset, size_bytes) == value & (1 << 8 * size_bytes) - 1


@pytest.mark.parametrize("offset", [1, 2, 3, 5, 0xF, 0x11, 0x12, 0x13, 0xFD, 0xFF])
def test_bytes_between_the_ioapics_registers_read_0(backend: Backend, offset: int) -> None:
    assert read(backend, IOAPIC + offset, 1) == 0


@pytest.mark.parametrize("size_bytes", [1, 2, 4])
@pytest.mark.parametrize("address", [IOAPIC + 0x100, IOAPIC + 0xFFC, LAPIC + 0x1000, 0xD000_0000])
def test_beyond_the_apics_nobody_answers(backend: Backend, address: int, size_bytes: int) -> None:
    assert read(backend, address, size_bytes) == (1 << 8 * size_bytes) - 1


@pytest.mark.parametrize(
    ("address", "size_bytes", "expected"),
    [
        (IOAPIC + 0x0F, 2, 0),
        (IOAPIC + 0x11, 4, 0),
        (IOAPIC + 0xFE, 4, 0xFFFF_FFFF),
        (IOAPIC + 0xFF, 2, 0xFFFF),
    ],
    ids=["before a register", "in a register", "over the end", "over the end by a byte"],
)
def test_an_unaligned_access_to_the_ioapic_is_one_access(
    backend: Backend, address: int, size_bytes: int, expected: int
) -> None:
    assert read(backend, address, size_bytes) == expected


@pytest.mark.parametrize(
    ("ahead", "expected"), [(1, 0xFFFF_FF00), (2, 0xFFFF_0000), (3, 0xFF << 24)]
)
def test_an_access_over_the_end_of_ram(backend: Backend, ahead: int, expected: int) -> None:
    assert read(backend, DEFAULT_RAM_BYTES - ahead, 4) == expected


# --- writes ---------------------------------------------------------------------------------------

LAPIC_READ_ONLY = (0x00, 0x10, 0x30, 0x40, 0x70, 0x90, 0xA0, 0xC0, 0x100, 0x170, 0x180, 0x1F0)
LAPIC_ABSENT = (0x200, 0x270, 0x290, 0x2E0, 0x2F0, 0x390, 0x3A0, 0x3D0, 0x3F0, 0x400, 0xFF0)


def unchanged(pc: Pc, *script: Op | tuple[Op, ...]) -> bool:
    """Whether a script leaves the local APIC and the IOAPIC's entries as `ON` made them."""
    states: list[tuple[bytes, list[int]]] = []

    def note() -> None:
        states.append((bytes(pc.vcpus[0].get_lapic()), [pc.pin(pin) for pin in range(24)]))

    pc.run(*ON, out8(PORT_ACT, 0), *script, out8(PORT_ACT, 0), acts=[note])
    return states[0] == states[1]


@pytest.mark.parametrize("size_bytes", [1, 2, 4])
@pytest.mark.parametrize("register", LAPIC_READ_ONLY + LAPIC_ABSENT)
def test_writes_to_what_is_not_writable_do_nothing(
    backend: Backend, register: int, size_bytes: int
) -> None:
    with backend.pc() as pc:
        assert unchanged(
            pc,
            mmio_write(LAPIC + register, 0xFFFF_FFFF, size_bytes),
            mmio_read(LAPIC + register, 0, size_bytes),
        )


@pytest.mark.parametrize("size_bytes", [1, 2])
@pytest.mark.parametrize("register", [TPR, SVR, ICR, LVT0])
def test_a_lapic_register_takes_32_bits_only(
    backend: Backend, register: int, size_bytes: int
) -> None:
    with backend.pc() as pc:
        assert unchanged(pc, mmio_write(LAPIC + register, 0x51, size_bytes))


@pytest.mark.parametrize("offset", [1, 2, 3, 4, 8, 12, 15])
def test_an_unaligned_write_to_the_lapic_does_nothing(backend: Backend, offset: int) -> None:
    with backend.pc() as pc:
        assert unchanged(pc, mmio_write(LAPIC + TPR + offset, 0x5050_5050))


@pytest.mark.parametrize(
    ("select_bytes", "data_bytes", "entry"),
    [(1, 4, 0x1_8A31), (2, 4, 0x1_8A31), (4, 2, 0x8A31), (4, 1, 0x31)],
)
def test_the_ioapic_takes_writes_of_any_width(
    backend: Backend, select_bytes: int, data_bytes: int, entry: int
) -> None:
    """Index: the low byte. Data: what is not there is 0."""
    with backend.pc() as pc:
        pc.run(
            *(unreal(), mmio_write(IOAPIC, 0x1234_5612, select_bytes)),
            mmio_write(IOAPIC + 0x10, 0x1_8A31, data_bytes),
        )
        assert pc.pin(1) == entry


@pytest.mark.parametrize("offset", [0x04, 0x08, 0x0C, 0x14, 0x20, 0x40, 0xFC])
@pytest.mark.parametrize("size_bytes", [1, 2, 4])
def test_writes_between_the_ioapics_registers_do_nothing(
    backend: Backend, offset: int, size_bytes: int
) -> None:
    with backend.pc() as pc:
        assert unchanged(
            *(pc, ioapic_write(0x12, MASKED)),
            mmio_write(IOAPIC + offset, 0x10, size_bytes),
        )


def test_writes_to_read_only_or_absent_ioapic_registers_do_nothing(backend: Backend) -> None:
    with backend.pc() as pc:
        writes = tuple(ioapic_write(register, 0) for register in (1, 2, *range(3, 16), 0x40, 0xFF))
        assert unchanged(pc, *writes)
    with backend.pc() as pc:
        got = pc.run(unreal(), *writes, ioapic_read(1, 0), ioapic_read(2, 1))
        assert got.results[:2] == (0x17_0011, 0)


# --- 8 bytes --------------------------------------------------------------------------------------

DATA_AT, READ_AT, GDT_AT = 0x7900, 0x7910, 0x7920
# cli; xor ax, ax; mov ds, ax; lgdt [GDT_AT]; PE on; mov ds, 8; PE off; mov ds, 0
UNREAL = bytes.fromhex("fa31c08ed8 0f01162079 0f20c00c010f22c0 bb08008edb 24fe0f22c0 31db8edb")
GDT = bytes.fromhex("0f002879") + bytes(4) + bytes(8) + bytes.fromhex("ffff00000092cf00")
LEAVE = b"\xb0\x5a\xe6\xf4"
DATA = bytes(range(0x11, 0x19))


def load(address: int) -> bytes:
    """movq mm0, [address]"""
    return b"\x67\x0f\x6f\x05" + address.to_bytes(4, "little")


def store(address: int) -> bytes:
    """movq [address], mm0"""
    return b"\x67\x0f\x7f\x05" + address.to_bytes(4, "little")


def select(register: int) -> bytes:
    """mov byte [IOAPIC], register"""
    return b"\x67\xc6\x05" + IOAPIC.to_bytes(4, "little") + bytes((register,))


def play_8_bytes(pc: Pc, code: bytes) -> bytes:
    """Run code that may leave 8 bytes at READ_AT, which begins with DATA in MM0."""
    pc.vm.write_memory(GDT_AT, GDT)
    pc.vm.write_memory(DATA_AT, DATA)
    assert pc.run_image(UNREAL + load(DATA_AT) + code + LEAVE) == 0x5A
    return pc.vm.read_memory(READ_AT, 8)


@pytest.mark.parametrize(
    ("register", "expected"), [(0x01, 0x17_0011), (0x10, 0x1_0000), (0x80, 0xFFFF_FFFF)]
)
def test_8_bytes_of_the_ioapic_read_the_register_and_0(
    backend: Backend, register: int, expected: int
) -> None:
    with backend.pc() as pc:
        got = play_8_bytes(pc, select(register) + load(IOAPIC + 0x10) + store(READ_AT))
        assert got == expected.to_bytes(8, "little")


def test_8_bytes_to_the_ioapic_write_the_low_4(backend: Backend) -> None:
    with backend.pc() as pc:
        got = play_8_bytes(pc, store(IOAPIC) + load(IOAPIC) + store(READ_AT))
        assert got == b"\x11" + bytes(7)
    with backend.pc() as pc:
        play_8_bytes(pc, select(0x10) + load(DATA_AT) + store(IOAPIC + 0x10))
        assert pc.pin(0) == int.from_bytes(DATA[:4], "little") & ~0x5000


def test_8_bytes_to_the_lapic_do_nothing(backend: Backend) -> None:
    with backend.pc() as pc:
        play_8_bytes(pc, store(LAPIC + TPR))
        assert pc.lapic(TPR) == 0


def test_8_bytes_of_nobody_read_all_ones(backend: Backend) -> None:
    with backend.pc() as pc:
        assert play_8_bytes(pc, load(0xD000_0000) + store(READ_AT)) == b"\xff" * 8


# --- destinations and vectors ---------------------------------------------------------------------


MODES = ("fixed", "lowest", "SMI", "remote read", "NMI", "INIT", "SIPI", "ExtINT")


@pytest.mark.parametrize("mode", range(8), ids=MODES)
@pytest.mark.parametrize("logical", [0, 1 << 11], ids=["physical", "logical"])
def test_messages_to_nobody_do_nothing(backend: Backend, mode: int, logical: int) -> None:
    icr = 0x4000 | logical | mode << 8 | VECTOR
    with backend.pc() as pc:
        before = pc.vcpus[0].get_mp_state()
        got = pc.run(
            *(*ON, sti(), lapic_write(ICR_HIGH, 5 << 24), lapic_write(ICR, icr), *WINDOWS),
            snap_vector(VECTOR, 0),
        )
        assert (got.results[0], got.nmis, pc.irr()) == (0, 0, set())
        assert pc.vcpus[0].get_mp_state() == before


@pytest.mark.parametrize("mode", [2, 3, 7], ids=["SMI", "remote read", "ExtINT"])
def test_messages_that_are_no_interrupts_do_nothing(backend: Backend, mode: int) -> None:
    with backend.pc() as pc:
        got = pc.run(*ON, sti(), lapic_write(ICR, 0x4000 | mode << 8 | VECTOR), *WINDOWS)
        assert (got.apic_vectors[VECTOR], got.nmis, pc.irr()) == (0, 0, set())


@pytest.mark.parametrize("msr", [0x1B, 0x801, 0x804, 0x809, 0x80E, 0x82F, 0x831, 0x840, 0x8FF])
def test_writes_of_ones_to_msrs_of_the_apic_fault(backend: Backend, msr: int) -> None:
    with backend.pc() as pc:
        got = pc.run(unreal(), wrmsr(MSR_APIC_BASE, X2APIC_BASE), wrmsr(msr, (1 << 64) - 1))
        assert got.faults == 1


# --- nothing of all that ends a run ---------------------------------------------------------------


def sweep(base: int, size_bytes: int) -> Script:
    """Write and read every 4th byte of a page, but for what ends the run: the reset of the vCPU."""
    script: list[tuple[Op, ...]] = []
    for offset in range(0, 0x420, 4):
        if base == LAPIC and offset == ICR:
            continue
        script.append(mmio_write(base + offset, 0xFFFF_FFFF, size_bytes))
        script.append(mmio_read(base + offset, 0, size_bytes))
    return tuple(script)


@pytest.mark.parametrize("size_bytes", [1, 2, 4])
@pytest.mark.parametrize("base", [LAPIC, IOAPIC], ids=["LAPIC", "IOAPIC"])
def test_all_ones_everywhere(backend: Backend, base: int, size_bytes: int) -> None:
    """The same state in the end, but for the current count."""
    with backend.pc() as pc:
        pc.run(unreal(), *sweep(base, size_bytes))
        state = pc.vcpus[0].get_lapic()
    with Backend("model", ModelVm, exact=True).pc() as pc:
        pc.run(unreal(), *sweep(base, size_bytes))
        expected = pc.vcpus[0].get_lapic()
    for each in (state, expected):
        each.set_reg(0x390, 0)
    assert bytes(state) == bytes(expected)
