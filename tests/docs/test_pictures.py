"""The pictures of docs: well-formed, without references outward, and true to the pages."""

import contextlib
import io
import re
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest
from doc_blocks import ROOT
from test_rooms import ROOMS

from kvmtick.cli import main

DOCS = ROOT / "docs"
PICTURES = sorted(DOCS.glob("*.svg"))
SVG = "{http://www.w3.org/2000/svg}"


def texts(picture: str, style: str) -> Iterator[str]:
    """The texts of a class, in the order of the file."""
    for element in ElementTree.fromstring(picture).iter(f"{SVG}text"):
        if style in element.get("class", "").split():
            yield element.text or ""


def sections(page: str) -> list[int]:
    """The numbers of the numbered sections."""
    return [int(number) for number in re.findall(r"^## (\d+)\. ", page, re.MULTILINE)]


def missing_steps(picture: str, page: str) -> list[int]:
    """Sections that the picture shows neither as a step nor in a note."""
    shown = {int(number) for number in texts(picture, "number")}
    shown |= {int(n) for note in texts(picture, "note") for n in re.findall(r"\b\d+\b", note)}
    return sorted(set(sections(page)) ^ shown)


@pytest.mark.parametrize("picture", PICTURES, ids=lambda picture: picture.name)
def test_a_picture_stands_alone(picture: Path) -> None:
    root = ElementTree.fromstring(picture.read_text(encoding="utf-8"))
    assert root.find(f"{SVG}title") is not None
    assert root.find(f"{SVG}desc") is not None
    assert not [e.tag for e in root.iter() for name in e.attrib if name.endswith("href")]


def test_the_path_shows_the_sections_of_the_walkthrough() -> None:
    picture = (DOCS / "tick-path.svg").read_text(encoding="utf-8")
    page = (DOCS / "walkthrough.md").read_text(encoding="utf-8")
    assert sections(page) == list(range(1, len(sections(page)) + 1))
    # The notes also speak of GSI 0, pin 0 and pin 2, which are sections or none.
    assert missing_steps(picture, page) == [0]


def test_the_rooms_are_those_of_the_house() -> None:
    picture = (DOCS / "rooms.svg").read_text(encoding="utf-8")
    names = [name for name in texts(picture, "name") if name in ROOMS]
    assert names == list(reversed(ROOMS))


def test_the_slow_clock_is_that_of_the_recording(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'kvmtick[report]'")
    from matplotlib.image import imread

    made = tmp_path / "slow-clock.png"
    recording = DOCS / "recordings" / "slow-clock.ktrace"
    with contextlib.redirect_stdout(io.StringIO()):
        assert main(["report", str(recording), "--png", str(made)]) == 0
    # other fonts and versions draw the same a little differently
    shown, fresh = imread(DOCS / "slow-clock.png"), imread(made)
    assert shown.shape == fresh.shape
    assert abs(shown.astype(float) - fresh).mean() < 0.02


# That these tests can fail.


def test_a_step_without_a_section_is_found() -> None:
    picture = (
        '<svg xmlns="http://www.w3.org/2000/svg"><text class="number">1</text>'
        '<text class="number">3</text><text class="note">2 is a note</text></svg>'
    )
    assert missing_steps(picture, "## 1. One\n## 2. Two\n") == [3]
    assert missing_steps(picture, "## 1. One\n## 2. Two\n## 3. Three\n## 4. Four\n") == [4]
