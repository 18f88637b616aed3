"""A whole host's records split by VM, in one pass.

A thread is its process' (`VmInfo`), or was told (`add_task`). The rest follows: a timer is a VM's
if one of its threads programmed it, a work item if such a timer's callback or such a thread queued
it, a worker if it ran one; and back, for a trace may begin when timers run already. Timers fire in
whatever thread was running, and the kvm-pit workers of one process have one name. The idle threads
of several CPUs have to be several tasks.

A batch is searched for such connections before it is handed on, and what is not known to be
anybody's is held back, up to a bound. Of a text, which says nothing of processes, everything that
is connected is one VM; threads that run the same vCPU are several. Where nothing tells threads
apart, they are one VM's.

Not told apart, for no record tells: what kernel threads and interrupts do for a VM (irqfds), local
APIC timers of several VMs that were armed before the trace began and fire in step.
"""

from collections.abc import Callable, Iterable
from typing import Final

from kvmtick.trace.events import IRQ_CONTEXT, Event, Function, Record
from kvmtick.trace.vms import VmInfo, vcpu_of_name

__all__ = ["ByVm", "Share"]

HELD: Final = 65_536
"""So many records wait until somebody claims them."""

TAIL: Final = 64
"""So many records of the last batch are looked at again with the next: a callback's run lies in
between."""

PATIENCE: Final = 256
"""In so many batches it is looked for which vCPU a thread runs."""

IN_STEP: Final = 4
"""A timer and a thread's acceptances that took turns so often belong together."""

_START: Final = int(Event.HRTIMER_START)
_EXPIRE: Final = int(Event.HRTIMER_EXPIRE_ENTRY)
_QUEUE: Final = int(Event.WORK_QUEUE)
_WORK_START: Final = int(Event.WORK_START)
_ACCEPT: Final = int(Event.KVM_APIC_ACCEPT_IRQ)
_EOI: Final = int(Event.KVM_EOI)
_ENTRY: Final = int(Event.KVM_ENTRY)
_EXIT: Final = int(Event.KVM_EXIT)
_WAKING: Final = int(Event.SCHED_WAKING)
_SWITCH: Final = int(Event.SCHED_SWITCH)
_LOST: Final = int(Event.LOST_EVENTS)
_APIC_TIMER_FN: Final = int(Function.APIC_TIMER_FN)
_PIT_TIMER_FN: Final = int(Function.PIT_TIMER_FN)

_OF_TIMERS: Final = (_START, int(Event.HRTIMER_CANCEL), _EXPIRE, _QUEUE)
"""What these are about says whose they are; of all others the thread does."""
_SENDS: Final = frozenset(map(int, (Event.KVM_APIC_IPI, Event.KVM_MSI_SET_IRQ, Event.KVM_SET_IRQ)))
"""What a local APIC may accept right after them is not its timer's."""
_TELLING: Final = frozenset((_START, _EXPIRE, _QUEUE, _WORK_START, _ACCEPT, _WAKING, *_SENDS))
_OF_VCPUS: Final = frozenset((_EOI, _ENTRY, _EXIT))
_ADDRESS, _TASK, _EVENT = 3, 2, 1
_NEVER: Final = -1

Append = Callable[[Record], None]


def _drop(_: Record) -> None:
    """Nobody wants it."""


class Share:
    """One VM's part."""

    def __init__(self, info: VmInfo) -> None:
        self.info = info
        self.vcpus: dict[int, int] = {}
        """Which task is which vCPU."""
        self.workers: set[int] = set()
        """Tasks that run its work items."""
        self.missed = 0
        """Records that came before it was known whose they are, too early to be handed on."""
        self.is_guessed = False
        """Nothing tells its threads from another VM's."""
        self.is_part = False
        """Its PIT's worker is known, and no thread that runs a vCPU."""
        self.records: list[Record] = []
        self.handed_ns = -1


class _Group:
    """Threads, timers and work items that are connected."""

    __slots__ = ("keys", "share")

    def __init__(self, key: int) -> None:
        self.keys = [key]
        self.share: Share | None = None


class ByVm:
    """Splits records, batch by batch. A timer or work item is `~address` among the keys."""

    def __init__(
        self, tasks: list[str], finds_vms: bool = False, unwanted: Iterable[Event] = ()
    ) -> None:
        """`tasks`: names of the records' tasks, which may still grow. `finds_vms`: make one of
        what nobody told of. `unwanted` events are dropped.
        """
        self.shares: list[Share] = []
        self.owners: dict[int, int] = {}
        """Whose local APIC timer it is, by hrtimer: a task, where that was learnt."""
        self._tasks = tasks
        self._finds_vms = finds_vms
        self._groups: dict[int, _Group] = {}
        self._by_task: dict[int, Append] = {}
        self._by_address: dict[int, Append] = {}
        self._held: list[Record] = []
        self._placed = self._placed_before = 0
        self._workers: set[int] = set()
        self._of_tid: dict[int, Share] = {}
        self._infos: dict[int, VmInfo] = {}
        self._nameless: set[int] = set()
        self._patience = 0
        self._tail: list[Record] = []
        self._expired: dict[int, Record] = {}
        self._last: dict[int, Record] = {}
        self._expiries: dict[int, int] = {}
        self._in_step: dict[int, dict[int, int]] = {}
        self._seen_at: dict[int, dict[int, int]] = {}
        own: dict[int, Append] = {
            _LOST: self._gap,
            _SWITCH: self._switch,
            _WAKING: self._waking,
            _START: self._start,
        } | dict.fromkeys(map(int, unwanted), _drop)
        self._route: list[tuple[dict[int, Append], int]] = [
            (own, _EVENT)
            if event in own
            else (self._by_address, _ADDRESS)
            if event in _OF_TIMERS
            else (self._by_task, _TASK)
            for event in range(len(Event))
        ]

    # What is told.

    def know(self, infos: Iterable[VmInfo]) -> None:
        """What a recorder knows of the VMs now."""
        for info in infos:
            if self._infos.get(info.pid) is info:
                continue
            self._infos[info.pid] = info
            share = next((s for s in self.shares if s.info.pid == info.pid), None)
            if share is None:
                share = self.add_vm(info)
            share.info = info
            for tid in info.threads.keys() | info.vcpus.keys():
                self._of_tid[tid] = share
            for task in list(self._by_task):
                self._identify(task)

    def add_vm(self, info: VmInfo) -> Share:
        """One more VM."""
        share = Share(info)
        self.shares.append(share)
        return share

    def add_task(self, share: Share, task: int) -> None:
        """A thread of the VM: a vCPU's, or a worker known beforehand."""
        self._give(self._group(task), share)

    # Record by record.

    def __call__(self, batch: list[Record]) -> list[tuple[Share, list[Record]]]:
        """The next records of the host; those of each VM that has some."""
        before, placed = self._held[:], self._placed_before
        self._distribute(batch)
        is_news = self._placed != placed
        if len(self._held) > len(before):
            is_news |= self._learn(batch)
        if is_news and self._held:
            self._start_over([*before, *batch])
        self._placed_before = self._placed
        self._tail = [*self._tail, *batch][-TAIL:] if len(batch) < TAIL else batch[-TAIL:]
        del self._held[:-HELD]
        if self._nameless:
            self._learn_vcpus(batch)
        return [(share, self._hand_on(share)) for share in self.shares if share.records]

    def _start_over(self, records: list[Record]) -> None:
        """More is known now of whose they are."""
        for share in self.shares:
            share.records.clear()
        self._held.clear()
        self._distribute(records)

    def _hand_on(self, share: Share) -> list[Record]:
        """Its records, less those that are too late."""
        records, after_ns = share.records[:], share.handed_ns
        share.records.clear()
        if records[0][0] < after_ns:
            kept = [record for record in records if record[0] >= after_ns]
            share.missed += len(records) - len(kept)
            records = kept
        if records:
            share.handed_ns = records[-1][0]
        return records

    def _distribute(self, batch: list[Record]) -> None:
        route = self._route
        for record in batch:
            table, at = route[record[1]]
            try:
                table[record[at]](record)
            except KeyError:
                self._meet(record, at)

    def _meet(self, record: Record, at: int) -> None:
        """A thread, timer or work item that was not seen before."""
        if at == _TASK:
            self._identify(record[at])
        else:
            self._group(~record[at])
        table = self._by_task if at == _TASK else self._by_address
        table[record[at]](record)

    def _hold(self, record: Record) -> None:
        self._held.append(record)

    def _gap(self, record: Record) -> None:
        for share in self.shares:
            share.records.append(record)

    def _start(self, record: Record) -> None:
        """A timer is armed: by its callback, or by a thread of the VM whose it is now."""
        task, timer = record[2], record[3]
        if not task & IRQ_CONTEXT:
            self._take_over(task, timer)
        try:
            self._by_address[timer](record)
        except KeyError:
            self._meet(record, _ADDRESS)

    def _take_over(self, task: int, timer: int) -> None:
        """Where a VM's timer was, another VM may have one when the first is gone; with it goes
        everything that the first had.
        """
        before, now = self._groups.get(~timer), self._groups.get(task)
        if before is None or now is None or None in (before.share, now.share):
            return
        if before.share is not now.share:
            gone = before.share
            for key in [k for k, group in self._groups.items() if k < 0 and group.share is gone]:
                self._groups.pop(key).keys.remove(key)
                del self._by_address[~key]
                self.owners.pop(~key, None)

    def _switch(self, record: Record) -> None:
        before, after = self._of_tid.get(record[3]), self._of_tid.get(record[5])
        if before is not None:
            before.records.append(record)
        if after is not None and after is not before:
            after.records.append(record)

    def _waking(self, record: Record) -> None:
        share = self._of_tid.get(record[3])
        if share is not None:
            share.records.append(record)

    # Who belongs together.

    def _group(self, key: int) -> _Group:
        group = self._groups.get(key)
        if group is None:
            group = self._groups[key] = _Group(key)
            self._place(key, self._hold)
        return group

    def _place(self, key: int, append: Append) -> None:
        if key >= 0:
            self._by_task[key] = append
        else:
            self._by_address[~key] = append

    def _give(self, group: _Group, share: Share) -> None:
        """All of a group is this VM's."""
        group.share = share
        self._placed += 1
        for key in group.keys:
            self._place(key, share.records.append)
            if key >= 0:
                self._own_task(share, key)
        share.workers |= self._workers.intersection(group.keys)

    def _own_task(self, share: Share, task: int) -> None:
        comm, tid = self._name(task)
        self._of_tid[tid] = share
        vcpu = share.info.vcpus.get(tid, vcpu_of_name(comm))
        if vcpu is not None:
            share.vcpus[task] = vcpu
        elif task not in share.vcpus and not _pid_of_worker(comm):
            self._nameless.add(task)
            self._patience = PATIENCE

    def _identify(self, task: int) -> None:
        """A thread may be that of a process that is known."""
        group = self._group(task)
        comm, tid = self._name(task)
        if not tid or task & IRQ_CONTEXT:
            return
        share = self._of_tid.get(tid)
        pid = _pid_of_worker(comm)
        if share is None and pid:
            share = next((s for s in self.shares if s.info.pid == pid), None)
        if share is None:
            return
        if group.share is None:
            self._give(group, share)
        elif tid in share.info.vcpus:
            share.vcpus[task] = share.info.vcpus[tid]

    def _name(self, task: int) -> tuple[str, int]:
        """Its comm and tid."""
        name = self._tasks[task] if task < len(self._tasks) else f"<...>-{task}"
        comm, _, tid = name.rpartition("-")
        return comm, int(tid)

    def _join(self, one: int, other: int) -> bool:
        """Two belong together; True if that is news."""
        into, group = self._group(one), self._group(other)
        if into is group or (into.share is not None and group.share is not None):
            return False
        if into.share is None and (group.share is not None or len(group.keys) > len(into.keys)):
            into, group = group, into
        into.keys += group.keys
        for key in group.keys:
            self._groups[key] = into
        if into.share is not None:
            self._give(into, into.share)
        return True

    # Learning.

    def _learn(self, batch: list[Record]) -> bool:
        """Search a batch for connections; True if somebody's VM is known now that was not."""
        placed = self._placed
        self._expired |= {record[2]: record for record in self._tail if record[1] == _EXPIRE}
        for record in batch:
            if record[1] in _TELLING:
                self._learn_from(record)
            elif record[1] == _LOST:
                self._expired.clear()
                self._last.clear()
                self._seen_at.clear()
        if self._finds_vms:
            self._find_vms(batch)
        return placed != self._placed

    def _learn_from(self, record: Record) -> None:
        event, task, about = record[1], record[2], record[3]
        if event == _START:
            if task & IRQ_CONTEXT:
                self._learn_woken(record)
            elif not self._is_callback(task, about):
                self._join(task, ~about)
                if record[4] == _APIC_TIMER_FN:
                    self.owners[about] = task
        elif event == _EXPIRE:
            self._expired[task] = record
            if record[4] == _APIC_TIMER_FN and about not in self.owners:
                self._expiries[about] = self._expiries.get(about, 0) + 1
        elif event == _QUEUE:
            expired = self._expired.get(task)
            if expired is not None and expired[4] == _PIT_TIMER_FN:
                self._join(~expired[3], ~about)
            elif not task & IRQ_CONTEXT:
                self._join(task, ~about)
        elif event == _WORK_START:
            self._workers.add(task)
            self._join(task, ~about)
            share = self._group(task).share
            if share is not None:
                share.workers.add(task)
        elif event == _ACCEPT and not task & IRQ_CONTEXT:
            self._learn_steps(record)
        self._last[task] = record

    def _is_callback(self, task: int, timer: int) -> bool:
        """The timer's own callback is what runs there; with PREEMPT_RT in a thread."""
        expired = self._expired.get(task)
        return expired is not None and expired[3] == timer

    def _learn_woken(self, start: Record) -> None:
        """A periodic timer's callback woke a thread and armed it again: its vCPU's."""
        task, timer = start[2], start[3]
        woken = self._last.get(task)
        if woken is None or woken[1] != _WAKING or not self._is_callback(task, timer):
            return
        if timer in self.owners or start[4] != _APIC_TIMER_FN:
            return
        for owner in self._by_task:
            if self._name(owner)[1] == woken[3] and not owner & IRQ_CONTEXT:
                self._join(owner, ~timer)
                self.owners[timer] = owner

    def _learn_steps(self, accept: Record) -> None:
        """What a local APIC accepts in its own thread, if nothing else explains it, is what its
        timer's expiry gave. Of the timers that nobody was seen to arm it is the only one that
        expired before every such record, and then took turns with them.
        """
        task = accept[2]
        before = self._last.get(task)
        _, _, _, _, mode, level, _ = accept
        if mode or level or (before is not None and before[1] in _SENDS):
            return
        if task in self.owners.values():
            return
        expiries, seen = self._expiries, self._seen_at.get(task)
        self._seen_at[task] = expiries.copy()
        if seen is None:
            return
        in_step = self._in_step.setdefault(task, {})
        for timer, count in expiries.items():
            came = count - seen.get(timer, 0)
            if not came:
                in_step[timer] = _NEVER
            elif in_step.get(timer, 0) != _NEVER:
                in_step[timer] = in_step.get(timer, 0) + 1 if came == 1 else 0
        possible = [t for t, steps in in_step.items() if steps != _NEVER and t not in self.owners]
        if len(possible) == 1 and in_step[possible[0]] >= IN_STEP:
            self._join(task, ~possible[0])
            self.owners[possible[0]] = task
            del expiries[possible[0]]

    def _learn_vcpus(self, batch: list[Record]) -> None:
        """kvm_eoi, kvm_entry and kvm_exit name the vCPU that their thread runs."""
        nameless = self._nameless
        self._patience -= 1
        if not self._patience:
            nameless.clear()
        for record in batch:
            if record[2] in nameless and record[1] in _OF_VCPUS:
                share = self._group(record[2]).share
                assert share is not None
                share.vcpus[record[2]] = record[3]
                nameless.discard(record[2])

    # VMs that nobody told of.

    def _find_vms(self, batch: list[Record]) -> None:
        """Make VMs of what is connected: one, if no two threads run the same vCPU and no two
        workers are there; else one of each.
        """
        vcpus = {r[2]: r[3] for r in batch if r[1] in _OF_VCPUS and not r[2] & IRQ_CONTEXT}
        self._join_processes()
        free = list({id(g): g for g in self._groups.values() if g.share is None}.values())
        parts = [_Part(self, group, vcpus) for group in free]
        parts = [part for part in parts if part.vcpus or part.has_pit]
        if not parts:
            self._adopt(free)
            return
        ids = [vcpu for part in parts for vcpu in part.vcpus]
        ids += [vcpu for share in self.shares for vcpu in share.vcpus.values()]
        pits = sum(part.has_pit for part in parts) + sum(bool(s.workers) for s in self.shares)
        if len(ids) == len(set(ids)) and pits <= 1 and len(self.shares) <= 1:
            share = self.shares[0] if self.shares else self.add_vm(VmInfo(0, ""))
            share.is_guessed |= len(parts) + bool(share.vcpus) > 1
            for part in parts:
                self._found(part, share)
        else:
            for part in parts:
                share = self.add_vm(VmInfo(0, ""))
                share.is_part = not part.vcpus
                self._found(part, share)
        self._adopt(free)

    def _join_processes(self) -> None:
        """`kvm-pit/PID` names a process, whose first thread is `PID`."""
        by_tid = {self._name(key)[1]: key for key in self._by_task if not key & IRQ_CONTEXT}
        for task in list(self._by_task):
            pid = _pid_of_worker(self._name(task)[0])
            if pid in by_tid:
                self._join(task, by_tid[pid])

    def _found(self, part: "_Part", share: Share) -> None:
        info = share.info
        info.pid = info.pid or part.pid
        info.name = info.name or part.name
        share.vcpus |= part.tasks
        share.workers |= part.workers
        self._give(part.group, share)

    def _adopt(self, free: list[_Group]) -> None:
        """Other threads that do something in KVM are the only VM's."""
        if len(self.shares) == 1:
            for group in free:
                if group.share is None and all(0 <= key < IRQ_CONTEXT for key in group.keys):
                    self._give(group, self.shares[0])


class _Part:
    """What a connected part of a trace shows of its VM."""

    def __init__(self, by_vm: ByVm, group: _Group, vcpus: dict[int, int]) -> None:
        self.group = group
        self.pid = 0
        self.name = ""
        self.tasks: dict[int, int] = {}
        self.workers: set[int] = set()
        for task in group.keys:
            if task < 0 or task & IRQ_CONTEXT:
                continue
            comm, _ = by_vm._name(task)
            pid = _pid_of_worker(comm)
            vcpu = vcpus.get(task, vcpu_of_name(comm))
            if pid:
                self.pid = pid
                self.workers.add(task)
            elif vcpu is not None:
                self.tasks[task] = vcpu
                self.name = self.name or comm

    @property
    def vcpus(self) -> list[int]:
        """The vCPUs that its threads run."""
        return list(self.tasks.values())

    @property
    def has_pit(self) -> bool:
        """A worker is there."""
        return bool(self.workers)


def _pid_of_worker(comm: str) -> int:
    """Of `kvm-pit/PID`; 0 if it is none."""
    pid = comm.removeprefix("kvm-pit/")
    return int(pid) if pid != comm and pid.isdigit() else 0
