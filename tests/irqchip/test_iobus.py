"""The port I/O bus: who takes an access."""

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmtick.abi.errors import KvmError
from kvmtick.irqchip.iobus import NR_IOBUS_DEVS, IoBus, IoDevice


class Device(IoDevice):
    def io_read(self, port: int, size_bytes: int, stale: int) -> int:
        return stale

    def io_write(self, port: int, size_bytes: int, value: int) -> None:
        pass


def test_an_empty_bus_takes_nothing() -> None:
    assert [IoBus().find(0x20, size) for size in (1, 2, 4)] == [None] * 3


@given(st.integers(0, 40), st.integers(1, 8), st.integers(0, 48), st.sampled_from([1, 2, 4]))
def test_a_device_takes_what_lies_within_its_range_entirely(
    first: int, length: int, port: int, size: int
) -> None:
    bus, device = IoBus(), Device()
    bus.register(first, length, device)
    inside = set(range(port, port + size)) <= set(range(first, first + length))
    assert bus.find(port, size) is (device if inside else None)


def test_a_decoded_part_is_where_accesses_must_start_not_where_they_must_end() -> None:
    bus, device = IoBus(), Device()
    bus.register(0x61, 4, device, decoded=1)
    assert [bus.find(0x61, size) for size in (1, 2, 4)] == [device] * 3
    assert [bus.find(port, 1) for port in (0x60, 0x62, 0x63, 0x64)] == [None] * 4
    assert [bus.find(0x62, 2), bus.find(0x60, 2)] == [None] * 2


def test_several_ranges_of_one_device_do_not_join() -> None:
    bus, device = IoBus(), Device()
    bus.register(0x20, 2, device)
    bus.register(0x22, 2, device)
    assert bus.find(0x22, 2) is device
    assert bus.find(0x21, 2) is None
    assert len(bus) == 2


def test_the_first_registered_of_two_on_one_port_takes_it_until_it_leaves() -> None:
    bus, first, second = IoBus(), Device(), Device()
    bus.register(0x40, 4, first)
    bus.register(0x42, 4, second)
    assert [bus.find(0x42, 1), bus.find(0x42, 2)] == [first] * 2
    assert [bus.find(0x44, 1), bus.find(0x42, 4), bus.find(0x43, 2)] == [second] * 3
    bus.unregister(first)
    assert [bus.find(0x42, 1), bus.find(0x42, 2)] == [second] * 2
    assert bus.find(0x40, 1) is None


def test_the_bus_is_full_at_1000_ranges() -> None:
    bus, device = IoBus(), Device()
    for _ in range(NR_IOBUS_DEVS):
        bus.register(0x10, 1, device)
    assert len(bus) == NR_IOBUS_DEVS == 1000
    other = Device()
    with pytest.raises(KvmError) as raised:
        bus.register(0x20, 1, other)
    assert raised.value.errno == errno.ENOSPC
    assert bus.find(0x20, 1) is None
    assert len(bus) == NR_IOBUS_DEVS


def test_unregistering_takes_all_ranges_of_that_device_only() -> None:
    bus, device, other = IoBus(), Device(), Device()
    bus.register(0x20, 2, device)
    bus.register(0x30, 2, other)
    bus.register(0xA0, 2, device)
    bus.unregister(device)
    assert len(bus) == 1
    assert [bus.find(port, 1) for port in (0x20, 0xA0, 0x30)] == [None, None, other]
    bus.unregister(device)  # harmless
    assert len(bus) == 1
