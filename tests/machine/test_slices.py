"""What falls due while the vCPU is on its way into the guest, or off its CPU."""

from collections.abc import Iterator

from kvmtick.cpu.scripted import Cli, Out, ScriptedEngine, Spin, Sti
from kvmtick.kvm.model import ModelVm
from kvmtick.testing import GuestMachine

PERIOD_NS = 999_848
BASE = 0x20
ICW4_AEOI = 0x03
PORT = 0xD0


def scripted_vm(main: Iterator[object], seen: list[int]) -> ModelVm:
    """A VM whose guest is `main`; its handler of IRQ 0 notes the time and writes no EOI."""
    vm = ModelVm(engine=lambda: engine)

    def handler() -> Iterator[object]:
        seen.append(vm.machine.clock.now_ns)
        yield Spin(1)

    engine = ScriptedEngine(lambda: main, {BASE: handler})
    vm.create_irqchip()
    vm.create_pit2()
    vm.create_vcpu()
    return vm


def start_ticks() -> Iterator[object]:
    """The PICs with automatic EOI, counter 0 at 1 kHz."""
    for port, value in ((0x20, 0x11), (0x21, BASE), (0x21, 0x04), (0x21, ICW4_AEOI), (0x21, 0xFE)):
        yield Out(port, value)
    for port, value in ((0x43, 0x34), (0x40, 0xA9), (0x40, 0x04)):
        yield Out(port, value)


def test_work_that_an_automatic_eoi_queues_at_the_injection_runs_at_once() -> None:
    def main() -> Iterator[object]:
        yield from start_ticks()
        yield Cli()
        yield Spin(20 * PERIOD_NS + PERIOD_NS // 2)
        yield Sti()
        yield Spin(100 * PERIOD_NS)

    seen: list[int] = []
    with scripted_vm(main(), seen) as vm:
        run = vm.run(for_ns=40 * PERIOD_NS)
    assert run.ticks is not None
    assert run.ticks.count("reinjected") == 19
    assert run.ticks.count("delivered") == 19, "those after the interrupts were on again"
    assert run.ticks.count("outstanding") <= 1
    replay = seen[:20]
    assert replay[-1] - replay[0] < PERIOD_NS // 10, "the 20 held back came back to back"


def test_a_shorter_absence_does_not_end_a_longer_one() -> None:
    with GuestMachine("tick-pic", ticks=1000) as machine:
        machine.run(for_="5ms")
        before = machine.guest_ticks
        machine.vcpu_off("50ms")
        machine.vcpu_off("1ms")
        machine.run(for_="40ms")
        assert machine.guest_ticks == before
        machine.run(for_="20ms")
        assert machine.guest_ticks == 65, "all are replayed"


def test_a_vcpu_that_is_off_draws_no_further_absence() -> None:
    with GuestMachine("tick-pic", ticks=1000, faults={"vcpu_off": "10us"}) as machine:
        machine.run(for_="5ms")
        before = machine.guest_ticks
        machine.vcpu_off("50ms")
        machine.run(for_="40ms")
        assert machine.guest_ticks == before


def test_of_the_nmis_that_come_while_one_is_handled_one_waits() -> None:
    handled: list[int] = []

    def main() -> Iterator[object]:
        yield Spin(100)
        yield Out(PORT, 0)
        yield Spin(100)

    def nmi() -> Iterator[object]:
        handled.append(engine.retired)
        yield Out(PORT, len(handled))
        yield Spin(10)

    def ask_for_three(port: int, size_bytes: int, value: int | None) -> None:
        if value == 0:
            vcpu.nmi()
        if value == 1:
            for _ in range(3):
                vcpu.nmi()

    engine = ScriptedEngine(main, {2: nmi})
    with ModelVm(engine=lambda: engine) as vm:
        vm.create_irqchip()
        vcpu = vm.create_vcpu()
        vm.run(for_ns=1000, handlers={PORT: ask_for_three})
    assert len(handled) == 2
