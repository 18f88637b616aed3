"""Run a guest on the live kernel and record the life of its ticks as ftrace text.

    python tests/golden/capture.py --image tick-pic.bin --load-at 0x1000 --entry 0:0x1000 \
        --reinject 1 --title "baseline, 20 ticks" --out base_1.txt

The file: `# ` header lines (what the guest did; clock, number of lines, lost events; where it
comes from), then ftrace text of this VM alone, clock mono, up to the write to the exit port.
`--timer apic` records the timer of the local APIC instead of the PIT's; the vCPU then has a CPUID
leaf 1, without which KVM gives that timer no other mode than one-shot.
It needs /dev/kvm and a tracefs it may write to; the trace instance is removed whatever happens.
Exit codes: 0 fine, 1 events were lost or the guest did not finish, 2 usage, 3 the host lacks
something.
"""

import argparse
import hashlib
import os
import re
import shlex
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from kvmtick.abi import HostError
from kvmtick.abi.structs import kvm_cpuid_entry2
from kvmtick.guests import Guest, Needs, gsi_routing
from kvmtick.host.kvmdev import pit_worker_tids
from kvmtick.host.probe import probe_host
from kvmtick.host.tracefs import TICK_EVENTS, Instance, Lost, open_tracefs
from kvmtick.kvm.kernel import KernelVm
from kvmtick.machine.ports import PORT_DEBUG_EXIT
from kvmtick.machine.run import Run

LINE = re.compile(r"^.+-(?P<tid>\d+) +\[\d+\] +\S+ +[\d.]+: (?P<event>\w+): (?P<rest>.*)$")
POINTER = re.compile(r"(?:hrtimer=|work struct[= ])(?P<pointer>[0-9a-f]+)")
TIMER_PIN = 2
TIMERS = {"pit": "pit_timer_fn", "apic": "apic_timer_fn"}


@dataclass(frozen=True, slots=True)
class Capture:
    """What one run gave: `lines` are this VM's."""

    lines: list[str]
    lost: Lost
    end: Run

    @property
    def reason(self) -> str:
        """How the guest ended; it is done whatever it wrote to the exit port."""
        return "done" if self.end.exit.code else self.end.exit.reason


def far_pointer(text: str) -> tuple[int, int]:
    """`cs:ip` or a linear address below 64 KiB, as numbers."""
    cs, _, ip = text.rpartition(":")
    return int(cs or "0", 0), int(ip, 0)


def number(text: str) -> int:
    """A number in any notation Python reads."""
    return int(text, 0)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    out = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    out.add_argument("--image", type=Path, required=True, help="flat binary of the guest")
    out.add_argument("--load-at", type=number, required=True, help="its guest-physical address")
    out.add_argument("--entry", type=far_pointer, required=True, help="where it starts, cs:ip")
    out.add_argument("--reinject", type=int, choices=(0, 1), default=1)
    out.add_argument("--title", required=True, help="the first line: what the guest does")
    out.add_argument("--out", type=Path, required=True, help="the file to write")
    out.add_argument(
        "--gsi0-pin",
        type=int,
        choices=(0, TIMER_PIN),
        default=0,
        help="route GSI 0 to this IOAPIC pin (default: 0)",
    )
    out.add_argument("--timer", choices=TIMERS, default="pit", help="whose ticks (default: pit)")
    out.add_argument("--limit-s", type=float, default=10.0, help="wall seconds (default: 10)")
    out.add_argument("--buffer-kib", type=int, default=8192, help="buffer per CPU (default: 8192)")
    return out


def enable(trace: Instance, tids: Iterable[int], timer: str) -> None:
    """The events of a tick of `timer`; those of KVM only where `tids` cause them."""
    ours = " || ".join(f"common_pid == {tid}" for tid in sorted(tids))
    events = {}
    for event, filter_ in TICK_EVENTS.items():
        if event.startswith("kvm:"):
            filter_ = f"({ours}) && ({filter_})" if filter_ else ours
        elif event.startswith("timer:"):
            filter_ = f"function.function == {TIMERS[timer]}"
        events[event] = filter_
    for event in trace.enable_known(events):
        print(f"capture: this kernel has no {event}; going on without it", file=sys.stderr)


def only_this_vm(text: str, tids: set[int]) -> list[str]:
    """The lines of this VM, in order, up to its write to the exit port.

    A timer fires in whatever thread was running, so timers and work items are told by their
    address: the one our vCPU thread started, the one our worker ran.
    """
    lines = (line.rstrip() for line in text.splitlines())
    parsed = [(line, m) for line in lines if (m := LINE.match(line))]
    pointers = set()
    for _, m in parsed:
        pointer = POINTER.match(m["rest"])
        # hrtimer_start outside a timer interrupt: the guest programmed the counter
        started_here = m["event"] in ("hrtimer_start", "sched_kthread_work_execute_start")
        if pointer and started_here and int(m["tid"]) in tids and not _in_irq(m.string):
            pointers.add(pointer["pointer"])
    kept = []
    for line, m in parsed:
        pointer = POINTER.match(m["rest"])
        if pointer["pointer"] in pointers if pointer else int(m["tid"]) in tids:
            kept.append(line)
            if m["event"] == "kvm_pio" and m["rest"].startswith(
                f"pio_write at {PORT_DEBUG_EXIT:#x} "
            ):
                break
    return kept


def _in_irq(line: str) -> bool:
    """Third latency flag: h or H in a hard interrupt, s in a soft one."""
    flags = re.search(r"\] +(\S{4,})", line)
    return flags is not None and flags[1][2] in "hHsZz"


def capture(guest: Guest, args: argparse.Namespace) -> Capture:
    """One run under a trace instance of its own."""
    with open_tracefs() as tracefs, tracefs.instance() as trace, KernelVm() as vm:
        others = pit_worker_tids(os.getpid())
        vm.create_irqchip()
        vm.create_pit2()
        table = gsi_routing(Needs(gsi0="ioapic-pin-2" if args.gsi0_pin == TIMER_PIN else "default"))
        if table is not None:
            vm.set_gsi_routing(table)
        vm.reinject_control(bool(args.reinject))
        vcpu = vm.create_vcpu()
        if args.timer == "apic":
            vcpu.set_cpuid2([kvm_cpuid_entry2(function=1)])
        vm.load(guest)
        workers = pit_worker_tids(os.getpid()) - others
        if not workers:
            raise HostError(
                f"the thread kvm-pit/{os.getpid()} cannot be seen", "run outside a pid namespace"
            )
        tids = {os.getpid(), *workers}
        trace.set_buffer_size(args.buffer_kib)
        enable(trace, tids, args.timer)
        trace.start()
        try:
            end = vm.run(limit_s=args.limit_s)
        finally:
            trace.stop()
        return Capture(only_this_vm(trace.text(), tids), trace.lost(), end)


def cpu_model() -> str:
    """The CPU's name as /proc/cpuinfo gives it."""
    match = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return match[1].strip() if match else os.uname().machine


def command(args: argparse.Namespace) -> str:
    """The command, with the names of files only: not where somebody keeps them."""
    cs, ip = args.entry
    words = ["tests/golden/capture.py", "--image", args.image.name]
    words += ["--load-at", f"{args.load_at:#x}", "--entry", f"{cs:#x}:{ip:#x}"]
    words += ["--reinject", str(args.reinject), "--title", args.title, "--out", args.out.name]
    if args.gsi0_pin:
        words += ["--gsi0-pin", str(args.gsi0_pin)]
    if args.timer != "pit":
        words += ["--timer", args.timer]
    return shlex.join(words)


def header(guest: Guest, args: argparse.Namespace, got: Capture) -> list[str]:
    """What the run was and where it was made, a line each."""
    host = probe_host()
    state = "complete" if not got.lost.total and got.reason == "done" else "incomplete"
    timer_us = host.parameters.get("kvm/min_timer_period_us", "unknown")
    end = f"{got.reason}, code {got.end.exit.code}, {got.end.elapsed_ns / 1e6:.1f} ms"
    if got.end.console:
        end += f", console {got.end.console!r}"
    digest = hashlib.sha256(guest.image).hexdigest()
    size = f"{len(guest.image)} bytes at {guest.load_at:#x}"
    return [
        args.title,
        f"clock: mono; {state}, {len(got.lines)} lines, lost {got.lost.total}",
        f"kernel: Linux {host.kernel}, {' '.join(host.backends)}, min_timer_period_us {timer_us}",
        f"cpu: {cpu_model()}, {host.cpus} CPUs",
        f"guest: {args.image.name}, {size}, sha256 {digest}",
        f"reinject: {args.reinject}",
        f"end: {end}",
        f"command: {command(args)}",
    ]


def main(argv: list[str] | None = None) -> int:
    """Capture, write, and say how it went."""
    args = parser().parse_args(argv)
    try:
        guest = Guest(args.image.name, args.image.read_bytes(), args.load_at, args.entry, None)
    except OSError as error:
        print(f"capture: {error}; name a flat binary with --image", file=sys.stderr)
        return 2
    try:
        got = capture(guest, args)
    except HostError as error:
        print(f"capture: {error}", file=sys.stderr)
        return error.exit_code
    except ValueError as error:
        print(f"capture: {error}", file=sys.stderr)
        return 2
    lines = header(guest, args, got)
    try:
        args.out.write_text("\n".join([*(f"# {line}" for line in lines), *got.lines]) + "\n")
    except OSError as error:
        print(f"capture: {error}; name a file that can be written with --out", file=sys.stderr)
        return 2
    print(f"{args.out.name}: {lines[1]}; {lines[6]}")
    return int(bool(got.lost.total) or got.reason != "done")


if __name__ == "__main__":
    sys.exit(main())
