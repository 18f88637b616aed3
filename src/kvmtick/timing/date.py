"""Seconds since 1970 as a date in UTC, and back: what an RTC's registers are made of.

The Gregorian calendar, without an end in either direction: it repeats after 400 years.
"""

from datetime import UTC, datetime
from typing import Final, NamedTuple

__all__ = ["Date", "date_of", "seconds_of"]

CYCLE_YEARS: Final = 400
CYCLE_S: Final = 146_097 * 86_400
"""Whole weeks, too."""


class Date(NamedTuple):
    """`weekday` is 1 on Sundays."""

    year: int
    month: int
    day: int
    hour: int
    minute: int
    second: int
    weekday: int


def date_of(seconds: int) -> Date:
    """The date at that moment."""
    cycles, rest_s = divmod(seconds, CYCLE_S)
    at = datetime.fromtimestamp(rest_s, UTC)
    year = at.year + cycles * CYCLE_YEARS
    weekday = at.isoweekday() % 7 + 1
    return Date(year, at.month, at.day, at.hour, at.minute, at.second, weekday)


def seconds_of(year: int, month: int, day: int, hour: int, minute: int, second: int) -> int:
    """ValueError for what is no date."""
    cycles, rest = divmod(year, CYCLE_YEARS)
    at = datetime(CYCLE_YEARS + rest, month, day, hour, minute, second, tzinfo=UTC)
    return int(at.timestamp()) + (cycles - 1) * CYCLE_S
