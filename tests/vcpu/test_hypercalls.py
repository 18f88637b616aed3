"""KVM's hypercalls: who may make them, what they do, what they answer."""

import pytest

from kvmtick.cpu.scripted import Hlt, Out, Program, ScriptedEngine, Vmcall
from kvmtick.kvm.model import ModelVcpu, ModelVm

CODE_64, CODE_32, DATA, DATA_OF_RING_3 = 0xA09B, 0xC09B, 0xC093, 0xC0F3
LMA = 1 << 10
PE = 1 << 0
KICK_CPU, CLOCK_PAIRING, SEND_IPI = 5, 9, 10
EPERM, EINVAL, EOPNOTSUPP, ENOSYS = -1, -22, -95, -1000
NMI = 4 << 8
LOGICAL, ALL_BUT_SELF = 1 << 11, 3 << 18
EXIT = 0xF4


class Caller:
    """Two vCPUs; the first makes one hypercall and ends. `vcpu` is the other one."""

    def __init__(self) -> None:
        self.result: int | None = None
        engines = [ScriptedEngine(self.guest), ScriptedEngine(halts)]
        self.engine = engines[0]
        remaining = iter(engines)
        self.vm = ModelVm(engine=lambda: next(remaining))
        self.vm.create_irqchip()
        self.vcpus: list[ModelVcpu] = [self.vm.create_vcpu(0), self.vm.create_vcpu(1)]
        for vcpu in self.vm.machine.board.vcpus:
            assert vcpu.lapic is not None
            vcpu.lapic.mmio_write(0xFEE0_00F0, 4, 0x1FF)
        self.vcpu = self.vm.machine.board.vcpus[1]

    def guest(self) -> Program:
        self.result = yield Vmcall()
        yield Out(EXIT, 0)

    def call(
        self, number: int, *arguments: int, code: int = CODE_64, stack: int = DATA, efer: int = LMA
    ) -> int:
        """RAX as a signed number."""
        names = ("rbx", "rcx", "rdx", "rsi")
        values = dict(zip(names, (*arguments, 0, 0, 0, 0), strict=False))
        state = {"rax": number, "cs_access": code, "ss_access": stack, "cr0": PE, "efer": efer}
        self.engine.set_registers(state | values)
        assert self.vm.run().exit.reason == "done"
        assert self.result is not None
        width = 64 if code == CODE_64 and efer else 32
        return self.result - (1 << width if self.result >> width - 1 else 0)


def halts() -> Program:
    yield Hlt()


def vectors(caller: Caller) -> list[int]:
    """What waits in each local APIC."""
    lapics = [vcpu.lapic for vcpu in caller.vm.machine.board.vcpus]
    return [lapic.irr.bit_length() - 1 for lapic in lapics if lapic is not None]


@pytest.mark.parametrize(
    ("number", "result"), [(1, 0), (11, 0), (CLOCK_PAIRING, EOPNOTSUPP), (2, ENOSYS), (99, ENOSYS)]
)
def test_a_number_has_its_answer(number: int, result: int) -> None:
    assert Caller().call(number) == result


def test_only_ring_0_may_call() -> None:
    caller = Caller()
    assert caller.call(SEND_IPI, 3, 0, 0, 0x41, stack=DATA_OF_RING_3) == EPERM
    assert vectors(caller) == [-1, -1]


@pytest.mark.parametrize(("code", "efer"), [(CODE_32, 0), (CODE_32, LMA), (CODE_64, 0)])
def test_outside_of_64_bit_mode_all_is_32_bits_wide(code: int, efer: int) -> None:
    caller = Caller()
    high = 1 << 32
    assert caller.call(high | SEND_IPI, high | 3, 0, high, high | 0x41, code=code, efer=efer) == 2
    assert vectors(caller) == [0x41, 0x41]


def test_an_ipi_goes_to_the_ids_of_both_bitmaps() -> None:
    """The second starts 64 ids behind the first, or 32; ids have 32 bits."""
    caller = Caller()
    assert caller.call(SEND_IPI, 0b10, 0, 0, 0x41) == 1
    assert vectors(caller) == [-1, 0x41]
    caller = Caller()
    assert caller.call(SEND_IPI, 0, 1, 0, 0x41) == 0
    caller = Caller()
    assert caller.call(SEND_IPI, 0, 0b10, 0xFFFF_FFC0, 0x41) == 1
    assert vectors(caller) == [-1, 0x41]
    caller = Caller()
    assert caller.call(SEND_IPI, 0, 0b10, 0xFFFF_FFE0, 0x41, code=CODE_32) == 1
    assert vectors(caller) == [-1, 0x41]


def test_an_ipi_to_ids_beyond_all_apics_goes_nowhere() -> None:
    caller = Caller()
    assert caller.call(SEND_IPI, 0xFFFF_FFFF, 0, 0xFFFF_FFFF, 0x41) == 0
    assert vectors(caller) == [-1, -1]


def test_an_ipi_may_be_an_nmi() -> None:
    caller = Caller()
    assert caller.call(SEND_IPI, 0b10, 0, 0, NMI) == 1
    assert caller.vcpu.pending.nmi_pending == 1


@pytest.mark.parametrize("icr", [LOGICAL | 0x41, ALL_BUT_SELF | 0x41])
def test_an_ipi_has_no_destination_of_its_own(icr: int) -> None:
    caller = Caller()
    assert caller.call(SEND_IPI, 3, 0, 0, icr) == EINVAL
    assert vectors(caller) == [-1, -1]


def test_an_ipi_needs_the_map_of_ids() -> None:
    caller = Caller()
    # Two APICs of one id: nobody can be looked up.
    lapic = caller.vcpu.lapic
    assert lapic is not None
    lapic.mmio_write(0xFEE0_0020, 4, 0)
    assert caller.call(SEND_IPI, 3, 0, 0, 0x41) == EOPNOTSUPP


def test_kick_wakes_a_cpu_without_an_interrupt() -> None:
    caller = Caller()
    assert caller.call(KICK_CPU, 0, 1) == 0
    lapic = caller.vcpu.lapic
    assert lapic is not None
    assert lapic.pv_unhalted
    assert vectors(caller) == [-1, -1]
