"""The local APIC's registers and their bits (SDM vol. 3A chapter 12, asm/apicdef.h).

Registers are named by their offset in the xAPIC page; the x2APIC's MSR is 0x800 + offset / 16.
"""

from typing import Final

APIC_DEFAULT_PHYS_BASE: Final = 0xFEE00000
LAPIC_MMIO_LENGTH: Final = 0x1000
APIC_REGS_BYTES: Final = 0x400
"""What KVM_GET_LAPIC gives of the page."""

APIC_ID: Final = 0x20
APIC_LVR: Final = 0x30
APIC_TASKPRI: Final = 0x80
APIC_ARBPRI: Final = 0x90
APIC_PROCPRI: Final = 0xA0
APIC_EOI: Final = 0xB0
APIC_LDR: Final = 0xD0
APIC_DFR: Final = 0xE0
APIC_SPIV: Final = 0xF0
APIC_ISR: Final = 0x100
APIC_TMR: Final = 0x180
APIC_IRR: Final = 0x200
APIC_ESR: Final = 0x280
APIC_ICR: Final = 0x300
APIC_ICR_HIGH: Final = 0x304
"""Bits 63:32 of the x2APIC's ICR, where the kernel keeps them; unused bytes in xAPIC mode."""
APIC_ICR2: Final = 0x310
APIC_LVTT: Final = 0x320
APIC_LVTTHMR: Final = 0x330
APIC_LVTPC: Final = 0x340
APIC_LVT0: Final = 0x350
APIC_LVT1: Final = 0x360
APIC_LVTERR: Final = 0x370
APIC_TMICT: Final = 0x380
APIC_TMCCT: Final = 0x390
APIC_TDCR: Final = 0x3E0
APIC_SELF_IPI: Final = 0x3F0

APIC_BASE_MSR: Final = 0x800
APIC_LAST_MSR: Final = 0x8FF
MSR_IA32_APICBASE: Final = 0x1B
MSR_IA32_TSC_DEADLINE: Final = 0x6E0

MSR_IA32_APICBASE_BSP: Final = 1 << 8
X2APIC_ENABLE: Final = 1 << 10
MSR_IA32_APICBASE_ENABLE: Final = 1 << 11
APICBASE_MODE_MASK: Final = MSR_IA32_APICBASE_ENABLE | X2APIC_ENABLE
APICBASE_RESERVED: Final = 0x2FF

# Delivery modes, as fields (not shifted).
DM_FIXED: Final = 0
DM_LOWEST: Final = 1
DM_SMI: Final = 2
DM_REMRD: Final = 3
DM_NMI: Final = 4
DM_INIT: Final = 5
DM_STARTUP: Final = 6
DM_EXTINT: Final = 7
DELIVERY_MODE_SHIFT: Final = 8

# Destination shorthands, as fields.
DEST_NOSHORT: Final = 0
DEST_SELF: Final = 1
DEST_ALLINC: Final = 2
DEST_ALLBUT: Final = 3

APIC_BROADCAST: Final = 0xFF
X2APIC_BROADCAST: Final = 0xFFFFFFFF
APIC_DFR_FLAT: Final = 0xFFFFFFFF
APIC_DFR_CLUSTER: Final = 0x0FFFFFFF

APIC_VECTOR_MASK: Final = 0xFF
APIC_MODE_MASK: Final = 0x700
APIC_DM_NMI: Final = 0x400
APIC_DM_EXTINT: Final = 0x700

APIC_LVT_MASKED: Final = 1 << 16
APIC_LVT_LEVEL_TRIGGER: Final = 1 << 15
APIC_LVT_REMOTE_IRR: Final = 1 << 14
APIC_INPUT_POLARITY: Final = 1 << 13
APIC_SEND_PENDING: Final = 1 << 12
LVT_MASK: Final = APIC_LVT_MASKED | APIC_SEND_PENDING | APIC_VECTOR_MASK
LINT_MASK: Final = (
    LVT_MASK | APIC_MODE_MASK | APIC_INPUT_POLARITY | APIC_LVT_REMOTE_IRR | APIC_LVT_LEVEL_TRIGGER
)

APIC_LVT_TIMER_ONESHOT: Final = 0
APIC_LVT_TIMER_PERIODIC: Final = 1 << 17
APIC_LVT_TIMER_TSCDEADLINE: Final = 1 << 18
APIC_LVT_TIMER_MODES: Final = APIC_LVT_TIMER_PERIODIC | APIC_LVT_TIMER_TSCDEADLINE

APIC_SPIV_APIC_ENABLED: Final = 1 << 8
APIC_SPIV_DIRECTED_EOI: Final = 1 << 12
APIC_SPIV_MASK: Final = 0x3FF
SPIV_RESET: Final = 0xFF

APIC_VERSION: Final = 0x14
APIC_LVR_DIRECTED_EOI: Final = 1 << 24
NR_LVT_ENTRIES: Final = 6
"""KVM has a seventh, CMCI, only where user space set MCG_CMCI_P in MCG_CAP."""

APIC_ICR_BUSY: Final = 1 << 12
APIC_INT_ASSERT: Final = 1 << 14
APIC_INT_LEVELTRIG: Final = 1 << 15
APIC_DEST_LOGICAL: Final = 1 << 11
APIC_SHORT_SHIFT: Final = 18
X2APIC_ICR_RESERVED: Final = 0xFFF00000 | 0x30000 | 1 << 13

APIC_LDR_MASK: Final = 0xFF << 24
APIC_DFR_ONES: Final = 0x0FFFFFFF
APIC_ICR2_MASK: Final = 0xFF << 24
APIC_TDR_MASK: Final = 0xB

# Bits of pending_events.
KVM_APIC_INIT: Final = 1 << 0
KVM_APIC_SIPI: Final = 1 << 1

U32: Final = (1 << 32) - 1
U64: Final = (1 << 64) - 1
