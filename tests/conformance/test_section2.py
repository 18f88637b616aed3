"""What KVM_IRQ_LINE_STATUS returns: the table measured on a real kernel, a test a row.

No vCPU runs, so nothing is acknowledged. Each row drives a GSI that leads to one chip only (or to
what the row says) to the levels of its sequence.
"""

import os
from collections.abc import Callable

import pytest

from kvmtick.abi.structs import KVM_IRQCHIP_PIC_SLAVE, KVM_IRQFD_FLAG_RESAMPLE
from kvmtick.guests.script import out8, pit, spin_ms
from kvmtick.kvm.model import ModelVm
from kvmtick.trace.events import Event, field

from .rig import (
    COUNT,
    DEST_ID_SHIFT,
    LEVEL,
    MASKED,
    MSI_ADDRESS,
    NMI,
    Backend,
    Pc,
    to_ioapic,
    to_msi,
    to_pic,
)

LEVELS = (1, 1, 0, 1, 0, 0)
GSI = 5
VECTOR = 0x45
ABSENT = 5
"""A destination nobody has."""


def to_the_pic(irq: int, **registers: int) -> Callable[[Pc], None]:
    def prepare(pc: Pc) -> None:
        pc.vm.set_gsi_routing([to_pic(GSI, irq)])
        if registers:
            pc.pic(irq // 8, **registers)

    return prepare


def to_the_ioapic(entry: int) -> Callable[[Pc], None]:
    def prepare(pc: Pc) -> None:
        pc.vm.set_gsi_routing([to_ioapic(GSI, 7)])
        pc.enable_lapic()
        pc.set_pin(7, entry)

    return prepare


def to_a_software_disabled_lapic(pc: Pc) -> None:
    pc.vm.set_gsi_routing([to_ioapic(GSI, 7)])
    pc.set_pin(7, VECTOR)


def to_a_message(data: int, address: int = MSI_ADDRESS) -> Callable[[Pc], None]:
    def prepare(pc: Pc) -> None:
        pc.vm.set_gsi_routing([to_msi(GSI, data, address)])
        pc.enable_lapic()

    return prepare


PIC_EDGE = (1, 1, 1, 0, 1, 1)
PIC_MASKED = (-1,) * 6
PIC_LEVEL = (1, 0, 1, 1, 1, 1)
ROWS: dict[str, tuple[Callable[[Pc], None], tuple[int, ...]]] = {
    "PIC master edge unmasked": (to_the_pic(3), PIC_EDGE),
    "PIC slave edge unmasked": (to_the_pic(11), PIC_EDGE),
    "PIC master edge masked": (to_the_pic(3, imr=0xFF), PIC_MASKED),
    "PIC slave edge masked": (to_the_pic(11, imr=0xFF), PIC_MASKED),
    "PIC master level masked": (to_the_pic(3, imr=0xFF, elcr=1 << 3), PIC_MASKED),
    "PIC slave level masked": (to_the_pic(11, imr=0xFF, elcr=1 << 3), PIC_MASKED),
    "PIC master level unmasked": (to_the_pic(3, elcr=1 << 3), PIC_LEVEL),
    "PIC slave level unmasked": (to_the_pic(11, elcr=1 << 3), PIC_LEVEL),
    "IOAPIC edge unmasked": (to_the_ioapic(VECTOR), (1, 0, 1, 1, 1, 1)),
    "IOAPIC edge masked": (to_the_ioapic(VECTOR | MASKED), (-1, 0, 1, -1, 1, 1)),
    "IOAPIC level unmasked": (to_the_ioapic(VECTOR | LEVEL), (1, -1, 1, -1, 1, 1)),
    "IOAPIC level masked": (to_the_ioapic(VECTOR | LEVEL | MASKED), (-1, -1, 1, -1, 1, 1)),
    "IOAPIC edge LAPIC software-disabled": (to_a_software_disabled_lapic, (0, 0, 1, 0, 1, 1)),
    "IOAPIC edge destination absent": (
        to_the_ioapic(VECTOR | ABSENT << DEST_ID_SHIFT),
        (0, 0, 1, 0, 1, 1),
    ),
    "IOAPIC NMI delivery": (to_the_ioapic(NMI), (1, 0, 1, 1, 1, 1)),
    "MSI": (to_a_message(VECTOR), (1, 1, -1, 1, -1, -1)),
    "MSI destination absent": (
        to_a_message(VECTOR, MSI_ADDRESS | ABSENT << 12),
        (0, 0, -1, 0, -1, -1),
    ),
}


@pytest.mark.parametrize(
    ("prepare", "expected"),
    ROWS.values(),
    ids=[name.replace(" ", "-") for name in ROWS],
)
def test_row(backend: Backend, prepare: Callable[[Pc], None], expected: tuple[int, ...]) -> None:
    with backend.pc() as pc:
        prepare(pc)
        assert tuple(pc.vm.irq_line_status(GSI, level) for level in LEVELS) == expected


def test_a_pulse_that_found_the_lapic_request_still_there_counts_as_delivered(
    backend: Backend,
) -> None:
    """The row `IOAPIC edge unmasked`: the APIC's request register has the vector all the time."""
    with backend.pc() as pc:
        to_the_ioapic(VECTOR)(pc)
        for _ in range(3):
            assert pc.vm.irq_line_status(GSI, 1) == 1
            assert pc.irr() == {VECTOR}
            pc.vm.irq_line(GSI, 0)


def test_a_coalesced_pic_edge_leaves_the_request(backend: Backend) -> None:
    with backend.pc() as pc:
        to_the_pic(3)(pc)
        assert [pc.vm.irq_line_status(GSI, level) for level in (1, 0, 1)] == [1, 1, 0]
        assert pc.pic()["irr"] == 1 << 3


def test_remote_irr_is_what_refuses_a_level_interrupt(backend: Backend) -> None:
    with backend.pc() as pc:
        to_the_ioapic(VECTOR | LEVEL)(pc)
        assert pc.vm.irq_line_status(GSI, 1) == 1
        assert pc.pin(7) == VECTOR | LEVEL | 1 << 14
        assert pc.vm.irq_line_status(GSI, 1) == -1


def test_nmi_delivery_makes_nmis_pending(backend: Backend) -> None:
    with backend.pc() as pc:
        to_the_ioapic(NMI)(pc)
        pc.pulse(GSI)
        assert pc.vcpus[0].get_vcpu_events().nmi.pending == 1


# --- several chips --------------------------------------------------------------------------------


def test_a_negative_result_counts_as_nothing_beside_another_chip(backend: Backend) -> None:
    """Default routing, the PIC unmasked, the IOAPIC masked."""
    with backend.pc() as pc:
        got = [pc.vm.irq_line_status(3, level) for level in (1, 1, 0, 1, 0)]
        assert got == [1, 1, 2, 0, 2]


def test_the_results_of_two_chips_add_up(backend: Backend) -> None:
    with backend.pc() as pc:
        pc.enable_lapic()
        pc.set_pin(3, VECTOR)
        assert [pc.vm.irq_line_status(3, level) for level in LEVELS] == [2, 1, 2, 1, 2, 2]


def test_only_negative_results_give_minus_one(backend: Backend) -> None:
    with backend.pc() as pc:
        pc.pic(imr=0xFF)
        assert pc.vm.irq_line_status(3, 1) == -1


# --- default routing ------------------------------------------------------------------------------


@pytest.mark.parametrize("gsi", [16, 20, 23, 24, 4095, 4096, 0xFFFF_FFFF])
def test_gsis_without_a_pic_pin_give_minus_one(backend: Backend, gsi: int) -> None:
    """16 to 23 have a masked IOAPIC pin, the others nothing: the call itself succeeds."""
    with backend.pc() as pc:
        assert [pc.vm.irq_line_status(gsi, 1), pc.vm.irq_line_status(gsi, 0)] == (
            [-1, 1] if gsi < 24 else [-1, -1]
        )


def test_gsi_n_leads_to_pin_n_of_ioapic_and_pics(backend: Backend) -> None:
    """Also GSI 0: to pin 0, not to pin 2."""
    with backend.pc() as pc:
        pc.enable_lapic()
        for pin in range(24):
            pc.set_pin(pin, 0x40 + pin)
        for gsi in range(24):
            before = pc.irr()
            pc.vm.irq_line(gsi, 1)
            assert pc.irr() - before == {0x40 + gsi}
            # pin 2 of the master is the slave's
            slave = pc.pic(KVM_IRQCHIP_PIC_SLAVE)["irr"]
            assert slave << 8 | pc.pic()["irr"] & ~4 | (gsi >= 2) << 2 == (2 << min(gsi, 15)) - 1
            pc.vm.irq_line(gsi, 0)


def test_an_empty_table_leads_nowhere(backend: Backend) -> None:
    with backend.pc() as pc:
        pc.vm.set_gsi_routing([])
        assert [pc.vm.irq_line_status(gsi, 1) for gsi in range(25)] == [-1] * 25
        assert pc.pic()["irr"] == 0


# --- source ids -----------------------------------------------------------------------------------


def test_the_line_is_the_or_over_its_sources(backend: Backend) -> None:
    """Two GSIs drive one pin for the same source: the last call counts. A message has no line."""
    with backend.pc() as pc:
        pc.vm.set_gsi_routing([to_pic(1, 3), to_pic(2, 3)])
        pc.pic(elcr=1 << 3)
        for gsi, level, irr in ((1, 1, 8), (2, 1, 8), (1, 0, 0), (2, 1, 8), (2, 0, 0)):
            pc.vm.irq_line(gsi, level)
            assert pc.pic()["irr"] == irr


def test_irq_source_ids_in_traces() -> None:
    """IRQ_LINE and a plain irqfd are source 0, a resampling irqfd 1, the PIT 2."""
    seen: list[tuple[int, ...]] = []
    fds = plain, resampling, resampled = tuple(os.eventfd(0, os.EFD_NONBLOCK) for _ in range(3))
    try:
        with Backend("model", ModelVm).pc(pit=True) as pc:
            assert isinstance(pc.vm, ModelVm)
            pc.vm.machine.recorder.add_consumer(
                lambda batch: seen.extend(
                    (field(record, "gsi"), field(record, "irq_source_id"))
                    for record in batch
                    if record[1] == Event.KVM_SET_IRQ
                )
            )
            pc.vm.irq_line(1, 1)
            pc.vm.irqfd(plain, 3)
            os.eventfd_write(plain, 1)
            pc.vm.get_irqchip(0)
            pc.vm.irqfd(resampling, 4, KVM_IRQFD_FLAG_RESAMPLE, resampled)
            os.eventfd_write(resampling, 1)
            pc.run(out8(0x21, 0xFF), pit(COUNT), spin_ms(2))
    finally:
        for fd in fds:
            os.close(fd)
    assert set(seen) == {(1, 0), (3, 0), (4, 1), (0, 2)}
