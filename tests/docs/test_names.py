"""What the pages name is there: modules, functions, files, sections.

And they leave nothing out: what a module does not model is told in docs/fidelity.md, every guest in
README.md, every word a tick may get in docs/walkthrough.md.
"""

import ast
import importlib
import re
from collections.abc import Iterable
from pathlib import Path

import pytest
from doc_blocks import PAGES, ROOT

from kvmtick import guests
from kvmtick.ticks.verdict import Verdict, Where

PACKAGE = ROOT / "src" / "kvmtick"
DOCUMENTS = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]

CODE = re.compile(r"`([^`\n]+)`")
NAME = re.compile(r"kvmtick(?:\.\w+)+")
LINK = re.compile(r"\]\(([^)\s]+)\)")
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
REPOSITORY_PATH = re.compile(r"(?:docs|src|tests|benchmarks|\.ci)/[\w./-]+")
LACKS = re.compile(r"^Not (?:modelled|here)\b", re.MULTILINE)


def resolve(name: str) -> object:
    """The module, class or function `kvmtick.a.b.c`; ImportError or AttributeError if none is."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError as error:
            if error.name is None or not name.startswith(error.name):
                raise
            continue
        for attribute in parts[length:]:
            found = getattr(found, attribute)
        return found
    raise ModuleNotFoundError(name)


def unresolved(text: str) -> list[str]:
    """Names of this package in `code` that lead nowhere."""
    faults = []
    for name in {name for code in CODE.findall(text) for name in NAME.findall(code)}:
        try:
            resolve(name)
        except (ImportError, AttributeError):
            faults.append(name)
    return faults


def anchors(text: str) -> set[str]:
    """The sections of a page, as links write them."""
    titles = re.findall(r"^#+ (.+)$", FENCED.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def dead_links(page: Path, text: str) -> list[str]:
    """Links to files or sections of this repository that are not there."""
    faults = []
    for link in LINK.findall(FENCED.sub("", text)):
        target, _, anchor = link.partition("#")
        if "://" in target:
            continue
        file = page.parent / target if target else page
        found = file.exists()
        if found and anchor:
            found = anchor in anchors(text if file == page else file.read_text(encoding="utf-8"))
        if not found:
            faults.append(link)
    return faults


def missing_paths(text: str) -> list[str]:
    """Files of this repository in `code` that are not there."""
    paths = [path for code in CODE.findall(text) for path in REPOSITORY_PATH.findall(code)]
    return [path for path in paths if not (ROOT / path).exists()]


def modules_that_lack_something() -> list[str]:
    """Modules whose docstring has a list of what they do not model."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        if LACKS.search(docstring):
            parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
            found.append(".".join(parts).removesuffix(".__init__"))
    return found


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: page.name)
def test_names_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert not unresolved(text)
    assert not missing_paths(text)
    assert not dead_links(page, text)


@pytest.mark.parametrize("module", modules_that_lack_something())
def test_fidelity_tells_what_a_module_lacks(module: str) -> None:
    text = (ROOT / "docs" / "fidelity.md").read_text(encoding="utf-8")
    assert f"\n| `{module}` |" in text


def test_fidelity_names_only_modules_that_lack_something() -> None:
    text = (ROOT / "docs" / "fidelity.md").read_text(encoding="utf-8")
    told = re.findall(r"^\| `(kvmtick[.\w]+)` \|", text, re.MULTILINE)
    assert sorted(told) == modules_that_lack_something()


def untold(page: str, words: Iterable[str]) -> list[str]:
    """Words that a page does not have as `code`."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return [word for word in words if f"`{word}`" not in text]


def test_every_guest_is_told() -> None:
    assert not untold("README.md", guests.names())
    assert not untold("CHANGELOG.md", guests.names())


def test_every_verdict_is_told() -> None:
    assert not untold("docs/walkthrough.md", [*Verdict, *Where])


def test_a_wrong_name_is_found() -> None:
    assert unresolved("`kvmtick.irqchip.i8254.Pit.timer_fm`") == [
        "kvmtick.irqchip.i8254.Pit.timer_fm"
    ]
    assert unresolved("`kvmtick.irqchip.i8255`") == ["kvmtick.irqchip.i8255"]
    assert not unresolved("`kvmtick.irqchip.i8254.Pit.timer_fn`")


def test_a_word_that_is_not_told_is_found() -> None:
    assert untold("README.md", ["tick-pic", "tick-hpet"]) == ["tick-hpet"]


def test_a_dead_link_is_found() -> None:
    page = ROOT / "README.md"
    text = "# One title\n[a](docs/none.md) [b](#no-title) [c](#one-title) [d](https://x.org)"
    assert dead_links(page, text) == ["docs/none.md", "#no-title"]
    assert missing_paths("`tests/docs/none.py` and `tests/docs`") == ["tests/docs/none.py"]
