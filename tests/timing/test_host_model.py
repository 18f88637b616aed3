"""The host model: how delays are written, and that they are drawn the same way everywhere."""

import os
import subprocess
import sys
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmtick.timing.host import (
    FAULTS,
    HostModel,
    format_ns,
    parse_delay,
    parse_duration_ns,
)
from kvmtick.timing.queue import NEVER_NS


@pytest.mark.parametrize(
    ("text", "value_ns"),
    [
        ("0ns", 0),
        ("7ns", 7),
        ("40us", 40_000),
        ("40µs", 40_000),
        ("250ms", 250_000_000),
        ("1.5s", 1_500_000_000),
        ("2m", 120_000_000_000),
        ("1e3us", 1_000_000),
        (".5us", 500),
    ],
)
def test_durations(text: str, value_ns: int) -> None:
    assert parse_duration_ns(text) == value_ns


@given(st.integers(0, 10**12))
def test_whole_nanoseconds_are_kept(value_ns: int) -> None:
    assert parse_duration_ns(f"{value_ns}ns") == value_ns


BAD_DURATIONS = [
    ("", "is not a duration"),
    ("us", "is not a duration"),
    ("10", "has no unit"),
    ("1e5", "has no unit"),
    ("10h", "is not a duration"),
    ("10 parsecs", "is not a duration"),
    ("ten us", "is not a duration"),
    ("1.2.3s", "is not a duration"),
    ("5US", "is not a duration"),
    ("-1us", "is negative"),
    ("nan", "is not a duration"),
    ("nans", "is not a duration"),
    ("-infs", "is not a duration"),
    ("1e999s", "is not a duration"),
    ("1e300ns", "is longer than"),
    ("two\nlines", "is not a duration"),
]


@pytest.mark.parametrize(("text", "why"), BAD_DURATIONS)
def test_a_bad_duration_gets_one_line_with_the_text_and_the_remedy(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why) as raised:
        parse_duration_ns(text)
    message = str(raised.value)
    assert "\n" not in message
    assert repr(text) in message
    assert "40us, 250ms" in message


def test_no_duration_reaches_the_time_that_never_comes() -> None:
    assert parse_duration_ns("4000000000s") < NEVER_NS
    with pytest.raises(ValueError, match="is longer than"):
        parse_duration_ns("5000000000s")


@pytest.mark.parametrize(
    ("text", "kind", "low_ns", "high_ns", "chance"),
    [
        ("200us", "const", 200_000, 200_000, 1.0),
        ("exp:200us", "exp", 200_000, 200_000, 1.0),
        ("uniform:10us..2ms", "uniform", 10_000, 2_000_000, 1.0),
        ("uniform:10us..10us", "uniform", 10_000, 10_000, 1.0),
        ("1%:5ms", "chance", 5_000_000, 5_000_000, 0.01),
        ("0.5%:5ms", "chance", 5_000_000, 5_000_000, 0.005),
        ("100%:1ns", "chance", 1, 1, 1.0),
    ],
)
def test_delays(text: str, kind: str, low_ns: int, high_ns: int, chance: float) -> None:
    delay = parse_delay(text)
    assert (delay.text, delay.kind) == (text, kind)
    assert (delay.low_ns, delay.high_ns) == (low_ns, high_ns)
    assert delay.chance == pytest.approx(chance)


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":",
        "10",
        "-5us",
        "gauss:5us",
        "exp:",
        "exp:-5us",
        "uniform:10us",
        "uniform:10us..",
        "uniform:..2ms",
        "uniform:2ms..10us",
        "%:5ms",
        "101%:5ms",
        "-1%:5ms",
        "nan%:5ms",
        "1%:",
        "1%:5",
        "two\nlines:5us",
    ],
)
def test_a_bad_delay_gets_one_line(text: str) -> None:
    with pytest.raises(ValueError, match=r"give a (number and a unit|duration)") as raised:
        parse_delay(text)
    assert "\n" not in str(raised.value)


@given(st.sampled_from(["40us", "exp:40us", "uniform:10us..2ms", "30%:5ms"]), st.integers())
def test_a_drawn_delay_is_a_whole_number_and_never_negative(text: str, seed: int) -> None:
    delay, random = parse_delay(text), Random(seed)
    for _ in range(20):
        drawn_ns = delay.draw_ns(random)
        assert isinstance(drawn_ns, int)
        assert drawn_ns >= 0


def draws(text: str, count: int = 4000) -> list[int]:
    delay, random = parse_delay(text), Random(1)
    return [delay.draw_ns(random) for _ in range(count)]


def test_a_constant_delay_is_constant() -> None:
    assert set(draws("40us", 10)) == {40_000}


def test_an_exponential_delay_has_its_mean_and_its_tail() -> None:
    drawn = draws("exp:200us")
    assert sum(drawn) / len(drawn) == pytest.approx(200_000, rel=0.1)
    beyond = sum(value > 2 * 200_000 for value in drawn) / len(drawn)
    assert beyond == pytest.approx(0.135, abs=0.03)  # e^-2


def test_a_uniform_delay_fills_its_range_and_nothing_else() -> None:
    drawn = draws("uniform:10us..20us")
    assert 10_000 <= min(drawn) < 10_100
    assert 19_900 < max(drawn) <= 20_000
    assert sum(drawn) / len(drawn) == pytest.approx(15_000, rel=0.02)


def test_a_chance_delay_is_all_or_nothing_that_often() -> None:
    drawn = draws("10%:5ms")
    assert set(drawn) == {0, 5_000_000}
    assert drawn.count(5_000_000) / len(drawn) == pytest.approx(0.1, abs=0.02)
    assert set(draws("0%:5ms", 100)) == {0}
    assert set(draws("100%:5ms", 100)) == {5_000_000}


# The model.


def drawn_by(host: HostModel, name: str, count: int = 20) -> list[int]:
    return [host.delay_ns(name) for _ in range(count)]


def test_without_a_fault_the_host_is_on_time() -> None:
    host = HostModel()
    assert host.on_time
    assert [host.delay_ns(name) for name in FAULTS] == [0, 0, 0]
    assert host.faults() == {}


def test_a_fault_concerns_only_itself() -> None:
    host = HostModel()
    host.set_fault("worker_delay", "40us")
    assert not host.on_time
    assert host.faults() == {"worker_delay": "40us"}
    assert {name: host.delay_ns(name) for name in FAULTS} == {
        "worker_delay": 40_000,
        "vcpu_off": 0,
        "late_expiry": 0,
    }
    host.set_fault("worker_delay", None)
    host.set_fault("late_expiry", None)  # harmless where there is none
    assert host.on_time
    assert host.faults() == {}


def test_an_unknown_fault_names_those_there_are() -> None:
    with pytest.raises(ValueError, match="unknown fault 'late'") as raised:
        HostModel().set_fault("late", "5us")
    assert all(name in str(raised.value) for name in FAULTS)


def test_a_misspelt_delay_leaves_the_host_as_it_was() -> None:
    host = HostModel()
    with pytest.raises(ValueError, match="has no unit"):
        host.set_fault("vcpu_off", "5")
    assert host.on_time
    assert host.faults() == {}


def test_the_seed_decides() -> None:
    hosts = [HostModel(seed) for seed in (1, 1, 2)]
    for host in hosts:
        host.set_fault("worker_delay", "exp:40us")
    first, second, other = (drawn_by(host, "worker_delay") for host in hosts)
    assert first == second
    assert first != other


def test_one_fault_does_not_change_the_draws_of_another() -> None:
    alone, both = HostModel(7), HostModel(7)
    for host in (alone, both):
        host.set_fault("worker_delay", "exp:40us")
    both.set_fault("late_expiry", "uniform:1us..2us")
    interleaved = []
    for _ in range(20):
        both.delay_ns("late_expiry")
        interleaved.append(both.delay_ns("worker_delay"))
    assert drawn_by(alone, "worker_delay") == interleaved


def test_two_faults_written_alike_are_not_late_together() -> None:
    host = HostModel(7)
    for name in FAULTS:
        host.set_fault(name, "exp:40us")
    assert len({tuple(drawn_by(host, name)) for name in FAULTS}) == len(FAULTS)


def test_draws_are_the_same_in_every_process() -> None:
    script = (
        "from kvmtick.timing.host import HostModel\n"
        "host = HostModel(3)\n"
        "host.set_fault('vcpu_off', 'exp:1ms')\n"
        "print([host.delay_ns('vcpu_off') for _ in range(20)])\n"
    )
    host = HostModel(3)
    host.set_fault("vcpu_off", "exp:1ms")
    environment = {**os.environ, "PYTHONHASHSEED": "12345", "PYTHONPATH": os.pathsep.join(sys.path)}
    child = subprocess.run(
        [sys.executable, "-c", script],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    )
    assert child.stdout.strip() == str(drawn_by(host, "vcpu_off"))


@pytest.mark.parametrize(
    ("value_ns", "text"),
    [
        (0, "0 ns"),
        (999, "999 ns"),
        (1_000, "1 us"),
        (999_848, "999.8 us"),
        (200_000, "200 us"),
        (1_500_000, "1.5 ms"),
        (2_000_000_000, "2 s"),
        (-40_000, "-40 us"),
    ],
)
def test_durations_for_people(value_ns: int, text: str) -> None:
    assert format_ns(value_ns) == text
