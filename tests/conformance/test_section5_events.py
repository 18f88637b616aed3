"""NMIs, HLT, irqfds and ioeventfds as measured on a real kernel."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
from eventfds import LIMIT_S, EventFd, MakeEventFd, wait_for

from kvmtick import guests
from kvmtick.abi.structs import (
    KVM_IOEVENTFD_FLAG_DATAMATCH,
    KVM_IOEVENTFD_FLAG_DEASSIGN,
    KVM_IOEVENTFD_FLAG_PIO,
    KVM_IRQCHIP_IOAPIC,
    KVM_IRQFD_FLAG_DEASSIGN,
    KVM_IRQFD_FLAG_RESAMPLE,
    KVM_MP_STATE_HALTED,
    KVM_MP_STATE_RUNNABLE,
    KVM_VCPUEVENT_VALID_NMI_PENDING,
    kvm_vcpu_events,
)
from kvmtick.guests.script import (
    NMIS_AT,
    Op,
    Results,
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
from kvmtick.kvm.model import ModelVm

from .rig import (
    ENABLED,
    EOI,
    LEVEL,
    PORT_ACT,
    REMOTE_IRR,
    SVR,
    WINDOWS,
    Backend,
    Handler,
    Pc,
    Script,
    to_ioapic,
    to_pic,
)

VECTOR = 0x45
GSI = PIN = 7
ON: Script = (unreal(), lapic_write(SVR, ENABLED))
IVT_NMI = 2 * 4
HANDLER_AT = 0x7800
"""Between the scenario guest's stack and its image."""

OUT_EXIT = b"\xb0\x5a\xe6\xf4"
"""mov al, 0x5a; out 0xf4, al"""


def run_until_halted(pc: Pc, code: bytes) -> None:
    """Run real-mode code until the vCPU sleeps in the kernel."""
    pc.vm.load(guests.Guest("image", code, guests.LOAD_AT, guests.ENTRY, None))
    if isinstance(pc.vm, ModelVm):
        pc.vm.run(until=lambda: pc.vcpus[0].get_mp_state() == KVM_MP_STATE_HALTED)
    else:
        assert pc.vm.run(limit_s=0.02).exit.reason == "limit"


def finish(pc: Pc) -> int:
    """Run on; the exit code."""
    if isinstance(pc.vm, ModelVm):
        return pc.vm.run(for_ns=1_000_000).exit.code
    return pc.vm.run(limit_s=LIMIT_S).exit.code


CLI_HLT = b"\xfa\xf4"


# --- NMIs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sent", "taken"), [(1, 1), (2, 2), (3, 2), (9, 2)])
def test_two_nmis_at_most_wait(backend: Backend, sent: int, taken: int) -> None:
    """They come with IF=0; here to a vCPU that halts."""
    with backend.pc() as pc:
        # inc word [0x7900]; iret
        pc.vm.write_memory(HANDLER_AT, b"\xff\x06\x00\x79\xcf")
        pc.vm.write_memory(IVT_NMI, HANDLER_AT.to_bytes(4, "little"))
        run_until_halted(pc, CLI_HLT + b"\xe6\x80" * 4 + OUT_EXIT)
        for _ in range(sent):
            pc.vcpus[0].nmi()
        assert pc.vcpus[0].get_vcpu_events().nmi.pending == taken
        assert finish(pc) == 0x5A
        assert pc.vm.read_memory(0x7900, 2) == taken.to_bytes(2, "little")
        assert pc.vcpus[0].get_vcpu_events().nmi.pending == 0


def test_in_the_handler_the_second_nmi_waits_and_nmis_are_masked(backend: Backend) -> None:
    with backend.pc() as pc:
        seen: list[tuple[int, int, int]] = []

        def look() -> None:
            nmi = pc.vcpus[0].get_vcpu_events().nmi
            seen.append((nmi.pending, nmi.masked, nmi.injected))

        def send() -> None:
            # push ax; out PORT_ACT + 1, al by dx; pop; inc dword [nmis]; iret
            nmis_at = (guests.LOAD_AT + NMIS_AT).to_bytes(2, "little")
            code = b"\x52\xba\x11\x05\xee\x5a\x66\xff\x06" + nmis_at + b"\xcf"
            pc.vm.write_memory(HANDLER_AT, code)
            pc.vm.write_memory(IVT_NMI, HANDLER_AT.to_bytes(4, "little"))
            for _ in range(3):
                pc.vcpus[0].nmi()

        assert pc.run(out8(PORT_ACT, 0), *WINDOWS, acts=[send, look]).nmis == 2
        assert seen == [(1, 1, 0), (0, 1, 0)]
        look()
        assert seen[2] == (0, 0, 0)


def test_set_vcpu_events_sets_the_pending_nmis_if_its_flag_says_so(backend: Backend) -> None:
    with backend.pc() as pc:
        pending: list[int] = []

        def send() -> None:
            vcpu = pc.vcpus[0]
            for flags in (0, KVM_VCPUEVENT_VALID_NMI_PENDING):
                events = kvm_vcpu_events(flags=flags)
                events.nmi.pending = 1
                vcpu.set_vcpu_events(events)
                pending.append(vcpu.get_vcpu_events().nmi.pending)

        assert pc.run(out8(PORT_ACT, 0), *WINDOWS, acts=[send]).nmis == 1
        assert pending == [0, 1]


# --- HLT ------------------------------------------------------------------------------------------


def test_set_mp_state_releases_a_hlt_with_if_0(backend: Backend) -> None:
    with backend.pc() as pc:
        run_until_halted(pc, CLI_HLT + OUT_EXIT)
        assert pc.vcpus[0].get_mp_state() == KVM_MP_STATE_HALTED
        pc.vcpus[0].set_mp_state(KVM_MP_STATE_RUNNABLE)
        assert pc.vcpus[0].get_mp_state() == KVM_MP_STATE_RUNNABLE
        assert finish(pc) == 0x5A


def test_after_a_run_that_ended_in_hlt_set_mp_state_lets_the_next_go_on(backend: Backend) -> None:
    """The first run has nothing that ends it but the caller."""
    with backend.pc() as pc:
        pc.vm.load(guests.Guest("image", CLI_HLT + OUT_EXIT, guests.LOAD_AT, guests.ENTRY, None))
        pc.vm.run(limit_s=0.02)
        assert pc.vcpus[0].get_mp_state() == KVM_MP_STATE_HALTED
        pc.vcpus[0].set_mp_state(KVM_MP_STATE_RUNNABLE)
        assert finish(pc) == 0x5A


def test_after_a_guest_has_ended_another_can_be_loaded_and_run(backend: Backend) -> None:
    with backend.pc() as pc:
        for code in (0x11, 0x22):
            assert pc.run_image(bytes((0xB0, code, 0xE6, 0xF4))) == code


def test_an_nmi_releases_a_hlt_with_if_0(backend: Backend) -> None:
    with backend.pc() as pc:
        pc.vm.write_memory(HANDLER_AT, b"\xcf")
        pc.vm.write_memory(IVT_NMI, HANDLER_AT.to_bytes(4, "little"))
        run_until_halted(pc, CLI_HLT + OUT_EXIT)
        pc.vcpus[0].nmi()
        assert finish(pc) == 0x5A


def test_an_interrupt_does_not_release_a_hlt_with_if_0(backend: Backend) -> None:
    with backend.pc() as pc:
        run_until_halted(pc, CLI_HLT + OUT_EXIT)
        pc.enable_lapic()
        assert pc.vm.signal_msi(guests.MSI_ADDRESS, VECTOR) == 1
        assert pc.vcpus[0].get_mp_state() == KVM_MP_STATE_HALTED
        if isinstance(pc.vm, ModelVm):
            assert pc.vm.run(for_ns=1_000_000).exit.code == 0
        else:
            assert pc.vm.run(limit_s=0.02).exit.reason == "limit"
        assert pc.vcpus[0].get_mp_state() == KVM_MP_STATE_HALTED


def test_get_lapic_shows_what_an_irqfd_did(backend: Backend, eventfd: MakeEventFd) -> None:
    """No other call is needed in between."""
    with backend.pc() as pc:
        pc.vm.set_gsi_routing([to_ioapic(GSI, PIN)])
        pc.enable_lapic()
        pc.set_pin(PIN, VECTOR)
        event = eventfd()
        pc.vm.irqfd(event.fd, GSI)
        event.signal()
        wait_for(lambda: pc.irr() == {VECTOR})


# --- irqfds ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Resampler:
    """A device behind an irqfd that is told when to ask again."""

    pc: Pc
    trigger: EventFd
    resample: EventFd

    def assign(self) -> None:
        self.pc.vm.irqfd(self.trigger.fd, GSI, KVM_IRQFD_FLAG_RESAMPLE, self.resample.fd)

    def ask(self, arrived: Callable[[], bool]) -> None:
        """Signal it, and wait until that has arrived."""
        self.trigger.signal()
        wait_for(arrived)


def resampling(pc: Pc, eventfd: MakeEventFd) -> Resampler:
    """One that is not assigned yet."""
    return Resampler(pc, eventfd(), eventfd())


def play_with_a_resampled_pic_pin(
    pc: Pc, device: Resampler, *script: Op | tuple[Op, ...]
) -> tuple[Results, list[int]]:
    """Run a script with a level line of the PIC: OUT to PORT_ACT lets the device ask, to the next
    port notes how often it was resampled since, and the pin's bit in IRR.
    """
    pc.vm.set_gsi_routing([to_pic(GSI, GSI)])
    noted: list[int] = []

    def requested() -> bool:
        return bool(pc.pic()["irr"] >> GSI & 1)

    def ask() -> None:
        pc.pic(elcr=1 << GSI)
        device.assign()
        device.ask(requested)

    def look() -> None:
        noted.extend((device.resample.count(), int(requested())))

    return pc.run(*script, acts=[ask, look]), noted


def test_an_irqfd_is_consumed_and_pulses_its_gsi(backend: Backend, eventfd: MakeEventFd) -> None:
    """One pulse for what was signalled several times at once."""
    with backend.pc() as pc:
        pc.enable_lapic()
        pc.set_pin(PIN, VECTOR)
        event = eventfd()
        pc.vm.irqfd(event.fd, GSI)
        event.signal(3)
        # the PIC's request stays, as does the APIC's
        wait_for(lambda: pc.pic()["irr"] == 1 << GSI)
        wait_for(lambda: pc.irr() == {VECTOR})
        assert event.count() == 0
        # the line is low again: the next edge counts
        assert pc.vm.irq_line_status(GSI, 1) == 1


def test_an_irqfd_signalled_before_it_was_assigned_fires(
    backend: Backend, eventfd: MakeEventFd
) -> None:
    with backend.pc() as pc:
        event = eventfd()
        event.signal()
        pc.vm.irqfd(event.fd, GSI)
        wait_for(lambda: pc.pic()["irr"] == 1 << GSI)
        # what was there before is not consumed
        assert event.count() == 1


def test_a_deassigned_irqfd_is_left_alone(backend: Backend, eventfd: MakeEventFd) -> None:
    with backend.pc() as pc:
        first, second = eventfd(), eventfd()
        pc.vm.irqfd(first.fd, GSI)
        pc.vm.irqfd(first.fd, GSI, KVM_IRQFD_FLAG_DEASSIGN)
        pc.vm.irqfd(second.fd, GSI + 1)
        first.signal()
        second.signal()
        wait_for(lambda: pc.pic(1)["irr"] == 1)
        assert pc.pic()["irr"] & 1 << GSI == 0
        assert first.count() == 1


def test_an_irqfd_wakes_a_halted_guest(backend: Backend, eventfd: MakeEventFd) -> None:
    with backend.pc() as pc:
        event = eventfd()
        pc.vm.irqfd(event.fd, GSI)
        got = pc.run(
            *(*ON, ioapic_write(0x10 + 2 * PIN, VECTOR), out8(PORT_ACT, 0)),
            wait_vector(VECTOR, 1),
            acts=[event.signal],
        )
        assert got.apic_vectors[VECTOR] == 1


def test_a_resampling_irqfd_holds_the_line_until_the_pics_eoi(
    backend: Backend, eventfd: MakeEventFd
) -> None:
    """With IF=0: a poll takes the interrupt, OCW2 ends it."""
    with backend.pc() as pc:
        device = resampling(pc, eventfd)
        got, noted = play_with_a_resampled_pic_pin(
            *(pc, device, out8(0x21, 0x7F), out8(PORT_ACT, 0), out8(0x20, 0x0C), in8(0x20, 0)),
            *(out8(PORT_ACT + 1, 0), out8(0x20, 0x20), out8(PORT_ACT + 1, 0)),
        )
        # a poll's acknowledgement clears ISR at once, and so is an EOI already
        assert got.results[0] == 0x80 | GSI
        assert noted == [1, 0, 0, 0]
        assert device.trigger.count() == 0


def test_a_resampling_irqfd_holds_the_line_until_ocw2(
    backend: Backend, eventfd: MakeEventFd
) -> None:
    with backend.pc() as pc:
        device = resampling(pc, eventfd)
        got, noted = play_with_a_resampled_pic_pin(
            *(pc, device, eoi_off(), out8(0x21, 0x7F), out8(PORT_ACT, 0), sti(), *WINDOWS, cli()),
            *(out8(PORT_ACT + 1, 0), out8(0x20, 0x20), out8(PORT_ACT + 1, 0), sti(), *WINDOWS),
        )
        # in service; then ended, and the line is down
        assert noted == [0, 1, 1, 0]
        assert got.vectors[GSI] == 1


@pytest.mark.parametrize("still", [0, 1], ids=["device is quiet", "device asks again"])
def test_a_resampling_irqfd_holds_the_line_until_the_lapics_eoi(
    backend: Backend, eventfd: MakeEventFd, still: int
) -> None:
    with backend.pc() as pc:
        pc.vm.set_gsi_routing([to_ioapic(GSI, PIN)])
        device = resampling(pc, eventfd)
        counts: list[int] = []

        def sent() -> bool:
            return pc.pin(PIN) & REMOTE_IRR != 0

        def ask() -> None:
            device.assign()
            device.ask(sent)
            assert pc.irr() == {VECTOR}
            pc.take_into_service(VECTOR)
            counts.append(device.resample.count())

        def look() -> None:
            counts.append(device.resample.count())
            counts.append(pc.vm.get_irqchip(KVM_IRQCHIP_IOAPIC).chip.ioapic.irr)
            if still:
                device.ask(sent)

        pc.run(
            *(*ON, ioapic_write(0x10 + 2 * PIN, VECTOR | LEVEL), out8(PORT_ACT, 0)),
            *(lapic_write(EOI, 0), out8(PORT_ACT + 1, 0)),
            acts=[ask, look],
        )
        assert counts == [0, 1, 0]
        assert pc.irr() == ({VECTOR} if still else set())
        assert pc.pin(PIN) == VECTOR | LEVEL | (REMOTE_IRR if still else 0)


def test_a_line_that_another_source_holds_stays_up_at_the_resamplers_ack(
    backend: Backend, eventfd: MakeEventFd
) -> None:
    """The pin's level is the OR over the sources: user space's 0, the resampler's 1."""
    with backend.pc() as pc:
        pc.vm.set_gsi_routing([to_ioapic(GSI, PIN)])
        device = resampling(pc, eventfd)

        def ask() -> None:
            device.assign()
            device.ask(lambda: pc.pin(PIN) & REMOTE_IRR != 0)
            assert pc.irr() == {VECTOR}
            pc.vm.irq_line(GSI, 1)
            pc.take_into_service(VECTOR)

        pc.run(
            *(*ON, ioapic_write(0x10 + 2 * PIN, VECTOR | LEVEL), out8(PORT_ACT, 0)),
            lapic_write(EOI, 0),
            acts=[ask],
        )
        assert device.resample.count() == 1
        assert pc.irr() == {VECTOR}
        pc.vm.irq_line(GSI, 0)
        assert pc.vm.get_irqchip(KVM_IRQCHIP_IOAPIC).chip.ioapic.irr == 0


# --- ioeventfds -----------------------------------------------------------------------------------

PORT = 0x520
# mov dx, 0x520; mov ax, 0x1234; out dx, ax; out dx, al; inc ax; out dx, ax
OUTS = b"\xba\x20\x05\xb8\x34\x12\xef\xee\x40\xef"
ALL_OUTS = [(2, 0x1234), (1, 0x34), (2, 0x1235)]


@pytest.mark.parametrize(
    ("length", "flags", "taken"),
    [
        (2, 0, [0, 2]),
        (2, KVM_IOEVENTFD_FLAG_DATAMATCH, [0]),
        (1, 0, [1]),
        (4, 0, []),
        (0, 0, [0, 1, 2]),
    ],
    ids=["2 bytes", "2 bytes that match", "1 byte", "4 bytes", "any"],
)
def test_an_ioeventfd_takes_the_port_writes_of_its_length(
    backend: Backend, eventfd: MakeEventFd, length: int, flags: int, taken: list[int]
) -> None:
    """The others are exits."""
    with backend.pc() as pc:
        event = eventfd()
        exits: list[tuple[int, int | None]] = []
        handlers: dict[int, Handler] = {
            PORT: lambda port, size_bytes, value: exits.append((size_bytes, value))
        }
        flags |= KVM_IOEVENTFD_FLAG_PIO
        pc.vm.ioeventfd(PORT, length, event.fd, flags, 0x1234)
        assert pc.run_image(OUTS + OUT_EXIT, handlers) == 0x5A
        assert event.count() == len(taken)
        assert exits == [each for n, each in enumerate(ALL_OUTS) if n not in taken]
        pc.vm.ioeventfd(PORT, length, event.fd, flags | KVM_IOEVENTFD_FLAG_DEASSIGN, 0x1234)


def test_without_its_ioeventfd_every_write_exits(backend: Backend, eventfd: MakeEventFd) -> None:
    with backend.pc() as pc:
        event = eventfd()
        exits: list[tuple[int, int | None]] = []
        flags = KVM_IOEVENTFD_FLAG_PIO
        pc.vm.ioeventfd(PORT, 2, event.fd, flags)
        pc.vm.ioeventfd(PORT, 2, event.fd, flags | KVM_IOEVENTFD_FLAG_DEASSIGN)
        pc.run_image(
            OUTS + OUT_EXIT,
            {PORT: lambda port, size_bytes, value: exits.append((size_bytes, value))},
        )
        assert exits == ALL_OUTS
        assert event.count() == 0


@pytest.mark.parametrize(
    ("length", "datamatch", "count"), [(4, None, 2), (4, 7, 1), (2, None, 1), (0, None, 4)]
)
def test_an_ioeventfd_in_memory(
    backend: Backend, eventfd: MakeEventFd, length: int, datamatch: int | None, count: int
) -> None:
    with backend.pc() as pc:
        event = eventfd()
        flags = 0 if datamatch is None else KVM_IOEVENTFD_FLAG_DATAMATCH
        pc.vm.ioeventfd(0xD000_0000, length, event.fd, flags, datamatch or 0)
        pc.run(
            *(unreal(), mmio_write(0xD000_0000, 7), mmio_write(0xD000_0000, 8)),
            *(mmio_write(0xD000_0000, 7, 2), mmio_write(0xD000_0000, 7, 1)),
        )
        assert event.count() == count


def test_two_ioeventfds_tell_values_apart(backend: Backend, eventfd: MakeEventFd) -> None:
    with backend.pc() as pc:
        events = eventfd(), eventfd()
        for value, event in enumerate(events):
            pc.vm.ioeventfd(PORT, 1, event.fd, KVM_IOEVENTFD_FLAG_PIO | 1, value)
        pc.run(out8(PORT, 1), out8(PORT, 0), out8(PORT, 1), out8(PORT, 2))
        assert [event.count() for event in events] == [1, 2]
