"""What a guest needs of its VMM, set up on either back end by the same calls."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Final, TypeVar

from kvmtick.abi.errors import HostError
from kvmtick.abi.structs import KVM_PIT_SPEAKER_DUMMY, kvm_cpuid_entry2
from kvmtick.guests import Needs, gsi_routing
from kvmtick.kvm.topology import one_package
from kvmtick.vcpu.cpuid import (
    ECX_HYPERVISOR,
    ECX_TSC_DEADLINE,
    FEATURES,
    LEAF_FEATURES,
    LEAF_VENDOR,
    LEAVES_CLOCKS,
    LEAVES_TOPOLOGY,
    vendor_registers,
)

if TYPE_CHECKING:
    from kvmtick.kvm.api import Vcpu, Vm

__all__ = ["cpuid_of", "prepare"]

APIC_ID_SHIFT: Final = 24
LEAF_AMD_TOPOLOGY: Final = 0x8000_001E
"""APIC id, core and node (APM vol. 3, appendix E)."""

IDENTITY_MAP_ADDR: Final = 0xFEFF_C000
TSS_ADDR: Final = IDENTITY_MAP_ADDR + 0x1000
"""KVM_SET_IDENTITY_MAP_ADDR and KVM_SET_TSS_ADDR: a page and three, between the local APIC and the
firmware, for real mode on Intel's CPUs (api.rst)."""

_V = TypeVar("_V", bound="Vcpu")


def cpuid_of(entries: list[kvm_cpuid_entry2], vcpu_id: int) -> list[kvm_cpuid_entry2]:
    """KVM_GET_SUPPORTED_CPUID's answer for one vCPU with an in-kernel local APIC: its APIC id is
    filled in, and what older kernels leave to the VMM (api.rst) is there: the TSC deadline, and the
    bit without which no guest looks for KVM's leaves.
    """
    for entry in entries:
        if entry.function == LEAF_FEATURES:
            entry.ebx = entry.ebx & ~(0xFF << APIC_ID_SHIFT) | (vcpu_id & 0xFF) << APIC_ID_SHIFT
            entry.ecx |= ECX_TSC_DEADLINE | ECX_HYPERVISOR
        elif entry.function in LEAVES_TOPOLOGY:
            entry.edx = vcpu_id
        elif entry.function == LEAF_AMD_TOPOLOGY:
            # a core of one thread in node 0; a kernel may tell the host's
            entry.eax, entry.ebx, entry.ecx = vcpu_id, vcpu_id & 0xFF, 0
    return entries


def prepare(vm: "Vm[_V]", needs: Needs, reinject: bool) -> "list[_V]":
    """Irqchip, PIT, routing, vCPUs and their CPUID as `needs` says.

    `reinject` is KVM_REINJECT_CONTROL, unless the guest leaves no choice. HostError where KVM does
    not offer a CPUID feature the guest needs.
    """
    vm.set_identity_map_addr(IDENTITY_MAP_ADDR)
    vm.set_tss_addr(TSS_ADDR)
    vm.create_irqchip()
    vm.create_pit2(KVM_PIT_SPEAKER_DUMMY)
    vm.reinject_control(reinject if needs.reinject is None else needs.reinject)
    table = gsi_routing(needs)
    if table is not None:
        vm.set_gsi_routing(table)
    vcpus = [vm.create_vcpu(vcpu_id) for vcpu_id in range(needs.vcpus)]
    for vcpu in vcpus:
        entries = cpuid_of(vm.get_supported_cpuid(), vcpu.vcpu_id)
        _check_offered(entries, needs.cpuid or ())
        _change(entries, needs)
        vcpu.set_cpuid2(one_package(entries, vcpu.vcpu_id, needs.vcpus))
    return vcpus


def _change(entries: Iterable[kvm_cpuid_entry2], needs: Needs) -> None:
    """What the VMM wants otherwise than KVM offers it."""
    for entry in entries:
        if entry.function in LEAVES_CLOCKS and not needs.cpuid_clocks:
            entry.eax = entry.ebx = entry.ecx = entry.edx = 0
        for feature in needs.cpuid_off:
            function, register, mask = FEATURES[feature]
            if entry.function == function:
                setattr(entry, register, getattr(entry, register) & ~mask)
        if needs.cpuid_vendor is not None and entry.function == LEAF_VENDOR:
            entry.ebx, entry.edx, entry.ecx = vendor_registers(needs.cpuid_vendor)


def _check_offered(entries: list[kvm_cpuid_entry2], features: Iterable[str]) -> None:
    for feature in features:
        function, register, mask = FEATURES[feature]
        if not any(getattr(e, register) & mask for e in entries if e.function == function):
            raise HostError(f"KVM offers no {feature} here", "choose a guest that does without")
