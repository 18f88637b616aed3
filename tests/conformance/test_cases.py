"""Every conformance case, on the model and on /dev/kvm; what a host cannot show is skipped."""

import re
from collections.abc import Callable
from functools import cache

import pytest

from kvmtick.abi import HostError
from kvmtick.conform.bench import BACKENDS, Bench, bench_of
from kvmtick.conform.case import Case, all_cases
from kvmtick.conform.run import run_case

CASES = list(all_cases())
SOURCE = re.compile(r"SDM|datasheet|82093AA|8254|8259|api\.rst|KVM_[A-Z]|[a-z]_[a-z]|\bKVM\b")
"""A document, an ioctl, or a function of the kernel."""

MakeBench = Callable[[str], Bench]


@pytest.fixture(scope="session")
def bench() -> MakeBench:
    """The bench of a back end, made once; a skip that says why where there is none."""

    @cache
    def make(backend: str) -> Bench | HostError:
        try:
            return bench_of(backend)
        except HostError as error:
            return error

    def bench_or_skip(backend: str) -> Bench:
        made = make(backend)
        if isinstance(made, HostError):
            pytest.skip(f"needs /dev/kvm: {made}")
        return made

    return bench_or_skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("backend", BACKENDS)
def test_case(bench: MakeBench, backend: str, case: Case) -> None:
    result = run_case(case, bench(backend))
    if result.outcome == "skipped":
        assert backend != "model", result.reason
        pytest.skip(result.reason)
    assert result.outcome == "passed", f"{case.right}\n{result.reason}\n{result.traceback}"


def test_every_case_has_a_name_of_its_own_and_a_sentence() -> None:
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)
    for case in CASES:
        assert case.right.endswith("."), case.name
        assert case.right.isprintable(), case.name
        assert SOURCE.search(case.right), f"{case.name} does not say why"
