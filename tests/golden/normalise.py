"""From a trace to what is compared: one short list of tokens for each chip line.

Both sides come as ftrace text: the kernel's from tracefs, the model's from `kvmtick.trace.ftrace`.
`project` reads them with one and the same code. This module is the only place that says what is
set aside, and why:

* **times**: timestamps, `now`, `softexpires`, how long a vCPU slept. They are the host's. Kept is
  what is exact in them: a timer's step from one `expires` to the next, and in how many tenths of a
  millisecond a newly programmed timer is due.
* **CPU numbers, latency flags, pointers, thread names and pids**: another host, other numbers.
  Only the kind of thread is used: the worker (`kvm-pit/...`), an interrupt, or the vCPU.
* **kvm_vcpu_wakeup**: this kernel's back end polls before it sleeps and may find its event then.
* **kvm_entry, kvm_exit**: that back end emulates the guest, so a port access is no exit there.
* **kvm_eoi, kvm_inj_virq**: the recorded kernel never writes kvm_inj_virq. It writes EOI to the
  local APIC itself when it injects, and that kvm_eoi stands for the injection; no guest here has a
  use for the local APIC. Both become the one token `inject`. The vector is set aside.
* **kvm_apicv_inhibit_changed**: KVM_REINJECT_CONTROL's; the recordings start later.
* **kvm_pit_reset_reinject**: the model's own event, the kernel has no such tracepoint.
* **kvm_apic_accept_irq**: no local APIC takes part in these runs.
* **hrtimer_cancel** and the **hrtimer_start** of a timer that is taken along when the vCPU thread
  moves to another CPU: `expires` is what it was before. A punctual host of one CPU moves nothing.
* **the order between threads**: which of them is first is the host's business, for example whether
  the worker drops the line before or after the vCPU takes the interrupt. Hence one list a line.
* **how often**: repeats are collapsed, see `collapse`. The numbers are the guest's business: it
  counts its ticks itself (tests/conformance/test_section6.py).
* **where the trace ends**: it is cut behind the write to the exit port. A run of the worker, or an
  expiry of the timer, that this leaves unfinished is dropped.

An event of any other kind is an error: nothing disappears unnamed.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, fields

LINE = re.compile(
    r"^ *(?P<comm>.+)-(?P<pid>\d+) +\[\d+\] +(?P<flags>\S{4,}) +(?P<ts>[\d.]+): "
    r"(?P<event>\w+): (?P<rest>.*?) *$"
)
SET_ASIDE = frozenset(
    {
        "hrtimer_cancel",
        "kvm_apic_accept_irq",
        "kvm_apicv_inhibit_changed",
        "kvm_entry",
        "kvm_exit",
        "kvm_pit_reset_reinject",
        "kvm_vcpu_wakeup",
    }
)
EXIT_WRITE = "pio_write at 0xf4 "
LONGEST_BLOCK = 3


@dataclass(frozen=True, slots=True)
class ChipLines:
    """What happened on each line, in order, repeats collapsed."""

    hrtimer: tuple[str, ...]
    """Counter 0's timer: `start in 1.0 ms`, `expire`, `expire, start +999848 ns`."""
    worker: tuple[str, ...]
    """Its runs: who queued the work, and what it did with the line: `by timer: 1 0`, `by ack: `."""
    gsi: tuple[str, ...]
    """Levels of GSI 0, with their source."""
    ioapic: tuple[str, ...]
    """What each level did at the IOAPIC's pin."""
    pic: tuple[str, ...]
    """What each level did at the PIC's pin."""
    vcpu: tuple[str, ...]
    """Port accesses, injections, and the acknowledgements they lead to."""


def project(lines: Iterable[str]) -> ChipLines:
    """The projection of a trace: ftrace text, comment lines are skipped.

    Raises ValueError on a line that is no event, and on an event this module knows nothing of.
    """
    reader = _Reader()
    for line in lines:
        if line.startswith("#") or not line.strip():
            continue
        match = LINE.match(line.rstrip("\n"))
        if match is None:
            raise ValueError(f"no line of a trace: {line!r}")
        reader.event(match)
        if match["event"] == "kvm_pio" and match["rest"].startswith(EXIT_WRITE):
            break
    return reader.result()


def collapse(tokens: Iterable[str], longest: int = LONGEST_BLOCK) -> tuple[str, ...]:
    """Every run of equal blocks becomes one of them.

    A block is 1 to `longest` consecutive tokens; a run is the block at least twice, one directly
    after the other. Short blocks go first, and again from the start after each pass that changed
    something, so that repeats of repeats go as well: `a b b a b c` is `a b c`.
    """
    out = list(tokens)
    size = 1
    while size <= longest:
        short = _collapse_blocks(out, size)
        size = size + 1 if len(short) == len(out) else 1
        out = short
    return tuple(out)


def _collapse_blocks(tokens: list[str], size: int) -> list[str]:
    out: list[str] = []
    at = 0
    while at < len(tokens):
        block = tokens[at : at + size]
        if len(block) == size and out[-size:] == block:
            at += size
        else:
            out.append(tokens[at])
            at += 1
    return out


def differences(model: ChipLines, kernel: ChipLines) -> str:
    """What differs, for people; empty if nothing does."""
    out = []
    for field in fields(ChipLines):
        ours, theirs = getattr(model, field.name), getattr(kernel, field.name)
        if ours != theirs:
            out.append(
                f"{field.name}:\n  model:  {' | '.join(ours)}\n  kernel: {' | '.join(theirs)}"
            )
    return "\n".join(out)


class _Reader:
    """Sorts the events of one trace onto the lines. Its `_<event>` methods take one event each."""

    def __init__(self) -> None:
        self._hrtimer: list[str] = []
        self._worker: list[str] = []
        self._gsi: list[str] = []
        self._ioapic: list[str] = []
        self._pic: list[str] = []
        self._vcpu: list[str] = []
        self._expires = 0
        self._expired = True
        self._restarts = False
        self._level: dict[str, str] = {}
        self._queued_by = ""
        self._run: list[str] | None = None
        self._before_run: list[int] = []
        self._eoi_is_injection = True

    def event(self, match: re.Match[str]) -> None:
        """The next event."""
        name = match["event"]
        handler = getattr(self, f"_{name}", None)
        if handler is not None:
            handler(match)
        elif name not in SET_ASIDE:
            raise ValueError(f"normalise.py does not know what to do with {name}")

    def result(self) -> ChipLines:
        """All lines, collapsed, without what the end of the trace cut in two."""
        if self._run is not None:
            for line, length in zip(self._pins(), self._before_run, strict=True):
                del line[length:]
        if self._restarts and self._hrtimer[-1] == "expire":
            self._hrtimer.pop()
        lines = (self._hrtimer, self._worker, self._gsi, self._ioapic, self._pic, self._vcpu)
        return ChipLines(*(collapse(line) for line in lines))

    def _pins(self) -> tuple[list[str], ...]:
        return self._gsi, self._ioapic, self._pic

    def _hrtimer_start(self, match: re.Match[str]) -> None:
        expires = int(_fields(match["rest"])["expires"])
        previous, self._expires = self._expires, expires
        if not self._expired and expires == previous:
            return
        self._expired = False
        if _in_interrupt(match):
            self._restarts = True
            self._hrtimer[-1] += f", start {expires - previous:+d} ns"
        else:
            due_ns = expires - int(match["ts"].replace(".", "")) * 1000
            self._hrtimer.append(f"start in {due_ns / 1e6:.1f} ms")

    def _hrtimer_expire_entry(self, match: re.Match[str]) -> None:
        self._expired = True
        self._hrtimer.append("expire")

    def _sched_kthread_work_queue_work(self, match: re.Match[str]) -> None:
        self._queued_by = "timer" if _in_interrupt(match) else "ack"

    def _sched_kthread_work_execute_start(self, match: re.Match[str]) -> None:
        self._run = [f"by {self._queued_by}:"]
        self._before_run = [len(line) for line in self._pins()]

    def _sched_kthread_work_execute_end(self, match: re.Match[str]) -> None:
        if self._run is not None:
            self._worker.append(" ".join(self._run))
            self._run = None

    def _kvm_set_irq(self, match: re.Match[str]) -> None:
        level = match["rest"].split()[3]
        self._level[match["pid"]] = level
        self._gsi.append(match["rest"])
        if self._run is not None and match["comm"].startswith("kvm-pit/"):
            self._run.append(level)

    def _kvm_ioapic_set_irq(self, match: re.Match[str]) -> None:
        self._ioapic.append(f"level {self._level[match['pid']]}: {match['rest']}")

    def _kvm_pic_set_irq(self, match: re.Match[str]) -> None:
        self._pic.append(f"level {self._level[match['pid']]}: {match['rest']}")

    def _kvm_pio(self, match: re.Match[str]) -> None:
        what = match["rest"]
        # What a read gives may be a time.
        self._vcpu.append(what if what.startswith("pio_write") else what.partition(" val ")[0])

    def _kvm_ack_irq(self, match: re.Match[str]) -> None:
        self._vcpu.append(f"ack {match['rest']}")

    def _kvm_inj_virq(self, match: re.Match[str]) -> None:
        self._eoi_is_injection = False
        if "[reinjected]" not in match["rest"]:
            self._vcpu.append("inject")

    def _kvm_eoi(self, match: re.Match[str]) -> None:
        if self._eoi_is_injection:
            self._vcpu.append("inject")


def _fields(rest: str) -> dict[str, str]:
    return dict(part.split("=", 1) for part in rest.split() if "=" in part)


def _in_interrupt(match: re.Match[str]) -> bool:
    """The third latency flag: h or H in a hard interrupt, s in a soft one, z or Z in an NMI."""
    return match["flags"][2] in "hHsZz"
