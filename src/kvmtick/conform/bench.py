"""What a conformance case works with: VMs of a back end, and scripts of the `scenario` guest.

A case does with its VMs what it would do with KVM's; the calls are the same on every back end, and
whoever can make VMs with them can be put on the bench (`Bench.make_vm`). `Bench.needs` is for what
a host's KVM may be unable to show (`kvmtick.conform.probes`).
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial, wraps
from typing import Any, TypeVar, cast

from kvmtick import guests
from kvmtick.abi import HostError, structs
from kvmtick.abi.caps import CAPS
from kvmtick.abi.structs import (
    KVM_IRQCHIP_IOAPIC,
    KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE,
    kvm_irq_routing_entry,
    kvm_pit_channel_state,
    to_chip,
)
from kvmtick.conform.case import Failed, Skipped, equal
from kvmtick.guests.script import EXIT_CODE, Code, Op, Results, Scenario, out8, tsc_read
from kvmtick.kvm.api import Vcpu, Vm
from kvmtick.kvm.kernel import KernelSystem, KernelVm
from kvmtick.kvm.model import ModelVm
from kvmtick.kvm.setup import cpuid_of
from kvmtick.machine.ports import PORT_HOST_SLEEP
from kvmtick.timing.wall import Stopwatch

T = TypeVar("T")

Script = tuple[Op | tuple[Op, ...], ...]
Handler = Callable[[int, int, int | None], int | None]

COUNT = 1193
"""A PIT count, whose period is"""
PERIOD_NS = 999_848
LIMIT_S = 5.0
LIMIT_NS = 5_000_000_000
"""No guest of a case that works comes near these, of wall time and of its own."""

LATE_MS = 4
TOLERANCE = LATE_MS + 2
ATTEMPTS = 4
"""How late a host may be, what that makes of a count of ticks at 1 kHz, how often it is tried."""
TIMES_AT = 124
"""The results that hold the TSC at the beginning and at the end of `Bench.on_time`."""


PORT_ACT = 0x510
"""A write to this port or one of the next is an exit to user space, where the test acts."""
PORT_NOBODY = 0x80
READ_AT = 0x7900
"""Where images of real-mode code leave what they read."""
LEAVE = bytes((0xB0, EXIT_CODE, 0xE6, 0xF4))
"""The end of such an image: mov al, EXIT_CODE; out 0xf4, al."""
WINDOWS: Script = (out8(PORT_NOBODY, 0),) * 8
"""Exits to user space: after each the guest takes an interrupt if one waits (IF=1)."""

# Registers of the local APIC.
ID, VERSION, TPR, PPR, EOI, LDR, DFR = 0x20, 0x30, 0x80, 0xA0, 0xB0, 0xD0, 0xE0
SVR, ISR, TMR, IRR, ESR, ICR, ICR_HIGH = 0xF0, 0x100, 0x180, 0x200, 0x280, 0x300, 0x310
LVTT, LVTTHMR, LVTPC, LVT0, LVT1, LVTERR = 0x320, 0x330, 0x340, 0x350, 0x360, 0x370
TMICT, TMCCT, TDCR, SELF_IPI = 0x380, 0x390, 0x3E0, 0x3F0

ENABLED = 0x1FF
DIVIDE_BY_1 = 0xB
LVT_MASKED, LVT_PERIODIC, LVT_TSC_DEADLINE = 1 << 16, 1 << 17, 1 << 18
LVT_NMI, LVT_EXTINT = 0x400, 0x700
TO_SELF = 0x4_4000
"""ICR: shorthand self, assert; with a vector below."""

MSR_TSC, MSR_APIC_BASE, MSR_TSC_DEADLINE = 0x10, 0x1B, 0x6E0
APIC_BASE, X2APIC_BASE = 0xFEE0_0900, 0xFEE0_0D00

# Redirection entries of the IOAPIC.
POLARITY_LOW, REMOTE_IRR, LEVEL, MASKED, NMI = 1 << 13, 1 << 14, 1 << 15, 1 << 16, 0x400
DEST_ID_SHIFT = 56
MSI_ADDRESS = guests.MSI_ADDRESS


BACKENDS = ("model", "kernel")
CAPABILITIES = (
    *("KVM_CAP_IRQCHIP", "KVM_CAP_PIT2", "KVM_CAP_PIT_STATE2", "KVM_CAP_REINJECT_CONTROL"),
    *("KVM_CAP_IRQ_ROUTING", "KVM_CAP_IRQFD"),
)
"""Without these there is nothing to look at."""


@dataclass(frozen=True, slots=True)
class Bench:
    """Who makes the VMs; where `exact`, time is virtual and every number of it must be right."""

    name: str
    make_vm: Callable[[], Vm[Vcpu]]
    exact: bool = False
    _probed: dict[str, bool] = field(default_factory=dict, repr=False, compare=False)

    def vm(self) -> Vm[Vcpu]:
        """A new VM with nothing in it, to be closed by `with`."""
        return self.make_vm()

    def needs(self, name: str) -> None:
        """Skip where this back end does not do it; `name` is one of `PROBES`, tried once."""
        from kvmtick.conform.probes import PROBES

        probe = PROBES[name]
        if name not in self._probed:
            self._probed[name] = probe.holds(self)
        if not self._probed[name]:
            raise Skipped(probe.reason)

    def quiet(self, attempt: Callable[[], T | None]) -> T:
        """What an attempt gives that the host did not disturb (it gave None where it did).

        Where time is virtual nothing disturbs; elsewhere Skipped after `ATTEMPTS`.
        """
        for _ in range(1 if self.exact else ATTEMPTS):
            if (got := attempt()) is not None:
                return got
        raise Skipped(f"the host is busy: {ATTEMPTS} attempts were disturbed")

    def on_time(
        self,
        *script: Op | tuple[Op, ...],
        reinject: bool = True,
        before: Callable[["Pc"], object] | None = None,
        acts: Iterable[Callable[["Pc"], object]] = (),
    ) -> Results:
        """Run a script under a PIT, at most LATE_MS longer than it asks for (`nominal_ns`).

        `before` prepares the VM; a write to PORT_ACT + n does `acts[n]`, whose time does not count.
        """

        def attempt() -> Results | None:
            with self.pc(pit=True, reinject=reinject) as pc:
                if before is not None:
                    before(pc)
                timed = [_Timed(partial(act, pc)) for act in acts]
                got = pc.run(tsc_read(TIMES_AT), *script, tsc_read(TIMES_AT + 2), acts=timed)
                took_ns = pc.elapsed_ns(got, TIMES_AT, TIMES_AT + 2)
                late_ns = took_ns - nominal_ns(script) - sum(act.took_ns for act in timed)
                return got if self.exact or late_ns < LATE_MS * 1_000_000 else None

        acts = list(acts)
        return self.quiet(attempt)

    @contextmanager
    def pc(
        self,
        *,
        pit: bool = False,
        pit_flags: int = 0,
        reinject: bool = True,
        vcpus: int = 1,
        cpuid: bool = True,
    ) -> Iterator["Pc"]:
        """A VM with an irqchip and vCPUs, which have all the CPUID features there are, or none."""
        with self.make_vm() as vm:
            vm.create_irqchip()
            if pit:
                vm.create_pit2(pit_flags)
                vm.reinject_control(reinject)
            made: list[Vcpu] = []
            for vcpu_id in range(vcpus):
                made.append(vm.create_vcpu(vcpu_id))
                if cpuid:
                    made[-1].set_cpuid2(cpuid_of(vm.get_supported_cpuid(), vcpu_id))
            yield Pc(self, vm, made)


@dataclass(frozen=True, slots=True)
class Pc:
    """A VM with its vCPUs, and what the tests ask of it."""

    backend: Bench
    vm: Vm[Vcpu]
    vcpus: list[Vcpu]

    @property
    def tsc_khz(self) -> int:
        """The rate of the TSC its guests read."""
        return self.vm.get_tsc_khz()

    def run(
        self, *script: Op | tuple[Op, ...], acts: Iterable[Callable[[], object]] = ()
    ) -> Results:
        """Run a script to its end; a write to PORT_ACT + n does `acts[n]`."""
        handlers = {PORT_ACT + number: _handler(act) for number, act in enumerate(acts)}
        whole: Script = (*script, Op(Code.END, 0, EXIT_CODE))
        self.vm.load(Scenario("conformance", "", whole).guest(self.tsc_khz))
        run = self.vm.run(for_ns=LIMIT_NS, limit_s=LIMIT_S, handlers=handlers)
        equal(run.exit.code, EXIT_CODE, f"exit code of the guest ({run.exit})")
        return Results.read(self.vm.read_memory(0, 0x10000))

    def run_image(self, code: bytes, handlers: dict[int, Handler] | None = None) -> int:
        """Run real-mode code at 0000:8000 until it writes the exit port; its exit code."""
        self.vm.load(guests.Guest("image", code, guests.LOAD_AT, guests.ENTRY, None))
        return self.vm.run(for_ns=LIMIT_NS, limit_s=LIMIT_S, handlers=handlers).exit.code

    def accesses(self, *each: tuple[int, int] | int) -> tuple[int, ...]:
        """Byte accesses to ports with IF=0 and nothing before them: `(port, value)` is written, a
        port alone is read; what was read.
        """
        code = bytearray()
        reads = 0
        for access in each:
            port, *values = (access,) if isinstance(access, int) else access
            code += b"\xba" + port.to_bytes(2, "little")  # mov dx, port
            for value in values:
                code += bytes((0xB0, value, 0xEE))  # mov al, value; out dx, al
            if not values:
                # in al, dx; mov [READ_AT + reads], al
                code += b"\xec\xa2" + (READ_AT + reads).to_bytes(2, "little")
                reads += 1
        equal(self.run_image(bytes(code) + LEAVE), EXIT_CODE, "exit code of the guest")
        return tuple(self.vm.read_memory(READ_AT, reads))

    def elapsed_ns(self, got: Results, begin: int, end: int) -> int:
        """Time between two `tsc_read`, by the indices of their results."""
        first, last = (got.results[at] | got.results[at + 1] << 32 for at in (begin, end))
        return (last - first) * 1_000_000 // self.tsc_khz

    # Local APICs.

    def lapic(self, register: int, vcpu_id: int = 0) -> int:
        """A register, by KVM_GET_LAPIC."""
        return self.vcpus[vcpu_id].get_lapic().reg(register)

    def vectors(self, first: int, vcpu_id: int = 0) -> set[int]:
        """The vectors whose bits are set in ISR, TMR or IRR, by KVM_GET_LAPIC."""
        state = self.vcpus[vcpu_id].get_lapic()
        bits = sum(state.reg(first + 16 * i) << 32 * i for i in range(8))
        return {vector for vector in range(256) if bits >> vector & 1}

    def irr(self, vcpu_id: int = 0) -> set[int]:
        """The vectors that wait."""
        return self.vectors(IRR, vcpu_id)

    def set_lapic(self, registers: dict[int, int], vcpu_id: int = 0) -> None:
        """Change registers by KVM_SET_LAPIC."""
        state = self.vcpus[vcpu_id].get_lapic()
        for register, value in registers.items():
            state.set_reg(register, value)
        self.vcpus[vcpu_id].set_lapic(state)

    def enable_lapic(self, vcpu_id: int = 0) -> None:
        """Set SVR's bit 8 from outside."""
        self.set_lapic({SVR: ENABLED}, vcpu_id)

    def take_into_service(self, *vectors: int) -> None:
        """Let vCPU 0 have accepted them: out of IRR, into ISR.

        With IF=0 this shows what a handler sees, without an injection.
        """
        state = self.vcpus[0].get_lapic()
        for vector in vectors:
            at, bit = 16 * (vector // 32), 1 << vector % 32
            state.set_reg(IRR + at, state.reg(IRR + at) & ~bit)
            state.set_reg(ISR + at, state.reg(ISR + at) | bit)
        self.vcpus[0].set_lapic(state)

    # PIT, IOAPIC, PIC and routing.

    def counter(self, channel: int, **fields: int) -> kvm_pit_channel_state:
        """A counter of the PIT, by KVM_GET_PIT2; `fields` are set before, by KVM_SET_PIT2."""
        if fields:
            state = self.vm.get_pit2()
            for name, value in fields.items():
                setattr(state.channels[channel], name, value)
            self.vm.set_pit2(state)
        return self.vm.get_pit2().channels[channel]

    def pin(self, pin: int) -> int:
        """A redirection entry, by KVM_GET_IRQCHIP."""
        return self.vm.get_irqchip(KVM_IRQCHIP_IOAPIC).chip.ioapic.redirtbl[pin].bits

    def set_pin(self, pin: int, entry: int) -> None:
        """Set a redirection entry by KVM_SET_IRQCHIP."""
        chip = self.vm.get_irqchip(KVM_IRQCHIP_IOAPIC)
        chip.chip.ioapic.redirtbl[pin].bits = entry
        self.vm.set_irqchip(chip)

    def pic(self, chip_id: int = KVM_IRQCHIP_PIC_MASTER, **fields: int) -> dict[str, int]:
        """A PIC's registers, by KVM_GET_IRQCHIP; `fields` are set before."""
        chip = self.vm.get_irqchip(chip_id)
        for name, value in fields.items():
            setattr(chip.chip.pic, name, value)
        if fields:
            self.vm.set_irqchip(chip)
        return {name: getattr(chip.chip.pic, name) for name, *_ in chip.chip.pic._fields_}

    def pulse(self, gsi: int) -> None:
        """KVM_IRQ_LINE up and down."""
        self.vm.irq_line(gsi, 1)
        self.vm.irq_line(gsi, 0)


def bench_of(backend: str) -> Bench:
    """The bench of a back end, `model` or `kernel`. HostError where it does not work here."""
    if backend == "model":
        return Bench(backend, ModelVm, exact=True)
    with KernelSystem() as system:
        for name in CAPABILITIES:
            if not system.check_extension(CAPS[name]):
                raise HostError(
                    f"this host's KVM has no {name}", "take a kernel with CONFIG_KVM_IOAPIC"
                )
    return Bench(backend, KernelVm)


Look = TypeVar("Look", bound=Callable[..., None])


def retried(look: Look) -> Look:
    """A case, or a part of one, that looks again where it fails, `ATTEMPTS` times at most.

    For what a late host can spoil without a trace; where time is virtual it looks once. The bench
    is its first argument.
    """

    @wraps(look)
    def looks(bench: Bench, *arguments: Any, **named: Any) -> None:
        for _ in range(0 if bench.exact else ATTEMPTS - 1):
            with suppress(Failed):
                look(bench, *arguments, **named)
                return
        look(bench, *arguments, **named)

    return cast(Look, looks)


class _Timed:
    """An act, and how long it took."""

    def __init__(self, act: Callable[[], object]) -> None:
        self._act = act
        self.took_ns = 0.0

    def __call__(self) -> None:
        stopwatch = Stopwatch()
        self._act()
        self.took_ns += stopwatch.elapsed_s() * 1e9


def _handler(act: Callable[[], object]) -> Handler:
    def handle(port: int, size_bytes: int, value: int | None) -> None:
        act()

    return handle


def to_ioapic(gsi: int, pin: int) -> kvm_irq_routing_entry:
    """A routing entry."""
    return to_chip(gsi, KVM_IRQCHIP_IOAPIC, pin)


def to_pic(gsi: int, irq: int) -> kvm_irq_routing_entry:
    """A routing entry to one of the 16 pins of the two PICs."""
    chip_id = KVM_IRQCHIP_PIC_SLAVE if irq >= 8 else KVM_IRQCHIP_PIC_MASTER
    return to_chip(gsi, chip_id, irq % 8)


def to_msi(
    gsi: int, data: int, address: int = MSI_ADDRESS, flags: int = 0
) -> kvm_irq_routing_entry:
    """A routing entry to a message."""
    return structs.to_msi(gsi, address, data, flags)


def nominal_ns(script: Script) -> int:
    """How long a script takes on a punctual host: its waits, and one tick to end each `idle_ms`.

    All ticks are those of a PIT with `COUNT`.
    """
    out = 0
    seen = 0
    for op in Scenario("conformance", "", script).ops():
        match op.code:
            case Code.SPIN_MS:
                out += op.arg32 * 1_000_000
            case Code.IDLE_MS:
                out += op.arg32 * 1_000_000 + PERIOD_NS
            case Code.WAIT_TICKS:
                out += op.arg32 * PERIOD_NS
            case Code.WAIT_VECTOR | Code.WAIT_NMIS:
                # these count from the start
                out += max(0, op.arg32 - seen) * PERIOD_NS
                seen = max(seen, op.arg32)
            case Code.OUT32 if op.arg16 == PORT_HOST_SLEEP:
                out += op.arg32 * 1_000
    return out
