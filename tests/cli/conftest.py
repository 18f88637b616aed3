"""`kvmtick` in this process."""

import pytest
from terminal import Terminal


@pytest.fixture
def kvmtick(capsys: pytest.CaptureFixture[str]) -> Terminal:
    return Terminal(capsys)
