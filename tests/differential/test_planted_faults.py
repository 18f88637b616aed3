"""The checks bite: a fault planted in the model is found by the fuzzer within 20,000 operations or,
if it is about ticks in time, by a conformance case.

The fuzzer compares the faulty model with the sound one, which needs no /dev/kvm.
"""

import pytest

from differential.faults import CONFORM_FAULTS, FAULTS, faulty
from kvmtick.conform.bench import bench_of
from kvmtick.conform.fuzz.search import Backends, Fuzzer
from kvmtick.conform.run import run_case, select_cases
from kvmtick.kvm import Kvm

OPERATIONS = 20_000


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(name: str) -> None:
    fuzzer = Fuzzer(faulty(FAULTS[name], Kvm("model")), shrinks=False)
    finding = fuzzer.run(OPERATIONS)
    assert finding is not None, f"not found in {fuzzer.totals.ops} operations"
    assert finding.found is not None
    assert finding.found.differences


def test_without_a_fault_nothing_is_found() -> None:
    model = Kvm("model")
    assert Fuzzer(Backends.of(model, model)).run(3_000) is None


@pytest.mark.parametrize("name", CONFORM_FAULTS)
def test_a_planted_fault_of_ticks_is_found(name: str) -> None:
    fault, pattern = CONFORM_FAULTS[name]
    bench, cases = bench_of("model"), select_cases([pattern])
    for case in cases:
        assert run_case(case, bench).outcome == "passed"
    with fault.planted():
        outcomes = [run_case(case, bench).outcome for case in cases]
    assert "failed" in outcomes
