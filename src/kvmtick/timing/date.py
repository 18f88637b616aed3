"""Seconds since 1970 as a date in UTC, and back: what an RTC's registers are made of."""

from datetime import UTC, datetime
from typing import NamedTuple

__all__ = ["Date", "date_of", "seconds_of"]


class Date(NamedTuple):
    """The Gregorian calendar; `weekday` is 1 on Sundays."""

    year: int
    month: int
    day: int
    hour: int
    minute: int
    second: int
    weekday: int


def date_of(seconds: int) -> Date:
    """ValueError outside of the years 1 to 9999."""
    at = datetime.fromtimestamp(seconds, UTC)
    weekday = at.isoweekday() % 7 + 1
    return Date(at.year, at.month, at.day, at.hour, at.minute, at.second, weekday)


def seconds_of(year: int, month: int, day: int, hour: int, minute: int, second: int) -> int:
    """ValueError for what is no date."""
    return int(datetime(year, month, day, hour, minute, second, tzinfo=UTC).timestamp())
