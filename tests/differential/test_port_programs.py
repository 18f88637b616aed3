"""The model's chips against the kernel's: after the same program, the same state, byte for byte.

What a program is, and what of its outcome is a matter of time, says programs.py. The programs run
in one VM a side, which is put back to its first state between them. KVMTICK_SEED=n in the
environment runs the program n alone; a failure says which one it was, and how much of it is needed.
"""

import struct
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass

import pytest

from differential.programs import (
    HANDLER,
    HANDLER_AT,
    IVT,
    LEAST_COUNT,
    LOAD_AT,
    PORT_ACT,
    PORT_EXIT,
    RESULTS_AT,
    WINDOWS,
    Call,
    In,
    Line,
    Operation,
    Out,
    Program,
    Reinject,
    SetIrqchip,
    SetPit2,
    Tick,
    assemble,
    calls,
    pic_registers,
    pit_registers,
    pit_without_times,
    program,
    read_masks,
    settle,
)
from differential.search import LateHostError, again, fewest, search
from kvmtick.abi import HostError
from kvmtick.abi.structs import (
    KVM_PIT_SPEAKER_DUMMY,
    kvm_irqchip,
    kvm_pic_state,
    kvm_pit_state2,
)
from kvmtick.guests import Guest
from kvmtick.irqchip.i8254 import Pit
from kvmtick.irqchip.i8259 import Pic
from kvmtick.kvm.kernel import KernelVm
from kvmtick.kvm.model import ModelVm

PROGRAMS = 2000
FAULT_PROGRAMS = 200
LIMIT_S = 2.0
LATE_RETRIES = 5
LEAST_TIMER_NS = LEAST_COUNT * 1_000_000_000 // 1193181
RAM_BYTES = 0x10000


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a program left: bytes read (masked), answers of KVM_IRQ_LINE_STATUS, the vectors of
    the interrupts that waited at its end, and the states after these.
    """

    reads: bytes
    vectors: tuple[int, ...]
    lines: tuple[int, ...]
    pics: tuple[bytes, bytes]
    pit: bytes

    def differences(self, kernel: "Outcome") -> list[str]:
        """For people: what differs from the kernel's."""
        out = []
        if self.reads != kernel.reads:
            out.append(f"read: model {self.reads.hex(' ')}, kernel {kernel.reads.hex(' ')}")
        if self.vectors != kernel.vectors:
            out.append(f"vectors: model {self.vectors}, kernel {kernel.vectors}")
        if self.lines != kernel.lines:
            out.append(f"KVM_IRQ_LINE_STATUS: model {self.lines}, kernel {kernel.lines}")
        mine, other = self._registers(), kernel._registers()
        return out + [
            f"{name}: model {mine[name]:#x}, kernel {other[name]:#x}"
            for name in mine
            if mine[name] != other[name]
        ]

    def _registers(self) -> dict[str, int]:
        out = {
            f"{chip}.{name}": value
            for chip, state in zip(("master", "slave"), self.pics, strict=True)
            for name, value in pic_registers(kvm_pic_state.from_buffer_copy(state)).items()
        }
        pit = pit_registers(kvm_pit_state2.from_buffer_copy(self.pit))
        return out | {f"pit.{name}": value for name, value in pit.items()}


class Side:
    """One back end's VM, for many programs."""

    def __init__(self, vm: ModelVm | KernelVm) -> None:
        self.vm = vm
        vm.create_irqchip()
        vm.create_pit2(KVM_PIT_SPEAKER_DUMMY)
        vm.create_vcpu()
        self._first_pics = [self._pic_state(chip_id) for chip_id in range(2)]
        self._lines: list[int] = []
        self._calls: list[Call] = []
        vm.write_memory(0, IVT)
        vm.write_memory(HANDLER_AT, HANDLER)

    def outcome(self, program: Program) -> Outcome:
        """Run a program from the first state."""
        self._calls, self._lines = calls(program), []
        self.vm.load(Guest("program", assemble(program), LOAD_AT, (0, LOAD_AT), None))
        masks = read_masks(program)
        self.vm.write_memory(RESULTS_AT, bytes(len(masks) + 2 * WINDOWS))
        try:
            self.run()
            reads = self.vm.read_memory(RESULTS_AT, len(masks))
            words = self.vm.read_memory(RESULTS_AT + len(masks), 2 * WINDOWS)
            vectors = struct.unpack(f"<{WINDOWS}H", words)
            return Outcome(
                reads=bytes(byte & mask for byte, mask in zip(reads, masks, strict=True)),
                vectors=tuple(word - 1 for word in vectors if word),
                lines=tuple(self._lines),
                pics=(self._pic_state(0), self._pic_state(1)),
                pit=bytes(pit_without_times(self.vm.get_pit2())),
            )
        finally:
            self._put_back(program)

    def run(self) -> None:
        """Run the guest until it writes the exit port."""
        raise NotImplementedError

    def act(self, port: int, size_bytes: int, value: int | None) -> None:
        """The guest asks for a call."""
        assert value is not None
        match self._calls[value]:
            case Line(gsi, level):
                self._lines.append(self.vm.irq_line_status(gsi, level))
            case Reinject(on):
                self.vm.reinject_control(on)
            case SetIrqchip(chip_id, state):
                self._set_pic(chip_id, state)
            case SetPit2(state):
                self.vm.set_pit2(kvm_pit_state2.from_buffer_copy(state))

    def _pic_state(self, chip_id: int) -> bytes:
        return bytes(self.vm.get_irqchip(chip_id).chip.pic)

    def _set_pic(self, chip_id: int, state: bytes) -> None:
        chip = kvm_irqchip(chip_id=chip_id)
        chip.chip.pic = kvm_pic_state.from_buffer_copy(state)
        self.vm.set_irqchip(chip)

    def _put_back(self, program: Program) -> None:
        """To the state of a new VM, the PIT's hidden part included: loading a count in mode 2
        forgets what is pending, and mode 255 stops the timer.
        """
        state = kvm_pit_state2()
        for index, channel in enumerate(state.channels):
            channel.count, channel.mode, channel.gate = 0x10000, 2, int(index < 2)
        self.vm.set_pit2(state)
        for channel in state.channels:
            channel.mode = 0xFF
        self.vm.set_pit2(state)
        for gsi in {call.gsi for call in self._calls if isinstance(call, Line)}:
            self.vm.irq_line(gsi, 0)
        for chip_id, first in enumerate(self._first_pics):
            self._set_pic(chip_id, first)
        if any(isinstance(call, Reinject) for call in self._calls):
            self.vm.reinject_control(True)


class ModelSide(Side):
    """The model. Its VM does not end with the guest: the exit port is the test's own."""

    vm: ModelVm

    def run(self) -> None:
        done = False

        def on_exit(port: int, size_bytes: int, value: int | None) -> None:
            nonlocal done
            done = True
            assert self.vm.machine.vcpu is not None
            self.vm.machine.vcpu.engine.kick()

        handlers = {PORT_ACT: self.act, PORT_EXIT: on_exit}
        run = self.vm.run(until=lambda: done, limit_s=LIMIT_S, handlers=handlers)
        assert run.exit.reason == "until", run.exit


class KernelSide(Side):
    """/dev/kvm."""

    vm: KernelVm

    def outcome(self, program: Program) -> Outcome:
        """As on the other side; a run on a late host is made again."""
        for _ in range(LATE_RETRIES):
            with suppress(LateHostError):
                return super().outcome(program)
        raise LateHostError

    def run(self) -> None:
        begin_ns = time.monotonic_ns()
        run = self.vm.run(handlers={PORT_ACT: self.act}, limit_s=LIMIT_S)
        assert run.exit.reason == "done", run.exit
        if time.monotonic_ns() - begin_ns > LEAST_TIMER_NS * 3 // 4:
            raise LateHostError


@pytest.fixture(scope="module")
def sides() -> Iterator["Sides"]:
    """A VM on each side; a skip that says why where /dev/kvm cannot be used."""
    try:
        kernel = KernelVm()
    except HostError as error:
        pytest.skip(f"needs /dev/kvm: {error}")
    with kernel, ModelVm() as model:
        yield ModelSide(model), KernelSide(kernel)


Sides = tuple[ModelSide, KernelSide]


def differences(sides: Sides, program: Program) -> list[str]:
    """What differs after a program on both sides, one after the other.

    A difference counts if it shows twice: a timer's interrupt may be lost in time on a host that
    is itself a guest, and then a `Tick` comes too late. Raises `LateHostError`.
    """
    found: list[str] = []
    for _ in range(2):
        outcomes: list[Outcome] = []
        for side in sides:
            try:
                outcomes.append(side.outcome(program))
            except LateHostError:
                raise
            except Exception as error:  # whatever a chip of the model raises is a difference
                return [f"{type(side).__name__}: {error!r}"]
        model, kernel = outcomes
        found = model.differences(kernel)
        if not found:
            break
    return found


def check(sides: Sides, seed: int) -> None:
    """AssertionError with the seed, what of the program is needed and all that differs.

    Raises `LateHostError` if the host was too late to tell.
    """
    whole = program(seed)
    found = differences(sides, whole)
    if not found:
        return

    def differs(operations: list[Operation]) -> list[str]:
        with suppress(LateHostError):
            return differences(sides, settle(tuple(operations)))
        return []

    needed = fewest(list(whole), lambda fewer: bool(differs(fewer)))
    found = differs(needed) or found
    lines = [f"program {seed}:", *found, "program:", *(f"  {op}," for op in needed)]
    raise AssertionError("\n".join([*lines, again(seed, __file__)]))


def test_random_programs_leave_the_same_state(sides: Sides) -> None:
    search(PROGRAMS, lambda seed: check(sides, seed))


def test_the_comparison_can_fail(sides: Sides) -> None:
    """Different programs on the two sides: each kind of difference is seen."""
    model, kernel = sides
    pairs: list[tuple[Program, Program, str]] = [
        ((Out(0x21, 1), In(0x21)), (Out(0x21, 2), In(0x21)), "read"),
        ((Line(3, 1),), (Out(0x21, 8), Line(3, 1)), "KVM_IRQ_LINE_STATUS"),
        ((Out(0xA1, 1),), (Out(0xA1, 2),), "slave.imr"),
        ((Out(0x43, 0x70),), (Out(0x43, 0x72),), "pit.channels[1].mode"),
        ((Tick(),), (), "vectors"),
        ((Out(0x21, 1), Tick()), (Out(0x21, 1),), "master.irr"),
    ]
    for ours, theirs, kind in pairs:
        try:
            found = model.outcome(ours).differences(kernel.outcome(theirs))
        except LateHostError:
            pytest.skip("this host is too slow: a program took longer than the timers it starts")
        assert any(difference.startswith(kind) for difference in found), (kind, found)


def _leave_in_service(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pic, "_end_service", lambda self, chip, pin: None)


def _latch_no_status(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pit, "_latch_status", lambda self, index: None)


def _stumble_over_an_initialisation(monkeypatch: pytest.MonkeyPatch) -> None:
    def stumble(self: Pic, chip: object, value: int) -> None:
        raise ArithmeticError

    monkeypatch.setattr(Pic, "_write_icw1", stumble)


@pytest.mark.parametrize(
    ("plant", "kind"),
    [
        (_leave_in_service, "isr: model"),
        (_latch_no_status, "status_latched: model 0x0, kernel 0x1"),
        (_stumble_over_an_initialisation, "ModelSide: ArithmeticError"),
    ],
)
def test_a_fault_of_the_model_is_found(
    sides: Sides,
    monkeypatch: pytest.MonkeyPatch,
    plant: Callable[[pytest.MonkeyPatch], None],
    kind: str,
) -> None:
    monkeypatch.delenv("KVMTICK_SEED", raising=False)
    with monkeypatch.context() as broken:
        plant(broken)
        with pytest.raises(AssertionError, match=kind) as failure:
            search(FAULT_PROGRAMS, lambda seed: check(sides, seed))
    told = str(failure.value).splitlines()
    seed = int(told[0].removeprefix("program ").rstrip(":"))
    needed = len(told) - told.index("program:") - 2
    assert 0 < needed <= len(program(seed))
    assert told[-1].startswith(f"again: KVMTICK_SEED={seed} pytest ")
    check(sides, seed)
