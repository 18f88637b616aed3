"""The model's IOAPIC and local APICs against the kernel's: after the same program, the same state.

What a program is says apic_programs.py. The programs of a sequence run one after the other in one
VM a side, and all there is to see is compared after each. KVMTICK_SEED=n in the environment runs
the sequence n alone; a failure says which one it was, and tells the shortest program it found.
"""

import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from differential import apic_programs
from differential.apic_programs import (
    COUNTS,
    GP_AT,
    IMAGE,
    IOAPIC,
    IVT,
    LAPIC,
    LEAST_TIMER_S,
    LOAD_AT,
    MSR_APICBASE,
    MSR_TSC,
    MSR_TSC_DEADLINE,
    PORT_DONE,
    SVR,
    TMCCT,
    TMICT,
    TPR,
    Access,
    Config,
    GetEvents,
    GetMsr,
    Mailbox,
    Msi,
    Nmi,
    Operation,
    Program,
    Routing,
    Sequence,
    SetIoapic,
    SetLapic,
    SetMpState,
    SetMsr,
    comparable,
    cpuid_entries,
    nmis_taken,
    read_mask,
    sequence,
    show,
)
from differential.programs import Line, SetIrqchip
from differential.search import LateHostError, again, fewest, search, skip_if_too_late
from kvmtick.abi import HostError, KvmError
from kvmtick.abi.caps import KVM_CAP_X2APIC_API
from kvmtick.abi.exits import ExitIo, ExitMmio
from kvmtick.abi.structs import (
    KVM_MP_STATE_RUNNABLE,
    kvm_ioapic_state,
    kvm_irq_routing_entry,
    kvm_irqchip,
    kvm_pic_state,
    struct_fields,
)
from kvmtick.cpu.engine import ExitReason
from kvmtick.guests import Guest
from kvmtick.irqchip.delivery import IrqDelivery
from kvmtick.irqchip.ioapic import Ioapic
from kvmtick.irqchip.lapic import Lapic
from kvmtick.irqchip.routing import IrqRouting
from kvmtick.kvm.kernel import KernelVm
from kvmtick.kvm.model import ModelVm
from kvmtick.vcpu.events import PendingEvents

SEQUENCES = 230
KERNEL_SEQUENCES = 40
FAULT_SEQUENCES = 60
LIMIT_S = 30.0
LATE_RETRIES = 3
MOST_SYNCS = 6
MOST_ENTRIES = 50
BUDGET = 10_000
SHRINK_S = 20.0

Answer = tuple[Any, ...]
"""What an operation gave."""

Snapshot = dict[str, int | bytes]
"""All that KVM tells of a VM's interrupt world, by name."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a program gave, operation by operation, and the state after it."""

    answers: tuple[Answer, ...]
    state: Snapshot

    def differences(self, other: "Outcome", program: Program) -> list[str]:
        """For people: what differs from the other side, which is the kernel."""
        out = []
        for operation, mine, theirs in zip(program, self.answers, other.answers, strict=True):
            if mine != theirs:
                out.append(f"{show(operation)}: {_show(mine)}, kernel {_show(theirs)}")
        for name, value in self.state.items():
            if value != other.state[name]:
                out += _field_differences(name, value, other.state[name])
        return out


def _show(value: object) -> str:
    if isinstance(value, int):
        return hex(value)
    return "(" + ", ".join(map(_show, value)) + ")" if isinstance(value, tuple) else str(value)


def _field_differences(name: str, mine: int | bytes, theirs: int | bytes) -> list[str]:
    if isinstance(mine, int) or isinstance(theirs, int):
        return [f"{name}: {_show(mine)}, kernel {_show(theirs)}"]
    if name.startswith("lapic"):
        words = (
            (f"[{at:#x}]", mine[at : at + 4], theirs[at : at + 4]) for at in range(0, len(mine), 4)
        )
        return [
            f"{name}{where}: {int.from_bytes(a, 'little'):#x}, kernel "
            f"{int.from_bytes(b, 'little'):#x}"
            for where, a, b in words
            if a != b
        ]
    struct = kvm_ioapic_state if name == "ioapic" else kvm_pic_state
    pairs = zip(
        struct_fields(struct.from_buffer_copy(mine)),
        struct_fields(struct.from_buffer_copy(theirs)),
        strict=True,
    )
    return [
        f"{name}.{field}: {_show(a)}, kernel {_show(b)}" for (field, a), (_, b) in pairs if a != b
    ]


class Side:
    """One back end's VM, for the programs of a sequence."""

    def __init__(self, vm: Any, config: Config) -> None:
        self.vm = vm
        self.config = config
        vm.create_irqchip()
        if config.x2apic_api:
            vm.enable_cap(KVM_CAP_X2APIC_API, config.x2apic_api)
        self.vcpus: list[Any] = [vm.create_vcpu(vcpu_id) for vcpu_id in range(config.vcpus)]
        if config.x2apic:
            for vcpu in self.vcpus:
                vcpu.set_cpuid2(cpuid_entries())
        self.mailboxes: list[Mailbox] = []
        if config.guest:
            vm.load(Guest("apic", IMAGE, LOAD_AT, (0, LOAD_AT), None))
            vm.write_memory(0, IVT)
            vm.write_memory(0xFFF0, b"\xeb\xfe")
            self.mailboxes = [Mailbox(self.ram(), index) for index in range(config.vcpus)]

    def ram(self) -> Any:
        """Guest RAM from gpa 0."""
        raise NotImplementedError

    def enter(self, index: int) -> None:
        """Let a vCPU into the guest until it tells that it has done what its mailbox holds."""
        raise NotImplementedError

    def run(self, program: Program) -> Outcome:
        """One program, from the state the last one left."""
        answers: list[Answer] = []
        dirty = False
        for operation in program:
            if not isinstance(operation, Access):
                answers.append(self.call(operation))
                dirty = True
                continue
            if dirty:
                self._sync()
            if operation.vcpu not in self.runnable():
                answers.append(("not running",))
                continue
            value = self._from_now(operation.vcpu, operation.address, operation.value)
            self.mailboxes[operation.vcpu].post(replace(operation, value=value))
            self.enter(operation.vcpu)
            answers.append(self.read(operation))
            self._sync()
            dirty = False
        self._sync()
        return Outcome(tuple(answers), self.snapshot())

    def _sync(self) -> None:
        """Every runnable vCPU enters the guest, until it has no NMI to take."""
        for index in self.runnable():
            for _ in range(MOST_SYNCS):
                self.mailboxes[index].post(None)
                self.enter(index)
                if not self.has_nmi(index):
                    break

    def close(self) -> None:
        self.vm.close()

    def runnable(self) -> list[int]:
        """Which vCPUs can enter the guest; takes INITs and SIPIs that wait."""
        if not self.config.guest:
            return []
        states = [vcpu.get_mp_state() for vcpu in self.vcpus]
        return [index for index, state in enumerate(states) if state == KVM_MP_STATE_RUNNABLE]

    def has_nmi(self, index: int) -> bool:
        nmi = self.vcpus[index].get_vcpu_events().nmi
        return bool(nmi.pending or nmi.injected)

    def read(self, access: Access) -> Answer:
        """The answer of an access that is done."""
        value, fault = self.mailboxes[access.vcpu].answer()
        mask = read_mask(access)
        return (int(value != 0) if mask is None else value & mask, fault)

    def call(self, operation: Operation) -> Answer:
        """Any operation but an `Access`."""
        try:
            return self._call(operation)
        except KvmError as error:
            return ("errno", error.errno)

    def _call(self, operation: Operation) -> Answer:
        vm = self.vm
        match operation:
            case Line(gsi, level):
                return (vm.irq_line_status(gsi, level),)
            case Msi(address, data, flags):
                return (vm.signal_msi(address, data, flags),)
            case Routing(entries, flags):
                vm.set_gsi_routing([_route(*entry) for entry in entries], flags)
            case SetIrqchip(chip_id, state):
                chip = kvm_irqchip(chip_id=chip_id)
                chip.chip.pic = kvm_pic_state.from_buffer_copy(state)
                vm.set_irqchip(chip)
            case SetIoapic(state):
                chip = kvm_irqchip(chip_id=2)
                chip.chip.ioapic = kvm_ioapic_state.from_buffer_copy(state)
                vm.set_irqchip(chip)
            case SetLapic(index, changes):
                lapic = self.vcpus[index].get_lapic()
                for offset, value in changes:
                    lapic.set_reg(offset, value & 0xFFFF_FFFF)
                if lapic.reg(TMICT) and lapic.reg(TMCCT) < 1 << 31:
                    # a one-shot count that is over would fire at once
                    lapic.set_reg(TMCCT, lapic.reg(TMICT))
                self.vcpus[index].set_lapic(lapic)
            case Nmi(index):
                self.vcpus[index].nmi()
            case SetMsr(index, msr, value):
                return (self.vcpus[index].set_msrs({msr: self._from_now(index, msr, value)}),)
            case GetMsr(index, msr):
                found = self.vcpus[index].get_msrs([msr])
                if read_mask(operation) is None:
                    found = {msr: int(value != 0) for msr, value in found.items()}
                return tuple(found.values())
            case SetMpState(index, mp_state):
                self.vcpus[index].set_mp_state(mp_state)
            case GetEvents(index):
                return (_events(self.vcpus[index].get_vcpu_events()),)
            case _:
                raise AssertionError(operation)
        return ()

    def _from_now(self, index: int, msr: int, value: int) -> int:
        """The value for an MSR; a TSC deadline counts from now."""
        if msr != MSR_TSC_DEADLINE or not value:
            return value
        return int(self.vcpus[index].get_msrs([MSR_TSC])[MSR_TSC]) + value

    def snapshot(self) -> Snapshot:
        """All that is compared after a program."""
        vm = self.vm
        state: Snapshot = {
            "master": bytes(vm.get_irqchip(0).chip.pic),
            "slave": bytes(vm.get_irqchip(1).chip.pic),
            "ioapic": bytes(vm.get_irqchip(2).chip.ioapic),
        }
        for index, vcpu in enumerate(self.vcpus):
            state[f"mp_state {index}"] = vcpu.get_mp_state()
            state[f"lapic {index}"] = comparable(bytes(vcpu.get_lapic()), self.config)
            state |= {f"{name} {index}": n for name, n in _events(vcpu.get_vcpu_events())}
            msrs = vcpu.get_msrs([MSR_APICBASE, MSR_TSC_DEADLINE])
            state[f"IA32_APIC_BASE {index}"] = msrs[MSR_APICBASE]
            state[f"IA32_TSC_DEADLINE {index}"] = int(msrs[MSR_TSC_DEADLINE] != 0)
        if self.config.guest:
            state["NMIs taken"] = nmis_taken(self.ram())
        return state


def _route(
    gsi: int, type_: int, flags: int, first: int, second: int, third: int
) -> kvm_irq_routing_entry:
    entry = kvm_irq_routing_entry(gsi=gsi, type=type_, flags=flags)
    entry.u.msi.address_lo, entry.u.msi.address_hi, entry.u.msi.data = first, second, third
    return entry


def _events(events: Any) -> tuple[tuple[str, int], ...]:
    return (
        ("nmi.pending", events.nmi.pending + events.nmi.injected),
        ("nmi.masked", events.nmi.masked),
        ("exception", events.exception.injected + events.exception.pending),
        ("interrupt", events.interrupt.injected),
        ("sipi_vector", events.sipi_vector),
    )


class GuestLostError(Exception):
    """A vCPU has left the guest's program."""


class KernelSide(Side):
    """/dev/kvm; one thread enters the vCPUs in turn."""

    vm: KernelVm

    def __init__(self, config: Config) -> None:
        super().__init__(KernelVm(), config)
        self._begin_s = time.monotonic()
        self._bounds = ExitStack()
        if config.guest:
            for vcpu in self.vm.vcpus:
                self._bounds.enter_context(vcpu.file.bounded(LIMIT_S))
            self.enter(0)

    def ram(self) -> Any:
        return self.vm.memory.ram

    def close(self) -> None:
        self._bounds.close()
        super().close()

    def run(self, program: Program) -> Outcome:
        outcome = super().run(program)
        if time.monotonic() - self._begin_s > LEAST_TIMER_S * 0.7:
            raise LateHostError
        return outcome

    def enter(self, index: int) -> None:
        vcpu = self.vm.vcpus[index]
        mailbox = self.mailboxes[index]
        while True:
            exit_ = vcpu.file.enter()
            if isinstance(exit_, ExitMmio):
                if not exit_.is_write:
                    vcpu.answer(b"\xff" * exit_.len)
            elif not isinstance(exit_, ExitIo):
                raise GuestLostError(f"kernel, vCPU {index}: {exit_} at {vcpu.get_regs()}")
            elif exit_.port == PORT_DONE + index and exit_.is_write:
                if mailbox.is_done:
                    return
            elif not exit_.is_write:
                vcpu.answer(b"\xff" * exit_.size * exit_.count)


class ModelSide(Side):
    """The model; its vCPUs are entered in turn as well, as often as it takes."""

    vm: ModelVm

    def __init__(self, config: Config) -> None:
        super().__init__(ModelVm(), config)
        self._left = False
        machine = self.vm.machine
        machine.ports.handlers = {PORT_DONE + index: self._leave for index in range(config.vcpus)}
        if config.guest:
            self.enter(0)

    def ram(self) -> Any:
        return self.vm.machine.ram

    def enter(self, index: int) -> None:
        machine, vcpu = self.vm.machine, self.vcpus[index].vcpu
        mailbox = self.mailboxes[index]
        for _ in range(MOST_ENTRIES):
            machine.board.queue.run_due(machine.clock)
            if vcpu.requests:
                vcpu.serve_requests()
            self._left = False
            reason = vcpu.enter(BUDGET)
            if reason == ExitReason.INTERNAL_ERROR:
                raise GuestLostError(f"model, vCPU {index}: {vcpu.engine.error}")
            if self._left and mailbox.is_done:
                return
        raise GuestLostError(f"model, vCPU {index}: {vcpu.engine.registers()}")

    def _leave(self, port: int, size_bytes: int, value: int | None) -> int | None:
        """A guest tells that it has done something, or that it has nothing to do."""
        self.vcpus[port - PORT_DONE].vcpu.engine.kick()
        self._left = True
        return None


# Comparing.


def _compare(left: Side, right: Side, program: Program) -> list[str]:
    """What differs after the next program."""
    outcome: Outcome | Exception
    try:
        outcome = left.run(program)
    except LateHostError:
        raise
    except Exception as error:  # whatever a chip of the model raises is a difference
        outcome = error
    try:
        kernel = right.run(program)
    except GuestLostError as error:
        return [] if isinstance(outcome, GuestLostError) else [str(error)]
    if isinstance(outcome, Outcome):
        return outcome.differences(kernel, program)
    return [repr(outcome)]


def first_difference(
    make: Callable[[Config], Side], reference: Callable[[Config], Side], of: Sequence
) -> tuple[int, list[str]] | None:
    """The number of the first program whose outcomes differ, and how; None: none.

    Raises `LateHostError` if the host is late every time.
    """
    for _ in range(LATE_RETRIES):
        with suppress(LateHostError), ExitStack() as stack:
            left, right = make(of.config), reference(of.config)
            stack.callback(left.close)
            stack.callback(right.close)
            for number, program in enumerate(of.programs):
                found = _compare(left, right, program)
                if found:
                    return number, found
            return None
    raise LateHostError


def shortest(
    make: Callable[[Config], Side], reference: Callable[[Config], Side], failing: Sequence
) -> tuple[Program, list[str]]:
    """Leave out of a sequence what the difference does not need: operations, then their parts."""
    deadline_s = time.monotonic() + SHRINK_S

    def differs(operations: list[Operation]) -> list[str]:
        if time.monotonic() > deadline_s:
            return []
        found = None
        with suppress(LateHostError):
            whole = replace(failing, programs=(tuple(operations),))
            found = first_difference(make, reference, whole)
        return found[1] if found else []

    operations = [operation for program in failing.programs for operation in program]
    found = differs(operations)
    if not found:
        return (), []
    operations = fewest(operations, lambda fewer: bool(differs(fewer)))
    for at in range(len(operations)):
        operations = _fewest_parts(operations, at, lambda fewer: bool(differs(fewer)))
    deadline_s += SHRINK_S
    return tuple(operations), differs(operations) or found


def _fewest_parts(
    operations: list[Operation], at: int, is_enough: Callable[[list[Operation]], bool]
) -> list[Operation]:
    """Leave out what an operation that has parts can do without."""
    operation = operations[at]

    def with_parts(parts: list[Any]) -> list[Operation]:
        changed: Operation = operation
        if isinstance(operation, SetLapic):
            changed = replace(operation, changes=tuple(parts))
        elif isinstance(operation, Routing):
            changed = replace(operation, entries=tuple(parts))
        return [*operations[:at], changed, *operations[at + 1 :]]

    if isinstance(operation, SetLapic):
        parts: list[Any] = list(operation.changes)
    elif isinstance(operation, Routing):
        parts = list(operation.entries)
    else:
        return operations
    return with_parts(fewest(parts, lambda fewer: is_enough(with_parts(fewer))))


def check(
    make: Callable[[Config], Side], reference: Callable[[Config], Side], of: Sequence
) -> None:
    """AssertionError with the seed, the shortest program and all that differs.

    Raises `LateHostError` if the host was too late to tell.
    """
    difference = first_difference(make, reference, of)
    if difference is None:
        return
    number, found = difference
    upto = replace(of, programs=of.programs[: number + 1])
    operations, less = shortest(make, reference, upto)
    if not less:  # only as separate programs: tell the last as it is
        operations, less = of.programs[number], found
    lines = [f"sequence {of.seed}, program {number}: {of.config}", *less, "program:"]
    lines += [f"  {show(operation)}," for operation in operations]
    lines.append(again(of.seed, __file__))
    raise AssertionError("\n".join(lines))


@pytest.fixture
def kvm() -> None:
    """Skip, saying why, where /dev/kvm cannot be used."""
    try:
        KernelVm().close()
    except HostError as error:
        pytest.skip(f"needs /dev/kvm: {error}")


needs_kvm = pytest.mark.usefixtures("kvm")


@needs_kvm
def test_random_programs_leave_the_same_state() -> None:
    search(SEQUENCES, lambda seed: check(ModelSide, KernelSide, sequence(seed)))


@needs_kvm
def test_the_kernel_agrees_with_itself() -> None:
    """What differs between two runs on the kernel must not be compared."""
    search(KERNEL_SEQUENCES, lambda seed: check(KernelSide, KernelSide, sequence(seed)))


def test_a_difference_is_told_though_the_host_is_late_from_then_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers = [(0, ["what differs"])]

    def once(*_: object) -> tuple[int, list[str]]:
        if not answers:
            raise LateHostError
        return answers.pop()

    monkeypatch.setattr(sys.modules[__name__], "first_difference", once)
    with pytest.raises(AssertionError, match="what differs"):
        check(ModelSide, KernelSide, sequence(0))
    with pytest.raises(LateHostError):
        check(ModelSide, KernelSide, sequence(0))


@pytest.mark.parametrize(("late", "skips"), [(2, False), (3, True)])
def test_late_seeds_are_left_out_as_long_as_they_are_few(
    monkeypatch: pytest.MonkeyPatch, late: int, skips: bool
) -> None:
    monkeypatch.delenv("KVMTICK_SEED", raising=False)
    looked_at: list[int] = []

    def look(seed: int) -> None:
        looked_at.append(seed)
        if seed < late:
            raise LateHostError

    if skips:
        with pytest.raises(pytest.skip.Exception, match="3 of 20 seeds"):
            search(20, look)
    else:
        search(20, look)
    assert looked_at == list(range(20))


def test_the_guest_is_what_its_source_says() -> None:
    if (nasm := shutil.which("nasm")) is None:
        pytest.skip("needs nasm")
    source = Path(apic_programs.__file__).with_name("apic_guest.asm")
    command = [nasm, "-f", "bin", "-Wall", "-Werror", "-o", "/dev/stdout", str(source)]
    assert subprocess.run(command, check=True, capture_output=True, timeout=60).stdout == IMAGE
    assert IMAGE[GP_AT - LOAD_AT - 1] == 0x90


ON = Access(0, "w32", LAPIC + SVR, 0x1FF)
ALONE = Config(vcpus=1, guest=True, x2apic=True, x2apic_api=0)


@needs_kvm
@pytest.mark.parametrize(
    ("one", "other", "kind"),
    [
        ((Access(0, "r32", LAPIC + SVR),), (Access(0, "r32", LAPIC + TPR),), "Access"),
        ((Access(0, "rdmsr", 0x808),), (Access(0, "rdmsr", 0x1B),), "Access"),
        ((Line(3, 1),), (Line(30, 1),), "Line"),
        ((ON, Msi(LAPIC, 0x45)), (ON, Msi(LAPIC, 0x46)), "lapic 0[0x220]"),
        ((Msi(LAPIC, 0x45, 2),), (Msi(LAPIC, 0x45),), "Msi"),
        ((Access(0, "out", 0x21, 1),), (Access(0, "out", 0x21, 2),), "master.imr"),
        ((Line(12, 1),), (Line(13, 1),), "slave.irr"),
        ((Access(0, "w32", IOAPIC, 0x12),), (Access(0, "w32", IOAPIC, 0x14),), "ioapic.ioregsel"),
        ((Nmi(0),), (GetEvents(0),), "NMIs taken"),
        ((SetMsr(0, 0x1B, 0xFEE00100),), (SetMsr(0, 0x1B, 0xFEE00900),), "IA32_APIC_BASE 0"),
        ((Access(0, "w32", LAPIC + TMICT, COUNTS[1]),), (ON,), "lapic 0[0x390]"),
    ],
)
def test_the_comparison_can_fail(one: Program, other: Program, kind: str) -> None:
    """Different programs on two kernels: each kind of difference is seen."""
    with ExitStack() as stack:
        left, right = KernelSide(ALONE), KernelSide(ALONE)
        stack.callback(left.close)
        stack.callback(right.close)
        try:
            found = left.run(one).differences(right.run(other), one)
        except LateHostError:
            pytest.skip("this host is too slow: a program took longer than the timers it starts")
    assert any(difference.startswith(kind) for difference in found), found


def _forget_the_eoi(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ioapic, "update_eoi", lambda self, lapic, vector, trig_mode_level: None)


def _take_any_table(monkeypatch: pytest.MonkeyPatch) -> None:
    set_table = IrqRouting.set_table

    def lenient(self: IrqRouting, entries: Any, flags: int = 0) -> None:
        with suppress(KvmError):
            set_table(self, entries, flags)

    monkeypatch.setattr(IrqRouting, "set_table", lenient)


def _count_one_destination(monkeypatch: pytest.MonkeyPatch) -> None:
    deliver = IrqDelivery.deliver
    monkeypatch.setattr(IrqDelivery, "deliver", lambda *args: min(1, deliver(*args)))


def _reset_at_init(monkeypatch: pytest.MonkeyPatch) -> None:
    reset = Lapic.reset
    monkeypatch.setattr(Lapic, "reset", lambda self, init_event: reset(self, False))


def _refuse_no_base(monkeypatch: pytest.MonkeyPatch) -> None:
    set_base = Lapic.set_base

    def lenient(self: Lapic, value: int, host_initiated: bool = False) -> bool:
        set_base(self, value, host_initiated)
        return True

    monkeypatch.setattr(Lapic, "set_base", lenient)


def _leave_the_ppr(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Lapic, "_update_ppr", lambda self: None)


def _let_three_nmis_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    def queue_nmi(self: PendingEvents, blocked: bool) -> None:
        self.nmi_pending = min(self.nmi_pending + 1, 3)

    monkeypatch.setattr(PendingEvents, "queue_nmi", queue_nmi)


def _forget_the_level(monkeypatch: pytest.MonkeyPatch) -> None:
    accept_irq = Lapic.accept_irq
    monkeypatch.setattr(
        Lapic, "accept_irq", lambda self, mode, vector, level, trigger: accept_irq(
            self, mode, vector, level, False
        )
    )  # fmt: skip


@needs_kvm
@pytest.mark.parametrize(
    "plant",
    [
        _forget_the_eoi,
        _take_any_table,
        _count_one_destination,
        _reset_at_init,
        _refuse_no_base,
        _leave_the_ppr,
        _let_three_nmis_wait,
        _forget_the_level,
    ],
)
def test_a_fault_of_the_model_is_found(
    monkeypatch: pytest.MonkeyPatch, plant: Callable[[pytest.MonkeyPatch], None]
) -> None:
    late = 0
    for seed in range(FAULT_SEQUENCES):
        try:
            with monkeypatch.context() as broken:
                plant(broken)
                found = first_difference(ModelSide, KernelSide, sequence(seed))
            if found and first_difference(ModelSide, KernelSide, sequence(seed)) is None:
                return
        except LateHostError:
            late += 1
    skip_if_too_late(late, FAULT_SEQUENCES)
    pytest.fail(f"not found in {FAULT_SEQUENCES} sequences")
