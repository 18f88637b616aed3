"""Linux on /dev/kvm, with the model's chips and with the kernel's; and where KVM cannot do that."""

import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from test_boots import START, timer_interrupts
from test_counts import LOCAL_TIMER_VECTOR, interrupts

from kvmtick.abi.errors import HostError
from kvmtick.cli import EXIT_HOST, EXIT_OK, main
from kvmtick.guests.linux import tiny_initrd
from kvmtick.host.kvmdev import open_kvm
from kvmtick.host.probe import probe_virtualization
from kvmtick.host.tracefs import open_tracefs
from kvmtick.kvm.kernel import KernelVm
from kvmtick.kvm.kernel_trace import TickTrace
from kvmtick.machine.linux import load_linux
from kvmtick.trace.events import Event, Record
from kvmtick.trace.events import field as value_of

WHERE = [["--cpu", "kvm"], ["--cpu", "kvm", "--chips", "kernel"]]
LIMIT_S = 300.0
NAMES = ("a", "b", "c")
SCRIPT = "\nsleep 0.5\n".join(f"snapshot {name}" for name in NAMES)
PROMPT = "kvmtick# "
GREETING = "Linux is up"
COMMANDS = "ticks\nsleep 1\nticks\nexit\n"
UNWANTED = ("MP-BIOS bug", "BUG:", "Kernel panic")
"""What a boot may not print however slow the host is."""


@pytest.fixture
def kvm() -> None:
    """Skip, saying why, where /dev/kvm cannot be used."""
    try:
        open_kvm().close()
    except HostError as error:
        pytest.skip(f"needs /dev/kvm: {error}")


@pytest.fixture
def hardware(kvm: None) -> None:
    """Skip, saying why, where KVM has no hardware to run guests with."""
    if not probe_virtualization():
        pytest.skip("needs a CPU with VMX or SVM: this one's KVM emulates guests' kernels")


@pytest.fixture
def tracefs() -> None:
    """Skip, saying why, where tracefs cannot be used."""
    try:
        with open_tracefs() as opened:
            opened.instance().close()
    except HostError as error:
        pytest.skip(f"needs tracefs: {error}")


@pytest.mark.usefixtures("kvm")
@pytest.mark.parametrize("where", WHERE, ids=" ".join)
def test_a_kvm_that_emulates_is_refused(
    tmp_path: Path,
    echo: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    where: list[str],
) -> None:
    monkeypatch.setattr("kvmtick.host.probe.probe_virtualization", lambda: "")
    trace = tmp_path / "kept.ktrace"
    trace.write_bytes(b"kept")
    with open(os.devnull) as nothing:
        monkeypatch.setattr("sys.stdin", nothing)
        code = main(["run", "--kernel", str(echo), *where, "--trace", str(trace)])
    assert code == EXIT_HOST
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "neither VMX nor SVM" in err
    assert err.endswith("; run the model: leave --cpu and --chips out\n")
    assert trace.read_bytes() == b"kept"


def boot(kernel: Path, vcpus: int, *where: str) -> tuple[int, str]:
    """Exit code and what was printed; `COMMANDS` are typed when the guest's init listens."""
    options = ("--kernel", str(kernel), "--vcpus", str(vcpus), "--limit", f"{LIMIT_S:g}s")
    with subprocess.Popen(
        [sys.executable, "-c", START, "run", *options, *where],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as running:
        assert running.stdin is not None
        assert running.stdout is not None
        printed = ""
        for line in running.stdout:
            printed += line
            if line.startswith(GREETING):
                running.stdin.write(COMMANDS)
                running.stdin.flush()
        return running.wait(), printed


@pytest.mark.usefixtures("hardware")
@pytest.mark.parametrize("vcpus", [1, 2])
@pytest.mark.parametrize("where", WHERE, ids=" ".join)
def test_a_kernel_boots_to_the_prompt(kernel: Path, where: list[str], vcpus: int) -> None:
    code, printed = boot(kernel, vcpus, *where)
    assert code == EXIT_OK, printed[-2000:]
    assert printed.count(PROMPT) == COMMANDS.count("\n")
    for text in UNWANTED:
        assert text not in printed
    before, after = timer_interrupts(printed)
    assert after > before
    assert "power-off after" in printed


@dataclass
class Watch:
    """When the guest printed its marks, and when its local timer's interrupts went in."""

    printed: bytearray = field(default_factory=bytearray)
    marks_ns: dict[str, int] = field(default_factory=dict)
    """CLOCK_MONOTONIC at the end of a line."""
    injected_ns: list[int] = field(default_factory=list)
    accepted_ns: list[int] = field(default_factory=list)
    """By the local APIC: all there is to see where hardware delivers (APICv, AVIC)."""

    def hear(self, byte: int) -> None:
        """The guest prints."""
        self.printed.append(byte)
        if byte == ord("\n"):
            line = self.printed.splitlines()[-1].decode(errors="replace")
            if line.startswith("snapshot "):
                self.marks_ns[line] = time.monotonic_ns()

    def see(self, records: list[Record]) -> None:
        """Records of the run."""
        for record in records:
            if record[1] == Event.KVM_INJ_VIRQ:
                if value_of(record, "vector") == LOCAL_TIMER_VECTOR:
                    # again, where an exit came between
                    self.injected_ns += [] if value_of(record, "reinjected") else [record[0]]
            elif (
                record[1] == Event.KVM_APIC_ACCEPT_IRQ
                and value_of(record, "vec") == LOCAL_TIMER_VECTOR
            ):
                self.accepted_ns.append(record[0])

    def until(self, mark: str) -> int:
        """How many interrupts there were until then."""
        seen_ns = self.injected_ns or self.accepted_ns
        return sum(ns <= self.marks_ns[mark] for ns in seen_ns)


@pytest.mark.usefixtures("hardware", "tracefs")
def test_the_guest_counts_the_ticks_that_the_kernel_traces(kernel: Path) -> None:
    guest = load_linux(
        kernel, initrd=tiny_initrd(script=SCRIPT.encode()), append="console=ttyS0 panic=-1"
    )
    watch = Watch()
    with KernelVm(ram_bytes=guest.needs.ram_bytes) as vm:
        vm.user.ports.on_text = watch.hear
        vm.prepare(guest.needs)
        vm.load(guest)
        trace = TickTrace(vm, [watch.see])
        run = vm.run(limit_s=LIMIT_S, observer=trace)
    printed = watch.printed.decode(errors="replace").replace("\r", "")
    assert run.exit.reason == "power-off", printed[-1000:]
    assert trace.lost == 0
    last = 0
    for name in NAMES:
        text = printed.split(f"snapshot {name} begin\n")[1].split(f"snapshot {name} end")[0]
        its = interrupts(text, "LOC")
        assert watch.until(f"snapshot {name} ...") <= its <= watch.until(f"snapshot {name} begin")
        assert its > last
        last = its
    assert re.search(r"Linux version \S+", printed)
