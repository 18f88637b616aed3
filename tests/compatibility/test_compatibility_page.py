"""The command that runs kvm-unit-tests: what it reads, how it judges, and the page it keeps."""

from pathlib import Path

import pytest
from kvm_unit_tests import (
    PAGE,
    TABLE_ENDS,
    TABLE_STARTS,
    Case,
    Result,
    built_for,
    cases,
    differences,
    missing,
    notes_out_of_place,
    options,
    parse_report,
    reason_not_run,
    row,
    split_page,
    table,
    verdict,
)

CONFIG = """\
# a comment
[apic]
file = apic.flat
smp = 2
extra_params = -cpu qemu64,+x2apic -append 'one two' -m 2048
arch = x86_64

[taskswitch]
file = taskswitch.flat
arch = i386
timeout = 900
"""

OUTPUT = """\
enabling apic\r
PASS: apic: existence\r
FAIL: apic: one: two\r
SKIP: no device\r
XFAIL: known\r
a FAIL: within a line is none\r
SUMMARY: 4 tests, 1 unexpected failures, 1 expected failures, 1 skipped\r
"""


def report_of(*failed: str) -> Result:
    """A result with these failures."""
    report = parse_report("\n".join(failed) + "\nPASS: good\n")
    return Result(
        Case("apic", "apic.flat", "x86_64", 2), verdict("guest-error", 1, report), report, 1.26
    )


def test_a_section_is_a_case_of_its_architecture() -> None:
    case = next(cases(CONFIG, "x86_64"))
    assert case == Case("apic", "apic.flat", "x86_64", 2, ("--append", "one two", "--ram", "2048M"))
    names = {arch: [case.name for case in cases(CONFIG, arch)] for arch in ("x86_64", "i386")}
    assert names["x86_64"] == ["apic", "smptest4", "tscdeadline_latency"]
    assert names["i386"] == ["taskswitch", "smptest4"]


def test_only_a_longer_timeout_than_ours_counts() -> None:
    assert next(cases(CONFIG, "i386")).limit_s == 900
    assert next(cases(CONFIG.replace("900", "5"), "i386")).limit_s == 120


@pytest.mark.parametrize(
    ("extra_params", "ours"),
    [
        ("", []),
        ("-cpu max,+vmx -machine pit=off", []),
        ("-m 4g", ["--ram", "4G"]),
        ('--append "10 20"', ["--append", "10 20"]),
        ("-cpu qemu64,-x2apic,+tsc-deadline", ["--cpuid", "x2apic=off"]),
        ("-cpu Opteron_G1,vendor=AuthenticAMD", ["--cpuid", "vendor=AuthenticAMD"]),
    ],
)
def test_qemu_options_become_ours(extra_params: str, ours: list[str]) -> None:
    assert list(options(extra_params)) == ours


def test_what_is_about_missing_parts_is_not_run() -> None:
    assert reason_not_run(Case("ept", "vmx.flat", "x86_64")) == "nested virtualization"
    assert reason_not_run(Case("access_fep", "access_test.flat", "x86_64")) == "forced emulation"
    assert reason_not_run(Case("access", "access_test.flat", "x86_64")) is None


def test_a_report_is_counted_by_first_words() -> None:
    report = parse_report(OUTPUT)
    assert report.passed == 2
    assert report.failed == ("FAIL: apic: one: two",)
    assert report.skipped == 1
    assert report.summary.startswith("SUMMARY: 4 tests")
    assert parse_report("").summary == ""


@pytest.mark.parametrize(
    ("reason", "code", "output", "expected"),
    [
        ("done", 0, "PASS: a", "pass"),
        ("done", 0, "PASS: a\nFAIL: b", "fail"),
        ("guest-error", 1, "FAIL: a", "fail"),
        ("guest-error", 127, "PASS: a", "exit code 127"),
        ("guest-error", 38, "SKIP: a", "skip"),
        ("triple-fault", 0, "PASS: a", "triple-fault"),
        ("limit", 0, "", "limit"),
    ],
)
def test_a_verdict_needs_the_exit_code_and_the_report(
    reason: str, code: int, output: str, expected: str
) -> None:
    assert verdict(reason, code, parse_report(output)) == expected


def test_differences_are_rows_but_for_the_time() -> None:
    was = table([report_of("FAIL: one")], [])
    assert not differences(was, was.replace("1.3 s", "77.0 s"))
    assert len(differences(was, table([report_of("FAIL: one", "FAIL: two")], []))) == 1
    assert differences("", row(report_of("FAIL: one")))[0].endswith("nothing")


def test_every_failure_needs_a_note_and_nothing_else_has_one() -> None:
    assert notes_out_of_place([report_of("FAIL: one")]) == ["x86_64 apic: fail, no note"]
    lacking = Case("s3", "s3.flat", "i386")
    assert notes_out_of_place([Result(lacking, "fail", parse_report(""), 0)]) == []
    assert notes_out_of_place([Result(lacking, "pass", parse_report(""), 0)]) == [
        "i386 s3: pass, a note"
    ]


def test_a_note_may_be_for_one_architecture() -> None:
    assert missing(Case("la57", "la57.flat", "x86_64"))
    assert not missing(Case("la57", "la57.flat", "i386"))


def test_a_page_without_marks_is_refused() -> None:
    with pytest.raises(ValueError, match="end of results"):
        split_page(f"text\n{TABLE_STARTS}\n| a |\n")
    assert split_page(f"a{TABLE_STARTS}\nb\n{TABLE_ENDS}c")[1] == "b"


def test_the_page_has_its_marks() -> None:
    split_page(PAGE.read_text(encoding="utf-8"))


def test_a_folder_that_is_no_build_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give a built kvm-unit-tests tree"):
        built_for(tmp_path)
    (tmp_path / "config.mak").write_text("ARCH=i386\n", encoding="utf-8")
    assert built_for(tmp_path) == "i386"
