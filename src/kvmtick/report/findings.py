"""Plain findings, each with its remedy: what a person can act on.

Every kind is told in docs/reporting.md. No finding names a cause that the trace does not show.
"""

from collections.abc import Iterator, Sequence

from kvmtick.report.data import Finding, Severity
from kvmtick.report.facts import SourceFacts, TraceFacts, VmFacts
from kvmtick.report.findings_held import held_findings
from kvmtick.report.findings_trace import trace_findings
from kvmtick.report.phrases import DISCARD, REPLAY, count, finding, rate, share, title
from kvmtick.report.source import MIN_PERIOD_NS
from kvmtick.ticks.verdict import Path, Verdict
from kvmtick.timing.host import format_ns
from kvmtick.trace.events import ApicvInhibitReason

__all__ = ["findings_of"]

FEW = 0.001
"""Up to 1 tick in 1,000: a busy host does that, no guest minds."""
FAST_HZ = 2_000
"""Ticks of one VM above which its kvm-pit thread costs a noticeable part of a CPU: 5,000/s, which
KVM allows, took more than 10 % of one (Firecracker issue 2777)."""
DRIFT_PPM = 500.0
"""As much as NTP can correct (adjtimex(2): 500 ppm)."""
NEVER = 10
"""So many ticks that wait behind one that was not acknowledged are no coincidence."""
MASKED_FOR_GOOD = 0.99
"""Masked that often: the guest does not use the timer."""

_EFFECTS = ("coalesced", "replayed", "drift")
"""What came of it is told after why."""
_ORDER = {Severity.PROBLEM: 0, Severity.NOTICE: 1, Severity.GOOD: 2}


def findings_of(trace: TraceFacts, vms: Sequence[VmFacts]) -> list[Finding]:
    """All findings, the most important first."""
    found = [*trace_findings(trace, vms)]
    for vm in vms:
        mine = [f for source in vm.sources for f in source_findings(vm, source)]
        mine += _inhibits_apicv(vm)
        if vm.sources and not any(f.severity is Severity.PROBLEM for f in mine):
            mine += _healthy(vm)
        found += mine
    return sorted(found, key=lambda f: (_ORDER[f.severity], f.kind in _EFFECTS, -f.ticks))


def source_findings(vm: VmFacts, source: SourceFacts) -> Iterator[Finding]:
    """Findings about one timer."""
    yield from held_findings(vm, source)
    yield from _replayed(vm, source)
    yield from _lost(vm, source)
    yield from _dropped(vm, source)
    yield from _masked(vm, source)
    yield from _stopped(vm, source)
    yield from _clamped(vm, source)
    yield from _fast(vm, source)
    yield from _drift(vm, source)


def _severity(source: SourceFacts, ticks: int) -> Severity:
    """A few ticks are worth a notice."""
    few = ticks <= FEW * source.report.ticks.expired
    return Severity.NOTICE if few else Severity.PROBLEM


def _replayed(vm: VmFacts, source: SourceFacts) -> Iterator[Finding]:
    run = source.lives.runs[Verdict.REINJECTED]
    if not run.rows:
        return
    span = format_ns(run.longest_ns)
    yield finding(
        vm,
        source,
        "replayed",
        Severity.NOTICE,
        f"{count(run.ticks, 'tick')} of {title(source)} replayed, in {count(run.rows, 'burst')};"
        f" the longest had {run.longest} within {span}: KVM made up for ticks the guest had not"
        " acknowledged in time",
        f"a guest that counts ticks needs them; for one that does not, {DISCARD} drops them",
        run.ticks,
    )


def _lost(vm: VmFacts, source: SourceFacts) -> Iterator[Finding]:
    """Ticks that merged with one before."""
    total = source.lives.runs[Verdict.COALESCED].ticks
    if not total:
        return
    by_place: dict[str, int] = {}
    for (verdict, where, _), ticks in source.lives.details.items():
        if verdict is Verdict.COALESCED:
            by_place[where] = by_place.get(where, 0) + ticks
    places = ", ".join(
        f"{ticks:,} {_PLACES.get(where, 'elsewhere')}"
        for where, ticks in sorted(by_place.items(), key=lambda item: -item[1])
    )
    run = source.lives.runs[Verdict.COALESCED]
    longest = f"; up to {run.longest} in a row" if run.longest > 1 else ""
    yield finding(
        vm,
        source,
        "coalesced",
        _severity(source, total),
        f"{count(total, 'tick')} of {title(source)} lost ({share(total, source)}): merged with one"
        f" before - {places}{longest}",
        _lost_remedy(vm, source),
        total,
    )


_PLACES = {
    "worker": "while the kvm-pit thread had not run yet",
    "pic": "while the PIC's request was still set",
    "ioapic": "while the IOAPIC's request was still set",
    "lapic": "while the local APIC's request was still set",
}


def _lost_remedy(vm: VmFacts, source: SourceFacts) -> str:
    if source.report.source == "lapic":
        return (
            "KVM replays no ticks of a local APIC's timer: have the guest read a clock (kvmclock,"
            " TSC) instead of counting ticks"
        )
    if source.lives.never_acknowledged:
        return "have the guest acknowledge the one it took"
    if vm.reinject:
        return "reinjection is on and does not help here: remove what holds the ticks up"
    if vm.reinject is None:
        return f"if the guest counts ticks, let KVM replay them: {REPLAY}"
    return f"reinjection is off: {REPLAY} replays them"


def _dropped(vm: VmFacts, source: SourceFacts) -> Iterator[Finding]:
    total = source.lives.runs[Verdict.DROPPED].ticks
    if not total:
        return
    reasons = [
        f"{ticks:,}: {why}"
        for (verdict, _, why), ticks in source.lives.details.most_common()
        if verdict is Verdict.DROPPED
    ]
    yield finding(
        vm,
        source,
        "dropped",
        _severity(source, total),
        f"{count(total, 'tick')} of {title(source)} thrown away before the guest got"
        f" {'it' if total == 1 else 'them'} - {'; '.join(reasons[:3])}",
        "what the guest does with its interrupt controllers does this (it masks and unmasks, or"
        " programs the timer anew): it must not count on those ticks",
        total,
    )


def _masked(vm: VmFacts, source: SourceFacts) -> Iterator[Finding]:
    ticks = source.report.ticks
    total = ticks.count(Verdict.MASKED)
    if not total:
        return
    run = source.lives.runs[Verdict.MASKED]
    start = format_ns(run.longest_from_ns - vm.trace.start_ns)
    text = f"the guest masked {count(total, 'tick')} of {title(source)} ({share(total, source)})"
    if total >= MASKED_FOR_GOOD * ticks.expired:
        text += ": it does not use this timer, which still costs the host its ticks"
        remedy = "have the guest stop the timer if it uses another"
    else:
        text += f", up to {run.longest} in a row, for {format_ns(run.longest_ns)} from {start} on"
        remedy = "a masked tick is gone: the guest should unmask sooner, or not count ticks"
    yield finding(vm, source, "masked", Severity.NOTICE, text, remedy, total)


def _stopped(vm: VmFacts, source: SourceFacts) -> Iterator[Finding]:
    """What stood at the end: never acknowledged, or nobody there."""
    last = source.lives.last_arrival
    gone = source.lives.gone
    behind = source.report.ticks.expired - (last.index if last is not None else 0)
    if source.lives.never_acknowledged and last is not None and behind >= NEVER:
        unseen = ""
        if vm.vcpus.last_ns <= (last.inject_ns or 0):
            unseen = " (nothing was seen of it since: it halted, ended or hangs)"
        yield finding(
            vm,
            source,
            "never-acknowledged",
            Severity.PROBLEM,
            f"the guest took tick {last.index} of {title(source)} and never acknowledged it"
            f"{unseen}: {count(behind, 'tick')} behind it never came",
            _NO_ACKNOWLEDGEMENT.get(last.path, _NO_EOI),
            behind,
        )
    elif gone >= NEVER:
        at_ns = vm.vcpus.last_ns - vm.trace.start_ns
        after = f" after {format_ns(at_ns)}" if vm.vcpus.last_ns else ""
        yield finding(
            vm,
            source,
            "stopped",
            Severity.NOTICE,
            f"the last {count(gone, 'tick')} of {title(source)} reached nobody: nothing was seen of"
            f" the guest{after}; it had ended, was paused, or hangs with its interrupts off",
            "if it should run, look at its VMM: is it stopped (ps, virsh domstate)?",
            gone,
        )
    elif source.lives.runs[Verdict.OUTSTANDING].longest >= NEVER:
        waiting = source.lives.runs[Verdict.OUTSTANDING].longest
        yield finding(
            vm,
            source,
            "not-taken-at-the-end",
            Severity.PROBLEM,
            f"the guest ran and took none of the last {count(waiting, 'tick')} of {title(source)}",
            "is it stuck with its interrupts off? Ask its VMM for the registers (info registers)",
            waiting,
        )


_NO_EOI = (
    "the guest's handler must end the interrupt: an EOI to the PIC (OCW2, port 0x20) or to the"
    " local APIC"
)
_NO_ACKNOWLEDGEMENT: dict[Path | None, str] = {
    Path.NMI: "an NMI has no EOI: the guest's handler must poll the PIC (OCW3, port 0x20), or give"
    f" the VM {DISCARD}",
    Path.MSI: f"nothing acknowledges an MSI to the PIT: give the VM {DISCARD}",
}


def _clamped(vm: VmFacts, source: SourceFacts) -> Iterator[Finding]:
    """No count of the PIT gives exactly this period."""
    ticks = source.lives.periods[MIN_PERIOD_NS]
    if not ticks:
        return
    if source.report.source == "pit":
        what = "asked for more than 5,000 ticks a second; KVM gives no more"
    else:
        what = "asked for 5,000 ticks a second or more; KVM gives no more"
    yield finding(
        vm,
        source,
        "clamped",
        Severity.PROBLEM if source.report.source == "pit" else Severity.NOTICE,
        f"the guest {what}: {count(ticks, 'tick')} of {title(source)} came every 200 us",
        "program a slower rate, or allow faster ones on this host (parameter min_timer_period_us of"
        " the module kvm)",
        ticks,
    )


def _fast(vm: VmFacts, source: SourceFacts) -> Iterator[Finding]:
    asked_hz = source.report.asked_hz
    if source.report.source != "pit" or asked_hz is None or asked_hz < FAST_HZ:
        return
    yield finding(
        vm,
        source,
        "flood",
        Severity.NOTICE,
        f"the guest asks the PIT for {rate(asked_hz)}: each wakes kvm-pit/{vm.ticks.pid}, which"
        " is in the host's root cgroup unless it was moved, not in the VM's",
        "put that thread into the VM's cgroup, or give the VM no PIT (Linux guests need none where"
        " there is a local APIC timer)",
        source.report.ticks.expired,
    )


def _drift(vm: VmFacts, source: SourceFacts) -> Iterator[Finding]:
    drift_ppm = source.report.drift_ppm
    if drift_ppm is None or abs(drift_ppm) <= DRIFT_PPM:
        return
    missing = source.lives.missing
    if missing < 1 or missing == source.lives.runs[Verdict.MASKED].ticks:
        return
    slow_s = -drift_ppm / 1e6 * 3600
    yield finding(
        vm,
        source,
        "drift",
        _severity(source, missing) if missing < NEVER else Severity.PROBLEM,
        f"a clock that counts the ticks of {title(source)} is {drift_ppm:+,.0f} ppm off"
        f" ({slow_s:,.1f} s slow in an hour; {source.report.drift_constant})",
        "see what lost the ticks; or have the guest read a clock (kvmclock, TSC, HPET) instead of"
        " counting them",
        missing,
    )


def _inhibits_apicv(vm: VmFacts) -> Iterator[Finding]:
    """KVM says so where its back end minds (AMD's AVIC does, Intel's APICv does not)."""
    if not vm.reinject or not any(s.report.source == "pit" for s in vm.sources):
        return
    if vm.inhibits is None:
        who = "where the host has AMD's AVIC that turns it off for the whole VM"
    elif vm.inhibits == 1 << ApicvInhibitReason.PIT_REINJ:
        who = "that alone turns AVIC off for the whole VM"
    else:
        return
    yield finding(
        vm,
        None,
        "reinject-inhibits-avic",
        Severity.NOTICE,
        f"the PIT replays ticks (reinjection is on): {who}, and each of its interrupts takes a VM"
        " exit",
        f"if the guest needs no replay: {DISCARD}, or KVM_REINJECT_CONTROL 0 in your own VMM",
    )


def _healthy(vm: VmFacts) -> Iterator[Finding]:
    told = []
    for source in vm.sources:
        ticks = source.report.ticks
        reached = ticks.count(Verdict.DELIVERED)
        open_ = ticks.count(Verdict.OUTSTANDING)
        seen = ticks.expired - source.lives.gone
        unknown = ticks.count(Verdict.UNKNOWN)
        bad = seen - reached - (open_ if open_ < NEVER else 0)
        bad -= unknown if unknown <= 1 else 0  # where the trace begins
        if not reached or bad > 2 * FEW * ticks.expired or source.lives.gone > seen:
            return
        text = f"{reached:,} of {count(seen, 'tick')} of {title(source)} reached the guest"
        if source.report.period_ns:
            text += " within their period"
        summary = source.report.histograms["expiry_to_eoi"].summary()
        if summary:
            text += f", expiry to EOI p99 {format_ns(summary['p99'])}"
        told.append(text)
    yield finding(
        vm,
        None,
        "healthy",
        Severity.GOOD,
        "; ".join(told),
        "",
        sum(source.report.ticks.expired for source in vm.sources),
    )
