"""What is made of the values: the mark, whether it is met, ratios and spread."""

import pytest

from kvmtick.bench.figure import Demand, Figure, Result, Taken
from kvmtick.bench.figures import FIGURES
from kvmtick.bench.session import Session

QEMU, BOCHS = Demand(10, "qemu"), Demand(2, "bochs")


def never(_: Session) -> Taken:
    raise AssertionError("nobody takes it")


def result(
    values: list[float], *demands: Demand, at_most: bool = False, **peers: list[float]
) -> Result:
    figure = Figure("x", "x", "1/s", never, demands, at_most=at_most)
    return Result(figure, Taken(values, peers))


def test_the_best_run_counts() -> None:
    told = result([9, 12, 10], QEMU, qemu=[1, 1.1, 0.9]).as_dict()
    assert (told["value"], told["best"], told["median"], told["runs"]) == (12, 12, 10, 3)
    assert told["spread"] == pytest.approx(0.3)
    assert told["mark"] == pytest.approx(11)
    assert told["met"] is True
    assert (told["peer"], told["ratio"]) == ("qemu", pytest.approx(12 / 1.1))
    assert told["peers"]["qemu"]["ratio_median"] == pytest.approx(12 / 1.1)


def test_less_is_better_where_a_figure_says_so() -> None:
    told = result([30, 20, 25], Demand(22), at_most=True).as_dict()
    assert (told["value"], told["mark"], told["met"], told["peer"]) == (20, 22, True, None)
    assert told["ratio"] is None
    assert result([23], Demand(22), at_most=True).met is False


def test_a_mark_is_missed_by_one_of_two_demands() -> None:
    assert result([19], QEMU, BOCHS, qemu=[1], bochs=[10]).met is False
    both = result([20], QEMU, BOCHS, qemu=[1], bochs=[10])
    assert (both.met, both.mark, both.peer) == (True, 20, "bochs")


def test_without_the_peer_a_mark_cannot_be_told() -> None:
    told = result([100], QEMU).as_dict()
    assert (told["mark"], told["met"], told["peer"], told["ratio"]) == (None, None, "qemu", None)
    assert result([100], QEMU, BOCHS, qemu=[1]).met is None
    assert result([100], QEMU, BOCHS, qemu=[11]).met is False


def test_a_fault_misses_the_mark_and_a_short_run_tells_nothing() -> None:
    faulty = result([100], Demand(1))
    faulty.taken.faults.append("3 ticks were lost")
    assert faulty.met is False
    faulty.taken.undecided = True
    assert faulty.met is None


def test_a_figure_that_was_not_taken() -> None:
    told = result([], Demand(1)).as_dict()
    assert (told["value"], told["met"], told["runs"], told["spread"]) == (None, None, 0, None)


def test_the_figures_are_those_of_the_marks() -> None:
    names = "tick-pic tick-ioapic tick-lapic traced chips fleet mips-memory mips-register"
    names += " boot-linux realtime-1k realtime-2k realtime-5k realtime-10k decode-raw decode-text"
    assert list(FIGURES) == [*names.split(), "start-help", "start-run", "memory"]
