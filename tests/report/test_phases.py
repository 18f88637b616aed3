"""Phases: how a guest set its timers, and what came of each setting."""

import contextlib
from collections.abc import Iterable
from pathlib import Path

import pytest
from made_reports import made_phase, made_report
from traces import made, report_of, simulated

from kvmtick.cli import main
from kvmtick.report import phases as module
from kvmtick.report.build import build
from kvmtick.report.data import Phase
from kvmtick.report.page import page_text
from kvmtick.report.page_data import page_data
from kvmtick.report.phases import Phases
from kvmtick.report.words import phase_outcome, phase_setting, phase_timer, phase_way
from kvmtick.ticks import verdict
from kvmtick.ticks.tick import Tick
from kvmtick.ticks.verdict import Verdict
from kvmtick.trace.events import Event
from kvmtick.trace.reading import open_trace

BOOT = Path(__file__).resolve().parents[2] / "docs" / "recordings" / "linux-boot.ktrace"
VCPU_TASK, OTHER_TASK = 2, 9
LVTT, TMCCT = 0x320, 0x390


class Guest:
    """Sets its timers, and its timers tick; each step takes 10 ns."""

    def __init__(self) -> None:
        self.phases = Phases({VCPU_TASK: 0}.get)
        self.now_ns = 0
        self.ticked = 0

    def _pio(self, port: int, value: int, is_write: bool) -> None:
        self.now_ns += 10
        self.phases.pio((self.now_ns, Event.KVM_PIO, VCPU_TASK, is_write, port, 1, 1, value))

    def out(self, *writes: tuple[int, int]) -> None:
        for port, value in writes:
            self._pio(port, value, is_write=True)

    def read(self, port: int, value: int = 0, times: int = 1) -> None:
        for _ in range(times):
            self._pio(port, value, is_write=False)

    def apic(self, register: int, value: int, is_write: bool = True, task: int = VCPU_TASK) -> None:
        self.now_ns += 10
        self.phases.apic((self.now_ns, Event.KVM_APIC, task, is_write, register, value))

    def tick(self, source: str = "pit", times: int = 1, period_ns: int | None = None) -> None:
        for _ in range(times):
            self.now_ns += period_ns or 1000
            self.ticked += 1
            tick = Tick(
                self.ticked,
                self.now_ns,
                self.now_ns,
                period_ns,
                vector=0x30,
                verdict=Verdict.DELIVERED,
                path=verdict.Path.IOAPIC,
            )
            self.phases.take(source, 0, [tick])

    def told(self) -> list[tuple[str | None, int | None, int, int]]:
        """Mode, count, ticks and readings of each phase."""
        return [(p.mode, p.count, p.ticks, p.reads) for p in self.phases.told()]


def set_counter(counter: int, mode: int, count: int) -> tuple[tuple[int, int], ...]:
    """Low byte, high byte."""
    control = counter << 6 | 3 << 4 | mode << 1
    port = 0x40 + counter
    return (0x43, control), (port, count & 0xFF), (port, count >> 8)


def test_each_rate_of_the_pit_is_a_phase() -> None:
    guest = Guest()
    guest.out(*set_counter(0, 2, 1193))
    guest.tick(times=3, period_ns=1000)
    guest.out(*set_counter(0, 2, 1193))
    guest.tick(times=2, period_ns=1000)
    guest.out(*set_counter(0, 3, 0))
    guest.tick(period_ns=5000)
    assert guest.told() == [("2", 1193, 5, 0), ("3", 0x10000, 1, 0)]
    first, second = guest.phases.told()
    assert (first.period_ns, second.period_ns) == (1000, 5000)
    assert first.start_ns == 30
    assert first.end_ns < second.start_ns < second.end_ns == guest.now_ns
    assert (first.path, first.vector, first.verdicts) == ("ioapic", 0x30, {"delivered": 5})


def test_one_shots_in_a_row_are_one_phase() -> None:
    guest = Guest()
    for count in (100, 100, 200):
        guest.out(*set_counter(0, 4, count))
        guest.tick()
    assert guest.told() == [("4", None, 3, 0)]
    assert guest.phases.told()[0].intervals.max == 1030


def test_a_count_of_one_byte() -> None:
    guest = Guest()
    guest.out((0x43, 1 << 4 | 2 << 1), (0x40, 0x12))
    guest.tick()
    guest.out((0x43, 2 << 4 | 6 << 1), (0x40, 0x12))
    guest.tick()
    assert guest.told() == [("2", 0x12, 1, 0), ("2", 0x1200, 1, 0)]


def test_a_latch_sets_nothing() -> None:
    guest = Guest()
    guest.out(*set_counter(0, 2, 500))
    guest.out((0x43, 0x00), (0x43, 0xC2), (0x40, 0xF4))
    guest.read(0x40, times=2)
    guest.tick(period_ns=400)
    assert guest.told() == [("2", 500, 1, 2)]


def test_counter_2_is_told_of_if_it_was_read() -> None:
    guest = Guest()
    guest.out(*set_counter(2, 3, 1000))
    assert guest.told() == []
    guest.out(*set_counter(2, 0, 0xFFFF))
    guest.read(0x42, times=7)
    assert guest.told() == [("0", 0xFFFF, 0, 7)]
    assert [p.channel for p in guest.phases.told()] == [2]


def test_who_waits_for_the_output_of_counter_2_looks_at_it_until_it_is_high() -> None:
    guest = Guest()
    guest.read(0x61, 0x00)
    guest.out(*set_counter(2, 0, 500))
    guest.read(0x61, 0x00, times=3)
    guest.read(0x61, 0x20)
    at_ns = guest.now_ns
    guest.read(0x61, 0x20, times=5)
    assert guest.told() == [("0", 500, 0, 4)]
    assert guest.phases.told()[0].end_ns == at_ns


def test_the_modes_of_a_local_apics_timer() -> None:
    """As a kernel that measures it first, masked, against another timer."""
    guest = Guest()
    guest.apic(LVTT, 0x1_0000)
    guest.apic(LVTT, 0x3_00EC)
    guest.apic(TMCCT, 0, is_write=False)
    guest.apic(TMCCT, 0, is_write=False)
    guest.apic(LVTT, 0x0_00EC)
    guest.tick("lapic")
    guest.apic(LVTT, 0x1_00EC)
    guest.apic(LVTT, 0x0_00EC)
    guest.tick("lapic")
    guest.apic(LVTT, 0x4_00EC)
    guest.tick("lapic")
    guest.apic(LVTT, 0x2_00EC, task=OTHER_TASK)
    guest.tick("lapic")
    assert guest.told() == [
        ("periodic", None, 0, 2),
        ("one-shot", None, 2, 0),
        ("tsc-deadline", None, 2, 0),
    ]


def test_ticks_of_a_timer_that_was_set_before_the_trace() -> None:
    guest = Guest()
    guest.tick(times=2, period_ns=1000)
    guest.out(*set_counter(0, 2, 1193))
    guest.tick(period_ns=900)
    assert guest.told() == [(None, None, 2, 0), ("2", 1193, 1, 0)]
    assert [p.start_ns for p in guest.phases.told()] == [1000, 2030]


def test_ticks_are_judged_later_than_the_guest_sets_the_next_rate() -> None:
    guest = Guest()
    guest.out(*set_counter(0, 2, 1000))
    guest.now_ns = 10_000
    guest.out(*set_counter(0, 2, 2000))
    for at_ns in (5_000, 9_999, 12_000):
        guest.phases.take("pit", 0, [Tick(1, at_ns, at_ns)])
    assert guest.told() == [("2", 1000, 2, 0), ("2", 2000, 1, 0)]


def test_they_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_PHASES", 3)
    guest = Guest()
    for count in range(100, 110):
        guest.out(*set_counter(0, 2, count))
        guest.tick()
    assert guest.told() == [("2", 100, 1, 0), ("2", 101, 1, 0), ("2", 102, 8, 0)]


# Of whole traces.


def told_of(phases: Iterable[Phase]) -> list[tuple[str, str, str, str]]:
    return [(phase_timer(p), phase_setting(p), phase_outcome(p), phase_way(p)) for p in phases]


def test_a_boot_of_linux() -> None:
    with contextlib.closing(open_trace(BOOT)) as trace:
        (vm,) = build(trace, BOOT).vms
    assert told_of(vm.phases) == [
        ("PIT counter 2", "mode 0, count 65,535", "read 71,524 times", ""),
        ("PIT", "mode 2, count 4,773: every 4 ms", "15 delivered", "ioapic, vector 0x30"),
        ("PIT", "mode 0, count 65,536", "1 delivered", "ioapic, vector 0x30"),
        ("LAPIC timer of vCPU 0", "TSC deadline", "307 delivered", "lapic, vector 0xec"),
    ]
    for source in vm.sources:
        own = [p for p in vm.phases if p.source == source.source]
        assert sum(p.ticks for p in own) == source.ticks.expired
    # the last one-shot is none of the ticks that were asked for so often
    assert vm.sources[0].asked_hz == pytest.approx(249.9856, abs=1e-4)
    assert vm.sources[0].got_hz == vm.sources[0].asked_hz


@pytest.mark.parametrize(
    ("guest", "setting"),
    [
        (("tick-pic", "--ticks", "5"), "mode 2, count 1,193: every 999.8 us"),
        (("tick-lapic", "--ticks", "5"), "periodic: every 1 ms"),
        (("tick-lapic", "--ticks", "5", "--timer", "oneshot"), "one-shot"),
        (("tick-lapic", "--ticks", "5", "--timer", "tsc-deadline"), "TSC deadline"),
    ],
)
def test_one_setting(tmp_path: Path, guest: tuple[str, ...], setting: str) -> None:
    (phase,) = report_of(tmp_path, *guest).vms[0].phases
    assert (phase_setting(phase), phase.ticks) == (setting, 5)


def test_a_trace_without_what_the_guest_wrote(tmp_path: Path) -> None:
    trace = made(tmp_path, "tick-pic", "--ticks", "5")
    trace.records = [r for r in trace.records if r[1] != Event.KVM_PIO]
    (phase,) = trace.report().vms[0].phases
    assert phase_setting(phase) == "how is not known: every 999.8 us"


def test_the_text_has_a_table_only_of_several(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = simulated(tmp_path, "tick-pic", "--ticks", "5")
    assert main(["report", str(path)]) == 0
    assert "how the guest set its timers" not in capsys.readouterr().out
    assert main(["report", str(BOOT), "--worst", "0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    at = lines.index("how the guest set its timers, by the time since the trace began:")
    assert " ".join(lines[at + 3].split()) == (
        "192.4 ms 252.4 ms PIT mode 2, count 4,773: every 4 ms 15 delivered ioapic, vector 0x30"
        " 4 ms 4 ms"
    )


def test_the_page_has_the_table_and_the_timeline_has_the_phases() -> None:
    report = made_report()
    report.vms[0].phases = [made_phase(0, 9)]
    assert "How the guest set its timers" not in page_text(report)
    assert page_data(report, ["x"])["sources"][0]["phases"] == []
    report.vms[0].phases.append(made_phase(10, 99, channel=2))
    text = page_text(report)
    assert "How the guest set its timers" in text
    assert 'data-of="vm0-source0" data-from="10" data-to="99">PIT counter 2</button>' in text
    assert page_data(report, ["x"])["sources"][0]["phases"] == [
        {"from": 0, "to": 9, "text": "mode 2, count 1,193"},
        {"from": 10, "to": 99, "text": "PIT counter 2: mode 2, count 1,193"},
    ]
