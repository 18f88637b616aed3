"""Record scenarios (apic_scenarios.py) on the live kernel, on a moment when it is quiet.

    PYTHONPATH=src:tests python -m golden.record if0_1 clamp_0 clamp_1

`_0` is reinject off, `_1` on; the files go to tests/golden/traces. A shared host is late now and
then: a run is taken only if no step of a tick took longer than QUIET_US, whatever the events are.
With reinject on there is one thing more, `reopened`.
It needs what capture.py needs. Exit codes: 0 fine, 1 no run was quiet, 2 usage, 3 as capture.py.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from golden import capture
from golden.apic_scenarios import PIN, SCENARIOS
from kvmtick import guests
from kvmtick.abi import HostError
from kvmtick.conform.punctual import reopened, worst_step_us
from kvmtick.guests import Guest
from kvmtick.guests.script import Scenario
from kvmtick.kvm.kernel import KernelVm

TRACES = Path(__file__).parent / "traces"
QUIET_US = 120
ATTEMPTS = 200
LIMIT_S = 5.0


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
