"""An access that begins in RAM and ends where there is none: the same on both back ends."""

import pytest

from kvmtick.conform.bench import Bench
from kvmtick.guests.script import mmio_read, unreal
from kvmtick.kvm.kernel import DEFAULT_RAM_BYTES


@pytest.mark.parametrize(
    ("ahead", "expected"), [(1, 0xFFFF_FF00), (2, 0xFFFF_0000), (3, 0xFF << 24)]
)
def test_an_access_over_the_end_of_ram(backend: Bench, ahead: int, expected: int) -> None:
    with backend.pc() as pc:
        got = pc.run(unreal(), mmio_read(DEFAULT_RAM_BYTES - ahead, 0))
        assert got.results[0] == expected
