"""How fast and how large `kvmtick run` is: ticks and instructions a second, memory, start-up.

Each figure is taken in processes of its own, pinned to one core, several times; best and median
are shown, for the machine is rarely alone. `--json` for programs, `--runs N` for how often.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

KVMTICK = (sys.executable, "-m", "kvmtick")
SPEED_TICKS = 100_000
MEMORY_TICKS = 1_000_000
MARKS = {
    "tick-pic": (60_000, "ticks/s", "at least"),
    "mips-exact": (60, "million instructions/s, exact, the slowest loop", "at least"),
    "mips-memory": (500, "million instructions/s, fast, loads and stores", "at least"),
    "mips-register": (1000, "million instructions/s, fast, registers only", "at least"),
    "memory": (200, "MB peak RSS over 1,000,000 ticks", "at most"),
    "start-help": (100, "ms for kvmtick --help", "at most"),
    "start-machine": (60, "ms from the first call to the end of a guest of one tick", "at most"),
}
# Loops for ever, at 0x8000 in real mode.
REGISTER_LOOP = bytes.fromhex(
    "6640 6601d8 6631c3 66678d1418 6629d1 6609ca 6621d6 66f7d6 664f ebe3"
)  # l: inc eax; add eax, ebx; xor ebx, eax; lea edx, [eax + ebx]; sub ecx, edx; or edx, ecx;
#    and esi, edx; not esi; dec edi; jmp l
MEMORY_LOOP = bytes.fromhex(
    "66a10050 6601c8 66a30450 668b1e0850 6631c3 66891e0c50 6641 ebe4"
)  # l: mov eax, [0x5000]; add eax, ecx; mov [0x5004], eax; mov ebx, [0x5008]; xor ebx, eax;
#    mov [0x500c], ebx; inc ecx; jmp l
SHORT_LOOP = bytes.fromhex("6649 75fc ebfa")  # l: dec ecx; jnz l; jmp l
START = """
import time
import kvmtick
import kvmtick.kvm.model
begin_s = time.perf_counter()
vm = kvmtick.Kvm("model").create_vm()
guest = kvmtick.guests.load("tick-pic", ticks=1)
vm.prepare(guest.needs)
vm.load(guest)
vm.run()
print((time.perf_counter() - begin_s) * 1000)
"""


def ticks_per_second() -> float:
    """`tick-pic` in virtual time, verdicts on, no trace."""
    run = json.loads(_output("run", "--ticks", str(SPEED_TICKS), "--json"))
    return float(run["ticks"]["expired"] / run["wall_s"])


def mips(loop: bytes, *options: str) -> float:
    """Instructions of a loop in virtual time, a microsecond of wall time."""
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder, "loop.bin")
        image.write_bytes(loop)
        run = json.loads(_output("run", str(image), "--json", *options))
    return float(run["instructions"] / run["wall_s"] / 1e6)


def exact_mips() -> float:
    """Every boundary is looked at: the slowest of the loops."""
    loops = (REGISTER_LOOP, MEMORY_LOOP, SHORT_LOOP)
    return min(mips(loop, "--for", "200ms") for loop in loops)


def start_ms() -> float:
    """The first machine of a process, until its guest has taken a tick and left."""
    command = [sys.executable, "-c", START]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def peak_rss_mb() -> float:
    """The largest resident set of a run of 1,000,000 ticks."""
    process = subprocess.Popen(
        [*KVMTICK, "run", "--ticks", str(MEMORY_TICKS), "--limit", "10m", "--json"],
        stdout=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"kvmtick run ended with status {status}")
    return usage.ru_maxrss / 1024


def help_ms() -> float:
    """From starting the process to its end."""
    started_s = time.perf_counter()
    _output("--help")
    return (time.perf_counter() - started_s) * 1000


def _output(*arguments: str) -> str:
    command = [*KVMTICK, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5, help="how often to take each figure (5)")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    options = parser.parse_args()
    # The processes that are measured inherit it.
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    takes: dict[str, tuple[Callable[[], float], int]] = {
        "tick-pic": (ticks_per_second, options.runs),
        "mips-exact": (exact_mips, options.runs),
        "mips-memory": (lambda: mips(MEMORY_LOOP, "--fast", "--for", "2s"), options.runs),
        "mips-register": (lambda: mips(REGISTER_LOOP, "--fast", "--for", "4s"), options.runs),
        "memory": (peak_rss_mb, 1),
        "start-help": (help_ms, options.runs),
        "start-machine": (start_ms, options.runs),
    }
    marks = []
    for name, (take, runs) in takes.items():
        values = [take() for _ in range(runs)]
        mark, unit, sense = MARKS[name]
        best = max(values) if sense == "at least" else min(values)
        met = best >= mark if sense == "at least" else best <= mark
        median = statistics.median(values)
        marks.append(
            {"name": name, "best": best, "median": median, "unit": unit, "mark": mark, "met": met}
        )
        if not options.json:
            verdict = "met" if met else "missed"
            print(
                f"{name:<13} best {best:>10,.1f}  median {median:>10,.1f}  {unit}"
                f"  ({sense} {mark:,}: {verdict})",
                flush=True,
            )
    if options.json:
        print(json.dumps({"marks": marks}))


if __name__ == "__main__":
    main()
