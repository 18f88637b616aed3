"""The initramfs for Linux: its archive is what Linux unpacks, its init does what it says."""

import datetime
import os
import platform
import re
import shutil
import stat
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvmtick.guests import build, linux
from kvmtick.guests.linux import cpio, tiny_initrd

Say = Callable[..., list[str]]
PROMPT = "kvmtick# "
HEADER_BYTES = 110


def unpack(archive: bytes) -> Iterator[tuple[str, list[int], bytes]]:
    """Name, the 13 fields of the header, and contents of each entry, without the trailer."""
    at = 0
    while True:
        assert archive[at : at + 6] == b"070701"
        fields = [int(archive[at + 6 + 8 * each :][:8], 16) for each in range(13)]
        name_at = at + HEADER_BYTES
        data_at = (name_at + fields[11] + 3) & ~3
        name = archive[name_at : name_at + fields[11] - 1].decode()
        assert archive[name_at + fields[11] - 1] == 0
        if name == "TRAILER!!!":
            assert archive[data_at:] == b""
            return
        yield name, fields, archive[data_at : data_at + fields[6]]
        at = (data_at + fields[6] + 3) & ~3


def elf(machine: int = 62, segments: tuple[int, ...] = (1,)) -> bytes:
    """The headers of a 64-bit ELF file with segments of these types."""
    ident = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    fields = (2, machine, 1, 0, 64, 0, 0, 64, 56, len(segments), 64, 0, 0)
    headers = [struct.pack("<I", each).ljust(56, b"\0") for each in segments]
    return ident + struct.pack("<HHIQQQIHHHHHH", *fields) + b"".join(headers)


@pytest.mark.skipif(shutil.which("nasm") is None, reason="nasm not found: init is not assembled")
def test_source_and_bytes_of_init_agree() -> None:
    source = build.HERE / "linux" / "init.asm"
    assert source in [each for folder in build.FOLDERS for each in build.sources(folder)]
    assert build.assemble(source) == linux.init(), "run `python -m kvmtick.guests.build`"


def test_the_archive_has_init_and_what_it_needs() -> None:
    entries = {name: (fields, data) for name, fields, data in unpack(tiny_initrd())}
    assert list(entries) == (
        ["bin", "dev", "proc", "sys", "dev/console", "dev/ttyS0", "dev/null", "init"]
    )
    nodes = {
        name: tuple(fields[9:11]) for name, (fields, _) in entries.items() if any(fields[9:11])
    }
    assert nodes == {"dev/console": (5, 1), "dev/ttyS0": (4, 64), "dev/null": (1, 3)}
    assert all(stat.S_ISCHR(entries[name][0][1]) for name in nodes)
    assert all(stat.S_ISDIR(entries[name][0][1]) for name in ("bin", "dev", "proc", "sys"))
    assert entries["init"][0][1] == stat.S_IFREG | 0o755
    assert entries["init"][1] == linux.init()


def test_it_is_small_and_always_the_same() -> None:
    assert tiny_initrd() == tiny_initrd()
    assert len(tiny_initrd()) < 8192
    for _, fields, _ in unpack(tiny_initrd()):
        assert fields[2:4] == [0, 0], "owner"
        assert fields[5] == 0, "time"


def test_script_and_busybox_come_along(tmp_path: Path) -> None:
    busybox = tmp_path / "busybox"
    busybox.write_bytes(elf())
    archive = tiny_initrd(script=b"uptime\n", busybox=busybox)
    entries = {name: (fields[1], data) for name, fields, data in unpack(archive)}
    assert entries["script"] == (stat.S_IFREG | 0o644, b"uptime\n")
    assert entries["bin/busybox"] == (stat.S_IFREG | 0o755, elf())


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (elf(segments=(6, 3, 1)), "is linked dynamically"),
        (elf(machine=183), "is no x86-64 ELF program"),
        (b"#!/bin/sh\n", "is no x86-64 ELF program"),
        (elf()[:66], "ends within its ELF headers"),
        (elf()[:10], "ends within its ELF headers"),
    ],
    ids=["dynamic", "arm", "script", "cut", "cut in the header"],
)
def test_a_busybox_that_cannot_run_is_refused(tmp_path: Path, image: bytes, reason: str) -> None:
    busybox = tmp_path / "busybox"
    busybox.write_bytes(image)
    with pytest.raises(ValueError, match=reason) as raised:
        tiny_initrd(busybox=busybox)
    assert "busybox-static" in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.skipif(
    shutil.which("cpio") is None, reason="cpio not found: only our parser has read it"
)
def test_cpio_reads_what_we_write() -> None:
    odd = [
        cpio.directory("d"),
        *(cpio.file(f"d/{'n' * size}", b"x" * size) for size in range(1, 9)),
    ]
    for archive, names in (
        (cpio.archive(odd), [entry.path for entry in odd]),
        (tiny_initrd(), [name for name, _, _ in unpack(tiny_initrd())]),
    ):
        done = subprocess.run(
            ["cpio", "-t", "--quiet"], input=archive, capture_output=True, check=True, timeout=10
        )
        assert done.stdout.decode().splitlines() == names
        assert done.stderr == b""


@pytest.fixture
def say(tmp_path: Path) -> Say:
    """Init as an ordinary process: what it answers to each line, without its welcome."""
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        pytest.skip("init runs on x86-64 Linux only")
    program = tmp_path / "init"
    program.write_bytes(linux.init())
    program.chmod(0o755)

    def run(*lines: str, script: Path | None = None) -> list[str]:
        arguments = [str(program), *([str(script)] if script else [])]
        text = "".join(f"{line}\n" for line in lines)
        done = subprocess.run(
            arguments, input=text, capture_output=True, text=True, check=True, timeout=20
        )
        assert done.stderr == ""
        return [done.stdout] if script else done.stdout.split(PROMPT)[1:]

    return run


def test_it_welcomes_and_leaves_at_the_end_of_the_input(say: Say) -> None:
    assert say() == [""]
    assert say("", "   ", "# nothing") == ["", "", "", ""]
    assert say("exit", "echo not reached") == [""]
    assert say("poweroff") == [""]
    assert say("reboot") == [""]


def test_cat_and_echo(say: Say, tmp_path: Path) -> None:
    for name, size in (("small", 5), ("large", 3 << 20)):
        (tmp_path / name).write_text("x" * size + "\n")
    files = f"{tmp_path}/small  {tmp_path}/large"
    answers = say("echo  two  words ", f"cat {files}", "cat", f"cat {tmp_path}/absent {files}")
    assert answers[0] == "two  words \n"
    assert answers[1] == "x" * 5 + "\n" + "x" * (3 << 20) + "\n"
    assert answers[2] == "cat needs a file: cat /proc/interrupts\n"
    absent = f"cannot open {tmp_path}/absent: error 2; `ls DIR` shows what is there\n"
    assert answers[3] == absent + answers[1]


def test_ls_marks_directories(say: Say, tmp_path: Path) -> None:
    place = tmp_path / "place"
    (place / "inner").mkdir(parents=True)
    (place / "..odd").write_text("")
    (place / ".x").write_text("")
    listed, absent, root = say(f"ls {place}", "ls /absent", "ls")[:3]
    assert sorted(listed.splitlines()) == ["..odd", ".x", "inner/"]
    assert absent == "cannot open /absent: error 2; `ls DIR` shows what is there\n"
    assert "proc/" in root.splitlines()


def test_date_is_the_same_moment_twice(say: Say) -> None:
    seconds, iso = say("date")[0].split()
    assert re.fullmatch(r"\d+\.\d{9}", seconds)
    moment = datetime.datetime.fromtimestamp(int(seconds.split(".")[0]), datetime.UTC)
    assert iso == moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def test_sleep_takes_fractions(say: Say) -> None:
    before, slept, after = say("uptime", "sleep 0.25", "uptime")[:3]
    assert slept == ""
    assert float(after) - float(before) >= 0.25


@pytest.mark.parametrize("seconds", ["", "x", "-1", "1x", "1.5x", "1 2"])
def test_sleep_refuses_what_is_no_time(say: Say, seconds: str) -> None:
    assert say(f"sleep {seconds}")[0] == "sleep needs a number of seconds: sleep 0.5\n"


def test_nproc_counts_the_cpus_we_may_use(say: Say) -> None:
    assert int(say("nproc")[0]) == len(os.sched_getaffinity(0))


def test_ticks_sums_the_timer_interrupts_of_all_cpus(say: Say) -> None:
    lines = say("ticks")[0].splitlines()
    if not lines:
        pytest.skip("/proc/interrupts has no timer interrupts here")
    cpus = len(Path("/proc/interrupts").read_text().splitlines()[0].split())
    for line in lines:
        found = re.fullmatch(r"(0|NMI|LOC|RES|CAL): (\d+) = (\d+(?: \+ \d+)*)  (\S.*)", line)
        assert found, line
        counts = [int(count) for count in found[3].split(" + ")]
        assert len(counts) == cpus
        assert sum(counts) == int(found[2])


def test_a_snapshot_has_all_between_its_marks(say: Say) -> None:
    lines = say("snapshot one")[0].splitlines()
    assert lines[:2] == ["snapshot one ...", "snapshot one begin"]
    assert lines[-1] == "snapshot one end"
    uptime, monotonic, realtime = lines[-4:-1]
    assert re.fullmatch(r"\d+\.\d\d \d+\.\d\d", uptime)
    assert re.fullmatch(r"monotonic_ns \d+", monotonic)
    assert re.fullmatch(r"realtime_ns \d{19}", realtime)
    labels = [line.split(":")[0] for line in Path("/proc/interrupts").read_text().splitlines()[1:]]
    assert [line.split(":")[0] for line in lines[3:-4]] == labels
    assert say("snapshot")[0] == "snapshot needs a name: snapshot before\n"


def test_help_lists_every_command_and_none_is_unknown(say: Say) -> None:
    listed = [line.split()[0] for line in say("help")[0].splitlines()]
    assert listed == sorted(listed)
    assert {"cat", "date", "dmesg", "echo", "ls", "sleep", "snapshot", "ticks"} <= set(listed)
    for name in set(listed) - {"sh"}:  # which would run the host's busybox
        assert "unknown" not in say(name)[0]
    for name in ("bogus", "ca", "catt"):
        assert say(name)[0] == f"unknown command '{name}': `help` lists the commands\n"


def test_a_script_prints_only_what_its_commands_print(say: Say, tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text("echo one\n\n# a comment\n\techo two\r\necho last")
    assert say("echo console", script=script) == ["one\ntwo \nlast\n"]
