"""The register page: reset values, masks, what reads and writes of every kind do."""

import pytest
from lapic_rig import BASE, NMI, LapicRig

from kvmtick.irqchip.delivery import SuppressEoiBroadcast
from kvmtick.trace.events import Event

LVTS = (0x320, 0x330, 0x340, 0x350, 0x360, 0x370)


@pytest.fixture
def rig() -> LapicRig:
    return LapicRig()


@pytest.mark.parametrize(
    ("offset", "value"),
    [
        *((offset, 0) for offset in (0x20, 0x80, 0x90, 0xA0, 0xD0, 0x280, 0x300, 0x310)),
        *((offset, 0) for offset in (0x380, 0x390, 0x3E0)),
        *((first + 16 * i, 0) for first in (0x100, 0x180, 0x200) for i in range(8)),
        (0x30, 0x50014),
        (0xE0, 0xFFFFFFFF),
        (0xF0, 0xFF),
        (0x350, 0x700),
        *((offset, 0x10000) for offset in LVTS if offset != 0x350),
    ],
)
def test_reset(rig: LapicRig, offset: int, value: int) -> None:
    assert rig.read(offset) == value


def test_only_the_boot_processor_starts_with_extint_unmasked() -> None:
    rig = LapicRig(2)
    assert [rig.read(0x350, vcpu=vcpu) for vcpu in (0, 1)] == [0x700, 0x10000]
    assert [lapic.accepts_pic_intr() for lapic in rig.lapics] == [True, False]
    assert [lapic.apic_base for lapic in rig.lapics] == [BASE | 0x900, BASE | 0x800]
    assert rig.read(0x20, vcpu=1) == 1 << 24


@pytest.mark.parametrize(
    ("offset", "kept"),
    [
        (0x20, 0xFF000000),
        (0x80, 0xFF),
        (0xD0, 0xFF000000),
        (0xE0, 0xFFFFFFFF),
        (0xF0, 0x3FF),
        (0x280, 0),
        (0x300, 0xFFFFEFFF),
        (0x310, 0xFF000000),
        (0x320, 0x710FF),
        (0x330, 0x117FF),
        (0x340, 0x117FF),
        (0x350, 0x1F7FF),
        (0x360, 0x1F7FF),
        (0x370, 0x110FF),
        (0x380, 0xFFFFFFFF),
        (0x3E0, 0xB),
    ],
)
def test_write_masks(rig: LapicRig, offset: int, kept: int) -> None:
    rig.enable()
    rig.write(0x320, 0x10000)
    rig.write(offset, 0xFFFFFFFF)
    assert rig.read(offset) == kept


def test_dfr_keeps_its_ones(rig: LapicRig) -> None:
    rig.write(0xE0, 0)
    assert rig.read(0xE0) == 0x0FFFFFFF


@pytest.mark.parametrize(
    "offset", [0x30, 0x90, 0xA0, 0x100, 0x180, 0x200, 0x390, 0x2F0, 0x3F0, 0xC0, 0x400, 0xFF0]
)
def test_other_registers_ignore_writes(rig: LapicRig, offset: int) -> None:
    before = rig.page()
    rig.write(offset, 0xFFFFFFFF)
    assert rig.page() == before


@pytest.mark.parametrize(
    "offset", [0x00, 0x10, 0x40, 0xB0, 0xC0, 0x2F0, 0x3A0, 0x3F0, 0x400, 0x800]
)
def test_unreadable_registers_read_0(rig: LapicRig, offset: int) -> None:
    assert (rig.read(offset), rig.read(offset, 2)) == (0, 0)


def test_reads_of_one_two_and_four_bytes_within_a_register(rig: LapicRig) -> None:
    rig.lapic.lvr = 0x44332211
    assert [rig.read(0x30 + i, 1) for i in range(4)] == [0x11, 0x22, 0x33, 0x44]
    assert [rig.read(0x30 + i, 2) for i in range(4)] == [0x2211, 0x3322, 0x4433, 0]
    assert [rig.read(0x30 + i, 4) for i in range(2)] == [0x44332211, 0]
    assert (rig.read(0x34, 1), rig.read(0x30, 8)) == (0, 0)


@pytest.mark.parametrize(
    ("offset", "size"), [(0x80, 1), (0x80, 2), (0x80, 8), (0x84, 4), (0x81, 4)]
)
def test_writes_other_than_aligned_dwords_vanish(rig: LapicRig, offset: int, size: int) -> None:
    rig.write(offset, 0x55, size)
    assert rig.read(0x80) == 0


def test_arbpri_reads_0_whatever_is_stored(rig: LapicRig) -> None:
    page = rig.page()
    page[0x90:0x94] = b"\x11\x22\x33\x44"
    rig.lapic.restore(bytes(page))
    assert rig.read(0x90) == 0
    assert rig.page()[0x90:0x94] == b"\x11\x22\x33\x44"


# The page's place.


def test_addresses_outside_the_page_are_not_its(rig: LapicRig) -> None:
    lapic = rig.lapic
    for gpa in (BASE - 1, BASE + 0x1000, 0, 0xFEC00000):
        assert lapic.mmio_read(gpa, 4) is None
        assert not lapic.mmio_write(gpa, 4, 1)
    assert lapic.mmio_read(BASE + 0xFFC, 4) is not None
    assert lapic.mmio_write(BASE + 0xFFC, 4, 1)


def test_the_base_moves(rig: LapicRig) -> None:
    lapic = rig.lapic
    assert lapic.set_base(0xFED00900)
    assert lapic.mmio_read(BASE + 0x30, 4) is None
    assert lapic.mmio_read(0xFED00030, 4) == 0x50014


def test_a_disabled_page_reads_ones_and_keeps_what_it_has(rig: LapicRig) -> None:
    rig.write(0x80, 0x30)
    assert rig.lapic.set_base(BASE | 0x100)
    assert rig.read(0x30) == 0xFFFFFFFF
    assert rig.read(0x31, 1) == 0xFF
    rig.write(0x80, 0x50)
    assert rig.lapic.set_base(BASE | 0x900)
    assert rig.read(0x80) == 0x30


def test_enabling_the_page_gives_the_id_back(rig: LapicRig) -> None:
    rig.write(0x20, 0x55000000)
    assert rig.lapic.set_base(BASE | 0x100)
    assert rig.lapic.set_base(BASE | 0x900)
    assert rig.read(0x20) == 0


@pytest.mark.parametrize("value", [1, 0x80, 0x200, 1 << 36, 1 << 63])
def test_reserved_bits_of_the_base(rig: LapicRig, value: int) -> None:
    assert not rig.lapic.set_base(BASE | 0x900 | value)
    assert not rig.lapic.set_base(BASE | 0x900 | value, host_initiated=True)
    assert rig.lapic.apic_base == BASE | 0x900


def test_the_base_goes_as_far_as_physical_addresses(rig: LapicRig) -> None:
    high = 1 << 39 | 0x900
    assert not rig.lapic.set_base(high)
    rig.lapic.after_set_cpuid(maxphyaddr=40)
    assert rig.lapic.set_base(high)
    assert rig.lapic.mmio_read((1 << 39) + 0x30, 4) == 0x50014


# Software disable, LVTs.


def test_software_disable_masks_every_lvt(rig: LapicRig) -> None:
    rig.enable()
    for offset in LVTS:
        rig.write(offset, 0x45)
    rig.lapic.pending_timer = 1
    rig.write(0xF0, 0xFF)
    assert [rig.read(offset) for offset in LVTS] == [0x10045] * 6
    assert rig.lapic.pending_timer == 0
    for offset in LVTS:
        rig.write(offset, 0x46)
    assert [rig.read(offset) for offset in LVTS] == [0x10046] * 6
    rig.enable()
    assert [rig.read(offset) for offset in LVTS] == [0x10046] * 6


@pytest.mark.parametrize(
    ("features", "kept"),
    [(None, 0x110FF), ((), 0x310FF), (("x2apic",), 0x310FF), (("tsc_deadline",), 0x710FF)],
)
def test_timer_modes_come_with_cpuid(features: tuple[str, ...] | None, kept: int) -> None:
    rig = LapicRig(features=features)
    rig.write(0x320, 0xFFFFFFFF)
    assert rig.read(0x320) == kept


@pytest.mark.parametrize(
    ("lvt0", "accepts"), [(0x700, True), (0x10700, False), (0x45, False), (0x8700, True)]
)
def test_extint_through_lvt0(rig: LapicRig, lvt0: int, accepts: bool) -> None:
    rig.enable()
    rig.write(0x350, lvt0)
    assert rig.lapic.accepts_pic_intr() is accepts
    assert rig.lapic.set_base(BASE | 0x100)
    assert rig.lapic.accepts_pic_intr()


def test_software_disable_stops_the_pic(rig: LapicRig) -> None:
    assert rig.lapic.accepts_pic_intr()
    rig.write(0xF0, 0xFF)
    assert not rig.lapic.accepts_pic_intr()


@pytest.mark.parametrize(
    ("lvt", "mode"),
    [(0x45, 0), (0x145, 1), (0x400, 4), (0x8045, 0), (0x245, None), (0x745, None), (0x10045, None)],
)
def test_local_delivery_follows_the_lvt(rig: LapicRig, lvt: int, mode: int | None) -> None:
    rig.enable()
    rig.write(0x360, lvt)
    rig.records()
    assert rig.lapic.local_deliver(0x360) == (mode is not None)
    offered = rig.records(Event.KVM_APIC_ACCEPT_IRQ)
    assert offered == ([] if lvt & 0x10000 else [(0, lvt & 0x700, lvt >> 15 & 1, lvt & 0xFF)])
    assert rig.vcpu.nmis == (mode == NMI)
    assert rig.lapic.irr == (1 << 0x45 if mode in (0, 1) else 0)
    assert rig.lapic.is_level(0x45) is (lvt & 0x8000 != 0)


def test_nothing_is_delivered_locally_while_disabled(rig: LapicRig) -> None:
    rig.enable()
    rig.write(0x360, 0x400)
    assert rig.lapic.set_base(BASE | 0x100)
    assert rig.lapic.local_deliver(0x360) == 0
    assert rig.vcpu.nmis == 0


def test_a_performance_interrupt_masks_its_lvt(rig: LapicRig) -> None:
    rig.enable()
    rig.write(0x340, 0x400)
    assert rig.lapic.local_deliver(0x340) == 1
    assert rig.read(0x340) == 0x10400
    assert rig.lapic.local_deliver(0x340) == 0


# The NMI watchdog.


def test_watchdogs_are_counted_as_lvt0_is_written() -> None:
    rig = LapicRig(2)
    rig.enable()
    for lvt0, count in ((0x400, 1), (0x400, 1), (0x10400, 0), (0x4FF, 1), (0x700, 0)):
        rig.write(0x350, lvt0)
        assert rig.delivery.vapics_in_nmi_mode == count
    rig.write(0x350, 0x400)
    rig.write(0x350, 0x400, vcpu=1)
    assert rig.delivery.vapics_in_nmi_mode == 2
    rig.lapics[1].reset(init_event=True)
    assert rig.delivery.vapics_in_nmi_mode == 1
    rig.change(lvt0=0x700)
    assert rig.delivery.vapics_in_nmi_mode == 0


def test_a_masked_watchdog_counts_where_the_apic_masked_it() -> None:
    rig = LapicRig()
    rig.write(0x350, 0x400)
    assert rig.read(0x350) == 0x10400
    assert rig.delivery.vapics_in_nmi_mode == 1
    rig.enable()
    rig.write(0x350, 0x400)
    rig.write(0xF0, 0xFF)
    assert rig.delivery.vapics_in_nmi_mode == 1
    rig.delivery.deliver_nmi_watchdog()
    assert rig.vcpu.nmis == 0


def test_the_watchdog_delivers_every_lvt0() -> None:
    rig = LapicRig(4)
    rig.enable()
    for vcpu, lvt0 in enumerate((0x400, 0x45, 0x700, 0x10400)):
        rig.write(0x350, lvt0, vcpu=vcpu)
    rig.delivery.deliver_nmi_watchdog()
    assert [stub.nmis for stub in rig.stubs] == [1, 0, 0, 0]
    assert [lapic.irr for lapic in rig.lapics] == [0, 1 << 0x45, 0, 0]


# Suppressing EOI broadcasts.


@pytest.mark.parametrize(
    ("split", "mode", "offered", "obeyed"),
    [
        (False, SuppressEoiBroadcast.QUIRKED, False, True),
        (False, SuppressEoiBroadcast.DISABLED, False, False),
        (True, SuppressEoiBroadcast.QUIRKED, True, False),
        (True, SuppressEoiBroadcast.ENABLED, True, True),
        (True, SuppressEoiBroadcast.DISABLED, False, False),
    ],
)
def test_directed_eoi(split: bool, mode: SuppressEoiBroadcast, offered: bool, obeyed: bool) -> None:
    rig = LapicRig(0)
    rig.delivery.split = split
    rig.delivery.suppress_eoi_broadcast = mode
    lapic = rig.add(0)
    assert rig.read(0x30) == (0x1050014 if offered else 0x50014)
    rig.write(0xF0, 0xFFFFFFFF)
    assert rig.read(0xF0) == (0x13FF if offered else 0x3FF)
    rig.change(spiv=0x11FF)
    assert lapic.directed_eoi is obeyed
    rig.change(spiv=0x1FF)
    assert not lapic.directed_eoi


def test_directed_eoi_is_not_offered_without_x2apic() -> None:
    rig = LapicRig(0, features=("tsc_deadline",))
    rig.delivery.split = True
    rig.add(0)
    assert rig.read(0x30) == 0x50014


# Resets.


def test_init_keeps_id_base_and_padding() -> None:
    rig = LapicRig()
    page = bytearray(i % 251 for i in range(1024))
    page[0x380:0x384] = bytes(4)
    rig.lapic.restore(bytes(page))
    rig.lapic.set_base(0xFED00900)
    rig.lapic.reset(init_event=True)
    assert rig.lapic.apic_base == 0xFED00900
    after = rig.page()
    fresh = LapicRig().page()
    cleared = [0x80, 0xA0, 0xD0, 0xF0, 0x280, 0x300, 0x310, *LVTS, 0x3E0, 0xE0, 0x30]
    cleared += [first + 16 * i for first in (0x100, 0x180, 0x200) for i in range(8)]
    for offset in range(0, 1024, 4):
        expected = fresh if offset in cleared or offset in (0x380, 0x390) else page
        assert after[offset : offset + 4] == expected[offset : offset + 4], hex(offset)


def test_power_on_gives_base_and_id_back() -> None:
    rig = LapicRig(2)
    rig.write(0x20, 0x55000000, vcpu=1)
    rig.lapics[1].set_base(0xFED00800)
    rig.lapics[1].reset(init_event=False)
    assert rig.lapics[1].apic_base == BASE | 0x800
    assert rig.read(0x20, vcpu=1) == 1 << 24


def test_init_stops_the_timer_and_drops_what_is_pending() -> None:
    rig = LapicRig()
    rig.enable()
    rig.write(0x320, 0x20045)
    rig.write(0x380, 1_000_000)
    rig.run(1_500_000)
    rig.accept(0x50)
    rig.lapic.reset(init_event=True)
    assert rig.lapic.pending_timer == 0
    assert rig.lapic.irr == 0
    assert not rig.lapic.timer.enqueued
    assert rig.read(0x390) == 0


def test_accesses_are_recorded_on_request() -> None:
    rig = LapicRig(detail=True)
    rig.records()
    rig.read(0x31, 1)
    rig.read(0xC0)
    rig.write(0x80, 0x45)
    rig.write(0x80, 0x45, 1)
    rig.write(0x30, 7)
    assert rig.records(Event.KVM_APIC) == [(0, 0x31, 0x50014), (1, 0x80, 0x45), (1, 0x30, 7)]
    quiet = LapicRig()
    quiet.read(0x30)
    assert quiet.records(Event.KVM_APIC) == []
