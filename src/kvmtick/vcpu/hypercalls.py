"""Hypercalls (Documentation/virt/kvm/x86/hypercalls.rst; kvm_emulate_hypercall of x86.c).

Number in RAX, arguments in RBX, RCX, RDX and RSI, result in RAX; 32 bits of each outside of 64-bit
mode. From a ring other than 0 the result is -KVM_EPERM. Any guest may make them, whatever CPUID
says (KVM_CAP_ENFORCE_PV_FEATURE_CPUID is off).

Not modelled: KVM_HC_CLOCK_PAIRING has no clock to pair; KVM_HC_SCHED_YIELD yields nothing; the
exits to user space (KVM_CAP_EXIT_HYPERCALL); Hyper-V's and Xen's; the tracepoint kvm_hypercall.
"""

from collections.abc import Mapping
from typing import Final

from kvmtick.cpu.mode import code_bits
from kvmtick.irqchip.apicdef import (
    APIC_DEST_LOGICAL,
    APIC_INT_ASSERT,
    APIC_INT_LEVELTRIG,
    APIC_MODE_MASK,
    APIC_SHORT_SHIFT,
    APIC_VECTOR_MASK,
    DELIVERY_MODE_SHIFT,
    DEST_NOSHORT,
    DM_REMRD,
    U32,
)
from kvmtick.irqchip.delivery import IrqDelivery, LapicIrq

__all__ = ["emulate_hypercall"]

KVM_HC_VAPIC_POLL_IRQ: Final = 1
KVM_HC_KICK_CPU: Final = 5
KVM_HC_CLOCK_PAIRING: Final = 9
KVM_HC_SEND_IPI: Final = 10
KVM_HC_SCHED_YIELD: Final = 11

KVM_EPERM, KVM_EINVAL, KVM_EOPNOTSUPP, KVM_ENOSYS = 1, 22, 95, 1000

DEST_MASK: Final = APIC_DEST_LOGICAL
SHORT_MASK: Final = 3 << APIC_SHORT_SHIFT


def emulate_hypercall(registers: Mapping[str, int], delivery: IrqDelivery) -> int:
    """What RAX becomes; `registers` are those of the vCPU, by SDM name."""
    is_64_bit = code_bits(registers) == 64
    mask = (1 << 64) - 1 if is_64_bit else U32
    number, a0, a1, a2, a3 = (
        registers[name] & mask for name in ("rax", "rbx", "rcx", "rdx", "rsi")
    )
    if registers["ss_access"] >> 5 & 3:
        result = -KVM_EPERM
    elif number in (KVM_HC_VAPIC_POLL_IRQ, KVM_HC_SCHED_YIELD):
        result = 0
    elif number == KVM_HC_KICK_CPU:
        result = _kick_cpu(delivery, a1)
    elif number == KVM_HC_SEND_IPI:
        result = _send_ipi(delivery, (a0, a1), a2 & U32, a3, 64 if is_64_bit else 32)
    elif number == KVM_HC_CLOCK_PAIRING:
        result = -KVM_EOPNOTSUPP
    else:
        result = -KVM_ENOSYS
    return result & mask


def _kick_cpu(delivery: IrqDelivery, apic_id: int) -> int:
    """`kvm_pv_kick_cpu_op`: wake the vCPU with that APIC id from HLT."""
    delivery.deliver(LapicIrq(0, DM_REMRD, False, False, False, DEST_NOSHORT, apic_id & U32, False))
    return 0


def _send_ipi(
    delivery: IrqDelivery, bitmaps: tuple[int, int], first_id: int, icr: int, width: int
) -> int:
    """`kvm_pv_send_ipi`: to the APIC ids that two bitmaps of `width` bits hold, from `first_id` on;
    how many took it.
    """
    if icr & (DEST_MASK | SHORT_MASK):
        return -KVM_EINVAL
    if delivery.apic_map is None:
        return -KVM_EOPNOTSUPP
    message, taken = _message(icr), 0
    for bitmap in bitmaps:
        ids = range(first_id, min(first_id + width, delivery.apic_map.max_apic_id + 1))
        taken += sum(delivery.deliver_to_id(i, message) for i in ids if bitmap >> i - first_id & 1)
        first_id = first_id + width & U32
    return taken


def _message(icr: int) -> LapicIrq:
    return LapicIrq(
        vector=icr & APIC_VECTOR_MASK,
        delivery_mode=(icr & APIC_MODE_MASK) >> DELIVERY_MODE_SHIFT,
        dest_mode_logical=False,
        trig_mode_level=icr & APIC_INT_LEVELTRIG != 0,
        level=icr & APIC_INT_ASSERT != 0,
        shorthand=DEST_NOSHORT,
        dest_id=0,
        msi_redir_hint=False,
    )
