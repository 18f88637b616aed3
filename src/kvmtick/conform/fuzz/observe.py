"""What is compared after each step: the state of a VM as KVM tells it, less what is a matter of
time.

This module is the one rule on times and the list of what is set aside (docs/fidelity.md, "What the
fuzzer does not compare"):

* of the PIT not `count_load_time`, `latched_count` and bit 7 (OUT) of a latched `status`;
* of a local APIC's timer whether TMCCT is 0, no more;
* the PPR in KVM_GET_LAPIC of a vCPU that runs: KVM brings it up to date whenever it looks for
  interrupts, so also when the host takes the vCPU out of the guest. What the guest reads is;
* in KVM_GET_VCPU_EVENTS the number of an interrupt or exception that there is none of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from kvmtick.abi.structs import (
    KvmStruct,
    kvm_ioapic_state,
    kvm_pic_state,
    kvm_pit_state2,
    kvm_vcpu_events,
    struct_fields,
)
from kvmtick.conform.fuzz.operations import Answer

__all__ = ["Difference", "Seen", "comparable_events", "comparable_lapic", "comparable_pit"]

PPR, TMCCT = 0xA0, 0x390


@dataclass(frozen=True, slots=True)
class Difference:
    """A field on which two back ends disagree; of a value that one alone has the other is None."""

    field: str
    left: Answer
    right: Answer


@dataclass(frozen=True, slots=True)
class Seen:
    """What there was to see after a step: the operation's answer, and states by name: a number,
    the bytes of a structure, or the errno.
    """

    answer: Answer
    states: dict[str, int | bytes | str]

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

_CHANNEL_BYTES, _LATCHED_COUNT, _STATUS, _LOAD_TIME = 24, 4, 8, 16


def comparable_pit(state: bytearray) -> bytes:
    """Struct kvm_pit_state2 without times; `state` is changed."""
    for at in range(0, 3 * _CHANNEL_BYTES, _CHANNEL_BYTES):
        state[at + _LATCHED_COUNT : at + _LATCHED_COUNT + 2] = b"\0\0"
        state[at + _STATUS] &= 0x7F
        state[at + _LOAD_TIME : at + _LOAD_TIME + 8] = b"\0\0\0\0\0\0\0\0"
    return bytes(state)


def comparable_lapic(page: bytearray, runs: bool) -> bytes:
    """A local APIC's registers without times, and of one that `runs` without PPR; `page` is
    changed.
    """
    page[TMCCT : TMCCT + 4] = bytes((any(page[TMCCT : TMCCT + 4]), 0, 0, 0))
    if runs:
        page[PPR : PPR + 4] = b"\0\0\0\0"
    return bytes(page)


def comparable_events(events: bytearray) -> bytes:
    """Struct kvm_vcpu_events without numbers that mean nothing; `events` is changed."""
    if not events[0] and not events[3]:
        events[:8] = bytes(8)
    if not events[8]:
        events[9] = events[10] = 0
    return bytes(events)
