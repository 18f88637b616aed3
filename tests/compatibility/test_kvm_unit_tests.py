"""kvm-unit-tests under kvmtick give what docs/compatibility.md says.

KVM_UNIT_TESTS names one or several built trees, separated by colons; without it these are skipped.
"""

import os
from pathlib import Path

import pytest
from kvm_unit_tests import PAGE, Case, all_cases, differences, reason_not_run, row, run, split_page

BUILDS = [Path(build) for build in os.environ.get("KVM_UNIT_TESTS", "").split(":") if build]


if not BUILDS:
    pytest.skip(
        "KVM_UNIT_TESTS is not set: give it built kvm-unit-tests trees", allow_module_level=True
    )


@pytest.mark.parametrize(
    ("build", "case"),
    [
        pytest.param(build, case, id=f"{case.arch}-{case.name}")
        for build in BUILDS
        for case in all_cases(build)
        if not reason_not_run(case)
    ],
)
def test_as_the_page_says(build: Path, case: Case) -> None:
    shown = split_page(PAGE.read_text(encoding="utf-8"))[1]
    assert differences(shown, row(run(case, build))) == []
