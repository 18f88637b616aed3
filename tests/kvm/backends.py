"""Both back ends for one test body; the kernel's skips, with the reason, where there is none."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

import kvmtick
from kvmtick.abi import HostError
from kvmtick.kvm.setup import cpuid_of

MakeVm = Callable[..., Any]
BACKENDS = ("model", "kernel")


def make_vm(backend: str, **options: Any) -> Any:
    """A VM of that back end; a skip where this host has no such thing."""
    if backend == "model":
        return kvmtick.Kvm("model").create_vm(**options)
    try:
        with kvmtick.Kvm("kernel") as system:
            return system.create_vm(**options)
    except HostError as error:
        pytest.skip(f"needs /dev/kvm: {error}")


def with_cpuid(vm: Any, vcpu: Any) -> Any:
    """The vCPU, told all that this back end supports."""
    vcpu.set_cpuid2(cpuid_of(vm.get_supported_cpuid(), vcpu.vcpu_id))
    return vcpu


@pytest.fixture(params=BACKENDS)
def vms(request: pytest.FixtureRequest) -> Iterator[MakeVm]:
    """Makes VMs of one back end, which are closed after the test."""
    made = []

    def make(**options: Any) -> Any:
        made.append(make_vm(request.param, **options))
        return made[-1]

    yield make
    for vm in made:
        vm.close()
