"""`kvmtick record`: the ticks of the VMs on this host, through tracefs, into a file."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from kvmtick.abi.errors import HostError
from kvmtick.cli import EXIT_HOST, EXIT_INTERRUPTED, EXIT_OK, UsageError
from kvmtick.cli.options import Parser
from kvmtick.cli.show_record import as_dict, live, plural, show_summary
from kvmtick.host.tracefs import open_tracefs
from kvmtick.host.vms import HostVms, NoVmError, is_initial_pid_namespace
from kvmtick.record.out_file import UnwritableError
from kvmtick.record.recording import Recording, Settings, Summary
from kvmtick.timing.host import parse_duration_ns

__all__ = ["main"]

COMMAND_END_S = 10.0
BUFFER_UNITS = {"K": 1, "M": 1 << 10, "G": 1 << 20}
LEAST_BUFFER_KIB, MOST_BUFFER_KIB = 64, 4 << 20

EPILOG = """\
The recording is complete however it ends: after --for, when COMMAND ends, with Ctrl-C or SIGTERM.
It can be read while it grows. On the host nothing stays changed; what a killed recorder left is
removed when the next one starts.

exit codes:
  0 recorded (also when Ctrl-C ends a recording that has no other end)   2 usage
  3 the host does not let it, the file cannot be written on, or there was no tick in the recording
  130 interrupted before --for or COMMAND was over; the recording is complete up to there

examples:
  kvmtick record --for 10s -o t.ktrace    all VMs, those that start meanwhile too
  kvmtick record --pid 4711               one VM, until Ctrl-C
  kvmtick record -- qemu-system-x86_64 -accel kvm disk.img
  kvmtick report t.ktrace                 what became of the ticks, and why
"""


def main(argv: list[str]) -> int:
    """Run the verb; returns the exit code."""
    words, command = _split(argv)
    options = _parser().parse_command_line(words)
    if options.words:
        what = f"{options.words[0]!r}: write -- before COMMAND"
        raise UsageError(f"{what}; see kvmtick record --help")
    settings = _settings(options)
    child = _Command(command, to_stderr=options.json)
    if command is not None and settings.for_ns is not None:
        raise UsageError("--for and COMMAND: one of them ends the recording; leave one out")
    pids = [_pid(text) for text in options.pid]
    if pids and options.all:
        raise UsageError("--pid and --all exclude each other: leave one out")
    path = _out(options)
    with (
        open_tracefs() as tracefs,
        Recording(tracefs, _vms(pids), settings) as recording,
    ):
        ends = _Ends(recording)
        with ends, child, live(recording, shown=not options.json) as watcher:
            try:
                recording.run(path, watcher, child.start if command else None)
            except UnwritableError as error:
                raise UsageError(f"--out {error}; give a file that can be written") from None
    summary = recording.summary()
    interrupted = ends.interrupted and (command is not None or settings.for_ns is not None)
    if options.json:
        print(json.dumps(as_dict(path, summary, child.told(), interrupted=interrupted)))
    else:
        show_summary(path, summary, child.told())
    if interrupted:
        print("kvmtick: interrupted; the recording is complete up to there", file=sys.stderr)
        return EXIT_INTERRUPTED
    return _judge(path, summary, pids)


def _split(argv: list[str]) -> tuple[list[str], list[str] | None]:
    """Our options, and the COMMAND behind `--`."""
    if "--" not in argv:
        return argv, None
    at = argv.index("--")
    if not argv[at + 1 :]:
        raise UsageError("--: no command follows; give one, or leave -- out")
    return argv[:at], argv[at + 1 :]


def _parser() -> Parser:
    p = Parser(
        prog="kvmtick record",
        usage="kvmtick record [OPTION ...] [-- COMMAND ...]",
        description="Record the ticks of the VMs on this host: every event of their life, through a"
        "\ntracefs instance of its own. Needs root.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = p.add_argument
    add("--for", metavar="DURATION", help="how long, such as 10s (until Ctrl-C)")
    add("-o", "--out", metavar="FILE", help="where to (kvmtick-DATE-TIME.ktrace)")
    add(
        "--pid",
        metavar="PID",
        action="append",
        default=[],
        help="only the VM of this process; may be repeated",
    )
    add("--all", action="store_true", help="all VMs, those that start meanwhile too (the default)")
    add(
        "--entries", action="store_true", help="all VM entries and exits too: several times as much"
    )
    add(
        "--no-sched",
        action="store_true",
        help="not when kvm-pit and vCPU threads waited for a CPU: a third less",
    )
    add(
        "--buffer",
        metavar="SIZE",
        help="of the kernel's buffer for each CPU, such as 32M (16M; 512M for all of them)",
    )
    add("--json", action="store_true", help="one JSON object instead of the summary")
    add("words", nargs="*", help=argparse.SUPPRESS)
    return p


def _settings(options: argparse.Namespace) -> Settings:
    return Settings(
        for_ns=_duration_ns(vars(options)["for"]),
        only_some=bool(options.pid),
        entries=options.entries,
        sched=not options.no_sched,
        buffer_kib=_buffer_kib(options.buffer),
    )


def _duration_ns(text: str | None) -> int | None:
    if text is None:
        return None
    try:
        duration_ns = parse_duration_ns(text)
    except ValueError as error:
        raise UsageError(f"--for: {error}") from None
    if not duration_ns:
        raise UsageError(f"--for {text}: give more than nothing, such as 10s")
    return duration_ns


def _buffer_kib(text: str | None) -> int | None:
    if text is None:
        return None
    number, unit = text[:-1], text[-1:].upper()
    if unit not in BUFFER_UNITS or not (number.isascii() and number.isdigit()):
        raise UsageError(f"--buffer {text!r} is no size: give a number and K, M or G, such as 32M")
    kib = int(number) * BUFFER_UNITS[unit]
    if not LEAST_BUFFER_KIB <= kib <= MOST_BUFFER_KIB:
        raise UsageError(f"--buffer {text}: give 64K to 4G")
    return kib


def _pid(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 0 < int(text) < 1 << 31):
        raise UsageError(f"--pid {text!r} is no process: give the number of a VM's process")
    return int(text)


def _out(options: argparse.Namespace) -> Path:
    name = options.out
    if name is None:
        return Path(time.strftime("kvmtick-%Y%m%d-%H%M%S.ktrace"))
    if name in ("", "-"):
        raise UsageError(f"--out {name!r}: a recording needs a file, such as t.ktrace")
    return Path(name)


def _vms(pids: list[int]) -> HostVms:
    """The VMs to follow. Raises `HostError`, and `UsageError` for a process that is none."""
    if not is_initial_pid_namespace():
        what = "the kernel's records count processes otherwise than this container does"
        raise HostError(what, "run in the host's pid namespace (docker run --pid=host, hostPID)")
    everybody = HostVms()
    try:
        return HostVms([everybody.check(pid) for pid in pids])
    except NoVmError as error:
        everybody.scan(0.0)
        vms = everybody.vms.values()
        there = ", ".join(f"{vm.pid} ({vm.name})" for vm in vms) or "none that could be seen"
        raise UsageError(f"--pid: {error}; VMs on this host: {there}") from None


class _Ends:
    """Ctrl-C, SIGTERM and SIGHUP end the recording well; a second Ctrl-C ends the program."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self, recording: Recording) -> None:
        self._recording = recording
        self._before: dict[int, object] = {}
        self.interrupted = False

    def __enter__(self) -> None:
        for number in self.SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._end)

    def _end(self, number: int, frame: object) -> None:
        self.interrupted = True
        self._recording.stop()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]


class _Command:
    """The command that is run while we record."""

    def __init__(self, argv: list[str] | None, *, to_stderr: bool) -> None:
        """`to_stderr`: its output goes there, for ours is for a program."""
        self._argv = argv
        self._stdout = 2 if to_stderr else None
        self._process: subprocess.Popen[bytes] | None = None
        self._pidfd = -1
        if argv is not None and shutil.which(argv[0]) is None:
            raise UsageError(f"{argv[0]}: no such program; give COMMAND as a shell would find it")

    def start(self) -> int:
        """Start it; a descriptor that can be read when it has ended."""
        assert self._argv is not None
        try:
            self._process = subprocess.Popen(self._argv, stdout=self._stdout)
        except OSError as error:
            raise UsageError(f"{self._argv[0]}: {error.strerror}; give another COMMAND") from None
        self._pidfd = os.pidfd_open(self._process.pid)
        return self._pidfd

    def told(self) -> dict[str, object] | None:
        """The command and its exit code: negative for a signal, null if it still runs."""
        if self._process is None:
            return None
        return {"argv": self._argv, "exit_code": self._process.returncode}

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        """The recording is over: so is the command."""
        if self._process is None:
            return
        os.close(self._pidfd)
        if self._process.poll() is None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(COMMAND_END_S)


HINTS = """\
  is the guest running, or halted for good?  top -H -p PID
  what does it tick by?  in the guest: /sys/devices/system/clockevents/clockevent0/current_device
  a TSC deadline that the CPU itself keeps (kvm_intel preemption_timer=Y) has no hrtimer
  a PIT, RTC or HPET that the VMM emulates (kernel-irqchip=split or off) is not KVM's\
"""


def _judge(path: Path, summary: Summary, pids: list[int]) -> int:
    """Ticks, or what to look at."""
    if summary.ticks or (summary.unowned_ticks and not pids):
        return EXIT_OK
    if not summary.vms:
        why = "no VM of KVM was seen: start one; those of others only root (CAP_SYS_PTRACE) sees"
    else:
        vms = plural(len(summary.vms), "VM")
        why = f"no timer of KVM expired for {vms}; what to look at:\n{HINTS}"
    print(f"kvmtick: no tick in {path}: {why}", file=sys.stderr)
    return EXIT_HOST
