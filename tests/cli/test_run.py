"""`kvmtick run`: what it prints, in words and as JSON, and how it ends."""

import json
import os
import re
from functools import partial
from pathlib import Path
from typing import Any

import elf_images
import pytest
from terminal import Terminal, process

from kvmtick.cli.run_output import trace_writer
from kvmtick.ticks.host import HostTicks
from kvmtick.trace.encode import KtraceEncoder
from kvmtick.trace.events import Event
from kvmtick.trace.reading import open_trace
from kvmtick.trace.vms import VmInfo

PERIOD_NS = 999_848
VERDICTS = ("delivered", "late", "reinjected", "coalesced", "masked", "dropped", "outstanding")
HOPS = ("expiry_to_work", "work_to_accept", "accept_to_inject", "inject_to_eoi", "expiry_to_eoi")


def run_json(kvmtick: Terminal, *arguments: str, code: int = 0) -> dict[str, Any]:
    result = kvmtick("run", *arguments, "--json")
    assert result.code == code, result.err
    assert result.out.count("\n") == 1, "one object, on one line"
    told = json.loads(result.out)
    assert isinstance(told, dict)
    assert sum(told["ticks"][verdict] for verdict in VERDICTS) == told["ticks"]["expired"]
    return told


# --- the object ---------------------------------------------------------------------------------


def test_a_thousand_ticks_as_the_issue_wants_them(kvmtick: Terminal) -> None:
    told = run_json(kvmtick, "--ticks", "1000")
    assert told["guest_ticks"] == 1000
    assert told["ticks"]["expired"] >= 1000
    assert abs(told["elapsed_ns"] - 1000 * PERIOD_NS) <= PERIOD_NS
    assert told["exit"] == {"reason": "done", "code": 0}
    again = run_json(kvmtick, "--ticks", "1000")
    assert told.pop("wall_s") > 0
    assert again.pop("wall_s") > 0
    assert again == told
    assert run_json(kvmtick)["guest_ticks"] == 1000, "and it is the default"


def test_the_keys_are_those_of_the_design(kvmtick: Terminal) -> None:
    told = run_json(kvmtick, "--ticks", "5")
    for key, value in (
        ("guest", "tick-pic"),
        ("cpu", "unicorn"),
        ("chips", "model"),
        ("clock", "virtual"),
        ("seed", 0),
        ("guest_ticks", 5),
    ):
        assert told[key] == value
    assert told["pit"] == {"count": 1193, "period_ns": PERIOD_NS, "reinject": True}
    assert set(told["ticks"]) >= {"source", "expired", *VERDICTS}
    assert told["ticks"]["source"] == "pit"
    assert set(told["latency_ns"]) == set(HOPS)
    assert all(set(values) == {"p50", "p99", "max"} for values in told["latency_ns"].values())
    assert isinstance(told["drift_ppm"], float)
    assert isinstance(told["instructions"], int)
    (source,) = told["sources"]
    assert (source["source"], source["vcpu"], source["path"]) == ("pit", 0, "pic")
    assert (source["ticks"], source["latency_ns"]) == (told["ticks"], told["latency_ns"])


def test_drift_is_what_the_guest_believes_against_the_clock(kvmtick: Terminal) -> None:
    told = run_json(kvmtick, "--ticks", "500")
    believed_ns = 500 * 1193 * 1e9 / 1193182
    assert told["drift_ppm"] == pytest.approx(
        (believed_ns / told["elapsed_ns"] - 1) * 1e6, abs=0.01
    )


# --- how long -----------------------------------------------------------------------------------


def test_for_alone_lifts_the_thousand_and_is_exact(kvmtick: Terminal) -> None:
    told = run_json(kvmtick, "--for", "1500ms")
    assert told["exit"]["reason"] == "time"
    assert told["elapsed_ns"] == 1_500_000_000
    assert told["guest_ticks"] == 1500


@pytest.mark.parametrize(
    ("duration", "ticks", "reason"), [("10ms", 10, "time"), ("1s", 20, "done")]
)
def test_with_both_what_comes_first_ends_it(
    kvmtick: Terminal, duration: str, ticks: int, reason: str
) -> None:
    told = run_json(kvmtick, "--for", duration, "--ticks", "20")
    assert (told["exit"]["reason"], told["guest_ticks"]) == (reason, ticks)


@pytest.mark.parametrize("reinject", ["--reinject", "--no-reinject"])
def test_a_guest_that_cannot_get_its_ticks_ends_after_ten_times_their_time(
    kvmtick: Terminal, reinject: str
) -> None:
    told = run_json(kvmtick, "tick-noeoi", "--ticks", "50", reinject)
    assert told["exit"] == {"reason": "time", "code": 0}
    assert told["elapsed_ns"] == 10 * 50 * PERIOD_NS
    assert told["guest_ticks"] == 1


@pytest.mark.parametrize(
    ("hz", "count"),
    [
        ("18.2", 65536),
        ("18.3", 65201),
        ("100", 11932),
        ("1000", 1193),
        ("1000.5", 1193),
        ("5000", 239),
        ("6000", 199),
        ("795454", 2),
        ("1193181", 1),
    ],
)
def test_hz_is_rounded_to_a_count_and_the_period_is_after_the_clamp(
    kvmtick: Terminal, hz: str, count: int
) -> None:
    told = run_json(kvmtick, "--hz", hz, "--ticks", "3")
    nominal_ns = count * 1_000_000_000 // 1193181
    period_ns = max(nominal_ns, 200_000)
    assert told["pit"]["count"] == count
    assert told["pit"]["period_ns"] == period_ns
    first_and_two_more_ns = nominal_ns + 2 * period_ns
    assert first_and_two_more_ns <= told["elapsed_ns"] < first_and_two_more_ns + 2_000
    assert told["guest_ticks"] == 3


# --- what becomes of ticks ----------------------------------------------------------------------


def test_interrupts_off_for_10_ms_with_and_without_reinjection(kvmtick: Terminal) -> None:
    words = ("tick-if0", "--hold", "10ms", "--ticks", "30")
    on = run_json(kvmtick, *words)
    assert on["ticks"]["reinjected"] >= 8
    assert on["ticks"]["coalesced"] == 0
    assert on["elapsed_ns"] == pytest.approx(30 * PERIOD_NS, rel=0.001)
    off = run_json(kvmtick, *words, "--no-reinject")
    assert off["pit"]["reinject"] is False
    assert off["ticks"]["reinjected"] == 0
    assert off["ticks"]["coalesced"] >= 8
    assert off["elapsed_ns"] > 38 * PERIOD_NS


def test_masked_for_10_ms_drops_what_was_counted(kvmtick: Terminal) -> None:
    told = run_json(kvmtick, "tick-mask", "--hold", "10ms", "--ticks", "30")
    assert told["ticks"]["dropped"] >= 8
    assert told["guest_ticks"] == 30


@pytest.mark.parametrize(
    ("fault", "hop"),
    [
        ("worker_delay", "expiry_to_work"),
        ("late_expiry", "expiry_to_work"),
        ("vcpu_off", "accept_to_inject"),
    ],
)
def test_faults_make_the_host_late_and_are_named(kvmtick: Terminal, fault: str, hop: str) -> None:
    told = run_json(kvmtick, "--ticks", "20", "--fault", f"{fault}=150us", "--seed", "3")
    assert told["faults"] == {fault: "150us"}
    assert told["seed"] == 3
    assert told["latency_ns"][hop]["max"] == 150_000
    text = kvmtick("run", "--ticks", "20", "--fault", f"{fault}=150us", "--seed", "3").out
    assert f"{fault}=150us, seed 3" in text


def test_the_seed_decides_about_a_random_fault(kvmtick: Terminal) -> None:
    words = ("--ticks", "100", "--fault", "worker_delay=exp:300us", "--fault", "vcpu_off=5%:2ms")
    runs = [run_json(kvmtick, *words, "--seed", seed) for seed in ("1", "1", "2")]
    for told in runs:
        del told["wall_s"]
    assert runs[0] == runs[1]
    assert runs[0]["latency_ns"] != runs[2]["latency_ns"]


# --- guests of one's own ------------------------------------------------------------------------


@pytest.fixture
def boot_sector(tmp_path: Path) -> Path:
    """Prints B, then leaves with 0."""
    path = tmp_path / "boot.img"
    code = bytes.fromhex("b042 e6e9 b000 e6f4 f4")
    path.write_bytes(code + bytes(510 - len(code)) + b"\x55\xaa")
    return path


def test_a_boot_sector_runs_and_what_it_prints_is_shown(
    kvmtick: Terminal, boot_sector: Path
) -> None:
    result = kvmtick("run", str(boot_sector))
    assert result.code == 0
    assert result.out.startswith(
        "B\n\nboot.img on the unicorn CPU with the model's chips, virtual time\n"
    )
    assert "debug console" not in result.out, "it was shown when it came"
    told = run_json(kvmtick, str(boot_sector))
    assert (told["guest"], told["guest_ticks"], told["drift_ppm"]) == ("boot.img", None, None)
    assert (told["console"], told["serial"]) == ("B", "")


def test_a_flat_image_at_its_own_place_with_its_own_counter(
    kvmtick: Terminal, tmp_path: Path
) -> None:
    path = tmp_path / "flat.bin"
    # at entry 0x20002: mov dword [0x600], 7; then leave with 0
    path.write_bytes(b"\xf4\xf4" + bytes.fromhex("66c706000607000000 b000 e6f4 f4"))
    told = run_json(
        kvmtick,
        *(str(path), "--load-at", "0x20000", "--entry", "0x20002", "--counter", "0x600"),
    )
    assert (told["exit"]["reason"], told["guest_ticks"]) == ("done", 7)


@pytest.mark.parametrize(
    ("code", "reason", "words"),
    [
        ("faf4", "deadlock", "cli; hlt"),
        ("fbf4", "deadlock", "no timer runs"),
        ("ebfe", "limit", "still running after 0.01 s of wall time"),
        ("0f011e0880ccf4f4000000000000", "triple-fault", "triple fault"),
        ("b05ae6f4f4", "guest-error", "0x5a"),
    ],
)
def test_a_guest_that_fails_gives_4_with_registers_and_the_last_events(
    kvmtick: Terminal, tmp_path: Path, code: str, reason: str, words: str
) -> None:
    path = tmp_path / "bad.bin"
    # an OUT to port 0x80 first, moved to where the code of the triple fault expects to be
    path.write_bytes(b"\xe6\x80" + bytes.fromhex(code))
    place = ("--load-at", "0x7ffe", "--limit", "10ms")
    result = kvmtick("run", str(path), *place)
    assert result.code == 4
    first, *rest = result.err.splitlines()
    assert first.startswith(f"kvmtick: bad.bin: {reason}: ")
    assert words in first
    assert re.fullmatch(r"vCPU 0, (halted|runnable), real mode:", rest[0])
    assert any(re.search(r"\beip 0000[78]", line) for line in rest)
    assert "last events:" in rest
    assert any("pio_write at 0x80" in line for line in rest)
    assert "Traceback" not in result.err
    assert f"{reason} after" in result.out, "the report of what was seen"
    told = run_json(kvmtick, str(path), *place, code=4)
    assert told["exit"]["reason"] == reason


# --- words --------------------------------------------------------------------------------------


def test_the_report_says_what_happened_without_colour(kvmtick: Terminal) -> None:
    result = kvmtick("run", "--ticks", "20")
    assert (result.code, result.err) == (0, "")
    assert "\x1b" not in result.out
    lines = result.out.splitlines()
    assert lines[0] == "tick-pic on the unicorn CPU with the model's chips, virtual time"
    assert lines[1] == "PIT count 1193: a tick every 999,848 ns (1,000.15 Hz), reinject on"
    assert lines[2].startswith(
        "done after 0.019997 s; the guest counted 20 ticks, its clock (1193182 Hz)"
    )
    lines = kvmtick("run", "exceptions", "--ticks", "20").out.splitlines()
    assert lines[1] == "the PIT ticks when the guest chooses, reinject on"
    assert lines[2].endswith(" ticks"), "it is no clock"
    assert re.search(r"^delivered +20 +reached the guest within their period *$", result.out, re.M)
    assert re.search(r"^expired +20 *$", result.out, re.M)
    assert "PIC request -> VM entry" in result.out
    assert "late" not in result.out, "verdicts nobody got are left out"
    assert re.search(
        r"^[\d.]+ s of wall time: [\d,]+ ticks/s, [\d,]+ instructions$", result.out, re.M
    )


def test_a_guest_without_ticks_needs_no_table_of_latencies(
    kvmtick: Terminal, boot_sector: Path
) -> None:
    result = kvmtick("run", str(boot_sector))
    assert result.code == 0
    assert "hop" not in result.out


def test_text_of_a_file_comes_as_it_is_before_the_report(kvmtick: Terminal, tmp_path: Path) -> None:
    path = tmp_path / "hello.bin"
    # 'o' to 0xe9, 'k' to 0x3f8, \n to 0xe9, then 3 to the debug exit port
    path.write_bytes(bytes.fromhex("b06f e6e9 baf803 b06b ee b00a e6e9 b003 e6f4 f4"))
    result = kvmtick("run", str(path))
    assert result.code == 4
    assert result.out.startswith("ok\n\nhello.bin on ")
    told = run_json(kvmtick, str(path), code=4)
    assert told["exit"] == {"reason": "guest-error", "code": 3}
    assert (told["console"], told["serial"]) == ("o\n", "k")


def test_what_a_built_in_guest_prints_stands_in_the_report(kvmtick: Terminal) -> None:
    result = kvmtick("run", "pit-registers")
    assert "\n\ndebug console:\n" in result.out
    assert result.out.startswith("pit-registers on ")


def test_a_kernel_gets_its_vcpus_command_line_and_modules(
    kvmtick: Terminal, tmp_path: Path
) -> None:
    path, module = tmp_path / "kernel.elf", tmp_path / "module"
    path.write_bytes(elf_images.kernel())
    module.write_bytes(b"content")
    options = ("--append", "one two", "--module", f"{module}:three", "--vcpus", "4", "--ram", "8M")
    told = run_json(kvmtick, str(path), *options)
    assert (told["exit"]["reason"], told["console"]) == ("done", "kernel.elf one two")
    assert told["guest_ticks"] is None


def test_the_quantum_of_several_vcpus(kvmtick: Terminal) -> None:
    """vCPU 1 spins until vCPU 0, which waits for its turn, lets it go on."""
    short = run_json(kvmtick, "ipi-tick", "--ticks", "20", "--quantum", "1us")
    long = run_json(kvmtick, "ipi-tick", "--ticks", "20", "--quantum", "5ms")
    assert short["guest_ticks"] == long["guest_ticks"] == 20
    assert short["elapsed_ns"] < long["elapsed_ns"]


def test_fast_runs_repeat_and_lose_nothing(kvmtick: Terminal) -> None:
    runs = [run_json(kvmtick, "tick-pic", "--ticks", "50", "--fast") for _ in range(2)]
    for told in runs:
        told.pop("wall_s")
    assert runs[0] == runs[1]
    assert runs[0]["guest_ticks"] == runs[0]["ticks"]["delivered"] == 50


def test_a_kernel_is_not_about_ticks_unless_told_so(kvmtick: Terminal, tmp_path: Path) -> None:
    """It programs the PIT, and spins."""
    path = tmp_path / "spin.elf"
    pit = "b034 e643 b0a9 e640 b004 e640"
    path.write_bytes(elf_images.kernel(bytes.fromhex(pit + "ebfe")))
    assert run_json(kvmtick, str(path), "--limit", "100ms", code=4)["exit"]["reason"] == "limit"
    told = run_json(kvmtick, str(path), "--ticks", "3")
    assert told["exit"]["reason"] == "time", "none of them reached it"


def test_the_story_follows_the_report(kvmtick: Terminal) -> None:
    result = kvmtick("run", "--ticks", "5", "--story", "2")
    assert result.code == 0
    report, _, story = result.out.partition("\n\nthe life of tick 2: delivered\n")
    assert "delivered" in report
    assert "hrtimer_expire_entry: hrtimer=" in story
    assert "kernel  pit_timer_fn" in story
    assert "here    kvmtick.irqchip.i8254.Pit.timer_fn" in story
    assert "change  pending: 0 -> 1" in story


def test_the_story_and_the_report_agree_on_a_reinjected_tick(kvmtick: Terminal) -> None:
    words = ("tick-if0", "--hold", "8ms", "--ticks", "15")
    told = run_json(kvmtick, *words, "--story", "6")
    assert told["ticks"]["reinjected"] > 0
    assert (told["story"]["tick"], told["story"]["verdict"]) == (6, "reinjected")
    plain = run_json(kvmtick, *words)
    for result in (told, plain):
        result.pop("wall_s")
    del told["story"]
    assert told == plain, "telling a story changes nothing"


def test_a_story_of_a_tick_that_did_not_happen(kvmtick: Terminal) -> None:
    result = kvmtick("run", "--ticks", "3", "--story", "7")
    assert result.code == 0
    assert result.out.endswith("tick 7 did not happen: 3 expired in this run\n")


FTRACE_LINE = re.compile(
    r"^ *(?P<comm>\S.*?)-(?P<pid>\d+) +\[000\] [.dNhs1]{5} +(?P<s>\d+)\.(?P<us>\d{6}):"
    r" (?P<event>\w+): \S"
)


def test_the_trace_is_ftrace_text_in_order(kvmtick: Terminal, tmp_path: Path) -> None:
    path = tmp_path / "trace.txt"
    plain = run_json(kvmtick, "--ticks", "5")
    told = run_json(kvmtick, "--ticks", "5", "--trace", str(path))
    for result in (told, plain):
        result.pop("wall_s")
    assert told == plain, "writing a trace changes nothing"
    lines = path.read_text().splitlines()
    assert lines[0] == "# tracer: nop"
    parsed = [FTRACE_LINE.match(line) for line in lines if not line.startswith("#")]
    assert all(parsed)
    matches = [match for match in parsed if match]
    times = [int(match["s"]) * 1_000_000 + int(match["us"]) for match in matches]
    assert times == sorted(times)
    events = [match["event"] for match in matches]
    assert events[0] == "kvm_apicv_inhibit_changed", "from the creation of the chips on"
    for event, count in (
        ("hrtimer_expire_entry", 5),
        ("sched_kthread_work_execute_start", 5),
        ("kvm_set_irq", 10),
        ("kvm_inj_virq", 5),
        ("kvm_ack_irq", 5),
    ):
        assert events.count(event) == count
    assert {(match["comm"], match["pid"]) for match in matches} <= {
        *(("<idle>", "0"), ("kvmtick", "1000"), ("kvm-pit/1000", "1001"), ("CPU 0/KVM", "1002"))
    }, "fixed numbers: nothing of the host enters a trace"
    assert any("pio_write at 0xf4 size 1 count 1 val 0x0" in line for line in lines[-4:])


def test_a_trace_may_be_a_recording(kvmtick: Terminal, tmp_path: Path) -> None:
    path = tmp_path / "run.ktrace"
    plain = run_json(kvmtick, "tick-if0", "--ticks", "9", "--hold", "4ms")
    told = run_json(kvmtick, "tick-if0", "--ticks", "9", "--hold", "4ms", "--trace", str(path))
    for result in (told, plain):
        result.pop("wall_s")
    assert told == plain, "writing a recording changes nothing"
    with open_trace(path) as trace:
        host = HostTicks(trace)
        host.read()
        assert (trace.cut, trace.unknown, trace.lost, trace.is_complete) == ("", 0, 0, True)
    (vm,) = host.vms
    assert (vm.pid, vm.name, vm.info.reinject) == (1000, "tick-if0", True)
    (report,) = vm.assembler.reports()
    assert report.as_dict() == told["ticks"]
    assert report.latency_ns == told["latency_ns"]


def test_a_recording_is_whole_although_nobody_reads_the_report(tmp_path: Path) -> None:
    path = tmp_path / "run.ktrace"
    reader, writer = os.pipe()
    os.close(reader)
    try:
        with process("run", "--ticks", "2", "--trace", str(path), stdout=writer) as child:
            child.communicate(timeout=60)
    finally:
        os.close(writer)
    with open_trace(path) as trace:
        assert sum(map(len, trace.batches())) > 20
        assert trace.cut == ""


def test_a_run_that_dies_leaves_a_recording_without_an_end(tmp_path: Path) -> None:
    path = tmp_path / "run.ktrace"
    record = (5, int(Event.KVM_SET_IRQ), 0, 0, 1, 2)
    tasks = ["<idle>-0"]

    def run() -> None:
        about = VmInfo(1, "")
        encoder = partial(KtraceEncoder, tasks=tasks, vm=about)
        with trace_writer(str(path), lambda: tasks, encoder, simulated=True) as write:
            assert write is not None
            write([record])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    with open_trace(path) as trace:
        assert [each for batch in trace.batches() for each in batch] == [record]
        assert trace.cut == "the recording was not ended: its last moments may be missing"


def test_a_missing_engine_is_the_hosts_fault_and_names_the_remedy(
    kvmtick: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> str:
        raise ImportError("the unicorn engine needs Unicorn 2.1.4: pip install unicorn==2.1.4")

    monkeypatch.setattr("kvmtick.cpu.unicorn.find_library", missing)
    result = kvmtick("run")
    assert (result.code, result.out, result.err.count("\n")) == (3, "", 1)
    assert "pip install unicorn==2.1.4" in result.err
