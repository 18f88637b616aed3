"""docs/reporting.md tells every kind of finding there is, and no other."""

import re
from pathlib import Path

from kvmtick.report.causes import CauseKind

ROOT = Path(__file__).resolve().parents[2]
NO_FINDINGS = {CauseKind.MASKED, CauseKind.OTHER}
"""Causes that have no finding: their verdicts have."""


def test_every_kind_is_told() -> None:
    page = (ROOT / "docs" / "reporting.md").read_text(encoding="utf-8")
    told = re.findall(r"^\| `([\w-]+)` \|", page, re.MULTILINE)
    code = "\n".join(
        path.read_text(encoding="utf-8")
        for path in sorted((ROOT / "src/kvmtick/report").glob("findings*.py"))
    )
    called = r'(?:finding\(\s*vm,\s+(?:source|None),\s+|_of_trace\(\s*)"([\w-]+)"'
    kinds = set(re.findall(called, code))
    kinds |= {kind.value for kind in CauseKind if kind not in NO_FINDINGS}
    assert sorted(told) == sorted(kinds)
