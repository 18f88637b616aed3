"""KVM_GET_VCPU_EVENTS and KVM_SET_VCPU_EVENTS: one table, held against both back ends."""

import errno
from typing import Any

import pytest
from backends import MakeVm, vms, with_cpuid  # noqa: F401 - a fixture

from kvmtick.abi import KvmError
from kvmtick.abi.structs import (
    KVM_MP_STATE_INIT_RECEIVED,
    KVM_MP_STATE_RUNNABLE,
    KVM_VCPUEVENT_VALID_PAYLOAD,
    KVM_VCPUEVENT_VALID_SIPI_VECTOR,
    KVM_VCPUEVENT_VALID_TRIPLE_FAULT,
    KVM_X86_SHADOW_INT_MOV_SS,
    KVM_X86_SHADOW_INT_STI,
    kvm_vcpu_events,
    struct_fields,
)

TOLD = 0xD
"""NMI_PENDING, SHADOW and SMM."""
GP, BP, UD = 13, 3, 6


def events(flags: int = TOLD, **fields: int) -> kvm_vcpu_events:
    """`exception__nr=13` sets `exception.nr`."""
    made = kvm_vcpu_events(flags=flags)
    for path, value in fields.items():
        *outer, name = path.split("__")
        target: Any = made
        for part in outer:
            target = getattr(target, part)
        setattr(target, name, value)
    return made


def told(vcpu: Any) -> dict[str, int]:
    """All that is not 0, but the flags, which are always the same."""
    fields = {name: value for name, value in struct_fields(vcpu.get_vcpu_events()) if value}
    assert fields.pop("flags") == TOLD
    return fields


@pytest.fixture
def vcpu(vms: MakeVm) -> Any:  # noqa: F811
    vm = vms()
    vm.create_irqchip()
    return with_cpuid(vm, vm.create_vcpu(0))


KEPT = {
    "nothing": ({}, {}),
    "an exception": (
        {"exception__injected": 1, "exception__nr": UD},
        {"exception.injected": 1, "exception.nr": UD},
    ),
    "an error code": (
        {
            "exception__injected": 5,
            "exception__nr": GP,
            "exception__has_error_code": 255,
            "exception__error_code": 0xFFFF_FFFF,
        },
        {
            "exception.injected": 1,
            "exception.nr": GP,
            "exception.has_error_code": 1,
            "exception.error_code": 0xFFFF_FFFF,
        },
    ),
    "a software exception is not told": (
        {"exception__injected": 1, "exception__nr": BP},
        {"exception.nr": BP},
    ),
    "pending counts with a payload only": (
        {"exception__pending": 1, "exception__nr": GP},
        {"exception.nr": GP},
    ),
    "a payload without its flag is stored": (
        {
            "exception__injected": 1,
            "exception__nr": 14,
            "exception_has_payload": 1,
            "exception_payload": 0x1000,
        },
        {"exception.injected": 1, "exception.nr": 14, "exception_payload": 0x1000},
    ),
    "numbers alone": (
        {"exception__nr": 99, "exception__error_code": 7, "interrupt__nr": 0x30},
        {"exception.nr": 99, "exception.error_code": 7, "interrupt.nr": 0x30},
    ),
    "an interrupt": (
        {"interrupt__injected": 7, "interrupt__nr": 0x30},
        {"interrupt.injected": 1, "interrupt.nr": 0x30},
    ),
    "a software interrupt is not told": (
        {"interrupt__injected": 1, "interrupt__nr": 0x80, "interrupt__soft": 9},
        {"interrupt.nr": 0x80},
    ),
    "the shadow of STI": (
        {"interrupt__shadow": KVM_X86_SHADOW_INT_STI},
        {"interrupt.shadow": KVM_X86_SHADOW_INT_STI},
    ),
    "the shadow of MOV SS": (
        {"interrupt__shadow": KVM_X86_SHADOW_INT_MOV_SS},
        {"interrupt.shadow": KVM_X86_SHADOW_INT_MOV_SS},
    ),
    "a shadow without its flag": ({"flags": 0, "interrupt__shadow": 1}, {}),
    "an NMI that goes in": ({"nmi__injected": 3}, {"nmi.injected": 1}),
    "NMIs up to two": ({"nmi__pending": 5}, {"nmi.pending": 2}),
    "one NMI behind one in service": (
        {"nmi__pending": 2, "nmi__masked": 3},
        {"nmi.pending": 1, "nmi.masked": 1},
    ),
    "one NMI behind one that goes in": (
        {"nmi__pending": 2, "nmi__injected": 1},
        {"nmi.pending": 1, "nmi.injected": 1},
    ),
    "NMIs without their flag": ({"flags": 0, "nmi__pending": 2}, {}),
    "the mask has no flag": ({"flags": 0, "nmi__masked": 1}, {"nmi.masked": 1}),
    "a latched INIT": ({"smi__latched_init": 1}, {"smi.latched_init": 1}),
    "SMM without its flag": ({"flags": 5, "smi__smm": 1, "smi__latched_init": 1}, {}),
    "the SIPI vector is never told": (
        {"flags": KVM_VCPUEVENT_VALID_SIPI_VECTOR, "sipi_vector": 0x1_2345},
        {},
    ),
    "a triple fault without its flag": ({"triple_fault__pending": 1}, {}),
    "everything at once": (
        {
            "exception__injected": 1,
            "exception__nr": GP,
            "interrupt__injected": 1,
            "interrupt__nr": 0x40,
            "nmi__injected": 1,
        },
        {
            "exception.injected": 1,
            "exception.nr": GP,
            "interrupt.injected": 1,
            "interrupt.nr": 0x40,
            "nmi.injected": 1,
        },
    ),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_is_set_is_told(vcpu: Any, name: str) -> None:
    given, expected = KEPT[name]
    vcpu.set_vcpu_events(events(**given))
    assert told(vcpu) == expected
    vcpu.set_vcpu_events(events(exception__nr=0))
    assert told(vcpu) == {}, "all of it can be taken back"


@pytest.mark.parametrize(
    "given",
    [
        {"exception__injected": 1, "exception__nr": 2},
        {"exception__injected": 1, "exception__nr": 32},
        {"flags": KVM_VCPUEVENT_VALID_PAYLOAD},
        {"flags": KVM_VCPUEVENT_VALID_TRIPLE_FAULT},
        {"flags": 1 << 6},
    ],
)
def test_what_is_refused_changes_nothing(vcpu: Any, given: dict[str, int]) -> None:
    with pytest.raises(KvmError) as caught:
        vcpu.set_vcpu_events(events(**{"nmi__pending": 1, **given}))
    assert caught.value.errno == errno.EINVAL
    assert told(vcpu) == {}


@pytest.mark.parametrize("field", ["smm", "pending", "smm_inside_nmi"])
def test_there_is_no_smm_which_is_found_out_last(vcpu: Any, field: str) -> None:
    given = {f"smi__{field}": 1, "smi__latched_init": 1}
    with pytest.raises(KvmError) as caught:
        vcpu.set_vcpu_events(
            events(nmi__pending=1, nmi__masked=1, interrupt__injected=1, interrupt__nr=9, **given)
        )
    assert caught.value.errno == errno.EINVAL
    assert told(vcpu) == {
        "nmi.pending": 1,
        "nmi.masked": 1,
        "interrupt.injected": 1,
        "interrupt.nr": 9,
    }


def test_nmis_that_are_not_given_stay(vcpu: Any) -> None:
    vcpu.nmi()
    vcpu.nmi()
    vcpu.set_vcpu_events(events(flags=0))
    assert told(vcpu) == {"nmi.pending": 2}
    vcpu.set_vcpu_events(events())
    assert told(vcpu) == {}


def test_a_latched_init_is_taken_when_somebody_looks(vcpu: Any) -> None:
    vcpu.set_mp_state(KVM_MP_STATE_INIT_RECEIVED)
    vcpu.set_vcpu_events(events(smi__latched_init=1))
    assert told(vcpu) == {"smi.latched_init": 1}
    assert vcpu.get_mp_state() == KVM_MP_STATE_RUNNABLE, "it is the one that boots"
    assert told(vcpu) == {}


def test_without_an_irqchip_there_is_no_init_to_latch(vms: MakeVm) -> None:  # noqa: F811
    vcpu = vms().create_vcpu(0)
    vcpu.set_vcpu_events(events(flags=0xF, smi__latched_init=1, sipi_vector=5, nmi__pending=1))
    assert told(vcpu) == {"nmi.pending": 1}


def test_an_injected_interrupt_is_a_bit_of_the_special_registers(vcpu: Any) -> None:
    vcpu.set_vcpu_events(events(interrupt__injected=1, interrupt__nr=0x91))
    assert list(vcpu.get_sregs().interrupt_bitmap) == [0, 0, 1 << 0x11, 0]
    vcpu.set_vcpu_events(events(interrupt__injected=1, interrupt__nr=0x91, interrupt__soft=1))
    assert list(vcpu.get_sregs().interrupt_bitmap) == [0, 0, 0, 0]


def test_registers_leave_an_injected_exception_alone(vcpu: Any) -> None:
    vcpu.set_vcpu_events(events(exception__injected=1, exception__nr=GP))
    vcpu.set_regs(vcpu.get_regs())
    vcpu.set_sregs(vcpu.get_sregs())
    assert told(vcpu) == {"exception.injected": 1, "exception.nr": GP}
