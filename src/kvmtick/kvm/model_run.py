"""KVM_RUN of the model (kvm_arch_vcpu_ioctl_run, arch/x86/kvm/x86.c; api.rst 4.10 and 5).

What no chip answers leaves to user space as the kernel's instruction emulator does it: a write when
the instruction has retired, a read before it. The next KVM_RUN then lets the instruction go on with
the answer, before anything else happens to the vCPU. An access over the end of a page is two exits,
an instruction with several accesses has one for each. REP INS asks for as many elements at once as
KVM does (`pio_in_emulated`), REP OUTS for one.

Not modelled: exits for debugging, hypercalls, MSRs, SMM, coalesced MMIO, dirty rings;
`kvm_valid_regs`; a signal for the process does not end the bare ioctl.
"""

import errno
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from mmap import mmap
from struct import Struct

from kvmtick.abi import structs
from kvmtick.abi.errors import KvmError
from kvmtick.abi.exits import Exit, ExitIntr, answer_place, decode
from kvmtick.abi.structs import kvm_run, offset_of
from kvmtick.cpu.engine import ExitReason
from kvmtick.cpu.paging import PAGE_BYTES
from kvmtick.irqchip.apicdef import MSR_IA32_APICBASE
from kvmtick.kvm.dev_ioctl import VCPU_MMAP_BYTES
from kvmtick.machine.machine import Machine
from kvmtick.machine.vcpu_thread import VcpuThread
from kvmtick.timing.wall import Stopwatch
from kvmtick.vcpu.events import RFLAGS_IF
from kvmtick.vcpu.exits import CR8_RESERVED
from kvmtick.vcpu.vcpu import MpState, Request, Vcpu

__all__ = ["KvmRun"]

PIO_DATA_OFFSET = 4096
"""KVM_PIO_PAGE_OFFSET, in bytes."""
READ_AHEAD_BYTES = 1024
"""What REP INS asks for at once, at most (struct read_cache)."""
RFLAGS_DF = 1 << 10

_REASON = Struct("<I")
_REASON_AT = offset_of(kvm_run, "exit_reason")
_UNION_AT = offset_of(kvm_run, "u")
_IO = Struct("<BBHIQ")
_MMIO = Struct("<Q8sIB")
_INTERNAL = Struct("<II6Q")

_EXIT_ACCESS = int(ExitReason.ACCESS)
_EXIT_HLT = int(ExitReason.HLT)


@dataclass(slots=True)
class _Access:
    """An access of the instruction under way; `value`: what was written, or the answer."""

    is_pio: bool
    is_write: bool
    address: int
    size_bytes: int
    value: int = 0
    count: int = 1

    def is_again(self, other: "_Access") -> bool:
        """Whether it is the same, but for the value."""
        return (
            self.address == other.address
            and self.is_write == other.is_write
            and self.is_pio == other.is_pio
            and self.size_bytes == other.size_bytes
        )


class _UserSpace:
    """The vCPU's accesses that leave KVM_RUN; `exits` are those user space is to hear of.

    A refused instruction is begun anew once its read is answered. It then does again what it had
    done before: `_done` answers that.
    """

    def __init__(self, machine: Machine, vcpu: Vcpu) -> None:
        self._machine = machine
        self._vcpu = vcpu
        self.exits: deque[_Access | int] = deque()
        """Accesses, and vectors of KVM_EXIT_IOAPIC_EOI."""
        self.lowered_tpr = False
        self.lost_memory = False
        self.completing = False
        """The instruction at RIP was begun and is not finished."""
        self.asked: _Access | None = None
        """The read that user space has to answer."""
        self._done: list[_Access] = []
        self._at = 0
        self._ahead: deque[int] = deque()
        """Further elements for REP INS."""
        self.defers = not vcpu.engine.exact
        """An engine that looks at blocks shall come again with the accessing instruction alone."""

    @property
    def rounds(self) -> int:
        """How many rounds of the instruction at RIP have their answers."""
        return 1 + len(self._ahead) if self._vcpu.engine.exact else 1

    # UserSpace.

    def read(self, port: int, size_bytes: int) -> int | None:
        return self._read(_Access(True, False, port, size_bytes))

    def write(self, port: int, size_bytes: int, value: int) -> None:
        self._write(_Access(True, True, port, size_bytes, value))

    def mmio_read(self, gpa: int, size_bytes: int) -> int | None:
        if self._machine.memory.is_missing(gpa, writes=False):
            self.lost_memory = True
            return None
        return self._read(_Access(False, False, gpa, size_bytes))

    def mmio_write(self, gpa: int, size_bytes: int, value: int) -> None:
        if self._machine.memory.is_missing(gpa, writes=True):
            self.lost_memory = True
            self._vcpu.engine.refuse()
        else:
            self._write(_Access(False, True, gpa, size_bytes, value))

    def ioapic_eoi(self, vector: int) -> bool:
        self.exits.append(vector)
        self._vcpu.engine.kick()
        return True

    def set_tpr(self) -> None:
        self.lowered_tpr = True
        self._vcpu.engine.kick()

    def unknown_msr(self, vcpu_id: int, access: str, index: int, rip: int) -> None:
        """The guest gets #GP."""

    def _read(self, access: _Access) -> int | None:
        if self.defers:
            return None
        if done := self._again(access):
            return done.value
        if self._ahead and access.is_pio:
            return self._ahead.popleft()
        self.asked = access
        return None

    def _write(self, access: _Access) -> None:
        if self._again(access) is None:
            self._done.append(access)
            self._at += 1
            self.exits.append(access)
            self._vcpu.engine.kick()

    def _again(self, access: _Access) -> _Access | None:
        """What came of this access when the instruction was begun before."""
        if self._at == len(self._done):
            return None
        done = self._done[self._at]
        if not done.is_again(access):
            del self._done[self._at :]
            return None
        self._at += 1
        return done

    # The instruction under way.

    def left_before_access(self) -> None:
        """The engine abandoned the instruction."""
        if self.defers:
            self.defers = False
            return
        self.completing = True
        self._at = 0
        if self.asked is not None:
            self.asked.count = self._elements()
            self.exits.append(self.asked)

    def answer(self, data: bytes) -> None:
        """User space has filled in what was asked for."""
        asked, self.asked = self.asked, None
        assert asked is not None
        step = asked.size_bytes
        values = [
            int.from_bytes(data[at : at + step], "little") for at in range(0, len(data), step)
        ]
        asked.value = values[0]
        self._done.append(asked)
        self._ahead.extend(values[1:])

    def finished(self) -> None:
        """The instruction, or a round of it, has retired."""
        self._done.clear()
        self._at = 0
        self.completing = bool(self._ahead)
        self.defers = not self.completing and not self._vcpu.engine.exact

    @property
    def place(self) -> tuple[int, int]:
        """Where the guest stands."""
        return self._vcpu.instructions, self._vcpu.engine.rip

    def forget(self) -> None:
        """The instruction will not go on: somebody has put the vCPU elsewhere."""
        self.asked = None
        self._ahead.clear()
        self.exits.clear()
        self.finished()

    def _elements(self) -> int:
        """`pio_in_emulated`: how many elements a REP INS reads at once; 1 for all else."""
        asked, rounds = self.asked, self._vcpu.engine.rounds
        if asked is None or not asked.is_pio or rounds <= 1:
            return 1
        registers = self._vcpu.engine.registers()
        offset = registers["rdi"] % PAGE_BYTES
        in_page = offset if registers["rflags"] & RFLAGS_DF else PAGE_BYTES - offset
        size_bytes = asked.size_bytes
        return max(1, min(in_page, READ_AHEAD_BYTES, size_bytes * rounds) // size_bytes)


class KvmRun:
    """One vCPU's kvm_run, and what KVM_RUN does with it."""

    def __init__(self, machine: Machine, vcpu: Vcpu) -> None:
        self._machine = machine
        self._vcpu = vcpu
        self._map: mmap | None = mmap(-1, VCPU_MMAP_BYTES)
        self._area: kvm_run | None = kvm_run.from_buffer(self._map)
        self._thread = VcpuThread(machine, vcpu)
        self._user = _UserSpace(machine, vcpu)
        self._place = self._user.place
        self._kicked = False
        self._limit_s: float | None = None
        self._stopwatch = Stopwatch()

    @property
    def area(self) -> kvm_run:
        """The kvm_run. KvmError EBADF after `close`."""
        if self._area is None:
            raise KvmError(errno.EBADF, "KVM_RUN", "this vCPU was closed")
        return self._area

    # What user space calls.

    def run(self, limit_s: float | None) -> Exit:
        """`Vcpu.run`."""
        self._limit_s = limit_s
        self._stopwatch = Stopwatch()
        try:
            while True:
                try:
                    self.enter()
                    break
                except KvmError as failure:
                    if failure.errno == errno.EINTR:
                        return self._interrupted()
                    if failure.errno != errno.EAGAIN:
                        raise
        finally:
            self._limit_s = None
        area = self.area
        assert self._map is not None
        return decode(area, self._map)

    def _interrupted(self) -> ExitIntr:
        if self._kicked:
            self._kicked = False
            self.area.immediate_exit = 0
            return ExitIntr("kick")
        return ExitIntr("kick" if self.area.immediate_exit else "time")

    def kick(self) -> None:
        """`Vcpu.kick`."""
        self._kicked = True
        if self._area is not None:
            self._area.immediate_exit = 1
        self._thread.call_out()

    def answer(self, data: bytes) -> None:
        """`Vcpu.answer`."""
        at = answer_place(self.area, data)
        assert self._map is not None
        self._map[at : at + len(data)] = data

    def close(self) -> None:
        """Give everything back; a `run` under way ends, and does it then. May be repeated."""
        self._thread.close()
        if self._thread in self._machine.threads:
            return
        self._area = None
        map_, self._map = self._map, None
        if map_ is not None:
            # somebody may hold `area`: it then goes with that reference
            with suppress(BufferError):
                map_.close()

    # KVM_RUN.

    def enter(self) -> None:
        """One KVM_RUN. KvmError EINTR: `immediate_exit`, a kick or the limit; EAGAIN: an INIT was
        taken; EINVAL: CR8 has reserved bits; EFAULT: a slot's memory is gone; EBADF: it was closed;
        EOPNOTSUPP: a vCPU of /dev/kvm under the model's chips.
        """
        if self._vcpu.engine.real_time:
            why = "a vCPU of /dev/kvm under the model's chips runs by Vm.run, or take Kvm('kernel')"
            raise KvmError(errno.EOPNOTSUPP, "KVM_RUN", why)
        try:
            self._enter_once(self.area)
        finally:
            if self._thread.closed:
                self.close()

    def _enter_once(self, area: kvm_run) -> None:
        exits = self._vcpu.exits
        with self._thread.running():
            before, exits.user_space = exits.user_space, self._user
            if self._place != self._user.place:
                self._user.forget()
            try:
                self._enter(area)
            finally:
                exits.user_space = before
                self._place = self._user.place
                self._post_run_save(area)

    def _enter(self, area: kvm_run) -> None:
        vcpu = self._vcpu
        if vcpu.mp_state == MpState.UNINITIALIZED:
            self._await_init(area)
        if vcpu.lapic is None:
            if area.cr8 & CR8_RESERVED:
                raise KvmError(
                    errno.EINVAL, "KVM_RUN", f"kvm_run.cr8 is {area.cr8:#x}, not 0 to 15"
                )
            vcpu.exits.cr8 = area.cr8
        if self._complete_access() or self._put_exit(area):
            return
        if area.immediate_exit:
            raise KvmError(errno.EINTR, "KVM_RUN")
        self._vcpu_run(area)

    def _await_init(self, area: kvm_run) -> None:
        while True:
            if area.immediate_exit:
                raise KvmError(errno.EINTR, "KVM_RUN")
            self._stop_if_over(area)
            if self._thread.is_ready(self._left_s()):
                return
            if self._vcpu.mp_state != MpState.UNINITIALIZED:
                raise KvmError(errno.EAGAIN, "KVM_RUN")

    def _vcpu_run(self, area: kvm_run) -> None:
        """`vcpu_run`."""
        vcpu = self._vcpu
        while True:
            if self._thread.is_ready(self._left_s()):
                self._ask_for_window(area)
                if vcpu.requests:
                    vcpu.serve_requests()
                if self._put_exit(area):
                    return
                if vcpu.mp_state == MpState.RUNNABLE and self._run_slice(area):
                    return
                if vcpu.wants_window and vcpu.may_take_interrupt():
                    self._put_reason(structs.KVM_EXIT_IRQ_WINDOW_OPEN)
                    return
            self._stop_if_over(area)

    def _run_slice(self, area: kvm_run) -> bool:
        """`vcpu_enter_guest`; True: leave to user space."""
        vcpu, user = self._vcpu, self._user
        alone = not user.defers and not vcpu.engine.exact
        reason = vcpu.enter(1) if alone else self._thread.enter(self._left_s())
        if reason == _EXIT_ACCESS:
            user.left_before_access()
            return self._complete_access() or self._put_exit(area)
        user.finished()
        if self._put_exit(area):
            return True
        if reason == _EXIT_HLT and vcpu.lapic is None:
            vcpu.make_runnable()
            self._put_reason(structs.KVM_EXIT_HLT)
            return True
        return self._put_failure(reason)

    def _complete_access(self) -> bool:
        """`complete_userspace_io`: go on with the instruction that user space has answered."""
        vcpu, user = self._vcpu, self._user
        if user.asked is not None and not user.exits and not user.lost_memory:
            assert self._map is not None
            asked = user.asked
            at = PIO_DATA_OFFSET if asked.is_pio else _UNION_AT + 8
            user.answer(self._map[at : at + asked.size_bytes * asked.count])
        while user.completing and not user.exits and not user.lost_memory:
            reason = vcpu.complete_access(user.rounds)
            if reason == _EXIT_ACCESS:
                user.left_before_access()
            elif vcpu.engine.retired:
                user.finished()
                if self._put_failure(reason):
                    return True
        if user.lost_memory:
            user.lost_memory = False
            raise KvmError(errno.EFAULT, "KVM_RUN")
        return False

    # How long.

    def _left_s(self) -> float | None:
        if self._limit_s is None:
            return None
        return max(0.0, self._limit_s - self._stopwatch.elapsed_s())

    def _stop_if_over(self, area: kvm_run) -> None:
        """A kick, or the limit: for the kernel they are signals."""
        self._thread.check_open()
        if area.immediate_exit or self._left_s() == 0:
            self._put_reason(structs.KVM_EXIT_INTR)
            raise KvmError(errno.EINTR, "KVM_RUN")

    # kvm_run.

    def _ask_for_window(self, area: kvm_run) -> None:
        """`dm_request_for_irq_injection` and `kvm_cpu_accept_dm_intr`."""
        vcpu = self._vcpu
        wants = bool(area.request_interrupt_window) and not vcpu.has_kernel_pic
        if wants and vcpu.lapic is not None:
            wants = vcpu.lapic.accepts_pic_intr()
        if wants != vcpu.wants_window:
            vcpu.wants_window = wants
            vcpu.requests |= int(Request.EVENT)

    def _post_run_save(self, area: kvm_run) -> None:
        """`post_kvm_run_save`."""
        vcpu = self._vcpu
        vcpu.wants_window = False
        area.if_flag = int(vcpu.engine.rflags & RFLAGS_IF != 0)
        area.ready_for_interrupt_injection = int(vcpu.has_kernel_pic or vcpu.may_take_interrupt())
        area.cr8 = vcpu.exits.cr8 if vcpu.lapic is None else vcpu.lapic.get_cr8()
        area.apic_base = vcpu.msrs.get(MSR_IA32_APICBASE, host_initiated=True) or 0

    def _put_reason(self, reason: int) -> None:
        assert self._map is not None
        _REASON.pack_into(self._map, _REASON_AT, reason)

    def _put_exit(self, area: kvm_run) -> bool:
        """The next of the exits that wait, if any."""
        user = self._user
        if user.exits:
            exit_ = user.exits.popleft()
            if isinstance(exit_, int):
                area.u.eoi.vector = exit_
                self._put_reason(structs.KVM_EXIT_IOAPIC_EOI)
            elif exit_.is_pio:
                self._put_io(exit_)
            else:
                self._put_mmio(exit_)
            return True
        if user.lowered_tpr:
            user.lowered_tpr = False
            self._put_reason(structs.KVM_EXIT_SET_TPR)
            return True
        return False

    def _put_io(self, access: _Access) -> None:
        map_ = self._map
        assert map_ is not None
        _IO.pack_into(
            map_,
            _UNION_AT,
            int(access.is_write),
            access.size_bytes,
            access.address,
            access.count,
            PIO_DATA_OFFSET,
        )
        if access.is_write:
            data = access.value.to_bytes(access.size_bytes, "little")
            map_[PIO_DATA_OFFSET : PIO_DATA_OFFSET + len(data)] = data
        self._put_reason(structs.KVM_EXIT_IO)

    def _put_mmio(self, access: _Access) -> None:
        assert self._map is not None
        data = access.value.to_bytes(8, "little")
        write = int(access.is_write)
        _MMIO.pack_into(self._map, _UNION_AT, access.address, data, access.size_bytes, write)
        self._put_reason(structs.KVM_EXIT_MMIO)

    def _put_failure(self, reason: int) -> bool:
        if reason == ExitReason.TRIPLE_FAULT:
            self._put_reason(structs.KVM_EXIT_SHUTDOWN)
            return True
        if reason != ExitReason.INTERNAL_ERROR:
            return False
        assert self._map is not None
        # prepare_emulation_failure_exit: flags, and what VMX would tell of the exit; no bytes of
        # the instruction, for there are none.
        suberror = structs.KVM_INTERNAL_ERROR_EMULATION
        _INTERNAL.pack_into(self._map, _UNION_AT, suberror, 6, *6 * (0,))
        self._put_reason(structs.KVM_EXIT_INTERNAL_ERROR)
        return True
