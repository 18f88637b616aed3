"""ACPI's fixed registers, as the ACPI specification 6.5, 4.8.3, has them."""

import pytest
from pc_host import FakePc

from kvmtick.machine.pc.acpi_pm import AcpiPm

STATUS, ENABLE, CONTROL, TIMER = 0x600, 0x602, 0x604, 0x608
HZ = 3_579_545
S = 1_000_000_000
TMR, GBL, PWRBTN, SLPBTN, RTC = (1 << bit for bit in (0, 5, 8, 9, 10))
SCI_EN, SLP_EN = 1, 1 << 13
SCI = 9
CARRY = 1 << 23


def at_count(count: int) -> int:
    """The first nanosecond at which the timer reads `count`."""
    return -(-count * S // HZ)


@pytest.fixture
def pc() -> FakePc:
    made = FakePc()
    made.ports = AcpiPm(made.host).ports()
    return made


# --- the timer ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("now_ns", "count"),
    [
        (0, 0),
        (279, 0),
        (280, 1),
        (1_000_000, 3_579),
        (S, HZ),
        (4 * S, 4 * HZ),
        (5 * S, 5 * HZ - (1 << 24)),
        (3600 * S, 3600 * HZ % (1 << 24)),
    ],
)
def test_timer(pc: FakePc, now_ns: int, count: int) -> None:
    pc.advance_to(now_ns)
    assert pc.read(TIMER, 4) == count


def test_timer_wraps_after_24_bits(pc: FakePc) -> None:
    pc.advance_to(at_count(1 << 24) - 1)
    assert pc.read(TIMER, 4) == 0xFF_FFFF
    pc.advance_to(at_count(1 << 24))
    assert pc.read(TIMER, 4) == 0


def test_timer_by_bytes_and_words_and_not_written(pc: FakePc) -> None:
    pc.advance_to(at_count(0x123456))
    pc.write(TIMER, 0xFFFF_FFFF, 4)
    assert pc.read(TIMER, 4) == 0x123456
    assert [pc.read(TIMER + n) for n in range(4)] == [0x56, 0x34, 0x12, 0]
    assert (pc.read(TIMER, 2), pc.read(TIMER + 2, 2)) == (0x3456, 0x12)
    assert pc.read(TIMER + 1, 2) == 0x1234


# --- the carry ------------------------------------------------------------------------------------


def test_carry_is_told_without_an_interrupt(pc: FakePc) -> None:
    pc.advance_to(at_count(CARRY) - 1)
    assert pc.read(STATUS, 2) == 0
    pc.advance_to(at_count(CARRY))
    assert pc.read(STATUS, 2) == TMR
    pc.write(STATUS, 0, 2)  # zeros clear nothing
    assert pc.read(STATUS, 2) == TMR
    pc.write(STATUS, TMR, 2)
    assert pc.read(STATUS, 2) == 0
    assert pc.lines == []
    assert len(pc.queue) == 0


def test_carry_interrupts_at_both_edges_of_bit_23(pc: FakePc) -> None:
    pc.write(ENABLE, TMR, 2)
    for carry in range(1, 50):
        due_ns = at_count(carry * CARRY)
        pc.advance_to(due_ns - 1)
        assert len(pc.lines) == 2 * (carry - 1)
        pc.advance_to(due_ns)
        assert pc.lines[-1] == (due_ns, SCI, 1)
        pc.advance_to(due_ns + S)
        assert pc.lines[-1][0] == due_ns  # a level: high until it is answered
        pc.write(STATUS, TMR, 2)
        assert pc.lines[-1] == (due_ns + S, SCI, 0)


def test_enabling_what_is_told_already_interrupts_at_once(pc: FakePc) -> None:
    pc.advance_to(3 * S)
    pc.write(ENABLE, TMR, 2)
    assert pc.lines == [(3 * S, SCI, 1)]
    pc.write(ENABLE, 0, 2)
    assert pc.levels() == [1, 0]
    assert pc.read(STATUS, 2) == TMR
    pc.advance_to(10 * S)
    assert pc.levels() == [1, 0]


def test_a_read_at_the_moment_of_the_carry_takes_no_interrupt_away(pc: FakePc) -> None:
    pc.write(ENABLE, TMR, 2)
    pc.clock.now_ns = at_count(CARRY)
    assert pc.read(STATUS, 2) == TMR  # before the queue has run
    pc.advance_to(pc.clock.now_ns)
    assert pc.levels() == [1]


# --- the other events -----------------------------------------------------------------------------


@pytest.mark.parametrize("event", [TMR, GBL, RTC])
def test_an_enabled_event_reads_back(pc: FakePc, event: int) -> None:
    """An operating system that enables one complains if it does not."""
    pc.write(ENABLE, event, 2)
    assert pc.read(ENABLE, 2) == event
    pc.write(ENABLE, 0, 2)
    assert pc.read(ENABLE, 2) == 0


def test_events_that_are_not_here_cannot_be_enabled(pc: FakePc) -> None:
    """The FADT says that there are no fixed buttons."""
    pc.write(ENABLE, PWRBTN | SLPBTN | 0xF800, 2)
    assert pc.read(ENABLE, 2) == 0


def test_only_the_timer_s_event_raises_sci(pc: FakePc) -> None:
    pc.write(ENABLE, GBL | RTC, 2)
    assert len(pc.queue) == 0
    pc.advance_to(3 * S)
    assert pc.read(STATUS, 2) == TMR
    pc.write(ENABLE, GBL | RTC, 2)
    assert pc.lines == []
    pc.write(ENABLE, TMR | GBL | RTC, 2)
    assert pc.lines == [(3 * S, SCI, 1)]


# --- accesses, control ----------------------------------------------------------------------------


def test_registers_by_any_width(pc: FakePc) -> None:
    pc.advance_to(3 * S)
    pc.write(STATUS, TMR << 16, 4)  # the enable register, and a 0 for the status
    assert pc.read(STATUS, 4) == TMR << 16 | TMR
    assert [pc.read(STATUS + n) for n in range(6)] == [TMR, 0, TMR, 0, SCI_EN, 0]
    pc.write(STATUS + 1, 0xFF)  # nothing of ours is in the high byte
    assert pc.read(STATUS) == TMR
    pc.write(STATUS, 0xFF)
    assert pc.read(STATUS, 4) == TMR << 16
    pc.write(ENABLE + 1, 0xFF)
    pc.write(ENABLE, 0xFE)
    assert pc.read(ENABLE, 2) == GBL | RTC
    assert [pc.read(ENABLE + n) for n in range(2)] == [GBL, RTC >> 8]


def test_acpi_mode_cannot_be_left(pc: FakePc) -> None:
    pc.write(CONTROL, 0, 2)
    assert pc.read(CONTROL, 2) == SCI_EN


def test_s5_switches_off(pc: FakePc) -> None:
    pc.write(CONTROL, 5 << 10, 2)
    assert pc.power_offs == 0
    assert pc.read(CONTROL, 2) == 5 << 10 | SCI_EN
    pc.write(CONTROL, 5 << 10 | SLP_EN, 2)
    assert pc.power_offs == 1
    assert pc.read(CONTROL, 2) == 5 << 10 | SCI_EN  # SLP_EN is write only


@pytest.mark.parametrize("sleep_type", [0, 1, 2, 3, 4, 6, 7])
def test_other_sleeping_states_do_nothing(pc: FakePc, sleep_type: int) -> None:
    pc.write(CONTROL, sleep_type << 10 | SLP_EN, 2)
    assert pc.power_offs == 0


def test_s5_by_a_byte_and_by_a_dword(pc: FakePc) -> None:
    pc.write(CONTROL + 1, (5 << 10 | SLP_EN) >> 8)
    assert pc.power_offs == 1
    pc.write(CONTROL, 5 << 10 | SLP_EN, 4)
    assert pc.power_offs == 2
