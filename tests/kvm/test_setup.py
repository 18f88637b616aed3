"""What a guest needs of its VMM, set up."""

import pytest

from kvmtick.abi import HostError, ioctls
from kvmtick.abi.structs import kvm_cpuid_entry2
from kvmtick.guests import Needs
from kvmtick.kvm.api import Arg
from kvmtick.kvm.kernel import KernelVm
from kvmtick.kvm.model import ModelVm
from kvmtick.kvm.setup import cpuid_of
from kvmtick.vcpu.cpuid import ECX_HYPERVISOR, ECX_TSC_DEADLINE, ECX_X2APIC


def leaf(needs: Needs, function: int, vcpu_id: int = 0) -> tuple[int, int, int, int]:
    """A leaf of CPUID as the vCPU got it."""
    with ModelVm() as vm:
        entries = vm.prepare(needs)[vcpu_id].get_cpuid2()
    entry = next(entry for entry in entries if entry.function == function)
    return entry.eax, entry.ebx, entry.ecx, entry.edx


def test_features_can_be_left_out() -> None:
    features = leaf(Needs(), 1)[2]
    assert features & ECX_X2APIC
    assert features & ECX_TSC_DEADLINE
    assert leaf(Needs(cpuid_off=("x2apic",)), 1)[2] == features & ~ECX_X2APIC
    both = Needs(vcpus=2, cpuid_off=("x2apic", "tsc_deadline"))
    assert leaf(both, 1, vcpu_id=1)[2] == features & ~(ECX_X2APIC | ECX_TSC_DEADLINE)


def test_the_vendor_can_be_another() -> None:
    _, ebx, ecx, edx = leaf(Needs(cpuid_vendor="AuthenticAMD"), 0)
    assert b"".join(part.to_bytes(4, "little") for part in (ebx, edx, ecx)) == b"AuthenticAMD"
    _, ebx, ecx, edx = leaf(Needs(), 0)
    assert b"".join(part.to_bytes(4, "little") for part in (ebx, edx, ecx)) == b"GenuineIntel"


def test_what_an_older_kernel_leaves_out_is_there_and_the_hosts_ids_are_not() -> None:
    told = [
        kvm_cpuid_entry2(function=1, ebx=0x0702_0800, ecx=ECX_X2APIC),
        kvm_cpuid_entry2(function=0x8000_001E, eax=7, ebx=0x103, ecx=0x201),
    ]
    features, topology = cpuid_of(told, 2)
    assert features.ebx == 0x0202_0800
    assert features.ecx == ECX_X2APIC | ECX_TSC_DEADLINE | ECX_HYPERVISOR
    assert (topology.eax, topology.ebx, topology.ecx) == (2, 2, 0)


def test_real_mode_s_pages_are_set_first(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    try:
        made = KernelVm()
    except HostError as error:
        pytest.skip(f"needs /dev/kvm: {error}")
    with made as vm:
        ioctl = vm.ioctl

        def noted(request: int, arg: Arg = 0) -> int:
            calls.append(request)
            return ioctl(request, arg)

        monkeypatch.setattr(vm, "ioctl", noted)
        vm.prepare(Needs(vcpus=2))
    assert calls[:2] == [ioctls.KVM_SET_IDENTITY_MAP_ADDR, ioctls.KVM_SET_TSS_ADDR]
