"""A host without faults."""

import pytest
from hypothesis import settings
from timing_rig import Rig

# A busy host is no failure; what fails can be repeated from what is printed.
settings.register_profile("steady", deadline=None, print_blob=True)
settings.load_profile("steady")


@pytest.fixture
def rig() -> Rig:
    return Rig()
