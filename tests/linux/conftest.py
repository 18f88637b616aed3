"""Linux kernels for the tests: one of a few bytes, and the newest that is installed."""

import os
from pathlib import Path

import pytest
from echo_kernel import echo_kernel

from kvmtick.abi.errors import HostError
from kvmtick.cli.run_linux import find_kernel

ALL_BOOTS = "KVMTICK_ALL_BOOTS"


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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get(ALL_BOOTS):
        return
    skipped = pytest.mark.skip(reason=f"one of all set-ups: make test-all, or {ALL_BOOTS}=1")
    for item in items:
        if item.get_closest_marker("all_boots"):
            item.add_marker(skipped)
