"""Record what tracefs gives of some runs: raw pages, format files, the kernel's own text of them.

    PYTHONPATH=src python tests/trace/record.py

writes src/kvmtick/bench/recorded.json, which `kvmtick bench` reads too. Needs /dev/kvm and tracefs,
as root. A run is taken when the host was on time: when the verdicts are those of recorded.py.
"""

import json
import os
import threading
from typing import Any

from recorded import COUNTS, RECORDED, RUNS, decode, decoder, reports, verdicts

from kvmtick import guests
from kvmtick.host.kvmdev import pit_worker_tids
from kvmtick.host.probe import probe_host
from kvmtick.host.tracefs import TICK_EVENTS, Tracefs, open_tracefs
from kvmtick.kvm.kernel import KernelVm
from kvmtick.trace.events import Function
from kvmtick.trace.pages import PageLayout

ATTEMPTS = 100


def record(tracefs: Tracefs, layout: PageLayout, name: str) -> dict[str, Any]:
    """One run of a built-in guest; of KVM only the events of its threads."""
    with tracefs.instance() as trace, KernelVm() as vm:
        guest = guests.load(name, tsc_khz=vm.get_tsc_khz(), **RUNS[name])
        vm.prepare(guest.needs)
        vm.load(guest)
        tid = threading.get_native_id()
        tids = {tid, *pit_worker_tids(os.getpid())}
        ours = " || ".join(f"common_pid == {tid}" for tid in tids)
        for event, filter_ in TICK_EVENTS.items():
            of_kvm = f"({ours}) && ({filter_})" if filter_ else ours
            trace.enable(event, of_kvm if event.startswith("kvm:") else filter_)
        trace.start()
        run = vm.run(limit_s=5)
        trace.stop()
        assert run.exit.reason == "done"
        text = [line.rstrip() for line in trace.text().splitlines() if not line.startswith("#")]
        pages = [(cpu, page[: layout.read(page).end].hex()) for cpu, page in trace.pages()]
    return {"load": RUNS[name], "vcpus": {str(tid): 0}, "pages": pages, "text": text}


def main() -> None:
    """All runs."""
    host = probe_host()
    with open_tracefs() as tracefs:
        header_page = tracefs.read("events/header_page")
        layout = PageLayout(header_page)
        addresses = tracefs.functions(*(function.name.lower() for function in Function))
        recorded: dict[str, Any] = {
            "provenance": f"Linux {host.kernel}, {' '.join(host.backends)}; tests/trace/record.py",
            "header_page": header_page,
            "formats": [tracefs.format_text(event) for event in TICK_EVENTS],
            "functions": {f"{address:#x}": name for address, name in addresses.items()},
            "runs": {},
        }
        for name in RUNS:
            for _ in range(ATTEMPTS):
                run = record(tracefs, layout, name)
                by = decoder(recorded)
                found = [verdicts(report) for report in reports(run, decode(run, by), by)]
                if found == [COUNTS.get(name, {"delivered": 3})]:
                    recorded["runs"][name] = run
                    break
            else:
                raise SystemExit(f"record: {name}: {ATTEMPTS} runs were late; use an idle host")
    RECORDED.write_text(json.dumps(recorded, indent=1) + "\n")
    print(f"{RECORDED.name}: {RECORDED.stat().st_size} bytes")


if __name__ == "__main__":
    main()
