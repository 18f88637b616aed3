"""Fixtures of the engine tests."""

from collections.abc import Iterator

import pytest

from kvmtick.cpu.unicorn import UnicornEngine


@pytest.fixture(autouse=True)
def closed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Closes every Unicorn engine a test opens."""
    opened: list[UnicornEngine] = []
    init = UnicornEngine.__init__

    def opening(self: UnicornEngine) -> None:
        init(self)
        opened.append(self)

    monkeypatch.setattr(UnicornEngine, "__init__", opening)
    yield
    for engine in opened:
        engine.close()
