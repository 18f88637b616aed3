"""What the fuzzer has found: short sequences, what the kernel makes of them, and so the model."""

from collections.abc import Iterator

import pytest

from kvmtick.abi import HostError
from kvmtick.abi.caps import KVM_CAP_SPLIT_IRQCHIP
from kvmtick.abi.structs import kvm_pic_state, kvm_vcpu_events
from kvmtick.conform.fuzz.look import Seen
from kvmtick.conform.fuzz.operations import (
    Access,
    CreateIrqchip,
    CreateVcpu,
    EnableCap,
    IrqFd,
    Nmi,
    Operation,
    ReadFd,
    SetCpuid2,
    SetIrqchip,
    SetMpState,
    SetVcpuEvents,
    SignalFd,
    SignalMsi,
)
from kvmtick.conform.fuzz.side import Config, Side
from kvmtick.kvm import Kvm
from kvmtick.kvm.api import System

APIC_BASE = 0x1B
TRIPLE_FAULT = 0x20


@pytest.fixture(params=["model", "kernel"])
def system(request: pytest.FixtureRequest) -> Iterator[System]:
    try:
        system = Kvm(request.param)
    except HostError as error:
        pytest.skip(f"needs /dev/kvm: {error}")
    with system:
        yield system


def after(system: System, *operations: Operation, runs: bool = False) -> Seen:
    """What there is to see after the last of them."""
    with Side(system, Config(runs)) as side:
        for operation in operations:
            seen = side.step(operation)
            assert not side.lost
    return seen


def events(seen: Seen) -> kvm_vcpu_events:
    state = seen.states["events 0"]
    assert isinstance(state, bytes)
    return kvm_vcpu_events.from_buffer_copy(state)


def set_events(**fields: int) -> SetVcpuEvents:
    """KVM_SET_VCPU_EVENTS; names have `_` for `.`."""
    state = kvm_vcpu_events(flags=fields.pop("flags", 0))
    for name, value in fields.items():
        part, _, field = name.partition("_")
        setattr(getattr(state, part), field, value)
    return SetVcpuEvents(0, bytes(state))


def test_a_vcpu_whose_id_is_taken_lets_messages_find_the_last_one(system: System) -> None:
    """A new vCPU gets no message until the map of destinations is made anew; so it is before the
    id of the next one is looked for.
    """
    start = (CreateIrqchip(), CreateVcpu(0), CreateVcpu(1))
    init = SignalMsi(0xFEE0_1000, 0xC500)
    assert after(system, *start, init).answer == 0
    assert after(system, *start, CreateVcpu(0)).answer == "EEXIST"
    assert after(system, *start, CreateVcpu(0), init).answer == 1


def test_a_chip_that_is_not_there_has_the_pics_looked_at(system: System) -> None:
    start = (
        CreateIrqchip(),
        CreateVcpu(0),
        SetIrqchip(1, bytes(kvm_pic_state(irr=8))),
        Access(0, "out8", 0x20, 0x10),  # ICW1 forgets the request of the slave
    )
    bad = SetIrqchip(3, bytes(16))
    for operations, answer, irr in ((start, (0, 0), 0), ((*start, bad), "EINVAL", 4)):
        seen = after(system, *operations, runs=True)
        assert seen.answer == answer
        master = seen.states["pic 0"]
        assert isinstance(master, bytes)
        assert kvm_pic_state.from_buffer_copy(master).irr == irr


def test_apic_base_without_a_local_apic(system: System) -> None:
    """It knows who boots, and what the guest may not do."""
    seen = after(system, CreateVcpu(0), CreateVcpu(1))
    assert seen.states["IA32_APIC_BASE 0"] == 0xFEE0_0900
    assert seen.states["IA32_APIC_BASE 1"] == 0xFEE0_0800
    start = (CreateVcpu(0), SetCpuid2(0, "x2apic"), Access(0, "wrmsr", APIC_BASE, 0xFEE0_0D00))
    assert after(system, *start, runs=True).answer == (0, 0)
    seen = after(system, *start, Access(0, "wrmsr", APIC_BASE, 0xFEE0_0900), runs=True)
    assert seen.answer == (0, 1)
    assert seen.states["IA32_APIC_BASE 0"] == 0xFEE0_0D00


def test_nmis_that_cannot_wait_any_more(system: System) -> None:
    waiting = (CreateVcpu(0), Nmi(0), Nmi(0), Nmi(0))
    assert events(after(system, *waiting)).nmi.pending == 2
    assert events(after(system, *waiting, set_events(nmi_masked=1))).nmi.pending == 1


def test_a_triple_fault_is_refused_last(system: System) -> None:
    asked = set_events(interrupt_injected=1, interrupt_nr=0x31, nmi_masked=1, flags=TRIPLE_FAULT)
    seen = after(system, CreateVcpu(0), asked)
    assert seen.answer == "EINVAL"
    told = events(seen)
    assert (told.interrupt.injected, told.interrupt.nr, told.nmi.masked) == (1, 0x31, 1)


def test_a_sipi_resets_nothing(system: System) -> None:
    seen = after(system, CreateIrqchip(), CreateVcpu(0), set_events(nmi_masked=1), SetMpState(0, 4))
    assert seen.states["mp_state 0"] == 0
    assert events(seen).nmi.masked == 1


def test_an_irqfd_takes_what_is_signalled_though_no_chip_is_there(system: System) -> None:
    split = EnableCap(KVM_CAP_SPLIT_IRQCHIP, 24)
    assert after(system, split, SignalFd(0), ReadFd(0)).answer == 1
    assert after(system, split, IrqFd(0, 6), SignalFd(0), ReadFd(0)).answer is None
