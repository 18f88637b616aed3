"""Local APICs with nothing around them: a clock, a queue, and vCPUs that count what they are asked.

Guest accesses go through `read` and `write`, offsets as in the xAPIC page.
"""

from collections.abc import Iterable

from apic_board import FEATURES, ApicBoard, VcpuStub

from kvmtick.irqchip.apicdef import APIC_SPIV, APIC_SPIV_APIC_ENABLED
from kvmtick.irqchip.delivery import LapicIrq
from kvmtick.irqchip.lapic import Lapic
from kvmtick.irqchip.lapic_registers import page_register, set_page_register
from kvmtick.trace.events import Event

BASE = 0xFEE00000
BASE_BSP = 0xFEE00900
BASE_X2APIC_BSP = 0xFEE00D00

FIXED, LOWEST, SMI, REMRD, NMI, INIT, STARTUP, EXTINT = range(8)
NOBODY = -1

MS = 1_000_000


class IoapicStub:
    """Remembers the EOIs it is told of."""

    def __init__(self) -> None:
        self.eois: list[tuple[int, int, bool]] = []

    def update_eoi(self, lapic: Lapic, vector: int, trig_mode_level: bool) -> None:
        self.eois.append((lapic.vcpu.vcpu_id, vector, trig_mode_level))

    def restore_rtc_tracking(self, lapic: Lapic) -> None:
        """No RTC here."""


class LapicRig(ApicBoard):
    """`vcpus` local APICs with ids from 0, none enabled by software; the first boots."""

    def __init__(
        self,
        vcpus: int = 1,
        features: Iterable[str] | None = FEATURES,
        detail: bool = False,
    ) -> None:
        """`features`: what KVM_SET_CPUID2 said; None: it was not called."""
        super().__init__(detail)
        self.ioapic = IoapicStub()
        self.delivery.eoi_target = self.ioapic
        self.features = features
        for vcpu_id in range(vcpus):
            self.add(vcpu_id)

    def add(self, vcpu_id: int) -> Lapic:
        """One more, as KVM_CREATE_VCPU and KVM_SET_CPUID2 make it."""
        lapic = self.create_lapic(vcpu_id, self.features or ())
        if self.features is not None:
            lapic.after_set_cpuid()
        return lapic

    @property
    def lapic(self) -> Lapic:
        return self.delivery.lapics[0]

    @property
    def vcpu(self) -> VcpuStub:
        return self.stubs[0]

    # The guest.

    def read(self, offset: int, size: int = 4, vcpu: int = 0) -> int:
        lapic = self.lapics[vcpu]
        value = lapic.mmio_read(lapic.base_address + offset, size)
        assert value is not None
        return value

    def write(self, offset: int, value: int, size: int = 4, vcpu: int = 0) -> None:
        lapic = self.lapics[vcpu]
        assert lapic.mmio_write(lapic.base_address + offset, size, value)

    def enable(self, *vcpus: int) -> None:
        """Set SVR's enable bit of these, or of all."""
        for index in vcpus or range(len(self.lapics)):
            self.write(APIC_SPIV, APIC_SPIV_APIC_ENABLED | 0xFF, vcpu=index)

    def x2apic(self, *vcpus: int) -> None:
        """Put these, or all, into x2APIC mode."""
        for index in vcpus or range(len(self.lapics)):
            assert self.lapics[index].set_base(self.lapics[index].apic_base | 0xC00)

    def accept(self, *vectors: int, level: bool = False, vcpu: int = 0) -> None:
        """Fixed interrupts arrive."""
        for vector in vectors:
            assert self.lapics[vcpu].accept_irq(FIXED, vector, True, level) == 1

    # State and records.

    def page(self, vcpu: int = 0) -> bytearray:
        return bytearray(self.lapics[vcpu].save())

    def change(self, vcpu: int = 0, **registers: int) -> None:
        """KVM_SET_LAPIC of what KVM_GET_LAPIC says, with registers (`APIC_x`) changed."""
        page = self.page(vcpu)
        for name, value in registers.items():
            set_page_register(page, OFFSETS[name], value)
        self.lapics[vcpu].restore(bytes(page))

    def records(self, *events: Event) -> list[tuple[int, ...]]:
        """The fields of the records since the last call, of these events if given."""
        return [record[3:] for record in self.take_records(*events)]

    def expiries(self) -> list[int]:
        """When timers expired since the last call."""
        return [record[-1] for record in self.records(Event.HRTIMER_EXPIRE_ENTRY)]


OFFSETS = {
    "id": 0x20,
    "taskpri": 0x80,
    "procpri": 0xA0,
    "ldr": 0xD0,
    "dfr": 0xE0,
    "spiv": 0xF0,
    "icr2": 0x310,
    "lvtt": 0x320,
    "lvt0": 0x350,
    "tmict": 0x380,
    "tmcct": 0x390,
    "tdcr": 0x3E0,
}


def message(
    vector: int = 0x40,
    mode: int = FIXED,
    dest: int = 0,
    *,
    logical: bool = False,
    level_triggered: bool = False,
    level: bool = True,
    shorthand: int = 0,
    redirect: bool = False,
) -> LapicIrq:
    return LapicIrq(vector, mode, logical, level_triggered, level, shorthand, dest, redirect)


def vectors(bits: int) -> list[int]:
    """The set bits of IRR, ISR or TMR."""
    return [vector for vector in range(256) if bits >> vector & 1]


def page_vectors(page: bytes | bytearray, first: int) -> list[int]:
    """The same, of the eight registers at `first` of a page."""
    return vectors(sum(page_register(page, first + 16 * i) << 32 * i for i in range(8)))
