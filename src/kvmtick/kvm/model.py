"""The model behind KVM's calls: `ModelVm`, and `ModelVcpu` for its vCPUs.

Each method is one ioctl of Documentation/virt/kvm/api.rst, with the kernel's errno in `KvmError`
and its order of checks. `run` runs all vCPUs to the guest's end and follows its ticks.

Not modelled: a user space that brings its own local APIC; of KVM_ENABLE_CAP all but
KVM_CAP_SPLIT_IRQCHIP, KVM_CAP_X2APIC_API and KVM_CAP_X86_APIC_BUS_CYCLES_NS.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Mapping

from kvmtick.abi.caps import (
    KVM_CAP_SPLIT_IRQCHIP,
    KVM_CAP_X2APIC_API,
    KVM_CAP_X86_APIC_BUS_CYCLES_NS,
)
from kvmtick.abi.closing import Closing
from kvmtick.abi.errors import KvmError
from kvmtick.abi.structs import (
    KVM_IRQCHIP_IOAPIC,
    KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE,
    KVM_NR_IRQCHIPS,
    KVM_PIT_SPEAKER_DUMMY,
    KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK,
    KVM_X2APIC_API_USE_32BIT_IDS,
    KVM_X2APIC_DISABLE_SUPPRESS_EOI_BROADCAST,
    KVM_X2APIC_ENABLE_SUPPRESS_EOI_BROADCAST,
    kvm_cpuid_entry2,
    kvm_irq_routing_entry,
    kvm_irqchip,
    kvm_msi,
    kvm_pic_state,
    kvm_pit_state,
    kvm_pit_state2,
)
from kvmtick.cpu.engine import Engine
from kvmtick.guests import DEFAULT_NEEDS, Guest, Needs, Parameters
from kvmtick.irqchip.delivery import SuppressEoiBroadcast
from kvmtick.irqchip.i8254 import MIN_TIMER_PERIOD_NS, Pit, nominal_period_ns
from kvmtick.irqchip.i8259 import Pic, PicState
from kvmtick.irqchip.ioapic import Ioapic
from kvmtick.irqchip.lapic_timer import GUEST_TSC_KHZ
from kvmtick.irqchip.routing import USERSPACE_IRQ_SOURCE_ID
from kvmtick.kvm.model_vcpu import ModelVcpu, cpuid_entries
from kvmtick.kvm.setup import prepare
from kvmtick.machine.machine import QUANTUM_NS, Exit, Machine
from kvmtick.machine.ports import PortHandler
from kvmtick.machine.run import PitSettings, Run
from kvmtick.ticks.life import TickAssembler
from kvmtick.ticks.report import TickReport
from kvmtick.timing.wall import Stopwatch

__all__ = ["DEFAULT_LIMIT_S", "NOMINAL_TIMES", "ModelVcpu", "ModelVm"]

DEFAULT_LIMIT_S = 60.0
NOMINAL_TIMES = 10
"""A guest that never gets its ticks is stopped after so many times the time they should take."""

SEED_STRIDE = 1 << 48
SEED_MASK = (1 << 64) - 1
"""Each vCPU draws random numbers of its own."""

MAX_VCPU_ID = 4096
MAX_RESERVED_IOAPIC_PINS = 4096
SUPPRESS_EOI_BROADCAST = (
    KVM_X2APIC_ENABLE_SUPPRESS_EOI_BROADCAST | KVM_X2APIC_DISABLE_SUPPRESS_EOI_BROADCAST
)
X2APIC_API_VALID = (
    KVM_X2APIC_API_USE_32BIT_IDS | KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK | SUPPRESS_EOI_BROADCAST
)
MAX_APIC_BUS_CYCLE_NS = ((1 << 64) - 1) // (0xFFFF_FFFF * 128)


class ModelVm(Closing):
    """One VM of the model, with RAM at guest-physical 0. A context manager."""

    def __init__(
        self,
        *,
        clock: str = "virtual",
        seed: int = 0,
        detail: bool = False,
        engine: Callable[[], Engine] | None = None,
        ram_bytes: int = DEFAULT_NEEDS.ram_bytes,
        quantum_ns: int = QUANTUM_NS,
        fast: bool | None = None,
    ) -> None:
        """`clock`: `virtual` or `real`. `seed`: for the host model's faults and the CPU's random
        numbers. `detail`: record the events that only traces need. `engine`: who executes the
        guest, the unicorn engine if None. `ram_bytes`: a multiple of 4096, `Guest.needs` says how
        many. `quantum_ns`: how long a vCPU runs at most while another one waits. `fast`: interrupts
        come where the next basic block begins, not at the next instruction; None: in real time. An
        `engine` of yours decides that itself.
        """
        if engine is not None and fast is not None:
            raise ValueError(f"fast={fast}: your engine decides that itself, leave it out")
        self.machine = Machine(clock, seed, detail, ram_bytes, quantum_ns)
        self.assembler = TickAssembler(tasks=self.machine.recorder.tasks)
        self.machine.recorder.add_consumer(self.assembler)
        self._engine = engine
        self._exact = self.machine.virtual if fast is None else not fast

    # The irqchip.

    def create_irqchip(self) -> None:
        """KVM_CREATE_IRQCHIP. EEXIST: it has one. EINVAL: a vCPU exists."""
        board = self.machine.board
        if board.irqchip_in_kernel:
            raise KvmError(errno.EEXIST, "KVM_CREATE_IRQCHIP")
        if board.vcpus:
            raise KvmError(errno.EINVAL, "KVM_CREATE_IRQCHIP")
        board.create_irqchip()

    def get_irqchip(self, chip_id: int) -> kvm_irqchip:
        """KVM_GET_IRQCHIP; `chip_id`: KVM_IRQCHIP_*. ENXIO: no irqchip. EINVAL: no such chip."""
        pic, ioapic = self._chips("KVM_GET_IRQCHIP")
        if not 0 <= chip_id < KVM_NR_IRQCHIPS:
            raise KvmError(errno.EINVAL, "KVM_GET_IRQCHIP")
        chip = kvm_irqchip(chip_id=chip_id)
        if chip_id == KVM_IRQCHIP_IOAPIC:
            chip.chip.ioapic = ioapic.save()
        else:
            state = _pic_of(pic, chip_id).save()
            chip.chip.pic = kvm_pic_state.from_buffer_copy(state)
        return chip

    def set_irqchip(self, chip: kvm_irqchip) -> None:
        """KVM_SET_IRQCHIP. ENXIO: no irqchip. EINVAL: no such chip."""
        pic, ioapic = self._chips("KVM_SET_IRQCHIP")
        if chip.chip_id in (KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE):
            _pic_of(pic, chip.chip_id).restore(bytes(chip.chip.pic))
            pic.update_irq()
        elif chip.chip_id == KVM_IRQCHIP_IOAPIC:
            ioapic.restore(chip.chip.ioapic)
            pic.update_irq()
        else:
            raise KvmError(errno.EINVAL, "KVM_SET_IRQCHIP")

    def _chips(self, call: str) -> tuple[Pic, Ioapic]:
        """The PICs and the IOAPIC, with the irqfds that were signalled served."""
        board = self.machine.board
        if board.pic is None or board.ioapic is None:
            raise KvmError(errno.ENXIO, call)
        board.irqfds.poll()
        return board.pic, board.ioapic

    def irq_line(self, gsi: int, level: int) -> None:
        """KVM_IRQ_LINE: set a GSI's level for source 0. ENXIO: no irqchip."""
        self._irq_line("KVM_IRQ_LINE", gsi, level, line_status=False)

    def irq_line_status(self, gsi: int, level: int) -> int:
        """KVM_IRQ_LINE_STATUS: as `irq_line`; >0 delivered, 0 coalesced, <0 ignored or masked."""
        return self._irq_line("KVM_IRQ_LINE_STATUS", gsi, level, line_status=True)

    def _irq_line(self, call: str, gsi: int, level: int, line_status: bool) -> int:
        board = self.machine.board
        if not board.irqchip_in_kernel:
            raise KvmError(errno.ENXIO, call)
        board.irqfds.poll()
        return board.routing.set_irq(USERSPACE_IRQ_SOURCE_ID, gsi, int(level != 0), line_status)

    def set_gsi_routing(self, entries: Iterable[kvm_irq_routing_entry], flags: int = 0) -> None:
        """KVM_SET_GSI_ROUTING: replace the whole table. EINVAL: no irqchip, or a bad entry."""
        self.machine.board.routing.set_table(list(entries), flags)

    def signal_msi(self, address: int, data: int, flags: int = 0) -> int:
        """KVM_SIGNAL_MSI: a message as a device writes it; >0 delivered, 0 nobody took it.

        EINVAL: no irqchip, or `flags` but KVM_MSI_VALID_DEVID. EPERM: no vCPU.
        """
        self.machine.board.irqfds.poll()
        msi = kvm_msi(address_lo=address, address_hi=address >> 32, data=data, flags=flags)
        return self.machine.board.routing.signal_msi(msi)

    def irqfd(self, fd: int, gsi: int, flags: int = 0, resamplefd: int = -1) -> None:
        """KVM_IRQFD: let an eventfd pulse `gsi`; `flags`: KVM_IRQFD_FLAG_*.

        The machine looks at it whenever it is out of the guest. EINVAL: no irqchip, bad flags, no
        eventfd. EBUSY: it has a GSI. EBADF: no descriptor.
        """
        self.machine.board.irqfds.set(fd, gsi & 0xFFFF_FFFF, flags, resamplefd)

    def ioeventfd(
        self, addr: int, len_bytes: int, fd: int, flags: int = 0, datamatch: int = 0
    ) -> None:
        """KVM_IOEVENTFD: let a guest's write signal an eventfd; `flags`: KVM_IOEVENTFD_FLAG_*.

        EINVAL: bad length or flags, no eventfd. EEXIST: taken. ENOENT: nothing to deassign.
        """
        self.machine.board.ioeventfds.set(addr, len_bytes, fd, flags, datamatch)

    def enable_cap(self, cap: int, *args: int, flags: int = 0) -> None:
        """KVM_ENABLE_CAP: KVM_CAP_SPLIT_IRQCHIP (pins), KVM_CAP_X2APIC_API (flags),
        KVM_CAP_X86_APIC_BUS_CYCLES_NS (ns).

        EINVAL: another capability, bad `args` or `flags`. Of the split irqchip EEXIST: an irqchip
        or a vCPU. Of the bus cycle ENXIO: no irqchip; EINVAL: a vCPU.
        """
        arg = args[0] if args else 0
        enable = self._enablers().get(cap)
        if flags or enable is None:
            raise KvmError(errno.EINVAL, "KVM_ENABLE_CAP")
        failure = enable(arg)
        if failure:
            raise KvmError(failure, "KVM_ENABLE_CAP")

    def _enablers(self) -> dict[int, Callable[[int], int]]:
        return {
            KVM_CAP_SPLIT_IRQCHIP: self._enable_split_irqchip,
            KVM_CAP_X2APIC_API: self._enable_x2apic_api,
            KVM_CAP_X86_APIC_BUS_CYCLES_NS: self._set_apic_bus_cycle,
        }

    def _enable_split_irqchip(self, reserved_pins: int) -> int:
        board = self.machine.board
        if reserved_pins > MAX_RESERVED_IOAPIC_PINS:
            return errno.EINVAL
        if board.irqchip_in_kernel or board.vcpus:
            return errno.EEXIST
        board.split_irqchip(reserved_pins)
        return 0

    def _enable_x2apic_api(self, flags: int) -> int:
        delivery = self.machine.board.delivery
        both = flags & SUPPRESS_EOI_BROADCAST == SUPPRESS_EOI_BROADCAST
        wants_split = flags & KVM_X2APIC_ENABLE_SUPPRESS_EOI_BROADCAST and not delivery.split
        if flags & ~X2APIC_API_VALID or both or wants_split:
            return errno.EINVAL
        if flags & KVM_X2APIC_API_USE_32BIT_IDS:
            delivery.x2apic_format = True
        if flags & KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK:
            delivery.x2apic_broadcast_quirk_disabled = True
        if flags & KVM_X2APIC_ENABLE_SUPPRESS_EOI_BROADCAST:
            delivery.suppress_eoi_broadcast = SuppressEoiBroadcast.ENABLED
        if flags & KVM_X2APIC_DISABLE_SUPPRESS_EOI_BROADCAST:
            delivery.suppress_eoi_broadcast = SuppressEoiBroadcast.DISABLED
        return 0

    def _set_apic_bus_cycle(self, cycle_ns: int) -> int:
        board = self.machine.board
        # The longest count, divided by the most, has to fit into 64 bits of ns.
        if not 0 < cycle_ns <= MAX_APIC_BUS_CYCLE_NS:
            return errno.EINVAL
        if not board.irqchip_in_kernel:
            return errno.ENXIO
        if board.vcpus:
            return errno.EINVAL
        board.delivery.apic_bus_cycle_ns = cycle_ns
        return 0

    # The PIT.

    def create_pit(self) -> None:
        """KVM_CREATE_PIT: as create_pit2 with KVM_PIT_SPEAKER_DUMMY. ENOENT, EEXIST as there."""
        self._create_pit("KVM_CREATE_PIT", KVM_PIT_SPEAKER_DUMMY)

    def create_pit2(self, flags: int = 0) -> None:
        """KVM_CREATE_PIT2; `flags`: KVM_PIT_SPEAKER_DUMMY. EEXIST: a PIT. ENOENT: no irqchip."""
        self._create_pit("KVM_CREATE_PIT2", flags)

    def _create_pit(self, call: str, flags: int) -> None:
        board = self.machine.board
        if board.pit is not None:
            raise KvmError(errno.EEXIST, call)
        if board.pic is None:
            raise KvmError(errno.ENOENT, call)
        board.create_pit(flags)

    def get_pit(self) -> kvm_pit_state:
        """KVM_GET_PIT. ENXIO: no PIT."""
        return self._pit("KVM_GET_PIT").get_state()

    def get_pit2(self) -> kvm_pit_state2:
        """KVM_GET_PIT2. ENXIO: no PIT."""
        return self._pit("KVM_GET_PIT2").get_state2()

    def set_pit(self, state: kvm_pit_state) -> None:
        """KVM_SET_PIT: restarts every counter. ENXIO: no PIT."""
        self._pit("KVM_SET_PIT").set_state(state)

    def set_pit2(self, state: kvm_pit_state2) -> None:
        """KVM_SET_PIT2: restarts every counter. ENXIO: no PIT."""
        self._pit("KVM_SET_PIT2").set_state2(state)

    def reinject_control(self, reinject: bool) -> None:
        """KVM_REINJECT_CONTROL: replay ticks the guest could not take, or not. ENXIO: no PIT."""
        self._pit("KVM_REINJECT_CONTROL").set_reinject(bool(reinject))

    def _pit(self, call: str) -> Pit:
        pit = self.machine.board.pit
        if pit is None:
            raise KvmError(errno.ENXIO, call)
        return pit

    # vCPU, memory, life.

    def set_boot_cpu_id(self, vcpu_id: int) -> None:
        """KVM_SET_BOOT_CPU_ID: which vCPU starts by itself. EBUSY: a vCPU exists. EINVAL: id."""
        board = self.machine.board
        if not 0 <= vcpu_id < MAX_VCPU_ID:
            raise KvmError(errno.EINVAL, "KVM_SET_BOOT_CPU_ID")
        if board.vcpus:
            raise KvmError(errno.EBUSY, "KVM_SET_BOOT_CPU_ID")
        board.bsp_vcpu_id = vcpu_id

    def create_vcpu(self, vcpu_id: int = 0) -> ModelVcpu:
        """KVM_CREATE_VCPU. EINVAL: the id is out of range. EEXIST: the id is taken."""
        if not 0 <= vcpu_id < MAX_VCPU_ID:
            raise KvmError(errno.EINVAL, "KVM_CREATE_VCPU")
        if any(vcpu.vcpu_id == vcpu_id for vcpu in self.machine.board.vcpus):
            raise KvmError(errno.EEXIST, "KVM_CREATE_VCPU")
        if self._engine is not None:
            engine = self._engine()
        else:
            seed = self.machine.host.seed + vcpu_id * SEED_STRIDE
            engine = _unicorn_engine(self._exact, seed & SEED_MASK)
        return ModelVcpu(self.machine.create_vcpu(engine, vcpu_id), self.machine.board)

    def get_supported_cpuid(self) -> list[kvm_cpuid_entry2]:
        """KVM_GET_SUPPORTED_CPUID: what `ModelVcpu.set_cpuid2` may be given."""
        return cpuid_entries()

    def prepare(self, needs: Needs, reinject: bool = True) -> list[ModelVcpu]:
        """Set up what a guest needs (`Guest.needs`): irqchip, PIT, routing, vCPUs, their CPUID.

        `reinject` is KVM_REINJECT_CONTROL, unless the guest leaves no choice.
        """
        return prepare(self, needs, reinject)

    def get_tsc_khz(self) -> int:
        """KVM_GET_TSC_KHZ: what the TSC of a vCPU counts a millisecond."""
        return GUEST_TSC_KHZ

    def load(self, guest: Guest) -> None:
        """Put an image into RAM; the vCPU that boots will start at its entry. ValueError if it does
        not fit.
        """
        self.machine.load(guest)

    def read_memory(self, gpa: int, size_bytes: int) -> bytes:
        """Bytes of guest RAM; ValueError outside of it."""
        return self.machine.read_memory(gpa, size_bytes)

    def write_memory(self, gpa: int, data: bytes) -> None:
        """Store bytes in guest RAM; ValueError outside of it."""
        self.machine.write_memory(gpa, data)

    def close(self) -> None:
        """Free the VM. Harmless when repeated."""
        self.machine.close()

    # Running.

    def run(
        self,
        *,
        ticks: int | None = None,
        for_ns: int | None = None,
        limit_s: float | None = DEFAULT_LIMIT_S,
        until: Callable[[], bool] | None = None,
        counter: int | None = None,
        handlers: Mapping[int, PortHandler] | None = None,
        on_ioapic_eoi: Callable[[int], None] | None = None,
    ) -> Run:
        """Run the guest and follow its ticks.

        It ends when the guest does, after `for_ns` of the machine's time, after `limit_s` wall
        seconds, or when `until` (asked whenever the vCPU is out of the guest) is true. A foreign
        guest ends when `ticks` ticks have reached it. A guest that does not get its ticks ends
        (reason `time`) after ten times the time they should take. `counter`: where a foreign guest
        keeps a 32-bit tick count, guest-physical. `handlers` answer ports of their own (or ours
        instead) during this run, as in `KernelVm.run`, and may call the VM.
        `on_ioapic_eoi` is told the vectors of KVM_EXIT_IOAPIC_EOI (split irqchip). May be called
        again to go on.
        """
        stopwatch = Stopwatch()
        guest = self.machine.loaded[-1] if self.machine.loaded else None
        lengths_ns = [] if for_ns is None else [for_ns]
        goal: _TickGoal | None = None
        if guest is not None and guest.parameters is not None:
            lengths_ns += self._nominal_rest_ns()
        elif ticks is not None:
            goal = _TickGoal(self, ticks)
        self.machine.ports.handlers = handlers or {}
        self.machine.ports.on_ioapic_eoi = on_ioapic_eoi
        exit_ = self.machine.run(
            min(lengths_ns, default=None), limit_s, _either(goal.is_over if goal else None, until)
        )
        if exit_.reason == "until" and goal is not None and goal.reason:
            exit_ = Exit(goal.reason)
        return self._result(guest, exit_, stopwatch.elapsed_s(), counter)

    def ticks(self) -> TickReport:
        """The ticks so far, of the PIT if it ever expired, else of the busiest local APIC timer."""
        self.machine.recorder.flush()
        self.assembler.settle()
        return self.assembler.report()

    def parameters(self) -> Parameters | None:
        """The guest's parameter block as it is now in RAM; None for a foreign guest, and for one
        that has overwritten it.
        """
        guest = self.machine.loaded[-1] if self.machine.loaded else None
        if guest is None or guest.parameters is None:
            return None
        try:
            return Parameters.read(self.machine.ram, guest.parameters.magic)
        except ValueError:
            return None

    def _nominal_rest_ns(self) -> list[int]:
        """How much longer a built-in guest may take for the ticks it waits for."""
        block = self.parameters()
        if block is None or not block.count:
            return []
        whole_ns = NOMINAL_TIMES * block.count * self._nominal_period_ns(block)
        ran_ns = self.machine.clock.now_ns - max(self.machine.loaded_ns, self._started_ns())
        return [max(0, whole_ns - ran_ns)]

    def _started_ns(self) -> int:
        """When the machine was first run; now, if it was not."""
        return min(self.machine.started_ns, self.machine.clock.now_ns)

    def _nominal_period_ns(self, block: Parameters) -> int:
        """The tick that a built-in guest's parameter block asks for."""
        if self.machine.loaded[-1].needs.tick_source == "lapic":
            return max(block.period_ns, MIN_TIMER_PERIOD_NS)
        return nominal_period_ns(block.divisor)

    def _believed_period_ns(self, block: Parameters | None) -> float | None:
        """What a guest whose clock is not the PIT takes its tick for; None for all others."""
        if block is None or self.machine.loaded[-1].needs.tick_source != "lapic":
            return None
        return block.period_ns

    def _result(self, guest: Guest | None, exit_: Exit, wall_s: float, counter: int | None) -> Run:
        machine, pit, block = self.machine, self.machine.board.pit, self.parameters()
        vcpu = machine.vcpu
        assert vcpu is not None
        guest_ticks = block.counter if block else None
        ticks = self.ticks() if pit or self.assembler.expired else None
        if counter is not None:
            guest_ticks = int.from_bytes(machine.read_memory(counter, 4), "little")
        return Run(
            guest=guest.name if guest else "",
            cpu=vcpu.engine.name,
            chips="model",
            clock=machine.clock.name,
            seed=machine.host.seed,
            elapsed_ns=machine.elapsed_ns,
            wall_s=wall_s,
            instructions=machine.instructions,
            exit=exit_,
            pit=PitSettings(pit.channels[0].count, pit.period_ns, pit.reinject) if pit else None,
            guest_ticks=guest_ticks,
            ticks=ticks,
            sources=self.assembler.reports() if ticks is not None else [],
            believed_period_ns=self._believed_period_ns(block),
            has_rate=guest is None or guest.has_rate,
            faults=machine.host.faults(),
            console=machine.ports.console.decode("utf-8", "replace"),
            serial=machine.ports.serial.decode("utf-8", "replace"),
        )


class _TickGoal:
    """A foreign guest's end: `ticks` of them reached it, or it had ten times the time for that."""

    def __init__(self, vm: ModelVm, ticks: int) -> None:
        self._vm = vm
        self._ticks = ticks
        self.reason = ""

    def is_over(self) -> bool:
        machine = self._vm.machine
        machine.recorder.flush()
        pit = machine.board.pit
        period_ns = pit.period_ns if pit else 0
        if self._vm.assembler.reached >= self._ticks:
            self.reason = "done"
        elif period_ns and machine.elapsed_ns >= NOMINAL_TIMES * self._ticks * period_ns:
            self.reason = "time"
        return bool(self.reason)


def _either(
    first: Callable[[], bool] | None, second: Callable[[], bool] | None
) -> Callable[[], bool] | None:
    if first is None or second is None:
        return first or second
    return lambda: first() or second()


def _pic_of(pic: Pic, chip_id: int) -> PicState:
    return pic.slave if chip_id == KVM_IRQCHIP_PIC_SLAVE else pic.master


def _unicorn_engine(exact: bool, seed: int) -> Engine:
    # Loading the native library takes time that scripted guests need not pay.
    from kvmtick.cpu.unicorn import UnicornEngine

    return UnicornEngine(exact=exact, seed=seed)
