"""A PC with irqchip and PIT, and one with both PICs initialised too."""

import pytest
from pc import Pc


@pytest.fixture
def pc() -> Pc:
    return Pc()


@pytest.fixture
def pics() -> Pc:
    """No PIT; vectors from 0x20 and 0x28, nothing masked."""
    pc = Pc(pit=None)
    pc.init_pics()
    return pc
