"""Whole texts: this kernel's own beside its raw pages, and those of trace-cmd and perf."""

import gzip
import io
import re
from collections.abc import Iterable
from pathlib import Path

import pytest
from recorded import RUNS, decode, decoder, kernel

from kvmtick.trace.events import HEADER_FIELDS, IRQ_CONTEXT, TRACEPOINTS, Event, Function, Record
from kvmtick.trace.formats import FormatError
from kvmtick.trace.ftrace import FtraceWriter
from kvmtick.trace.reading import open_trace
from kvmtick.trace.text import REORDERED, TextReader
from kvmtick.trace.vms import VmInfo

TEXTS = Path(__file__).with_name("texts")
GOLDEN = Path(__file__).parents[1] / "golden" / "traces"
POINTERS = ("hrtimer", "work", "worker")


def read(path: Path) -> tuple[TextReader, list[Record]]:
    with open_trace(path) as trace:
        assert isinstance(trace, TextReader)
        return trace, [record for batch in trace.batches() for record in batch]


def write(folder: Path, text: str) -> Path:
    path = folder / "trace.txt"
    path.write_text(text)
    return path


def lines(*events: tuple[str, str, str], flags: str = " ..... ") -> str:
    """Of (thread, seconds, event)."""
    return "".join(f"   {who} [000]{flags}{at}: {event}\n" for who, at, event in events)


Comparable = tuple[int, str, str, bool, dict[str, int]]


def comparable(records: Iterable[Record], tasks: list[str]) -> list[Comparable]:
    """Without what a text has otherwise: ns, names, pointers (hashed), bits of other pins."""
    numbers: dict[tuple[str, int], int] = {}
    found: list[Comparable] = []
    for record in records:
        event = Event(record[1])
        values = dict(zip(TRACEPOINTS[event].fields, record[HEADER_FIELDS:], strict=True))
        for name in POINTERS:
            if name in values:
                values[name] = numbers.setdefault((name, values[name]), len(numbers))
        if event is Event.KVM_PIC_SET_IRQ:
            values["elcr"] &= 1 << values["pin"]
            values["imr"] &= 1 << values["pin"]
        pid = tasks[record[2] & ~IRQ_CONTEXT].rpartition("-")[2]
        in_interrupt = bool(record[2] & IRQ_CONTEXT)
        found.append(
            (
                (record[0] + 500) // 1000,  # as the kernel rounds
                event.name,
                pid,
                in_interrupt,
                values,
            )
        )
    return found


@pytest.mark.parametrize("name", RUNS)
def test_the_kernels_text_says_what_its_pages_say(name: str, tmp_path: Path) -> None:
    run = kernel()["runs"][name]
    by = decoder(kernel())
    from_pages = comparable(decode(run, by), by.tasks.names)
    trace, records = read(write(tmp_path, "\n".join(run["text"]) + "\n"))
    assert comparable(records, trace.tasks) == from_pages
    assert (trace.unknown, trace.lost, trace.cut, trace.is_complete) == (0, 0, "", False)
    assert trace.events == {Event[row[1]] for row in from_pages}


@pytest.mark.parametrize("name", RUNS)
def test_without_flags_the_interrupts_are_the_same(name: str, tmp_path: Path) -> None:
    text = "\n".join(kernel()["runs"][name]["text"]) + "\n"
    with_flags = read(write(tmp_path, text))[1]
    without = read(write(tmp_path, re.sub(r"(\[\d+\]) [^\s\d]\S+ ", r"\1 ", text)))[1]
    assert [(r[0], r[1]) for r in without] == [(r[0], r[1]) for r in with_flags]
    differing = [a for a, b in zip(with_flags, without, strict=True) if (a[2] ^ b[2]) & IRQ_CONTEXT]
    assert differing == []


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.txt")), ids=lambda path: path.stem)
def test_real_texts_are_understood_whole(path: Path) -> None:
    trace, records = read(path)
    events = sum(not line.startswith("#") for line in path.read_text().splitlines())
    assert (len(records), trace.unknown, trace.cut) == (events, 0, "")
    assert records == sorted(records, key=lambda record: record[0])


# --- other tools --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["trace-cmd-report", "trace-cmd-report-t", "trace-cmd-report-l"])
def test_trace_cmd_report(name: str) -> None:
    trace, records = read(TEXTS / f"{name}.txt")
    assert (trace.unknown, trace.cut, trace.vms) == (0, "", [])
    names = [trace.tasks[record[2] & ~IRQ_CONTEXT] for record in records]
    assert {"<idle>-0", "python-15073", "kvm-pit/15073-15074"} == set(names)
    expiries = [record for record in records if record[1] == Event.HRTIMER_EXPIRE_ENTRY]
    assert len(expiries) == 3
    rounded_ns = 0 if name.endswith("-t") else 500
    assert all(-rounded_ns <= record[0] - record[5] < 100_000 for record in expiries)


def test_trace_cmd_report_is_the_same_with_and_without_flags() -> None:
    """`-l` shows them: of the timer's records the same are in an interrupt."""

    def timers(name: str) -> list[tuple[int, int, int]]:
        records = read(TEXTS / name)[1]
        wanted = (Event.HRTIMER_START, Event.HRTIMER_EXPIRE_ENTRY, Event.WORK_QUEUE)
        return [(r[0], r[1], r[2] & IRQ_CONTEXT) for r in records if r[1] in wanted]

    with_flags = timers("trace-cmd-report-l.txt")
    assert timers("trace-cmd-report.txt") == with_flags
    assert {irq for _, _, irq in with_flags} == {0, IRQ_CONTEXT}


def test_raw_fields_are_not_understood_and_counted() -> None:
    trace, records = read(TEXTS / "trace-cmd-report-R.txt")
    assert trace.unknown > 10
    assert {record[1] for record in records} == {Event.HRTIMER_START, Event.SCHED_WAKING}


def test_perf_script_names_the_worker_by_the_scheduler_and_its_vm_by_the_process() -> None:
    trace, records = read(TEXTS / "perf-script-pid-tid-ns.txt")
    assert trace.unknown == 0
    assert "kvm-pit/15094-15096" in trace.tasks
    assert trace.vms == [VmInfo(15094, "python", {15094: "python", 15096: "kvm-pit/15094"})]
    assert any(record[0] % 1000 for record in records)
    assert read(TEXTS / "perf-script.txt")[0].vms == []


def test_two_vms_by_their_tgid() -> None:
    trace, _ = read(TEXTS / "trace-tgid-local.txt")
    assert [(vm.pid, sorted(vm.threads.values())) for vm in trace.vms] == [
        (9458, ["kvm-pit/9458", "python"]),
        (9461, ["kvm-pit/9461", "python"]),
    ]
    assert all(
        f"{comm}-{tid}" in trace.tasks for vm in trace.vms for tid, comm in vm.threads.items()
    )


# --- clocks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["trace-tgid-local", "perf-script", "perf-script-pid-tid-ns"])
def test_another_clock_is_moved_to_the_timers(name: str) -> None:
    _, records = read(TEXTS / f"{name}.txt")
    late_ns = [r[0] - r[5] for r in records if r[1] == Event.HRTIMER_EXPIRE_ENTRY]
    assert min(late_ns) == 0
    assert max(late_ns) < 20_000


def expiry(ts_ns: int, now_ns: int) -> str:
    seconds, ns = divmod(ts_ns, 10**9)
    return (
        f"  <idle>-0 [000] d.h1. {seconds}.{ns:09d}: hrtimer_expire_entry:"
        f" hrtimer=1f function=pit_timer_fn now={now_ns}\n"
    )


@pytest.mark.parametrize("ppm", [-50, 0, 50])
def test_a_clock_that_drifts_is_followed(ppm: int, tmp_path: Path) -> None:
    """A minute at 1 kHz: as much as 3 ms."""
    text = "".join(
        expiry(
            7_000_000_000 + at + at * ppm // 1_000_000 + 1000 + at // 7 % 5000, 90_000_000_000 + at
        )
        for at in range(0, 60_000_000_000, 1_000_000)
    )
    _, records = read(write(tmp_path, text))
    late_ns = [record[0] - record[5] for record in records]
    assert len(late_ns) == 60_000
    assert all(-100_000 <= late <= 100_000 for late in late_ns)
    assert records == sorted(records, key=lambda record: record[0])


@pytest.mark.parametrize("late_ns", [0, 900_000])
def test_one_clock_is_left_alone(late_ns: int, tmp_path: Path) -> None:
    _, records = read(write(tmp_path, expiry(5_000_000_000 + late_ns, 5_000_000_000)))
    assert records[0][0] == 5_000_000_000 + late_ns


def test_the_offset_holds_for_what_comes_before_the_first_expiry(tmp_path: Path) -> None:
    before = lines(*(("a-1", "1.000000", "kvm_eoi: apicid 0 vector 1"),) * 5000)
    _, records = read(write(tmp_path, before + expiry(2_000_000_000, 9_000_000_000)))
    assert {record[0] for record in records} == {8_000_000_000, 9_000_000_000}


def test_without_an_expiry_times_stay_as_they_are(tmp_path: Path) -> None:
    text = lines(("a-1", "1.000000", "kvm_eoi: apicid 0 vector 1"))
    assert read(write(tmp_path, text))[1][0][0] == 1_000_000_000


# --- interrupts without flags -------------------------------------------------------------------

EXPIRE = "hrtimer_expire_entry: hrtimer=1f function=pit_timer_fn now=1000000000"
START = "hrtimer_start: hrtimer=1f function=pit_timer_fn expires=1001000000 softexpires=1"
OTHER_START = START.replace("=1f", "=2f")
QUEUE = "sched_kthread_work_queue_work: work struct=2b function=pit_do_work worker=ec"
EOI = "kvm_eoi: apicid 0 vector 1"


@pytest.mark.parametrize(
    ("events", "in_interrupt"),
    [
        ([EXPIRE, QUEUE, START, START], [True, True, True, False]),
        ([EXPIRE, EOI, START], [True, False, False]),
        ([EXPIRE, OTHER_START, START], [True, False, False]),
        ([EXPIRE, EXPIRE.replace("=1f", "=2f"), OTHER_START, START], [True, True, True, False]),
        ([QUEUE, START], [False, False]),
    ],
)
def test_what_is_in_the_interrupt(
    events: list[str], in_interrupt: list[bool], tmp_path: Path
) -> None:
    text = lines(*(("a-1", "1.000000", event) for event in events), flags=" ")
    _, records = read(write(tmp_path, text))
    assert [bool(record[2] & IRQ_CONTEXT) for record in records] == in_interrupt


def test_another_task_does_not_end_the_interrupt(tmp_path: Path) -> None:
    text = lines(
        ("a-1", "1.000000", EXPIRE), ("b-2", "1.000000", EOI), ("a-1", "1.000000", START), flags=" "
    )
    _, records = read(write(tmp_path, text))
    assert [bool(record[2] & IRQ_CONTEXT) for record in records] == [True, False, True]


# --- files --------------------------------------------------------------------------------------


def base() -> str:
    return (GOLDEN / "base_0.txt").read_text()


def test_a_packed_text(tmp_path: Path) -> None:
    path = tmp_path / "trace.txt.gz"
    path.write_bytes(gzip.compress(base().encode()))
    trace, records = read(path)
    assert records == read(GOLDEN / "base_0.txt")[1]
    assert trace.cut == ""
    assert trace.size_bytes == path.stat().st_size


@pytest.mark.parametrize("cut", [1, 40, 100])
def test_a_text_that_was_cut_gives_what_it_has(cut: int, tmp_path: Path) -> None:
    trace, records = read(write(tmp_path, base()[:-cut]))
    assert records == read(GOLDEN / "base_0.txt")[1][: len(records)]
    assert len(records) == 312
    assert "cut short" in trace.cut


def test_a_packed_text_that_was_cut(tmp_path: Path) -> None:
    path = tmp_path / "trace.txt.gz"
    path.write_bytes(gzip.compress(base().encode())[:-600])
    trace, records = read(path)
    assert records == read(GOLDEN / "base_0.txt")[1][: len(records)]
    assert records
    assert "cut short" in trace.cut


def test_a_packed_text_that_is_damaged(tmp_path: Path) -> None:
    packed = bytearray(gzip.compress(base().encode()))
    packed[len(packed) // 2] ^= 0xFF
    path = tmp_path / "trace.txt.gz"
    path.write_bytes(packed)
    trace, _ = read(path)
    assert trace.cut


@pytest.mark.parametrize(
    ("start", "told"),
    [
        (b"\x17\x08\x44tracing6\0", "trace-cmd report -t -i"),
        (b"PERFILE2\x68\0", "perf script"),
        (b"hello\n", "neither"),
        (b"", "neither"),
        (b"\x1f\x8bnot gzip", "gzip"),
    ],
)
def test_other_files(start: bytes, told: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(start)
    with pytest.raises(FormatError, match=told):
        open_trace(path)


def test_an_empty_trace(tmp_path: Path) -> None:
    trace, records = read(write(tmp_path, "# tracer: nop\n#\n"))
    assert (records, trace.unknown, trace.cut) == ([], 0, "")


def test_lines_that_are_not_understood_are_counted(tmp_path: Path) -> None:
    text = lines(
        ("a-1", "1.000000", EOI),
        ("a-1", "1.000000", "kvm_eoi: who knows"),
        ("a-1", "1.000000", "net_dev_queue: dev=eth0 skbaddr=1 len=2"),
        (
            "a-1",
            "1.000000",
            "hrtimer_start: hrtimer=1f function=tick_sched expires=1 softexpires=1",
        ),
        (
            "a-1",
            "1.000000",
            "hrtimer_start: hrtimer=1f function=0xffffffff expires=1 softexpires=1",
        ),
    )
    trace, records = read(write(tmp_path, text + " => do_syscall_64\n\n# a remark\n"))
    assert len(records) == 1
    assert trace.unknown == 3


def test_lost_events_stand_where_they_are_missing(tmp_path: Path) -> None:
    event = lines(("a-1", "1.000000", EOI))
    later = lines(("a-1", "2.000000", EOI))
    trace, records = read(write(tmp_path, f"{event}CPU:3 [LOST 7 EVENTS]\n{later}"))
    assert [record[1] for record in records] == [Event.KVM_EOI, Event.LOST_EVENTS, Event.KVM_EOI]
    assert records[1][0] == 2_000_000_000
    assert records[1][HEADER_FIELDS:] == (3, 7)
    assert trace.lost == 7


def test_neighbours_are_put_in_order(tmp_path: Path) -> None:
    times = [*range(5000), 4500, *range(5000, 20000)]
    text = "".join(lines(("a-1", f"1.{at:06d}", EOI)) for at in times)
    _, records = read(write(tmp_path, text))
    assert [record[0] // 1000 - 1_000_000 for record in records] == sorted(times)


def test_a_text_in_no_order_is_refused(tmp_path: Path) -> None:
    one_cpu = "".join(lines(("a-1", f"1.{at:06d}", EOI)) for at in range(10 * REORDERED))
    with pytest.raises(FormatError, match="not in order of time"):
        read(write(tmp_path, one_cpu + one_cpu))


def test_threads_far_apart_in_their_columns(tmp_path: Path) -> None:
    """The time stands elsewhere for each; what is read fast for one is read right for all."""
    names = ["a-1", "a-long-name-4194304", "CPU 0/KVM-77", "x: y-5"]
    events = [(name, f"{at}.000000", EOI) for at in range(8, 300) for name in names]
    trace, records = read(write(tmp_path, lines(*events)))
    assert [(trace.tasks[r[2]], r[0] // 10**9) for r in records] == [
        (name, int(at.partition(".")[0])) for name, at, _ in events
    ]
    assert trace.unknown == 0


def test_a_text_of_ours_is_read_back(tmp_path: Path) -> None:
    tasks = ["<idle>-0", "CPU 0/KVM-1002", "kvm-pit/1000-1001"]
    pit, work = int(Function.PIT_TIMER_FN), int(Function.PIT_DO_WORK)
    records: list[Record] = [
        (1_000_000, int(Event.HRTIMER_START), 1, 0x1F, pit, 2_000_000, 0),
        (2_000_000, int(Event.HRTIMER_EXPIRE_ENTRY), IRQ_CONTEXT, 0x1F, pit, 1_999_123),
        (2_001_000, int(Event.WORK_QUEUE), IRQ_CONTEXT, 0x2B, work, 0xEC),
        (2_002_000, int(Event.WORK_START), 2, 0x2B, work),
        (2_003_000, int(Event.PIT_RESET_REINJECT), 1, 4),
        (2_004_000, int(Event.LOST_EVENTS), 1, 2, -1),
        (2_005_000, int(Event.SCHED_SWITCH), 1, 1002, 0x100, 0, 1, 120, 120),
    ]
    file = io.StringIO()
    FtraceWriter(file, tasks)(records)
    trace, found = read(write(tmp_path, file.getvalue()))
    assert found == [
        (r[0], r[1], trace.tasks.index(tasks[r[2] & ~IRQ_CONTEXT]) | r[2] & IRQ_CONTEXT, *r[3:])
        for r in records
    ]
    assert trace.is_complete


def test_a_real_run_of_ours_is_not_complete(tmp_path: Path) -> None:
    file = io.StringIO()
    FtraceWriter(file, ["<idle>-0"], simulated=False)([])
    assert not read(write(tmp_path, file.getvalue()))[0].is_complete
