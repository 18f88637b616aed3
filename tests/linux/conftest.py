"""Linux kernels for the tests: one of a few bytes, and the newest that is installed."""

from pathlib import Path

import pytest
from echo_kernel import echo_kernel

from kvmtick.abi.errors import HostError
from kvmtick.machine.installed import find_kernel


@pytest.fixture
def echo(tmp_path: Path) -> Path:
    """The kernel that gives everything back."""
    path = tmp_path / "echo"
    path.write_bytes(echo_kernel())
    return path


@pytest.fixture(scope="session")
def kernel() -> Path:
    """Debian's, or another."""
    try:
        return find_kernel()
    except HostError:
        pytest.skip("no kernel in /boot: apt-get install linux-image-cloud-amd64")
