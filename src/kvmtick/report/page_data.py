"""The ticks of a report as the page's script reads them: columns, small enough for 100,000 ticks.

Of each source the ticks are in order of their expiry. `index` and `expiry` are steps from the tick
before (the first from 0 and from the start of the trace); the other times are offsets to the
expiry, null for a step it never reached. What many ticks share is told once, in `kinds`.
"""

import json
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

from kvmtick.report.data import Phase, Report, SourceReport, VmReport, WorstTick
from kvmtick.report.words import COLOURS, phase_setting, phase_timer
from kvmtick.ticks.tick import Tick

__all__ = ["drawn", "page_data", "phases_of", "script_json"]

_STEPS = ("fired", "work", "accept", "inject", "eoi")


def page_data(report: Report, ids: Iterable[str]) -> dict[str, Any]:
    """Everything the script needs; `ids`: of the elements of the sources, in their order."""
    sources = [(vm, source) for vm in report.vms for source in vm.sources]
    return {
        "start_ns": str(report.start_ns),
        "length_ns": report.end_ns - report.start_ns,
        "colours": {verdict.value: colour for verdict, colour in COLOURS.items()},
        "sources": [
            {
                "id": name,
                **_source(source, report.start_ns),
                "phases": [_phase(phase, report.start_ns) for phase in phases_of(vm, source)],
            }
            for name, (vm, source) in zip(ids, sources, strict=True)
        ],
    }


def drawn(source: SourceReport) -> list[Tick]:
    """The ticks to draw, by expiry: the points, and the worst ones."""
    ticks = {tick.index: tick for tick in source.points}
    ticks.update((worst.tick.index, worst.tick) for worst in source.worst)
    return sorted(ticks.values(), key=lambda tick: (tick.expiry_ns, tick.index))


def phases_of(vm: VmReport, source: SourceReport) -> list[Phase]:
    """How the guest set a timer, if its VM has phases to tell of."""
    if len(vm.phases) < 2:
        return []
    is_pit = source.source == "pit"
    return [p for p in vm.phases if p.source == source.source and (is_pit or p.vcpu == source.vcpu)]


def script_json(value: object) -> str:
    """JSON that can stand inside <script>: nothing in it ends the element or begins a comment."""
    text = json.dumps(value, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _source(source: SourceReport, start_ns: int) -> dict[str, Any]:
    ticks = drawn(source)
    kinds: dict[str, int] = {}
    kind_of = [kinds.setdefault(json.dumps(_kind(tick)), len(kinds)) for tick in ticks]
    return {
        "source": source.source,
        "path": source.ticks.path,
        "period": source.period_ns,
        "kinds": [json.loads(kind) for kind in kinds],
        "kind": kind_of,
        "index": _steps([tick.index for tick in ticks]),
        "expiry": _steps([tick.expiry_ns - start_ns for tick in ticks]),
        **{step: _offsets(ticks, f"{step}_ns") for step in _STEPS},
        "worst": {str(worst.tick.index): _worst(worst) for worst in source.worst},
    }


def _phase(phase: Phase, start_ns: int) -> dict[str, Any]:
    timer = f"{phase_timer(phase)}: " if phase.channel else ""
    return {
        "from": phase.start_ns - start_ns,
        "to": phase.end_ns - start_ns,
        "text": timer + phase_setting(phase),
    }


def _kind(tick: Tick) -> dict[str, Any]:
    return {
        "verdict": tick.verdict.value,
        "where": tick.where.value if tick.where else None,
        "path": tick.path.value if tick.path else None,
        "vcpu": tick.vcpu,
        "vector": tick.vector,
        "period": tick.period_ns,
        "detail": tick.detail,
    }


def _steps(values: list[int]) -> list[int]:
    return [later - earlier for earlier, later in pairwise([0, *values])]


def _offsets(ticks: list[Tick], step: str) -> list[int | None]:
    times: list[int | None] = [getattr(tick, step) for tick in ticks]
    return [
        None if ts_ns is None else ts_ns - tick.expiry_ns
        for ts_ns, tick in zip(times, ticks, strict=True)
    ]


def _worst(worst: WorstTick) -> dict[str, Any]:
    expiry_ns = worst.tick.expiry_ns
    story = [
        [line.ts_ns - expiry_ns, line.thread, line.event, line.text, line.what]
        for line in worst.story
    ]
    return {"held_up": worst.held_up, "story": story}
