"""`kvmtick record`: real VMs recorded, and what it says where it cannot."""

import json
import os
import re
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from real_vm import guest_command, needs_recording, ticking_vm
from terminal import START, Terminal

from kvmtick.cli import UsageError
from kvmtick.cli import record as verb
from kvmtick.cli.show_record import live_table
from kvmtick.host.tracefs import Lost, Tracefs, open_tracefs
from kvmtick.kvm.kernel import KernelVm
from kvmtick.record.live import Sampled
from kvmtick.record.recording import Summary, VmSummary
from kvmtick.ticks.host import HostTicks
from kvmtick.trace.events import Event
from kvmtick.trace.ktrace import MAGIC, KtraceReader
from kvmtick.trace.vms import VmInfo


@pytest.fixture
def tracefs() -> Iterator[Tracefs]:
    """Skips where nothing can be recorded."""
    needs_recording()
    with open_tracefs() as opened:
        yield opened


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "t.ktrace"


def instances_of(tracefs: Tracefs, pid: int) -> list[str]:
    return [name for name in tracefs.instances() if f"-{pid}-" in name]


def read(path: Path) -> tuple[HostTicks, KtraceReader]:
    with KtraceReader(path) as trace:
        host = HostTicks(trace)
        host.read()
    return host, trace


# What cannot be.


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--for 0s", "--for 0s: give more than nothing, such as 10s"),
        ("--for -1s", "--for: duration '-1s' is negative: give a number and a unit"),
        ("--for 10", "--for: duration '10' has no unit"),
        ("--for soon", "--for: 'soon' is not a duration"),
        ("--pid 12x", "--pid '12x' is no process: give the number of a VM's process"),
        ("--pid 0", "--pid '0' is no process"),
        ("--pid 1 --all", "--pid and --all exclude each other: leave one out"),
        ("--buffer 16", "--buffer '16' is no size: give a number and K, M or G, such as 32M"),
        ("--buffer 1K", "--buffer 1K: give 64K to 4G"),
        ("--out -", "--out '-': a recording needs a file, such as t.ktrace"),
        ("--", "--: no command follows; give one, or leave -- out"),
        ("-- /no/such/program", "/no/such/program: no such program; give COMMAND"),
        ("--for 1s -- true", "--for and COMMAND: one of them ends the recording"),
        ("qemu-system-x86_64", "'qemu-system-x86_64': write -- before COMMAND"),
        ("--for", "argument --for: expected one argument; see kvmtick record --help"),
    ],
)
def test_usage(kvmtick: Terminal, words: str, message: str) -> None:
    result = kvmtick("record", *words.split())
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith(f"kvmtick: {message}")
    assert result.err.count("\n") == 1


def test_the_help(kvmtick: Terminal) -> None:
    result = kvmtick("record", "--help")
    assert (result.code, result.err) == (0, "")
    for word in ("--for", "--out", "--pid", "--all", "--entries", "--no-sched", "--buffer", "130"):
        assert word in result.out
    assert max(len(line) for line in result.out.splitlines()) <= 100


def test_without_root(out: Path) -> None:
    """Whoever may not use tracefs reads how to."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to be somebody else")
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)
        sys.stderr = os.fdopen(writer, "w", buffering=1)
        from kvmtick.cli import main

        os._exit(main(["record", "--for", "1s", "-o", str(out)]))
    os.close(writer)
    with os.fdopen(reader) as told:
        message = told.read()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3
    assert re.fullmatch(r"kvmtick: tracefs .*\(?as root.*\n", message)
    assert not out.exists()


def test_in_a_pid_namespace_of_its_own(
    kvmtick: Terminal, out: Path, tracefs: Tracefs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verb, "is_initial_pid_namespace", lambda: False)
    result = kvmtick("record", "--for", "1s", "-o", str(out))
    assert result.code == 3
    assert "run in the host's pid namespace" in result.err
    assert not out.exists()


def test_a_process_that_is_no_vm(kvmtick: Terminal, out: Path, tracefs: Tracefs) -> None:
    result = kvmtick("record", "--pid", "1", "--pid", "4194304", "-o", str(out))
    assert result.code in (2, 3)
    result = kvmtick("record", "--pid", str(os.getpid()), "-o", str(out))
    assert result.code == 2
    assert re.match(r"kvmtick: --pid: process \d+ \(.*\) has no VM of KVM; VMs on", result.err)
    result = kvmtick("record", "--pid", "4194304", "-o", str(out))
    assert result.code == 2
    assert "--pid: there is no process 4194304; VMs on this host:" in result.err
    assert not out.exists()


def test_a_file_that_cannot_be_written(kvmtick: Terminal, tmp_path: Path, tracefs: Tracefs) -> None:
    result = kvmtick("record", "--for", "1s", "-o", str(tmp_path))
    assert (result.code, result.out) == (2, "")
    assert result.err == (
        f"kvmtick: --out {tmp_path}: Is a directory; give a file that can be written\n"
    )
    assert not instances_of(tracefs, os.getpid())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk(kvmtick: Terminal, tracefs: Tracefs) -> None:
    result = kvmtick("record", "--for", "1s", "-o", "/dev/full")
    assert result.code == 3
    assert result.err == (
        "kvmtick: /dev/full: No space left on device; give --out a place with more room\n"
    )
    assert not instances_of(tracefs, os.getpid())


def test_a_vm_without_ticks(
    kvmtick: Terminal, tmp_path: Path, tracefs: Tracefs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with KernelVm() as vm:
        vm.create_irqchip()
        result = kvmtick("record", "--for", "10ms", "--pid", str(os.getpid()))
    assert result.code == 3
    (out,) = Path().glob("kvmtick-20*.ktrace")
    assert f"no tick in {out}: no timer of KVM expired for 1 VM" in result.err
    assert "clockevent0" in result.err
    assert read(out)[1].cut == ""


# What it records.


def test_a_vm_that_ticks(kvmtick: Terminal, out: Path, tracefs: Tracefs) -> None:
    with ticking_vm() as vm:
        result = kvmtick("record", "--for", "400ms", "--pid", str(vm.pid), "-o", str(out), "--json")
    assert (result.code, result.err) == (0, "")
    told = json.loads(result.out)
    host, trace = read(out)
    assert (trace.cut, trace.lost, told["lost_events"]) == ("", 0, 0)
    (told_vm,) = told["vms"]
    assert told_vm["pid"] == vm.pid
    assert told_vm["vcpus"] == 1
    assert told_vm["ticks"]["pit"] == told["ticks"] > 300
    assert told["elapsed_ns"] >= 400_000_000
    assert told["size_bytes"] == out.stat().st_size
    assert told["cpu_share"] > 0
    assert told["events"] == host.records
    (own,) = [each for each in host.vms if each.pid == vm.pid]
    assert set(own.info.threads.values()) >= {f"kvm-pit/{vm.pid}"}
    assert own.info.vcpus == {vm.pid: 0}
    assert told["ticks"] - 3 <= own.assembler.report().expired <= told["ticks"]
    assert {Event.SCHED_SWITCH, Event.SCHED_WAKING} <= trace.events
    assert not instances_of(tracefs, os.getpid())


def test_the_summary(kvmtick: Terminal, out: Path, tracefs: Tracefs) -> None:
    with ticking_vm() as vm:
        words = ("--no-sched", "--entries", "--buffer", "1M")
        result = kvmtick("record", "--for", "100ms", *words, "-o", str(out))
    assert (result.code, result.err) == (0, "")
    for pattern in (
        rf"^0\.1 s of \d+ VMs? in {out}: \d+ ticks, [\d.]+ MB$",
        rf"^\S+ +{vm.pid} +1 +\d+ \([\d,.]+/s\) +-$",
        r"^[\d,]+ events, none lost$",
        r"^recording took [\d.]+% of one CPU$",
        rf"^next: kvmtick report {out}$",
    ):
        assert re.search(pattern, result.out, re.MULTILINE), pattern
    _, trace = read(out)
    assert not {Event.SCHED_SWITCH, Event.SCHED_WAKING} & trace.events
    assert {Event.KVM_ENTRY, Event.KVM_EXIT} <= trace.events


def test_a_command_that_starts_a_vm(
    kvmtick: Terminal, tmp_path: Path, out: Path, tracefs: Tracefs
) -> None:
    said = tmp_path / "pid"
    command = ["sh", "-c", f'echo $$ >{said}; exec "$@"', "sh", *guest_command(milliseconds=1500)]
    result = kvmtick("record", "--json", "-o", str(out), "--", *command)
    told = json.loads(result.out)
    assert result.code == 0
    assert told["command"] == {"argv": command, "exit_code": 7}
    host, trace = read(out)
    assert trace.cut == ""
    pid = int(said.read_text())
    (ticks,) = [vm["ticks"]["pit"] for vm in told["vms"] if vm["pid"] == pid]
    assert ticks > 400
    (own,) = [vm for vm in host.vms if vm.pid == pid]
    assert own.assembler.report().expired == ticks


def test_the_end_of_a_command_is_told(kvmtick: Terminal, out: Path, tracefs: Tracefs) -> None:
    with ticking_vm():
        result = kvmtick("record", "-o", str(out), "--", "sh", "-c", "sleep 0.1; kill -9 $$")
    assert result.code == 0
    assert "the command was ended by SIGKILL\n" in result.out


# How it ends.


class Recorder:
    """A recorder as a process, whose file we read as it grows."""

    def __init__(self, fifo: Path, *words: str) -> None:
        os.mkfifo(fifo)
        command = [sys.executable, "-c", START, "record", "--json", "-o", str(fifo), *words]
        fd = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        assert poll.poll(60_000), "it does not record"
        os.set_blocking(fd, True)
        self._file = os.fdopen(fd, "rb")
        self._read = bytearray(self._file.read(len(MAGIC)))
        assert self._read == MAGIC
        self._thread = threading.Thread(target=self._drain)
        self._thread.start()

    def _drain(self) -> None:
        while data := self._file.read1(1 << 16):
            self._read += data

    def end(self, path: Path) -> tuple[str, str]:
        """Its output, when it has ended; what it recorded is in `path`."""
        told = self.process.communicate(timeout=60)
        self._thread.join()
        self._file.close()
        path.write_bytes(self._read)
        return told


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_well(
    tmp_path: Path, out: Path, tracefs: Tracefs, number: signal.Signals
) -> None:
    with ticking_vm() as vm:
        recorder = Recorder(tmp_path / "fifo", "--pid", str(vm.pid))
        assert len(instances_of(tracefs, recorder.process.pid)) == 1
        recorder.process.send_signal(number)
        told, error = recorder.end(out)
    assert (recorder.process.returncode, error) == (0, "")
    assert json.loads(told)["ticks"] > 0
    host, trace = read(out)
    assert trace.cut == ""
    assert host.records > 0
    assert not instances_of(tracefs, recorder.process.pid)


def test_interrupted_before_its_time(tmp_path: Path, out: Path, tracefs: Tracefs) -> None:
    with ticking_vm() as vm:
        recorder = Recorder(tmp_path / "fifo", "--pid", str(vm.pid), "--for", "60m")
        recorder.process.send_signal(signal.SIGINT)
        told, error = recorder.end(out)
    assert recorder.process.returncode == 130
    assert error == "kvmtick: interrupted; the recording is complete up to there\n"
    assert json.loads(told)["interrupted"] is True
    assert read(out)[1].cut == ""


def test_the_command_ends_with_the_recording(tmp_path: Path, out: Path, tracefs: Tracefs) -> None:
    recorder = Recorder(tmp_path / "fifo", "--", *guest_command())
    recorder.process.send_signal(signal.SIGTERM)
    told, _ = recorder.end(out)
    assert recorder.process.returncode == 130
    assert json.loads(told)["command"]["exit_code"] == -signal.SIGTERM


def test_a_killed_one_is_cleaned_up_by_the_next(
    kvmtick: Terminal, tmp_path: Path, out: Path, tracefs: Tracefs
) -> None:
    with ticking_vm() as vm:
        recorder = Recorder(tmp_path / "fifo", "--pid", str(vm.pid))
        recorder.process.kill()
        recorder.end(out)
        assert len(instances_of(tracefs, recorder.process.pid)) == 1
        assert read(out)[1].cut
        again = tmp_path / "again.ktrace"
        assert kvmtick("record", "--for", "50ms", "-o", str(again)).code == 0
    assert not instances_of(tracefs, recorder.process.pid)


def test_the_host_is_as_before(kvmtick: Terminal, out: Path, tracefs: Tracefs) -> None:
    """Beside instances of our own nothing of tracefs is written; nor is our priority kept."""
    files = ("tracing_on", "trace_clock", "buffer_size_kb", "current_tracer", "set_event")

    def state() -> list[Any]:
        switches = [tracefs.read(f"events/{name}/enable") for name in ("kvm", "timer", "sched")]
        handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        nice = os.getpriority(os.PRIO_PROCESS, 0)
        mounts = Path("/proc/mounts").read_text()
        return [[tracefs.read(name) for name in files], switches, handlers, nice, mounts]

    before = state()
    with ticking_vm() as vm:
        assert kvmtick("record", "--for", "50ms", "--pid", str(vm.pid), "-o", str(out)).code == 0
    assert state() == before
    assert not instances_of(tracefs, os.getpid())


# What is seen meanwhile.


def test_the_live_lines() -> None:
    from rich.console import Console

    info = VmInfo(4711, "web")
    summary = Summary(
        elapsed_ns=2_000_000_000,
        events=9,
        lost=Lost(3, 0, 0),
        size_bytes=1_500_000,
        cpu_ns=1,
        vms=[VmSummary(info, {"pit": 2000})],
        unowned_ticks=0,
        missing=[],
        unfollowed=0,
    )
    sampled = Sampled(ticks=100, lost=4)
    sampled.expiry_to_eoi.add([45_000] * 100)
    console = Console(width=120, no_color=True)
    with console.capture() as shown:
        console.print(live_table(summary, {4711: sampled}, {4711: 998.4}))
    text = shown.get()
    assert re.search(r"^web +4711 +2,000 +998/s +4 of 100 +45 us *$", text, re.MULTILINE), text
    assert "2 s, 1.5 MB, 3 events lost; Ctrl-C ends the recording" in text
    with console.capture() as shown:
        console.print(live_table(summary, {}, {}))
    assert re.search(r"^web +4711 +2,000 +- +- +- *$", shown.get(), re.MULTILINE)


def test_a_command_that_cannot_be_started(tmp_path: Path) -> None:
    """A program, but not one that this machine can run."""
    broken = tmp_path / "broken"
    broken.write_bytes(b"\x7fELFnonsense")
    broken.chmod(0o755)
    with pytest.raises(UsageError, match="broken: Exec format error; give another COMMAND"):
        verb._Command([str(broken)], to_stderr=False).start()
