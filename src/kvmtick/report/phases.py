"""How a guest set its timers, one setting after the other, and what came of each.

A phase is a stretch in which one timer was set in one way: a counter of the PIT by its control word
and count, a local APIC's timer by LVTT's mode. One-shots in a row are one phase. A setting from
which no tick came, and whose counter nobody read, is none.

Sources: 8254 datasheet (control word, counts), Intel SDM volume 3, "APIC Timer" (LVTT, TMCCT).

Not modelled: the latch and read-back commands, for they set nothing; the gates of the counters;
settings that user space makes (KVM_SET_PIT2, KVM_SET_LAPIC).
"""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Final

from kvmtick.report.data import Phase
from kvmtick.ticks.histogram import Histogram
from kvmtick.ticks.tick import Tick
from kvmtick.trace.events import Record

__all__ = ["Phases"]

MOST_PHASES = 100
"""Of each timer; in what is set later, the last of them goes on."""

_COUNTERS: Final = range(0x40, 0x43)
_CONTROL, _SPEAKER = 0x43, 0x61
_OUT2 = 0x20
_LSB, _MSB, _WORD = 1, 2, 3
_PERIODIC: Final = ("2", "3")
"""Modes of the PIT: rate generator and square wave."""

_LVTT, _TMCCT = 0x320, 0x390
_MASKED = 1 << 16
_LVTT_MODES: Final = ("one-shot", "periodic", "tsc-deadline", None)

_PIT, _LAPIC = "pit", "lapic"


class Phases:
    """Follows one VM's timers: first its records, then the ticks that were judged since."""

    def __init__(self, vcpu_of: Callable[[int], int | None]) -> None:
        """`vcpu_of`: whose thread a task is."""
        self._vcpu_of = vcpu_of
        self._pit = [_Counter(channel) for channel in range(3)]
        self._lapic: dict[int, _LapicTimer] = {}

    def pio(self, record: Record) -> None:
        """kvm_pio: the guest sets or reads the PIT."""
        ts_ns, _, _, is_write, port, _, count, value = record
        if port in _COUNTERS:
            counter = self._pit[port & 3]
            if is_write:
                counter.write(ts_ns, value & 0xFF)
            else:
                counter.read(ts_ns, count)
        elif port == _CONTROL and is_write:
            channel = value >> 6 & 3
            if channel < len(self._pit):
                self._pit[channel].control(value)
        elif port == _SPEAKER and not is_write:
            self._pit[2].look_at_output(ts_ns, bool(value & _OUT2))

    def apic(self, record: Record) -> None:
        """kvm_apic: the guest sets its local APIC's timer, or reads its count."""
        ts_ns, _, task, is_write, register, value = record
        if register not in (_LVTT, _TMCCT):
            return
        vcpu = self._vcpu_of(task)
        if vcpu is None:
            return
        if register == _TMCCT and not is_write:
            self._timer(vcpu).read(ts_ns, 1)
        elif register == _LVTT and is_write:
            self._timer(vcpu).write(ts_ns, value)

    def _timer(self, vcpu: int) -> "_LapicTimer":
        return self._lapic.setdefault(vcpu, _LapicTimer(vcpu))

    def take(self, source: str, vcpu: int, lives: Iterable[Tick]) -> None:
        """The next ticks of a timer, in order; what the guest wrote before them is known."""
        timer = self._pit[0] if source == _PIT else self._timer(vcpu)
        for tick in lives:
            timer.take(tick)

    def told(self) -> list[Phase]:
        """All that something came of, by when they were set."""
        timers = [*self._pit, *(timer for _, timer in sorted(self._lapic.items()))]
        phases = [each.told() for timer in timers for each in timer.settings if each.used]
        return sorted(phases, key=lambda phase: phase.start_ns)


class _Setting:
    """A phase while it is gathered."""

    def __init__(
        self,
        timer: "_Timer",
        start_ns: int | None,
        mode: str | None = None,
        count: int | None = None,
    ) -> None:
        """`start_ns`: None if it was set before the trace began."""
        self._timer = timer
        self.start_ns = start_ns
        self.mode = mode
        self.count = count
        self.reads = 0
        self.last_ns = 0
        """Its last tick or reading."""
        self._first_ns: int | None = None
        self._before_ns: int | None = None
        self._intervals = Histogram()
        self._verdicts: Counter[str] = Counter()
        self._periods: Counter[int | None] = Counter()
        self._ways: Counter[tuple[str, int | None]] = Counter()

    @property
    def used(self) -> bool:
        """Something came of it."""
        return self._first_ns is not None or self.reads > 0

    def read(self, ts_ns: int, times: int) -> None:
        """The guest reads the counter."""
        self.reads += times
        self.last_ns = ts_ns

    def take(self, tick: Tick) -> None:
        """A tick came of it."""
        at_ns = tick.expiry_ns
        if self._before_ns is None:
            self._first_ns = at_ns
        else:
            self._intervals.count(at_ns - self._before_ns)
        self._before_ns = at_ns
        self.last_ns = max(self.last_ns, at_ns)
        self._verdicts[tick.verdict.value] += 1
        self._periods[tick.period_ns] += 1
        if tick.path is not None:
            self._ways[tick.path.value, tick.vector] += 1

    def told(self) -> Phase:
        """For the report."""
        (path, vector), _ = self._ways.most_common(1)[0] if self._ways else ((None, None), 0)
        start_ns = self.start_ns
        if start_ns is None:
            start_ns = self._first_ns if self._first_ns is not None else self.last_ns
        return Phase(
            source=self._timer.source,
            vcpu=self._timer.vcpu,
            channel=self._timer.channel,
            mode=self.mode,
            count=self.count,
            period_ns=self._periods.most_common(1)[0][0] if self._periods else None,
            start_ns=start_ns,
            end_ns=self.last_ns,
            reads=self.reads,
            path=path,
            vector=vector,
            verdicts=dict(self._verdicts),
            intervals=self._intervals,
        )


class _Timer:
    """The settings of one timer, in order."""

    source = _PIT
    vcpu = 0
    channel: int | None = None

    def __init__(self) -> None:
        self.settings = [_Setting(self, None)]
        self._at = 0

    def _set(self, ts_ns: int, mode: str | None, count: int | None, goes_on: bool) -> None:
        """The guest sets it; `goes_on`: to the same mode again is no new phase."""
        last = self.settings[-1]
        if len(self.settings) > MOST_PHASES:
            return
        if last.start_ns is not None and last.mode == mode and (goes_on or last.count == count):
            if last.count != count:
                last.count = None
            return
        self.settings.append(_Setting(self, ts_ns, mode, count))

    def read(self, ts_ns: int, times: int) -> None:
        """The guest reads its count."""
        self.settings[-1].read(ts_ns, times)

    def take(self, tick: Tick) -> None:
        """The next tick."""
        settings = self.settings
        while self._at + 1 < len(settings):
            start_ns = settings[self._at + 1].start_ns
            if start_ns is None or tick.fired_ns < start_ns:
                break
            self._at += 1
        settings[self._at].take(tick)


class _Counter(_Timer):
    """One of the PIT's counters: the control word tells how many bytes a count has."""

    def __init__(self, channel: int) -> None:
        super().__init__()
        self.channel = channel
        self._mode: str | None = None
        self._access = _WORD
        self._low: int | None = None
        self._waits = False

    def control(self, value: int) -> None:
        """A control word; it takes effect with the count."""
        access = value >> 4 & 3
        if not access:
            return
        mode = value >> 1 & 7
        self._mode = str(mode & 3 if mode > 5 else mode)
        self._access = access
        self._low = None

    def write(self, ts_ns: int, value: int) -> None:
        """A byte of a count."""
        if self._access == _WORD and self._low is None:
            self._low = value
            return
        if self._access == _WORD:
            value, self._low = value << 8 | (self._low or 0), None
        elif self._access == _MSB:
            value <<= 8
        goes_on = self._mode is None or self._mode not in _PERIODIC
        self._set(ts_ns, self._mode, value or 0x1_0000, goes_on)
        self._waits = True

    def look_at_output(self, ts_ns: int, is_high: bool) -> None:
        """The guest looks at OUT (port 0x61), and so waits for the count to end."""
        if self._waits:
            self.read(ts_ns, 1)
            self._waits = not is_high


class _LapicTimer(_Timer):
    """One local APIC's; a mode that is masked is a setting only if the guest reads the count."""

    source = _LAPIC

    def __init__(self, vcpu: int) -> None:
        super().__init__()
        self.vcpu = vcpu
        self._masked: tuple[int, str | None] | None = None

    def write(self, ts_ns: int, value: int) -> None:
        """LVTT."""
        mode = _LVTT_MODES[value >> 17 & 3]
        self._masked = (ts_ns, mode) if value & _MASKED else None
        if not value & _MASKED:
            self._set(ts_ns, mode, None, goes_on=True)

    def read(self, ts_ns: int, times: int) -> None:
        """TMCCT."""
        if self._masked is not None:
            self._set(*self._masked, None, goes_on=True)
            self._masked = None
        super().read(ts_ns, times)
