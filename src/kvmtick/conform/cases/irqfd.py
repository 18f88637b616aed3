"""irqfds, resampling irqfds and ioeventfds (api.rst 4.59, 4.75; virt/kvm/eventfd.c).

KVM serves an irqfd that leads to a chip in a worker, so what it does is awaited; what it must not
do is looked at when something that was asked for later has been done.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from kvmtick.abi.caps import KVM_CAP_SPLIT_IRQCHIP
from kvmtick.abi.structs import (
    KVM_IOEVENTFD_FLAG_DATAMATCH,
    KVM_IOEVENTFD_FLAG_DEASSIGN,
    KVM_IOEVENTFD_FLAG_PIO,
    KVM_IRQCHIP_IOAPIC,
    KVM_IRQFD_FLAG_DEASSIGN,
    KVM_IRQFD_FLAG_RESAMPLE,
)
from kvmtick.conform.apics import (
    GSI,
    ON,
    PIN,
    REDTBL_LOW,
    VECTOR,
    errno_of,
    only_the_ioapic,
)
from kvmtick.conform.bench import (
    EOI,
    LEAVE,
    LEVEL,
    MASKED,
    NMI,
    PORT_ACT,
    REMOTE_IRR,
    WINDOWS,
    Bench,
    Handler,
    Pc,
    to_ioapic,
    to_msi,
    to_pic,
)
from kvmtick.conform.case import case, equal, variants
from kvmtick.conform.eventfds import EventFd, eventfds, wait_for
from kvmtick.guests.script import (
    EXIT_CODE,
    Op,
    cli,
    eoi_off,
    in8,
    ioapic_write,
    lapic_write,
    mmio_write,
    out8,
    sti,
    unreal,
    wait_vector,
)


def pic_requests(pc: Pc) -> int:
    """IRR of both PICs, the slave's above."""
    return pc.pic(1)["irr"] << 8 | pc.pic()["irr"]


def wait_for_pic(pc: Pc, irr: int) -> None:
    """Await requests of the PICs; a slave's makes one of the master's pin 2."""
    wait_for(lambda: pic_requests(pc) & irr == irr, f"IRR of the PICs has {irr:#x}")


# irqfds.


@case("A signal of an irqfd raises its GSI and is consumed (irqfd_wakeup, irqfd_inject).")
def signal_raises_the_gsi(bench: Bench) -> None:
    with bench.pc() as pc, eventfds() as (event,):
        pc.vm.irqfd(event.fd, GSI)
        event.signal()
        wait_for_pic(pc, 1 << GSI)
        equal(event.count(), 0, "the eventfd's count")


@case("Signals that come at once are one: the count is read as a whole (eventfd_ctx_do_read).")
def signals_at_once_are_one(bench: Bench) -> None:
    with bench.pc() as pc, eventfds() as (event,):
        pc.vm.set_gsi_routing([to_msi(GSI, NMI)])
        pc.enable_lapic()
        pc.vm.irqfd(event.fd, GSI)
        event.signal(3)
        wait_for(lambda: pc.vcpus[0].get_vcpu_events().nmi.pending > 0, "an NMI is pending")
        nmis = pc.vcpus[0].get_vcpu_events().nmi.pending
        equal((nmis, event.count()), (1, 0), "pending NMIs, the eventfd's count")


@case("A plain irqfd's line falls at once: the next edge counts (irqfd_inject: 1, then 0).")
def line_falls_again(bench: Bench) -> None:
    with bench.pc() as pc, eventfds() as (event,):
        only_the_ioapic(pc, VECTOR)
        pc.vm.irqfd(event.fd, GSI)
        event.signal()
        wait_for(lambda: pc.irr() == {VECTOR}, "IRR")
        wait_for(lambda: pc.vm.get_irqchip(KVM_IRQCHIP_IOAPIC).chip.ioapic.irr == 0, "line low")
        equal(pc.vm.irq_line_status(GSI, 1), 1, "KVM_IRQ_LINE_STATUS of the next edge")


@case("KVM_GET_LAPIC shows what an irqfd did, no other call is needed (irqfd_inject).")
def get_lapic_shows_it(bench: Bench) -> None:
    with bench.pc() as pc, eventfds() as (event,):
        only_the_ioapic(pc, VECTOR)
        pc.vm.irqfd(event.fd, GSI)
        event.signal()
        wait_for(lambda: pc.irr() == {VECTOR}, "IRR")


@case(
    "An eventfd that was signalled before it was assigned raises its GSI then (kvm_irqfd_assign "
    "polls); that signal is not consumed."
)
def signalled_before_the_assignment(bench: Bench) -> None:
    with bench.pc() as pc, eventfds() as (event,):
        event.signal()
        pc.vm.irqfd(event.fd, GSI)
        wait_for_pic(pc, 1 << GSI)
        equal(event.count(), 1, "the eventfd's count")


@case("A deassigned eventfd is left alone: not consumed, and raises nothing (api.rst 4.75).")
def deassigned_is_left_alone(bench: Bench) -> None:
    with bench.pc() as pc, eventfds(2) as (first, second):
        pc.vm.irqfd(first.fd, GSI)
        pc.vm.irqfd(first.fd, GSI, KVM_IRQFD_FLAG_DEASSIGN)
        pc.vm.irqfd(second.fd, GSI + 1)
        first.signal()
        second.signal()
        wait_for_pic(pc, 1 << GSI + 1)
        equal((pic_requests(pc) >> GSI & 1, first.count()), (0, 1), "request, count")


@case("Deassigning with another GSI leaves the irqfd as it is, and succeeds (kvm_irqfd_deassign).")
def deassign_of_another_gsi(bench: Bench) -> None:
    with bench.pc() as pc, eventfds() as (event,):
        pc.vm.irqfd(event.fd, GSI)
        pc.vm.irqfd(event.fd, GSI + 1, KVM_IRQFD_FLAG_DEASSIGN)
        event.signal()
        wait_for_pic(pc, 1 << GSI)


@case("A deassigned eventfd may be assigned to another GSI (api.rst 4.75).")
def assigned_anew(bench: Bench) -> None:
    with bench.pc() as pc, eventfds() as (event,):
        pc.vm.irqfd(event.fd, GSI)
        pc.vm.irqfd(event.fd, GSI, KVM_IRQFD_FLAG_DEASSIGN)
        pc.vm.irqfd(event.fd, GSI - 1)
        event.signal()
        wait_for_pic(pc, 1 << GSI - 1)
        equal(pic_requests(pc), 1 << GSI - 1, "IRR of the PICs")


@case("Several eventfds may raise one GSI (api.rst 4.75).")
def two_of_one_gsi(bench: Bench) -> None:
    with bench.pc() as pc, eventfds(2) as pair:
        for event in pair:
            pc.vm.irqfd(event.fd, GSI)
        for event in pair:
            pc.pic(irr=0, last_irr=0)
            event.signal()
            wait_for_pic(pc, 1 << GSI)


@case("An irqfd goes by the table of when it is signalled (irqfd_update).")
def goes_by_the_table_of_now(bench: Bench) -> None:
    with bench.pc() as pc, eventfds() as (event,):
        pc.vm.irqfd(event.fd, 50)
        pc.vm.set_gsi_routing([to_pic(50, 3)])
        event.signal()
        wait_for_pic(pc, 1 << 3)


@case("An irqfd whose GSI is a message sends it (kvm_arch_set_irq_inatomic).")
def message_of_an_irqfd(bench: Bench) -> None:
    with bench.pc() as pc, eventfds() as (event,):
        pc.vm.set_gsi_routing([to_msi(50, VECTOR)])
        pc.enable_lapic()
        pc.vm.irqfd(event.fd, 50)
        event.signal()
        wait_for(lambda: pc.irr() == {VECTOR}, "IRR")


@case("An irqfd whose GSI leads nowhere is consumed all the same (irqfd_wakeup).")
def unrouted_is_consumed(bench: Bench) -> None:
    with bench.pc() as pc, eventfds(2) as (event, other):
        pc.vm.irqfd(event.fd, 100)
        pc.vm.irqfd(other.fd, GSI)
        event.signal()
        other.signal()
        wait_for_pic(pc, 1 << GSI)
        equal(event.count(), 0, "the eventfd's count")


@case("An edge by irqfd to a masked IOAPIC pin is lost like any other (ioapic_service).")
def masked_pin_loses_it(bench: Bench) -> None:
    with bench.pc() as pc, eventfds() as (event,):
        only_the_ioapic(pc, VECTOR | MASKED)
        pc.vm.set_gsi_routing([to_ioapic(GSI, PIN), to_pic(GSI, GSI)])
        pc.vm.irqfd(event.fd, GSI)
        event.signal()
        wait_for_pic(pc, 1 << GSI)
        pc.run(unreal(), ioapic_write(REDTBL_LOW, VECTOR))
        equal(pc.irr(), set(), "IRR after the unmask")


@case("An irqfd wakes a vCPU that halts (kvm_vcpu_kick).")
def wakes_a_halted_guest(bench: Bench) -> None:
    with bench.pc() as pc, eventfds() as (event,):
        pc.vm.irqfd(event.fd, GSI)
        got = pc.run(
            *(*ON, ioapic_write(REDTBL_LOW, VECTOR), out8(PORT_ACT, 0), wait_vector(VECTOR, 1)),
            acts=[event.signal],
        )
        equal(got.apic_vectors[VECTOR], 1, "interrupts")


@case("With a split irqchip a plain irqfd sends its GSI's message (api.rst 4.75, 7.5).")
def split_irqfd(bench: Bench) -> None:
    with bench.vm() as vm, eventfds() as (event,):
        vm.enable_cap(KVM_CAP_SPLIT_IRQCHIP, 24)
        pc = Pc(bench, vm, [vm.create_vcpu(0)])
        vm.set_gsi_routing([to_msi(GSI, VECTOR)])
        pc.enable_lapic()
        vm.irqfd(event.fd, GSI)
        event.signal()
        wait_for(lambda: pc.irr() == {VECTOR}, "IRR")


def assign_no_eventfd(pc: Pc, event: EventFd) -> None:
    with open(os.devnull) as other:
        pc.vm.irqfd(other.fileno(), GSI)


def assign_twice(pc: Pc, event: EventFd) -> None:
    pc.vm.irqfd(event.fd, GSI)
    pc.vm.irqfd(event.fd, GSI)


def assign_two_gsis(pc: Pc, event: EventFd) -> None:
    pc.vm.irqfd(event.fd, GSI)
    pc.vm.irqfd(event.fd, GSI + 1)


@variants(
    "KVM_IRQFD with {0} gives {1} (api.rst 4.75; kvm_irqfd_assign).",
    {
        "same-twice": ("an eventfd that has that GSI already", "EBUSY", assign_twice),
        "two-gsis": ("an eventfd that has another GSI", "EBUSY", assign_two_gsis),
        "flags-4": ("flags 4", "EINVAL", lambda pc, event: pc.vm.irqfd(event.fd, GSI, 4)),
        "no-descriptor": ("descriptor -1", "EBADF", lambda pc, event: pc.vm.irqfd(-1, GSI)),
        "no-eventfd": (
            "a descriptor that is no eventfd",
            "EINVAL",
            assign_no_eventfd,
        ),
        "no-resamplefd": (
            "no resamplefd, resampling",
            "EBADF",
            lambda pc, event: pc.vm.irqfd(event.fd, GSI, KVM_IRQFD_FLAG_RESAMPLE, -1),
        ),
        "any-gsi": ("GSI 0xffffffff", 0, lambda pc, event: pc.vm.irqfd(event.fd, 0xFFFF_FFFF)),
        "deassign-unknown": (
            "deassign of one that has no GSI",
            0,
            lambda pc, event: pc.vm.irqfd(event.fd, GSI, KVM_IRQFD_FLAG_DEASSIGN),
        ),
    },
)
def error_of(
    bench: Bench, what: str, expected: object, call: Callable[[Pc, EventFd], object]
) -> None:
    with bench.pc() as pc, eventfds() as (event,):
        equal(errno_of(call, pc, event), expected, "error of KVM_IRQFD")


@case("Without an irqchip in the kernel there are no irqfds: EINVAL (kvm_irqfd_assign).")
def without_irqchip(bench: Bench) -> None:
    with bench.vm() as vm, eventfds() as (event,):
        equal(errno_of(vm.irqfd, event.fd, GSI), "EINVAL", "error of KVM_IRQFD")


@case("With a split irqchip none resamples: the acknowledgement is user space's (api.rst 7.5).")
def split_does_not_resample(bench: Bench) -> None:
    with bench.vm() as vm, eventfds(2) as (event, resample):
        vm.enable_cap(KVM_CAP_SPLIT_IRQCHIP, 24)
        got = errno_of(vm.irqfd, event.fd, GSI, KVM_IRQFD_FLAG_RESAMPLE, resample.fd)
        equal(got, "EINVAL", "error of KVM_IRQFD")


# Resampling irqfds.


@dataclass(frozen=True, slots=True)
class Resampler:
    """A device behind an irqfd that is told when to ask again."""

    pc: Pc
    trigger: EventFd
    resample: EventFd

    def assign(self, flags: int = 0) -> None:
        """KVM_IRQFD."""
        self.pc.vm.irqfd(self.trigger.fd, GSI, flags | KVM_IRQFD_FLAG_RESAMPLE, self.resample.fd)

    def in_service_at_the_ioapic(self) -> None:
        """Ask, and let vCPU 0 take the interrupt of a level pin."""
        self.trigger.signal()
        wait_for(lambda: self.pc.pin(PIN) & REMOTE_IRR != 0, "Remote IRR")
        self.pc.take_into_service(VECTOR)


@contextmanager
def resamplers(bench: Bench, number: int = 1) -> Iterator[tuple[Pc, list[Resampler]]]:
    """Assigned ones of `GSI`, which leads to a level pin of the IOAPIC and one of the PIC."""
    with bench.pc() as pc, eventfds(2 * number) as made:
        only_the_ioapic(pc, VECTOR | LEVEL)
        devices = [Resampler(pc, *made[2 * n : 2 * n + 2]) for n in range(number)]
        for each in devices:
            each.assign()
        yield pc, devices


def line(pc: Pc) -> int:
    """The level of the IOAPIC's pin."""
    return pc.vm.get_irqchip(KVM_IRQCHIP_IOAPIC).chip.ioapic.irr >> PIN & 1


@case(
    "A resampling irqfd holds its line until the local APIC's EOI, which drops the line and "
    "signals the resamplefd (irqfd_resampler_ack)."
)
def resampled_by_the_lapics_eoi(bench: Bench) -> None:
    with resamplers(bench) as (pc, (device,)):
        seen: list[tuple[int, int]] = []

        def ask() -> None:
            device.in_service_at_the_ioapic()
            look()

        def look() -> None:
            seen.append((device.resample.count(), line(pc)))

        pc.run(*ON, out8(PORT_ACT, 0), lapic_write(EOI, 0), out8(PORT_ACT + 1, 0), acts=[ask, look])
        equal(seen, [(0, 1), (1, 0)], "resamplefd's count and line, before and after EOI")
        equal((pc.irr(), pc.pin(PIN)), (set(), VECTOR | LEVEL), "IRR, redirection entry")


@case("A device that still wants attention signals again and interrupts anew (api.rst 4.75).")
def resampled_device_asks_again(bench: Bench) -> None:
    with resamplers(bench) as (pc, (device,)):
        pc.run(
            *(*ON, out8(PORT_ACT, 0), lapic_write(EOI, 0)),
            acts=[device.in_service_at_the_ioapic],
        )
        device.trigger.signal()
        wait_for(lambda: pc.irr() == {VECTOR}, "IRR")
        equal(pc.pin(PIN), VECTOR | LEVEL | REMOTE_IRR, "redirection entry")


def resampled_pic_pin(bench: Bench, *script: Op | tuple[Op, ...]) -> list[tuple[int, int]]:
    """Run a script with a level line of the PIC: OUT to PORT_ACT lets the device ask, to the next
    port notes how often it was resampled since, and the pin's request.
    """
    noted: list[tuple[int, int]] = []
    with bench.pc() as pc, eventfds(2) as made:
        pc.vm.set_gsi_routing([to_pic(GSI, GSI)])
        device = Resampler(pc, *made)

        def ask() -> None:
            pc.pic(elcr=1 << GSI)
            device.assign()
            device.trigger.signal()
            wait_for_pic(pc, 1 << GSI)

        def look() -> None:
            noted.append((device.resample.count(), pic_requests(pc) >> GSI & 1))

        pc.run(*script, acts=[ask, look])
    return noted


@case("OCW2 acknowledges a resampling irqfd of a PIC's pin, not INTA (kvm_pic_clear_isr).")
def resampled_by_ocw2(bench: Bench) -> None:
    noted = resampled_pic_pin(
        bench,
        *(eoi_off(), out8(0x21, 0x7F), out8(PORT_ACT, 0), sti(), *WINDOWS, cli()),
        *(out8(PORT_ACT + 1, 0), out8(0x20, 0x20), out8(PORT_ACT + 1, 0)),
    )
    equal(noted, [(0, 1), (1, 0)], "resamplefd's count and request, in service and after OCW2")


@case(
    "A poll acknowledges a resampling irqfd of a PIC's pin, and OCW2 then nothing (pic_poll_read)."
)
def resampled_by_a_poll(bench: Bench) -> None:
    noted = resampled_pic_pin(
        bench,
        *(out8(0x21, 0x7F), out8(PORT_ACT, 0), out8(0x20, 0x0C), in8(0x20, 0)),
        *(out8(PORT_ACT + 1, 0), out8(0x20, 0x20), out8(PORT_ACT + 1, 0)),
    )
    equal(noted, [(1, 0), (0, 0)], "resamplefd's count and request, after the poll and after OCW2")


@case(
    "A line that user space holds too stays up at the acknowledgement: it is the OR over the "
    "sources (kvm_set_irq)."
)
def resampled_line_that_another_holds(bench: Bench) -> None:
    with resamplers(bench) as (pc, (device,)):

        def ask() -> None:
            device.in_service_at_the_ioapic()
            pc.vm.irq_line(GSI, 1)

        pc.run(*ON, out8(PORT_ACT, 0), lapic_write(EOI, 0), acts=[ask])
        equal((device.resample.count(), pc.irr()), (1, {VECTOR}), "resamplefd's count, IRR")
        pc.vm.irq_line(GSI, 0)
        equal(line(pc), 0, "line when user space lets go")


@case("One acknowledgement tells every resampling irqfd of the GSI (irqfd_resampler_notify).")
def all_resamplers_are_told(bench: Bench) -> None:
    with resamplers(bench, 2) as (pc, devices):
        pc.run(
            *(*ON, out8(PORT_ACT, 0), lapic_write(EOI, 0)),
            acts=[devices[0].in_service_at_the_ioapic],
        )
        equal([each.resample.count() for each in devices], [1, 1], "resamplefds' counts")


@case(
    "The last resampling irqfd of a GSI that goes takes its line down (irqfd_resampler_shutdown)."
)
def last_resampler_takes_the_line_down(bench: Bench) -> None:
    with resamplers(bench, 2) as (pc, devices):
        devices[0].trigger.signal()
        wait_for(lambda: line(pc) == 1, "line up")
        lines: list[int] = []
        for each in devices:
            each.assign(KVM_IRQFD_FLAG_DEASSIGN)
            lines.append(line(pc))
        equal(lines, [1, 0], "line after the first and the last were deassigned")


@case(
    "Unmasking a level pin asks its resampling irqfds instead of sending: the line may be stale "
    "(ioapic_write_indirect, kvm_notify_irqfd_resampler)."
)
def unmask_asks_the_resampler(bench: Bench) -> None:
    with resamplers(bench) as (pc, (device,)):
        pc.set_pin(PIN, VECTOR | LEVEL | MASKED)
        device.trigger.signal()
        wait_for(lambda: line(pc) == 1, "line up")
        pc.run(unreal(), ioapic_write(REDTBL_LOW, VECTOR | LEVEL))
        equal((device.resample.count(), pc.irr(), line(pc)), (1, set(), 0), "count, IRR, line")


@case("One eventfd may be both: triggered by itself as resamplefd (api.rst 4.75).")
def trigger_may_be_the_resamplefd(bench: Bench) -> None:
    with bench.pc() as pc, eventfds() as (event,):
        got = errno_of(pc.vm.irqfd, event.fd, GSI, KVM_IRQFD_FLAG_RESAMPLE, event.fd)
        equal(got, 0, "error of KVM_IRQFD")


# ioeventfds.

PORT = 0x520
GPA = 0xD000_0000
PIO, MATCH = KVM_IOEVENTFD_FLAG_PIO, KVM_IOEVENTFD_FLAG_DATAMATCH
OUTS = b"\xba\x20\x05\xb8\x34\x12\xef\xee\x40\xef"
"""mov dx, 0x520; mov ax, 0x1234; out dx, ax; out dx, al; inc ax; out dx, ax"""
ALL_OUTS = [(2, 0x1234), (1, 0x34), (2, 0x1235)]


def port_writes(pc: Pc, code: bytes = OUTS, port: int = PORT) -> list[tuple[int, int | None]]:
    """Run code; the accesses to a port that were exits."""
    exits: list[tuple[int, int | None]] = []
    handlers: dict[int, Handler] = {
        port: lambda port, size_bytes, value: exits.append((size_bytes, value))
    }
    equal(pc.run_image(code + LEAVE, handlers), EXIT_CODE, "exit code")
    return exits


@variants(
    "An ioeventfd of {0} takes the port writes that fit, the others exit (ioeventfd_in_range).",
    {
        "2-bytes": ("2 bytes", 2, 0, [0, 2]),
        "2-bytes-that-match": ("2 bytes with a match", 2, MATCH, [0]),
        "1-byte": ("1 byte", 1, 0, [1]),
        "4-bytes": ("4 bytes", 4, 0, []),
        "any": ("any length", 0, 0, [0, 1, 2]),
    },
)
def port_writes_of(bench: Bench, what: str, length: int, flags: int, taken: list[int]) -> None:
    with bench.pc() as pc, eventfds() as (event,):
        pc.vm.ioeventfd(PORT, length, event.fd, flags | PIO, 0x1234)
        exits = port_writes(pc)
        equal(event.count(), len(taken), "the eventfd's count")
        equal(exits, [each for n, each in enumerate(ALL_OUTS) if n not in taken], "exits")


@case("A deassigned ioeventfd takes nothing any more (kvm_deassign_ioeventfd).")
def deassigned_ioeventfd(bench: Bench) -> None:
    with bench.pc() as pc, eventfds() as (event,):
        pc.vm.ioeventfd(PORT, 2, event.fd, PIO)
        pc.vm.ioeventfd(PORT, 2, event.fd, PIO | KVM_IOEVENTFD_FLAG_DEASSIGN)
        equal((port_writes(pc), event.count()), (ALL_OUTS, 0), "exits, the eventfd's count")


@case("Reads are not an ioeventfd's: they are exits (ioeventfd_ops has write only).")
def port_read_is_an_exit(bench: Bench) -> None:
    with bench.pc() as pc, eventfds() as (event,):
        pc.vm.ioeventfd(PORT, 0, event.fd, PIO)
        # mov dx, PORT; in al, dx
        exits = port_writes(pc, b"\xba\x20\x05\xec")
        equal((exits, event.count()), ([(1, None)], 0), "exits, the eventfd's count")


@case("An ioeventfd takes writes to its very address, not to those behind it (ioeventfd_in_range).")
def neighbour_port_is_an_exit(bench: Bench) -> None:
    with bench.pc() as pc, eventfds() as (event,):
        pc.vm.ioeventfd(PORT, 4, event.fd, PIO)
        # mov dx, PORT + 1; out dx, al
        exits = port_writes(pc, b"\xba\x21\x05\xee", PORT + 1)
        equal((len(exits), event.count()), (1, 0), "exits, the eventfd's count")


@case("A port and a physical address of the same number are two (KVM_PIO_BUS, KVM_MMIO_BUS).")
def port_is_no_memory(bench: Bench) -> None:
    with bench.pc() as pc, eventfds(2) as (port, memory):
        pc.vm.ioeventfd(PORT, 1, port.fd, PIO)
        pc.vm.ioeventfd(PORT, 1, memory.fd)
        pc.run(out8(PORT, 0))
        equal((port.count(), memory.count()), (1, 0), "counts of the port's and the memory's")


@case("Two ioeventfds of one port tell values apart (KVM_IOEVENTFD_FLAG_DATAMATCH).")
def two_tell_values_apart(bench: Bench) -> None:
    with bench.pc() as pc, eventfds(2) as pair:
        for value, event in enumerate(pair):
            pc.vm.ioeventfd(PORT, 1, event.fd, PIO | MATCH, value)
        pc.run(out8(PORT, 1), out8(PORT, 0), out8(PORT, 1), out8(PORT, 2))
        equal([event.count() for event in pair], [1, 2], "counts")


@case("A match is of 64 bits: more than the length can hold never matches (ioeventfd_in_range).")
def match_beyond_the_length(bench: Bench) -> None:
    with bench.pc() as pc, eventfds() as (event,):
        pc.vm.ioeventfd(PORT, 1, event.fd, PIO | MATCH, 0x101)
        pc.run(out8(PORT, 1))
        equal(event.count(), 0, "the eventfd's count")


@variants(
    "In memory an ioeventfd of {0} takes {3} of: 4 bytes 7, 4 bytes 8, 2 bytes 7, 1 byte 7 "
    "(ioeventfd_in_range).",
    {
        "4-bytes": ("4 bytes", 4, None, 2),
        "4-bytes-that-match": ("4 bytes that match 7", 4, 7, 1),
        "2-bytes": ("2 bytes", 2, None, 1),
        "any": ("any length", 0, None, 4),
    },
)
def memory_writes_of(
    bench: Bench, what: str, length: int, datamatch: int | None, count: int
) -> None:
    with bench.pc() as pc, eventfds() as (event,):
        flags = 0 if datamatch is None else MATCH
        pc.vm.ioeventfd(GPA, length, event.fd, flags, datamatch or 0)
        pc.run(
            *(unreal(), mmio_write(GPA, 7), mmio_write(GPA, 8)),
            *(mmio_write(GPA, 7, 2), mmio_write(GPA, 7, 1)),
        )
        equal(event.count(), count, "the eventfd's count")


@case(
    "An eventfd may be an ioeventfd and an irqfd: the guest's write interrupts it"
    " (ioeventfd_write)."
)
def ioeventfd_that_is_an_irqfd(bench: Bench) -> None:
    with bench.pc() as pc, eventfds() as (event,):
        pc.vm.ioeventfd(PORT, 1, event.fd, PIO)
        pc.vm.irqfd(event.fd, GSI)
        got = pc.run(
            *(*ON, ioapic_write(REDTBL_LOW, VECTOR), out8(PORT, 0), wait_vector(VECTOR, 1)),
        )
        equal(got.apic_vectors[VECTOR], 1, "interrupts")


TAKEN = (0x600, 2, PIO | MATCH, 5)
"""There is an ioeventfd of 2 bytes at that port, for writes of 5."""


@variants(
    "An ioeventfd {0} beside one of 2 bytes that matches 5 gives {1} (ioeventfd_check_collision).",
    {
        "the-same": ("like it", "EEXIST", TAKEN),
        "without-match": ("of 2 bytes without a match", "EEXIST", (0x600, 2, PIO, 0)),
        "any-length": ("of any length", "EEXIST", (0x600, 0, PIO, 0)),
        "another-match": ("that matches 6", 0, (0x600, 2, PIO | MATCH, 6)),
        "another-length": ("of 1 byte", 0, (0x600, 1, PIO | MATCH, 5)),
        "another-address": ("at the next port", 0, (0x601, 2, PIO | MATCH, 5)),
        "in-memory": ("at that address in memory", 0, (0x600, 2, MATCH, 5)),
    },
)
def collision(bench: Bench, what: str, expected: object, new: tuple[int, int, int, int]) -> None:
    with bench.vm() as vm, eventfds(2) as (there, event):
        vm.ioeventfd(*TAKEN[:2], there.fd, *TAKEN[2:])
        got = errno_of(vm.ioeventfd, *new[:2], event.fd, *new[2:])
        equal(got, expected, "error of KVM_IOEVENTFD")


@variants(
    "KVM_IOEVENTFD with {0} gives {1} (api.rst 4.59; kvm_assign_ioeventfd).",
    {
        "3-bytes": ("3 bytes", "EINVAL", (GPA, 3, 0, 0)),
        "8-bytes": ("8 bytes", 0, (GPA, 8, 0, 0)),
        "match-without-length": ("a match without a length", "EINVAL", (GPA, 0, MATCH, 0)),
        "wrapping-address": ("an address that wraps", "EINVAL", ((1 << 64) - 2, 4, 0, 0)),
        "flags-0x20": ("flags 0x20", "EINVAL", (GPA, 4, 0x20, 0)),
        "deassign-unknown": (
            "deassign of none",
            "ENOENT",
            (GPA, 4, KVM_IOEVENTFD_FLAG_DEASSIGN, 0),
        ),
    },
)
def ioeventfd_error(
    bench: Bench, what: str, expected: object, new: tuple[int, int, int, int]
) -> None:
    with bench.vm() as vm, eventfds() as (event,):
        got = errno_of(vm.ioeventfd, *new[:2], event.fd, *new[2:])
        equal(got, expected, "error of KVM_IOEVENTFD")


@case("To deassign an ioeventfd all it was assigned with must be told (kvm_deassign_ioeventfd).")
def deassign_needs_the_same_words(bench: Bench) -> None:
    with bench.vm() as vm, eventfds(2) as (event, other):
        vm.ioeventfd(PORT, 2, event.fd, PIO | MATCH, 5)
        got = [
            errno_of(vm.ioeventfd, PORT, length, fd, flags | KVM_IOEVENTFD_FLAG_DEASSIGN, match)
            for length, fd, flags, match in (
                *((1, event.fd, PIO | MATCH, 5), (2, other.fd, PIO | MATCH, 5)),
                *((2, event.fd, PIO, 5), (2, event.fd, PIO | MATCH, 6), (2, event.fd, MATCH, 5)),
                (2, event.fd, PIO | MATCH, 5),
            )
        ]
        equal(got, ["ENOENT"] * 5 + [0], "errors: length, eventfd, no match, match, bus; the same")
