"""The bench of the conformance cases, for tests that are not cases yet: a skip is pytest's."""

import pytest

from kvmtick.conform import bench
from kvmtick.conform.bench import *  # noqa: F403


class Backend(bench.Bench):
    """A bench."""

    def needs_model(self, why: str) -> None:
        if not self.exact:
            pytest.skip(why)
