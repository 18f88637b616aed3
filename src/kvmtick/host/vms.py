"""Which VMs run on this host, from /proc: processes that hold a descriptor of a VM.

`HostVms.scan` is called again and again; most of the host is looked at ever more rarely, what may
become a VM each time. A thread's vCPU comes from its name as the VMMs give it, or, while it sleeps
in ioctl(vcpu_fd, KVM_RUN), from /proc/PID/task/TID/syscall. A VM is called what its VMM's command
line calls it.

Source: proc(5); KVM names its descriptors anon_inode:kvm-vm and anon_inode:kvm-vcpu:ID, a PIT's
worker kvm-pit/PID.

Not modelled: several VMs of one process (they are taken for one); a child that inherited a VM's
descriptor (it is taken for a VM).
"""

import os
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from kvmtick.abi.errors import HostError
from kvmtick.abi.ioctls import KVM_RUN

__all__ = [
    "HostVm",
    "HostVms",
    "NoVmError",
    "is_initial_pid_namespace",
    "vcpu_of_name",
    "vm_name",
    "vm_reinject",
]

PROC: Final = Path("/proc")

_VM_FD = "anon_inode:kvm-vm"
_VCPU_FD = re.compile(r"anon_inode:kvm-vcpu:(\d+)")
_KVM_DEVICE = "/kvm"
_WORKER = re.compile(r"kvm-pit/(\d+)")
_VCPU_COMM = re.compile(r"CPU (\d+)/KVM|(?:\w+[_-])?vcpu[ _:-]?(\d+)")
"""QEMU; fc_vcpu 0 (Firecracker), crosvm_vcpu0, kvm-vcpu-0 (kvmtool), vcpu0 (cloud-hypervisor)."""

_SYS_IOCTL: Final = "16"
"""By x86-64's table; a 32-bit VMM's vCPUs are known by name only."""
_INITIAL_PID_NAMESPACE: Final = 0xEFFF_FFFC
"""PROC_PID_INIT_INO."""

_NAMING_LOOKS: Final = 3
"""A thread is named after it was made: its name is read so often."""
_LONGEST_PAUSE_S: Final = 60.0


class NoVmError(Exception):
    """A process that was asked for is no VM; one line that says so."""


@dataclass(slots=True)
class HostVm:
    """One VM, and what is known of it."""

    pid: int
    name: str
    threads: dict[int, str] = field(default_factory=dict)
    """Threads of the process and kvm-pit workers of its VM: tid to name; those that ended too."""
    vcpus: dict[int, int] = field(default_factory=dict)
    """tid to vCPU id, where known."""
    reinject: bool | None = None
    """How its command line sets the PIT; None if it does not."""
    looks: dict[int, int] = field(default_factory=dict)
    """How often its threads were looked at, those that live."""

    def workers(self) -> list[int]:
        """Its kvm-pit workers that live."""
        return [tid for tid in self.looks if _WORKER.fullmatch(self.threads.get(tid, ""))]

    def runners(self) -> list[int]:
        """Its vCPUs' threads that live; all threads while none is known."""
        return [tid for tid in self.looks if tid in self.vcpus] or list(self.looks)

    def new_threads(self) -> list[int]:
        """Threads that the last scan found and that may be vCPUs, as far as is known."""
        known = {*self.vcpus, *self.workers()}
        return [tid for tid, looks in self.looks.items() if looks == 1 and tid not in known]


class HostVms:
    """The VMs of this host; `vms` holds all that were seen, by pid, also those that ended."""

    def __init__(self, only: Collection[int] = (), proc: Path = PROC) -> None:
        """`only`: nothing but these processes; none: all."""
        self.vms: dict[int, HostVm] = {}
        self.changes = 0
        """So often a scan has found something new."""
        self._only = frozenset(only)
        self._proc = proc
        self._known: dict[int, float] = {}
        """When a process was first seen."""
        self._next: dict[int, float] = {}
        self._workers: dict[int, list[int]] = {}
        """kvm-pit threads by the process they work for."""

    def scan(self, now_s: float) -> bool:
        """Look at what is due; whether something is new."""
        before = self.changes
        pids = {int(name) for name in os.listdir(self._proc) if name.isdigit()}
        for pid in self._known.keys() - pids:
            del self._known[pid]
            self._next.pop(pid, None)
        for pid in sorted(pids):
            if now_s >= self._next.get(pid, now_s):
                self._look(pid, now_s)
        for pid, vm in self.vms.items():
            self._look_at_threads(vm, pids if pid in pids else set())
        return self.changes != before

    def _look(self, pid: int, now_s: float) -> None:
        """Is it a VM, or the worker of one? And when to look again."""
        first_s = self._known.setdefault(pid, now_s)
        self._next[pid] = now_s + min(now_s - first_s, _LONGEST_PAUSE_S)
        if pid in self.vms:
            return
        comm = self._comm(pid, pid)
        worker = _WORKER.fullmatch(comm)
        if worker is not None:
            self._workers.setdefault(int(worker[1]), []).append(pid)
            self._next[pid] = float("inf")
            if int(worker[1]) in self._known:
                self._look_for_vm(int(worker[1]), now_s)
        else:
            self._look_for_vm(pid, now_s)

    def _look_for_vm(self, pid: int, now_s: float) -> None:
        if pid in self.vms or (self._only and pid not in self._only):
            return
        for target in self._descriptors(pid):
            if target == _VM_FD:
                self.vms[pid] = self._made(pid)
                self.changes += 1
                return
            if target.endswith(_KVM_DEVICE):
                self._next[pid] = now_s  # it is about to make one

    def _made(self, pid: int) -> HostVm:
        argv = self._argv(pid)
        return HostVm(pid, vm_name(argv, pid), reinject=vm_reinject(argv))

    def _look_at_threads(self, vm: HostVm, pids: Collection[int]) -> None:
        """`pids`: the processes there are; none: the VM has ended."""
        tids = [tid for tid in self._workers.get(vm.pid, ()) if tid in pids]
        if pids:
            with suppress(OSError):
                tids += map(int, os.listdir(self._proc / str(vm.pid) / "task"))
        vm.looks = {tid: vm.looks.get(tid, 0) + 1 for tid in tids}
        for tid, looks in vm.looks.items():
            comm = vm.threads.get(tid, "")
            if looks <= _NAMING_LOOKS:
                comm = self._comm(vm.pid, tid) or comm
            if vm.threads.get(tid, "") != comm:
                vm.threads[tid] = comm
                self.changes += 1
            if tid not in vm.vcpus and (vcpu := self._vcpu(vm.pid, tid, comm)) is not None:
                vm.vcpus[tid] = vcpu
                self.changes += 1

    def _vcpu(self, pid: int, tid: int, comm: str) -> int | None:
        named = vcpu_of_name(comm)
        return self._running_vcpu(pid, tid) if named is None else named

    def _running_vcpu(self, pid: int, tid: int) -> int | None:
        """The vCPU whose KVM_RUN a thread sleeps in."""
        where = self._proc / str(pid)
        try:
            number, *args = (where / "task" / str(tid) / "syscall").read_text().split()
            # Threads that the kernel made in this process have its registers, but no stack.
            if number != _SYS_IOCTL or int(args[1], 16) != KVM_RUN or int(args[-2], 16) == 0:
                return None
            vcpu = _VCPU_FD.fullmatch(os.readlink(where / "fd" / str(int(args[0], 16))))
        except (OSError, ValueError, IndexError):
            return None
        return int(vcpu[1]) if vcpu else None

    # Of a process.

    def check(self, pid: int) -> int:
        """A thread's process. Raises `NoVmError` where it is no VM, and `HostError` where nobody
        may know.
        """
        where = self._proc / str(pid)
        try:
            found = re.search(r"^Tgid:\s*(\d+)", (where / "status").read_text(), re.MULTILINE)
            tgid = int(found[1]) if found else pid
            links = list(self._links(tgid))
        except (FileNotFoundError, ProcessLookupError):
            raise NoVmError(f"there is no process {pid}") from None
        except PermissionError:
            remedy = "record as root (CAP_SYS_PTRACE)"
            raise HostError(f"process {pid} may not be looked at", remedy) from None
        if _VM_FD not in links:
            raise NoVmError(f"process {pid} ({self._comm(tgid, pid)}) has no VM of KVM")
        return tgid

    def _descriptors(self, pid: int) -> Iterator[str]:
        with suppress(OSError):
            yield from self._links(pid)

    def _links(self, pid: int) -> Iterator[str]:
        where = f"{self._proc}/{pid}/fd"
        for name in os.listdir(where):
            with suppress(FileNotFoundError):
                yield os.readlink(f"{where}/{name}")

    def _comm(self, pid: int, tid: int) -> str:
        """A thread's name; of a worker, which is no thread of the process, that of its own."""
        for where in (f"{pid}/task/{tid}", str(tid)):
            with suppress(OSError):
                return (self._proc / where / "comm").read_text(errors="replace").rstrip("\n")
        return ""

    def _argv(self, pid: int) -> list[str]:
        with suppress(OSError):
            text = (self._proc / str(pid) / "cmdline").read_text(errors="replace")
            return text.rstrip("\0").split("\0")
        return []


def is_initial_pid_namespace() -> bool:
    """Whether /proc counts processes as the kernel's records do."""
    return os.stat("/proc/self/ns/pid").st_ino == _INITIAL_PID_NAMESPACE


def vcpu_of_name(comm: str) -> int | None:
    """The vCPU that a thread of this name runs, as VMMs call them; None if it does not say."""
    named = _VCPU_COMM.fullmatch(comm)
    return int(named[1] or named[2]) if named else None


# What a VMM's command line says.


def vm_name(argv: Sequence[str], pid: int) -> str:
    """The VM's name: QEMU's -name, `--id`, `--name`, cloud-hypervisor's API socket, the guest of
    `kvmtick run`; else the program's name and the pid.
    """
    program = os.path.basename(argv[0]) if argv else ""
    if program.startswith("qemu") or program == "kvm":
        name = _qemu_name(argv)
    elif program.startswith("cloud-hypervisor"):
        socket = _value(argv, "--api-socket").removeprefix("path=").partition(",")[0]
        name = os.path.basename(socket).removesuffix(".sock")
    else:
        name = _value(argv, "--id") or _value(argv, "--name") or _own_guest(argv)
    return name or f"{program or 'vm'}-{pid}"


def _qemu_name(argv: Sequence[str]) -> str:
    """`-name x`, `-name guest=x,debug-threads=on`; a comma is doubled."""
    options = _value(argv, "-name", "--name").replace(",,", "\0")
    for number, option in enumerate(options.split(",")):
        key, equals, value = option.partition("=")
        if key == "guest" and equals:
            return value.replace("\0", ",")
        if number == 0 and not equals:
            return key.replace("\0", ",")
    return ""


def _own_guest(argv: Sequence[str]) -> str:
    """`kvmtick run GUEST`, `python -m kvmtick run GUEST`."""
    for at, word in enumerate(argv[:-2]):
        if os.path.basename(word) == "kvmtick" and argv[at + 1] == "run":
            guest = argv[at + 2]
            return "" if guest.startswith("-") else os.path.basename(guest)
    return ""


def _value(argv: Sequence[str], *names: str) -> str:
    """The value of an option: `NAME VALUE` or `NAME=VALUE`; the last one counts."""
    found = ""
    for at, word in enumerate(argv):
        name, equals, value = word.partition("=")
        if name in names:
            found = value if equals else "".join(argv[at + 1 : at + 2])
    return found


_LOST_TICK_POLICY = re.compile(
    r"kvm-pit\.lost_tick_policy=(\w+)"
    r"|driver=kvm-pit,property=lost_tick_policy,value=(\w+)"
)
_REINJECTS = {"delay": True, "--reinject": True, "discard": False, "--no-reinject": False}


def vm_reinject(argv: Sequence[str]) -> bool | None:
    """Whether the command line asks for lost ticks to be replayed (QEMU: delay; kvmtick:
    --reinject) or not (discard; --no-reinject); None where it says nothing.
    """
    found = None
    for word in argv:
        policy = _LOST_TICK_POLICY.fullmatch(word)
        found = _REINJECTS.get((policy[1] or policy[2]) if policy else word, found)
    return found
