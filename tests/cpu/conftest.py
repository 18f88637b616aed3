"""Fixtures of the engine tests."""

from collections.abc import Iterator
from typing import Any

import pytest

from kvmtick.cpu.unicorn import UnicornEngine


@pytest.fixture(autouse=True)
def closed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Closes every Unicorn engine a test opens."""
    opened: list[UnicornEngine] = []
    init = UnicornEngine.__init__

    def opening(self: UnicornEngine, **options: Any) -> None:
        init(self, **options)
        opened.append(self)

    monkeypatch.setattr(UnicornEngine, "__init__", opening)
    yield
    for engine in opened:
        engine.close()
