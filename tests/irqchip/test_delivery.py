"""Who takes a message: the map, the slow path, and where they differ."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lapic_rig import BASE, FIXED, LOWEST, NMI, NOBODY, LapicRig, message, vectors

from kvmtick.irqchip.delivery import LogicalMode

CLUSTER_DFR = 0x0FFFFFFF
SELF, ALL, OTHERS = 1, 2, 3


@pytest.fixture
def rig() -> LapicRig:
    """Three enabled APICs with a logical bit each."""
    return flat(3)


def flat(vcpus: int) -> LapicRig:
    rig = LapicRig(vcpus)
    rig.enable()
    for vcpu in range(vcpus):
        rig.write(0xD0, 1 << (24 + vcpu), vcpu=vcpu)
    return rig


def clusters(*ldrs: int) -> LapicRig:
    rig = LapicRig(len(ldrs))
    rig.enable()
    for vcpu, ldr in enumerate(ldrs):
        rig.write(0xE0, CLUSTER_DFR, vcpu=vcpu)
        rig.write(0xD0, ldr << 24, vcpu=vcpu)
    return rig


def takers(rig: LapicRig, **fields: Any) -> list[int]:
    """Who gets a fixed interrupt (or what `fields` say); the result must be their number."""
    for lapic in rig.lapics:
        lapic.irr = 0
    result = rig.delivery.deliver(message(0x45, **fields))
    taken = [vcpu for vcpu, lapic in enumerate(rig.lapics) if lapic.irr]
    assert max(result, 0) == len(taken)
    return taken


def mode_of(rig: LapicRig) -> LogicalMode | None:
    return rig.delivery.apic_map.logical_mode if rig.delivery.apic_map else None


# Results.


def test_without_a_vcpu_nobody_matches() -> None:
    rig = LapicRig(0)
    assert rig.delivery.deliver(message()) == NOBODY
    assert rig.delivery.deliver(message(dest=0xFF)) == NOBODY


def test_a_new_vcpu_is_mapped_at_the_next_change() -> None:
    rig = LapicRig(2)
    nmi = message(mode=NMI)
    assert rig.delivery.deliver(nmi) == 1
    assert rig.delivery.deliver(nmi._replace(dest_id=1)) == 0
    assert rig.delivery.deliver(nmi._replace(dest_id=0xFF)) == 2
    rig.write(0xD0, 0)
    assert rig.delivery.deliver(nmi._replace(dest_id=1)) == 1


@pytest.mark.parametrize(("dest", "result"), [(0, 1), (1, 1), (2, 1), (3, 0), (0xFE, 0), (0xFF, 3)])
def test_physical(rig: LapicRig, dest: int, result: int) -> None:
    assert rig.delivery.deliver(message(dest=dest)) == result
    assert takers(rig, dest=dest) == ([0, 1, 2] if dest == 0xFF else [dest] * result)


@pytest.mark.parametrize("dest", [0x100, 0x10001, 0xFFFFFFFF])
def test_ids_beyond_the_map(rig: LapicRig, dest: int) -> None:
    assert rig.delivery.deliver(message(dest=dest)) == 0


def test_what_nobody_takes_is_0_and_what_nobody_matches_is_less(rig: LapicRig) -> None:
    rig.write(0xF0, 0xFF)
    assert rig.delivery.deliver(message(dest=0)) == 0
    assert rig.delivery.deliver(message(dest=0, mode=NMI)) == 1
    rig.write(0x20, 1 << 24)
    assert rig.delivery.apic_map is None
    assert rig.delivery.deliver(message(dest=1)) == 1
    assert rig.delivery.deliver(message(dest=0)) == NOBODY


def test_who_accepted_what_is_noted(rig: LapicRig) -> None:
    rig.write(0xF0, 0xFF, vcpu=1)
    dest_map: dict[int, int] = {}
    assert rig.delivery.deliver(message(0x45, dest=0xFF), dest_map=dest_map) == 2
    assert dest_map == {0: 0x45, 2: 0x45}


# Logical destinations.


@pytest.mark.parametrize(
    ("dest", "to"),
    [(1, [0]), (2, [1]), (5, [0, 2]), (8, []), (0, []), (0xF8, []), (0xFF, [0, 1, 2])],
)
def test_flat(rig: LapicRig, dest: int, to: list[int]) -> None:
    assert mode_of(rig) is LogicalMode.XAPIC_FLAT
    assert takers(rig, dest=dest, logical=True) == to


@pytest.mark.parametrize(
    ("dest", "to"),
    [
        (0x11, [0]),
        (0x13, [0, 1]),
        (0x21, [2]),
        (0x22, []),
        (0x31, []),
        (0xF, []),
        (0xFF, [0, 1, 2]),
    ],
)
def test_cluster(dest: int, to: list[int]) -> None:
    rig = clusters(0x11, 0x12, 0x21)
    assert mode_of(rig) is LogicalMode.XAPIC_CLUSTER
    assert takers(rig, dest=dest, logical=True) == to


@pytest.mark.parametrize(
    ("dest", "to"),
    [
        (0x00000001, [0]),
        (0x00000007, [0, 1, 2]),
        (0x00010003, [3, 4]),
        (0x00020001, []),
        (0x00100001, []),
        (0xFFFFFFFF, [0, 1, 2, 3, 4]),
        (0x00FF0001, []),
    ],
)
def test_x2apic_cluster(dest: int, to: list[int]) -> None:
    rig = LapicRig(3)
    rig.add(16)
    rig.add(17)
    rig.enable()
    rig.x2apic()
    assert mode_of(rig) is LogicalMode.X2APIC
    irq = message(0x45, dest=dest, logical=True)
    assert rig.delivery.deliver(irq, rig.lapic) == len(to)
    assert [vcpu for vcpu, lapic in enumerate(rig.lapics) if lapic.irr] == to


def test_software_disabled_apics_are_in_no_logical_map(rig: LapicRig) -> None:
    rig.write(0xF0, 0xFF, vcpu=1)
    assert rig.delivery.deliver(message(mode=NMI, dest=7, logical=True)) == 2
    assert [stub.nmis for stub in rig.stubs] == [1, 0, 1]
    assert rig.delivery.deliver(message(mode=NMI, dest=1)) == 1


def test_all_disabled_by_software() -> None:
    rig = LapicRig(2)
    rig.write(0xD0, 1 << 24)
    assert mode_of(rig) is LogicalMode.SW_DISABLED
    assert rig.delivery.deliver(message(mode=NMI, dest=1, logical=True)) == 0


def test_apics_in_different_modes_are_asked_one_by_one(rig: LapicRig) -> None:
    rig.write(0xE0, CLUSTER_DFR, vcpu=2)
    rig.write(0xD0, 0x12 << 24, vcpu=2)
    assert mode_of(rig) is LogicalMode.MAP_DISABLED
    assert takers(rig, dest=1, logical=True) == [0]
    assert takers(rig, dest=0x12, logical=True) == [1, 2]
    for dest in (0x40, 0):
        assert rig.delivery.deliver(message(dest=dest, logical=True)) == NOBODY
    assert rig.delivery.deliver(message(dest=9)) == 0


@pytest.mark.parametrize("ldr", [0x06, 0x04])
def test_a_logical_id_of_several_bits_or_of_another(ldr: int) -> None:
    rig = flat(3)
    rig.write(0xD0, ldr << 24, vcpu=1)
    assert mode_of(rig) is LogicalMode.MAP_DISABLED
    assert takers(rig, dest=4, logical=True) == [1, 2]


def test_other_dfrs_match_nothing_one_by_one(rig: LapicRig) -> None:
    """In the map they count as clusters, and so does the destination."""
    for vcpu in range(3):
        rig.write(0xE0, 0x5FFFFFFF, vcpu=vcpu)
    assert takers(rig, dest=2, logical=True) == [1]
    rig.write(0xD0, 6 << 24, vcpu=1)
    assert rig.delivery.deliver(message(dest=2, logical=True)) == NOBODY


# Lowest priority.


@pytest.mark.parametrize("how", [{"mode": LOWEST}, {"redirect": True}])
def test_lowest_priority_hashes_the_vector(rig: LapicRig, how: dict[str, int]) -> None:
    for vector in range(0x60, 0x66):
        assert rig.delivery.deliver(message(vector, dest=7, logical=True, **how)) == 1
    assert [vectors(lapic.irr) for lapic in rig.lapics] == [
        [0x60, 0x63],
        [0x61, 0x64],
        [0x62, 0x65],
    ]


def test_a_bit_nobody_has_takes_its_share(rig: LapicRig) -> None:
    results = [
        rig.delivery.deliver(message(vector, LOWEST, 0xF, logical=True))
        for vector in range(0x70, 0x74)
    ]
    assert results == [1, 1, 1, 0]


def test_to_one_apic_there_is_no_lowest(rig: LapicRig) -> None:
    assert takers(rig, mode=LOWEST, dest=1) == [1]


def test_a_physical_lowest_priority_broadcast_is_a_broadcast(rig: LapicRig) -> None:
    assert takers(rig, mode=LOWEST, dest=0xFF) == [0, 1, 2]


def test_with_the_redirection_hint_it_is_for_one(rig: LapicRig) -> None:
    rig.delivery.deliver(message(0x58, dest=0xFF, redirect=True))
    rig.delivery.deliver(message(0x59, LOWEST, 0xFF, redirect=True))
    assert [vectors(lapic.irr) for lapic in rig.lapics] == [[], [0x58], [0x59]]


def test_a_logical_broadcast_of_lowest_priority(rig: LapicRig) -> None:
    rig.write(0xF0, 0xFF, vcpu=1)
    for vector in (0x60, 0x61):
        assert rig.delivery.deliver(message(vector, LOWEST, 0xFF, logical=True)) == 1
    assert [vectors(lapic.irr) for lapic in rig.lapics] == [[0x60], [], [0x61]]


def test_nobody_enabled_nobody_lowest() -> None:
    rig = LapicRig(2)
    assert rig.delivery.deliver(message(0x60, LOWEST, 0xFF, logical=True)) == NOBODY


# Shorthands.


def test_shorthands(rig: LapicRig) -> None:
    source = rig.lapics[1]
    for shorthand, to in ((SELF, [1]), (ALL, [0, 1, 2]), (OTHERS, [0, 2])):
        for lapic in rig.lapics:
            lapic.irr = 0
        irq = message(0x45, dest=0x77, shorthand=shorthand)
        assert rig.delivery.deliver(irq, source) == len(to)
        assert [vcpu for vcpu, lapic in enumerate(rig.lapics) if lapic.irr] == to


def test_alone_there_are_no_others() -> None:
    rig = flat(1)
    assert rig.delivery.deliver(message(shorthand=OTHERS), rig.lapic) == NOBODY


# x2APIC ids and broadcasts.


def mixed() -> LapicRig:
    """vCPU 0 in xAPIC mode, 1 in x2APIC mode."""
    rig = flat(2)
    rig.lapics[1].set_base(BASE | 0xC00)
    assert rig.lapics[1].x2apic_mode
    return rig


@pytest.mark.parametrize(
    ("dest", "source", "quirk_off", "to"),
    [
        (0xFF, None, False, [0, 1]),
        (0xFF, None, True, [0]),
        (0xFF, 0, False, [0]),
        (0xFF, 1, False, []),
        (0xFFFFFFFF, None, False, []),
        (0xFFFFFFFF, None, True, [1]),
        (0xFFFFFFFF, 1, False, [1]),
    ],
)
def test_broadcasts_over_mixed_modes(
    dest: int, source: int | None, quirk_off: bool, to: list[int]
) -> None:
    rig = mixed()
    rig.delivery.x2apic_broadcast_quirk_disabled = quirk_off
    lapic = None if source is None else rig.lapics[source]
    rig.delivery.deliver(message(0x45, dest=dest), lapic)
    assert [vcpu for vcpu, each in enumerate(rig.lapics) if each.irr] == to


def test_without_the_quirk_0xff_is_an_id_among_x2apics() -> None:
    rig = LapicRig(1)
    rig.add(0xFF)
    rig.enable()
    rig.x2apic()
    for quirk_off, to in ((False, [0, 1]), (True, [1])):
        rig.delivery.x2apic_broadcast_quirk_disabled = quirk_off
        assert takers(rig, dest=0xFF) == to


def test_an_xapic_without_a_logical_id_is_named_by_its_id_among_x2apics() -> None:
    """The x2APIC's logical map is the physical one."""
    rig = mixed()
    assert mode_of(rig) is LogicalMode.MAP_DISABLED
    rig.write(0xD0, 0)
    assert mode_of(rig) is LogicalMode.X2APIC
    assert takers(rig, dest=1, logical=True) == [0]
    assert takers(rig, dest=2, logical=True) == [1]


@pytest.mark.parametrize(("x2apic_format", "to"), [(False, [0, 1]), (True, [0])])
def test_ids_that_8_bits_do_not_tell_apart(x2apic_format: bool, to: list[int]) -> None:
    rig = LapicRig(0)
    rig.delivery.x2apic_format = x2apic_format
    rig.add(1)
    rig.add(0x101)
    rig.enable()
    assert takers(rig, dest=1) == to
    assert takers(rig, dest=0x101) == [1]


# When the map is made anew.


@pytest.mark.parametrize(
    ("offset", "value", "scans"),
    [
        *((offset, 0x02000000, 1) for offset in (0x20, 0xD0, 0xE0)),
        (0xF0, 0x1FF, 1),
        (0xF0, 0xFF, 0),
        (0x80, 0x40, 0),
        (0xB0, 0, 0),
        (0x310, 1, 0),
        (0x350, 0x700, 0),
    ],
)
def test_changes_have_the_ioapic_scanned(offset: int, value: int, scans: int) -> None:
    rig = LapicRig(2)
    before = [stub.scans for stub in rig.stubs]
    rig.write(offset, value)
    assert [stub.scans for stub in rig.stubs] == [count + scans for count in before]


def test_base_changes_and_restores_too() -> None:
    rig = LapicRig(2)
    rig.write(0xF0, 0xFF)
    for change in (
        lambda: rig.lapic.set_base(BASE | 0x100),
        lambda: rig.lapic.set_base(BASE | 0x900),
        lambda: rig.lapic.set_base(BASE | 0xD00),
        lambda: rig.change(),
        lambda: rig.lapic.reset(init_event=False),
    ):
        before = rig.stubs[1].scans
        change()
        assert rig.stubs[1].scans == before + 1
    before = rig.stubs[1].scans
    assert rig.lapic.set_base(0xFED00900)
    assert rig.stubs[1].scans == before


def test_an_apic_without_base_is_out_of_the_map(rig: LapicRig) -> None:
    rig.lapics[1].set_base(BASE)
    assert takers(rig, dest=1) == []
    assert takers(rig, dest=7, logical=True) == [0, 2]
    assert takers(rig, dest=0xFF) == [0, 2]


# Properties.


CONFIGS = st.lists(
    st.tuples(
        st.sampled_from([0, 1, 2, 3, 0x55]),
        st.sampled_from([0, 1, 2, 3, 4, 0x11, 0x12, 0x21, 0x80]),
        st.sampled_from([0xFFFFFFFF, 0x0FFFFFFF]),
        st.booleans(),
        st.sampled_from([0x900, 0x900, 0x900, 0x100]),
    ),
    min_size=1,
    max_size=5,
)
"""Of each APIC: id, logical id, DFR, enabled by software, base."""


@given(CONFIGS, st.integers(0, 0x101), st.booleans(), st.booleans())
def test_the_map_gives_what_asking_everybody_gives(
    configs: list[tuple[int, int, int, bool, int]], dest: int, logical: bool, lowest: bool
) -> None:
    """Of xAPICs. But a logical bit that names nobody takes its share of lowest-priority messages,
    and a physical destination in the map is for one only.
    """
    rig = LapicRig(len(configs))
    for vcpu, (xapic_id, ldr, dfr, enabled, base) in enumerate(configs):
        rig.write(0x20, xapic_id << 24, vcpu=vcpu)
        rig.write(0xE0, dfr, vcpu=vcpu)
        rig.write(0xD0, ldr << 24, vcpu=vcpu)
        rig.write(0xF0, 0x1FF if enabled else 0xFF, vcpu=vcpu)
        rig.lapics[vcpu].set_base(BASE | base)
    matching = [
        each
        for each in rig.lapics
        if each.hw_enabled and each.sw_enabled and each.matches(None, 0, dest, logical)
    ]
    result = rig.delivery.deliver(message(0x61, LOWEST if lowest else FIXED, dest, logical=logical))
    taken = [each for each in rig.lapics if each.irr]
    assert max(result, 0) == len(taken)
    assert (result == NOBODY) <= (mode_of(rig) in (None, LogicalMode.MAP_DISABLED) or dest == 0xFF)
    if not lowest or (dest == 0xFF and not logical):
        assert taken == matching
    else:
        assert len(taken) <= 1
        assert set(taken) <= set(matching)
        if not logical:
            assert bool(taken) == bool(matching)
