"""What Linux counts is what kvmtick counts: /proc/interrupts, uptime and both of its clocks.

The guest's `snapshot` prints a line, reads all at one moment and prints it. The host looks at its
own counts when that line has left, and again when what was read begins to come.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from kvmtick.guests.linux import tiny_initrd
from kvmtick.kvm.model import ModelVm
from kvmtick.machine.linux import load_linux
from kvmtick.trace.events import Event
from kvmtick.trace.recorder import Entry, EntryConsumer

LIMIT_S = 300.0
NAMES = ("a", "b", "c", "d")
SCRIPT = "\nsleep 0.5\n".join(f"snapshot {name}" for name in NAMES)
TIMER_VECTOR = 0x30
"""ISA_IRQ_VECTOR(0), by the PIC and by the IOAPIC alike; the log tells that of the IOAPIC."""
LOCAL_TIMER_VECTOR = 0xEC
UPTIME_STEP_S = 0.01


class Injections(EntryConsumer):
    """How often each vector went into the guest."""

    def __init__(self) -> None:
        self.of_vector = [0] * 256

    def take(self, entries: list[Entry], begin: int, end: int) -> None:
        for entry in entries[begin:end]:
            if entry.event == Event.KVM_INJ_VIRQ:
                self.of_vector[entry.a] += 1


@dataclass
class Watch:
    """The host's counts and clock, at each `MARK` the guest prints."""

    vm: ModelVm
    injections: Injections
    printed: bytearray = field(default_factory=bytearray)
    seen: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    """By the end of the line: IRQ 0, local timer, ns."""

    def take(self, byte: int) -> None:
        """The guest prints."""
        self.printed.append(byte)
        if byte != ord("\n"):
            return
        line = self.printed.splitlines()[-1].decode(errors="replace")
        if line.startswith("snapshot ") and not line.endswith("end"):
            machine = self.vm.machine
            machine.recorder.flush()
            counts = self.injections.of_vector
            self.seen[line] = (
                counts[TIMER_VECTOR],
                counts[LOCAL_TIMER_VECTOR],
                machine.clock.now_ns,
            )


def interrupts(text: str, label: str) -> int:
    """A line of /proc/interrupts with one CPU."""
    found = re.search(rf"^ *{label}: +(\d+)", text, re.MULTILINE)
    return int(found[1]) if found else 0


@pytest.mark.parametrize("append", ["noapic nolapic", ""], ids=["PIC", "local APIC"])
def test_the_guest_s_counts_are_ours(kernel: Path, append: str) -> None:
    guest = load_linux(
        kernel, initrd=tiny_initrd(script=SCRIPT.encode()), append=f"console=ttyS0 {append}"
    )
    with ModelVm(ram_bytes=guest.needs.ram_bytes, fast=True) as vm:
        watch = Watch(vm, Injections())
        vm.machine.recorder.add_entry_consumer(watch.injections)
        vm.machine.ports.on_text = watch.take
        vm.prepare(guest.needs)
        vm.load(guest)
        run = vm.run(limit_s=LIMIT_S)
    printed = watch.printed.decode(errors="replace").replace("\r", "")
    assert run.exit.reason == "power-off", printed[-1000:]
    clocks = []
    for name in NAMES:
        before, after = watch.seen[f"snapshot {name} ..."], watch.seen[f"snapshot {name} begin"]
        text = printed.split(f"snapshot {name} begin\n")[1].split(f"snapshot {name} end")[0]
        guests = (interrupts(text, "0"), interrupts(text, "LOC"))
        # it reads all in some 0.1 ms between two ticks; runs repeat, so this is no matter of luck
        assert before[:2] == guests == after[:2], name
        clocks.append((before[2], after[2], text))
    told = [
        {key: int(value) for key, value in re.findall(r"^(\w+_ns) (\d+)$", text, re.MULTILINE)}
        for _, _, text in clocks
    ]
    uptimes_s = [
        float(re.findall(r"^(\d+\.\d\d) \d+\.\d\d$", text, re.MULTILINE)[0]) for *_, text in clocks
    ]
    for index in range(1, len(NAMES)):
        least_ns = clocks[index][0] - clocks[0][1]
        most_ns = clocks[index][1] - clocks[0][0]
        for clock in ("monotonic_ns", "realtime_ns"):
            assert least_ns <= told[index][clock] - told[0][clock] <= most_ns
        passed_s = uptimes_s[index] - uptimes_s[0]
        assert least_ns / 1e9 - UPTIME_STEP_S <= passed_s <= most_ns / 1e9 + UPTIME_STEP_S
