"""The file of a `VmState`, version 1: JSON, described in docs/state.md.

Structures are hexadecimal, as KVM has them; numbers of 64 bits are decimal but for addresses and
MSRs. All of a file is read and checked, field by field, before there is a `VmState`.
"""

import base64
import binascii
import json
from collections.abc import Iterator
from ctypes import sizeof
from dataclasses import asdict, fields
from os import PathLike
from typing import Any, Final, Literal, TypeVar

from kvmtick.abi.structs import (
    KvmStruct,
    kvm_cpuid_entry2,
    kvm_ioapic_state,
    kvm_irq_routing_entry,
    kvm_lapic_state,
    kvm_pic_state,
    kvm_pit_state2,
    kvm_regs,
    kvm_sregs,
    kvm_vcpu_events,
)
from kvmtick.cpu.paging import PAGE_BYTES
from kvmtick.guests import ParameterOffsets
from kvmtick.kvm.state import (
    RUN_BYTES,
    GuestState,
    IrqchipState,
    PitState,
    RamRun,
    StateError,
    VcpuState,
    VmState,
)
from kvmtick.kvm.told import IrqchipKind

__all__ = ["FORMAT", "VERSION", "from_json", "read", "to_json", "write"]

FORMAT: Final = "kvmtick-vm-state"
VERSION: Final = 1

U32: Final = (1 << 32) - 1
U64: Final = (1 << 64) - 1

_S = TypeVar("_S", bound=KvmStruct)
_T = TypeVar("_T", bound=str)


def write(state: VmState, path: str | PathLike[str]) -> None:
    """`VmState.write`."""
    with open(path, "w", encoding="ascii") as file:
        json.dump(to_json(state), file, indent=1)
        file.write("\n")


def read(path: str | PathLike[str]) -> VmState:
    """`VmState.read`."""
    with open(path, "rb") as file:
        data = file.read()
    try:
        return from_json(json.loads(data))
    except (ValueError, RecursionError) as error:
        if isinstance(error, StateError):
            raise StateError(f"{path}: {error}") from None
        raise StateError(f"{path}: no JSON, or cut short ({error}); save the VM again") from None


# Writing.


def to_json(state: VmState) -> dict[str, Any]:
    """The object that the file holds."""
    chips, pit, routing = state.chips, state.pit, state.routing
    return {
        "format": FORMAT,
        "version": VERSION,
        "backend": state.backend,
        "guest": state.guest and asdict(state.guest),
        "irqchip": state.irqchip,
        "boot_cpu_id": state.boot_cpu_id,
        "caps": [{"cap": cap, "args": list(args)} for cap, args in state.caps],
        "routing": None if routing is None else [_hex(entry) for entry in routing],
        "clock_ns": state.clock_ns,
        "chips": chips and {name: _hex(getattr(chips, name)) for name in _CHIPS},
        "pit": pit and {"flags": pit.flags, "reinject": pit.reinject, "state": _hex(pit.state)},
        "vcpus": [_vcpu_to_json(vcpu) for vcpu in state.vcpus],
        "ram_bytes": state.ram_bytes,
        "ram": [
            {"gpa": hex(run.gpa), "bytes": run.size_bytes, "zlib": run.as_text()}
            for run in state.ram
        ],
    }


def _vcpu_to_json(vcpu: VcpuState) -> dict[str, Any]:
    return {
        "id": vcpu.vcpu_id,
        "mp_state": vcpu.mp_state,
        "tsc_khz": vcpu.tsc_khz,
        "cpuid": [_hex(entry) for entry in vcpu.cpuid],
        "regs": _hex(vcpu.regs),
        "sregs": _hex(vcpu.sregs),
        "msrs": {hex(index): hex(value) for index, value in vcpu.msrs.items()},
        "lapic": vcpu.lapic and _hex(vcpu.lapic),
        "events": _hex(vcpu.events),
    }


def _hex(struct: KvmStruct) -> str:
    return bytes(struct).hex()


# Reading.

_CHIPS: Final[dict[str, type[KvmStruct]]] = {
    "pic_master": kvm_pic_state,
    "pic_slave": kvm_pic_state,
    "ioapic": kvm_ioapic_state,
}
_IRQCHIPS: Final[tuple[IrqchipKind, ...]] = ("none", "split", "kernel")
_TICK_SOURCES: Final[tuple[Literal["pit", "lapic"], ...]] = ("pit", "lapic")


class _Node:
    """A value of the file, and where it is; every look at it is a check."""

    def __init__(self, value: Any, where: str) -> None:
        self.value = value
        self.where = where

    def wrong(self, what: str) -> StateError:
        """The error that says what is wrong here."""
        return StateError(f"{self.where}: {what}; save the VM again")

    def _is(self, kind: type, name: str) -> Any:
        if type(self.value) is not kind:
            raise self.wrong(f"{name} is needed, not {_short(self.value)}")
        return self.value

    def __getitem__(self, name: str) -> "_Node":
        members = self._is(dict, "an object")
        where = f"{self.where}.{name}" if self.where else name
        if name not in members:
            raise StateError(f"{where}: missing; save the VM again")
        return _Node(members[name], where)

    def members(self) -> Iterator[tuple["_Node", "_Node"]]:
        """Names and values."""
        for name, value in self._is(dict, "an object").items():
            yield _Node(name, f"{self.where}.{name}"), _Node(value, f"{self.where}.{name}")

    def items(self) -> list["_Node"]:
        """The parts of a list."""
        parts = self._is(list, "a list")
        return [_Node(part, f"{self.where}[{at}]") for at, part in enumerate(parts)]

    def optional(self) -> "_Node | None":
        """None for null."""
        return None if self.value is None else self

    def text(self) -> str:
        """A string."""
        return str(self._is(str, "a string"))

    def one_of(self, words: tuple[_T, ...]) -> _T:
        """One of these strings."""
        for word in words:
            if self.text() == word:
                return word
        raise self.wrong(f"{_short(self.value)} is none of {', '.join(words)}")

    def flag(self) -> bool:
        """True or false."""
        return bool(self._is(bool, "true or false"))

    def number(self, low: int, high: int) -> int:
        """A number in a range."""
        value = int(self._is(int, "a number"))
        if not low <= value <= high:
            raise self.wrong(f"{_short(value)} is not in {low}..{high}")
        return value

    def address(self, high: int = U64) -> int:
        """A number written in hexadecimal."""
        try:
            value = int(self.text(), 16)
        except ValueError:
            what = f"a number in hexadecimal is needed, not {_short(self.value)}"
            raise self.wrong(what) from None
        if not 0 <= value <= high:
            raise self.wrong(f"{_short(self.value)} is not in 0..{high:#x}")
        return value

    def struct(self, kind: type[_S]) -> _S:
        """A structure in hexadecimal."""
        try:
            data = bytes.fromhex(self.text())
        except ValueError:
            raise self.wrong(f"no hexadecimal: {_short(self.value)}") from None
        if len(data) != sizeof(kind):
            raise self.wrong(f"{kind.__name__} has {sizeof(kind)} bytes, not {len(data)}")
        return kind.from_buffer_copy(data)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def from_json(value: Any) -> VmState:
    """The state that a file's object tells. StateError: where, and what is wrong."""
    if type(value) is not dict or value.get("format") != FORMAT:
        raise StateError("no state of a VM; Vm.save() and VmState.write() make one")
    version = value.get("version")
    if version != VERSION:
        raise StateError(
            f"version {_short(version)}, and this kvmtick reads {VERSION}; use its writer"
        )
    file = _Node(value, "")
    state = VmState(
        backend=file["backend"].text(),
        guest=_guest(file["guest"].optional()),
        irqchip=file["irqchip"].one_of(_IRQCHIPS),
        boot_cpu_id=file["boot_cpu_id"].number(0, U32),
        caps=tuple(_cap(node) for node in file["caps"].items()),
        routing=_routing(file["routing"].optional()),
        clock_ns=file["clock_ns"].number(0, U64),
        chips=_chips(file["chips"].optional()),
        pit=_pit(file["pit"].optional()),
        vcpus=tuple(_vcpu(node) for node in file["vcpus"].items()),
        ram_bytes=file["ram_bytes"].number(0, U64),
        ram=tuple(_run(node) for node in file["ram"].items()),
    )
    _check_parts(file, state)
    _check_ram(file, state)
    return state


def _guest(node: _Node | None) -> GuestState | None:
    if node is None:
        return None
    return GuestState(
        node["name"].text(),
        _parameters(node["parameters"].optional()),
        node["has_rate"].flag(),
        node["tick_source"].one_of(_TICK_SOURCES),
    )


def _parameters(node: _Node | None) -> ParameterOffsets | None:
    if node is None:
        return None
    names = [field.name for field in fields(ParameterOffsets)]
    return ParameterOffsets(**{name: node[name].number(0, U32) for name in names})


def _cap(node: _Node) -> tuple[int, tuple[int, ...]]:
    args = tuple(part.number(0, U64) for part in node["args"].items())
    if len(args) > 4:
        raise node["args"].wrong("more than 4 arguments")
    return node["cap"].number(0, U32), args


def _routing(node: _Node | None) -> tuple[kvm_irq_routing_entry, ...] | None:
    return None if node is None else tuple(e.struct(kvm_irq_routing_entry) for e in node.items())


def _chips(node: _Node | None) -> IrqchipState | None:
    if node is None:
        return None
    return IrqchipState(
        node["pic_master"].struct(kvm_pic_state),
        node["pic_slave"].struct(kvm_pic_state),
        node["ioapic"].struct(kvm_ioapic_state),
    )


def _pit(node: _Node | None) -> PitState | None:
    if node is None:
        return None
    return PitState(
        node["flags"].number(0, U32),
        node["reinject"].flag(),
        node["state"].struct(kvm_pit_state2),
    )


def _vcpu(node: _Node) -> VcpuState:
    lapic = node["lapic"].optional()
    return VcpuState(
        vcpu_id=node["id"].number(0, U32),
        mp_state=node["mp_state"].number(0, U32),
        tsc_khz=node["tsc_khz"].number(0, U32),
        cpuid=tuple(entry.struct(kvm_cpuid_entry2) for entry in node["cpuid"].items()),
        regs=node["regs"].struct(kvm_regs),
        sregs=node["sregs"].struct(kvm_sregs),
        msrs={name.address(U32): msr.address() for name, msr in node["msrs"].members()},
        lapic=None if lapic is None else lapic.struct(kvm_lapic_state),
        events=node["events"].struct(kvm_vcpu_events),
    )


def _run(node: _Node) -> RamRun:
    text = node["zlib"]
    try:
        deflated = base64.b64decode(text.text(), validate=True)
    except (binascii.Error, ValueError):
        raise text.wrong(f"no base64: {_short(text.value)}") from None
    run = RamRun(node["gpa"].address(), node["bytes"].number(1, RUN_BYTES), deflated)
    if run.gpa % PAGE_BYTES or run.size_bytes % PAGE_BYTES:
        raise node.wrong(f"{run.gpa:#x} and {run.size_bytes} are not multiples of {PAGE_BYTES}")
    return run


def _check_parts(file: _Node, state: VmState) -> None:
    """What there is follows from the kind of irqchip."""
    if (state.chips is not None) != (state.irqchip == "kernel"):
        raise file["chips"].wrong(f"they do not go with irqchip {state.irqchip!r}")
    if state.pit is not None and state.chips is None:
        raise file["pit"].wrong(f"there can be none with irqchip {state.irqchip!r}")
    for node, vcpu in zip(file["vcpus"].items(), state.vcpus, strict=True):
        if (vcpu.lapic is not None) != (state.irqchip != "none"):
            raise node["lapic"].wrong(f"it does not go with irqchip {state.irqchip!r}")


def _check_ram(file: _Node, state: VmState) -> None:
    if state.ram_bytes % PAGE_BYTES:
        raise file["ram_bytes"].wrong(f"{state.ram_bytes} is not a multiple of {PAGE_BYTES}")
    end = 0
    for node, run in zip(file["ram"].items(), state.ram, strict=True):
        if run.gpa < end or run.gpa + run.size_bytes > state.ram_bytes:
            raise node.wrong(f"{run.size_bytes} bytes at {run.gpa:#x} are not between the others")
        end = run.gpa + run.size_bytes
        run.data()
