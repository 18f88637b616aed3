"""Closing VMs and vCPUs in any order, also while another thread runs them: on both back ends."""

import errno
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from backends import make_vm
from eventfds import EventFd
from threads import JOIN_S, nothing_leaks, thread

from kvmtick import guests
from kvmtick.abi import KvmError
from kvmtick.abi.exits import ExitIo
from kvmtick.kvm.model import ModelVm
from kvmtick.machine import machine
from kvmtick.timing.queue import NEVER_NS
from kvmtick.vcpu.vcpu import MpState

CODE = 0x1000
SAYS = "e680"  # out 0x80, al
SPINS = "ebfe"  # jmp $
SLEEPS = "fb f4 ebfd"  # sti; l: hlt; jmp l
KINDS = ["model", "model-real", "kernel"]


@pytest.fixture(params=KINDS)
def new_vm(request: pytest.FixtureRequest) -> Callable[[], Any]:
    def make() -> Any:
        if request.param == "model-real":
            return ModelVm(clock="real")
        return make_vm(request.param)

    return make


def start(vm: Any, code: str, vcpu_id: int = 0) -> Any:
    """A vCPU that has come as far as SAYS, with a stack of its own."""
    at = CODE + 0x1000 * vcpu_id
    vm.write_memory(at, bytes.fromhex(SAYS + code))
    vcpu = vm.create_vcpu(vcpu_id)
    vcpu.start_at(0, at, {"rsp": at + 0x1000})
    vcpu.set_mp_state(0)
    assert isinstance(vcpu.run(), ExitIo)
    return vcpu


def ends_with_ebadf(run: Callable[[], object]) -> Callable[[], None]:
    """Until it is closed, `run` may give exits."""

    def run_on() -> None:
        while True:
            run()

    def body() -> None:
        with pytest.raises(KvmError) as failure:
            run_on()
        assert failure.value.errno == errno.EBADF

    return body


@pytest.mark.parametrize("closed", ["vcpu", "vm"])
@pytest.mark.parametrize("code", [SPINS, SLEEPS, SAYS + SPINS], ids=["spins", "sleeps", "leaves"])
def test_a_run_of_another_thread_ends(new_vm: Callable[[], Any], code: str, closed: str) -> None:
    with nothing_leaks(), new_vm() as vm:
        vm.create_irqchip()
        vcpu = start(vm, code)
        with thread(ends_with_ebadf(lambda: vcpu.run(JOIN_S))):
            (vcpu if closed == "vcpu" else vm).close()
        assert vcpu.fileno() == -1
        vcpu.kick()
        vcpu.close()


def test_the_others_run_on(new_vm: Callable[[], Any]) -> None:
    with nothing_leaks(), new_vm() as vm:
        vm.create_irqchip()
        first, second = start(vm, SPINS), start(vm, SAYS + SPINS, 1)
        with thread(ends_with_ebadf(lambda: first.run(JOIN_S))):
            first.close()
        assert isinstance(second.run(JOIN_S), ExitIo)
        with pytest.raises(KvmError) as failure:
            vm.run()
        assert failure.value.errno == errno.EBADF


@pytest.mark.parametrize("closed", ["vcpu", "vm"])
def test_a_run_of_the_whole_vm_ends(new_vm: Callable[[], Any], closed: str) -> None:
    with nothing_leaks(), new_vm() as vm:
        vm.create_irqchip()
        start(vm, SPINS)
        vcpu = start(vm, SLEEPS, 1)
        with thread(ends_with_ebadf(lambda: vm.run(limit_s=JOIN_S))):
            (vcpu if closed == "vcpu" else vm).close()


@pytest.mark.parametrize("closed", ["vcpu", "vm"])
def test_from_within_a_handler(new_vm: Callable[[], Any], closed: str) -> None:
    with nothing_leaks(), new_vm() as vm:
        vm.create_irqchip()
        vcpu = start(vm, SAYS + SPINS)

        def close(*_: object) -> int:
            (vcpu if closed == "vcpu" else vm).close()
            return 0

        with pytest.raises(KvmError) as failure:
            vm.run(handlers={0x80: close}, limit_s=JOIN_S)
        assert failure.value.errno == errno.EBADF


STRESS_ROUNDS = 10
VCPUS = 4
TICKS = (
    "b0fe e621"  # mov al, 0xfe; out 0x21, al: IRQ 0 alone
    "fb"  # sti
    "ff060006"  # l: inc word [0x600]
    "e680"  # out 0x80, al
    "f4 ebf7"  # hlt; jmp l
)
HANDLER = "ff060206 b020 e620 cf"  # inc word [0x602]; mov al, 0x20; out 0x20, al: EOI; iret


@pytest.mark.parametrize("kind", ["virtual", "real"])
@pytest.mark.parametrize("vm_first", [True, False], ids=["vm", "vcpus"])
def test_calls_from_everywhere_while_vcpus_run(kind: str, vm_first: bool) -> None:
    """Nobody waits for ever, every call is answered, and nothing is left over."""
    with nothing_leaks(), ModelVm(clock=kind) as vm:
        vm.create_irqchip()
        vm.create_pit2()
        vm.write_memory(0x20 * 4, (0x500).to_bytes(4, "little"))
        vm.write_memory(0x500, bytes.fromhex(HANDLER))
        vm.write_memory(2 * 4, (0x540).to_bytes(4, "little"))
        vm.write_memory(0x540, b"\xcf")  # iret
        pic = vm.get_irqchip(0)
        pic.chip.pic.irq_base = 0x20
        vm.set_irqchip(pic)
        vcpus = [start(vm, TICKS, vcpu_id) for vcpu_id in range(VCPUS - 1)]
        vcpus.append(start(vm, SPINS, VCPUS - 1))
        event = EventFd()
        vm.irqfd(event.fd, 0)
        exits = [threading.Event() for _ in range(VCPUS)]

        def run(at: int) -> Callable[[], None]:
            def once() -> None:
                if isinstance(vcpus[at].run(JOIN_S), ExitIo):
                    exits[at].set()

            return ends_with_ebadf(once)

        def ask() -> None:
            for number in range(STRESS_ROUNDS):
                vm.irq_line(0, number & 1)
                vm.write_memory(0x700, vm.read_memory(0x600, 4))
                vcpus[number % VCPUS].get_regs()
                vcpus[number % VCPUS].get_lapic()
                vm.get_pit2()

        def disturb() -> None:
            for number in range(STRESS_ROUNDS):
                vcpus[number % VCPUS].kick()
                vcpus[number % VCPUS].nmi()
                event.signal()

        def create() -> None:
            for number in range(VCPUS, VCPUS + 5):
                vm.create_vcpu(number).close()
                vm.irqfd(event.fd, 0, 1)
                vm.irqfd(event.fd, 0)

        with thread(run(0)), thread(run(1)), thread(run(2)), thread(run(3)):
            with thread(ask), thread(disturb), thread(create):
                pass
            assert all(each.wait(JOIN_S) for each in exits[:-1])
            for each in [vm, *vcpus] if vm_first else [*vcpus, vm]:
                each.close()
        event.close()


@pytest.mark.parametrize("kind", ["virtual", "real"])
def test_calls_do_not_wait_for_the_sleep_of_a_run(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without them it lasts for ever."""
    monkeypatch.setattr(machine, "SLICE_REAL_NS", NEVER_NS)
    with nothing_leaks(), ModelVm(clock=kind) as vm:
        vm.create_irqchip()
        vcpu = start(vm, SAYS + SLEEPS)
        event, said = EventFd(), threading.Event()
        vm.irqfd(event.fd, 0)

        def ask() -> None:
            assert said.wait(JOIN_S)
            while vcpu.get_mp_state() != MpState.HALTED:
                vm.get_irqchip(0)
            for _ in range(STRESS_ROUNDS):
                vm.get_irqchip(0)
            vm.close()

        run = ends_with_ebadf(lambda: vm.run(handlers={0x80: lambda *_: said.set()}))
        with thread(run), thread(ask):
            pass
        event.close()


def test_an_irqfd_of_a_moment_ago_wakes_a_sleeper(new_vm: Callable[[], Any]) -> None:
    with new_vm() as vm:
        vm.create_irqchip()
        vcpu = start(vm, "fb f4" + SAYS + SPINS)  # sti; hlt
        vm.write_memory(0x20 * 4, (0x500).to_bytes(4, "little"))
        vm.write_memory(0x500, b"\xcf")  # iret
        pic = vm.get_irqchip(0)
        pic.chip.pic.irq_base, pic.chip.pic.imr, pic.chip.pic.auto_eoi = 0x20, 0xFE, 1
        vm.set_irqchip(pic)
        event = EventFd()

        def signal() -> None:
            with suppress(KvmError):
                vm.irqfd(event.fd, 0)
            event.signal()

        with thread(lambda: vcpu.run(JOIN_S)):
            signal()
        event.close()


@pytest.fixture(autouse=True)
def library_is_open() -> None:
    """The first engine of a process opens files that stay."""
    with ModelVm(clock="real") as vm:
        vm.load(guests.load("tick-pic", ticks=1))
        vm.prepare(guests.load("tick-pic").needs)
        vm.run()
