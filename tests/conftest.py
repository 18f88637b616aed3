"""What tests of several directories use; modules beside this one can be imported by all."""

import os
from collections.abc import Iterator

import pytest
from eventfds import EventFd, MakeEventFd


@pytest.fixture
def eventfd() -> Iterator[MakeEventFd]:
    """Makes eventfds, which are closed after the test."""
    made: list[EventFd] = []

    def make() -> EventFd:
        made.append(EventFd())
        return made[-1]

    yield make
    for each in made:
        os.close(each.fd)
