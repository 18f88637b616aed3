"""Eventfds for the tests, as the conformance cases have them."""

from collections.abc import Callable

from kvmtick.conform.eventfds import LIMIT_S, EventFd, wait_for

__all__ = ["LIMIT_S", "EventFd", "MakeEventFd", "wait_for"]

MakeEventFd = Callable[[], EventFd]
