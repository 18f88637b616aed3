"""MSRs and CR8 of a vCPU, as far as they need no kernel to compare with (tests/conformance)."""

import pytest

from kvmtick.cpu.engine import CPU_MSRS
from kvmtick.cpu.scripted import Out, Program, Rdmsr, Rdtsc, Routine, ScriptedEngine, Spin, Wrmsr
from kvmtick.guests import LOAD_AT, Guest
from kvmtick.guests.start import long_mode
from kvmtick.kvm.model import ModelVcpu, ModelVm

EXIT = 0xF4
TSC, UNKNOWN, X2APIC_ID, PAT = 0x10, 0xDEAD_BEEF, 0x802, 0x277
STAR, EFER, FS_BASE, TSC_AUX, SYSENTER_CS, SYSENTER_EIP = (
    0xC000_0081,
    0xC000_0080,
    0xC000_0100,
    0xC000_0103,
    0x174,
    0x176,
)
TASKPRI, SPIV, IRR = 0x80, 0xF0, 0x200
PAGE_TABLES = ((0x1000, 0x2007), (0x2000, 0x3007), (0x3000, 0x87))
"""The first 2 MiB, in one large page."""


def scripted(guest: Routine, handlers: dict[int, Routine] | None = None) -> ModelVm:
    vm = ModelVm(engine=lambda: ScriptedEngine(guest, handlers))
    vm.create_irqchip()
    vm.create_vcpu(0)
    return vm


def in_long_mode(code: str, *, irqchip: bool = True) -> tuple[ModelVm, ModelVcpu]:
    """A VM that runs `code` in 64-bit mode, without an IDT."""
    vm = ModelVm()
    if irqchip:
        vm.create_irqchip()
    vcpu = vm.create_vcpu(0)
    tables = tuple((gpa, entry.to_bytes(8, "little")) for gpa, entry in PAGE_TABLES)
    start = long_mode(LOAD_AT, 0x1000)
    image = bytes.fromhex(code)
    vm.load(Guest("long", image, LOAD_AT, (0, LOAD_AT), None, pieces=tables, start=start))
    return vm, vcpu


# --- the end of a strict run ----------------------------------------------------------------------


def ends() -> Program:
    yield Out(EXIT, 0)


@pytest.mark.parametrize(
    ("access", "name"), [(Rdmsr(UNKNOWN), "read"), (Wrmsr(UNKNOWN, 1), "write")]
)
def test_an_unknown_msr_ends_a_strict_run_only(access: Rdmsr | Wrmsr, name: str) -> None:
    def guest() -> Program:
        yield access

    with scripted(guest, {13: ends}) as vm:
        assert vm.run().exit.reason == "done"
    with scripted(guest, {13: ends}) as vm:
        vm.machine.strict = True
        exit_ = vm.run().exit
    assert exit_.reason == "guest-error"
    assert exit_.detail == (
        f"vCPU 0 at 0x0: {name} of the unknown MSR 0xdeadbeef; without strict it gets #GP"
    )


def test_the_end_names_the_instruction() -> None:
    vm, _ = in_long_mode("b9efbeadde 0f32")  # mov ecx, 0xdeadbeef; rdmsr
    with vm:
        vm.machine.strict = True
        assert vm.run().exit.detail.startswith("vCPU 0 at 0x8005: read of")


@pytest.mark.parametrize(
    "access", [Rdmsr(X2APIC_ID), Wrmsr(PAT, 2), Wrmsr(0xFE, 0)], ids=["mode", "value", "read only"]
)
def test_what_is_refused_for_its_value_or_mode_is_no_unknown_msr(access: Rdmsr | Wrmsr) -> None:
    def guest() -> Program:
        yield access

    with scripted(guest, {13: ends}) as vm:
        vm.machine.strict = True
        assert vm.run().exit.reason == "done"


# --- the engine's, through KVM_GET_MSRS and KVM_SET_MSRS ----------------------------------------


def test_user_space_reads_and_writes_the_cpus_own() -> None:
    values = {index: 0x10 + index % 16 for index in CPU_MSRS if index != EFER}
    with ModelVm() as vm:
        vm.create_irqchip()
        vcpu = vm.create_vcpu(0)
        assert vcpu.set_msrs(values) == len(values)
        assert vcpu.get_msrs(values) == values
        assert vcpu.vcpu.engine.registers()["kernel_gs_base"] == values[0xC000_0102]


@pytest.mark.parametrize(
    ("index", "value", "kept"),
    [
        (FS_BASE, 1 << 47, None),
        (FS_BASE, (1 << 64) - (1 << 47), (1 << 64) - (1 << 47)),
        (SYSENTER_EIP, 1 << 50, None),
        (TSC_AUX, 1 << 32, None),
        (TSC_AUX, (1 << 32) - 1, (1 << 32) - 1),
        (SYSENTER_CS, 1 << 33 | 5, 5),
        (STAR, (1 << 64) - 1, (1 << 64) - 1),
        (EFER, 1 << 1, None),
        (EFER, 0xD01, 0x901),
    ],
)
def test_user_space_cannot_write_what_no_cpu_has(index: int, value: int, kept: int | None) -> None:
    """EFER.LMA follows paging."""
    with ModelVm() as vm:
        vm.create_irqchip()
        vcpu = vm.create_vcpu(0)
        assert vcpu.set_msrs({index: value}) == (kept is not None)
        assert vcpu.get_msrs([index]) == {index: kept or 0}


# --- time -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0, 5_000_000, (1 << 64) - 1])
def test_rdtsc_counts_from_a_write_on(value: int) -> None:
    seen: list[int] = []

    def guest() -> Program:
        yield Spin(1000)
        yield Wrmsr(TSC, value)
        seen.append((yield Rdtsc()))
        seen.append((yield Rdmsr(TSC)))
        yield Out(EXIT, 0)

    with scripted(guest) as vm:
        assert vm.run().exit.reason == "done"
    assert seen == [(value + 1) % (1 << 64), (value + 2) % (1 << 64)]


def test_machine_code_reads_the_tsc_it_wrote() -> None:
    vm, _ = in_long_mode(
        "b910000000 b800000000 ba10000000 0f30"  # mov ecx, 0x10; mov eax, 0; mov edx, 16; wrmsr
        "0f31 890425 00050000 891425 04050000"  # rdtsc; mov [0x500], eax; mov [0x504], edx
        "30c0 e6f4"  # xor al, al; out 0xf4, al
    )
    with vm:
        assert vm.run().exit.reason == "done"
        assert int.from_bytes(vm.read_memory(0x500, 8), "little") == (16 << 32) + 1


def test_a_tsc_that_user_space_set_before_the_first_run_stays() -> None:
    def guest() -> Program:
        yield Spin(1000)
        yield Out(EXIT, 0)

    with scripted(guest) as vm:
        vcpu = vm.machine.board.vcpus[0]
        assert vcpu.msrs.set(TSC, 1 << 40, host_initiated=True)
        vm.run()
        assert vcpu.guest_tsc() == (1 << 40) + 1001


# --- CR8 ------------------------------------------------------------------------------------------

CR8_WRITE_5 = "b805000000 440f22c0"
"""mov eax, 5; mov cr8, rax"""
STORE_CR8 = "440f20c3 48891c25 00050000"
"""mov rbx, cr8; mov [0x500], rbx"""
LEAVE = "30c0 e6f4"


@pytest.mark.parametrize("irqchip", [True, False], ids=["local APIC", "no local APIC"])
def test_cr8_is_the_task_priority(irqchip: bool) -> None:
    vm, vcpu = in_long_mode(CR8_WRITE_5 + STORE_CR8 + LEAVE, irqchip=irqchip)
    with vm:
        assert vm.run().exit.reason == "done"
        assert vm.read_memory(0x500, 8) == (5).to_bytes(8, "little")
        if irqchip:
            assert vcpu.get_lapic().reg(TASKPRI) == 0x50


def test_the_tpr_shows_in_cr8() -> None:
    vm, vcpu = in_long_mode(STORE_CR8 + LEAVE)
    with vm:
        state = vcpu.get_lapic()
        state.set_reg(TASKPRI, 0xA7)
        vcpu.set_lapic(state)
        assert vm.run().exit.reason == "done"
        assert vm.read_memory(0x500, 8) == (0xA).to_bytes(8, "little")


@pytest.mark.parametrize("irqchip", [True, False], ids=["local APIC", "no local APIC"])
def test_reserved_bits_of_cr8_fault(irqchip: bool) -> None:
    vm, _ = in_long_mode("b810000000 440f22c0" + LEAVE, irqchip=irqchip)
    with vm:
        assert vm.run().exit.reason == "triple-fault"


def test_lowering_cr8_lets_a_waiting_interrupt_through() -> None:
    vm, vcpu = in_long_mode("90")
    with vm:
        state = vcpu.get_lapic()
        state.set_reg(SPIV, 0x1FF)
        state.set_reg(TASKPRI, 0x30)
        state.set_reg(IRR + 0x20, 1 << 0x45 - 64)
        vcpu.set_lapic(state)
        model = vcpu.vcpu
        assert model.has_interrupt()
        model.requests = 0
        assert model.exits.write_cr8(7, 0)
        assert not model.has_interrupt()
        assert model.requests == 0
        assert model.exits.write_cr8(3, 0)
        assert model.has_interrupt()
        assert model.requests & 1
