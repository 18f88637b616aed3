"""Million guest instructions a second, in fast virtual time, beside QEMU and Bochs.

Two loops (`load-store.asm`, `registers.asm`) that run a number of rounds and leave.
"""

import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final

from kvmtick.bench.figure import Demand, Figure, Taken
from kvmtick.bench.kvmtick_run import run_guest
from kvmtick.bench.peers import PEERS
from kvmtick.bench.process import MeasureError, Spent
from kvmtick.bench.session import Session
from kvmtick.guests import ENTRY, LOAD_AT, PARAMETERS, Guest

__all__ = ["FIGURES", "loop"]

INSTRUCTIONS: Final = {"load-store": 8, "registers": 10}
"""Of one round."""
ROUNDS: Final = {"kvmtick": 150_000_000, "qemu": 200_000_000, "bochs": 12_000_000}
"""Half a second or more of the slower loop."""
_COUNT_AT: Final = PARAMETERS.count - LOAD_AT


def loop(name: str, rounds: int) -> Guest:
    """One of the loops, to go round so many times."""
    image = bytearray(Path(__file__).with_name(f"{name}.bin").read_bytes())
    struct.pack_into("<I", image, _COUNT_AT, rounds)
    return Guest(name, bytes(image), LOAD_AT, ENTRY, PARAMETERS)


def mips(session: Session, name: str) -> Taken:
    """A loop under all three."""
    path = session.folder / f"{name}.bin"

    def ours(rounds: int) -> Spent:
        path.write_bytes(loop(name, rounds).image)
        counter = hex(PARAMETERS.counter)
        spent, run = run_guest(str(path), "--fast", "--counter", counter)
        if run["guest_ticks"] != rounds:
            raise MeasureError(f"{name} went round {run['guest_ticks']} times, not {rounds}")
        return spent

    def theirs(peer: str) -> float:
        return _mips(
            session, name, peer, lambda rounds: PEERS[peer].run(loop(name, rounds), rounds)
        )

    return session.in_turns(
        lambda: _mips(session, name, "kvmtick", ours),
        {peer: partial(theirs, peer) for peer in PEERS},
    )


def _mips(session: Session, name: str, who: str, run: Callable[[int], Spent]) -> float:
    few = 1_000
    rounds = session.scaled(ROUNDS[who])
    return session.rate(run, few, few + rounds) * INSTRUCTIONS[name] / 1e6


def _figure(name: str, loop_name: str, what: str) -> Figure:
    def take(session: Session) -> Taken:
        return mips(session, loop_name)

    return Figure(
        name,
        what,
        "MIPS",
        take,
        (Demand(5.0, "bochs"), Demand(1 / 3, "qemu")),
    )


FIGURES: Final = (
    _figure("mips-memory", "load-store", "guest code, 2 loads and 2 stores in 8, fast time"),
    _figure("mips-register", "registers", "guest code without memory, fast time"),
)
