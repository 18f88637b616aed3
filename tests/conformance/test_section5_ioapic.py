"""The IOAPIC: registers, edges and levels, Remote IRR, as measured on a real kernel.

The recorded host's back end writes EOI at every injection. So where an interrupt in service
matters, IF is 0 and KVM_SET_LAPIC takes the vector into service.
"""

import pytest

from kvmtick.guests.script import (
    apic_eoi_off,
    cli,
    ioapic_read,
    ioapic_write,
    lapic_write,
    mmio_read,
    mmio_write,
    out8,
    snap_vector,
    sti,
    unreal,
)

from .rig import (
    ENABLED,
    EOI,
    EOI_AT_INJECTION,
    LEVEL,
    MASKED,
    POLARITY_LOW,
    PORT_ACT,
    REMOTE_IRR,
    SVR,
    TMR,
    WINDOWS,
    Backend,
    Script,
    to_ioapic,
)

VECTOR = 0x45
PIN = 7
GSI = 7
LOW = 0x10 + 2 * PIN

ON: Script = (unreal(), lapic_write(SVR, ENABLED))


def test_version(backend: Backend) -> None:
    with backend.pc() as pc:
        assert pc.run(unreal(), ioapic_read(1, 0)).results[0] == 0x17_0011


def test_redirection_entries_are_masked_after_reset(backend: Backend) -> None:
    with backend.pc() as pc:
        reads = tuple(ioapic_read(0x10 + n, n) for n in range(48))
        assert pc.run(unreal(), *reads).results[:48] == (0x1_0000, 0) * 24


def test_id_is_writable_and_arb_reads_the_same(backend: Backend) -> None:
    with backend.pc() as pc:
        got = pc.run(
            *(unreal(), ioapic_read(0, 0), ioapic_write(0, 0x0500_0000), ioapic_read(0, 1)),
            *(ioapic_read(2, 2), ioapic_write(0, 0xFFFF_FFFF), ioapic_read(0, 3)),
            *(ioapic_write(2, 0), ioapic_read(2, 4)),
        )
        assert got.results[:5] == (0, 0x0500_0000, 0x0500_0000, 0x0F00_0000, 0x0F00_0000)


def test_delivery_status_and_remote_irr_are_read_only(backend: Backend) -> None:
    with backend.pc() as pc:
        got = pc.run(
            *(unreal(), ioapic_write(LOW, 0xFFFF_FFFF), ioapic_write(LOW + 1, 0xFFFF_FFFF)),
            *(ioapic_read(LOW, 0), ioapic_read(LOW + 1, 1)),
        )
        assert got.results[:2] == (0xFFFF_AFFF, 0xFFFF_FFFF)
        assert pc.pin(PIN) == 0xFFFF_FFFF_FFFF_AFFF


@pytest.mark.parametrize("register", [0x40, 0x41, 0x42, 0x80, 0xFE, 0xFF])
def test_indices_beyond_the_last_entry_read_all_ones(backend: Backend, register: int) -> None:
    with backend.pc() as pc:
        got = pc.run(unreal(), ioapic_write(register, 0), ioapic_read(register, 0))
        assert got.results[0] == 0xFFFF_FFFF
        assert {pc.pin(pin) for pin in range(24)} == {MASKED}


def test_unused_indices_below_the_first_entry_read_all_ones(backend: Backend) -> None:
    with backend.pc() as pc:
        reads = tuple(ioapic_read(register, register) for register in range(3, 16))
        got = pc.run(unreal(), ioapic_write(1, 0), ioapic_read(1, 1), *reads)
        assert got.results[1] == 0x17_0011
        assert got.results[3:16] == (0xFFFF_FFFF,) * 13


def test_the_index_register_reads_back_8_bits(backend: Backend) -> None:
    with backend.pc() as pc:
        got = pc.run(
            *(unreal(), mmio_write(0xFEC0_0000, 0x1234_5601), mmio_read(0xFEC0_0000, 0)),
            mmio_read(0xFEC0_0010, 1),
        )
        assert got.results[:2] == (0x01, 0x17_0011)


# --- edges ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [0, 1], ids=["a pulse", "a line that stays high"])
def test_an_edge_while_masked_is_lost(backend: Backend, level: int) -> None:
    with backend.pc() as pc:
        got = pc.run(
            *(*ON, ioapic_write(LOW, VECTOR | MASKED), out8(PORT_ACT, 0)),
            *(ioapic_write(LOW, VECTOR), sti(), *WINDOWS, snap_vector(VECTOR, 0)),
            acts=[lambda: (pc.vm.irq_line(GSI, 1), pc.vm.irq_line(GSI, level))],
        )
        assert got.results[0] == got.apic_vectors[VECTOR] == 0
        assert pc.irr() == set()
        # the next edge comes through
        pc.vm.irq_line(GSI, 0)
        pc.vm.irq_line(GSI, 1)
        assert pc.irr() == {VECTOR}


def test_an_edge_is_taken_once_however_long_the_line_stays_high(backend: Backend) -> None:
    with backend.pc() as pc:
        got = pc.run(
            *(*ON, ioapic_write(LOW, VECTOR), sti(), out8(PORT_ACT, 0), *WINDOWS),
            *(out8(PORT_ACT + 1, 0), *WINDOWS),
            acts=[lambda: pc.vm.irq_line(GSI, 1), lambda: pc.pulse(GSI)],
        )
        # up while up is no edge; the pulse's end let the line fall
        assert got.apic_vectors[VECTOR] == 1
        assert pc.irr() == set()


# --- levels ---------------------------------------------------------------------------------------


def test_a_level_line_that_is_high_at_the_unmask_fires(backend: Backend) -> None:
    with backend.pc() as pc:
        pc.vm.irq_line(GSI, 1)
        pc.run(*ON, ioapic_write(LOW, VECTOR | LEVEL))
        assert pc.irr() == {VECTOR}
        assert pc.pin(PIN) == VECTOR | LEVEL | REMOTE_IRR


def test_a_level_line_that_fell_while_masked_is_forgotten(backend: Backend) -> None:
    with backend.pc() as pc:
        pc.pulse(GSI)
        pc.run(*ON, ioapic_write(LOW, VECTOR | LEVEL))
        assert pc.irr() == set()
        assert pc.pin(PIN) == VECTOR | LEVEL


@pytest.mark.parametrize("trigger", [0, LEVEL], ids=["edge", "level"])
def test_the_polarity_bit_is_ignored(backend: Backend, trigger: int) -> None:
    """High is asserted."""
    with backend.pc() as pc:
        pc.vm.set_gsi_routing([to_ioapic(GSI, PIN)])
        pc.enable_lapic()
        pc.set_pin(PIN, VECTOR | trigger | POLARITY_LOW)
        assert pc.vm.irq_line_status(GSI, 0) == 1
        assert pc.irr() == set()
        assert pc.vm.irq_line_status(GSI, 1) == 1
        assert pc.irr() == {VECTOR}
        assert pc.vectors(TMR) == ({VECTOR} if trigger else set())


@pytest.mark.parametrize("trigger", [0, LEVEL], ids=["edge", "level"])
def test_remote_irr_is_set_by_a_level_delivery_only(backend: Backend, trigger: int) -> None:
    with backend.pc() as pc:
        pc.enable_lapic()
        pc.set_pin(PIN, VECTOR | trigger)
        pc.vm.irq_line(GSI, 1)
        assert pc.pin(PIN) == VECTOR | trigger | (REMOTE_IRR if trigger else 0)


@pytest.mark.parametrize("line", [0, 1])
def test_after_eoi_a_line_that_is_high_fires_again(backend: Backend, line: int) -> None:
    """With the line low EOI clears Remote IRR, and that is all."""
    with backend.pc() as pc:
        pc.run(
            *(*ON, ioapic_write(LOW, VECTOR | LEVEL), out8(PORT_ACT, 0), lapic_write(EOI, 0)),
            acts=[
                lambda: (
                    pc.vm.irq_line(GSI, 1),
                    pc.take_into_service(VECTOR),
                    pc.vm.irq_line(GSI, line),
                )
            ],
        )
        assert pc.irr() == ({VECTOR} if line else set())
        assert pc.pin(PIN) == VECTOR | LEVEL | (REMOTE_IRR if line else 0)


def test_a_level_interrupt_is_taken_once_until_its_handler_ends_it(backend: Backend) -> None:
    """With IF=1 all the way: the second time comes after the EOI."""
    backend.needs_model(EOI_AT_INJECTION)
    with backend.pc() as pc:
        got = pc.run(
            *(*ON, apic_eoi_off(), ioapic_write(LOW, VECTOR | LEVEL), sti(), out8(PORT_ACT, 0)),
            *(*WINDOWS, snap_vector(VECTOR, 0), ioapic_read(LOW, 1), lapic_write(EOI, 0)),
            *(*WINDOWS, snap_vector(VECTOR, 2), out8(PORT_ACT + 1, 0), cli()),
            *(lapic_write(EOI, 0), sti(), *WINDOWS, snap_vector(VECTOR, 3), ioapic_read(LOW, 4)),
            acts=[lambda: pc.vm.irq_line(GSI, 1), lambda: pc.vm.irq_line(GSI, 0)],
        )
        in_service = VECTOR | LEVEL | REMOTE_IRR
        assert got.results[:5] == (1, in_service, 2, 2, VECTOR | LEVEL)


def test_writing_edge_mode_clears_remote_irr(backend: Backend) -> None:
    with backend.pc() as pc:
        pc.run(
            *(*ON, ioapic_write(LOW, VECTOR | LEVEL), out8(PORT_ACT, 0)),
            *(ioapic_write(LOW, VECTOR | MASKED), ioapic_write(LOW, VECTOR | LEVEL | MASKED)),
            acts=[lambda: pc.pulse(GSI)],
        )
        assert pc.pin(PIN) == VECTOR | LEVEL | MASKED


def test_two_gsis_of_one_pin(backend: Backend) -> None:
    """Source 0 drives the pin for both: the level is that of the last call."""
    with backend.pc() as pc:
        pc.vm.set_gsi_routing([to_ioapic(1, PIN), to_ioapic(2, PIN)])
        pc.enable_lapic()
        pc.set_pin(PIN, VECTOR)
        got = [pc.vm.irq_line_status(gsi, level) for gsi, level in ((1, 1), (2, 1), (1, 0), (2, 1))]
        assert got == [1, 0, 1, 1]
