"""A host without faults."""

import pytest
from timing_rig import Rig


@pytest.fixture
def rig() -> Rig:
    return Rig()
