"""VMs and tracefs for the tests, and skips that say why."""

from collections.abc import Iterator

import pytest
from tiny_guests import MakeVm, bytes_at

from kvmtick.abi import HostError
from kvmtick.host.kvmdev import open_kvm
from kvmtick.host.tracefs import Tracefs, open_tracefs
from kvmtick.kvm.kernel import KernelVm


@pytest.fixture
def kvm() -> None:
    """Skip, saying why, where /dev/kvm cannot be used."""
    try:
        open_kvm().close()
    except HostError as error:
        pytest.skip(f"needs /dev/kvm: {error}")


@pytest.fixture
def make_vm(kvm: None) -> Iterator[MakeVm]:
    """A VM with irqchip, PIT and vCPU 0 that starts at the bytes given."""
    made: list[KernelVm] = []

    def make(code: bytes = b"", *, irqchip: bool = True, pit: bool = True) -> KernelVm:
        vm = KernelVm()
        made.append(vm)
        if irqchip:
            vm.create_irqchip()
            if pit:
                vm.create_pit2()
        if code:
            vm.create_vcpu()
            vm.load(bytes_at(code))
        return vm

    yield make
    for vm in made:
        vm.close()


@pytest.fixture
def tracefs() -> Iterator[Tracefs]:
    """Skip, saying why, where tracefs cannot be used."""
    try:
        opened = open_tracefs()
    except HostError as error:
        pytest.skip(f"needs tracefs: {error}")
    with opened:
        try:
            opened.instance().close()
        except HostError as error:
            pytest.skip(f"needs a tracefs it may write to: {error}")
        yield opened
