"""The fixture `backend`: the tests here run on the model and on the kernel."""

import pytest

from kvmtick.abi import HostError
from kvmtick.conform.bench import BACKENDS, Bench, bench_of


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Bench:
    """Both back ends; a skip that says why where /dev/kvm cannot be used."""
    try:
        return bench_of(request.param)
    except HostError as error:
        pytest.skip(f"needs /dev/kvm: {error}")


@pytest.fixture
def model() -> Bench:
    """The model alone, for what the recorded kernel's back end does in a way of its own."""
    return bench_of("model")
