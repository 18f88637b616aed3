"""Record scenarios (apic_scenarios.py) on the live kernel, on a moment when it is quiet.

    PYTHONPATH=src:tests python -m golden.record if0_1 clamp_0 clamp_1

`_0` is reinject off, `_1` on; the files go to tests/golden/traces. A shared host is late now and
then: a run is taken only if no step of a tick took longer than QUIET_US, whatever the events are.
With reinject on there is one thing more, `reopened`.
It needs what capture.py needs. Exit codes: 0 fine, 1 no run was quiet, 2 usage, 3 as capture.py.
"""

import argparse
import re
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from golden import capture
from golden.apic_scenarios import PIN, SCENARIOS
from kvmtick import guests
from kvmtick.abi import HostError
from kvmtick.conform.normalise import LINE
from kvmtick.guests import Guest
from kvmtick.guests.script import Scenario
from kvmtick.kvm.kernel import KernelVm

TRACES = Path(__file__).parent / "traces"
QUIET_US = 120
ATTEMPTS = 200
LIMIT_S = 5.0


def worst_step_us(lines: Iterable[str]) -> float:
    """The longest of: expiry due to its callback, work queued to started and started to done, line
    raised to the halted vCPU awake, expiry of its local APIC's timer to its interrupt accepted,
    injection to EOI.
    """
    worst = 0.0
    due_us = queued_us = injected_us = raised_us = started_us = expired_us = -1.0
    eois = _Eois()
    for match in filter(None, map(LINE.match, lines)):
        event, rest, now_us = match["event"], match["rest"], float(match["ts"]) * 1e6
        since_us = -1.0
        if event == "hrtimer_start":
            due_us = int(rest.partition("expires=")[2].split()[0]) / 1e3
        elif event == "hrtimer_expire_entry":
            since_us = due_us
            expired_us = now_us if "function=apic_timer_fn" in rest else -1.0
        elif event == "kvm_apic_accept_irq":
            since_us, expired_us = expired_us, -1.0
        elif event == "sched_kthread_work_queue_work":
            queued_us = now_us
        elif event == "sched_kthread_work_execute_start":
            since_us, started_us = queued_us, now_us
        elif event == "sched_kthread_work_execute_end":
            since_us = started_us
        elif event == "kvm_set_irq" and " level 1 " in rest:
            raised_us = now_us
        elif event == "kvm_vcpu_wakeup":
            asleep_us = int(rest.partition(" time ")[2].split()[0]) / 1e3
            since_us = raised_us if raised_us > now_us - asleep_us else -1.0
        elif eois.is_injection(match):
            injected_us = now_us
        elif event in ("kvm_eoi", "kvm_ack_irq"):
            since_us, injected_us = injected_us, -1.0
        if since_us >= 0:
            worst = max(worst, now_us - since_us)
    return worst


def duration_us(lines: Iterable[str]) -> float:
    """From the start of the timer to the end of the trace."""
    times = [
        (match["event"], float(match["ts"]) * 1e6) for match in filter(None, map(LINE.match, lines))
    ]
    begin_us = next(time_us for event, time_us in times if event == "hrtimer_start")
    return times[-1][1] - begin_us


def reopened(lines: Iterable[str]) -> bool:
    """Whether the timer expired, or the line was raised, between a PIC's injection and its EOI.

    This host's back end writes EOI to the local APIC when it injects, which also tells the PIT that
    its tick was acknowledged: work that comes then pulses the line once more, which on no other
    host it does (reinject on). It is a matter of luck while ticks are replayed back to back. Of an
    IOAPIC's tick that EOI is the only one it hears of.
    """
    in_service = False
    eois = _Eois()
    for match in filter(None, map(LINE.match, lines)):
        if eois.is_injection(match):
            in_service = True
        elif match["event"] in ("kvm_eoi", "kvm_ack_irq"):
            in_service = False
        elif in_service and (
            match["event"] == "hrtimer_expire_entry"
            or (match["event"] == "kvm_set_irq" and " level 1 " in match["rest"])
        ):
            return True
    return False


class _Eois:
    """Tells injections from the guest's EOIs: see normalise.py."""

    def __init__(self) -> None:
        self._in_service = False

    def is_injection(self, match: re.Match[str]) -> bool:
        """Whether this event stands for an injection."""
        if match["event"] != "kvm_eoi":
            return match["event"] == "kvm_inj_virq"
        by_guest, self._in_service = self._in_service, not match["rest"].endswith(" -1")
        return self._in_service or not by_guest


def options(scenario: Scenario, reinject: int) -> list[str]:
    """What `capture` has to be told for this guest."""
    pin = ["--gsi0-pin", str(PIN)] if scenario.needs.gsi0 == "ioapic-pin-2" else []
    timer = "apic" if scenario.needs.tick_source == "lapic" else "pit"
    return [*pin, "--timer", timer, "--reinject", str(reinject)]


def scenario_image(name: str) -> Guest:
    """The scenario's guest for this host's TSC."""
    with KernelVm() as vm:
        return SCENARIOS[name].guest(vm.get_tsc_khz())


def record(name: str, reinject: int, out: Path) -> float | None:
    """Write one file; how long its slowest step took (us), None if no run was quiet.

    Raises `HostError` where this host lacks something.
    """
    title = f"reinject={reinject} {SCENARIOS[name].description}"
    with tempfile.TemporaryDirectory() as directory:
        image = Path(directory, f"scenario-{name}.bin")
        image.write_bytes(scenario_image(name).image)
        command = ["--image", str(image), "--load-at", hex(guests.LOAD_AT)]
        command += ["--entry", f"{guests.ENTRY[0]:#x}:{guests.ENTRY[1]:#x}"]
        command += [*options(SCENARIOS[name], reinject), "--title", title]
        made = Path(directory, out.name)
        for attempt in range(1, ATTEMPTS + 1):
            if capture.main([*command, "--out", str(made)]):
                continue
            lines = made.read_text().splitlines()
            worst_us = worst_step_us(lines)
            if worst_us <= QUIET_US and not (reinject and reopened(lines)):
                events = sum(not line.startswith("#") for line in lines)
                header, body = lines[:-events], lines[-events:]
                note = f"# quiet: no step took longer than {worst_us:.0f} us; attempt {attempt}"
                out.write_text("\n".join([*header, note, *body]) + "\n")
                return worst_us
    return None


def main(argv: list[str] | None = None) -> int:
    """Record what is asked for, and say how it went."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [f"{name}_{reinject}" for name in SCENARIOS for reinject in (0, 1)]
    parser.add_argument("traces", nargs="+", choices=names, metavar="NAME_REINJECT")
    for trace in parser.parse_args(argv).traces:
        name, _, reinject = trace.rpartition("_")
        try:
            worst_us = record(name, int(reinject), TRACES / f"{trace}.txt")
        except HostError as error:
            print(f"record: {error}", file=sys.stderr)
            return error.exit_code
        if worst_us is None:
            print(f"record: {trace}: none of {ATTEMPTS} runs was quiet; use an idle host")
            return 1
        print(f"{trace}: no step took longer than {worst_us:.0f} us")
    return 0


if __name__ == "__main__":
    sys.exit(main())
