"""What tests of several directories use; modules beside this one can be imported by all."""

import os
from collections.abc import Iterator

import compiled
import pytest
from eventfds import EventFd, MakeEventFd
from hypothesis import settings

# The same examples each time, so that a change is judged by what it changed; exploring is for those
# who have the time to look into what it finds. A busy host is no failure.
settings.register_profile("steady", deadline=None, print_blob=True, derandomize=True)
settings.register_profile("explore", deadline=None, print_blob=True)
settings.load_profile("explore" if os.environ.get("KVMTICK_EXPLORE") else "steady")


def pytest_configure() -> None:
    """Nothing is tested with compiled modules that are not what their sources say."""
    compiled.refuse_stale()


def pytest_report_header() -> str:
    return f"modules of kvmtick: {compiled.modules()}"


@pytest.fixture
def eventfd() -> Iterator[MakeEventFd]:
    """Makes eventfds, which are closed after the test."""
    made: list[EventFd] = []

    def make() -> EventFd:
        made.append(EventFd())
        return made[-1]

    yield make
    for each in made:
        each.close()
