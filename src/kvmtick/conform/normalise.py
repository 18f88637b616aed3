"""From a trace to what is compared: one short list of tokens for each chip line.

Both sides come as ftrace text: the kernel's from tracefs, the model's from `kvmtick.trace.ftrace`.
`project` reads them with one and the same code. This module is the only place that says what is
set aside, and why:

* **times**: timestamps, `now`, `softexpires`, how long a vCPU slept. They are the host's. Kept is
  what is exact in them: a timer's step from one `expires` to the next, and in how many tenths of a
  millisecond a newly programmed timer is due: from now, or, as a TSC deadline, from when it was due
  the last time (of a timer whose start is not in the trace: how many from one expiry to the next).
* **CPU numbers, latency flags, pointers, thread names and pids**: another host, other numbers.
  Only the kind of thread is used: the worker (`kvm-pit/...`), an interrupt, or which vCPU.
* **what a port read gives**, for it may be a time; of a write to **port 0x61** all but gate and
  speaker: guests write the bits back that show times.
* **kvm_vcpu_wakeup**: some back ends poll before they sleep and may find their event then.
* **kvm_entry, kvm_exit**: a back end that emulates the guest has no exit where a port is accessed.
* **whose EOI a kvm_eoi is**: a back end that never writes kvm_inj_virq, and writes EOI to the local
  APIC itself when it injects: its kvm_eoi stands for the injection, and the guest's own EOI finds
  nothing in service: vector -1. Of an interrupt of the PIC the -1 is the injection; where a vector
  was injected, the -1 after it is the guest's EOI. Both kernels become `inject 32` (of the PIC
  `inject`: there the vector is set aside) and `EOI`. The vector of the guest's EOI is checked where
  it is known: `EOI` means the last one injected, any other is named.
* **when the IOAPIC's kvm_ack_irq comes**: it follows an EOI, there the back end's at the injection,
  here the guest's. It is put behind the guest's EOI; that each injection has one, or none, and of
  which pin, is compared. One whose EOI the trace ends before is dropped.
* **kvm_apicv_inhibit_changed**: KVM_REINJECT_CONTROL's; a recording starts later.
* **kvm_pit_reset_reinject, kvm_inj_nmi**: the model's own events, the kernel has no such
  tracepoint. NMIs are compared where they are accepted, and by the guest's own count.
* **kvm_mmio, kvm_apic, kvm_msr**: what the guest wrote to the registers of the APICs; what the
  writes led to is compared. **kvm_ioapic_delayed_eoi_inj** hangs on the host's HZ.
* **hrtimer_cancel** and the **hrtimer_start** of a timer that is taken along when the vCPU thread
  moves to another CPU: `expires` is what it was before. A punctual host of one CPU moves nothing.
* **the order between threads**: which of them is first is the host's business, for example whether
  the worker drops the line before or after the vCPU takes the interrupt. Hence one list a line, and
  one for each vCPU.
* **the order between vectors**: a vCPU that takes interrupts of several vectors has one list for
  each, for how their timers stand to each other is the host's business. Ports are another.
* **how often**: repeats are collapsed, see `collapse`. The numbers are the guest's business: it
  counts its ticks itself.
* **where the trace ends**: it is cut behind the write to the exit port. A run of the worker, or an
  expiry of the timer, that this leaves unfinished is dropped.

An event of any other kind is an error: nothing disappears unnamed.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields

from kvmtick.machine.ports import PORT_DEBUG_EXIT

__all__ = [
    "LINE",
    "SET_ASIDE",
    "ChipLines",
    "collapse",
    "differences",
    "ends_of_interrupt",
    "project",
    "tally",
]

LINE = re.compile(
    r"^ *(?P<comm>.+)-(?P<pid>\d+) +\[\d+\] +(?P<flags>\S{4,}) +(?P<ts>[\d.]+): "
    r"(?P<event>\w+): (?P<rest>.*?) *$"
)
SET_ASIDE = frozenset(
    {
        "hrtimer_cancel",
        "kvm_apic",
        "kvm_apicv_inhibit_changed",
        "kvm_entry",
        "kvm_exit",
        "kvm_inj_nmi",
        "kvm_ioapic_delayed_eoi_inj",
        "kvm_mmio",
        "kvm_msr",
        "kvm_pit_reset_reinject",
        "kvm_vcpu_wakeup",
    }
)
EXIT_WRITE = f"pio_write at {PORT_DEBUG_EXIT:#x} "
MASKABLE = ("Fixed|", "LowPrio|")
SYSTEM_CONTROL = "pio_write at 0x61 "
SYSTEM_CONTROL_WRITABLE = 0x03
WORKER = "kvm-pit/"
VCPU = re.compile(r"CPU (\d+)/KVM")
LONGEST_BLOCK = 3
LATE_NS = 40_000
"""So late is the kernel's record of a timer's start, or the guest with programming it anew."""


@dataclass(frozen=True, slots=True)
class ChipLines:
    """What happened on each line, in order, repeats collapsed."""

    hrtimer: tuple[str, ...]
    """Counter 0's timer: `start in 1.0 ms`, `expire`, `expire, start +999848 ns`."""
    lapic_timer: tuple[str, ...]
    """The local APIC's timer, likewise; `expire, +1.0 ms` in excerpts."""
    worker: tuple[str, ...]
    """Its runs: who queued the work, and what it did with the line: `by timer: 1 0`, `by ack: `."""
    gsi: tuple[str, ...]
    """Levels of GSI 0, with their source; and what a local APIC accepted of the same thread after
    the chips had the level: the NMI watchdog.
    """
    ioapic: tuple[str, ...]
    """What each level did at the IOAPIC's pin, and what a local APIC accepted from it."""
    pic: tuple[str, ...]
    """What each level did at the PIC's pin."""
    vcpu: tuple[str, ...]
    """Port accesses, injections, EOIs, and the acknowledgements they lead to; what was accepted in
    the vCPU's own thread: its timer's interrupt, IPIs it sent. Tokens of vCPUs but 0 say whose.
    """


def project(lines: Iterable[str]) -> ChipLines:
    """The projection of a trace: ftrace text, comment lines are skipped.

    Raises ValueError on a line that is no event, and on an event this module knows nothing of.
    """
    return _read(lines).result()


def tally(lines: Iterable[str]) -> dict[str, int]:
    """How often what happened, not collapsed: to compare runs of the same length.

    `expire`, `raise` (GSI level 1), `accept`, `inject`, `EOI`, `ack`. Errors as `project`.
    """
    return dict(_read(lines).tally)


def ends_of_interrupt(lines: Iterable[str]) -> list[tuple[str, ...]]:
    """What the local APIC's end of an interrupt led to at once, of each one that was in service.

    Whether the guest wrote the EOI or the back end did it at injection: it does the same.
    """
    out: list[list[str]] = []
    ending = ""
    for match in _events(lines):
        event, rest, pid = match["event"], match["rest"], match["pid"]
        if event == "kvm_eoi":
            ending = "" if rest.endswith(" -1") else pid
            if ending:
                out.append([rest])
        elif event in ("kvm_inj_virq", "kvm_pio", "kvm_exit", "kvm_entry"):
            ending = ""
        elif pid == ending and event not in SET_ASIDE:
            out[-1].append(f"{event}: {rest}")
    return [tuple(each) for each in out]


def _read(lines: Iterable[str]) -> "_Reader":
    reader = _Reader()
    for match in _events(lines):
        reader.event(match)
        if match["event"] == "kvm_pio" and match["rest"].startswith(EXIT_WRITE):
            break
    return reader


def _events(lines: Iterable[str]) -> Iterator[re.Match[str]]:
    for line in lines:
        if line.startswith("#") or not line.strip():
            continue
        match = LINE.match(line.rstrip("\n"))
        if match is None:
            raise ValueError(f"no line of a trace: {line!r}")
        yield match


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


class _Timer:
    """One timer's line."""

    def __init__(self) -> None:
        self.tokens: list[str] = []
        self._expires = 0
        self._expired = True
        self._restarts = False
        self._started = False
        self._expired_ns = 0
        self._lengths_ns: list[int] = []

    def start(self, match: re.Match[str]) -> None:
        """hrtimer_start."""
        self._started = True
        expires = int(_fields(match["rest"])["expires"])
        previous, self._expires = self._expires, expires
        if not self._expired and expires == previous:
            return
        self._expired = False
        if _in_interrupt(match):
            self._restarts = True
            self.tokens[-1] += f", start {expires - previous:+d} ns"
        else:
            due_ns = expires - int(match["ts"].replace(".", "")) * 1000
            self.tokens.append(f"start in {self._length_ms(due_ns, expires - previous):.1f} ms")

    def _length_ms(self, due_ns: int, step_ns: int) -> float:
        """What it was programmed for: from now, or from when it was due the last time."""
        for known_ns in self._lengths_ns:
            if min(abs(due_ns - known_ns), abs(step_ns - known_ns)) <= LATE_NS:
                return known_ns / 1e6
        self._lengths_ns.append(due_ns + LATE_NS // 2)
        return self._lengths_ns[-1] / 1e6

    def expire(self, match: re.Match[str]) -> None:
        """hrtimer_expire_entry."""
        self._expired = True
        now_ns = int(_fields(match["rest"])["now"])
        previous_ns, self._expired_ns = self._expired_ns, now_ns
        if self._started or not previous_ns:
            self.tokens.append("expire")
        else:
            self.tokens.append(f"expire, {(now_ns - previous_ns) / 1e6:+.1f} ms")

    def line(self) -> list[str]:
        """The tokens, without an expiry whose restart is behind the end."""
        cut = self._restarts and self.tokens[-1] == "expire"
        return self.tokens[:-1] if cut else self.tokens


class _Reader:
    """Sorts the events of one trace onto the lines. Its `_<event>` methods take one event each."""

    def __init__(self) -> None:
        self.tally: Counter[str] = Counter()
        self._timers: dict[str, dict[str, _Timer]] = {"pit_timer_fn": {}, "apic_timer_fn": {}}
        """By function and hrtimer."""
        self._worker: list[str] = []
        self._gsi: list[str] = []
        self._ioapic: list[str] = []
        self._pic: list[str] = []
        self._vcpus: dict[str, list[tuple[str, str]]] = {}
        """By thread: the vector a token is about, and the token."""
        self._comms: dict[str, str] = {}
        self._level: dict[str, str] = {}
        self._queued_by = ""
        self._run: list[str] | None = None
        self._before_run: list[int] = []
        # Whether the worker has pulsed the line since its run began (excerpts: since the expiry).
        self._pulsed = False
        self._eoi_is_injection = True
        # By pid: what was accepted within a kvm_set_irq that the IOAPIC has not answered yet.
        self._accepted: dict[str, list[str]] = {}
        # Vectors accepted and not injected; injected and not ended.
        self._requested: set[str] = set()
        self._in_service: dict[str, list[str]] = {}
        self._ended: dict[str, str] = {}
        self._acks: dict[str, list[tuple[str, str]]] = {}
        """By thread: the vector they are of, and the acknowledgements its EOI will give."""

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
        hrtimer, lapic_timer = (
            tuple(token for timer in timers.values() for token in collapse(timer.line()))
            for timers in self._timers.values()
        )
        worker, gsi, ioapic, pic = map(collapse, (self._worker, *self._pins()))
        return ChipLines(hrtimer, lapic_timer, worker, gsi, ioapic, pic, self._vcpu_line())

    def _vcpu_line(self) -> tuple[str, ...]:
        """Every vCPU's, by its id, or by who came first where threads do not tell it."""
        lines: list[tuple[int, tuple[str, ...]]] = []
        for pid, tokens in self._vcpus.items():
            named = VCPU.match(self._comms[pid])
            lines.append((int(named[1]) if named else len(lines), _by_vector(tokens)))
        return tuple(
            f"vcpu {vcpu}: {token}" if vcpu else token
            for vcpu, line in sorted(lines)
            for token in line
        )

    def _say(self, match: re.Match[str], token: str, vector: str = "") -> None:
        """The vCPU whose thread it is did something."""
        self._comms[match["pid"]] = match["comm"]
        self._vcpus.setdefault(match["pid"], []).append((vector, token))

    def _pins(self) -> tuple[list[str], ...]:
        return self._gsi, self._ioapic, self._pic

    def _timer(self, match: re.Match[str]) -> _Timer:
        fields = _fields(match["rest"])
        function = fields["function"]
        if function not in self._timers:
            raise ValueError(f"normalise.py does not know what to do with {function}")
        return self._timers[function].setdefault(fields["hrtimer"], _Timer())

    def _hrtimer_start(self, match: re.Match[str]) -> None:
        self._timer(match).start(match)

    def _hrtimer_expire_entry(self, match: re.Match[str]) -> None:
        self.tally["expire"] += 1
        if self._run is None:
            self._pulsed = False
        self._timer(match).expire(match)

    def _sched_kthread_work_queue_work(self, match: re.Match[str]) -> None:
        self._queued_by = "timer" if _in_interrupt(match) else "ack"

    def _sched_kthread_work_execute_start(self, match: re.Match[str]) -> None:
        self._run = [f"by {self._queued_by}:"]
        self._before_run = [len(line) for line in self._pins()]
        self._pulsed = False

    def _sched_kthread_work_execute_end(self, match: re.Match[str]) -> None:
        if self._run is not None:
            self._worker.append(" ".join(self._run))
            self._run = None

    def _kvm_set_irq(self, match: re.Match[str]) -> None:
        level = match["rest"].split()[3]
        if self._accepted.get(match["pid"]):
            raise ValueError(f"normalise.py: nothing accepts but from an IOAPIC: {match.string!r}")
        self.tally["raise"] += level == "1"
        self._level[match["pid"]] = level
        self._gsi.append(match["rest"])
        self._accepted[match["pid"]] = []
        if match["comm"].startswith(WORKER):
            self._pulsed = True
            if self._run is not None:
                self._run.append(level)

    def _kvm_ioapic_set_irq(self, match: re.Match[str]) -> None:
        accepted = self._accepted.pop(match["pid"], [])
        self._ioapic.append(
            f"level {self._level[match['pid']]}: {match['rest']}" + "".join(accepted)
        )

    def _kvm_pic_set_irq(self, match: re.Match[str]) -> None:
        self._pic.append(f"level {self._level[match['pid']]}: {match['rest']}")

    def _kvm_msi_set_irq(self, match: re.Match[str]) -> None:
        """The GSI leads to a message: nothing of the IOAPIC's will come."""
        self._accepted.pop(match["pid"], None)
        if match["comm"].startswith(WORKER):
            self._gsi[-1] += f", msi {match['rest']}"
        else:
            self._say(match, f"msi {match['rest']}")

    def _kvm_apic_ipi(self, match: re.Match[str]) -> None:
        self._say(match, f"ipi {match['rest']}")

    def _kvm_apic_accept_irq(self, match: re.Match[str]) -> None:
        self.tally["accept"] += 1
        _, _, _, vector, mode = match["rest"].split()
        if mode.strip("()").startswith(MASKABLE):
            self._requested.add(vector)
        what = f"accept {match['rest']}"
        if match["pid"] in self._accepted:
            self._accepted[match["pid"]].append(f", {what}")
        elif not match["comm"].startswith(WORKER):
            self._say(match, what, vector)
        elif self._pulsed:
            self._gsi[-1] += f", then {what}"
        else:
            self._gsi.append(what)

    def _kvm_pio(self, match: re.Match[str]) -> None:
        what, _, value = match["rest"].partition(" val ")
        if what.startswith("pio_write"):
            number = int(value.split()[0], 16)
            if what.startswith(SYSTEM_CONTROL):
                number &= SYSTEM_CONTROL_WRITABLE
            what += f" val {number:#x}"
        self._say(match, what)

    def _kvm_ack_irq(self, match: re.Match[str]) -> None:
        pid, what = match["pid"], f"ack {match['rest']}"
        in_service = self._in_service.get(pid)
        if self._eoi_is_injection and in_service:
            self._acks.setdefault(pid, []).append((in_service[-1], what))
            return
        self.tally["ack"] += 1
        if "IOAPIC" in what:
            self._say(match, what, self._ended.get(pid, ""))
        else:
            self._say(match, what)

    def _kvm_inj_virq(self, match: re.Match[str]) -> None:
        self._eoi_is_injection = False
        if "[reinjected]" in match["rest"]:
            return
        vector = str(int(match["rest"].split()[1], 16))
        if vector in self._requested:
            self._inject(match, vector)
        else:
            self._inject_of_the_pic(match)

    def _kvm_eoi(self, match: re.Match[str]) -> None:
        vector = match["rest"].split()[-1]
        in_service = self._in_service.get(match["pid"])
        if not self._eoi_is_injection:
            self._end(match, vector)
        elif vector != "-1":
            self._inject(match, vector)
        elif in_service:
            self._end(match, in_service[-1])
        else:
            self._inject_of_the_pic(match)

    def _inject(self, match: re.Match[str], vector: str) -> None:
        self.tally["inject"] += 1
        self._requested.discard(vector)
        self._give_acks(match["pid"], vector)
        self._in_service.setdefault(match["pid"], []).append(vector)
        self._say(match, f"inject {vector}", vector)

    def _inject_of_the_pic(self, match: re.Match[str]) -> None:
        self.tally["inject"] += 1
        self._say(match, "inject")

    def _end(self, match: re.Match[str], vector: str) -> None:
        self.tally["EOI"] += 1
        in_service = self._in_service.get(match["pid"])
        last = in_service.pop() if in_service else ""
        self._ended[match["pid"]] = vector
        self._say(match, "EOI" if vector == last else f"EOI of {vector}", vector)
        self._give_acks(match["pid"], vector)

    def _give_acks(self, pid: str, vector: str) -> None:
        waiting = self._acks.get(pid, [])
        given = [ack for ack in waiting if ack[0] == vector]
        if given:
            self.tally["ack"] += len(given)
            self._vcpus[pid] += given
            self._acks[pid] = [ack for ack in waiting if ack not in given]


def _by_vector(tokens: list[tuple[str, str]]) -> tuple[str, ...]:
    """Collapsed; what is about one of several vectors has a list of its own."""
    vectors = {vector for vector, _ in tokens if vector}
    if len(vectors) < 2:
        return collapse(token for _, token in tokens)
    lists = [
        [token for about, token in tokens if about == vector] for vector in ("", *sorted(vectors))
    ]
    return tuple(token for each in lists for token in collapse(each))


def _fields(rest: str) -> dict[str, str]:
    return dict(part.split("=", 1) for part in rest.split() if "=" in part)


def _in_interrupt(match: re.Match[str]) -> bool:
    """The third latency flag: h or H in a hard interrupt, s in a soft one, z or Z in an NMI."""
    return match["flags"][2] in "hHsZz"
