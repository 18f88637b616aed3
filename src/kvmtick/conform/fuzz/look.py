"""Looking at a VM after each step: the state of it as KVM tells it, less what is a matter of time.

This module is the one rule on times and the list of what is set aside (docs/fidelity.md, "What the
fuzzer does not compare"):

* of the PIT not `count_load_time`, `latched_count` and bit 7 (OUT) of a latched `status`;
* of a local APIC's timer whether TMCCT is 0, no more;
* the PPR in KVM_GET_LAPIC of a vCPU that runs: KVM brings it up to date whenever it looks for
  interrupts, so also when the host takes the vCPU out of the guest. What the guest reads is;
* in KVM_GET_VCPU_EVENTS the number of an interrupt or exception that there is none of.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

from kvmtick.abi import ioctls
from kvmtick.abi.errors import KvmError
from kvmtick.abi.structs import (
    KvmStruct,
    kvm_ioapic_state,
    kvm_irqchip,
    kvm_lapic_state,
    kvm_mp_state,
    kvm_msr_entry,
    kvm_pic_state,
    kvm_pit_state2,
    kvm_vcpu_events,
    make_msrs,
    struct_fields,
)
from kvmtick.conform.fuzz.operations import Answer
from kvmtick.kvm.api import Vcpu, Vm

__all__ = ["Difference", "Looks", "Seen", "State", "errno_name"]

PPR, TMCCT = 0xA0, 0x390
MSR_APIC_BASE, MSR_TSC_DEADLINE = 0x1B, 0x6E0
_MSRS = bytes(make_msrs(kvm_msr_entry(index=index) for index in (MSR_APIC_BASE, MSR_TSC_DEADLINE)))
_CHIPS = (("pic 0", 16), ("pic 1", 16), ("ioapic", 216))

State: TypeAlias = int | bytes | str
"""A number, the bytes of a structure, or the errno."""


@dataclass(frozen=True, slots=True)
class Difference:
    """A field on which two back ends disagree; of a value that one alone has the other is None."""

    field: str
    left: Answer
    right: Answer


@dataclass(frozen=True, slots=True)
class Seen:
    """What there was to see after a step: the operation's answer, and states by name."""

    answer: Answer
    states: dict[str, State]

    def differences(self, other: Seen) -> Iterator[Difference]:
        """Field by field."""
        if self.answer != other.answer:
            yield Difference("answer", self.answer, other.answer)
        for name in self.states | other.states:
            left, right = self.states.get(name), other.states.get(name)
            if left != right:
                yield from _fields(name, left, right)


def _fields(name: str, left: Any, right: Any) -> Iterator[Difference]:
    if not isinstance(left, bytes) or not isinstance(right, bytes):
        yield Difference(name, _plain(left), _plain(right))
        return
    split = _SPLIT[name.split()[0]]
    for (field, one), (_, two) in zip(split(left), split(right), strict=True):
        if one != two:
            yield Difference(f"{name}.{field}", _plain(one), _plain(two))


def _plain(value: Any) -> Answer:
    return value.hex() if isinstance(value, bytes) else value


def _of(struct: type[KvmStruct]) -> Callable[[bytes], Iterator[tuple[str, int | bytes]]]:
    return lambda data: struct_fields(struct.from_buffer_copy(data))


def _registers(page: bytes) -> Iterator[tuple[str, int]]:
    for at in range(0, len(page), 4):
        yield f"[{at:#x}]", int.from_bytes(page[at : at + 4], "little")


_SPLIT: dict[str, Callable[[bytes], Iterator[tuple[str, int | bytes]]]] = {
    "pit": _of(kvm_pit_state2),
    "pic": _of(kvm_pic_state),
    "ioapic": _of(kvm_ioapic_state),
    "lapic": _registers,
    "events": _of(kvm_vcpu_events),
}


class Looks:
    """Reads the states of one VM; `runs`: its vCPUs enter the guest."""

    def __init__(self, vm: Vm[Any], runs: bool) -> None:
        self._vm = vm
        self._runs = runs
        # What ioctls fill in, made once.
        self.pit = kvm_pit_state2()
        """The PIT as it was last; all 0 without one."""
        self._chip = kvm_irqchip()
        self._lapic = kvm_lapic_state()
        self._events = kvm_vcpu_events()
        self._mp_state = kvm_mp_state()

    def everything(self, vcpus: Iterable[Vcpu], answer: Answer) -> Seen:
        """What there is to see now."""
        ioctl = self._vm.ioctl
        states: dict[str, State] = {}
        states["pit"] = _but(_read(ioctl, ioctls.KVM_GET_PIT2, self.pit), _comparable_pit)
        for chip_id, (name, size_bytes) in enumerate(_CHIPS):
            self._chip.chip_id = chip_id
            chip = _read(ioctl, ioctls.KVM_GET_IRQCHIP, self._chip)
            states[name] = chip if isinstance(chip, str) else chip[8 : 8 + size_bytes]
        for index, vcpu in enumerate(vcpus):
            for name, state in self._of_vcpu(vcpu):
                states[f"{name} {index}"] = state
        return Seen(answer, states)

    def _of_vcpu(self, vcpu: Vcpu) -> Iterator[tuple[str, State]]:
        ioctl, runs = vcpu.ioctl, self._runs
        ioctl(ioctls.KVM_GET_MP_STATE, self._mp_state)
        yield "mp_state", self._mp_state.mp_state
        lapic = _read(ioctl, ioctls.KVM_GET_LAPIC, self._lapic)
        yield "lapic", _but(lapic, lambda page: _comparable_lapic(page, runs))
        events = _read(ioctl, ioctls.KVM_GET_VCPU_EVENTS, self._events)
        yield "events", _but(events, _comparable_events)
        area = vcpu.area
        yield "if_flag", area.if_flag
        yield "ready_for_interrupt_injection", area.ready_for_interrupt_injection
        yield "cr8", area.cr8
        yield "apic_base", area.apic_base
        msrs = bytearray(_MSRS)
        ioctl(ioctls.KVM_GET_MSRS, msrs)
        yield "IA32_APIC_BASE", int.from_bytes(msrs[16:24], "little")
        yield "IA32_TSC_DEADLINE", int(any(msrs[32:40]))

    def lapic(self, vcpu: Vcpu) -> bytes | None:
        """KVM_GET_LAPIC; None without an in-kernel local APIC."""
        page = _read(vcpu.ioctl, ioctls.KVM_GET_LAPIC, self._lapic)
        return None if isinstance(page, str) else page


def _read(ioctl: Callable[[int, KvmStruct], int], request: int, buffer: KvmStruct) -> bytes | str:
    """What an ioctl fills in, or the errno."""
    try:
        ioctl(request, buffer)
    except KvmError as error:
        return errno_name(error)
    return bytes(buffer)


def errno_name(error: KvmError) -> str:
    """Such as `EINVAL`."""
    return errno.errorcode.get(error.errno or 0, str(error.errno))


def _but(state: bytes | str, comparable: Callable[[bytearray], bytes]) -> bytes | str:
    """As much of a state as is compared; an errno as it is."""
    return state if isinstance(state, str) else comparable(bytearray(state))


_CHANNEL_BYTES, _LATCHED_COUNT, _STATUS, _LOAD_TIME = 24, 4, 8, 16


def _comparable_pit(state: bytearray) -> bytes:
    """Struct kvm_pit_state2 without times; `state` is changed."""
    for at in range(0, 3 * _CHANNEL_BYTES, _CHANNEL_BYTES):
        state[at + _LATCHED_COUNT : at + _LATCHED_COUNT + 2] = b"\0\0"
        state[at + _STATUS] &= 0x7F
        state[at + _LOAD_TIME : at + _LOAD_TIME + 8] = b"\0\0\0\0\0\0\0\0"
    return bytes(state)


def _comparable_lapic(page: bytearray, runs: bool) -> bytes:
    """A local APIC's registers without times, and of one that `runs` without PPR; `page` is
    changed.
    """
    page[TMCCT : TMCCT + 4] = bytes((any(page[TMCCT : TMCCT + 4]), 0, 0, 0))
    if runs:
        page[PPR : PPR + 4] = b"\0\0\0\0"
    return bytes(page)


def _comparable_events(events: bytearray) -> bytes:
    """Struct kvm_vcpu_events without numbers that mean nothing; `events` is changed."""
    if not events[0] and not events[3]:
        events[:8] = bytes(8)
    if not events[8]:
        events[9] = events[10] = 0
    return bytes(events)
