"""The local APIC in x2APIC mode: its registers are MSRs."""

import pytest

from kvmtick.guests.script import (
    apic_eoi_on,
    lapic_read,
    lapic_write,
    out8,
    rdmsr,
    snap_vector,
    sti,
    unreal,
    wait_vector,
    wrmsr,
    x2apic_write,
)

from .rig import (
    APIC_BASE,
    DFR,
    ENABLED,
    EOI,
    ESR,
    ICR,
    ICR_HIGH,
    ISR,
    LVT0,
    MSR_APIC_BASE,
    PORT_ACT,
    SELF_IPI,
    SVR,
    TPR,
    VERSION,
    WINDOWS,
    X2APIC_BASE,
    Backend,
    Script,
)

VECTOR = 0x45
ON: Script = (
    *(unreal(), wrmsr(MSR_APIC_BASE, X2APIC_BASE), apic_eoi_on(x2apic=True)),
    x2apic_write(SVR, ENABLED),
)


def msr(register: int) -> int:
    """The MSR of a register, named by its xAPIC offset."""
    return 0x800 + register // 16


def test_id_version_and_ldr(backend: Backend) -> None:
    with backend.pc(vcpus=2) as pc:
        got = pc.run(*ON, rdmsr(0x802, 0), rdmsr(0x803, 2), rdmsr(0x80D, 4))
        assert got.results[:6] == (0, 0, 0x5_0014, 0, 1, 0)
        second = pc.vcpus[1]
        assert second.set_msrs({MSR_APIC_BASE: X2APIC_BASE & ~0x100}) == 1
        assert second.get_msrs([0x802, 0x80D]) == {0x802: 1, 0x80D: 2}


def test_self_ipi_and_eoi(backend: Backend) -> None:
    with backend.pc() as pc:
        got = pc.run(
            *(*ON, wrmsr(msr(SELF_IPI), VECTOR), rdmsr(0x822, 0), wait_vector(VECTOR, 1)),
            *(wrmsr(msr(SELF_IPI), VECTOR), wait_vector(VECTOR, 2), rdmsr(0x812, 2)),
        )
        assert got.results[:4] == (1 << 5, 0, 0, 0)
        assert (got.apic_vectors[VECTOR], got.faults) == (2, 0)


def test_eoi_ends_the_highest_in_service(backend: Backend) -> None:
    with backend.pc() as pc:
        got = pc.run(
            *(*ON, out8(PORT_ACT, 0), rdmsr(msr(ISR) + 2, 0), wrmsr(msr(EOI), 0)),
            *(rdmsr(msr(ISR) + 2, 2), wrmsr(msr(EOI), 0), rdmsr(msr(ISR) + 2, 4)),
            acts=[lambda: pc.take_into_service(0x45, 0x55)],
        )
        assert (got.results[0], got.results[2], got.results[4]) == (1 << 5 | 1 << 21, 1 << 5, 0)


def test_icr_is_one_register_of_64_bits(backend: Backend) -> None:
    with backend.pc(vcpus=2) as pc:
        pc.enable_lapic(1)
        value = 1 << 32 | 0x4000 | VECTOR
        got = pc.run(*ON, wrmsr(msr(ICR), value), rdmsr(msr(ICR), 0), rdmsr(msr(ICR_HIGH), 2))
        assert got.results[:2] == (0x4000 | VECTOR, 1)
        assert pc.irr(1) == {VECTOR}
        assert got.faults == 1


def test_the_page_reads_all_ones_and_swallows_writes(backend: Backend) -> None:
    with backend.pc() as pc:
        got = pc.run(
            *(*ON, lapic_read(VERSION, 0), lapic_read(SVR, 1), lapic_write(TPR, 0x50)),
            rdmsr(msr(TPR), 2),
        )
        assert got.results[:4] == (0xFFFF_FFFF, 0xFFFF_FFFF, 0, 0)


def test_without_cpuid_the_mode_is_refused(backend: Backend) -> None:
    with backend.pc(cpuid=False) as pc:
        got = pc.run(
            *(unreal(), wrmsr(MSR_APIC_BASE, X2APIC_BASE), rdmsr(MSR_APIC_BASE, 0)),
            *(rdmsr(0x802, 2), lapic_read(VERSION, 4)),
        )
        assert got.results[:5] == (APIC_BASE, 0, 0xFFFF_FFFF, 0xFFFF_FFFF, 0x5_0014)
        assert got.faults == 2


@pytest.mark.parametrize(
    ("given", "faults"),
    [
        ((wrmsr(MSR_APIC_BASE, APIC_BASE),), 1),
        ((wrmsr(MSR_APIC_BASE, APIC_BASE & ~0x800),), 0),
        ((wrmsr(MSR_APIC_BASE, APIC_BASE & ~0x800), wrmsr(MSR_APIC_BASE, X2APIC_BASE)), 1),
        ((wrmsr(MSR_APIC_BASE, APIC_BASE & ~0x800 | 0x400),), 1),
        ((wrmsr(MSR_APIC_BASE, X2APIC_BASE | 1),), 1),
        ((wrmsr(MSR_APIC_BASE, X2APIC_BASE),), 0),
    ],
    ids=["to xAPIC", "to disabled", "disabled to x2APIC", "extended only", "reserved", "the same"],
)
def test_changes_of_mode(backend: Backend, given: Script, faults: int) -> None:
    with backend.pc() as pc:
        assert pc.run(*ON, *given).faults == faults


@pytest.mark.parametrize(
    ("access", "faults"),
    [
        pytest.param(rdmsr(msr(EOI), 0), 1, id="read EOI"),
        pytest.param(wrmsr(msr(EOI), 1), 0, id="write EOI = 1"),
        pytest.param(rdmsr(msr(DFR), 0), 1, id="read DFR"),
        pytest.param(wrmsr(msr(DFR), 0), 1, id="write DFR = 0"),
        pytest.param(rdmsr(msr(SELF_IPI), 0), 1, id="read SELF_IPI"),
        pytest.param(wrmsr(msr(SELF_IPI), 0x100), 1, id="write SELF_IPI = 0x100"),
        pytest.param(wrmsr(msr(ESR), 0), 0, id="write ESR = 0"),
        pytest.param(wrmsr(msr(ESR), 1), 1, id="write ESR = 1"),
        pytest.param(wrmsr(0x802, 0), 1, id="write 0x802 = 0"),
        pytest.param(wrmsr(0x803, 0), 1, id="write 0x803 = 0"),
        pytest.param(wrmsr(0x80D, 0), 1, id="write 0x80D = 0"),
        pytest.param(wrmsr(msr(TPR), 1 << 32), 1, id="write TPR = 1 << 32"),
        pytest.param(wrmsr(msr(LVT0), 0x700), 0, id="write LVT0 = 0x700"),
        pytest.param(rdmsr(0x801, 0), 1, id="read 0x801"),
        pytest.param(rdmsr(0x804, 0), 1, id="read 0x804"),
        pytest.param(rdmsr(0x8FF, 0), 1, id="read 0x8FF"),
        pytest.param(wrmsr(0x8FF, 0), 1, id="write 0x8FF = 0"),
    ],
)
def test_accesses_that_fault(backend: Backend, access: Script, faults: int) -> None:
    """Those of registers that are not there, not readable or not writable, or out of range; but
    EOI takes any 32 bits.
    """
    with backend.pc() as pc:
        assert pc.run(*ON, access).faults == faults


def test_tpr_blocks(backend: Backend) -> None:
    with backend.pc() as pc:
        got = pc.run(
            *(*ON, x2apic_write(TPR, 0x50), wrmsr(msr(SELF_IPI), VECTOR), sti(), *WINDOWS),
            *(snap_vector(VECTOR, 0), rdmsr(0x80A, 1), x2apic_write(TPR, 0), *WINDOWS),
            snap_vector(VECTOR, 3),
        )
        assert (got.results[0], got.results[1], got.results[3]) == (0, 0x50, 1)
