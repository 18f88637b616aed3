"""Thin typed access to /dev/kvm: file descriptors, ioctls, guest memory, and a bounded KVM_RUN.

Nothing here knows what a PIT is: `KvmFile.ioctl` raises `KvmError` with the kernel's errno, and
`kvmtick.kvm.kernel` builds the calls on it. Everything closes in any order, more than once, and
on garbage collection.

KVM_RUN is bounded by one signal, in the way api.rst describes for KVM_SET_SIGNAL_MASK: the signal
is blocked in the running thread and unblocked inside KVM_RUN only, so it ends KVM_RUN with EINTR,
stays pending when it comes early, and no handler ever runs. A POSIX timer sends it to the thread
at the deadline, `kick` sends it from any thread; no helper thread, no polling.

Not here: coalesced MMIO, the dirty log and ring.
"""

import ctypes
import errno
import fcntl
import math
import mmap
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, TypeVar

from kvmtick.abi import HostError, KvmError, ioctls, structs
from kvmtick.abi.closing import Closing
from kvmtick.abi.exits import Exit, ExitIntr, answer_place, decode
from kvmtick.abi.structs import (
    KvmStruct,
    kvm_regs,
    kvm_run,
    kvm_segment,
    kvm_sregs,
)

__all__ = [
    "DEFAULT_LIMIT_S",
    "KVM_PATH",
    "GuestMemory",
    "KvmDevice",
    "KvmFile",
    "VcpuFile",
    "VmFile",
    "open_kvm",
    "pit_worker_tids",
]

KVM_PATH: Final = "/dev/kvm"
PAGE_SIZE: Final = mmap.PAGESIZE

DEFAULT_LIMIT_S: Final = 10.0
"""Wall seconds a KVM_RUN may take when the caller names no limit."""

DATA_SEGMENT: Final = 0x3
CODE_SEGMENT: Final = 0xB
"""Segment types (SDM table 3-1): read and write, execute and read; both accessed."""
CR0_AFTER_RESET: Final = 0x6000_0010

KICK_SIGNAL: Final = signal.SIGRTMIN + 6
"""Ends KVM_RUN; any real-time signal nobody else uses would do."""

_S = TypeVar("_S", bound=KvmStruct)


_libc_ioctl = ctypes.CDLL(None, use_errno=True).ioctl
_libc_ioctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong)


def _ioctl_word(fd: int, request: int, word: int) -> int:
    """ioctl(2) with the unsigned long as it is; fcntl.ioctl would cut it to an int."""
    result = int(_libc_ioctl(fd, request, word))
    if result < 0:
        raise OSError(ctypes.get_errno(), "")
    return result


def _size_of(buffer: "KvmStruct | bytearray") -> int:
    return len(buffer) if isinstance(buffer, bytearray) else ctypes.sizeof(buffer)


class KvmFile(Closing):
    """An open KVM file descriptor; a context manager, closing is harmless when repeated."""

    kind = "descriptor"
    """What it is, for messages."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    @property
    def closed(self) -> bool:
        """True after `close`."""
        return self._fd < 0

    def fileno(self) -> int:
        """The descriptor, -1 after `close`."""
        return -1 if self.closed else self._fd

    def ioctl(self, request: int, arg: "int | KvmStruct | bytearray" = 0) -> int:
        """Call ioctl(2), again after EINTR (KVM_RUN: not); a structure or buffer is passed by
        address: EFAULT where it is shorter than `request` says.

        Raises `KvmError` with the kernel's errno; EBADF after `close`.
        """
        call = ioctls.ioctl_name(request)
        if self.closed:
            raise KvmError(errno.EBADF, call, f"this {self.kind} was closed")
        if not isinstance(arg, int) and _size_of(arg) < ioctls.argument_bytes(request):
            raise KvmError(errno.EFAULT, call)
        while True:
            try:
                if isinstance(arg, int):
                    return _ioctl_word(self._fd, request, arg)
                result: int = fcntl.ioctl(self._fd, request, arg)
                return result
            except InterruptedError:
                if request == ioctls.KVM_RUN:
                    raise KvmError(errno.EINTR, call) from None
            except OSError as error:
                raise KvmError(error.errno or 0, call) from None

    def get(self, request: int, struct: type[_S]) -> _S:
        """An ioctl that fills in a structure."""
        out = struct()
        self.ioctl(request, out)
        return out

    def close(self) -> None:
        """Give the descriptor back."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0:
            self.close()


class KvmDevice(KvmFile):
    """The system fd: /dev/kvm (api.rst, "System ioctls")."""

    kind = "system"

    def api_version(self) -> int:
        """KVM_GET_API_VERSION: 12 on every kernel one meets."""
        return self.ioctl(ioctls.KVM_GET_API_VERSION)

    def check_extension(self, cap: int) -> int:
        """KVM_CHECK_EXTENSION: 0 means no; other values as api.rst says."""
        return self.ioctl(ioctls.KVM_CHECK_EXTENSION, cap)

    def vcpu_mmap_size(self) -> int:
        """KVM_GET_VCPU_MMAP_SIZE: bytes of the area shared with a vCPU."""
        return self.ioctl(ioctls.KVM_GET_VCPU_MMAP_SIZE)

    def again(self) -> "KvmDevice":
        """Another descriptor of the same device, to be closed by itself."""
        if self.closed:
            raise KvmError(errno.EBADF, "KVM_CREATE_VM", f"this {self.kind} was closed")
        return KvmDevice(fcntl.fcntl(self._fd, fcntl.F_DUPFD_CLOEXEC, 0))

    def create_vm(self, type_: int = 0) -> "VmFile":
        """KVM_CREATE_VM. EINVAL: `type_` is not a machine type of this host."""
        mmap_bytes = self.vcpu_mmap_size()
        return VmFile(self.ioctl(ioctls.KVM_CREATE_VM, type_), mmap_bytes)


class _VmLife:
    """A VM lives until its last descriptor is closed; until then its slots need their memory.

    The kernel knows a slot by its address in this process: were it unmapped under a living VM,
    the guest could write into whatever is mapped there next.
    """

    def __init__(self) -> None:
        self.descriptors = 0
        self.ram: dict[int, mmap.mmap | ctypes.Array[ctypes.c_char]] = {}
        """By slot."""

    def leave(self) -> None:
        """One descriptor fewer."""
        self.descriptors -= 1
        if not self.descriptors:
            self.ram.clear()


class VmFile(KvmFile):
    """A VM fd (api.rst, "VM ioctls"); the VM lives until this and all its vCPUs are closed."""

    kind = "VM"

    def __init__(self, fd: int, vcpu_mmap_bytes: int) -> None:
        super().__init__(fd)
        self._vcpu_mmap_bytes = vcpu_mmap_bytes
        self._life = _VmLife()
        self._life.descriptors += 1

    def close(self) -> None:
        """Give the descriptor back."""
        if not self.closed:
            super().close()
            self._life.leave()

    def check_extension(self, cap: int) -> int:
        """KVM_CHECK_EXTENSION asked of the VM: may differ from the system's answer."""
        return self.ioctl(ioctls.KVM_CHECK_EXTENSION, cap)

    def add_memory(self, gpa: int, size_bytes: int, slot: int = 0, flags: int = 0) -> "GuestMemory":
        """Anonymous memory at `gpa` (KVM_SET_USER_MEMORY_REGION); both page aligned.

        EINVAL: not page aligned, or it wraps. EEXIST: it overlaps another slot.
        """
        if size_bytes <= 0:
            # 0 would ask the kernel to take the slot away
            raise KvmError(errno.EINVAL, "KVM_SET_USER_MEMORY_REGION")
        ram = mmap.mmap(-1, size_bytes)
        self.map_memory(gpa, ram, slot, flags)
        return GuestMemory(self, slot, gpa, ram)

    def map_memory(
        self, gpa: int, ram: "mmap.mmap | ctypes.Array[ctypes.c_char]", slot: int, flags: int = 0
    ) -> None:
        """As `add_memory`, but memory of others, which the VM keeps mapped as long as it lives."""
        region = structs.kvm_userspace_memory_region(
            slot=slot,
            flags=flags,
            guest_phys_addr=gpa,
            memory_size=len(ram),
            userspace_addr=ctypes.addressof(ctypes.c_char.from_buffer(ram)),
        )
        self.ioctl(ioctls.KVM_SET_USER_MEMORY_REGION, region)
        self._life.ram[slot] = ram

    def unmap_memory(self, gpa: int, slot: int) -> None:
        """Take a slot away (KVM_SET_USER_MEMORY_REGION of size 0)."""
        region = structs.kvm_userspace_memory_region(slot=slot, guest_phys_addr=gpa)
        self.ioctl(ioctls.KVM_SET_USER_MEMORY_REGION, region)
        del self._life.ram[slot]

    def remove_memory(self, memory: "GuestMemory") -> None:
        """Take a slot away and unmap its memory.

        Where only vCPUs keep the VM alive that cannot be told the kernel any more: the memory
        then goes with the last of them.
        """
        if not self.closed:
            self.unmap_memory(memory.gpa, memory.slot)
        elif self._life.descriptors:
            return
        # somebody else may look at the same bytes: they then stay for him
        with suppress(BufferError):
            memory.ram.close()

    def create_vcpu(self, vcpu_id: int = 0) -> "VcpuFile":
        """KVM_CREATE_VCPU. EEXIST: the id is taken. EINVAL: it is out of range."""
        fd = self.ioctl(ioctls.KVM_CREATE_VCPU, vcpu_id)
        return VcpuFile(fd, self._vcpu_mmap_bytes, self._life)


class GuestMemory:
    """Memory of a VM's slot at `gpa` (`VmFile.add_memory`).

    `ram` is what the guest sees, and may be handed to others.
    """

    def __init__(self, vm: VmFile, slot: int, gpa: int, ram: mmap.mmap) -> None:
        self.slot = slot
        self.gpa = gpa
        self.ram = ram
        self.size_bytes = len(ram)
        self._vm = vm
        self._closed = False

    def close(self) -> None:
        """Take it from the VM and unmap it; harmless when repeated."""
        if not self._closed:
            self._closed = True
            self._vm.remove_memory(self)


class VcpuFile(KvmFile):
    """A vCPU fd and the kvm_run area shared with the kernel (api.rst, "vcpu ioctls").

    `enter` is one KVM_RUN, inside `bounded`; `run` is both in one.
    """

    kind = "vCPU"

    def __init__(self, fd: int, mmap_bytes: int, life: _VmLife) -> None:
        super().__init__(fd)
        self._life = life
        life.descriptors += 1
        self._lock = threading.RLock()
        self._is_open = True
        self._runner = 0
        self.tid = 0
        """The thread that runs it, or last did, as the kernel counts threads; 0: none yet."""
        self._kicked = False
        self._ended = False
        self._deadline_s = 0.0
        self._timer = _ThreadTimer()
        self._map: mmap.mmap | None = None
        self._kvm_run: kvm_run | None = None
        try:
            self._map = mmap.mmap(fd, mmap_bytes)
        except OSError:
            self.close()
            raise
        self._kvm_run = kvm_run.from_buffer(self._map)

    @property
    def area(self) -> kvm_run:
        """The shared area. Raises `KvmError` EBADF after `close`."""
        if self._kvm_run is None or not self._is_open:
            raise KvmError(errno.EBADF, "KVM_RUN", "this vCPU was closed")
        return self._kvm_run

    @property
    def closed(self) -> bool:
        """True after `close`, even if a KVM_RUN is still on its way out."""
        return not self._is_open

    @contextmanager
    def bounded(self, limit_s: float | None = DEFAULT_LIMIT_S) -> Iterator[None]:
        """Every `enter` inside ends after `limit_s` wall seconds in all (None: only a `kick` ends
        one), or at a `kick`.

        One vCPU is run by one thread at a time: RuntimeError otherwise.
        """
        # before anyone can see who runs it: unblocked, a kick would end the process
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {KICK_SIGNAL})
        try:
            self._take()
        except RuntimeError:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            raise
        try:
            self._set_signal_mask(before)
            self._deadline_s = math.inf
            if limit_s is not None:
                self._deadline_s = time.monotonic() + limit_s
                self._timer.arm(limit_s)
            yield
        finally:
            if limit_s is not None:
                self._timer.disarm()
            if threading.current_thread() is not threading.main_thread():
                # a later thread may get this one's id, but the timer would be for the dead one
                self._timer.close()
            with self._lock:
                self._runner = 0
                if self._ended:
                    self._ended = False
                    if self._kvm_run is not None:
                        self._kvm_run.immediate_exit = int(self._kicked)
            # under the block: what arrived late must not reach the thread unblocked
            _drain()
            if KICK_SIGNAL not in before:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, {KICK_SIGNAL})
            if self.closed:
                self.close()

    def _take(self) -> None:
        """The calling thread runs it from now on."""
        with self._lock:
            if self._runner:
                raise RuntimeError("this vCPU is running already; one thread at a time")
            self._runner = threading.get_ident()
            self.tid = threading.get_native_id()

    def enter(self) -> Exit:
        """KVM_RUN until the next exit; signals meant for others do not end it.

        Raises `KvmError`: EIO from another process than the VM's, EBADF after `close`, EFAULT
        where guest memory went away.
        """
        while True:
            self.area  # noqa: B018  closed meanwhile: EBADF
            try:
                fcntl.ioctl(self._fd, ioctls.KVM_RUN, 0)
            except (InterruptedError, BlockingIOError):  # EAGAIN: an INIT or SIPI was taken
                if stop := self._stopped():
                    return stop
                continue
            except OSError as error:
                raise KvmError(error.errno or 0, "KVM_RUN") from None
            assert self._map is not None
            return decode(self.area, self._map)

    def run(self, limit_s: float = DEFAULT_LIMIT_S) -> Exit:
        """One KVM_RUN to the next exit, at most `limit_s` wall seconds; errors as `enter`."""
        with self.bounded(limit_s):
            return self.enter()

    def kick(self) -> None:
        """End the KVM_RUN under way, or the next one, with `ExitIntr("kick")`; any thread may."""
        with self._lock:
            self._kicked = True
            if self._kvm_run is not None:
                self._kvm_run.immediate_exit = 1
            if self._runner:
                signal.pthread_kill(self._runner, KICK_SIGNAL)

    def end(self) -> None:
        """As `kick`, but for the `bounded` under way alone: every `enter` in it ends from now on.

        Does nothing when there is none.
        """
        with self._lock:
            if self._runner:
                self._ended = True
                if self._kvm_run is not None:
                    self._kvm_run.immediate_exit = 1
                signal.pthread_kill(self._runner, KICK_SIGNAL)

    def answer(self, data: bytes) -> None:
        """Give the bytes of the read the last exit (IO or MMIO) asked for.

        Raises ValueError when it was no read, or the size is wrong.
        """
        at = answer_place(self.area, data)
        assert self._map is not None
        self._map[at : at + len(data)] = data

    def set_real_mode(self, cs: int, ip: int, *, unreal: bool = False) -> None:
        """Registers as after RESET, but starting at `cs`:`ip` in real mode.

        All segments are 64 KiB at selector * 16. With `unreal` the data segments reach 4 GiB:
        the local APIC and the IOAPIC are then within a real-mode guest's reach.
        """
        sregs = self.get(ioctls.KVM_GET_SREGS, kvm_sregs)
        for name in ("ds", "es", "fs", "gs", "ss"):
            _real_segment(getattr(sregs, name), 0, DATA_SEGMENT, unreal=unreal)
        _real_segment(sregs.cs, cs, CODE_SEGMENT, unreal=False)
        for table in (sregs.gdt, sregs.idt):
            table.base, table.limit = 0, 0xFFFF
        sregs.cr0 = CR0_AFTER_RESET
        sregs.cr2 = sregs.cr3 = sregs.cr4 = sregs.efer = 0
        self.ioctl(ioctls.KVM_SET_SREGS, sregs)
        self.ioctl(ioctls.KVM_SET_REGS, kvm_regs(rip=ip, rflags=2))

    def close(self) -> None:
        """Unmap kvm_run and give the descriptor back. A `bounded` under way ends: every `enter` in
        it with EBADF from now on; who is in it then does the rest.
        """
        with self._lock:
            self._is_open = False
            if self._runner:
                self.kick()
                return
            fd, map_ = self._fd, self._map
            self._fd, self._kvm_run, self._map = -1, None, None
        self._timer.close()
        if map_ is not None:
            # a caller may still hold `area`: the mapping then goes with that reference
            with suppress(BufferError):
                map_.close()
        if fd >= 0:
            os.close(fd)
            self._life.leave()

    def _stopped(self) -> ExitIntr | None:
        _drain()
        with self._lock:
            if self._kicked:
                self._kicked = False
                self.area.immediate_exit = int(self._ended)
                return ExitIntr("kick")
            if self.area.immediate_exit:
                return ExitIntr("kick")
        return ExitIntr("time") if time.monotonic() >= self._deadline_s else None

    def _set_signal_mask(self, blocked: set[int]) -> None:
        bits = sum(1 << (number - 1) for number in blocked if number != KICK_SIGNAL)
        data = bytes(structs.kvm_signal_mask(len=8)) + bits.to_bytes(8, "little")
        self.ioctl(ioctls.KVM_SET_SIGNAL_MASK, bytearray(data))


def _real_segment(segment: kvm_segment, selector: int, type_: int, *, unreal: bool) -> None:
    """A real-mode segment; KVM cuts a limit above 1 MiB unless `g` says it is in pages."""
    segment.selector = selector
    segment.base = selector << 4
    segment.limit = 0xFFFF_FFFF if unreal else 0xFFFF
    segment.g = int(unreal)
    segment.type = type_
    segment.s = segment.present = 1
    segment.dpl = segment.db = segment.l = segment.avl = segment.unusable = 0


def _drain() -> None:
    """Take our signal off the calling thread, which has it blocked."""
    while signal.sigtimedwait({KICK_SIGNAL}, 0) is not None:
        pass


class _sigevent(ctypes.Structure):
    """struct sigevent of timer_create(2), with the thread it is for."""

    _fields_ = (
        ("sigev_value", ctypes.c_void_p),
        ("sigev_signo", ctypes.c_int),
        ("sigev_notify", ctypes.c_int),
        ("sigev_notify_thread_id", ctypes.c_int),
        ("pad", ctypes.c_byte * 44),
    )


class _itimerspec(ctypes.Structure):
    _fields_ = (
        ("interval_s", ctypes.c_long),
        ("interval_ns", ctypes.c_long),
        ("value_s", ctypes.c_long),
        ("value_ns", ctypes.c_long),
    )


_CLOCK_MONOTONIC, _SIGEV_THREAD_ID = 1, 4


class _ThreadTimer:
    """A POSIX timer that sends KICK_SIGNAL to the thread that armed it."""

    def __init__(self) -> None:
        self._tid = 0
        self._id = ctypes.c_void_p()
        self._libc = ctypes.CDLL(None, use_errno=True)

    def arm(self, seconds: float) -> None:
        """One signal to this thread after `seconds` on CLOCK_MONOTONIC."""
        tid = threading.get_native_id()
        if tid != self._tid:
            self.close()
            event = _sigevent(
                sigev_signo=KICK_SIGNAL, sigev_notify=_SIGEV_THREAD_ID, sigev_notify_thread_id=tid
            )
            timer = ctypes.byref(self._id)
            self._call("timer_create", _CLOCK_MONOTONIC, ctypes.byref(event), timer)
            self._tid = tid
        # 0 would disarm it: a limit of nothing still has to end KVM_RUN
        self._set(max(1, int(seconds * 1e9)))

    def disarm(self) -> None:
        """No signal any more; one already sent stays pending."""
        if self._tid:
            self._set(0)

    def close(self) -> None:
        """Give the timer back."""
        if self._tid:
            self._tid = 0
            self._libc.timer_delete(self._id)

    def _set(self, ns: int) -> None:
        spec = _itimerspec(value_s=ns // 10**9, value_ns=ns % 10**9)
        self._call("timer_settime", self._id, 0, ctypes.byref(spec), None)

    def _call(self, name: str, *args: object) -> None:
        if getattr(self._libc, name)(*args):
            code = ctypes.get_errno()
            raise OSError(code, f"{name}: {os.strerror(code)}")


def open_kvm(path: str = KVM_PATH) -> KvmDevice:
    """Open /dev/kvm. Raises `HostError` with the remedy where it is absent or forbidden."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise _host_error(path, error) from None
    device = KvmDevice(fd)
    try:
        version = device.api_version()
    except KvmError as error:
        device.close()
        name = errno.errorcode.get(error.errno or 0, "")
        raise HostError(
            f"{path} is no KVM device ({error.call}: {name})",
            "a KVM device is: c 10 232",
        ) from None
    if version != structs.KVM_API_VERSION:
        device.close()
        raise HostError(f"{path} speaks KVM API {version}, not 12", "use a kernel from 2.6.22 on")
    return device


def _host_error(path: str, error: OSError) -> HostError:
    if error.errno == errno.ENOENT:
        return HostError(
            f"{path} is not there",
            "modprobe kvm_intel (or kvm_amd)",
        )
    if error.errno in (errno.EACCES, errno.EPERM):
        return HostError(
            f"{path} may not be opened ({error.strerror})",
            "join the group kvm: usermod -aG kvm USER, then log in again",
        )
    if error.errno in (errno.ENODEV, errno.ENXIO):
        return HostError(
            f"{path} has no KVM behind it ({error.strerror})",
            "switch virtualisation on in the firmware, then modprobe kvm_intel (or kvm_amd)",
        )
    return HostError(f"{path} cannot be opened ({error.strerror})", "see dmesg")


def pit_worker_tids(tgid: int) -> set[int]:
    """The `kvm-pit/<tgid>` kernel threads: one for each VM with a PIT that process `tgid` made."""
    name = f"kvm-pit/{tgid}"
    found = set()
    for comm in Path("/proc").glob("[0-9]*/comm"):
        with suppress(OSError):
            if comm.read_text().rstrip("\n") == name:
                found.add(int(comm.parent.name))
    return found
