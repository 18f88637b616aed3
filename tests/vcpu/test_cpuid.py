"""The table of `supported`: what it says is true of the engine and of the machine."""

from kvmtick.cpu.unicorn import FEATURES as EXECUTED
from kvmtick.guests import Needs
from kvmtick.kvm.model import ModelVm
from kvmtick.vcpu.cpuid import Cpuid, supported

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
