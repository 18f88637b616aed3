"""irqfd and ioeventfd with real eventfds."""

import errno
import os
import select
from collections.abc import Callable, Iterator

import pytest
from apics import LEVEL, MASK, REMOTE_IRR, Apics

from kvmtick.abi.errors import KvmError
from kvmtick.abi.structs import to_chip, to_msi
from kvmtick.irqchip.irqfd import IoEventFds, IrqFds
from kvmtick.irqchip.routing import IrqRouting
from kvmtick.trace.events import Event

DEASSIGN, RESAMPLE = 1, 2
DATAMATCH, PIO, IO_DEASSIGN, CCW, FAST_MMIO = 1, 2, 4, 8, 16
PIN, VECTOR = 5, 0x45

NewFd = Callable[..., int]


@pytest.fixture
def fds() -> Iterator[NewFd]:
    """Makes eventfds; blocking ones unless told otherwise."""
    opened: list[int] = []

    def new(count: int = 0, flags: int = os.EFD_CLOEXEC) -> int:
        opened.append(os.eventfd(count, flags))
        return opened[-1]

    yield new
    for fd in opened:
        os.close(fd)


@pytest.fixture
def apics() -> Iterator["Wired"]:
    wired = Wired()
    yield wired
    wired.irqfds.close()


class Wired(Apics):
    """With irqfds."""

    def __init__(self, split: int | None = None) -> None:
        super().__init__(split=split)
        self.irqfds = IrqFds(self.routing, self.notifiers)
        if split is None:
            self.routing.set_table([to_chip(PIN, 2, PIN)])
            self.program(PIN, VECTOR | LEVEL)
            self.records()

    def driven(self) -> list[tuple[int, ...]]:
        """(gsi, level, source) of the kvm_set_irq since."""
        return [tuple(map(int, record[3:])) for record in self.records(Event.KVM_SET_IRQ)]


def count(fd: int) -> int:
    """What is in an eventfd, taken out of it."""
    try:
        data = bytearray(8)
        os.preadv(fd, [data], -1, os.RWF_NOWAIT)
    except BlockingIOError:
        return 0
    return int.from_bytes(data, "little")


def refused(call: str, function: Callable[..., object], *args: int) -> int | None:
    with pytest.raises(KvmError, match=f"^{call}: ") as raised:
        function(*args)
    return raised.value.errno


# Plain.


def test_a_signal_pulses_its_gsi(apics: Wired, fds: NewFd) -> None:
    fd = fds()
    apics.irqfds.set(fd, 4)
    assert not apics.irqfds.poll()
    os.eventfd_write(fd, 3)
    assert apics.irqfds.poll()
    assert apics.driven() == [(4, 1, 0), (4, 0, 0)]
    assert count(fd) == 0
    assert not apics.irqfds.poll()


def test_signals_before_a_look_are_one_pulse_and_a_semaphore_keeps_the_rest(
    apics: Wired, fds: NewFd
) -> None:
    plain, semaphore = fds(), fds(0, os.EFD_SEMAPHORE)
    for fd in (plain, semaphore):
        apics.irqfds.set(fd, 4)
        os.eventfd_write(fd, 1)
        os.eventfd_write(fd, 1)
    assert apics.irqfds.poll()
    assert not apics.irqfds.poll()
    assert apics.driven().count((4, 1, 0)) == 2
    assert (count(plain), count(semaphore)) == (0, 1)


def test_what_was_signalled_before_is_raised_at_once(apics: Wired, fds: NewFd) -> None:
    apics.irqfds.set(fds(1), 4)
    assert apics.driven() == [(4, 1, 0), (4, 0, 0)]
    assert not apics.irqfds.poll()


def test_a_message_is_sent_without_a_line(apics: Wired, fds: NewFd) -> None:
    fd = fds()
    apics.irqfds.set(fd, 40)
    apics.routing.set_table([to_msi(40, 0xFEE0_0000, 0x51)])
    os.eventfd_write(fd, 1)
    assert apics.irqfds.poll()
    assert apics.names() == ["kvm_msi_set_irq", "kvm_apic_accept_irq"]
    assert apics.irrs() == [0x51]


def test_the_table_counts_as_it_is_at_the_signal(apics: Wired, fds: NewFd) -> None:
    fd = fds()
    apics.irqfds.set(fd, PIN)
    apics.routing.set_table([])
    os.eventfd_write(fd, 1)
    apics.irqfds.poll()
    assert apics.irrs() == []
    apics.routing.set_table([to_chip(PIN, 2, PIN)])
    os.eventfd_write(fd, 1)
    apics.irqfds.poll()
    assert apics.irrs() == [VECTOR]


def test_any_gsi_may_be_assigned_and_several_eventfds_to_one(apics: Wired, fds: NewFd) -> None:
    for gsi in (4, 4, 100, 4095, 4096, 0xFFFF_FFFF):
        fd = fds()
        apics.irqfds.set(fd, gsi)
        os.eventfd_write(fd, 1)
    assert len(apics.irqfds) == 6
    apics.irqfds.poll()
    raised = [gsi for gsi, level, _ in apics.driven() if level]
    assert sorted(raised) == [4, 4, 100, 4095, 4096, 0xFFFF_FFFF]


def test_the_descriptor_may_be_closed(apics: Wired) -> None:
    fd = os.eventfd(0)
    other = os.dup(fd)
    apics.irqfds.set(fd, 4)
    os.close(fd)
    os.eventfd_write(other, 1)
    os.close(other)
    assert apics.irqfds.poll()


def test_descriptors_to_wait_for(apics: Wired, fds: NewFd) -> None:
    assert apics.irqfds.filenos() == []
    fd = fds()
    apics.irqfds.set(fd, 4)
    (waited_for,) = apics.irqfds.filenos()
    assert select.select([waited_for], [], [], 0)[0] == []
    os.eventfd_write(fd, 1)
    assert select.select([waited_for], [], [], 0)[0] == [waited_for]
    assert apics.irqfds.poll()
    assert select.select([waited_for], [], [], 0)[0] == []
    apics.irqfds.set(fd, 4, DEASSIGN)
    assert apics.irqfds.filenos() == []


# Deassigning.


def test_deassign_takes_back_that_gsi_only(apics: Wired, fds: NewFd) -> None:
    fd, never = fds(), fds()
    apics.irqfds.set(fd, 4)
    apics.irqfds.set(fd, 5, DEASSIGN)
    apics.irqfds.set(never, 4, DEASSIGN)
    assert len(apics.irqfds) == 1
    for _ in range(2):
        apics.irqfds.set(fd, 4, DEASSIGN)
        assert len(apics.irqfds) == 0
    os.eventfd_write(fd, 1)
    assert not apics.irqfds.poll()
    assert count(fd) == 1
    apics.irqfds.set(fd, 5)


def test_what_was_signalled_before_the_deassignment_is_raised(apics: Wired, fds: NewFd) -> None:
    fd = fds()
    apics.irqfds.set(fd, 4)
    os.eventfd_write(fd, 1)
    apics.irqfds.set(fd, 4, DEASSIGN)
    assert apics.driven() == [(4, 1, 0), (4, 0, 0)]


def test_closing_holds_no_descriptor(fds: NewFd) -> None:
    before = len(os.listdir("/proc/self/fd"))
    apics = Wired()
    fd, resample = fds(), fds()
    apics.irqfds.set(fd, 4)
    apics.irqfds.set(resample, 5, RESAMPLE, fds())
    assert refused("KVM_IRQFD", apics.irqfds.set, fd, 5, RESAMPLE, resample) == errno.EBUSY
    assert refused("KVM_IRQFD", apics.irqfds.set, fds(), 5, RESAMPLE, -1) == errno.EBADF
    for _ in range(2):
        apics.irqfds.close()
    assert len(os.listdir("/proc/self/fd")) == before + 4
    assert len(apics.notifiers) == 0


# What is refused.


def test_errors(apics: Wired, fds: NewFd) -> None:
    fd, ordinary = fds(), os.open("/dev/null", os.O_RDONLY)
    try:
        for args, expected in {
            (fd, 4, 4): errno.EINVAL,
            (-1, 4): errno.EBADF,
            (0xFFFF_FFFF, 4): errno.EBADF,
            (1_000_000, 4): errno.EBADF,
            (ordinary, 4): errno.EINVAL,
            (-1, 4, DEASSIGN): errno.EBADF,
            (ordinary, 4, DEASSIGN): errno.EINVAL,
            (fd, 4, RESAMPLE, -1): errno.EBADF,
            (fd, 4, RESAMPLE, ordinary): errno.EINVAL,
        }.items():
            assert refused("KVM_IRQFD", apics.irqfds.set, *args) == expected, args
    finally:
        os.close(ordinary)
    assert len(apics.irqfds) == 0


def test_one_eventfd_raises_one_gsi_of_one_vm(apics: Wired, fds: NewFd) -> None:
    fd = fds()
    apics.irqfds.set(fd, 4)
    duplicate = os.dup(fd)
    other = Wired()
    for irqfds, gsi in ((apics.irqfds, 4), (apics.irqfds, 5), (other.irqfds, 4)):
        assert refused("KVM_IRQFD", irqfds.set, duplicate, gsi) == errno.EBUSY
    os.close(duplicate)
    apics.irqfds.close()
    other.irqfds.set(fd, 4)
    other.irqfds.close()


def test_a_refused_resampler_leaves_its_line_low_and_no_notifier(apics: Wired, fds: NewFd) -> None:
    fd = fds()
    apics.irqfds.set(fd, 4)
    assert refused("KVM_IRQFD", apics.irqfds.set, fd, 7, RESAMPLE, fds()) == errno.EBUSY
    assert apics.driven() == [(7, 0, 1)]
    assert len(apics.notifiers) == 0


def test_it_takes_an_irqchip(fds: NewFd) -> None:
    fd = fds()
    bare = Apics()
    none = IrqFds(IrqRouting(bare.recorder), bare.notifiers)
    for args in ((fd, 4), (fd, 4, RESAMPLE, fd), (-1, 4)):
        assert refused("KVM_IRQFD", none.set, *args) == errno.EINVAL
    none.set(fd, 4, DEASSIGN)
    split = Wired(split=24)
    assert refused("KVM_IRQFD", split.irqfds.set, fd, 4, RESAMPLE, fd) == errno.EINVAL
    split.irqfds.set(fd, 4)
    split.irqfds.close()


# Resampling.


def test_a_resampled_line_stays_up_until_it_is_ended(apics: Wired, fds: NewFd) -> None:
    fd, resamplefd = fds(), fds()
    apics.irqfds.set(fd, PIN, RESAMPLE, resamplefd)
    os.eventfd_write(fd, 1)
    apics.irqfds.poll()
    assert apics.driven() == [(PIN, 1, 1)]
    assert apics.take() == VECTOR
    assert count(resamplefd) == 0
    apics.eoi()
    assert apics.driven() == [(PIN, 0, 1)]
    assert count(resamplefd) == 1
    assert not apics.ioapic.redirtbl[PIN] & REMOTE_IRR
    assert apics.take() == -1
    # Whoever still wants attention signals again.
    os.eventfd_write(fd, 1)
    apics.irqfds.poll()
    assert apics.take() == VECTOR


def test_a_resampled_pic_line_falls_at_ocw2(apics: Wired, fds: NewFd) -> None:
    fd, resamplefd = fds(), fds()
    apics.routing.set_table([to_chip(3, 0, 3)])
    apics.irqfds.set(fd, 3, RESAMPLE, resamplefd)
    os.eventfd_write(fd, 1)
    apics.irqfds.poll()
    apics.pic.read_irq()
    assert count(resamplefd) == 0
    apics.pic.io_write(0x20, 1, 0x20)
    assert count(resamplefd) == 1
    assert 3 not in apics.pic.irq_states


def test_every_resamplefd_of_a_gsi_is_signalled_by_one_end(apics: Wired, fds: NewFd) -> None:
    triggers, resamplefds = [fds(), fds()], [fds(), fds()]
    for fd, resamplefd in zip(triggers, resamplefds, strict=True):
        apics.irqfds.set(fd, PIN, RESAMPLE, resamplefd)
    os.eventfd_write(triggers[0], 1)
    apics.irqfds.poll()
    apics.take()
    apics.eoi()
    assert [count(fd) for fd in resamplefds] == [1, 1]
    assert apics.driven() == [(PIN, 1, 1), (PIN, 0, 1)]


def test_the_last_one_to_go_takes_the_line_down(apics: Wired, fds: NewFd) -> None:
    triggers = [fds(), fds()]
    for fd in triggers:
        apics.irqfds.set(fd, PIN, RESAMPLE, fds())
    os.eventfd_write(triggers[0], 1)
    apics.irqfds.poll()
    assert apics.driven() == [(PIN, 1, 1)]
    apics.irqfds.set(triggers[0], PIN, DEASSIGN)
    assert apics.driven() == []
    assert apics.ioapic.irq_states[PIN] == 1 << 1
    apics.irqfds.set(triggers[1], PIN, DEASSIGN | RESAMPLE)
    assert apics.driven() == [(PIN, 0, 1)]
    assert len(apics.notifiers) == 0


def test_one_eventfd_may_be_both(apics: Wired, fds: NewFd) -> None:
    fd = fds()
    apics.irqfds.set(fd, PIN, RESAMPLE, fd)
    os.eventfd_write(fd, 1)
    apics.irqfds.poll()
    apics.take()
    apics.eoi()
    assert apics.irqfds.poll()  # the resample signal raised it again
    assert apics.take() == VECTOR


def test_unmasking_asks_the_resampler_instead_of_sending(apics: Wired, fds: NewFd) -> None:
    fd, resamplefd = fds(), fds()
    apics.irqfds.set(fd, PIN, RESAMPLE, resamplefd)
    apics.program(PIN, VECTOR | LEVEL | MASK)
    os.eventfd_write(fd, 1)
    apics.irqfds.poll()
    apics.program(PIN, VECTOR | LEVEL)
    assert count(resamplefd) == 1
    assert apics.ioapic.irr == 0
    assert apics.irrs() == []
    assert apics.line(PIN, 1) == 1


def test_a_full_resamplefd_does_not_block(apics: Wired, fds: NewFd) -> None:
    fd, resamplefd = fds(), fds()
    apics.irqfds.set(fd, PIN, RESAMPLE, resamplefd)
    os.eventfd_write(resamplefd, 0xFFFF_FFFF_FFFF_FFFE)
    os.eventfd_write(fd, 1)
    apics.irqfds.poll()
    apics.take()
    apics.eoi()
    assert count(resamplefd) == 0xFFFF_FFFF_FFFF_FFFE


# ioeventfd.


@pytest.fixture
def io() -> Iterator[IoEventFds]:
    with IoEventFds() as ioeventfds:
        yield ioeventfds


def test_a_write_that_fits_signals(io: IoEventFds, fds: NewFd) -> None:
    port, memory = fds(), fds()
    io.set(0x510, 2, port, PIO)
    io.set(0x510, 4, memory)
    assert io.signal(True, 0x510, 2, 0x1234)
    assert not io.signal(True, 0x510, 1, 0x34)
    assert not io.signal(True, 0x511, 2, 0)
    assert (count(port), count(memory)) == (1, 0)
    assert io.signal(False, 0x510, 4, 0)
    assert (count(port), count(memory)) == (0, 1)


def test_data_that_matches(io: IoEventFds, fds: NewFd) -> None:
    one, two, never = fds(), fds(), fds()
    io.set(0x510, 1, one, PIO | DATAMATCH, 1)
    io.set(0x510, 1, two, PIO | DATAMATCH, 2)
    io.set(0x510, 1, never, PIO | DATAMATCH, 0x101)
    assert [io.signal(True, 0x510, 1, value) for value in (2, 1, 2, 3)] == [True] * 3 + [False]
    assert [count(fd) for fd in (one, two, never)] == [1, 2, 0]


def test_length_0_takes_any_write(io: IoEventFds, fds: NewFd) -> None:
    fd = fds()
    io.set(0x1000, 0, fd)
    assert all(io.signal(False, 0x1000, size, 0) for size in (1, 2, 4, 8))
    assert count(fd) == 4


def test_collisions(io: IoEventFds, fds: NewFd) -> None:
    io.set(0x510, 2, fds(), PIO)
    for length, flags in ((2, PIO), (2, PIO | DATAMATCH), (0, PIO)):
        assert refused("KVM_IOEVENTFD", io.set, 0x510, length, fds(), flags) == errno.EEXIST
    io.set(0x510, 1, fds(), PIO)
    io.set(0x510, 2, fds(), 0)
    io.set(0x511, 2, fds(), PIO)
    io.set(0x600, 4, fds(), DATAMATCH, 7)
    assert refused("KVM_IOEVENTFD", io.set, 0x600, 4, fds(), DATAMATCH, 7) == errno.EEXIST
    assert refused("KVM_IOEVENTFD", io.set, 0x600, 4, fds()) == errno.EEXIST
    io.set(0x600, 4, fds(), DATAMATCH, 8)
    assert len(io) == 6


def test_ioeventfd_errors(io: IoEventFds, fds: NewFd) -> None:
    fd, ordinary = fds(), os.open("/dev/null", os.O_RDONLY)
    try:
        for args, expected in {
            (0x510, 3, fd): errno.EINVAL,
            (0x510, 16, fd): errno.EINVAL,
            (0x510, 0, fd, DATAMATCH): errno.EINVAL,
            (0x510, 4, fd, 0x20): errno.EINVAL,
            (0xFFFF_FFFF_FFFF_FFFF, 1, fd): errno.EINVAL,
            (0xFFFF_FFFF_FFFF_FFFC, 8, fd): errno.EINVAL,
            (0x510, 4, -1): errno.EBADF,
            (0x510, 4, ordinary): errno.EINVAL,
            (0x510, 4, fd, IO_DEASSIGN): errno.ENOENT,
            (0x510, 4, -1, IO_DEASSIGN): errno.EBADF,
            (0x510, 3, fd, IO_DEASSIGN | 0x20): errno.ENOENT,
        }.items():
            assert refused("KVM_IOEVENTFD", io.set, *args) == expected, args
    finally:
        os.close(ordinary)
    io.set(0xFFFF_FFFF_FFFF_FFFF, 0, fd)
    for length, flags in ((8, 0), (8, PIO), (4, CCW), (4, FAST_MMIO)):
        io.set(0x700, length, fds(), flags)
    assert len(io) == 5
    assert not io.signal(True, 0x700, 4, 0)


def test_a_ccw_address_is_neither_port_nor_memory(io: IoEventFds, fds: NewFd) -> None:
    io.set(0x700, 4, fds(), CCW)
    assert not any(io.signal(is_pio, 0x700, 4, 0) for is_pio in (False, True))


def test_ioeventfd_deassign_needs_the_same_words(io: IoEventFds, fds: NewFd) -> None:
    fd = fds()
    io.set(0x510, 2, fd, PIO | DATAMATCH, 7)
    for args in (
        (0x510, 2, fds(), PIO | DATAMATCH, 7),
        (0x510, 4, fd, PIO | DATAMATCH, 7),
        (0x510, 2, fd, DATAMATCH, 7),
        (0x510, 2, fd, PIO | DATAMATCH, 8),
        (0x510, 2, fd, PIO, 7),
        (0x511, 2, fd, PIO | DATAMATCH, 7),
    ):
        addr, length, number, flags, datamatch = args
        failed = refused(
            "KVM_IOEVENTFD", io.set, addr, length, number, flags | IO_DEASSIGN, datamatch
        )
        assert failed == errno.ENOENT
    io.set(0x510, 2, fd, PIO | DATAMATCH | IO_DEASSIGN, 7)
    assert len(io) == 0
    assert not io.signal(True, 0x510, 2, 7)
    io.set(0x510, 2, fd, PIO)


def test_ioeventfds_hold_no_descriptor_after_close(fds: NewFd) -> None:
    fd = fds()
    before = len(os.listdir("/proc/self/fd"))
    io = IoEventFds()
    io.set(0x510, 2, fd, PIO)
    assert refused("KVM_IOEVENTFD", io.set, 0x510, 2, fd, PIO) == errno.EEXIST
    io.set(0x520, 2, fd, PIO)
    io.set(0x520, 2, fd, PIO | IO_DEASSIGN)
    for _ in range(2):
        io.close()
    assert len(os.listdir("/proc/self/fd")) == before
