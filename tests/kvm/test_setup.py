"""What a guest needs of its VMM, set up."""

from kvmtick.guests import Needs
from kvmtick.kvm.model import ModelVm
from kvmtick.vcpu.cpuid import ECX_TSC_DEADLINE, ECX_X2APIC


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
