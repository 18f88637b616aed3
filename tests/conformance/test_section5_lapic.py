"""The local APIC: reset, the ways to switch it off, priorities, IPIs, as measured on a real kernel.

The recorded host's back end writes EOI at every injection. So where an interrupt in service
matters, IF is 0 and KVM_SET_LAPIC sets ISR.
"""

import pytest

from kvmtick import guests
from kvmtick.guests.script import (
    VECTORS_AT,
    apic_eoi_off,
    cli,
    lapic_read,
    lapic_write,
    mmio_read,
    out8,
    rdmsr,
    snap_vector,
    sti,
    unreal,
    wait_vector,
    wrmsr,
)

from .rig import (
    APIC_BASE,
    DFR,
    ENABLED,
    EOI,
    EOI_AT_INJECTION,
    ESR,
    ICR,
    ICR_HIGH,
    ID,
    IRR,
    ISR,
    LDR,
    LVT0,
    LVT1,
    LVT_EXTINT,
    LVT_MASKED,
    LVTERR,
    LVTPC,
    LVTT,
    LVTTHMR,
    MSI_ADDRESS,
    MSR_APIC_BASE,
    PORT_ACT,
    PPR,
    SVR,
    TDCR,
    TMCCT,
    TMICT,
    TO_SELF,
    TPR,
    VERSION,
    WINDOWS,
    Backend,
    Script,
    to_ioapic,
)

VECTOR = 0x45
RESET = {
    ID: 0,
    VERSION: 0x5_0014,
    TPR: 0,
    PPR: 0,
    LDR: 0,
    DFR: 0xFFFF_FFFF,
    SVR: 0xFF,
    ESR: 0,
    ICR: 0,
    ICR_HIGH: 0,
    LVTT: LVT_MASKED,
    LVTTHMR: LVT_MASKED,
    LVTPC: LVT_MASKED,
    LVT0: LVT_EXTINT,
    LVT1: LVT_MASKED,
    LVTERR: LVT_MASKED,
    TMICT: 0,
    TMCCT: 0,
    TDCR: 0,
}
ON: Script = (unreal(), lapic_write(SVR, ENABLED))

DISABLED = APIC_BASE & ~(1 << 11)

PIC_IRQ = 1
PIC_TAKEN_AT = guests.LOAD_AT + VECTORS_AT + 4 * PIC_IRQ
"""Where the guest counts the interrupts of that pin."""
OPEN_PIC: Script = (out8(0x21, 0xFC),)


def test_registers_after_reset(backend: Backend) -> None:
    with backend.pc() as pc:
        reads = tuple(lapic_read(register, n) for n, register in enumerate(RESET))
        assert dict(zip(RESET, pc.run(unreal(), *reads).results, strict=False)) == RESET


def test_lapic_state_of_both_vcpus_after_reset(backend: Backend) -> None:
    """LVT0 lets the PIC through on vCPU 0 only, and the id is the vCPU's."""
    with backend.pc(vcpus=2) as pc:
        for vcpu_id in (0, 1):
            got = {register: pc.lapic(register, vcpu_id) for register in RESET}
            assert got == RESET | {
                ID: vcpu_id << 24,
                LVT0: LVT_MASKED if vcpu_id else LVT_EXTINT,
            }


# --- the PIC's interrupt, and what stops it -------------------------------------------------------


def pic_interrupts(backend: Backend, before: Script, then: Script = ()) -> tuple[int, int]:
    """How often a PIC pin's pulse was taken after `before`, and how often in all after `then`."""
    with backend.pc() as pc:
        got = pc.run(
            *(*OPEN_PIC, unreal(), *before, out8(PORT_ACT, 0), sti(), *WINDOWS, cli()),
            *(mmio_read(PIC_TAKEN_AT, 0), *then, sti(), *WINDOWS),
            acts=[lambda: pc.pulse(PIC_IRQ)],
        )
        return got.results[0], got.vectors[PIC_IRQ]


LOOK = lapic_write(ICR, TO_SELF | 0x30)
"""No write of LVT0 makes KVM look for the PIC's interrupt again; another interrupt does."""


def test_after_reset_the_pic_gets_through_with_the_lapic_software_disabled(
    backend: Backend,
) -> None:
    assert pic_interrupts(backend, ()) == (1, 1)


def test_svr_without_bit_8_stops_the_pic(backend: Backend) -> None:
    """The bit falls: every LVT is masked. With LVT0 restored what waited comes."""
    off = (lapic_write(SVR, ENABLED), lapic_write(SVR, 0xFF))
    on = (lapic_write(SVR, ENABLED), lapic_write(LVT0, LVT_EXTINT), LOOK)
    assert pic_interrupts(backend, off, on) == (0, 1)


def test_svr_written_without_bit_8_after_reset_stops_the_pic(backend: Backend) -> None:
    """The first write of LVT0 comes out masked."""
    before = (lapic_write(SVR, 0xFF), lapic_write(LVT0, LVT_EXTINT))
    assert pic_interrupts(backend, before, (lapic_read(LVT0, 1),)) == (0, 0)


def test_lvt0_masked_stops_the_pic(backend: Backend) -> None:
    before = (lapic_write(SVR, ENABLED), lapic_write(LVT0, LVT_EXTINT | LVT_MASKED))
    assert pic_interrupts(backend, before, (lapic_write(LVT0, LVT_EXTINT), LOOK)) == (0, 1)


def test_lvt0_in_fixed_mode_does_not_deliver_the_pic_interrupt(backend: Backend) -> None:
    before = (lapic_write(SVR, ENABLED), lapic_write(LVT0, VECTOR))
    assert pic_interrupts(backend, before) == (0, 0)
    with backend.pc() as pc:
        pc.run(
            *OPEN_PIC,
            *ON,
            lapic_write(LVT0, VECTOR),
            out8(PORT_ACT, 0),
            acts=[lambda: pc.pulse(PIC_IRQ)],
        )
        assert pc.irr() == set()


@pytest.mark.parametrize("lvt0", [LVT_EXTINT, LVT_EXTINT | LVT_MASKED, VECTOR])
def test_globally_disabled_the_pic_gets_through_whatever_lvt0_is(
    backend: Backend, lvt0: int
) -> None:
    off = (lapic_write(SVR, ENABLED), lapic_write(LVT0, lvt0), wrmsr(MSR_APIC_BASE, DISABLED))
    assert pic_interrupts(backend, off) == (1, 1)


def test_globally_disabled_the_page_reads_all_ones(backend: Backend) -> None:
    with backend.pc() as pc:
        got = pc.run(
            *(unreal(), wrmsr(MSR_APIC_BASE, DISABLED), lapic_read(VERSION, 0)),
            *(lapic_write(TPR, 0x50), rdmsr(MSR_APIC_BASE, 1), wrmsr(MSR_APIC_BASE, APIC_BASE)),
            *(lapic_read(VERSION, 3), lapic_read(TPR, 4)),
        )
        assert got.results[:5] == (0xFFFF_FFFF, DISABLED, 0, 0x5_0014, 0)
        assert got.faults == 0


# --- software disable -----------------------------------------------------------------------------


@pytest.mark.parametrize("register", [LVTT, LVTTHMR, LVTPC, LVT0, LVT1, LVTERR])
def test_without_svr_bit_8_an_lvt_write_comes_out_masked(backend: Backend, register: int) -> None:
    value = LVT_EXTINT if register in (LVT0, LVT1) else 0x40
    with backend.pc() as pc:
        got = pc.run(
            *(unreal(), lapic_write(register, value), lapic_read(register, 0)),
            *(lapic_write(SVR, ENABLED), lapic_write(register, value), lapic_read(register, 1)),
            *(lapic_write(SVR, 0xFF), lapic_read(register, 2)),
        )
        assert got.results[:3] == (value | LVT_MASKED, value, value | LVT_MASKED)


def test_a_software_disabled_lapic_takes_no_message(backend: Backend) -> None:
    with backend.pc() as pc:
        assert pc.vm.signal_msi(MSI_ADDRESS, VECTOR) == 0
        pc.enable_lapic()
        assert pc.vm.signal_msi(MSI_ADDRESS, VECTOR) == 1
        assert pc.irr() == {VECTOR}


# --- priorities -----------------------------------------------------------------------------------


def test_tpr_blocks_its_class_and_those_below(backend: Backend) -> None:
    with backend.pc() as pc:
        got = pc.run(
            *(*ON, lapic_write(TPR, 0x50), lapic_read(PPR, 0), sti()),
            *(lapic_write(ICR, TO_SELF | 0x45), lapic_write(ICR, TO_SELF | 0x5F), *WINDOWS),
            *(snap_vector(0x45, 1), snap_vector(0x5F, 2), lapic_read(IRR + 0x20, 3)),
            *(lapic_write(ICR, TO_SELF | 0x60), *WINDOWS, snap_vector(0x60, 4)),
            *(lapic_write(TPR, 0x4F), *WINDOWS, snap_vector(0x5F, 5), snap_vector(0x45, 6)),
            *(lapic_read(PPR, 7), lapic_write(TPR, 0), *WINDOWS, snap_vector(0x45, 8)),
            lapic_read(PPR, 9),
        )
        assert got.results[:5] == (0x50, 0, 0, 1 << 5 | 1 << 31, 1)
        assert got.results[5:10] == (1, 0, 0x4F, 1, 0)


def test_ppr_follows_what_is_in_service(backend: Backend) -> None:
    """ISR {0x45, 0x55}: an EOI ends the highest, and PPR is the class of the next."""
    with backend.pc() as pc:
        got = pc.run(
            *(*ON, out8(PORT_ACT, 0)),
            *(lapic_read(PPR, 0), lapic_read(ISR + 0x20, 1), lapic_write(EOI, 0)),
            *(lapic_read(PPR, 2), lapic_read(ISR + 0x20, 3), lapic_write(EOI, 0)),
            *(lapic_read(PPR, 4), lapic_read(ISR + 0x20, 5), lapic_write(EOI, 0)),
            *(lapic_read(PPR, 6), lapic_read(ISR + 0x20, 7)),
            acts=[lambda: pc.take_into_service(0x45, 0x55)],
        )
        assert got.results[:8] == (0x50, 1 << 5 | 1 << 21, 0x40, 1 << 5, 0, 0, 0, 0)


def test_ppr_is_tpr_where_that_is_the_higher_class(backend: Backend) -> None:
    with backend.pc() as pc:
        got = pc.run(
            *(*ON, out8(PORT_ACT, 0), lapic_write(TPR, 0x43), lapic_read(PPR, 0)),
            *(lapic_write(TPR, 0x53), lapic_read(PPR, 1), lapic_write(TPR, 0x33)),
            lapic_read(PPR, 2),
            acts=[lambda: pc.take_into_service(0x45)],
        )
        assert got.results[:3] == (0x43, 0x53, 0x40)


def test_an_interrupt_in_service_blocks_its_class_until_eoi(backend: Backend) -> None:
    backend.needs_model(EOI_AT_INJECTION)
    with backend.pc() as pc:
        got = pc.run(
            *(*ON, apic_eoi_off(), sti(), lapic_write(ICR, TO_SELF | 0x51), *WINDOWS),
            *(lapic_read(PPR, 0), lapic_read(ISR + 0x20, 1)),
            *(lapic_write(ICR, TO_SELF | 0x45), lapic_write(ICR, TO_SELF | 0x5F), *WINDOWS),
            *(snap_vector(0x45, 2), snap_vector(0x5F, 3), lapic_write(EOI, 0), *WINDOWS),
            *(snap_vector(0x45, 4), snap_vector(0x5F, 5), lapic_write(EOI, 0), *WINDOWS),
            snap_vector(0x45, 6),
        )
        assert got.results[:7] == (0x50, 1 << 17, 0, 0, 0, 1, 1)


# --- IPIs -----------------------------------------------------------------------------------------


def test_self_ipi(backend: Backend) -> None:
    with backend.pc() as pc:
        got = pc.run(
            *(*ON, lapic_write(ICR, TO_SELF | VECTOR), lapic_read(ICR, 0)),
            *(lapic_read(IRR + 0x20, 1), wait_vector(VECTOR, 1)),
        )
        assert got.results[:2] == (TO_SELF | VECTOR, 1 << 5)
        assert got.apic_vectors[VECTOR] == 1


def test_fixed_ipi_to_an_id(backend: Backend) -> None:
    with backend.pc(vcpus=2) as pc:
        pc.enable_lapic(1)
        got = pc.run(
            *(*ON, lapic_write(ICR_HIGH, 0), lapic_write(ICR, 0x4000 | VECTOR)),
            *(wait_vector(VECTOR, 1), lapic_write(ICR_HIGH, 1 << 24)),
            lapic_write(ICR, 0x4000 | 0x46),
        )
        assert (got.apic_vectors[VECTOR], got.apic_vectors[0x46]) == (1, 0)
        assert (pc.irr(0), pc.irr(1)) == (set(), {0x46})


@pytest.mark.parametrize(
    ("shorthand", "first", "second"),
    [(0x4_0000, True, False), (0x8_0000, True, True), (0xC_0000, False, True)],
    ids=["self", "all", "all but self"],
)
def test_shorthands(backend: Backend, shorthand: int, first: bool, second: bool) -> None:
    with backend.pc(vcpus=2) as pc:
        pc.enable_lapic(1)
        pc.run(*ON, lapic_write(ICR, 0x4000 | shorthand | VECTOR))
        assert (pc.irr(0), pc.irr(1)) == (
            {VECTOR} if first else set(),
            {VECTOR} if second else set(),
        )


@pytest.mark.parametrize("icr", [0x4_4400, 0x4400], ids=["to itself", "to id 0"])
def test_nmi_ipi_comes_with_if_0(backend: Backend, icr: int) -> None:
    with backend.pc() as pc:
        assert pc.run(*ON, lapic_write(ICR, icr), *WINDOWS).nmis == 1


def test_an_ipi_to_nobody_is_lost(backend: Backend) -> None:
    with backend.pc() as pc:
        pc.run(*ON, lapic_write(ICR_HIGH, 5 << 24), lapic_write(ICR, 0x4000 | VECTOR))
        assert pc.irr() == set()
        assert pc.lapic(ICR) == 0x4000 | VECTOR


def test_icr_never_reads_busy(backend: Backend) -> None:
    with backend.pc() as pc:
        got = pc.run(*ON, lapic_write(ICR, TO_SELF | 0x1000 | VECTOR), lapic_read(ICR, 0))
        assert got.results[0] == TO_SELF | VECTOR


# --- illegal vectors ------------------------------------------------------------------------------


@pytest.mark.parametrize("vector", [0, 2, 15])
def test_an_illegal_vector_is_taken_and_never_delivered(backend: Backend, vector: int) -> None:
    """No bit of ESR is set; SIGNAL_MSI and IRQ_LINE_STATUS say it was delivered."""
    with backend.pc() as pc:
        got = pc.run(
            *(*ON, sti(), lapic_write(ICR, TO_SELF | vector), *WINDOWS),
            *(lapic_write(ESR, 0), lapic_read(ESR, 0)),
        )
        # another vector than those the guest expects would have ended the run
        assert (got.results[0], got.nmis, got.vectors) == (0, 0, (0,) * 16)
        assert pc.irr() == {vector}
        assert pc.vm.signal_msi(MSI_ADDRESS, vector) == 1
        pc.vm.set_gsi_routing([to_ioapic(5, 7)])
        pc.set_pin(7, vector)
        assert pc.vm.irq_line_status(5, 1) == 1
