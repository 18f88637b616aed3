"""A guest run to its end on the model, with its ticks: what `ModelVm.run` stands on."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from kvmtick.guests import Guest, Parameters
from kvmtick.kvm.goal import TickGoal, any_of
from kvmtick.kvm.length import NOMINAL_TIMES, believed_period_ns, most_ns, parameters_of
from kvmtick.machine.machine import Exit, Machine
from kvmtick.machine.ports import PortHandler
from kvmtick.machine.run import PitSettings, Run
from kvmtick.ticks.life import TickAssembler
from kvmtick.ticks.report import TickReport
from kvmtick.timing.wall import Stopwatch

__all__ = ["GuestRun"]


class GuestRun:
    """Runs the guest of one machine, and puts its ticks together."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.assembler = TickAssembler(tasks=machine.recorder.tasks)
        machine.recorder.add_entry_consumer(self.assembler)

    def run(
        self,
        ticks: int | None,
        for_ns: int | None,
        limit_s: float | None,
        until: Callable[[], bool] | None,
        counter: int | None,
        handlers: Mapping[int, PortHandler],
        on_ioapic_eoi: Callable[[int], None] | None,
    ) -> Run:
        """`ModelVm.run`, with its arguments in order."""
        stopwatch = Stopwatch()
        guest = self.machine.loaded[-1] if self.machine.loaded else None
        lengths_ns = [] if for_ns is None else [for_ns]
        goal: TickGoal | None = None
        if guest is not None and guest.parameters is not None:
            lengths_ns += self._rest_ns(guest)
        elif ticks is not None:
            goal = TickGoal(ticks, self._reached, self._is_time_up)
        self.machine.ports.handlers = handlers
        self.machine.ports.on_ioapic_eoi = on_ioapic_eoi
        exit_ = self.machine.run(
            min(lengths_ns, default=None), limit_s, any_of(goal.is_over if goal else None, until)
        )
        if exit_.reason == "until" and goal is not None and goal.reason:
            exit_ = Exit(goal.reason)
        return self._result(guest, exit_, stopwatch.elapsed_s(), counter)

    def ticks(self) -> TickReport:
        """The ticks so far, of the PIT if it ever expired, else of the busiest local APIC timer."""
        self.machine.recorder.flush()
        self.assembler.settle()
        return self.assembler.report()

    def parameters(self) -> Parameters | None:
        """The guest's parameter block as it is now in RAM; None for a foreign guest, and for one
        that has overwritten it.
        """
        guest = self.machine.loaded[-1] if self.machine.loaded else None
        return parameters_of(guest, self.machine.read_ram)

    def _rest_ns(self, guest: Guest) -> list[int]:
        """How much longer a built-in guest may take for the ticks it waits for."""
        whole_ns = most_ns(guest, self.parameters())
        if whole_ns is None:
            return []
        ran_ns = self.machine.clock.now_ns - max(self.machine.loaded_ns, self._started_ns())
        return [max(0, whole_ns - ran_ns)]

    def _reached(self) -> int:
        """How many ticks have reached the guest."""
        self.machine.recorder.flush()
        return self.assembler.reached

    def _is_time_up(self, ticks: int) -> bool:
        """Whether a foreign guest had ten times the time that so many ticks of the PIT take."""
        pit = self.machine.board.pit
        period_ns = pit.period_ns if pit else 0
        return period_ns > 0 and self.machine.elapsed_ns >= NOMINAL_TIMES * ticks * period_ns

    def _started_ns(self) -> int:
        """When the machine was first run; now, if it was not."""
        return min(self.machine.started_ns, self.machine.clock.now_ns)

    def _result(self, guest: Guest | None, exit_: Exit, wall_s: float, counter: int | None) -> Run:
        machine, pit, block = self.machine, self.machine.board.pit, self.parameters()
        vcpu = machine.vcpu
        assert vcpu is not None
        guest_ticks = block.counter if block else None
        ticks = self.ticks() if pit or self.assembler.expired else None
        if counter is not None:
            guest_ticks = int.from_bytes(machine.read_memory(counter, 4), "little")
        return Run(
            guest=guest.name if guest else "",
            cpu=vcpu.engine.name,
            chips="model",
            clock=machine.clock.name,
            seed=machine.host.seed,
            elapsed_ns=machine.elapsed_ns,
            wall_s=wall_s,
            instructions=machine.instructions,
            exit=exit_,
            pit=PitSettings(pit.channels[0].count, pit.period_ns, pit.reinject) if pit else None,
            guest_ticks=guest_ticks,
            ticks=ticks,
            sources=self.assembler.reports() if ticks is not None else [],
            believed_period_ns=believed_period_ns(guest, block),
            has_rate=guest is None or guest.has_rate,
            faults=machine.host.faults(),
            console=machine.ports.console.decode("utf-8", "replace"),
            serial=machine.ports.serial.decode("utf-8", "replace"),
        )
