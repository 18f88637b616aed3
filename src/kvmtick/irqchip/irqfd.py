"""irqfd and ioeventfd: eventfds that raise a GSI, and eventfds that a guest's write signals
(virt/kvm/eventfd.c; api.rst 4.59 KVM_IOEVENTFD, 4.75 KVM_IRQFD; eventfd(2)).

A plain irqfd pulses its GSI when it is signalled; if the GSI is a message, that is sent at once. A
resampling irqfd raises the line and leaves it up; when the guest acknowledges the interrupt, the
line drops and every resamplefd of the GSI is signalled, so that whoever still wants attention
signals again.

The kernel is called when an eventfd is signalled; here `IrqFds.poll` looks, edge triggered, so that
a count from before the assignment stays where it is, as in the kernel. Signals between two looks
are one.

Not modelled: an irqfd that goes away because its last descriptor was closed (a duplicate is held
here), the way of an irqfd's message that the fast map of destinations cannot tell (the kernel hands
it to a work item, which shows in a trace), irq bypass.
"""

from __future__ import annotations

import errno
import os
import re
import select
from collections.abc import Callable
from typing import Final
from weakref import WeakValueDictionary

from kvmtick.abi.closing import Closing
from kvmtick.abi.errors import NO_IRQCHIP, KvmError
from kvmtick.abi.structs import (
    KVM_IOEVENTFD_FLAG_DATAMATCH,
    KVM_IOEVENTFD_FLAG_DEASSIGN,
    KVM_IOEVENTFD_FLAG_PIO,
    KVM_IOEVENTFD_FLAG_VIRTIO_CCW_NOTIFY,
    KVM_IRQFD_FLAG_DEASSIGN,
    KVM_IRQFD_FLAG_RESAMPLE,
)
from kvmtick.irqchip.notifiers import Notifiers
from kvmtick.irqchip.routing import (
    IRQFD_RESAMPLE_IRQ_SOURCE_ID,
    USERSPACE_IRQ_SOURCE_ID,
    IrqRouting,
)

__all__ = ["EventFd", "IoEventFds", "IrqFds"]

KVM_IRQFD: Final = "KVM_IRQFD"
KVM_IOEVENTFD: Final = "KVM_IOEVENTFD"

IRQFD_FLAGS: Final = KVM_IRQFD_FLAG_DEASSIGN | KVM_IRQFD_FLAG_RESAMPLE
IOEVENTFD_FLAG_FAST_MMIO: Final = 1 << 4
IOEVENTFD_FLAGS: Final = (
    KVM_IOEVENTFD_FLAG_DATAMATCH
    | KVM_IOEVENTFD_FLAG_PIO
    | KVM_IOEVENTFD_FLAG_DEASSIGN
    | KVM_IOEVENTFD_FLAG_VIRTIO_CCW_NOTIFY
    | IOEVENTFD_FLAG_FAST_MMIO
)

ADDRESS_END: Final = 1 << 64
COUNTER_BYTES: Final = 8

_bound: WeakValueDictionary[str, IrqFds] = WeakValueDictionary()
"""Eventfds that are the irqfd of some VM: one eventfd raises one GSI of one VM."""


class EventFd(Closing):
    """A reference to an eventfd, for as long as it is not closed.

    Reading and signalling never block, whatever the descriptor's flags say.
    """

    __slots__ = ("fd", "ident")

    def __init__(self, fd: int, call: str) -> None:
        """`eventfd_ctx_fdget`. KvmError EBADF: no descriptor. EINVAL: not an eventfd."""
        self.fd = -1
        self.ident = _eventfd_ident(fd, call)
        self.fd = os.dup(fd)

    def close(self) -> None:
        """Drop the reference; harmless when repeated."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __del__(self) -> None:
        self.close()

    def take(self) -> bool:
        """Consume what was signalled (`eventfd_ctx_do_read`); False if nothing was."""
        try:
            os.preadv(self.fd, [bytearray(COUNTER_BYTES)], -1, os.RWF_NOWAIT)
        except BlockingIOError:
            return False
        return True

    def signal(self) -> None:
        """`eventfd_signal`: add 1; a full counter stays full."""
        poller = select.poll()
        poller.register(self.fd, select.POLLOUT)
        if poller.poll(0):
            os.eventfd_write(self.fd, 1)


def _eventfd_ident(fd: int, call: str) -> str:
    """What two descriptors of one eventfd have in common."""
    if not 0 <= fd < 1 << 31:
        raise KvmError(errno.EBADF, call)
    try:
        os.fstat(fd)
    except OSError as error:
        raise KvmError(errno.EBADF, call) from error
    with open(f"/proc/self/fdinfo/{fd}") as info:
        found = re.search(r"^eventfd-id:\s*(\d+)", info.read(), re.MULTILINE)
    if found is None:
        raise KvmError(errno.EINVAL, call, f"descriptor {fd} is not an eventfd; use os.eventfd()")
    return found[1]


class _IrqFd:
    """One assigned irqfd."""

    __slots__ = ("eventfd", "gsi", "resamplefd", "resampler")

    def __init__(
        self,
        eventfd: EventFd,
        gsi: int,
        resamplefd: EventFd | None,
        resampler: _Resampler | None,
    ) -> None:
        self.eventfd = eventfd
        self.gsi = gsi
        self.resamplefd = resamplefd
        self.resampler = resampler


class _Resampler:
    """The resampling irqfds of one GSI (struct kvm_kernel_irqfd_resampler)."""

    __slots__ = ("ack", "irqfds")

    def __init__(self, ack: Callable[[], None]) -> None:
        self.ack = ack
        self.irqfds: list[_IrqFd] = []

    def notify(self) -> None:
        """`irqfd_resampler_notify`."""
        for irqfd in self.irqfds:
            if irqfd.resamplefd is not None:
                irqfd.resamplefd.signal()


class IrqFds(Closing):
    """The irqfds of one VM. With the first that resamples it is the notifiers' `resampler`."""

    __slots__ = (
        "__weakref__",
        "_by_fd",
        "_epoll",
        "_notifiers",
        "_resamplers",
        "_routing",
        "assigned",
    )

    def __init__(self, routing: IrqRouting, notifiers: Notifiers) -> None:
        self._routing = routing
        self._notifiers = notifiers
        self.assigned: list[_IrqFd] = []
        self._by_fd: dict[int, _IrqFd] = {}
        self._resamplers: dict[int, _Resampler] = {}
        self._epoll: select.epoll | None = None

    def __len__(self) -> int:
        return len(self.assigned)

    def set(self, fd: int, gsi: int, flags: int = 0, resamplefd: int = -1) -> None:
        """KVM_IRQFD: `deassign` or `assign`, as `flags` say. EINVAL: unknown flags."""
        if flags & ~IRQFD_FLAGS:
            raise KvmError(errno.EINVAL, KVM_IRQFD, f"flags {flags:#x}; 1 deassigns, 2 resamples")
        if flags & KVM_IRQFD_FLAG_DEASSIGN:
            self.deassign(fd, gsi)
        else:
            self.assign(fd, gsi, flags, resamplefd)

    def assign(self, fd: int, gsi: int, flags: int = 0, resamplefd: int = -1) -> None:
        """`kvm_irqfd_assign`: from now on a signal of `fd` raises `gsi`, which may be any.

        With KVM_IRQFD_FLAG_RESAMPLE the line stays up until it is acknowledged; then `resamplefd`
        is signalled. An eventfd that was signalled before raises `gsi` now.

        KvmError EINVAL: no irqchip in the kernel (resampling: not all of it), or a descriptor that
        is no eventfd; EBADF: no descriptor; EBUSY: `fd` is assigned already.
        """
        resample = bool(flags & KVM_IRQFD_FLAG_RESAMPLE)
        if not self._routing.in_kernel:
            raise KvmError(errno.EINVAL, KVM_IRQFD, NO_IRQCHIP)
        if resample and self._routing.split:
            raise KvmError(
                errno.EINVAL,
                KVM_IRQFD,
                "user space has the IOAPIC; let it resample, use a plain one",
            )
        eventfd = EventFd(fd, KVM_IRQFD)
        resampled: EventFd | None = None
        if resample:
            try:
                resampled = EventFd(resamplefd, KVM_IRQFD)
            except KvmError:
                eventfd.close()
                raise
        irqfd = _IrqFd(eventfd, gsi, resampled, self._resampler(gsi) if resample else None)
        if irqfd.resampler is not None:
            irqfd.resampler.irqfds.append(irqfd)
        if eventfd.ident in _bound:
            self._shutdown(irqfd)
            raise KvmError(errno.EBUSY, KVM_IRQFD, f"eventfd {fd} is assigned already")
        _bound[eventfd.ident] = self
        self.assigned.append(irqfd)
        self._by_fd[eventfd.fd] = irqfd
        # What other eventfds have to say must not be lost with the readiness this one starts with.
        self.poll()
        if self._epoll is None:
            self._epoll = select.epoll()
        self._epoll.register(eventfd.fd, select.EPOLLIN | select.EPOLLET)
        if self._epoll.poll(0):
            self._inject_work(irqfd)

    def deassign(self, fd: int, gsi: int) -> None:
        """`kvm_irqfd_deassign`: harmless if `fd` is not assigned to `gsi`.

        KvmError EBADF: no descriptor; EINVAL: not an eventfd.
        """
        ident = _eventfd_ident(fd, KVM_IRQFD)
        # What was signalled before was raised before.
        self.poll()
        for irqfd in [each for each in self.assigned if each.gsi == gsi]:
            if irqfd.eventfd.ident == ident:
                self._remove(irqfd)

    def poll(self) -> bool:
        """Raise the GSIs of all eventfds signalled since; False if none was."""
        if self._epoll is None:
            return False
        signalled = False
        for fd, _ in self._epoll.poll(0):
            irqfd = self._by_fd.get(fd)
            if irqfd is not None and self._take(irqfd):
                signalled = True
        return signalled

    def filenos(self) -> list[int]:
        """The descriptors to wait for in a sleep; one becomes readable when `poll` is due."""
        return [self._epoll.fileno()] if self._epoll is not None and self.assigned else []

    def close(self) -> None:
        """`kvm_irqfd_release`: give all of them back; harmless when repeated."""
        for irqfd in list(self.assigned):
            self._remove(irqfd)
        if self._epoll is not None:
            self._epoll.close()
            self._epoll = None

    def _take(self, irqfd: _IrqFd) -> bool:
        """`irqfd_wakeup`."""
        if not irqfd.eventfd.take():
            return False
        if not self._routing.set_irq_inatomic(irqfd.gsi):
            self._inject_work(irqfd)
        return True

    def _inject_work(self, irqfd: _IrqFd) -> None:
        """`irqfd_inject`."""
        if irqfd.resampler is not None:
            self._routing.set_irq(IRQFD_RESAMPLE_IRQ_SOURCE_ID, irqfd.gsi, 1)
        else:
            self._routing.set_irq(USERSPACE_IRQ_SOURCE_ID, irqfd.gsi, 1)
            self._routing.set_irq(USERSPACE_IRQ_SOURCE_ID, irqfd.gsi, 0)

    def _remove(self, irqfd: _IrqFd) -> None:
        _bound.pop(irqfd.eventfd.ident, None)
        self.assigned.remove(irqfd)
        del self._by_fd[irqfd.eventfd.fd]
        if self._epoll is not None:
            self._epoll.unregister(irqfd.eventfd.fd)
        self._shutdown(irqfd)

    def _shutdown(self, irqfd: _IrqFd) -> None:
        """`irqfd_shutdown`; the last one of its GSI takes the resampler with it, line down."""
        resampler = irqfd.resampler
        if resampler is not None:
            resampler.irqfds.remove(irqfd)
            if not resampler.irqfds:
                del self._resamplers[irqfd.gsi]
                self._notifiers.unregister_ack(irqfd.gsi, resampler.ack)
                self._routing.set_irq(IRQFD_RESAMPLE_IRQ_SOURCE_ID, irqfd.gsi, 0)
        irqfd.eventfd.close()
        if irqfd.resamplefd is not None:
            irqfd.resamplefd.close()

    # Resampling.

    def _resampler(self, gsi: int) -> _Resampler:
        """The resampler of `gsi`, made and registered if there is none."""
        resampler = self._resamplers.get(gsi)
        if resampler is None:

            def ack() -> None:
                """`irqfd_resampler_ack`."""
                self._routing.set_irq(IRQFD_RESAMPLE_IRQ_SOURCE_ID, gsi, 0)
                self._resamplers[gsi].notify()

            resampler = self._resamplers[gsi] = _Resampler(ack)
            self._notifiers.resampler = self._notify_resampler_of
            self._notifiers.register_ack(gsi, ack)
        return resampler

    def _notify_resampler_of(self, gsi: int) -> bool:
        resampler = self._resamplers.get(gsi)
        if resampler is None:
            return False
        resampler.notify()
        return True


class _IoEventFd:
    """One assigned ioeventfd; `datamatch` None: any value."""

    __slots__ = ("bus", "datamatch", "eventfd", "length")

    def __init__(self, bus: int, length: int, datamatch: int | None, eventfd: EventFd) -> None:
        self.bus = bus
        self.length = length
        self.datamatch = datamatch
        self.eventfd = eventfd

    def collides(self, other: _IoEventFd) -> bool:
        """`ioeventfd_check_collision`, for two of one bus and address."""
        if not self.length or not other.length:
            return True
        return self.length == other.length and (
            self.datamatch is None or other.datamatch is None or self.datamatch == other.datamatch
        )

    def hit_by(self, size_bytes: int, value: int) -> bool:
        """`ioeventfd_in_range`."""
        if not self.length:
            return True
        return size_bytes == self.length and self.datamatch in (None, value)


MMIO_BUS: Final = 0
PIO_BUS: Final = 1
VIRTIO_CCW_NOTIFY_BUS: Final = 2


def _bus(flags: int) -> int:
    """`ioeventfd_bus_from_flags`."""
    if flags & KVM_IOEVENTFD_FLAG_PIO:
        return PIO_BUS
    return VIRTIO_CCW_NOTIFY_BUS if flags & KVM_IOEVENTFD_FLAG_VIRTIO_CCW_NOTIFY else MMIO_BUS


class IoEventFds(Closing):
    """The ioeventfds of one VM.

    The board asks the chips first. Who puts an ioeventfd on a chip's own address, gets nothing; the
    kernel goes by address and length there.
    """

    __slots__ = ("_by_address",)

    def __init__(self) -> None:
        self._by_address: dict[tuple[int, int], list[_IoEventFd]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._by_address.values()))

    def set(self, addr: int, length: int, fd: int, flags: int = 0, datamatch: int = 0) -> None:
        """KVM_IOEVENTFD: `deassign` or `assign`, as `flags` say."""
        if flags & KVM_IOEVENTFD_FLAG_DEASSIGN:
            self.deassign(addr, length, fd, flags, datamatch)
        else:
            self.assign(addr, length, fd, flags, datamatch)

    def assign(self, addr: int, length: int, fd: int, flags: int = 0, datamatch: int = 0) -> None:
        """`kvm_assign_ioeventfd`: a write of `length` bytes (0: any) to `addr` signals `fd`.

        With KVM_IOEVENTFD_FLAG_DATAMATCH only a write of `datamatch` does; KVM_IOEVENTFD_FLAG_PIO:
        `addr` is a port.

        KvmError EINVAL: `length`, unknown flags, addresses that wrap, a match without a length, not
        an eventfd; EBADF: no descriptor; EEXIST: a write that hits another one as well.
        """
        if length not in (0, 1, 2, 4, 8):
            raise _bad_ioeventfd(f"length {length}; use 1, 2, 4, 8, or 0 for any")
        if addr + length >= ADDRESS_END:
            raise _bad_ioeventfd(f"{length} bytes at {addr:#x} wrap; give a lower address")
        if flags & ~IOEVENTFD_FLAGS:
            raise _bad_ioeventfd(f"flags {flags:#x}; 1 matches data, 2 is a port, 4 deassigns")
        if not length and flags & KVM_IOEVENTFD_FLAG_DATAMATCH:
            raise _bad_ioeventfd("a match needs a length; give 1, 2, 4 or 8 bytes")
        matched = datamatch if flags & KVM_IOEVENTFD_FLAG_DATAMATCH else None
        new = _IoEventFd(_bus(flags), length, matched, EventFd(fd, KVM_IOEVENTFD))
        there = self._by_address.setdefault((new.bus, addr), [])
        if any(each.collides(new) for each in there):
            new.eventfd.close()
            raise KvmError(
                errno.EEXIST, KVM_IOEVENTFD, f"another one takes such a write at {addr:#x}"
            )
        there.append(new)

    def deassign(self, addr: int, length: int, fd: int, flags: int = 0, datamatch: int = 0) -> None:
        """`kvm_deassign_ioeventfd`: all arguments as given to `assign`.

        KvmError ENOENT: there is none of that kind; EBADF: no descriptor; EINVAL: not an eventfd.
        """
        ident = _eventfd_ident(fd, KVM_IOEVENTFD)
        matched = datamatch if flags & KVM_IOEVENTFD_FLAG_DATAMATCH else None
        there = self._by_address.get((_bus(flags), addr), [])
        for each in there:
            if (each.eventfd.ident, each.length, each.datamatch) == (ident, length, matched):
                there.remove(each)
                each.eventfd.close()
                return
        raise KvmError(errno.ENOENT, KVM_IOEVENTFD, f"no such ioeventfd at {addr:#x}")

    def signal(self, is_pio: bool, addr: int, size_bytes: int, value: int) -> bool:
        """The guest wrote `value`; True: an eventfd took the write and was signalled."""
        for each in self._by_address.get((PIO_BUS if is_pio else MMIO_BUS, addr), ()):
            if each.hit_by(size_bytes, value):
                each.eventfd.signal()
                return True
        return False

    def close(self) -> None:
        """Give all of them back; harmless when repeated."""
        for there in self._by_address.values():
            for each in there:
                each.eventfd.close()
        self._by_address.clear()


def _bad_ioeventfd(why: str) -> KvmError:
    return KvmError(errno.EINVAL, KVM_IOEVENTFD, why)
