"""KVM_SET_TSC_KHZ and KVM_GET_TSC_KHZ of VM and vCPU, and what a rate does (api.rst 4.55, 4.56)."""

import errno

import pytest
from backends import MakeVm, vms

from kvmtick.abi import KvmError
from kvmtick.abi.caps import KVM_CAP_TSC_CONTROL
from kvmtick.conform.bench import (
    DIVIDE_BY_1,
    ENABLED,
    LVT_TSC_DEADLINE,
    LVTT,
    MSR_TSC,
    MSR_TSC_DEADLINE,
    SVR,
    TDCR,
    Bench,
)
from kvmtick.cpu.scripted import Out, Program, Rdtsc, ScriptedEngine, Spin
from kvmtick.guests.script import (
    lapic_write,
    rdmsr,
    sti,
    tsc_read,
    unreal,
    wait_vector,
    wrmsr,
)
from kvmtick.kvm.model import ModelVm

__all__ = ["vms"]

EXIT_PORT = 0xF4
VECTOR = 0x45
KHZ = 2_596_122


def refused(call: object, *args: int) -> str:
    with pytest.raises(KvmError) as caught:
        call(*args)  # type: ignore[operator]
    return errno.errorcode[caught.value.errno or 0]


def test_a_vcpu_has_the_rate_its_vm_had_when_it_was_made(vms: MakeVm) -> None:
    vm = vms()
    own = vm.get_tsc_khz()
    vm.set_tsc_khz(3 * own)
    assert vm.get_tsc_khz() == 3 * own
    vm.set_tsc_khz(0)
    assert vm.get_tsc_khz() == own, "0: the host's"
    vm.set_tsc_khz(2 * own)
    assert vm.create_vcpu(0).get_tsc_khz() == 2 * own
    assert refused(vm.set_tsc_khz, own) == "EINVAL", "a vCPU exists"
    assert vm.get_tsc_khz() == 2 * own


def test_a_vcpu_may_have_a_rate_of_its_own(vms: MakeVm) -> None:
    vm = vms()
    own = vm.get_tsc_khz()
    first, second = vm.create_vcpu(0), vm.create_vcpu(1)
    for khz, told in ((2 * own, 2 * own), (own, own), (own - 1, own - 1), (0, own)):
        first.set_tsc_khz(khz)
        assert (first.get_tsc_khz(), second.get_tsc_khz()) == (told, own)
    if vm.check_extension(KVM_CAP_TSC_CONTROL) == 0:
        assert refused(first.set_tsc_khz, own // 2) == "EINVAL"


def test_the_guest_reads_that_rate() -> None:
    seen: list[int] = []

    def guest() -> Program:
        yield Spin(1_000_000)
        seen.append((yield Rdtsc()))
        yield Out(EXIT_PORT, 0)

    with ModelVm(engine=lambda: ScriptedEngine(guest)) as vm:
        vm.set_tsc_khz(KHZ)
        vcpu = vm.create_vcpu(0)
        assert vm.run().exit.reason == "done"
        assert seen == [KHZ]
        (tsc,) = vcpu.get_msrs([MSR_TSC]).values()
        assert tsc == 1_000_002 * KHZ // 1_000_000
        vcpu.set_tsc_khz(2 * KHZ)
        (tsc,) = vcpu.get_msrs([MSR_TSC]).values()
        assert tsc == 1_000_002 * 2 * KHZ // 1_000_000, "as if it had always counted so"


def test_a_value_that_is_written_counts_on_at_that_rate() -> None:
    with ModelVm() as vm:
        vcpu = vm.create_vcpu(0)
        vcpu.set_tsc_khz(KHZ)
        vcpu.set_msrs({MSR_TSC: 1 << 50})
        vm.machine.clock.now_ns += 1_000_000
        assert vcpu.get_msrs([MSR_TSC]) == {MSR_TSC: (1 << 50) + KHZ}


def test_a_deadline_is_met_at_that_rate() -> None:
    def make() -> ModelVm:
        vm = ModelVm()
        vm.set_tsc_khz(KHZ)
        return vm

    deadline = 20 * KHZ
    with Bench("model", make).pc() as pc:
        got = pc.run(
            *(unreal(), lapic_write(SVR, ENABLED), lapic_write(TDCR, DIVIDE_BY_1), sti()),
            *(lapic_write(LVTT, LVT_TSC_DEADLINE | VECTOR), wrmsr(MSR_TSC, 0)),
            *(wrmsr(MSR_TSC_DEADLINE, deadline), wait_vector(VECTOR, 1), tsc_read(0)),
            rdmsr(MSR_TSC_DEADLINE, 2),
        )
        assert deadline <= got.results[0] | got.results[1] << 32 < deadline + 1000
        assert got.results[2:4] == (0, 0)
        assert 20_000_000 <= pc.vm.machine.elapsed_ns < 20_100_000
