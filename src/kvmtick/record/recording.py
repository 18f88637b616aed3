"""A recording: a trace instance of our own, whose pages go into a `.ktrace` file as they come.

    recording = Recording(tracefs, HostVms(), Settings(for_ns=10**10))
    recording.run(path)
    print(recording.summary())

One thread sleeps until a buffer is a quarter full or a second is over, empties the buffers into the
file, and now and then looks for new VMs and threads, for which filters are renewed. Nothing is
decoded; `kvmtick.record.tally` counts the ticks.

Not modelled: CPUs that come online while it records; a VM that ended before anybody looked.
"""

import os
import select
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol

from kvmtick.abi.closing import Closing
from kvmtick.abi.errors import HostError
from kvmtick.host.tracefs import Instance, Lost, Tracefs
from kvmtick.host.vms import HostVm, HostVms
from kvmtick.record.events import NOTHING, Filters, events_of, first_filters
from kvmtick.record.out_file import OutFile
from kvmtick.record.tally import Tally
from kvmtick.trace.events import FUNCTIONS
from kvmtick.trace.formats import parse_fields
from kvmtick.trace.ktrace import Header, KtraceWriter
from kvmtick.trace.vms import VmInfo

__all__ = ["Recording", "Settings", "Summary", "VmSummary", "Watcher", "default_buffer_kib"]

LONGEST_SLEEP_S: Final = 1.0
WAKE_PERCENT: Final = 25
"""So full a CPU's buffer may become before it is emptied."""
PAGE_KIB: Final = 64
"""Reading few large pages costs half of what many small ones do."""
SETTLED_NS: Final = 100_000_000
"""An event is in the buffer at the latest so long after its time, also where the host of a
virtual machine takes its CPUs away.
"""
FIRST_SCAN_S: Final = 0.3
SCAN_EVERY_S: Final = 1.0
SHOW_EVERY_S: Final = 1.0
NAMES_EVERY_S: Final = 5.0
NICE: Final = -10

ROOM_BYTES: Final = 256
"""A page with less room than that is full: no event that we record is longer."""

MOST_BUFFER_KIB: Final = 16 << 10
LEAST_BUFFER_KIB: Final = 2 << 10
ALL_BUFFERS_KIB: Final = 512 << 10

_LENGTH: Final = (1 << 27) - 1
_COUNT_STORED: Final = 1 << 30
_COUNT_BYTES: Final = 8
"""Of a page's `commit` (`kvmtick.trace.pages`)."""

NEEDED: Final = ("kvm:kvm_eoi", "timer:hrtimer_expire_entry", "timer:hrtimer_start")


def default_buffer_kib(cpus: int) -> int:
    """For each CPU 16 MiB, or its share of 512 MiB if that is less, and at least 2 MiB.

    10 VMs at 1 kHz on two CPUs fill 16 MiB in two seconds and more.
    """
    return max(LEAST_BUFFER_KIB, min(MOST_BUFFER_KIB, ALL_BUFFERS_KIB // cpus))


@dataclass(frozen=True, slots=True)
class Settings:
    """What to record."""

    for_ns: int | None = None
    """How long; None: until `Recording.stop`."""
    only_some: bool = False
    """Only the VMs that `HostVms` is limited to."""
    entries: bool = False
    """All VM entries and exits."""
    sched: bool = True
    """When workers and vCPUs wait for a CPU."""
    buffer_kib: int | None = None
    """For each CPU; None: `default_buffer_kib`."""


@dataclass(frozen=True, slots=True)
class VmSummary:
    """One VM that was recorded."""

    info: VmInfo
    ticks: Mapping[str, int]
    """Expiries by source (`pit`, `lapic`)."""


@dataclass(frozen=True, slots=True)
class Summary:
    """What a recording has."""

    elapsed_ns: int
    events: int
    lost: Lost
    size_bytes: int
    cpu_ns: int
    """CPU time the recorder took, with all its threads."""
    vms: list[VmSummary]
    unowned_ticks: int
    """Expiries of timers of which nobody knows whose they are: a LAPIC timer that goes on from
    before the recording, or one of a VM that was not asked for.
    """
    missing: list[str]
    """Events that this kernel does not have."""
    unfollowed: int
    """Threads of which nobody knows when they waited for a CPU: too many for a filter."""

    @property
    def ticks(self) -> int:
        """Expiries of the VMs' timers."""
        return sum(sum(vm.ticks.values()) for vm in self.vms)

    @property
    def cpu_share(self) -> float:
        """CPU time by elapsed time: 0.1 is a tenth of one CPU."""
        return self.cpu_ns / self.elapsed_ns if self.elapsed_ns else 0.0


class Watcher(Protocol):
    """Somebody who looks while it records."""

    def window_s(self, now_s: float) -> float:
        """How long a sample is wanted now; 0: none."""

    def sample(self, recording: "Recording", pages: list[tuple[int, bytes]]) -> None:
        """All that was recorded in a short while."""

    def show(self, recording: "Recording") -> None:
        """A second is over."""


@dataclass(slots=True)
class _State:
    """What is there while it runs."""

    instance: Instance
    file: OutFile
    writer: KtraceWriter
    start_ns: int
    cpu_start_ns: int
    scan_at_s: float
    names_at_s: float
    filters: dict[str, str]
    end_ns: int = 0
    """When it was stopped; 0: it runs."""
    named: set[int] = field(default_factory=set)
    told_changes: int = -1


class Recording(Closing):
    """One recording; `run` makes it, `summary` tells of it at any time."""

    def __init__(self, tracefs: Tracefs, vms: HostVms, settings: Settings) -> None:
        """Raises `HostError` where this kernel's trace cannot be read."""
        self.vms = vms
        self._tracefs = tracefs
        self._settings = settings
        wanted = events_of(entries=settings.entries, sched=settings.sched)
        for event in NEEDED:
            if not tracefs.has_event(event):
                what = f"this kernel has no trace event {event}"
                raise HostError(what, "load KVM first: modprobe kvm_intel, or kvm_amd")
        self.functions = tracefs.functions(*FUNCTIONS)
        self._first_filters = first_filters(self.functions.values())
        self.events = [
            event
            for event in wanted
            if tracefs.has_event(event) and self._first_filters.get(event) != NOTHING
        ]
        self.missing = [event for event in wanted if event not in self.events]
        self.formats = {event: tracefs.format_text(event) for event in self.events}
        self.header_page = tracefs.read("events/header_page")
        self._end_of = _end_finder(self.header_page)
        self._filters = Filters(entries=settings.entries, only_some=settings.only_some)
        by_name = {event.partition(":")[2]: text for event, text in self.formats.items()}
        self.tally = Tally(by_name, self.functions)
        self._state: _State | None = None
        self._stop_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._stopping = False
        self._last = Summary(0, 0, Lost(0, 0, 0), 0, 0, [], 0, self.missing, 0)

    def stop(self) -> None:
        """End it soon; for any thread, and for signal handlers."""
        self._stopping = True
        if self._stop_fd >= 0:
            os.eventfd_write(self._stop_fd, 1)

    def run(
        self,
        path: Path,
        watcher: Watcher | None = None,
        started: Callable[[], int] | None = None,
    ) -> None:
        """Record into `path` until the time is over or `stop` is called.

        `started` is called when the kernel records, and gives a descriptor that can be read when
        the recording shall end. Raises `HostError`; what was written until then stays.
        `UnwritableError`: the file cannot be opened.
        """
        with self._tracefs.instance() as instance:
            self._prepare(instance)
            with OutFile(path) as file:
                self._start(instance, file)
                try:
                    ends = [self._stop_fd, *([started()] if started else [])]
                    with _preferred():
                        self._follow(ends, watcher)
                finally:
                    self._finish()

    # The beginning.

    def _prepare(self, instance: Instance) -> None:
        cpus = os.cpu_count() or 1
        kib = self._settings.buffer_kib or default_buffer_kib(cpus)
        try:
            instance.set_buffer_size(kib)
        except HostError as error:
            what = f"{kib} KiB of buffer for each of {cpus} CPUs are refused ({error.what})"
            raise HostError(what, "give a smaller --buffer") from None
        with suppress(HostError):  # kernels before 4.16 wake by their own count
            instance.write("buffer_percent", str(WAKE_PERCENT))
        with suppress(HostError):  # kernels before 6.8 have pages of 4 KiB only
            instance.write("buffer_subbuf_size_kb", str(max(4, min(PAGE_KIB, kib // 16))))
        self.vms.scan(time.monotonic())
        texts = self._texts()
        for event in self.events:
            instance.enable(event, texts.get(event) or self._first_filters.get(event, ""))

    def _header(self) -> Header:
        return Header(
            kind="host",
            header_page=self.header_page,
            formats=list(self.formats.values()),
            functions={hex(address): name for address, name in self.functions.items()},
            start_ns=time.monotonic_ns(),
            origin=" ".join(os.uname()),
            missing=self.missing,
            vms=self.infos(),
        )

    def _start(self, instance: Instance, file: OutFile) -> None:
        header = self._header()
        now_s = time.monotonic()
        self._state = _State(
            instance,
            file,
            KtraceWriter(file, header),
            start_ns=header.start_ns,
            cpu_start_ns=time.process_time_ns(),
            scan_at_s=now_s + FIRST_SCAN_S,
            names_at_s=now_s,
            filters=self._texts(),
        )
        instance.start()

    # While it runs.

    def _follow(self, ends: list[int], watcher: Watcher | None) -> None:
        state = self._running()
        show_at_s = time.monotonic() + SHOW_EVERY_S
        while (sleep_s := self._sleep_s(ends)) > 0:
            state.instance.wait(sleep_s, ends)
            self._take()
            self._look(time.monotonic())
            state.file.flush()
            if watcher is None:
                continue
            self._sample(ends, watcher)
            if time.monotonic() >= show_at_s:
                show_at_s = time.monotonic() + SHOW_EVERY_S
                self._last = self._count()
                watcher.show(self)

    def _sleep_s(self, ends: list[int]) -> float:
        """How long to sleep now; 0: it is over."""
        if self._stopping or any(_can_be_read(fd) for fd in ends):
            return 0
        state, now_ns = self._running(), time.monotonic_ns()
        sleep_s = min(LONGEST_SLEEP_S, max(0.001, state.scan_at_s - now_ns / 1e9))
        if self._settings.for_ns is not None:
            sleep_s = min(sleep_s, (state.start_ns + self._settings.for_ns - now_ns) / 1e9)
        return sleep_s

    def _sample(self, ends: list[int], watcher: Watcher) -> None:
        """A short while's pages for the watcher: the buffers were just emptied."""
        window_s = watcher.window_s(time.monotonic())
        if window_s > 0:
            self._running().instance.wait(window_s, ends)
            watcher.sample(self, self._take())

    def _take(self, *, all_of_it: bool = False) -> list[tuple[int, bytes]]:
        """Empty the buffers into the file; but for `all_of_it`, up to what comes meanwhile."""
        state = self._running()
        settled_ns = time.monotonic_ns() - SETTLED_NS
        write, count, end_of = state.writer.page, self.tally.page, self._end_of
        pages = []
        for cpu, page in state.instance.pages(None if all_of_it else self._is_full):
            cut = page[: end_of(page)]
            write(cpu, cut)
            count(cut)
            pages.append((cpu, cut))
        state.writer.mark(settled_ns)
        return pages

    def _is_full(self, page: bytes) -> bool:
        return self._end_of(page) > len(page) - ROOM_BYTES

    def _look(self, now_s: float) -> None:
        """For new VMs and threads, if it is time."""
        state = self._running()
        if now_s < state.scan_at_s:
            return
        state.scan_at_s = now_s + SCAN_EVERY_S
        self.vms.scan(now_s)
        self._tell(now_s)
        texts = self._texts()
        for event, text in texts.items():
            if event in self.formats and state.filters.get(event) != text:
                state.instance.set_filter(event, text)
        state.filters = texts

    def _tell(self, now_s: float) -> None:
        """What is new of VMs and other threads goes into the file."""
        state = self._running()
        fresh: dict[int, str] = {}
        if now_s >= state.names_at_s:
            state.names_at_s = now_s + NAMES_EVERY_S
            comms = self._tracefs.comms()
            nameless = self.tally.interrupted - state.named
            fresh = {tid: comms[tid] for tid in nameless if tid in comms}
            state.named |= fresh.keys()
        if fresh or state.told_changes != self.vms.changes:
            state.told_changes = self.vms.changes
            state.writer.update(self.infos(), fresh)

    def _texts(self) -> dict[str, str]:
        """The filters that are right now."""
        vms = self.vms.vms.values()
        return self._filters.texts(
            threads=[tid for vm in vms for tid in vm.looks],
            followed=[
                *(tid for vm in vms for tid in vm.workers()),
                *(tid for vm in vms for tid in vm.runners()),
            ],
            new=[tid for vm in vms for tid in vm.new_threads()],
            timers=self.tally.timers,
        )

    # The end.

    def _finish(self) -> None:
        state = self._running()
        try:
            state.instance.stop()
            state.end_ns = time.monotonic_ns()
            self._take(all_of_it=True)
            self.vms.scan(time.monotonic())
            state.names_at_s = 0.0
            self._tell(time.monotonic())
            state.writer.end(state.end_ns, state.instance.lost().total)
            state.file.flush()
        finally:
            self._last = self._count()
            self._state = None

    # For readers.

    def infos(self) -> list[VmInfo]:
        """The VMs, as recordings have them."""
        return [_info(vm) for vm in self.vms.vms.values()]

    def summary(self) -> Summary:
        """What there is by now, not older than a second."""
        return self._last

    def _count(self) -> Summary:
        state = self._running()
        elapsed_ns = (state.end_ns or time.monotonic_ns()) - state.start_ns
        owners = {tid: vm.pid for vm in self.vms.vms.values() for tid in vm.threads}
        ticks: dict[int, dict[str, int]] = {pid: {} for pid in self.vms.vms}
        unowned = 0
        for (tid, source), count in self.tally.by_thread().items():
            pid = owners.get(tid)
            if pid is None:
                unowned += count
            else:
                ticks[pid][source] = ticks[pid].get(source, 0) + count
        return Summary(
            elapsed_ns=elapsed_ns,
            events=state.instance.recorded(),
            lost=state.instance.lost(),
            size_bytes=state.file.size_bytes,
            cpu_ns=time.process_time_ns() - state.cpu_start_ns,
            vms=[VmSummary(_info(vm), ticks[vm.pid]) for vm in self.vms.vms.values()],
            unowned_ticks=unowned,
            missing=self.missing,
            unfollowed=self._filters.unfollowed if self._settings.sched else 0,
        )

    def _running(self) -> _State:
        assert self._state is not None
        return self._state

    def close(self) -> None:
        """Give the descriptor back; harmless when repeated."""
        fd, self._stop_fd = self._stop_fd, -1
        if fd >= 0:
            os.close(fd)


@contextmanager
def _preferred() -> Iterator[None]:
    """A busy host shall not keep us from the buffers until they overflow."""
    before = os.getpriority(os.PRIO_PROCESS, 0)
    try:
        os.setpriority(os.PRIO_PROCESS, 0, min(before, NICE))
    except PermissionError:
        yield
        return
    try:
        yield
    finally:
        os.setpriority(os.PRIO_PROCESS, 0, before)


def _info(vm: HostVm) -> VmInfo:
    return VmInfo(vm.pid, vm.name, dict(vm.threads), dict(vm.vcpus), vm.reinject)


def _end_finder(header_page: str) -> Callable[[bytes], int]:
    """Where the events of a page end, and the count of those missed before it."""
    fields = parse_fields(header_page)
    commit, data = fields["commit"].offset, fields["data"].offset
    unpack = struct.Struct("<I").unpack_from

    def end(page: bytes) -> int:
        value: int = unpack(page, commit)[0]
        return data + (value & _LENGTH) + (_COUNT_BYTES if value & _COUNT_STORED else 0)

    return end


def _can_be_read(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))
