"""The model's VM as the API has it (tests/kvm/test_errno_table.py has what its calls answer)."""

import pytest

import kvmtick
from kvmtick import Kvm, KvmError
from kvmtick.abi.ioctls import IOCTLS
from kvmtick.cpu.scripted import Hlt, Program, ScriptedEngine
from kvmtick.guests import Guest
from kvmtick.kvm.model import ModelVm


def halt() -> Program:
    yield Hlt()


def fresh() -> ModelVm:
    return ModelVm(engine=lambda: ScriptedEngine(halt))


def test_the_library_example() -> None:
    vm = kvmtick.Kvm("model").create_vm()
    vm.create_irqchip()
    vm.create_pit2()
    vcpu = vm.create_vcpu(0)
    vm.load(kvmtick.guests.load("tick-pic", ticks=1000))
    run = vm.run()
    assert run.ticks is not None
    print(run.ticks.summary())
    assert (run.guest_ticks, run.ticks.expired, run.ticks.count("delivered")) == (1000, 1000, 1000)
    assert vcpu.vcpu_id == 0
    assert run.ticks.summary().startswith("1000 ticks of the pit by way of the pic:\n")
    vm.close()


def test_an_unknown_back_end_is_named_with_the_choice() -> None:
    with pytest.raises(ValueError, match="unknown back end 'nope': choose model, kernel or auto"):
        Kvm("nope")
    assert Kvm().backend == "model"


@pytest.mark.parametrize("name", ["CREATE_PIT", "GET_PIT2", "REINJECT_CONTROL", "GET_IRQCHIP"])
def test_what_was_refused_is_told_in_one_line(name: str) -> None:
    with fresh() as vm, pytest.raises(KvmError) as caught:
        vm.ioctl(IOCTLS[f"KVM_{name}"], bytearray(1024))
    assert str(caught.value).startswith(f"KVM_{name}: EN")
    assert "create_irqchip() first" in str(caught.value) or "create_irqchip() and" in str(
        caught.value
    )
    assert "\n" not in str(caught.value)


def test_the_vcpu_answers_get_regs_and_mp_state() -> None:
    vm = fresh()
    vm.create_irqchip()
    made = vm.create_vcpu(0)
    vm.load(Guest("x", b"\xf4", 0x1000, (0, 0x1234), None))
    assert made.get_mp_state() == 0
    assert made.get_regs().rip == 0x1234
    vm.run(for_ns=100)
    assert made.get_mp_state() == 3, "KVM_MP_STATE_HALTED"
    made.nmi()
    assert made.vcpu.pending.nmi_pending == 1


def test_a_closed_vm_has_nothing_registered_any_more() -> None:
    vm = fresh()
    vm.create_irqchip()
    vm.create_pit2()
    board = vm.machine.board
    assert len(board.source_ids) == 3
    assert len(board.notifiers) == 2
    ports = len(board.bus)
    vm.close()
    assert board.pit is None
    assert len(board.source_ids) == 2
    assert len(board.notifiers) == 0
    assert len(board.bus) == ports - 1
    assert board.apicv_inhibits == 0
