"""`KernelVm.run`: the calls of the model, on the kernel's chips."""

import pytest

import kvmtick
from kvmtick.abi import HostError
from kvmtick.host.kvmdev import open_kvm


@pytest.fixture(autouse=True)
def kvm() -> None:
    """Skip, saying why, where /dev/kvm cannot be used."""
    try:
        open_kvm().close()
    except HostError as error:
        pytest.skip(f"needs /dev/kvm: {error}")


def test_the_library_example_runs_on_the_kernel_and_has_no_ticks_to_tell() -> None:
    with kvmtick.Kvm("kernel").create_vm() as vm:
        vm.create_irqchip()
        vm.create_pit2()
        vm.create_vcpu(0)
        vm.load(kvmtick.guests.load("tick-pic", ticks=50, tsc_khz=vm.get_tsc_khz()))
        run = vm.run()
    assert (run.exit.reason, run.exit.code) == ("done", 0)
    assert run.guest_ticks == 50
    assert run.pit is not None
    assert (run.pit.count, run.pit.period_ns, run.pit.reinject) == (1193, 999_848, True)
    assert run.ticks is None
    assert run.as_dict()["ticks"] is None


def test_a_run_says_what_reinject_was_set_to_and_that_a_vm_has_no_pit() -> None:
    with kvmtick.Kvm("kernel").create_vm() as vm:
        vm.create_irqchip()
        vm.create_pit2()
        vm.reinject_control(False)
        vm.create_vcpu(0)
        vm.load(kvmtick.guests.load("tick-pic", ticks=5, tsc_khz=vm.get_tsc_khz()))
        run = vm.run()
    assert run.pit is not None
    assert not run.pit.reinject


def test_a_guest_that_hangs_is_stopped_at_the_limit() -> None:
    with kvmtick.Kvm("kernel").create_vm() as vm:
        vm.create_irqchip()
        vm.create_vcpu(0)
        vm.load(kvmtick.guests.Guest("spin", b"\xeb\xfe", 0x8000, (0, 0x8000), None))
        run = vm.run(limit_s=0.2)
    assert run.exit.reason == "limit"
    assert run.pit is None
    assert run.guest_ticks is None
