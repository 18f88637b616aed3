"""VMs and vCPUs as files: descriptors that ioctls return, closing in any order, nothing leaks."""

import gc
import itertools
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from backends import BACKENDS, make_vm

from kvmtick import Kvm, KvmError
from kvmtick.abi import ioctls
from kvmtick.kvm.api import System
from kvmtick.kvm.model import ModelVm
from kvmtick.kvm.model_file import file_of
from kvmtick.kvm.model_vcpu import ModelVcpu

VMS = 100
RAM_BYTES = 1 << 16


@pytest.fixture(params=BACKENDS)
def system(request: pytest.FixtureRequest) -> Iterator[System]:
    make_vm(request.param).close()
    with Kvm(request.param) as made:
        yield made


def descriptors() -> dict[str, str]:
    """The open ones, and what they are of."""
    found = {}
    for each in Path("/proc/self/fd").iterdir():
        try:
            found[each.name] = os.readlink(each)
        except FileNotFoundError:  # the one that lists them
            continue
    return found


@pytest.fixture
def leaves_nothing() -> Iterator[None]:
    """Descriptors and threads are the same after the test."""
    gc.collect()
    before = descriptors(), threading.active_count()
    yield
    gc.collect()
    assert (descriptors(), threading.active_count()) == before


# --- closing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_closing_in_any_order_and_twice(system: System, order: tuple[int, ...]) -> None:
    vm = system.create_vm(ram_bytes=RAM_BYTES)
    vm.create_irqchip()
    vm.create_pit2()
    files: list[Any] = [system, vm, vm.create_vcpu(0), vm.create_vcpu(1)]
    for place in order * 2:
        files[place].close()
    for file in files:
        assert file.fileno() == -1
        with pytest.raises(KvmError, match="EBADF"):
            file.ioctl(ioctls.KVM_GET_API_VERSION)


def test_a_vm_outlives_its_system(system: System) -> None:
    vm = system.create_vm(ram_bytes=RAM_BYTES)
    system.close()
    vm.create_irqchip()
    assert vm.create_vcpu(0).get_mp_state() == 0
    assert vm.get_supported_cpuid()
    vm.close()


# --- nothing leaks --------------------------------------------------------------------------------


def busy(system: System, eventfd: int) -> Any:
    """A VM with all that has descriptors or threads, whose vCPU has slept."""
    vm = system.create_vm(ram_bytes=RAM_BYTES)
    vm.create_irqchip()
    vm.create_pit2()
    vcpu = vm.create_vcpu(0)
    vcpu.fileno()
    vm.write_memory(0, b"\xfa\xf4")  # cli; hlt
    vcpu.start_at(0, 0)
    vcpu.run(limit_s=0.001)
    vm.irqfd(eventfd, 4)
    vm.ioeventfd(0x510, 2, eventfd, 2)
    return vm


@pytest.mark.usefixtures("leaves_nothing")
def test_a_hundred_vms_leave_nothing(system: System) -> None:
    eventfd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    for _ in range(VMS // 2):
        busy(system, eventfd).close()
        with busy(system, eventfd):
            pass
    assert len(descriptors()) < VMS
    os.close(eventfd)


@pytest.mark.usefixtures("leaves_nothing")
def test_vms_that_nobody_closed_leave_nothing(system: System) -> None:
    for _ in range(5):
        eventfd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        busy(system, eventfd)
        os.close(eventfd)


@pytest.mark.usefixtures("leaves_nothing")
def test_descriptors_that_ioctls_return_leave_nothing(system: System) -> None:
    for _ in range(VMS):
        vm = system.ioctl(ioctls.KVM_CREATE_VM)
        assert str(vm) in descriptors()
        os.close(vm)


# --- descriptors of the model ---------------------------------------------------------------------


def test_a_descriptor_leads_to_its_file() -> None:
    with Kvm() as system:
        vm = file_of(system.ioctl(ioctls.KVM_CREATE_VM))
        assert isinstance(vm, ModelVm)
        vcpu = file_of(vm.ioctl(ioctls.KVM_CREATE_VCPU, 3))
        assert isinstance(vcpu, ModelVcpu)
        assert vcpu.vcpu_id == 3
        assert vm.vcpus == [vcpu]
        fds = vm.fileno(), vcpu.fileno()
        assert len({*fds, system.fileno()}) == 3
        vm.close()
        for fd in fds:
            with pytest.raises(KvmError, match="EBADF"):
                file_of(fd)


def test_a_vm_stays_while_its_vcpu_is_open() -> None:
    with Kvm() as system:
        vm = system.ioctl(ioctls.KVM_CREATE_VM)
        vcpu = file_of(vm).ioctl(ioctls.KVM_CREATE_VCPU)
        os.close(vm)
        gc.collect()
        with pytest.raises(KvmError, match="EBADF"):
            file_of(vm)
        assert file_of(vcpu).ioctl(ioctls.KVM_GET_TSC_KHZ) > 0
        os.close(vcpu)


def test_a_number_that_was_closed_and_given_to_another_file_is_not_the_vm() -> None:
    with Kvm() as system:
        vm = system.ioctl(ioctls.KVM_CREATE_VM)
        os.close(vm)
        other = os.eventfd(0, os.EFD_CLOEXEC)
        assert other == vm
        with pytest.raises(KvmError, match="ENOTTY"):
            file_of(other)
        os.close(other)


def test_closing_a_vm_whose_number_another_one_has_leaves_that_one_alone() -> None:
    with Kvm() as system:
        number = system.ioctl(ioctls.KVM_CREATE_VM)
        first = file_of(number)
        os.close(number)
        assert system.ioctl(ioctls.KVM_CREATE_VM) == number
        first.close()
        gc.collect()
        assert file_of(number).ioctl(ioctls.KVM_GET_TSC_KHZ) > 0
        os.close(number)
