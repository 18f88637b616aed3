"""The checks bite: a fault planted in the model is found by the fuzzer within 20,000 operations.

The faulty model is compared with the sound one, which needs no /dev/kvm.
"""

import pytest

from differential.faults import FAULTS, faulty
from kvmtick.conform.fuzz.search import Backends, Fuzzer
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
