"""The MP tables: linked, summed up, and what a kernel reads in them."""

import struct

import pytest

from kvmtick.machine.pc.mptable import mp_tables

AT = 0xF_8000
LENGTHS = {0: 20, 1: 8, 2: 8, 3: 8, 4: 8}


def entries(vcpus: int) -> list[bytes]:
    """The configuration table's, found from the floating pointer on."""
    memory = mp_tables(AT, vcpus)
    assert memory[:4] == b"_MP_"
    pointer, length, version = struct.unpack_from("<IBB", memory, 4)
    assert (length, version) == (1, 4)
    assert sum(memory[:16]) % 256 == 0
    table = memory[pointer - AT :]
    assert table[:4] == b"PCMP"
    size, revision = struct.unpack_from("<HB", table, 4)
    assert (size, revision) == (len(table), 4)
    assert sum(table) % 256 == 0
    (count, lapic) = struct.unpack_from("<HI", table, 34)
    assert lapic == 0xFEE0_0000
    found, at = [], 44
    while at < size:
        found.append(table[at : at + LENGTHS[table[at]]])
        at += LENGTHS[table[at]]
    assert len(found) == count
    assert [entry[0] for entry in found] == sorted(entry[0] for entry in found)
    return found


@pytest.mark.parametrize("vcpus", [1, 2, 255])
def test_processors_are_listed_with_the_first_as_the_boot_processor(vcpus: int) -> None:
    processors = [entry for entry in entries(vcpus) if entry[0] == 0]
    assert [entry[1] for entry in processors] == list(range(vcpus))
    assert [entry[3] for entry in processors] == [3] + [1] * (vcpus - 1)


def test_processors_without_an_8_bit_apic_id_are_left_out() -> None:
    assert entries(300) == entries(255)


def test_the_timer_is_at_pin_2_and_the_8259s_at_lint0() -> None:
    bus, ioapic, *interrupts = [entry for entry in entries(1) if entry[0]]
    assert bus == b"\x01\0ISA   "
    assert ioapic[1:4] == b"\0\x11\x01"
    assert ioapic[4:] == (0xFEC0_0000).to_bytes(4, "little")
    pins = {entry[5]: entry[7] for entry in interrupts if entry[0] == 3}
    assert pins == {0: 2} | {irq: irq for irq in (1, *range(3, 16))}
    local = [(entry[1], entry[6], entry[7]) for entry in interrupts if entry[0] == 4]
    assert local == [(3, 0xFF, 0), (1, 0xFF, 1)]
