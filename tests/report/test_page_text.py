"""The page as text: escaped, well-formed, closed to everything outside, and small."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from made_reports import START_NS, made_report, made_source

from kvmtick.report.page import page_text, write_page
from kvmtick.report.page_data import drawn, page_data, script_json

HOSTILE = "</script><script>hacked=1</script>&<img src=x onerror=hacked=1>'\"`${1}<!--"
VOID = {"meta", "img", "br", "link", "input", "hr"}


def hostile(text: str) -> str:
    """Something a guest's owner could call a VM or a thread."""
    return f"{text} {HOSTILE}"


class Elements(HTMLParser):
    """Which elements a page has; AssertionError where they do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def tags(self) -> list[str]:
        return [tag for tag, _ in self.seen]


def test_elements_nest_also_with_hostile_names() -> None:
    honest = Elements(page_text(made_report(vms=2)))
    attacked = Elements(page_text(made_report(vms=2, words=hostile)))
    assert attacked.tags() == honest.tags()
    assert attacked.tags().count("script") == 2
    handlers = [name for _, attrs in attacked.seen for name in attrs if name.startswith("on")]
    assert handlers == []


def test_the_check_of_elements_can_fail() -> None:
    with pytest.raises(AssertionError):
        Elements(f"<p>{HOSTILE}</p>")


def test_only_what_the_policy_names_by_its_hash_can_run_or_style() -> None:
    text = page_text(made_report())
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', text)
    assert policy
    assert policy[1].startswith("default-src 'none'; ")
    assert "unsafe" not in policy[1]
    for element, directive in (("script", "script-src"), ("style", "style-src")):
        [body] = re.findall(f"<{element}>(.*?)</{element}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
        assert f"{directive} 'sha256-{digest}'" in policy[1]


def test_nothing_is_referred_to_but_the_page_itself() -> None:
    page = Elements(page_text(made_report(vms=2)))
    references = [
        value
        for _, attrs in page.seen
        for name, value in attrs.items()
        if name in ("src", "href", "srcset", "action", "data")
    ]
    assert references
    assert all(str(reference).startswith("#") for reference in references)
    ids = [attrs["id"] for _, attrs in page.seen if "id" in attrs]
    assert {str(reference)[1:] for reference in references} <= set(ids)


def test_json_in_a_script_cannot_end_it() -> None:
    text = script_json({"name": HOSTILE})
    assert not set("<>&") & set(text)
    assert json.loads(text) == {"name": HOSTILE}


def test_the_columns_give_back_the_ticks() -> None:
    report = made_report(60)
    [told] = page_data(report, ["x"])["sources"]
    index, expiry_ns = 0, START_NS
    for position, tick in enumerate(report.vms[0].sources[0].points):
        index += told["index"][position]
        expiry_ns += told["expiry"][position]
        kind = told["kinds"][told["kind"][position]]
        assert (index, expiry_ns) == (tick.index, tick.expiry_ns)
        assert (kind["verdict"], kind["detail"]) == (tick.verdict.value, tick.detail)
        for step in ("fired", "work", "accept", "inject", "eoi"):
            offset, ts_ns = told[step][position], getattr(tick, f"{step}_ns")
            assert ts_ns == (None if offset is None else expiry_ns + offset)


def test_the_worst_are_drawn_even_if_they_are_no_points() -> None:
    source = made_source()
    source.points = source.points[20:40]
    assert [tick.index for tick in drawn(source)] == [8, 14, *range(21, 41)]


def test_it_says_how_many_ticks_are_not_drawn() -> None:
    report = made_report()
    assert "ticks are drawn" not in page_text(report)
    report.vms[0].sources[0].points = report.vms[0].sources[0].points[20:40]
    assert "22 of 200 ticks are drawn" in page_text(report)


def test_numbers_are_there_without_the_script() -> None:
    text = page_text(made_report())
    for part in ("200 ticks expired", "some.ktrace", "pin it elsewhere", "-60,000 ppm", "999.8 us"):
        assert part in text


def test_no_ticks_and_no_vms() -> None:
    report = made_report(vms=2)
    report.vms[0].sources = [made_source(1)]
    report.vms[0].sources[0].points = []
    report.vms[1].sources = []
    assert "No timer of it expired" in page_text(report)
    report.vms = []
    report.findings = []
    Elements(page_text(report))


def test_names_that_are_no_text_can_be_written(tmp_path: Path) -> None:
    with (tmp_path / "x.html").open("wb") as file:
        write_page(made_report(words=lambda text: f"{text}\udcff\0"), file)
    assert "vm-0?" in (tmp_path / "x.html").read_text(encoding="utf-8")


def test_a_tick_takes_some_tens_of_bytes() -> None:
    small, large = (len(page_text(made_report(ticks))) for ticks in (1_000, 11_000))
    assert (large - small) / 10_000 < 60
