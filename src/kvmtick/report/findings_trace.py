"""Findings about the trace: what it lacks, and what cannot be told because of that."""

from collections import Counter
from collections.abc import Iterator, Sequence

from kvmtick.report.data import Finding, Severity
from kvmtick.report.facts import TraceFacts, VmFacts
from kvmtick.report.phrases import count, finding, share, title
from kvmtick.ticks.verdict import Verdict

__all__ = ["trace_findings"]

FEW = 0.001
"""Fewer are not told: a trace that begins in the middle has one or two."""
_MOST_REASONS = 3


def trace_findings(trace: TraceFacts, vms: Sequence[VmFacts]) -> Iterator[Finding]:
    """What is wrong with the trace."""
    if trace.lost:
        yield _of_trace(
            "lost-events",
            f"the kernel lost {count(trace.lost, 'event')} while recording: its buffers were full;"
            " ticks under way at that time are unknown",
            "record again with larger buffers, fewer events or fewer VMs",
        )
    if trace.cut:
        yield _of_trace("cut", trace.cut, "record again if the end matters")
    if trace.unknown:
        yield _of_trace(
            "unknown-lines",
            f"{count(trace.unknown, 'line')} of the text not understood, and left out",
            "if they are events of KVM, timers or work items, tell us their wording",
        )
    for vm in vms:
        yield from _no_ticks(vm)
        for source in vm.sources:
            total = source.report.ticks.count(Verdict.UNKNOWN)
            if total <= max(1, FEW * source.report.ticks.expired):
                continue
            reasons: Counter[str] = Counter()
            for (verdict, _, why), ticks in source.lives.details.items():
                if verdict is Verdict.UNKNOWN:
                    reasons[why] += ticks
            told = "; ".join(f"{n:,}: {why}" for why, n in reasons.most_common(_MOST_REASONS))
            yield finding(
                vm,
                source,
                "unknown",
                Severity.NOTICE,
                f"of {count(total, 'tick')} of {title(source)} ({share(total, source)}) the trace"
                f" cannot tell what became - {told}",
                "record what is missing: kvmtick record takes all that is needed",
                total,
            )


def _of_trace(kind: str, text: str, remedy: str) -> Finding:
    return Finding(kind, Severity.NOTICE, text, remedy)


def _no_ticks(vm: VmFacts) -> Iterator[Finding]:
    if vm.sources:
        return
    yield finding(
        vm,
        None,
        "no-ticks",
        Severity.NOTICE,
        "no timer of KVM's expired for this VM: its guest uses none, or one of its VMM's (HPET,"
        " RTC), which KVM does not see",
        "record for longer, or look at the guest's timer (current_clocksource, /proc/timer_list)",
    )
