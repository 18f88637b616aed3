"""The columns of ftrace text, line by line. Real lines, or made by hand from what is told."""

import pytest

from kvmtick.trace.text_lines import (
    is_remark,
    line_cpu,
    lost_events,
    overwritten_events,
    parse_line,
)

EVENT = "kvm_eoi: apicid 0 vector 78"

# (line up to the event, comm, pid, tgid, cpu, in an interrupt, ns)
LINES = [
    (
        "          <idle>-0       [001] d.h1.  2448.453984: ",
        ("<idle>", 0, None, 1, True, 2448_453984_000),
    ),
    (
        "    kvm-pit/6084-6132    [001] .....  5432.816989: ",
        ("kvm-pit/6084", 6132, None, 1, False, 5432_816989_000),
    ),
    # `cat trace` of older kernels: four flags; without irq-info: none.
    (
        "     CPU 0/KVM-1234  [000] d..1   280.971122: ",
        ("CPU 0/KVM", 1234, None, 0, False, 280971122000),
    ),
    ("           <...>-77    [012] ..s. 1.000001: ", ("<...>", 77, None, 12, True, 1_000_001_000)),
    (
        "     CPU 0/KVM-1234  [000]   280.971122: ",
        ("CPU 0/KVM", 1234, None, 0, False, 280971122000),
    ),
    # A real-time kernel: six flags.
    (
        "     CPU 0/KVM-1234  [000] d..h1.   280.971122: ",
        ("CPU 0/KVM", 1234, None, 0, True, 280971122000),
    ),
    # record-tgid
    (
        "          python-9482    (   9482) [001] d.h.. 45205.864105: ",
        ("python", 9482, 9482, 1, True, 45205_864105_000),
    ),
    (
        "           sshd-9482    (-------) [001] ..... 45205.864105: ",
        ("sshd", 9482, None, 1, False, 45205_864105_000),
    ),
    # trace-cmd report, with -t, with -l
    (
        " memfd:sealed-91-10090 [000] 42089.774822: ",
        ("memfd:sealed-91", 10090, None, 0, False, 42089_774822_000),
    ),
    (
        "          python-15073 [000] 42089.774611873: ",
        ("python", 15073, None, 0, False, 42089_774611_873),
    ),
    (
        "  <idle>-0       0d.h1. 42090.289895: ",
        ("<idle>", 0, None, 0, True, 42090_289895_000),
    ),
    # perf script, with pid/tid
    (
        "            perf 15093 [000] 42091.609284: ",
        ("perf", 15093, None, 0, False, 42091_609284_000),
    ),
    (
        " kworker/3:2-mm_ 420821 [003] 108229.926253: ",
        ("kworker/3:2-mm_", 420821, None, 3, False, 108229_926253_000),
    ),
    (
        "       CPU 0/KVM 1234/1240  [017] 42091.609284493: ",
        ("CPU 0/KVM", 1240, 1234, 17, False, 42091_609284_493),
    ),
    (
        "         swapper     0/0     [001] 42092.176734526: ",
        ("swapper", 0, 0, 1, False, 42092_176734_526),
    ),
    # A name may look like columns.
    (
        "     a-1 [002] 3.000001: b-12    [001] .....  5432.816989: ",
        ("a-1 [002] 3.000001: b", 12, None, 1, False, 5432_816989_000),
    ),
]


@pytest.mark.parametrize(("columns", "wanted"), LINES)
def test_columns(columns: str, wanted: tuple[object, ...]) -> None:
    line = parse_line(columns + EVENT)
    assert line is not None
    assert (line.comm, line.pid, line.tgid, line.cpu, line.in_interrupt, line.ts_ns) == wanted
    assert line.rest == EVENT
    assert columns.startswith(line.columns + ".")
    assert line_cpu(columns + EVENT) == wanted[3]


@pytest.mark.parametrize(
    "line",
    [
        "",
        "cpus=2",
        "# tracer: nop",
        " => do_syscall_64",
        "          <idle>-0       [001] d.h1.  2448.453984: no event here",
        "          <idle>-0       [001] d.h1.  24484539840: kvm_eoi: apicid 0 vector 78",
        "          <idle>-0       [001] d.h1.  2448.45: kvm_eoi: apicid 0 vector 78",
    ],
)
def test_other_lines(line: str) -> None:
    assert parse_line(line) is None


@pytest.mark.parametrize(
    ("line", "lost"),
    [
        ("CPU:1 [LOST 123 EVENTS]", (1, 123)),
        ("CPU:12 [LOST EVENTS]", (12, -1)),
        ("CPU:1 [7 EVENTS DROPPED]", (1, 7)),
        ("CPU:1 [EVENTS DROPPED]", (1, -1)),
        ("##### CPU 3 buffer started ####", (3, -1)),
        ("  perf 12 [004] 42.609284: PERF_RECORD_LOST lost 9", (4, 9)),
        ("LOST 5 events!", (0, 5)),
        ("# entries-in-buffer/entries-written: 5/9   #P:2", None),
    ],
)
def test_where_events_are_missing(line: str, lost: tuple[int, int] | None) -> None:
    assert lost_events(line) == lost


def test_what_the_head_says_was_overwritten() -> None:
    assert overwritten_events("# entries-in-buffer/entries-written: 56441/56500   #P:2") == 59
    assert overwritten_events("# tracer: nop") == 0


@pytest.mark.parametrize("line", ["", "# anything", "cpus=2", "version = 6", "   "])
def test_remarks(line: str) -> None:
    assert is_remark(line)


def test_stack_traces_are_no_remarks() -> None:
    assert not is_remark(" => do_syscall_64")
