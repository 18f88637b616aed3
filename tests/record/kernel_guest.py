"""One built-in guest on the kernel, for tests of what is recorded of it: a small VMM.

    kernel_guest.py --name NAME '{"guest": "tick-if0", "ticks": 60, "reinject": false}'

It makes its VM, says `ready`, waits for a line, runs the guest, gives the VM back and prints what
the guest counted. `watched`: it also reads the kernel's trace itself, and prints what became of
every tick by that.
"""

import json
import os
import sys
from typing import Any

from kvmtick import guests
from kvmtick.kvm.kernel import KernelVm
from kvmtick.kvm.kernel_trace import TickTrace

LIMIT_S = 20.0


def main(told: dict[str, Any]) -> None:
    """Do so."""
    name, reinject = told.pop("guest"), told.pop("reinject", True)
    watched = told.pop("watched", False)
    with KernelVm() as vm:
        guest = guests.load(name, tsc_khz=vm.get_tsc_khz(), **told)
        vm.prepare(guest.needs, reinject)
        vm.load(guest)
        observer = TickTrace(vm) if watched else None
        print("ready", flush=True)
        sys.stdin.readline()
        run = vm.run(limit_s=LIMIT_S, observer=observer)
    print(
        json.dumps(
            {
                "pid": os.getpid(),
                "exit": run.exit.reason,
                "guest_ticks": run.guest_ticks,
                "lost": observer.lost if observer else 0,
                "sources": [
                    [
                        (t.index, t.expiry_ns, t.verdict, t.where, t.inject_ns, t.eoi_ns)
                        for t in report
                    ]
                    for report in run.sources
                ]
                if watched
                else [],
            }
        ),
        flush=True,
    )


if __name__ == "__main__":
    main(json.loads(sys.argv[-1]))
