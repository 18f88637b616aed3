"""One back end's VM under a sequence: it carries operations out and tells what there is to see.

Interrupts are taken in windows only (`Side.window`), one each. What makes them comparable with a
back end that writes EOI itself when it injects one (docs/fidelity.md): a window opens only while
nothing is in service in the local APIC, and afterwards the guest writes EOI where something is. And
with one that looks for interrupts at every KVM_RUN: before a window the vCPU is asked to look
(KVM_REQ_EVENT), by a KVM_SET_MP_STATE that changes nothing. And with one that serves all requests
at KVM_RUN only: after an access the vCPU enters the guest once more, for nothing.

No timer may fire by itself: counts are far away (`far_count`), and in real time `keep_pit_away`
starts the PIT's counters again before they get near. Operations that let one fire wait for it.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from kvmtick.abi.closing import Closing
from kvmtick.abi.errors import KvmError
from kvmtick.abi.exits import ExitHlt, ExitIo, ExitIoapicEoi, ExitIrqWindowOpen, ExitMmio
from kvmtick.abi.structs import KVM_MP_STATE_RUNNABLE
from kvmtick.conform.fuzz import mailbox
from kvmtick.conform.fuzz.look import Looks, Seen, errno_name
from kvmtick.conform.fuzz.mailbox import Mailbox
from kvmtick.conform.fuzz.operations import Answer, Operation
from kvmtick.kvm.api import System, Vcpu, Vm
from kvmtick.machine.machine import Machine
from kvmtick.timing.wall import Stopwatch, sleep_ns

__all__ = ["LOST", "Config", "GuestLostError", "LateHostError", "Side"]

VECTORS_TAKEN = "vectors taken"
LOST = "the guest is lost"
EVENTFDS = 4
LIMIT_S = 5.0
"""No entry takes that long, but where the guest is lost."""
MOST_EXITS = 20
MOST_NMIS = 6

MSR_TSC, MSR_APIC_BASE, MSR_TSC_DEADLINE, MSR_X2APIC = 0x10, 0x1B, 0x6E0, 0x800
APIC_BASE_X2APIC, APIC_BASE_ENABLED = 1 << 10, 1 << 11
TPR, EOI, SVR, ISR, IRR, ESR, TMCCT = 0x80, 0xB0, 0xF0, 0x100, 0x200, 0x280, 0x390
APIC_PAGES = 0xFED0_0000
"""From here on there are local APICs, where MSR_IA32_APICBASE puts them."""
READABLE = frozenset((0x20, 0x30, TPR, 0x90, 0xA0, 0xD0, 0xE0, SVR, 0x3E0))
READABLE |= {*range(ISR, ESR + 1, 0x10), *range(0x300, TMCCT + 1, 0x10)}
"""Registers of a local APIC; of any other the kernel gives what its emulator read last."""

LEAST_COUNT = 0xC000
"""Of the PIT's channel 0: 41 ms."""
REARM_S, LATE_S = 0.010, 0.035
IRQFD_WORK_NS = 300_000
LEAST_TIMER_S = 2.2
"""A sequence must be over before a local APIC's timer may fire: the shortest takes 3.2 s."""


@dataclass(frozen=True, slots=True)
class Config:
    """What a sequence is about: `runs`: its vCPUs enter the guest."""

    runs: bool


class LateHostError(Exception):
    """The host took so long that a timer may have fired that should not."""


class GuestLostError(Exception):
    """A vCPU has left the guest's program."""


class Side(Closing):
    """A VM of one back end, and what a sequence needs around it."""

    def __init__(self, system: System, config: Config) -> None:
        self.vm: Vm[Vcpu] = system.create_vm(ram_bytes=mailbox.RAM_BYTES)
        self.config = config
        self.vcpus: list[Vcpu] = []
        self._mailbox = Mailbox(self.vm)
        self._fds = [os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(EVENTFDS)]
        self._exits: list[Answer] = []
        self.lost = ""
        """Why nothing more can be done with it."""
        self._real_time = system.backend == "kernel"
        self._age = Stopwatch()
        self._since_load = Stopwatch()
        self._look_at = Looks(self.vm, config.runs)
        self._lock: AbstractContextManager[Any] = (
            nullcontext() if self._real_time else _machine(self.vm).lock
        )
        self._port_masks: dict[int, int] = {}
        mailbox.install(self.vm)

    def close(self) -> None:
        """Give the VM and the eventfds back; harmless when repeated."""
        self.vm.close()
        for fd in self._fds:
            os.close(fd)
        self._fds.clear()

    # One step.

    def step(self, operation: Operation) -> Seen:
        """Carry an operation out and look at everything.

        Raises LateHostError where a timer may have fired. Whatever else goes wrong is the answer,
        and an end: `lost` says so.
        """
        if self._real_time:
            self._keep_pit_away()
        self._exits = []
        try:
            answer = operation.do(self)
        except KvmError as error:
            answer = errno_name(error)
        except GuestLostError as error:
            answer, self.lost = LOST, str(error)
        except Exception as error:
            answer = self.lost = repr(error)
        if self._exits:
            answer = (answer, *self._exits)
        seen = self._look(answer)
        if self._real_time and self._age.elapsed_s() > LEAST_TIMER_S:
            raise LateHostError
        return seen

    def look_again(self, seen: Seen, after_us: int) -> Seen:
        """What there is to see a moment after `seen`, in which nothing was done."""
        if not self._real_time:
            return seen
        sleep_ns(after_us * 1000)
        again = self._look(seen.answer)
        if self.config.runs:
            again.states[VECTORS_TAKEN] = seen.states[VECTORS_TAKEN]
        return again

    def _look(self, answer: Answer) -> Seen:
        with self._lock:
            seen = self._look_at.everything(self.vcpus, answer)
        if self.config.runs:
            nmis, *vectors = mailbox.interrupts_taken(self.vm)
            seen.states["NMIs taken"] = nmis
            seen.states[VECTORS_TAKEN] = " ".join(map(hex, vectors))
        return seen

    # What operations are made of.

    def vcpu(self, index: int) -> Vcpu | None:
        """The vCPU that was created as the `index`-th; None: there is none."""
        return self.vcpus[index] if index < len(self.vcpus) else None

    def create_vcpu(self, vcpu_id: int) -> None:
        """KVM_CREATE_VCPU, at the guest's entry if it runs."""
        vcpu = self.vm.create_vcpu(vcpu_id)
        self.vcpus.append(vcpu)
        if self.config.runs and vcpu.get_mp_state() == KVM_MP_STATE_RUNNABLE:
            vcpu.start_at(0, mailbox.START)

    def fd(self, index: int) -> int:
        """The descriptor of an eventfd; -1 for what is none."""
        return self._fds[index] if 0 <= index < EVENTFDS else -1

    def signal_fd(self, index: int) -> None:
        """Write 1 to an eventfd; returns when an irqfd had time to see it."""
        os.eventfd_write(self._fds[index], 1)
        self.let_irqfds_work()

    def let_irqfds_work(self) -> None:
        """The kernel leaves an irqfd that was signalled to a work item: let that be done."""
        if self._real_time:
            sleep_ns(IRQFD_WORK_NS)

    def read_fd(self, index: int) -> Answer:
        """What an eventfd counted; None if nothing."""
        try:
            return os.eventfd_read(self._fds[index])
        except BlockingIOError:
            return None

    def wait_us(self, us: int) -> None:
        """Let that much of the VM's time pass."""
        if self._real_time:
            sleep_ns(us * 1000)
            return
        machine = _machine(self.vm)
        end_ns = machine.clock.now_ns + us * 1000
        while machine.board.queue.next_ns <= end_ns:
            machine.clock.now_ns = max(machine.clock.now_ns, machine.board.queue.next_ns)
            machine.board.queue.run_due(machine.clock)
        machine.clock.now_ns = end_ns

    def far_count(self, value: int) -> int:
        """What to write to counter 0 instead of `value`, so that no count is short."""
        write_state = self._look_at.pit.channels[0].write_state
        if write_state in (2, 4):
            return value | LEAST_COUNT >> 8
        return value if write_state == 3 else value & ~0xFF

    def _keep_pit_away(self) -> None:
        """Load the PIT's counters anew, with the state as it is, before the timer can fire."""
        since_s = self._since_load.elapsed_s()
        if since_s < REARM_S:
            return
        try:
            self.vm.set_pit2(self.vm.get_pit2())
        except KvmError:
            self._since_load = Stopwatch()
            return
        since_s = self._since_load.elapsed_s()
        self._since_load = Stopwatch()
        if since_s > LATE_S:
            raise LateHostError

    # MSRs.

    def from_now(self, index: int, msr: int, value: int) -> int:
        """The value for an MSR; a TSC deadline counts from now."""
        if msr != MSR_TSC_DEADLINE or not value:
            return value
        return self.vcpus[index].get_msrs((MSR_TSC,))[MSR_TSC] + value

    @staticmethod
    def msr_answer(index: int, value: int) -> int:
        """As much of an MSR's value as is compared."""
        is_time = index in (MSR_TSC_DEADLINE, MSR_X2APIC + TMCCT // 16)
        return int(value != 0) if is_time else value

    # The guest.

    def runs(self, index: int) -> bool:
        """Whether a vCPU can enter the guest."""
        state = self.vcpus[index].get_mp_state() if self.config.runs else -1
        return state == KVM_MP_STATE_RUNNABLE

    def access(self, index: int, kind: str, address: int = 0, value: int = 0) -> Answer:
        """Let the guest do something; what it read, and 1 for a #GP."""
        if not self.runs(index):
            return "not running"
        if self.vcpus[index].get_vcpu_events().interrupt.injected and self._in_service(index):
            return "in service"
        self._take_nmis(index)
        self._mailbox.post(kind, address, value)
        self._enter(index)
        read, fault = self._mailbox.answer()
        if kind.startswith("in"):
            read &= self._port_mask(index, address, int(kind[2:]) // 8)
        else:
            read = _masked(kind, address, read)
        self._mailbox.post("none")
        self._enter(index)
        self._take_nmis(index)
        return read, fault

    def _port_mask(self, index: int, port: int, size_bytes: int) -> int:
        """The bits of a port that do not depend on time: of a counter none, of a latched status all
        but OUT; of port 0x61 not the refresh clock and OUT. Port 0x43 leaves the vCPU's buffer of
        port reads as the last one left it.
        """
        in_pit = port + size_bytes <= 0x44
        if port == 0x43 and in_pit:
            return self._port_masks.get(index, ~0)
        mask = ~0
        if port == 0x61:
            mask = ~0x30
        elif 0x40 <= port < 0x43 and in_pit:
            channel = self._look_at.pit.channels[port - 0x40]
            mask = ~0x80 if channel.status_latched else ~0xFF
        self._port_masks[index] = mask
        return mask

    def window(self, index: int, kind: str) -> Answer:
        """An interrupt window of the guest; `hlt` only where an interrupt waits."""
        if self._in_service(index):
            return "in service"
        if kind == "hlt" and not self._wakes(index):
            return "nothing to wait for"
        vcpu = self.vcpus[index]
        if self.runs(index):
            vcpu.set_mp_state(KVM_MP_STATE_RUNNABLE)  # KVM_REQ_EVENT
        answer = self.access(index, kind)
        if self._in_service(index):
            base = vcpu.get_msrs((MSR_APIC_BASE,))[MSR_APIC_BASE]
            if base & APIC_BASE_X2APIC:
                self.access(index, "wrmsr", MSR_X2APIC + EOI // 16)
            else:
                self.access(index, "w32", (base & ~0xFFF & 0xFFFF_FFFF) + EOI)
        return answer

    def _in_service(self, index: int) -> bool:
        """Whether a vCPU's local APIC has a vector in ISR."""
        lapic = self._look_at.lapic(self.vcpus[index])
        return lapic is not None and _highest(lapic, ISR) >= 0

    def _wakes(self, index: int) -> bool:
        """Whether HLT ends: the local APIC has a vector for a vCPU with nothing in service."""
        lapic = self._look_at.lapic(self.vcpus[index])
        if lapic is None:
            return True  # HLT is an exit
        base = self.vcpus[index].get_msrs((MSR_APIC_BASE,))[MSR_APIC_BASE]
        enabled = base & APIC_BASE_ENABLED and lapic[SVR + 1] & 1
        return bool(enabled) and max(_highest(lapic, IRR), 0) & 0xF0 > lapic[TPR] & 0xF0

    def _take_nmis(self, index: int) -> None:
        """Enter the guest until the vCPU has no NMI to take."""
        for _ in range(MOST_NMIS):
            nmi = self.vcpus[index].get_vcpu_events().nmi
            if not nmi.pending and not nmi.injected:
                return
            self._mailbox.post("none")
            self._enter(index)

    def _enter(self, index: int) -> None:
        """Let a vCPU into the guest until it tells that it has done what its mailbox holds."""
        vcpu = self.vcpus[index]
        for _ in range(MOST_EXITS):
            exit_ = vcpu.run(LIMIT_S)
            if isinstance(exit_, ExitIo):
                if exit_.is_write and exit_.port == mailbox.PORT_DONE:
                    if self._mailbox.is_done:
                        return
                    continue
                self._exits.append((exit_.port, exit_.size, exit_.data.hex()))
                if not exit_.is_write:
                    vcpu.answer(b"\xff" * exit_.size * exit_.count)
            elif isinstance(exit_, ExitMmio):
                self._exits.append((exit_.phys_addr, exit_.len, exit_.data.hex()))
                if not exit_.is_write:
                    vcpu.answer(b"\xff" * exit_.len)
            elif isinstance(exit_, ExitIoapicEoi):
                self._exits.append(("IOAPIC EOI", exit_.vector))
            elif isinstance(exit_, ExitHlt | ExitIrqWindowOpen):
                self._exits.append(type(exit_).__name__)
            else:
                raise GuestLostError(f"vCPU {index}: {exit_}")
        raise GuestLostError(f"vCPU {index}: still not done after {MOST_EXITS} exits")


def _machine(vm: Any) -> Machine:
    """The machine of a VM of the model."""
    machine: Machine = vm.machine
    return machine


def _highest(lapic: bytes, register: int) -> int:
    """The highest vector in IRR or ISR; -1: none."""
    for word in range(7, -1, -1):
        at = register + 0x10 * word
        bits = int.from_bytes(lapic[at : at + 4], "little")
        if bits:
            return 32 * word + bits.bit_length() - 1
    return -1


def _masked(kind: str, address: int, value: int) -> int:
    """As much of what a guest read as is compared."""
    if kind == "rdmsr":
        return Side.msr_answer(address, value)
    size_bytes = {"r32": 4, "r16": 2, "r8": 1}.get(kind)
    if size_bytes is None or address < APIC_PAGES:
        return value
    register, byte = address & 0xFF0, address & 0xF
    if register not in READABLE or byte + size_bytes > 4:
        return 0
    if register == TMCCT:
        return int(value != 0) if size_bytes == 4 else 0
    return value
