"""Makes the recordings of this directory again.

    python docs/recordings/make.py slow-clock | after | interrupts-off | linux-boot

`linux-boot` is a simulated run of the newest kernel in /boot. The others need /dev/kvm and tracefs,
and root: each is what `kvmtick record` writes while two VMs run, both with a guest that takes 1,000
ticks a second (`tick-pic`, `tick-if0`): `mail` is well, `billing` is the patient. README.md tells
what they show. Threads of the machine that have nothing to do with it get other names in the file;
nothing else is changed. Do it at a quiet moment.
"""

import gzip
import json
import os
import re
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

from kvmtick import guests
from kvmtick.host.kvmdev import pit_worker_tids
from kvmtick.kvm.kernel import KernelVm
from kvmtick.trace.ktrace import MAGIC
from kvmtick.trace.reading import open_trace

CHUNK = struct.Struct("<BxHI")
UPDATE = 4
"""Of a recording's parts: kind, CPU and length, and the kind that has names (kvmtick.trace.ktrace).
"""

FOLDER = Path(__file__).parent
HOST_NAME = "host"
RECORD_S = 1.5
AFTER_S = 0.75
LIMIT_S = 30.0

BUSY = "flow-meter"
VM_PRIORITY, BUSY_PRIORITY = 10, 50
BUSY_MS = 20
PAUSE_S = 0.45
PATIENTS_CPU, OTHER_CPU = 1, 0

HELD_MS = 80
KNOWN_NAMES = re.compile(
    rf"|<.*>|{BUSY}|CPU 0/KVM|(kvm-pit|swapper|kworker|ksoftirqd|migration)/.*|rcu_.*|kvm-.*"
)


def main(words: list[str]) -> None:
    """What the command line says."""
    match words:
        case ["--name", _, "vm", guest, policy]:
            run_vm(guest, policy == "delay")
        case ["busy"]:
            be_busy()
        case ["slow-clock"]:
            record_slow_clock(FOLDER / "slow-clock.ktrace", PATIENTS_CPU, RECORD_S)
        case ["after"]:
            record_slow_clock(FOLDER / "after.ktrace", OTHER_CPU, AFTER_S)
        case ["linux-boot"]:
            record_linux_boot(FOLDER / "linux-boot.ktrace")
        case ["interrupts-off"]:
            record_interrupts_off(FOLDER / "interrupts-off.ktrace")
        case _:
            sys.exit(__doc__)


# The VMs.


def run_vm(name: str, reinject: bool) -> None:
    """A small VMM: one vCPU, the guest until it is killed. It begins when it gets a line."""
    call_thread("CPU 0/KVM")
    with KernelVm() as vm:
        guest = guests.load(name, ticks=0, param_ms=HELD_MS, tsc_khz=vm.get_tsc_khz())
        vm.prepare(guest.needs, reinject)
        vm.load(guest)
        (worker,) = pit_worker_tids(os.getpid())
        for tid in (os.getpid(), worker):
            os.sched_setscheduler(tid, os.SCHED_FIFO, os.sched_param(VM_PRIORITY))
        print(worker, flush=True)
        sys.stdin.readline()
        vm.run(limit_s=LIMIT_S)


def call_thread(name: str) -> None:
    """As `ps` and the trace name it."""
    Path("/proc/self/comm").write_text(name)


@contextmanager
def vm(name: str, guest: str, policy: str) -> Iterator[tuple[IO[str], int, int]]:
    """Its standard input, its pid and the pid of its kvm-pit thread."""
    words = [sys.executable, __file__, "--name", name, "vm", guest, policy]
    pipe = subprocess.PIPE
    with subprocess.Popen(words, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield process.stdin, process.pid, int(process.stdout.readline())
        finally:
            process.kill()


# Who takes the CPU.


def be_busy() -> None:
    """A real-time task that takes its CPU for some ms at a time, a few per cent of it in all."""
    call_thread(BUSY)
    os.sched_setaffinity(0, {PATIENTS_CPU})
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(BUSY_PRIORITY))
    for _ in range(int(LIMIT_S / PAUSE_S)):
        end_ns = time.monotonic_ns() + BUSY_MS * 1_000_000
        while time.monotonic_ns() < end_ns:
            pass
        time.sleep(PAUSE_S)


# The recordings.


def record_slow_clock(path: Path, worker_cpu: int, for_s: float) -> None:
    """`billing` has reinjection off, and its kvm-pit thread is bound to `worker_cpu`."""
    with ExitStack() as stack:
        mail = stack.enter_context(vm("mail", "tick-pic", "delay"))
        billing = stack.enter_context(vm("billing", "tick-pic", "discard"))
        for _, *tids in (mail, billing):
            for tid in tids:
                os.sched_setaffinity(tid, {OTHER_CPU})
        os.sched_setaffinity(billing[2], {worker_cpu})
        busy = stack.enter_context(subprocess.Popen([sys.executable, __file__, "busy"]))
        stack.callback(busy.kill)
        for stdin, *_ in (mail, billing):
            stdin.write("go\n")
            stdin.flush()
        time.sleep(1.0)
        only = [f"--pid={pid}" for _, pid, _ in (mail, billing)]
        record(path, ["--for", f"{for_s}s", *only])


def record_interrupts_off(path: Path) -> None:
    """`billing` switches its interrupts off for `HELD_MS`."""
    with ExitStack() as stack:
        mail = stack.enter_context(vm("mail", "tick-pic", "delay"))
        billing = stack.enter_context(vm("billing", "tick-if0", "delay"))
        mail[0].write("go\n")
        mail[0].flush()
        ends = path.with_suffix(".fifo")
        os.mkfifo(ends)
        stack.callback(ends.unlink)
        only = [f"--pid={pid}" for _, pid, _ in (mail, billing)]
        command = ["sh", "-c", 'echo > "$0"; exec sleep "$1"', str(ends), f"{HELD_MS * 3 / 1000}"]
        record(path, [*only, "--", *command], ends, billing[0])


def record_linux_boot(path: Path) -> None:
    """To the prompt, two seconds of sleep, and off."""
    words = ["run", "linux", "--append", "nopv", "--trace", str(path)]
    script = b"ticks\nsleep 2\nticks\n"
    subprocess.run([sys.executable, "-m", "kvmtick", *words], input=script, check=True)
    compress(path, path.read_bytes())


def record(
    path: Path, words: list[str], begins: Path | None = None, to: IO[str] | None = None
) -> None:
    """`kvmtick record WORDS`, on a host of another name; `to` gets its line when it has begun."""
    words = [sys.executable, "-m", "kvmtick", "record", "-o", str(path), *words]
    command = ["unshare", "--uts", "sh", "-c", 'hostname "$0"; exec "$@"', HOST_NAME, *words]
    with subprocess.Popen(command) as recorder:
        if begins is not None and to is not None:
            begins.read_text()
            to.write("go\n")
            to.flush()
    if recorder.returncode:
        sys.exit(recorder.returncode)
    compress(path, without_other_names(path))


def compress(path: Path, data: bytes) -> None:
    """Write the file, compressed with gzip."""
    path.write_bytes(gzip.compress(data, mtime=0))
    print(f"{path.name}: {path.stat().st_size} bytes")


def without_other_names(path: Path) -> bytes:
    """The file, with the names of threads that are not `KNOWN_NAMES` replaced by numbered ones."""
    with open_trace(path) as trace:
        for _ in trace.batches():
            pass
        comms = {name.rpartition("-")[0] for name in trace.tasks}
    others = sorted(comm for comm in comms if not KNOWN_NAMES.fullmatch(comm))
    names = {comm: f"other-{number}" for number, comm in enumerate(others, 1)}
    data = path.read_bytes()
    at, parts = len(MAGIC), [MAGIC]
    while at < len(data):
        kind, cpu, length = CHUNK.unpack_from(data, at)
        payload = data[at + CHUNK.size : at + CHUNK.size + length]
        at += CHUNK.size + length
        for comm, name in names.items():
            payload = payload.replace(in_page(comm), in_page(name))
        if kind == UPDATE:
            told = json.loads(payload)
            told["tasks"] = {tid: names.get(comm, comm) for tid, comm in told["tasks"].items()}
            payload = json.dumps(told).encode()
        parts.append(CHUNK.pack(kind, cpu, len(payload)) + payload)
    return b"".join(parts)


def in_page(comm: str) -> bytes:
    """A name as records of the scheduler have it."""
    return comm.encode().ljust(16, b"\0")


if __name__ == "__main__":
    main(sys.argv[1:])
