"""What an i8254 counter reads and what its OUT pin is, for every mode and time."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from pc import CONTROL, HZ, Pc, clocks, interval_ns

from kvmtick.irqchip.i8254 import KVM_PIT_FREQ_HZ, mul_u64_u32_div, nominal_period_ns

COUNTS = st.integers(1, 0x10000)
ELAPSED_NS = st.integers(0, 10**10)


def loaded(channel: int, mode: int, count: int) -> Pc:
    pc = Pc()
    pc.load(channel, mode, count)
    return pc


def stepped(mode: int, count: int, steps: int) -> int:
    """The counting element, stepped one input clock at a time."""
    value = count
    for _ in range(steps):
        if mode in (0, 1, 4, 5):
            value = (value - 1) & 0xFFFF
        elif mode == 2:
            value = value - 1 or count
        else:
            value = value - 2 if value > 2 else value - 2 + count
    return value & 0xFFFF


def out_pin(mode: int, count: int, passed: int) -> bool:
    """OUT after `passed` input clocks, as the mode's timing diagram draws it."""
    if mode == 0:  # low until terminal count
        return passed >= count
    if mode == 1:  # the pulse; KVM draws it upside down
        return passed < count
    if mode == 2:  # KVM shows the clock at which it reloads
        return passed > 0 and passed % count == 0
    if mode == 3:  # high for the first half, the longer one if the count is odd
        return passed % count < (count + 1) // 2
    return passed == count  # a strobe of one clock


def test_the_frequency_is_kvms() -> None:
    assert KVM_PIT_FREQ_HZ == HZ == 1193181


@pytest.mark.parametrize("channel", [1, 2])
@pytest.mark.parametrize("mode", range(6))
def test_known_counts(channel: int, mode: int) -> None:
    pc = loaded(channel, mode, 1000)
    seen = []
    for passed in (0, 1, 499, 500, 999, 1000, 1001, 2500):
        pc.run_to(clocks(passed))
        seen.append(pc.count(channel))
    if mode == 2:
        assert seen == [1000, 999, 501, 500, 1, 1000, 999, 500]
    elif mode == 3:
        assert seen == [1000, 998, 2, 1000, 2, 1000, 998, 1000]
    else:
        assert seen == [1000, 999, 501, 500, 1, 0, 0xFFFF, 0x10000 - 1500]


@pytest.mark.parametrize("channel", [1, 2])
@pytest.mark.parametrize(
    ("mode", "outs"),
    [
        (0, [0, 0, 0, 0, 0, 1, 1, 1]),
        (1, [1, 1, 1, 1, 1, 0, 0, 0]),
        (2, [0, 0, 0, 0, 0, 1, 0, 0]),
        (3, [1, 1, 1, 0, 0, 1, 1, 0]),
        (4, [0, 0, 0, 0, 0, 1, 0, 0]),
        (5, [0, 0, 0, 0, 0, 1, 0, 0]),
    ],
)
def test_known_outputs(channel: int, mode: int, outs: list[int]) -> None:
    pc = loaded(channel, mode, 1000)
    seen = []
    for passed in (0, 1, 499, 500, 999, 1000, 1001, 2500):
        pc.run_to(clocks(passed))
        seen.append(pc.status(channel) >> 7)
    assert seen == outs


def test_an_odd_square_wave_is_high_one_clock_longer() -> None:
    pc = loaded(2, 3, 5)
    seen = []
    for passed in range(10):
        pc.run_to(clocks(passed))
        seen.append((pc.count(2), pc.pit.out_of(2)))
    assert seen == [(5, 1), (3, 1), (1, 1), (4, 0), (2, 0)] * 2


@given(st.sampled_from([1, 2]), st.integers(0, 5), COUNTS, st.integers(0, 300))
def test_time_may_pass_in_steps_of_one_clock_or_at_once(
    channel: int, mode: int, count: int, steps: int
) -> None:
    assume(mode != 3 or count > 1)
    pc = loaded(channel, mode, count)
    pc.run_to(clocks(steps))
    assert pc.count(channel) == stepped(mode, count, steps)
    assert pc.pit.out_of(channel) == out_pin(mode, count, steps)


@given(st.sampled_from([1, 2]), st.integers(0, 5), COUNTS, ELAPSED_NS)
def test_counts_and_outputs_at_any_time(
    channel: int, mode: int, count: int, elapsed_ns: int
) -> None:
    pc = loaded(channel, mode, count)
    pc.run_to(elapsed_ns)
    passed = elapsed_ns * HZ // 1_000_000_000
    value = pc.pit.count_of(channel)
    if mode in (2, 3):
        assert 1 <= value <= count
        assert (count - value - passed * (mode - 1)) % count == 0
    else:
        assert 0 <= value <= 0xFFFF
        assert (count - value - passed) % 0x10000 == 0
    assert pc.count(channel) == value & 0xFFFF
    assert pc.pit.out_of(channel) == out_pin(mode, count, passed)


@given(st.integers(0, 5), COUNTS, ELAPSED_NS, ELAPSED_NS)
def test_a_counter_depends_on_the_time_since_its_load_only(
    mode: int, count: int, start_ns: int, elapsed_ns: int
) -> None:
    late = Pc(start_ns=start_ns)
    late.load(1, mode, count)
    late.run(elapsed_ns)
    early = loaded(1, mode, count)
    early.run(elapsed_ns)
    assert late.count(1) == early.count(1)
    assert late.status(1) == early.status(1)


# Counter 0 is read off its timer.


@pytest.mark.parametrize("mode", [0, 1, 4])
@given(count=COUNTS, elapsed_ns=st.integers(0, 10**8))
def test_counter_0_counts_like_the_others_in_one_shot_modes(
    mode: int, count: int, elapsed_ns: int
) -> None:
    pc = loaded(0, mode, count)
    pc.run_to(elapsed_ns)
    passed = elapsed_ns * HZ // 1_000_000_000
    assert pc.count(0) == (count - passed) & 0xFFFF
    assert pc.pit.out_of(0) == out_pin(mode, count, passed)


@pytest.mark.parametrize("mode", [2, 3])
@given(count=COUNTS, periods=st.integers(0, 20), within_ns=st.integers(0, 10**8))
def test_counter_0_starts_over_at_each_expiry_in_periodic_modes(
    mode: int, count: int, periods: int, within_ns: int
) -> None:
    pc = loaded(0, mode, count)
    within_ns %= pc.pit.period_ns
    pc.run_to(interval_ns(count) + periods * pc.pit.period_ns + within_ns)
    passed = within_ns * HZ // 1_000_000_000
    assert pc.pit.count_of(0) == count - passed * (mode - 1) % count
    assert 1 <= pc.pit.count_of(0) <= count
    assert pc.pit.out_of(0) == out_pin(mode, count, passed)


@given(
    st.sampled_from([0, 1, 2, 3, 4]),
    st.integers(100, 0x10000),
    st.lists(st.integers(0, 300_000), max_size=30),
)
def test_the_machine_may_stop_wherever_it_likes(mode: int, count: int, steps: list[int]) -> None:
    in_steps, at_once = loaded(0, mode, count), loaded(0, mode, count)
    for elapsed_ns in steps:
        in_steps.run(elapsed_ns)
    at_once.clock.now_ns = sum(steps)
    at_once.board.queue.run_due(at_once.clock)
    for pc in (in_steps, at_once):
        pc.settle()
    assert in_steps.count(0) == at_once.count(0)
    assert in_steps.status(0) == at_once.status(0)
    assert in_steps.pit.pending == at_once.pit.pending
    assert in_steps.pit.timer.expires_ns == at_once.pit.timer.expires_ns
    assert len(in_steps.expiries()) == len(at_once.expiries())


def test_counter_0_in_mode_5_stands_still_if_it_never_had_a_timer() -> None:
    pc = loaded(0, 5, 1000)
    for _ in range(3):
        pc.run(clocks(100))
        assert pc.count(0) == 1000


def test_counter_0_in_mode_5_goes_on_from_an_earlier_timer() -> None:
    pc = loaded(0, 2, 0x8000)
    pc.run(clocks(0x100))
    pc.load(0, 5, 0x8000)
    assert not pc.pit.timer.enqueued
    assert pc.count(0) == 0x7F00
    pc.run_to(clocks(0x200))
    assert pc.count(0) == 0x7E00


def test_a_late_timer_lets_counter_0_run_past_its_end_and_wrap() -> None:
    pc = loaded(0, 2, 1000)
    pc.clock.now_ns = clocks(1250)  # expired, the callback has not run
    assert pc.count(0) == 750
    pc = loaded(0, 0, 1000)
    pc.clock.now_ns = clocks(1250)
    assert pc.count(0) == 0x10000 - 250


def test_the_clamp_does_not_take_the_count_out_of_range() -> None:
    pc = loaded(0, 2, 10)
    for _ in range(100):
        pc.run(7919)
        assert 1 <= pc.count(0) <= 10


def test_a_control_word_changes_the_formula_at_once_but_not_the_timer() -> None:
    pc = loaded(0, 2, 1000)
    pc.run(clocks(100))
    pc.out(CONTROL, 0x36)
    assert pc.count(0) == 800
    pc.out(CONTROL, 0x30)
    assert pc.count(0) == 900
    pc.run_to(interval_ns(1000))
    pc.run(2_000_000)
    assert len(pc.expiries()) == 3


# The kernel's division.


@given(st.integers(-(2**63), 2**64 - 1), st.integers(0, 2**32 - 1), st.integers(1, 2**32 - 1))
def test_mul_u64_u32_div_is_unsigned_and_rounds_down(
    value: int, multiplier: int, divisor: int
) -> None:
    unsigned = value % 2**64
    result = mul_u64_u32_div(value, multiplier, divisor)
    assert 0 <= result < 2**64
    assert (unsigned * multiplier // divisor - result) % 2**64 == 0


def test_nominal_periods() -> None:
    assert [nominal_period_ns(count) for count in (1, 238, 239, 1193, 0x10000)] == [
        200_000,
        200_000,
        200_304,
        999_848,
        54_925_447,
    ]
