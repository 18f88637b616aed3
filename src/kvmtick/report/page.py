"""The report as a page: one file that needs nothing else, from no network and no other file.

Numbers, bars and histograms are there without the script; it draws the timelines and tells of the
tick that is chosen. Names of VMs and threads come from the trace: they are escaped wherever they
stand, and a content security policy lets nothing run or load but what is written here.
"""

import base64
import hashlib
from collections.abc import Iterable
from html import escape
from io import FileIO
from pathlib import Path
from typing import BinaryIO

from kvmtick.report.data import Finding, Phase, Report, SourceReport, VmReport, WorstTick
from kvmtick.report.page_data import drawn, page_data, phases_of, script_json
from kvmtick.report.page_svg import Scale, axis, histogram, verdict_bar
from kvmtick.report.words import (
    COLOURS,
    hop_names,
    phase_outcome,
    phase_setting,
    phase_timer,
    phase_way,
    timer_name,
)
from kvmtick.ticks.tick import Tick
from kvmtick.ticks.verdict import Verdict
from kvmtick.timing.host import format_ns

__all__ = ["page_text", "write_page"]


def write_page(report: Report, file: BinaryIO | FileIO) -> None:
    """Write the page to a binary file."""
    file.write(page_text(report).encode(errors="replace"))


def page_text(report: Report) -> str:
    """The page."""
    style = _own("page.css")
    script = _own("page.js") + _own("page_story.js")
    ids = [_id(v, s) for v, vm in enumerate(report.vms) for s in range(len(vm.sources))]
    data = script_json(page_data(report, ids))
    policy = (
        f"default-src 'none'; style-src '{_sha256(style)}'; script-src '{_sha256(script)}';"
        " base-uri 'none'; form-action 'none'"
    )
    title = f"Ticks of {report.path.name}"
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="generator" content="kvmtick report --html">',
            f"<title>{escape(title)}</title>",
            f"<style>{style}</style>",
            "</head>",
            "<body>",
            f"<header><h1>{escape(title)}</h1>{_recorded(report)}</header>",
            "<main>",
            _findings(report),
            _glance(report),
            *(_vm(vm, number, report.start_ns) for number, vm in enumerate(report.vms)),
            "</main>",
            "<noscript><p>The timelines need JavaScript; all else is above.</p></noscript>",
            f'<script type="application/json" id="data">{data}</script>',
            f"<script>{script}</script>",
            "</body>",
            "</html>",
            "",
        ]
    )


def _own(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _sha256(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


def _id(vm: int, source: int) -> str:
    return f"vm{vm}-source{source}"


# The whole trace.


def _recorded(report: Report) -> str:
    facts = [
        ("from", report.origin, False),
        ("length", format_ns(report.end_ns - report.start_ns), False),
        ("trace time", f"{_seconds(report.start_ns)} to {_seconds(report.end_ns)}", False),
        ("VMs", f"{len(report.vms):,}", False),
        ("events", f"{report.records:,}", False),
        ("lost events", f"{report.lost_events:,}", report.lost_events > 0),
    ]
    if report.unknown_lines:
        facts.append(("lines not understood", f"{report.unknown_lines:,}", True))
    return _facts(facts) + _notes(report.notes)


def _seconds(ts_ns: int) -> str:
    return f"{ts_ns // 1_000_000_000}.{ts_ns % 1_000_000_000 // 1000:06d} s"


_ALARM = ' class="alarm"'


def _facts(facts: Iterable[tuple[str, str, bool]]) -> str:
    """Name, value, and whether it is bad news."""
    items = [
        f"<div{_ALARM if alarm else ''}><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"
        for name, value, alarm in facts
    ]
    return f'<dl class="facts">{"".join(items)}</dl>'


def _notes(notes: list[str]) -> str:
    if not notes:
        return ""
    return f'<ul class="notes">{"".join(f"<li>{escape(note)}</li>" for note in notes)}</ul>'


def _findings(report: Report) -> str:
    items = [_finding(finding, report) for finding in report.findings]
    if not items:
        return "<h2>Findings</h2><p>None.</p>"
    return f'<h2>Findings</h2><ul class="findings">{"".join(items)}</ul>'


def _finding(finding: Finding, report: Report) -> str:
    severity = finding.severity.value
    remedy = (
        f'<p class="remedy"><b>What to do:</b> {escape(finding.remedy)}</p>'
        if finding.remedy
        else ""
    )
    return (
        f'<li class="{severity}"><span class="severity">{severity}</span><div>'
        f"{_whose(finding, report)}<p>{escape(finding.text)}</p>{remedy}</div></li>"
    )


def _whose(finding: Finding, report: Report) -> str:
    """A link to the VM or the timer that a finding is about, if there is one."""
    for number, vm in enumerate(report.vms):
        if finding.pid is None or vm.pid != finding.pid:
            continue
        name, text = f"vm{number}", _vm_title(vm)
        for place, source in enumerate(vm.sources):
            if source.source == finding.source and finding.vcpu in (None, source.vcpu):
                name, text = _id(number, place), f"{text}, {_timer(source)}"
                break
        return f'<p class="whose"><a href="#{name}">{escape(text)}</a></p>'
    return ""


def _glance(report: Report) -> str:
    """All sources in one table; one source alone needs none."""
    rows = [
        f'<tr><td><a href="#{_id(number, place)}">{escape(_vm_title(vm))}</a></td>'
        f"<td>{escape(_timer(source))}</td>"
        f'<td class="n">{_hz(source.asked_hz)}</td><td class="n">{_hz(source.got_hz)}</td>'
        f'<td class="n">{source.ticks.expired:,}</td>'
        f'<td class="n">{source.ticks.count(Verdict.DELIVERED):,}</td>'
        f'<td class="n">{_p99(source)}</td>'
        f'<td class="n">{_ppm(source.drift_ppm)}</td></tr>'
        for number, vm in enumerate(report.vms)
        for place, source in enumerate(vm.sources)
    ]
    if len(rows) < 2:
        return ""
    heads = ("asked", "got", "expired", "delivered", "p99 to EOI", "clock off by")
    return (
        '<h2>At a glance</h2><div class="wide"><table><thead><tr><th>VM</th><th>timer</th>'
        + "".join(f'<th class="n">{head}</th>' for head in heads)
        + f"</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _p99(source: SourceReport) -> str:
    values = source.ticks.latency_ns["expiry_to_eoi"]
    return format_ns(values["p99"]) if values else ""


def _hz(rate: float | None) -> str:
    return "" if rate is None else f"{rate:,.6g} Hz"


def _ppm(drift: float | None) -> str:
    return "" if drift is None else f"{drift:+,.6g} ppm"


# A VM and its timers.


def _vm(vm: VmReport, number: int, start_ns: int) -> str:
    parts = [_source(source, _id(number, place)) for place, source in enumerate(vm.sources)]
    if not parts:
        parts = ["<p>No timer of it expired.</p>"]
    return (
        f'<section id="vm{number}"><h2>{escape(vm.name)} <small>{_pid(vm)}</small></h2>'
        f"{_notes(vm.notes)}{_phases(vm, number, start_ns)}{''.join(parts)}</section>"
    )


def _phases(vm: VmReport, number: int, start_ns: int) -> str:
    """How the guest set its timers; one setting alone needs no table."""
    if len(vm.phases) < 2:
        return ""
    names = {
        id(phase): _id(number, place)
        for place, source in enumerate(vm.sources)
        for phase in phases_of(vm, source)
    }
    rows = [_phase(phase, names.get(id(phase), ""), start_ns) for phase in vm.phases]
    heads = ("timer", "set to", "ticks and readings", "by way of")
    return (
        '<section class="card"><h4>How the guest set its timers <small>by the time since the trace'
        ' began; a click shows the stretch below</small></h4><div class="wide"><table><thead><tr>'
        '<th class="n">from</th><th class="n">to</th>'
        + "".join(f"<th>{head}</th>" for head in heads)
        + '<th class="n">from tick to tick</th><th class="n">most</th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div></section>"
    )


def _phase(phase: Phase, name: str, start_ns: int) -> str:
    from_ns, to_ns = phase.start_ns - start_ns, phase.end_ns - start_ns
    timer = escape(phase_timer(phase))
    if name:
        timer = f'<button data-of="{name}" data-from="{from_ns}" data-to="{to_ns}">{timer}</button>'
    words = (phase_setting(phase), phase_outcome(phase), phase_way(phase))
    intervals = phase.intervals.summary()
    return (
        f'<tr><td class="n">{format_ns(from_ns)}</td><td class="n">{format_ns(to_ns)}</td>'
        f"<td>{timer}</td>"
        + "".join(f"<td>{escape(word)}</td>" for word in words)
        + "".join(
            f'<td class="n">{format_ns(intervals[key]) if intervals else ""}</td>'
            for key in ("p50", "max")
        )
        + "</tr>"
    )


def _pid(vm: VmReport) -> str:
    return f"process {vm.pid}" if vm.pid else ""


def _vm_title(vm: VmReport) -> str:
    return f"{vm.name} ({vm.pid})" if vm.pid else vm.name


def _timer(source: SourceReport) -> str:
    return timer_name(source.source, source.vcpu)


def _source(source: SourceReport, name: str) -> str:
    return (
        f'<article id="{name}"><h3>{escape(_timer(source))}'
        f" <small>by way of {escape(source.ticks.path)}</small></h3>"
        f"{_rates(source)}"
        f'<div class="two"><section class="card">{_verdicts(source)}</section>'
        f'<section class="card">{_latency(source)}</section></div>'
        f'<div class="main"><section class="card">{_timeline(source)}</section>'
        f'<section class="card story" aria-live="polite">{_HINT}</section></div>'
        f"{_worst(source)}</article>"
    )


_HINT = '<h4>The story of a tick</h4><p class="hint">Click on a mark in the timeline.</p>'


def _rates(source: SourceReport) -> str:
    facts = [("period", "one-shot", False)]
    if source.period_ns is not None:
        facts = [("period", format_ns(source.period_ns), False)]
    if source.asked_hz is not None:
        facts.append(("asked", _hz(source.asked_hz), False))
    if source.got_hz is not None:
        facts.append(("got", _hz(source.got_hz), False))
    if source.drift_ppm is not None:
        told = _ppm(source.drift_ppm)
        if source.drift_constant:
            told += f" ({source.drift_constant})"
        facts.append(("a clock of these ticks is off by", told, False))
    if source.ticks.extra:
        facts.append(("injections of no tick", f"{source.ticks.extra:,}", False))
    return _facts(facts)


def _verdicts(source: SourceReport) -> str:
    ticks = source.ticks
    rows = [
        f'<tr><td><button data-verdict="{word}" aria-pressed="true" title="show or hide">'
        f"{_swatch(Verdict(word))}{word}</button></td>"
        f'<td class="n">{count:,}</td><td class="n">{_share(count, ticks.expired)}</td>'
        f"<td><small>{escape(meaning)}</small></td></tr>"
        for word, count, meaning in ticks.rows()
        if count
    ]
    return (
        f"<h4>{ticks.expired:,} ticks expired</h4>{verdict_bar(ticks)}"
        f"<table><tbody>{''.join(rows)}</tbody></table>"
    )


def _share(count: int, whole: int) -> str:
    return f"{100 * count / whole:.3g} %" if whole else ""


def _swatch(verdict: Verdict) -> str:
    """The verdict's mark, as the timeline draws it."""
    shape = {
        Verdict.DELIVERED: '<circle cx="6.5" cy="6.5" r="5"/>',
        Verdict.LATE: '<path d="M6.5 1 12.5 12H.5z"/>',
        Verdict.REINJECTED: '<path d="M6.5 0 13 6.5 6.5 13 0 6.5z"/>',
    }.get(verdict, '<path d="M2 2h9v9H2z"/>')
    return f'<svg viewBox="0 0 13 13" aria-hidden="true" fill="{COLOURS[verdict]}">{shape}</svg>'


def _latency(source: SourceReport) -> str:
    names = hop_names(source.source, source.ticks.path)
    filled = {hop: h for hop, h in source.histograms.items() if len(h)}
    if not filled:
        return "<h4>Latency</h4><p>No tick reached the guest.</p>"
    scale = Scale(filled.values())
    rows = [
        f"<tr><td>{escape(_arrow(names[hop]))}</td><td>{histogram(latency, scale)}</td>"
        + "".join(f'<td class="n">{format_ns(v)}</td>' for v in latency.summary().values())
        + "</tr>"
        for hop, latency in filled.items()
    ]
    heads = "".join(
        f'<th class="n"><svg class="key" aria-hidden="true"><line class="{name}" x1="50%" x2="50%"'
        f' y2="100%"/></svg>{name}</th>'
        for name in ("p50", "p99", "max")
    )
    last = f'<tr><td></td><td>{axis(scale)}</td><td colspan="3"></td></tr>'
    return (
        '<h4>Latency per hop <small>both scales are logarithmic</small></h4><div class="wide">'
        '<table class="latency"><thead><tr><th>hop</th><th>ticks by latency</th>'
        f"{heads}</tr></thead><tbody>{''.join(rows)}{last}</tbody></table></div>"
    )


def _arrow(name: str) -> str:
    return name.replace("->", "\N{RIGHTWARDS ARROW}")


def _timeline(source: SourceReport) -> str:
    ticks = drawn(source)
    left_out = ""
    if len(ticks) < source.ticks.expired:
        left_out = (
            f'<p class="left-out">{len(ticks):,} of {source.ticks.expired:,} ticks are drawn.'
            " Counts and histograms cover all.</p>"
        )
    return (
        "<h4>Timeline <small>a mark per tick: when it was due, and how long it took</small></h4>"
        f'{left_out}<div class="tools"><label>show <select>'
        '<option value="inject">time to VM entry</option>'
        '<option value="eoi">time to the guest\'s EOI</option>'
        '<option value="interval">time since the tick before</option>'
        f'</select></label>{_BUTTONS}<span class="range"></span></div>'
        '<div class="plot"><canvas tabindex="0" role="img"'
        f' aria-label="timeline of {len(ticks):,} ticks"></canvas>'
        '<div class="tip" hidden></div></div>'
        f'<p class="keys">{_KEYS}</p>'
    )


_BUTTONS = "".join(
    f'<button class="{name}" title="{title}">{text}</button>'
    for name, title, text in (
        ("in", "zoom in", "+"),
        ("out", "zoom out", "\N{MINUS SIGN}"),
        ("left", "earlier", "\N{LEFTWARDS ARROW}"),
        ("right", "later", "\N{RIGHTWARDS ARROW}"),
        ("reset", "the whole trace", "all"),
    )
)
_KEYS = (
    "Drag: zoom in. Double-click: all. Shift and drag, or the strip below: move. Ctrl and wheel:"
    " zoom. Keys: arrows for the next tick, with Shift to move; + and \N{MINUS SIGN}; 0."
)


def _worst(source: SourceReport) -> str:
    if not source.worst:
        return ""
    rows = [_worst_row(worst) for worst in source.worst]
    return (
        '<section class="card"><h4>The worst ticks</h4><div class="wide"><table><thead><tr>'
        '<th class="n">tick</th><th>verdict</th><th class="n">to VM entry</th><th>held up by</th>'
        f"</tr></thead><tbody>{''.join(rows)}</tbody></table></div></section>"
    )


def _worst_row(worst: WorstTick) -> str:
    tick = worst.tick
    where = f" at {tick.where.value}" if tick.where else ""
    return (
        f'<tr><td class="n"><button data-tick="{tick.index}">{tick.index:,}</button></td>'
        f'<td>{tick.verdict.value}{where}</td><td class="n">{_latency_of(tick)}</td>'
        f"<td>{escape(worst.held_up)}</td></tr>"
    )


def _latency_of(tick: Tick) -> str:
    return "never" if tick.inject_ns is None else format_ns(tick.inject_ns - tick.expiry_ns)
