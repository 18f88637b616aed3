"""Ticks a second in virtual time: on each path, beside QEMU and Bochs, and with a full trace."""

from collections.abc import Callable
from functools import partial
from typing import Final

from kvmtick import guests
from kvmtick.bench.figure import Demand, Figure, Taken
from kvmtick.bench.kvmtick_run import run_ticks
from kvmtick.bench.peers import PEERS
from kvmtick.bench.process import Spent
from kvmtick.bench.session import Session

__all__ = ["FIGURES"]

LENGTHS: Final = {"kvmtick": (5_000, 305_000), "qemu": (1_000, 21_000), "bochs": (10_000, 210_000)}
"""Few and many ticks: half a second or more apart."""
TRACED_TICKS: Final = (5_000, 105_000)

TIMES_QEMU: Final = 10.0
STRETCH: Final = (Demand(1.0, "bochs"), Demand(1_000_000.0))


def ticks_per_second(session: Session, guest: str) -> Taken:
    """A built-in guest at 1 kHz under all three."""
    few, many = LENGTHS["kvmtick"]
    ours = partial(session.rate, partial(run_ticks, guest), few, session.scaled(many) + few)
    return session.in_turns(ours, {name: partial(_peer, session, name, guest) for name in PEERS})


def _peer(session: Session, name: str, guest: str) -> float:
    few, many = LENGTHS[name]
    value = session.rate(_peer_run(name, guest), few, session.scaled(many) + few)
    session.peer_ticks.setdefault((name, guest), []).append(value)
    return value


def _peer_run(name: str, guest: str) -> Callable[[int], Spent]:
    return lambda ticks: PEERS[name].run(guests.load(guest, ticks=ticks), ticks)


def traced_ticks_per_second(session: Session) -> Taken:
    """tick-pic with every event of its path written to a recording."""
    path = session.folder / "traced.ktrace"
    few, many = TRACED_TICKS
    run = partial(_traced, str(path))
    ours = partial(session.rate, run, few, session.scaled(many) + few)
    known = session.peer_ticks.get(("qemu", "tick-pic"))
    if known:
        # tick-pic was taken in this session: the same run of QEMU
        taken = session.in_turns(ours, {})
        taken.peers["qemu"] = known
    else:
        taken = session.in_turns(ours, {"qemu": partial(_peer, session, "qemu", "tick-pic")})
    if path.exists():
        taken.details["bytes_per_tick"] = path.stat().st_size / (session.scaled(many) + few)
    return taken


def _traced(path: str, ticks: int) -> Spent:
    return run_ticks("tick-pic", ticks, "--trace", path)


def _figure(name: str, path: str) -> Figure:
    def take(session: Session) -> Taken:
        return ticks_per_second(session, name)

    return Figure(
        name,
        f"{path}, 1 kHz, HLT in between, verdicts on",
        "ticks/s",
        take,
        (Demand(TIMES_QEMU, "qemu"),),
        STRETCH,
    )


FIGURES: Final = (
    _figure("tick-pic", "PIT through the PIC"),
    _figure("tick-ioapic", "PIT through the IOAPIC"),
    _figure("tick-lapic", "the local APIC's timer"),
    Figure(
        "traced",
        "tick-pic with every event recorded to a file",
        "ticks/s",
        traced_ticks_per_second,
        (Demand(TIMES_QEMU / 2, "qemu"),),
        (Demand(500_000.0),),
    ),
)
