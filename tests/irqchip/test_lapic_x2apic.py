"""x2APIC mode: transitions of IA32_APIC_BASE, the MSRs and which give #GP, ICR, SELF_IPI."""

import pytest
from lapic_rig import BASE, BASE_BSP, BASE_X2APIC_BSP, FIXED, LapicRig, vectors

from kvmtick.irqchip.lapic import x2apic_ldr
from kvmtick.trace.events import Event

READABLE = {
    *(0x802, 0x803, 0x808, 0x80A, 0x80D, 0x80F, *range(0x810, 0x829), 0x830),
    *(*range(0x832, 0x83A), 0x83E),
}
WRITABLE = {0x808, 0x80B, 0x80F, 0x828, 0x830, *range(0x832, 0x839), 0x83E, 0x83F}

OFF, XAPIC, X2APIC, INVALID = 0x100, 0x900, 0xD00, 0x500


@pytest.fixture
def rig() -> LapicRig:
    rig = LapicRig(2)
    rig.x2apic()
    rig.records()
    return rig


@pytest.mark.parametrize("features", [None, (), ("tsc_deadline",)])
def test_x2apic_needs_its_cpuid_bit(features: tuple[str, ...] | None) -> None:
    rig = LapicRig(features=features)
    assert not rig.lapic.set_base(BASE_X2APIC_BSP)
    assert not rig.lapic.set_base(BASE_X2APIC_BSP, host_initiated=True)
    assert rig.lapic.apic_base == BASE_BSP


@pytest.mark.parametrize(
    ("before", "after", "guest", "host"),
    [
        (XAPIC, X2APIC, True, True),
        (XAPIC, OFF, True, True),
        (OFF, XAPIC, True, True),
        (X2APIC, OFF, True, True),
        (X2APIC, XAPIC, False, True),
        (OFF, X2APIC, False, True),
        (XAPIC, INVALID, False, False),
        (OFF, INVALID, False, False),
        (X2APIC, INVALID, False, False),
        (X2APIC, X2APIC, True, True),
    ],
)
def test_transitions(before: int, after: int, guest: bool, host: bool) -> None:
    for host_initiated, allowed in ((False, guest), (True, host)):
        lapic = LapicRig().lapic
        assert lapic.set_base(BASE | before, host_initiated=True)
        assert lapic.set_base(BASE | after, host_initiated) is allowed
        assert lapic.apic_base == BASE | (after if allowed else before)
        assert lapic.x2apic_mode is (lapic.apic_base & 0xC00 == 0xC00)
        assert lapic.hw_enabled is (lapic.apic_base & 0x800 != 0)


@pytest.mark.parametrize(
    ("vcpu_id", "ldr"),
    [(0, 1), (1, 2), (15, 0x8000), (16, 0x10001), (255, 0xF8000), (300, 0x121000)],
)
def test_id_and_ldr_are_the_vcpus(vcpu_id: int, ldr: int) -> None:
    rig = LapicRig(0)
    lapic = rig.add(vcpu_id)
    rig.write(0x20, 0x77000000)
    rig.write(0xD0, 0x77000000)
    rig.x2apic()
    assert x2apic_ldr(vcpu_id) == ldr
    assert (lapic.read_msr(0x802), lapic.read_msr(0x80D)) == (vcpu_id, ldr)
    assert lapic.set_base(BASE_BSP, host_initiated=True)
    assert rig.read(0x20) == (vcpu_id << 24) & 0xFF000000


def test_registers_stay_over_the_modes() -> None:
    rig = LapicRig()
    rig.enable()
    rig.write(0x80, 0x40)
    rig.x2apic()
    assert rig.lapic.read_msr(0x808) == 0x40
    assert rig.lapic.write_msr(0x830, 0x5_0000_4045)
    assert rig.lapic.set_base(BASE | OFF)
    assert rig.lapic.set_base(BASE | XAPIC)
    assert [rig.read(offset) for offset in (0x20, 0xD0, 0x80, 0xF0, 0x300, 0x310)] == [
        *(0, 1, 0x40, 0x1FF),
        *(0x4045, 0),
    ]


def test_the_page_is_a_hole(rig: LapicRig) -> None:
    assert rig.read(0x30) == 0xFFFFFFFF
    rig.write(0x80, 0x40)
    assert rig.lapic.read_msr(0x808) == 0


def test_which_can_be_read(rig: LapicRig) -> None:
    readable = {i for i in range(0x7FF, 0x901) if rig.lapic.read_msr(i) is not None}
    assert readable == READABLE


def test_which_can_be_written(rig: LapicRig) -> None:
    assert {i for i in range(0x7FF, 0x901) if rig.lapic.write_msr(i, 0)} == WRITABLE


@pytest.mark.parametrize("index", sorted(READABLE | WRITABLE))
def test_none_outside_x2apic_mode(index: int) -> None:
    lapic = LapicRig().lapic
    assert lapic.read_msr(index) is None
    assert not lapic.write_msr(index, 0)


@pytest.mark.parametrize("index", sorted(WRITABLE - {0x830}))
def test_high_halves_are_reserved(rig: LapicRig, index: int) -> None:
    before = rig.page()
    assert not rig.lapic.write_msr(index, 1 << 32)
    assert rig.page() == before


@pytest.mark.parametrize(
    ("index", "value", "kept"),
    [
        (0x808, 0x1FF, 0xFF),
        (0x80F, 0xFFFFFFFF, 0x3FF),
        (0x835, 0xFFFFFFFF, 0x1F7FF),
        (0x83E, 0x7F, 0xB),
    ],
)
def test_low_halves_have_none(rig: LapicRig, index: int, value: int, kept: int) -> None:
    assert rig.lapic.write_msr(index, value)
    assert rig.lapic.read_msr(index) == kept


@pytest.mark.parametrize(
    ("index", "value", "accepted"),
    [(0x80B, 0xFF00, True), (0x828, 0, True), (0x828, 1, False), (0x83F, 0x100, False)],
)
def test_the_exceptions(rig: LapicRig, index: int, value: int, accepted: bool) -> None:
    assert rig.lapic.write_msr(index, value) is accepted


def test_icr_is_one_register_of_64_bits(rig: LapicRig) -> None:
    lapic = rig.lapic
    assert lapic.write_msr(0x830, 0x1234_5678_0000_5031)
    assert lapic.read_msr(0x830) == 0x1234_5678_0000_4031
    assert rig.records(Event.KVM_APIC_IPI) == [(0x4031, 0x12345678)]
    page = rig.page()
    assert page[0x300:0x308] == bytes.fromhex("3140000078563412")
    assert page[0x310:0x314] == bytes.fromhex("78563412")


@pytest.mark.parametrize("bit", [13, 16, 17, *range(20, 32)])
def test_reserved_bits_of_icr(rig: LapicRig, bit: int) -> None:
    assert not rig.lapic.write_msr(0x830, 1 << bit | 0x31)
    assert rig.lapic.read_msr(0x830) == 0
    assert rig.records(Event.KVM_APIC_IPI) == []


def test_self_ipi(rig: LapicRig) -> None:
    for lapic in rig.lapics:
        lapic.write_msr(0x80F, 0x1FF)
    assert rig.lapics[1].write_msr(0x83F, 0x45)
    assert [vectors(lapic.irr) for lapic in rig.lapics] == [[], [0x45]]
    assert rig.records(Event.KVM_APIC_IPI) == [(0x40045, 0)]
    assert rig.lapics[1].read_msr(0x822) == 1 << 5


def test_eoi_by_msr(rig: LapicRig) -> None:
    lapic = rig.lapic
    lapic.write_msr(0x80F, 0x1FF)
    lapic.accept_irq(FIXED, 0x45, True, False)
    lapic.get_interrupt()
    assert lapic.read_msr(0x812) == 1 << 5
    assert lapic.read_msr(0x80A) == 0x40
    assert lapic.write_msr(0x80B, 0)
    assert lapic.read_msr(0x812) == 0


def test_the_timer_by_msr(rig: LapicRig) -> None:
    lapic = rig.lapic
    lapic.write_msr(0x80F, 0x1FF)
    lapic.write_msr(0x83E, 0xB)
    lapic.write_msr(0x832, 0x20045)
    lapic.write_msr(0x838, 1_000_000)
    rig.run(1_250_000)
    assert lapic.read_msr(0x839) == 750_000
    assert lapic.pending_timer == 1


def test_init_keeps_id_and_ldr(rig: LapicRig) -> None:
    lapic = rig.lapics[1]
    lapic.write_msr(0x830, 0x7_0000_0031)
    lapic.reset(init_event=True)
    assert lapic.x2apic_mode
    assert (lapic.read_msr(0x802), lapic.read_msr(0x80D)) == (1, 2)
    assert lapic.read_msr(0x830) == 0


def test_icr_is_recorded_as_written(rig: LapicRig) -> None:
    rig.recorder.detail = True
    rig.lapic.write_msr(0x830, 0x5_0000_4031)
    rig.lapic.read_msr(0x830)
    rig.lapic.read_msr(0x802)
    assert rig.records(Event.KVM_APIC) == [(1, 0x300, 0x5_0000_4031), (0, 0x20, 0)]
