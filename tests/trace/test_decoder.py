"""Pages of a real kernel's ring buffer (record.py) as records, and what they say of ticks."""

import re
import struct

import pytest
from recorded import COUNTS, RUNS, decode, functions, kernel, reports, verdicts
from recorded import decoder as decoder_of

from kvmtick.trace.decoder import Decoder, Merge, TaskNames
from kvmtick.trace.events import Event, Function, Record
from kvmtick.trace.formats import FormatError
from kvmtick.trace.ftrace import event_name, event_text, format_line

KERNEL = kernel()
FUNCTIONS = functions(KERNEL)
MISSED = 1 << 31
COUNT_STORED = 1 << 30


def decoder() -> Decoder:
    """For the kernel of the recordings."""
    return decoder_of(KERNEL)


def records_of(name: str, by: Decoder) -> list[Record]:
    """All records of a run, in order."""
    return decode(KERNEL["runs"][name], by)


def first_page(name: str) -> tuple[int, bytes]:
    """A page of a run, and its CPU."""
    cpu, page = KERNEL["runs"][name]["pages"][0]
    return cpu, bytes.fromhex(page)


def without_pointers(text: str) -> str:
    """The kernel's text hashes them; its modes and slack are the timers' own."""
    text = re.sub(r"(hrtimer=|struct[ =]|worker=)[0-9a-f]+", r"\1", text)
    return re.sub(r"softexpires=\d+ mode=\S+", "", text).strip()


@pytest.mark.parametrize("name", RUNS)
def test_every_record_says_what_the_kernel_s_own_text_says(name: str) -> None:
    by = decoder()
    records = records_of(name, by)
    theirs = KERNEL["runs"][name]["text"]
    assert len(records) == len(theirs) > 20
    for record, line in zip(records, theirs, strict=True):
        match = re.match(r".*-(\d+) +\[\d+\] (\S+) +(\d+)\.(\d+): (\w+): (.*)", line)
        assert match is not None
        tid, flags, seconds, micros, event, text = match.groups()
        assert event_name(record) == event
        assert without_pointers(event_text(record)) == without_pointers(text)
        assert (record[0] + 500) // 1000 == int(seconds) * 1_000_000 + int(micros)
        ours = format_line(record, by.tasks.names).split()
        assert ours[0].endswith(f"-{tid}")
        assert (ours[2][2] == "h") == (flags[2] in "hH")


PATHS = {
    "tick-pic": "pit pic",
    "tick-ioapic": "pit ioapic",
    "tick-lapic": "lapic lapic",
    "tick-x2apic": "lapic lapic",
    "tick-mask": "pit pic",
    "tick-if0": "pit pic",
    "nmi-watchdog": "pit pic",
}
"""Of the watchdog's tick the guest's poll of the PIC is what shows."""


@pytest.mark.parametrize("name", RUNS)
def test_every_tick_of_a_recording_has_its_verdict(name: str) -> None:
    by = decoder()
    (report,) = reports(KERNEL["runs"][name], records_of(name, by), by)
    assert f"{report.source} {report.path}" == PATHS[name]
    assert verdicts(report) == COUNTS.get(name, {"delivered": 3})
    assert report.expired == sum(verdicts(report).values())
    assert report.extra == 0
    reached = [tick for tick in report if tick.inject_ns is not None]
    assert len(reached) == RUNS[name]["ticks"]
    for tick in reached:
        times = [tick.expiry_ns, tick.work_ns, tick.accept_ns, tick.inject_ns, tick.eoi_ns]
        known = [ns for ns in times if ns is not None]
        assert known == sorted(known)


@pytest.mark.parametrize("stored", [False, True])
def test_records_that_the_kernel_lost_make_ticks_unknown(stored: bool) -> None:
    by = decoder()
    records = records_of("tick-if0", by)
    at = next(n for n, record in enumerate(records) if record[1] == Event.KVM_SET_IRQ)
    cpu, page = first_page("tick-if0")
    commit = int.from_bytes(page[8:16], "little")
    flags = MISSED | (COUNT_STORED if stored else 0)
    marked = page[:8] + (commit | flags).to_bytes(8, "little") + page[16:]
    lost = by.decode(marked + (7).to_bytes(8, "little") * stored, cpu)[0]
    assert lost[1:] == (Event.LOST_EVENTS, 0, cpu, 7 if stored else -1)
    gap = (records[at][0], *lost[1:])
    (report,) = reports(KERNEL["runs"]["tick-if0"], [*records[:at], gap, *records[at + 1 :]], by)
    why = {tick.detail for tick in report if tick.verdict == "unknown"}
    assert why == {f"the kernel lost {7 if stored else 'some'} of its records"}
    assert sum(verdicts(report).values()) == report.expired == 9


def test_a_field_that_is_elsewhere_in_another_kernel_is_found() -> None:
    """GSI and level change places in the format file, and so in the records."""
    formats = [
        text.replace("gsi;\toffset:8;", "gsi;\toffset:@;")
        .replace("level;\toffset:12;", "level;\toffset:8;")
        .replace("@", "12")
        if "name: kvm_set_irq\n" in text
        else text
        for text in KERNEL["formats"]
    ]
    other = Decoder(KERNEL["header_page"], formats, FUNCTIONS)
    ours = [
        record for record in records_of("tick-pic", decoder()) if record[1] == Event.KVM_SET_IRQ
    ]
    theirs = [record for record in records_of("tick-pic", other) if record[1] == Event.KVM_SET_IRQ]
    assert [(r[4], r[3], r[5]) for r in theirs] == [r[3:] for r in ours] != [r[3:] for r in theirs]


def test_an_event_that_this_host_has_not_is_absent() -> None:
    formats = [text for text in KERNEL["formats"] if "name: kvm_pio\n" not in text]
    by = Decoder(KERNEL["header_page"], formats, FUNCTIONS)
    events = {record[1] for record in records_of("tick-pic", by)}
    assert Event.KVM_PIO not in events
    assert Event.KVM_SET_IRQ in events


def test_a_function_that_is_nobody_s_tick_is_left_out() -> None:
    without = {at: each for at, each in FUNCTIONS.items() if each != Function.PIT_TIMER_FN}
    by = Decoder(KERNEL["header_page"], KERNEL["formats"], without)
    records = records_of("tick-pic", by)
    starts = {record[4] for record in records if record[1] == Event.HRTIMER_START}
    assert Function.PIT_TIMER_FN not in starts
    assert Event.WORK_START in {record[1] for record in records}


def test_what_later_kernels_added_may_be_missing_and_nothing_else() -> None:
    def formats(event: str, field: str) -> list[str]:
        return [
            re.sub(rf"\tfield:[^;]*{field};.*\n", "", text) if f"name: {event}\n" in text else text
            for text in KERNEL["formats"]
        ]

    old = Decoder(KERNEL["header_page"], formats("hrtimer_start", "was_armed"), FUNCTIONS)
    starts = [r for r in records_of("tick-pic", old) if r[1] == Event.HRTIMER_START]
    assert starts[0][6] == 0
    assert [r[:6] for r in starts] == [
        r[:6] for r in records_of("tick-pic", decoder()) if r[1] == Event.HRTIMER_START
    ]
    with pytest.raises(FormatError, match="kvm_set_irq has no field gsi here"):
        Decoder(KERNEL["header_page"], formats("kvm_set_irq", "gsi"), FUNCTIONS)


def test_every_cpu_has_an_idle_thread_of_its_own() -> None:
    tasks = TaskNames()
    assert [tasks.idle(cpu) for cpu in (0, 1, 0, 1)] == [0, 1, 0, 1]
    assert tasks.index(7) == 2
    assert tasks.names == ["<idle>-0", "<idle>-0", "<...>-7"]


SCHED_SWITCH = """\
name: sched_switch
ID: 372
format:
\tfield:unsigned short common_type;\toffset:0;\tsize:2;\tsigned:0;
\tfield:unsigned char common_flags;\toffset:2;\tsize:1;\tsigned:0;
\tfield:unsigned char common_preempt_count;\toffset:3;\tsize:1;\tsigned:0;
\tfield:int common_pid;\toffset:4;\tsize:4;\tsigned:1;

\tfield:char prev_comm[16];\toffset:8;\tsize:16;\tsigned:0;
\tfield:pid_t prev_pid;\toffset:24;\tsize:4;\tsigned:1;
\tfield:int prev_prio;\toffset:28;\tsize:4;\tsigned:1;
\tfield:long prev_state;\toffset:32;\tsize:8;\tsigned:1;
\tfield:char next_comm[16];\toffset:40;\tsize:16;\tsigned:0;
\tfield:pid_t next_pid;\toffset:56;\tsize:4;\tsigned:1;
\tfield:int next_prio;\toffset:60;\tsize:4;\tsigned:1;
"""
"""Of Linux 6.18."""


def switch(prev: tuple[bytes, int, int, int], following: tuple[bytes, int, int]) -> bytes:
    """A page with one sched_switch: name, pid, priority, and how the thread leaves."""
    event = struct.pack("<HBBi16siiq16sii", 372, 1, 2, prev[1], *prev, *following)
    body = struct.pack("<I", len(event) // 4) + event
    return struct.pack("<QQ", 5_000, len(body)) + body


def test_threads_are_named_by_the_events_that_tell_their_names() -> None:
    by = Decoder(KERNEL["header_page"], [SCHED_SWITCH], {})
    by.tasks.name(20, "CPU 0/KVM")
    (record,) = by.decode(switch((b"rcu_preempt", 15, 98, 1), (b"swapper/3", 0, 120)), 3)
    assert record == (5_000, int(Event.SCHED_SWITCH), 2, 15, 1, 0, 3, 98, 120)
    assert by.tasks.names == ["<idle>-0", "CPU 0/KVM-20", "rcu_preempt-15"]
    by.decode(switch((b"qemu", 20, 120, 0), (b"sh", 15, 120)), 3)
    assert by.tasks.names == ["<idle>-0", "CPU 0/KVM-20", "sh-15"], "what was told stays"
    assert event_text(record, by.tasks.names) == (
        "prev_comm=sh prev_pid=15 prev_prio=98 prev_state=S"
        " ==> next_comm=swapper/3 next_pid=0 next_prio=120"
    )


def test_records_wait_for_those_of_other_cpus() -> None:
    merge = Merge()
    merge.add(1, [(5, 0, 0), (9, 1, 0)])
    assert merge.until(6) == [(5, 0, 0)]
    merge.add(0, [(7, 2, 0), (9, 3, 0)])
    assert merge.until(9) == [(7, 2, 0)]
    assert merge.until(None) == [(9, 1, 0), (9, 3, 0)]
    assert merge.until(None) == []
    assert merge.waiting == 0


def test_what_comes_too_late_is_lost() -> None:
    merge = Merge()
    merge.add(0, [(5, 0, 0), (9, 1, 0)])
    assert merge.until(None) == [(5, 0, 0), (9, 1, 0)]
    merge.add(2, [(7, 2, 0), (8, 3, 0), (9, 4, 0)])
    assert merge.until(None) == [(9, int(Event.LOST_EVENTS), 0, 2, 2), (9, 4, 0)]


def test_a_run_that_is_out_of_order_is_put_in_order() -> None:
    merge = Merge()
    merge.add(0, [(9, 1, 0)])
    merge.add(0, [(5, 0, 0), (12, 0, 0)])
    assert merge.known_ns() == 12
    assert merge.until(10) == [(5, 0, 0), (9, 1, 0)]
    assert merge.waiting == 1


@pytest.mark.parametrize("text", ["", "name: x\nformat:\n", "rubbish"])
def test_what_is_no_format_file_is_told(text: str) -> None:
    with pytest.raises(FormatError, match="no event format"):
        Decoder(KERNEL["header_page"], [text], FUNCTIONS)
    with pytest.raises(FormatError, match="no page header"):
        Decoder(text, [], FUNCTIONS)


@pytest.mark.parametrize("size", [0, 7, 15, 16, 100])
def test_a_page_that_was_cut_short_is_told(size: int) -> None:
    _, page = first_page("tick-pic")
    with pytest.raises(FormatError, match="was cut short"):
        decoder().decode(page[:size])
