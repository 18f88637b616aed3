"""What an APIC does with each kind of message, and the IPIs a guest sends."""

import pytest
from lapic_rig import (
    BASE,
    EXTINT,
    FIXED,
    INIT,
    LOWEST,
    NMI,
    REMRD,
    SMI,
    STARTUP,
    LapicRig,
    vectors,
)

from kvmtick.irqchip.apicdef import KVM_APIC_INIT, KVM_APIC_SIPI
from kvmtick.trace.events import Event

BUSY, LEVEL, LOGICAL = 1 << 12, 1 << 15, 1 << 11
TO_SELF, TO_ALL, TO_OTHERS = 1 << 18, 2 << 18, 3 << 18


@pytest.fixture
def rig() -> LapicRig:
    rig = LapicRig(3)
    rig.enable()
    rig.records()
    for stub in rig.stubs:
        stub.events = 0
    return rig


@pytest.mark.parametrize("mode", [FIXED, LOWEST])
@pytest.mark.parametrize(
    ("level", "triggered", "taken"), [(1, 0, 1), (0, 0, 1), (1, 1, 1), (0, 1, 0)]
)
def test_interrupts(rig: LapicRig, mode: int, level: int, triggered: int, taken: int) -> None:
    dest_map: dict[int, int] = {}
    lapic = rig.lapics[1]
    assert lapic.accept_irq(mode, 0x45, bool(level), bool(triggered), dest_map) == taken
    assert lapic.irr == (1 << 0x45) * taken
    assert lapic.tmr == (1 << 0x45) * (taken and triggered)
    assert rig.stubs[1].events == taken
    assert dest_map == ({1: 0x45} if taken else {})


def test_a_coalesced_interrupt_counts_as_taken(rig: LapicRig) -> None:
    assert [rig.lapic.accept_irq(FIXED, 0x45, True, False) for _ in range(2)] == [1, 1]


@pytest.mark.parametrize(
    ("mode", "taken"), [(SMI, 0), (REMRD, 1), (NMI, 1), (STARTUP, 1), (EXTINT, 0)]
)
@pytest.mark.parametrize("enabled", [True, False])
def test_other_messages(rig: LapicRig, mode: int, taken: int, enabled: bool) -> None:
    """Enabled or not by software: that is for interrupts."""
    lapic, stub = rig.lapics[1], rig.stubs[1]
    if not enabled:
        rig.write(0xF0, 0xFF, vcpu=1)
    before = rig.page(1)
    assert lapic.accept_irq(mode, 0x45, True, False) == taken
    assert rig.page(1) == before
    assert stub.nmis == (mode == NMI)
    assert stub.events == (mode in (REMRD, STARTUP))
    assert lapic.pv_unhalted is (mode == REMRD)
    assert lapic.pending_events == (KVM_APIC_SIPI if mode == STARTUP else 0)
    assert lapic.sipi_vector == (0x45 if mode == STARTUP else 0)


@pytest.mark.parametrize(
    ("level", "triggered", "taken"), [(1, 0, 1), (0, 0, 1), (1, 1, 1), (0, 1, 0)]
)
def test_init_level_de_assert_is_ignored(
    rig: LapicRig, level: int, triggered: int, taken: int
) -> None:
    lapic = rig.lapics[1]
    assert lapic.accept_irq(INIT, 0, bool(level), bool(triggered)) == taken
    assert lapic.pending_events == KVM_APIC_INIT * taken
    assert rig.stubs[1].events == taken


def test_init_takes_back_a_sipi_and_a_sipi_joins_an_init(rig: LapicRig) -> None:
    lapic = rig.lapics[1]
    lapic.accept_irq(STARTUP, 0x12, True, False)
    lapic.accept_irq(INIT, 0, True, False)
    assert lapic.pending_events == KVM_APIC_INIT
    lapic.accept_irq(STARTUP, 0x34, True, False)
    assert lapic.pending_events == KVM_APIC_INIT | KVM_APIC_SIPI
    assert lapic.sipi_vector == 0x34


@pytest.mark.parametrize("mode", range(8))
def test_every_message_is_recorded(rig: LapicRig, mode: int) -> None:
    rig.lapics[2].accept_irq(mode, 0x45, True, True)
    assert rig.records(Event.KVM_APIC_ACCEPT_IRQ) == [(2, mode << 8, 1, 0x45)]


# IPIs.


def received(rig: LapicRig) -> list[list[int]]:
    return [vectors(lapic.irr) for lapic in rig.lapics]


def ipi(rig: LapicRig, icr: int, dest: int = 0, source: int = 0) -> None:
    rig.write(0x310, dest << 24, vcpu=source)
    rig.write(0x300, icr, vcpu=source)


@pytest.mark.parametrize(
    ("icr", "dest", "to"),
    [
        (0x4045, 0, [0]),
        (0x4045, 1, [1]),
        (0x4045, 9, []),
        (0x4045, 0xFF, [0, 1, 2]),
        (0x4045 | LOGICAL, 0b101, [0, 2]),
        (0x4045 | LOGICAL, 0xFF, [0, 1, 2]),
        (0x4045 | LOGICAL, 0, []),
        (0x4045 | TO_SELF, 1, [0]),
        (0x4045 | TO_ALL, 1, [0, 1, 2]),
        (0x4045 | TO_OTHERS, 0, [1, 2]),
        (0x0045 | LEVEL, 1, []),
        (0x0045, 1, [1]),
    ],
)
def test_where_ipis_go(rig: LapicRig, icr: int, dest: int, to: list[int]) -> None:
    for vcpu in range(3):
        rig.write(0xD0, 1 << (24 + vcpu), vcpu=vcpu)
    ipi(rig, icr, dest)
    assert received(rig) == [[0x45] if vcpu in to else [] for vcpu in range(3)]


def test_an_ipi_is_recorded_before_it_arrives(rig: LapicRig) -> None:
    ipi(rig, 0x4445 | LEVEL, 1)
    assert rig.records() == [(0xC445, 1), (1, 0x400, 1, 0x45)]


def test_icr_reads_back_never_busy(rig: LapicRig) -> None:
    ipi(rig, 0x4045 | BUSY, 1)
    assert rig.read(0x300) == 0x4045
    assert rig.read(0x310) == 1 << 24


def test_writing_the_destination_sends_nothing(rig: LapicRig) -> None:
    rig.write(0x310, 0xFFFFFFFF)
    assert rig.records() == []


def test_ipis_of_other_modes(rig: LapicRig) -> None:
    ipi(rig, 0x4400, 1)
    assert [stub.nmis for stub in rig.stubs] == [0, 1, 0]
    ipi(rig, 0x4500 | TO_OTHERS)
    assert [lapic.pending_events for lapic in rig.lapics] == [0, KVM_APIC_INIT, KVM_APIC_INIT]
    ipi(rig, 0x0500 | LEVEL | TO_ALL)
    assert rig.lapic.pending_events == 0
    ipi(rig, 0x4612, 2)
    assert rig.lapics[2].pending_events == KVM_APIC_INIT | KVM_APIC_SIPI
    assert rig.lapics[2].sipi_vector == 0x12


def test_a_lowest_priority_ipi_goes_by_its_vector(rig: LapicRig) -> None:
    for vcpu in range(3):
        rig.write(0xD0, 1 << (24 + vcpu), vcpu=vcpu)
    for vector in (0x60, 0x61, 0x62, 0x63):
        ipi(rig, 0x4100 | LOGICAL | vector, 7)
    assert received(rig) == [[0x60, 0x63], [0x61], [0x62]]


def test_a_disabled_apic_still_sends(rig: LapicRig) -> None:
    rig.write(0xF0, 0xFF)
    ipi(rig, 0x4045, 1)
    ipi(rig, 0x4046 | TO_SELF)
    assert received(rig) == [[], [0x45], []]


def test_nothing_reaches_an_apic_without_base(rig: LapicRig) -> None:
    rig.lapics[1].set_base(BASE)
    ipi(rig, 0x4400, 1)
    ipi(rig, 0x4400 | TO_OTHERS)
    assert [stub.nmis for stub in rig.stubs] == [0, 0, 1]
