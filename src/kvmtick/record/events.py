"""Which events a recording takes, and through which filters.

Filters follow the threads and timers that are known; the kernel takes a page of text at most, and
what does not fit is recorded unfiltered (`kvm_*`) or not followed (`sched_*`). The timers' own
events and those of work items happen in any thread: they cannot be limited to some VMs.
"""

import mmap
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Final

from kvmtick.host.tracefs import TICK_EVENTS

__all__ = ["NOTHING", "Filters", "events_of", "first_filters"]

KVM_EXIT: Final = "kvm:kvm_exit"
KVM_ENTRY: Final = "kvm:kvm_entry"
APICV: Final = "kvm:kvm_apicv_accept_irq"
CANCEL: Final = "timer:hrtimer_cancel"
SWITCH: Final = "sched:sched_switch"
WAKING: Final = "sched:sched_waking"

NOTHING: Final = "common_pid < 0"
"""Lets nothing through."""
EVERYTHING: Final = "0"
"""What `filter` takes for: no filter."""
_MOST_BYTES: Final = mmap.PAGESIZE - 1


def events_of(*, entries: bool, sched: bool) -> list[str]:
    """The events; `entries`: all entries and exits; `sched`: when threads wait for a CPU."""
    return [
        *TICK_EVENTS,
        APICV,
        CANCEL,
        *([KVM_EXIT] if entries else []),
        *([SWITCH, WAKING] if sched else []),
    ]


def first_filters(functions: Collection[str]) -> dict[str, str]:
    """The filters of a tick's events where the kernel has these functions: it refuses others. An
    event of none of them is not recorded: NOTHING.
    """
    return {event: _of_known(filter_, functions) for event, filter_ in TICK_EVENTS.items()}


def _of_known(filter_: str, functions: Collection[str]) -> str:
    if ".function == " not in filter_:
        return filter_
    terms = filter_.split(" || ")
    return " || ".join(term for term in terms if term.split()[-1] in functions) or NOTHING


class Filters:
    """What each event's filter should be now."""

    def __init__(self, *, entries: bool, only_some: bool) -> None:
        """`only_some`: KVM's events in these threads only."""
        self._entries = entries
        self._only_some = only_some
        self.unfollowed = 0
        """So many threads did not fit into the filters of `sched_*`."""

    def texts(
        self,
        *,
        threads: Iterable[int],
        followed: Iterable[int],
        new: Iterable[int],
        timers: Iterable[int],
    ) -> dict[str, str]:
        """Filters by event. `threads`: all of the VMs; `followed`: workers and vCPUs, the most
        important first; `new`: those of which all entries are wanted, to learn whose vCPU they are.
        """
        own = _within_page(_in_ranges("common_pid", threads)) if self._only_some else ""
        texts = {
            event: _both(own, filter_)
            for event, filter_ in TICK_EVENTS.items()
            if event.startswith("kvm:")
        }
        texts[APICV] = texts[KVM_EXIT] = own or EVERYTHING
        if self._entries:
            texts[KVM_ENTRY] = own or EVERYTHING
        else:
            entries = " || ".join((TICK_EVENTS[KVM_ENTRY], *_in_ranges("common_pid", new)))
            texts[KVM_ENTRY] = _both(own, entries if len(entries) <= _MOST_BYTES else "")
        texts[CANCEL] = _fitting(timers, lambda some: (f"hrtimer == {at:#x}" for at in some))[0]
        followed = list(followed)
        texts[SWITCH], fit = _fitting(followed, _switches)
        texts[WAKING], _ = _fitting(followed, lambda tids: _in_ranges("pid", tids))
        self.unfollowed = len(followed) - fit
        return texts


def _switches(tids: Iterable[int]) -> Iterator[str]:
    tids = list(tids)
    yield from _in_ranges("prev_pid", tids)
    yield from _in_ranges("next_pid", tids)


def _in_ranges(field: str, numbers: Iterable[int]) -> Iterator[str]:
    """Terms that are true for these numbers; a VM's threads mostly follow each other."""
    first = last = None
    for number in [*sorted(set(numbers)), None]:
        if last is not None and number == last + 1:
            last = number
            continue
        if first is not None:
            yield (
                f"{field} == {first}"
                if first == last
                else f"({field} >= {first} && {field} <= {last})"
            )
        first = last = number


def _both(one: str, other: str) -> str:
    if not (one and other):
        return one or other or EVERYTHING
    both = f"({one}) && ({other})"
    return both if len(both) <= _MOST_BYTES else other


def _within_page(terms: Iterable[str]) -> str:
    """Any of these terms; empty if that is too long to be a filter."""
    text = " || ".join(terms) or NOTHING
    return text if len(text) <= _MOST_BYTES - len(max(TICK_EVENTS.values(), key=len)) else ""


def _fitting(
    numbers: Iterable[int], terms: Callable[[list[int]], Iterable[str]]
) -> tuple[str, int]:
    """A filter for as many numbers as fit, and how many that are."""
    wanted = list(numbers)
    fit = len(wanted)
    while len(text := " || ".join(terms(wanted[:fit]))) > _MOST_BYTES:
        fit = fit * 9 // 10
    return text or NOTHING, fit
