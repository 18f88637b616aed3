"""The in-kernel port I/O bus (virt/kvm/kvm_main.c: kvm_io_bus_register_dev and friends).

An access goes to a device whose range contains all of it; what nobody takes is an exit to user
space. Port reads fill a buffer that keeps its content: a device that accepts a read and writes
nothing leaves the guest with what was there before.
"""

import errno
from typing import Final

from mypy_extensions import mypyc_attr

from kvmtick.abi.errors import KvmError

__all__ = ["IoBus", "IoDevice"]

NR_IOBUS_DEVS: Final = 1000
NO_PORT: Final = -1


@mypyc_attr(allow_interpreted_subclasses=True)
class IoDevice:
    """A device on the bus."""

    __slots__ = ()

    def io_read(self, port: int, size_bytes: int, stale: int) -> int:
        """The value read; `stale` is what the buffer held before."""
        raise NotImplementedError

    def io_write(self, port: int, size_bytes: int, value: int) -> None:
        """The guest wrote `value`."""
        raise NotImplementedError


class IoBus:
    """Port ranges and the devices behind them."""

    __slots__ = ("_last_device", "_last_port", "_ranges")

    def __init__(self) -> None:
        self._ranges: list[tuple[int, int, int, IoDevice]] = []
        self._last_port = NO_PORT
        self._last_device: IoDevice | None = None
        """Who took the last access of a single byte, at `_last_port`."""

    def __len__(self) -> int:
        return len(self._ranges)

    def register(self, port: int, length: int, device: IoDevice, decoded: int = 0) -> None:
        """Give `length` ports from `port` on to `device`; KvmError ENOSPC when the bus is full.

        With `decoded`, only accesses that start in the first so many ports are taken; they may
        reach over the rest.
        """
        if len(self._ranges) >= NR_IOBUS_DEVS:
            raise KvmError(
                errno.ENOSPC, "kvm_io_bus_register_dev", f"{NR_IOBUS_DEVS} devices on the bus"
            )
        self._ranges.append((port, length, decoded or length, device))

    def unregister(self, device: IoDevice) -> None:
        """Take a device off the bus, with all its ranges; harmless if it is not there."""
        self._ranges = [entry for entry in self._ranges if entry[3] is not device]
        self._last_port = NO_PORT

    def find(self, port: int, size_bytes: int) -> IoDevice | None:
        """The device that takes an access of `size_bytes` at `port`."""
        if port == self._last_port and size_bytes == 1:
            return self._last_device
        for first, length, decoded, device in self._ranges:
            if first <= port < first + decoded and port + size_bytes <= first + length:
                if size_bytes == 1:
                    self._last_port = port
                    self._last_device = device
                return device
        return None
