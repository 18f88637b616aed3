"""KVM_GET_LAPIC and KVM_SET_LAPIC."""

import errno

import pytest
from attributes import attributes
from hypothesis import given
from hypothesis import strategies as st
from lapic_rig import MS, LapicRig, page_vectors

from kvmtick.abi import KvmError
from kvmtick.irqchip.lapic_registers import (
    FIELDS,
    VECTOR_FIELDS,
    LapicRegisters,
    page_register,
    set_page_register,
)
from kvmtick.irqchip.lapic_timer import LapicTimer

PAGE_BYTES = 1024
TMICT, TMCCT, PPR, LVR = 0x380, 0x390, 0xA0, 0x30
COMPUTED = (LVR, PPR, TMCCT)


def distinct_page() -> bytearray:
    """Every 32-bit word another value, no timer."""
    page = bytearray()
    for offset in range(0, PAGE_BYTES, 4):
        page += (0x80010000 + offset * 0x101).to_bytes(4, "little")
    set_page_register(page, TMICT, 0)
    return page


def same_but_computed(before: bytes | bytearray, after: bytes | bytearray) -> None:
    for offset in range(0, PAGE_BYTES, 4):
        if offset not in COMPUTED:
            assert before[offset : offset + 4] == after[offset : offset + 4], hex(offset)


def test_every_field_makes_the_round_trip() -> None:
    rig = LapicRig()
    page = distinct_page()
    rig.lapic.restore(bytes(page))
    for offset, name in FIELDS.items():
        if offset not in COMPUTED:
            assert getattr(rig.lapic, name) == page_register(page, offset), name
    for first, name in VECTOR_FIELDS.items():
        bits = getattr(rig.lapic, name)
        assert [vector for vector in range(256) if bits >> vector & 1] == page_vectors(page, first)
    saved = rig.page()
    same_but_computed(page, saved)
    assert page_register(saved, LVR) == 0x50014
    assert page_register(saved, TMCCT) == 0


def test_every_register_is_a_field_of_the_page() -> None:
    """A register that is added shows up here, and in the round trip above."""
    registers = {*FIELDS.values(), *VECTOR_FIELDS.values()}
    own = {name.removeprefix("_") for name in attributes(LapicRegisters)} - {"padding"}
    inherited = {name.removeprefix("_") for name in attributes(LapicTimer)}
    assert own - inherited <= registers
    assert registers <= own | inherited


def test_each_field_is_at_its_place() -> None:
    for offset, name in FIELDS.items():
        rig = LapicRig()
        before = rig.page()
        setattr(rig.lapic, name, 0x8000_0001 if name != "tmict" else 0)
        after = rig.page()
        changed = {i & ~3 for i in range(PAGE_BYTES) if before[i] != after[i]}
        assert changed <= {offset}, name
        assert changed or name == "tmict"


@pytest.mark.parametrize("size", [0, 1023, 1025])
def test_the_page_has_its_size(size: int) -> None:
    with pytest.raises(KvmError) as caught:
        LapicRig().lapic.restore(bytes(size))
    assert caught.value.errno == errno.EINVAL


def test_restoring_asks_the_vcpu_to_look() -> None:
    rig = LapicRig()
    before = rig.vcpu.events, rig.vcpu.scans
    rig.change()
    assert rig.vcpu.events > before[0]
    assert rig.vcpu.scans > before[1]


def test_restoring_enables() -> None:
    rig = LapicRig()
    rig.change(spiv=0x1FF)
    assert rig.lapic.sw_enabled
    assert rig.lapic.accept_irq(0, 0x45, True, False) == 1
    rig.change(spiv=0xFF)
    assert not rig.lapic.sw_enabled


def test_ppr_is_right_when_the_vcpu_has_looked() -> None:
    """At first it goes by what was in service before."""
    rig = LapicRig()
    for first, isr, at_once, later in ((0, 0x45, 0, 0x40), (1, 0x85, 0x80, 0x80), (2, None, 0, 0)):
        page = rig.page()
        for i in range(8):
            set_page_register(page, 0x100 + 16 * i, 0)
        if isr is not None:
            set_page_register(page, 0x100 + (isr >> 5) * 16, 1 << (isr & 31))
        rig.lapic.restore(bytes(page))
        assert page_register(rig.page(), PPR) == at_once, first
        rig.lapic.has_interrupt()
        assert page_register(rig.page(), PPR) == later, first


def test_ppr_goes_by_the_vector_at_hand() -> None:
    rig = LapicRig()
    rig.enable()
    rig.accept(0x65)
    rig.lapic.get_interrupt()
    page = rig.page()
    set_page_register(page, 0x130, 0)
    rig.lapic.restore(bytes(page))
    assert page_register(rig.page(), PPR) == 0x60
    assert rig.read(PPR) == 0


def test_a_restored_request_is_delivered() -> None:
    rig = LapicRig()
    page = rig.page()
    set_page_register(page, 0x220, 1 << 5)
    rig.lapic.restore(bytes(page))
    assert rig.lapic.get_interrupt() == 0x45


# The timer.


@pytest.mark.parametrize("lvtt", [0x10045, 0x30045])
def test_a_running_timer_goes_on(lvtt: int) -> None:
    rig = LapicRig()
    rig.change(lvtt=lvtt, tmict=MS, tdcr=0xB, tmcct=MS)
    rig.run(MS // 4)
    saved = bytes(rig.page())
    assert page_register(saved, TMCCT) == MS * 3 // 4
    other = LapicRig()
    other.run(7 * MS)
    other.lapic.restore(saved)
    assert bytes(other.page()) == saved
    other.run(MS * 3 // 4)
    assert other.expiries() == [7 * MS + MS * 3 // 4]


@pytest.mark.parametrize(
    ("lvtt", "tmcct", "first"),
    [
        (0x45, 0, 0),
        (0x45, MS // 4, MS // 4),
        (0x45, 2 * MS, MS),
        (0x20045, 0, MS),
        (0x20045, MS // 4, MS // 4),
        (0x20045, 2 * MS, MS),
        (0x20045, 1000, 1000),
    ],
)
def test_what_the_current_count_does(lvtt: int, tmcct: int, first: int) -> None:
    """None left: a one-shot is due, a periodic one has a whole period; too much: a period."""
    rig = LapicRig()
    rig.change(lvtt=lvtt, tmict=MS, tdcr=0xB, tmcct=tmcct)
    rig.run(2 * MS)
    expiries = rig.expiries()
    assert expiries[0] == first
    assert expiries[1:2] == ([first + MS] if lvtt == 0x20045 else [])


def test_restoring_drops_what_is_pending() -> None:
    rig = LapicRig()
    rig.enable()
    rig.write(0x3E0, 0xB)
    rig.write(0x320, 0x20045)
    rig.write(TMICT, MS)
    rig.run(MS)
    rig.change()
    assert rig.lapic.pending_timer == 0


def test_no_initial_count_no_timer() -> None:
    rig = LapicRig()
    rig.change(lvtt=0x20045, tmict=0, tdcr=0xB, tmcct=MS)
    assert page_register(rig.page(), TMCCT) == 0
    assert not rig.lapic.timer.enqueued


def test_a_mode_that_cpuid_does_not_have() -> None:
    """The page may say it; the timer does not know it."""
    rig = LapicRig(features=None)
    rig.change(lvtt=0x60045, tmict=MS, tdcr=0xB, tmcct=MS)
    assert page_register(rig.page(), 0x320) == 0x60045
    assert rig.lapic.is_oneshot
    rig.run(5 * MS)
    assert rig.expiries() == [MS]


def test_into_deadline_mode_the_count_goes() -> None:
    rig = LapicRig()
    rig.change(lvtt=0x40045, tmict=MS, tdcr=0xB, tmcct=MS)
    assert page_register(rig.page(), TMICT) == 0


# x2APIC.


def test_ids_in_x2apic_mode() -> None:
    rig = LapicRig(2)
    rig.x2apic()
    page = rig.page(1)
    assert page_register(page, 0x20) == 1 << 24
    set_page_register(page, 0x20, 0x77)
    set_page_register(page, 0xD0, 0x77)
    set_page_register(page, 0x300, 0x4045)
    set_page_register(page, 0x304, 0x11)
    set_page_register(page, 0x310, 0x12345678)
    rig.lapics[1].restore(bytes(page))
    lapic = rig.lapics[1]
    assert (lapic.read_msr(0x802), lapic.read_msr(0x80D)) == (1, 2)
    assert lapic.read_msr(0x830) == 0x1234_5678_0000_4045
    saved = rig.page(1)
    assert page_register(saved, 0x304) == 0x12345678


def test_32_bit_ids_must_match() -> None:
    rig = LapicRig(2)
    rig.delivery.x2apic_format = True
    rig.x2apic()
    page = rig.page(1)
    assert page_register(page, 0x20) == 1
    rig.lapics[1].restore(bytes(page))
    before = rig.page(1)
    set_page_register(page, 0x20, 1 << 24)
    set_page_register(page, 0x80, 0x40)
    set_page_register(page, 0xF0, 0x1AB)
    with pytest.raises(KvmError) as caught:
        rig.lapics[1].restore(bytes(page))
    assert (caught.value.errno, caught.value.call) == (errno.EINVAL, "KVM_SET_LAPIC")
    after = rig.page(1)
    assert page_register(after, 0xF0) == 0x1AB
    set_page_register(after, 0xF0, page_register(before, 0xF0))
    assert after == before


def test_xapic_ids_are_as_stored() -> None:
    rig = LapicRig()
    rig.delivery.x2apic_format = True
    rig.change(id=0x55123456)
    assert page_register(rig.page(), 0x20) == 0x55123456


# Properties.

PAGES = st.binary(min_size=PAGE_BYTES, max_size=PAGE_BYTES)


@given(PAGES, st.booleans(), st.booleans())
def test_a_saved_state_restores_to_itself(page: bytes, x2apic: bool, timer: bool) -> None:
    """On another APIC, of any history, once the vCPU has looked."""
    rig, other = LapicRig(), LapicRig()
    other.enable()
    other.accept(0x99)
    other.lapic.get_interrupt()
    if x2apic:
        rig.x2apic()
        other.x2apic()
    state = bytearray(page)
    if not timer:
        set_page_register(state, TMICT, 0)
    rig.lapic.restore(bytes(state))
    rig.lapic.has_interrupt()
    saved = rig.lapic.save()
    other.lapic.restore(saved)
    other.lapic.has_interrupt()
    assert other.lapic.save() == saved


@given(PAGES)
def test_nothing_but_what_is_computed_changes(page: bytes) -> None:
    state = bytearray(page)
    set_page_register(state, TMICT, 0)
    rig = LapicRig()
    rig.lapic.restore(bytes(state))
    same_but_computed(state, rig.page())
    rig.lapic.has_interrupt()
    highest = max(page_vectors(state, 0x100), default=0) & 0xF0
    tpr = page_register(state, 0x80) & 0xFF
    assert page_register(rig.page(), PPR) == (tpr if tpr & 0xF0 >= highest else highest)
