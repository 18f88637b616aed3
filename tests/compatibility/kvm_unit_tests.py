#!/usr/bin/env python3
"""Run kvm-unit-tests' x86 flats under `kvmtick run`, and keep the table of docs/compatibility.md.

    tests/compatibility/kvm_unit_tests.py BUILD [BUILD ...] [--only NAME ...] [--write | --check]

BUILD is a built kvm-unit-tests tree (`./configure; make`), for x86_64 or i386. What to run, with
how many CPUs and which command line, is read from its x86/unittests.cfg. `--write` puts the results
into docs/compatibility.md, `--check` compares them with what stands there (but for the times) and
exits with 1 if they differ.
"""

import argparse
import configparser
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "compatibility.md"
TABLE_STARTS = "<!-- results: written by tests/compatibility/kvm_unit_tests.py --write -->"
TABLE_ENDS = "<!-- end of results -->"

LIMIT_S = 120
"""Wall seconds a test gets unless unittests.cfg gives it more, or `SLOW` does."""
SLOW = {"access": 1200, "sieve": 600, "xapic": 1200}
"""Wall seconds for tests of billions of instructions."""
PATIENCE_S = 30
"""What kvmtick may take beyond its limit before it is killed."""
SKIPPED_CODE = 77 >> 1
"""What a test that skipped everything writes to the debug exit port."""

NOT_RUN = {
    "apic-split": "an IOAPIC in user space",
    "ioapic-split": "an IOAPIC in user space",
    "svm": "nested virtualization",
    "vmx": "nested virtualization",
    "pmu": "performance counters",
    "hyperv": "Hyper-V's enlightenments",
    "intel-iommu": "an IOMMU",
    "vmware": "VMware's backdoor ports",
    "intel_cet": "control-flow enforcement",
    "vmexit": "VM exits that take time",
    "access_fep": "forced emulation",
    "access-reduced": "a smaller MAXPHYADDR than the host's",
}
"""Sections and files that start so are about what kvmtick does not have."""

TEST_DEVICE_MEMORY = "the test device's memory at 0xff000000"
MISSING = {
    "asyncpf": "asynchronous page faults",
    "debug": "#DB by DR7.GD behind a MOV SS that blocks a single step",
    "emulator": f"{TEST_DEVICE_MEMORY}; alignment checks of SSE, some checks of SS and of RIP",
    "hypercall (i386)": "nothing: its subtests are for 64 bits",
    "kvmclock_test": "kvmclock",
    "la57 (x86_64)": "checks that descriptor tables and their segments have canonical bases",
    "lam": TEST_DEVICE_MEMORY,
    "pks": "PKS",
    "pku": "PKU, in CPUID",
    "realmode": "firmware, whose PIT tick ends the HLT of its subtest `sti inhibit`",
    "s3": "ACPI tables",
    "taskswitch2": "task switches to a conforming code segment of another ring",
    "tsx-ctrl": "TSX",
}
"""By test, for one architecture if it is said: what one that does not pass lacks."""


@dataclass(frozen=True, slots=True)
class Case:
    """One test: a flat, and how to run it. `name` is its section in unittests.cfg."""

    name: str
    flat: str
    arch: str
    vcpus: int = 1
    options: tuple[str, ...] = ()
    limit_s: int = LIMIT_S


@dataclass(frozen=True, slots=True)
class Report:
    """What a test printed: its lines by their first word, and its own count of all."""

    passed: int
    failed: tuple[str, ...]
    skipped: int
    summary: str


@dataclass(frozen=True, slots=True)
class Result:
    """What became of a case. `verdict`: pass, fail, skip, or why the run ended early."""

    case: Case
    verdict: str
    report: Report
    wall_s: float


def cases(config: str, arch: str) -> Iterator[Case]:
    """The tests of a unittests.cfg for one architecture, and two that it leaves out."""
    parser = configparser.RawConfigParser()
    parser.read_string(config)
    for name in parser.sections():
        section = parser[name]
        if section.get("arch", arch) == arch:
            yield Case(
                name,
                section["file"],
                arch,
                section.getint("smp", 1),
                tuple(options(section.get("extra_params", ""))),
                max(section.getint("timeout", 0), SLOW.get(name, LIMIT_S)),
            )
    yield Case("smptest4", "smptest.flat", arch, 4)
    if arch == "x86_64":
        yield Case("tscdeadline_latency", "tscdeadline_latency.flat", arch)


def options(extra_params: str) -> Iterator[str]:
    """What QEMU's options mean to kvmtick; those it has no counterpart for are left out."""
    words = iter(shlex.split(extra_params))
    for word in words:
        if word in ("-append", "--append"):
            yield from ("--append", next(words))
        elif word == "-m":
            size = next(words)
            yield from ("--ram", size.upper() if size[-1].isalpha() else f"{size}M")
        elif word == "-cpu":
            for change in cpuid_changes(next(words)):
                yield from ("--cpuid", change)


def cpuid_changes(cpu: str) -> Iterator[str]:
    """What QEMU's -cpu leaves out or renames of what kvmtick offers; a model is not imitated."""
    for change in cpu.split(","):
        if change.startswith("vendor="):
            yield change
        elif change in ("-x2apic", "-tsc-deadline"):
            yield f"{change[1:].replace('-', '_')}=off"


def reason_not_run(case: Case) -> str | None:
    """Which part of a machine that kvmtick does not have the test is about, if it is."""
    for start, reason in NOT_RUN.items():
        if case.name.startswith(start) or case.flat.startswith(start):
            return reason
    return None


def parse_report(text: str) -> Report:
    """What a test printed on its serial line (lib/report.c)."""
    lines = [line.strip() for line in text.splitlines()]
    return Report(
        sum(line.startswith(("PASS: ", "XFAIL: ", "KFAIL: ")) for line in lines),
        tuple(line for line in lines if line.startswith(("FAIL: ", "XPASS: "))),
        sum(line.startswith("SKIP: ") for line in lines),
        next((line for line in lines if line.startswith("SUMMARY: ")), ""),
    )


def verdict(reason: str, code: int, report: Report) -> str:
    """From why the run ended, and the code the test gave back if it ended itself."""
    if reason == "done":
        return "fail" if report.failed else "pass"
    if reason == "guest-error" and code == SKIPPED_CODE:
        return "skip"
    if reason == "guest-error":
        return "fail" if report.failed else f"exit code {code}"
    return reason


def run(case: Case, build: Path) -> Result:
    """Run one case; RuntimeError if kvmtick itself does not work."""
    command = [
        *(sys.executable, "-m", "kvmtick", "run", str(build / "x86" / case.flat)),
        *("--vcpus", str(case.vcpus), "--limit", f"{case.limit_s}s", "--json", *case.options),
    ]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=case.limit_s + PATIENCE_S, check=False
        )
    except subprocess.TimeoutExpired:
        return Result(case, "hangs", parse_report(""), case.limit_s + PATIENCE_S)
    if done.returncode < 0:
        return Result(case, f"signal {-done.returncode}", parse_report(""), 0)
    try:
        outcome = json.loads(done.stdout)
    except json.JSONDecodeError:
        raise RuntimeError(f"{shlex.join(command)}: {done.stderr.strip()}") from None
    report = parse_report(outcome["serial"])
    end = outcome["exit"]
    return Result(case, verdict(end["reason"], end["code"], report), report, outcome["wall_s"])


# The table.


def missing(case: Case) -> str:
    """What is known to keep the test from passing."""
    return MISSING.get(f"{case.name} ({case.arch})", MISSING.get(case.name, ""))


def row(result: Result) -> str:
    """A line of the table."""
    case, report = result.case, result.report
    cells = [
        case.name,
        case.arch,
        str(case.vcpus),
        result.verdict,
        str(report.passed),
        str(len(report.failed)),
        str(report.skipped),
        f"{result.wall_s:.1f} s",
        "" if result.verdict == "pass" else missing(case),
    ]
    return f"| {' | '.join(cells)} |"


def table(results: Iterable[Result], left_out: Iterable[Case]) -> str:
    """The part of the page that is written by `--write`."""
    lines = [
        "| test | built for | vCPUs | verdict | pass | fail | skip | wall time | what is missing |",
        "|---|---|---:|---|---:|---:|---:|---:|---|",
        *map(row, results),
        "",
        "Not run, for kvmtick lacks what they are about:",
        "",
        *not_run(left_out),
    ]
    return "\n".join(lines).rstrip()


def not_run(left_out: Iterable[Case]) -> Iterator[str]:
    """For what reasons which tests were not run, a line each."""
    names: dict[str, list[str]] = {}
    for case in left_out:
        reason = reason_not_run(case) or ""
        if case.name not in names.setdefault(reason, []):
            names[reason].append(case.name)
    for reason in sorted(names):
        yield f"* {reason}: {', '.join(names[reason])}"


def split_page(page: str) -> tuple[str, str, str]:
    """Before the table, the table, behind it; ValueError without its marks."""
    before, mark, rest = page.partition(TABLE_STARTS)
    inside, end, behind = rest.partition(TABLE_ENDS)
    if not mark or not end:
        raise ValueError(f"no {TABLE_STARTS!r} and {TABLE_ENDS!r} in the page")
    return before + mark, inside.strip(), end + behind


def key(line: str) -> tuple[str, ...] | None:
    """What identifies a row: test and architecture; None: no row."""
    cells = line.split(" | ")
    return (cells[0], cells[1]) if len(cells) > 1 else None


def differences(shown: str, present: str) -> list[str]:
    """Rows of `present` that are not what `shown` has; the wall time does not count."""
    known = {key(line): without_time(line) for line in shown.splitlines()}
    return [
        f"{line}\n  the page has: {known.get(key(line), 'nothing')}"
        for line in present.splitlines()
        if key(line) and known.get(key(line)) != without_time(line)
    ]


def without_time(line: str) -> str:
    """The row with its wall time blanked."""
    return re.sub(r"\| [\d.]+ s \|", "| |", line)


def notes_out_of_place(results: Iterable[Result]) -> list[str]:
    """Tests that do not pass and have no note on what is missing, and notes on tests that pass."""
    faults = []
    for result in results:
        case = result.case
        noted = bool(missing(case))
        if noted == (result.verdict == "pass"):
            faults.append(
                f"{case.arch} {case.name}: {result.verdict}, {'a' if noted else 'no'} note"
            )
    return faults


# The command.


def built_for(build: Path) -> str:
    """`x86_64` or `i386`; ValueError if the folder is no built tree."""
    try:
        config = (build / "config.mak").read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{build}: {error.strerror}: give a built kvm-unit-tests tree") from None
    for line in config.splitlines():
        if line.startswith("ARCH="):
            return line.removeprefix("ARCH=")
    raise ValueError(f"{build}/config.mak has no ARCH=: run ./configure there")


def all_cases(build: Path) -> list[Case]:
    """Those of a built tree; ValueError if it is none."""
    arch = built_for(build)
    return list(cases((build / "x86" / "unittests.cfg").read_text(encoding="utf-8"), arch))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("build", nargs="+", type=Path, help="a built kvm-unit-tests tree")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these tests of unittests.cfg")
    parser.add_argument("--write", action="store_true", help=f"put the table into {PAGE.name}")
    parser.add_argument("--check", action="store_true", help=f"compare with {PAGE.name}")
    options = parser.parse_args(argv)
    if options.write and options.only:
        parser.error("--write wants all tests: leave --only out")
    results, left_out = [], []
    try:
        for build in options.build:
            for case in all_cases(build):
                if options.only and case.name not in options.only:
                    continue
                if reason_not_run(case):
                    left_out.append(case)
                    continue
                result = run(case, build)
                print(row(result), flush=True)
                for line in result.report.failed:
                    print(f"    {line}", flush=True)
                results.append(result)
    except (ValueError, RuntimeError) as error:
        print(f"kvm_unit_tests.py: {error}", file=sys.stderr)
        return 2
    return finish(options, results, table(results, left_out))


def finish(options: argparse.Namespace, results: list[Result], present: str) -> int:
    """Write or check the page, if that was asked for."""
    before, shown, behind = split_page(PAGE.read_text(encoding="utf-8"))
    if options.write:
        PAGE.write_text(f"{before}\n{present}\n{behind}", encoding="utf-8")
    faults = notes_out_of_place(results) if options.write or options.check else []
    if options.check:
        faults += differences(shown, present)
    for fault in faults:
        print(fault, file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
