"""The ticks of a VM on the real kernel: its events, read from tracefs while it runs.

    run = vm.run(observer=TickTrace(vm))
    print(run.ticks.summary())

Raw pages of a trace instance of our own are decoded, put in order, cut down to this VM, completed
(`kvmtick.trace.inferred`) and handed to consumers, as a recorder does with the model's. While the
guest runs, a thread only empties the kernel's buffers, for decoding would take the CPU from the
guest: it comes at the end, or when many pages are there. What was lost all the same is a
LOST_EVENTS record, and ticks it may concern are `unknown`.

Not modelled: several runs of one VM in a trace (one `TickTrace` a run); a VM of which other threads
than its vCPUs' drive lines.
"""

import os
import threading
import time
from collections.abc import Iterable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Final

from kvmtick.abi.errors import HostError
from kvmtick.host.kvmdev import pit_worker_tids
from kvmtick.host.tracefs import TICK_EVENTS, Instance, Tracefs, open_tracefs
from kvmtick.ticks.life import TickAssembler
from kvmtick.trace.by_vm import ByVm, Share
from kvmtick.trace.decoder import Decoder, Merge, pid_of
from kvmtick.trace.events import FUNCTIONS, ApicvInhibitReason, Event, Record
from kvmtick.trace.formats import FormatError
from kvmtick.trace.inferred import Inferred
from kvmtick.trace.recorder import Consumer
from kvmtick.trace.vms import VmInfo

if TYPE_CHECKING:
    from kvmtick.kvm.kernel import KernelVm

__all__ = ["TickTrace", "decoder_of"]

BUFFER_KIB: Final = 4096
"""For each CPU: some seconds of a guest at 1 kHz."""

READ_EVERY_S: Final = 0.2
LIVE_EVERY_S: Final = 0.05
MOST_PAGES: Final = 16_384
"""So many pages wait until they are decoded: half a minute of a guest at 1 kHz."""

SETTLED_NS: Final = 20_000_000
"""An event is in the buffer at the latest so long after its time."""


def decoder_of(tracefs: Tracefs, events: Iterable[str]) -> Decoder:
    """A decoder for this kernel. Raises `HostError`."""
    addresses = tracefs.functions(*FUNCTIONS)
    functions = {address: FUNCTIONS[name] for address, name in addresses.items()}
    try:
        return Decoder(
            tracefs.read("events/header_page"), map(tracefs.format_text, events), functions
        )
    except FormatError as error:
        raise HostError(f"tracefs: {error}", "this kernel's trace cannot be read") from None


class TickTrace:
    """Traces one run of a VM: an `Observer` of `KernelVm.run`."""

    def __init__(
        self,
        vm: "KernelVm",
        consumers: Iterable[Consumer] = (),
        as_written: Iterable[Consumer] = (),
    ) -> None:
        """`consumers` get the records in batches, beside `assembler`; those of `as_written` without
        what is inferred.
        """
        self._vm = vm
        self._stack = ExitStack()
        self._live = False
        self._by_vm: ByVm
        self._own: Share
        self._inferred = Inferred()
        self._merge = Merge()
        self._pages: list[tuple[int, bytes]] = []
        self._over = threading.Event()
        self._error: BaseException | None = None
        self._named: set[int] = set()
        self._thread: threading.Thread | None = None
        self._instance: Instance
        self._decoder: Decoder
        self.assembler: TickAssembler
        self.missing: list[str] = []
        """Events that this kernel does not have."""
        self.lost = 0
        """How many records were lost, as far as the kernel says."""
        self._consumers = list(consumers)
        self._as_written = list(as_written)

    @property
    def tasks(self) -> list[str]:
        """Names of the records' tasks; may still grow."""
        return self._decoder.tasks.names

    # From start to end.

    def start(self, live: bool = False) -> None:
        """Trace from now on; `live`: decode as the events come, not when the run is over.

        Raises `HostError` without tracefs or permission.
        """
        self._live = live
        with ExitStack() as stack:
            tracefs = stack.enter_context(open_tracefs())
            self._instance = stack.enter_context(tracefs.instance())
            known = [event for event in TICK_EVENTS if tracefs.has_event(event)]
            self.missing = [event for event in TICK_EVENTS if event not in known]
            self._decoder = decoder_of(tracefs, known)
            self._by_vm = ByVm(self.tasks)
            self._own = self._by_vm.add_vm(VmInfo(os.getpid(), ""))
            self.assembler = TickAssembler(
                tasks=self.tasks, sees_nmis=lambda: self._inferred.sees_nmis
            )
            self._consumers.insert(0, self.assembler)
            self._instance.set_buffer_size(BUFFER_KIB)
            self._instance.enable_known({event: TICK_EVENTS[event] for event in known})
            self._know_worker()
            self._instance.start()
            self._hand_out(self._inferred([self._reinject_record()]))
            self._thread = threading.Thread(target=self._follow, name="tick trace", daemon=True)
            self._thread.start()
            self._stack = stack.pop_all()

    def stop(self) -> None:
        """Trace no more, and hand out the rest. Harmless when repeated; raises what went wrong."""
        with self._stack:
            if self._thread is None:
                return
            self._instance.stop()
            self._over.set()
            self._thread.join()
            self._thread = None
            if self._error is not None:
                raise self._error
            self._take_pages()
            self._decode(None)
            self.assembler.settle()

    def _know_worker(self) -> None:
        """The worker of the only PIT of this process is known; else the events tell which it is."""
        workers = pit_worker_tids(os.getpid())
        if self._vm.told.pit_flags is not None and len(workers) == 1:
            tid = workers.pop()
            worker = self._decoder.tasks.name(tid, f"kvm-pit/{os.getpid()}")
            self._by_vm.add_task(self._own, worker)

    def _reinject_record(self) -> Record:
        """How the PIT was set up before the trace began."""
        event, reason = int(Event.KVM_APICV_INHIBIT_CHANGED), int(ApicvInhibitReason.PIT_REINJ)
        return (time.monotonic_ns(), event, 0, reason, int(self._vm.told.reinject), 0)

    # The thread that follows.

    def _follow(self) -> None:
        try:
            while not self._over.wait(LIVE_EVERY_S if self._live else READ_EVERY_S):
                end_ns = time.monotonic_ns() - SETTLED_NS
                self._take_pages()
                if self._live or len(self._pages) > MOST_PAGES:
                    self._decode(end_ns)
        except BaseException as error:
            self._error = error

    def _take_pages(self) -> None:
        self._pages += self._instance.pages()

    def _decode(self, end_ns: int | None) -> None:
        """Hand out what came before `end_ns`; None: all."""
        for cpu, page in self._pages:
            self._merge.add(cpu, self._decoder.decode(page, cpu))
        self._pages.clear()
        self._name_vcpus()
        shares = self._by_vm(self._merge.until(end_ns))
        own = shares[0][1] if shares else []
        self._name_workers()
        for consumer in self._as_written:
            consumer(own)
        self._hand_out(self._inferred(own))

    def _name_vcpus(self) -> None:
        """Threads appear when they first run their vCPU."""
        for vcpu in self._vm.vcpus:
            tid = vcpu.file.tid
            if tid and tid not in self._named:
                self._named.add(tid)
                task = self._decoder.tasks.name(tid, f"CPU {vcpu.vcpu_id}/KVM")
                self._by_vm.add_task(self._own, task)

    def _name_workers(self) -> None:
        for task in self._own.workers:
            pid = pid_of(self.tasks[task])
            self._decoder.tasks.name(pid, f"kvm-pit/{os.getpid()}")

    def _hand_out(self, batch: list[Record]) -> None:
        self.lost += sum(max(1, r[4]) for r in batch if r[1] == Event.LOST_EVENTS)
        if batch:
            for consumer in self._consumers:
                consumer(batch)
