"""Latencies in constant memory: how exact, how small."""

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from kvmtick.ticks.histogram import Histogram

VALUES = st.lists(st.integers(0, 1 << 40), min_size=1, max_size=200)


def filled(values: list[int]) -> Histogram:
    histogram = Histogram()
    histogram.add(values)
    return histogram


@given(VALUES, st.sampled_from((0.5, 0.9, 0.99, 1.0)))
@settings(max_examples=200, deadline=None)
def test_a_quantile_is_never_below_the_true_one_and_less_than_a_64th_above(
    values: list[int], share: float
) -> None:
    true = sorted(values)[max(1, round(share * len(values))) - 1]
    got = filled(values).quantile(share)
    assert true <= got <= max(values)
    assert got - true < max(1, true) / 64 or got == true


@given(VALUES)
@settings(max_examples=100, deadline=None)
def test_the_maximum_is_exact_and_the_count_is_all(values: list[int]) -> None:
    histogram = filled(values)
    assert len(histogram) == len(values)
    assert histogram.summary()["max"] == max(values)
    assert len(histogram) == len(values)


@given(VALUES, VALUES)
@settings(max_examples=100, deadline=None)
def test_in_how_many_portions_values_come_changes_nothing(
    first: list[int], second: list[int]
) -> None:
    histogram = filled(first)
    histogram.summary()
    histogram.add(second)
    assert histogram.summary() == filled(first + second).summary()


def test_small_values_are_exact() -> None:
    for value in range(128):
        histogram = filled([value])
        assert histogram.summary() == {"p50": value, "p99": value, "max": value}


def test_nothing_counted_gives_nothing() -> None:
    histogram = Histogram()
    assert histogram.summary() == {}
    assert histogram.quantile(0.5) == 0
    assert len(histogram) == 0


def test_the_number_of_buckets_is_bounded_by_the_width_of_the_values() -> None:
    histogram = Histogram()
    for exponent in range(40):
        histogram.add([int(math.pow(2, exponent) * (1 + step / 256)) for step in range(256)])
    assert len(histogram) == 40 * 256
    assert len(histogram.buckets()) <= 40 * 64 + 128
