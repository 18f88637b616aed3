"""Who answers a guest's MMIO, MSR and CPUID accesses, and what user space's chips get to see."""

import errno
import os
from collections.abc import Iterator, Mapping

import pytest

from kvmtick.abi.caps import (
    KVM_CAP_SPLIT_IRQCHIP,
    KVM_CAP_X2APIC_API,
    KVM_CAP_X86_APIC_BUS_CYCLES_NS,
)
from kvmtick.abi.errors import KvmError
from kvmtick.abi.structs import (
    KVM_IOEVENTFD_FLAG_DATAMATCH,
    KVM_IOEVENTFD_FLAG_PIO,
    KVM_IRQ_ROUTING_MSI,
    kvm_irq_routing_entry,
)
from kvmtick.cpu.scripted import (
    Cpuid,
    Hlt,
    In,
    MmioRead,
    MmioWrite,
    Out,
    Program,
    Rdmsr,
    Routine,
    ScriptedEngine,
    Spin,
    Sti,
    Wrmsr,
)
from kvmtick.kvm.model import ModelVm
from kvmtick.trace.events import Event, Record

EXIT = 0xF4
LAPIC, IOAPIC = 0xFEE00000, 0xFEC00000
ID, VERSION, EOI, SVR, ICR, LVTT, TMICT = 0x20, 0x30, 0xB0, 0xF0, 0x300, 0x320, 0x380
IA32_TSC, IA32_APIC_BASE, IA32_TSC_DEADLINE, X2APIC_ID = 0x10, 0x1B, 0x6E0, 0x802
GP = 13
ONES = 0xFFFF_FFFF


class Bench:
    """A VM of one vCPU over a routine; `seen` is what the routine appends to."""

    def __init__(
        self,
        guest: Routine,
        handlers: Mapping[int, Routine] | None = None,
        *,
        irqchip: str = "kernel",
        detail: bool = False,
        cpuid: bool = False,
    ) -> None:
        self.vm = ModelVm(engine=lambda: ScriptedEngine(guest, handlers), detail=detail)
        self.records: list[Record] = []
        self.vm.machine.recorder.add_consumer(self.records.extend)
        if irqchip == "kernel":
            self.vm.create_irqchip()
        elif irqchip == "split":
            self.vm.enable_cap(KVM_CAP_SPLIT_IRQCHIP, 24)
        self.vcpu = self.vm.create_vcpu(0)
        if cpuid:
            self.vcpu.set_cpuid2(self.vm.get_supported_cpuid())

    def events(self, event: Event) -> list[tuple[int, ...]]:
        return [record[3:] for record in self.records if record[1] == event]


def ends() -> Program:
    yield Out(EXIT, 0)


@pytest.fixture
def eventfd() -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    yield fd
    os.close(fd)


def test_mmio_goes_to_the_local_apic_the_ioapic_and_then_to_nobody() -> None:
    seen: list[int] = []

    def guest() -> Program:
        seen.append((yield MmioRead(LAPIC + VERSION)))
        yield MmioWrite(IOAPIC, 1)
        seen.append((yield MmioRead(IOAPIC + 0x10)))
        yield MmioWrite(0xFED0_0000, 5)
        seen.append((yield MmioRead(0xFED0_0000)))
        yield from ends()

    bench = Bench(guest, detail=True)
    assert bench.vm.run().exit.reason == "done"
    assert seen == [0x50014, 0x170011, ONES]
    assert bench.events(Event.KVM_MMIO) == [
        (1, 4, LAPIC + VERSION, 0x50014),
        (2, 4, IOAPIC, 1),
        (1, 4, IOAPIC + 0x10, 0x170011),
        (2, 4, 0xFED0_0000, 5),
        (0, 4, 0xFED0_0000, ONES),
    ]


def test_a_vm_without_an_irqchip_has_neither_apic() -> None:
    seen: list[int] = []

    def guest() -> Program:
        seen.append((yield MmioRead(LAPIC + VERSION)))
        seen.append((yield MmioRead(IOAPIC + 0x10)))
        seen.append((yield Rdmsr(IA32_APIC_BASE)))
        seen.append((yield Rdmsr(IA32_TSC_DEADLINE)))
        yield from ends()

    assert Bench(guest, irqchip="none").vm.run().exit.reason == "done"
    assert seen == [ONES, ONES, 0xFEE0_0900, 0]


def test_the_local_apic_moves_with_ia32_apic_base() -> None:
    seen: list[int] = []

    def guest() -> Program:
        yield Wrmsr(IA32_APIC_BASE, 0xFED0_0900)
        seen.append((yield MmioRead(LAPIC + VERSION)))
        seen.append((yield MmioRead(0xFED0_0000 + VERSION)))
        yield from ends()

    assert Bench(guest).vm.run().exit.reason == "done"
    assert seen == [ONES, 0x50014]


def test_a_refused_msr_access_gives_the_guest_gp() -> None:
    faults: list[str] = []

    def guest() -> Program:
        yield Rdmsr(X2APIC_ID)
        yield Wrmsr(IA32_APIC_BASE, 0xFEE0_0D00)
        yield from ends()

    def gp() -> Program:
        faults.append("#GP")
        return
        yield

    bench = Bench(guest, {GP: gp}, detail=True)
    assert bench.vm.run().exit.reason == "done"
    assert faults == ["#GP", "#GP"]
    assert [(write, ecx, gp) for write, ecx, _, gp in bench.events(Event.KVM_MSR)] == [
        (0, X2APIC_ID, True),
        (1, IA32_APIC_BASE, True),
    ]


def test_cpuid_is_what_user_space_set_and_x2apic_needs_it() -> None:
    seen: list[int] = []

    def guest() -> Program:
        leaf = yield Cpuid(1)
        seen.append(leaf >> 64 & 1 << 21)
        yield Wrmsr(IA32_APIC_BASE, 0xFEE0_0D00)
        seen.append((yield Rdmsr(X2APIC_ID)))
        seen.append((yield MmioRead(LAPIC + VERSION)))
        yield from ends()

    assert Bench(guest, cpuid=True).vm.run().exit.reason == "done"
    assert seen == [1 << 21, 0, ONES]


def test_without_set_cpuid2_every_leaf_is_zero() -> None:
    seen: list[int] = []

    def guest() -> Program:
        seen.append((yield Cpuid(0)))
        seen.append((yield Cpuid(1)))
        yield from ends()

    assert Bench(guest).vm.run().exit.reason == "done"
    assert seen == [0, 0]


def test_cpuid_shows_whether_the_apic_is_enabled() -> None:
    seen: list[int] = []

    def guest() -> Program:
        for base in (0xFEE0_0900, 0xFEE0_0100):
            yield Wrmsr(IA32_APIC_BASE, base)
            leaf = yield Cpuid(1)
            seen.append(leaf >> 96 >> 9 & 1)
        yield from ends()

    assert Bench(guest, cpuid=True).vm.run().exit.reason == "done"
    assert seen == [1, 0]


def test_the_tsc_counts_nanoseconds_and_can_be_written() -> None:
    seen: list[int] = []

    def guest() -> Program:
        yield Spin(1000)
        seen.append((yield Rdmsr(IA32_TSC)))
        yield Wrmsr(IA32_TSC, 5_000_000)
        yield Spin(99)
        seen.append((yield Rdmsr(IA32_TSC)))
        yield from ends()

    bench = Bench(guest)
    assert bench.vm.run().exit.reason == "done"
    assert seen == [1000, 5_000_100]
    assert 5_000_100 <= bench.vcpu.get_msrs([IA32_TSC])[IA32_TSC] < 5_000_110


def test_a_timer_an_mmio_write_arms_ends_the_slice_that_was_cut_for_later() -> None:
    ticks: list[int] = []

    def guest() -> Program:
        yield MmioWrite(LAPIC + SVR, 0x1FF)
        yield MmioWrite(LAPIC + 0x3E0, 0xB)
        yield MmioWrite(LAPIC + LVTT, 0x41)
        yield Sti()
        yield MmioWrite(LAPIC + TMICT, 300)
        yield Spin(1000)
        yield from ends()

    bench: list[Bench] = []

    def tick() -> Program:
        ticks.append(bench[0].vm.machine.clock.now_ns)
        yield MmioWrite(LAPIC + EOI, 0)

    bench.append(Bench(guest, {0x41: tick}))
    assert bench[0].vm.run().exit.reason == "done"
    assert len(ticks) == 1
    assert ticks[0] < 320


def test_the_pic_goes_before_the_local_apic_and_an_nmi_before_both() -> None:
    order: list[str] = []

    def guest() -> Program:
        for port, value in ((0x20, 0x11), (0x21, 0x20), (0x21, 4), (0x21, 1)):
            yield Out(port, value)
        yield MmioWrite(LAPIC + SVR, 0x1FF)
        yield MmioWrite(LAPIC + 0x350, 0x700)
        yield MmioWrite(LAPIC + ICR, 0x4_0042)
        yield Out(0x510, 1)
        yield Sti()
        yield Spin(10)
        yield from ends()

    def handler(name: str) -> Routine:
        def run() -> Program:
            order.append(name)
            yield Spin(1)

        return run

    bench = Bench(guest, {2: handler("nmi"), 0x21: handler("pic"), 0x42: handler("lapic")})

    def raise_all(port: int, size_bytes: int, value: int | None) -> None:
        bench.vm.irq_line(1, 1)
        bench.vcpu.nmi()

    assert bench.vm.run(handlers={0x510: raise_all}).exit.reason == "done"
    assert order == ["nmi", "pic", "lapic"]


def test_an_ioeventfd_takes_a_port_write_that_matches_and_user_space_the_rest(
    eventfd: int,
) -> None:
    def guest() -> Program:
        yield Out(0x510, 0x1234, 2)
        yield Out(0x510, 0x1235, 2)
        yield Out(0x510, 0x34, 1)
        yield from ends()

    bench = Bench(guest)
    written: list[int | None] = []
    flags = KVM_IOEVENTFD_FLAG_PIO | KVM_IOEVENTFD_FLAG_DATAMATCH
    bench.vm.ioeventfd(0x510, 2, eventfd, flags, 0x1234)
    bench.vm.run(handlers={0x510: lambda port, size, value: written.append(value)})
    assert os.eventfd_read(eventfd) == 1
    assert written == [0x1235, 0x34]


def test_an_ioeventfd_takes_an_mmio_write(eventfd: int) -> None:
    def guest() -> Program:
        yield MmioWrite(0xFED0_0000, 1)
        yield MmioWrite(0xFED0_0000, 2)
        yield from ends()

    bench = Bench(guest)
    bench.vm.ioeventfd(0xFED0_0000, 4, eventfd)
    assert bench.vm.run().exit.reason == "done"
    assert os.eventfd_read(eventfd) == 2


def test_an_irqfd_that_is_signalled_while_the_guest_halts_wakes_it(eventfd: int) -> None:
    ticks: list[int] = []

    def guest() -> Program:
        for port, value in ((0x20, 0x11), (0x21, 0x20), (0x21, 4), (0x21, 1)):
            yield Out(port, value)
        yield Sti()
        yield Out(0x510, 1)
        yield Hlt()
        yield from ends()

    def irq4() -> Program:
        ticks.append(1)
        yield Out(0x20, 0x20)

    bench = Bench(guest, {0x24: irq4})
    bench.vm.irqfd(eventfd, 4)

    def signal(port: int, size_bytes: int, value: int | None) -> None:
        os.eventfd_write(eventfd, 1)

    assert bench.vm.run(handlers={0x510: signal}).exit.reason == "done"
    assert ticks == [1]


def level_msi(gsi: int, vector: int) -> kvm_irq_routing_entry:
    entry = kvm_irq_routing_entry(gsi=gsi, type=KVM_IRQ_ROUTING_MSI)
    entry.u.msi.address_lo = LAPIC
    entry.u.msi.data = 0xC000 | vector
    return entry


def test_with_a_split_irqchip_user_space_hears_the_eoi_of_level_messages() -> None:
    def guest() -> Program:
        yield MmioWrite(LAPIC + SVR, 0x1FF)
        yield Sti()
        yield Out(0x510, 5)
        yield Spin(100)
        yield Out(0x510, 6)
        yield Spin(100)
        yield from ends()

    def tick() -> Program:
        yield MmioWrite(LAPIC + EOI, 0)

    bench = Bench(guest, {0x45: tick, 0x46: tick}, irqchip="split")
    edge = level_msi(6, 0x46)
    edge.u.msi.data = 0x46
    bench.vm.set_gsi_routing([level_msi(5, 0x45), edge])
    told: list[int] = []

    def raise_line(port: int, size_bytes: int, value: int | None) -> None:
        assert value is not None
        bench.vm.irq_line(value, 1)

    run = bench.vm.run(handlers={0x510: raise_line}, on_ioapic_eoi=told.append)
    assert run.exit.reason == "done"
    assert told == [0x45]


def test_with_a_split_irqchip_kvm_interrupt_is_the_pic_of_user_space() -> None:
    vectors: list[int] = []

    def guest() -> Program:
        yield Sti()
        yield Spin(100)
        yield from ends()

    def taken() -> Program:
        vectors.append(0x30)
        yield Spin(1)

    bench = Bench(guest, {0x30: taken}, irqchip="split")
    bench.vcpu.interrupt(0x30)
    with pytest.raises(KvmError) as again:
        bench.vcpu.interrupt(0x31)
    assert again.value.errno == errno.EEXIST
    assert bench.vm.run().exit.reason == "done"
    assert vectors == [0x30]


def test_without_an_irqchip_kvm_interrupt_is_injected_at_the_next_entry() -> None:
    vectors: list[int] = []

    def guest() -> Program:
        yield Spin(100)
        yield from ends()

    def taken() -> Program:
        vectors.append(0x30)
        yield Spin(1)

    bench = Bench(guest, {0x30: taken}, irqchip="none")
    bench.vcpu.interrupt(0x30)
    events = bench.vcpu.get_vcpu_events()
    assert (events.interrupt.injected, events.interrupt.nr) == (1, 0x30)
    assert bench.vm.run().exit.reason == "done"
    assert vectors == [0x30]


@pytest.mark.parametrize(
    ("irqchip", "call", "code"),
    [
        ("kernel", lambda b: b.vcpu.interrupt(0x20), errno.ENXIO),
        ("kernel", lambda b: b.vcpu.interrupt(0x100), errno.EINVAL),
        ("kernel", lambda b: b.vcpu.set_mp_state(5), errno.EINVAL),
        ("none", lambda b: b.vcpu.set_mp_state(3), errno.EINVAL),
        ("none", lambda b: b.vcpu.get_lapic(), errno.EINVAL),
        ("none", lambda b: b.vm.signal_msi(LAPIC, 0x40), errno.EINVAL),
        ("none", lambda b: b.vm.set_gsi_routing([]), errno.EINVAL),
        ("none", lambda b: b.vm.irq_line(0, 1), errno.ENXIO),
        ("split", lambda b: b.vm.get_irqchip(0), errno.ENXIO),
        ("split", lambda b: b.vm.create_irqchip(), errno.EEXIST),
        ("split", lambda b: b.vm.enable_cap(KVM_CAP_SPLIT_IRQCHIP, 24), errno.EEXIST),
        ("none", lambda b: b.vm.enable_cap(KVM_CAP_SPLIT_IRQCHIP, 24), errno.EEXIST),
        ("none", lambda b: b.vm.enable_cap(KVM_CAP_SPLIT_IRQCHIP, 4097), errno.EINVAL),
        ("kernel", lambda b: b.vm.enable_cap(KVM_CAP_X2APIC_API, 4), errno.EINVAL),
        ("split", lambda b: b.vm.enable_cap(KVM_CAP_X2APIC_API, 12), errno.EINVAL),
        ("kernel", lambda b: b.vm.enable_cap(KVM_CAP_X86_APIC_BUS_CYCLES_NS, 10), errno.EINVAL),
        ("kernel", lambda b: b.vm.enable_cap(KVM_CAP_X86_APIC_BUS_CYCLES_NS, 0), errno.EINVAL),
        ("none", lambda b: b.vm.enable_cap(KVM_CAP_X86_APIC_BUS_CYCLES_NS, 10), errno.ENXIO),
        ("kernel", lambda b: b.vm.enable_cap(9999), errno.EINVAL),
        ("kernel", lambda b: b.vm.enable_cap(KVM_CAP_X2APIC_API, 1 << 8), errno.EINVAL),
        ("kernel", lambda b: b.vm.enable_cap(KVM_CAP_X2APIC_API, 1, flags=1), errno.EINVAL),
        ("kernel", lambda b: b.vm.create_vcpu(0), errno.EEXIST),
        ("kernel", lambda b: b.vm.create_vcpu(4096), errno.EINVAL),
        ("kernel", lambda b: b.vm.set_boot_cpu_id(1), errno.EBUSY),
    ],
)
def test_misuse_gives_the_kernels_errno(irqchip: str, call: object, code: int) -> None:
    bench = Bench(ends, irqchip=irqchip)
    assert callable(call)
    with pytest.raises(KvmError) as refused:
        call(bench)
    assert refused.value.errno == code


def test_the_apic_bus_cycle_scales_the_timer() -> None:
    ticks: list[int] = []

    def guest() -> Program:
        yield MmioWrite(LAPIC + SVR, 0x1FF)
        yield MmioWrite(LAPIC + 0x3E0, 0xB)
        yield MmioWrite(LAPIC + LVTT, 0x41)
        yield Sti()
        yield MmioWrite(LAPIC + TMICT, 1000)
        yield Hlt()
        yield from ends()

    def tick() -> Program:
        ticks.append(vm.machine.clock.now_ns)
        yield MmioWrite(LAPIC + EOI, 0)

    vm = ModelVm(engine=lambda: ScriptedEngine(guest, {0x41: tick}))
    vm.create_irqchip()
    vm.enable_cap(KVM_CAP_X86_APIC_BUS_CYCLES_NS, 25)
    vm.create_vcpu(0)
    assert vm.run().exit.reason == "done"
    assert ticks == [25_000 + 4]


def test_a_vm_without_a_pit_still_tells_of_its_local_apics_ticks() -> None:
    def guest() -> Program:
        yield MmioWrite(LAPIC + SVR, 0x1FF)
        yield MmioWrite(LAPIC + LVTT, 0x41)
        yield Sti()
        yield MmioWrite(LAPIC + TMICT, 1000)
        yield Hlt()
        yield from ends()

    def tick() -> Program:
        yield MmioWrite(LAPIC + EOI, 0)

    run = Bench(guest, {0x41: tick}).vm.run()
    assert run.pit is None
    assert [(r.source, r.path, r.count("delivered")) for r in run.sources] == [
        ("lapic", "lapic", 1)
    ]


def test_port_reads_of_all_sizes_still_reach_user_space() -> None:
    seen: list[int] = []

    def guest() -> Program:
        seen.append((yield In(0x510, 1)))
        seen.append((yield In(0x510, 2)))
        seen.append((yield In(0x510, 4)))
        yield from ends()

    assert Bench(guest).vm.run().exit.reason == "done"
    assert seen == [0xFF, 0xFFFF, ONES]


def test_an_nmi_ends_hlt_in_an_nmi_handler_though_it_has_to_wait() -> None:
    order: list[str] = []

    def guest() -> Program:
        yield Out(0x510, 1)
        order.append("guest")
        yield from ends()

    def nmi() -> Program:
        order.append("nmi")
        if len(order) == 1:
            yield MmioWrite(LAPIC + SVR, 0x1FF)
            # LVTT knows no NMI; a self IPI some time ahead would be too early: the host sends it.
            yield Out(0x510, 2)
            yield Hlt()
            order.append("awake")
        yield Spin(1)

    bench = Bench(guest, {2: nmi})

    def host(port: int, size_bytes: int, value: int | None) -> None:
        due_ns = bench.vm.machine.clock.now_ns + 1000
        if value == 1:
            bench.vcpu.nmi()
        else:
            bench.vm.machine.board.queue.add(due_ns, bench.vcpu.nmi)

    # The guest halts with interrupts off: an end keeps the run from being a deadlock at once.
    bench.vm.machine.board.delivery.vapics_in_nmi_mode += 1
    assert bench.vm.run(handlers={0x510: host}, for_ns=1_000_000).exit.reason == "done"
    assert order == ["nmi", "awake", "nmi", "guest"]


def test_a_timer_that_expires_while_the_apic_is_disabled_waits_for_it() -> None:
    seen: list[int] = []

    def guest() -> Program:
        yield MmioWrite(LAPIC + SVR, 0x1FF)
        yield MmioWrite(LAPIC + LVTT, 0x41)
        yield MmioWrite(LAPIC + TMICT, 1000)
        yield Wrmsr(IA32_APIC_BASE, 0xFEE0_0100)
        yield Spin(5000)
        yield Wrmsr(IA32_APIC_BASE, 0xFEE0_0900)
        yield Spin(10)
        seen.append((yield MmioRead(LAPIC + 0x220)))
        yield from ends()

    assert Bench(guest).vm.run().exit.reason == "done"
    assert seen == [2]
