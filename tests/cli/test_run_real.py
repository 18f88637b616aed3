"""`kvmtick run --cpu kvm` and `--chips kernel`: the guest on /dev/kvm."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from terminal import Terminal, process

from kvmtick.abi import HostError
from kvmtick.host.kvmdev import open_kvm
from kvmtick.host.tracefs import open_tracefs
from kvmtick.ticks.host import HostTicks
from kvmtick.trace.events import Event
from kvmtick.trace.reading import open_trace

VERDICTS = (
    *("delivered", "late", "reinjected", "coalesced", "masked", "dropped", "outstanding"),
    "unknown",
)
ENDS_S = 60


@pytest.fixture
def kvm() -> None:
    """Skip, saying why, where /dev/kvm cannot be used."""
    try:
        open_kvm().close()
    except HostError as error:
        pytest.skip(f"needs /dev/kvm: {error}")


@pytest.fixture
def tracefs() -> None:
    """Skip, saying why, where tracefs cannot be used."""
    try:
        with open_tracefs() as opened:
            opened.instance().close()
    except HostError as error:
        pytest.skip(f"needs tracefs: {error}")


def run_json(kvmtick: Terminal, *arguments: str) -> dict[str, Any]:
    result = kvmtick("run", *arguments, "--json")
    assert result.code == 0, result.err
    told = json.loads(result.out)
    assert isinstance(told, dict)
    return told


def check_sums(told: dict[str, Any]) -> None:
    for ticks in (told["ticks"], *(source["ticks"] for source in told["sources"])):
        assert sum(ticks.get(verdict, 0) for verdict in VERDICTS) == ticks["expired"]


@pytest.mark.usefixtures("kvm")
@pytest.mark.parametrize(
    "guest", ["tick-pic", "tick-if0", "tick-lapic", "nmi-watchdog", "ipi-tick", "tick-long"]
)
def test_the_models_chips_tick_a_real_cpu(kvmtick: Terminal, guest: str) -> None:
    told = run_json(kvmtick, guest, "--cpu", "kvm", "--ticks", "20", "--hz", "100")
    assert (told["cpu"], told["chips"], told["clock"]) == ("kvm", "model", "real")
    assert told["exit"] == {"reason": "done", "code": 0}
    assert told["guest_ticks"] == 20
    assert told["instructions"] is None
    assert told["ticks"]["expired"] > 0
    check_sums(told)


@pytest.mark.usefixtures("kvm")
def test_a_run_ends_when_its_time_is_over(kvmtick: Terminal) -> None:
    for chips in ("model", "kernel"):
        told = run_json(kvmtick, "--cpu", "kvm", "--chips", chips, "--for", "100ms")
        assert told["exit"]["reason"] == "time"
        assert told["elapsed_ns"] >= 100_000_000
        assert told["guest_ticks"] > 0


@pytest.mark.usefixtures("kvm", "tracefs")
@pytest.mark.parametrize("guest", ["tick-pic", "tick-lapic", "ipi-tick"])
def test_the_kernels_chips_have_ticks_where_tracefs_tells_them(
    kvmtick: Terminal, guest: str
) -> None:
    told = run_json(kvmtick, guest, "--chips", "kernel", "--ticks", "20", "--hz", "100")
    assert (told["cpu"], told["chips"], told["clock"]) == ("kvm", "kernel", "real")
    assert told["guest_ticks"] == 20
    assert told["ticks"]["expired"] > 0
    check_sums(told)


@pytest.mark.usefixtures("kvm", "tracefs")
@pytest.mark.parametrize("guest", ["tick-if0", "tick-lapic"])
def test_the_kernels_ticks_can_be_kept_as_a_recording(
    kvmtick: Terminal, tmp_path: Path, guest: str
) -> None:
    path = tmp_path / "run.ktrace"
    told = run_json(kvmtick, guest, "--chips", "kernel", "--ticks", "20", "--trace", str(path))
    with open_trace(path) as trace:
        host = HostTicks(trace)
        host.read()
        assert (trace.cut, trace.unknown, trace.is_complete) == ("", 0, False)
        assert Event.KVM_SET_IRQ in trace.events
        assert Event.SCHED_SWITCH not in trace.events
    (vm,) = host.vms
    assert (vm.pid, vm.name) == (os.getpid(), guest)
    report = next(each for each in vm.assembler.reports() if each.expired)
    assert report.as_dict() == told["ticks"]
    assert report.latency_ns == told["latency_ns"]


@pytest.mark.usefixtures("kvm")
def test_without_tracefs_nobody_sees_the_kernels_ticks(
    kvmtick: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent() -> None:
        raise HostError("tracefs is not there", "mount it")

    monkeypatch.setattr("kvmtick.cli.run_kernel.open_tracefs", absent)
    result = kvmtick("run", "--chips", "kernel", "--ticks", "20", "--json")
    told = json.loads(result.out)
    assert (result.code, told["guest_ticks"], told["ticks"]) == (0, 20, None)
    assert result.err == "kvmtick: nobody sees the ticks: tracefs is not there; mount it\n"
    result = kvmtick("run", "--chips", "kernel", "--trace", "/dev/null")
    assert (result.code, result.err) == (3, "kvmtick: tracefs is not there; mount it\n")


@pytest.mark.usefixtures("kvm")
@pytest.mark.parametrize("where", [["--cpu", "kvm"], ["--chips", "kernel"]], ids=" ".join)
def test_ctrl_c_ends_a_run_with_its_report(tmp_path: Path, where: list[str]) -> None:
    # mov al, 10; out 0xe9, al; jmp $: a line of text says that it runs
    guest = tmp_path / "guest.bin"
    guest.write_bytes(b"\xb0\x0a\xe6\xe9\xeb\xfe")
    with process("run", str(guest), *where, "--for", f"{ENDS_S}s") as running:
        assert running.stdout is not None
        assert running.stdout.readline() == "\n"
        running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=ENDS_S)
    assert running.returncode == 130, err
    assert "interrupted after" in out


REFUSED: list[tuple[list[str], str, str]] = [
    (["--cpu", "unicorn", "--chips", "kernel"], "only vCPUs of /dev/kvm", "give --cpu kvm"),
    (["--cpu", "kvm", "--clock", "virtual"], "its time is real", "leave it out"),
    (["--cpu", "kvm", "--gdb", "0"], "--gdb: a debugger", "use --cpu unicorn"),
    (["--cpu", "kvm", "--fast"], "--fast", "use --cpu unicorn"),
    (["--chips", "kernel", "--gdb", "0"], "--gdb", "use --cpu unicorn"),
    (["--chips", "kernel", "--fault", "vcpu_off=1ms"], "--fault", "use --chips model"),
    (["--chips", "kernel", "--quantum", "1ms"], "--quantum", "use --chips model"),
    (["--chips", "kernel", "--seed", "1"], "--seed", "use --chips model"),
    (["--chips", "kernel", "--story", "1"], "--story", "use --chips model"),
    (["--chips", "kernel", "--no-clamp"], "--no-clamp: there min_timer_", "use --chips model"),
    (["--chips", "kernel", "--strict"], "--strict", "use --chips model"),
    (["--cpu", "xen"], "'xen'", "see kvmtick run --help"),
]


@pytest.mark.parametrize(("arguments", "wrong", "remedy"), REFUSED, ids=lambda v: str(v)[:40])
def test_what_does_not_go_together(
    kvmtick: Terminal, arguments: list[str], wrong: str, remedy: str
) -> None:
    result = kvmtick("run", *arguments)
    assert (result.code, result.out) == (2, "")
    assert result.err.count("\n") == 1
    assert wrong in result.err
    assert remedy in result.err


@pytest.mark.parametrize("where", [["--cpu", "kvm"], ["--chips", "kernel"]], ids=" ".join)
def test_no_kvm_is_the_hosts_fault(
    kvmtick: Terminal, monkeypatch: pytest.MonkeyPatch, where: list[str]
) -> None:
    def absent() -> None:
        raise HostError("/dev/kvm is not there", "modprobe kvm_intel (or kvm_amd)")

    monkeypatch.setattr("kvmtick.host.kvmdev.open_kvm", absent)
    result = kvmtick("run", *where)
    assert (result.code, result.out) == (3, "")
    assert result.err.startswith("kvmtick: /dev/kvm is not there; modprobe kvm_intel")
    assert result.err.count("\n") == 1
