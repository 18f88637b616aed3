"""What a run gave: the object of `kvmtick run --json`, and the same for library users."""

from dataclasses import dataclass, field
from typing import Any

from kvmtick.machine.machine import Exit
from kvmtick.ticks.report import TickReport

__all__ = ["BELIEVED_HZ", "PitSettings", "Run"]

BELIEVED_HZ = 1193182
"""What guests take the PIT's frequency for (105/88 MHz); KVM's runs at 1193181 Hz."""


@dataclass(frozen=True, slots=True)
class PitSettings:
    """Counter 0 at the end of a run: its count, its period in ns (after the clamp), reinject."""

    count: int
    period_ns: int
    reinject: bool


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a guest. Times are the machine's, in ns, but for `wall_s`, seconds of this host.

    `guest_ticks` is the guest's own count, None if it has none we know of. `ticks` are those of the
    main source, `sources` those of every timer that expired; None and empty if nobody saw the
    events (the kernel's chips without tracefs). `believed_period_ns` is what the guest takes the
    time from tick to tick for, if its clock is not the PIT; without `has_rate` it has no clock.
    """

    guest: str
    cpu: str
    chips: str
    clock: str
    seed: int
    elapsed_ns: int
    wall_s: float
    instructions: int | None
    exit: Exit
    pit: PitSettings | None
    guest_ticks: int | None
    ticks: TickReport | None
    faults: dict[str, str] = field(default_factory=dict)
    console: str = ""
    serial: str = ""
    sources: list[TickReport] = field(default_factory=list)
    believed_period_ns: float | None = None
    has_rate: bool = True

    @property
    def drift_ppm(self) -> float | None:
        """How fast the guest's own clock runs against the machine's, in parts per million.

        The guest counts `guest_ticks` of `believed_period_ns`, or of `count` periods of 1193182 Hz
        if the PIT is its clock; 0 would be a true clock. None if the guest counted nothing or no
        time has passed, and without `has_rate`.
        """
        if not self.guest_ticks or not self.elapsed_ns or not self.has_rate:
            return None
        period_ns = self.believed_period_ns
        if period_ns is None:
            if self.pit is None:
                return None
            period_ns = self.pit.count * 1_000_000_000 / BELIEVED_HZ
        return round((self.guest_ticks * period_ns / self.elapsed_ns - 1) * 1e6, 3)

    def as_dict(self) -> dict[str, Any]:
        """The JSON object of `kvmtick run --json` (docs/json.md)."""
        # A report without ticks is false; only None means that nobody looked.
        ticks = None if self.ticks is None else self.ticks.as_dict()
        latency_ns = None if self.ticks is None else self.ticks.latency_ns
        pit = self.pit
        return {
            "guest": self.guest,
            "cpu": self.cpu,
            "chips": self.chips,
            "clock": self.clock,
            "seed": self.seed,
            "faults": self.faults,
            "elapsed_ns": self.elapsed_ns,
            "wall_s": self.wall_s,
            "instructions": self.instructions,
            "exit": {"reason": self.exit.reason, "code": self.exit.code},
            "console": self.console,
            "serial": self.serial,
            "pit": pit
            and {"count": pit.count, "period_ns": pit.period_ns, "reinject": pit.reinject},
            "guest_ticks": self.guest_ticks,
            "ticks": ticks,
            "latency_ns": latency_ns,
            "drift_ppm": self.drift_ppm,
            "sources": [
                {
                    "source": report.source,
                    "vcpu": report.vcpu,
                    "path": report.path,
                    "ticks": report.as_dict(),
                    "latency_ns": report.latency_ns,
                }
                for report in self.reports()
            ],
        }

    def reports(self) -> list[TickReport]:
        """`sources`, or the main one alone if only that was given."""
        return self.sources or ([] if self.ticks is None else [self.ticks])

    def summary(self) -> str:
        """A few lines for the terminal."""
        lines = [f"{self.guest}: {self.exit.reason} after {self.elapsed_ns / 1e9:.6f} s"]
        if self.guest_ticks is not None:
            lines.append(f"  guest counted {self.guest_ticks} ticks")
        lines += [report.summary() for report in self.reports()]
        return "\n".join(lines)
