"""Real machine code on up to eight vCPUs over the same RAM, an engine each."""

import pytest
from images import LOAD_AT

from kvmtick.guests import Guest, Needs
from kvmtick.kvm.model import ModelVm

READY, IDS = 0x500, 0x600
AP_AT = 0x9000

X2APIC_ON = bytes.fromhex("66b91b000000 0f32 0d000c 0f30")
"""mov ecx, 0x1b; rdmsr; or ax, 0xc00; wrmsr"""
START_ALL_OTHERS = bytes.fromhex(
    "66b930080000 6631d2"  # mov ecx, 0x830; xor edx, edx
    "66b800450c00 0f30"  # mov eax, 0xc4500; wrmsr: INIT to all others
    "66b809460c00 0f30"  # mov eax, 0xc4609; wrmsr: SIPI, page 9
)
LEAVE = bytes.fromhex("b000 e6f4 f4")
"""mov al, 0; out 0xf4, al; hlt"""
AP = bytes.fromhex(
    "31c0 8ed8"  # xor ax, ax; mov ds, ax
    "66b801000000 0fa2 66c1eb18"  # mov eax, 1; cpuid; shr ebx, 24
    "67889b00060000 f0fe060005"  # mov [ebx + 0x600], bl; lock inc byte [0x500]
    "faf4"  # cli; hlt
)


def wait_for(ready: int) -> bytes:
    """pause; cmp byte [READY], ready; jne"""
    return bytes.fromhex("f390 803e0005") + bytes((ready,)) + bytes.fromhex("75f7")


def machine(vcpus: int, *, fast: bool = False) -> ModelVm:
    vm = ModelVm(fast=fast)
    vm.prepare(Needs(vcpus=vcpus))
    image = X2APIC_ON + START_ALL_OTHERS + wait_for(vcpus - 1) + LEAVE
    vm.load(Guest("aps", image, LOAD_AT, (0, LOAD_AT), None, pieces=((AP_AT, AP),)))
    return vm


@pytest.mark.parametrize("fast", [False, True], ids=["exact", "fast"])
@pytest.mark.parametrize("vcpus", [2, 3, 8])
def test_a_broadcast_of_init_and_sipi_starts_all_others(vcpus: int, fast: bool) -> None:
    with machine(vcpus, fast=fast) as vm:
        run = vm.run(for_ns=10_000_000)
        assert run.exit.reason == "done", run.exit
        assert vm.read_memory(READY, 1) == bytes((vcpus - 1,))
        assert vm.read_memory(IDS, vcpus) == bytes(range(vcpus))


def test_it_repeats_to_the_instruction() -> None:
    results = set()
    for _ in range(2):
        with machine(8) as vm:
            run = vm.run(for_ns=10_000_000)
            results.add((run.instructions, run.elapsed_ns, bytes(vm.machine.ram)))
    assert len(results) == 1


def test_a_started_vcpu_runs_the_code_that_is_there_now() -> None:
    """The page of the SIPI vector is rewritten by the vCPU that boots, between two starts."""
    increments_twice = AP.replace(bytes.fromhex("f0fe060005"), bytes.fromhex("f080060005 02"), 1)
    rewrite = bytes.fromhex(
        "be00a0 bf0090 b9"  # mov si, 0xa000; mov di, 0x9000; mov cx, ...
    )
    rewrite += len(increments_twice).to_bytes(2, "little")
    rewrite += bytes.fromhex("31c0 8ed8 8ec0 fc f3a4")  # xor ax, ax; mov ds, es, ax; cld; rep movsb
    image = X2APIC_ON + START_ALL_OTHERS + wait_for(1) + rewrite
    image += START_ALL_OTHERS + wait_for(3) + LEAVE
    with ModelVm() as vm:
        vm.prepare(Needs(vcpus=2))
        pieces = ((AP_AT, AP), (0xA000, increments_twice))
        vm.load(Guest("twice", image, LOAD_AT, (0, LOAD_AT), None, pieces=pieces))
        run = vm.run(for_ns=10_000_000)
        assert run.exit.reason == "done", (run.exit, vm.machine.snapshot())
        assert vm.read_memory(READY, 1) == b"\x03"
