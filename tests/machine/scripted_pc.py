"""A VM of scripted vCPUs: what the tests of turns share."""

from collections.abc import Callable, Mapping

from kvmtick.abi.structs import KVM_MP_STATE_RUNNABLE
from kvmtick.cpu.scripted import Routine, ScriptedEngine
from kvmtick.kvm.model import ModelVm
from kvmtick.trace.events import Record

US = 1_000
LOG, EXIT = 0x3000, 0xF4
SVR, EOI, ICR, ICR2 = 0xFEE000F0, 0xFEE000B0, 0xFEE00300, 0xFEE00310
FIXED_42, NMI = 0x4042, 0x4400


class CountingEngine(ScriptedEngine):
    """Counts its entries."""

    entries = 0

    def enter(
        self, intr_info: int, irq_window: bool, nmi_window: bool, budget: int, tsc: int
    ) -> int:
        self.entries += 1
        return super().enter(intr_info, irq_window, nmi_window, budget, tsc)


class Pc:
    """A VM whose vCPUs run routines; what they write to LOG is kept with the time.

    All of them run from the start if `started`, and without an irqchip; else those that do not boot
    wait for INIT and SIPI.
    """

    def __init__(
        self,
        *guests: Routine,
        handlers: Mapping[int, Routine] | None = None,
        irqchip: bool = True,
        boot: int = 0,
        started: bool = False,
        **options: int,
    ) -> None:
        self.log: list[tuple[int, int]] = []
        self.engines = [CountingEngine(guest, handlers) for guest in guests]
        waiting = iter(self.engines)
        self.vm = ModelVm(engine=lambda: next(waiting), **options)  # type: ignore[arg-type]
        self.records: list[Record] = []
        self.vm.machine.recorder.add_consumer(self.records.extend)
        self.vm.set_boot_cpu_id(boot)
        if irqchip:
            self.vm.create_irqchip()
        self.vcpus = [self.vm.create_vcpu(index) for index in range(len(guests))]
        for vcpu in self.vcpus[1:] if started else ():
            vcpu.set_mp_state(KVM_MP_STATE_RUNNABLE)

    def run(self, for_ns: int | None = None, until: Callable[[], bool] | None = None) -> str:
        return self.vm.run(for_ns=for_ns, until=until, handlers={LOG: self._write}).exit.reason

    def _write(self, port: int, size_bytes: int, value: int | None) -> None:
        assert value is not None
        self.log.append((self.vm.machine.clock.now_ns, value))

    def values(self) -> list[int]:
        return [value for _, value in self.log]

    def times(self, value: int) -> list[int]:
        return [ns for ns, logged in self.log if logged == value]

    def states(self) -> list[int]:
        return [vcpu.get_mp_state() for vcpu in self.vcpus]
