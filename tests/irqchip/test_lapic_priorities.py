"""IRR, ISR, TMR, TPR, PPR and EOI."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lapic_rig import BASE, LOWEST, NOBODY, LapicRig, vectors

from kvmtick.trace.events import Event


@pytest.fixture
def rig() -> LapicRig:
    rig = LapicRig()
    rig.enable()
    rig.records()
    rig.vcpu.events = 0
    return rig


def test_a_request_waits_is_taken_and_ends(rig: LapicRig) -> None:
    lapic = rig.lapic
    assert lapic.has_interrupt() == NOBODY
    rig.accept(0x45)
    assert rig.vcpu.events == 1
    assert rig.read(0x220) == 1 << 5
    assert lapic.has_interrupt() == 0x45
    assert lapic.get_interrupt() == 0x45
    assert (vectors(lapic.irr), vectors(lapic.isr)) == ([], [0x45])
    assert rig.read(0x120) == 1 << 5
    assert rig.read(0xA0) == 0x40
    assert lapic.get_interrupt() == NOBODY
    rig.write(0xB0, 0)
    assert lapic.isr == 0
    assert rig.read(0xA0) == 0


def test_a_second_request_of_a_vector_is_one(rig: LapicRig) -> None:
    rig.accept(0x45, 0x45)
    assert rig.lapic.get_interrupt() == 0x45
    assert rig.lapic.get_interrupt() == NOBODY
    rig.accept(0x45)
    assert rig.lapic.has_interrupt() == NOBODY
    rig.write(0xB0, 0)
    assert rig.lapic.get_interrupt() == 0x45


def test_the_highest_vector_first_and_only_higher_classes_nest(rig: LapicRig) -> None:
    lapic = rig.lapic
    rig.accept(0x51, 0x55, 0x60)
    assert [lapic.get_interrupt(), lapic.get_interrupt()] == [0x60, NOBODY]
    rig.accept(0x6F, 0x71)
    assert [lapic.get_interrupt(), lapic.get_interrupt()] == [0x71, NOBODY]
    done = []
    while lapic.isr:
        rig.write(0xB0, 0)
        done.append(lapic.get_interrupt())
    assert done == [NOBODY, 0x6F, 0x55, 0x51, NOBODY]


def test_eoi_is_recorded_with_its_vector(rig: LapicRig) -> None:
    rig.accept(0x45)
    rig.lapic.get_interrupt()
    rig.write(0xB0, 0xFFFFFFFF)
    rig.write(0xB0, 0)
    assert rig.records(Event.KVM_EOI) == [(0, 0x45), (0, -1)]


def test_a_spurious_eoi_asks_for_nothing(rig: LapicRig) -> None:
    rig.accept(0x45)
    rig.vcpu.events = 0
    rig.write(0xB0, 0)
    assert rig.vcpu.events == 0
    assert rig.lapic.irr == 1 << 0x45


def test_eoi_lets_the_next_one_in(rig: LapicRig) -> None:
    rig.accept(0x45, 0x46)
    rig.lapic.get_interrupt()
    rig.vcpu.events = 0
    rig.write(0xB0, 0)
    assert rig.vcpu.events
    assert rig.lapic.has_interrupt() == 0x45


@pytest.mark.parametrize(("waiting", "looks"), [(None, 0), (0x31, 1), (0x46, 1)])
def test_an_eoi_has_the_vcpu_look_if_it_lets_a_request_through(
    rig: LapicRig, waiting: int | None, looks: int
) -> None:
    rig.accept(0x45)
    rig.lapic.get_interrupt()
    if waiting is not None:
        rig.accept(waiting)
    rig.vcpu.events = 0
    rig.write(0xB0, 0)
    assert rig.vcpu.events == looks


def test_tpr_holds_back_its_class_and_lower(rig: LapicRig) -> None:
    rig.write(0x80, 0x4F)
    rig.accept(0x4F)
    assert rig.lapic.has_interrupt() == NOBODY
    rig.accept(0x50)
    assert rig.lapic.has_interrupt() == 0x50
    rig.lapic.get_interrupt()
    assert rig.read(0xA0) == 0x50
    rig.vcpu.events = 0
    rig.write(0x80, 0)
    assert rig.vcpu.events == 0
    rig.write(0xB0, 0)
    assert rig.vcpu.events
    assert rig.lapic.has_interrupt() == 0x4F


def test_lowering_tpr_asks_for_a_look(rig: LapicRig) -> None:
    rig.write(0x80, 0x50)
    rig.accept(0x45)
    rig.vcpu.events = 0
    rig.write(0x80, 0x40)
    assert rig.vcpu.events == 0
    rig.write(0x80, 0x30)
    assert rig.vcpu.events == 1
    rig.write(0x80, 0x20)
    assert rig.lapic.has_interrupt() == 0x45


def test_cr8_is_the_class_of_tpr(rig: LapicRig) -> None:
    rig.write(0x80, 0x5A)
    assert rig.lapic.get_cr8() == 5
    rig.lapic.set_tpr(9)
    assert rig.read(0x80) == 0x90
    assert rig.read(0xA0) == 0x90
    rig.lapic.set_tpr(0x1F)
    assert rig.read(0x80) == 0xF0


def test_vectors_below_16_are_accepted_and_never_taken(rig: LapicRig) -> None:
    rig.accept(0x0F)
    assert rig.lapic.irr == 1 << 0x0F
    assert rig.lapic.has_interrupt() == NOBODY
    assert rig.read(0x280) == 0


def test_requests_survive_a_software_disable(rig: LapicRig) -> None:
    rig.accept(0x45)
    rig.write(0xF0, 0xFF)
    assert rig.lapic.accept_irq(0, 0x46, True, False) == 0
    assert rig.lapic.has_interrupt() == 0x45


def test_a_disabled_apic_gives_and_takes_nothing(rig: LapicRig) -> None:
    rig.accept(0x45)
    assert rig.lapic.set_base(BASE | 0x100)
    assert rig.lapic.has_interrupt() == NOBODY
    assert rig.lapic.get_interrupt() == NOBODY
    assert rig.lapic.accept_irq(LOWEST, 0x46, True, False) == 0
    assert rig.lapic.irr == 1 << 0x45


def test_tmr_follows_the_last_message(rig: LapicRig) -> None:
    lapic = rig.lapic
    rig.accept(0x45, level=True)
    assert lapic.is_level(0x45)
    assert rig.read(0x1A0) == 1 << 5
    rig.accept(0x45)
    assert not lapic.is_level(0x45)
    assert lapic.accept_irq(0, 0x46, False, True) == 0
    assert not lapic.pending_eoi(0x46)


def test_pending_eoi(rig: LapicRig) -> None:
    lapic = rig.lapic
    assert not lapic.pending_eoi(0x45)
    rig.accept(0x45)
    assert lapic.pending_eoi(0x45)
    lapic.get_interrupt()
    assert lapic.pending_eoi(0x45)
    lapic.eoi()
    assert not lapic.pending_eoi(0x45)


# EOI and the IOAPIC.


def test_the_ioapic_hears_of_its_vectors_only(rig: LapicRig) -> None:
    rig.lapic.handled_vectors = 1 << 0x45 | 1 << 0x46
    rig.accept(0x45, level=True)
    rig.accept(0x46, 0x50)
    for _ in range(2):
        rig.lapic.get_interrupt()
        rig.write(0xB0, 0)
    assert rig.ioapic.eois == [(0, 0x46, False)]
    rig.lapic.get_interrupt()
    rig.write(0xB0, 0)
    assert rig.ioapic.eois == [(0, 0x46, False), (0, 0x45, True)]
    assert rig.vcpu.eoi_exits == []


def test_an_eoi_without_ioapic_is_an_eoi(rig: LapicRig) -> None:
    rig.delivery.eoi_target = None
    rig.lapic.handled_vectors = 1 << 0x45
    rig.accept(0x45)
    rig.lapic.get_interrupt()
    rig.write(0xB0, 0)
    assert rig.lapic.isr == 0


def test_a_split_irqchip_tells_user_space() -> None:
    rig = LapicRig(0)
    rig.delivery.split = True
    lapic = rig.add(0)
    rig.enable()
    lapic.handled_vectors = 1 << 0x45
    for spiv in (0x1FF, 0x11FF):
        rig.write(0xF0, spiv)
        rig.accept(0x45, level=True)
        lapic.get_interrupt()
        rig.write(0xB0, 0)
    assert rig.stubs[0].eoi_exits == [0x45, 0x45]
    assert rig.ioapic.eois == []


# Properties.

Step = tuple[str, int]

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("accept"), st.integers(16, 255)),
        st.tuples(st.just("take"), st.just(0)),
        st.tuples(st.just("eoi"), st.just(0)),
        st.tuples(st.just("tpr"), st.integers(0, 255)),
        st.tuples(st.just("cr8"), st.integers(0, 15)),
    ),
    max_size=60,
)


@given(STEPS)
def test_priorities(steps: list[Step]) -> None:
    """Against a model of lists: what is taken, PPR always, one ISR bit a class at most."""
    rig = LapicRig()
    rig.enable()
    lapic = rig.lapic
    waiting: set[int] = set()
    serving: list[int] = []
    tpr = 0
    for what, value in steps:
        if what == "accept":
            rig.accept(value)
            waiting.add(value)
        elif what == "take":
            highest = max(waiting, default=-1)
            floor = max(tpr >> 4, max(serving, default=0) >> 4)
            expected = highest if highest >> 4 > floor else NOBODY
            assert lapic.has_interrupt() == expected
            assert lapic.get_interrupt() == expected
            if expected >= 0:
                waiting.remove(expected)
                serving.append(expected)
        elif what == "eoi":
            lapic.eoi()
            if serving:
                serving.remove(max(serving))
        elif what == "tpr":
            rig.write(0x80, value)
            tpr = value
        else:
            lapic.set_tpr(value)
            tpr = value << 4
        in_service = max(serving, default=0) & 0xF0
        assert lapic.procpri == (tpr if tpr & 0xF0 >= in_service else in_service)
        assert rig.read(0xA0) == lapic.procpri
        assert vectors(lapic.irr) == sorted(waiting)
        assert vectors(lapic.isr) == sorted(serving)
        classes = [vector >> 4 for vector in serving]
        assert classes == sorted(set(classes))


@given(st.lists(st.integers(16, 255), min_size=1), st.integers(0, 255))
def test_whoever_can_come_in_was_asked_for(arrivals: list[int], tpr: int) -> None:
    """The vCPU looks only when asked: when TPR falls below a request it is, and else not."""
    rig = LapicRig()
    rig.enable()
    rig.write(0x80, 0xFF)
    rig.accept(*arrivals)
    rig.vcpu.events = 0
    rig.write(0x80, tpr)
    assert (rig.vcpu.events > 0) == (max(arrivals) >> 4 > tpr >> 4)
    assert (rig.lapic.has_interrupt() != NOBODY) == (max(arrivals) >> 4 > tpr >> 4)
