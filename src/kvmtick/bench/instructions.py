"""Host instructions a tick takes, counted by callgrind: the same on a busy host as on an idle one.

    python -m kvmtick.bench.instructions GUEST TICKS

is the process that callgrind watches. It tells callgrind itself when to count, so that start-up and
the first ticks are left out.

Source: the Valgrind manual, "The Client Request mechanism", "Callgrind specific client requests".
"""

import ctypes
import json
import mmap
import re
import shutil
import sys
from typing import Final

from kvmtick.bench.kvmtick_run import told
from kvmtick.bench.process import MeasureError, run_process

__all__ = ["VALGRIND", "instructions_per_tick"]

VALGRIND: Final = "valgrind"
WARM_UP_TICKS: Final = 50
PERIOD_NS: Final = 1_000_000
START_INSTRUMENTATION: Final = 0x4354_0004  # "CT", request 4
STOP_INSTRUMENTATION: Final = 0x4354_0005
_REQUEST: Final = bytes.fromhex(
    "48 89 f8"  # mov rax, rdi: the request and its arguments
    "31 d2"  # xor edx, edx
    "48 c1 c7 03 48 c1 c7 0d 48 c1 c7 3d 48 c1 c7 33"  # rol rdi by 3, 13, 61, 51: as it was
    "48 87 db"  # xchg rbx, rbx: Valgrind knows it by these five, a CPU does nothing
    "c3"  # ret
)


def instructions_per_tick(guest: str, ticks: int) -> float:
    """Of a built-in guest at 1 kHz in virtual time, verdicts on.

    MeasureError if valgrind is missing or the run fails.
    """
    if shutil.which(VALGRIND) is None:
        raise MeasureError(f"{VALGRIND} is not installed: apt-get install {VALGRIND}")
    command = [
        *(VALGRIND, "--tool=callgrind", "--instr-atstart=no", "--callgrind-out-file=/dev/null"),
        *(sys.executable, "-m", "kvmtick.bench.instructions", guest, str(ticks)),
    ]
    spent = run_process(command, environment={"PYTHONHASHSEED": "0"})
    counted = re.search(r"Collected : (\d+)", spent.errors)
    if counted is None:
        raise MeasureError(f"{VALGRIND} did not say how many instructions it counted")
    return int(counted[1]) / int(told(spent)["ticks"])


def _count(guest_name: str, ticks: int) -> int:
    """Run so many ticks where callgrind counts; how many it were by the guest's own count."""
    from kvmtick import guests
    from kvmtick.kvm.model import ModelVm

    guest = guests.load(guest_name, ticks=0)
    with ModelVm(ram_bytes=guest.needs.ram_bytes) as vm:
        vm.prepare(guest.needs)
        vm.load(guest)
        before = vm.run(for_ns=WARM_UP_TICKS * PERIOD_NS).guest_ticks or 0
        with mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_WRITE | mmap.PROT_EXEC) as page:
            page.write(_REQUEST)
            code = ctypes.c_char.from_buffer(page)
            request = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(ctypes.addressof(code))
            request(ctypes.byref((ctypes.c_uint64 * 6)(START_INSTRUMENTATION)))
            run = vm.run(for_ns=ticks * PERIOD_NS)
            request(ctypes.byref((ctypes.c_uint64 * 6)(STOP_INSTRUMENTATION)))
            del code
    return (run.guest_ticks or 0) - before


def main() -> None:
    """The process that is watched."""
    print(json.dumps({"ticks": _count(sys.argv[1], int(sys.argv[2]))}))


if __name__ == "__main__":
    main()
