"""A fleet: many machines of one kind in one thread, in virtual time, each with its ticks judged.

The machines run scripted guests (`kvmtick.cpu.listed`), each for a slice of its time, round robin.
Nothing that changes is shared between them but the recorder's ring, which is handed on whenever
another machine has its turn: a machine does what it would do alone.

`kvmtick.machine.fleet_pool` has fleets over many processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final

from kvmtick.abi.structs import KVM_PIT_SPEAKER_DUMMY
from kvmtick.cpu.listed import ListedEngine, Listing
from kvmtick.machine.fleet_guests import GUESTS
from kvmtick.machine.machine import Exit, Machine
from kvmtick.ticks.life import TickAssembler
from kvmtick.ticks.report import TickReport
from kvmtick.ticks.verdict import Verdict
from kvmtick.timing.wall import collections_held_back
from kvmtick.trace.recorder import Ring
from kvmtick.vcpu.cpuid import Cpuid, supported

__all__ = ["SLICE_NS", "Fleet", "MachineTicks", "listing_of", "total"]

SLICE_NS: Final = 50_000_000
"""How long a machine runs at a time: 50 ticks at 1 kHz."""
MOST_MACHINES: Final = 1_000_000

_LEAF_FEATURES: Final = 1
_RUNNING: Final = "time"


@dataclass(frozen=True, slots=True)
class MachineTicks:
    """What became of one machine. Times are its own, in ns.

    `counts`: of the main source, by verdict, with `expired` and `extra`. `latency_ns`: `p50`, `p99`
    and `max` by hop.
    """

    index: int
    seed: int
    faults: dict[str, str]
    elapsed_ns: int
    instructions: int
    exit: Exit | None
    """None: it could go on."""
    source: str
    counts: dict[str, int]
    latency_ns: dict[str, dict[str, int]] = field(default_factory=dict)

    @property
    def expired(self) -> int:
        """How often its timer expired."""
        return self.counts["expired"]


def total(machines: Sequence[MachineTicks]) -> dict[str, int]:
    """The counts of all of them."""
    names = ("expired", *(verdict.value for verdict in Verdict), "extra")
    return {name: sum(machine.counts[name] for machine in machines) for name in names}


def listing_of(guest: str | Listing) -> Listing:
    """A built-in guest by its name; ValueError names those there are."""
    if isinstance(guest, Listing):
        return guest
    if guest not in GUESTS:
        raise ValueError(f"no fleet guest {guest!r}: choose one of {', '.join(GUESTS)}")
    return GUESTS[guest]()


class Member:
    """One machine of a fleet."""

    __slots__ = ("assembler", "exit", "index", "machine")

    def __init__(
        self, index: int, guest: Listing, seed: int, ring: Ring, cpuid: Cpuid, keep: int
    ) -> None:
        machine = Machine(seed=seed, ram_bytes=0, ring=ring)
        self.index = index
        self.machine = machine
        self.exit: Exit | None = None
        """Why it ended; None: it goes on."""
        self.assembler = TickAssembler(keep=keep, tasks=machine.recorder.tasks)
        machine.recorder.add_entry_consumer(self.assembler)
        machine.board.create_irqchip()
        machine.board.create_pit(KVM_PIT_SPEAKER_DUMMY)
        vcpu = machine.create_vcpu(ListedEngine(guest))
        vcpu.cpuid.set_same(cpuid)
        assert vcpu.lapic is not None
        vcpu.lapic.after_set_cpuid(vcpu.cpuid.maxphyaddr(), vcpu.cpuid.has_leaf(_LEAF_FEATURES))
        machine.recorder.flush()

    def fault(self, name: str, delay: str | None) -> None:
        """Make its host late from now on (`worker_delay`, `exp:200us`); None ends it."""
        self.machine.host.set_fault(name, delay)

    def run(self, for_ns: int) -> None:
        """Let it run on, unless it has ended."""
        if self.exit is None:
            end = self.machine.run_alone(for_ns)
            if end.reason != _RUNNING:
                self.exit = end

    def close(self) -> None:
        """Harmless when repeated. What its worker still does then changes no result."""
        if not self.machine.closed:
            recorder = self.machine.recorder
            recorder.remove_entry_consumer(self.assembler)
            self.machine.close()
            recorder.flush()

    def ticks(self) -> TickReport:
        """The ticks so far, of the main source."""
        self.assembler.settle()
        return self.assembler.report()

    def result(self) -> MachineTicks:
        """The same in numbers, to keep."""
        machine, report = self.machine, self.ticks()
        counts = {verdict.value: report.count(verdict) for verdict in Verdict}
        return MachineTicks(
            self.index,
            machine.host.seed,
            machine.host.faults(),
            machine.elapsed_ns,
            machine.instructions or 0,
            self.exit,
            report.source,
            {"expired": report.expired, **counts, "extra": report.extra},
            report.latency_ns,
        )


class Fleet:
    """`count` machines with irqchip, PIT and one vCPU each. A context manager.

    All have the same `faults`; machine n has seed `seed + n`.
    """

    def __init__(
        self,
        count: int,
        guest: str | Listing = "tick-pic",
        *,
        seed: int = 0,
        faults: Mapping[str, str] | None = None,
        reinject: bool = True,
        first: int = 0,
        keep: int = 0,
    ) -> None:
        """`guest`: `tick-pic`, `tick-ioapic`, `tick-lapic`, or a listing. `first`: the number of
        the first machine, where these are a part of a larger fleet. `keep`: how many lives of ticks
        each machine keeps to look at. ValueError names the value and what may be given.
        """
        if not 0 < count <= MOST_MACHINES:
            raise ValueError(f"count={count}: give 1 to {MOST_MACHINES} machines")
        listing = listing_of(guest)
        self.members: list[Member] = []
        self._closed = False
        # what is made stays: looking through it again and again would take most of the time
        with collections_held_back():
            self._make(
                range(first, first + count), listing, seed, dict(faults or {}), reinject, keep
            )

    def _make(
        self,
        indexes: range,
        guest: Listing,
        seed: int,
        faults: dict[str, str],
        reinject: bool,
        keep: int,
    ) -> None:
        ring, cpuid = Ring(), Cpuid()
        cpuid.set(supported())
        for index in indexes:
            member = Member(index, guest, seed + index, ring, cpuid, keep)
            for name, delay in faults.items():
                member.fault(name, delay)
            pit = member.machine.board.pit
            if pit is not None:
                pit.set_reinject(reinject)
                member.machine.recorder.flush()
            self.members.append(member)

    def __enter__(self) -> Fleet:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, index: int) -> Member:
        return self.members[index]

    def __iter__(self) -> Iterator[Member]:
        return iter(self.members)

    def run(
        self, for_ns: int, *, slice_ns: int = SLICE_NS, until: Callable[[], bool] | None = None
    ) -> None:
        """Let every machine run for `for_ns` of its time, `slice_ns` at a turn; machines that have
        ended stay so. `until` is asked after each round, and may end it early.
        """
        if self._closed:
            raise ValueError("the fleet is closed: make another one")
        if for_ns < 0:
            raise ValueError(f"for_ns={for_ns} is negative: give 0 or more")
        if slice_ns <= 0:
            raise ValueError(f"slice_ns={slice_ns}: give more than 0")
        left_ns = for_ns
        while left_ns > 0:
            turn_ns = min(left_ns, slice_ns)
            for member in self.members:
                member.run(turn_ns)
            left_ns -= turn_ns
            if until is not None and until():
                return

    def results(self) -> list[MachineTicks]:
        """What became of each machine so far."""
        return [member.result() for member in self.members]

    def ticks(self) -> dict[str, int]:
        """The counts of all machines so far."""
        return total(self.results())

    def close(self) -> None:
        """Give everything back; harmless when repeated. The results can still be asked for."""
        self._closed = True
        for member in self.members:
            member.close()
