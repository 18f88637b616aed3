"""A tracefs without a kernel: what was recorded of one guest, handed out bit by bit."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

from kvmtick import bench
from kvmtick.host.tracefs import Lost

RECORDED = json.loads(Path(bench.__file__).with_name("recorded.json").read_text())
FORMATS = {text.split()[1]: text for text in RECORDED["formats"]}


def pages_of(guest: str) -> list[tuple[int, bytes]]:
    """The pages of a guest's run."""
    return [(cpu, bytes.fromhex(page)) for cpu, page in RECORDED["runs"][guest]["pages"]]


class FakeTracefs:
    """Has the events of which there is a format, and makes one instance."""

    def __init__(self, deliveries: list[list[tuple[int, bytes]]], lost: int = 0) -> None:
        self.made = FakeInstance(deliveries, lost)

    def has_event(self, event: str) -> bool:
        return event.partition(":")[2] in FORMATS

    def format_text(self, event: str) -> str:
        return FORMATS[event.partition(":")[2]]

    def functions(self, *names: str) -> dict[int, str]:
        functions = {int(at, 16): name for at, name in RECORDED["functions"].items()}
        assert set(names) == set(functions.values())
        return functions

    def read(self, name: str) -> str:
        assert name == "events/header_page"
        return RECORDED["header_page"]

    def comms(self) -> dict[int, str]:
        return {4242: "hog"}

    def instance(self) -> "FakeInstance":
        return self.made


class FakeInstance:
    """Hands out one delivery after each sleep; after the last it calls `at_end`."""

    def __init__(self, deliveries: list[list[tuple[int, bytes]]], lost: int) -> None:
        self._deliveries = list(deliveries)
        self._ready: list[tuple[int, bytes]] = []
        self._lost = lost
        self.at_end: Callable[[], object] = lambda: None
        self.calls: list[tuple[str, ...]] = []
        self.filters: dict[str, str] = {}

    def __enter__(self) -> "FakeInstance":
        return self

    def __exit__(self, *error: object) -> None:
        self.calls.append(("close",))

    def set_buffer_size(self, kib: int) -> None:
        self.calls.append(("buffer", str(kib)))

    def write(self, name: str, text: str) -> None:
        self.calls.append((name, text))

    def enable(self, event: str, filter_: str = "") -> None:
        self.filters[event] = filter_

    def set_filter(self, event: str, filter_: str) -> None:
        self.calls.append(("filter", event))
        self.filters[event] = filter_

    def start(self) -> None:
        self.calls.append(("start",))

    def stop(self) -> None:
        self.calls.append(("stop",))

    def wait(self, timeout_s: float, others: list[int]) -> None:
        if self._deliveries:
            self._ready = self._deliveries.pop(0)
        else:
            self.at_end()

    def pages(self, is_full: Callable[[bytes], bool] | None = None) -> Iterator[tuple[int, bytes]]:
        ready, self._ready = self._ready, []
        yield from ready

    def lost(self) -> Lost:
        return Lost(self._lost, 0, 0)

    def recorded(self) -> int:
        return 1000
