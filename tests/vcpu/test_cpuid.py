"""What CPUID says is true of the engine and of the machine, and of the VM's vCPUs."""

from collections.abc import Iterable

import pytest

from kvmtick.abi.structs import kvm_cpuid_entry2
from kvmtick.cpu.unicorn import FEATURES as EXECUTED
from kvmtick.guests import Needs
from kvmtick.kvm.dev_ioctl import cpuid_entries
from kvmtick.kvm.model import ModelVm
from kvmtick.kvm.topology import one_package
from kvmtick.vcpu.cpuid import Cpuid, CpuidLeaf, supported

OF_THE_BOARD = {
    # x2APIC, TSC deadline, hypervisor
    (0x1, 0, "ecx"): 1 << 21 | 1 << 24 | 1 << 31,
    # APIC, MTRR, MCA, PAT
    (0x1, 0, "edx"): 1 << 9 | 1 << 12 | 1 << 14 | 1 << 16,
    # TSC_ADJUST
    (0x7, 0, "ebx"): 1 << 1,
}


def offered() -> Cpuid:
    cpuid = Cpuid()
    cpuid.set(supported())
    return cpuid


def leaves(entries: Iterable[kvm_cpuid_entry2]) -> list[CpuidLeaf]:
    return [
        CpuidLeaf(e.function, e.index if e.flags else None, e.eax, e.ebx, e.ecx, e.edx)
        for e in entries
    ]


def answer(function: int, index: int = 0) -> dict[str, int]:
    registers = offered().answer(function, index, apic_enabled=True)
    return dict(zip(("eax", "ebx", "ecx", "edx"), registers, strict=True))


def test_no_feature_is_offered_that_the_engine_does_not_execute() -> None:
    for (function, index, register), executed in EXECUTED.items():
        given = answer(function, index)[register]
        assert not given & ~executed & ~OF_THE_BOARD.get((function, index, register), 0)
    assert answer(0x7) == {"eax": 0, "ebx": answer(0x7)["ebx"], "ecx": 0, "edx": 0}
    assert answer(0x1)["ecx"] & (1 << 26 | 1 << 27) == 0, "XSAVE would need leaf 0xd"


def test_what_64_bit_system_software_needs_is_there() -> None:
    assert answer(0x1)["edx"] & 0x0783_FBFD == 0x0783_FBFD
    long_mode, nx, syscall, rdtscp = 1 << 29, 1 << 20, 1 << 11, 1 << 27
    wanted = long_mode | nx | syscall | rdtscp
    assert answer(0x8000_0001)["edx"] & wanted == wanted


def test_vendor_brand_and_hypervisor_spell_names() -> None:
    def text(*words: int) -> str:
        return b"".join(word.to_bytes(4, "little") for word in words).decode().rstrip("\0")

    vendor, hypervisor = answer(0), answer(0x4000_0000)
    assert text(vendor["ebx"], vendor["edx"], vendor["ecx"]) == "GenuineIntel"
    assert text(hypervisor["ebx"], hypervisor["ecx"], hypervisor["edx"]) == "KVMKVMKVM"
    brand = [word for leaf in range(0x8000_0002, 0x8000_0005) for word in answer(leaf).values()]
    assert text(*brand) == "kvmtick virtual CPU @ 1.00GHz"
    assert (vendor["eax"], hypervisor["eax"]) == (0x15, 0x4000_0010)


def test_the_clocks_are_those_of_the_machine() -> None:
    """TSC = crystal * EBX / EAX, and the local APIC's timer counts the crystal."""
    crystal = answer(0x15)
    with ModelVm() as vm:
        tsc_hz = vm.get_tsc_khz() * 1000
        apic_hz = 1_000_000_000 // vm.machine.board.delivery.apic_bus_cycle_ns
    assert crystal["ecx"] * crystal["ebx"] // crystal["eax"] == tsc_hz
    assert crystal["ecx"] == apic_hz
    assert answer(0x4000_0010) == {
        "eax": tsc_hz // 1000,
        "ebx": apic_hz // 1000,
        "ecx": 0,
        "edx": 0,
    }


def test_prepare_gives_each_of_eight_vcpus_its_apic_id() -> None:
    with ModelVm() as vm:
        vcpus = vm.prepare(Needs(vcpus=8))
        for vcpu_id, vcpu in enumerate(vcpus):
            cpuid = vcpu.vcpu.cpuid
            assert cpuid.answer(1, 0, apic_enabled=True)[1] >> 24 == vcpu_id
            for index in range(3):
                assert cpuid.answer(0xB, index, apic_enabled=True)[3] == vcpu_id


@pytest.mark.parametrize(
    ("vcpus", "id_bits", "ids"), [(1, 0, 1), (2, 1, 2), (3, 2, 4), (8, 3, 8), (300, 9, 255)]
)
def test_the_vcpus_are_cores_of_one_package(vcpus: int, id_bits: int, ids: int) -> None:
    """Leaf 1 has 8 bits for the package's ids, leaf 0xB room for all of them."""
    last = vcpus - 1
    cpuid = Cpuid()
    cpuid.set(leaves(one_package(cpuid_entries(), last, vcpus)))
    features = cpuid.answer(1, 0, apic_enabled=True)
    assert features[1] >> 16 & 0xFF == ids
    assert features[3] >> 28 & 1 == (vcpus > 1)
    assert cpuid.answer(0xB, 0, apic_enabled=True) == (0, 1, 0x100, last)
    assert cpuid.answer(0xB, 1, apic_enabled=True) == (id_bits, vcpus, 0x201, last)
    assert cpuid.answer(0xB, 2, apic_enabled=True) == (0, 0, 2, last)
    assert last >> id_bits == 0, "an APIC id without its lowest bits is the package's"


def test_a_host_s_topology_is_not_the_vm_s() -> None:
    """Caches keep their sizes; what the host says of packages and dies goes."""

    def entry(function: int, index: int, eax: int) -> kvm_cpuid_entry2:
        return kvm_cpuid_entry2(function=function, index=index, flags=1, eax=eax)

    l1d, l2, l3, no_more = 0x1C00_4121, 0x1C00_4143, 0x1C03_C163, 0
    host = [
        *(entry(4, index, cache) for index, cache in enumerate((l1d, l2, l3, no_more))),
        *(entry(0xB, index, shift) for index, shift in enumerate((1, 5))),
        *(entry(0x1F, index, shift) for index, shift in enumerate((1, 4, 5))),
    ]
    changed = [(each.function, each.index, each.eax) for each in one_package(host, 2, 3)]
    assert changed == [
        (4, 0, 3 << 26 | 0x121),
        (4, 1, 3 << 26 | 0x143),
        (4, 2, 3 << 26 | 3 << 14 | 0x163),
        (4, 3, 0),
        (0xB, 0, 0),
        (0xB, 1, 2),
    ]


def test_topology_is_not_invented_where_the_cpu_has_none() -> None:
    entries = [kvm_cpuid_entry2(function=1, edx=1 << 28, ebx=8 << 16)]
    (only,) = one_package(entries, 0, 1)
    assert (only.ebx, only.edx) == (1 << 16, 0)


def test_amd_s_cpus_tell_their_cores_in_their_own_leaf() -> None:
    def cores(vendor: str | None) -> int:
        with ModelVm() as vm:
            *_, last = vm.prepare(Needs(vcpus=6, cpuid_vendor=vendor))
            return last.vcpu.cpuid.answer(0x8000_0008, 0, apic_enabled=True)[2]

    assert cores(None) == 0
    assert cores("AuthenticAMD") == 3 << 12 | 5


@pytest.mark.parametrize("told", [True, False])
def test_the_clocks_rates_can_be_left_out(told: bool) -> None:
    with ModelVm() as vm:
        (vcpu,) = vm.prepare(Needs(cpuid_clocks=told))
        for leaf in (0x15, 0x4000_0010):
            assert any(vcpu.vcpu.cpuid.answer(leaf, 0, apic_enabled=True)) == told
