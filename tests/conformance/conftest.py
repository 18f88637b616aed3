"""The fixture `backend`: the tests here run on the model and on the kernel."""

import pytest

from conformance.rig import Backend
from kvmtick.abi import HostError
from kvmtick.kvm.kernel import KernelVm
from kvmtick.kvm.model import ModelVm


@pytest.fixture(params=["model", "kernel"])
def backend(request: pytest.FixtureRequest) -> Backend:
    """Both back ends; a skip that says why where /dev/kvm cannot be used."""
    if request.param == "model":
        return Backend("model", ModelVm, exact=True)
    try:
        KernelVm().close()
    except HostError as error:
        pytest.skip(f"needs /dev/kvm: {error}")
    return Backend("kernel", KernelVm)
