"""What recording costs: `kvmtick record` beside 10 guests that tick at 1 kHz on the kernel's chips.

The guests are processes of their own that do nothing but run. The recorder's CPU time is what the
kernel says of its whole process (getrusage), start-up and the reading of /proc included; by its own
account it is less. `--json` for programs, `--vms N`, `--seconds N`, further options go to `record`.
Needs root, /dev/kvm and tracefs.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

MOST_SHARE = 0.10
GUEST = """
import sys
from kvmtick import guests
from kvmtick.kvm.kernel import KernelVm
guest = guests.load("tick-pic", ticks=10_000_000)
with KernelVm(ram_bytes=guest.needs.ram_bytes) as vm:
    vm.prepare(guest.needs)
    vm.load(guest)
    vm.run(for_ns=20_000_000)
    print("ticking", flush=True)
    vm.run(for_ns=int(sys.argv[1]) * 10**9)
"""


def start_guest(stack: ExitStack, seconds: int) -> None:
    """A guest that ticks by now, and ends with the stack."""
    command = [sys.executable, "-c", GUEST, str(seconds)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    stack.callback(process.wait)
    stack.callback(process.kill)
    assert process.stdout is not None
    if process.stdout.readline() != "ticking\n":
        raise SystemExit("a guest did not start: see kvmtick doctor")


def record(seconds: int, options: list[str]) -> dict[str, float]:
    """One recording of what ticks now."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "t.ktrace")
        command = [sys.executable, "-m", "kvmtick", "record", "--json", "-o", str(out)]
        command += ["--for", f"{seconds}s", *options]
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert process.stdout is not None
        told = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"kvmtick record ended with exit code {process.returncode}")
    said = json.loads(told)
    whole_s = usage.ru_utime + usage.ru_stime
    return {
        "vms": sum(1 for vm in said["vms"] if sum(vm["ticks"].values())),
        "ticks_per_s": said["ticks"] / seconds,
        "events_per_s": said["events"] / seconds,
        "mb_per_s": said["size_bytes"] / 1e6 / seconds,
        "lost_events": said["lost_events"],
        "share": whole_s / seconds,
        "share_recording": said["cpu_share"],
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vms", type=int, default=10, help="how many guests (10)")
    parser.add_argument("--seconds", type=int, default=10, help="how long to record (10)")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    options, others = parser.parse_known_args()
    with ExitStack() as stack:
        for _ in range(options.vms):
            start_guest(stack, options.seconds + 60)
        took = record(options.seconds, others)
    met = took["share"] < MOST_SHARE and not took["lost_events"]
    if options.json:
        print(json.dumps({**took, "mark": MOST_SHARE, "met": met}))
        return
    print(
        f"{took['vms']:.0f} VMs, {took['ticks_per_s']:,.0f} ticks/s:"
        f" {took['events_per_s']:,.0f} events/s, {took['mb_per_s']:.1f} MB/s,"
        f" {took['lost_events']:,.0f} lost"
    )
    print(
        f"recorder: {took['share']:.1%} of one CPU with its start, {took['share_recording']:.1%}"
        f" without (at most {MOST_SHARE:.0%}, no event lost: {'met' if met else 'missed'})"
    )


if __name__ == "__main__":
    main()
