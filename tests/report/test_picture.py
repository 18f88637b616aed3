"""The picture: a PNG of the right size, with all colours, the same bytes each time."""

import builtins
import struct
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from made_reports import made_report

from kvmtick.abi.errors import HostError
from kvmtick.report import picture
from kvmtick.report.data import Finding, Report, Severity
from kvmtick.report.picture import MOST_FINDINGS, write_picture
from kvmtick.report.words import COLOURS

PNG = b"\x89PNG\r\n\x1a\n"


def size_of(path: Path) -> tuple[int, int]:
    """Width and height, from the file's header."""
    data = path.read_bytes()
    assert data.startswith(PNG)
    width, height = struct.unpack(">II", data[16:24])
    return width, height


def written(report: Report, path: Path) -> Path:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: kvmtick[report]")
    with path.open("wb") as file:
        write_picture(report, file)
    return path


def pixels(path: Path, colour: str) -> int:
    """How many pixels have about this colour."""
    from matplotlib.image import imread

    wanted = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    image = imread(path)[:, :, :3]
    return int((abs(image - wanted).max(axis=2) < 0.02).sum())


def test_every_verdict_has_its_colour(tmp_path: Path) -> None:
    path = written(made_report(200), tmp_path / "x.png")
    width, height = size_of(path)
    assert width == 1430
    assert 500 < height < 800
    for verdict, colour in COLOURS.items():
        assert pixels(path, colour) > 10, verdict
    assert pixels(path, "#12fe34") == 0


def test_the_same_report_gives_the_same_bytes(tmp_path: Path) -> None:
    first = written(made_report(100), tmp_path / "a.png").read_bytes()
    assert written(made_report(100), tmp_path / "b.png").read_bytes() == first
    assert b"matplotlib" not in first
    assert written(made_report(101), tmp_path / "c.png").read_bytes() != first


def test_names_are_drawn_as_they_are(tmp_path: Path) -> None:
    path = written(
        made_report(60, words=lambda text: f"{text} $\\frac{{1}} \udcff\n\0 名"), tmp_path / "x.png"
    )
    assert size_of(path)[0] == 1430


def test_many_sources_and_findings_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(picture, "MOST_SOURCES", 2)
    report = made_report(5, vms=2)
    finding = Finding("x", Severity.GOOD, "all is well", "")
    report.findings = [finding] * MOST_FINDINGS
    width, height = size_of(written(report, tmp_path / "a.png"))
    # One more of each: a line that says so, no more.
    report.vms.append(report.vms[0])
    report.findings.append(finding)
    again = size_of(written(report, tmp_path / "b.png"))
    assert again[0] == width
    assert 0 < again[1] - height < 80


def test_no_ticks_and_no_vms(tmp_path: Path) -> None:
    report = made_report(1)
    report.vms[0].sources[0].points = []
    report.end_ns = report.start_ns
    assert size_of(written(report, tmp_path / "a.png"))[1] > 300
    report.vms = []
    assert size_of(written(report, tmp_path / "b.png"))[1] < 300


def test_without_matplotlib_one_line_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: Any, **more: Any) -> Any:
        if name.partition(".")[0] == "matplotlib":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *arguments, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(
        HostError, match=r"^--png needs matplotlib.*pip install 'kvmtick\[report\]'"
    ):
        write_picture(made_report(1), BytesIO())
    assert not (tmp_path / "x.png").exists()
