"""The page in headless Chromium: it draws, zooms, filters, and tells the story of a tick."""

from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from chromium import Browser, chromium
from made_reports import PERIOD_NS, made_phase, made_report
from test_page_text import HOSTILE, hostile

from kvmtick.cli import main
from kvmtick.report.build import build
from kvmtick.report.data import Report
from kvmtick.report.page import write_page
from kvmtick.report.words import COLOURS
from kvmtick.ticks.tick import Tick
from kvmtick.ticks.verdict import Verdict
from kvmtick.timing.host import format_ns
from kvmtick.trace.reading import open_trace

Open = Callable[[Report], Browser]

PIXELS = """
const [number, colour] = arguments;
const { canvas } = kvmtick.timelines[number];
const copy = new OffscreenCanvas(canvas.width, canvas.height);
const pen = copy.getContext("2d", { willReadFrequently: true });
pen.drawImage(canvas, 0, 0);
const { data } = pen.getImageData(0, 0, canvas.width, canvas.height);
const wanted = [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16));
let count = 0;
for (let at = 0; at < data.length; at += 4) {
  const same = wanted.every((value, n) => Math.abs(data[at + n] - value) < 3);
  if (same && data[at + 3] === 255) count++;
}
return count;
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as made:
        yield made


@pytest.fixture
def open_report(browser: Browser, tmp_path: Path) -> Iterator[Open]:
    """Opens a report's page; at the end: no complaint on the console, nothing else loaded."""

    def open_it(report: Report) -> Browser:
        with (tmp_path / "page.html").open("wb") as file:
            write_page(report, file)
        browser.open(tmp_path / "page.html")
        return browser

    yield open_it
    assert browser.complaints() == []
    assert browser.requests() == [(tmp_path / "page.html").as_uri()]


def shown(browser: Browser) -> tuple[float, float]:
    """The time that the first timeline shows, in ns."""
    start, end = browser.run("return [line.from, line.to]")
    return start, end


def place(browser: Browser, index: int) -> tuple[float, float]:
    """Where a tick is drawn."""
    at = browser.run("return line.place(arguments[0])", index)
    assert at, f"tick {index} is not drawn"
    return at["x"], at["y"]


def hops_of(tick: Tick) -> list[str]:
    """The durations its story must tell."""
    steps = (tick.fired_ns, tick.work_ns, tick.accept_ns, tick.inject_ns, tick.eoi_ns)
    times = [tick.expiry_ns, *(ts_ns for ts_ns in steps if ts_ns is not None)]
    return [format_ns(b - a) for a, b in pairwise(times)]


def test_every_source_has_marks_of_every_verdict(open_report: Open) -> None:
    report = made_report(200, vms=2)
    browser = open_report(report)
    expected = Counter(t.verdict.value for t in report.vms[0].sources[0].points)
    assert len(expected) == len(Verdict)
    for number in range(2):
        drawn = browser.run(
            "return Object.fromEntries(kvmtick.timelines[arguments[0]].drawn)", number
        )
        assert drawn == expected
        for verdict, colour in COLOURS.items():
            assert browser.run(PIXELS, number, colour) > 4, (number, verdict)
    assert browser.run(PIXELS, 0, "#12fe34") == 0


def test_a_click_on_a_phase_shows_it(open_report: Open) -> None:
    report = made_report(200)
    report.vms[0].phases = [
        made_phase(10 * PERIOD_NS, 30 * PERIOD_NS),
        made_phase(40 * PERIOD_NS, 60 * PERIOD_NS),
    ]
    browser = open_report(report)
    browser.run("document.querySelectorAll('button[data-of]')[1].click()")
    browser.settle()
    assert shown(browser) == (39 * PERIOD_NS, 61 * PERIOD_NS)


def test_the_time_since_the_tick_before(open_report: Open) -> None:
    report = made_report(200)
    points = report.vms[0].sources[0].points
    report.vms[0].sources[0].points = [*points[20:30], *points[100:]]
    browser = open_report(report)
    browser.run(
        "const select = document.querySelector('select'); select.value = 'interval';"
        "select.dispatchEvent(new Event('change'))"
    )
    browser.settle()
    told = browser.run("return [...line.ticks.interval].map((ns) => Number.isNaN(ns) ? -1 : ns)")
    # of the first, and where ticks are left out, nobody knows; 8 and 14, the worst, are drawn too
    assert [told[at] for at in (0, 1, 2, 12)] == [-1] * 4
    assert set(told[3:12]) | set(told[13:]) == {PERIOD_NS}
    assert place(browser, 105)[1] == place(browser, 150)[1]


def test_a_drag_zooms_and_a_double_click_shows_all_again(open_report: Open) -> None:
    browser = open_report(made_report(200))
    whole = shown(browser)
    assert whole == (0, 201 * PERIOD_NS)
    label = browser.text(".range")
    (x1, y), (x2, _) = place(browser, 51), place(browser, 101)
    browser.mouse((x1, y), (x2, y))
    start, end = shown(browser)
    pixel_ns = (whole[1] - whole[0]) / 800
    assert abs(start - 51 * PERIOD_NS) < 3 * pixel_ns
    assert abs(end - 101 * PERIOD_NS) < 3 * pixel_ns
    assert browser.text(".range") != label
    assert 48 <= sum(browser.run("return [...line.drawn.values()]")) <= 53

    browser.run(
        "line.canvas.dispatchEvent(new MouseEvent('dblclick', {bubbles: true}))",
    )
    browser.settle()
    assert shown(browser) == whole
    assert browser.text(".range") == label


def test_buttons_and_keys_zoom_and_move(open_report: Open) -> None:
    browser = open_report(made_report(200))
    whole = shown(browser)
    browser.find("button.in").click()
    browser.settle()
    half = shown(browser)
    assert half[1] - half[0] == pytest.approx((whole[1] - whole[0]) / 2)
    browser.find("button.right").click()
    browser.settle()
    assert shown(browser)[0] > half[0]
    browser.keys("-", "-")
    assert shown(browser) == whole
    browser.keys("+")
    assert shown(browser) == half
    browser.keys("0")
    assert shown(browser) == whole


@pytest.mark.parametrize("index", [3, 8, 12, 14, 18])
def test_a_click_on_a_tick_tells_its_own_story(open_report: Open, index: int) -> None:
    report = made_report(200)
    tick = report.vms[0].sources[0].points[index - 1]
    assert tick.index == index
    browser = open_report(report)
    assert f"Tick {index}" not in browser.text(".story")
    browser.run("line.zoom(0, 25 * arguments[0])", PERIOD_NS)
    browser.settle()
    browser.mouse(place(browser, index))
    story = browser.text(".story")
    where = f"{tick.verdict.value} at {tick.where.value}" if tick.where else tick.verdict.value
    assert story.startswith(f"Tick {index} {where}")
    for took in hops_of(tick):
        assert took in story
    assert f"trace time {tick.expiry_ns // 10**9}.{tick.expiry_ns % 10**9:09} s" in story
    assert ("it never reached the guest" in story) == (tick.inject_ns is None)
    assert tick.detail in story
    if tick.inject_ns is not None:
        assert "VM entry with vector 0x20" in story
        assert "path pic vCPU 0" in story


def test_a_click_beside_all_ticks_tells_nothing(open_report: Open) -> None:
    browser = open_report(made_report(200))
    before = browser.text(".story")
    x, _ = place(browser, 100)
    browser.mouse((x, 20))
    assert browser.text(".story") == before


def test_the_worst_are_listed_and_lead_to_their_events(open_report: Open) -> None:
    browser = open_report(made_report(200))
    browser.find("button[data-tick='14']").click()
    browser.settle()
    start, end = shown(browser)
    assert start < 14 * PERIOD_NS < end
    assert end - start < 30 * PERIOD_NS
    story = browser.text(".story")
    assert story.startswith("Tick 14 coalesced at pic")
    assert "make-77 held up tick 14 for 3.1 ms" in story
    assert "sched_kthread_work_execute_start: work struct 0: function pit_do_work" in story
    assert "kvm-pit/1000-1002" in browser.text(".hops tr:nth-child(3)")
    assert "make-77" not in browser.text(".hops")


def test_arrow_keys_go_from_tick_to_tick(open_report: Open) -> None:
    from selenium.webdriver.common.keys import Keys

    browser = open_report(made_report(200))
    browser.keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert browser.text(".story").startswith("Tick 3 delivered")
    browser.keys(Keys.ARROW_LEFT)
    assert browser.text(".story").startswith("Tick 2 delivered")


def test_the_legend_hides_a_verdict_and_shows_it_again(open_report: Open) -> None:
    browser = open_report(made_report(200))
    colour = COLOURS[Verdict.LATE]
    button = browser.find("button[data-verdict='late']")
    assert browser.run(PIXELS, 0, colour) > 0
    where = place(browser, 8)
    button.click()
    browser.settle()
    assert button.get_attribute("aria-pressed") == "false"
    assert browser.run(PIXELS, 0, colour) == 0
    assert browser.run("return line.place(8)") is None
    before = browser.text(".story")
    browser.mouse(where)
    assert browser.text(".story") == before
    assert browser.run(PIXELS, 0, COLOURS[Verdict.REINJECTED]) > 0
    button.click()
    browser.settle()
    assert browser.run(PIXELS, 0, colour) > 0


def test_hovering_tells_a_tick(open_report: Open) -> None:
    browser = open_report(made_report(200))
    assert not browser.find(".tip").is_displayed()
    x, y = place(browser, 8)
    browser.run("line.hover(arguments[0], arguments[1])", x, y)
    assert browser.text(".tip").startswith("tick 8: late, 1.52 ms to VM entry")
    browser.run("line.hover(-99, -99)")
    assert not browser.find(".tip").is_displayed()


def test_latencies_up_to_the_eoi(open_report: Open) -> None:
    browser = open_report(made_report(200))
    _, inject_y = place(browser, 3)
    browser.run(
        "const select = line.root.querySelector('select'); select.value = 'eoi';"
        "select.dispatchEvent(new Event('change'))"
    )
    _, eoi_y = place(browser, 3)
    assert eoi_y < inject_y


def test_hostile_names_are_names(open_report: Open) -> None:
    browser = open_report(made_report(200, words=hostile))
    for selector in ("h2 + ul", "section h2", "main > ul", ".notes"):
        assert HOSTILE in browser.text(selector)
    for index in (8, 14):
        browser.find(f"button[data-tick='{index}']").click()
        assert HOSTILE in browser.text(".story")
        assert HOSTILE in browser.text(".story .events")
    assert browser.run("return window.hacked") is None
    assert browser.run("return document.querySelectorAll('img, script[src]').length") == 0


def test_the_policy_stops_what_would_get_in(browser: Browser, tmp_path: Path) -> None:
    text = tmp_path / "page.html"
    with text.open("wb") as file:
        write_page(made_report(60), file)
    inside = "</main><img src='http://127.0.0.1:9/x' onerror='hacked=1'><script>hacked=1</script>"
    text.write_text(text.read_text(encoding="utf-8").replace("</main>", inside), encoding="utf-8")
    browser.open(text)
    browser.settle()
    assert browser.run("return window.hacked") is None
    assert browser.requests() == [text.as_uri()]
    complaints = browser.complaints()
    assert complaints
    assert all("Content Security Policy" in complaint for complaint in complaints)


def test_dark_and_light(open_report: Open) -> None:
    browser = open_report(made_report(60))
    seen = {}
    for scheme in ("light", "dark"):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        browser.settle()
        ink = browser.run("return getComputedStyle(document.body).getPropertyValue('--muted')")
        seen[scheme] = ink
        assert browser.run(PIXELS, 0, ink) > 0, scheme
    browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert seen["light"] != seen["dark"]


def test_twenty_thousand_ticks_are_drawn(open_report: Open) -> None:
    browser = open_report(made_report(20_000))
    assert sum(browser.run("return [...line.drawn.values()]")) == 20_000
    browser.run("line.jump(14)")
    browser.settle()
    assert browser.text(".story").startswith("Tick 14 coalesced")


def test_a_simulated_run_from_end_to_end(open_report: Open, tmp_path: Path) -> None:
    run = ["run", "tick-pic", "--ticks", "200", "--no-reinject", "--fault"]
    recording = tmp_path / "run.ktrace"
    assert main([*run, "worker_delay=exp:400us", "--json", "--trace", str(recording)]) == 0
    with open_trace(recording) as trace:
        report = build(trace, recording)
    [source] = report.vms[0].sources
    assert source.ticks.count(Verdict.COALESCED) > 5
    browser = open_report(report)
    drawn = browser.run("return Object.fromEntries(line.drawn)")
    assert drawn == {verdict: count for verdict, count, _ in source.ticks.rows()}
    worst = source.worst[0]
    browser.find(f"button[data-tick='{worst.tick.index}']").click()
    story = browser.text(".story")
    assert story.startswith(f"Tick {worst.tick.index} ")
    assert worst.held_up in story
    for line in worst.story:
        assert f"{line.event}: {line.text}" in story
    assert len(worst.story) > 5
