"""Registers by SDM name, in lower case, and where KVM_GET_REGS and KVM_GET_SREGS have them.

`rax` to `r15`, `rip`, `rflags`; of each segment the selector, `_base`, `_limit` and `_access`
(access rights as in a VMCS, SDM vol. 3C, 25.4.1: a segment that is not present is unusable, too);
`gdtr` and `idtr`; control registers and `efer`.
Debug registers and other MSRs have ioctls of their own.
"""

from collections.abc import Iterator, Mapping

from kvmtick.abi.structs import kvm_regs, kvm_segment, kvm_sregs

__all__ = ["GENERAL", "SPECIAL", "put_registers", "register_values", "special_values"]

_SEGMENTS = {name: name for name in ("cs", "ds", "es", "fs", "gs", "ss", "tr")} | {"ldtr": "ldt"}
_TABLES = {"gdtr": "gdt", "idtr": "idt"}
_CONTROL = ("cr0", "cr2", "cr3", "cr4", "efer")
GENERAL = tuple(field[0] for field in kvm_regs._fields_)
"""Those of KVM_GET_REGS."""
SPECIAL = (
    *_CONTROL,
    *(f"{name}_{part}" for name in _TABLES for part in ("base", "limit")),
    *(f"{name}{part}" for name in _SEGMENTS for part in ("", "_base", "_limit", "_access")),
)
"""Those of KVM_GET_SREGS."""
_ACCESS_BITS = (("s", 4), ("present", 7), ("avl", 12), ("l", 13), ("db", 14), ("g", 15))
_UNUSABLE = 16
"""Of access rights; the type is in bits 3:0, DPL in 6:5."""


def put_registers(values: Mapping[str, int], regs: kvm_regs, sregs: kvm_sregs) -> None:
    """Write `values` into the structures. ValueError: one has no place there."""
    for name, value in values.items():
        register, _, part = name.partition("_")
        if name in GENERAL:
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
    segment.type = value & 0xF
    segment.dpl = value >> 5 & 3
    segment.unusable = value >> _UNUSABLE & 1
    for name, bit in _ACCESS_BITS:
        setattr(segment, name, value >> bit & 1)


def register_values(regs: kvm_regs, sregs: kvm_sregs) -> Iterator[tuple[str, int]]:
    """Every register there is in the structures."""
    for name in GENERAL:
        yield name, getattr(regs, name)
    yield from special_values(sregs)


def special_values(sregs: kvm_sregs) -> Iterator[tuple[str, int]]:
    """Every register of `SPECIAL`; the fields of a segment are cut to their bits."""
    for name in _CONTROL:
        yield name, getattr(sregs, name)
    for name, field in _TABLES.items():
        table = getattr(sregs, field)
        yield f"{name}_base", table.base
        yield f"{name}_limit", table.limit
    for name, field in _SEGMENTS.items():
        segment = getattr(sregs, field)
        yield name, segment.selector
        yield f"{name}_base", segment.base
        yield f"{name}_limit", segment.limit
        yield f"{name}_access", _access(segment)


def _access(segment: kvm_segment) -> int:
    """`vmx_segment_access_rights`."""
    rights = segment.type & 0xF | (segment.dpl & 3) << 5
    for name, bit in _ACCESS_BITS:
        rights |= (getattr(segment, name) & 1) << bit
    return int(rights | (segment.unusable != 0 or not segment.present & 1) << _UNUSABLE)
