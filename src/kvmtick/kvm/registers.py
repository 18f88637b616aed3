"""Registers by SDM name (`Engine.registers`, `Guest.start`) in KVM_SET_REGS and KVM_SET_SREGS.
Debug registers and MSRs have ioctls of their own.
"""

from collections.abc import Mapping

from kvmtick.abi.structs import kvm_regs, kvm_segment, kvm_sregs
from kvmtick.vcpu.vcpu import Vcpu

__all__ = ["get_regs", "put_registers"]

_SEGMENTS = {name: name for name in ("cs", "ds", "es", "fs", "gs", "ss", "tr")} | {"ldtr": "ldt"}
_TABLES = {"gdtr": "gdt", "idtr": "idt"}
_CONTROL = ("cr0", "cr2", "cr3", "cr4", "efer")
_GENERAL = frozenset(field[0] for field in kvm_regs._fields_)


def get_regs(vcpu: Vcpu) -> kvm_regs:
    """KVM_GET_REGS of the model."""
    registers = vcpu.engine.registers()
    return kvm_regs(**{name: registers[name] for name in _GENERAL if name in registers})


def put_registers(values: Mapping[str, int], regs: kvm_regs, sregs: kvm_sregs) -> None:
    """Write `values` into the structures. ValueError: one has no place there."""
    for name, value in values.items():
        register, _, part = name.partition("_")
        if name in _GENERAL:
            setattr(regs, name, value)
        elif name in _CONTROL:
            setattr(sregs, name, value)
        elif register in _SEGMENTS and part in ("", "base", "limit", "access"):
            _put_segment(getattr(sregs, _SEGMENTS[register]), part or "selector", value)
        elif register in _TABLES and part in ("base", "limit"):
            setattr(getattr(sregs, _TABLES[register]), part, value)
        else:
            raise ValueError(f"{name}: KVM_SET_REGS and KVM_SET_SREGS have no such register")


def _put_segment(segment: kvm_segment, part: str, value: int) -> None:
    if part != "access":
        setattr(segment, part, value)
        return
    # Access rights as in a VMCS (SDM vol. 3C, 25.4.1).
    segment.type = value & 0xF
    for name, bit in (("s", 4), ("present", 7), ("avl", 12), ("l", 13), ("db", 14), ("g", 15)):
        setattr(segment, name, value >> bit & 1)
    segment.dpl = value >> 5 & 3
    segment.unusable = value >> 16 & 1
