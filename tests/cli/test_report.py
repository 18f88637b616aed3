"""`kvmtick report`: what it prints, what it writes, what it refuses."""

import json
import os
import re
from pathlib import Path

import pytest
from recordings import write_recording
from terminal import Terminal

IF0 = ("tick-if0", "--ticks", "100", "--hold", "5ms", "--no-reinject")

TEXT = """\
run.ktrace: a simulated run
1 VM, 0.104 s, 1,993 events, none lost

problem interrupts-off
  5 ticks of the PIT late or lost because the guest kept its interrupts off: its vCPU was running
  and did not take them for up to 4 ms
  -> shorten what the guest does with interrupts off (cli, a handler that does not return)

problem coalesced
  4 ticks of the PIT lost (3.85 %): merged with one before - 4 while the PIC's request was still
  set; up to 4 in a row
  -> reinjection is off: tickpolicy delay (QEMU: -global kvm-pit.lost_tick_policy=delay; libvirt:
  <timer name='pit' tickpolicy='delay'/>) replays them

problem drift
  a clock that counts the ticks of the PIT is -38,462 ppm off (138.5 s slow in an hour; taken for
  1193182 Hz; KVM's PIT runs at 1193181 Hz)
  -> see what lost the ticks; or have the guest read a clock (kvmclock, TSC, HPET) instead of
  counting them

tick-if0 (pid 1000)

the pit by way of the pic: a tick every 999,848 ns, 1,000.15 a second asked for, 961.685 came
a clock that counts them: -38,462.1 ppm; taken for 1193182 Hz; KVM's PIT runs at 1193181 Hz
verdict    ticks  meaning
delivered     99  reached the guest within their period
late           1  reached the guest a period late, or more
coalesced      4  merged with a request that was still set
expired      104
"""
WORST = "the guest was running and did not take it for 4 ms: its interrupts were off"


@pytest.fixture
def trace(tmp_path: Path, kvmtick: Terminal) -> Path:
    """A simulated guest that keeps its interrupts off for a while."""
    path = tmp_path / "run.ktrace"
    assert kvmtick("run", *IF0, "--trace", str(path), "--json").code == 0
    return path


def test_the_text(trace: Path, kvmtick: Terminal) -> None:
    result = kvmtick("report", str(trace))
    assert (result.code, result.err) == (0, "")
    head = result.out.partition("\nhop ")[0]
    assert [line.rstrip() for line in head.splitlines()] == TEXT.splitlines()


def test_the_table_of_the_worst(trace: Path, kvmtick: Terminal) -> None:
    lines = kvmtick("report", str(trace), "--worst", "1").out.splitlines()
    (at,) = [number for number, line in enumerate(lines) if line.startswith("#")]
    assert lines[at + 1].split(maxsplit=5) == ["1", "4", "late", "4", "ms", WORST]
    assert lines[at + 2] == ""
    assert "came after" not in kvmtick("report", str(trace), "--worst", "0").out


def test_a_recording_of_a_kernel(tmp_path: Path, kvmtick: Terminal) -> None:
    path = write_recording(tmp_path / "t.ktrace", "tick-pic")
    result = kvmtick("report", str(path), "--json")
    assert (result.code, result.err) == (0, "")
    told = json.loads(result.out)
    (vm,) = told["vms"]
    (source,) = vm["sources"]
    assert (vm["name"], source["source"], source["path"]) == ("tick-pic", "pit", "pic")
    assert source["ticks"]["delivered"] > 0
    assert told["origin"]


def test_the_json_object(trace: Path, kvmtick: Terminal) -> None:
    run = json.loads(kvmtick("run", *IF0, "--json").out)
    told = json.loads(kvmtick("report", str(trace), "--json").out)
    assert {"lost_events", "vms", "findings"} <= told.keys()
    (vm,) = told["vms"]
    assert {"pid", "name", "sources"} <= vm.keys()
    (source,) = vm["sources"]
    assert {"source", "vcpu", "period_ns", "ticks", "latency_ns", "drift_ppm"} <= source.keys()
    assert source["ticks"] == run["ticks"]
    assert source["latency_ns"] == run["latency_ns"]
    assert {"interrupts-off", "coalesced", "drift"} == {f["kind"] for f in told["findings"]}


def test_a_story(trace: Path, kvmtick: Terminal) -> None:
    text = kvmtick("report", str(trace), "--story", "1").out
    assert text.startswith("tick 4: late\nthe guest was running and did not take it for 4 ms")
    assert re.search(r"\+0 ns  CPU 0/KVM-1002 +the hrtimer expires$", text, re.MULTILINE)
    assert "hrtimer_expire_entry: hrtimer=" in text
    story = json.loads(kvmtick("report", str(trace), "--story", "1", "--json").out)["story"]
    assert (story["tick"], story["verdict"]) == (4, "late")
    assert story["lines"][1]["event"] == "hrtimer_expire_entry"


def test_one_vm(trace: Path, kvmtick: Terminal) -> None:
    by_name = kvmtick("report", str(trace), "--vm", "tick-if0")
    assert by_name.out == kvmtick("report", str(trace), "--vm", "1000").out
    assert kvmtick("report", str(trace), "--vm", "other").err == (
        f"kvmtick: --vm other: no such VM in {trace}; there are 1000 (tick-if0)\n"
    )


def test_page_and_picture(trace: Path, tmp_path: Path, kvmtick: Terminal) -> None:
    pytest.importorskip(
        "matplotlib", reason="--png needs matplotlib: pip install 'kvmtick[report]'"
    )
    html, png = tmp_path / "t.html", tmp_path / "t.png"
    result = kvmtick("report", str(trace), "--html", str(html), "--png", str(png))
    assert (result.code, result.err) == (0, "")
    assert "tick-if0" in html.read_text()
    assert png.read_bytes().startswith(b"\x89PNG")


def test_exports(trace: Path, tmp_path: Path, kvmtick: Terminal) -> None:
    pytest.importorskip("pyarrow", reason="--parquet needs pyarrow: pip install 'kvmtick[export]'")
    pytest.importorskip("perfetto", reason="--perfetto needs it: pip install 'kvmtick[export]'")
    parquet, perfetto = tmp_path / "tables", tmp_path / "t.pftrace"
    result = kvmtick(
        "report", str(trace), "--parquet", str(parquet), "--perfetto", str(perfetto), "--json"
    )
    assert (result.code, result.err) == (0, "")
    assert (parquet / "ticks.parquet").exists()
    assert perfetto.stat().st_size > 1000


# What cannot be.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--story", "99"), "--story 99: 10 of the worst ticks are kept; give 1 to 10"),
        (("--story", "0"), "--story 0: give a number, such as --story 3"),
        (("--worst", "x"), "--worst x: give a number, such as --worst 3"),
        (("--frobnicate",), "unrecognized arguments: --frobnicate; see kvmtick report --help"),
    ],
)
def test_options(trace: Path, kvmtick: Terminal, options: tuple[str, ...], message: str) -> None:
    result = kvmtick("report", str(trace), *options)
    assert (result.code, result.out, result.err) == (2, "", f"kvmtick: {message}\n")


def one_line(kvmtick: Terminal, path: Path, code: int = 2) -> str:
    """What is said of a file that cannot be reported on."""
    result = kvmtick("report", str(path))
    assert (result.code, result.out) == (code, "")
    (line,) = result.err.splitlines()
    assert line.startswith(f"kvmtick: {path}: ")
    return line.removeprefix(f"kvmtick: {path}: ")


def test_no_file(tmp_path: Path, kvmtick: Terminal) -> None:
    assert one_line(kvmtick, tmp_path / "none") == (
        "No such file or directory; give a recording or a trace"
    )
    assert one_line(kvmtick, tmp_path).startswith("no regular file: ")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(trace: Path, kvmtick: Terminal) -> None:
    trace.chmod(0)
    assert one_line(kvmtick, trace).startswith("Permission denied; ")


@pytest.mark.parametrize(
    "content", [b"", b"\x7fELF" + bytes(100), b"\x1f\x8bnot gzip", b"ktrace1\n"]
)
def test_another_format(tmp_path: Path, kvmtick: Terminal, content: bytes) -> None:
    path = tmp_path / "t"
    path.write_bytes(content)
    assert one_line(kvmtick, path)


def test_a_recording_without_a_tick(tmp_path: Path, kvmtick: Terminal) -> None:
    path = tmp_path / "none.ktrace"
    assert kvmtick("run", "tick-pic", "--for", "500us", "--trace", str(path)).code == 0
    said = one_line(kvmtick, path)
    assert said.startswith("no tick in it: ")
    assert said.endswith(
        "1 VM; record for longer, while a guest uses a timer of KVM's (PIT, local APIC)"
    )
    path.write_bytes(path.read_bytes()[:-1])
    assert "1 VM (the file ends in the middle: it was cut short); " in one_line(kvmtick, path)


def test_a_recording_that_was_cut_short(trace: Path, kvmtick: Terminal) -> None:
    whole = trace.read_bytes()
    trace.write_bytes(whole[: len(whole) // 2])
    told = json.loads(kvmtick("report", str(trace), "--json").out)
    assert "cut" in {finding["kind"] for finding in told["findings"]}
    assert told["vms"][0]["sources"][0]["ticks"]["expired"] > 0


@pytest.mark.parametrize("option", ["--html", "--png", "--perfetto", "--parquet"])
def test_an_output_that_cannot_be_written(
    trace: Path, tmp_path: Path, kvmtick: Terminal, option: str
) -> None:
    place = tmp_path / "a file"
    place.touch()
    result = kvmtick("report", str(trace), option, str(place / "below"))
    assert result.code == 3
    (line,) = result.err.splitlines()
    assert "a file" in line


@pytest.mark.parametrize("option", ["--html", "--png", "--perfetto"])
def test_the_trace_is_not_overwritten(trace: Path, kvmtick: Terminal, option: str) -> None:
    before = trace.read_bytes()
    result = kvmtick("report", str(trace), option, str(trace))
    assert (result.code, trace.read_bytes()) == (2, before)
    assert "that is the trace itself" in result.err


def test_nothing_is_left_where_the_trace_cannot_be_read(tmp_path: Path, kvmtick: Terminal) -> None:
    html = tmp_path / "t.html"
    html.write_text("before")
    assert kvmtick("report", str(tmp_path / "none"), "--html", str(html)).code == 2
    assert [path.name for path in tmp_path.iterdir()] == ["t.html"]
    assert html.read_text() == "before"
