"""The host model: how late the host is, and how that is asked for (`--fault`).

Without faults nothing is ever late. A fault is a name and a delay, drawn anew each time:

* `worker_delay`: from queueing the work to the `kvm-pit` worker running it;
* `vcpu_off`: from the kick (or the wake-up from HLT) to the vCPU entering the guest again;
* `late_expiry`: from the hrtimer's expiry to its callback.

A delay is a duration (`200us`) or a distribution: `exp:200us` (exponential, that mean),
`uniform:10us..2ms`, or `1%:5ms` (5 ms once in a hundred, otherwise nothing). Every fault draws
from a generator of its own, seeded by the machine's seed and the fault's name, so that adding one
fault does not change another.
"""

from dataclasses import dataclass
from random import Random

from kvmtick.timing.queue import NEVER_NS

__all__ = ["FAULTS", "Delay", "HostModel", "format_ns", "parse_delay", "parse_duration_ns"]

FAULTS = ("worker_delay", "vcpu_off", "late_expiry")

_UNITS_NS = {"ns": 1, "us": 1_000, "ms": 1_000_000, "s": 1_000_000_000, "m": 60_000_000_000}


def parse_duration_ns(text: str) -> int:
    """`250ms`, `1.5s`, `40us` as nanoseconds; ValueError names the text and the remedy."""
    digits = text.rstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZµ")
    unit = text[len(digits) :].replace("µ", "u")
    remedy = "give a number and a unit: 40us, 250ms, 10s, 2m"
    if digits and not unit:
        raise ValueError(f"duration {text!r} has no unit: {remedy}")
    try:
        value_ns = round(float(digits) * _UNITS_NS[unit])
    except (KeyError, ValueError, OverflowError):
        raise ValueError(f"{text!r} is not a duration: {remedy}") from None
    if value_ns < 0:
        raise ValueError(f"duration {text!r} is negative: {remedy}")
    if value_ns >= NEVER_NS:
        raise ValueError(f"duration {text!r} is longer than {NEVER_NS} ns: {remedy}")
    return value_ns


def format_ns(value_ns: int) -> str:
    """A duration for people, with the largest unit that keeps it above 1: `999.8 us`."""
    for unit, scale in (("s", 1_000_000_000), ("ms", 1_000_000), ("us", 1_000)):
        if abs(value_ns) >= scale:
            return (
                f"{value_ns / scale:.4g} {unit}"
                if value_ns % scale
                else f"{value_ns // scale} {unit}"
            )
    return f"{value_ns} ns"


@dataclass(frozen=True, slots=True)
class Delay:
    """A delay as asked for: `kind` const, exp, uniform or chance, with its numbers."""

    text: str
    kind: str
    low_ns: int
    high_ns: int
    chance: float = 1.0

    def draw_ns(self, random: Random) -> int:
        """One delay in ns, never negative."""
        if self.kind == "exp":
            return int(random.expovariate(1.0) * self.low_ns)
        if self.kind == "uniform":
            return random.randint(self.low_ns, self.high_ns)
        if self.kind == "chance":
            return self.low_ns if random.random() < self.chance else 0
        return self.low_ns


def parse_delay(text: str) -> Delay:
    """A delay from its written form (see the module); ValueError names the text and the remedy."""
    head, colon, tail = text.partition(":")
    if not colon:
        value_ns = parse_duration_ns(text)
        return Delay(text, "const", value_ns, value_ns)
    if head == "exp":
        value_ns = parse_duration_ns(tail)
        return Delay(text, "exp", value_ns, value_ns)
    if head == "uniform":
        low, dots, high = tail.partition("..")
        low_ns, high_ns = parse_duration_ns(low), parse_duration_ns(high) if dots else -1
        if low_ns <= high_ns:
            return Delay(text, "uniform", low_ns, high_ns)
    elif head.endswith("%"):
        try:
            chance = float(head[:-1]) / 100
        except ValueError:
            chance = -1.0
        if 0 <= chance <= 1:
            value_ns = parse_duration_ns(tail)
            return Delay(text, "chance", value_ns, value_ns, chance)
    raise ValueError(
        f"{text!r} is not a delay: give a duration (200us), exp:200us, uniform:10us..2ms or 1%:5ms"
    )


class HostModel:
    """Draws the delays of one machine's host; `on_time` (all are zero) until `set_fault`."""

    __slots__ = ("_delays", "_randoms", "on_time", "seed")

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self.on_time = True
        self._delays: dict[str, Delay] = {}
        self._randoms: dict[str, Random] = {}
        """Made when a fault first draws: one is larger than a chip."""

    def set_fault(self, name: str, delay: str | None) -> None:
        """Make the host late in one way, or (`None`) on time again; ValueError if misspelt."""
        if name not in FAULTS:
            raise ValueError(f"unknown fault {name!r}: choose one of {', '.join(FAULTS)}")
        if delay is None:
            self._delays.pop(name, None)
        else:
            self._delays[name] = parse_delay(delay)
        self.on_time = not self._delays

    def faults(self) -> dict[str, str]:
        """The faults in force, as written."""
        return {name: delay.text for name, delay in self._delays.items()}

    def delay_ns(self, name: str) -> int:
        """How late the host is this time; 0 without that fault."""
        delay = self._delays.get(name)
        if delay is None:
            return 0
        random = self._randoms.get(name)
        if random is None:
            random = self._randoms[name] = Random(f"{self.seed}:{name}")
        return delay.draw_ns(random)
