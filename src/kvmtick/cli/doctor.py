"""`kvmtick doctor`: what this machine offers, what does not work, and what to do about it."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import shutil
import sys
import sysconfig
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from kvmtick import __version__
from kvmtick.cli import EXIT_OK
from kvmtick.cli.options import Parser
from kvmtick.host.probe import HostProbe, KvmProbe, TracefsProbe, is_compiled, probe_host

__all__ = ["Check", "main"]

MIN_PYTHON = (3, 11)
UNICORN_VERSION = "2.1.4"


@dataclass(frozen=True, slots=True)
class Check:
    """One thing looked at: `ok`, or what is wrong (`found`) and what to do (`remedy`).

    `needed`: without it `kvmtick run` does not work; the rest only adds the real kernel.
    """

    name: str
    ok: bool
    found: str
    remedy: str = ""
    needed: bool = False


def main(argv: list[str]) -> int:
    """Run the verb. A missing piece is a finding, not a failure: the exit code is 0."""
    p = Parser(
        prog="kvmtick doctor",
        usage="kvmtick doctor [--json]",
        description="What this machine offers to kvmtick, what it lacks, and what to do about it.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    options = p.parse_args(argv)
    host = probe_host()
    checks = [
        _python(),
        _compiler(),
        _unicorn(),
        _shim(),
        _modules(),
        *_kvm(host.kvm),
        *_virtualization(host),
        *_tracefs(host.tracefs),
    ]
    facts = {
        "compiled": is_compiled(),
        "kernel": host.kernel,
        "cpus": host.cpus,
        "backends": list(host.backends),
    }
    if options.json:
        print(json.dumps(_as_dict(checks, facts, host.kvm, host.tracefs, host.parameters)))
        return EXIT_OK
    _show(checks, facts, host.kvm.caps, host.parameters)
    return EXIT_OK


def _python() -> Check:
    found = f"{platform.python_implementation()} {platform.python_version()}"
    ok = sys.version_info >= MIN_PYTHON
    return Check("Python", ok, found, "" if ok else "install Python 3.11 or newer", needed=True)


def _compiler() -> Check:
    compiler = (sysconfig.get_config_var("CC") or "cc").split()[0]
    path = shutil.which(compiler)
    if path:
        return Check("C compiler", True, compiler)
    return Check(
        "C compiler",
        False,
        f"{compiler} not found; what is installed goes on working",
        "to build kvmtick again: apt-get install gcc python3-dev",
    )


def _unicorn() -> Check:
    remedy = f"pip install unicorn=={UNICORN_VERSION}"
    try:
        found = version("unicorn")
    except PackageNotFoundError:
        return Check("unicorn", False, "not installed", remedy, needed=True)
    ok = found == UNICORN_VERSION
    return Check("unicorn", ok, found, "" if ok else remedy, needed=True)


def _shim() -> Check:
    """The native part, tried out: it proves libunicorn's layout when an engine is made."""
    remedy = "build it again: pip install --force-reinstall --no-deps kvmtick"
    if importlib.util.find_spec("kvmtick.cpu._shim") is None:
        return Check("native shim", False, "kvmtick.cpu._shim is not built", remedy, needed=True)
    try:
        from kvmtick.cpu.unicorn import UnicornEngine

        UnicornEngine().close()
    except (ImportError, RuntimeError) as error:
        return Check("native shim", False, str(error), remedy, needed=True)
    return Check("native shim", True, "loaded; libunicorn is the build it knows", needed=True)


def _modules() -> Check:
    if is_compiled():
        return Check("modules", True, "compiled by mypyc")
    if os.environ.get("KVMTICK_PURE"):
        return Check("modules", True, "Python, slower than compiled: KVMTICK_PURE is set")
    remedy = "install kvmtick without KVMTICK_PURE=1 in the environment"
    return Check("modules", True, "Python, slower than compiled", remedy)


def _kvm(probe: KvmProbe) -> list[Check]:
    if not probe.openable:
        return [Check("/dev/kvm", False, probe.error, probe.remedy)]
    missing = [name for name in ("IRQCHIP", "PIT2", "REINJECT_CONTROL") if not _cap(probe, name)]
    checks = [Check("/dev/kvm", True, f"API version {probe.api_version}")]
    if missing:
        checks.append(
            Check(
                "in-kernel irqchip",
                False,
                f"no {', '.join(missing)}",
                "the kernel was built without CONFIG_KVM_IOAPIC; the model is not affected",
            )
        )
    else:
        checks.append(Check("in-kernel irqchip", True, "IRQCHIP, PIT2, REINJECT_CONTROL"))
    return checks


def _virtualization(host: HostProbe) -> list[Check]:
    if not host.kvm.openable:
        return []
    if host.virtualization:
        return [Check("VMX or SVM", True, host.virtualization)]
    return [
        Check(
            "VMX or SVM",
            False,
            "this KVM executes guests' kernels by its instruction emulator: the small guests run",
            "for Linux on /dev/kvm use a host with VMX or SVM; the model is not affected",
        )
    ]


def _cap(probe: KvmProbe, name: str) -> int:
    return next((value for cap, value in probe.caps.items() if cap.endswith(f"CAP_{name}")), 0)


def _tracefs(probe: TracefsProbe) -> list[Check]:
    if not probe.readable:
        return [Check("tracefs", False, probe.error, probe.remedy)]
    missing = [event for event, there in probe.events.items() if not there]
    where = f"mounted at {probe.mounted_at}" if probe.mounted_at else "can be mounted privately"
    checks = [Check("tracefs", True, where)]
    if missing:
        checks.append(
            Check("trace events", False, f"no {', '.join(missing)}", "load the kvm module first")
        )
    else:
        checks.append(Check("trace events", True, f"all {len(probe.events)} that follow a tick"))
    return checks


def _as_dict(
    checks: list[Check],
    facts: dict[str, object],
    kvm: KvmProbe,
    tracefs: TracefsProbe,
    parameters: dict[str, str],
) -> dict[str, object]:
    return {
        "kvmtick": __version__,
        **facts,
        "ready": all(check.ok for check in checks if check.needed),
        "checks": [
            {
                "name": check.name,
                "ok": check.ok,
                "found": check.found,
                "remedy": check.remedy,
                "needed": check.needed,
            }
            for check in checks
        ],
        "capabilities": kvm.caps,
        "events": tracefs.events,
        "parameters": parameters,
    }


def _show(
    checks: list[Check],
    facts: dict[str, object],
    caps: dict[str, int],
    parameters: dict[str, str],
) -> None:
    from rich.markup import escape
    from rich.table import Table

    from kvmtick.cli.show import ReportConsole

    console = ReportConsole()
    console.print(f"kvmtick {__version__} on Linux {facts['kernel']}, {facts['cpus']} CPUs")
    table = Table("", "what", "found", box=None, pad_edge=False)
    for check in checks:
        mark = "[green]ok[/]" if check.ok else ("[red]no[/]" if check.needed else "[yellow]--[/]")
        table.add_row(mark, check.name, escape(check.found))
        if check.remedy:
            table.add_row("", "", f"[bold]do:[/] {escape(check.remedy)}")
    console.print(table)
    if caps:
        console.print("\ncapabilities: " + ", ".join(f"{k}={v}" for k, v in caps.items() if v))
        absent = [name for name, value in caps.items() if not value]
        if absent:
            console.print("absent: " + ", ".join(absent))
    if parameters:
        console.print("parameters: " + ", ".join(f"{k}={v}" for k, v in parameters.items()))
    ready = all(check.ok for check in checks if check.needed)
    console.print()
    if not ready:
        console.print("kvmtick run does not work here yet: see the lines marked no")
    elif all(check.ok for check in checks):
        console.print("everything works here: the model, and the real kernel beside it")
    else:
        console.print("kvmtick run works here; what is marked -- only adds the real kernel")
