"""The local APIC: reset, the ways to switch it off, priorities, IPIs, as measured on a real kernel.

The recorded host's back end writes EOI at every injection. So where an interrupt in service
matters, IF is 0 and KVM_SET_LAPIC sets ISR.
"""

import pytest
from guests.scenarios import (
    Op,
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


def pic_interrupt(
    backend: Backend, *given: Op | tuple[Op, ...], end: tuple[Op | tuple[Op, ...], ...] = ()
) -> tuple[int, int]:
    """Whether the PIC's interrupt came after `given`, and after `end` as well."""
    with backend.pc() as pc:
        vector = PIC_IRQ
        got = pc.run(
            *(*OPEN_PIC, unreal(), *given, sti(), out8(PORT_ACT, 0), *WINDOWS, cli()),
            *(out8(PORT_ACT + 1, 0), *end, sti(), *WINDOWS),
            acts=[lambda: pc.pulse(PIC_IRQ), lambda: taken.append(count())],
        ) if False else None
        del got, vector
        taken: list[int] = []

        def count() -> int:
            return int.from_bytes(pc.vm.read_memory(0x8300 + 4 * PIC_IRQ, 4), "little")

        results = pc.run(
            *(*OPEN_PIC, unreal(), *given, sti(), out8(PORT_ACT, 0), *WINDOWS, cli()),
            *(out8(PORT_ACT + 1, 0), *end, sti(), *WINDOWS),
            acts=[lambda: pc.pulse(PIC_IRQ), lambda: taken.append(count())],
        )
        return taken[0], results.vectors[PIC_IRQ]
