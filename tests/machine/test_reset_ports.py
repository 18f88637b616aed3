"""Ports 0x92 and 0xcf9."""

import pytest
from pc_host import FakePc

from kvmtick.machine.pc.reset import ResetPorts

PORT_A, CONTROL = 0x92, 0xCF9


@pytest.fixture
def pc() -> FakePc:
    made = FakePc()
    made.ports = ResetPorts(made.host).ports()
    return made


def test_fast_reset_by_port_a(pc: FakePc) -> None:
    assert pc.read(PORT_A) == 2
    pc.write(PORT_A, 0)
    assert pc.read(PORT_A) == 0  # kept, though A20 stays on
    pc.write(PORT_A, 2)
    assert pc.resets == []
    pc.write(PORT_A, 3)
    assert pc.resets == ["port 0x92"]
    pc.write(PORT_A, 3)  # only the edge resets
    assert len(pc.resets) == 1
    pc.write(PORT_A, 2)
    pc.write(PORT_A, 3)
    assert len(pc.resets) == 2


@pytest.mark.parametrize("kind", [0x00, 0x02, 0x08, 0x0A])
def test_reset_control_resets_by_bit_2(pc: FakePc, kind: int) -> None:
    pc.write(CONTROL, kind)
    assert pc.read(CONTROL) == kind
    assert pc.resets == []
    pc.write(CONTROL, kind | 4)
    assert pc.resets == ["port 0xcf9"]
    pc.write(CONTROL, kind | 4)
    assert len(pc.resets) == 1
    pc.write(CONTROL, 0xF1)
    assert pc.read(CONTROL) == 0
    assert len(pc.resets) == 1


def test_words_are_nobody_s(pc: FakePc) -> None:
    pc.write(CONTROL, 0x0606, 2)
    pc.write(PORT_A, 0x0101, 2)
    assert pc.resets == []
    assert pc.ports[CONTROL](CONTROL, 4, None) is None
    assert pc.ports[PORT_A](PORT_A, 2, None) is None
