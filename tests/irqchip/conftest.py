"""A PC with irqchip and PIT, and one with both PICs initialised too."""

import pytest
from hypothesis import settings
from pc import Pc

# A busy host is no failure; what fails can be repeated from what is printed.
settings.register_profile("steady", deadline=None, print_blob=True)
settings.load_profile("steady")


@pytest.fixture
def pc() -> Pc:
    return Pc()


@pytest.fixture
def pics() -> Pc:
    """No PIT; vectors from 0x20 and 0x28, nothing masked."""
    pc = Pc(pit=None)
    pc.init_pics()
    return pc
