"""What the model's calls answer: the rows of a real kernel's errno table that this API can reach.

The rows were observed on Linux 6.18 (docs/fidelity.md says what is not modelled).
"""

import errno
from collections.abc import Callable
from typing import TypeAlias

import pytest

from kvmtick import Kvm, KvmError, guests
from kvmtick.abi.structs import kvm_irqchip, kvm_pit_state, kvm_pit_state2
from kvmtick.cpu.scripted import Hlt, Program, ScriptedEngine
from kvmtick.kvm.model import ModelVm

Call: TypeAlias = Callable[[ModelVm], object]


def halt() -> Program:
    yield Hlt()


def fresh() -> ModelVm:
    return ModelVm(engine=lambda: ScriptedEngine(halt))


def irqchip(vm: ModelVm) -> None:
    vm.create_irqchip()


def pit(vm: ModelVm) -> None:
    vm.create_irqchip()
    vm.create_pit2()


def vcpu(vm: ModelVm) -> None:
    vm.create_vcpu(0)


def chip(chip_id: int) -> Call:
    """SET_IRQCHIP of an empty state."""
    return lambda vm: vm.set_irqchip(kvm_irqchip(chip_id=chip_id))


def round_trip(chip_id: int) -> Call:
    """SET_IRQCHIP of the state just read."""
    return lambda vm: vm.set_irqchip(vm.get_irqchip(chip_id))


def line(gsi: int, level: int = 1) -> Call:
    return lambda vm: vm.irq_line(gsi, level)


NO_PREPARATION: Call = lambda vm: None  # noqa: E731
PIT_CALLS: dict[str, Call] = {
    "GET_PIT": lambda vm: vm.get_pit(),
    "GET_PIT2": lambda vm: vm.get_pit2(),
    "SET_PIT": lambda vm: vm.set_pit(kvm_pit_state()),
    "SET_PIT2": lambda vm: vm.set_pit2(kvm_pit_state2()),
    "REINJECT_CONTROL": lambda vm: vm.reinject_control(True),
}

REFUSED: list[tuple[str, Call, Call, int]] = [
    ("CREATE_IRQCHIP second time", irqchip, irqchip, errno.EEXIST),
    ("CREATE_IRQCHIP after a vCPU", vcpu, irqchip, errno.EINVAL),
    ("CREATE_PIT no irqchip", NO_PREPARATION, lambda vm: vm.create_pit(), errno.ENOENT),
    ("CREATE_PIT2 no irqchip", NO_PREPARATION, lambda vm: vm.create_pit2(), errno.ENOENT),
    ("CREATE_PIT twice", pit, lambda vm: vm.create_pit(), errno.EEXIST),
    ("CREATE_PIT2 after CREATE_PIT", pit, lambda vm: vm.create_pit2(), errno.EEXIST),
    *(
        (f"{name} no irqchip", NO_PREPARATION, call, errno.ENXIO)
        for name, call in PIT_CALLS.items()
    ),
    *((f"{name} no PIT", irqchip, call, errno.ENXIO) for name, call in PIT_CALLS.items()),
    *(
        (f"GET_IRQCHIP {n:#x}", irqchip, lambda vm, n=n: vm.get_irqchip(n), errno.EINVAL)
        for n in (3, 4, 0xFFFF_FFFF)
    ),
    *((f"SET_IRQCHIP {n:#x}", irqchip, chip(n), errno.EINVAL) for n in (3, 4, 0xFFFF_FFFF)),
    *(
        (
            f"GET_IRQCHIP {n} no irqchip",
            NO_PREPARATION,
            lambda vm, n=n: vm.get_irqchip(n),
            errno.ENXIO,
        )
        for n in (0, 1, 2, 3)
    ),
    *((f"SET_IRQCHIP {n} no irqchip", NO_PREPARATION, chip(n), errno.ENXIO) for n in (0, 3)),
    ("IRQ_LINE no irqchip", NO_PREPARATION, line(0), errno.ENXIO),
    (
        "IRQ_LINE_STATUS no irqchip",
        NO_PREPARATION,
        lambda vm: vm.irq_line_status(0, 1),
        errno.ENXIO,
    ),
    ("CREATE_VCPU id 0 twice", vcpu, vcpu, errno.EEXIST),
    ("CREATE_VCPU id 4096", NO_PREPARATION, lambda vm: vm.create_vcpu(4096), errno.EINVAL),
]


@pytest.mark.parametrize(
    ("before", "call", "number"),
    [row[1:] for row in REFUSED],
    ids=[row[0].replace(" ", "-") for row in REFUSED],
)
def test_refused_as_the_kernel_does(before: Call, call: Call, number: int) -> None:
    vm = fresh()
    before(vm)
    with pytest.raises(KvmError) as caught:
        call(vm)
    assert caught.value.errno == number
    text = str(caught.value)
    assert text.startswith("KVM_")
    assert errno.errorcode[number] in text
    assert "\n" not in text


def irqchip_and_vcpu(vm: ModelVm) -> None:
    vm.create_irqchip()
    vm.create_vcpu(0)


def nmi_twice(vm: ModelVm) -> None:
    made = vm.create_vcpu(0)
    made.nmi()
    made.nmi()


ACCEPTED: list[tuple[str, Call, Call]] = [
    ("CREATE_IRQCHIP", NO_PREPARATION, irqchip),
    ("CREATE_PIT after irqchip", irqchip, lambda vm: vm.create_pit()),
    *(
        (f"CREATE_PIT2 flags {flags:#x}", irqchip, lambda vm, flags=flags: vm.create_pit2(flags))
        for flags in (0, 1, 2, 0xFFFF_FFFF)
    ),
    (
        "CREATE_PIT2 after vCPU",
        irqchip_and_vcpu,
        lambda vm: vm.create_pit2(),
    ),
    *((name, pit, call) for name, call in PIT_CALLS.items()),
    *(
        (
            f"SET_PIT2 flags {flags:#x}",
            pit,
            lambda vm, flags=flags: vm.set_pit2(kvm_pit_state2(flags=flags)),
        )
        for flags in (1, 2, 3, 4, 8, 0xFFFF_FFFF)
    ),
    *((f"GET_IRQCHIP {n}", irqchip, lambda vm, n=n: vm.get_irqchip(n)) for n in (0, 1, 2)),
    *((f"SET_IRQCHIP {n} as read", irqchip, round_trip(n)) for n in (0, 1)),
    *(
        (f"IRQ_LINE {gsi:#x}", irqchip, line(gsi, level))
        for gsi in (0, 15, 23, 24, 4096, 0xFFFF_FFFF)
        for level in (0, 1, 2)
    ),
    ("NMI twice", pit, nmi_twice),
]


@pytest.mark.parametrize(
    ("before", "call"),
    [row[1:] for row in ACCEPTED],
    ids=[f"{row[0].replace(' ', '-')}-{n}" for n, row in enumerate(ACCEPTED)],
)
def test_accepted_as_the_kernel_does(before: Call, call: Call) -> None:
    vm = fresh()
    before(vm)
    call(vm)
    vm.close()


@pytest.mark.parametrize(
    ("gsi", "status"),
    [*((gsi, 1) for gsi in (0, 1, 2, 15)), *((gsi, -1) for gsi in (16, 23, 24, 25, 4095, 4096))],
)
def test_irq_line_status_without_a_vcpu(gsi: int, status: int) -> None:
    vm = fresh()
    vm.create_irqchip()
    assert vm.irq_line_status(gsi, 1) == status
    vm.irq_line(gsi, 0)


def test_irq_line_status_of_the_default_routing() -> None:
    """kernel-contract section 2: PIC unmasked and IOAPIC masked: 1, 1, 2, 0, 2."""
    vm = fresh()
    vm.create_irqchip()
    assert [vm.irq_line_status(3, level) for level in (1, 1, 0, 1, 0)] == [1, 1, 2, 0, 2]


def test_any_byte_can_be_set_and_is_read_back() -> None:
    vm = fresh()
    pit(vm)
    state = vm.get_pit2()
    for channel in state.channels:
        for name, *_ in channel._fields_:
            setattr(channel, name, 0xFF)
    state.flags = 0
    vm.set_pit2(state)
    got = vm.get_pit2()
    assert [c.mode for c in got.channels] == [0xFF] * 3
    assert [c.count for c in got.channels] == [0xFF] * 3
    vm.set_pit2(kvm_pit_state2())
    assert [c.count for c in vm.get_pit2().channels] == [0x10000] * 3, "0 counts 65536"
    vm.close()


@pytest.mark.parametrize("chip_id", [0, 1])
def test_all_ones_go_into_a_pic_and_come_back(chip_id: int) -> None:
    vm = fresh()
    vm.create_irqchip()
    given = kvm_irqchip(chip_id=chip_id)
    for name, *_ in given.chip.pic._fields_:
        setattr(given.chip.pic, name, 0xFF)
    vm.set_irqchip(given)
    assert bytes(vm.get_irqchip(chip_id).chip.pic) == b"\xff" * 16


def test_the_vcpu_answers_get_regs_and_mp_state() -> None:
    vm = fresh()
    irqchip(vm)
    made = vm.create_vcpu(0)
    vm.load(guests.Guest("x", b"\xf4", 0x1000, (0, 0x1234), None))
    assert made.get_mp_state() == 0
    assert made.get_regs().rip == 0x1234
    vm.run(for_ns=100)
    assert made.get_mp_state() == 3, "KVM_MP_STATE_HALTED"
    made.nmi()
    assert made.vcpu.pending.nmi_pending == 1


# --- the door -----------------------------------------------------------------------------------


def test_the_library_example() -> None:
    import kvmtick

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


def test_closing_twice_and_leaving_a_with_block_are_harmless() -> None:
    with Kvm("model").create_vm() as vm:
        vm.create_irqchip()
        vm.create_pit2()
    vm.close()
    assert vm.machine.board.pit is None


def test_a_closed_vm_has_nothing_registered_any_more() -> None:
    vm = fresh()
    pit(vm)
    board = vm.machine.board
    assert len(board.source_ids) == 3
    assert len(board.notifiers) == 2
    ports = len(board.bus)
    vm.close()
    assert len(board.source_ids) == 2
    assert len(board.notifiers) == 0
    assert len(board.bus) == ports - 1
    assert board.apicv_inhibits == 0
